"""The Mamba-1 decoding step in torch: the two update ops one after the other. The truth for the kernel, and the CPU path."""

import torch
from torch import Tensor

from m1.kernels.causal_conv1d.reference import causal_conv1d_update
from m1.kernels.selective_scan.reference import selective_state_update


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
) -> Tensor:
    """See m1.kernels.mamba1_step.mamba1_step."""
    width = x.shape[2]
    convolved = causal_conv1d_update(
        x.flatten(1), conv_state, conv_weight, conv_bias, activation=conv_activation, slots=slots, head_width=width
    )
    x = convolved.unflatten(1, (-1, width))
    A = -A_log.float().exp()
    return selective_state_update(ssm_state, x, dt, A, B, C, D=D, z=z, dt_bias=dt_bias, dt_softplus=dt_softplus, slots=slots)
