"""`m1 convert`: from a Transformer to a hybrid, in memory (`convert`) or as a directory (`run`).

Where bases come from stands in bases.py, which tensor goes where in weights.py, the improved start in start.py.
"""

import copy
import dataclasses
import itertools
import json
import math
import tomllib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from m1 import storage
from m1.config import ConvertConfig, require
from m1.conversion import gguf
from m1.conversion.bases import assemble, import_base, load_base, open_source
from m1.conversion.calibration import Text, read_texts, tokenize_documents
from m1.conversion.start import LayerFit, Mixer, balance, fit_mixers, improved_options, open_mixer
from m1.conversion.weights import attention_to_mixer, hybrid_weights, layer_weights
from m1.modeling import M1Config, M1ForCausalLM
from m1.modeling.hybrid import MIXER_CLASSES, count_parameters
from m1.modeling.loading import choose_device, load_config

__all__ = ["choose_attention_layers", "convert", "hybrid_config", "import_base", "load_base", "run"]

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def choose_attention_layers(num_layers: int, fraction: float) -> list[int]:
    """The layers that stay attention: `fraction` of them (at least one unless 0), evenly spaced, the last one among them.

    Six of 28 gives M1's 3, 8, 13, 18, 23, 27 (arXiv 2504.10449). Raises ValueError unless 0 <= fraction <= 1.
    """
    if not 0 <= fraction <= 1:
        raise ValueError(f"attention_fraction: expected 0 to 1, got {fraction}")
    if fraction == 0:
        return []
    count = max(1, math.floor(num_layers * fraction + 0.5))
    first, last = num_layers // count - 1, num_layers - 1
    return [first + math.ceil(i * (last - first) / max(1, count - 1)) for i in range(count)]


def read_layers(given: Sequence[int] | str | None) -> list[int] | None:
    """A list of layers, from the list itself or from a JSON or TOML file with `attention_layers`, as `m1 select` writes it.

    Raises FileNotFoundError for a missing file, ValueError naming it if there is no such list in it.
    """
    if not isinstance(given, str):
        return list(given) if given is not None else None
    path = Path(given)
    if not path.is_file():
        raise FileNotFoundError(f"--attention-layers {given}: no such file; give numbers, or a file that `m1 select` wrote")
    text = path.read_text(encoding="utf-8")
    try:
        found = tomllib.loads(text) if path.suffix == ".toml" else json.loads(text)
    except ValueError as error:
        raise ValueError(f"{path}: not a list of layers: {error}") from error
    layers = found.get("attention_layers") if isinstance(found, dict) else found
    if not isinstance(layers, list) or not all(isinstance(layer, int) and not isinstance(layer, bool) for layer in layers):
        raise ValueError(f"{path}: expected attention_layers, a list of layer numbers, as `m1 select` writes it")
    return layers


def convert(
    base: M1ForCausalLM | str | Path,
    *,
    attention_layers: Sequence[int] | None = None,
    attention_fraction: float = 0.25,
    mixer: str = "mamba1",
    start: str = "m1",
    calibration: Sequence[Text] = (),
    tokenizer: PreTrainedTokenizerBase | None = None,
    calibration_tokens: int = 8192,
    seed: int = 0,
    on_layer: Callable[[LayerFit], None] = lambda fit: None,
) -> M1ForCausalLM:
    """A hybrid that starts from a Transformer: attention stays in some layers, the others become mixers with its weights.

    Args:
        base: a dense M1 model (left as it is, nothing shared with it), or what `load_base` takes.
        attention_layers: layers that stay attention; by default `attention_fraction` of them, evenly spaced.
        mixer: "mamba1" or "mamba2". start: "m1" or "improved" (start.py).
        calibration: texts, chats or token ids for the improved start's fit; text needs `tokenizer` where base is a model.
        calibration_tokens: tokens of them that are used. seed: of the fresh weights.
        on_layer: called with each layer's fit.
    Returns:
        the model in eval mode, in the base's dtype and on its device, with the base's generation config.
    Raises:
        ValueError: for layers that don't exist, a base that is a hybrid already, or calibration with start "m1".
    """
    if not isinstance(base, M1ForCausalLM):
        base, own_tokenizer = load_base(base)
        tokenizer = tokenizer or own_tokenizer
    _require_improved(start, bool(calibration))
    config = hybrid_config(base.config, attention_layers, attention_fraction, mixer, start)
    mixers = _start_mixers(base, config, start, seed)
    if calibration and mixers:
        fit_mixers(base, mixers, tokenize_documents(calibration, tokenizer, calibration_tokens), on_layer=on_layer)
    if start == "improved":
        for module in mixers.values():
            balance(module)
    weights = hybrid_weights(
        {name: tensor.detach().clone() for name, tensor in base.state_dict().items()},
        {layer: {n: t.detach().to(base.dtype) for n, t in module.state_dict().items()} for layer, module in mixers.items()},
    )
    model = assemble(config, weights, source="the hybrid")
    model.generation_config = copy.deepcopy(base.generation_config)
    return model


def _require_improved(start: str, has_calibration: bool) -> None:
    if has_calibration and start != "improved":
        raise ValueError(f"calibration: only the improved start is calibrated, got start {start!r}")


def hybrid_config(
    base: M1Config, attention_layers: Sequence[int] | None, attention_fraction: float, mixer: str, start: str
) -> M1Config:
    """The config of the hybrid that `convert` would make; ValueError for what it would refuse."""
    if base.mixer_layers:
        raise ValueError(
            f"base: layers {base.mixer_layers} are mixers already; convert the Transformer that this hybrid came from"
        )
    if start not in ("m1", "improved"):
        raise ValueError(f"start: expected 'm1' or 'improved', got {start!r}")
    if attention_layers is None:
        attention_layers = choose_attention_layers(base.num_hidden_layers, attention_fraction)
    for layer in attention_layers:
        if not 0 <= layer < base.num_hidden_layers:
            raise ValueError(
                f"attention_layers: layer {layer} does not exist; the base has layers 0 to {base.num_hidden_layers - 1}"
            )
    converted = sorted(set(range(base.num_hidden_layers)) - set(attention_layers))
    options = {"mixer_bias": base.attention_bias} if start == "m1" else improved_options(mixer)
    # The base's fields of its own mixers, of which a dense model has none, must not stand in the way.
    unset = {"d_state": None, "dt_rank": None}
    return M1Config.from_base(base, mixer_layers=converted, mixer=mixer, **unset, **options)


def _start_mixers(base: M1ForCausalLM, config: M1Config, start: str, seed: int) -> dict[int, Mixer]:
    """A mixer in fp32 for each converted layer, with attention's weights and the chosen start."""
    state = base.state_dict()
    mixers: dict[int, Mixer] = {}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for layer in config.mixer_layers:
            mixer = cast(Mixer, MIXER_CLASSES[config.mixer](config, layer))
            mixer.load_state_dict(attention_to_mixer(layer_weights(state, layer, "self_attn"), mixer.state_dict(), config))
            if start == "improved":
                open_mixer(mixer)
            mixers[layer] = mixer.to(base.device).eval()
    return mixers


def run(config: ConvertConfig) -> None:
    """The command: says what it will do, checks that there is room, converts, and writes the hybrid's directory.

    What the same options have made already stays as it is.
    """
    require(config, "base", "out")
    layers = read_layers(config.attention_layers)
    config = dataclasses.replace(config, attention_layers=layers)
    _require_improved(config.start, bool(config.calibration))
    if Path(config.base).exists() and Path(config.base).resolve() == Path(config.out).resolve():
        raise ValueError(f"--out {config.out} is the base itself; give another directory")
    if not config.overwrite and _is_done(config):
        print(f"{config.out} is finished already: a model. Next: m1 align --model {config.out} …")
        return
    with storage.new_directory(config.out, overwrite=config.overwrite) as directory:
        source = open_source(config.base)
        is_gguf = isinstance(source, gguf.GgufFile)
        base_config = load_config(source) if isinstance(source, str) else M1Config.from_base(gguf.read_config(source))
        hybrid = hybrid_config(base_config, layers, config.attention_fraction, config.mixer, config.start)
        texts = list(itertools.islice(read_texts(config.calibration), config.calibration_tokens))  # a row is a token or more
        _announce(config, hybrid)
        model, tokenizer, fits = _convert_for(config, source, texts, len(hybrid.mixer_layers))
        model.save_pretrained(directory)
        tokenizer.save_pretrained(directory)
        facts = {"layer_types": hybrid.layer_types, "fits": [dataclasses.asdict(fit) for fit in fits]}
        storage.write_run_record(directory, "convert", dataclasses.asdict(config), **facts)
    _conclude(config, fits, is_gguf, has_mixers=bool(hybrid.mixer_layers))


def _is_done(config: ConvertConfig) -> bool:
    """Whether the output is what this command made with these options, so that a recipe's commands can be run again."""
    record = storage.read_run_record(config.out)
    if record is None or record["command"] != "convert":
        return False
    now = json.loads(json.dumps(dataclasses.asdict(config)))
    return all(record["config"].get(key) == now[key] for key in now.keys() - {"out", "device", "overwrite"})


def _announce(config: ConvertConfig, hybrid: M1Config) -> None:
    """Say what will be done, and refuse it if memory or disk are too small."""
    parameters = count_parameters(hybrid)
    size = parameters * DTYPES[config.dtype].itemsize
    kept = ", ".join(map(str, hybrid.attention_layers)) or "none"
    print(f"base      {config.base} ({hybrid.base_model_type}, {hybrid.num_hidden_layers} layers)")
    print(f"hybrid    {len(hybrid.mixer_layers)} layers become {config.mixer} mixers, attention stays in layers: {kept}")
    print(f"start     {config.start}{_describe_calibration(config)}")
    print(f"writes    {parameters / 1e6:.1f}M parameters in {config.dtype} ({size / storage.GIB:.2f} GiB) to {config.out}")
    storage.require_disk(config.out, size, "the hybrid")
    # The base and the hybrid side by side, in fp32 while the improved start is computed.
    storage.require_memory(2 * parameters * _working_dtype(config).itemsize, f"converting {config.base}")


def _describe_calibration(config: ConvertConfig) -> str:
    if config.start == "m1":
        return ""
    if not config.calibration:
        return ", not calibrated: no --calibration text was given"
    return f", calibrated on {config.calibration_tokens} tokens of {', '.join(config.calibration)}"


def _working_dtype(config: ConvertConfig) -> torch.dtype:
    return torch.float32 if config.calibration else DTYPES[config.dtype]


def _convert_for(
    config: ConvertConfig, source: str | gguf.GgufFile, texts: list[Text], num_mixers: int
) -> tuple[M1ForCausalLM, PreTrainedTokenizerBase, list[LayerFit]]:
    """The hybrid in the dtype to be written, on the CPU; the tokenizer; what was fitted."""
    base: Any
    base, tokenizer = load_base(source, dtype=_working_dtype(config))
    fits: list[LayerFit] = []
    with tqdm(total=num_mixers, desc="fit", unit=" layers", disable=None if texts else True) as bar:

        def on_layer(fit: LayerFit) -> None:
            fits.append(fit)
            bar.update()

        model: Any = convert(
            base.to(choose_device(config.device)),
            attention_layers=read_layers(config.attention_layers),
            attention_fraction=config.attention_fraction,
            mixer=config.mixer,
            start=config.start,
            calibration=texts,
            tokenizer=tokenizer,
            calibration_tokens=config.calibration_tokens,
            seed=config.seed,
            on_layer=on_layer,
        )
    return model.to(dtype=DTYPES[config.dtype], device="cpu"), tokenizer, fits


def _conclude(config: ConvertConfig, fits: list[LayerFit], is_gguf: bool, has_mixers: bool) -> None:
    """Say where the result is, how near it starts, and what comes next."""
    if fits:
        before, after = (sum(getattr(fit, name) for fit in fits) / len(fits) for name in ("error_before", "error_after"))
        print(f"fit       distance of mixers from attention {before:.2f} -> {after:.2f} (mean over layers; 0 is equal)")
    print(f"done      {config.out}")
    if not has_mixers:
        print(f"next      m1 sample --model {config.out} …, m1 convert --base {config.out} …; it is their --teacher too")
        return
    teacher = config.base
    if is_gguf:
        teacher = "TEACHER"
        print(f"teacher   m1 convert --base {config.base} --attention-fraction 1 --out TEACHER")
    print(f"next      m1 align --model {config.out} --teacher {teacher} --data DATA.jsonl --out ALIGNED")
