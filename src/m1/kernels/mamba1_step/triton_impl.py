"""The Mamba-1 decoding step on a GPU: one kernel, in triton_kernel.py; states by slot, each read and written once.

A program serves some groups of one sequence, with all query-side heads that share their windows, one member of each group
after the other: so a tile has no padding whatever H/G is, and what members share is loaded once.

Bytes moved: a sequence's states twice, 2·(H·P·N + G·P·(W-1)) elements, and (4·H·P + 2·G·P) · 2 besides. Floor on an H100
at 3.0 TB/s, M1-3B dimensions (H = 192, G = 64, P = N = 16, W = 4), batch 512, fp32 SSM states and a bf16 window:
201 + 6 + 15 MB, 74 µs (bf16 states 41 µs).
"""

from typing import NamedTuple

import torch
from torch import Tensor

from m1.kernels.launch import cdiv, chaining, next_power_of_2, with_unit_stride
from m1.kernels.mamba1_step.triton_kernel import step_kernel

WARP = 32
LANE_BYTES = 192  # of the states that a lane holds, which are in registers all at once, beside their parameters


class StepConfig(NamedTuple):
    """Groups a program, its warps, the most registers a thread (None: as many as the compiler likes), and the most channels
    of a head a program.
    """

    groups: int = 2
    num_warps: int = 1
    max_registers: int | None = None
    channels: int = 16


def choose_config(state_dtype: torch.dtype, repeat: int, d_state: int) -> StepConfig:
    """The launch for SSM states of that dtype, `repeat` heads a group, d_state = N."""
    config = StepConfig()
    bytes_a_channel = config.groups * repeat * d_state * state_dtype.itemsize // WARP
    most = max(LANE_BYTES // max(bytes_a_channel, 1), 1)
    return config._replace(channels=min(config.channels, 1 << (most.bit_length() - 1)))


@torch.no_grad()
def mamba1_step(
    conv_state: Tensor,
    ssm_state: Tensor,
    z: Tensor,
    x: Tensor,
    B: Tensor,
    C: Tensor,
    dt: Tensor,
    conv_weight: Tensor,
    conv_bias: Tensor | None,
    A_log: Tensor,
    *,
    D: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = True,
    conv_activation: str | None = "silu",
    slots: Tensor | None = None,
    config: StepConfig | None = None,
) -> Tensor:
    """See m1.kernels.mamba1_step.mamba1_step; `config` overrides the launch sizes.

    A row whose slot is not one of the states' is skipped: no state changes, and its y is zero.
    """
    H, P, N = A_log.shape
    n, G, _ = x.shape
    config = config or choose_config(ssm_state.dtype, H // G, N)
    width = conv_weight.shape[1]
    z, x, B, C, dt = (with_unit_stride(tensor) for tensor in (z, x, B, C, dt))
    conv_weight, A_log = conv_weight.contiguous(), A_log.contiguous()
    D, dt_bias, conv_bias = (None if p is None else p.contiguous() for p in (D, dt_bias, conv_bias))
    y = torch.empty(n, H, P, dtype=x.dtype, device=x.device)
    block_n = next_power_of_2(N)
    rows = min(next_power_of_2(P), config.channels, max(1024 // block_n, 1))
    grid = (cdiv(G, config.groups) * cdiv(P, rows), n)
    with torch.cuda.device_of(x):
        step_kernel[grid](
            conv_state, ssm_state, z, x, B, C, dt, conv_weight, conv_bias, A_log, D, dt_bias, slots, y,
            *conv_state.stride(), *ssm_state.stride(), min(conv_state.shape[0], ssm_state.shape[0]),
            *z.stride()[:2], *x.stride()[:2], *B.stride()[:2], *C.stride()[:2], *dt.stride()[:2],
            G, H // G, P, N, block_n, width, config.groups, rows,
            OWN_FILTERS=conv_weight.shape[0] == H * P, HAS_CONV_BIAS=conv_bias is not None,
            HAS_D=D is not None, HAS_BIAS=dt_bias is not None, HAS_SLOTS=slots is not None,
            SILU=conv_activation == "silu", SOFTPLUS=dt_softplus,
            num_warps=config.num_warps, maxnreg=config.max_registers, **chaining(x.device),
        )  # fmt: skip
    return y
