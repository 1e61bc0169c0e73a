"""Rotary position embedding in torch: the truth for the kernel, and the CPU path."""

import torch
from torch import Tensor


def apply_rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """See m1.kernels.rope.apply_rotary."""
    wide = x.float()  # [T, H, K]
    first, second = wide.chunk(2, -1)
    rotated = torch.cat([-second, first], -1)
    return (wide * cos.float()[:, None] + rotated * sin.float()[:, None]).to(x.dtype)
