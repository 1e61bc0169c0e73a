"""What spelling alone decides, and which formulas are kept away from algebra."""

import json
import random
import time
from fractions import Fraction

import pytest

from m1.reasoning.answers import LONGEST_NORMALIZED, normalize_answer
from m1.reasoning.equality import DEEPEST_NESTING, is_explosive, parse_number, settle
from m1.reasoning.voting import group_answers


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("12", Fraction(12)),
        ("-.5", Fraction(-1, 2)),
        ("1,234.50", Fraction(2469, 2)),
        ("3/4", Fraction(3, 4)),
        (r"-\frac{3}{4}", Fraction(-3, 4)),
        (r"\frac{-3}{4}", Fraction(-3, 4)),
        (r"\frac34", Fraction(3, 4)),
        ("50%", Fraction(1, 2)),
        ("7.", Fraction(7)),
        ("1,23", None),
        ("12,345,6", None),
        ("1/0", None),
        ("1.5/2", None),
        ("x", None),
        ("", None),
        ("1" * 301, None),
    ],
)
def test_parse_number(text, value):
    number = parse_number(text)
    assert (number.value if number else None) == value


def test_random_numbers_are_compared_by_value():
    generator = random.Random(0)
    for _ in range(2000):
        first, second = (Fraction(generator.randint(-30, 30), generator.randint(1, 12)) for _ in range(2))
        scale = generator.randint(1, 5)
        spelled = rf"\frac{{{second.numerator * scale}}}{{{second.denominator * scale}}}"
        assert settle(f"{first.numerator}/{first.denominator}", spelled) is (first == second)


def test_algebra_is_asked_only_where_spelling_does_not_decide():
    assert settle("x + 1", "$1 + x$") == ("x + 1", "1 + x")
    assert settle("(C) x + 1", "1+x") == ("x + 1", "1+x")
    assert settle(r"\text{Navin}", "Evelyn") is False
    assert settle("5", "10^{10^{10}}") is False


@pytest.mark.parametrize(
    "formula",
    [
        "10^{10^{10}}",
        "10^10^10",
        "9^{9^9}",
        "2^{2^{2^{2^{2}}}}",
        "2^{99999}",
        "2^{-10000000}",
        "x^{1000000}",
        "2^{10!}",
        "(10^9)!",
        "(10!)!",
        "10!!",
        "99999!",
        "(x+y+z+1)^{40}",
        "{x+1}^{100}",
        "1+" * 600 + "1",
        "(" * (DEEPEST_NESTING + 1) + "1" + ")" * (DEEPEST_NESTING + 1),
    ],
)
def test_explosive_formulas_are_recognised(formula):
    assert is_explosive(formula)


@pytest.mark.parametrize(
    "formula",
    [
        "10^{100}",
        "2^{1009}",
        "2^{2^{10}}",
        "e^{x^2}",
        "e^{-x^{4}}",
        "x^{2^n}",
        r"\frac{100!}{2^{50}}",
        r"\frac{d !}{2 k(d-k) !}",
        "(x+1)^{10}",
        "(2x)^{40}",
        "2^{n}-n-1",
        r"\left(\frac{2}{3}\right)^{2023}",
        "(1,2]",
        r"\begin{pmatrix} 2 & 0 \\ 3 & 5 \end{pmatrix}",
    ],
)
def test_honest_formulas_are_not_taken_for_explosive(formula):
    assert not is_explosive(formula)


def test_no_benchmark_answer_is_taken_for_explosive(shared_data):
    for path in sorted(shared_data.glob("*.jsonl")):
        for line in path.open():
            answer = json.loads(line)["answer"]
            assert not is_explosive(normalize_answer(answer)), answer


@pytest.mark.parametrize(
    "piece", ["(", "{", "}", "^", "!", "^{2", "(x+", ")!", "1 cm ", "(A)", r"\frac", r"\text{", "9^", "\\", "$ "]
)
def test_spelling_is_judged_quickly(piece):
    answer = piece * (LONGEST_NORMALIZED // len(piece))
    start = time.process_time()
    for length in (len(answer), 990, 400):
        assert settle("5", answer[:length]) is not True
    assert time.process_time() - start < 1.0


@pytest.mark.parametrize(
    "make",
    [
        lambda index: "{" * 500_000 + str(index) + "}" * 500_000,
        lambda index: r"\frac{1}{" * 10_000 + str(index) + "}" * 10_000,
        lambda index: "x " * 500_000 + str(index),
        lambda index: "\x00\x07" * 500_000 + str(index),
        lambda index: "10^{" * 3 + str(index) + "}" * 3,
    ],
    ids=["braces", "fractions", "spaces", "control characters", "towers"],
)
def test_a_vote_of_different_hostile_answers_is_quick(make):
    """Each is compared with every other: 2,016 pairs, none of which may look at a megabyte."""
    answers = [make(index) for index in range(64)]
    start = time.process_time()
    groups = group_answers(answers, lambda first, second: settle(first, second) is True)
    assert time.process_time() - start < 2
    assert len(groups) == 64
