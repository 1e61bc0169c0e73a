"""Rotary position embedding in torch: the truth for the kernels, and the CPU path."""

import torch
from torch import Tensor

from m1.kernels import rope


def apply_rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """See m1.kernels.rope.apply_rotary."""
    wide = x.float()  # [T, H, K]
    first, second = wide.chunk(2, -1)
    rotated = torch.cat([-second, first], -1)
    return (wide * cos.float()[:, None] + rotated * sin.float()[:, None]).to(x.dtype)


def rotary_state_heads(x: Tensor, cos: Tensor, sin: Tensor, *, num_groups: int, width: int) -> Tensor:
    """See m1.kernels.rope.rotary_state_heads. Rotates by the public op: on a GPU, where this may serve, by its kernel."""
    rotated = rope.apply_rotary(x, cos, sin).unflatten(-1, (2, width // 2, -1)).unflatten(1, (num_groups, -1))
    return rotated.permute(0, 1, 5, 2, 3, 4).reshape(x.shape[0], -1, width)  # of [T, group, member, half, pair, narrow head]
