"""Depthwise causal convolution over packed documents: checks and dispatch; arithmetic is in the other files."""

from typing import Any, Literal

from torch import Tensor

from m1.kernels.dispatch import (
    implementation_for,
    require,
    require_cu_seqlens,
    require_rank,
    require_slots,
    require_tensor,
)


def causal_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    activation: Literal["silu"] | None = None,
    cu_seqlens: Tensor | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    head_width: int | None = None,
) -> Any:
    """Convolve each channel with its own causal filter, restarting at every document.

    y_t = act(bias + Σ_w weight[:, w] · x_{t-(W-1)+w}); before a document's first token stand its initial
    state or zeros.

    Args:
        x: [T, Dx] packed tokens; weight: [D, W]; bias: [D]. Dx is D, or divides it (see head_width).
        activation: "silu" or None.
        cu_seqlens: [n+1] int32, None for one document.
        initial_state: [n, Dx, W-1], the inputs before each document, oldest first.
        output_final_state: also return the last W-1 inputs of each document.
        head_width: P, where D = R·Dx: each head of P channels of x is read by R successive heads of filters, as if it were
            repeated (R·P channels side by side) before the convolution, but without moving it.
    Returns:
        y [T, D], or (y, final_state [n, Dx, W-1]), both in x's dtype. Differentiable in every floating input.
    Raises:
        ValueError: for a wrong shape, dtype, device or activation.
    """
    require_rank("x", x, "T Dx")
    num_sequences = require_cu_seqlens(cu_seqlens, x.shape[0], x)
    _check_filter(x, weight, bias, activation, head_width)
    if initial_state is not None:
        shape = (num_sequences, x.shape[1], weight.shape[1] - 1)
        require_tensor("initial_state", initial_state, "n Dx W-1", shape, x)
    implementation = implementation_for(x, __name__)
    return implementation.causal_conv1d(
        x,
        weight,
        bias,
        activation=activation,
        cu_seqlens=cu_seqlens,
        initial_state=initial_state,
        output_final_state=output_final_state,
        head_width=head_width,
    )


def causal_conv1d_update(
    x: Tensor,
    conv_state: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    activation: Literal["silu"] | None = None,
    slots: Tensor | None = None,
    head_width: int | None = None,
) -> Tensor:
    """Convolve one new token of each of n sequences and shift it into their states, in place; without gradient.

    Args:
        x: [n, Dx]; conv_state: [S, Dx, W-1], oldest input first; weight: [D, W]; bias: [D].
        slots: [n] int64, the state of each row; None means arange(n).
        head_width: as for causal_conv1d, where D is a multiple of Dx.
    Returns:
        y [n, D] in x's dtype.
    Raises:
        ValueError: for a wrong shape, dtype, device, activation or (on the CPU) a slot out of range.
    """
    require_rank("x", x, "n Dx")
    _check_filter(x, weight, bias, activation, head_width)
    require_rank("conv_state", conv_state, "S Dx W-1")
    num_slots = conv_state.shape[0]
    require_tensor("conv_state", conv_state, "S Dx W-1", (num_slots, x.shape[1], weight.shape[1] - 1), x)
    require_slots(slots, x.shape[0], num_slots, x)
    implementation = implementation_for(x, __name__, "causal_conv1d_update")
    return implementation.causal_conv1d_update(
        x, conv_state, weight, bias, activation=activation, slots=slots, head_width=head_width
    )


def _check_filter(x: Tensor, weight: Tensor, bias: Tensor | None, activation: str | None, head_width: int | None) -> None:
    require_rank("weight", weight, "D W")
    (channels, width), sources = weight.shape, x.shape[1]
    if head_width is None:
        require_tensor("weight", weight, "D W", (sources, width), x)
    else:
        require(
            head_width > 0 and sources % head_width == 0,
            "head_width",
            f"a divisor of the {sources} channels of x",
            head_width,
        )
        require(
            channels % sources == 0, "weight", f"[D, W] with D a multiple of the {sources} channels of x", [channels, width]
        )
        require_tensor("weight", weight, "D W", (channels, width), x)
    require(width > 0, "weight", "a filter of width W >= 1", list(weight.shape))
    if bias is not None:
        require_tensor("bias", bias, "D", (channels,), x)
    require(activation in (None, "silu"), "activation", "None or 'silu'", repr(activation))
