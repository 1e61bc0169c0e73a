"""Rewards by name, and that no reward or completion takes the run down."""

import time

import pytest

from m1.reasoning.problems import Problem, generate_problems
from m1.reasoning.rewards import Scorer, require_reward_name

MODULE = "tests.reasoning.reward_functions"


@pytest.fixture(scope="module")
def scorer(verifier):
    with Scorer(verifier=verifier, time_limit=3.0, memory_limit=2 << 30, num_workers=2) as shared:
        yield shared


def test_each_problem_is_scored_by_its_own_reward(scorer):
    summing = generate_problems("chain_sum", 2, seed=5)
    custom = Problem("c", "say much", "", f"{MODULE}:length_reward", {"longest": 8})
    problems = [Problem("a", "1+1", "2"), summing[0], custom, Problem("b", "x", r"\frac{1}{2}"), summing[1]]
    completions = [r"\boxed{2.0}", f"It is {summing[0].answer}.", "four", r"\boxed{1/3}", r"\boxed{none}"]
    scores = scorer.score_many(problems, completions)
    assert [score.reward for score in scores] == [1.0, 1.0, 0.5, 0.0, 0.0]
    assert [score.answer for score in scores] == ["2.0", summing[0].answer, None, "1/3", "none"]
    assert all(score.reason is None for score in scores)


@pytest.mark.parametrize("generator", ["chain_sum", "lcm", "gcd", "letter_counting", "products", "fraction_simplification"])
def test_reasoning_gym_gives_full_marks_only_for_the_answer(scorer, generator):
    problems = generate_problems(generator, 6, seed=7, **({"styles": ("plain",)} if "fraction" in generator else {}))
    right = [rf"So \boxed{{{problem.answer}}}" for problem in problems]
    wrong = [rf"So \boxed{{{problem.answer}1}}" for problem in problems]
    wordy = [rf"So \boxed{{it may be {problem.answer}, or another}}" for problem in problems]  # would get part of the marks
    assert [score.reward for score in scorer.score_many(problems, right)] == [1.0] * 6
    assert [score.reward for score in scorer.score_many(problems, wrong)] == [0.0] * 6
    assert [score.reward for score in scorer.score_many(problems, wordy)] == [0.0] * 6


def test_reasoning_gym_accepts_the_spellings_of_mathematics(scorer):
    fraction = generate_problems("fraction_simplification", 1, seed=7, styles=("plain",))[0]
    numerator, denominator = fraction.answer.split("/")
    multiple = next(problem for problem in generate_problems("lcm", 50, seed=1) if len(problem.answer) > 3)
    completions = [rf"\boxed{{\frac{{{numerator}}}{{{denominator}}}}}", rf"\boxed{{{int(multiple.answer):,}}}"]
    assert [score.reward for score in scorer.score_many([fraction, multiple], completions)] == [1.0, 1.0]


def test_a_crashing_generator_gives_zero_and_a_reason(scorer):
    problem = generate_problems("prime_factorization", 1, seed=1)[0]
    bad, good = scorer.score_many([problem, problem], [r"\boxed{no idea}", rf"\boxed{{{problem.answer}}}"])
    assert (bad.reward, good.reward) == (0.0, 1.0)
    assert "ValueError" in bad.reason


@pytest.mark.parametrize(
    ("action", "reason"),
    [
        ("raise", "ZeroDivisionError: division by zero"),
        ("sleep", "took more than 3 s"),
        ("loop in C", "took more than 3 s"),
        ("exit", "SystemExit: 3"),
        ("die", "its process ended with exit code 3"),
        ("crash", "its process was killed by SIGSEGV"),
        ("eat memory", "MemoryError: "),
        ("recurse", "RecursionError: maximum recursion depth exceeded"),
        ("return text", "returned '1.0', not a finite number"),
        ("return nothing", "returned None, not a finite number"),
        ("return nan", "returned nan, not a finite number"),
        ("return an object", "TypeError: Object of type object is not JSON serializable"),
    ],
)
def test_a_bad_reward_gives_zero_with_the_reason_and_spares_the_others(scorer, action, reason):
    problem = Problem("a", "p", "1", f"{MODULE}:misbehave")
    before, bad, after = scorer.score_many([problem] * 3, ["behave", action, "behave"])
    assert (before.reward, before.reason) == (1.0, None)
    assert (after.reward, after.reason) == (1.0, None)
    assert bad.reward == 0.0
    assert bad.reason.startswith(reason)


def test_many_bad_rewards_at_once(scorer):
    """Every worker is lost several times; order and count of the scores survive."""
    actions = ["behave", "die", "raise", "behave", "crash"] * 8
    scores = scorer.score_many([Problem("a", "p", "1", f"{MODULE}:misbehave")] * len(actions), actions)
    assert [score.reward for score in scores] == [float(action == "behave") for action in actions]


def test_large_completions_reach_the_reward(scorer):
    """Larger than a pipe holds, several at once, some to a worker that hangs."""
    size = 1_000_000
    problem = Problem("a", "p", "1", f"{MODULE}:length_reward", {"longest": size})
    scores = scorer.score_many([problem] * 4, ["a" * size, "a" * (size // 2), "a", "a" * size])
    assert [score.reward for score in scores] == [1.0, 0.5, 1 / size, 1.0]
    misbehaving = [Problem("a", "p", "1", f"{MODULE}:misbehave")] * 2 + [
        Problem("a", "p" * size, "1", f"{MODULE}:misbehave")
    ] * 4
    scores = scorer.score_many(misbehaving, ["sleep"] * 2 + ["behave"] * 4)
    assert [score.reward for score in scores] == [0.0, 0.0, 1.0, 1.0, 1.0, 1.0]


@pytest.mark.parametrize(
    ("reward", "message"),
    [
        ("no_such_module:reward", "cannot load 'no_such_module:reward': ModuleNotFoundError"),
        (f"{MODULE}:no_such_function", "AttributeError"),
        ("maths", "problem 'a': reward must be `math`"),
        ("reasoning_gym:", "problem 'a': reward must be `math`"),
        ("reasoning_gym:chain_sum", "problem 'a' has the reward 'reasoning_gym:chain_sum' but no reasoning-gym entry"),
    ],
)
def test_a_reward_that_does_not_exist_is_an_error(reward, message):
    with Scorer(num_workers=1) as scorer, pytest.raises(ValueError, match="^" + message if "problem" in message else message):
        scorer.score_many([Problem("a", "p", "1", reward)], ["1"])


def test_reward_names():
    for name in ("math", "reasoning_gym:chain_sum", "my.rewards:brevity"):
        require_reward_name(name)
    for name in ("", "Math", "reasoning_gym:chain sum", "my.rewards:", ":f", "my.rewards:f:g", "os;system:f"):
        with pytest.raises(ValueError):
            require_reward_name(name)


def test_problems_and_completions_must_pair_up(scorer):
    with pytest.raises(ValueError, match="got 1 and 2"):
        scorer.score_many([Problem("a", "p", "1")], ["1", "2"])


def test_a_batch_of_a_training_step_is_scored_quickly(scorer):
    problems = [problem for problem in generate_problems("chain_sum", 64, seed=1) for _ in range(8)]
    completions = [f"Adding up gives \\boxed{{{problem.answer}}}" for problem in problems]
    scorer.score_many(problems[:8], completions[:8])
    start = time.perf_counter()
    assert all(score.reward == 1.0 for score in scorer.score_many(problems, completions))
    assert time.perf_counter() - start < 20.0
