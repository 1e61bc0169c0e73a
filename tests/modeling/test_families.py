"""A base model loaded as M1 with no layer converted gives the logits of transformers' own model; others are refused by name."""

from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, LlamaForCausalLM, PreTrainedConfig, PreTrainedModel

from m1.conversion import gguf
from m1.modeling import M1Config, M1ForCausalLM
from m1.modeling.loading import load_model
from tests.numerics import DENSE_EQUALS_ORIGINAL

LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,  # short, so that all three bands of frequencies occur
}
FAMILIES = {
    "llama": ("llama", {}),
    "llama-tied": ("llama", {"tie_word_embeddings": True}),
    "llama3-rope": ("llama", {"rope_parameters": LLAMA3}),
    "llama-bias": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "llama-head-dim": ("llama", {"head_dim": 32}),
    "llama-linear-rope": ("llama", {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 500.0}}),
    "mistral-window": ("mistral", {"sliding_window": 5}),
    "mistral-no-window": ("mistral", {"sliding_window": None}),
    "qwen2": ("qwen2", {}),
    "qwen2-tied": ("qwen2", {"tie_word_embeddings": True}),
    "qwen2-window": ("qwen2", {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1}),
    "qwen3": ("qwen3", {"head_dim": 24}),
    "qwen3-tied-bias": ("qwen3", {"head_dim": 24, "tie_word_embeddings": True, "attention_bias": True}),
}
SHAPE = {
    "vocab_size": 89,
    "hidden_size": 64,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
}


def tiny_base(family: str, options: dict) -> PreTrainedModel:
    """A random model in which every parameter matters: biases and norm weights too, which start at 0 and 1."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **{**SHAPE, **options}))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(1.0 if parameter.ndim == 1 else 0.0, 0.3 if parameter.ndim == 1 else 0.15)
    return model.eval()


@pytest.mark.parametrize(("family", "options"), FAMILIES.values(), ids=FAMILIES)
def test_dense_model_equals_original(family: str, options: dict, tmp_path: Path) -> None:
    original = tiny_base(family, options)
    original.save_pretrained(tmp_path)
    loaded = load_model(tmp_path)
    ids = torch.randint(0, SHAPE["vocab_size"], (2, 40), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected, given = original(ids, use_cache=False).logits, loaded(ids, use_cache=False).logits
    assert expected.std() > 0.1
    assert (given - expected).abs().max() < DENSE_EQUALS_ORIGINAL
    is_tied = bool(options.get("tie_word_embeddings"))
    assert (loaded.lm_head.weight is loaded.model.embed_tokens.weight) == is_tied


def test_smollm2_equals_original() -> None:
    try:
        file = gguf.open_gguf(gguf.find_smollm2())
    except FileNotFoundError as error:
        pytest.skip(str(error))
    config = gguf.read_config(file)
    weights = dict(gguf.iterate_weights(file, config, torch.float32))
    original = LlamaForCausalLM.from_pretrained(None, config=config, state_dict=dict(weights), dtype=torch.float32)
    with torch.device("meta"):
        loaded = M1ForCausalLM(M1Config.from_base(config))
    missing, unexpected = loaded.load_state_dict(weights, strict=False, assign=True)
    assert (missing, unexpected) == (["lm_head.weight"], [])  # tied
    loaded.tie_weights()
    ids = torch.randint(20, config.vocab_size, (1, 48), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected, given = original.eval()(ids, use_cache=False).logits, loaded.eval()(ids, use_cache=False).logits
    assert expected.std() > 1
    assert (given - expected).abs().max() < DENSE_EQUALS_ORIGINAL


@pytest.mark.parametrize(
    ("family", "options", "named"),
    [
        ("gpt2", {}, "gpt2"),
        ("gemma2", {}, "gemma2"),
        ("llama", {"hidden_act": "gelu"}, "gelu"),
        ("llama", {"attention_dropout": 0.1}, "attention_dropout"),
        ("llama", {"pretraining_tp": 2}, "pretraining_tp"),
        (
            "llama",
            {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}},
            "dynamic",
        ),
        (
            "llama",
            {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}},
            "partial_rotary_factor",
        ),
    ],
)
def test_unsupported_base_is_refused_by_name(family: str, options: dict, named: str) -> None:
    config: PreTrainedConfig = AutoConfig.for_model(family, **options)
    with pytest.raises(ValueError, match=named):
        M1Config.from_base(config)
