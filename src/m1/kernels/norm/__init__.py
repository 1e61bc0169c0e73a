"""RMSNorm, alone or fused with a residual addition or a SiLU gate: checks and dispatch."""

from typing import Any

import torch
from torch import Tensor

from m1.kernels.dispatch import implementation_for, is_like, require, require_rank, require_tensor


def rms_norm(x: Tensor, weight: Tensor, eps: float, residual: Tensor | None = None) -> Any:
    """Normalise the last dimension by its root mean square (Zhang & Sennrich 2019, arXiv 1910.07467).

    Numerics as in Hugging Face's LlamaRMSNorm: statistics in fp32, weight · (normed, cast to x's dtype).

    Args:
        x: [..., D]; weight: [D]; eps: added to the mean square; residual: like x, added first.
    Returns:
        y like x, or with a residual (y, x + residual). Differentiable.
    Raises:
        ValueError: for a wrong shape, dtype, device or a negative eps.
    """
    if not (x.dim() > 0 and x.is_floating_point()):
        require(False, "x", "a floating tensor [..., D]", f"{x.dtype} {list(x.shape)}")
    require_tensor("weight", weight, "D", x.shape[-1:], x)
    require(eps >= 0, "eps", "at least 0", eps)
    if residual is not None and not is_like(residual, x.shape, x, (x.dtype,)):
        layout = " ".join(["..."] * (x.dim() - 1) + ["D"])
        require_tensor("residual", residual, layout, x.shape, x, (x.dtype,))
    implementation = implementation_for(x, __name__)
    return implementation.rms_norm(x, weight, eps, residual)


def rms_norm_of_parts(parts: Tensor, weight: Tensor, eps: float, residual: Tensor) -> tuple[Tensor, Tensor]:
    """rms_norm of the sum of parts, rounded to residual's dtype as if it had been stored, with that residual; no gradient.

    Args:
        parts: [S, T, D] fp32 (or wider), such as decode_linear_parts leaves; weight: [D]; residual: [T, D].
    Returns:
        (y, the sum of parts and residual), like residual.
    Raises:
        ValueError: for a wrong shape, dtype, device or a negative eps.
    """
    check_parts(parts, weight, eps, residual)
    return implementation_for(parts, __name__).rms_norm_of_parts(parts, weight, eps, residual)


def check_parts(parts: Tensor, weight: Tensor, eps: float, residual: Tensor) -> None:
    """What the norms of parts require: see rms_norm_of_parts."""
    require_rank("parts", parts, "S T D")
    require_tensor("parts", parts, "S T D", parts.shape, parts, (torch.float32, torch.float64))
    require_tensor("weight", weight, "D", parts.shape[-1:], parts)
    require_tensor("residual", residual, "T D", parts.shape[1:], parts)
    require(eps >= 0, "eps", "at least 0", eps)


def gated_rms_norm(x: Tensor, z: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Normalise x · silu(z) within each head (the output norm of Mamba-2; one group a head).

    Args:
        x, z: [T, H, P]; weight: [H·P]; eps: added to the mean square.
    Returns:
        [T, H, P] in x's dtype, computed in fp32. Differentiable.
    Raises:
        ValueError: for a wrong shape, dtype, device or a negative eps.
    """
    require_rank("x", x, "T H P")
    require_tensor("z", z, "T H P", x.shape, x)
    require_tensor("weight", weight, "H·P", (x.shape[1] * x.shape[2],), x)
    require(eps >= 0, "eps", "at least 0", eps)
    implementation = implementation_for(x, __name__)
    return implementation.gated_rms_norm(x, z, weight, eps)
