"""Layers of one input as one product, in models that the engine has for itself.

For few tokens a product costs what reading its weight costs, and a launch's beginning and end, in which memory idles: one wide
product is faster than several narrow ones. Weights keep their names towards `copy_weights`, by part.
"""

from typing import cast

import torch
from torch import Tensor, nn

from m1.kernels import swiglu
from m1.modeling.attention import Attention
from m1.modeling.hybrid import MLP, HybridBlock, M1ForCausalLM


class MergedLinear(nn.Module):
    """x [T, in] -> the outputs of several linear layers, [T, out] each, side by side in one tensor.

    names: of the layers, as their parent had them. `linear` computes; whatever replaces it has `load`.
    """

    def __init__(self, names: tuple[str, ...], linears: list[nn.Linear]) -> None:
        super().__init__()
        self.names, self.sizes = names, [linear.out_features for linear in linears]
        self.in_features = linears[0].in_features
        with torch.device("meta"):
            self.linear = nn.Linear(self.in_features, sum(self.sizes), bias=False)
        weight = torch.cat([linear.weight.detach() for linear in linears])
        self.linear.weight = nn.Parameter(weight, requires_grad=False)
        if linears[0].bias is not None:
            self.linear.bias = nn.Parameter(torch.cat([linear.bias.detach() for linear in linears]), requires_grad=False)
        self._given: dict[int, Tensor] = {}  # parts that wait for the others

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return self.linear(x).split(self.sizes, dim=-1)

    @torch.no_grad()
    def load(self, part: int, weight: Tensor) -> None:
        """Take over the weight [out, in] of one of the layers."""
        if isinstance(self.linear, nn.Linear):
            self.linear.weight.split(self.sizes)[part].copy_(weight)
            return
        self._given[part] = weight  # other layouts are made of whole weights
        if len(self._given) == len(self.sizes):
            self.linear.load(torch.cat([self._given[index] for index in range(len(self.sizes))]))
            self._given.clear()

    @torch.no_grad()
    def load_bias(self, part: int, bias: Tensor) -> None:
        self.linear.bias.split(self.sizes)[part].copy_(bias)


class MergedMLP(nn.Module):
    """`MLP` with one product for gate and up."""

    def __init__(self, mlp: MLP) -> None:
        super().__init__()
        self.gate_up_proj = MergedLinear(("gate_proj", "up_proj"), [mlp.gate_proj, mlp.up_proj])
        self.down_proj = mlp.down_proj

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(swiglu(*self.gate_up_proj(x)))


class MergedAttention(Attention):
    """`Attention` with one product for q, k and v. Takes over all that `attention` has."""

    def __init__(self, attention: Attention) -> None:
        nn.Module.__init__(self)
        names = ("q_proj", "k_proj", "v_proj")
        self.qkv_proj = MergedLinear(names, [getattr(attention, name) for name in names])
        for name, value in (*vars(attention).items(), *attention.named_children()):
            if not name.startswith("_") and name not in (*names, "training"):
                setattr(self, name, value)

    def project(self, x: Tensor) -> tuple[Tensor, ...]:
        return self.qkv_proj(x)


def merge_projections(model: M1ForCausalLM) -> None:
    """Merge what can be merged, layer by layer, so that few weights are held twice at a time."""
    for block in cast("list[HybridBlock]", model.model.layers):
        setattr(block, "mlp", MergedMLP(block.mlp))  # noqa: B010  (of another class, on purpose)
        if not block.is_mixer:
            block.self_attn = MergedAttention(block.self_attn)
    model.train(model.training)  # also what is new
