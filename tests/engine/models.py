"""Tiny models with random weights, and a tokenizer of single bytes, for the engine's tests."""

import torch
from tokenizers import Tokenizer, decoders, pre_tokenizers, processors
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerFast

from m1.engine import Engine
from m1.modeling import M1Config, M1ForCausalLM

LINEAR, FULL, SLIDING = "linear_attention", "full_attention", "sliding_attention"
VARIANTS = {
    "mamba1": {"mixer": "mamba1", "layer_types": [LINEAR, FULL, LINEAR]},
    "mamba2": {"mixer": "mamba2", "layer_types": [FULL, LINEAR, LINEAR]},
    "mamba1-only": {"mixer": "mamba1", "layer_types": [LINEAR] * 3},
    "mamba2-rope-sliding": {
        "mixer": "mamba2",
        "mixer_rope": True,
        "layer_types": [LINEAR, SLIDING, FULL],
        "sliding_window": 6,
    },
    "dense": {"layer_types": [FULL] * 3},
}
EOS = 256
SPECIAL_TOKENS = ["<eos>", "<pad>", "<bos>"]
VOCABULARY = 256 + len(SPECIAL_TOKENS)


def tiny_model(variant: str = "mamba1", **options: object) -> M1ForCausalLM:
    """Weights so large that a wrong state, page or position changes the most likely token."""
    torch.manual_seed(0)
    fields = {
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "initializer_range": 0.3,
        "max_position_embeddings": 128,
        "eos_token_id": EOS,
        "pad_token_id": EOS + 1,
    }
    return M1ForCausalLM(M1Config(**{**fields, **VARIANTS[variant], **options})).eval()


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """One token a byte, id = the byte's place in the byte-level alphabet; then the special tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(BPE(vocab={symbol: index for index, symbol in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(SPECIAL_TOKENS)
    tokenizer.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", EOS + 2)])
    eos, pad, bos = SPECIAL_TOKENS
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=eos, pad_token=pad, bos_token=bos)
    assert fast.eos_token_id == EOS
    return fast


def tiny_engine(model: M1ForCausalLM, **options: object) -> Engine:
    """Small pages and budgets, so that short tests meet every page boundary and chunk."""
    sizes = {"page_size": 4, "max_num_seqs": 8, "max_num_batched_tokens": 24}
    return Engine(model, options.pop("tokenizer", None), **{**sizes, **options})


def random_prompts(lengths: tuple[int, ...], seed: int = 1) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(0, 256, (length,), generator=generator).tolist() for length in lengths]


def assert_all_free(engine: Engine) -> None:
    """No sequence holds anything; what is left belongs to cached prefixes."""
    assert engine.scheduler.is_idle
    engine.cache.forget_prefixes()
    assert engine.cache.pages.num_free == engine.cache.pages.num_pages
    assert engine.cache.slots.num_free == engine.cache.slots.num_slots
