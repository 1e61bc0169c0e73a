"""The Mamba-2 decoding step on a GPU: one kernel, states by slot, each read and written once.

A program serves one group of one sequence: x and B of the group, and the query-side heads that share them one after the
other, each with its whole state [P, N] in registers. So every channel of the convolution is stepped by one program only, and
a head's outputs are all there for its output norm.

Bytes moved: a sequence's states twice, 2·(H·P·N + Dc·(W-1)) elements, and (3·H·P + 2·G·P + …) · 2 besides. Floors on an H100
at 3.0 TB/s, batch 512, fp32 SSM states and a bf16 window of W = 4: M1-3B dimensions (H = 24, G = 8, P = N = 128, Dc = 5120)
1.61 GB + 31 MB + 15 MB, 552 µs; 0.5B (14, 2, 64) 235 + 7 + 3 MB, 82 µs; 135M (9, 3, 64) 151 + 6 + 2 MB, 53 µs.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from m1.kernels.launch import with_unit_stride
from m1.kernels.ssd.triton_update import step_size_and_decay
from m1.kernels.triton_math import sigmoid

MAX_STATE = 2**16  # elements of a padded state that a program can hold in registers


class StepConfig(NamedTuple):
    """State elements a warp, which sets the warps of a program (1 to 16), and the stages of its loop over heads."""

    elements: int = 2048
    num_stages: int = 1


@torch.no_grad()
def mamba2_step(
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
    norm_weight: Tensor | None = None,
    norm_eps: float = 0.0,
    slots: Tensor | None = None,
    config: StepConfig | None = None,
) -> Tensor:
    """See m1.kernels.mamba2_step.mamba2_step; `config` overrides the launch sizes.

    A row whose slot is not one of the states' is skipped: no state changes, and its y is zero. Raises ValueError for states
    of more than MAX_STATE elements a head.
    """
    config = config or StepConfig()
    n, G, P = x.shape
    H, N = C.shape[1:]
    width = conv_weight.shape[1]
    padded = triton.next_power_of_2(P), triton.next_power_of_2(N)
    size = padded[0] * padded[1]
    if size > MAX_STATE:
        raise ValueError(f"`ssm_state` must have heads of P·N <= {MAX_STATE} (each padded to a power of 2); given: {P}·{N}")
    z, x, B, C = (with_unit_stride(tensor) for tensor in (z, x, B, C))
    A = A.float().contiguous()
    D, dt_bias = (None if p is None else p.float().contiguous() for p in (D, dt_bias))
    y = torch.empty(n, H, P, dtype=x.dtype, device=x.device)
    _step_kernel[(G, n)](
        conv_state, ssm_state, z, x, B, C, dt, conv_weight.contiguous(), conv_bias, A, D, dt_bias, norm_weight, slots, y,
        *conv_state.stride(), *ssm_state.stride(), min(conv_state.shape[0], ssm_state.shape[0]),
        *z.stride()[:2], *x.stride()[:2], *B.stride()[:2], *C.stride()[:2], *dt.stride(), norm_eps,
        G, H // G, P, N, *padded, width, triton.next_power_of_2(max(width - 1, 1)), config.num_stages,
        HAS_CONV_BIAS=conv_bias is not None, HAS_D=D is not None, HAS_BIAS=dt_bias is not None,
        HAS_NORM=norm_weight is not None, HAS_SLOTS=slots is not None, SILU=conv_activation == "silu",
        SOFTPLUS=dt_softplus, num_warps=min(max(size // config.elements, 1), 16),
    )  # fmt: skip
    return y


@triton.jit
def _convolve(
    newest, window, weight, bias, channel, exists, state_channel, state_place,
    WIDTH: tl.constexpr, TAPS: tl.constexpr, HAS_BIAS: tl.constexpr, SILU: tl.constexpr,
):  # fmt: skip
    """The convolution's output at the new token, rounded to x's dtype as between separate ops; shifts the window."""
    tap = tl.arange(0, TAPS)[:, None]
    is_past = exists[None, :] & (tap < WIDTH - 1)
    at = window + channel[None, :] * state_channel + tap * state_place
    past = tl.load(at, mask=is_past, other=0.0)
    taps = tl.load(weight + channel[None, :] * WIDTH + tap, mask=is_past, other=0.0).to(tl.float32)
    out = newest.to(tl.float32) * tl.load(weight + channel * WIDTH + (WIDTH - 1), mask=exists, other=0.0).to(tl.float32)
    out += tl.sum(past.to(tl.float32) * taps, axis=0)
    if HAS_BIAS:
        out += tl.load(bias + channel, mask=exists, other=0.0).to(tl.float32)
    if SILU:
        out *= sigmoid(out)
    # There are more threads than channels: several read the same window, and none may write before all have read.
    tl.debug_barrier()
    tl.store(at - state_place, past, mask=is_past & (tap > 0))
    if WIDTH > 1:
        newest_at = window + channel * state_channel + (WIDTH - 2) * state_place
        tl.store(newest_at, newest.to(window.dtype.element_ty), mask=exists)
    return out.to(newest.dtype).to(tl.float32)


@triton.jit
def _step_kernel(
    conv_state, ssm_state, z, x, B, C, dt, conv_weight, conv_bias, A, D, dt_bias, norm_weight, slots, y,
    conv_slot, conv_channel, conv_place, ssm_slot, ssm_head, ssm_row, ssm_n, num_slots,
    z_row, z_head, x_row, x_head, b_row, b_head, c_row, c_head, dt_row, dt_head, norm_eps,
    G, REPEAT: tl.constexpr, P: tl.constexpr, N: tl.constexpr, BP: tl.constexpr, BN: tl.constexpr, WIDTH: tl.constexpr,
    TAPS: tl.constexpr, STAGES: tl.constexpr, HAS_CONV_BIAS: tl.constexpr, HAS_D: tl.constexpr, HAS_BIAS: tl.constexpr,
    HAS_NORM: tl.constexpr, HAS_SLOTS: tl.constexpr, SILU: tl.constexpr, SOFTPLUS: tl.constexpr,
):  # fmt: skip
    """Grid (groups, sequences)."""
    group = tl.program_id(0)
    sequence = tl.program_id(1).to(tl.int64)
    slot = sequence
    if HAS_SLOTS:
        slot = tl.load(slots + sequence)
    p, n = tl.arange(0, BP), tl.arange(0, BN)
    has_p, has_n = p < P, n < N
    has_element = has_p[:, None] & has_n[None, :]
    y_at = y + (sequence * G + group) * (REPEAT * P) + p
    if (slot < 0) | (slot >= num_slots):
        for member in range(REPEAT):
            tl.store(y_at + member * P, tl.zeros([BP], y.dtype.element_ty), mask=has_p)
        return
    window = conv_state + slot * conv_slot
    x_t = _convolve(
        tl.load(x + sequence * x_row + group * x_head + p, mask=has_p, other=0.0),
        window, conv_weight, conv_bias, group * P + p, has_p, conv_channel, conv_place,
        WIDTH, TAPS, HAS_CONV_BIAS, SILU,
    )  # fmt: skip
    b_t = _convolve(
        tl.load(B + sequence * b_row + group * b_head + n, mask=has_n, other=0.0),
        window, conv_weight, conv_bias, G * P + group * N + n, has_n, conv_channel, conv_place,
        WIDTH, TAPS, HAS_CONV_BIAS, SILU,
    )  # fmt: skip
    state_at = ssm_state + slot * ssm_slot + p[:, None] * ssm_row + n[None, :] * ssm_n
    for member in tl.range(0, REPEAT, num_stages=STAGES):
        head = group * REPEAT + member
        at = state_at + head.to(tl.int64) * ssm_head
        h = tl.load(at, mask=has_element, other=0.0).to(tl.float32)
        c_t = _convolve(
            tl.load(C + sequence * c_row + head * c_head + n, mask=has_n, other=0.0),
            window, conv_weight, conv_bias, G * (P + N) + head * N + n, has_n, conv_channel, conv_place,
            WIDTH, TAPS, HAS_CONV_BIAS, SILU,
        )  # fmt: skip
        delta, decay = step_size_and_decay(dt + sequence * dt_row, dt_bias, A, head, dt_head, HAS_BIAS, SOFTPLUS)
        h = decay * h + (delta * x_t)[:, None] * b_t[None, :]
        tl.store(at, h.to(ssm_state.dtype.element_ty), mask=has_element)
        out = tl.sum(h * c_t[None, :], axis=1)
        if HAS_D:
            out += tl.load(D + head) * x_t
        gate = tl.load(z + sequence * z_row + head * z_head + p, mask=has_p, other=0.0).to(tl.float32)
        out = out.to(y.dtype.element_ty).to(tl.float32) * gate * sigmoid(gate)  # rounded as between separate ops
        if HAS_NORM:
            scale = tl.rsqrt(tl.sum(out * out, axis=0) / P + norm_eps)
            out *= scale * tl.load(norm_weight + head * P + p, mask=has_p, other=0.0).to(tl.float32)
        tl.store(y_at + member * P, out.to(y.dtype.element_ty), mask=has_p)
