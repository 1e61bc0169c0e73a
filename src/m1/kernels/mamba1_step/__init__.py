"""One decoding step of M1's Mamba-1 mixer between its projections: checks and dispatch; arithmetic is in the other files.

Convolution step, softplus of the step size, scan step, skip and gate (arXiv 2504.10449 §3) in one call, so that on a GPU
the step costs one read and one write of the states. The projections before and after stay outside.
"""

from typing import Literal

from torch import Tensor

from m1.kernels.dispatch import implementation_for, require, require_groups, require_rank, require_slots, require_tensor


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
    conv_activation: Literal["silu"] | None = "silu",
    slots: Tensor | None = None,
) -> Tensor:
    """Advance the states of n sequences by one token each, in place; without gradient.

    The same as causal_conv1d_update of x, then selective_state_update.

    Args:
        conv_state: [S, G·P, W-1]; ssm_state: [S, H, P, N]; both any floating dtype, updated in place.
        z: [n, H, P]; x: [n, G, P]; B: [n, G, N]; C: [n, H, N]: the rows of in_proj; dt: [n, H, P], after dt_proj.
        conv_weight: [Dc, W]; conv_bias: [Dc], with Dc = H·P (a filter a channel of every query-side head, as if x were
            repeated before the convolution) or G·P (repeated after it).
        A_log: [H, P, N], the rates are A = -exp(A_log); D, dt_bias: [H, P].
        slots: [n] int64, the state of each row; None means arange(n).
    Returns:
        y [n, H, P] in x's dtype.
    Raises:
        ValueError: for a wrong shape, dtype, device, activation or (on the CPU) a slot out of range.
    """
    _check(conv_state, ssm_state, z, x, B, C, dt, conv_weight, conv_bias, A_log, D, dt_bias, slots)
    require(conv_activation in (None, "silu"), "conv_activation", "None or 'silu'", repr(conv_activation))
    implementation = implementation_for(x, __name__)
    return implementation.mamba1_step(
        conv_state,
        ssm_state,
        z,
        x,
        B,
        C,
        dt,
        conv_weight,
        conv_bias,
        A_log,
        D=D,
        dt_bias=dt_bias,
        dt_softplus=dt_softplus,
        conv_activation=conv_activation,
        slots=slots,
    )


def _check(
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
    D: Tensor | None,
    dt_bias: Tensor | None,
    slots: Tensor | None,
) -> None:
    require_rank("x", x, "n G P")
    require_rank("A_log", A_log, "H P N")
    require_rank("conv_weight", conv_weight, "Dc W")
    require_rank("ssm_state", ssm_state, "S H P N")
    n, num_groups, width = x.shape
    num_heads, _, d_state = A_log.shape
    num_slots = ssm_state.shape[0]
    channels, filter_width = conv_weight.shape
    require_groups("x", num_heads, num_groups)
    require_tensor("A_log", A_log, "H P N", (num_heads, width, d_state), x)
    require_tensor("ssm_state", ssm_state, "S H P N", (num_slots, num_heads, width, d_state), x)
    require(
        channels in (num_groups * width, num_heads * width),
        "conv_weight",
        f"of {num_groups * width} (G·P) or {num_heads * width} (H·P) channels",
        f"{channels} channels",
    )
    require_tensor("conv_state", conv_state, "S G·P W-1", (num_slots, num_groups * width, filter_width - 1), x)
    require_tensor("conv_weight", conv_weight, "Dc W", (channels, filter_width), x)
    require_tensor("B", B, "n G N", (n, num_groups, d_state), x)
    require_tensor("C", C, "n H N", (n, num_heads, d_state), x)
    for name, tensor in (("z", z), ("dt", dt)):
        require_tensor(name, tensor, "n H P", (n, num_heads, width), x)
    for name, parameter in (("D", D), ("dt_bias", dt_bias)):
        if parameter is not None:
            require_tensor(name, parameter, "H P", (num_heads, width), x)
    if conv_bias is not None:
        require_tensor("conv_bias", conv_bias, "Dc", (channels,), x)
    require_slots(slots, n, num_slots, x)
