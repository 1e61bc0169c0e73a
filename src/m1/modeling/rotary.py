"""Rotary position embedding: the cos and sin tables that attention (and, by option, mixers) rotate with.

Frequencies come from transformers' own functions, so that Llama-3 and YaRN scaling are theirs. Nothing here is a buffer:
a non-persistent buffer would be garbage after `from_pretrained`.
"""

import torch
from torch import Tensor
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from m1.modeling.configuration import M1Config


class RotaryEmbedding:
    """`rotary(positions [T]) -> (cos, sin)`, each [T, head_dim] fp32, in transformers' half-rotation layout."""

    def __init__(self, config: M1Config) -> None:
        rope = config.rope_parameters or {"rope_type": "default", "rope_theta": 10000.0}
        with torch.device("cpu"):  # a model may be under construction on the meta device
            if rope.get("rope_type", "default") == "default":
                exponents = torch.arange(0, config.head_dim, 2, dtype=torch.float32) / config.head_dim
                self.inv_freq, self.scaling = 1.0 / rope["rope_theta"] ** exponents, 1.0
            else:
                self.inv_freq, self.scaling = ROPE_INIT_FUNCTIONS[rope["rope_type"]](config, torch.device("cpu"))

    def frequencies_on(self, device: torch.device) -> Tensor:
        """The inverse frequencies [head_dim / 2] fp32 on `device`, where they stay."""
        if self.inv_freq.device != device:
            self.inv_freq = self.inv_freq.to(device)
        return self.inv_freq

    def __call__(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        angles = positions.float()[:, None] * self.frequencies_on(positions.device)[None, :]
        angles = torch.cat([angles, angles], dim=-1)
        return angles.cos() * self.scaling, angles.sin() * self.scaling
