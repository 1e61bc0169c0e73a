"""Weights laid out for a CPU's matrix units: `nn.Linear` modules replaced by ones that keep only oneDNN's blocked layout.

A plain bf16 product reorders its weight into that layout at every call, which for a batch of decoding sequences takes about as
long as the product. The ops are those that torch's own compiler emits for linear layers on a CPU. fp32 products gain nothing.
"""

import torch
from torch import Tensor, nn

from m1.modeling.mamba1 import StepSizeProjection

ROWS = 64  # the batch that the layout is chosen for; others run on it as well


def can_pack(weight: Tensor) -> bool:
    """Whether this torch and this processor multiply packed weights of the kind of `weight`."""
    return (
        weight.device.type == "cpu"
        and weight.dtype == torch.bfloat16
        and torch.backends.mkldnn.is_available()
        and hasattr(torch.ops.mkldnn, "_linear_pointwise")
        and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    )


class PackedLinear(nn.Module):
    """x [T, in] -> [T, out], as `nn.Linear`, without gradient. `load` replaces the weight."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.shape = linear.weight.shape
        self.bias = linear.bias
        self.load(linear.weight)

    @torch.no_grad()
    def load(self, weight: Tensor) -> None:
        """Take over `weight` [out, in] of any floating dtype."""
        self.packed = torch.ops.mkldnn._reorder_linear_weight(weight.detach().to("cpu", torch.bfloat16).contiguous(), ROWS)

    def forward(self, x: Tensor) -> Tensor:
        return torch.ops.mkldnn._linear_pointwise(x, self.packed, self.bias, "none", [], "")


def pack_linears(module: nn.Module) -> None:
    """Replace every linear layer below `module`, one by one, so that no weight is held twice for long."""
    for name, child in list(module.named_children()):
        if isinstance(child, nn.Linear) and not isinstance(child, StepSizeProjection):
            setattr(module, name, PackedLinear(child))
        else:
            pack_linears(child)
