"""Distillation: the hybrid learns to predict what the teacher predicts; teacher and student in one process."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from m1.config import DistillConfig, require
from m1.distributed import local_device
from m1.modeling import M1Config, M1ForCausalLM
from m1.modeling.loading import load_config, load_model, load_tokenizer
from m1.storage import weights_fingerprint
from m1.training.command import parameter_bytes, read_documents, run_training
from m1.training.loop import Step, TrainResult, autocast, backpropagate, mean_over_targets, train
from m1.training.losses import Divergence, head_loss, target_states
from m1.training.optimizer import select_trainable
from m1.training.packing import BatchStream, Document, PackedBatch, best_fit, pack
from m1.training.run_directory import RunDirectory
from m1.training.sharding import shard_model
from m1.training.teacher_cache import CachedBatch, CachedTeacher, TeacherCache
from m1.training.top_k import TopKDivergence


class DistillStage:
    """A `loop.Stage`: KL between the teacher's and the student's next-token distributions at the targets, mixed with CE.

    The teacher is a model that runs beside the student, or one that a cache speaks for.
    """

    def __init__(
        self,
        student: M1ForCausalLM,
        teacher: M1ForCausalLM | CachedTeacher,
        documents: Sequence[Document],
        config: DistillConfig,
    ) -> None:
        require_same_vocabulary(student.config, teacher.config, config.teacher or "the teacher")
        self.student, self.config = student, config
        self.teacher = teacher if isinstance(teacher, CachedTeacher) else teacher.eval()
        self.stream = BatchStream(documents, config.tokens_per_batch, config.seed)

    def draw(self, step: int) -> Step:
        batches = self.stream.next_batches(self.config.tokens_per_step)
        return Step([list(map(self.teacher.say, batches)) if isinstance(self.teacher, CachedTeacher) else batches])

    def backward(self, batch: PackedBatch | CachedBatch, num_targets: float) -> dict[str, Tensor]:
        config = self.config
        options: dict[str, Any] = {"kind": config.kl, "temperature": config.temperature, "ce_weight": config.ce_weight}
        if isinstance(batch, CachedBatch):
            recorded = TopKDivergence(batch.teacher, batch.packed.targets, **options)
            sums = head_loss(recorded, target_states(self.student, batch.packed))
        else:
            assert not isinstance(self.teacher, CachedTeacher)
            with torch.no_grad():
                teacher = target_states(self.teacher, batch)
            sums = head_loss(Divergence(batch.targets, **options), target_states(self.student, batch), teacher)
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
    teacher: M1ForCausalLM | CachedTeacher,
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


def open_cache(config: DistillConfig, documents: Sequence[Document]) -> CachedTeacher:
    """What speaks for the config's teacher from `teacher_cache`. Raises OSError if what is missing there will find no room."""
    of_teacher = load_config(config.teacher)
    identity = weights_fingerprint(config.teacher) or config.teacher
    facts = {"teacher": identity, "vocab_size": of_teacher.vocab_size, "temperature": config.temperature}
    cache = TeacherCache(config.teacher_cache, facts | {"top_k": min(config.teacher_top_k, of_teacher.vocab_size)})
    options: dict[str, Any] = {"temperature": config.temperature, "precision": config.precision}
    teacher = CachedTeacher(lambda: load_teacher(config), of_teacher, cache, **options)
    teacher.require_disk(documents)
    return teacher


def check_cache_settings(config: DistillConfig) -> None:
    """ValueError for settings of the teacher's cache that can't work."""
    if config.teacher_top_k < 1:
        raise ValueError(f"--teacher-top-k: expected at least 1, got {config.teacher_top_k}")
    if config.teacher_cache and config.shard_teacher:
        raise ValueError("--shard-teacher: with --teacher-cache each rank asks the teacher when it needs it; leave one out")


def run(config: DistillConfig) -> None:
    """`m1 distill`."""
    require(config, "model", "teacher", "out")
    check_cache_settings(config)
    teacher_config = load_config(config.teacher)
    require_same_vocabulary(load_config(config.model), teacher_config, config.teacher)

    def read(tokenizer: PreTrainedTokenizerBase) -> tuple[tuple[Sequence[Document], CachedTeacher | None], str]:
        require_same_tokenizer(tokenizer, config.teacher)
        documents, words = read_documents(config, tokenizer, config.loss_on)
        return (documents, open_cache(config, documents) if config.teacher_cache else None), words

    run_training(
        "distill",
        config,
        read_data=read,
        train=lambda student, _, data, directory: distill(
            student, data[1] or load_teacher(config), data[0], config, directory=directory
        ),
        frozen=config.frozen,
        extra_bytes=parameter_bytes(teacher_config, getattr(torch, config.precision).itemsize),
        next_command="m1 sft --model {out} --data …",
    )
