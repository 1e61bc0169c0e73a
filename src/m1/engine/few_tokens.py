"""Linear layers of small decoding batches on a GPU: a kernel that streams the weight where cuBLAS leaves bandwidth unused.

Only in models that the engine has for itself; prefill and large batches go to cuBLAS as before. The kernels are in
m1.kernels.decode_linear.
"""

import torch
from torch import Tensor, nn

from m1.engine.merging import MergedLinear, MergedMLP
from m1.kernels import swiglu
from m1.kernels.decode_linear import decode_linear, decode_swiglu
from m1.modeling.hybrid import M1ForCausalLM

MOST_TOKENS = 0  # at which the kernel is the faster one
LEAST_WEIGHTS = 2**21  # of a layer: below, both take as long as a launch
NOT_MODULES = ("dt_proj",)  # mixers take the weights of these instead of calling them


class StreamedLinear(nn.Linear):
    """`nn.Linear` without gradient, with its weight and bias."""

    def __init__(self, linear: nn.Linear) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight, self.bias = linear.weight, linear.bias

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[0] > MOST_TOKENS:
            return nn.functional.linear(x, self.weight, self.bias)
        return decode_linear(x, self.weight, self.bias)


class StreamedMLP(nn.Module):
    """`MergedMLP` that applies SwiGLU inside the product."""

    def __init__(self, mlp: MergedMLP) -> None:
        super().__init__()
        self.gate_up_proj, self.down_proj = mlp.gate_up_proj, mlp.down_proj

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[0] > MOST_TOKENS:
            return self.down_proj(swiglu(*self.gate_up_proj(x)))
        linear = self.gate_up_proj.linear
        assert isinstance(linear, nn.Linear)
        return self.down_proj(decode_swiglu(x, linear.weight, linear.bias))


def can_stream(weight: Tensor) -> bool:
    """Whether the kernel was made for weights of this kind."""
    return weight.is_cuda and weight.dtype == torch.bfloat16 and torch.cuda.get_device_capability(weight.device) >= (9, 0)


def stream_linears(model: M1ForCausalLM) -> None:
    """Replace the linear layers of a model whose projections are merged, in place; weights stay where they are."""
    _replace_linears(model)
    for block in model.model.layers:
        assert isinstance(block.mlp, MergedMLP) and isinstance(block.mlp.gate_up_proj, MergedLinear)
        block.mlp = StreamedMLP(block.mlp)
    model.train(model.training)


def _replace_linears(module: nn.Module) -> None:
    for name, child in list(module.named_children()):
        if type(child) is nn.Linear and name not in NOT_MODULES and child.weight.numel() >= LEAST_WEIGHTS:
            setattr(module, name, StreamedLinear(child))
        else:
            _replace_linears(child)
