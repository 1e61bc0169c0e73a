"""Paired tests: against enumeration, their promised error rates, and the t interval where that holds."""

import itertools
import math

import numpy as np
import pytest

from m1.evaluation.comparison import paired_difference


def test_the_p_value_of_few_problems_is_exact():
    first, second = [0.0, 0.5, 0.25, 1.0, 0.5], [0.5, 0.75, 0.25, 0.75, 1.0]
    differences = np.subtract(second, first)
    signs = np.array(list(itertools.product([-1, 1], repeat=5)))
    expected = np.mean(np.abs(signs @ differences) >= abs(differences.sum()) - 1e-12)
    found = paired_difference(first, second)
    assert found.p_value == pytest.approx(expected)
    assert found.mean == pytest.approx(differences.mean())
    assert found.low <= found.mean <= found.high


def test_equal_models_do_not_differ():
    found = paired_difference([0.5, 1.0, 0.0], [0.5, 1.0, 0.0])
    assert (found.mean, found.low, found.high, found.p_value) == (0.0, 0.0, 0.0, 1.0)


def test_many_problems_by_sampling_agree_with_the_normal_limit():
    generator = np.random.default_rng(1)
    first = generator.beta(1, 1, 400)
    second = np.clip(first + generator.normal(0.03, 0.2, 400), 0, 1)
    found = paired_difference(first.tolist(), second.tolist())
    error = np.std(second - first, ddof=1) / 20
    assert (found.low, found.high) == pytest.approx((found.mean - 1.96 * error, found.mean + 1.96 * error), abs=0.15 * error)
    z = found.mean / error
    assert found.p_value == pytest.approx(2 * (1 - 0.5 * (1 + math.erf(z / 2**0.5))), abs=0.02)


def test_under_the_null_hypothesis_p_values_are_uniform():
    """Two models of equal skill: at most 5 % of comparisons are significant at 5 %, and not hardly any."""
    generator = np.random.default_rng(2)
    p_values = []
    for _ in range(200):
        skill = generator.beta(1, 1, 14)[:, None]
        first, second = (generator.random((2, 14, 8)) < skill).mean(axis=2)
        p_values.append(paired_difference(first.tolist(), second.tolist()).p_value)
    assert 0.01 <= np.mean(np.array(p_values) <= 0.05) <= 0.09


def test_unpaired_scores_are_refused():
    for pair in (([1.0], [1.0, 0.0]), ([], [])):
        with pytest.raises(ValueError, match="must pair up"):
            paired_difference(*pair)
