"""One decoding step of the Mamba-2 mixer between its projections: checks and dispatch; arithmetic is in the other files.

Convolution step of x, B and C, softplus of the step size, scan step, skip, gate and output norm (arXiv 2405.21060 §7) in one
call, so that on a GPU the step costs little more than one read and one write of the states. The projections stay outside.
"""

from typing import Literal

from torch import Tensor

from m1.kernels.dispatch import (
    implementation_for,
    require,
    require_rank,
    require_slots,
    require_tensor,
)


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
    conv_activation: Literal["silu"] | None = "silu",
    norm_weight: Tensor | None = None,
    norm_eps: float = 0.0,
    slots: Tensor | None = None,
) -> Tensor:
    """Advance the states of n sequences by one token each, in place; without gradient.

    The same as causal_conv1d_update of xBC, then ssd_state_update, then gated_rms_norm with z (or, where `norm_weight`
    is None, the product with silu(z)).

    Args:
        conv_state: [S, Dc, W-1]; ssm_state: [S, H, P, N]; both any floating dtype, updated in place.
        z: [n, H, P]; xBC: [n, Dc] with Dc = G·P + G·N + H·N, the channels of x, B and C in this order; dt: [n, H]: the rows
            of in_proj.
        conv_weight: [Dc, W]; conv_bias: [Dc]; A_log: [H], the rates are A = -exp(A_log); D, dt_bias: [H].
        norm_weight: [H·P]; norm_eps: added to the mean square.
        slots: [n] int64, the state of each row; None means arange(n).
    Returns:
        y [n, H, P] in xBC's dtype.
    Raises:
        ValueError: for a wrong shape, dtype, device, activation, negative norm_eps or (on the CPU) a slot out of range.
    """
    _check(conv_state, ssm_state, z, xBC, dt, conv_weight, conv_bias, A_log, D, dt_bias, norm_weight, slots)
    require(conv_activation in (None, "silu"), "conv_activation", "None or 'silu'", repr(conv_activation))
    require(norm_eps >= 0, "norm_eps", "at least 0", norm_eps)
    return implementation_for(xBC, __name__).mamba2_step(
        conv_state,
        ssm_state,
        z,
        xBC,
        dt,
        conv_weight,
        conv_bias,
        A_log,
        D=D,
        dt_bias=dt_bias,
        dt_softplus=dt_softplus,
        conv_activation=conv_activation,
        norm_weight=norm_weight,
        norm_eps=norm_eps,
        slots=slots,
    )


def _check(
    conv_state: Tensor,
    ssm_state: Tensor,
    z: Tensor,
    xBC: Tensor,
    dt: Tensor,
    conv_weight: Tensor,
    conv_bias: Tensor | None,
    A_log: Tensor,
    D: Tensor | None,
    dt_bias: Tensor | None,
    norm_weight: Tensor | None,
    slots: Tensor | None,
) -> None:
    require_rank("xBC", xBC, "n Dc")
    require_rank("conv_weight", conv_weight, "Dc W")
    require_rank("ssm_state", ssm_state, "S H P N")
    n, channels = xBC.shape
    num_slots, num_heads, width, d_state = ssm_state.shape
    filter_width = conv_weight.shape[1]
    num_groups, rest = divmod(channels - num_heads * d_state, width + d_state)
    expected = f"of G·(P + N) + H·N channels, P = {width}, N = {d_state}, G dividing H = {num_heads}"
    require(rest == 0 and num_groups > 0 and num_heads % num_groups == 0, "xBC", expected, f"{channels} channels")
    require_tensor("ssm_state", ssm_state, "S H P N", ssm_state.shape, xBC)
    require_tensor("z", z, "n H P", (n, num_heads, width), xBC)
    require_tensor("dt", dt, "n H", (n, num_heads), xBC)
    require_tensor("conv_weight", conv_weight, "Dc W", (channels, filter_width), xBC)
    require(filter_width > 0, "conv_weight", "a filter of width W >= 1", list(conv_weight.shape))
    require_tensor("conv_state", conv_state, "S Dc W-1", (num_slots, channels, filter_width - 1), xBC)
    for name, parameter in (("A_log", A_log), ("D", D), ("dt_bias", dt_bias)):
        if parameter is not None:
            require_tensor(name, parameter, "H", (num_heads,), xBC)
    if conv_bias is not None:
        require_tensor("conv_bias", conv_bias, "Dc", (channels,), xBC)
    if norm_weight is not None:
        require_tensor("norm_weight", norm_weight, "H·P", (num_heads * width,), xBC)
    require_slots(slots, n, num_slots, xBC)
