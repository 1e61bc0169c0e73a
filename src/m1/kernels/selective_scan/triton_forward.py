"""The forward kernels of the selective scan: what a chunk does to a state, the carry between chunks, the outputs.

Tiles have the axes [t, i, h, j, n]: `STEPS` tokens, `HB` heads, the `PI`·`PJ` rows p = i·PJ + j of each, `BN` >= N states.
Loads of A are contiguous in n, so a thread owns 4 states and the lanes go to n, j and h in this order; t and i stay inside
a thread. There the recurrence over t is plain register arithmetic (triton_math.scan_rows), sums over n cost two shuffles, and
what depends on (t, p) alone (softplus, gate) is computed once, not once a state.
"""

import triton
import triton.language as tl

from m1.kernels.chunk_table import IS_LAST
from m1.kernels.triton_math import LOG2E, scan_rows, scan_rows_exclusive, sigmoid, softplus


@triton.jit
def tile_channels(H, P: tl.constexpr, HB: tl.constexpr, PI: tl.constexpr, PJ: tl.constexpr):
    """Heads [1, 1, HB, 1] and rows [1, PI, 1, PJ] of this program, whether they exist, and the block of rows."""
    blocks: tl.constexpr = (P + PI * PJ - 1) // (PI * PJ)
    program = tl.program_id(0)
    head = program // blocks * HB + tl.arange(0, HB)[None, None, :, None]
    row = program % blocks * (PI * PJ) + (tl.arange(0, PI) * PJ)[None, :, None, None] + tl.arange(0, PJ)[None, None, None, :]
    return head, row, (head < H) & (row < P), program % blocks


@triton.jit
def scan_chunk_kernel(
    x, dt, A, B, C, D, z, dt_bias, entry, delta_sum, final_state, y, chunks,
    x_token, x_head, dt_token, dt_head, b_token, b_head, c_token, c_head, z_token, z_head,
    H, x_repeat, b_repeat,
    P: tl.constexpr, N: tl.constexpr, BN: tl.constexpr, STEPS: tl.constexpr,
    HB: tl.constexpr, PI: tl.constexpr, PJ: tl.constexpr, STAGES: tl.constexpr, UNIT: tl.constexpr,
    HAS_D: tl.constexpr, HAS_Z: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_ENTRY: tl.constexpr, HAS_FINAL: tl.constexpr,
    SOFTPLUS: tl.constexpr, WITH_OUTPUT: tl.constexpr,
):  # fmt: skip
    """Run one chunk for a block of channels; grid (channel blocks, chunks).

    WITH_OUTPUT: from the state in `entry`, write y (and final_state after a document's last chunk). Without: from zero,
    write the state reached into `entry` and the sum of Δ into `delta_sum`; a document's last chunk has no use for them.
    """
    chunk = tl.program_id(1).to(tl.int64)
    start = tl.load(chunks + chunk * 4)
    length = tl.load(chunks + chunk * 4 + 1) - start
    is_last = (tl.load(chunks + chunk * 4 + 3) & IS_LAST) != 0
    if length <= 0:
        return
    if not WITH_OUTPUT and is_last:
        return
    head, row, exists, _ = tile_channels(H, P, HB, PI, PJ)
    channel = head * P + row  # [1, PI, HB, PJ]
    n = tl.arange(0, BN)
    element = channel[:, :, :, :, None] * N + n
    has_element = exists[:, :, :, :, None] & (n < N)
    decay_rate = tl.load(A + element, mask=has_element, other=0.0) * LOG2E  # [1, PI, HB, PJ, BN]
    state = tl.zeros([1, PI, HB, PJ, BN], tl.float32)
    if WITH_OUTPUT and HAS_ENTRY:
        state = tl.load(entry + chunk * (H * P * N) + element, mask=has_element, other=0.0)
    state = tl.sum(state, axis=0)
    if HAS_BIAS:
        bias = tl.load(dt_bias + channel, mask=exists, other=0.0)
    if HAS_D and WITH_OUTPUT:
        skip = tl.load(D + channel, mask=exists, other=0.0)
    total = tl.zeros([PI, HB, PJ], tl.float32)

    step = tl.arange(0, STEPS)[:, None, None, None]
    state_step = tl.arange(0, STEPS)[:, None, None, None, None]
    narrow_step = tl.arange(0, STEPS)[:, None, None]
    narrow_head = tl.reshape(head, [1, HB, 1])
    narrow_exists = (narrow_head < H) & (n < N)
    token = start.to(tl.int64)
    x_place = step * (x_token * UNIT) + head // x_repeat * x_head + row
    x_at = x + token * (x_token * UNIT)
    dt_place = step * (dt_token * UNIT) + head * dt_head + row
    dt_at = dt + token * (dt_token * UNIT)
    b_place = narrow_step * (b_token * UNIT) + narrow_head // b_repeat * b_head + n
    b_at = B + token * (b_token * UNIT)
    if WITH_OUTPUT:
        c_place = narrow_step * (c_token * UNIT) + narrow_head * c_head + n
        c_at = C + token * (c_token * UNIT)
        y_place = step * (H * P) + head * P + row
        y_at = y + token * (H * P)
        if HAS_Z:
            z_place = step * (z_token * UNIT) + head * z_head + row
            z_at = z + token * (z_token * UNIT)

    for tile in tl.range(0, length, STEPS, num_stages=STAGES):
        here = exists & (tile + step < length)
        narrow_here = narrow_exists & (tile + narrow_step < length)
        x_t = tl.load(x_at + x_place, mask=here, other=0.0).to(tl.float32)
        delta = tl.load(dt_at + dt_place, mask=here, other=0.0).to(tl.float32)
        b_t = tl.load(b_at + b_place, mask=narrow_here, other=0.0).to(tl.float32)[:, None, :, None, :]
        if HAS_BIAS:
            delta += bias
        if SOFTPLUS:
            delta = softplus(delta)
        delta = tl.where(here, delta, 0.0)  # a step of zero leaves the state alone
        decay = tl.exp2(delta[:, :, :, :, None] * decay_rate)
        states, state = scan_rows(decay, (delta * x_t)[:, :, :, :, None] * b_t, state, state_step, STEPS)
        if WITH_OUTPUT:
            c_t = tl.load(c_at + c_place, mask=narrow_here, other=0.0).to(tl.float32)[:, None, :, None, :]
            out = tl.sum(states * c_t, axis=4)
            if HAS_D:
                out += skip * x_t
            if HAS_Z:
                gate = tl.load(z_at + z_place, mask=here, other=0.0).to(tl.float32)
                out *= gate * sigmoid(gate)
                z_at += STEPS * UNIT * z_token
            tl.store(y_at + y_place, out.to(y.dtype.element_ty), mask=here)
            c_at += STEPS * UNIT * c_token
            y_at += STEPS * H * P
        else:
            total += tl.sum(delta, axis=0)
        x_at += STEPS * UNIT * x_token
        dt_at += STEPS * UNIT * dt_token
        b_at += STEPS * UNIT * b_token

    if not WITH_OUTPUT:
        tl.store(entry + chunk * (H * P * N) + element, tl.expand_dims(state, 0), mask=has_element)
        tl.store(delta_sum + chunk * (H * P) + channel, tl.expand_dims(total, 0), mask=exists)
    if WITH_OUTPUT and HAS_FINAL and is_last:
        document = tl.load(chunks + chunk * 4 + 2).to(tl.int64)
        tl.store(final_state + document * (H * P * N) + element, tl.expand_dims(state, 0), mask=has_element)


@triton.jit
def carry_kernel(
    states, delta_sum, A, first_chunk, carried_in,
    H, P: tl.constexpr, N: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr,
    HAS_CARRY: tl.constexpr, REVERSE: tl.constexpr,
):  # fmt: skip
    """Turn what each chunk adds into what enters it, in place: s_c, d_c become e_c with e_{c+1} = d_c · e_c + s_c.

    Grid (blocks of H·P·N elements, documents). Forward e is the state; in REVERSE, over chunks from last to first, it is
    the gradient. `carried_in` [n, H, P, N] enters each document's first chunk in that order. ROWS chunks are read at once.
    """
    document = tl.program_id(1)
    first = tl.load(first_chunk + document)
    count = tl.load(first_chunk + document + 1) - first
    size = H * P * N
    element = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    exists = element < size
    rate = tl.load(A + element, mask=exists, other=0.0) * LOG2E
    carry = tl.zeros([BLOCK], tl.float32)
    if HAS_CARRY:
        carry += tl.load(carried_in + document.to(tl.int64) * size + element, mask=exists, other=0.0).to(tl.float32)
    step = tl.arange(0, ROWS)[:, None]
    for block in range(0, count, ROWS):
        order = block + step
        chunk = first + (count - 1 - order if REVERSE else order).to(tl.int64)
        at = states + chunk * size + element
        goes_on = exists & (order < count - 1)  # the last chunk in this order adds to nothing
        added = tl.load(at, mask=goes_on, other=0.0)
        delta = tl.load(delta_sum + chunk * (H * P) + element // N, mask=goes_on, other=0.0)
        decay = tl.exp2(delta * rate)
        entering, carry = scan_rows_exclusive(decay, added, carry, step, ROWS)
        tl.store(at, entering, mask=exists & (order < count))
