"""The kernel of the Mamba-1 decoding step.

A program serves some groups of one sequence with all query-side heads that share a group's windows (its members), MEMBERS of
them at a time. A lane has a channel of each member with all its states, in pieces of one 16-byte access, so that sums over
states stay in the lane; and the states of MEMBERS heads are asked for before the first is waited for.

A tile may have fewer channels than the program has threads. Then several threads hold the same element: all of them load
it, one of them stores it, and nothing orders the store of one after the load of another. So all that is stored was loaded
before a barrier.
"""

# mypy: disable-error-code="assignment,var-annotated"
# (a tuple grows by +=, which Triton unrolls)

import triton
import triton.language as tl

from m1.kernels.launch import wait_for_previous
from m1.kernels.triton_math import LOG2E, sigmoid, softplus, widen


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
def _joined(pieces, FIRST: tl.constexpr, COUNT: tl.constexpr):
    """Pieces FIRST … FIRST + COUNT - 1 [PB, GB, PIECE] side by side, [PB, GB, COUNT · PIECE]; COUNT a power of 2."""
    if COUNT == 1:
        return pieces[FIRST]
    else:
        first = _joined(pieces, FIRST, COUNT // 2)
        second = _joined(pieces, FIRST + COUNT // 2, COUNT // 2)
        both = tl.permute(tl.join(first, second), (0, 1, 3, 2))
        return tl.reshape(both, [first.shape[0], first.shape[1], 2 * first.shape[2]])


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
def step_kernel(
    conv_state, ssm_state, z, x, B, C, dt, conv_weight, conv_bias, A_log, D, dt_bias, slots, y,
    conv_slot, conv_channel, conv_place, ssm_slot, ssm_head, ssm_row, ssm_n, num_slots,
    z_row, z_head, x_row, x_head, b_row, b_head, c_row, c_head, dt_row, dt_head,
    G, REPEAT: tl.constexpr, P: tl.constexpr, N: tl.constexpr, WIDTH: tl.constexpr,
    GB: tl.constexpr, PB: tl.constexpr, PIECE: tl.constexpr, PIECES: tl.constexpr, MEMBERS: tl.constexpr,
    OWN_FILTERS: tl.constexpr, HAS_CONV_BIAS: tl.constexpr, HAS_D: tl.constexpr, HAS_BIAS: tl.constexpr,
    HAS_SLOTS: tl.constexpr, SILU: tl.constexpr, SOFTPLUS: tl.constexpr, IS_INTERPRETED: tl.constexpr,
    JOIN: tl.constexpr, SWAP: tl.constexpr, IS_CHAINED: tl.constexpr,
):  # fmt: skip
    """Grid (blocks of GB groups x blocks of PB rows, sequences); tiles [PB, GB], [PB, GB, PIECE], of which
    the last axis lies inside a thread.

    OWN_FILTERS: every head has its own filter (else one a group).
    """
    blocks: tl.constexpr = (P + PB - 1) // PB
    group_program = tl.program_id(1 if SWAP else 0)
    row = (group_program % blocks * PB + tl.arange(0, PB))[:, None]
    group = (group_program // blocks * GB + tl.arange(0, GB))[None, :]
    n = tl.arange(0, PIECE)[None, None, :]
    source = group * P + row
    is_channel = (group < G) & (row < P)
    for start in tl.static_range(0, REPEAT, MEMBERS):
        rates, filters, offsets, skips = (), (), (), ()
        for member in tl.static_range(start, start + MEMBERS):
            if member < REPEAT:
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
        if start == 0:
            wait_for_previous(IS_CHAINED)  # which makes rows and slots; the parameters were there before
            sequence = tl.zeros([1, 1], tl.int64) + tl.program_id(0 if SWAP else 1)
            slot = sequence
            if HAS_SLOTS:
                slot = tl.load(slots + sequence)
            exists = is_channel & (slot >= 0) & (slot < num_slots)
            window_at = conv_state + slot * conv_slot + source * conv_channel
            group_at = ssm_state + (slot * ssm_slot + group * (REPEAT * ssm_head) + row * ssm_row)[:, :, None]
            zero = row * 0  # what all channels of a group share, each lane reads for itself
            x_new = tl.load(x + sequence * x_row + group * x_head + row, mask=exists, other=0.0)
            past = ()
            for w in tl.static_range(WIDTH - 1):
                past += (tl.load(window_at + w * conv_place, mask=exists, other=0.0),)
            writes = _pieces(B + (sequence * b_row + group * b_head + zero)[:, :, None], n, exists, N, PIECE, PIECES, 1)
        states, reads, deltas, gates = (), (), (), ()
        for member in tl.static_range(start, start + MEMBERS):
            if member < REPEAT:
                head = group * REPEAT + member
                states += (_pieces(group_at + member * ssm_head, n, exists, N, PIECE, PIECES, ssm_n),)
                reads += (_pieces(C + (sequence * c_row + head * c_head + zero)[:, :, None], n, exists, N, PIECE, PIECES, 1),)
                deltas += (tl.load(dt + sequence * dt_row + head * dt_head + row, mask=exists, other=0.0).to(tl.float32),)
                gates += (tl.load(z + sequence * z_row + head * z_head + row, mask=exists, other=0.0).to(tl.float32),)
        tl.debug_barrier()
        for member in tl.static_range(start, start + MEMBERS):
            if member < REPEAT:
                if member == 0 or OWN_FILTERS:
                    x_t = _convolved(x_new, past, filters[member - start], WIDTH, SILU)
                delta = deltas[member - start] + offsets[member - start]
                if SOFTPLUS:
                    delta = softplus(delta)
                out = skips[member - start] * x_t
                stepped = ()
                for piece in tl.static_range(PIECES):
                    decay = tl.exp2(delta[:, :, None] * rates[member - start][piece])
                    h = decay * widen(states[member - start][piece], IS_INTERPRETED)
                    h += (delta * x_t)[:, :, None] * widen(writes[piece], IS_INTERPRETED)
                    out += tl.sum(h * widen(reads[member - start][piece], IS_INTERPRETED), axis=2)
                    stepped += (h.to(ssm_state.dtype.element_ty),)
                if JOIN:
                    place = tl.arange(0, PIECE * PIECES)[None, None, :]
                    at = group_at + member * ssm_head + place * ssm_n
                    tl.store(at, _joined(stepped, 0, PIECES), mask=exists[:, :, None] & (place < N))
                else:
                    for piece in tl.static_range(PIECES):
                        place = n + piece * PIECE
                        at = group_at + member * ssm_head + place * ssm_n
                        tl.store(at, stepped[piece], mask=exists[:, :, None] & (place < N))
                out = tl.where(exists, out * gates[member - start] * sigmoid(gates[member - start]), 0.0)
                channel = (group * REPEAT + member) * P + row
                tl.store(y + sequence * (G * REPEAT * P) + channel, out.to(y.dtype.element_ty), mask=is_channel)
    for w in tl.static_range(WIDTH - 1):
        newest = x_new if w == WIDTH - 2 else past[w + 1]
        tl.store(window_at + w * conv_place, newest.to(conv_state.dtype.element_ty), mask=exists)
