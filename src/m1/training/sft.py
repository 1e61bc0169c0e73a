"""Supervised fine-tuning: cross-entropy on the data's own tokens."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from m1.config import SFTConfig
from m1.modeling import M1ForCausalLM
from m1.training.command import read_documents, run_training
from m1.training.loop import Step, TrainResult, backpropagate, mean_over_targets, train
from m1.training.losses import CrossEntropy, head_loss, target_states
from m1.training.optimizer import select_trainable
from m1.training.packing import BatchStream, Document, PackedBatch
from m1.training.run_directory import RunDirectory


class SFTStage:
    """A `loop.Stage`: packed documents in, the cross-entropy of their targets out."""

    def __init__(self, model: M1ForCausalLM, documents: Sequence[Document], config: SFTConfig) -> None:
        self.model, self.tokens_per_step = model, config.tokens_per_step
        self.stream = BatchStream(documents, config.tokens_per_batch, config.seed)

    def draw(self, step: int) -> Step:
        return Step([self.stream.next_batches(self.tokens_per_step)])

    def backward(self, batch: PackedBatch, num_targets: float) -> dict[str, Tensor]:
        sums = head_loss(CrossEntropy(batch.targets), target_states(self.model, batch))
        backpropagate(sums["loss"] / num_targets)
        return {"loss": sums["loss"].detach()}

    def summarise(self, sums: dict[str, float], num_targets: int) -> dict[str, float]:
        return mean_over_targets(sums, num_targets)

    def state_dict(self) -> dict[str, Any]:
        return self.stream.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.stream.load_state_dict(state)


def sft(
    model: M1ForCausalLM,
    documents: Sequence[Document],
    config: SFTConfig,
    *,
    directory: RunDirectory | None = None,
    progress: bool = True,
) -> TrainResult:
    """Fine-tune `model` (fp32 weights) in place on the documents' targets. See `loop.train` for what it raises."""
    select_trainable(model, config.frozen)
    return train(model, SFTStage(model, documents, config), config, directory=directory, progress=progress, title="sft")


def run(config: SFTConfig) -> None:
    """`m1 sft`."""
    run_training(
        "sft",
        config,
        read_data=lambda tokenizer: read_documents(config, tokenizer, config.loss_on, only_correct=config.only_correct),
        train=lambda model, _, documents, directory: sft(model, documents, config, directory=directory),
        frozen=config.frozen,
        next_command="m1 grpo --model {out} --data …, or m1 solve --model {out} …",
    )
