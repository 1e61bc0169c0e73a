"""Rotary embedding on CUDA, forward and backward: one program a token, all heads at once, so angles are read once.

The backward of a rotation is the rotation with the halves' roles exchanged (exact also where the two halves of cos and sin
hold different angles). Bytes moved: 2 · H · K elements a token plus 2 · K of angles. Floor on an H100 at 3.0 TB/s, bf16,
16,384 tokens of 24 heads of 128: 0.21 GB, 0.070 ms. Decoding rotates while it writes the cache (attention/triton_impl.py).
rotary_state_heads moves the same bytes: the pairs are dealt out between the registers of a program.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from m1.kernels.launch import next_power_of_2, with_unit_stride


@triton.jit
def _rotary_kernel(
    x_ptr, cos_ptr, sin_ptr, y_ptr, stride_t, stride_h, cos_stride, sin_stride,
    H: tl.constexpr, HALF: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_HALF: tl.constexpr, IS_BACKWARD: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    half = tl.arange(0, BLOCK_HALF)
    heads = tl.arange(0, BLOCK_H)
    in_half = half < HALF
    mask = (heads < H)[:, None] & in_half[None, :]
    c1 = tl.load(cos_ptr + token * cos_stride + half, mask=in_half, other=0.0).to(tl.float32)[None, :]
    c2 = tl.load(cos_ptr + token * cos_stride + HALF + half, mask=in_half, other=0.0).to(tl.float32)[None, :]
    s1 = tl.load(sin_ptr + token * sin_stride + half, mask=in_half, other=0.0).to(tl.float32)[None, :]
    s2 = tl.load(sin_ptr + token * sin_stride + HALF + half, mask=in_half, other=0.0).to(tl.float32)[None, :]
    offsets = token * stride_t + heads[:, None] * stride_h + half[None, :]
    a = tl.load(x_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    b = tl.load(x_ptr + offsets + HALF, mask=mask, other=0.0).to(tl.float32)
    if IS_BACKWARD:  # the transposed matrix
        first, second = a * c1 + b * s2, b * c2 - a * s1
    else:
        first, second = a * c1 - b * s1, b * c2 + a * s2
    out = (token * H + heads[:, None]) * (2 * HALF) + half[None, :]
    tl.store(y_ptr + out, first.to(y_ptr.dtype.element_ty), mask=mask)
    tl.store(y_ptr + out + HALF, second.to(y_ptr.dtype.element_ty), mask=mask)


def _launch(x: Tensor, cos: Tensor, sin: Tensor, is_backward: bool) -> Tensor:
    num_tokens, num_heads, width = x.shape
    x = with_unit_stride(x)
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    with torch.cuda.device_of(x):
        _rotary_kernel[(num_tokens,)](
            x, cos, sin, y, *x.stride()[:2], cos.stride(0), sin.stride(0),
            H=num_heads, HALF=width // 2, BLOCK_H=next_power_of_2(num_heads),
            BLOCK_HALF=next_power_of_2(width // 2), IS_BACKWARD=is_backward, num_warps=4,
        )  # fmt: skip
    return y


class _Rotary(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _launch(x, cos, sin, is_backward=False)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Any:
        cos, sin = ctx.saved_tensors
        return _launch(dy, cos, sin, is_backward=True), None, None


def apply_rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate each head of x [T, H, K] by its token's angles; differentiable in x; the public op's contract."""
    cos, sin = with_unit_stride(cos), with_unit_stride(sin)
    if torch.is_grad_enabled() and x.requires_grad:
        return _Rotary.apply(x, cos, sin)
    return _launch(x, cos, sin, is_backward=False)


@triton.jit
def _state_heads_kernel(
    x_ptr, cos_ptr, sin_ptr, y_ptr, x_stride_t, x_stride_h, cos_stride, sin_stride,
    H: tl.constexpr, MEMBERS: tl.constexpr, PAIRS: tl.constexpr, NARROW: tl.constexpr,
    BLOCK_H: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr, IS_BACKWARD: tl.constexpr,
):  # fmt: skip
    """x [T, H, 2, PAIRS, NARROW] and y [T, H / MEMBERS, NARROW, MEMBERS, 2, PAIRS]; backward reads gradients as y, writes x."""
    token = tl.program_id(0).to(tl.int64)
    HALF: tl.constexpr = PAIRS * NARROW
    heads = tl.arange(0, BLOCK_H)[:, None, None]
    pairs = tl.arange(0, BLOCK_P)[None, :, None]
    narrow = tl.arange(0, BLOCK_N)[None, None, :]
    column = pairs * NARROW + narrow
    in_half = (pairs < PAIRS) & (narrow < NARROW)
    mask = (heads < H) & in_half  # tiles [BLOCK_H, BLOCK_P, BLOCK_N]
    c1 = tl.load(cos_ptr + token * cos_stride + column, mask=in_half, other=0.0).to(tl.float32)
    c2 = tl.load(cos_ptr + token * cos_stride + HALF + column, mask=in_half, other=0.0).to(tl.float32)
    s1 = tl.load(sin_ptr + token * sin_stride + column, mask=in_half, other=0.0).to(tl.float32)
    s2 = tl.load(sin_ptr + token * sin_stride + HALF + column, mask=in_half, other=0.0).to(tl.float32)
    x_at = token * x_stride_t + heads * x_stride_h + column
    # the same in the order of y, pairs last: [BLOCK_H, BLOCK_N, BLOCK_P]
    y_narrow = tl.arange(0, BLOCK_N)[None, :, None]
    y_pairs = tl.arange(0, BLOCK_P)[None, None, :]
    y_mask = (heads < H) & (y_narrow < NARROW) & (y_pairs < PAIRS)
    row = (heads // MEMBERS * NARROW + y_narrow) * MEMBERS + heads % MEMBERS
    y_at = token * (2 * H * HALF) + row * (2 * PAIRS) + y_pairs
    if IS_BACKWARD:
        a = tl.permute(tl.load(y_ptr + y_at, mask=y_mask, other=0.0).to(tl.float32), (0, 2, 1))
        b = tl.permute(tl.load(y_ptr + y_at + PAIRS, mask=y_mask, other=0.0).to(tl.float32), (0, 2, 1))
        tl.store(x_ptr + x_at, (a * c1 + b * s2).to(x_ptr.dtype.element_ty), mask=mask)
        tl.store(x_ptr + x_at + HALF, (b * c2 - a * s1).to(x_ptr.dtype.element_ty), mask=mask)
    else:
        a = tl.load(x_ptr + x_at, mask=mask, other=0.0).to(tl.float32)
        b = tl.load(x_ptr + x_at + HALF, mask=mask, other=0.0).to(tl.float32)
        first = (a * c1 - b * s1).to(y_ptr.dtype.element_ty)
        second = (b * c2 + a * s2).to(y_ptr.dtype.element_ty)
        tl.store(y_ptr + y_at, tl.permute(first, (0, 2, 1)), mask=y_mask)
        tl.store(y_ptr + y_at + PAIRS, tl.permute(second, (0, 2, 1)), mask=y_mask)


def _launch_state_heads(x: Tensor, cos: Tensor, sin: Tensor, y: Tensor, num_groups: int, is_backward: bool) -> None:
    num_tokens, num_heads, head_width = x.shape
    pairs = y.shape[2] // 2
    narrow = head_width // y.shape[2]
    with torch.cuda.device_of(x):
        _state_heads_kernel[(num_tokens,)](
            x, cos, sin, y, *x.stride()[:2], cos.stride(0), sin.stride(0),
            H=num_heads, MEMBERS=num_heads // num_groups, PAIRS=pairs, NARROW=narrow,
            BLOCK_H=next_power_of_2(num_heads), BLOCK_P=next_power_of_2(pairs),
            BLOCK_N=next_power_of_2(narrow), IS_BACKWARD=is_backward, num_warps=4,
        )  # fmt: skip


class _RotaryStateHeads(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor, num_groups: int, width: int) -> Tensor:
        ctx.save_for_backward(cos, sin)
        ctx.shape, ctx.num_groups = x.shape, num_groups
        y = torch.empty(x.shape[0], x.shape[1] * x.shape[2] // width, width, dtype=x.dtype, device=x.device)
        _launch_state_heads(with_unit_stride(x), cos, sin, y, num_groups, is_backward=False)
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Any:
        cos, sin = ctx.saved_tensors
        dx = torch.empty(ctx.shape, dtype=dy.dtype, device=dy.device)
        _launch_state_heads(dx, cos, sin, dy.contiguous(), ctx.num_groups, is_backward=True)
        return dx, None, None, None, None


def rotary_state_heads(x: Tensor, cos: Tensor, sin: Tensor, *, num_groups: int, width: int) -> Tensor:
    """See m1.kernels.rope.rotary_state_heads."""
    return _RotaryStateHeads.apply(x, with_unit_stride(cos), with_unit_stride(sin), num_groups, width)
