"""The backward kernels of the selective scan; tiles and pointers are those of triton_forward.py.

With q_t = ∂L/∂h_t through later tokens, g_t = ∂L/∂h_t = q_t + C_t·∂ỹ_t (ỹ before the gate) and q_{t-1} = a_t·g_t, all
gradients but two follow from g and from h alone. The two are those of Δ and A, through a = exp(Δ·A): both need
r_t = a_t·g_t·h_{t-1}, a product of a quantity that runs forwards and one that runs backwards. It telescopes:

    g_t·h_t = C_t·∂ỹ_t·h_t + r_{t+1}   and   r_t = g_t·(h_t - Δ_t·x_t·B_t)   so   r_t = r_{t+1} + C_t·∂ỹ_t·h_t - g_t·Δ_t·x_t·B_t

Hence ∂Δ_t ∋ Σ_n A·r_t is a suffix sum, ∂A = Σ_t Δ_t·r_t = S_end·r_end + Σ_t S_t·(C_t·∂ỹ_t·h_t - g_t·Δ_t·x_t·B_t) with
S the prefix sums of Δ, and a chunk needs one sweep forwards for h and one backwards for g, without storing any h but the
last. The differences cancel, and their rounding is weighed by S, so the sums restart with every chunk, from
r_end = q_end·h_end: chunks are kept short for that.

∂B and ∂C sum over the rows of a head, which are other lanes. In half precision the tensor cores do that, as a product with
a matrix that says which row belongs to which head; in fp32 the lanes exchange values.
"""

import triton
import triton.language as tl

from m1.kernels.chunk_table import IS_FIRST
from m1.kernels.selective_scan.triton_forward import state_address, tile_channels
from m1.kernels.triton_math import (
    LN2,
    LOG2E,
    add_rows,
    scan_rows,
    scan_rows_backwards,
    sigmoid,
    softplus,
    softplus_and_slope,
    widen,
)


@triton.jit(do_not_specialize=["zero"])
def chunk_gradient_kernel(
    dt, A, C, z, dt_bias, dy, q, delta_sum, chunks,
    dt_token, dt_head, c_token, c_head, z_token, z_head, dy_token, dy_head,
    H, zero,
    P: tl.constexpr, N: tl.constexpr, BN: tl.constexpr, STEPS: tl.constexpr,
    HB: tl.constexpr, PB: tl.constexpr, STAGES: tl.constexpr, UNIT: tl.constexpr,
    HAS_Z: tl.constexpr, HAS_BIAS: tl.constexpr, SOFTPLUS: tl.constexpr, IS_INTERPRETED: tl.constexpr,
):  # fmt: skip
    """What a chunk's outputs contribute to the gradient of the state that enters it: Σ_t exp(A·S_t)·C_t·∂ỹ_t into `q`.

    Also the chunk's sum of Δ, for the carry. A document's first chunk is skipped: the main kernel yields its gradient.
    Grid (channel blocks, chunks); q is [chunks, N, H·P], delta_sum [chunks, H·P].
    """
    chunk = tl.program_id(1).to(tl.int64)
    start = tl.load(chunks + chunk * 4)
    length = tl.load(chunks + chunk * 4 + 1) - start
    is_first = (tl.load(chunks + chunk * 4 + 3) & IS_FIRST) != 0
    if length <= 0 or is_first:
        return
    head, row, exists, _ = tile_channels(H, P, HB, PB)
    size = H * P
    channel = head * P + row
    n = tl.arange(0, BN)[None, :, None, None]
    element = channel[:, None, :, :] + n * size + zero
    has_element = exists[:, None, :, :] & (n < N)
    rate = tl.load(A + element, mask=has_element, other=0.0) * LOG2E
    gradient = tl.sum(tl.zeros_like(rate), axis=2)
    if HAS_BIAS:
        bias = tl.load(dt_bias + channel + zero, mask=exists, other=0.0)
    total = tl.zeros([HB, PB], tl.float32)

    step = tl.arange(0, STEPS)[None, :, None]
    state_step = tl.arange(0, STEPS)[None, None, :, None]
    narrow_n = tl.arange(0, BN)[None, :, None]
    narrow_step = tl.arange(0, STEPS)[None, None, :]
    narrow_exists = (head < H) & (narrow_n < N)
    token = start.to(tl.int64)
    dt_at = dt + token * (dt_token * UNIT) + step * (dt_token * UNIT) + head * dt_head + row
    dy_at = dy + token * (dy_token * UNIT) + step * (dy_token * UNIT) + head * dy_head + row
    c_at = C + token * (c_token * UNIT) + narrow_step * (c_token * UNIT) + head * c_head + narrow_n
    if HAS_Z:
        z_at = z + token * (z_token * UNIT) + step * (z_token * UNIT) + head * z_head + row
    for tile in tl.range(0, length, STEPS, num_stages=STAGES):
        here = exists & (tile + step < length)
        narrow_here = narrow_exists & (tile + narrow_step < length)
        delta = tl.load(dt_at + tile * (dt_token * UNIT), mask=here, other=0.0).to(tl.float32)
        grad = tl.load(dy_at + tile * (dy_token * UNIT), mask=here, other=0.0).to(tl.float32)
        c_t = widen(tl.load(c_at + tile * (c_token * UNIT), mask=narrow_here, other=0.0), IS_INTERPRETED)[:, :, :, None]
        if HAS_BIAS:
            delta += bias
        if SOFTPLUS:
            delta = softplus(delta)
        delta = tl.where(here, delta, 0.0)
        if HAS_Z:
            gate = tl.load(z_at + tile * (z_token * UNIT), mask=here, other=0.0).to(tl.float32)
            grad *= gate * sigmoid(gate)
        prefix = tl.expand_dims(total, 1) + tl.cumsum(delta, axis=1)
        decay = tl.exp2(prefix[:, None, :, :] * rate)
        gradient = add_rows(gradient, decay, grad[:, None, :, :] * c_t, state_step, STEPS, 2)
        total += tl.sum(delta, axis=1)
    tl.store(q + chunk * (size * N) + element, tl.expand_dims(gradient, 2), mask=has_element)
    tl.store(delta_sum + chunk * size + channel, tl.expand_dims(total, 1), mask=exists)


@triton.jit
def store_row_sums(
    values, target, token, limit, H, row_block,
    N: tl.constexpr, BN: tl.constexpr, STEPS: tl.constexpr, HB: tl.constexpr, PB: tl.constexpr, BLOCKS: tl.constexpr,
    DOT: tl.constexpr,
):  # fmt: skip
    """Σ over p of values [HB, BN, STEPS, PB] into rows token … limit of target [T, H, BLOCKS, N], block `row_block`.

    DOT: the operand type of a tensor-core product, or None for sums in fp32.
    """
    first_head = tl.program_id(0) // BLOCKS * HB
    if DOT is None:
        step = tl.arange(0, STEPS)[None, None, :]
        head = first_head + tl.arange(0, HB)[:, None, None]
        n = tl.arange(0, BN)[None, :, None]
        at = target + ((token + step).to(tl.int64) * H + head) * (BLOCKS * N) + row_block * N + n
        sums = tl.sum(values, axis=3)
        tl.store(at, sums.to(target.dtype.element_ty), mask=(token + step < limit) & (head < H) & (n < N))
    else:
        # rows of the product are (token, n), columns are heads: 8 of them, of which HB are used
        lane = tl.arange(0, HB * PB)[:, None]
        owner = tl.arange(0, 8)[None, :]
        members = (lane // PB == owner).to(DOT)
        laid = tl.reshape(tl.permute(values.to(DOT), (2, 1, 0, 3)), [STEPS * BN, HB * PB])
        sums = tl.dot(laid, members)
        line = tl.arange(0, STEPS * BN)[:, None]
        step, n, head = line // BN, line % BN, first_head + owner
        at = target + ((token + step).to(tl.int64) * H + head) * (BLOCKS * N) + row_block * N + n
        is_used = (owner < HB) & (head < H) & (n < N) & (token + step < limit)
        tl.store(at, sums.to(target.dtype.element_ty), mask=is_used)


@triton.jit(do_not_specialize=["zero"])
def scan_chunk_backward_kernel(
    x, dt, A, B, C, D, z, dt_bias, dy, entry, q_end, correlation,
    dx, ddt, dA, dB, dC, dD, dz, d_bias, d_initial, chunks,
    x_token, x_head, dt_token, dt_head, b_token, b_head, c_token, c_head, z_token, z_head, dy_token, dy_head,
    H, x_repeat, b_repeat, zero,
    P: tl.constexpr, N: tl.constexpr, BN: tl.constexpr, STEPS: tl.constexpr,
    HB: tl.constexpr, PB: tl.constexpr, STAGES: tl.constexpr, UNIT: tl.constexpr,
    HAS_D: tl.constexpr, HAS_Z: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_ENTRY: tl.constexpr, HAS_END: tl.constexpr,
    HAS_INITIAL: tl.constexpr, SOFTPLUS: tl.constexpr, STATES_ARE_OUTER: tl.constexpr, DOT: tl.constexpr,
    IS_INTERPRETED: tl.constexpr,
):  # fmt: skip
    """All gradients of one chunk for a block of channels, from the state that enters it and the q that leaves it.

    Grid (channel blocks, chunks). dx, ddt, dz are [T, H, P]; dB, dC [T, H, row blocks, N]; dA [chunks, N, H·P], dD and
    d_bias [chunks, H·P], zero for unused chunks; d_initial [n, H, P, N]. `correlation` [T, H, P] fp32 is scratch between the
    sweeps. STATES_ARE_OUTER: entry and q_end are [n, H, P, N], not [chunks, N, H·P]. DOT: see store_row_sums.
    """
    chunk = tl.program_id(1).to(tl.int64)
    start = tl.load(chunks + chunk * 4)
    end = tl.load(chunks + chunk * 4 + 1)
    length = end - start
    head, row, exists, row_block = tile_channels(H, P, HB, PB)
    size = H * P
    channel = head * P + row
    n = tl.arange(0, BN)[None, :, None, None]
    element = channel[:, None, :, :] + n * size + zero
    has_element = exists[:, None, :, :] & (n < N)
    dA_at = dA + chunk * (size * N) + element
    if HAS_D:
        dD_at = dD + chunk * size + channel
    if HAS_BIAS:
        d_bias_at = d_bias + chunk * size + channel
    if length <= 0:
        tl.store(dA_at, tl.zeros([HB, BN, 1, PB], tl.float32), mask=has_element)
        if HAS_D:
            tl.store(dD_at, tl.zeros([HB, 1, PB], tl.float32), mask=exists)
        if HAS_BIAS:
            tl.store(d_bias_at, tl.zeros([HB, 1, PB], tl.float32), mask=exists)
        return
    rate = tl.load(A + element, mask=has_element, other=0.0) * LOG2E  # A in units of log2
    state = tl.zeros([HB, BN, 1, PB], tl.float32)
    if HAS_ENTRY:
        entry_at = state_address(entry, chunk, channel, n, size, N, zero, STATES_ARE_OUTER)
        state = tl.load(entry_at, mask=has_element, other=0.0)
    state = tl.sum(state, axis=2)
    if HAS_BIAS:
        bias = tl.load(dt_bias + channel + zero, mask=exists, other=0.0)
    if HAS_D:
        skip = tl.load(D + channel + zero, mask=exists, other=0.0)

    step = tl.arange(0, STEPS)[None, :, None]
    state_step = tl.arange(0, STEPS)[None, None, :, None]
    narrow_n = tl.arange(0, BN)[None, :, None]
    narrow_step = tl.arange(0, STEPS)[None, None, :]
    narrow_exists = (head < H) & (narrow_n < N)
    blocks: tl.constexpr = (P + PB - 1) // PB
    token = start.to(tl.int64)
    x_at = x + token * (x_token * UNIT) + step * (x_token * UNIT) + head // x_repeat * x_head + row
    dt_at = dt + token * (dt_token * UNIT) + step * (dt_token * UNIT) + head * dt_head + row
    dy_at = dy + token * (dy_token * UNIT) + step * (dy_token * UNIT) + head * dy_head + row
    b_at = B + token * (b_token * UNIT) + narrow_step * (b_token * UNIT) + head // b_repeat * b_head + narrow_n
    c_at = C + token * (c_token * UNIT) + narrow_step * (c_token * UNIT) + head * c_head + narrow_n
    if HAS_Z:
        z_at = z + token * (z_token * UNIT) + step * (z_token * UNIT) + head * z_head + row
    out_place = token * size + step * size + channel + zero

    dA_sum = tl.zeros_like(state)
    prefix_sum = tl.zeros([HB, PB], tl.float32)  # of Δ
    for tile in tl.range(0, length, STEPS, num_stages=STAGES):  # forwards: h, hence ∂C, ∂z
        here = exists & (tile + step < length)
        narrow_here = narrow_exists & (tile + narrow_step < length)
        x_t = tl.load(x_at + tile * (x_token * UNIT), mask=here, other=0.0).to(tl.float32)
        delta = tl.load(dt_at + tile * (dt_token * UNIT), mask=here, other=0.0).to(tl.float32)
        grad = tl.load(dy_at + tile * (dy_token * UNIT), mask=here, other=0.0).to(tl.float32)
        b_t = widen(tl.load(b_at + tile * (b_token * UNIT), mask=narrow_here, other=0.0), IS_INTERPRETED)[:, :, :, None]
        c_t = widen(tl.load(c_at + tile * (c_token * UNIT), mask=narrow_here, other=0.0), IS_INTERPRETED)[:, :, :, None]
        if HAS_BIAS:
            delta += bias
        if SOFTPLUS:
            delta = softplus(delta)
        delta = tl.where(here, delta, 0.0)
        prefix = tl.expand_dims(prefix_sum, 1) + tl.cumsum(delta, axis=1)
        prefix_sum += tl.sum(delta, axis=1)
        decay = tl.exp2(delta[:, None, :, :] * rate)
        states, state = scan_rows(decay, (delta * x_t)[:, None, :, :] * b_t, state, state_step, STEPS, 2)
        read = states * c_t
        if HAS_Z:
            gate = tl.load(z_at + tile * (z_token * UNIT), mask=here, other=0.0).to(tl.float32)
            weight = sigmoid(gate)
            pre_gate = tl.sum(read, axis=1)
            if HAS_D:
                pre_gate += skip * x_t
            slope = weight * (1.0 + gate * (1.0 - weight))
            tl.store(dz + out_place + tile * size, (grad * pre_gate * slope).to(dz.dtype.element_ty), mask=here)
            grad *= gate * weight
        tl.store(correlation + out_place + tile * size, grad * tl.sum(read * rate, axis=1), mask=here)
        dA_sum = add_rows(dA_sum, read, (prefix * grad)[:, None, :, :], state_step, STEPS, 2)
        store_row_sums(states * grad[:, None, :, :], dC, start + tile, end, H, row_block, N, BN, STEPS, HB, PB, blocks, DOT)
    tl.debug_barrier()  # the sweep backwards may read what other threads of this program stored

    q = tl.zeros([HB, BN, 1, PB], tl.float32)
    if HAS_END:
        end_at = state_address(q_end, chunk, channel, n, size, N, zero, STATES_ARE_OUTER)
        q = tl.load(end_at, mask=has_element, other=0.0)
    q = tl.sum(q, axis=2)
    at_end = q * state
    dA_sum += at_end * prefix_sum[:, None, :]
    suffix_sum = tl.sum(at_end * tl.sum(rate, axis=2), axis=1)  # Σ_n A·r in units of log2
    d_bias_sum = tl.zeros([HB, PB], tl.float32)
    dD_sum = tl.zeros([HB, PB], tl.float32)
    num_tiles = tl.cdiv(length, STEPS)
    for count in tl.range(0, num_tiles, num_stages=STAGES):  # backwards: g, hence ∂B, ∂x, ∂dt
        tile = (num_tiles - 1 - count) * STEPS
        here = exists & (tile + step < length)
        narrow_here = narrow_exists & (tile + narrow_step < length)
        x_t = tl.load(x_at + tile * (x_token * UNIT), mask=here, other=0.0).to(tl.float32)
        delta = tl.load(dt_at + tile * (dt_token * UNIT), mask=here, other=0.0).to(tl.float32)
        grad = tl.load(dy_at + tile * (dy_token * UNIT), mask=here, other=0.0).to(tl.float32)
        correlated = tl.load(correlation + out_place + tile * size, mask=here, other=0.0)
        b_t = widen(tl.load(b_at + tile * (b_token * UNIT), mask=narrow_here, other=0.0), IS_INTERPRETED)[:, :, :, None]
        c_t = widen(tl.load(c_at + tile * (c_token * UNIT), mask=narrow_here, other=0.0), IS_INTERPRETED)[:, :, :, None]
        if HAS_BIAS:
            delta += bias
        if SOFTPLUS:
            delta, slope = softplus_and_slope(delta)
        delta = tl.where(here, delta, 0.0)
        if HAS_Z:
            gate = tl.load(z_at + tile * (z_token * UNIT), mask=here, other=0.0).to(tl.float32)
            grad *= gate * sigmoid(gate)
        prefix_sum -= tl.sum(delta, axis=1)
        prefix = tl.expand_dims(prefix_sum, 1) + tl.cumsum(delta, axis=1)
        u = delta * x_t
        decay = tl.exp2(delta[:, None, :, :] * rate)
        gradients, q = scan_rows_backwards(decay, grad[:, None, :, :] * c_t, q, state_step, STEPS, 2)
        written = gradients * b_t
        du = tl.sum(written, axis=1)
        dA_sum = add_rows(dA_sum, written, (-prefix * u)[:, None, :, :], state_step, STEPS, 2)
        change = correlated - u * tl.sum(written * rate, axis=1)
        suffix = tl.expand_dims(suffix_sum, 1) + tl.cumsum(change, axis=1, reverse=True)
        suffix_sum += tl.sum(change, axis=1)
        d_delta = x_t * du + suffix * LN2
        if SOFTPLUS:
            d_delta *= slope
        d_delta = tl.where(here, d_delta, 0.0)
        tl.store(ddt + out_place + tile * size, d_delta.to(ddt.dtype.element_ty), mask=here)
        if HAS_BIAS:
            d_bias_sum += tl.sum(d_delta, axis=1)
        dx_t = delta * du
        if HAS_D:
            dx_t += skip * grad
            dD_sum += tl.sum(grad * x_t, axis=1)
        tl.store(dx + out_place + tile * size, dx_t.to(dx.dtype.element_ty), mask=here)
        store_row_sums(gradients * u[:, None, :, :], dB, start + tile, end, H, row_block, N, BN, STEPS, HB, PB, blocks, DOT)

    tl.store(dA_at, tl.expand_dims(dA_sum, 2), mask=has_element)
    if HAS_D:
        tl.store(dD_at, tl.expand_dims(dD_sum, 1), mask=exists)
    if HAS_BIAS:
        tl.store(d_bias_at, tl.expand_dims(d_bias_sum, 1), mask=exists)
    if HAS_INITIAL and (tl.load(chunks + chunk * 4 + 3) & IS_FIRST) != 0:
        document = tl.load(chunks + chunk * 4 + 2).to(tl.int64)
        initial_at = state_address(d_initial, document, channel, n, size, N, zero, True)
        tl.store(initial_at, tl.expand_dims(q, 2), mask=has_element)


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
