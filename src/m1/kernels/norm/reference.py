"""RMSNorm in torch: the truth for the kernels, and the CPU path."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def rms_norm(x: Tensor, weight: Tensor, eps: float, residual: Tensor | None = None) -> Any:
    """See m1.kernels.norm.rms_norm."""
    if residual is None:
        return _normalise(x, weight, eps)
    summed = x + residual
    return _normalise(summed, weight, eps), summed


@torch.no_grad()
def rms_norm_of_parts(parts: Tensor, weight: Tensor, eps: float, residual: Tensor) -> tuple[Tensor, Tensor]:
    """See m1.kernels.norm.rms_norm_of_parts."""
    return rms_norm(parts.sum(0).to(residual.dtype), weight, eps, residual)


def gated_rms_norm(x: Tensor, z: Tensor, weight: Tensor, eps: float) -> Tensor:
    """See m1.kernels.norm.gated_rms_norm."""
    gated = x.float() * F.silu(z.float())  # [T, H, P]
    normed = gated * torch.rsqrt(gated.square().mean(-1, keepdim=True) + eps)
    return (normed * weight.float().view(x.shape[1], x.shape[2])).to(x.dtype)


def _normalise(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    wide = x.float()
    normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return (weight * normed.to(x.dtype)).to(x.dtype)
