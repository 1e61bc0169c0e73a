"""The forward kernel of the SSD scan: a chunk's outputs from the state that enters it and from its own tokens.

Chunks, decays l and step sizes Δ are those of triton_chunks.py. A program's own tokens stand in blocks: within its own block
the decay exp(l_t - l_s) is taken for every pair; between its block and another it factors at the border, exp(l_t - l_b)·
exp(l_b - l_s), both at most 1, so that a pair costs a product and no exponential.
"""

import triton
import triton.language as tl


@triton.jit
def decays_between(later, earlier, log_later, log_earlier, end):
    """exp(l_t - l_s) for tokens s <= t < end, else 0, with t along `later`'s axis and s along `earlier`'s."""
    is_causal = (earlier <= later) & (later < end)
    return tl.exp2(tl.where(is_causal, log_later - log_earlier, float("-inf")))


@triton.jit(do_not_specialize=["num_tokens", "row_blocks"])
def output_kernel(
    x, B, C, D, delta, log_decay, entry, y, chunks,
    x_token, x_head, b_token, b_head, c_token, c_head, H, num_tokens, row_blocks, x_repeat, b_repeat,
    P: tl.constexpr, N: tl.constexpr, BP: tl.constexpr, BN: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, HAS_D: tl.constexpr,
    OPERAND: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """y_t = Σ_{s <= t} exp(l_t - l_s)·(C_t·B_s)·Δ_s·x_s + exp(l_t)·C_t·h_entry + D·x_t for ROWS tokens of a head.

    Grid (heads, chunks x blocks of ROWS tokens): heads that share x and B run side by side.
    """
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
    delta += head.to(tl.int64) * num_tokens + start
    log_decay += head.to(tl.int64) * num_tokens + start
    has_row = (t < length)[:, None]

    c = tl.load(C + t[:, None] * c_token + n[None, :], mask=has_row & (n < N)[None, :], other=0.0).to(OPERAND)
    log_t = tl.load(log_decay + t, mask=t < length, other=0.0)
    state_at = entry + (chunk * H + head) * (P * N) + p[:, None] * N + n[None, :]
    state = tl.load(state_at, mask=(p < P)[:, None] & (n < N)[None, :], other=0.0).to(OPERAND)
    log_border = tl.load(log_decay + begin - 1, mask=begin > 0, other=0.0)
    out = tl.dot(c, tl.trans(state), input_precision=PRECISION) * tl.exp2(log_border)
    for own in tl.static_range(2):  # earlier blocks, then the program's own
        if own:
            out *= tl.exp2(tl.where(t < length, log_t - log_border, 0.0))[:, None]
        for block in range(begin if own else 0, tl.minimum(begin + ROWS, length) if own else begin, COLUMNS):
            s = block + offset
            has_column = s < length
            b_s = tl.load(B + s[:, None] * b_token + n[None, :], mask=has_column[:, None] & (n < N)[None, :], other=0.0)
            x_s = tl.load(x + s[:, None] * x_token + p[None, :], mask=has_column[:, None] & (p < P)[None, :], other=0.0)
            log_s = tl.load(log_decay + s, mask=has_column, other=0.0)
            delta_s = tl.load(delta + s, mask=has_column, other=0.0)
            scores = tl.dot(c, tl.trans(b_s.to(OPERAND)), input_precision=PRECISION)
            if own:
                scores *= decays_between(t[:, None], s[None, :], log_t[:, None], log_s[None, :], length) * delta_s[None, :]
            else:
                scores *= (tl.exp2(log_border - log_s) * delta_s)[None, :]
            out = tl.dot(scores.to(OPERAND), x_s.to(OPERAND), out, input_precision=PRECISION)
    exists = has_row & (p < P)[None, :]
    if HAS_D:
        own = tl.load(x + t[:, None] * x_token + p[None, :], mask=exists, other=0.0).to(tl.float32)
        out += tl.load(D + head) * own
    y += (first * H + head) * P
    tl.store(y + t[:, None] * (H * P) + p[None, :], out.to(y.dtype.element_ty), mask=exists)
