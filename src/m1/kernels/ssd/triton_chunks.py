"""Kernels of the SSD scan that make and pass on states: step sizes, what a chunk adds to a state, the carry between chunks.

Forwards the carried quantity is the state h [P, N] of a head, which a chunk multiplies by exp(l_Q) and adds
Σ_s Δ_s·exp(l_Q - l_s)·x_s ⊗ B_s to; backwards it is q = ∂L/∂h, to which the chunk adds Σ_t exp(l_t)·∂y_t ⊗ C_t. Here l_t is
the sum of Δ·A from the chunk's first token to token t. It is kept in units of log 2, so that exp2 serves, and only
differences that are negative are exponentiated.
"""

import triton
import triton.language as tl

from m1.kernels.chunk_table import IS_FIRST, IS_LAST
from m1.kernels.triton_math import LOG2E, scan_rows_exclusive, softplus


@triton.jit(do_not_specialize=["num_tokens"])
def step_size_kernel(
    dt, A, dt_bias, delta, log_decay, chunk_decay, chunks, dt_token, dt_head, H, num_tokens,
    LENGTH: tl.constexpr, HB: tl.constexpr, HAS_BIAS: tl.constexpr, SOFTPLUS: tl.constexpr,
):  # fmt: skip
    """Δ and l of every token, [H, T], and l of each chunk's last token, [chunks, H]; grid (blocks of heads, chunks)."""
    chunk = tl.program_id(1)
    start = tl.load(chunks + chunk * 4)
    end = tl.load(chunks + chunk * 4 + 1)
    if start >= end:
        return
    head = (tl.program_id(0) * HB + tl.arange(0, HB))[:, None]
    offset = tl.arange(0, LENGTH)[None, :]
    here = (head < H) & (start + offset < end)
    step = tl.load(dt + start.to(tl.int64) * dt_token + offset * dt_token + head * dt_head, mask=here, other=0.0)
    step = step.to(tl.float32)
    if HAS_BIAS:
        step += tl.load(dt_bias + head, mask=head < H, other=0.0)
    if SOFTPLUS:
        step = softplus(step)
    step = tl.where(here, step, 0.0)
    decay = step * (tl.load(A + head, mask=head < H, other=0.0) * LOG2E)
    at = head.to(tl.int64) * num_tokens + start + offset
    tl.store(delta + at, step, mask=here)
    tl.store(log_decay + at, tl.cumsum(decay, axis=1), mask=here)
    tl.store(chunk_decay + chunk * H + head, tl.sum(decay, axis=1)[:, None], mask=head < H)


@triton.jit(do_not_specialize=["num_tokens"])
def chunk_state_kernel(
    values, keys, delta, log_decay, chunk_decay, added, chunks,
    value_token, value_head, key_token, key_head, H, num_tokens, value_repeat, key_repeat,
    P: tl.constexpr, N: tl.constexpr, BN: tl.constexpr, PB: tl.constexpr, BLOCK: tl.constexpr,
    REVERSE: tl.constexpr, WITH_ENDS: tl.constexpr, OPERAND: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """What a chunk adds to the carried state, from zero: Σ_s w_s·value_s ⊗ key_s into `added` [chunks, H, P, N].

    Forwards values and keys are x and B, w = Δ·exp(l_Q - l); in REVERSE ∂y and C, w = exp(l). Unless WITH_ENDS, a document's
    last chunk in that order is skipped, because nothing follows. Grid (heads x blocks of PB rows, chunks).
    """
    chunk = tl.program_id(1).to(tl.int64)
    start = tl.load(chunks + chunk * 4)
    end = tl.load(chunks + chunk * 4 + 1)
    is_end = (tl.load(chunks + chunk * 4 + 3) & (IS_FIRST if REVERSE else IS_LAST)) != 0
    if start >= end:
        return
    if not WITH_ENDS and is_end:
        return
    row_blocks: tl.constexpr = (P + PB - 1) // PB
    head = tl.program_id(0) // row_blocks
    row = tl.program_id(0) % row_blocks * PB + tl.arange(0, PB)
    n = tl.arange(0, BN)
    offset = tl.arange(0, BLOCK)
    values += start.to(tl.int64) * value_token + head // value_repeat * value_head
    keys += start.to(tl.int64) * key_token + head // key_repeat * key_head
    delta += head.to(tl.int64) * num_tokens + start
    log_decay += head.to(tl.int64) * num_tokens + start
    total_decay = tl.load(chunk_decay + chunk * H + head)
    length = end - start
    state = tl.zeros([PB, BN], tl.float32)
    for block in range(0, length, BLOCK):
        s = block + offset
        here = s < length
        value = tl.load(values + s[:, None] * value_token + row[None, :], mask=here[:, None] & (row < P)[None, :], other=0.0)
        key = tl.load(keys + s[:, None] * key_token + n[None, :], mask=here[:, None] & (n < N)[None, :], other=0.0)
        decay = tl.load(log_decay + s, mask=here, other=0.0)
        if REVERSE:
            weight = tl.where(here, tl.exp2(decay), 0.0)
        else:
            weight = tl.load(delta + s, mask=here, other=0.0) * tl.exp2(tl.where(here, total_decay - decay, 0.0))
        weighted = (key.to(tl.float32) * weight[:, None]).to(OPERAND)
        state = tl.dot(tl.trans(value.to(OPERAND)), weighted, state, input_precision=PRECISION)
    at = added + (chunk * H + head) * (P * N) + row[:, None] * N + n[None, :]
    tl.store(at, state, mask=(row < P)[:, None] & (n < N)[None, :])


@triton.jit
def carry_kernel(
    added, chunk_decay, first_chunk, carried_in, carried_out, entering, entry, crossing,
    H, SIZE: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr,
    HAS_IN: tl.constexpr, HAS_OUT: tl.constexpr, REVERSE: tl.constexpr,
):  # fmt: skip
    """From what each chunk adds to what enters it: e_{c+1} = exp(l_Q)·e_c + added_c into `entering` [chunks, H, SIZE].

    Grid (heads x blocks of BLOCK elements, documents); ROWS chunks are read at once. REVERSE goes from a document's last chunk
    to its first and also sums exp(l_Q)·e_c·entry_c, what the chunk hands through unread, into `crossing` [chunks, H, blocks].
    carried_in, carried_out [n, H, SIZE] enter and leave each document.
    """
    blocks: tl.constexpr = (SIZE + BLOCK - 1) // BLOCK
    document = tl.program_id(1)
    head = tl.program_id(0) // blocks
    first = tl.load(first_chunk + document)
    count = tl.load(first_chunk + document + 1) - first
    place = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    exists = (place < SIZE)[None, :]
    outside = (document.to(tl.int64) * H + head) * SIZE + place
    carry = tl.zeros([BLOCK], tl.float32)
    if HAS_IN:
        carry += tl.load(carried_in + outside, mask=place < SIZE, other=0.0).to(tl.float32)
    step = tl.arange(0, ROWS)[:, None]
    for block in range(0, count, ROWS):
        order = block + step
        chunk = first + (count - 1 - order if REVERSE else order).to(tl.int64)
        at = (chunk * H + head) * SIZE + place[None, :]
        in_use = order < count
        adds = in_use if HAS_OUT else order < count - 1
        addition = tl.load(added + at, mask=exists & adds, other=0.0)
        decay = tl.exp2(tl.load(chunk_decay + chunk * H + head, mask=in_use, other=0.0))
        enters, carry = scan_rows_exclusive(tl.broadcast_to(decay, [ROWS, BLOCK]), addition, carry, step, ROWS)
        tl.store(entering + at, enters.to(entering.dtype.element_ty), mask=exists & in_use)
        if REVERSE:
            state = tl.load(entry + at, mask=exists & in_use, other=0.0).to(tl.float32)
            passed = tl.sum(enters * state * decay, axis=1)[:, None]
            tl.store(crossing + (chunk * H + head) * blocks + tl.program_id(0) % blocks, passed, mask=in_use)
    if HAS_OUT:
        tl.store(carried_out + outside, carry, mask=place < SIZE)
