"""Models of known dimensions with random weights, and how fast a decode step of theirs can be: its bytes and operations."""

from dataclasses import dataclass

import torch
from torch import nn

from m1.engine.fp8 import Fp8Linear
from m1.engine.weights import sampling_copy
from m1.modeling import M1Config, M1ForCausalLM
from m1.modeling.state import ModelState

BANDWIDTH = 3.0e12  # bytes a second, as measured on an H100
FLOPS = 790e12  # bf16 operations a second of a large product, as measured there

LLAMA_3B = {
    "vocab_size": 128256,
    "hidden_size": 3072,
    "intermediate_size": 8192,
    "num_hidden_layers": 28,
    "num_attention_heads": 24,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "tie_word_embeddings": True,
    "max_position_embeddings": 131072,
}
QWEN_HALF_B = {
    "vocab_size": 151936,
    "hidden_size": 896,
    "intermediate_size": 4864,
    "num_hidden_layers": 24,
    "num_attention_heads": 14,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "attention_bias": True,
    "tie_word_embeddings": True,
    "max_position_embeddings": 32768,
}
# name: (dimensions, attention layers; the others are Mamba-1)
MODELS: dict[str, tuple[dict, list[int]]] = {
    "m1-3b": (LLAMA_3B, [3, 8, 13, 18, 23, 27]),
    "llama-3b": (LLAMA_3B, list(range(28))),
    "m1-0.5b": (QWEN_HALF_B, [3, 7, 11, 15, 19, 23]),
    "qwen-0.5b": (QWEN_HALF_B, list(range(24))),
}


def config_of(name: str, mixer: str = "mamba1") -> M1Config:
    fields, attention = MODELS[name]
    kinds = ["full_attention" if i in attention else "linear_attention" for i in range(fields["num_hidden_layers"])]
    return M1Config(**fields, layer_types=kinds, mixer=mixer)


def random_model(name: str, mixer: str = "mamba1", is_fp8: bool = False, device: str = "cuda") -> M1ForCausalLM:
    """bf16 weights (or fp8 ones) as the engine lays out its own; the mixers' dynamics in fp32."""
    torch.manual_seed(0)
    with torch.device(device):
        model = M1ForCausalLM(config_of(name, mixer)).eval()
    return sampling_copy(model, torch.bfloat16, is_fp8)


@dataclass(frozen=True)
class StepCost:
    """What a decode step of n sequences with `context` tokens each must move and compute.

    weight_bytes: every matrix once; state_bytes: read and written; cache_bytes: keys and values read; flops: of the products,
    8-bit ones counted half.
    """

    weight_bytes: float
    state_bytes: float
    cache_bytes: float
    flops: float

    @property
    def seconds(self) -> float:
        """Products run at the slower of their two limits; the other kernels are bound by bytes and run one after the other."""
        return max(self.weight_bytes / BANDWIDTH, self.flops / FLOPS) + (self.state_bytes + self.cache_bytes) / BANDWIDTH


def step_cost(
    model: M1ForCausalLM, num_sequences: int, context: float, is_fp8: bool = False, state_dtype: torch.dtype = torch.float32
) -> StepCost:
    """is_fp8: keys and values of 8 bits, and products that run twice as fast."""
    num_weights, weight_bytes = 0, 0
    for module in model.modules():
        weight = module.values if isinstance(module, Fp8Linear) else getattr(module, "weight", None)
        if isinstance(module, (nn.Linear, Fp8Linear)):
            num_weights += weight.numel()
            weight_bytes += weight.numel() * weight.element_size()
    key_dtype = torch.float8_e4m3fn if is_fp8 else torch.bfloat16
    return StepCost(
        weight_bytes=weight_bytes,
        state_bytes=2.0 * num_sequences * ModelState.bytes_per_slot(model.config, torch.bfloat16, state_dtype),
        cache_bytes=num_sequences * context * ModelState.bytes_per_page(model.config, 1, key_dtype),
        flops=2.0 * num_sequences * num_weights / (2 if is_fp8 else 1),
    )
