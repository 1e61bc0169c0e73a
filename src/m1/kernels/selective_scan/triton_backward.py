"""The backward kernels of the selective scan; tiles and pointers are those of triton_forward.py.

With q_t = ∂L/∂h_t through later tokens, g_t = ∂L/∂h_t = q_t + C_t·∂ỹ_t (ỹ before the gate) and q_{t-1} = a_t·g_t, all
gradients but two follow from g and from h alone. The two are those of Δ and A, through a = exp(Δ·A): both need
r_t = a_t·g_t·h_{t-1}, a product of a quantity that runs forwards and one that runs backwards. It telescopes:

    g_t·h_t = C_t·∂ỹ_t·h_t + r_{t+1}   and   r_t = g_t·(h_t - Δ_t·x_t·B_t)   so   r_t = r_{t+1} + C_t·∂ỹ_t·h_t - g_t·Δ_t·x_t·B_t

Hence ∂Δ_t ∋ Σ_n A·r_t is a suffix sum, ∂A = Σ_t Δ_t·r_t = S_end·r_end + Σ_t S_t·(C_t·∂ỹ_t·h_t - g_t·Δ_t·x_t·B_t) with
S the prefix sums of Δ, and a chunk needs one sweep forwards for h and one backwards for g. The differences cancel, and
their rounding is weighed by S, so both sums restart after every span of SPAN tokens from r_end = q_end·h_end: only these
h are stored between the sweeps. In fp32 over spans of 64, ∂A's relative error is 1e-5 where Δ is about 1 or less, 3e-4
where Δ·|A| reaches 50 in a token and the gradient is next to nothing.
"""

import triton
import triton.language as tl

from m1.kernels.chunk_table import IS_FIRST
from m1.kernels.selective_scan.triton_forward import tile_channels
from m1.kernels.triton_math import (
    LN2,
    LOG2E,
    add_rows,
    scan_rows,
    scan_rows_backwards,
    sigmoid,
    softplus,
    softplus_and_slope,
)


@triton.jit
def chunk_gradient_kernel(
    dt, A, C, z, dt_bias, dy, q, delta_sum, chunks,
    dt_token, dt_head, c_token, c_head, z_token, z_head, dy_token, dy_head,
    H,
    P: tl.constexpr, N: tl.constexpr, BN: tl.constexpr, STEPS: tl.constexpr,
    HB: tl.constexpr, PI: tl.constexpr, PJ: tl.constexpr, STAGES: tl.constexpr, UNIT: tl.constexpr,
    HAS_Z: tl.constexpr, HAS_BIAS: tl.constexpr, SOFTPLUS: tl.constexpr,
):  # fmt: skip
    """What a chunk's outputs contribute to the gradient of the state that enters it: Σ_t exp(A·S_t)·C_t·∂ỹ_t into `q`.

    Also the chunk's sum of Δ, for the carry. A document's first chunk is skipped: the main kernel yields its gradient.
    Grid (channel blocks, chunks).
    """
    chunk = tl.program_id(1).to(tl.int64)
    start = tl.load(chunks + chunk * 4)
    length = tl.load(chunks + chunk * 4 + 1) - start
    is_first = (tl.load(chunks + chunk * 4 + 3) & IS_FIRST) != 0
    if length <= 0 or is_first:
        return
    head, row, exists, _ = tile_channels(H, P, HB, PI, PJ)
    channel = head * P + row
    n = tl.arange(0, BN)
    element = channel[:, :, :, :, None] * N + n
    has_element = exists[:, :, :, :, None] & (n < N)
    rate = tl.load(A + element, mask=has_element, other=0.0) * LOG2E
    gradient = tl.sum(tl.zeros_like(rate), axis=0)
    if HAS_BIAS:
        bias = tl.load(dt_bias + channel, mask=exists, other=0.0)
    total = tl.zeros([PI, HB, PJ], tl.float32)

    step = tl.arange(0, STEPS)[:, None, None, None]
    state_step = tl.arange(0, STEPS)[:, None, None, None, None]
    narrow_step = tl.arange(0, STEPS)[:, None, None]
    narrow_head = tl.reshape(head, [1, HB, 1])
    narrow_exists = (narrow_head < H) & (n < N)
    token = start.to(tl.int64)
    dt_place = step * (dt_token * UNIT) + head * dt_head + row
    dt_at = dt + token * (dt_token * UNIT)
    dy_place = step * (dy_token * UNIT) + head * dy_head + row
    dy_at = dy + token * (dy_token * UNIT)
    c_place = narrow_step * (c_token * UNIT) + narrow_head * c_head + n
    c_at = C + token * (c_token * UNIT)
    if HAS_Z:
        z_place = step * (z_token * UNIT) + head * z_head + row
        z_at = z + token * (z_token * UNIT)
    for tile in tl.range(0, length, STEPS, num_stages=STAGES):
        here = exists & (tile + step < length)
        delta = tl.load(dt_at + dt_place, mask=here, other=0.0).to(tl.float32)
        grad = tl.load(dy_at + dy_place, mask=here, other=0.0).to(tl.float32)
        c_t = tl.load(c_at + c_place, mask=narrow_exists & (tile + narrow_step < length), other=0.0).to(tl.float32)
        if HAS_BIAS:
            delta += bias
        if SOFTPLUS:
            delta = softplus(delta)
        delta = tl.where(here, delta, 0.0)
        if HAS_Z:
            gate = tl.load(z_at + z_place, mask=here, other=0.0).to(tl.float32)
            grad *= gate * sigmoid(gate)
            z_at += STEPS * UNIT * z_token
        prefix = tl.expand_dims(total, 0) + tl.cumsum(delta, axis=0)
        decay = tl.exp2(prefix[:, :, :, :, None] * rate)
        gradient = add_rows(gradient, decay, grad[:, :, :, :, None] * c_t[:, None, :, None, :], state_step, STEPS)
        total += tl.sum(delta, axis=0)
        dt_at += STEPS * UNIT * dt_token
        dy_at += STEPS * UNIT * dy_token
        c_at += STEPS * UNIT * c_token
    tl.store(q + chunk * (H * P * N) + element, tl.expand_dims(gradient, 0), mask=has_element)
    tl.store(delta_sum + chunk * (H * P) + channel, tl.expand_dims(total, 0), mask=exists)


@triton.jit
def scan_chunk_backward_kernel(
    x, dt, A, B, C, D, z, dt_bias, dy, entry, q_end, correlation, span_state, span_delta,
    dx, ddt, dA, dB, dC, dD, dz, d_bias, d_initial, chunks,
    x_token, x_head, dt_token, dt_head, b_token, b_head, c_token, c_head, z_token, z_head, dy_token, dy_head,
    H, x_repeat, b_repeat, max_spans,
    P: tl.constexpr, N: tl.constexpr, BN: tl.constexpr, STEPS: tl.constexpr,
    HB: tl.constexpr, PI: tl.constexpr, PJ: tl.constexpr, STAGES: tl.constexpr, UNIT: tl.constexpr,
    HAS_D: tl.constexpr, HAS_Z: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_ENTRY: tl.constexpr, HAS_END: tl.constexpr,
    HAS_INITIAL: tl.constexpr, SOFTPLUS: tl.constexpr, SPAN: tl.constexpr,
):  # fmt: skip
    """All gradients of one chunk for a block of channels, from the state that enters it and the q that leaves it.

    Grid (channel blocks, chunks). dx, ddt, dz are [T, H, P]; dB, dC [T, H, row blocks, N]; dA [chunks, H, P, N], dD and
    d_bias [chunks, H, P], zero for unused chunks. Scratch between the sweeps, fp32: `correlation` [T, H, P], and of each
    span of a chunk `span_state` [chunks, max_spans, H, P, N] and `span_delta` [chunks, max_spans, H, P].
    """
    chunk = tl.program_id(1).to(tl.int64)
    start = tl.load(chunks + chunk * 4)
    length = tl.load(chunks + chunk * 4 + 1) - start
    head, row, exists, row_block = tile_channels(H, P, HB, PI, PJ)
    channel = head * P + row
    n = tl.arange(0, BN)
    element = channel[:, :, :, :, None] * N + n
    has_element = exists[:, :, :, :, None] & (n < N)
    dA_at = dA + chunk * (H * P * N) + element
    if HAS_D:
        dD_at = dD + chunk * (H * P) + channel
    if HAS_BIAS:
        d_bias_at = d_bias + chunk * (H * P) + channel
    if length <= 0:
        tl.store(dA_at, tl.zeros([1, PI, HB, PJ, BN], tl.float32), mask=has_element)
        if HAS_D:
            tl.store(dD_at, tl.zeros([1, PI, HB, PJ], tl.float32), mask=exists)
        if HAS_BIAS:
            tl.store(d_bias_at, tl.zeros([1, PI, HB, PJ], tl.float32), mask=exists)
        return
    rate = tl.load(A + element, mask=has_element, other=0.0) * LOG2E  # A in units of log2
    state = tl.zeros([1, PI, HB, PJ, BN], tl.float32)
    if HAS_ENTRY:
        state = tl.load(entry + chunk * (H * P * N) + element, mask=has_element, other=0.0)
    state = tl.sum(state, axis=0)
    if HAS_BIAS:
        bias = tl.load(dt_bias + channel, mask=exists, other=0.0)
    if HAS_D:
        skip = tl.load(D + channel, mask=exists, other=0.0)

    step = tl.arange(0, STEPS)[:, None, None, None]
    state_step = tl.arange(0, STEPS)[:, None, None, None, None]
    narrow_step = tl.arange(0, STEPS)[:, None, None]
    narrow_head = tl.reshape(head, [1, HB, 1])
    narrow_exists = (narrow_head < H) & (n < N)
    blocks: tl.constexpr = (P + PI * PJ - 1) // (PI * PJ)
    token = start.to(tl.int64)
    x_place = step * (x_token * UNIT) + head // x_repeat * x_head + row
    x_at = x + token * (x_token * UNIT)
    dt_place = step * (dt_token * UNIT) + head * dt_head + row
    dt_at = dt + token * (dt_token * UNIT)
    dy_place = step * (dy_token * UNIT) + head * dy_head + row
    dy_at = dy + token * (dy_token * UNIT)
    b_place = narrow_step * (b_token * UNIT) + narrow_head // b_repeat * b_head + n
    b_at = B + token * (b_token * UNIT)
    c_place = narrow_step * (c_token * UNIT) + narrow_head * c_head + n
    c_at = C + token * (c_token * UNIT)
    if HAS_Z:
        z_place = step * (z_token * UNIT) + head * z_head + row
        z_at = z + token * (z_token * UNIT)
    out_at = token * (H * P)
    out_place = step * (H * P) + channel
    partial_at = token * (H * blocks * N)
    partial_place = (narrow_step * H + narrow_head) * (blocks * N) + row_block * N + n

    dA_sum = tl.zeros_like(state)
    num_spans = tl.cdiv(length, SPAN)
    first_span = chunk * max_spans
    for span in range(num_spans):  # forwards: h, hence ∂C, ∂z
        prefix_sum = tl.zeros([PI, HB, PJ], tl.float32)  # of Δ
        for tile in tl.range(span * SPAN, tl.minimum(length, (span + 1) * SPAN), STEPS, num_stages=STAGES):
            here = exists & (tile + step < length)
            narrow_here = narrow_exists & (tile + narrow_step < length)
            x_t = tl.load(x_at + x_place, mask=here, other=0.0).to(tl.float32)
            delta = tl.load(dt_at + dt_place, mask=here, other=0.0).to(tl.float32)
            grad = tl.load(dy_at + dy_place, mask=here, other=0.0).to(tl.float32)
            b_t = tl.load(b_at + b_place, mask=narrow_here, other=0.0).to(tl.float32)[:, None, :, None, :]
            c_t = tl.load(c_at + c_place, mask=narrow_here, other=0.0).to(tl.float32)[:, None, :, None, :]
            if HAS_BIAS:
                delta += bias
            if SOFTPLUS:
                delta = softplus(delta)
            delta = tl.where(here, delta, 0.0)
            prefix = tl.expand_dims(prefix_sum, 0) + tl.cumsum(delta, axis=0)
            prefix_sum += tl.sum(delta, axis=0)
            decay = tl.exp2(delta[:, :, :, :, None] * rate)
            states, state = scan_rows(decay, (delta * x_t)[:, :, :, :, None] * b_t, state, state_step, STEPS)
            read = states * c_t
            if HAS_Z:
                gate = tl.load(z_at + z_place, mask=here, other=0.0).to(tl.float32)
                weight = sigmoid(gate)
                pre_gate = tl.sum(read, axis=4)
                if HAS_D:
                    pre_gate += skip * x_t
                slope = weight * (1.0 + gate * (1.0 - weight))
                tl.store(dz + out_at + out_place, (grad * pre_gate * slope).to(dz.dtype.element_ty), mask=here)
                grad *= gate * weight
                z_at += STEPS * UNIT * z_token
            tl.store(correlation + out_at + out_place, grad * tl.sum(read * rate, axis=4), mask=here)
            dA_sum = add_rows(dA_sum, read, (prefix * grad)[:, :, :, :, None], state_step, STEPS)
            dC_t = tl.sum(tl.sum(states * grad[:, :, :, :, None], axis=1), axis=2)
            tl.store(dC + partial_at + partial_place, dC_t.to(dC.dtype.element_ty), mask=narrow_here)
            x_at += STEPS * UNIT * x_token
            dt_at += STEPS * UNIT * dt_token
            dy_at += STEPS * UNIT * dy_token
            b_at += STEPS * UNIT * b_token
            c_at += STEPS * UNIT * c_token
            out_at += STEPS * H * P
            partial_at += STEPS * H * blocks * N
        at_span = first_span + span
        tl.store(span_state + at_span * (H * P * N) + element, tl.expand_dims(state, 0), mask=has_element)
        tl.store(span_delta + at_span * (H * P) + channel, tl.expand_dims(prefix_sum, 0), mask=exists)
    tl.debug_barrier()  # the sweep backwards reads what other threads of this program stored

    q = tl.zeros([1, PI, HB, PJ, BN], tl.float32)
    if HAS_END:
        q = tl.load(q_end + chunk * (H * P * N) + element, mask=has_element, other=0.0)
    q = tl.sum(q, axis=0)
    d_bias_sum = tl.zeros([PI, HB, PJ], tl.float32)
    dD_sum = tl.zeros([PI, HB, PJ], tl.float32)
    for back in range(num_spans):  # backwards: g, hence ∂B, ∂x, ∂dt
        span = num_spans - 1 - back
        last_state = tl.load(span_state + (first_span + span) * (H * P * N) + element, mask=has_element, other=0.0)
        total = tl.load(span_delta + (first_span + span) * (H * P) + channel, mask=exists, other=0.0)
        prefix_sum = tl.sum(total, axis=0)
        at_end = q * tl.sum(last_state, axis=0)
        dA_sum += at_end * prefix_sum[:, :, :, None]
        suffix_sum = tl.sum(at_end * tl.sum(rate, axis=0), axis=3)  # Σ_n A·r in units of log2
        num_tiles = tl.cdiv(tl.minimum(length - span * SPAN, SPAN), STEPS)
        for count in tl.range(0, num_tiles, num_stages=STAGES):
            tile = span * SPAN + (num_tiles - 1 - count) * STEPS
            x_at -= STEPS * UNIT * x_token
            dt_at -= STEPS * UNIT * dt_token
            dy_at -= STEPS * UNIT * dy_token
            b_at -= STEPS * UNIT * b_token
            c_at -= STEPS * UNIT * c_token
            out_at -= STEPS * H * P
            partial_at -= STEPS * H * blocks * N
            here = exists & (tile + step < length)
            narrow_here = narrow_exists & (tile + narrow_step < length)
            x_t = tl.load(x_at + x_place, mask=here, other=0.0).to(tl.float32)
            delta = tl.load(dt_at + dt_place, mask=here, other=0.0).to(tl.float32)
            grad = tl.load(dy_at + dy_place, mask=here, other=0.0).to(tl.float32)
            correlated = tl.load(correlation + out_at + out_place, mask=here, other=0.0)
            b_t = tl.load(b_at + b_place, mask=narrow_here, other=0.0).to(tl.float32)[:, None, :, None, :]
            c_t = tl.load(c_at + c_place, mask=narrow_here, other=0.0).to(tl.float32)[:, None, :, None, :]
            if HAS_BIAS:
                delta += bias
            if SOFTPLUS:
                delta, slope = softplus_and_slope(delta)
            delta = tl.where(here, delta, 0.0)
            if HAS_Z:
                z_at -= STEPS * UNIT * z_token
                gate = tl.load(z_at + z_place, mask=here, other=0.0).to(tl.float32)
                grad *= gate * sigmoid(gate)
            prefix_sum -= tl.sum(delta, axis=0)
            prefix = tl.expand_dims(prefix_sum, 0) + tl.cumsum(delta, axis=0)
            u = delta * x_t
            decay = tl.exp2(delta[:, :, :, :, None] * rate)
            gradients, q = scan_rows_backwards(decay, grad[:, :, :, :, None] * c_t, q, state_step, STEPS)
            written = gradients * b_t
            du = tl.sum(written, axis=4)
            dA_sum = add_rows(dA_sum, written, (-prefix * u)[:, :, :, :, None], state_step, STEPS)
            change = correlated - u * tl.sum(written * rate, axis=4)
            suffix = tl.expand_dims(suffix_sum, 0) + tl.cumsum(change, axis=0, reverse=True)
            suffix_sum += tl.sum(change, axis=0)
            d_delta = x_t * du + suffix * LN2
            if SOFTPLUS:
                d_delta *= slope
            d_delta = tl.where(here, d_delta, 0.0)
            tl.store(ddt + out_at + out_place, d_delta.to(ddt.dtype.element_ty), mask=here)
            if HAS_BIAS:
                d_bias_sum += tl.sum(d_delta, axis=0)
            dx_t = delta * du
            if HAS_D:
                dx_t += skip * grad
                dD_sum += tl.sum(grad * x_t, axis=0)
            tl.store(dx + out_at + out_place, dx_t.to(dx.dtype.element_ty), mask=here)
            dB_t = tl.sum(tl.sum(gradients * u[:, :, :, :, None], axis=1), axis=2)
            tl.store(dB + partial_at + partial_place, dB_t.to(dB.dtype.element_ty), mask=narrow_here)

    tl.store(dA_at, tl.expand_dims(dA_sum, 0), mask=has_element)
    if HAS_D:
        tl.store(dD_at, tl.expand_dims(dD_sum, 0), mask=exists)
    if HAS_BIAS:
        tl.store(d_bias_at, tl.expand_dims(d_bias_sum, 0), mask=exists)
    if HAS_INITIAL and (tl.load(chunks + chunk * 4 + 3) & IS_FIRST) != 0:
        document = tl.load(chunks + chunk * 4 + 2).to(tl.int64)
        tl.store(d_initial + document * (H * P * N) + element, tl.expand_dims(q, 0), mask=has_element)


@triton.jit
def sum_heads_kernel(partial, total, size, width, REPEAT: tl.constexpr, BLOCK: tl.constexpr):
    """total [rows, width] = Σ over r of partial [rows, REPEAT, width], in fp32; grid (blocks of `size` = rows·width)."""
    element = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    exists = element < size
    at = partial + element // width * (REPEAT * width) + element % width
    result = tl.zeros([BLOCK], tl.float32)
    for r in tl.static_range(REPEAT):
        result += tl.load(at + r * width, mask=exists, other=0.0).to(tl.float32)
    tl.store(total + element, result.to(total.dtype.element_ty), mask=exists)
