"""The kernel of the Mamba-1 step: it loads all that a program reads before it computes.

The wait for loads and the number of instructions count here as much as bytes do. So nothing but a sequence's slot is waited
for before all of its states, rows and parameters have been asked for; all strides but the slots' and rows' are constants, so
that addresses differ by immediates; taps and windows are a tile each, which spares sums across lanes.

A tile may have fewer elements than the program has threads. Then several threads hold the same element: all of them load
it, one of them stores it, and nothing orders the store of one after the load of another. So states are loaded before a
barrier and stored after it.
"""

# mypy: disable-error-code="assignment,var-annotated"
# (a tuple grows by +=, which Triton unrolls)

import triton
import triton.language as tl

from m1.kernels.launch import wait_for_previous
from m1.kernels.triton_math import LOG2E, sigmoid, softplus


@triton.jit
def _parameter(at, exists, IS_GIVEN: tl.constexpr):
    """A parameter of each channel as fp32, zero where there is none."""
    if IS_GIVEN:
        return tl.load(at, mask=exists, other=0.0).to(tl.float32)
    else:
        return tl.zeros(exists.shape, tl.float32)


@triton.jit
def step_kernel(
    conv_state, ssm_state, z, x, B, C, dt, conv_weight, conv_bias, A_log, D, dt_bias, slots, y,
    conv_slot, conv_channel: tl.constexpr, conv_place: tl.constexpr,
    ssm_slot, ssm_head: tl.constexpr, ssm_row: tl.constexpr, ssm_n: tl.constexpr, num_slots,
    z_row, z_head: tl.constexpr, x_row, x_head: tl.constexpr, b_row, b_head: tl.constexpr, c_row, c_head: tl.constexpr,
    dt_row, dt_head: tl.constexpr,
    G: tl.constexpr, REPEAT: tl.constexpr, P: tl.constexpr, N: tl.constexpr, BN: tl.constexpr, WIDTH: tl.constexpr,
    GB: tl.constexpr, PB: tl.constexpr, OWN_FILTERS: tl.constexpr,
    HAS_CONV_BIAS: tl.constexpr, HAS_D: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_SLOTS: tl.constexpr,
    SILU: tl.constexpr, SOFTPLUS: tl.constexpr, IS_CHAINED: tl.constexpr,
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
    is_element = is_channel[:, :, None] & (n < N)
    source = g * P + row
    channel = g * (REPEAT * P) + row  # of the first member
    window_at = conv_state + first * (P * conv_channel) + source * conv_channel
    states_at = ssm_state + first * (REPEAT * ssm_head) + ((g * (REPEAT * ssm_head) + row * ssm_row)[:, :, None] + n * ssm_n)
    rates_at = A_log + first * (REPEAT * P * N) + ((channel * N)[:, :, None] + n)
    dt_at = dt + first * (REPEAT * dt_head) + (g * (REPEAT * dt_head) + row)
    z_at = z + first * (REPEAT * z_head) + (g * (REPEAT * z_head) + row)
    c_at = C + first * (REPEAT * c_head) + ((g * (REPEAT * c_head))[:, :, None] + n)
    b_at = B + first * b_head + ((g * b_head)[:, :, None] + n)
    x_at = x + first * x_head + (g * x_head + row)
    out_at = y + first * (REPEAT * P) + channel
    parameter = first * (REPEAT * P) + channel

    place = slot + tl.zeros([1, 1], tl.int64)
    is_placed = (place >= 0) & (place < num_slots)
    exists, has_element = is_channel & is_placed, is_element & is_placed[:, :, None]
    has_narrow = is_group[:, :, None] & (n < N) & is_placed[:, :, None]
    states, steps, gates, readouts, past = (), (), (), (), ()
    for member in tl.static_range(REPEAT):
        states += (tl.load(states_at + slot * ssm_slot + member * ssm_head, mask=has_element, other=0.0),)
    for w in tl.static_range(WIDTH - 1):
        past += (tl.load(window_at + slot * conv_slot + w * conv_place, mask=exists, other=0.0),)
    for member in tl.static_range(REPEAT):
        steps += (tl.load(dt_at + sequence * dt_row + member * dt_head, mask=exists, other=0.0),)
        gates += (tl.load(z_at + sequence * z_row + member * z_head, mask=exists, other=0.0),)
        readouts += (tl.load(c_at + sequence * c_row + member * c_head, mask=has_narrow, other=0.0),)
    x_new = tl.load(x_at + sequence * x_row, mask=exists, other=0.0)
    b_t = tl.load(b_at + sequence * b_row, mask=has_narrow, other=0.0)
    rates, taps, biases, skips, offsets = (), (), (), (), ()
    for member in tl.static_range(REPEAT):
        rates += (tl.load(rates_at + member * (P * N), mask=is_element, other=0.0),)
        if member == 0 or OWN_FILTERS:
            filtered = parameter + member * P if OWN_FILTERS else first * P + source
            of_filter = ()
            for w in tl.static_range(WIDTH):
                of_filter += (_parameter(conv_weight + filtered * WIDTH + w, is_channel, True),)
            taps += (of_filter,)
            biases += (_parameter(conv_bias + filtered, is_channel, HAS_CONV_BIAS),)
        offsets += (_parameter(dt_bias + parameter + member * P, is_channel, HAS_BIAS),)
        skips += (_parameter(D + parameter + member * P, is_channel, HAS_D),)
    decays = ()
    for member in tl.static_range(REPEAT):
        decays += (tl.exp2(rates[member].to(tl.float32) * LOG2E),)

    b_t = b_t.to(tl.float32)
    for member in tl.static_range(REPEAT):
        if member == 0 or OWN_FILTERS:
            x_t = x_new.to(tl.float32) * taps[member][WIDTH - 1] + biases[member]
            for w in tl.static_range(WIDTH - 1):
                x_t += past[w].to(tl.float32) * taps[member][w]
            if SILU:
                x_t *= sigmoid(x_t)
            x_t = x_t.to(x.dtype.element_ty).to(tl.float32)  # rounded as between separate ops
        delta = steps[member].to(tl.float32) + offsets[member]
        if SOFTPLUS:
            delta = softplus(delta)
        h = states[member].to(tl.float32)
        h = tl.exp2((delta * -LOG2E)[:, :, None] * decays[member]) * h + (delta * x_t)[:, :, None] * b_t
        out = tl.sum(h * readouts[member].to(tl.float32), axis=2) + skips[member] * x_t
        gate = gates[member].to(tl.float32)
        out = tl.where(exists, out * gate * sigmoid(gate), 0.0).to(y.dtype.element_ty)
        tl.store(out_at + sequence * (G * REPEAT * P) + member * P, out, mask=is_channel)
        tl.debug_barrier()
        tl.store(states_at + slot * ssm_slot + member * ssm_head, h.to(ssm_state.dtype.element_ty), mask=has_element)
    for w in tl.static_range(1, WIDTH - 1):
        tl.store(window_at + slot * conv_slot + (w - 1) * conv_place, past[w], mask=exists)
    if WIDTH > 1:
        newest_at = window_at + slot * conv_slot + (WIDTH - 2) * conv_place
        tl.store(newest_at, x_new.to(conv_state.dtype.element_ty), mask=exists)
