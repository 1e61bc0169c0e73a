"""Products whose parts the norm after them adds up, in models that the engine has for itself.

A narrow product of few tokens divides its k among two programs a tile. To add their sums up itself it would have to wait for
the later of them; but every branch of a block ends in a norm, which reads what it adds to the residual anyway.
"""

from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from m1.kernels import rms_norm, rms_norm_of_parts
from m1.modeling.attention import RMSNorm
from m1.modeling.hybrid import HybridBlock, M1ForCausalLM


class Parts(NamedTuple):
    """What a block's branch gives, [T, hidden], as parts [S, T, hidden] fp32 to be added up."""

    values: Tensor

    def to(self, dtype: torch.dtype) -> "Parts":
        """Itself: the norm rounds the sum to its residual's dtype."""
        return self


class NormOfParts(nn.Module):
    """`RMSNorm` that takes `Parts` as well."""

    def __init__(self, norm: RMSNorm) -> None:
        super().__init__()
        self.weight, self.eps = norm.weight, norm.eps

    def forward(self, x: Tensor | Parts, residual: Tensor | None = None) -> Any:
        """As RMSNorm.forward."""
        if isinstance(x, Parts):
            assert residual is not None, "parts are of a branch"
            return rms_norm_of_parts(x.values, self.weight, self.eps, residual)
        return rms_norm(x, self.weight, self.eps, residual)


def leave_parts(model: M1ForCausalLM) -> None:
    """Let the last layer of every branch leave parts, if it knows how, and let norms take them; in place.

    The layers are those with an attribute `leaves_parts`; 8-bit norms take parts already.
    """
    for block in cast("list[HybridBlock]", model.model.layers):
        mixer = cast(Any, block.token_mixer)
        for linear in (mixer.out_proj if block.is_mixer else mixer.o_proj, block.mlp.down_proj):
            if hasattr(linear, "leaves_parts"):
                setattr(linear, "leaves_parts", True)  # noqa: B010  (of a class that nn.Module's type does not name)
        for name in ("input_layernorm", "post_attention_layernorm"):
            _replace_norm(block, name)
    _replace_norm(model.model, "norm")
    model.train(model.training)


def _replace_norm(module: nn.Module, name: str) -> None:
    norm = getattr(module, name)
    if isinstance(norm, RMSNorm):
        setattr(module, name, NormOfParts(norm))
