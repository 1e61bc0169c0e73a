"""Tiny random models, tokenizers and documents for the tests of this room."""

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from m1.modeling import M1Config, M1ForCausalLM
from m1.training.packing import Document

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def model(
    mixer: str = "mamba1", *, attention: tuple[int, ...] = (1,), layers: int = 2, seed: int = 0, **fields
) -> M1ForCausalLM:
    """fp32, random; layers not in `attention` are mixers. Matrices are enlarged so that outputs depend on the input."""
    torch.manual_seed(seed)
    config = M1Config(
        **{
            "vocab_size": 67,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": layers,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "layer_types": ["full_attention" if i in attention else "linear_attention" for i in range(layers)],
            "mixer": mixer,
            "tie_word_embeddings": True,
            "eos_token_id": 0,
        }
        | fields
    )
    built = M1ForCausalLM(config)
    with torch.no_grad():
        for name, parameter in built.named_parameters():
            if parameter.ndim == 2 and "A_log" not in name:
                parameter.mul_(4)
    return built.eval()


def teacher_of(student: M1ForCausalLM, seed: int = 1) -> M1ForCausalLM:
    """A dense model with the student's shape; everything that both have is copied to the student."""
    fields = student.config.to_dict() | {"layer_types": ["full_attention"] * student.config.num_hidden_layers}
    teacher = model(
        attention=tuple(range(student.config.num_hidden_layers)), layers=student.config.num_hidden_layers, seed=seed
    )
    assert teacher.config.hidden_size == fields["hidden_size"]
    student.load_state_dict(teacher.state_dict(), strict=False)
    return teacher


def documents(count: int = 12, *, vocab: int = 67, low: int = 3, high: int = 16, seed: int = 0) -> list[Document]:
    """Random tokens; the loss is on the second half."""
    generator = np.random.default_rng(seed)
    made = []
    for length in generator.integers(low, high, count):
        ids = generator.integers(1, vocab, length).astype(np.int32)
        made.append(Document(ids, np.arange(length) >= length // 2))
    return made


def byte_tokenizer(chat_template: str | None = CHATML) -> PreTrainedTokenizerFast:
    """One token a byte; ChatML's special tokens; <|im_end|> ends."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    specials = ["<|im_end|>", "<|im_start|>", "<s>"]
    vocab = {token: index for index, token in enumerate([*specials, *alphabet])}
    backend = Tokenizer(models.BPE(vocab, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        eos_token="<|im_end|>",
        pad_token="<|im_end|>",
        additional_special_tokens=["<|im_start|>"],
        chat_template=chat_template,
    )
    return tokenizer


def word_tokenizer(words: str) -> PreTrainedTokenizerFast:
    """One token a word, and <end> as 0; no chat template."""
    vocab = {word: index for index, word in enumerate(["<end>", *words.split()])}
    backend = Tokenizer(models.WordLevel(vocab, unk_token="<end>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<end>", pad_token="<end>")
