"""The Mamba-1 decoding step on a GPU: one kernel, states by slot, each read and written once.

A program serves some groups of some sequences, one sequence after the other, with all query-side heads that share a group's
windows (its members). A lane has a channel of each member with all its states, in pieces of one 16-byte access, so that sums
over states stay in the lane; the parameters, as large as a sequence's states, are read and taken to the exponential once
for all sequences; and all states of a sequence are asked for before the first is waited for.

A tile may have fewer channels than the program has threads. Then several threads hold the same element: all of them load
it, one of them stores it, and nothing orders the store of one after the load of another. So all that is stored was loaded
before a barrier.

Bytes moved: a sequence's states twice, 2·(H·P·N + G·P·(W-1)) elements, and (4·H·P + 2·G·P) · 2 besides. Floor on an H100
at 3.0 TB/s, M1-3B dimensions (H = 192, G = 64, P = N = 16, W = 4), batch 512, fp32 SSM states and a bf16 window:
201 + 6 + 15 MB, 74 µs (bf16 states 41 µs).
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from m1.kernels.launch import IS_INTERPRETED, num_multiprocessors, with_unit_stride
from m1.kernels.triton_math import LOG2E, sigmoid, softplus, widen

MOST_PIECES = 4  # of a channel's states: wider ones are shared among lanes


class StepConfig(NamedTuple):
    """Groups a program, its warps, sequences a program (None: up to 4, where there are enough of them to fill the GPU), and the
    most registers a thread (None: as many as the compiler likes).
    """

    groups: int = 2
    num_warps: int = 1
    sequences: int | None = None
    max_registers: int | None = None

    def sequences_of(self, num_sequences: int, num_groups: int, multiprocessors: int) -> int:
        if self.sequences is not None:
            return self.sequences
        wanted = num_sequences * triton.cdiv(num_groups, self.groups) * self.num_warps // (8 * multiprocessors)
        return max(number for number in (1, 2, 4) if number <= max(wanted, 1))


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
    config = config or StepConfig()
    width = conv_weight.shape[1]
    z, x, B, C, dt = (with_unit_stride(tensor) for tensor in (z, x, B, C, dt))
    conv_weight, A_log = conv_weight.contiguous(), A_log.contiguous()
    D, dt_bias, conv_bias = (None if p is None else p.contiguous() for p in (D, dt_bias, conv_bias))
    y = torch.empty(n, H, P, dtype=x.dtype, device=x.device)
    block_n = triton.next_power_of_2(N)
    piece = min(max(16 // ssm_state.element_size(), block_n // MOST_PIECES), block_n)
    rows = min(triton.next_power_of_2(P), max(1024 // block_n, 1))
    sequences = config.sequences_of(n, G, num_multiprocessors(x.device))
    grid = (triton.cdiv(G, config.groups) * triton.cdiv(P, rows), triton.cdiv(n, sequences))
    with torch.cuda.device_of(x):
        _step_kernel[grid](
            conv_state, ssm_state, z, x, B, C, dt, conv_weight, conv_bias, A_log, D, dt_bias, slots, y,
            *conv_state.stride(), *ssm_state.stride(), min(conv_state.shape[0], ssm_state.shape[0]),
            *z.stride()[:2], *x.stride()[:2], *B.stride()[:2], *C.stride()[:2], *dt.stride()[:2],
            n, G, H // G, P, N, width, config.groups, rows, piece, block_n // piece, sequences,
            OWN_FILTERS=conv_weight.shape[0] == H * P, HAS_CONV_BIAS=conv_bias is not None,
            HAS_D=D is not None, HAS_BIAS=dt_bias is not None, HAS_SLOTS=slots is not None,
            SILU=conv_activation == "silu", SOFTPLUS=dt_softplus, IS_INTERPRETED=IS_INTERPRETED,
            num_warps=config.num_warps, maxnreg=config.max_registers,
        )  # fmt: skip
    return y


@triton.jit
def _parameter(tensor, offset, exists, IS_GIVEN: tl.constexpr):
    """A parameter of each channel as fp32, zero where there is none."""
    if IS_GIVEN:
        return tl.load(tensor + offset, mask=exists, other=0.0).to(tl.float32)
    else:
        return tl.zeros(exists.shape, tl.float32)


@triton.jit
def _pieces(at, n, exists, N: tl.constexpr, PIECE: tl.constexpr, PIECES: tl.constexpr, N_STRIDE):
    """What `at` [PB, GB, 1] points to along the states, as PIECES tiles [PB, GB, PIECE]."""
    found = ()
    for index in tl.static_range(PIECES):
        place = n + index * PIECE
        found += (tl.load(at + place * N_STRIDE, mask=exists[:, :, None] & (place < N), other=0.0),)
    return found


@triton.jit
def _convolved(
    x_new, past, filters, WIDTH: tl.constexpr, SILU: tl.constexpr
):  # fmt: skip
    """The convolution's output for a member: `filters` are its W taps and its bias."""
    out = x_new.to(tl.float32) * filters[WIDTH - 1] + filters[WIDTH]
    for w in tl.static_range(WIDTH - 1):
        out += past[w].to(tl.float32) * filters[w]
    if SILU:
        out *= sigmoid(out)
    return out.to(x_new.dtype).to(tl.float32)  # rounded as between separate ops


@triton.jit
def _step_kernel(
    conv_state, ssm_state, z, x, B, C, dt, conv_weight, conv_bias, A_log, D, dt_bias, slots, y,
    conv_slot, conv_channel, conv_place, ssm_slot, ssm_head, ssm_row, ssm_n, num_slots,
    z_row, z_head, x_row, x_head, b_row, b_head, c_row, c_head, dt_row, dt_head, num_sequences,
    G, REPEAT: tl.constexpr, P: tl.constexpr, N: tl.constexpr, WIDTH: tl.constexpr,
    GB: tl.constexpr, PB: tl.constexpr, PIECE: tl.constexpr, PIECES: tl.constexpr, SEQUENCES: tl.constexpr,
    OWN_FILTERS: tl.constexpr, HAS_CONV_BIAS: tl.constexpr, HAS_D: tl.constexpr, HAS_BIAS: tl.constexpr,
    HAS_SLOTS: tl.constexpr, SILU: tl.constexpr, SOFTPLUS: tl.constexpr, IS_INTERPRETED: tl.constexpr,
):  # fmt: skip
    """Grid (blocks of GB groups x blocks of PB rows, blocks of SEQUENCES); tiles [PB, GB], [PB, GB, PIECE], of which
    the last axis lies inside a thread.

    OWN_FILTERS: every head has its own filter (else one a group).
    """
    blocks: tl.constexpr = (P + PB - 1) // PB
    row = (tl.program_id(0) % blocks * PB + tl.arange(0, PB))[:, None]
    group = (tl.program_id(0) // blocks * GB + tl.arange(0, GB))[None, :]
    n = tl.arange(0, PIECE)[None, None, :]
    source = group * P + row
    is_channel = (group < G) & (row < P)
    rates, filters, offsets, skips = (), (), (), ()
    for member in tl.static_range(REPEAT):
        channel = (group * REPEAT + member) * P + row
        logarithms = _pieces(A_log + (channel * N)[:, :, None], n, is_channel, N, PIECE, PIECES, 1)
        rate = ()
        for piece in tl.static_range(PIECES):
            rate += (tl.exp2(logarithms[piece].to(tl.float32) * LOG2E) * -LOG2E,)
        rates += (rate,)
        if member == 0 or OWN_FILTERS:
            filtered = channel if OWN_FILTERS else source
            taps = ()
            for w in tl.static_range(WIDTH):
                taps += (_parameter(conv_weight, filtered * WIDTH + w, is_channel, True),)
            taps += (_parameter(conv_bias, filtered, is_channel, HAS_CONV_BIAS),)
            filters += (taps,)
        offsets += (_parameter(dt_bias, channel, is_channel, HAS_BIAS),)
        skips += (_parameter(D, channel, is_channel, HAS_D),)

    first = tl.program_id(1) * SEQUENCES
    for index in range(SEQUENCES):
        sequence = tl.zeros([1, 1], tl.int64) + first + index
        slot = sequence
        if HAS_SLOTS:
            slot = tl.load(slots + sequence, mask=sequence < num_sequences, other=-1)
        is_row = is_channel & (sequence < num_sequences)
        exists = is_row & (slot >= 0) & (slot < num_slots)
        window_at = conv_state + slot * conv_slot + source * conv_channel
        group_at = ssm_state + (slot * ssm_slot + group * (REPEAT * ssm_head) + row * ssm_row)[:, :, None]
        zero = row * 0  # what all channels of a group share, each lane reads for itself
        x_new = tl.load(x + sequence * x_row + group * x_head + row, mask=exists, other=0.0)
        past, states, reads, deltas, gates = (), (), (), (), ()
        for w in tl.static_range(WIDTH - 1):
            past += (tl.load(window_at + w * conv_place, mask=exists, other=0.0),)
        for member in tl.static_range(REPEAT):
            head = group * REPEAT + member
            states += (_pieces(group_at + member * ssm_head, n, exists, N, PIECE, PIECES, ssm_n),)
            reads += (_pieces(C + (sequence * c_row + head * c_head + zero)[:, :, None], n, exists, N, PIECE, PIECES, 1),)
            deltas += (tl.load(dt + sequence * dt_row + head * dt_head + row, mask=exists, other=0.0).to(tl.float32),)
            gates += (tl.load(z + sequence * z_row + head * z_head + row, mask=exists, other=0.0).to(tl.float32),)
        writes = _pieces(B + (sequence * b_row + group * b_head + zero)[:, :, None], n, exists, N, PIECE, PIECES, 1)
        tl.debug_barrier()
        for member in tl.static_range(REPEAT):
            if member == 0 or OWN_FILTERS:
                x_t = _convolved(x_new, past, filters[member], WIDTH, SILU)
            delta = deltas[member] + offsets[member]
            if SOFTPLUS:
                delta = softplus(delta)
            out = skips[member] * x_t
            for piece in tl.static_range(PIECES):
                decay = tl.exp2(delta[:, :, None] * rates[member][piece])
                h = decay * widen(states[member][piece], IS_INTERPRETED)
                h += (delta * x_t)[:, :, None] * widen(writes[piece], IS_INTERPRETED)
                out += tl.sum(h * widen(reads[member][piece], IS_INTERPRETED), axis=2)
                place = n + piece * PIECE
                at = group_at + member * ssm_head + place * ssm_n
                tl.store(at, h.to(ssm_state.dtype.element_ty), mask=exists[:, :, None] & (place < N))
            out = tl.where(exists, out * gates[member] * sigmoid(gates[member]), 0.0)
            channel = (group * REPEAT + member) * P + row
            tl.store(y + sequence * (G * REPEAT * P) + channel, out.to(y.dtype.element_ty), mask=is_row)
        for w in tl.static_range(WIDTH - 1):
            newest = x_new if w == WIDTH - 2 else past[w + 1]
            tl.store(window_at + w * conv_place, newest.to(conv_state.dtype.element_ty), mask=exists)
