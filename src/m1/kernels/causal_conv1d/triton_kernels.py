"""The kernels of the causal convolution: forward, backward, and the single-token step.

A program walks a chunk of one document in tiles [STEPS tokens, BLOCK channels]. BLOCK is at least 256 channels a warp, so
a thread holds all tokens of its channels: taps are registers of this tile or of its neighbour (triton_math.delay_rows),
and every element is read from memory once, in 16-byte accesses.

Where x has fewer channels than the filter, each head of HEAD channels of x serves REPEAT successive heads of filters (its
members): x is repeated by indexing. Blocks are of x's channels (`source`); `channel` is the filter's.
"""

import triton
import triton.language as tl

from m1.kernels.chunk_table import IS_FIRST
from m1.kernels.triton_math import add_rows, advance_rows, delay_rows, row_of, sigmoid


@triton.jit
def _filter_channel(source, member, REPEAT: tl.constexpr, HEAD: tl.constexpr):
    """The channel of the filter that convolves channel `source` of x for the given member of its group."""
    if REPEAT == 1:
        return source
    else:
        return source // HEAD * (HEAD * REPEAT) + member * HEAD + source % HEAD


@triton.jit
def _inputs(
    x, initial_state, token, start, stop, document, source, exists, x_token, num_sources,
    WIDTH: tl.constexpr, UNIT: tl.constexpr, HAS_INITIAL: tl.constexpr,
):  # fmt: skip
    """x at the given tokens [STEPS, 1] of a document [start, stop), as fp32; before it, its initial state or zeros."""
    inside = exists & (token >= start) & (token < stop)
    values = tl.load(x + token.to(tl.int64) * (x_token * UNIT) + source, mask=inside, other=0.0).to(tl.float32)
    if HAS_INITIAL:
        place = token - start + (WIDTH - 1)
        state = initial_state + (document.to(tl.int64) * num_sources + source) * (WIDTH - 1) + place
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
    x, weight, bias, initial_state, y, final_state, chunks, bounds, x_token, num_sources,
    WIDTH: tl.constexpr, TAPS: tl.constexpr, STEPS: tl.constexpr, BLOCK: tl.constexpr, UNIT: tl.constexpr,
    REPEAT: tl.constexpr, HEAD: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_INITIAL: tl.constexpr, HAS_FINAL: tl.constexpr, SILU: tl.constexpr,
):  # fmt: skip
    """Grid (blocks of x's channels x members, chunks); members side by side, so that the L2 cache has their x."""
    chunk = tl.program_id(1)
    first = tl.load(chunks + chunk * 4)
    end = tl.load(chunks + chunk * 4 + 1)
    if first >= end:
        return
    document = tl.load(chunks + chunk * 4 + 2)
    start = tl.load(bounds + document)
    member = tl.zeros([1, 1], tl.int32) + tl.program_id(0) % REPEAT
    source = (tl.program_id(0) // REPEAT * BLOCK + tl.arange(0, BLOCK))[None, :]
    exists = source < num_sources
    channel = _filter_channel(source, member, REPEAT, HEAD)
    step = tl.arange(0, STEPS)[:, None]
    taps, tap, offset = _filter_parameters(weight, bias, channel, exists, WIDTH, TAPS, BLOCK, HAS_BIAS)
    window_start = tl.load(bounds + document + 1) - (WIDTH - 1)  # of the final state
    window = final_state
    if HAS_FINAL:
        window = final_state + (document.to(tl.int64) * num_sources + source) * (WIDTH - 1) - window_start

    token = first - STEPS + step
    before = _inputs(
        x, initial_state, token, start, end, document, source, exists, x_token, num_sources, WIDTH, UNIT, HAS_INITIAL
    )
    if HAS_FINAL:
        in_window = exists & (token >= window_start) & (token < start) & (member == 0)
        tl.store(window + token, before.to(final_state.dtype.element_ty), mask=in_window)
    for tile in range(first, end, STEPS):
        token = tile + step
        values = _inputs(
            x, initial_state, token, start, end, document, source, exists, x_token, num_sources, WIDTH, UNIT, False
        )
        out = _filter(values, before, taps, tap, offset, step, WIDTH, STEPS)
        if SILU:
            out *= sigmoid(out)
        inside = exists & (token < end)
        y_at = y + token.to(tl.int64) * (num_sources * REPEAT) + channel
        tl.store(y_at, out.to(y.dtype.element_ty), mask=inside)
        if HAS_FINAL:
            in_window = inside & (token >= window_start) & (member == 0)
            tl.store(window + token, values.to(final_state.dtype.element_ty), mask=in_window)
        before = values


@triton.jit
def _final_gradient(
    d_final, token, window_start, stop, document, source, exists, num_sources, WIDTH: tl.constexpr, HAS_FINAL: tl.constexpr
):
    """What the final state's gradient adds to the inputs at the given tokens, [STEPS, BLOCK]."""
    gradient = (token + source).to(tl.float32) * 0.0
    if HAS_FINAL:
        at = d_final + (document.to(tl.int64) * num_sources + source) * (WIDTH - 1) + token - window_start
        gradient = tl.load(at, mask=exists & (token >= window_start) & (token < stop), other=0.0).to(tl.float32)
    return gradient


@triton.jit
def _add_to(at, gradient, mask, member, REPEAT: tl.constexpr):
    """Store the gradient of the first member, add that of the others to what is there."""
    if REPEAT > 1:
        gradient += tl.load(at, mask=mask & (member > 0), other=0.0).to(tl.float32)
    tl.store(at, gradient.to(at.dtype.element_ty), mask=mask)


@triton.jit
def conv_backward_kernel(
    x, weight, bias, initial_state, dy, d_final, dx, d_filter, d_initial, chunks, bounds, x_token, dy_token, num_sources,
    WIDTH: tl.constexpr, TAPS: tl.constexpr, STEPS: tl.constexpr, BLOCK: tl.constexpr, UNIT: tl.constexpr,
    REPEAT: tl.constexpr, HEAD: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_INITIAL: tl.constexpr, HAS_FINAL: tl.constexpr, SILU: tl.constexpr,
):  # fmt: skip
    """Grid (blocks of x's channels, chunks). A program walks its chunk backwards from one tile after its end, once for each
    member, and adds their gradients of x up in memory, where its tile stays in the cache.

    d_filter [chunks, WIDTH + 1, D] fp32 takes the partial gradients of the taps, then of the bias.
    """
    chunk = tl.program_id(1)
    first = tl.load(chunks + chunk * 4)
    end = tl.load(chunks + chunk * 4 + 1)
    source = (tl.program_id(0) * BLOCK + tl.arange(0, BLOCK))[None, :]
    exists = source < num_sources
    tap = tl.arange(0, TAPS)[:, None]
    document = tl.load(chunks + chunk * 4 + 2)
    for index in range(REPEAT):
        member = tl.zeros([1, 1], tl.int32) + index
        channel = _filter_channel(source, member, REPEAT, HEAD)
        d_taps = tl.zeros([TAPS, BLOCK], tl.float32)
        d_bias = tl.zeros([1, BLOCK], tl.float32)
        if first < end:
            start = tl.load(bounds + document)
            stop = tl.load(bounds + document + 1)
            step = tl.arange(0, STEPS)[:, None]
            taps, _, offset = _filter_parameters(weight, bias, channel, exists, WIDTH, TAPS, BLOCK, HAS_BIAS)
            num_tiles = tl.cdiv(end - first, STEPS)
            token = first + num_tiles * STEPS + step
            values = _inputs(
                x, initial_state, token, start, stop, document, source, exists, x_token, num_sources, WIDTH, UNIT, False
            )
            after = tl.zeros([STEPS, BLOCK], tl.float32)
            for _ in range(num_tiles + 1):
                before = _inputs(
                    x, initial_state, token - STEPS, start, stop, document, source, exists, x_token, num_sources,
                    WIDTH, UNIT, HAS_INITIAL,
                )  # fmt: skip
                dy_at = dy + token.to(tl.int64) * (dy_token * UNIT) + channel
                gradient = tl.load(dy_at, mask=exists & (token < stop), other=0.0).to(tl.float32)
                if SILU:
                    pre = _filter(values, before, taps, tap, offset, step, WIDTH, STEPS)
                    weight_of_pre = sigmoid(pre)
                    gradient *= weight_of_pre * (1.0 + pre * (1.0 - weight_of_pre))
                dx_t = _final_gradient(
                    d_final, token, stop - WIDTH + 1, stop, document, source, exists & (member == 0), num_sources,
                    WIDTH, HAS_FINAL,
                )  # fmt: skip
                own = tl.where(token < end, gradient, 0.0)
                for w in tl.static_range(WIDTH):
                    dx_t += row_of(taps, tap, w) * advance_rows(gradient, after, step, WIDTH - 1 - w, STEPS)
                    moved = delay_rows(values, before, step, WIDTH - 1 - w, STEPS)
                    d_tap = add_rows(row_of(d_taps, tap, w), own, moved, step, STEPS)
                    d_taps = tl.where(tap == w, tl.expand_dims(d_tap, 0), d_taps)
                d_bias += tl.expand_dims(tl.sum(own, axis=0), 0)
                _add_to(dx + token.to(tl.int64) * num_sources + source, dx_t, exists & (token < end), member, REPEAT)
                values, after = before, gradient
                token -= STEPS
            if HAS_INITIAL and (tl.load(chunks + chunk * 4 + 3) & IS_FIRST) != 0:
                dx_t = _final_gradient(
                    d_final, token, stop - WIDTH + 1, stop, document, source, exists & (member == 0), num_sources,
                    WIDTH, HAS_FINAL,
                )  # fmt: skip
                nothing = tl.zeros([STEPS, BLOCK], tl.float32)
                for w in tl.static_range(WIDTH):
                    dx_t += row_of(taps, tap, w) * advance_rows(nothing, after, step, WIDTH - 1 - w, STEPS)
                place = token - start + (WIDTH - 1)
                at = d_initial + (document.to(tl.int64) * num_sources + source) * (WIDTH - 1) + place
                _add_to(at, dx_t, exists & (place >= 0), member, REPEAT)
        d_filter_at = d_filter + chunk.to(tl.int64) * (WIDTH + 1) * (num_sources * REPEAT) + channel
        tl.store(d_filter_at + tap * (num_sources * REPEAT), d_taps, mask=exists & (tap < WIDTH))
        tl.store(d_filter_at + WIDTH * (num_sources * REPEAT), d_bias, mask=exists)
        if REPEAT > 1:
            tl.debug_barrier()  # the next member adds to what other threads of this program may have stored


@triton.jit
def conv_update_kernel(
    x, state, weight, bias, slots, y, x_row, state_slot, state_channel, state_place, num_slots, num_sources,
    WIDTH: tl.constexpr, PLACES: tl.constexpr, BLOCK: tl.constexpr, REPEAT: tl.constexpr, HEAD: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_SLOTS: tl.constexpr, SILU: tl.constexpr,
):  # fmt: skip
    """Grid (blocks of x's channels, sequences); a window is a tile [BLOCK, PLACES].

    Threads may hold copies of one element, so all is loaded before a barrier and stored after it.
    """
    sequence = tl.program_id(1).to(tl.int64)
    slot = sequence
    if HAS_SLOTS:
        slot = tl.load(slots + sequence)
    source = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    exists = source < num_sources
    y_at = y + sequence * (num_sources * REPEAT)
    if (slot < 0) | (slot >= num_slots):
        for member in tl.static_range(REPEAT):
            channel = _filter_channel(source, member, REPEAT, HEAD)
            tl.store(y_at + channel, tl.zeros([BLOCK], y.dtype.element_ty), mask=exists)
        return
    newest = tl.load(x + sequence * x_row + source, mask=exists, other=0.0)
    place = tl.arange(0, PLACES)[None, :]
    in_window = exists[:, None] & (place < WIDTH - 1)
    window_at = state + slot * state_slot + (source * state_channel)[:, None] + place * state_place
    past = tl.load(window_at, mask=in_window, other=0.0)
    for member in tl.static_range(REPEAT):
        channel = _filter_channel(source, member, REPEAT, HEAD)
        taps = weight + channel * WIDTH
        out = newest.to(tl.float32) * tl.load(taps + (WIDTH - 1), mask=exists, other=0.0).to(tl.float32)
        if HAS_BIAS:
            out += tl.load(bias + channel, mask=exists, other=0.0).to(tl.float32)
        past_taps = tl.load(taps[:, None] + place, mask=in_window, other=0.0).to(tl.float32)
        out += tl.sum(past.to(tl.float32) * past_taps, axis=1)
        if SILU:
            out *= sigmoid(out)
        tl.store(y_at + channel, out.to(y.dtype.element_ty), mask=exists)
    tl.debug_barrier()
    tl.store(window_at - state_place, past, mask=in_window & (place > 0))
    if WIDTH > 1:
        newest_at = state + slot * state_slot + source * state_channel + (WIDTH - 2) * state_place
        tl.store(newest_at, newest.to(state.dtype.element_ty), mask=exists)
