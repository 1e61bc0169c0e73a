"""The forward kernels of the selective scan: what a chunk does to a state, the carry between chunks, the outputs.

Tiles have the axes [h, n, t, p]: `HB` heads, `BN` >= N states, `STEPS` tokens, `PB` rows of a head. The lanes of a warp go to
(h, p), CHANNELS to each, side by side; n and t stay inside a thread, n innermost. There the recurrence over t is plain
register arithmetic (triton_math.scan_rows), a sum over n is a chain of additions, what depends on (t, p) alone (softplus,
gate) is computed once, and what a lane reads of B and C serves its channels. Triton gives lanes to the axis along which the
loads of A are contiguous, and several elements to a lane where it knows them to be aligned. So A and the states in scratch
memory lie transposed, [N, H·P], and their addresses contain CHANNELS times `zero`, an argument that is 0 and of which the
compiler knows nothing.
"""

import triton
import triton.language as tl

from m1.kernels.chunk_table import IS_LAST
from m1.kernels.triton_math import LOG2E, scan_rows, scan_rows_exclusive, sigmoid, softplus, widen


@triton.jit
def tile_channels(H, P: tl.constexpr, HB: tl.constexpr, PB: tl.constexpr):
    """Heads [HB, 1, 1] and rows [1, 1, PB] of this program, whether they exist [HB, 1, PB], and the block of rows."""
    blocks: tl.constexpr = (P + PB - 1) // PB
    program = tl.program_id(0)
    head = program // blocks * HB + tl.arange(0, HB)[:, None, None]
    row = program % blocks * PB + tl.arange(0, PB)[None, None, :]
    return head, row, (head < H) & (row < P), program % blocks


@triton.jit
def state_address(base, index, channel, n, size, N: tl.constexpr, zero, IS_OUTER: tl.constexpr):
    """Where state `index` of `base` has its elements: [H, P, N] as callers have it (IS_OUTER), or [N, H·P] as scratch has."""
    if IS_OUTER:
        return base + index * (size * N) + channel[:, None, :, :] * N + n
    else:
        return base + index * (size * N) + channel[:, None, :, :] + n * size + zero


@triton.jit(do_not_specialize=["zero"])
def scan_chunk_kernel(
    x, dt, A, B, C, D, z, dt_bias, entry, delta_sum, final_state, y, chunks,
    x_token, x_head, dt_token, dt_head, b_token, b_head, c_token, c_head, z_token, z_head,
    H, x_repeat, b_repeat, zero,
    P: tl.constexpr, N: tl.constexpr, BN: tl.constexpr, STEPS: tl.constexpr,
    HB: tl.constexpr, PB: tl.constexpr, CHANNELS: tl.constexpr, STAGES: tl.constexpr, UNIT: tl.constexpr,
    HAS_D: tl.constexpr, HAS_Z: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_ENTRY: tl.constexpr, HAS_FINAL: tl.constexpr,
    SOFTPLUS: tl.constexpr, WITH_OUTPUT: tl.constexpr, ENTRY_IS_OUTER: tl.constexpr, IS_INTERPRETED: tl.constexpr,
):  # fmt: skip
    """Run one chunk for a block of channels; grid (channel blocks, chunks).

    WITH_OUTPUT: from the state in `entry`, write y (and final_state [n, H, P, N] after a document's last chunk). Without: from
    zero, write the state reached into `entry` and the sum of Δ into `delta_sum` [chunks, H·P]; a document's last chunk has no
    use for them. A is [N, H·P]; `entry` is [chunks, N, H·P], or [n, H, P, N] if ENTRY_IS_OUTER.
    """
    chunk = tl.program_id(1).to(tl.int64)
    start = tl.load(chunks + chunk * 4)
    length = tl.load(chunks + chunk * 4 + 1) - start
    is_last = (tl.load(chunks + chunk * 4 + 3) & IS_LAST) != 0
    if length <= 0:
        return
    if not WITH_OUTPUT and is_last:
        return
    head, row, exists, _ = tile_channels(H, P, HB, PB)
    size = H * P
    zero *= CHANNELS
    channel = head * P + row  # [HB, 1, PB]
    n = tl.arange(0, BN)[None, :, None, None]
    has_element = exists[:, None, :, :] & (n < N)
    decay_rate = tl.load(A + channel[:, None, :, :] + n * size + zero, mask=has_element, other=0.0) * LOG2E  # [HB, BN, 1, PB]
    if HAS_ENTRY:
        entry_at = state_address(entry, chunk, channel, n, size, N, zero, ENTRY_IS_OUTER)
    state = tl.zeros([HB, BN, 1, PB], tl.float32)
    if WITH_OUTPUT and HAS_ENTRY:
        state = tl.load(entry_at, mask=has_element, other=0.0)
    state = tl.sum(state, axis=2)
    if HAS_BIAS:
        bias = tl.load(dt_bias + channel + zero, mask=exists, other=0.0)
    if HAS_D and WITH_OUTPUT:
        skip = tl.load(D + channel + zero, mask=exists, other=0.0)
    total = tl.zeros([HB, PB], tl.float32)

    step = tl.arange(0, STEPS)[None, :, None]
    state_step = tl.arange(0, STEPS)[None, None, :, None]
    narrow_n = tl.arange(0, BN)[None, :, None]
    narrow_step = tl.arange(0, STEPS)[None, None, :]
    narrow_exists = (head < H) & (narrow_n < N)
    token = start.to(tl.int64)
    x_at = x + token * (x_token * UNIT) + step * (x_token * UNIT) + head // x_repeat * x_head + row
    dt_at = dt + token * (dt_token * UNIT) + step * (dt_token * UNIT) + head * dt_head + row
    b_at = B + token * (b_token * UNIT) + narrow_step * (b_token * UNIT) + head // b_repeat * b_head + narrow_n
    if WITH_OUTPUT:
        c_at = C + token * (c_token * UNIT) + narrow_step * (c_token * UNIT) + head * c_head + narrow_n
        y_at = y + token * size + step * size + channel + zero
        if HAS_Z:
            z_at = z + token * (z_token * UNIT) + step * (z_token * UNIT) + head * z_head + row

    for tile in tl.range(0, length, STEPS, num_stages=STAGES):
        here = exists & (tile + step < length)
        narrow_here = narrow_exists & (tile + narrow_step < length)
        x_t = tl.load(x_at + tile * (x_token * UNIT), mask=here, other=0.0).to(tl.float32)
        delta = tl.load(dt_at + tile * (dt_token * UNIT), mask=here, other=0.0).to(tl.float32)
        b_t = widen(tl.load(b_at + tile * (b_token * UNIT), mask=narrow_here, other=0.0), IS_INTERPRETED)[:, :, :, None]
        if HAS_BIAS:
            delta += bias
        if SOFTPLUS:
            delta = softplus(delta)
        delta = tl.where(here, delta, 0.0)  # a step of zero leaves the state alone
        decay = tl.exp2(delta[:, None, :, :] * decay_rate)
        states, state = scan_rows(decay, (delta * x_t)[:, None, :, :] * b_t, state, state_step, STEPS, 2)
        if WITH_OUTPUT:
            c_t = widen(tl.load(c_at + tile * (c_token * UNIT), mask=narrow_here, other=0.0), IS_INTERPRETED)[:, :, :, None]
            out = tl.sum(states * c_t, axis=1)
            if HAS_D:
                out += skip * x_t
            if HAS_Z:
                gate = tl.load(z_at + tile * (z_token * UNIT), mask=here, other=0.0).to(tl.float32)
                out *= gate * sigmoid(gate)
            tl.store(y_at + tile * size, out.to(y.dtype.element_ty), mask=here)
        else:
            total += tl.sum(delta, axis=1)

    if not WITH_OUTPUT:
        tl.store(entry_at, tl.expand_dims(state, 2), mask=has_element)
        tl.store(delta_sum + chunk * size + channel, tl.expand_dims(total, 1), mask=exists)
    if WITH_OUTPUT and HAS_FINAL and is_last:
        document = tl.load(chunks + chunk * 4 + 2).to(tl.int64)
        final_at = state_address(final_state, document, channel, n, size, N, zero, True)
        tl.store(final_at, tl.expand_dims(state, 2), mask=has_element)


@triton.jit
def carry_kernel(
    states, delta_sum, A, first_chunk, carried_in,
    H, P: tl.constexpr, N: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr,
    HAS_CARRY: tl.constexpr, REVERSE: tl.constexpr,
):  # fmt: skip
    """Turn what each chunk adds into what enters it, in place: s_c, d_c become e_c with e_{c+1} = d_c · e_c + s_c.

    Grid (blocks of N·H·P elements, documents); `states` are [chunks, N, H·P] and A [N, H·P]. Forward e is the state; in
    REVERSE, over chunks from last to first, it is the gradient. `carried_in` [n, H, P, N] enters each document's first chunk
    in that order. ROWS chunks are read at once.
    """
    document = tl.program_id(1)
    first = tl.load(first_chunk + document)
    count = tl.load(first_chunk + document + 1) - first
    width = H * P
    size = width * N
    element = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    exists = element < size
    rate = tl.load(A + element, mask=exists, other=0.0) * LOG2E
    carry = tl.zeros([BLOCK], tl.float32)
    if HAS_CARRY:
        outer = element % width * N + element // width
        carry += tl.load(carried_in + document.to(tl.int64) * size + outer, mask=exists, other=0.0).to(tl.float32)
    step = tl.arange(0, ROWS)[:, None]
    for block in range(0, count, ROWS):
        order = block + step
        chunk = first + (count - 1 - order if REVERSE else order).to(tl.int64)
        at = states + chunk * size + element
        goes_on = exists & (order < count - 1)  # the last chunk in this order adds to nothing
        added = tl.load(at, mask=goes_on, other=0.0)
        delta = tl.load(delta_sum + chunk * width + element % width, mask=goes_on, other=0.0)
        decay = tl.exp2(delta * rate)
        entering, carry = scan_rows_exclusive(decay, added, carry, step, ROWS)
        tl.store(at, entering, mask=exists & (order < count))
