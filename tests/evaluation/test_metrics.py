"""pass@k and maj@k against enumeration and closed forms; standard errors against simulation."""

import itertools
import math
import random
from fractions import Fraction

import numpy as np
import pytest

from m1.evaluation.metrics import (
    best_of_k,
    can_enumerate,
    majority_at_k,
    majority_at_k_by_subsampling,
    mean_accuracy,
    pass_at_k,
)

EXACT = 1e-12  # float64 rounding over some hundred terms


def test_pass_at_k_against_enumeration():
    for num_samples in range(1, 9):
        for num_correct in range(num_samples + 1):
            for k in range(1, num_samples + 1):
                subsets = list(itertools.combinations(range(num_samples), k))
                hits = sum(min(subset) < num_correct for subset in subsets)
                assert pass_at_k(num_samples, num_correct, k) == pytest.approx(hits / len(subsets), abs=EXACT)


@pytest.mark.parametrize(
    ("num_samples", "num_correct", "k"), [(200, 3, 100), (10_000, 7, 64), (10_000, 5_000, 3), (10**6, 2, 10)]
)
def test_pass_at_k_against_the_product_formula_at_large_n(num_samples, num_correct, k):
    exact = 1 - math.prod((Fraction(num_samples - num_correct - i, num_samples - i) for i in range(k)), start=Fraction(1))
    assert pass_at_k(num_samples, num_correct, k) == pytest.approx(float(exact), rel=1e-10)


def test_pass_at_k_keeps_its_digits_where_it_is_small():
    assert pass_at_k(10**7, 1, 1) == pytest.approx(1e-7, rel=1e-12, abs=0)
    assert pass_at_k(10, 0, 5) == 0.0
    assert pass_at_k(10, 6, 5) == 1.0


@pytest.mark.parametrize(("num_samples", "num_correct", "k"), [(4, 5, 1), (4, -1, 1), (4, 2, 0), (4, 2, 5)])
def test_impossible_counts_are_errors(num_samples, num_correct, k):
    with pytest.raises(ValueError, match="must be between"):
        pass_at_k(num_samples, num_correct, k)


def enumerate_majority(labels, is_correct, k):
    total = Fraction(0)
    subsets = list(itertools.combinations(labels, k))
    for subset in subsets:
        counts = {label: subset.count(label) for label in set(subset) - {-1}}
        winners = [label for label, count in counts.items() if count == max(counts.values())]
        total += Fraction(sum(is_correct[label] for label in winners), max(1, len(winners)))
    return float(total / len(subsets))


def random_vote(generator, most_samples):
    labels = [generator.randint(-1, 4) for _ in range(generator.randint(1, most_samples))]
    names = sorted(set(labels) - {-1})
    labels = [names.index(label) if label >= 0 else -1 for label in labels]
    return labels, [generator.random() < 0.4 for _ in names]


def sizes_of(labels):
    return [labels.count(label) for label in range(max(labels, default=-1) + 1)], labels.count(-1)


def test_majority_at_k_against_enumeration():
    generator = random.Random(0)
    for _ in range(150):
        labels, is_correct = random_vote(generator, 10)
        k = generator.randint(1, len(labels))
        sizes, num_unanswered = sizes_of(labels)
        expected = enumerate_majority(labels, is_correct, k)
        assert majority_at_k(sizes, is_correct, num_unanswered, k) == pytest.approx(expected, abs=EXACT)


def test_majority_at_k_by_subsampling_estimates_the_exact_value():
    generator = random.Random(1)
    for seed in range(6):
        labels, is_correct = random_vote(generator, 30)
        k = generator.randint(1, len(labels))
        sizes, num_unanswered = sizes_of(labels)
        exact = majority_at_k(sizes, is_correct, num_unanswered, k)
        estimate = majority_at_k_by_subsampling(labels, is_correct, k, repeats=3000, seed=seed)
        assert estimate == pytest.approx(exact, abs=4 * math.sqrt(max(exact * (1 - exact), 1e-3) / 3000))


def test_subsampling_is_reproducible_and_weighted():
    labels, is_correct = [0, 0, 0, 1, 1, -1], [False, True]
    first = majority_at_k_by_subsampling(labels, is_correct, 3, seed=5)
    assert first == majority_at_k_by_subsampling(labels, is_correct, 3, seed=5)
    assert 0 < first < 1
    assert majority_at_k_by_subsampling(labels, is_correct, 6, weights=[1, 1, 1, 2, 2, 9]) == 1.0
    assert majority_at_k_by_subsampling(labels, is_correct, 6, weights=[1, 1, 1, 1, 1, 9]) == 0.0
    assert majority_at_k_by_subsampling([-1, -1], [], 2) == 0.0
    with pytest.raises(ValueError, match="weights"):
        majority_at_k_by_subsampling(labels, is_correct, 3, weights=[1, 2])


def test_majority_of_many_samples():
    assert majority_at_k([1] * 64, [True] + [False] * 63, 0, 64) == pytest.approx(1 / 64)
    assert majority_at_k([33, 31], [True, False], 0, 64) == 1.0
    assert majority_at_k([600, 400], [True, False], 0, 501) > 0.99
    assert can_enumerate(1000, 500)
    with pytest.raises(ValueError, match="majority_at_k_by_subsampling"):
        majority_at_k([2000], [True], 0, 1000)


def test_mean_accuracy_of_unequal_numbers_of_samples():
    accuracy = mean_accuracy([[1, 1, 0, 0], [1, 1], [0, 0, 0]])
    assert accuracy.mean == 0.5
    assert accuracy.standard_error == pytest.approx(math.sqrt(((0.5 - 0.5) ** 2 + 0.5**2 + 0.5**2) / 2 / 3))
    assert accuracy.sampling_error == pytest.approx(math.sqrt(1 / 3 / 4) / 3)
    assert math.isnan(mean_accuracy([[1, 0]]).standard_error)
    assert math.isnan(mean_accuracy([[1], [0]]).sampling_error)
    for empty in ([], [[1], []]):
        with pytest.raises(ValueError, match="at least one"):
            mean_accuracy(empty)


def test_standard_errors_are_the_spread_of_repeated_benchmarks():
    """Other problems and samples: standard_error. Other samples on the same problems: sampling_error, which is smaller."""
    generator = np.random.default_rng(0)

    def benchmark(difficulties):
        return mean_accuracy((generator.random((len(difficulties), 8)) < difficulties[:, None]).astype(float).tolist())

    over_problems = [benchmark(generator.beta(0.5, 0.5, 60)) for _ in range(400)]
    assert np.mean([a.standard_error for a in over_problems]) == pytest.approx(
        np.std([a.mean for a in over_problems]), rel=0.15
    )
    fixed = generator.beta(0.5, 0.5, 60)
    over_samples = [benchmark(fixed) for _ in range(400)]
    spread = np.std([a.mean for a in over_samples])
    assert np.mean([a.sampling_error for a in over_samples]) == pytest.approx(spread, rel=0.15)
    assert spread < 0.5 * np.mean([a.standard_error for a in over_samples])


def enumerate_best(is_correct, k):
    subsets = list(itertools.combinations(range(len(is_correct)), k))
    return sum(is_correct[min(subset)] for subset in subsets) / len(subsets)


def test_best_of_k_against_enumeration():
    generator = random.Random(2)
    for _ in range(60):
        is_correct = [generator.random() < 0.4 for _ in range(generator.randint(1, 9))]
        for k in range(1, len(is_correct) + 1):
            assert best_of_k(is_correct, k) == pytest.approx(enumerate_best(is_correct, k), abs=EXACT)
    with pytest.raises(ValueError, match="k must be between"):
        best_of_k([True], 2)


def test_weighted_subsampling_against_enumeration():
    """Weights that never tie, so that every subset has one winner."""
    generator = random.Random(4)
    for seed in range(4):
        labels = [generator.randint(-1, 3) for _ in range(9)]
        is_correct = [generator.random() < 0.5 for _ in range(4)]
        weights = [generator.random() for _ in labels]
        k = generator.randint(2, 6)
        right = []
        for subset in itertools.combinations(range(9), k):
            totals = {
                label: sum(weights[i] for i in subset if labels[i] == label) for label in {labels[i] for i in subset} - {-1}
            }
            right.append(bool(totals) and is_correct[max(totals, key=totals.get)])
        exact = sum(right) / len(right)
        estimate = majority_at_k_by_subsampling(labels, is_correct, k, repeats=4000, seed=seed, weights=weights)
        assert estimate == pytest.approx(exact, abs=4 * math.sqrt(max(exact * (1 - exact), 1e-3) / 4000))
