"""Products of few tokens in torch: the truth for the kernel, and the CPU path."""

import torch
import torch.nn.functional as F
from torch import Tensor


def decode_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """See m1.kernels.decode_linear.decode_linear."""
    return F.linear(x, weight, bias)


def decode_linear_parts(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """See m1.kernels.decode_linear.decode_linear_parts; one part."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    return F.linear(x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype))[None]


def decode_swiglu(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """See m1.kernels.decode_linear.decode_swiglu."""
    gate, up = F.linear(x.float(), weight.float(), None if bias is None else bias.float()).chunk(2, dim=-1)
    return (F.silu(gate) * up).to(x.dtype)
