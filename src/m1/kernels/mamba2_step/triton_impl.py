"""The Mamba-2 decoding step on a GPU in two kernels: the convolution's, and one that reads and writes each SSM state once.

The convolution comes first and alone (causal_conv1d's kernel): x and B of a group are read by all heads that share them, and a
window may be shifted only when nobody will read it any more. In the second a program has a head of one sequence with its whole
state [P, N] in registers, so that the head's outputs are all there for gate and output norm.

Bytes moved: a sequence's states twice, 2·(H·P·N + Dc·(W-1)) elements, and (3·H·P + 3·Dc) · 2 besides. Floors on an H100 at
3.0 TB/s, batch 512, fp32 SSM states and a bf16 window of W = 4: M1-3B dimensions (H = 24, G = 8, P = N = 128, Dc = 5120)
1.67 GB, 556 µs; 0.5B (14, 2, 64) 247 MB, 82 µs; 135M (9, 3, 64) 160 MB, 53 µs.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from m1.kernels.causal_conv1d.triton_impl import causal_conv1d_update
from m1.kernels.launch import with_unit_stride
from m1.kernels.ssd.triton_update import step_size
from m1.kernels.triton_math import LOG2E, sigmoid

MAX_STATE = 2**16  # elements of a padded state that a program can hold in registers


class StepConfig(NamedTuple):
    """State elements a warp, which sets the warps of a program (1 to 16)."""

    elements: int = 2048


@torch.no_grad()
def mamba2_step(
    conv_state: Tensor,
    ssm_state: Tensor,
    z: Tensor,
    xBC: Tensor,
    dt: Tensor,
    conv_weight: Tensor,
    conv_bias: Tensor | None,
    A_log: Tensor,
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
    num_slots, H, P, N = ssm_state.shape
    G = (xBC.shape[1] - H * N) // (P + N)
    padded = triton.next_power_of_2(P), triton.next_power_of_2(N)
    size = padded[0] * padded[1]
    if size > MAX_STATE:
        raise ValueError(f"`ssm_state` must have heads of P·N <= {MAX_STATE} (each padded to a power of 2); given: {P}·{N}")
    channels = causal_conv1d_update(xBC, conv_state, conv_weight, conv_bias, activation=conv_activation, slots=slots)
    z = with_unit_stride(z)
    A_log = A_log.contiguous()
    D, dt_bias, norm_weight = (None if p is None else p.contiguous() for p in (D, dt_bias, norm_weight))
    y = torch.empty(len(xBC), H, P, dtype=xBC.dtype, device=xBC.device)
    _state_kernel[(H, len(xBC))](
        ssm_state, z, channels, dt, A_log, D, dt_bias, norm_weight, slots, y,
        *ssm_state.stride(), num_slots, *z.stride()[:2], channels.shape[1], *dt.stride(), norm_eps,
        H, G, H // G, P, N, *padded,
        HAS_D=D is not None, HAS_BIAS=dt_bias is not None, HAS_NORM=norm_weight is not None,
        HAS_SLOTS=slots is not None, SOFTPLUS=dt_softplus, num_warps=min(max(size // config.elements, 1), 16),
    )  # fmt: skip
    return y


@triton.jit
def _state_kernel(
    ssm_state, z, channels, dt, A_log, D, dt_bias, norm_weight, slots, y,
    state_slot, state_head, state_row, state_n, num_slots, z_row, z_head, channels_row, dt_row, dt_head, norm_eps,
    H, G, repeat, P: tl.constexpr, N: tl.constexpr, BP: tl.constexpr, BN: tl.constexpr,
    HAS_D: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_NORM: tl.constexpr, HAS_SLOTS: tl.constexpr, SOFTPLUS: tl.constexpr,
):  # fmt: skip
    """Grid (heads, sequences); `channels` [n, Dc] holds convolved x, B and C."""
    head = tl.program_id(0)
    sequence = tl.program_id(1).to(tl.int64)
    slot = sequence
    if HAS_SLOTS:
        slot = tl.load(slots + sequence)
    p, n = tl.arange(0, BP), tl.arange(0, BN)
    has_p, has_n = p < P, n < N
    has_element = has_p[:, None] & has_n[None, :]
    y_at = y + (sequence * H + head) * P + p
    if (slot < 0) | (slot >= num_slots):
        tl.store(y_at, tl.zeros([BP], y.dtype.element_ty), mask=has_p)
        return
    state_at = ssm_state + slot * state_slot + head.to(tl.int64) * state_head
    state_at += p[:, None] * state_row + n[None, :] * state_n
    h = tl.load(state_at, mask=has_element, other=0.0).to(tl.float32)
    group = head // repeat
    row = channels + sequence * channels_row
    x_t = tl.load(row + group * P + p, mask=has_p, other=0.0).to(tl.float32)
    b_t = tl.load(row + G * P + group * N + n, mask=has_n, other=0.0).to(tl.float32)
    c_t = tl.load(row + G * (P + N) + head * N + n, mask=has_n, other=0.0).to(tl.float32)
    gate = tl.load(z + sequence * z_row + head * z_head + p, mask=has_p, other=0.0).to(tl.float32)
    delta = step_size(dt + sequence * dt_row + head * dt_head, dt_bias, head, HAS_BIAS, SOFTPLUS)
    rate = -tl.exp2(tl.load(A_log + head).to(tl.float32) * LOG2E)
    h = tl.exp2(delta * rate * LOG2E) * h + (delta * x_t)[:, None] * b_t[None, :]
    tl.debug_barrier()  # threads may hold copies of one element: all have loaded before any stores
    tl.store(state_at, h.to(ssm_state.dtype.element_ty), mask=has_element)
    out = tl.sum(h * c_t[None, :], axis=1)
    if HAS_D:
        out += tl.load(D + head).to(tl.float32) * x_t
    out = out.to(y.dtype.element_ty).to(tl.float32) * gate * sigmoid(gate)  # rounded as between separate ops
    if HAS_NORM:
        scale = tl.rsqrt(tl.sum(out * out, axis=0) / P + norm_eps)
        out *= scale * tl.load(norm_weight + head * P + p, mask=has_p, other=0.0).to(tl.float32)
    tl.store(y_at, out.to(y.dtype.element_ty), mask=has_p)
