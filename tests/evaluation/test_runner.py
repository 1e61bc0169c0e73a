"""An evaluation from prompt to summary, killed and resumed, and protected from mixing runs."""

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

from m1.evaluation.runner import Sample, boxed_prompt, evaluate, read_records, summarize
from m1.reasoning.problems import Problem, generate_problems
from m1.reasoning.rewards import Scorer

PROBLEMS = [Problem(f"p{index}", f"{index} + 1?", str(index + 1)) for index in range(7)]
PARAMS = {"temperature": 0.7, "max_tokens": 64, "seed": 100}


@pytest.fixture(scope="module")
def scorer():
    with Scorer(num_workers=1) as shared:
        yield shared


class Model:
    """Answers sample i of problem x with x + 1 where i is even, else with i; every fourth sample gives no answer."""

    def __init__(self):
        self.calls = []

    def __call__(self, prompts, n, params):
        self.calls.append((len(prompts), n, dict(params)))
        return [[self.sample(int(prompt[0]["content"].split()[0]), index) for index in range(n)] for prompt in prompts]

    def sample(self, number, index):
        text = "no idea" if index % 4 == 3 else rf"\boxed{{{number + 1 if index % 2 == 0 else 1000 + index}}}"
        return Sample(text, 10 + index, "length" if index % 4 == 3 else "stop", -0.5)


def run(path, scorer, model=None, problems=PROBLEMS, **changes):
    arguments = {"num_samples": 4, "params": PARAMS, "batch_size": 3, "description": {"model": "m"}, "scorer": scorer} | changes
    return evaluate(problems, model or Model(), records_path=path, **arguments)


def test_summary_and_records(tmp_path, scorer):
    path, model, seen = tmp_path / "deep" / "records.jsonl", Model(), []
    summary = run(path, scorer, model, on_record=lambda done, total: seen.append((done, total)))
    assert model.calls == [(3, 4, PARAMS), (3, 4, PARAMS | {"seed": 103}), (1, 4, PARAMS | {"seed": 106})]
    assert seen == [(done, 7) for done in range(1, 8)]
    assert summary == {
        "num_problems": 7,
        "num_samples": 4,
        "pass@1": 0.5,
        "pass@1_standard_error": 0.0,
        "pass@1_sampling_error": pytest.approx((1 / 3 / 4 / 7) ** 0.5),
        "pass@k": {"1": pytest.approx(0.5), "2": pytest.approx(5 / 6), "4": 1.0},
        # two samples: both right 1/6; right and wrong 2/6, by lot; right and silent 2/6; wrong and silent 1/6
        "maj@k": {"1": pytest.approx(0.5), "2": pytest.approx(1 / 6 + 1 / 6 + 2 / 6), "4": 1.0},
        "mean_tokens": 11.5,
        "truncation_rate": 0.25,
        "no_answer_rate": 0.25,
        "failed_score_rate": 0.0,
    }
    json.dumps(summary, allow_nan=False)
    description, records = read_records(path)
    assert description["params"] == PARAMS
    assert summarize(records) == summary
    assert records[2]["id"] == "p2"
    assert records[2]["labels"] == [0, 1, 0, -1]
    assert records[2]["samples"][0] == {
        "text": r"\boxed{3}",
        "num_tokens": 10,
        "finish_reason": "stop",
        "mean_logprob": -0.5,
        "answer": "3",
        "reward": 1.0,
        "reason": None,
    }


def test_equal_answers_vote_together(tmp_path, scorer):
    def model(prompts, n, params):
        return [[Sample(rf"\boxed{{{answer}}}", 5, "stop") for answer in ("x+1", "7", "1 + x", "7", "1+x")] for _ in prompts]

    problem = Problem("a", "simplify", "1+x")
    summary = run(tmp_path / "r.jsonl", scorer, model, [problem], num_samples=5)
    assert (summary["pass@1"], summary["maj@k"]["5"]) == (0.6, 1.0)


def test_generated_problems_are_judged_by_their_own_reward(tmp_path, scorer):
    problems = generate_problems("lcm", 3, seed=1)
    answers = {problem.problem: problem.answer for problem in problems}

    def model(prompts, n, params):
        return [[Sample(f"It is {answers[prompt]}.", 5, "stop")] * n for prompt in prompts]

    summary = run(tmp_path / "r.jsonl", scorer, model, problems, num_samples=2, to_prompt=lambda problem: problem.problem)
    assert summary["pass@1"] == 1.0


def test_the_prompt_is_the_papers():
    assert boxed_prompt(PROBLEMS[0]) == [
        {"role": "user", "content": "0 + 1?\nLet's think step by step and output the final answer within \\boxed{}."}
    ]


class Interrupted(Exception):
    pass


@pytest.mark.parametrize("torn", [b"", b'{"id": "p4", "prob'])
def test_an_interrupted_run_is_continued_without_duplicates(tmp_path, scorer, torn):
    whole = run(tmp_path / "whole.jsonl", scorer)
    path = tmp_path / "records.jsonl"

    def interrupt(done, total):
        if done == 4:
            raise Interrupted

    with pytest.raises(Interrupted):
        run(path, scorer, on_record=interrupt)
    with path.open("ab") as file:
        file.write(torn)
    model = Model()
    assert run(path, scorer, model) == whole
    assert sum(calls[0] for calls in model.calls) == 3
    assert path.read_text() == (tmp_path / "whole.jsonl").read_text()
    again = Model()
    assert run(path, scorer, again) == whole
    assert again.calls == []


KILLED_RUN = """
import time
from tests.evaluation.test_runner import Model, run
from m1.reasoning.rewards import Scorer

class SlowModel(Model):
    def __call__(self, *arguments):
        time.sleep(0.2)
        return super().__call__(*arguments)

with Scorer(num_workers=1) as scorer:
    run({path!r}, scorer, SlowModel(), batch_size=1)
"""


def test_a_killed_run_is_continued(tmp_path, scorer):
    path = tmp_path / "records.jsonl"
    program = subprocess.Popen([sys.executable, "-c", KILLED_RUN.format(path=str(path))], cwd=Path(__file__).parents[2])
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and (not path.exists() or path.read_bytes().count(b"\n") < 3):
        time.sleep(0.02)
    with pytest.raises(ValueError, match="is being written by another evaluation"):
        run(path, scorer, batch_size=1)
    program.kill()
    program.wait()
    num_done = path.read_bytes().count(b"\n") - 1
    assert 2 <= num_done < 7
    model = Model()
    summary = run(path, scorer, model, batch_size=1)
    assert len(model.calls) == 7 - num_done
    assert summary["num_problems"] == 7
    assert [record["id"] for record in read_records(path)[1]] == [problem.id for problem in PROBLEMS]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_samples": 8}, "num_samples differ"),
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
    ]:
        with pytest.raises(ValueError, match=message):
            run(path, scorer, **changes)
    assert not path.exists()
    with pytest.raises(ValueError, match="generate must return 4 samples"):
        run(path, scorer, lambda prompts, n, params: [[Sample("1", 1, "stop")] * (n - 1) for _ in prompts])
    with pytest.raises(ValueError, match="no records"):
        summarize([])


def test_a_failing_reward_is_counted(tmp_path, scorer):
    problem = Problem("a", "p", "1", "tests.reasoning.reward_functions:misbehave")
    summary = run(
        tmp_path / "r.jsonl", scorer, lambda prompts, n, params: [[Sample("raise", 1, "stop"), Sample("behave", 1, "stop")]],
        [problem], num_samples=2,
    )  # fmt: skip
    assert (summary["failed_score_rate"], summary["pass@1"]) == (0.5, 0.5)
