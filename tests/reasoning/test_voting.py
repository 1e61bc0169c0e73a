"""Votes: grouping, ties, weights, best of n, and adaptive stopping against the full vote."""

import random
from collections import Counter
from fractions import Fraction

import pytest

from m1.reasoning.voting import (
    AdaptiveVote,
    best_of_n,
    group_answers,
    logprob_weights,
    majority_vote,
    probability_of_lead,
)


def same_value(first, second):
    return Fraction(first) == Fraction(second)


def test_answers_are_grouped_by_value_in_order_of_appearance():
    assert group_answers(["1/2", "3", None, "0.5", "3", "2/4"], same_value) == [[0, 3, 5], [1, 4]]
    assert group_answers([], same_value) == []
    assert group_answers([None, None], same_value) == []


def test_grouping_by_mathematics(verifier):
    answers = [r"\sqrt{8}", "x+1", r"2\sqrt{2}", None, "1 + x", "8^{1/2}", "3"]
    assert group_answers(answers, verifier.are_same) == [[0, 2, 5], [1, 4], [6]]


def test_grouping_is_transitive_even_where_equality_is_not():
    def near(first, second):
        return abs(int(first) - int(second)) <= 1

    answers = ["1", "2", "3", "2"]
    assert group_answers(answers, near) == [[0, 1, 3], [2]]  # 3 is near 2, but 2 stands for 1
    assert sorted(index for group in group_answers(answers, near) for index in group) == [0, 1, 2, 3]


def test_a_spelling_is_compared_once():
    calls = []

    def counting(first, second):
        calls.append((first, second))
        return first == second

    group_answers(["1", "2"] * 50, counting)
    assert calls == [("1", "2")]


def test_majority_vote():
    vote = majority_vote(["3", "1/2", None, "0.5", "2/4", "3"], same_value)
    assert (vote.answer, vote.share, vote.winner_index) == ("1/2", 0.5, 1)
    assert [(group.answer, group.indices, group.weight) for group in vote.groups] == [
        ("1/2", (1, 3, 4), 3.0),
        ("3", (0, 5), 2.0),
    ]


def test_no_answer_wins_only_where_nothing_else_can():
    assert majority_vote([None, None, None, "7"], same_value).answer == "7"
    assert majority_vote([None, None, None, "7"], same_value).share == 0.25
    nothing = majority_vote([None, None], same_value)
    assert (nothing.answer, nothing.share, nothing.groups, nothing.winner_index) == (None, 0.0, (), 0)
    assert majority_vote([], same_value).winner_index is None


def test_ties_go_to_more_samples_and_then_to_the_earliest():
    assert majority_vote(["2", "1", "1", "2"], same_value).answer == "2"
    assert majority_vote(["1", "2", "2"], same_value, weights=[2.0, 1.0, 1.0]).answer == "2"
    assert majority_vote(["1", "2"], same_value, weights=[0.0, 0.0]).answer == "1"


def test_weighted_votes():
    answers = ["1", "2", "1", "2", "2"]
    vote = majority_vote(answers, same_value, weights=[0.9, 0.1, 0.8, 0.2, 0.3])
    assert (vote.answer, vote.winner_index) == ("1", 0)
    assert vote.share == pytest.approx(1.7 / 2.3)
    assert majority_vote(answers, same_value, weights=lambda index: [0.1, 0.1, 0.1, 0.1, 0.2][index]).winner_index == 4
    assert logprob_weights([0.0, -1.0]) == pytest.approx([1.0, 0.36787944])


@pytest.mark.parametrize("weights", [[1.0], [1.0, -1.0], [1.0, float("nan")], [1.0, float("inf")]])
def test_bad_weights_are_errors(weights):
    with pytest.raises(ValueError, match="weights"):
        majority_vote(["1", "2"], same_value, weights=weights)
    with pytest.raises(ValueError, match="mean_logprobs"):
        logprob_weights([0.5])


def test_best_of_n():
    assert best_of_n(["1", "2", "3"], [-3.0, -1.0, -2.0]) == 1
    assert best_of_n([None, "2", "3"], [9.0, 1.0, 1.0]) == 1
    assert best_of_n([None, None], [1.0, 2.0]) == 1
    assert best_of_n([], []) is None
    with pytest.raises(ValueError, match="scores"):
        best_of_n(["1"], [float("nan")])


def test_probability_of_lead_is_the_beta_integral():
    for leader, runner_up in [(0, 0), (3, 0), (5, 2), (30, 20)]:
        steps = 20_000
        grid = [(index + 0.5) / steps for index in range(steps)]
        density = [p**leader * (1 - p) ** runner_up for p in grid]
        integral = sum(density[steps // 2 :]) / sum(density)
        assert probability_of_lead(leader, runner_up) == pytest.approx(integral, abs=1e-6)


def draw_problem(generator):
    """A random answer distribution of one clear or less clear favourite, some rivals, and samples without an answer."""
    favourite = generator.uniform(0.2, 0.9)
    rivals = [generator.random() for _ in range(generator.randint(1, 6))]
    weights = [favourite] + [(1 - favourite) * rival / sum(rivals) for rival in rivals]
    return lambda n: [
        None if generator.random() < 0.05 else str(generator.choices(range(len(weights)), weights)[0]) for _ in range(n)
    ]


def run_adaptively(answers, confidence):
    adaptive = AdaptiveVote(len(answers), str.__eq__, confidence)
    for answer in answers:
        if adaptive.add(answer):
            break
    return adaptive


def test_certain_stopping_never_changes_the_winner_and_saves_samples():
    generator = random.Random(0)
    used = 0
    for _ in range(1500):
        answers = draw_problem(generator)(generator.randint(1, 24))
        adaptive = run_adaptively(answers, confidence=1.0)
        assert adaptive.vote().answer == majority_vote(answers, str.__eq__).answer, answers
        used += len(adaptive.answers) / len(answers)
    assert used < 0.9 * 1500


def test_certain_stopping_is_as_early_as_possible():
    """Before the decision there is a continuation that changes the winner: all the rest for one rival answer."""
    generator = random.Random(1)
    for _ in range(300):
        answers = draw_problem(generator)(12)
        adaptive = AdaptiveVote(12, str.__eq__, confidence=1.0)
        for index, answer in enumerate(answers[:-1]):
            rest = 11 - index
            if not adaptive.add(answer) and any(seen is not None for seen in answers[: index + 1]):
                leader = adaptive.vote().answer
                rivals = {seen for seen in adaptive.answers if seen not in (None, leader)} | {"new"}
                outcomes = {majority_vote(adaptive.answers + [rival] * rest, str.__eq__).answer for rival in rivals}
                assert outcomes - {leader}, adaptive.answers


@pytest.mark.parametrize("confidence", [0.8, 0.95])
def test_confident_stopping_agrees_with_the_full_vote_as_often_as_promised(confidence):
    generator = random.Random(2)
    num_problems, num_samples, agreements, used = 1500, 40, 0, 0
    for _ in range(num_problems):
        answers = draw_problem(generator)(num_samples)
        adaptive = run_adaptively(answers, confidence)
        agreements += adaptive.vote().answer == majority_vote(answers, str.__eq__).answer
        used += len(adaptive.answers)
    assert agreements / num_problems >= confidence
    assert used / num_problems < num_samples / 2


def test_adaptive_vote_says_why_and_checks_its_arguments():
    adaptive = AdaptiveVote(5, same_value, confidence=1.0)
    assert [adaptive.add(answer) for answer in ["1/2", None, "0.5"]] == [False, False, True]  # two new ones would only tie
    assert adaptive.reason == "cannot be overtaken"
    confident = AdaptiveVote(64, same_value, confidence=0.95)
    assert [confident.add("1") for _ in range(4)] == [False, False, False, True]
    assert confident.reason == "confident"
    exhausted = AdaptiveVote(2, same_value)
    assert [exhausted.add(None) for _ in range(2)] == [False, True]
    assert exhausted.reason == "complete"
    for arguments in ({"num_samples": 0}, {"num_samples": 4, "confidence": 0.5}, {"num_samples": 4, "confidence": 1.1}):
        with pytest.raises(ValueError):
            AdaptiveVote(equal=same_value, **arguments)


def test_votes_equal_a_plain_count():
    generator = random.Random(3)
    for _ in range(300):
        answers = draw_problem(generator)(generator.randint(1, 30))
        counts = Counter(answer for answer in answers if answer is not None)
        vote = majority_vote(answers, str.__eq__)
        if counts:
            assert counts[vote.answer] == max(counts.values())
            assert answers.index(vote.answer) == min(
                answers.index(a) for a, count in counts.items() if count == max(counts.values())
            )
