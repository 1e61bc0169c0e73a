"""SwiGLU in torch: the truth for the kernel, and the CPU path."""

import torch.nn.functional as F
from torch import Tensor


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """See m1.kernels.activation.swiglu."""
    return (F.silu(gate.float()) * up.float()).to(gate.dtype)
