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
) -> Any:
    """Convolve each channel with its own causal filter, restarting at every document.

    y_t = act(bias + Σ_w weight[:, w] · x_{t-(W-1)+w}); before a document's first token stand its initial
    state or zeros.

    Args:
        x: [T, D] packed tokens; weight: [D, W]; bias: [D].
        activation: "silu" or None.
        cu_seqlens: [n+1] int32, None for one document.
        initial_state: [n, D, W-1], the inputs before each document, oldest first.
        output_final_state: also return the last W-1 inputs of each document.
    Returns:
        y [T, D], or (y, final_state [n, D, W-1]), both in x's dtype. Differentiable in every floating input.
    Raises:
        ValueError: for a wrong shape, dtype, device or activation.
    """
    require_rank("x", x, "T D")
    num_sequences = require_cu_seqlens(cu_seqlens, x.shape[0], x)
    _check_filter(x, weight, bias, activation)
    if initial_state is not None:
        shape = (num_sequences, x.shape[1], weight.shape[1] - 1)
        require_tensor("initial_state", initial_state, "n D W-1", shape, x)
    implementation = implementation_for(x, __name__)
    return implementation.causal_conv1d(
        x,
        weight,
        bias,
        activation=activation,
        cu_seqlens=cu_seqlens,
        initial_state=initial_state,
        output_final_state=output_final_state,
    )


def causal_conv1d_update(
    x: Tensor,
    conv_state: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    activation: Literal["silu"] | None = None,
    slots: Tensor | None = None,
) -> Tensor:
    """Convolve one new token of each of n sequences and shift it into their states, in place; without gradient.

    Args:
        x: [n, D]; conv_state: [S, D, W-1], oldest input first; weight: [D, W]; bias: [D].
        slots: [n] int64, the state of each row; None means arange(n).
    Returns:
        y [n, D] in x's dtype.
    Raises:
        ValueError: for a wrong shape, dtype, device, activation or (on the CPU) a slot out of range.
    """
    require_rank("x", x, "n D")
    _check_filter(x, weight, bias, activation)
    require_rank("conv_state", conv_state, "S D W-1")
    num_slots = conv_state.shape[0]
    require_tensor("conv_state", conv_state, "S D W-1", (num_slots, x.shape[1], weight.shape[1] - 1), x)
    require_slots(slots, x.shape[0], num_slots, x)
    implementation = implementation_for(x, __name__)
    return implementation.causal_conv1d_update(x, conv_state, weight, bias, activation=activation, slots=slots)


def _check_filter(x: Tensor, weight: Tensor, bias: Tensor | None, activation: str | None) -> None:
    require_rank("weight", weight, "D W")
    require_tensor("weight", weight, "D W", (x.shape[1], weight.shape[1]), x)
    require(weight.shape[1] > 0, "weight", "a filter of width W >= 1", list(weight.shape))
    if bias is not None:
        require_tensor("bias", bias, "D", (x.shape[1],), x)
    require(activation in (None, "silu"), "activation", "None or 'silu'", repr(activation))
