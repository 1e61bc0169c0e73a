"""GRPO: sample groups, score them, and raise the probability of what scored better than its group (arXiv 2402.03300, §4.1).

A step draws groups (`groups.py`) and takes one or more updates on them. The gradient is the mean over all tokens of an
update, of all ranks; groups in which all score alike teach nothing and are dropped, or replaced by others (arXiv 2503.14476).
The loss of a token is in `policy_loss.py`, sampling in `rollouts.py`, rewards in m1.reasoning.
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

from m1.config import GRPOConfig, require
from m1.distributed import share
from m1.modeling import M1ForCausalLM
from m1.modeling.loading import load_config
from m1.reasoning.problems import Problem
from m1.reasoning.rewards import Scorer
from m1.training.command import parameter_bytes, run_training
from m1.training.data import prompt_ids
from m1.training.groups import GroupSource, describe, group_advantages
from m1.training.loop import Step, TrainResult, autocast, backpropagate, mean_over_targets, train
from m1.training.losses import TokenLogProbs, head_loss, target_states
from m1.training.optimizer import select_trainable
from m1.training.packing import AnnotatedBatch, Document, PackedBatch, best_fit, pack
from m1.training.policy_loss import PolicyLoss, PolicyTokens
from m1.training.rollouts import EngineSampler, ProblemStream, Sample, Sampler, check_rollout_settings, with_room
from m1.training.run_directory import RunDirectory
from m1.training.sharding import forget_gathered
from m1.training.sources import read_problem_set


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
class PolicyBatch(AnnotatedBatch):
    """A `loop.Batch` of rollouts: packed prompts and completions, and what is known of the completions' tokens [N]."""

    tokens: PolicyTokens

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
        self.stream = ProblemStream(problems, config.seed)
        self.source = GroupSource(
            self.stream, lambda problem: _prompt(problem, tokenizer, config), config, sampler=sampler, scorer=scorer
        )
        self.reference = _frozen_copy(model, config.precision) if config.kl_weight else None
        self._drawn_at, self._num_drawn = 0.0, 0  # when training on the drawn samples began, and on how many tokens

    def draw(self, step: int) -> Step:
        drawn = self.source.draw(step)
        useful = [group for group in drawn.groups if group.is_useful][: self.config.problems_per_step]
        rollouts = [
            Rollout(group.prompt, sample, float(advantage))
            for group in useful
            for sample, advantage in zip(group.samples, group_advantages(group.rewards[None])[0], strict=True)
            if self.config.overlong == "keep" or not sample.is_truncated
        ]
        self._drawn_at, self._num_drawn = time.perf_counter(), sum(rollout.num_tokens for rollout in rollouts)
        return Step(self._updates(rollouts, step), describe(drawn))

    def _updates(self, rollouts: list[Rollout], step: int) -> list[list[PolicyBatch]]:
        """The step's rollouts, shuffled into `updates_per_step` mini-batches of packed micro-batches: this rank's share."""
        order = np.random.default_rng([self.config.seed, step]).permutation(len(rollouts))
        parts = [part for part in np.array_split(order, self.config.updates_per_step) if len(part)]
        updates = []
        for part in parts:
            chosen = [rollouts[i] for i in part]
            bins = best_fit([rollout.num_tokens for rollout in chosen], self.config.tokens_per_batch)
            updates.append([pack_rollouts([chosen[i] for i in bin_], counts=counts) for bin_, counts in share(bins)])
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
        forget_gathered(model)  # what a divided model gathered without gradients must not serve the forward that has them
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
        seconds = time.perf_counter() - self._drawn_at
        summary |= {
            "seconds_training": round(seconds, 4),
            "trained_tokens_per_second": round(self._num_drawn / seconds, 1),
        }
        return summary | ({"kl": means["kl"]} if self.reference is not None else {})

    def state_dict(self) -> dict[str, Any]:
        return self.stream.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.stream.load_state_dict(state)


def pack_rollouts(rollouts: Sequence[Rollout], *, counts: bool = True) -> PolicyBatch:
    """Rollouts side by side; every completion token is a target, in the order of the tensors of `PolicyTokens`."""
    packed = pack(
        [
            Document(
                np.array(rollout.prompt + rollout.sample.token_ids, dtype=np.int32),
                np.arange(rollout.num_tokens) >= len(rollout.prompt),
            )
            for rollout in rollouts
        ],
        counts=counts,
    )
    lengths = [len(rollout.sample.token_ids) for rollout in rollouts]
    advantages = np.repeat(np.array([rollout.advantage for rollout in rollouts], dtype=np.float32), lengths)
    log_probs = np.concatenate([np.array(rollout.sample.log_probs, dtype=np.float32) for rollout in rollouts])
    return PolicyBatch(packed, PolicyTokens(packed.targets, torch.from_numpy(advantages), torch.from_numpy(log_probs)))


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
    problems = with_room(problems, lambda problem: _prompt(problem, tokenizer, config), config)
    select_trainable(model, config.frozen)
    with ExitStack() as owned:
        scorer = owned.enter_context(Scorer()) if scorer is None else scorer
        if sampler is None:
            longest = max(len(_prompt(problem, tokenizer, config)) for problem in problems) + config.max_new_tokens
            sampler = EngineSampler(
                model, tokenizer, precision=config.precision, max_length=longest, keeps_memory=config.keep_sampler
            )
        stage = GRPOStage(model, tokenizer, problems, config, sampler=sampler, scorer=scorer)
        return train(model, stage, config, directory=directory, progress=progress, title="grpo")


def check_settings(config: GRPOConfig) -> None:
    """ValueError for settings that can't work together."""
    check_rollout_settings(config)
    for name, least in (("samples_per_problem", 2), ("updates_per_step", 1), ("refill", 1), ("overlong_buffer", 0)):
        if getattr(config, name) < least:
            raise ValueError(f"--{name.replace('_', '-')}: expected at least {least}, got {getattr(config, name)}")
    if not 0 <= config.pass_rates[0] <= config.pass_rates[1] <= 1:
        raise ValueError(f"--pass-rates: expected two shares, the smaller first, got {config.pass_rates}")
    if config.overlong_buffer > config.max_new_tokens:
        raise ValueError(
            f"--overlong-buffer: expected at most --max-new-tokens {config.max_new_tokens}, got {config.overlong_buffer}"
        )


def within_pass_rates(problems: Sequence[Problem], config: GRPOConfig) -> list[Problem]:
    """The problems of which a share of samples within `pass_rates` was correct, or that nobody sampled; ValueError if none."""
    least, most = config.pass_rates
    kept = [problem for problem in problems if least <= problem.metadata.get("pass_rate", least) <= most]
    if not kept:
        raise ValueError(f"data: no problem has a share of correct samples within --pass-rates {least:g} {most:g}")
    return kept


def run(config: GRPOConfig) -> None:
    """`m1 grpo`."""
    require(config, "model", "out")
    check_settings(config)
    # Beside the model that trains: the sampler's copy, where it samples in another type, and the one that the KL holds on to.
    itemsize = getattr(torch, config.precision).itemsize
    copies = (config.precision != "float32") + bool(config.kl_weight)
    with Scorer() as scorer:

        def read(tokenizer: PreTrainedTokenizerBase) -> tuple[list[Problem], str]:
            problems = read_problem_set(config.data, num_problems=config.num_problems, seed=config.seed, reward=config.reward)
            num_read = len(problems)
            kept = within_pass_rates(problems, config)
            kept = with_room(kept, lambda problem: _prompt(problem, tokenizer, config), config)
            first_of_each = {problem.reward: problem for problem in kept}
            scorer.score_many(list(first_of_each.values()), [""] * len(first_of_each))  # a reward that is not there says so now
            samples = config.problems_per_step * config.samples_per_problem
            return kept, (
                f"{len(kept):,} problems ({num_read - len(kept):,} too easy, hard or long), {config.problems_per_step} × "
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
            extra_bytes=parameter_bytes(load_config(config.model), itemsize * copies),
            next_command="m1 solve --model {out} …",
        )
