"""Statistics of sampled answers: pass@k, maj@k, standard errors. Numpy only; what the numbers count is decided elsewhere.

Legend: N problems, n samples of a problem, c of them correct, k the number drawn without replacement from the n.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

_MOST_SUBSETS = 10**300


def pass_at_k(num_samples: int, num_correct: int, k: int) -> float:
    """Unbiased estimate of the probability that at least one of k samples is correct: 1 - C(n-c, k) / C(n, k).

    Chen et al. 2021 (arXiv 2107.03374), equation 1, as a sum of logarithms: the quotient is the product over
    i = n-c+1 .. n of (1 - k/i), and 1 minus it is taken by expm1, so neither large n nor small results lose digits.
    Raises ValueError unless 0 <= c <= n and 1 <= k <= n.
    """
    _require_counts(num_samples, num_correct, k)
    if num_samples - num_correct < k:
        return 1.0
    misses = np.arange(num_samples - num_correct + 1, num_samples + 1)
    return float(-np.expm1(np.log1p(-k / misses).sum()))


@dataclass(frozen=True, slots=True)
class MeanAccuracy:
    """pass@1 over a benchmark with two standard errors.

    `standard_error` is for other problems of the same kind: clustered by problem, that is the standard deviation of the
    problems' means over sqrt(N) (Miller 2024, arXiv 2411.00640, sections 2.1 and 2.2). `sampling_error` is for other samples
    on the same problems; it is what tells two runs on one benchmark apart. Either is NaN where it can't be estimated (one
    problem; one sample of a problem).
    """

    mean: float
    standard_error: float
    sampling_error: float


def mean_accuracy(rewards: Sequence[Sequence[float]]) -> MeanAccuracy:
    """pass@1: the mean over problems of the mean over their samples. `rewards` is [N][n], n may differ by problem."""
    if not rewards or not all(len(samples) for samples in rewards):
        raise ValueError("rewards must hold at least one problem and at least one sample for each")
    means = np.array([np.mean(samples) for samples in rewards])
    num_problems = len(means)
    standard_error = float(means.std(ddof=1) / math.sqrt(num_problems)) if num_problems > 1 else math.nan
    if min(len(samples) for samples in rewards) > 1:
        variances = [np.var(samples, ddof=1) / len(samples) for samples in rewards]
        sampling_error = math.sqrt(math.fsum(variances)) / num_problems
    else:
        sampling_error = math.nan
    return MeanAccuracy(float(means.mean()), standard_error, sampling_error)


def majority_at_k(group_sizes: Sequence[int], is_correct: Sequence[bool], num_unanswered: int, k: int) -> float:
    """Exact probability that the majority of k samples, drawn without replacement, is correct; ties are drawn by lot.

    `group_sizes` has the number of samples with each distinct answer, `is_correct` says which answers are right, and
    `num_unanswered` samples gave none and vote for nothing. This is what repeated subsampling estimates, with ties going to
    the answer drawn first. For each correct group and each number m of its votes, counts the ways to draw the rest with no
    group above m, by the number of ties. All terms are positive, so float64 is exact to about 1e-12; sizes are limited by
    `can_enumerate`. Raises ValueError for impossible counts.
    """
    if len(group_sizes) != len(is_correct) or any(size < 1 for size in group_sizes) or num_unanswered < 0:
        raise ValueError("group_sizes must be positive and pair up with is_correct; num_unanswered must not be negative")
    num_samples = sum(group_sizes) + num_unanswered
    _require_counts(num_samples, 0, k)
    if not can_enumerate(num_samples, k):
        raise ValueError(f"C({num_samples}, {k}) is beyond float64; use majority_at_k_by_subsampling")
    favourable = 0.0
    for group, size in enumerate(group_sizes):
        if not is_correct[group]:
            continue
        others = [other_size for other, other_size in enumerate(group_sizes) if other != group]
        for votes in range(1, min(size, k) + 1):
            ways = _ways_below(others, num_unanswered, votes, k - votes)
            favourable += math.comb(size, votes) * float((ways / np.arange(1, len(ways) + 1)).sum())
    return favourable / math.comb(num_samples, k)


def can_enumerate(num_samples: int, k: int) -> bool:
    """Whether `majority_at_k` can count the C(n, k) subsets in float64: always up to n = 1000."""
    return math.comb(num_samples, k) <= _MOST_SUBSETS


def _ways_below(sizes: Sequence[int], num_unanswered: int, most_votes: int, num_drawn: int) -> np.ndarray:
    """Ways to draw `num_drawn` samples, at most `most_votes` of each group, by how many groups reach that. [ties + 1]"""
    ways = np.zeros((num_drawn // most_votes + 1, num_drawn + 1))  # [ties, drawn]
    ways[0, : num_unanswered + 1] = [math.comb(num_unanswered, drawn) for drawn in range(min(num_unanswered, num_drawn) + 1)]
    for size in sizes:
        updated = ways.copy()
        for votes in range(1, min(size, most_votes, num_drawn) + 1):
            added = math.comb(size, votes) * ways[:, : num_drawn + 1 - votes]
            if votes < most_votes:
                updated[:, votes:] += added
            else:
                updated[1:, votes:] += added[:-1]
        ways = updated
    return ways[:, num_drawn]


def majority_at_k_by_subsampling(
    labels: Sequence[int],
    is_correct: Sequence[bool],
    k: int,
    *,
    repeats: int = 100,
    seed: int = 0,
    weights: Sequence[float] | None = None,
) -> float:
    """Share of `repeats` random subsets of k samples whose (weighted) majority is correct: the M1 paper's maj@k protocol.

    `labels` [n] names each sample's answer by a number, -1 for none; `is_correct` is indexed by label; `weights` [n] are
    voting weights, 1 by default. Ties go to the answer drawn first, as in `reasoning.voting`. The same seed gives the same
    subsets. For unweighted votes `majority_at_k` gives the expectation of this without its noise.
    """
    names, own_weights = np.asarray(labels), np.ones(len(labels)) if weights is None else np.asarray(weights, float)
    _require_counts(len(labels), 0, k)
    if own_weights.shape != names.shape or not (own_weights >= 0).all():
        raise ValueError(f"weights must be {len(labels)} numbers of at least 0, got shape {own_weights.shape}")
    num_groups = int(names.max(initial=-1)) + 1
    if num_groups == 0:
        return 0.0
    order = np.tile(np.arange(len(names)), (repeats, 1))
    drawn = np.random.default_rng(seed).permuted(order, axis=1)[:, :k]  # [repeats, k]
    subset, place = np.nonzero(names[drawn] >= 0)
    ballots = (subset, names[drawn[subset, place]])
    totals, sizes, first = np.zeros((3, repeats, num_groups))
    first += k
    np.add.at(totals, ballots, own_weights[drawn[subset, place]])
    np.add.at(sizes, ballots, 1)
    np.minimum.at(first, ballots, place)
    # A group without votes must not win by an equal total of zero: its size, the second key, loses.
    winners = np.lexsort((first, -sizes, -totals), axis=-1)[:, 0]
    is_right = np.asarray(is_correct, bool)[winners] & (sizes[np.arange(repeats), winners] > 0)
    return float(is_right.mean())


def best_of_k(is_correct: Sequence[bool], k: int) -> float:
    """Exact probability that the best of k samples, drawn without replacement, is correct; `is_correct` is from best to worst.

    Sample j (from 0) is the best of a subset if it is drawn and none before it is: k / (n - j) times the product over i < j
    of (1 - k / (n - i)). Raises ValueError unless 1 <= k <= n.
    """
    num_samples = len(is_correct)
    _require_counts(num_samples, 0, k)
    total, none_before = 0.0, 1.0
    for place, correct in enumerate(is_correct[: num_samples - k + 1]):
        share = k / (num_samples - place)
        total += none_before * share * bool(correct)
        none_before *= 1 - share
    return total


def _require_counts(num_samples: int, num_correct: int, k: int) -> None:
    if not 0 <= num_correct <= num_samples:
        raise ValueError(f"num_correct must be between 0 and num_samples = {num_samples}, got {num_correct}")
    if not 1 <= k <= num_samples:
        raise ValueError(f"k must be between 1 and num_samples = {num_samples}, got {k}; draw more samples or ask a smaller k")
