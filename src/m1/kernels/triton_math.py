"""Elementary functions for Triton kernels, and recurrences over a tile that stays in registers; no kernel lives here.

exp2, log1p and sigmoid are written for instruction count: one special-function instruction each. Relative error is below
5e-7 (log1p, sigmoid) on the whole range, which is what fp32 arithmetic leaves anyway.

The recurrences run along an axis of a tile, `step` being that axis's index in the tile's rank. They take row k as a
sum in which every other row is masked to zero. Where the axis lies wholly inside a thread (the layouts in use see to that,
by giving the lanes to the other axes), the masks are constants and a row is a register: no instruction is left of it. The
sums are of integers, because adding the integer 0 folds away and adding 0.0 does not. In Triton's interpreter a call costs
more than arithmetic, so the idiom is written out in each.
"""

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def widen(x, IS_INTERPRETED: tl.constexpr):
    """Half precision to fp32; of bf16 by one instruction an element, where the compiler's own conversion takes up to two."""
    if x.dtype == tl.bfloat16 and not IS_INTERPRETED:
        return tl.inline_asm_elementwise(
            "shl.b32 $0, $2, 16; and.b32 $1, $2, 0xffff0000;", "=r,=r,r", [x], dtype=tl.float32, is_pure=True, pack=2
        )
    else:
        return x.to(tl.float32)


@triton.jit
def log1p_of_unit(u):
    """log(1 + u) for u in [0, 1]: u times the degree-9 Chebyshev interpolant of log1p(u)/u."""
    r = u * -0.0031760570127516985 + 0.019542528316378593
    r = r * u - 0.05637361481785774
    r = r * u + 0.10543623566627502
    r = r * u - 0.1526966691017151
    r = r * u + 0.1966327428817749
    r = r * u - 0.24951615929603577
    r = r * u + 0.33329710364341736
    r = r * u - 0.49999892711639404
    return u * (r * u + 1.0)


@triton.jit
def sigmoid(v):
    """1 / (1 + exp(-v)) as the square of a reciprocal root, which is one instruction where a division is many."""
    root = tl.rsqrt(1.0 + tl.exp2(v * -LOG2E))
    return root * root


@triton.jit
def softplus(v):
    """log(1 + exp(v)), accurate in relative terms also where it is small."""
    return tl.maximum(v, 0.0) + log1p_of_unit(tl.exp2(tl.abs(v) * -LOG2E))


@triton.jit
def softplus_and_slope(v):
    """softplus(v) and its derivative sigmoid(v), from one exponential."""
    u = tl.exp2(tl.abs(v) * -LOG2E)
    root = tl.rsqrt(1.0 + u)
    return tl.maximum(v, 0.0) + log1p_of_unit(u), tl.where(v >= 0, 1.0, u) * root * root


@triton.jit
def row_of(tile, step, k):
    """Row k of an fp32 tile."""
    return tl.sum(tl.where(step == k, tile.to(tl.int32, bitcast=True), 0), axis=0).to(tl.float32, bitcast=True)


@triton.jit
def delay_rows(tile, before, step, BY: tl.constexpr, STEPS: tl.constexpr):
    """Row k is row k - BY of the tile, or of the tile `before` it."""
    moved = tile
    if BY > 0:
        tile_bits, before_bits = tile.to(tl.int32, bitcast=True), before.to(tl.int32, bitcast=True)
        for k in tl.static_range(STEPS):
            source = tile_bits if k >= BY else before_bits
            row = tl.sum(tl.where(step == (k - BY) % STEPS, source, 0), axis=0).to(tl.float32, bitcast=True)
            moved = tl.where(step == k, tl.expand_dims(row, 0), moved)
    return moved


@triton.jit
def scan_rows(decay, write, state, step, STEPS: tl.constexpr, AXIS: tl.constexpr = 0):
    """h_k = decay_k · h_{k-1} + write_k: all h_k, and the last."""
    decay_bits = decay.to(tl.int32, bitcast=True)
    write_bits = write.to(tl.int32, bitcast=True)
    states = write
    for k in tl.static_range(STEPS):
        decay_k = tl.sum(tl.where(step == k, decay_bits, 0), axis=AXIS).to(tl.float32, bitcast=True)
        write_k = tl.sum(tl.where(step == k, write_bits, 0), axis=AXIS).to(tl.float32, bitcast=True)
        state = decay_k * state + write_k
        states = tl.where(step == k, tl.expand_dims(state, AXIS), states)
    return states, state


@triton.jit
def scan_rows_exclusive(decay, write, state, step, STEPS: tl.constexpr, AXIS: tl.constexpr = 0):
    """The same recurrence: what enters each row, h_{k-1}, and the last h."""
    decay_bits = decay.to(tl.int32, bitcast=True)
    write_bits = write.to(tl.int32, bitcast=True)
    entering = write
    for k in tl.static_range(STEPS):
        entering = tl.where(step == k, tl.expand_dims(state, AXIS), entering)
        decay_k = tl.sum(tl.where(step == k, decay_bits, 0), axis=AXIS).to(tl.float32, bitcast=True)
        write_k = tl.sum(tl.where(step == k, write_bits, 0), axis=AXIS).to(tl.float32, bitcast=True)
        state = decay_k * state + write_k
    return entering, state


@triton.jit
def scan_rows_backwards(decay, write, carry, step, STEPS: tl.constexpr, AXIS: tl.constexpr = 0):
    """g_k = q + write_k, then q = decay_k · g_k, from the last row to the first: all g_k, and the last q."""
    decay_bits = decay.to(tl.int32, bitcast=True)
    write_bits = write.to(tl.int32, bitcast=True)
    gradients = write
    for back in tl.static_range(STEPS):
        is_k = step == STEPS - 1 - back
        gradient = carry + tl.sum(tl.where(is_k, write_bits, 0), axis=AXIS).to(tl.float32, bitcast=True)
        carry = tl.sum(tl.where(is_k, decay_bits, 0), axis=AXIS).to(tl.float32, bitcast=True) * gradient
        gradients = tl.where(is_k, tl.expand_dims(gradient, AXIS), gradients)
    return gradients, carry


@triton.jit
def add_rows(total, values, weights, step, STEPS: tl.constexpr, AXIS: tl.constexpr = 0):
    """total + Σ_k values_k · weights_k as one chain of fused multiply-adds (tl.sum would build a tree)."""
    value_bits = values.to(tl.int32, bitcast=True)
    weight_bits = tl.broadcast_to(weights, values.shape).to(tl.int32, bitcast=True)
    for k in tl.static_range(STEPS):
        value = tl.sum(tl.where(step == k, value_bits, 0), axis=AXIS).to(tl.float32, bitcast=True)
        total += value * tl.sum(tl.where(step == k, weight_bits, 0), axis=AXIS).to(tl.float32, bitcast=True)
    return total


@triton.jit
def running_sums(values, carry, step, STEPS: tl.constexpr, AXIS: tl.constexpr, REVERSE: tl.constexpr):
    """carry + the sums of rows 0 … k, or of rows k … STEPS - 1 in REVERSE: for every k, and the sum of all."""
    bits = values.to(tl.int32, bitcast=True)
    sums = values
    for k in tl.static_range(STEPS):
        is_k = step == (STEPS - 1 - k if REVERSE else k)
        carry += tl.sum(tl.where(is_k, bits, 0), axis=AXIS).to(tl.float32, bitcast=True)
        sums = tl.where(is_k, tl.expand_dims(carry, AXIS), sums)
    return sums, carry


@triton.jit
def running_products(values, carry, step, STEPS: tl.constexpr, AXIS: tl.constexpr):
    """carry times the products of rows 0 … k: for every k, and the product of all."""
    bits = values.to(tl.int32, bitcast=True)
    products = values
    for k in tl.static_range(STEPS):
        carry *= tl.sum(tl.where(step == k, bits, 0), axis=AXIS).to(tl.float32, bitcast=True)
        products = tl.where(step == k, tl.expand_dims(carry, AXIS), products)
    return products, carry
