"""Ways to vote by name: what each weighs, and what is refused."""

import math

import pytest

from m1.evaluation.sampling import TAIL_TOKENS, Sample, confidences
from m1.evaluation.votes import elect, load_verifier, require_vote

ANSWERS = ["1", "2", "1", "2", "2", None]
SAMPLES = [
    Sample(f"text {index}", 5, "stop", mean_logprob, tail_logprob)
    for index, (mean_logprob, tail_logprob) in enumerate(
        [(-0.1, -2.0), (-2.0, -1.0), (-0.1, -2.0), (-2.0, -0.2), (-2.0, -1.0), (-0.01, -0.01)]
    )
]


def vote(method, **options):
    return elect(SAMPLES, ANSWERS, str.__eq__, method=method, problem="1 or 2?", **options)


def length(problem, completion):
    assert problem == "1 or 2?"
    return {"text 2": 9.0}.get(completion, 1.0)


def test_each_way_to_vote():
    assert vote("majority").answer == "2"
    by_logprob = vote("logprob")
    assert by_logprob.answer == "1"
    assert by_logprob.groups[0].weight == pytest.approx(2 * math.exp(-0.1))
    assert vote("tail").answer == "2"
    assert (vote("best-logprob").answer, vote("best-logprob").winner_index) == ("1", 0)  # not 5, which has no answer
    assert (vote("best-tail").answer, vote("best-tail").winner_index) == ("2", 3)


def test_a_verifier_weighs_or_chooses():
    method = "tests.evaluation.test_votes:length"
    assert vote(method, verifier=load_verifier(method)).answer == "1"
    assert vote(f"best-{method}", verifier=load_verifier(f"best-{method}")).winner_index == 2
    assert vote("best-m:f", verifier=lambda problem, completion: -ord(completion[-1])).winner_index == 0  # any sign
    with pytest.raises(ValueError, match="must not be negative"):
        vote("m:f", verifier=lambda problem, completion: -1.0)
    with pytest.raises(ValueError, match="must be finite"):
        vote("m:f", verifier=lambda problem, completion: math.nan)


def test_no_samples_and_no_log_probs():
    assert elect([], [], str.__eq__, method="best-tail").answer is None
    with pytest.raises(ValueError, match="no log-probs"):
        elect([Sample("a", 1, "stop")], ["1"], str.__eq__, method="logprob")


@pytest.mark.parametrize("method", ["", "most", "best-majority", "best-", "a:b:c", "module:", "os.path"])
def test_unknown_ways_are_refused(method):
    with pytest.raises(ValueError, match="--vote: expected"):
        require_vote(method)


@pytest.mark.parametrize("method", ["no.such.module:f", "math:no_such_function"])
def test_a_verifier_that_is_not_there_is_named(method):
    with pytest.raises(ValueError, match=f"cannot load '{method}'"):
        load_verifier(method)


def test_confidences_of_a_completion():
    assert confidences([]) == (None, None)
    assert confidences([-1.0, -3.0]) == (-2.0, -2.0)
    logprobs = [-5.0] * 100 + [-1.0] * TAIL_TOKENS
    assert confidences(logprobs) == (pytest.approx(-(500 + TAIL_TOKENS) / (100 + TAIL_TOKENS)), -1.0)
    assert confidences([1e-9]) == (0.0, 0.0)  # rounding may leave a log-prob above 0, which no weight may be
