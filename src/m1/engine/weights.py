"""The sampler's weights: the trainer's own tensors, a copy in another dtype that follows them, or a checkpoint's."""

import copy
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from m1.engine.few_tokens import can_stream, stream_linears
from m1.engine.fp8 import Fp8Linear, quantize_model
from m1.engine.merging import MergedLinear, merge_projections
from m1.engine.packing import PackedLinear, can_pack, pack_linears
from m1.engine.parts import leave_parts
from m1.modeling.configuration import M1Config
from m1.modeling.hybrid import M1ForCausalLM, count_parameters
from m1.modeling.loading import load_config, load_model, load_tokenizer
from m1.storage import GIB, require_memory

# Few numbers with exponentials behind them: rounding them would change the dynamics, and the kernels take them in fp32.
FLOAT32_PARAMETERS = ("A_log", "dt_bias", "dt_proj.bias", "mixer.D")
TIED = ("model.embed_tokens.weight", "lm_head.weight")


def prepare_model(
    model: M1ForCausalLM | str | Path,
    tokenizer: PreTrainedTokenizerBase | None,
    dtype: torch.dtype | None,
    device: torch.device | str | None,
    is_quantized: bool,
) -> tuple[M1ForCausalLM, PreTrainedTokenizerBase | None, M1ForCausalLM | None]:
    """The model to sample from, its tokenizer, and the model that it is a copy of, if it is one.

    model: one whose weights are shared where dtype allows and nothing is quantized, or a checkpoint, which lends its tokenizer
    if none is given. Raises ValueError for a device that is not the given model's.
    """
    if isinstance(model, (str, Path)):
        return load_for_sampling(model, dtype, device or "cpu", is_quantized), tokenizer or load_tokenizer(model), None
    if device is not None and torch.device(device).type != model.device.type:
        raise ValueError(f"device: the model is on {model.device}, given {device}; move the model first")
    own_dtype = model.model.embed_tokens.weight.dtype
    if dtype in (None, own_dtype) and not is_quantized:
        return model, tokenizer, None
    return sampling_copy(model, dtype or own_dtype, is_quantized), tokenizer, model


def sampling_copy(model: M1ForCausalLM, dtype: torch.dtype, is_quantized: bool = False) -> M1ForCausalLM:
    """A model in eval mode with weights of its own in `dtype` (the mixers' dynamics stay fp32), laid out for sampling."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    copies = {
        id(parameter): nn.Parameter(
            parameter.detach().to(_copy_dtype(names[id(parameter)], dtype), copy=True), requires_grad=False
        )
        for parameter in model.parameters()
    }
    sampler = copy.deepcopy(model, copies).eval()
    copies.clear()  # or no weight could be freed once it is laid out anew
    return for_sampling(sampler, is_quantized)


def for_sampling(model: M1ForCausalLM, is_quantized: bool = False) -> M1ForCausalLM:
    """Lay out a model that nobody else uses for sampling and for the device it is on, with 8-bit products if so asked."""
    merge_projections(model)
    if is_quantized:
        quantize_model(model)
    elif can_pack(model.model.embed_tokens.weight):
        pack_linears(model)
    if can_stream(model.model.embed_tokens.weight):
        stream_linears(model)
        leave_parts(model)
    return model


def load_for_sampling(
    source: str | Path, dtype: torch.dtype | None, device: torch.device | str, is_quantized: bool = False
) -> M1ForCausalLM:
    """A checkpoint's model in its own dtype, or in another one with the mixers' dynamics as exact as they are stored.

    Raises MemoryError, before anything is loaded, where there is no room for its weights.
    """
    config = load_config(source)
    stored = config.dtype if isinstance(config.dtype, torch.dtype) else torch.float32
    _require_room(source, config, stored, dtype or stored, torch.device(device))
    model = load_model(source, dtype=stored, device=device)
    if dtype in (None, model.model.embed_tokens.weight.dtype):
        return for_sampling(model, is_quantized)
    return sampling_copy(model, dtype, is_quantized)


def _require_room(source: str | Path, config: M1Config, stored: torch.dtype, dtype: torch.dtype, device: torch.device) -> None:
    """Weights are loaded into main memory as they are stored; where they end, a copy in another dtype stands beside them."""
    num_parameters = count_parameters(config)
    size = num_parameters * stored.itemsize
    with_copy = size if dtype == stored else size + num_parameters * dtype.itemsize
    require_memory(size if device.type == "cuda" else with_copy, f"loading {source}")
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        if free < with_copy:
            raise MemoryError(
                f"{source}: its weights need {with_copy / GIB:.1f} GiB on the GPU, {free / GIB:.1f} GiB are free; "
                "end what else uses it, or take a smaller model"
            )


def _copy_dtype(name: str, dtype: torch.dtype) -> torch.dtype:
    return torch.float32 if name.endswith(FLOAT32_PARAMETERS) else dtype


@torch.no_grad()
def copy_weights(source: Iterable[tuple[str, Tensor]], target: M1ForCausalLM) -> None:
    """Overwrite every weight of `target` with the one of its name in `source`.

    Raises ValueError for an unknown name, another shape, or a weight that `source` leaves out; a tied one may come under
    either of its names.
    """
    places = _places(target)
    twins = dict(zip(TIED, reversed(TIED), strict=True)) if target.config.tie_word_embeddings else {}
    missing = set(places)
    for name, tensor in source:
        if name not in places:
            raise ValueError(f"update_weights: the model has no parameter {name!r}; is it another model's?")
        shape, _ = places[name]
        if tensor.shape != shape:
            raise ValueError(f"update_weights: {name!r} expected shape {list(shape)}, given {list(tensor.shape)}")
        for place in {name, twins.get(name, name)}:
            places[place][1](tensor)
            missing.discard(place)
    if missing:
        raise ValueError(f"update_weights: {len(missing)} parameters were not given, such as {min(missing)!r}")


def _places(target: M1ForCausalLM) -> dict[str, tuple[torch.Size, Callable[[Tensor], object]]]:
    """Of every weight, by its name in a plain model: its shape, and what takes over a new value."""
    places: dict[str, tuple[torch.Size, Callable[[Tensor], object]]] = {}
    for name, parameter in target.named_parameters(remove_duplicate=False):
        places[name] = (parameter.shape, parameter.copy_)
    modules = dict(target.named_modules())
    for name, module in modules.items():
        if isinstance(module, (PackedLinear, Fp8Linear)):
            places[f"{name}.weight"] = (module.shape, module.load)
    for name, module in modules.items():
        if isinstance(module, MergedLinear):
            parent = name.rpartition(".")[0]
            del places[f"{name}.linear.weight"]
            has_bias = places.pop(f"{name}.linear.bias", None) is not None
            for part, (own, size) in enumerate(zip(module.names, module.sizes, strict=True)):
                places[f"{parent}.{own}.weight"] = (torch.Size((size, module.in_features)), partial(module.load, part))
                if has_bias:
                    places[f"{parent}.{own}.bias"] = (torch.Size((size,)), partial(module.load_bias, part))
    return places
