"""The kernels of the causal convolution: forward, backward, and the single-token step.

A program walks a chunk of one document in tiles [STEPS tokens, BLOCK channels]. BLOCK is at least 256 channels a warp, so
a thread holds all tokens of its channels: taps are registers of this tile or of its neighbour (triton_math.delay_rows),
and every element is read from memory once, in 16-byte accesses.
"""

import triton
import triton.language as tl

from m1.kernels.chunk_table import IS_FIRST
from m1.kernels.triton_math import add_rows, advance_rows, delay_rows, row_of, sigmoid


@triton.jit
def _inputs(
    x, initial_state, token, start, stop, document, channel, exists, x_token, D,
    WIDTH: tl.constexpr, UNIT: tl.constexpr, HAS_INITIAL: tl.constexpr,
):  # fmt: skip
    """x at the given tokens [STEPS, 1] of a document [start, stop), as fp32; before it, its initial state or zeros."""
    inside = exists & (token >= start) & (token < stop)
    values = tl.load(x + token.to(tl.int64) * (x_token * UNIT) + channel, mask=inside, other=0.0).to(tl.float32)
    if HAS_INITIAL:
        place = token - start + (WIDTH - 1)
        state = initial_state + (document.to(tl.int64) * D + channel) * (WIDTH - 1) + place
        values += tl.load(state, mask=exists & (token < start) & (place >= 0), other=0.0).to(tl.float32)
    return values


@triton.jit
def _filter(values, before, taps, tap, bias, step, WIDTH: tl.constexpr, STEPS: tl.constexpr):
    """bias + Σ_w taps_w · x_{t-(WIDTH-1)+w}, [STEPS, BLOCK]."""
    out = tl.zeros_like(values) + bias
    for w in tl.static_range(WIDTH):
        out += row_of(taps, tap, w) * delay_rows(values, before, step, WIDTH - 1 - w, STEPS)
    return out


@triton.jit
def _filter_parameters(
    weight, bias, channel, exists, WIDTH: tl.constexpr, TAPS: tl.constexpr, BLOCK: tl.constexpr, HAS_BIAS: tl.constexpr
):
    """The taps [TAPS, BLOCK], their index [TAPS, 1] and the bias [1, BLOCK]."""
    tap = tl.arange(0, TAPS)[:, None]
    taps = tl.load(weight + channel * WIDTH + tap, mask=exists & (tap < WIDTH), other=0.0).to(tl.float32)
    offset = tl.zeros([1, BLOCK], tl.float32)
    if HAS_BIAS:
        offset += tl.load(bias + channel, mask=exists, other=0.0).to(tl.float32)
    return taps, tap, offset


@triton.jit
def conv_kernel(
    x, weight, bias, initial_state, y, final_state, chunks, bounds, x_token, D,
    WIDTH: tl.constexpr, TAPS: tl.constexpr, STEPS: tl.constexpr, BLOCK: tl.constexpr, UNIT: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_INITIAL: tl.constexpr, HAS_FINAL: tl.constexpr, SILU: tl.constexpr,
):  # fmt: skip
    """Grid (blocks of channels, chunks)."""
    chunk = tl.program_id(1)
    first = tl.load(chunks + chunk * 4)
    end = tl.load(chunks + chunk * 4 + 1)
    if first >= end:
        return
    document = tl.load(chunks + chunk * 4 + 2)
    start = tl.load(bounds + document)
    channel = (tl.program_id(0) * BLOCK + tl.arange(0, BLOCK))[None, :]
    exists = channel < D
    step = tl.arange(0, STEPS)[:, None]
    taps, tap, offset = _filter_parameters(weight, bias, channel, exists, WIDTH, TAPS, BLOCK, HAS_BIAS)
    window_start = tl.load(bounds + document + 1) - (WIDTH - 1)  # of the final state
    window = final_state
    if HAS_FINAL:
        window = final_state + (document.to(tl.int64) * D + channel) * (WIDTH - 1) - window_start

    token = first - STEPS + step
    before = _inputs(x, initial_state, token, start, end, document, channel, exists, x_token, D, WIDTH, UNIT, HAS_INITIAL)
    if HAS_FINAL:
        in_window = exists & (token >= window_start) & (token < start)
        tl.store(window + token, before.to(final_state.dtype.element_ty), mask=in_window)
    for tile in range(first, end, STEPS):
        token = tile + step
        values = _inputs(x, initial_state, token, start, end, document, channel, exists, x_token, D, WIDTH, UNIT, False)
        out = _filter(values, before, taps, tap, offset, step, WIDTH, STEPS)
        if SILU:
            out *= sigmoid(out)
        inside = exists & (token < end)
        tl.store(y + token.to(tl.int64) * D + channel, out.to(y.dtype.element_ty), mask=inside)
        if HAS_FINAL:
            tl.store(window + token, values.to(final_state.dtype.element_ty), mask=inside & (token >= window_start))
        before = values


@triton.jit
def _final_gradient(
    d_final, token, window_start, stop, document, channel, exists, D, WIDTH: tl.constexpr, HAS_FINAL: tl.constexpr
):
    """What the final state's gradient adds to the inputs at the given tokens, [STEPS, BLOCK]."""
    gradient = (token + channel).to(tl.float32) * 0.0
    if HAS_FINAL:
        at = d_final + (document.to(tl.int64) * D + channel) * (WIDTH - 1) + token - window_start
        gradient = tl.load(at, mask=exists & (token >= window_start) & (token < stop), other=0.0).to(tl.float32)
    return gradient


@triton.jit
def conv_backward_kernel(
    x, weight, bias, initial_state, dy, d_final, dx, d_filter, d_initial, chunks, bounds, x_token, dy_token, D,
    WIDTH: tl.constexpr, TAPS: tl.constexpr, STEPS: tl.constexpr, BLOCK: tl.constexpr, UNIT: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_INITIAL: tl.constexpr, HAS_FINAL: tl.constexpr, SILU: tl.constexpr,
):  # fmt: skip
    """Grid (blocks of channels, chunks); a program walks its chunk backwards, from one tile after its end.

    d_filter [chunks, WIDTH + 1, D] fp32 takes the partial gradients of the taps, then of the bias.
    """
    chunk = tl.program_id(1)
    first = tl.load(chunks + chunk * 4)
    end = tl.load(chunks + chunk * 4 + 1)
    channel = (tl.program_id(0) * BLOCK + tl.arange(0, BLOCK))[None, :]
    exists = channel < D
    d_filter_at = d_filter + chunk.to(tl.int64) * (WIDTH + 1) * D + channel
    tap = tl.arange(0, TAPS)[:, None]
    d_taps = tl.zeros([TAPS, BLOCK], tl.float32)
    d_bias = tl.zeros([1, BLOCK], tl.float32)
    if first < end:
        document = tl.load(chunks + chunk * 4 + 2)
        start = tl.load(bounds + document)
        stop = tl.load(bounds + document + 1)
        step = tl.arange(0, STEPS)[:, None]
        taps, _, offset = _filter_parameters(weight, bias, channel, exists, WIDTH, TAPS, BLOCK, HAS_BIAS)
        num_tiles = tl.cdiv(end - first, STEPS)
        token = first + num_tiles * STEPS + step
        values = _inputs(x, initial_state, token, start, stop, document, channel, exists, x_token, D, WIDTH, UNIT, False)
        after = tl.zeros([STEPS, BLOCK], tl.float32)
        for _ in range(num_tiles + 1):
            before = _inputs(
                x, initial_state, token - STEPS, start, stop, document, channel, exists, x_token, D, WIDTH, UNIT, HAS_INITIAL
            )
            dy_at = dy + token.to(tl.int64) * (dy_token * UNIT) + channel
            gradient = tl.load(dy_at, mask=exists & (token < stop), other=0.0).to(tl.float32)
            if SILU:
                pre = _filter(values, before, taps, tap, offset, step, WIDTH, STEPS)
                weight_of_pre = sigmoid(pre)
                gradient *= weight_of_pre * (1.0 + pre * (1.0 - weight_of_pre))
            dx_t = _final_gradient(d_final, token, stop - WIDTH + 1, stop, document, channel, exists, D, WIDTH, HAS_FINAL)
            own = tl.where(token < end, gradient, 0.0)
            for w in tl.static_range(WIDTH):
                dx_t += row_of(taps, tap, w) * advance_rows(gradient, after, step, WIDTH - 1 - w, STEPS)
                moved = delay_rows(values, before, step, WIDTH - 1 - w, STEPS)
                d_tap = add_rows(row_of(d_taps, tap, w), own, moved, step, STEPS)
                d_taps = tl.where(tap == w, tl.expand_dims(d_tap, 0), d_taps)
            d_bias += tl.expand_dims(tl.sum(own, axis=0), 0)
            tl.store(dx + token.to(tl.int64) * D + channel, dx_t.to(dx.dtype.element_ty), mask=exists & (token < end))
            values, after = before, gradient
            token -= STEPS
        if HAS_INITIAL and (tl.load(chunks + chunk * 4 + 3) & IS_FIRST) != 0:
            dx_t = _final_gradient(d_final, token, stop - WIDTH + 1, stop, document, channel, exists, D, WIDTH, HAS_FINAL)
            nothing = tl.zeros([STEPS, BLOCK], tl.float32)
            for w in tl.static_range(WIDTH):
                dx_t += row_of(taps, tap, w) * advance_rows(nothing, after, step, WIDTH - 1 - w, STEPS)
            place = token - start + (WIDTH - 1)
            at = d_initial + (document.to(tl.int64) * D + channel) * (WIDTH - 1) + place
            tl.store(at, dx_t.to(d_initial.dtype.element_ty), mask=exists & (place >= 0))
    tl.store(d_filter_at + tap * D, d_taps, mask=exists & (tap < WIDTH))
    tl.store(d_filter_at + WIDTH * D, d_bias, mask=exists)


@triton.jit
def conv_update_kernel(
    x, state, weight, bias, slots, y, x_row, state_slot, state_channel, state_place, num_slots, D,
    WIDTH: tl.constexpr, BLOCK: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_SLOTS: tl.constexpr, SILU: tl.constexpr,
):  # fmt: skip
    """Grid (blocks of channels, sequences)."""
    sequence = tl.program_id(1).to(tl.int64)
    slot = sequence
    if HAS_SLOTS:
        slot = tl.load(slots + sequence)
    channel = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    y_at = y + sequence * D + channel
    if (slot < 0) | (slot >= num_slots):
        tl.store(y_at, tl.zeros([BLOCK], y.dtype.element_ty), mask=channel < D)
        return
    exists = channel < D
    newest = tl.load(x + sequence * x_row + channel, mask=exists, other=0.0)
    last_tap = tl.load(weight + channel * WIDTH + (WIDTH - 1), mask=exists, other=0.0).to(tl.float32)
    out = newest.to(tl.float32) * last_tap
    if HAS_BIAS:
        out += tl.load(bias + channel, mask=exists, other=0.0).to(tl.float32)
    at = state + slot * state_slot + channel * state_channel
    for w in tl.static_range(WIDTH - 1):
        value = tl.load(at + w * state_place, mask=exists, other=0.0)
        out += value.to(tl.float32) * tl.load(weight + channel * WIDTH + w, mask=exists, other=0.0).to(tl.float32)
        if w > 0:
            tl.store(at + (w - 1) * state_place, value, mask=exists)
    if WIDTH > 1:
        tl.store(at + (WIDTH - 2) * state_place, newest.to(state.dtype.element_ty), mask=exists)
    if SILU:
        out *= sigmoid(out)
    tl.store(y_at, out.to(y.dtype.element_ty), mask=exists)
