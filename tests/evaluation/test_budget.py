"""Sampling under budgets: deadlines that are kept, what is counted, rounds, and votes at each budget of a record."""

import time

import pytest

from m1.evaluation.budget import MOST_SAMPLES, Budget, SampleUntil, accuracy_at_budgets, sample_until
from m1.evaluation.sampling import Sample, SampleRequest
from m1.reasoning.voting import AdaptiveVote
from tests.evaluation.fake_model import FakeModel

REQUEST = SampleRequest("3 + 1?", 500, {"seed": 5})


def test_without_a_budget_all_samples_come():
    watch = SampleUntil()
    samples = sample_until(FakeModel(), REQUEST, watch)
    assert sorted(sample.index for sample in samples) == list(range(500))
    assert watch.ended_by == "samples"


def test_a_time_budget_ends_in_time_with_what_has_finished():
    watch = SampleUntil(Budget(seconds=0.3))
    start = time.perf_counter()
    samples = sample_until(FakeModel(before_sample=lambda: time.sleep(0.02)), REQUEST, watch)
    assert 0.3 <= time.perf_counter() - start < 5
    assert watch.ended_by == "seconds"
    assert 1 <= len(samples) < 20
    assert all(0 < sample.seconds <= 0.3 for sample in samples)


def test_a_token_budget_counts_across_rounds(monkeypatch):
    monkeypatch.setattr("m1.evaluation.budget.MOST_SAMPLES", 8)
    model = FakeModel(lambda number, index: Sample(r"\boxed{4}", 10, "stop"))
    watch = SampleUntil(Budget(tokens=255))
    samples = sample_until(model, REQUEST, watch)
    assert (watch.ended_by, watch.num_tokens, len(samples)) == ("tokens", 260, 25)  # the last one came late
    assert [sample.tokens_spent for sample in samples] == list(range(10, 260, 10))
    assert sorted(sample.index for sample in samples[:24]) == list(range(24))
    assert [call[0].params["seed"] for call in model.calls] == [5, 13, 21, 29]
    assert MOST_SAMPLES == 4096


def test_a_decided_vote_ends_the_sampling():
    model = FakeModel(lambda number, index: Sample(r"\boxed{4}", 10, "stop"))
    watch = SampleUntil(adaptive=AdaptiveVote(500, str.__eq__, 0.95))
    assert len(sample_until(model, REQUEST, watch)) == 4
    assert watch.ended_by == "confident"
    assert model.num_finished == 4


@pytest.mark.parametrize("arguments", [{"seconds": 0.0}, {"seconds": -1.0}, {"tokens": 0}, {"seconds": float("nan")}])
def test_a_budget_is_positive(arguments):
    with pytest.raises(ValueError, match="expected more than 0"):
        Budget(**arguments)


def record(*samples, labels):
    return {
        "labels": labels,
        "samples": [{"seconds": seconds, "tokens_spent": 100 * seconds, "reward": reward} for seconds, reward in samples],
    }


def test_votes_at_budgets():
    records = [
        # wrong first, then two right: a tie at 2 s goes to the wrong one, at 4 s the right answer has the majority
        record((1, 0.0), (2, 1.0), (4, 1.0), labels=[0, 1, 1]),
        # right at once, silent, then overruled
        record((1, 1.0), (2, 0.0), (3, 0.0), (5, 0.0), labels=[0, -1, 1, 1]),
    ]
    points = accuracy_at_budgets(records, [0.5, 1, 2, 4, 9])
    assert [point["accuracy"] for point in points] == [0.0, 0.5, 0.5, 1.0, 0.5]
    assert [point["coverage"] for point in points] == [0.0, 0.5, 1.0, 1.0, 1.0]
    assert [point["mean_samples"] for point in points] == [0.0, 1.0, 2.0, 3.0, 3.5]
    silent = record((1, 0.0), (1, 0.0), (2, 0.0), (3, 1.0), labels=[-1, -1, -1, 0])
    assert [point["accuracy"] for point in accuracy_at_budgets([silent], [2, 3])] == [0.0, 1.0]  # silence doesn't vote
    assert points[1]["standard_error"] == pytest.approx(0.5)
    assert accuracy_at_budgets(records, [100, 400], "tokens")[1]["accuracy"] == 1.0
    assert accuracy_at_budgets(records[:1], [4])[0]["standard_error"] is None
