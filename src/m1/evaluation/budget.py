"""Sampling until a budget is used up or a vote is decided, and what voting was worth at every budget of a recorded run.

A budget is wall-clock seconds or generated tokens. Time is measured here, never computed from a throughput.
"""

import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from m1.evaluation.sampling import Generate, Sample, SampleRequest, Watch
from m1.evaluation.summary import correct_labels
from m1.reasoning.answers import extract_answer
from m1.reasoning.voting import AdaptiveVote

MOST_SAMPLES = 4096
"""Samples of one request: the engine's limit. A budget that has room for more is spent in rounds of so many."""


@dataclass(frozen=True, slots=True)
class Budget:
    """What a problem may cost: seconds of wall-clock, tokens generated (unfinished completions included), or both; None is
    no limit. Raises ValueError for one that is not positive."""

    seconds: float | None = None
    tokens: int | None = None

    def __post_init__(self) -> None:
        for name in ("seconds", "tokens"):
            value = getattr(self, name)
            if value is not None and not 0 < value < float("inf"):
                raise ValueError(f"--{name}: expected more than 0, got {value}")

    def __bool__(self) -> bool:
        return self.seconds is not None or self.tokens is not None


def parse_budgets(text: str, option: str = "budgets") -> list[float]:
    """Ascending budgets from a list with commas, none for an empty one. Raises ValueError for what is no positive number."""
    try:
        numbers = sorted({float(part) for part in text.split(",") if part.strip()})
    except ValueError as error:
        raise ValueError(f"{option}: expected numbers with commas between them, got {text!r}") from error
    if any(not 0 < number < float("inf") for number in numbers):
        raise ValueError(f"{option}: expected numbers above 0, got {text!r}")
    return numbers


class SampleUntil(Watch):
    """Collects the samples of one problem, in the order in which they finish, until the budget or the vote says stop.

    The clock starts when this is made, and is read at least once a step of the sampler, so a run ends within a step of its
    deadline; a sample that ends in that last step is late and left out. `ended_by` says why it ended: "samples" (all there
    were), "seconds", "tokens", or the adaptive vote's reason.
    """

    def __init__(
        self,
        budget: Budget | None = None,
        adaptive: AdaptiveVote | None = None,
        *,
        on_progress: Callable[["SampleUntil"], None] | None = None,
    ) -> None:
        self.budget, self.adaptive = budget or Budget(), adaptive
        self.samples: list[Sample] = []
        self.num_tokens = 0  # generated so far, those of unfinished completions included
        self.ended_by = "samples"
        self._on_progress = on_progress
        self._rounds_tokens = 0
        self._start = time.perf_counter()

    @property
    def seconds(self) -> float:
        return time.perf_counter() - self._start

    @property
    def is_ended(self) -> bool:
        return self.ended_by != "samples"

    def on_sample(self, request: int, sample: Sample) -> bool:
        spent = None if sample.tokens_spent is None else sample.tokens_spent + self._rounds_tokens
        self.num_tokens = max(self.num_tokens, spent or 0)
        seconds = self.seconds
        if self._ends_at(seconds, self.num_tokens, is_late=True):
            return True
        self.samples.append(replace(sample, seconds=seconds, tokens_spent=spent))
        if self._on_progress:
            self._on_progress(self)
        if self.adaptive is not None and self.adaptive.add(extract_answer(sample.text)):
            self.ended_by = self.adaptive.reason or "complete"
            return True
        return False

    def is_over(self, num_tokens: int) -> bool:
        self.num_tokens = self._rounds_tokens + num_tokens
        return self._ends_at(self.seconds, self.num_tokens, is_late=False)

    def _ends_at(self, seconds: float, tokens: int, *, is_late: bool) -> bool:
        """Whether the budget ends the sampling here: at its very end for what is yet to come, after it for what has come."""
        for name, used, limit in (("seconds", seconds, self.budget.seconds), ("tokens", tokens, self.budget.tokens)):
            if limit is not None and (used > limit if is_late else used >= limit) and not self.is_ended:
                self.ended_by = name
        return self.is_ended

    def end_round(self) -> None:
        self._rounds_tokens = self.num_tokens


def sample_until(generate: Generate, request: SampleRequest, watch: SampleUntil) -> list[Sample]:
    """Sample one prompt up to `request.n` times, until `watch` ends it: what had finished then, in order of finishing.

    More than `MOST_SAMPLES` are drawn in rounds with seeds of their own.
    """
    seed = request.params.get("seed")
    for start in range(0, request.n, MOST_SAMPLES):
        params = request.params if seed is None or not start else {**request.params, "seed": seed + start}
        num_before = len(watch.samples)
        generate([SampleRequest(request.prompt, min(MOST_SAMPLES, request.n - start), params)], watch)
        watch.samples[num_before:] = [replace(one, index=one.index + start) for one in watch.samples[num_before:]]
        watch.end_round()
        if watch.is_ended:
            break
    return watch.samples


def accuracy_at_budgets(
    records: Sequence[Mapping[str, Any]], budgets: Sequence[float], unit: str = "seconds"
) -> list[dict[str, Any]]:
    """What a vote was worth at each of `budgets`: for each problem, the majority of the samples that had finished by then.

    unit: "seconds" or "tokens". The samples of a record stand in order of finishing, and ties go to the answer that came
    first. A problem of which nothing had finished counts as wrong. Gives for each budget the `accuracy` with its
    `standard_error` over problems, the `coverage` (share of problems with a correct sample), and `mean_samples` finished.
    """
    field = {"seconds": "seconds", "tokens": "tokens_spent"}[unit]
    correct = [correct_labels(record) for record in records]
    points: list[dict[str, Any]] = []
    for budget in budgets:
        finished = [
            [label for label, sample in zip(one["labels"], one["samples"]) if sample[field] <= budget] for one in records
        ]
        right = [_majority_is_right(labels, of_record) for labels, of_record in zip(finished, correct)]
        covered = [any(of_record[label] for label in set(labels) - {-1}) for labels, of_record in zip(finished, correct)]
        error = float(np.std(right, ddof=1) / len(right) ** 0.5) if len(right) > 1 else None
        points.append(
            {
                "budget": float(budget),
                "accuracy": float(np.mean(right)),
                "standard_error": error,
                "coverage": float(np.mean(covered)),
                "mean_samples": float(np.mean([len(labels) for labels in finished])),
            }
        )
    return points


def vote_is_right(record: Mapping[str, Any]) -> bool:
    """Whether the majority of all of a problem's samples is right; ties go to the answer that stands first."""
    return _majority_is_right(record["labels"], correct_labels(record))


def _majority_is_right(labels: Sequence[int], correct: Sequence[bool]) -> bool:
    votes = Counter(label for label in labels if label >= 0)  # in order of first appearance, and max takes the first of equals
    return bool(votes) and correct[max(votes, key=votes.__getitem__)]
