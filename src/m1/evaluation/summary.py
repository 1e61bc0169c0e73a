"""From the records of an evaluation to its numbers. What each of them means is said in docs/evaluation.md."""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from m1.evaluation import metrics
from m1.evaluation.votes import CONFIDENCES

_FULL_REWARD = 1.0  # a sample is correct when its reward reaches this
VERIFIER_SCORE = "verifier_score"  # of a sample, where a verifier was asked
_SUBSETS = 100  # random subsets where a vote can't be counted exactly: the number of the M1 paper


def summarize(records: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Statistics of the records of one run, as plain JSON.

    `pass@1` with its `standard_error` and `sampling_error` (`metrics.MeanAccuracy`, None where undefined); `pass@k`, `maj@k`
    and, where samples have log-probs or a verifier's scores, the other `votes` (means over problems) for k = 1, 2, 4 ... n;
    `mean_tokens` a sample; the shares of samples cut off at the token limit (`truncation_rate`), without an answer
    (`no_answer_rate`), and whose score failed (`failed_score_rate`). Raises ValueError without records, or for a problem
    without samples.
    """
    if not records:
        raise ValueError("there are no records to summarize")
    correct = [[float(is_correct(sample)) for sample in record["samples"]] for record in records]
    accuracy = metrics.mean_accuracy(correct)
    num_samples = min(len(record["samples"]) for record in records)
    sizes = subset_sizes(num_samples)
    has_logprobs = all(sample.get("mean_logprob") is not None for record in records for sample in record["samples"])
    votes: dict[str, dict[str, float]] = {}
    if has_logprobs:
        for name, field in CONFIDENCES.items():
            votes[name] = _by_size(sizes, records, functools.partial(_weighted_majority, field))
            votes[f"best-{name}"] = _by_size(sizes, records, functools.partial(_best, field))
    scores = [sample.get(VERIFIER_SCORE) for record in records for sample in record["samples"]]
    if None not in scores:
        votes["best-verifier"] = _by_size(sizes, records, functools.partial(_best, VERIFIER_SCORE))
        if min(scores) >= 0:
            votes["verifier"] = _by_size(sizes, records, functools.partial(_weighted_majority, VERIFIER_SCORE))
    return {
        "num_problems": len(records),
        "num_samples": num_samples,
        "pass@1": accuracy.mean,
        "pass@1_standard_error": _finite(accuracy.standard_error),
        "pass@1_sampling_error": _finite(accuracy.sampling_error),
        "pass@k": _by_size(sizes, records, pass_at_k),
        "maj@k": _by_size(sizes, records, majority_at_k),
        "votes": votes,
        **sample_rates(records),
    }


def sample_rates(records: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Means over all samples of length, truncation, answers that are missing, and scores that failed."""
    samples = [sample for record in records for sample in record["samples"]]
    if not samples:
        return {"mean_tokens": 0.0, "truncation_rate": 0.0, "no_answer_rate": 0.0, "failed_score_rate": 0.0}
    return {
        "mean_tokens": float(np.mean([sample["num_tokens"] for sample in samples])),
        "truncation_rate": float(np.mean([sample["finish_reason"] == "length" for sample in samples])),
        "no_answer_rate": float(np.mean([sample["answer"] is None for sample in samples])),
        "failed_score_rate": float(np.mean([sample["reason"] is not None for sample in samples])),
    }


def is_correct(sample: Mapping[str, Any]) -> bool:
    return sample["reward"] >= _FULL_REWARD


def pass_at_k(record: Mapping[str, Any], k: int) -> float:
    """Unbiased estimate for one problem that one of k samples is correct."""
    return metrics.pass_at_k(len(record["samples"]), sum(map(is_correct, record["samples"])), k)


def majority_at_k(record: Mapping[str, Any], k: int) -> float:
    """Probability for one problem that the majority of k of its samples is correct: exact, or by subsampling beyond float64."""
    labels, correct = record["labels"], correct_labels(record)
    if not metrics.can_enumerate(len(labels), k):
        return metrics.majority_at_k_by_subsampling(labels, correct, k, repeats=_SUBSETS)
    return metrics.majority_at_k([labels.count(label) for label in range(len(correct))], correct, labels.count(-1), k)


def correct_labels(record: Mapping[str, Any]) -> list[bool]:
    """Which of a problem's distinct answers is right: the verdict on the first sample that gave it."""
    correct: dict[int, bool] = {}
    for label, sample in zip(record["labels"], record["samples"]):
        if label not in correct:
            correct[label] = is_correct(sample)
    return [correct[label] for label in range(max(correct, default=-1) + 1)]


def subset_sizes(num_samples: int) -> list[int]:
    """1, 2, 4 ... and `num_samples` itself; empty for 0."""
    return sorted({2**power for power in range(num_samples.bit_length())} | {num_samples}) if num_samples else []


def _weighted_majority(field: str, record: Mapping[str, Any], k: int) -> float:
    values = [sample[field] for sample in record["samples"]]
    weights = np.asarray(values) if field == VERIFIER_SCORE else np.exp(values)
    return metrics.majority_at_k_by_subsampling(
        record["labels"], correct_labels(record), k, repeats=_SUBSETS, weights=weights.tolist()
    )


def _best(field: str, record: Mapping[str, Any], k: int) -> float:
    """As `reasoning.voting.best_of_n`: samples without an answer come last."""
    ranked = sorted(record["samples"], key=lambda sample: (sample["answer"] is None, -sample[field]))
    return metrics.best_of_k([is_correct(sample) for sample in ranked], k)


def _by_size(
    sizes: Sequence[int], records: Sequence[Mapping[str, Any]], of_record: Callable[[Mapping[str, Any], int], float]
) -> dict[str, float]:
    return {str(k): float(np.mean([of_record(record, k) for record in records])) for k in sizes}


def _finite(value: float) -> float | None:
    return value if np.isfinite(value) else None
