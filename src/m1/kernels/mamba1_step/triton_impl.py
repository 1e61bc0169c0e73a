"""The Mamba-1 decoding step on a GPU: one kernel, states by slot, each read and written once.

A program serves a few groups of one sequence, with all query-side heads that share them: a convolution whose channels are
repeated afterwards must be stepped by one program only.

Bytes moved: a sequence's states twice, 2·(H·P·N + Dc·(W-1)) elements, and (4·H·P + 2·G·P) · 2 besides. Floor on an H100
at 3.0 TB/s, M1-3B dimensions (H = 192, G = 64, P = N = 16, Dc = 3072, W = 4), batch 512, fp32 SSM states and a bf16
window: 201 + 19 + 15 MB, 78 µs; the 25 M exponentials take 7 µs.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from m1.kernels.launch import with_unit_stride
from m1.kernels.triton_math import LOG2E, sigmoid, softplus


class StepConfig(NamedTuple):
    """Groups a program, and its warps."""

    groups: int = 2
    num_warps: int = 4


@torch.no_grad()
def mamba1_step(
    conv_state: Tensor,
    ssm_state: Tensor,
    z: Tensor,
    x: Tensor,
    B: Tensor,
    C: Tensor,
    dt: Tensor,
    conv_weight: Tensor,
    conv_bias: Tensor | None,
    A: Tensor,
    *,
    D: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = True,
    conv_activation: str | None = "silu",
    slots: Tensor | None = None,
    config: StepConfig | None = None,
) -> Tensor:
    """See m1.kernels.mamba1_step.mamba1_step; `config` overrides the launch sizes.

    A row whose slot is not one of the states' is skipped: no state changes, and its y is zero.
    """
    config = config or StepConfig()
    H, P, N = A.shape
    n, G, _ = x.shape
    z, x, B, C, dt = (with_unit_stride(tensor) for tensor in (z, x, B, C, dt))
    A = A.float().contiguous()
    D, dt_bias = (None if p is None else p.float().contiguous() for p in (D, dt_bias))
    y = torch.empty(n, H, P, dtype=x.dtype, device=x.device)
    rows = min(triton.next_power_of_2(P), max(1024 // triton.next_power_of_2(N), 1))
    grid = (triton.cdiv(G, config.groups) * triton.cdiv(P, rows), n)
    _step_kernel[grid](
        conv_state, ssm_state, z, x, B, C, dt, conv_weight.contiguous(), conv_bias, A, D, dt_bias, slots, y,
        *conv_state.stride(), *ssm_state.stride(), min(conv_state.shape[0], ssm_state.shape[0]),
        *z.stride()[:2], *x.stride()[:2], *B.stride()[:2], *C.stride()[:2], *dt.stride()[:2],
        G, H // G, P, N, triton.next_power_of_2(N), conv_weight.shape[1], config.groups, rows,
        CONV_AFTER_REPEAT=conv_weight.shape[0] == H * P and H != G,
        HAS_CONV_BIAS=conv_bias is not None, HAS_D=D is not None, HAS_BIAS=dt_bias is not None,
        HAS_SLOTS=slots is not None, SILU=conv_activation == "silu", SOFTPLUS=dt_softplus, num_warps=config.num_warps,
    )  # fmt: skip
    return y


@triton.jit
def _convolve(
    x_t, state_at, weight, bias, channel, exists, state_channel, state_place,
    WIDTH: tl.constexpr, HAS_BIAS: tl.constexpr, SILU: tl.constexpr,
):  # fmt: skip
    """The convolution's output at the new token, rounded to x's dtype as between separate ops; shifts the window."""
    out = x_t.to(tl.float32) * tl.load(weight + channel * WIDTH + (WIDTH - 1), mask=exists, other=0.0).to(tl.float32)
    if HAS_BIAS:
        out += tl.load(bias + channel, mask=exists, other=0.0).to(tl.float32)
    at = state_at + channel * state_channel
    for w in tl.static_range(WIDTH - 1):
        value = tl.load(at + w * state_place, mask=exists, other=0.0)
        out += value.to(tl.float32) * tl.load(weight + channel * WIDTH + w, mask=exists, other=0.0).to(tl.float32)
        if w > 0:
            tl.store(at + (w - 1) * state_place, value, mask=exists)
    if WIDTH > 1:
        tl.store(at + (WIDTH - 2) * state_place, x_t.to(state_at.dtype.element_ty), mask=exists)
    if SILU:
        out *= sigmoid(out)
    return out.to(x_t.dtype).to(tl.float32)


@triton.jit
def _step_kernel(
    conv_state, ssm_state, z, x, B, C, dt, conv_weight, conv_bias, A, D, dt_bias, slots, y,
    conv_slot, conv_channel, conv_place, ssm_slot, ssm_head, ssm_row, ssm_n, num_slots,
    z_row, z_head, x_row, x_head, b_row, b_head, c_row, c_head, dt_row, dt_head,
    G, REPEAT: tl.constexpr, P: tl.constexpr, N: tl.constexpr, BN: tl.constexpr, WIDTH: tl.constexpr,
    GB: tl.constexpr, PB: tl.constexpr, CONV_AFTER_REPEAT: tl.constexpr, HAS_CONV_BIAS: tl.constexpr,
    HAS_D: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_SLOTS: tl.constexpr, SILU: tl.constexpr, SOFTPLUS: tl.constexpr,
):  # fmt: skip
    """Grid (blocks of groups x blocks of rows, sequences); tiles [GB, PB, BN], one for each of a group's heads."""
    sequence = tl.program_id(1).to(tl.int64)
    slot = sequence
    if HAS_SLOTS:
        slot = tl.load(slots + sequence)
    blocks: tl.constexpr = (P + PB - 1) // PB
    group = (tl.program_id(0) // blocks * GB + tl.arange(0, GB))[:, None]
    row = (tl.program_id(0) % blocks * PB + tl.arange(0, PB))[None, :]
    n = tl.arange(0, BN)
    exists = (group < G) & (row < P)
    has_narrow = (group < G) & (n < N)[None, :]  # [GB, BN]
    has_element = exists[:, :, None] & (n < N)[None, None, :]
    y_at = y + sequence * (G * REPEAT * P)
    if (slot < 0) | (slot >= num_slots):
        for r in tl.static_range(REPEAT):
            tl.store(y_at + (group * REPEAT + r) * P + row, tl.zeros([GB, PB], y.dtype.element_ty), mask=exists)
        return
    window = conv_state + slot * conv_slot
    x_new = tl.load(x + sequence * x_row + group * x_head + row, mask=exists, other=0.0)
    b_t = tl.load(B + sequence * b_row + group * b_head + n[None, :], mask=has_narrow, other=0.0).to(tl.float32)
    if not CONV_AFTER_REPEAT:
        x_t = _convolve(
            x_new, window, conv_weight, conv_bias, group * P + row, exists, conv_channel, conv_place,
            WIDTH, HAS_CONV_BIAS, SILU,
        )  # fmt: skip
    for r in tl.static_range(REPEAT):
        head = group * REPEAT + r
        channel = head * P + row
        at = ssm_state + slot * ssm_slot + (head * ssm_head + row * ssm_row)[:, :, None] + n * ssm_n
        h = tl.load(at, mask=has_element, other=0.0).to(tl.float32)
        rate = tl.load(A + channel[:, :, None] * N + n, mask=has_element, other=0.0) * LOG2E
        delta = tl.load(dt + sequence * dt_row + head * dt_head + row, mask=exists, other=0.0).to(tl.float32)
        gate = tl.load(z + sequence * z_row + head * z_head + row, mask=exists, other=0.0).to(tl.float32)
        c_t = tl.load(C + sequence * c_row + head * c_head + n[None, :], mask=has_narrow, other=0.0).to(tl.float32)
        if CONV_AFTER_REPEAT:
            x_t = _convolve(
                x_new, window, conv_weight, conv_bias, channel, exists, conv_channel, conv_place,
                WIDTH, HAS_CONV_BIAS, SILU,
            )  # fmt: skip
        if HAS_BIAS:
            delta += tl.load(dt_bias + channel, mask=exists, other=0.0)
        if SOFTPLUS:
            delta = softplus(delta)
        h = tl.exp2(delta[:, :, None] * rate) * h + (delta * x_t)[:, :, None] * b_t[:, None, :]
        tl.store(at, h.to(ssm_state.dtype.element_ty), mask=has_element)
        out = tl.sum(h * c_t[:, None, :], axis=2)
        if HAS_D:
            out += tl.load(D + channel, mask=exists, other=0.0) * x_t
        tl.store(y_at + channel, (out * gate * sigmoid(gate)).to(y.dtype.element_ty), mask=exists)
