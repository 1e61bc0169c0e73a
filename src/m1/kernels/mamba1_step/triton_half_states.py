"""The Mamba-1 step's kernel for SSM states of 16 bits: fewer instructions a state than triton_impl.py's, whose note on tiles
with fewer elements than threads holds here too.

With half the bytes to move, instructions and the wait for them count: a sequence's slot is a scalar and a row without one
returns at once, so no load is masked for it; all strides but the slots' and rows' are constants, so that addresses differ by
immediates; taps and windows are a tile each, which spares sums across lanes. A state takes 26 instructions (sm_90), not 42 as
triton_impl.py's kernel does with one group a program. That one is ahead with fp32 states of groups of many heads.
"""

# mypy: disable-error-code="assignment,var-annotated"
# (a tuple grows by +=, which Triton unrolls)

import triton
import triton.language as tl

from m1.kernels.launch import wait_for_previous
from m1.kernels.triton_math import LOG2E, sigmoid, softplus


@triton.jit
def half_states_kernel(
    conv_state, ssm_state, z, x, B, C, dt, conv_weight, conv_bias, A_log, D, dt_bias, slots, y,
    conv_slot, conv_channel: tl.constexpr, conv_place: tl.constexpr,
    ssm_slot, ssm_head: tl.constexpr, ssm_row: tl.constexpr, ssm_n: tl.constexpr, num_slots,
    z_row, z_head: tl.constexpr, x_row, x_head: tl.constexpr, b_row, b_head: tl.constexpr, c_row, c_head: tl.constexpr,
    dt_row, dt_head: tl.constexpr,
    G: tl.constexpr, REPEAT: tl.constexpr, P: tl.constexpr, N: tl.constexpr, BN: tl.constexpr, WIDTH: tl.constexpr,
    GB: tl.constexpr, PB: tl.constexpr, OWN_FILTERS: tl.constexpr,
    HAS_CONV_BIAS: tl.constexpr, HAS_D: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_SLOTS: tl.constexpr,
    SILU: tl.constexpr, SOFTPLUS: tl.constexpr, IS_SMALL: tl.constexpr, IS_CHAINED: tl.constexpr,
):  # fmt: skip
    """Grid (blocks of GB groups x blocks of PB rows, sequences); tiles [GB, PB, BN].

    OWN_FILTERS: every head has its own filter (else one a group).
    """
    wait_for_previous(IS_CHAINED)
    blocks: tl.constexpr = (P + PB - 1) // PB
    part = tl.program_id(0)
    sequence = tl.program_id(1).to(tl.int64)
    slot = sequence
    if HAS_SLOTS:
        slot = tl.load(slots + sequence)
    first = part // blocks * GB
    g = tl.arange(0, GB)[:, None]
    row = (part % blocks * PB + tl.arange(0, PB))[None, :]
    n = tl.arange(0, BN)[None, None, :]
    is_group = g < GB if G % GB == 0 else g < G - first  # [GB, 1]
    is_channel = is_group & (row < P)
    has_element = is_channel[:, :, None] & (n < N)
    has_narrow = is_group[:, :, None] & (n < N)
    out_at = y + (sequence * G + first) * (REPEAT * P) + (g * (REPEAT * P) + row)
    if (slot < 0) | (slot >= num_slots):
        for member in tl.static_range(REPEAT):
            tl.store(out_at + member * P, tl.zeros([GB, PB], y.dtype.element_ty), mask=is_channel)
        return
    source = g * P + row
    channel = g * (REPEAT * P) + row  # of the first member
    window_at = conv_state + slot * conv_slot + first * (P * conv_channel) + source * conv_channel
    states_at = ssm_state + slot * ssm_slot + first * (REPEAT * ssm_head)
    states_at += (g * (REPEAT * ssm_head) + row * ssm_row)[:, :, None] + n * ssm_n
    rates_at = A_log + first * (REPEAT * P * N) + ((channel * N)[:, :, None] + n)
    dt_at = dt + sequence * dt_row + first * (REPEAT * dt_head) + (g * (REPEAT * dt_head) + row)
    z_at = z + sequence * z_row + first * (REPEAT * z_head) + (g * (REPEAT * z_head) + row)
    c_at = C + sequence * c_row + first * (REPEAT * c_head) + ((g * (REPEAT * c_head))[:, :, None] + n)
    parameter = first * (REPEAT * P) + channel
    past = ()
    for w in tl.static_range(WIDTH - 1):
        past += (tl.load(window_at + w * conv_place, mask=is_channel, other=0.0),)
    x_new = tl.load(x + sequence * x_row + first * x_head + (g * x_head + row), mask=is_channel, other=0.0)
    b_t = tl.load(B + sequence * b_row + first * b_head + ((g * b_head)[:, :, None] + n), mask=has_narrow, other=0.0)
    b_t = b_t.to(tl.float32)
    for member in tl.static_range(REPEAT):
        h = tl.load(states_at + member * ssm_head, mask=has_element, other=0.0).to(tl.float32)
        rate = tl.load(rates_at + member * (P * N), mask=has_element, other=0.0).to(tl.float32)
        delta = tl.load(dt_at + member * dt_head, mask=is_channel, other=0.0).to(tl.float32)
        gate = tl.load(z_at + member * z_head, mask=is_channel, other=0.0).to(tl.float32)
        c_t = tl.load(c_at + member * c_head, mask=has_narrow, other=0.0).to(tl.float32)
        if member == 0 or OWN_FILTERS:
            filtered = parameter + member * P if OWN_FILTERS else first * P + source
            taps = conv_weight + filtered * WIDTH
            x_t = x_new.to(tl.float32) * tl.load(taps + (WIDTH - 1), mask=is_channel, other=0.0).to(tl.float32)
            for w in tl.static_range(WIDTH - 1):
                x_t += past[w].to(tl.float32) * tl.load(taps + w, mask=is_channel, other=0.0).to(tl.float32)
            if HAS_CONV_BIAS:
                x_t += tl.load(conv_bias + filtered, mask=is_channel, other=0.0).to(tl.float32)
            if SILU:
                x_t *= sigmoid(x_t)
            x_t = x_t.to(x.dtype.element_ty).to(tl.float32)  # rounded as between separate ops
        if HAS_BIAS:
            delta += tl.load(dt_bias + parameter + member * P, mask=is_channel, other=0.0).to(tl.float32)
        if SOFTPLUS:
            delta = softplus(delta)
        h = tl.exp2((delta * -LOG2E)[:, :, None] * tl.exp2(rate * LOG2E)) * h + (delta * x_t)[:, :, None] * b_t
        out = tl.sum(h * c_t, axis=2)
        if HAS_D:
            out += tl.load(D + parameter + member * P, mask=is_channel, other=0.0).to(tl.float32) * x_t
        tl.store(out_at + member * P, (out * gate * sigmoid(gate)).to(y.dtype.element_ty), mask=is_channel)
        if IS_SMALL:
            tl.debug_barrier()
        tl.store(states_at + member * ssm_head, h.to(ssm_state.dtype.element_ty), mask=has_element)
    tl.debug_barrier()
    for w in tl.static_range(1, WIDTH - 1):
        tl.store(window_at + (w - 1) * conv_place, past[w], mask=is_channel)
    if WIDTH > 1:
        tl.store(window_at + (WIDTH - 2) * conv_place, x_new.to(conv_state.dtype.element_ty), mask=is_channel)
