"""The gated activation of the MLP: checks and dispatch."""

from torch import Tensor

from m1.kernels.dispatch import implementation_for, is_like, require, require_tensor


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) · up (Shazeer 2020, arXiv 2002.05202), computed in fp32; differentiable.

    Args:
        gate, up: any one shape.
    Returns:
        Like gate, in gate's dtype.
    Raises:
        ValueError: for shapes or devices that differ, or a dtype that is not floating.
    """
    require(gate.is_floating_point(), "gate", "a floating tensor", gate.dtype)
    if not is_like(up, gate.shape, gate):
        require_tensor("up", up, " ".join(["size"] * gate.dim()), gate.shape, gate)
    implementation = implementation_for(gate, __name__)
    return implementation.swiglu(gate, up)
