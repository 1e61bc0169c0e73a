"""The kernels of the causal convolution: forward, backward, and the single-token step.

A program walks a chunk of one document. Forwards in tiles [STEPS tokens, BLOCK channels]: BLOCK is at least 256 channels a
warp, so a thread holds all tokens of its channels, taps are registers of this tile or of its neighbour
(triton_math.delay_rows), and every element is read from memory once, in 16-byte accesses. The backward has a few channels a
lane, whose rows are tuples of registers.

Where x has fewer channels than the filter, each head of HEAD channels of x serves REPEAT successive heads of filters (its
members): x is repeated by indexing. Blocks are of x's channels (`source`); `channel` is the filter's.
"""

# mypy: disable-error-code="assignment"
# (a tuple grows by +=, which Triton unrolls)

import triton
import triton.language as tl

from m1.kernels.triton_math import delay_rows, row_of, sigmoid


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
def _row(tensor, stride, token, offset, low, high, exists):
    """Row `token` of `tensor` at the given offsets [BLOCK] as fp32; zeros where it is not one of low … high - 1."""
    at = tensor + token.to(tl.int64) * stride + offset
    return tl.load(at, mask=exists & (token >= low) & (token < high), other=0.0).to(tl.float32)


@triton.jit
def _filter_of(weight, bias, channel, exists, BLOCK: tl.constexpr, WIDTH: tl.constexpr, HAS_BIAS: tl.constexpr):
    """The taps, then the bias: a tuple of WIDTH + 1 blocks of channels; and as many zeros."""
    found, zeros = (), ()
    for w in tl.static_range(WIDTH):
        found += (tl.load(weight + channel * WIDTH + w, mask=exists, other=0.0).to(tl.float32),)
        zeros += (tl.zeros([BLOCK], tl.float32),)
    offset = tl.zeros([BLOCK], tl.float32)
    if HAS_BIAS:
        offset += tl.load(bias + channel, mask=exists, other=0.0).to(tl.float32)
    found += (offset,)
    zeros += (tl.zeros([BLOCK], tl.float32),)
    return found, zeros


@triton.jit
def _gradients_of_sums(gradients, inputs, taps, WIDTH: tl.constexpr, STEPS: tl.constexpr, SILU: tl.constexpr):
    """The gradients of STEPS sums of a filter from those of their activations; `inputs` begin WIDTH - 1 rows earlier."""
    found = ()
    for k in tl.static_range(STEPS):
        gradient = gradients[k]
        if SILU:
            pre = taps[WIDTH]
            for w in tl.static_range(WIDTH):
                pre += taps[w] * inputs[k + w]
            weight_of_pre = sigmoid(pre)
            gradient *= weight_of_pre + weight_of_pre * (pre - pre * weight_of_pre)
        found += (gradient,)
    return found


@triton.jit
def _add_input_gradients(totals, gradients, taps, WIDTH: tl.constexpr, STEPS: tl.constexpr):
    """totals_k + Σ_w taps_w · gradients_{k+(WIDTH-1)-w}."""
    found = ()
    for k in tl.static_range(STEPS):
        total = totals[k]
        for w in tl.static_range(WIDTH):
            total += taps[w] * gradients[k + WIDTH - 1 - w]
        found += (total,)
    return found


@triton.jit
def _add_filter_gradients(totals, gradients, inputs, WIDTH: tl.constexpr, STEPS: tl.constexpr):
    """What STEPS sums add to the gradients of the WIDTH taps and of the bias."""
    found = ()
    for w in tl.static_range(WIDTH):
        total = totals[w]
        for k in tl.static_range(STEPS):
            total += gradients[k] * inputs[k + w]
        found += (total,)
    total = totals[WIDTH]
    for k in tl.static_range(STEPS):
        total += gradients[k]
    found += (total,)
    return found


@triton.jit
def _final_gradients(
    d_final, token, stop, document, source, exists, num_sources,
    WIDTH: tl.constexpr, STEPS: tl.constexpr, BLOCK: tl.constexpr, HAS_FINAL: tl.constexpr,
):  # fmt: skip
    """What the final state's gradient adds to those of the STEPS inputs from `token` on."""
    found = ()
    for k in tl.static_range(STEPS):
        gradient = tl.zeros([BLOCK], tl.float32)
        if HAS_FINAL:
            place = token + k - (stop - WIDTH + 1)
            at = d_final + (document.to(tl.int64) * num_sources + source) * (WIDTH - 1) + place
            gradient += tl.load(at, mask=exists & (place >= 0) & (place < WIDTH - 1), other=0.0).to(tl.float32)
        found += (gradient,)
    return found


@triton.jit
def _put(at, gradient, mask, is_more, IS_WHOLE: tl.constexpr):
    """Store a gradient, or if it is not the whole (IS_WHOLE) and there is one already (`is_more`), add to that."""
    if not IS_WHOLE:
        gradient += tl.load(at, mask=mask & is_more, other=0.0).to(tl.float32)
    tl.store(at, gradient.to(at.dtype.element_ty), mask=mask)


@triton.jit
def conv_backward_kernel(
    x, weight, bias, initial_state, dy, d_final, dx, d_filter, d_initial, chunks, bounds, x_token, dy_token, num_sources,
    WIDTH: tl.constexpr, STEPS: tl.constexpr, BLOCK: tl.constexpr, UNIT: tl.constexpr,
    REPEAT: tl.constexpr, MEMBERS: tl.constexpr, HEAD: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_INITIAL: tl.constexpr, HAS_FINAL: tl.constexpr, SILU: tl.constexpr,
):  # fmt: skip
    """Grid (blocks of x's channels, chunks). A program walks its chunk, STEPS >= WIDTH - 1 tokens at a time, for MEMBERS
    filters of each channel at once, whose gradients of x add up in registers; where a head of x has more members than that,
    it walks again and adds to what it stored. Rows are tuples of blocks of channels; a gradient of x is complete, and is
    stored, WIDTH - 1 tokens late, so one tile more ends the walk.

    STEPS divides a chunk's length: a row of a tile after the chunk's end is after its document's end too, and zero.
    d_filter [chunks, WIDTH + 1, D] fp32 takes the partial gradients of the taps, then of the bias.
    """
    HALO: tl.constexpr = WIDTH - 1
    IS_WHOLE: tl.constexpr = REPEAT == MEMBERS
    chunk = tl.program_id(1)
    first = tl.load(chunks + chunk * 4)
    end = tl.load(chunks + chunk * 4 + 1)  # of a chunk that is not in use: 0, and the gradients of its filters are zero
    document = tl.load(chunks + chunk * 4 + 2)
    start = tl.load(bounds + document)
    stop = tl.load(bounds + document + 1)
    source = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    exists = source < num_sources
    state_at = (document.to(tl.int64) * num_sources + source) * HALO + HALO - start
    zero = tl.zeros([1], tl.int32)
    for base in range(0, REPEAT, MEMBERS):
        is_more = (source * 0 + base) > 0
        before, channels, taps, d_taps, after = (), (), (), (), ()
        for k in tl.static_range(HALO):
            token = first + zero - HALO + k
            row = _row(x, x_token * UNIT, token, source, start, stop, exists)
            if HAS_INITIAL:
                in_state = exists & (token < start) & (token >= start - HALO)
                row += tl.load(initial_state + state_at + token, mask=in_state, other=0.0).to(tl.float32)
            before += (row,)
        for member in tl.static_range(MEMBERS):
            channel = _filter_channel(source, base + member, REPEAT, HEAD)
            parameters, zeros = _filter_of(weight, bias, channel, exists, BLOCK, WIDTH, HAS_BIAS)
            channels += (channel,)
            taps += (parameters,)
            d_taps += (zeros,)
            after += (zeros[2:],)
        for place in range(first, end, STEPS):
            tile = zero + place
            inputs, totals, gradients, sums = before, (), (), ()
            for k in tl.static_range(STEPS):
                inputs += (_row(x, x_token * UNIT, tile + k, source, first, stop, exists),)
            for member in tl.static_range(MEMBERS):
                rows = ()
                for k in tl.static_range(STEPS):
                    rows += (_row(dy, dy_token * UNIT, tile + k, channels[member], first, stop, exists),)
                gradients += (rows,)
            totals = _final_gradients(
                d_final, tile - HALO, stop, document, source, exists & ~is_more, num_sources, WIDTH, STEPS, BLOCK, HAS_FINAL
            )
            later = ()
            for member in tl.static_range(MEMBERS):
                rows = _gradients_of_sums(gradients[member], inputs, taps[member], WIDTH, STEPS, SILU)
                sums += (_add_filter_gradients(d_taps[member], rows, inputs, WIDTH, STEPS),)
                rows = after[member] + rows
                totals = _add_input_gradients(totals, rows, taps[member], WIDTH, STEPS)
                later += (rows[STEPS:],)
            for k in tl.static_range(STEPS):
                token = tile - HALO + k
                at = dx + token.to(tl.int64) * num_sources + source
                _put(at, totals[k], exists & (token >= first) & (token < end), is_more, IS_WHOLE)
                if HAS_INITIAL:
                    in_state = exists & (zero + first == start) & (token >= start - HALO) & (token < start)
                    _put(d_initial + state_at + token, totals[k], in_state, is_more, IS_WHOLE)
            before, after, d_taps = inputs[STEPS:], later, sums
        tile = zero + first + tl.cdiv(end - first, STEPS) * STEPS
        inputs = before
        for k in tl.static_range(HALO):
            inputs += (_row(x, x_token * UNIT, tile + k, source, first, stop, exists),)
        totals = _final_gradients(
            d_final, tile - HALO, stop, document, source, exists & ~is_more, num_sources, WIDTH, HALO, BLOCK, HAS_FINAL
        )
        for member in tl.static_range(MEMBERS):
            rows = ()
            for k in tl.static_range(HALO):
                rows += (_row(dy, dy_token * UNIT, tile + k, channels[member], first, stop, exists),)
            rows = after[member] + _gradients_of_sums(rows, inputs, taps[member], WIDTH, HALO, SILU)
            totals = _add_input_gradients(totals, rows, taps[member], WIDTH, HALO)
            at = d_filter + chunk.to(tl.int64) * (WIDTH + 1) * (num_sources * REPEAT) + channels[member]
            for w in tl.static_range(WIDTH + 1):
                tl.store(at + w * (num_sources * REPEAT), d_taps[member][w], mask=exists)
        for k in tl.static_range(HALO):
            token = tile - HALO + k
            at = dx + token.to(tl.int64) * num_sources + source
            _put(at, totals[k], exists & (token >= first) & (token < end), is_more, IS_WHOLE)
        if REPEAT > MEMBERS:
            tl.debug_barrier()  # the next members add to what other threads of this program may have stored


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
