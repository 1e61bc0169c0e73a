"""Choosing one answer from many samples: grouping by equality, majority and weighted votes, best of n, stopping early.

What makes two answers equal is passed in as a callable (`Verifier.are_same`); models and time limits are not known here.
An answer is a string, or None where a sample gave none; None belongs to no group and wins only where nothing else can.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

Equal = Callable[[str, str], bool]
Weights = Sequence[float] | Callable[[int], float]


@dataclass(frozen=True, slots=True)
class AnswerGroup:
    """Samples with the same answer: the spelling of the earliest, the samples' indices (ascending), and their weight."""

    answer: str
    indices: tuple[int, ...]
    weight: float


@dataclass(frozen=True, slots=True)
class Vote:
    """The outcome of a vote.

    `share` is the winner's part of the weight of all samples, those without an answer included; `groups` are ranked, the
    winner first; `winner_index` is the sample to show: the heaviest of the winning group, the earliest among equals. With
    no answers at all `answer` is None, `share` 0, and `winner_index` the heaviest sample, or None without samples.
    """

    answer: str | None
    share: float
    groups: tuple[AnswerGroup, ...]
    winner_index: int | None


def group_answers(answers: Sequence[str | None], equal: Equal) -> list[list[int]]:
    """Indices of equal answers, group by group, in order of first appearance; None belongs to none.

    Each answer joins the first group whose earliest member it equals, so grouping is transitive even where `equal` is not.
    The same spelling is compared only once.
    """
    groups: list[list[int]] = []
    group_of_spelling: dict[str, list[int]] = {}
    for index, answer in enumerate(answers):
        if answer is None:
            continue
        group = group_of_spelling.get(answer)
        if group is None:
            group = next((group for group in groups if equal(_first(answers, group), answer)), None)
        if group is None:
            group = []
            groups.append(group)
        group_of_spelling[answer] = group
        group.append(index)
    return groups


def majority_vote(answers: Sequence[str | None], equal: Equal, weights: Weights | None = None) -> Vote:
    """The answer with the most votes, or the most weight (Wang et al. 2022, self-consistency, arXiv 2203.11171).

    `weights` has a finite, non-negative number for each sample (`logprob_weights`, or `weights(index)` of a verifier or
    reward model); None counts each sample once. Ties go to the group with more samples, then to the one whose first sample
    came earliest, so the same samples in the same order always give the same winner. Raises ValueError for bad weights.
    """
    sample_weights = _weights_of(answers, weights)
    groups = [
        AnswerGroup(_first(answers, indices), tuple(indices), math.fsum(sample_weights[index] for index in indices))
        for indices in group_answers(answers, equal)
    ]
    groups.sort(key=lambda group: (-group.weight, -len(group.indices), group.indices[0]))
    candidates = groups[0].indices if groups else range(len(answers))
    winner_index = max(candidates, key=lambda index: (sample_weights[index], -index), default=None)
    if not groups:
        return Vote(None, 0.0, (), winner_index)
    total = math.fsum(sample_weights)
    return Vote(groups[0].answer, groups[0].weight / total if total else 0.0, tuple(groups), winner_index)


def best_of_n(answers: Sequence[str | None], scores: Weights) -> int | None:
    """Index of the sample with the highest score; the earliest among equals; one without an answer only if none has one.

    `scores` is a finite number for each sample, of any sign, or a callable on its index. None without samples.
    """
    values = _numbers_of(answers, scores, "scores")
    return max(range(len(answers)), key=lambda index: (answers[index] is not None, values[index], -index), default=None)


def logprob_weights(mean_logprobs: Sequence[float]) -> list[float]:
    """Voting weights exp(mean log-prob per token): the length-normalised likelihoods of Wang et al. 2022, section 3.1."""
    for index, logprob in enumerate(mean_logprobs):
        if not logprob <= 0:
            raise ValueError(f"mean_logprobs[{index}] must be at most 0, got {logprob}")
    return [math.exp(logprob) for logprob in mean_logprobs]


@dataclass
class AdaptiveVote:
    """A majority vote fed one sample at a time that says when the rest need not be drawn.

    It is decided when no outcome of the remaining of `num_samples` could change the winner (by `majority_vote`'s rule, so
    the result is exactly that of the full vote), or when the leader is the most likely answer of the model with posterior
    probability of at least `confidence`: for the two leading answers with a and b votes and a uniform prior,
    P(p_a > p_b) = P(Beta(a + 1, b + 1) > 1/2) (Aggarwal et al. 2023, Adaptive-Consistency, arXiv 2305.11860). With
    `confidence` 1 only the first rule applies. Samples without an answer use up the budget and vote for nothing.
    """

    num_samples: int
    equal: Equal
    confidence: float = 0.95
    answers: list[str | None] = field(default_factory=list, init=False)
    _groups: list[list[int]] = field(default_factory=list, init=False)  # as in `group_answers`

    def __post_init__(self) -> None:
        if self.num_samples < 1:
            raise ValueError(f"num_samples must be at least 1, got {self.num_samples}")
        if not 0.5 < self.confidence <= 1:
            raise ValueError(f"confidence must be above 0.5 and at most 1, got {self.confidence}")

    def add(self, answer: str | None) -> bool:
        """Count one more sample; returns `is_decided`. Samples may be added after the decision, up to any number."""
        self.answers.append(answer)
        if answer is not None:
            index = len(self.answers) - 1
            for group in self._groups:
                if self.equal(_first(self.answers, group), answer):
                    group.append(index)
                    break
            else:
                self._groups.append([index])
        return self.is_decided

    @property
    def is_decided(self) -> bool:
        return self.reason is not None

    @property
    def reason(self) -> str | None:
        """Why sampling may stop ("complete", "cannot be overtaken", "confident"), or None while it may not."""
        remaining = self.num_samples - len(self.answers)
        if remaining <= 0:
            return "complete"
        if not self._groups:
            return None
        leader, *others = sorted(self._groups, key=lambda group: (-len(group), group[0]))
        # A group that wins ties needs one sample less than one that loses them; an answer not seen yet loses them.
        needed = [len(leader) - len(group) + (group[0] > leader[0]) for group in others] + [len(leader) + 1]
        if remaining < min(needed):
            return "cannot be overtaken"
        runner_up = len(others[0]) if others else 0
        if self.confidence < 1 and probability_of_lead(len(leader), runner_up) >= self.confidence:
            return "confident"
        return None

    def vote(self) -> Vote:
        """The majority vote over the samples so far."""
        return majority_vote(self.answers, self.equal)


def probability_of_lead(leader: int, runner_up: int) -> float:
    """P(p > 1/2) for p ~ Beta(leader + 1, runner_up + 1), exactly: P(Binomial(leader + runner_up + 1, 1/2) <= leader)."""
    trials = leader + runner_up + 1
    return sum(math.comb(trials, successes) for successes in range(leader + 1)) / 2**trials


def _first(answers: Sequence[str | None], group: Sequence[int]) -> str:
    answer = answers[group[0]]
    assert answer is not None
    return answer


def _weights_of(answers: Sequence[str | None], weights: Weights | None) -> list[float]:
    if weights is None:
        return [1.0] * len(answers)
    values = _numbers_of(answers, weights, "weights")
    for index, value in enumerate(values):
        if value < 0:
            raise ValueError(f"weights[{index}] must not be negative, got {value}; for log-probs use logprob_weights")
    return values


def _numbers_of(answers: Sequence[str | None], numbers: Weights, name: str) -> list[float]:
    values = [float(numbers(index)) for index in range(len(answers))] if callable(numbers) else list(map(float, numbers))
    if len(values) != len(answers):
        raise ValueError(f"{name} must have a number for each of the {len(answers)} answers, got {len(values)}")
    for index, value in enumerate(values):
        if not math.isfinite(value):
            raise ValueError(f"{name}[{index}] must be finite, got {value}")
    return values
