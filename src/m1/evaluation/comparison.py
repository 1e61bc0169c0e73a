"""Is one model better than another? Paired tests over the problems that both were asked. Numpy only."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

_RESAMPLES = 10_000
_MOST_ENUMERATED = 16  # problems that differ; 2^16 sign patterns are few enough to go through
_CHUNK = 256  # resamples at a time, so that memory stays small


@dataclass(frozen=True, slots=True)
class PairedDifference:
    """How much the second of two models is better on the same problems.

    mean: mean over problems of (second - first). low, high: its 95 % interval by resampling problems (percentile bootstrap,
    Efron 1979): what other problems of the kind would give. p_value: two-sided sign-flip permutation test: how often a
    difference at least this large would come about if, on each problem, it were chance which model got which score; exact
    where at most 16 problems differ.
    """

    mean: float
    low: float
    high: float
    p_value: float
    num_problems: int


def paired_difference(first: Sequence[float], second: Sequence[float], *, seed: int = 0) -> PairedDifference:
    """Compare two models by their scores (shares of correct samples, or votes) on the same problems, in the same order.

    Raises ValueError unless both have a score for each of the same at least one problems.
    """
    if len(first) != len(second) or not len(first):
        raise ValueError(f"first and second must pair up over at least one problem, got {len(first)} and {len(second)} scores")
    differences = np.asarray(second, float) - np.asarray(first, float)
    generator = np.random.default_rng(seed)
    num_problems = len(differences)
    means = np.concatenate(
        [differences[generator.integers(0, num_problems, (size, num_problems))].mean(axis=1) for size in _chunks(_RESAMPLES)]
    )
    low, high = np.quantile(means, [0.025, 0.975])
    p_value = _sign_flip_p_value(differences, generator)
    return PairedDifference(float(differences.mean()), float(low), float(high), p_value, num_problems)


def _sign_flip_p_value(differences: np.ndarray, generator: np.random.Generator) -> float:
    differences = differences[differences != 0]
    if not len(differences):
        return 1.0
    # Sums of the same numbers in another order differ in their last bits; that must not decide what is "at least as large".
    reached = abs(differences.sum()) - 1e-9 * np.abs(differences).sum()
    if len(differences) <= _MOST_ENUMERATED:
        patterns = np.arange(2 ** len(differences))[:, None] >> np.arange(len(differences)) & 1
        return float((np.abs((2 * patterns - 1) @ differences) >= reached).mean())
    num_reached = sum(
        int((np.abs(generator.choice([-1.0, 1.0], (size, len(differences))) @ differences) >= reached).sum())
        for size in _chunks(_RESAMPLES)
    )
    return (num_reached + 1) / (_RESAMPLES + 1)


def _chunks(total: int) -> list[int]:
    return [min(_CHUNK, total - start) for start in range(0, total, _CHUNK)]
