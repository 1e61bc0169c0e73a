"""Distillation: the hybrid learns to predict what the teacher predicts; teacher and student in one process."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from m1.config import DistillConfig, require
from m1.modeling import M1Config, M1ForCausalLM
from m1.modeling.loading import load_config, load_model, load_tokenizer
from m1.training.command import parameter_bytes, read_documents, run_training
from m1.training.distributed import local_device
from m1.training.loop import Step, TrainResult, autocast, backpropagate, mean_over_targets, train
from m1.training.losses import Divergence, head_loss, target_states
from m1.training.optimizer import select_trainable
from m1.training.packing import BatchStream, Document, PackedBatch, best_fit, pack
from m1.training.run_directory import RunDirectory
from m1.training.sharding import shard_model


class DistillStage:
    """A `loop.Stage`: KL between the teacher's and the student's next-token distributions at the targets, mixed with CE."""

    def __init__(
        self, student: M1ForCausalLM, teacher: M1ForCausalLM, documents: Sequence[Document], config: DistillConfig
    ) -> None:
        require_same_vocabulary(student.config, teacher.config, config.teacher or "the teacher")
        self.student, self.teacher, self.config = student, teacher.eval(), config
        self.stream = BatchStream(documents, config.tokens_per_batch, config.seed)

    def draw(self, step: int) -> Step:
        return Step([self.stream.next_batches(self.config.tokens_per_step)])

    def backward(self, batch: PackedBatch, num_targets: float) -> dict[str, Tensor]:
        divergence = Divergence(
            batch.targets, kind=self.config.kl, temperature=self.config.temperature, ce_weight=self.config.ce_weight
        )
        with torch.no_grad():
            teacher = target_states(self.teacher, batch)
        sums = head_loss(divergence, target_states(self.student, batch), teacher)
        backpropagate(sums["loss"] / num_targets)
        return {name: value.detach() for name, value in sums.items()}

    def summarise(self, sums: dict[str, float], num_targets: int) -> dict[str, float]:
        return mean_over_targets(sums, num_targets)

    def state_dict(self) -> dict[str, Any]:
        return self.stream.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.stream.load_state_dict(state)


def distill(
    student: M1ForCausalLM,
    teacher: M1ForCausalLM,
    documents: Sequence[Document],
    config: DistillConfig,
    *,
    directory: RunDirectory | None = None,
    progress: bool = True,
) -> TrainResult:
    """Train `student` (fp32 weights) in place to predict as `teacher` (any dtype) does at the documents' targets.

    Raises ValueError for another vocabulary; see `loop.train` for the rest.
    """
    stage = DistillStage(student, teacher, documents, config)
    select_trainable(student, config.frozen)
    return train(student, stage, config, directory=directory, progress=progress, title="distill")


@torch.no_grad()
def compare(
    student: M1ForCausalLM,
    teacher: M1ForCausalLM,
    documents: Sequence[Document],
    *,
    tokens_per_batch: int = 4096,
    precision: str = "bfloat16",
) -> dict[str, float]:
    """How near the student is to the teacher at the documents' targets, means over tokens.

    kl: KL(teacher || student) in nats; agreement: share of tokens with the same most probable next token; ce: cross-entropy
    of the student on the documents' own tokens; targets: how many were compared.
    """
    require_same_vocabulary(student.config, teacher.config, "the teacher")
    lengths = [len(document.token_ids) for document in documents]
    sums: dict[str, float] = {}
    targets = 0
    for bin_ in best_fit(lengths, max(tokens_per_batch, *lengths)):
        batch = pack([documents[index] for index in bin_]).to(student.device)
        with autocast(precision, student.device):
            divergence = Divergence(batch.targets, counts_agreement=True)
            new = head_loss(divergence, target_states(student, batch), target_states(teacher, batch))
        sums = {name: sums.get(name, 0.0) + float(value) for name, value in new.items()}
        targets += batch.num_targets
    return {name: sums[name] / targets for name in ("kl", "agreement", "ce")} | {"targets": targets}


def require_same_vocabulary(student: M1Config, teacher: M1Config, name: str) -> None:
    if student.vocab_size != teacher.vocab_size:
        raise ValueError(
            f"teacher: {name} has a vocabulary of {teacher.vocab_size} tokens, the student one of {student.vocab_size}; "
            "distillation needs the same one: give the model that the student was converted from, or a relative of it"
        )


def require_same_tokenizer(student: PreTrainedTokenizerBase, teacher_source: str | Path) -> None:
    """ValueError unless the teacher's tokenizer has the student's tokens."""
    if load_tokenizer(teacher_source).get_vocab() != student.get_vocab():
        raise ValueError(f"teacher: {teacher_source} has another tokenizer than the student; their tokens can't be compared")


def load_teacher(config: Any) -> M1ForCausalLM:
    """The config's teacher, frozen, in the precision of the forward pass; divided among the ranks if `shard_teacher`."""
    teacher = load_model(config.teacher, dtype=getattr(torch, config.precision), device=local_device(config.device))
    teacher.requires_grad_(False)
    if config.shard_teacher:
        shard_model(teacher, precision="float32")  # it has the type it computes in already
    return teacher


def run(config: DistillConfig) -> None:
    """`m1 distill`."""
    require(config, "model", "teacher", "out")
    teacher_config = load_config(config.teacher)
    require_same_vocabulary(load_config(config.model), teacher_config, config.teacher)

    def read(tokenizer: PreTrainedTokenizerBase) -> tuple[Sequence[Document], str]:
        require_same_tokenizer(tokenizer, config.teacher)
        return read_documents(config, tokenizer, config.loss_on)

    run_training(
        "distill",
        config,
        read_data=read,
        train=lambda student, _, documents, directory: distill(
            student, load_teacher(config), documents, config, directory=directory
        ),
        frozen=config.frozen,
        extra_bytes=parameter_bytes(teacher_config, getattr(torch, config.precision).itemsize),
        next_command="m1 sft --model {out} --data …",
    )
