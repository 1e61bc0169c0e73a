"""Groups: samples of one problem with their scores, drawn by all ranks together; advantages; what a step's groups were like.

Which groups a step wants and what it does with them is decided in `grpo.py`; sampling is in `rollouts.py`.
"""

import math
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from m1.config import GRPOConfig
from m1.reasoning.problems import Problem
from m1.reasoning.rewards import Score, Scorer
from m1.training.rollouts import ProblemStream, Sample, Sampler, mine, of_all, seeds_of

FULL_MARKS = 1.0
LEAST_USEFUL_SHARE = 0.25  # a refill never samples more than four problems for one group that is missing


@dataclass(frozen=True)
class Group:
    """A prompt, its samples, their scores, and the rewards that advantages are made of [samples]."""

    prompt: list[int]
    samples: list[Sample]
    scores: list[Score]
    rewards: np.ndarray

    @property
    def is_useful(self) -> bool:
        """Whether some sample scored otherwise than another."""
        return bool((self.rewards != self.rewards[0]).any())


@dataclass
class Draw:
    """All groups of a step in the order of their drawing, and the seconds this rank spent on them."""

    groups: list[Group] = field(default_factory=list)
    seconds_sampling: float = 0.0
    seconds_rewards: float = 0.0

    @property
    def num_useful(self) -> int:
        return sum(group.is_useful for group in self.groups)


class GroupSource:
    """Draws groups of one step after another; every rank samples and scores its share, and all get all groups."""

    def __init__(
        self,
        stream: ProblemStream[Problem],
        to_prompt: Callable[[Problem], list[int]],
        config: GRPOConfig,
        *,
        sampler: Sampler,
        scorer: Scorer,
    ) -> None:
        self.stream, self.to_prompt, self.config = stream, to_prompt, config
        self.sampler, self.scorer = sampler, scorer

    def draw(self, step: int) -> Draw:
        """`problems_per_step` groups, and with `refill` more of them until as many are useful or the limit is reached."""
        wanted, drawn = self.config.problems_per_step, Draw()
        limit = max(wanted, int(wanted * self.config.refill))
        while (missing := wanted - drawn.num_useful) > 0 and (room := limit - len(drawn.groups)) > 0:
            share = max(drawn.num_useful / len(drawn.groups), LEAST_USEFUL_SHARE) if drawn.groups else 1.0
            self._add_groups(drawn, step, min(room, math.ceil(missing / share)))
        return drawn

    def _add_groups(self, drawn: Draw, step: int, count: int) -> None:
        config, began = self.config, time.perf_counter()
        problems = self.stream.next_problems(count)
        prompts = [self.to_prompt(problem) for problem in problems]
        seeds = seeds_of(config.seed, step, len(drawn.groups), count=count)
        samples = self.sampler.sample(
            mine(prompts),
            seeds=mine(seeds),
            num_samples=config.samples_per_problem,
            max_new_tokens=config.max_new_tokens,
            temperature=config.temperature,
        )
        sampled = time.perf_counter()
        scores = iter(
            self.scorer.score_many(
                [problem for problem, group in zip(mine(problems), samples, strict=True) for _ in group],
                [sample.text for group in samples for sample in group],
            )
        )
        of_rank = [(group, [next(scores) for _ in group]) for group in samples]
        for prompt, (group, of_group) in zip(prompts, of_all(of_rank, count), strict=True):
            drawn.groups.append(Group(prompt, group, of_group, self._rewards(group, of_group)))
        drawn.seconds_sampling += sampled - began
        drawn.seconds_rewards += time.perf_counter() - sampled
        self._report_failures(drawn.groups[-count:])

    def _rewards(self, samples: Sequence[Sample], scores: Sequence[Score]) -> np.ndarray:
        """Scores less the penalty for length (soft overlong punishment, arXiv 2503.14476, eq. 13)."""
        rewards = np.array([score.reward for score in scores], dtype=np.float64)
        if self.config.overlong_buffer:
            lengths = np.array([len(sample.token_ids) for sample in samples])
            free = self.config.max_new_tokens - self.config.overlong_buffer
            rewards -= np.clip((lengths - free) / self.config.overlong_buffer, 0.0, 1.0)
        return rewards

    def _report_failures(self, groups: Sequence[Group]) -> None:
        reasons = {score.reason for group in groups for score in group.scores if score.reason is not None}
        for reason in sorted(reasons):  # a warning is shown once a reason
            warnings.warn(f"a reward could not be computed and counts as 0: {reason}", stacklevel=2)


def group_advantages(rewards: np.ndarray) -> np.ndarray:
    """(reward - mean) / (standard deviation + 1e-6) within each row of [problems, samples]; 0 where a row is constant."""
    centred = rewards - rewards.mean(1, keepdims=True)
    constant = (rewards == rewards[:, :1]).all(1, keepdims=True)
    return np.where(constant, 0.0, centred / (rewards.std(1, keepdims=True) + 1e-6))


def describe(drawn: Draw) -> dict[str, float]:
    """Metrics of what was sampled, all groups counted. pass_at_k: share of problems that one of the group solved."""
    groups = drawn.groups
    samples = [sample for group in groups for sample in group.samples]
    scores = np.array([[score.reward for score in group.scores] for group in groups])
    correct = scores >= FULL_MARKS
    num_tokens = sum(len(sample.token_ids) for sample in samples)
    return {
        "reward": float(scores.mean()),
        "pass_at_1": float(correct.mean()),
        "pass_at_k": float(correct.any(1).mean()),
        "length": num_tokens / len(samples),
        "truncated": float(np.mean([sample.is_truncated for sample in samples])),
        "groups": len(groups),
        "dropped_groups": 1 - drawn.num_useful / len(groups),
        "failed_rewards": sum(score.reason is not None for group in groups for score in group.scores),
        "seconds_sampling": round(drawn.seconds_sampling, 4),
        "seconds_rewards": round(drawn.seconds_rewards, 4),
        "sampled_tokens_per_second": round(num_tokens / drawn.seconds_sampling, 1),
    }
