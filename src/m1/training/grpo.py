"""GRPO: sample groups, score them, and raise the probability of what scored better than its group (arXiv 2402.03300, §4.1).

A step draws problems, samples a group of completions for each, and takes one or more updates on them. The gradient is the
mean over all tokens of an update; groups in which all score alike teach nothing and are dropped (arXiv 2503.14476). The
loss of a token is in `policy_loss.py`, sampling in `rollouts.py`, rewards in m1.reasoning.
Legend: N completion tokens of a batch.
"""

import copy
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from m1.config import GRPOConfig
from m1.modeling import M1ForCausalLM
from m1.reasoning.problems import Problem
from m1.reasoning.rewards import Scorer
from m1.training.command import run_training
from m1.training.data import prompt_ids
from m1.training.loop import Step, TrainResult, autocast, backpropagate, mean_over_targets, train
from m1.training.losses import TokenLogProbs, head_loss, target_states
from m1.training.optimizer import select_trainable
from m1.training.packing import Document, PackedBatch, best_fit, pack
from m1.training.policy_loss import PolicyLoss, PolicyTokens
from m1.training.rollouts import EngineSampler, ProblemStream, Sample, Sampler
from m1.training.run_directory import RunDirectory
from m1.training.sources import read_problem_set

FULL_MARKS = 1.0


@dataclass(frozen=True)
class Rollout:
    """A sampled completion of a prompt, and how much better it scored than its group, in standard deviations."""

    prompt: list[int]
    sample: Sample
    advantage: float

    @property
    def num_tokens(self) -> int:
        return len(self.prompt) + len(self.sample.token_ids)


@dataclass(frozen=True)
class PolicyBatch:
    """A `loop.Batch` of rollouts: packed prompts and completions, and what is known of the completions' tokens [N]."""

    packed: PackedBatch
    tokens: PolicyTokens

    @property
    def num_tokens(self) -> int:
        return self.packed.num_tokens

    @property
    def num_targets(self) -> int:
        return self.packed.num_targets

    @property
    def counts(self) -> bool:
        return self.packed.counts

    def to(self, device: torch.device) -> "PolicyBatch":
        return PolicyBatch(self.packed.to(device), self.tokens.to(device))

    def tensors(self) -> dict[str, Tensor]:
        return self.packed.tensors() | {name: tensor for name, tensor in vars(self.tokens).items() if tensor is not None}


class GRPOStage:
    """A `loop.Stage`: draws by sampling and scoring, with gradients of the clipped policy loss."""

    def __init__(
        self,
        model: M1ForCausalLM,
        tokenizer: PreTrainedTokenizerBase,
        problems: Sequence[Problem],
        config: GRPOConfig,
        *,
        sampler: Sampler,
        scorer: Scorer,
    ) -> None:
        self.model, self.tokenizer, self.config = model, tokenizer, config
        self.sampler, self.scorer = sampler, scorer
        self.stream = ProblemStream(problems, config.seed)
        self.reference = _frozen_copy(model, config.precision) if config.kl_weight else None

    def draw(self, step: int) -> Step:
        config, began = self.config, time.perf_counter()
        problems = self.stream.next_problems(config.problems_per_step)
        prompts = [_prompt(problem, self.tokenizer, config) for problem in problems]
        groups = self.sampler.sample(
            prompts,
            num_samples=config.samples_per_problem,
            max_new_tokens=config.max_new_tokens,
            temperature=config.temperature,
            seed=config.seed * 1_000_003 + step,
        )
        sampled = time.perf_counter()
        scores = self.scorer.score_many(
            [problem for problem, group in zip(problems, groups, strict=True) for _ in group],
            [sample.text for group in groups for sample in group],
        )
        rewards = np.array([score.reward for score in scores]).reshape(len(groups), -1)  # [problems, samples]
        scored = time.perf_counter()
        advantages = group_advantages(rewards)
        rollouts = [
            Rollout(prompt, sample, float(advantage))
            for prompt, group, of_group in zip(prompts, groups, advantages)
            if of_group.any()
            for sample, advantage in zip(group, of_group, strict=True)
        ]
        metrics = _describe(rewards, groups, num_failed=sum(score.reason is not None for score in scores))
        num_sampled = sum(len(sample.token_ids) for group in groups for sample in group)
        metrics |= {
            "seconds_sampling": round(sampled - began, 4),
            "seconds_rewards": round(scored - sampled, 4),
            "sampled_tokens_per_second": round(num_sampled / (sampled - began), 1),
        }
        return Step(self._updates(rollouts, step), metrics)

    def _updates(self, rollouts: list[Rollout], step: int) -> list[list[PolicyBatch]]:
        """The step's rollouts, shuffled into `updates_per_step` mini-batches of packed micro-batches."""
        order = np.random.default_rng([self.config.seed, step]).permutation(len(rollouts))
        parts = [part for part in np.array_split(order, self.config.updates_per_step) if len(part)]
        updates = []
        for part in parts:
            mine = [rollouts[i] for i in part]
            bins = best_fit([rollout.num_tokens for rollout in mine], self.config.tokens_per_batch)
            updates.append([pack_rollouts([mine[i] for i in bin_]) for bin_ in bins])
        old = self.model if len(updates) > 1 else None  # with one update, the log-probs in its own forward are the old ones
        return [[self._with_log_probs(batch, old) for batch in batches] for batches in updates]

    def _with_log_probs(self, batch: PolicyBatch, old: M1ForCausalLM | None) -> PolicyBatch:
        """The batch with log-probs of the policy `old` and of the reference, where there are such."""
        known: dict[str, Tensor] = {}
        for name, model in (("old_log_probs", old), ("reference_log_probs", self.reference)):
            if model is not None:
                known[name] = self._log_probs(model, batch.packed)
        return replace(batch, tokens=replace(batch.tokens, **known)) if known else batch

    @torch.no_grad()
    def _log_probs(self, model: M1ForCausalLM, batch: PackedBatch) -> Tensor:
        batch = batch.to(model.device)
        recorder = TokenLogProbs(batch.targets, self.config.temperature)
        with autocast(self.config.precision, model.device):
            head_loss(recorder, target_states(model, batch))
        return recorder.log_probs

    def backward(self, batch: PolicyBatch, num_targets: float) -> dict[str, Tensor]:
        config = self.config
        loss = PolicyLoss(
            batch.tokens,
            clip_low=config.clip_low,
            clip_high=config.clip_high,
            importance_cap=config.importance_cap,
            temperature=config.temperature,
            entropy_weight=config.entropy_weight,
            kl_weight=config.kl_weight,
        )
        sums = head_loss(loss, target_states(self.model, batch.packed))
        backpropagate(sums["loss"] / num_targets)
        return {name: value.detach() for name, value in sums.items()}

    def summarise(self, sums: dict[str, float], num_targets: int) -> dict[str, float]:
        means = mean_over_targets(sums, num_targets)
        summary = {"loss": means["loss"], "entropy": means["entropy"], "clip_share": means["clipped"]}
        summary |= {"log_prob_gap": means["gap"], "importance_weight": means["importance"]}
        return summary | ({"kl": means["kl"]} if self.reference is not None else {})

    def state_dict(self) -> dict[str, Any]:
        return self.stream.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.stream.load_state_dict(state)


def group_advantages(rewards: np.ndarray) -> np.ndarray:
    """(reward - mean) / (standard deviation + 1e-6) within each row of [problems, samples]; 0 where a row is constant."""
    centred = rewards - rewards.mean(1, keepdims=True)
    constant = (rewards == rewards[:, :1]).all(1, keepdims=True)
    return np.where(constant, 0.0, centred / (rewards.std(1, keepdims=True) + 1e-6))


def pack_rollouts(rollouts: Sequence[Rollout]) -> PolicyBatch:
    """Rollouts side by side; every completion token is a target, in the order of the tensors of `PolicyTokens`."""
    packed = pack(
        [
            Document(
                np.array(rollout.prompt + rollout.sample.token_ids, dtype=np.int32),
                np.arange(rollout.num_tokens) >= len(rollout.prompt),
            )
            for rollout in rollouts
        ]
    )
    advantages = [rollout.advantage for rollout in rollouts for _ in rollout.sample.token_ids]
    log_probs = [value for rollout in rollouts for value in rollout.sample.log_probs]
    return PolicyBatch(packed, PolicyTokens(packed.targets, torch.tensor(advantages), torch.tensor(log_probs)))


def _describe(rewards: np.ndarray, groups: Sequence[Sequence[Sample]], num_failed: int) -> dict[str, float]:
    """Metrics of what was sampled, all groups counted. pass_at_k: share of problems that one of the group solved."""
    samples = [sample for group in groups for sample in group]
    correct = rewards >= FULL_MARKS
    return {
        "reward": float(rewards.mean()),
        "pass_at_1": float(correct.mean()),
        "pass_at_k": float(correct.any(1).mean()),
        "length": float(np.mean([len(sample.token_ids) for sample in samples])),
        "truncated": float(np.mean([sample.is_truncated for sample in samples])),
        "dropped_groups": float((rewards == rewards[:, :1]).all(1).mean()),
        "failed_rewards": num_failed,
    }


def _prompt(problem: Problem, tokenizer: PreTrainedTokenizerBase, config: GRPOConfig) -> list[int]:
    return prompt_ids(tokenizer, problem.problem + config.suffix)


def _frozen_copy(model: M1ForCausalLM, precision: str) -> M1ForCausalLM:
    return copy.deepcopy(model).to(getattr(torch, precision)).requires_grad_(False).eval()


def grpo(
    model: M1ForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    problems: Sequence[Problem],
    config: GRPOConfig,
    *,
    sampler: Sampler | None = None,
    scorer: Scorer | None = None,
    directory: RunDirectory | None = None,
    progress: bool = True,
) -> TrainResult:
    """Reinforce `model` (fp32 weights) in place on `problems`, sampling with the engine unless a `sampler` is given.

    Raises ValueError for settings that contradict each other, prompts that leave no room for a completion, and a reward that
    does not exist; see `loop.train` for the rest.
    """
    check_settings(config)
    problems = with_room(problems, tokenizer, config)
    select_trainable(model, config.frozen)
    with ExitStack() as owned:
        scorer = owned.enter_context(Scorer()) if scorer is None else scorer
        if sampler is None:
            longest = max(len(_prompt(problem, tokenizer, config)) for problem in problems) + config.max_new_tokens
            sampler = EngineSampler(model, tokenizer, precision=config.precision, max_length=longest)
        stage = GRPOStage(model, tokenizer, problems, config, sampler=sampler, scorer=scorer)
        return train(model, stage, config, directory=directory, progress=progress, title="grpo")


def check_settings(config: GRPOConfig) -> None:
    """ValueError for settings that can't work together."""
    for name, least in (("problems_per_step", 1), ("samples_per_problem", 2), ("updates_per_step", 1), ("max_new_tokens", 1)):
        if getattr(config, name) < least:
            raise ValueError(f"--{name.replace('_', '-')}: expected at least {least}, got {getattr(config, name)}")
    if config.temperature <= 0:
        raise ValueError(f"--temperature: expected more than 0, so that samples differ, got {config.temperature}")
    if config.max_new_tokens >= config.max_length:
        raise ValueError(
            f"--max-new-tokens {config.max_new_tokens} leaves no room for a prompt within --max-length {config.max_length}"
        )


def with_room(problems: Sequence[Problem], tokenizer: PreTrainedTokenizerBase, config: GRPOConfig) -> list[Problem]:
    """The problems whose prompt and `max_new_tokens` fit into `max_length`; ValueError if there is none."""
    room = config.max_length - config.max_new_tokens
    kept = [problem for problem in problems if len(_prompt(problem, tokenizer, config)) <= room]
    if not kept:
        raise ValueError(
            f"data: no problem's prompt leaves room for --max-new-tokens {config.max_new_tokens} within --max-length "
            f"{config.max_length}"
        )
    return kept


def run(config: GRPOConfig) -> None:
    """`m1 grpo`."""
    check_settings(config)
    with Scorer() as scorer:

        def read(tokenizer: PreTrainedTokenizerBase) -> tuple[list[Problem], str]:
            problems = read_problem_set(config.data, num_problems=config.num_problems, seed=config.seed, reward=config.reward)
            kept = with_room(problems, tokenizer, config)
            first_of_each = {problem.reward: problem for problem in kept}
            scorer.score_many(list(first_of_each.values()), [""] * len(first_of_each))  # a reward that is not there says so now
            samples = config.problems_per_step * config.samples_per_problem
            return kept, (
                f"{len(kept):,} problems ({len(problems) - len(kept):,} too long), {config.problems_per_step} × "
                f"{config.samples_per_problem} = {samples:,} samples of up to {config.max_new_tokens:,} tokens a step"
            )

        run_training(
            "grpo",
            config,
            read_data=read,
            train=lambda model, tokenizer, problems, directory: grpo(
                model, tokenizer, problems, config, scorer=scorer, directory=directory
            ),
            frozen=config.frozen,
            next_command="m1 solve --model {out} …",
        )
