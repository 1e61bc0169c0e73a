"""The Mamba-2 decoding step in torch: the single ops one after the other. The truth for the kernel, and the CPU path."""

import torch
import torch.nn.functional as F
from torch import Tensor

from m1.kernels.causal_conv1d.reference import causal_conv1d_update
from m1.kernels.norm.reference import gated_rms_norm
from m1.kernels.ssd.reference import ssd_state_update


@torch.no_grad()
def mamba2_step(
    conv_state: Tensor,
    ssm_state: Tensor,
    z: Tensor,
    xBC: Tensor,
    dt: Tensor,
    conv_weight: Tensor,
    conv_bias: Tensor | None,
    A_log: Tensor,
    *,
    D: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = True,
    conv_activation: str | None = "silu",
    norm_weight: Tensor | None = None,
    norm_eps: float = 0.0,
    slots: Tensor | None = None,
) -> Tensor:
    """See m1.kernels.mamba2_step.mamba2_step."""
    channels = causal_conv1d_update(xBC, conv_state, conv_weight, conv_bias, activation=conv_activation, slots=slots)
    _, H, P, N = ssm_state.shape
    G = (channels.shape[1] - H * N) // (P + N)
    x, B, C = channels.split([G * P, G * N, H * N], 1)
    x, B, C = x.unflatten(1, (G, P)), B.unflatten(1, (G, N)), C.unflatten(1, (H, N))
    A = -A_log.float().exp()
    y = ssd_state_update(ssm_state, x, dt, A, B, C, D=D, dt_bias=dt_bias, dt_softplus=dt_softplus, slots=slots)
    if norm_weight is not None:
        return gated_rms_norm(y, z, norm_weight, norm_eps)
    return (y.float() * F.silu(z.float())).to(y.dtype)
