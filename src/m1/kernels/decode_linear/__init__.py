"""Products of few tokens with a weight, where reading the weight is all that counts: checks and dispatch.

A decoding step of a small batch is a chain of these. For many tokens cuBLAS is faster; who chooses is the caller.
"""

from torch import Tensor

from m1.kernels.dispatch import implementation_for, require, require_rank, require_tensor

MAX_TOKENS = 128


def decode_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x · weightᵀ + bias, without gradient.

    Args:
        x: [T, K], T at most MAX_TOKENS; weight: [N, K]; bias: [N].
    Returns:
        [T, N] in x's dtype, summed in fp32.
    Raises:
        ValueError: for a wrong shape, dtype or device, or too many tokens.
    """
    _check(x, weight, bias)
    return implementation_for(x, __name__).decode_linear(x, weight, bias)


def decode_linear_parts(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """As decode_linear, but in parts that whoever reads them must add up, such as rms_norm_of_parts: a product whose k is
    divided among several programs ends earlier so.

    Returns:
        [S, T, N] in fp32, of which the sum over S is the product; S from the shapes alone.
    Raises:
        ValueError: as decode_linear.
    """
    _check(x, weight, bias)
    return implementation_for(x, __name__).decode_linear_parts(x, weight, bias)


def decode_swiglu(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """silu(gate) · up, where gate and up are the halves of x · weightᵀ + bias, in one pass; without gradient.

    Args:
        x: [T, K], T at most MAX_TOKENS; weight: [2·I, K], the rows of gate and then those of up; bias: [2·I].
    Returns:
        [T, I] in x's dtype; gate and up are not rounded in between.
    Raises:
        ValueError: for a wrong shape, dtype or device, or too many tokens.
    """
    _check(x, weight, bias)
    require(weight.shape[0] % 2 == 0, "weight", "of an even number of rows, gate's and up's", list(weight.shape))
    return implementation_for(x, __name__).decode_swiglu(x, weight, bias)


def _check(x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    require_rank("x", x, "T K")
    require(0 < x.shape[0] <= MAX_TOKENS, "x", f"of 1 to {MAX_TOKENS} tokens", list(x.shape))
    require_rank("weight", weight, "N K")
    require_tensor("weight", weight, "N K", (weight.shape[0], x.shape[1]), x, (x.dtype,))
    if bias is not None:
        require_tensor("bias", bias, "N", weight.shape[:1], x, (x.dtype,))


__all__ = ["MAX_TOKENS", "decode_linear", "decode_linear_parts", "decode_swiglu"]
