"""Linear layers of small decoding batches on a GPU: a kernel that streams the weight where cuBLAS leaves bandwidth unused.

Only in models that the engine has for itself; prefill and large batches go to cuBLAS as before. The kernel is in
m1.kernels.decode_linear; weights stay where they are, under their names.
"""

from typing import Any, cast

import torch
from torch import Tensor, nn

from m1.engine.merging import MergedMLP
from m1.engine.parts import Parts
from m1.kernels import swiglu
from m1.kernels.decode_linear import decode_linear, decode_linear_parts, decode_swiglu
from m1.modeling.hybrid import HybridBlock, M1ForCausalLM
from m1.modeling.mamba1 import StepSizeProjection

# Where the kernel is the faster one, as measured on an H100, parts on an H200, with M1-3B's layers:
MOST_TOKENS = 64  # for any layer of at least LEAST_WEIGHTS,
MOST_TOKENS_IF_WIDE = 128  # for those of at least WIDE outputs, gate and up with their SwiGLU, and those that leave parts
WIDE = 8192
LEAST_WEIGHTS = 2**22
ALIGNMENT = 64  # of a layer's inputs


class StreamedLinear(nn.Linear):
    """`nn.Linear` without gradient, with its weight and bias. `adds_bias`: whether the output has it.

    leaves_parts: give `Parts` where the kernel serves.
    """

    def __init__(self, linear: nn.Linear) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight, self.bias = linear.weight, linear.bias
        self.adds_bias = not isinstance(linear, StepSizeProjection)
        self.leaves_parts = False

    @property
    def most_tokens(self) -> int:
        """For which the kernel serves. Of step sizes, both are as fast, and the chain stays whole."""
        is_wide = self.out_features >= WIDE or not self.adds_bias
        return MOST_TOKENS_IF_WIDE if is_wide or self.leaves_parts else MOST_TOKENS

    def forward(self, x: Tensor) -> Any:
        bias = self.bias if self.adds_bias else None
        if x.shape[0] > self.most_tokens:
            return nn.functional.linear(x, self.weight, bias)
        if self.leaves_parts:
            return Parts(decode_linear_parts(x, self.weight, bias))
        return decode_linear(x, self.weight, bias)


class StreamedMLP(nn.Module):
    """`MergedMLP` that applies SwiGLU inside the product. Gives what down_proj gives."""

    def __init__(self, mlp: MergedMLP) -> None:
        super().__init__()
        self.gate_up_proj, self.down_proj = mlp.gate_up_proj, mlp.down_proj

    def forward(self, x: Tensor) -> Any:
        if x.shape[0] > MOST_TOKENS_IF_WIDE:
            return self.down_proj(swiglu(*self.gate_up_proj(x)))
        linear = self.gate_up_proj.linear
        return self.down_proj(decode_swiglu(x, linear.weight, linear.bias))


def can_stream(weight: Tensor) -> bool:
    """Whether the kernel was made for weights of this kind and for this GPU."""
    return weight.is_cuda and weight.dtype == torch.bfloat16 and torch.cuda.get_device_capability(weight.device) >= (9, 0)


def stream_linears(model: M1ForCausalLM) -> None:
    """Replace the linear layers of a model whose projections are merged, in place; 8-bit ones have such a kernel already."""
    _replace_linears(model)
    for block in cast("list[HybridBlock]", model.model.layers):
        if isinstance(block.mlp, MergedMLP) and isinstance(block.mlp.gate_up_proj.linear, StreamedLinear):
            setattr(block, "mlp", StreamedMLP(block.mlp))  # noqa: B010  (of another class, on purpose)
    model.train(model.training)


def _replace_linears(module: nn.Module) -> None:
    for name, child in list(module.named_children()):
        if isinstance(child, nn.Linear):
            # A mixer's step sizes are few, but a kernel of ours keeps the chain of launches whole.
            is_worth_it = child.weight.numel() >= LEAST_WEIGHTS or isinstance(child, StepSizeProjection)
            if is_worth_it and child.in_features % ALIGNMENT == 0:
                setattr(module, name, StreamedLinear(child))
        else:
            _replace_linears(child)
