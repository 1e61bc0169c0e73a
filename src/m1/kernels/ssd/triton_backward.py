"""The backward kernels of the SSD scan: one owns the tokens that read (C), one the tokens that write (x, B), one Δ.

With W_ts = exp(l_t - l_s) for s <= t in a chunk, S_ts = C_t·B_s, G_ts = ∂y_t·x_s, h the state that enters the chunk and q the
gradient of the state that leaves it, exp(l_Q - l_s) = w_s:

    ∂C_t = Σ_s W_ts·Δ_s·G_ts·B_s + exp(l_t)·h^T·∂y_t
    ∂B_s = Δ_s·(Σ_t W_ts·G_ts·C_t + w_s·q^T·x_s)       ∂x_s = Δ_s·(Σ_t W_ts·S_ts·∂y_t + w_s·q·B_s) + D·∂y_s

Decays: every term of the loss that passes from a source (token j, or h) to a sink (token i, or q) is proportional to
exp(sum of Δ·A between them), so ∂(Δ_t·A) is the sum of all terms with a source before t and a sink at or after t. With
E_ts = W_ts·Δ_s·G_ts·S_ts that is, within a chunk,

    Σ_{i >= t} (Σ_s E_is - Σ_r E_ri) + Σ_{i >= t} exp(l_i)·C_i·h^T·∂y_i + Σ_{j < t} Δ_j·w_j·B_j·q^T·x_j + exp(l_Q)·q·h.

Only the first sum has terms of both signs that cancel. They are therefore summed in fp32 from the same products, before
these are rounded to the operands of the tensor cores.
"""

import triton
import triton.language as tl

from m1.kernels.ssd.triton_forward import decays_between
from m1.kernels.triton_math import softplus_and_slope

# Rows of the per-token sums [5, H, T] that the first two kernels leave for the third.
READ_INSIDE = tl.constexpr(0)  # Σ_s E_ts
READ_ENTRY = tl.constexpr(1)  # exp(l_t)·C_t·h^T·∂y_t
WRITTEN_INSIDE = tl.constexpr(2)  # Σ_t E_ts / Δ_s
WRITTEN_END = tl.constexpr(3)  # w_s·B_s·q^T·x_s
SKIPPED = tl.constexpr(4)  # ∂y_s·x_s


@triton.jit(do_not_specialize=["num_tokens", "row_blocks"])
def reader_gradient_kernel(
    x, B, C, dy, delta, log_decay, entry, dC, sums, chunks,
    x_token, x_head, b_token, b_head, c_token, c_head, dy_token, dy_head, H, num_tokens, row_blocks, x_repeat, b_repeat,
    P: tl.constexpr, N: tl.constexpr, BP: tl.constexpr, BN: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, HAS_D: tl.constexpr,
    OPERAND: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """∂C [T, H, N] of ROWS tokens of a head, their READ and SKIPPED sums; grid (heads, chunks x blocks of ROWS tokens)."""
    head = tl.program_id(0)
    chunk = (tl.program_id(1) // row_blocks).to(tl.int64)
    start = tl.load(chunks + chunk * 4)
    length = tl.load(chunks + chunk * 4 + 1) - start
    begin = tl.program_id(1) % row_blocks * ROWS
    if begin >= length:
        return
    t = begin + tl.arange(0, ROWS)
    p, n = tl.arange(0, BP), tl.arange(0, BN)
    offset = tl.arange(0, COLUMNS)
    first = start.to(tl.int64)
    x += first * x_token + head // x_repeat * x_head
    B += first * b_token + head // b_repeat * b_head
    C += first * c_token + head * c_head
    dy += first * dy_token + head * dy_head
    delta += head.to(tl.int64) * num_tokens + start
    log_decay += head.to(tl.int64) * num_tokens + start
    has_row = (t < length)[:, None]

    c = tl.load(C + t[:, None] * c_token + n[None, :], mask=has_row & (n < N)[None, :], other=0.0).to(OPERAND)
    dy_t = tl.load(dy + t[:, None] * dy_token + p[None, :], mask=has_row & (p < P)[None, :], other=0.0).to(OPERAND)
    log_t = tl.load(log_decay + t, mask=t < length, other=0.0)
    state_at = entry + (chunk * H + head) * (P * N) + p[:, None] * N + n[None, :]
    state = tl.load(state_at, mask=(p < P)[:, None] & (n < N)[None, :], other=0.0).to(OPERAND)
    log_border = tl.load(log_decay + begin - 1, mask=begin > 0, other=0.0)
    to_row = tl.exp2(tl.where(t < length, log_t - log_border, 0.0))
    dc = tl.dot(dy_t, state, input_precision=PRECISION) * tl.exp2(log_border)
    from_entry = tl.sum(dc * c.to(tl.float32), axis=1) * to_row
    inside = tl.zeros([ROWS], tl.float32)
    skipped = tl.zeros([ROWS], tl.float32)
    for own in tl.static_range(2):  # earlier blocks, then the program's own
        if own:
            dc *= to_row[:, None]
            inside *= to_row
        for block in range(begin if own else 0, tl.minimum(begin + ROWS, length) if own else begin, COLUMNS):
            s = block + offset
            has_column = s < length
            b_s = tl.load(B + s[:, None] * b_token + n[None, :], mask=has_column[:, None] & (n < N)[None, :], other=0.0)
            x_s = tl.load(x + s[:, None] * x_token + p[None, :], mask=has_column[:, None] & (p < P)[None, :], other=0.0)
            log_s = tl.load(log_decay + s, mask=has_column, other=0.0)
            delta_s = tl.load(delta + s, mask=has_column, other=0.0)
            weights = tl.dot(dy_t, tl.trans(x_s.to(OPERAND)), input_precision=PRECISION)
            if own:
                if HAS_D:
                    skipped += tl.sum(tl.where(t[:, None] == s[None, :], weights, 0.0), axis=1)
                weights *= decays_between(t[:, None], s[None, :], log_t[:, None], log_s[None, :], length) * delta_s[None, :]
            else:
                weights *= (tl.exp2(log_border - log_s) * delta_s)[None, :]
            scores = tl.dot(c, tl.trans(b_s.to(OPERAND)), input_precision=PRECISION)
            inside += tl.sum(weights * scores, axis=1)
            dc = tl.dot(weights.to(OPERAND), b_s.to(OPERAND), dc, input_precision=PRECISION)
    out = dC + (first * H + head) * N + t[:, None] * (H * N) + n[None, :]
    tl.store(out, dc.to(dC.dtype.element_ty), mask=has_row & (n < N)[None, :])
    sums += head.to(tl.int64) * num_tokens + start + t
    sums_row = num_tokens.to(tl.int64) * H
    tl.store(sums + READ_INSIDE * sums_row, inside, mask=t < length)
    tl.store(sums + READ_ENTRY * sums_row, from_entry, mask=t < length)
    if HAS_D:
        tl.store(sums + SKIPPED * sums_row, skipped, mask=t < length)


@triton.jit(do_not_specialize=["num_tokens", "row_blocks"])
def writer_gradient_kernel(
    x, B, C, D, dy, delta, log_decay, chunk_decay, q_end, dx, dB, sums, chunks,
    x_token, x_head, b_token, b_head, c_token, c_head, dy_token, dy_head, H, num_tokens, row_blocks, x_repeat, b_repeat,
    SHARED: tl.constexpr, P: tl.constexpr, N: tl.constexpr, BP: tl.constexpr, BN: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, HAS_D: tl.constexpr,
    OPERAND: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """∂x and ∂B of ROWS tokens, summed over SHARED neighbouring heads that read the same x and B, and their WRITTEN sums.

    dx [T, H/SHARED, P], dB [T, H/SHARED, N]; grid (H/SHARED, chunks x blocks of ROWS tokens). Here rows are the tokens s that
    write and columns the tokens t >= s that read.
    """
    chunk = (tl.program_id(1) // row_blocks).to(tl.int64)
    start = tl.load(chunks + chunk * 4)
    length = tl.load(chunks + chunk * 4 + 1) - start
    begin = tl.program_id(1) % row_blocks * ROWS
    if begin >= length:
        return
    s = begin + tl.arange(0, ROWS)
    p, n = tl.arange(0, BP), tl.arange(0, BN)
    offset = tl.arange(0, COLUMNS)
    first = start.to(tl.int64)
    group = tl.program_id(0)
    x += first * x_token + group * SHARED // x_repeat * x_head
    B += first * b_token + group * SHARED // b_repeat * b_head
    has_row = (s < length)[:, None]
    has_x, has_b = has_row & (p < P)[None, :], has_row & (n < N)[None, :]
    is_state = (p < P)[:, None] & (n < N)[None, :]
    dx_s = tl.zeros([ROWS, BP], tl.float32)
    db_s = tl.zeros([ROWS, BN], tl.float32)
    for member in tl.range(0, SHARED, disable_licm=True):
        head = group * SHARED + member
        # x and B come from L2 for every head: kept from one to the next, they would cost registers.
        x_s = tl.load(x + s[:, None] * x_token + p[None, :], mask=has_x, other=0.0).to(OPERAND)
        b_s = tl.load(B + s[:, None] * b_token + n[None, :], mask=has_b, other=0.0).to(OPERAND)
        scalars = head.to(tl.int64) * num_tokens + start
        log_s = tl.load(log_decay + scalars + s, mask=s < length, other=0.0)
        delta_s = tl.load(delta + scalars + s, mask=s < length, other=0.0)
        state_at = q_end + (chunk * H + head) * (P * N) + p[:, None] * N + n[None, :]
        q = tl.load(state_at, mask=is_state, other=0.0).to(OPERAND)
        total_decay = tl.load(chunk_decay + chunk * H + head)
        to_end = tl.exp2(tl.where(s < length, total_decay - log_s, 0.0))
        through_b = tl.dot(x_s, q, input_precision=PRECISION) * to_end[:, None]
        to_sums = sums + scalars + s
        row = num_tokens.to(tl.int64) * H
        tl.store(to_sums + WRITTEN_END * row, tl.sum(through_b * b_s.to(tl.float32), axis=1), mask=s < length)
        db_s += through_b * delta_s[:, None]
        dx_s += tl.dot(b_s, tl.trans(q), input_precision=PRECISION) * (to_end * delta_s)[:, None]
        if HAS_D:
            skip = tl.load(D + head)
        inside = tl.zeros([ROWS], tl.float32)
        c_at = C + first * c_token + head * c_head
        dy_at = dy + first * dy_token + head * dy_head
        log_border = tl.load(log_decay + scalars + tl.minimum(begin + ROWS, length) - 1)
        from_row = tl.exp2(tl.where(s < length, log_border - log_s, 0.0))
        for own in tl.static_range(2):  # later blocks, then the program's own
            if own:
                inside *= from_row
            for block in range(begin if own else begin + ROWS, tl.minimum(begin + ROWS, length) if own else length, COLUMNS):
                t = block + offset
                has_column = (t < length)[:, None]
                c_t = tl.load(c_at + t[:, None] * c_token + n[None, :], mask=has_column & (n < N)[None, :], other=0.0)
                dy_t = tl.load(dy_at + t[:, None] * dy_token + p[None, :], mask=has_column & (p < P)[None, :], other=0.0)
                log_t = tl.load(log_decay + scalars + t, mask=t < length, other=0.0)
                weights = tl.dot(x_s, tl.trans(dy_t.to(OPERAND)), input_precision=PRECISION)
                scores = tl.dot(b_s, tl.trans(c_t.to(OPERAND)), input_precision=PRECISION)
                if own:
                    decay = decays_between(t[None, :], s[:, None], log_t[None, :], log_s[:, None], length)
                    weights *= decay
                    inside += tl.sum(weights * scores, axis=1)
                    weights *= delta_s[:, None]
                    scores *= decay * delta_s[:, None]
                    if HAS_D:
                        scores += tl.where(s[:, None] == t[None, :], skip, 0.0)
                else:
                    to_column = tl.exp2(tl.where(t < length, log_t - log_border, 0.0))[None, :]
                    weights *= to_column
                    inside += tl.sum(weights * scores, axis=1)
                    weights *= (from_row * delta_s)[:, None]
                    scores *= to_column * (from_row * delta_s)[:, None]
                db_s = tl.dot(weights.to(OPERAND), c_t.to(OPERAND), db_s, input_precision=PRECISION)
                dx_s = tl.dot(scores.to(OPERAND), dy_t.to(OPERAND), dx_s, input_precision=PRECISION)
        tl.store(to_sums + WRITTEN_INSIDE * row, inside, mask=s < length)
    groups = tl.num_programs(0)
    tl.store(
        dx + (first * groups + group) * P + s[:, None] * (groups * P) + p[None, :], dx_s.to(dx.dtype.element_ty), mask=has_x
    )
    tl.store(
        dB + (first * groups + group) * N + s[:, None] * (groups * N) + n[None, :], db_s.to(dB.dtype.element_ty), mask=has_b
    )


@triton.jit(do_not_specialize=["num_tokens"])
def step_size_gradient_kernel(
    dt, A, dt_bias, sums, crossing, ddt, dA, dD, d_bias, chunks, dt_token, dt_head, H, num_tokens,
    CROSSINGS: tl.constexpr, CROSSING_BLOCK: tl.constexpr, LENGTH: tl.constexpr, HB: tl.constexpr,
    HAS_D: tl.constexpr, HAS_BIAS: tl.constexpr, SOFTPLUS: tl.constexpr,
):  # fmt: skip
    """∂dt [T, H], and each chunk's part of ∂A, ∂D and ∂dt_bias [chunks, H] (zero for an unused chunk).

    `crossing` [chunks, H, CROSSINGS] holds the parts of exp(l_Q)·q·h. Grid (blocks of heads, chunks).
    """
    chunk = tl.program_id(1)
    start = tl.load(chunks + chunk * 4)
    end = tl.load(chunks + chunk * 4 + 1)
    head = (tl.program_id(0) * HB + tl.arange(0, HB))[:, None]
    offset = tl.arange(0, LENGTH)[None, :]
    exists = head < H
    here = exists & (start + offset < end)
    part = tl.arange(0, CROSSING_BLOCK)[None, :]
    is_part = exists & (part < CROSSINGS)
    parts = tl.load(crossing + (chunk * H + head).to(tl.int64) * CROSSINGS + part, mask=is_part, other=0.0)
    passed = tl.sum(parts, axis=1)[:, None]
    raw_at = dt + start.to(tl.int64) * dt_token + offset * dt_token + head * dt_head
    raw = tl.load(raw_at, mask=here, other=0.0).to(tl.float32)
    if HAS_BIAS:
        raw += tl.load(dt_bias + head, mask=exists, other=0.0)
    delta, slope = raw, tl.full(raw.shape, 1.0, tl.float32)
    if SOFTPLUS:
        delta, slope = softplus_and_slope(raw)
    delta = tl.where(here, delta, 0.0)
    at = sums + head.to(tl.int64) * num_tokens + start + offset
    row = num_tokens.to(tl.int64) * H
    inside = tl.load(at + WRITTEN_INSIDE * row, mask=here, other=0.0)
    to_end = tl.load(at + WRITTEN_END * row, mask=here, other=0.0)
    read = tl.load(at + READ_INSIDE * row, mask=here, other=0.0) + tl.load(at + READ_ENTRY * row, mask=here, other=0.0)
    later = tl.cumsum(read - delta * inside, axis=1, reverse=True)
    earlier = tl.cumsum(delta * to_end, axis=1) - delta * to_end
    d_decay = tl.where(here, later + earlier + passed, 0.0)
    d_delta = (inside + to_end + tl.load(A + head, mask=exists, other=0.0) * d_decay) * slope
    out = ddt + (start + offset).to(tl.int64) * H + head
    tl.store(out, d_delta.to(ddt.dtype.element_ty), mask=here)
    tl.store(dA + chunk * H + head, tl.sum(delta * d_decay, axis=1)[:, None], mask=exists)
    if HAS_D:
        skipped = tl.load(at + SKIPPED * row, mask=here, other=0.0)
        tl.store(dD + chunk * H + head, tl.sum(skipped, axis=1)[:, None], mask=exists)
    if HAS_BIAS:
        tl.store(d_bias + chunk * H + head, tl.sum(tl.where(here, d_delta, 0.0), axis=1)[:, None], mask=exists)
