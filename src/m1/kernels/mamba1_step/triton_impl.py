"""The Mamba-1 decoding step on a GPU: one kernel, states by slot, each read and written once. States of 16 bits have a
kernel of their own, in triton_half_states.py.

A program serves some groups of one sequence, with all query-side heads that share their windows, one member of each group
after the other: so a tile has no padding whatever H/G is, and what members share is loaded once.

A tile may have fewer elements than the program has threads. Then several threads hold the same element: all of them load
it, one of them stores it, and nothing orders the store of one after the load of another. So a state is loaded before a
barrier and stored after it: a window once all members have been served, the SSM states where a tile is that small.

Bytes moved: a sequence's states twice, 2·(H·P·N + G·P·(W-1)) elements, and (4·H·P + 2·G·P) · 2 besides. Floor on an H100
at 3.0 TB/s, M1-3B dimensions (H = 192, G = 64, P = N = 16, W = 4), batch 512, fp32 SSM states and a bf16 window:
201 + 6 + 15 MB, 74 µs (bf16 states 41 µs). About 25 instructions an element of the states take 20 µs of issue slots.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from m1.kernels.launch import chaining, wait_for_previous, with_unit_stride
from m1.kernels.mamba1_step.triton_half_states import half_states_kernel
from m1.kernels.triton_math import LOG2E, sigmoid, softplus


class StepConfig(NamedTuple):
    """Groups a program, its warps, the most registers a thread (None: as many as the compiler likes), the most channels of a
    head a program, and whether all is loaded before anything is computed.
    """

    groups: int = 2
    num_warps: int = 1
    max_registers: int | None = None
    channels: int = 64
    loads_first: bool = False


def choose_config(state_dtype: torch.dtype) -> StepConfig:
    """The launch for SSM states of that dtype."""
    return StepConfig(loads_first=state_dtype.itemsize == 2)


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
    A_log: Tensor,
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
    H, P, N = A_log.shape
    n, G, _ = x.shape
    config = config or choose_config(ssm_state.dtype)
    width = conv_weight.shape[1]
    z, x, B, C, dt = (with_unit_stride(tensor) for tensor in (z, x, B, C, dt))
    conv_weight, A_log = conv_weight.contiguous(), A_log.contiguous()
    D, dt_bias, conv_bias = (None if p is None else p.contiguous() for p in (D, dt_bias, conv_bias))
    y = torch.empty(n, H, P, dtype=x.dtype, device=x.device)
    block_n = triton.next_power_of_2(N)
    rows = min(triton.next_power_of_2(P), config.channels, max(1024 // block_n, 1))
    kernel, sizes = half_states_kernel, {}
    if not config.loads_first:
        kernel, sizes = _step_kernel, {"BW": triton.next_power_of_2(max(width - 1, 1))}
    grid = (triton.cdiv(G, config.groups) * triton.cdiv(P, rows), n)
    with torch.cuda.device_of(x):
        kernel[grid](
            conv_state, ssm_state, z, x, B, C, dt, conv_weight, conv_bias, A_log, D, dt_bias, slots, y,
            *conv_state.stride(), *ssm_state.stride(), min(conv_state.shape[0], ssm_state.shape[0]),
            *z.stride()[:2], *x.stride()[:2], *B.stride()[:2], *C.stride()[:2], *dt.stride()[:2],
            G, H // G, P, N, block_n, width, config.groups, rows, **sizes,
            OWN_FILTERS=conv_weight.shape[0] == H * P, HAS_CONV_BIAS=conv_bias is not None,
            HAS_D=D is not None, HAS_BIAS=dt_bias is not None, HAS_SLOTS=slots is not None,
            SILU=conv_activation == "silu", SOFTPLUS=dt_softplus,
            IS_SMALL=config.groups * rows * block_n < 32 * config.num_warps, num_warps=config.num_warps,
            maxnreg=config.max_registers, **chaining(x.device),
        )  # fmt: skip
    return y


@triton.jit
def _step_kernel(
    conv_state, ssm_state, z, x, B, C, dt, conv_weight, conv_bias, A_log, D, dt_bias, slots, y,
    conv_slot, conv_channel, conv_place, ssm_slot, ssm_head, ssm_row, ssm_n, num_slots,
    z_row, z_head, x_row, x_head, b_row, b_head, c_row, c_head, dt_row, dt_head,
    G, REPEAT: tl.constexpr, P: tl.constexpr, N: tl.constexpr, BN: tl.constexpr, WIDTH: tl.constexpr,
    GB: tl.constexpr, PB: tl.constexpr, BW: tl.constexpr, OWN_FILTERS: tl.constexpr,
    HAS_CONV_BIAS: tl.constexpr, HAS_D: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_SLOTS: tl.constexpr,
    SILU: tl.constexpr, SOFTPLUS: tl.constexpr, IS_SMALL: tl.constexpr, IS_CHAINED: tl.constexpr,
):  # fmt: skip
    """Grid (blocks of GB groups x blocks of PB rows, sequences); tiles [GB, PB, BN].

    OWN_FILTERS: every head has its own filter (else one a group).
    """
    wait_for_previous(IS_CHAINED)
    blocks: tl.constexpr = (P + PB - 1) // PB
    group = (tl.program_id(0) // blocks * GB + tl.arange(0, GB))[:, None]
    row = (tl.program_id(0) % blocks * PB + tl.arange(0, PB))[None, :]
    n = tl.arange(0, BN)[None, None, :]
    w = tl.arange(0, BW)[None, None, :]
    sequence = tl.program_id(1) + tl.zeros([1, 1], tl.int64)
    source = group * P + row
    slot = sequence
    if HAS_SLOTS:
        slot = tl.load(slots + sequence)
    is_group = (group < G) & (slot >= 0) & (slot < num_slots)  # [GB, 1]
    exists = is_group & (row < P)
    has_element = exists[:, :, None] & (n < N)
    has_narrow = is_group[:, :, None] & (n < N)  # [GB, 1, BN]
    in_window = exists[:, :, None] & (w < WIDTH - 1)
    window_at = conv_state + (slot * conv_slot + source * conv_channel)[:, :, None] + w * conv_place
    past = tl.load(window_at, mask=in_window, other=0.0)
    x_new = tl.load(x + sequence * x_row + group * x_head + row, mask=exists, other=0.0)
    b_t = tl.load(B + (sequence * b_row + group * b_head)[:, :, None] + n, mask=has_narrow, other=0.0).to(tl.float32)
    group_at = ssm_state + (slot * ssm_slot + group * (REPEAT * ssm_head) + row * ssm_row)[:, :, None] + n * ssm_n
    rate_at = A_log + ((group * (REPEAT * P) + row) * N)[:, :, None] + n
    for member in tl.static_range(REPEAT):
        head = group * REPEAT + member
        channel = head * P + row
        filtered = channel if OWN_FILTERS else source
        state_at = group_at + member * ssm_head
        h = tl.load(state_at, mask=has_element, other=0.0).to(tl.float32)
        rate = tl.load(rate_at + member * (P * N), mask=has_element, other=0.0).to(tl.float32)
        delta = tl.load(dt + sequence * dt_row + head * dt_head + row, mask=exists, other=0.0).to(tl.float32)
        gate = tl.load(z + sequence * z_row + head * z_head + row, mask=exists, other=0.0).to(tl.float32)
        c_t = tl.load(C + (sequence * c_row + head * c_head)[:, :, None] + n, mask=has_narrow, other=0.0).to(tl.float32)
        if member == 0 or OWN_FILTERS:
            taps = conv_weight + filtered * WIDTH
            x_t = x_new.to(tl.float32) * tl.load(taps + (WIDTH - 1), mask=exists, other=0.0).to(tl.float32)
            x_t += tl.sum(past.to(tl.float32) * tl.load(taps[:, :, None] + w, mask=in_window, other=0.0).to(tl.float32), axis=2)
            if HAS_CONV_BIAS:
                x_t += tl.load(conv_bias + filtered, mask=exists, other=0.0).to(tl.float32)
            if SILU:
                x_t *= sigmoid(x_t)
            x_t = x_t.to(x.dtype.element_ty).to(tl.float32)  # rounded as between separate ops
        if HAS_BIAS:
            delta += tl.load(dt_bias + channel, mask=exists, other=0.0).to(tl.float32)
        if SOFTPLUS:
            delta = softplus(delta)
        rate = tl.exp2(rate * LOG2E) * -LOG2E
        h = tl.exp2(delta[:, :, None] * rate) * h + (delta * x_t)[:, :, None] * b_t
        out = tl.sum(h * c_t, axis=2)
        if HAS_D:
            out += tl.load(D + channel, mask=exists, other=0.0).to(tl.float32) * x_t
        out = tl.where(exists, out * gate * sigmoid(gate), 0.0)
        tl.store(y + sequence * (G * REPEAT * P) + channel, out.to(y.dtype.element_ty), mask=(group < G) & (row < P))
        if IS_SMALL:
            tl.debug_barrier()
        tl.store(state_at, h.to(ssm_state.dtype.element_ty), mask=has_element)
    tl.debug_barrier()
    tl.store(window_at - conv_place, past, mask=in_window & (w > 0))
    if WIDTH > 1:
        newest_at = conv_state + slot * conv_slot + source * conv_channel + (WIDTH - 2) * conv_place
        tl.store(newest_at, x_new.to(conv_state.dtype.element_ty), mask=exists)
