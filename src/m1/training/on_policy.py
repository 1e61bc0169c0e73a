"""On-policy distillation: the student samples, and is brought to the teacher at every token of what it wrote itself.

At each sampled token the KL is taken over the whole vocabulary, and the gradient goes through the student's distribution
there, not through the sampling (arXiv 2306.13649, with all data from the student). So it is exactly zero where both models
agree. Sampling is in `rollouts.py`.
"""

import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from m1.config import OnPolicyConfig, require
from m1.distributed import share
from m1.modeling import M1ForCausalLM
from m1.modeling.loading import load_config
from m1.training.command import parameter_bytes, run_training
from m1.training.data import prompt_ids
from m1.training.distill import load_teacher, require_same_tokenizer, require_same_vocabulary
from m1.training.loop import Step, TrainResult, backpropagate, mean_over_targets, train
from m1.training.losses import Divergence, head_loss, target_states
from m1.training.optimizer import select_trainable
from m1.training.packing import Document, PackedBatch, best_fit, pack
from m1.training.rollouts import (
    EngineSampler,
    ProblemStream,
    Sample,
    Sampler,
    check_rollout_settings,
    mine,
    of_all,
    seeds_of,
    with_room,
)
from m1.training.run_directory import RunDirectory
from m1.training.sources import read_prompts


class OnPolicyStage:
    """A `loop.Stage`: draws by sampling, with gradients of the KL between student and teacher at the sampled tokens."""

    def __init__(
        self,
        student: M1ForCausalLM,
        teacher: M1ForCausalLM,
        prompts: Sequence[list[int]],
        config: OnPolicyConfig,
        *,
        sampler: Sampler,
    ) -> None:
        require_same_vocabulary(student.config, teacher.config, config.teacher or "the teacher")
        self.student, self.teacher, self.config, self.sampler = student, teacher.eval(), config, sampler
        self.stream = ProblemStream(prompts, config.seed)
        self._drawn_at, self._num_drawn = 0.0, 0  # when training on the drawn samples began, and on how many tokens

    def draw(self, step: int) -> Step:
        config, began = self.config, time.perf_counter()
        prompts = self.stream.next_problems(config.problems_per_step)
        seeds = seeds_of(config.seed, step, count=len(prompts))
        of_rank = self.sampler.sample(
            mine(prompts),
            seeds=mine(seeds),
            num_samples=config.samples_per_problem,
            max_new_tokens=config.max_new_tokens,
            temperature=config.temperature,
        )
        groups = of_all(of_rank, len(prompts))
        documents = [_document(prompt, sample) for prompt, group in zip(prompts, groups, strict=True) for sample in group]
        bins = best_fit([len(document.token_ids) for document in documents], config.tokens_per_batch)
        batches = [pack([documents[i] for i in bin_], counts=counts) for bin_, counts in share(bins)]
        self._drawn_at, self._num_drawn = time.perf_counter(), sum(len(document.token_ids) for document in documents)
        return Step([batches], _describe(groups, self._drawn_at - began))

    def backward(self, batch: PackedBatch, num_targets: float) -> dict[str, Tensor]:
        with torch.no_grad():
            teacher = target_states(self.teacher, batch)
        sums = head_loss(Divergence(batch.targets, kind=self.config.kl), target_states(self.student, batch), teacher)
        backpropagate(sums["loss"] / num_targets)
        return {name: value.detach() for name, value in sums.items()}

    def summarise(self, sums: dict[str, float], num_targets: int) -> dict[str, float]:
        means, seconds = mean_over_targets(sums, num_targets), time.perf_counter() - self._drawn_at
        return {
            "loss": means["loss"],
            "kl": means["kl"],
            "seconds_training": round(seconds, 4),
            "trained_tokens_per_second": round(self._num_drawn / seconds, 1),
        }

    def state_dict(self) -> dict[str, Any]:
        return self.stream.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.stream.load_state_dict(state)


def _document(prompt: list[int], sample: Sample) -> Document:
    """Prompt and completion; every token of the completion counts."""
    ids = np.array(prompt + sample.token_ids, dtype=np.int32)
    return Document(ids, np.arange(len(ids)) >= len(prompt))


def _describe(groups: Sequence[Sequence[Sample]], seconds: float) -> dict[str, float]:
    """Metrics of what was sampled. entropy: of the student where it sampled, estimated by the log-probs of what it drew."""
    samples = [sample for group in groups for sample in group]
    log_probs = [value for sample in samples for value in sample.log_probs]
    return {
        "entropy": -float(np.mean(log_probs)),
        "length": len(log_probs) / len(samples),
        "truncated": float(np.mean([sample.is_truncated for sample in samples])),
        "seconds_sampling": round(seconds, 4),
        "sampled_tokens_per_second": round(len(log_probs) / seconds, 1),
    }


def distill_on_policy(
    student: M1ForCausalLM,
    teacher: M1ForCausalLM,
    tokenizer: PreTrainedTokenizerBase | None,
    prompts: Sequence[list[int]],
    config: OnPolicyConfig,
    *,
    sampler: Sampler | None = None,
    directory: RunDirectory | None = None,
    progress: bool = True,
) -> TrainResult:
    """Train `student` (fp32 weights) in place on its own samples of `prompts` (token ids), towards `teacher` (any dtype).

    Samples with the engine unless a `sampler` is given. Raises ValueError for another vocabulary, settings that contradict
    each other, and prompts that leave no room for a completion; see `loop.train` for the rest.
    """
    check_rollout_settings(config)
    prompts = with_room(prompts, lambda prompt: prompt, config)
    select_trainable(student, config.frozen)
    if sampler is None:
        longest = max(map(len, prompts)) + config.max_new_tokens
        sampler = EngineSampler(
            student, tokenizer, precision=config.precision, max_length=longest, keeps_memory=config.keep_sampler
        )
    stage = OnPolicyStage(student, teacher, prompts, config, sampler=sampler)
    return train(student, stage, config, directory=directory, progress=progress, title="on-policy")


def run(config: OnPolicyConfig) -> None:
    """`m1 on-policy`."""
    require(config, "model", "teacher", "out")
    check_rollout_settings(config)
    teacher_config = load_config(config.teacher)
    require_same_vocabulary(load_config(config.model), teacher_config, config.teacher)

    def read(tokenizer: PreTrainedTokenizerBase) -> tuple[list[list[int]], str]:
        require_same_tokenizer(tokenizer, config.teacher)
        texts = read_prompts(config.data, num_problems=config.num_problems, seed=config.seed, suffix=config.suffix)
        prompts = [prompt_ids(tokenizer, text) for text in texts]
        kept = with_room(prompts, lambda prompt: prompt, config)
        return kept, (
            f"{len(kept):,} prompts ({len(prompts) - len(kept):,} too long), {config.problems_per_step} × "
            f"{config.samples_per_problem} samples of up to {config.max_new_tokens:,} tokens a step"
        )

    run_training(
        "on-policy",
        config,
        read_data=read,
        train=lambda student, tokenizer, prompts, directory: distill_on_policy(
            student, load_teacher(config), tokenizer, prompts, config, directory=directory
        ),
        frozen=config.frozen,
        # The teacher, and the sampler's copy of the student, which has about its size.
        extra_bytes=2 * parameter_bytes(teacher_config, getattr(torch, config.precision).itemsize),
        next_command="m1 sft --model {out} --data …, or m1 grpo --model {out} --data …",
    )
