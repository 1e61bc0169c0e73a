"""The one training loop of all stages: accumulation, clipping, schedule, metrics, checkpoints, interruption.

A stage says what a step's batches are and how one of them is turned into gradients; everything else is here, and nothing
here knows which stage it runs.
"""

import math
import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

from m1.config import TrainConfig
from m1.distributed import add_over_ranks, is_distributed, is_first, num_ranks, rank, sum_over_ranks
from m1.modeling import M1ForCausalLM
from m1.training.average import WeightAverage
from m1.training.checkpoint import TrainingState
from m1.training.interruption import interruptible
from m1.training.metrics import MetricsLog, Record
from m1.training.optimizer import build_optimizer, clip_gradients, set_learning_rates, squared_gradient_norm
from m1.training.run_directory import RunDirectory
from m1.training.saving import RunSaver
from m1.training.sharding import add_gradients, divides, forget_gathered, is_divided, shard_model, synchronize_gradients
from m1.training.trackers import open_trackers
from m1.training.working_copies import WorkingCopies


class Batch(Protocol):
    """What one forward and backward takes: packed tokens, some of which are targets."""

    @property
    def num_tokens(self) -> int: ...
    @property
    def num_targets(self) -> int: ...
    @property
    def counts(self) -> bool:
        """False for a batch that only keeps this rank in step with the others."""

    def to(self, device: torch.device) -> "Batch": ...
    def tensors(self) -> dict[str, Tensor]: ...


@dataclass
class Step:
    """What a stage draws for one step: the micro-batches of each optimizer update (usually one), and metrics of its own."""

    updates: Sequence[Sequence[Any]]
    metrics: dict[str, float] = field(default_factory=dict)


class Stage(Protocol):
    """What `train` needs to know of align, distill, sft or grpo."""

    def draw(self, step: int) -> Step:
        """The batches of `step` (from 0) that are this rank's: as many as every other rank's."""

    def backward(self, batch: Any, num_targets: float) -> dict[str, Tensor]:
        """Add to the gradients those of the batch's loss, summed over targets and divided by `num_targets`, the targets of
        the whole update on all ranks. Returns sums over the batch's targets, not divided; `loss` among them."""

    def summarise(self, sums: dict[str, float], num_targets: int) -> dict[str, float]:
        """Metrics of a step from its sums."""

    def state_dict(self) -> dict[str, Any]:
        """Where the stage's data stands, as plain JSON."""

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


@dataclass
class TrainResult:
    """What a run did: its metrics by step, steps, tokens and seconds (of this process)."""

    metrics: list[Record]
    steps: int
    tokens: int
    seconds: float

    @property
    def last(self) -> Record:
        return self.metrics[-1] if self.metrics else {}


class TrainingDivergedError(ValueError):
    """The loss or its gradient is not finite. The parameters are those before the step."""


def autocast(precision: str, device: torch.device) -> AbstractContextManager:
    """Arithmetic of forward passes: bfloat16 autocast, or float32 as it is."""
    if precision != "bfloat16":
        return nullcontext()
    # A weight once cast serves all micro-batches; not so where weights are gathered for each: the cast would keep them, and
    # its gradient would come after they have been summed.
    return torch.autocast(device.type, torch.bfloat16, cache_enabled=not is_distributed())


def mean_over_targets(sums: dict[str, float], num_targets: int) -> dict[str, float]:
    """The usual `Stage.summarise`."""
    return {name: value / num_targets for name, value in sums.items()}


def backpropagate(loss: Tensor) -> None:
    """Backward outside autocast, but within its context, so that weights once cast serve the next micro-batch too."""
    with torch.autocast(loss.device.type, enabled=False):
        loss.backward()


def train(
    model: M1ForCausalLM,
    stage: Stage,
    config: TrainConfig,
    *,
    directory: RunDirectory | None = None,
    progress: bool = True,
    title: str = "train",
) -> TrainResult:
    """Train `model` in place for `config.steps` steps; with a `directory`, write metrics and checkpoints, and resume.

    The gradient of a step is that of the mean over all targets of the step, on all ranks, however it is cut into micro-batches.
    Parameters that don't require gradients stay. With several ranks the model is whole on each or divided among them
    (`sharding.divides`), and stays so; with `ema_decay` it ends as the average of its weights. Raises TrainingDivergedError
    before it would change a parameter by NaN, OSError if the last checkpoint can't be written (saving.py; those before it
    stand), and KeyboardInterrupt after the step that was running when Ctrl-C came, once that is saved.
    """
    if divides(config, sum(parameter.numel() for parameter in model.parameters()), model.device):
        shard_model(model, precision=config.precision, reshard_after_forward=config.reshard_after_forward)
    optimizer = build_optimizer(model, config)
    average = WeightAverage(model, config.ema_decay) if config.ema_decay else None
    copies = WorkingCopies(model, config.precision)
    saver = RunSaver(model, stage, config, directory, TrainingState(model, optimizer, average))
    log = MetricsLog(directory.metrics if directory and is_first() else None)
    first = saver.resume(log)
    if directory and is_first():
        log.trackers = open_trackers(config.track, directory.path, asdict(config), first_step=first)
    began, tokens = time.perf_counter(), 0
    try:
        with (
            _training_mode(model, config),
            interruptible(is_on=directory is not None) as stop,
            _progress_bar(config.steps, first, title, is_on=progress) as bar,
        ):
            for step in range(first, config.steps):
                record = _train_step(model, optimizer, stage, step, config, directory, copies)
                if average is not None:
                    average.update()
                tokens += record["tokens"]
                if step % config.log_every == 0 or step + 1 == config.steps:
                    log.write(record)
                bar.set_postfix(_shown(record), refresh=False)
                bar.update()
                if saver.keep(step + 1, stop):
                    raise KeyboardInterrupt
    finally:
        log.close()
        saver.wait()
    if average is not None:
        average.swap()
    return TrainResult(log.records, config.steps, tokens, time.perf_counter() - began)


@contextmanager
def _training_mode(model: M1ForCausalLM, config: TrainConfig) -> Iterator[None]:
    """Within: the model as it trains; afterwards as it was, without gradients."""
    was_training = model.training
    model.train()
    if config.gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    try:
        yield
    finally:
        if config.gradient_checkpointing:
            model.gradient_checkpointing_disable()
        model.train(was_training)
        for parameter in model.parameters():
            parameter.grad = None


def _train_step(
    model: M1ForCausalLM,
    optimizer: torch.optim.Optimizer,
    stage: Stage,
    step: int,
    config: TrainConfig,
    directory: RunDirectory | None,
    copies: WorkingCopies | None = None,
) -> Record:
    """One step: draw, and one optimizer update for each set of micro-batches drawn. Returns its line of metrics."""
    began = time.perf_counter()
    drawn = stage.draw(step)
    rates = set_learning_rates(optimizer, step, config)
    totals: dict[str, float] = {}
    norms = []
    for batches in drawn.updates:
        sums, norm = _accumulate(model, stage, batches, config, copies)
        if not (math.isfinite(norm) and all(map(math.isfinite, sums.values()))):
            _stop_diverged(step, sums, norm, batches, directory)
        clip_gradients(model.parameters(), norm, config.max_grad_norm)
        forget_gathered(model)
        optimizer.step()
        norms.append(norm)
        totals = {name: totals.get(name, 0.0) + value for name, value in sums.items()}
    counted = [batch for batches in drawn.updates for batch in batches if batch.counts]
    targets, tokens = map(
        int, sum_over_ranks([sum(batch.num_targets for batch in counted), sum(batch.num_tokens for batch in counted)])
    )
    seconds = time.perf_counter() - began
    return {
        "step": step + 1,
        **(stage.summarise(totals, targets) if targets else {}),
        **rates,
        **({"grad_norm": max(norms)} if norms else {}),
        "tokens": tokens,
        "targets": targets,
        "seconds": round(seconds, 4),
        "tokens_per_second": round(tokens / seconds, 1),
        **drawn.metrics,
    }


def _accumulate(
    model: M1ForCausalLM,
    stage: Stage,
    batches: Sequence[Any],
    config: TrainConfig,
    copies: WorkingCopies | None = None,
) -> tuple[dict[str, float], float]:
    """Gradients of one update over its micro-batches: (sums over all of them, gradient norm), read from the device once.

    Both are of all ranks, and gradients are summed over the ranks with the last micro-batch only.
    """
    for parameter in model.parameters():
        parameter.grad = None
    forget_gathered(model)  # drawing may have gathered weights without gradients, which would get none
    num_targets = sum_over_ranks([sum(batch.num_targets for batch in batches if batch.counts)])[0]
    totals: dict[str, Tensor] = {}
    copies = copies or WorkingCopies(model, config.precision)
    with autocast(config.precision, model.device), copies.in_place():
        for batch in batches:
            synchronize_gradients(model, batch is batches[-1])
            # A batch that doesn't count adds gradients of exactly zero, as if there were endlessly many targets.
            sums = stage.backward(batch.to(model.device), num_targets if batch.counts else math.inf)
            for name, value in sums.items():
                totals[name] = totals.get(name, 0.0) + (value if batch.counts else torch.zeros_like(value))
            copies.collect()
    add_gradients(model)
    squared_norm = squared_gradient_norm(model.parameters())
    if not is_divided(model):  # every rank has the whole
        squared_norm = squared_norm / num_ranks()
    values = torch.stack([*(value.double() for value in totals.values()), squared_norm])
    *of_stage, square = add_over_ranks(values).tolist()
    return dict(zip(totals, of_stage, strict=True)), math.sqrt(square)


def _stop_diverged(
    step: int, sums: dict[str, float], norm: float, batches: Sequence[Any], directory: RunDirectory | None
) -> None:
    what = f"step {step + 1}: the loss is {sums['loss']}, the gradient norm {norm}; nothing was updated"
    if directory is None:
        raise TrainingDivergedError(f"{what}. Lower the learning rate, or look at the data")
    of_rank = f".rank-{rank():05d}" if num_ranks() > 1 else ""
    path = _save_batches(directory.path / f"diverged-step-{step + 1:08d}{of_rank}.safetensors", batches)
    raise TrainingDivergedError(
        f"{what}. The batch is in {path}, and the checkpoints before it stand. Look at that data, or start anew with a lower "
        "learning rate and another --out"
    )


def _save_batches(path: Path, batches: Sequence[Any]) -> Path:
    tensors = {f"{i}.{name}": t.contiguous() for i, batch in enumerate(batches) for name, t in batch.tensors().items()}
    save_file(tensors, path)
    return path


def _progress_bar(steps: int, first: int, title: str, *, is_on: bool) -> tqdm:
    """On the first rank, if it is wanted; None lets tqdm leave it out where there is no terminal."""
    return tqdm(total=steps, initial=first, desc=title, unit="step", disable=None if is_on and is_first() else True)


def _shown(record: Record) -> dict[str, str]:
    """The few numbers that stand beside the progress bar."""
    names = ("loss", "kl", "reward", "tokens_per_second")
    return {name: f"{record[name]:.4g}" for name in names if isinstance(record.get(name), (int, float))}
