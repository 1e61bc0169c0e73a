"""From a command's options to a model that can be sampled: loads it, or finds its server, and says what it is."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from m1.config import EvalConfig, SamplingConfig, SolveConfig, require
from m1.evaluation.sampling import Generate, Prompt, SampleRequest, Watch
from m1.storage import weights_fingerprint

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from m1.engine.llm import Engine

# Under a deadline samples must end in time: few enough at once that each is nearly as fast as it would be alone.
_ENGINE_CONCURRENCY_IN_TIME = {"cpu": 8, "cuda": 128}
_DEFAULT_CONCURRENCY = {"transformers": 16, "server": 16, "vllm": 256}


@dataclass
class Backend:
    """A model that is ready: its `generate`, one line about it for a person, and facts for the record.

    identity: what makes results of this model comparable with others of it: its name and a fingerprint of its weights, or
    its address. is_chat: whether prompts should be chat messages (else text). concurrency: samples that run at once.
    """

    generate: Generate
    description: str
    identity: dict[str, Any]
    is_chat: bool = True
    facts: dict[str, Any] = field(default_factory=dict)
    concurrency: int = 0

    def prompt(self, text: str) -> Prompt:
        """`text` as the model wants it: a user's message, or plain text for a model without chat template."""
        return as_prompt(text, self.is_chat)

    def warm_up(self, prompt: Prompt, max_tokens: int, temperature: float) -> None:
        """Sample a few tokens at full width, so that compilation and first allocations are not timed."""
        params = {"temperature": temperature, "max_tokens": max_tokens, "seed": 0}
        self.generate([SampleRequest(prompt, self.concurrency if temperature > 0 else 1, params)], Watch())


def as_prompt(text: str, is_chat: bool) -> Prompt:
    """`text` as a user's message, or as it is."""
    return [{"role": "user", "content": text}] if is_chat else text


def open_backend(config: SolveConfig | EvalConfig, texts: Sequence[str] = (), *, has_deadline: bool = False) -> Backend:
    """The model that `config` names, loaded. With a deadline, `concurrency` 0 means fewer samples at once.

    texts: what will be asked, if it is known: our engine then takes no more memory than the longest of them needs with
    `max_new_tokens` behind it, instead of the model's whole context. Raises ValueError, OSError or MemoryError for what can't
    be had, naming the option.
    """
    require(config, "model")
    if config.concurrency < 0:
        raise ValueError(f"--concurrency: expected at least 0, got {config.concurrency}")
    if config.url and config.backend not in ("engine", "server"):
        raise ValueError(f"--url: a server has its own backend; leave out --backend {config.backend}")
    for name, value in _engine_options(config).items():
        if config.url or config.backend != "engine":
            raise ValueError(f"--{name.replace('_', '-')} {value}: M1's engine alone has it; leave out --url and --backend")
    if config.url or config.backend == "server":
        return _open_server(config)
    if config.backend == "engine":
        opened = _open_engine(config, texts, has_deadline)
    else:
        opened = {"transformers": _open_transformers, "vllm": _open_vllm}[config.backend](config)
    opened.identity = {"model": config.model, "backend": config.backend, "weights": weights_fingerprint(config.model)}
    opened.identity |= _engine_options(config)
    return opened


def _engine_options(config: SamplingConfig) -> dict[str, str]:
    """What makes the engine's arithmetic another one than by default."""
    options = {"quantization": (config.quantization, "none"), "state_dtype": (config.state_dtype, "float32")}
    return {name: value for name, (value, default) in options.items() if value != default}


@contextmanager
def other_ranks_serving(config: SamplingConfig, *, has_deadline: bool = False) -> Iterator[bool]:
    """Within, under `torchrun`: true on the first rank, which may `open_backend(config)` to sample with the engines of all; the
    others have served it, and have nothing left to do."""
    from m1.backends.ranks import dismiss, serve
    from m1.distributed import is_first

    if not is_first():
        serve(lambda max_model_len: _load_engine(config, has_deadline, max_model_len))
        yield False
        return
    try:
        yield True
    finally:
        dismiss()


def needed_room(texts: Sequence[str], max_new_tokens: int, tokenizer: "PreTrainedTokenizerBase", limit: int) -> int | None:
    """Tokens of the longest prompt with its completion, at most the model's `limit`; None where no prompts are known."""
    from m1.engine.prompts import encode_prompt

    prompts = [as_prompt(text, bool(tokenizer.chat_template)) for text in texts]
    longest = max((len(encode_prompt(prompt, tokenizer, len(tokenizer))) for prompt in prompts), default=None)
    return None if longest is None else min(limit, longest + max_new_tokens)


def _load_engine(
    config: SamplingConfig,
    has_deadline: bool,
    max_model_len: int | None,
    tokenizer: "PreTrainedTokenizerBase | None" = None,
) -> "Engine":
    """tokenizer: the model's own, if it is loaded already."""
    import torch

    from m1.distributed import local_device
    from m1.engine.llm import Engine
    from m1.modeling.loading import inference_dtype, load_tokenizer

    device = local_device(config.device)
    concurrency = config.concurrency or (_ENGINE_CONCURRENCY_IN_TIME[device.type] if has_deadline else None)
    options: dict[str, Any] = {
        "dtype": inference_dtype(device),
        "device": device,
        "max_num_seqs": concurrency,
        "max_model_len": max_model_len,
    }
    if config.state_dtype == "bfloat16" or config.quantization == "fp8":
        options["state_dtype"] = torch.bfloat16
    if config.quantization == "fp8":
        options |= {"quantization": "fp8", "kv_cache_dtype": "fp8"}
    return Engine(config.model, load_tokenizer(config.model) if tokenizer is None else tokenizer, **options)


def _open_engine(config: SolveConfig | EvalConfig, texts: Sequence[str], has_deadline: bool) -> Backend:
    from m1.backends.engine import engine_backend
    from m1.backends.ranks import announce, shared_backend
    from m1.distributed import num_ranks
    from m1.modeling.loading import load_config, load_tokenizer

    limit = load_config(config.model).max_position_embeddings
    tokenizer = load_tokenizer(config.model)
    room = needed_room(texts, config.max_new_tokens, tokenizer, limit)
    if num_ranks() > 1:
        announce(room)
    engine = _load_engine(config, has_deadline, room, tokenizer)
    layers, capacity, weight = engine.model.config, engine.capacity, engine.model.model.embed_tokens.weight
    dtype = str(weight.dtype).removeprefix("torch.") if config.quantization == "none" else config.quantization
    places = f"on {weight.device}" if num_ranks() == 1 else f"on each of {num_ranks()} ranks"
    assert engine.tokenizer is not None
    return Backend(
        generate=engine_backend(engine) if num_ranks() == 1 else shared_backend(engine),
        description=(
            f"{config.model}: {len(layers.mixer_layers)} mixer and {len(layers.attention_layers)} attention layers {places} "
            f"in {dtype}, up to {num_ranks() * capacity.max_num_seqs} samples at once"
        ),
        identity={},
        is_chat=bool(engine.tokenizer.chat_template),
        facts={
            "dtype": dtype,
            "mixer_layers": len(layers.mixer_layers),
            "attention_layers": len(layers.attention_layers),
            "max_model_len": capacity.max_model_len,
            "ranks": num_ranks(),
        },
        concurrency=num_ranks() * capacity.max_num_seqs,
    )


def _open_transformers(config: SamplingConfig) -> Backend:
    from transformers import AutoModelForCausalLM

    import m1.modeling  # noqa: F401  # makes the architecture known to transformers
    from m1.backends.transformers import transformers_backend
    from m1.modeling.loading import choose_device, inference_dtype, load_tokenizer

    tokenizer = load_tokenizer(config.model)  # first: it says clearly when there is no such model
    device = choose_device(config.device)
    dtype = inference_dtype(device)
    model: Any = AutoModelForCausalLM.from_pretrained(config.model, dtype=dtype, use_safetensors=True)
    model = model.to(device).eval()
    concurrency = config.concurrency or _DEFAULT_CONCURRENCY["transformers"]
    return Backend(
        generate=transformers_backend(model, tokenizer, concurrency=concurrency),
        description=f"{config.model}: {type(model).__name__} under transformers' generate on {device}, {concurrency} at once",
        identity={},
        is_chat=bool(tokenizer.chat_template),
        facts={"dtype": str(dtype).removeprefix("torch."), "class": type(model).__name__},
        concurrency=concurrency,
    )


def _open_vllm(config: SamplingConfig) -> Backend:
    from m1.backends.vllm import open_vllm, vllm_backend

    concurrency = config.concurrency or _DEFAULT_CONCURRENCY["vllm"]
    llm = open_vllm(config.model, concurrency=concurrency, seed=config.seed)
    return Backend(
        generate=vllm_backend(llm, concurrency=concurrency),
        description=f"{config.model} in vLLM, up to {concurrency} samples at once",
        identity={},
        is_chat=bool(llm.get_tokenizer().chat_template),
        concurrency=concurrency,
    )


def _open_server(config: SamplingConfig) -> Backend:
    from m1.backends.server import server_backend

    require(config, "url")
    concurrency = config.concurrency or _DEFAULT_CONCURRENCY["server"]
    return Backend(
        generate=server_backend(config.url, config.model, concurrency=concurrency, logprobs=config.logprobs),
        description=f"{config.model} at {config.url}, {concurrency} requests at once",
        identity={"model": config.model, "backend": "server", "url": config.url},
        concurrency=concurrency,
    )
