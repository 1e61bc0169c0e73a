"""Products of 8-bit numbers (e4m3) with a scale a row: quantisation, alone or fused into what comes before, and the product.

A row of activations (one token) and a row of a weight (one output channel) each have an fp32 scale, so that the largest
magnitude of the row becomes 448, the largest e4m3 number (arXiv 2209.05433). Checks and dispatch; no arithmetic here.
Without gradient.
"""

from typing import Any

import torch
from torch import Tensor

from m1.kernels.decode_linear import MAX_TOKENS
from m1.kernels.dispatch import implementation_for, require, require_rank, require_tensor
from m1.kernels.norm import check_parts

FP8 = torch.float8_e4m3fn
ALIGNMENT = 16  # what the sizes of a product must be multiples of, as the hardware's 16-byte accesses want it


def quantize_fp8(x: Tensor) -> tuple[Tensor, Tensor]:
    """Round each row to e4m3 numbers times a scale: x ≈ values · scale.

    Args:
        x: [T, K] in any floating dtype: tokens, or the output channels of a weight.
    Returns:
        values [T, K] float8_e4m3fn; scale [T, 1] fp32, the row's largest magnitude / 448.
    Raises:
        ValueError: for a wrong shape or dtype.
    """
    require_rank("x", x, "T K")
    return implementation_for(x, __name__).quantize_fp8(x)


def rms_norm_fp8(x: Tensor, weight: Tensor, eps: float, residual: Tensor | None = None) -> Any:
    """rms_norm (its numerics, rounding to x's dtype included), then quantize_fp8, in one launch.

    Args:
        x: [T, D]; weight: [D]; eps: added to the mean square; residual: like x, added first.
    Returns:
        (values, scale) as quantize_fp8, or with a residual (values, scale, x + residual).
    Raises:
        ValueError: for a wrong shape, dtype, device or a negative eps.
    """
    require_rank("x", x, "T D")
    require_tensor("weight", weight, "D", x.shape[-1:], x)
    require(eps >= 0, "eps", "at least 0", eps)
    if residual is not None:
        require_tensor("residual", residual, "T D", x.shape, x, (x.dtype,))
    return implementation_for(x, __name__).rms_norm_fp8(x, weight, eps, residual)


def rms_norm_fp8_of_parts(parts: Tensor, weight: Tensor, eps: float, residual: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """rms_norm_of_parts (its arguments and errors), then quantize_fp8, in one launch: (values, scale, the sum)."""
    check_parts(parts, weight, eps, residual)
    return implementation_for(parts, __name__).rms_norm_fp8_of_parts(parts, weight, eps, residual)


def swiglu_fp8(gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    """quantize_fp8 of silu(gate) · up, in one launch.

    Args:
        gate, up: [T, I], possibly halves of one projection.
    Returns:
        (values, scale) as quantize_fp8.
    Raises:
        ValueError: for a wrong shape, dtype or device.
    """
    require_rank("gate", gate, "T I")
    require_tensor("up", up, "T I", gate.shape, gate, (gate.dtype,))
    return implementation_for(gate, __name__).swiglu_fp8(gate, up)


def fp8_linear(
    x: Tensor,
    x_scale: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None = None,
    out_dtype: torch.dtype = torch.bfloat16,
) -> Tensor:
    """y = (x · x_scale) @ (weight · weight_scale).T + bias, accumulated in fp32.

    Args:
        x: [T, K] and weight: [N, K] float8_e4m3fn, contiguous, K and N multiples of 16.
        x_scale: [T, 1]; weight_scale: [N, 1]; fp32. bias: [N] in any floating dtype.
        out_dtype: bfloat16, or float32 (on a CPU alone).
    Returns:
        y [T, N] in out_dtype.
    Raises:
        ValueError: for a wrong shape, dtype, device, layout or size.
    """
    _check_product(x, x_scale, weight, weight_scale, bias)
    dtypes = (torch.bfloat16, torch.float32) if x.device.type == "cpu" else (torch.bfloat16,)
    require(out_dtype in dtypes, "out_dtype", f"one of {dtypes} on {x.device.type}", out_dtype)
    return implementation_for(x, __name__).fp8_linear(x, x_scale, weight, weight_scale, bias, out_dtype)


def fp8_linear_parts(x: Tensor, x_scale: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None = None) -> Tensor:
    """As fp8_linear of at most MAX_TOKENS tokens, in parts [S, T, N] fp32 that must be added up; see decode_linear_parts."""
    _check_product(x, x_scale, weight, weight_scale, bias)
    require(0 < x.shape[0] <= MAX_TOKENS, "x", f"of 1 to {MAX_TOKENS} tokens", list(x.shape))
    return implementation_for(x, __name__).fp8_linear_parts(x, x_scale, weight, weight_scale, bias)


def _check_product(x: Tensor, x_scale: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None) -> None:
    require_rank("x", x, "T K")
    require_rank("weight", weight, "N K")
    (num_tokens, width), num_outputs = x.shape, weight.shape[0]
    require_tensor("x", x, "T K", x.shape, x, (FP8,))
    require_tensor("weight", weight, "N K", (num_outputs, width), x, (FP8,))
    require(width % ALIGNMENT == 0, "x", f"of a width K that {ALIGNMENT} divides", width)
    require(num_outputs % ALIGNMENT == 0, "weight", f"of N output channels that {ALIGNMENT} divides", num_outputs)
    for name, tensor in (("x", x), ("weight", weight)):
        require(tensor.is_contiguous(), name, "contiguous", f"strides {tensor.stride()}")
    require_tensor("x_scale", x_scale, "T 1", (num_tokens, 1), x, (torch.float32,))
    require_tensor("weight_scale", weight_scale, "N 1", (num_outputs, 1), x, (torch.float32,))
    if bias is not None:
        require_tensor("bias", bias, "N", (num_outputs,), x)
