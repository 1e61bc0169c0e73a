"""The backward kernels of the selective scan; tiles and pointers are those of triton_forward.py.

With q_t = ∂L/∂h_t through later tokens, g_t = ∂L/∂h_t = q_t + C_t·∂ỹ_t (ỹ before the gate) and q_{t-1} = a_t·g_t, all
gradients but two follow from g and from h alone. The two are those of Δ and A, through a = exp(Δ·A): both need
r_t = a_t·g_t·h_{t-1}, a product of a quantity that runs forwards and one that runs backwards. It telescopes:

    g_t·h_t = C_t·∂ỹ_t·h_t + r_{t+1}   and   r_t = g_t·(h_t - Δ_t·x_t·B_t)   so   r_t = r_{t+1} + C_t·∂ỹ_t·h_t - g_t·Δ_t·x_t·B_t

Hence ∂Δ_t ∋ Σ_n A·r_t is a suffix sum, ∂A = Σ_t Δ_t·r_t = S_end·r_end + Σ_t S_t·(C_t·∂ỹ_t·h_t - g_t·Δ_t·x_t·B_t) with
S the prefix sums of Δ, and a chunk needs one sweep forwards for h (the reader's kernel: gradients of what reads the state)
and one backwards for g (the writer's), without storing any h. The differences cancel, and their rounding is weighed by S,
so the sums restart with every chunk, from r_end = q_end·h_end: chunks are kept short for that.

The reader's sweep also finds what the chunk's outputs contribute to the gradient of the state that enters it,
Σ_t exp(A·S_t)·C_t·∂ỹ_t, from which the carry between the two makes every q_end.

∂B and ∂C sum over the rows of a head, which are other lanes. Where they are wanted in half precision the tensor cores do that,
as a product with a matrix that says which row belongs to which head (in tf32: fp32 words reach the operand's layout by fewer
instructions than halves do); else the lanes exchange values.
"""

import triton
import triton.language as tl

from m1.kernels.chunk_table import IS_FIRST, IS_LAST
from m1.kernels.selective_scan.triton_forward import state_address, tile_channels
from m1.kernels.triton_math import (
    LN2,
    LOG2E,
    add_rows,
    running_products,
    running_sums,
    scan_rows,
    scan_rows_backwards,
    sigmoid,
    softplus,
    softplus_and_slope,
    widen,
)


@triton.jit
def store_row_sums(
    values, target, token, limit, H, num_rows, row_block,
    N: tl.constexpr, BN: tl.constexpr, STEPS: tl.constexpr, HB: tl.constexpr, PB: tl.constexpr, CHANNELS: tl.constexpr,
    BLOCKS: tl.constexpr, SLOTS: tl.constexpr, SHARE: tl.constexpr, IS_HALF: tl.constexpr,
):  # fmt: skip
    """Σ over p of values [HB, BN, STEPS, PB] into rows token … limit of target [T, num_rows, BLOCKS, N], block `row_block`.

    A program has SLOTS rows of the target, one for each head of its HB (SHARE 1), or, IS_HALF alone, for each group of SHARE
    heads of which it has some. IS_HALF: by the tensor cores, in tf32; if not, in fp32.
    """
    first_head = tl.program_id(0) // BLOCKS * HB
    first_row = tl.program_id(0) // BLOCKS * SLOTS
    LANES: tl.constexpr = PB // CHANNELS  # of a head
    values = tl.sum(tl.reshape(values, [HB, BN, STEPS, LANES, CHANNELS]), axis=4)
    if not IS_HALF:
        step = tl.arange(0, STEPS)[None, None, :]
        head = tl.arange(0, HB)[:, None, None]
        n = tl.arange(0, BN)[None, :, None]
        at = target + ((token + step).to(tl.int64) * num_rows + first_row + head) * (BLOCKS * N) + row_block * N + n
        sums = tl.sum(values, axis=3)
        tl.store(at, sums.to(target.dtype.element_ty), mask=(token + step < limit) & (first_head + head < H) & (n < N))
    else:
        # rows of the product are heads or groups, 16 of which SLOTS are used; columns are (token, n), side by side in a lane
        lane = tl.arange(0, HB * LANES)[None, :]
        slot = tl.arange(0, 16)[:, None]
        first_group = first_head // SHARE
        members = ((first_head + lane // LANES) // SHARE - first_group == slot).to(tl.float32)
        laid = tl.reshape(tl.permute(values, (0, 3, 2, 1)), [HB * LANES, STEPS * BN])
        sums = tl.dot(members, laid, input_precision="tf32")
        line = tl.arange(0, STEPS * BN)[None, :]
        step, n = line // BN, line % BN
        at = target + ((token + step).to(tl.int64) * num_rows + first_row + slot) * (BLOCKS * N) + row_block * N + n
        has_heads = (first_group + slot) * SHARE < tl.minimum(first_head + HB, H)
        is_used = (slot < SLOTS) & has_heads & (n < N) & (token + step < limit)
        tl.store(at, sums.to(target.dtype.element_ty), mask=is_used)


@triton.jit(do_not_specialize=["zero"])
def reader_gradient_kernel(
    x, dt, A, B, C, D, z, dt_bias, dy, entry, dC, dA, dz, correlation, q, delta_sum, final_state, chunks,
    x_token, x_head, dt_token, dt_head, b_token, b_head, c_token, c_head, z_token, z_head, dy_token, dy_head,
    H, x_repeat, b_repeat, zero,
    P: tl.constexpr, N: tl.constexpr, BN: tl.constexpr, STEPS: tl.constexpr,
    HB: tl.constexpr, PB: tl.constexpr, CHANNELS: tl.constexpr, STAGES: tl.constexpr, UNIT: tl.constexpr,
    HAS_D: tl.constexpr, HAS_Z: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_ENTRY: tl.constexpr, HAS_FINAL: tl.constexpr,
    WITH_Q: tl.constexpr, SOFTPLUS: tl.constexpr, ENTRY_IS_OUTER: tl.constexpr, IS_HALF: tl.constexpr,
    IS_INTERPRETED: tl.constexpr,
):  # fmt: skip
    """One chunk forwards from the state that enters it; grid (channel blocks, chunks).

    Writes dz [T, H, P], dC [T, H, row blocks, N], this sweep's part of dA [chunks, N, H·P] (zero for unused chunks), for the
    other sweep the chunk's sum of Δ, delta_sum [chunks, H·P], and `correlation` [T, H, P] fp32 = Σ_n A·C·∂ỹ·h in units of
    log2; HAS_FINAL: the last states of documents, final_state [n, N, H·P]; WITH_Q: the contribution to the gradient of the
    entering state, q [chunks, N, H·P], which of a document's first chunk is of no use.
    """
    chunk = tl.program_id(1).to(tl.int64)
    start = tl.load(chunks + chunk * 4)
    end = tl.load(chunks + chunk * 4 + 1)
    flags = tl.load(chunks + chunk * 4 + 3)
    length = end - start
    head, row, exists, row_block = tile_channels(H, P, HB, PB)
    size = H * P
    zero *= CHANNELS
    channel = head * P + row
    n = tl.arange(0, BN)[None, :, None, None]
    element = channel[:, None, :, :] + n * size + zero
    has_element = exists[:, None, :, :] & (n < N)
    dA_at = dA + chunk * (size * N) + element
    if length <= 0:
        tl.store(dA_at, tl.zeros([HB, BN, 1, PB], tl.float32), mask=has_element)
        return
    rate = tl.load(A + element, mask=has_element, other=0.0) * LOG2E  # A in units of log2
    state = tl.zeros([HB, BN, 1, PB], tl.float32)
    if HAS_ENTRY:
        entry_at = state_address(entry, chunk, channel, n, size, N, zero, ENTRY_IS_OUTER)
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
    through = tl.zeros_like(state) + 1.0  # the decay since the chunk's start
    gradient = tl.zeros_like(state)
    total = tl.zeros([HB, PB], tl.float32)  # of Δ
    for tile in tl.range(0, length, STEPS, num_stages=STAGES):
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
        prefix, total = running_sums(delta, total, step, STEPS, 1, False)
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
        if WITH_Q:
            products, through = running_products(decay, through, state_step, STEPS, 2)
            gradient = add_rows(gradient, products, grad[:, None, :, :] * c_t, state_step, STEPS, 2)
        store_row_sums(
            states * grad[:, None, :, :], dC, start + tile, end, H, H, row_block,
            N, BN, STEPS, HB, PB, CHANNELS, blocks, HB, 1, IS_HALF,
        )  # fmt: skip

    tl.store(dA_at, tl.expand_dims(dA_sum, 2), mask=has_element)
    tl.store(delta_sum + chunk * size + channel, tl.expand_dims(total, 1), mask=exists)
    if WITH_Q and (flags & IS_FIRST) == 0:
        tl.store(q + chunk * (size * N) + element, tl.expand_dims(gradient, 2), mask=has_element)
    if HAS_FINAL and (flags & IS_LAST) != 0:
        document = tl.load(chunks + chunk * 4 + 2).to(tl.int64)
        tl.store(final_state + document * (size * N) + element, tl.expand_dims(state, 2), mask=has_element)


@triton.jit
def _at_chunk_end(
    q_end, entry, final_state, chunk, document, flags, channel, n, element, has_element, size, zero,
    N: tl.constexpr, HAS_END: tl.constexpr, HAS_FINAL: tl.constexpr, STATES_ARE_OUTER: tl.constexpr,
):  # fmt: skip
    """The q that leaves a chunk and the state there, each [HB, BN, 1, PB]; see writer_gradient_kernel."""
    q = tl.zeros(element.shape, tl.float32)
    state = tl.zeros(element.shape, tl.float32)
    if HAS_END:
        is_last = (tl.zeros([1, 1, 1, 1], tl.int32) + (flags & IS_LAST)) != 0
        end_at = state_address(q_end, chunk, channel, n, size, N, zero, STATES_ARE_OUTER)
        q = tl.load(end_at, mask=has_element, other=0.0)
        if HAS_FINAL:
            state += tl.load(final_state + document * (size * N) + element, mask=has_element & is_last, other=0.0)
        if not STATES_ARE_OUTER:
            state += tl.load(entry + (chunk + 1) * (size * N) + element, mask=has_element & (is_last == 0), other=0.0)
    return q, state


@triton.jit(do_not_specialize=["zero"])
def writer_gradient_kernel(
    x, dt, A, B, C, D, z, dt_bias, dy, entry, q_end, correlation, delta_sum, final_state,
    dx, ddt, dA, dB, dD, d_bias, d_initial, chunks,
    x_token, x_head, dt_token, dt_head, b_token, b_head, c_token, c_head, z_token, z_head, dy_token, dy_head,
    H, x_repeat, b_repeat, dB_rows, zero,
    P: tl.constexpr, N: tl.constexpr, BN: tl.constexpr, STEPS: tl.constexpr,
    HB: tl.constexpr, PB: tl.constexpr, CHANNELS: tl.constexpr, STAGES: tl.constexpr, UNIT: tl.constexpr,
    HAS_D: tl.constexpr, HAS_Z: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_END: tl.constexpr, HAS_FINAL: tl.constexpr,
    HAS_INITIAL: tl.constexpr, SOFTPLUS: tl.constexpr, STATES_ARE_OUTER: tl.constexpr, SLOTS: tl.constexpr, SHARE: tl.constexpr,
    IS_HALF: tl.constexpr, IS_INTERPRETED: tl.constexpr,
):  # fmt: skip
    """One chunk backwards from the q that leaves it, after the reader's kernel; grid (channel blocks, chunks).

    Writes dx, ddt [T, H, P], dB [T, dB_rows, row blocks, N] (see store_row_sums), dD and d_bias [chunks, H·P] (zero for unused
    chunks), d_initial [n, H, P, N], and adds its part to dA. The state that leaves a chunk is the next one's in `entry`, of a
    document's last chunk that in final_state (HAS_FINAL; if not, no gradient arrives there). HAS_END: there is a q_end,
    [chunks, N, H·P], or [n, H, P, N] if STATES_ARE_OUTER: then each document is one chunk.
    """
    chunk = tl.program_id(1).to(tl.int64)
    start = tl.load(chunks + chunk * 4)
    end = tl.load(chunks + chunk * 4 + 1)
    document = tl.load(chunks + chunk * 4 + 2).to(tl.int64)
    flags = tl.load(chunks + chunk * 4 + 3)
    length = end - start
    head, row, exists, row_block = tile_channels(H, P, HB, PB)
    size = H * P
    zero *= CHANNELS
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
        if HAS_D:
            tl.store(dD_at, tl.zeros([HB, 1, PB], tl.float32), mask=exists)
        if HAS_BIAS:
            tl.store(d_bias_at, tl.zeros([HB, 1, PB], tl.float32), mask=exists)
        return
    rate = tl.load(A + element, mask=has_element, other=0.0) * LOG2E  # A in units of log2
    if HAS_BIAS:
        bias = tl.load(dt_bias + channel + zero, mask=exists, other=0.0)
    if HAS_D:
        skip = tl.load(D + channel + zero, mask=exists, other=0.0)
    prefix_sum = tl.sum(tl.load(delta_sum + chunk * size + channel + zero, mask=exists, other=0.0), axis=1)  # of Δ
    q, state = _at_chunk_end(
        q_end, entry, final_state, chunk, document, flags, channel, n, element, has_element, size, zero,
        N, HAS_END, HAS_FINAL, STATES_ARE_OUTER,
    )  # fmt: skip
    at_end = tl.sum(q * state, axis=2)
    q = tl.sum(q, axis=2)
    dA_sum = at_end * prefix_sum[:, None, :]
    suffix_sum = tl.sum(at_end * tl.sum(rate, axis=2), axis=1)  # Σ_n A·r in units of log2

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

    d_bias_sum = tl.zeros([HB, PB], tl.float32)
    dD_sum = tl.zeros([HB, PB], tl.float32)
    num_tiles = tl.cdiv(length, STEPS)
    for count in tl.range(0, num_tiles, num_stages=STAGES):
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
        suffix, remaining = running_sums(-delta, prefix_sum, step, STEPS, 1, True)
        prefix = suffix + delta
        prefix_sum = remaining
        u = delta * x_t
        decay = tl.exp2(delta[:, None, :, :] * rate)
        gradients, q = scan_rows_backwards(decay, grad[:, None, :, :] * c_t, q, state_step, STEPS, 2)
        written = gradients * b_t
        du = tl.sum(written, axis=1)
        dA_sum = add_rows(dA_sum, written, (-prefix * u)[:, None, :, :], state_step, STEPS, 2)
        change = correlated - u * tl.sum(written * rate, axis=1)
        suffix, suffix_sum = running_sums(change, suffix_sum, step, STEPS, 1, True)
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
        store_row_sums(
            gradients * u[:, None, :, :], dB, start + tile, end, H, dB_rows, row_block,
            N, BN, STEPS, HB, PB, CHANNELS, blocks, SLOTS, SHARE, IS_HALF,
        )  # fmt: skip

    dA_sum = tl.expand_dims(dA_sum, 2) + tl.load(dA_at, mask=has_element, other=0.0)
    tl.store(dA_at, dA_sum, mask=has_element)
    if HAS_D:
        tl.store(dD_at, tl.expand_dims(dD_sum, 1), mask=exists)
    if HAS_BIAS:
        tl.store(d_bias_at, tl.expand_dims(d_bias_sum, 1), mask=exists)
    if HAS_INITIAL and (flags & IS_FIRST) != 0:
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


@triton.jit
def sum_slots_kernel(
    partial, total, num_groups, num_rows, WIDTH: tl.constexpr, SHARE: tl.constexpr, HB: tl.constexpr, SLOTS: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """total [T, groups, WIDTH] = what the programs of a group's heads left in partial [T, rows, WIDTH], in fp32.

    Grid (tokens, blocks of groups·WIDTH). Program p of the writer's kernel has heads p·HB … and its rows are slots for their
    groups, the first for that of its first head (store_row_sums).
    """
    token = tl.program_id(0).to(tl.int64)
    element = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    exists = element < num_groups * WIDTH
    group = element // WIDTH
    result = tl.zeros([BLOCK], tl.float32)
    for k in tl.static_range((SHARE + HB - 2) // HB + 1):
        program = group * SHARE // HB + k
        has_heads = program * HB < (group + 1) * SHARE
        row = program * SLOTS + group - program * HB // SHARE
        at = partial + token * (num_rows * WIDTH) + row * WIDTH + element % WIDTH
        result += tl.load(at, mask=exists & has_heads, other=0.0).to(tl.float32)
    tl.store(total + token * (num_groups * WIDTH) + element, result.to(total.dtype.element_ty), mask=exists)
