"""What the commands align, distill, sft and grpo have in common around their training: checks, words, and the export."""

from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from transformers import PreTrainedTokenizerBase

from m1.config import TrainConfig, require
from m1.distributed import num_local_ranks, num_ranks, on_first, ranks, say
from m1.modeling import M1Config, M1ForCausalLM
from m1.modeling.hybrid import count_parameters
from m1.modeling.loading import load_config, load_model, load_tokenizer
from m1.storage import GIB, require_disk, require_memory
from m1.training.checkpoint import PREFIX
from m1.training.data import iterate_documents
from m1.training.document_cache import CachedDocuments, cache_directory, cache_key, write_documents
from m1.training.loop import TrainResult
from m1.training.optimizer import select_trainable
from m1.training.packing import Document
from m1.training.process_map import num_processes_here
from m1.training.run_directory import RunDirectory
from m1.training.sharding import STATE_BYTES, divides
from m1.training.sources import fingerprints, iterate_rows
from m1.training.trackers import require_trackers

Data = TypeVar("Data")


def run_training(
    command: str,
    config: TrainConfig,
    *,
    read_data: Callable[[PreTrainedTokenizerBase], tuple[Data, str]],
    train: Callable[[M1ForCausalLM, PreTrainedTokenizerBase, Data, RunDirectory], TrainResult],
    frozen: Collection[str],
    extra_bytes: int = 0,
    next_command: str,
) -> None:
    """Run a training command from its config to the model in `config.out`, or say that this is done already.

    `read_data` gives the data and a few words on it; `train` is the stage's in-memory function. `extra_bytes`: memory that
    the stage needs beside the model (a teacher). Nothing is written before model, data, memory and disk are found good. Under
    `torchrun` every rank runs this; the first one speaks and writes.
    """
    require(config, "model", "out")
    _check_numbers(config)
    require_trackers(config.track)
    directory = RunDirectory(command, config)
    if directory.is_finished:
        say(f"{directory.path} is finished already: a trained model. Next: {next_command.format(out=config.out)}")
        return
    with ranks(config.device, config.timeout) as device:
        tokenizer = load_tokenizer(config.model)
        data, words_on_data = read_data(tokenizer)
        shape = load_config(config.model)
        is_divided = divides(config, parameter_bytes(shape, 1), device)
        _require_training_memory(shape, config, device, extra_bytes, is_divided=is_divided)
        model = load_model(config.model, dtype=torch.float32, device=device)
        select_trainable(model, frozen)
        _require_training_disk(model, config, f"m1 {command}")
        _announce(command, config, model, words_on_data, directory, is_divided=is_divided)
        directory.create(tokenizer)
        result = train(model, tokenizer, data, directory)
        directory.export(model, metrics=result.last, tokens=result.tokens, seconds=round(result.seconds, 1))
        say(f"The model is in {directory.path}. Next: {next_command.format(out=config.out)}")


def _announce(
    command: str,
    config: TrainConfig,
    model: M1ForCausalLM,
    words_on_data: str,
    directory: RunDirectory,
    *,
    is_divided: bool,
) -> None:
    """What is about to happen."""
    num_all, num_trained = (sum(p.numel() for p in model.parameters() if p.requires_grad >= flag) for flag in (False, True))
    layers = model.config
    place = str(model.device)
    if num_ranks() > 1:
        place = f"{num_ranks()} ranks of {model.device.type}, {'divided among them' if is_divided else 'whole on each'}"
    say(f"m1 {command}: {config.model}, {layers.num_hidden_layers} layers of which {len(layers.attention_layers)} attention")
    say(f"  trains {num_trained / 1e6:.1f}M of {num_all / 1e6:.1f}M parameters on {place}, in {config.precision}")
    say(f"  data: {words_on_data}")
    say(f"  {config.steps} steps, metrics in {directory.metrics}; Ctrl-C and the same command go on later")


def read_documents(
    config: TrainConfig, tokenizer: PreTrainedTokenizerBase, loss_on: str, *, only_correct: bool = False
) -> tuple[Sequence[Document], str]:
    """The documents of `config.data`, and what to say of them. They are tokenised once; later runs find them in the cache."""
    origin: dict[str, Any] = {"num_problems": config.num_problems, "seed": config.seed}
    options: dict[str, Any] = {"max_length": config.max_length, "loss_on": loss_on, "suffix": config.suffix}
    entry = cache_directory(config.cache_dir) / cache_key(
        tokenizer, data=fingerprints(config.data, **origin), only_correct=only_correct, **options
    )

    def tokenise() -> None:
        if not entry.is_dir():
            rows = iterate_rows(config.data, only_correct=only_correct, **origin)
            documents = iterate_documents(rows, tokenizer, num_processes=num_processes_here(), **options)
            write_documents(entry, documents)

    on_first(tokenise, of_host=True)
    documents = CachedDocuments(entry)
    tokens, targets = documents.facts["tokens"], documents.facts["targets"]
    epochs = config.steps * config.tokens_per_step / tokens
    words = (
        f"{len(documents):,} documents, {tokens:,} tokens, {targets:,} of them targets; "
        f"{config.steps * config.tokens_per_step:,} tokens are {epochs:,.1f} epochs"
    )
    batches = -(-config.tokens_per_step // config.tokens_per_batch)
    if batches % num_ranks():
        words += (
            f"; the {batches} batches of a step don't divide among {num_ranks()} ranks, some of which will idle: "
            "make --tokens-per-step a multiple of --tokens-per-batch times the ranks"
        )
    return documents, words


def parameter_bytes(config: M1Config, itemsize: int) -> int:
    """Size of a model of this shape, without loading it."""
    return count_parameters(config) * itemsize


def _check_numbers(config: TrainConfig) -> None:
    for name in ("steps", "tokens_per_step", "tokens_per_batch", "max_length", "checkpoint_every", "log_every"):
        if getattr(config, name) < 1:
            raise ValueError(f"--{name.replace('_', '-')}: expected at least 1, got {getattr(config, name)}")
    if not 0 <= config.ema_decay < 1:
        raise ValueError(f"--ema-decay: expected 0 (none) or a number below 1, such as 0.999, got {config.ema_decay}")
    if config.timeout <= 0:
        raise ValueError(f"--timeout: expected more than 0 seconds, got {config.timeout}")
    if config.export_every < 0:
        raise ValueError(f"--export-every: expected 0 (none) or more, got {config.export_every}")
    if config.max_length > config.tokens_per_batch:
        raise ValueError(
            f"--max-length {config.max_length} does not fit into --tokens-per-batch {config.tokens_per_batch}: "
            "lower the one or raise the other"
        )


def _require_training_memory(
    model: M1Config, config: TrainConfig, device: torch.device, extra_bytes: int, *, is_divided: bool
) -> None:
    """Compare what training needs on this rank with what is free. Raises MemoryError.

    That is fp32 weights, gradients and two averages (of its share, once the whole weights have been loaded), and activations:
    estimated as 16 hidden and 4 intermediate vectors a token and layer, or with gradient checkpointing one hidden
    vector a layer and one layer's whole.
    """
    width = 16 * model.hidden_size + 4 * model.intermediate_size
    vectors = model.hidden_size * model.num_hidden_layers + width
    if not config.gradient_checkpointing:
        vectors = width * model.num_hidden_layers
    itemsize = 2 if config.precision == "bfloat16" else 4
    weights = parameter_bytes(model, STATE_BYTES) // (num_ranks() if is_divided else 1)
    needed = max(weights + config.tokens_per_batch * vectors * itemsize, parameter_bytes(model, 4)) + extra_bytes
    remedies = ["lower --tokens-per-batch", "add --gradient-checkpointing"]
    if num_ranks() > 1 and not is_divided:
        remedies.append("divide the model by --replicate never")
    purpose = f"training {config.model} ({', or '.join(remedies)})"
    if device.type == "cpu":
        require_memory(needed * num_local_ranks(), purpose)
        return
    free, _ = torch.cuda.mem_get_info(device)
    if free < needed:
        raise MemoryError(f"{purpose} needs about {needed / GIB:.1f} GiB on the GPU, {free / GIB:.1f} GiB are free")


def _require_training_disk(model: M1ForCausalLM, config: TrainConfig, purpose: str) -> None:
    """Room for the checkpoints that are kept, the one that is being written, and the models. Raises OSError.

    What a run that is resumed has written already is there and needs no more.
    """
    num_all, num_trained = (sum(p.numel() for p in model.parameters() if p.requires_grad >= flag) for flag in (False, True))
    checkpoint = num_trained * 4 * (4 if config.ema_decay else 3)
    exports = 1 + (config.steps - 1) // config.export_every if config.export_every else 1
    num_bytes = checkpoint * (config.keep_checkpoints + 1) + exports * num_all * getattr(torch, config.dtype).itemsize
    written = [path for part in ("checkpoints", "exports") for path in Path(config.out, part).glob(f"{PREFIX}*/*")]
    require_disk(config.out, max(num_bytes - sum(path.stat().st_size for path in written), checkpoint), purpose)
