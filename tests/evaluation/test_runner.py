"""An evaluation from prompt to summary, killed and resumed, and protected from mixing runs."""

import gzip
import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

from m1.evaluation.budget import Budget
from m1.evaluation.records import read_records
from m1.evaluation.runner import boxed_prompt, evaluate, summarize_run
from m1.evaluation.sampling import Sample
from m1.evaluation.summary import summarize
from m1.reasoning.problems import Problem, generate_problems
from m1.reasoning.rewards import Scorer
from tests.evaluation.fake_model import FakeModel

PROBLEMS = [Problem(f"p{index}", f"{index} + 1?", str(index + 1)) for index in range(7)]
PARAMS = {"temperature": 0.7, "max_tokens": 64, "seed": 100}


@pytest.fixture(scope="module")
def scorer():
    with Scorer(num_workers=1) as shared:
        yield shared


def run(path, scorer, model=None, problems=PROBLEMS, **changes):
    arguments = {"num_samples": 4, "params": PARAMS, "description": {"model": "m"}, "scorer": scorer} | changes
    return evaluate(problems, model or FakeModel(), records_path=path, **arguments)


@pytest.mark.parametrize("name", ["records.jsonl", "records.jsonl.gz"])
def test_summary_and_records(tmp_path, scorer, name):
    path, model, seen = tmp_path / "deep" / name, FakeModel(), []
    steps = []
    summary = run(
        path, scorer, model, on_record=lambda done, total: seen.append((done, total)), on_step=lambda *now: steps.append(now)
    )
    assert [len(call) for call in model.calls] == [7]
    assert steps[-1] == (28, 7 * (10 + 11 + 12 + 13))
    assert seen == [(done, 7) for done in range(1, 8)]
    every = {str(k): pytest.approx(0.5) for k in (1, 2)} | {"4": 1.0}
    assert summary.pop("votes").keys() == {"logprob", "tail", "best-logprob", "best-tail"}
    assert summary == {
        "num_problems": 7,
        "num_samples": 4,
        "pass@1": 0.5,
        "pass@1_standard_error": 0.0,
        "pass@1_sampling_error": pytest.approx((1 / 3 / 4 / 7) ** 0.5),
        "pass@k": {"1": pytest.approx(0.5), "2": pytest.approx(5 / 6), "4": 1.0},
        # two samples: both right 1/6; right and wrong 2/6, by lot; right and silent 2/6; wrong and silent 1/6
        "maj@k": every | {"2": pytest.approx(1 / 6 + 1 / 6 + 2 / 6)},
        "mean_tokens": 11.5,
        "truncation_rate": 0.25,
        "no_answer_rate": 0.25,
        "failed_score_rate": 0.0,
    }
    json.dumps(summary, allow_nan=False)
    description, records = read_records(path)
    assert description["params"] == PARAMS
    assert {key: value for key, value in summarize(records).items() if key != "votes"} == summary
    record = next(record for record in records if record["id"] == "p2")
    assert record["labels"] == [0, 1, 0, -1]
    assert record["samples"][0] == {
        "text": r"\boxed{3}",
        "num_tokens": 10,
        "finish_reason": "stop",
        "mean_logprob": -0.5,
        "tail_logprob": -0.4,
        "index": 0,
        "seconds": None,
        "tokens_spent": record["samples"][0]["tokens_spent"],
        "answer": "3",
        "reward": 1.0,
        "reason": None,
    }
    assert "text" not in read_records(path, with_texts=False)[1][0]["samples"][0]


def test_a_verifiers_scores_vote(tmp_path, scorer):
    """Sample 2 is right; the verifier likes it more than the two that agree on a wrong answer."""
    model = FakeModel(lambda number, index: Sample(rf"\\boxed{{{number + 1 if index == 2 else 0}}}", 5 + index, "stop"))
    path = tmp_path / "r.jsonl"
    summary = run(path, scorer, model, num_samples=3, verifier=lambda problem, text: 1 + 9 * (r"{0}" not in text))
    assert summary["maj@k"]["3"] == 0.0
    assert summary["votes"] == {"verifier": {"1": pytest.approx(1 / 3, abs=0.1), "2": pytest.approx(2 / 3, abs=0.1), "3": 1.0},
                                "best-verifier": {"1": pytest.approx(1 / 3), "2": pytest.approx(2 / 3), "3": 1.0}}  # fmt: skip
    assert read_records(path)[1][0]["samples"][2]["verifier_score"] == 10.0
    summary = run(
        tmp_path / "negative.jsonl", scorer, model, num_samples=3, verifier=lambda problem, text: -float(len(problem))
    )
    assert summary["votes"].keys() == {"best-verifier"}


def test_each_problem_has_a_seed_of_its_own_whatever_the_batch(tmp_path, scorer):
    def seeds(path, batch_size):
        model = FakeModel()
        run(path, scorer, model, batch_size=batch_size)
        assert max(len(call) for call in model.calls) == batch_size
        return [request.params["seed"] for call in model.calls for request in call]

    together = seeds(tmp_path / "a.jsonl", 7)
    assert together == seeds(tmp_path / "b.jsonl", 2)
    assert len(set(together)) == 7
    assert all(0 <= seed < 2**31 for seed in together)


def test_equal_answers_vote_together(tmp_path, scorer):
    answers = ("x+1", "7", "1 + x", "7", "1+x")
    model = FakeModel(lambda number, index: Sample(rf"\boxed{{{answers[index]}}}", 5, "stop"))
    problem = Problem("a", "0 simplify", "1+x")
    summary = run(tmp_path / "r.jsonl", scorer, model, [problem], num_samples=5)
    assert (summary["pass@1"], summary["maj@k"]["5"]) == (0.6, 1.0)


def test_generated_problems_are_judged_by_their_own_reward(tmp_path, scorer):
    problems = generate_problems("lcm", 3, seed=1)
    model = FakeModel(lambda number, index: Sample(f"It is {problems[number].answer}.", 5, "stop"))
    number = {problem.id: index for index, problem in enumerate(problems)}
    summary = run(
        tmp_path / "r.jsonl", scorer, model, problems, num_samples=2, to_prompt=lambda problem: f"{number[problem.id]}"
    )
    assert summary["pass@1"] == 1.0


def test_the_prompt_is_the_papers():
    assert boxed_prompt(PROBLEMS[0]) == [
        {"role": "user", "content": "0 + 1?\nLet's think step by step and output the final answer within \\boxed{}."}
    ]


class Interrupted(Exception):
    pass


@pytest.mark.parametrize("name", ["records.jsonl", "records.jsonl.gz"])
@pytest.mark.parametrize("num_torn", [0, 1, 30])
def test_an_interrupted_run_is_continued_without_duplicates(tmp_path, scorer, num_torn, name):
    whole = run(tmp_path / f"whole-{name}", scorer)
    path = tmp_path / name

    def interrupt(done, total):
        if done == 4:
            raise Interrupted

    with pytest.raises(Interrupted):
        run(path, scorer, on_record=interrupt)
    assert len(read_records(path)[1]) == 4
    line = b'{"id": "p4", "problem": "what a kill left of a longer line than this"}\n'
    with path.open("ab") as file:
        file.write((gzip.compress(line) if name.endswith(".gz") else line)[:num_torn])
    model = FakeModel()
    assert run(path, scorer, model) == whole
    assert len(model.calls[0]) == 3
    assert sorted(record["id"] for record in read_records(path)[1]) == [problem.id for problem in PROBLEMS]
    again = FakeModel()
    assert run(path, scorer, again) == whole
    assert again.num_finished == 0


KILLED_RUN = """
import time
from tests.evaluation.test_runner import FakeModel, run
from m1.reasoning.rewards import Scorer

with Scorer(num_workers=1) as scorer:
    run({path!r}, scorer, FakeModel(before_sample=lambda: time.sleep(0.1)), batch_size=1)
"""


def test_a_killed_run_is_continued(tmp_path, scorer):
    path = tmp_path / "records.jsonl.gz"
    program = subprocess.Popen([sys.executable, "-c", KILLED_RUN.format(path=str(path))], cwd=Path(__file__).parents[2])
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and (not path.exists() or len(read_records(path)[1]) < 2):
        time.sleep(0.02)
    with pytest.raises(ValueError, match="is being written by another evaluation"):
        run(path, scorer)
    program.kill()
    program.wait()
    num_done = len(read_records(path)[1])
    assert 2 <= num_done < 7
    model = FakeModel()
    summary = run(path, scorer, model)
    assert len(model.calls[0]) == 7 - num_done
    assert summary["num_problems"] == 7
    assert sorted(record["id"] for record in read_records(path)[1]) == [problem.id for problem in PROBLEMS]


def test_what_was_sampled_whole_is_recorded_when_the_model_fails(tmp_path, scorer):
    path, model = tmp_path / "records.jsonl", FakeModel()

    def fail():
        if model.num_finished == 20:
            raise Interrupted

    model.before_sample = fail
    with pytest.raises(Interrupted):
        run(path, scorer, model)
    num_done = len(read_records(path)[1])
    assert 0 < num_done < 7
    model = FakeModel()
    run(path, scorer, model)
    assert model.num_finished == 4 * (7 - num_done)


def test_an_adaptive_run_stops_early_and_is_judged_by_its_vote(tmp_path, scorer):
    path = tmp_path / "records.jsonl.gz"
    model = FakeModel(lambda number, index: Sample(rf"\boxed{{{number + 1 if index % 10 else 0}}}", 5, "stop"))
    summary = run(path, scorer, model, num_samples=40, adaptive=0.95)
    assert summary["vote"] == 1.0
    assert summary["mean_samples"] < 10
    assert "pass@1" not in summary
    assert model.num_finished == sum(len(record["samples"]) for record in read_records(path)[1])
    assert {record["ended_by"] for record in read_records(path)[1]} == {"confident"}


def test_a_budget_is_spent_on_one_problem_at_a_time(tmp_path, scorer):
    """Of the first four samples to finish, tokens 10 + index each, as many vote as the budget has room for."""
    path, model = tmp_path / "records.jsonl.gz", FakeModel()
    summary = run(path, scorer, model, num_samples=1000, budget=Budget(tokens=3000))
    assert [len(call) for call in model.calls] == [1] * 7
    run_line, records = read_records(path)
    assert all(record["ended_by"] == "tokens" for record in records)
    assert all(3000 <= record["tokens"] < 4010 for record in records)
    assert all(record["samples"][-1]["tokens_spent"] <= 3000 for record in records)
    assert summary["token_budgets"][0]["accuracy"] == summary["vote"]
    assert [sample["seconds"] for sample in records[0]["samples"]] == sorted(s["seconds"] for s in records[0]["samples"])
    assert summary["token_budgets"][0]["budget"] == 3000
    points = summarize_run(run_line, records, tokens=[1, 1500, 5000])["token_budgets"]
    assert points[0]["mean_samples"] == 0
    assert points[0]["accuracy"] == 0
    assert points[2]["mean_samples"] == summary["mean_samples"] > points[1]["mean_samples"] > 0
    assert points[2]["accuracy"] == summary["vote"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_samples": 8}, "num_samples differ"),
        ({"adaptive": 0.9}, "adaptive differ"),
        ({"budget": Budget(tokens=9)}, "budget differ"),
        ({"params": PARAMS | {"temperature": 1.0}}, "params differ"),
        ({"description": {"model": "another"}}, "description differ"),
        ({"problems": [*PROBLEMS[:-1], Problem("p6", "6 + 1?", "8")]}, "problems or prompts differ"),
        ({"to_prompt": lambda problem: [{"role": "user", "content": f"{problem.problem} Go!"}]}, "problems or prompts differ"),
    ],
)
def test_records_of_another_run_are_not_mixed(tmp_path, scorer, changes, message):
    path = tmp_path / "records.jsonl"
    run(path, scorer)
    before = path.read_bytes()
    with pytest.raises(ValueError, match=message):
        run(path, scorer, **changes)
    assert path.read_bytes() == before


def test_a_compressed_file_of_something_else_is_left_alone(tmp_path, scorer):
    path = tmp_path / "records.jsonl.gz"
    torn = gzip.compress(b"important notes")[:-4]
    for content, message in [
        (b"important notes", "holds no records"),
        (torn, "holds no records"),
        (gzip.compress(b"notes\n"), "line 1: not a record"),
        (gzip.compress(b'{"run": {}}\n') + b"important notes", "holds no records"),
    ]:
        path.write_bytes(content)
        with pytest.raises(ValueError, match=message):
            run(path, scorer)
        assert path.read_bytes() == content


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("important notes", "holds no records of an evaluation"),
        ("important notes\nand more", "line 1: not a record"),
        ('{"run": {}}\nnot json\n', "line 2: not a record"),
        ('{"run": {}}\n{"id": "a"}\n{"id": "a"}\n', "line 3: the problem 'a' has a record already"),
    ],
)
def test_a_file_of_something_else_is_left_alone(tmp_path, scorer, content, message):
    path = tmp_path / "records.jsonl"
    path.write_text(content)
    with pytest.raises(ValueError, match=message):
        run(path, scorer)
    assert path.read_text() == content


def test_bad_input_is_refused_before_anything_is_sampled(tmp_path, scorer):
    path = tmp_path / "records.jsonl"
    for changes, message in [
        ({"problems": []}, "at least one problem"),
        ({"problems": [PROBLEMS[0], PROBLEMS[0]]}, "unique ids"),
        ({"num_samples": 0}, "num_samples must be at least 1"),
        ({"batch_size": 0}, "batch_size must be at least 1"),
        ({"adaptive": 0.5}, "adaptive: expected"),
    ]:
        with pytest.raises(ValueError, match=message):
            run(path, scorer, **changes)
    assert not path.exists()
    for left_out in (1, 4):
        with pytest.raises(ValueError, match=f"generate must give 4 samples of each request, got .*'p0': {4 - left_out}"):
            run(path, scorer, FakeModel(leave_out=left_out))
    with pytest.raises(ValueError, match="no records"):
        summarize([])


def test_a_failing_reward_is_counted(tmp_path, scorer):
    problem = Problem("a", "0 p", "1", "tests.reasoning.reward_functions:misbehave")
    model = FakeModel(lambda number, index: Sample(("raise", "behave")[index], 1, "stop"))
    summary = run(tmp_path / "r.jsonl", scorer, model, [problem], num_samples=2)
    assert (summary["failed_score_rate"], summary["pass@1"]) == (0.5, 0.5)
