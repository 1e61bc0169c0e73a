"""Alignment: each mixer learns to give, on the teacher's own inputs, what the teacher's attention of that layer gave.

One pass of the teacher; a hook on each replaced attention trains its mixer on the spot, so that no layer's activations
outlive it. All tokens count. (The step that all published conversions share, arXiv 2505.03005 §3.)
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from m1.config import AlignConfig, require
from m1.distributed import from_first
from m1.modeling import M1Config, M1ForCausalLM
from m1.modeling.loading import load_config
from m1.training.command import parameter_bytes, read_documents, run_training
from m1.training.distill import load_teacher
from m1.training.loop import Step, TrainResult, autocast, backpropagate, train
from m1.training.optimizer import GROUPS, select_trainable
from m1.training.packing import BatchStream, Document, PackedBatch
from m1.training.run_directory import RunDirectory
from m1.training.sharding import divides, shard_model

FROZEN = tuple(group for group in GROUPS if group != "mixers")


class AlignStage:
    """A `loop.Stage`: the loss is the mean over mixer layers of the squared error, in units of that layer's signal.

    The unit is the mean square of the teacher's output of the layer, measured on the first batch and then fixed, so that
    layers weigh alike and a step is the same however it is cut. `error_N` in the metrics is the relative error of layer N in
    the step: root of squared error over squared signal; 0 is perfect, 1 is what a mixer that gives nothing has.
    """

    def __init__(
        self, student: M1ForCausalLM, teacher: M1ForCausalLM, documents: Sequence[Document], config: AlignConfig
    ) -> None:
        require_same_shape(student.config, teacher.config, config.teacher or "the teacher")
        self.student, self.teacher, self.config = student, teacher.eval(), config
        self.layers = student.config.mixer_layers
        self.stream = BatchStream(documents, config.tokens_per_batch, config.seed)
        self.units: list[float] | None = None

    def draw(self, step: int) -> Step:
        batches = [_with_all_positions(batch) for batch in self.stream.next_batches(self.config.tokens_per_step)]
        if self.units is None:  # on the step's first batch, which is the first rank's
            self.units = from_first(self._measure_units(batches[0].to(self.student.device)))
        return Step([batches])

    def backward(self, batch: PackedBatch, num_targets: float) -> dict[str, Tensor]:
        assert self.units is not None
        scales = [1 / (unit * len(self.units)) for unit in self.units]
        sums = {"loss": torch.zeros((), device=self.student.device)}

        def train_layer(number: int, x: Tensor, wanted: Tensor, layout: Any, rotary: Any) -> None:
            mixer = self.student.model.layers[self.layers[number]].token_mixer
            wanted = wanted.float()
            with torch.enable_grad():
                x = x.detach().float() if self.config.precision == "float32" else x.detach()
                error = (mixer(x, layout, rotary) - wanted).square().mean(-1).sum()
                loss = error * scales[number]
                backpropagate(loss / num_targets)
            sums["loss"] += loss.detach()
            sums[f"squared_error_{self.layers[number]}"] = error.detach()
            sums[f"squared_signal_{self.layers[number]}"] = wanted.square().mean(-1).sum()

        self._walk(batch, train_layer)
        return sums

    def summarise(self, sums: dict[str, float], num_targets: int) -> dict[str, float]:
        errors = {
            f"error_{layer}": (sums[f"squared_error_{layer}"] / sums[f"squared_signal_{layer}"]) ** 0.5 for layer in self.layers
        }
        return {"loss": sums["loss"] / num_targets, **errors}

    def state_dict(self) -> dict[str, Any]:
        return {**self.stream.state_dict(), "units": self.units}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.stream.load_state_dict(state)
        self.units = state["units"]

    def _measure_units(self, batch: PackedBatch) -> list[float]:
        units: list[Tensor] = []

        def measure(number: int, x: Tensor, wanted: Tensor, layout: Any, rotary: Any) -> None:
            units.append(wanted.float().square().mean())

        with autocast(self.config.precision, self.student.device):
            self._walk(batch, measure)
        return torch.stack(units).tolist()

    def _walk(self, batch: PackedBatch, visit: Callable[[int, Tensor, Tensor, Any, Any], None]) -> None:
        """One pass of the teacher over the batch; `visit` sees each replaced layer's input [T, hidden] and output."""

        def hook(number: int, module: nn.Module, arguments: tuple, output: Tensor) -> None:
            x, layout, rotary, *_ = arguments
            visit(number, x, output, layout, rotary)

        layers = self.teacher.model.layers
        handles = [layers[i].token_mixer.register_forward_hook(partial(hook, n)) for n, i in enumerate(self.layers)]
        try:
            with torch.no_grad():
                self.teacher.packed_states(batch.input_ids, batch.layout)
        finally:
            for handle in handles:
                handle.remove()


def _with_all_positions(batch: PackedBatch) -> PackedBatch:
    """The batch with every token counted, prompts and last tokens too: a mixer's output matters at each."""
    return replace(batch, target_positions=torch.arange(batch.num_tokens), targets=batch.input_ids)


def align(
    student: M1ForCausalLM,
    teacher: M1ForCausalLM,
    documents: Sequence[Document],
    config: AlignConfig,
    *,
    directory: RunDirectory | None = None,
    progress: bool = True,
) -> TrainResult:
    """Train the mixers of `student` (fp32 weights) in place on the inputs and outputs of `teacher`'s attention.

    Raises ValueError for a student without mixers or a teacher of another shape; see `loop.train` for the rest.
    """
    stage = AlignStage(student, teacher, documents, config)
    select_trainable(student, FROZEN)
    if divides(config, sum(parameter.numel() for parameter in student.parameters()), student.device):
        shard_model(student, precision=config.precision, mixers_alone=True)
    return train(student, stage, config, directory=directory, progress=progress, title="align")


def require_same_shape(student: M1Config, teacher: M1Config, name: str) -> None:
    if not student.mixer_layers:
        raise ValueError("model: no layer of it is a mixer, so there is nothing to align; convert it first with `m1 convert`")
    for field in ("num_hidden_layers", "hidden_size"):
        mine, theirs = getattr(student, field), getattr(teacher, field)
        if mine != theirs:
            raise ValueError(f"teacher: {name} has {field} {theirs}, the student {mine}; give the model it was converted from")


def run(config: AlignConfig) -> None:
    """`m1 align`."""
    require(config, "model", "teacher", "out")
    teacher_config = load_config(config.teacher)
    require_same_shape(load_config(config.model), teacher_config, config.teacher)
    run_training(
        "align",
        config,
        read_data=lambda tokenizer: read_documents(config, tokenizer, "all"),
        train=lambda student, _, documents, directory: align(
            student, load_teacher(config), documents, config, directory=directory
        ),
        frozen=FROZEN,
        extra_bytes=parameter_bytes(teacher_config, getattr(torch, config.precision).itemsize),
        next_command=f"m1 distill --model {{out}} --teacher {config.teacher} --data …",
    )
