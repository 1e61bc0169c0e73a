"""The one training loop of all stages: accumulation, clipping, schedule, metrics, checkpoints, interruption.

A stage says what a step's batches are and how one of them is turned into gradients; everything else is here, and nothing
here knows which stage it runs.
"""

import math
import signal
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
from m1.modeling import M1ForCausalLM
from m1.training.checkpoint import load_newest_checkpoint, remove_leftovers, save_checkpoint
from m1.training.metrics import MetricsLog, Record
from m1.training.optimizer import build_optimizer, clip_gradients, gradient_norm, set_learning_rates
from m1.training.run_directory import RunDirectory
from m1.training.trackers import open_trackers


class Batch(Protocol):
    """What one forward and backward takes: packed tokens, some of which are targets."""

    @property
    def num_tokens(self) -> int: ...
    @property
    def num_targets(self) -> int: ...
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
        """The batches of `step` (from 0)."""

    def backward(self, batch: Any, num_targets: int) -> dict[str, Tensor]:
        """Add to the gradients those of the batch's loss, summed over targets and divided by `num_targets`, the targets of
        the whole update. Returns sums over the batch's targets, not divided; `loss` among them."""

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
    return torch.autocast(device.type, torch.bfloat16) if precision == "bfloat16" else nullcontext()


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

    The gradient of a step is that of the mean over all targets of the step, however it is cut into micro-batches. Parameters
    that don't require gradients stay. Raises TrainingDivergedError before it would change a parameter by NaN, and
    KeyboardInterrupt after the step that was running when Ctrl-C came, once that is saved.
    """
    optimizer = build_optimizer(model, config)
    log = MetricsLog(directory.metrics if directory else None)
    first = _resume(model, optimizer, stage, log, directory) if directory else 0
    if directory:
        log.trackers = open_trackers(config.track, directory.path, asdict(config), first_step=first)
    tokens, began = 0, time.perf_counter()
    was_training = model.training
    model.train()
    if config.gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    try:
        with (
            _interruptible(is_on=directory is not None) as stop,
            tqdm(total=config.steps, initial=first, desc=title, unit="step", disable=None if progress else True) as bar,
        ):
            for step in range(first, config.steps):
                record = _train_step(model, optimizer, stage, step, config, directory)
                tokens += record["tokens"]
                is_last = step + 1 == config.steps
                if step % config.log_every == 0 or is_last:
                    log.write(record)
                bar.set_postfix(_shown(record), refresh=False)
                bar.update()
                if directory and (stop.is_requested or is_last or (step + 1) % config.checkpoint_every == 0):
                    position = stage.state_dict()
                    save_checkpoint(directory.checkpoints, step + 1, model, optimizer, position, keep=config.keep_checkpoints)
                if stop.is_requested and not is_last:
                    raise KeyboardInterrupt
    finally:
        log.close()
        if config.gradient_checkpointing:
            model.gradient_checkpointing_disable()
        model.train(was_training)
        for parameter in model.parameters():
            parameter.grad = None
    return TrainResult(log.records, config.steps, tokens, time.perf_counter() - began)


def _resume(
    model: M1ForCausalLM, optimizer: torch.optim.Optimizer, stage: Stage, log: MetricsLog, directory: RunDirectory
) -> int:
    """Steps already done, according to the newest whole checkpoint, which is now in place."""
    remove_leftovers(directory.checkpoints)
    found = load_newest_checkpoint(directory.checkpoints, model, optimizer)
    step, position = found if found else (0, None)
    if position is not None:
        stage.load_state_dict(position)
    log.resume(step)
    return step


def _train_step(
    model: M1ForCausalLM,
    optimizer: torch.optim.Optimizer,
    stage: Stage,
    step: int,
    config: TrainConfig,
    directory: RunDirectory | None,
) -> Record:
    """One step: draw, and one optimizer update for each set of micro-batches drawn. Returns its line of metrics."""
    began = time.perf_counter()
    drawn = stage.draw(step)
    rates = set_learning_rates(optimizer, step, config)
    totals: dict[str, float] = {}
    norms = []
    for batches in drawn.updates:
        sums, norm = _accumulate(model, stage, batches, config)
        if not (math.isfinite(norm) and all(map(math.isfinite, sums.values()))):
            _stop_diverged(step, sums, norm, batches, directory)
        clip_gradients(model.parameters(), norm, config.max_grad_norm)
        optimizer.step()
        norms.append(norm)
        totals = {name: totals.get(name, 0.0) + value for name, value in sums.items()}
    targets = sum(batch.num_targets for batches in drawn.updates for batch in batches)
    tokens = sum(batch.num_tokens for batches in drawn.updates for batch in batches)
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
    model: M1ForCausalLM, stage: Stage, batches: Sequence[Any], config: TrainConfig
) -> tuple[dict[str, float], float]:
    """Gradients of one update over its micro-batches: (sums over all of them, gradient norm), read from the device once."""
    for parameter in model.parameters():
        parameter.grad = None
    num_targets = sum(batch.num_targets for batch in batches)
    totals: dict[str, Tensor] = {}
    with autocast(config.precision, model.device):
        for batch in batches:
            for name, value in stage.backward(batch.to(model.device), num_targets).items():
                totals[name] = totals[name] + value if name in totals else value
    values = torch.stack([*(value.float() for value in totals.values()), gradient_norm(model.parameters()).float()]).tolist()
    return dict(zip(totals, values)), values[-1]


def _stop_diverged(
    step: int, sums: dict[str, float], norm: float, batches: Sequence[Any], directory: RunDirectory | None
) -> None:
    what = f"step {step + 1}: the loss is {sums['loss']}, the gradient norm {norm}; nothing was updated"
    if directory is None:
        raise TrainingDivergedError(f"{what}. Lower the learning rate, or look at the data")
    path = _save_batches(directory.path / f"diverged-step-{step + 1:08d}.safetensors", batches)
    raise TrainingDivergedError(
        f"{what}. The batch is in {path}, and the checkpoints before it stand. Look at that data, or start anew with a lower "
        "learning rate and another --out"
    )


def _save_batches(path: Path, batches: Sequence[Any]) -> Path:
    tensors = {f"{i}.{name}": t.contiguous() for i, batch in enumerate(batches) for name, t in batch.tensors().items()}
    save_file(tensors, path)
    return path


def _shown(record: Record) -> dict[str, str]:
    """The few numbers that stand beside the progress bar."""
    names = ("loss", "kl", "reward", "tokens_per_second")
    return {name: f"{record[name]:.4g}" for name in names if isinstance(record.get(name), (int, float))}


class _Stop:
    is_requested = False


@contextmanager
def _interruptible(*, is_on: bool) -> Iterator[_Stop]:
    """Within: the first Ctrl-C or SIGTERM asks to stop after the running step, a second Ctrl-C stops at once."""
    stop = _Stop()

    def request(number: int, frame: Any) -> None:
        if stop.is_requested:
            raise KeyboardInterrupt
        stop.is_requested = True

    try:
        before = {number: signal.signal(number, request) for number in (signal.SIGINT, signal.SIGTERM)} if is_on else {}
    except ValueError:  # not the main thread, which alone may set handlers: interruption is the caller's business
        before = {}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
