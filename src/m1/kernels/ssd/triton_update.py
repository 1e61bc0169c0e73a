"""One decoding step of SSD on a GPU: states are read and written once, in place, by slot.

Bytes moved: 2·H·P·N state elements a sequence, and (2·H·P + H·N + 2·G·N) · 2 besides. Floors on an H100 at 3.0 TB/s, batch
512, fp32 states: M1-3B dimensions (H = 24, G = 8, P = N = 128) 1.61 GB, 540 µs; 0.5B (14, 2, 64) 235 MB, 80 µs; 135M
(9, 3, 64) 151 MB, 52 µs. bf16 states halve that.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from m1.kernels.launch import with_unit_stride
from m1.kernels.triton_math import LOG2E, softplus


class UpdateConfig(NamedTuple):
    """State elements a program, and its warps."""

    elements: int = 4096
    num_warps: int = 4


@torch.no_grad()
def ssd_state_update(
    ssm_state: Tensor,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    *,
    D: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = True,
    slots: Tensor | None = None,
    config: UpdateConfig | None = None,
) -> Tensor:
    """See m1.kernels.ssd.ssd_state_update; `config` overrides the launch sizes.

    A row whose slot is not one of the state's is skipped: no state changes, and its y is zero.
    """
    config = config or UpdateConfig()
    num_slots, H, P, N = ssm_state.shape
    x, B, C = (with_unit_stride(tensor) for tensor in (x, B, C))
    A = A.float().contiguous()
    D, dt_bias = (None if p is None else p.float().contiguous() for p in (D, dt_bias))
    y = torch.empty(x.shape[0], H, P, dtype=x.dtype, device=x.device)
    states = triton.next_power_of_2(N)
    rows = min(triton.next_power_of_2(P), max(config.elements // states, 1))
    _update_kernel[(H * triton.cdiv(P, rows), x.shape[0])](
        ssm_state, x, dt, A, B, C, D, dt_bias, slots, y, *ssm_state.stride(), num_slots,
        *x.stride()[:2], *dt.stride(), *B.stride()[:2], *C.stride()[:2],
        H, H // x.shape[1], H // B.shape[1], P, N, states, rows,
        HAS_D=D is not None, HAS_BIAS=dt_bias is not None, HAS_SLOTS=slots is not None, SOFTPLUS=dt_softplus,
        num_warps=config.num_warps,
    )  # fmt: skip
    return y


@triton.jit
def step_size(dt, dt_bias, head, HAS_BIAS: tl.constexpr, SOFTPLUS: tl.constexpr):
    """Δ of one head, whose step size before bias and softplus is at `dt`."""
    delta = tl.load(dt).to(tl.float32)
    if HAS_BIAS:
        delta += tl.load(dt_bias + head).to(tl.float32)
    if SOFTPLUS:
        delta = softplus(delta)
    return delta


@triton.jit
def _update_kernel(
    state, x, dt, A, B, C, D, dt_bias, slots, y, state_slot, state_head, state_row, state_n, num_slots,
    x_row, x_head, dt_row, dt_head, b_row, b_head, c_row, c_head, H, x_repeat, b_repeat,
    P: tl.constexpr, N: tl.constexpr, BN: tl.constexpr, PB: tl.constexpr,
    HAS_D: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_SLOTS: tl.constexpr, SOFTPLUS: tl.constexpr,
):  # fmt: skip
    """Grid (heads x blocks of rows, sequences); a program has a tile [PB, BN] of one state."""
    sequence = tl.program_id(1).to(tl.int64)
    slot = sequence
    if HAS_SLOTS:
        slot = tl.load(slots + sequence)
    blocks: tl.constexpr = (P + PB - 1) // PB
    head = tl.program_id(0) // blocks
    row = tl.program_id(0) % blocks * PB + tl.arange(0, PB)
    n = tl.arange(0, BN)
    y_at = y + (sequence * H + head) * P + row
    if (slot < 0) | (slot >= num_slots):
        tl.store(y_at, tl.zeros([PB], y.dtype.element_ty), mask=row < P)
        return
    has_element = (row < P)[:, None] & (n < N)[None, :]
    state_at = state + slot * state_slot + head.to(tl.int64) * state_head + row[:, None] * state_row + n[None, :] * state_n
    h = tl.load(state_at, mask=has_element, other=0.0).to(tl.float32)
    x_t = tl.load(x + sequence * x_row + head // x_repeat * x_head + row, mask=row < P, other=0.0).to(tl.float32)
    b_t = tl.load(B + sequence * b_row + head // b_repeat * b_head + n, mask=n < N, other=0.0).to(tl.float32)
    c_t = tl.load(C + sequence * c_row + head * c_head + n, mask=n < N, other=0.0).to(tl.float32)
    delta = step_size(dt + sequence * dt_row + head * dt_head, dt_bias, head, HAS_BIAS, SOFTPLUS)
    h = tl.exp2(delta * tl.load(A + head) * LOG2E) * h + (delta * x_t)[:, None] * b_t[None, :]
    tl.debug_barrier()  # threads may hold copies of one element: all have loaded before any stores
    tl.store(state_at, h.to(state.dtype.element_ty), mask=has_element)
    out = tl.sum(h * c_t[None, :], axis=1)
    if HAS_D:
        out += tl.load(D + head) * x_t
    tl.store(y_at, out.to(y.dtype.element_ty), mask=row < P)
