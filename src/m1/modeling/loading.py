"""Loading checkpoints: an M1 model, or a Transformer of a supported family as an M1 model with no layer converted.

Only safetensors and no downloaded code. A checkpoint that does not fit its config is refused: nothing is filled in at random.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoTokenizer, PreTrainedTokenizerBase

from m1.modeling.configuration import M1Config
from m1.modeling.hybrid import M1ForCausalLM

OUR_DIRECTORIES = ("models/", "runs/")  # where recipes write: the hub, which would be asked for seconds, has no such owners


def load_config(source: str | Path) -> M1Config:
    """The M1 config of a directory or hub name: its own, or a base model's translated (`M1Config.from_base`)."""
    _require_model_source(source)
    with _naming(source):
        config = AutoConfig.from_pretrained(source)
    return config if isinstance(config, M1Config) else M1Config.from_base(config)


def load_model(source: str | Path, *, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu") -> M1ForCausalLM:
    """An `M1ForCausalLM` in eval mode from a directory or hub name, hybrid or dense.

    Raises FileNotFoundError for a missing directory, ValueError for an unsupported family or for weights that don't fit.
    """
    config = load_config(source)
    loaded: Any = M1ForCausalLM.from_pretrained(
        source, config=config, dtype=dtype, use_safetensors=True, output_loading_info=True
    )
    model, info = loaded
    require_fit(source, info)
    return model.to(device).eval()


def require_fit(source: str | Path, info: dict[str, Any]) -> None:
    """ValueError if transformers' loading info tells of weights that are missing, left over, or of another shape."""
    for problem in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if info[problem]:
            names = sorted(str(key) for key in info[problem])
            raise ValueError(
                f"{source}: the checkpoint does not fit its config.json ({len(names)} {problem.replace('_', ' ')}, such as "
                f"{names[0]}): is it the checkpoint of another model?"
            )


def load_tokenizer(source: str | Path, *, needs_chat_template: bool = False) -> PreTrainedTokenizerBase:
    """The tokenizer of a directory or hub name; ValueError if it has no end token, or no chat template where one is needed."""
    _require_model_source(source)
    with _naming(source):
        tokenizer = AutoTokenizer.from_pretrained(source)
    if tokenizer.eos_token_id is None:
        raise ValueError(f"{source}: the tokenizer has no end-of-sequence token; set eos_token in tokenizer_config.json")
    if needs_chat_template and not tokenizer.chat_template:
        raise ValueError(
            f"{source}: the tokenizer has no chat template; add chat_template.jinja to the directory, "
            "or use data with 'prompt' and 'completion' instead of 'messages'"
        )
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def _require_model_source(source: str | Path) -> None:
    """A path must hold a config.json; anything that looks like a hub name is left to the hub."""
    path = Path(source)
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise FileNotFoundError(f"{source}: no config.json in this directory; is it a model?")
    elif path.exists():
        raise ValueError(
            f"{source}: expected a model directory or a hub name; `m1 convert --attention-fraction 1` makes a directory of a "
            "GGUF file, whose name must end in .gguf"
        )
    elif path.is_absolute() or str(source).startswith((".", "~", *OUR_DIRECTORIES)) or str(source).count("/") != 1:
        raise FileNotFoundError(f"{source}: no such model directory")


@contextmanager
def _naming(source: str | Path) -> Iterator[None]:
    """Errors of the hub say which model was asked for, and that it is no directory here."""
    try:
        yield
    except OSError as error:
        if Path(source).exists():
            raise
        raise FileNotFoundError(f"{source}: no such directory here, and not to be had from the hub: {error}") from error


def choose_device(name: str) -> torch.device:
    """The device that a config names ("auto", "cpu", "cuda"); auto is the GPU if there is one. ValueError if it isn't there."""
    has_gpu = torch.cuda.is_available()
    if name == "cuda" and not has_gpu:
        raise ValueError("--device cuda: torch sees no CUDA GPU here; use --device cpu, or install torch for your GPU")
    return torch.device("cuda" if has_gpu and name != "cpu" else "cpu")


def inference_dtype(device: torch.device) -> torch.dtype:
    """The dtype in which a device computes quickest: bf16 where it multiplies bf16 matrices in hardware, else fp32."""
    if device.type == "cpu" and not (torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()):
        return torch.float32
    return torch.bfloat16
