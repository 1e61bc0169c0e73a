"""8-bit quantisation and products in torch: the truth for the kernels, and the CPU path (which gains no speed from 8 bits)."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from m1.kernels.norm.reference import rms_norm, rms_norm_of_parts

LARGEST = torch.finfo(torch.float8_e4m3fn).max  # 448
SMALLEST_SCALE = 1e-12  # of a row of zeros


@torch.no_grad()
def quantize_fp8(x: Tensor) -> tuple[Tensor, Tensor]:
    """See m1.kernels.fp8.quantize_fp8."""
    wide = x.float()
    scale = (wide.abs().amax(-1, keepdim=True) / LARGEST).clamp_min(SMALLEST_SCALE)
    return (wide / scale).clamp(-LARGEST, LARGEST).to(torch.float8_e4m3fn), scale


@torch.no_grad()
def rms_norm_fp8(x: Tensor, weight: Tensor, eps: float, residual: Tensor | None = None) -> Any:
    """See m1.kernels.fp8.rms_norm_fp8."""
    if residual is None:
        return quantize_fp8(rms_norm(x, weight, eps))
    normed, summed = rms_norm(x, weight, eps, residual)
    return *quantize_fp8(normed), summed


@torch.no_grad()
def rms_norm_fp8_of_parts(parts: Tensor, weight: Tensor, eps: float, residual: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """See m1.kernels.fp8.rms_norm_fp8_of_parts."""
    normed, summed = rms_norm_of_parts(parts, weight, eps, residual)
    return *quantize_fp8(normed), summed


@torch.no_grad()
def swiglu_fp8(gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    """See m1.kernels.fp8.swiglu_fp8."""
    return quantize_fp8(F.silu(gate.float()) * up.float())


@torch.no_grad()
def fp8_linear(
    x: Tensor,
    x_scale: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None = None,
    out_dtype: torch.dtype = torch.bfloat16,
) -> Tensor:
    """See m1.kernels.fp8.fp8_linear."""
    y = (x.float() @ weight.float().t()) * x_scale * weight_scale.t()
    return (y if bias is None else y + bias.float()).to(out_dtype)


@torch.no_grad()
def fp8_linear_parts(x: Tensor, x_scale: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None = None) -> Tensor:
    """See m1.kernels.fp8.fp8_linear_parts; one part."""
    return fp8_linear(x, x_scale, weight, weight_scale, bias, torch.float32)[None]
