"""Models of known dimensions with random weights, and how fast a decode step of theirs can be: its bytes and operations."""

from dataclasses import dataclass

import torch

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


def random_model(name: str, mixer: str = "mamba1", device: str = "cuda") -> M1ForCausalLM:
    """bf16 weights as the engine lays out its own; the mixers' dynamics in fp32."""
    torch.manual_seed(0)
    with torch.device(device):
        model = M1ForCausalLM(config_of(name, mixer)).eval()
    return sampling_copy(model, torch.bfloat16)


@dataclass(frozen=True)
class StepCost:
    """What a decode step of n sequences with `context` tokens each must move and compute.

    weight_bytes: every matrix once; state_bytes: read and written; cache_bytes: keys and values read; flops: of the products.
    """

    weight_bytes: float
    state_bytes: float
    cache_bytes: float
    flops: float

    @property
    def seconds(self) -> float:
        """Products run at the slower of their two limits; the other kernels are bound by bytes and run one after the other."""
        return max(self.weight_bytes / BANDWIDTH, self.flops / FLOPS) + (self.state_bytes + self.cache_bytes) / BANDWIDTH


def step_cost(model: M1ForCausalLM, num_sequences: int, context: float, state_dtype: torch.dtype = torch.float32) -> StepCost:
    config = model.config
    matrices = [
        p for name, p in model.named_parameters() if p.dim() == 2 and "embed_tokens" not in name and "A_log" not in name
    ]
    if config.tie_word_embeddings:
        matrices.append(model.model.embed_tokens.weight)  # as the head
    num_weights = sum(p.numel() for p in matrices)
    cache = ModelState.bytes_per_page(config, 1, torch.bfloat16)
    return StepCost(
        weight_bytes=sum(p.numel() * p.element_size() for p in matrices),
        state_bytes=2.0 * num_sequences * ModelState.bytes_per_slot(config, torch.bfloat16, state_dtype),
        cache_bytes=num_sequences * context * cache,
        flops=2.0 * num_sequences * num_weights,
    )
