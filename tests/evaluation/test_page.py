"""The page of evaluations: what it says of runs made up for the purpose, whose numbers are known."""

import json

import pytest

from m1.evaluation.budget import Budget
from m1.evaluation.page import is_evaluation, load_evaluations, write_evaluation_page
from m1.evaluation.runner import evaluate
from m1.evaluation.sampling import Sample
from m1.reasoning.problems import Problem
from m1.reasoning.rewards import Scorer
from m1.storage import write_run_record
from tests.evaluation.fake_model import FakeModel

PROBLEMS = [Problem(f"p{index}", f"{index} + 1?", str(index + 1)) for index in range(12)]


@pytest.fixture(scope="module")
def scorer():
    with Scorer(num_workers=1) as shared:
        yield shared


def weak(number, index):
    """Right in one of four samples, and the others agree on a wrong answer."""
    return Sample(rf"\boxed{{{number + 1 if index % 4 == 0 else 0}}}", 10, "stop", -1.0 if index % 4 else -0.1, -0.2)


def strong(number, index):
    return Sample(rf"\boxed{{{number + 1 if index % 4 else 0}}}", 20, "stop", -0.1, -0.2)


def write(directory, scorer, answer, *, model, problems=PROBLEMS, **options):
    evaluate(
        problems, FakeModel(answer), num_samples=options.pop("num_samples", 4), params={"temperature": 0.7},
        records_path=directory / "aime24.jsonl.gz", scorer=scorer, **options,
    )  # fmt: skip
    config = {"model": f"models/{model}", "temperature": 0.7, "time_budgets": "", "token_budgets": "1000,2000,6000"}
    write_run_record(directory, "eval", config, hardware={"cpu": "an abacus", "threads": 1}, backend={"backend": "engine"})
    return directory


def cells(page, first):
    """The rest of the table row whose first cells are `first`."""
    start = "<tr>" + "".join(f"<td>{cell}</td>" for cell in first)
    assert start in page, (first, page[:3000])
    row = page[page.index(start) + len(start) :]
    return row[: row.index("</tr>")].removeprefix("<td>").removesuffix("</td>").split("</td><td>")


def test_two_models_are_compared_problem_by_problem(tmp_path, scorer):
    directories = [write(tmp_path / name, scorer, answer, model=name) for name, answer in (("weak", weak), ("strong", strong))]
    assert all(map(is_evaluation, directories))
    write_evaluation_page(directories, tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text()
    assert "Evaluation: weak, strong" in page
    # Wrong answers of problem 0 are never right: 0 is not 1.
    assert cells(page, ["weak", "12"]) == ["25.0% ± 0.0%", "0.0%", "100.0%", "10", "0.0%", "0.0%"]
    assert cells(page, ["strong", "12"]) == ["75.0% ± 0.0%", "100.0%", "100.0%", "20", "0.0%", "0.0%"]
    assert cells(page, ["pass@1"]) == ["+50.0%", "+50.0% to +50.0%", "0.000488", "12"]  # 2 of 2^12 sign patterns
    assert cells(page, ["maj@4"])[0] == "+100.0%"
    assert cells(page, ["pass@4"]) == ["+0.0%", "+0.0% to +0.0%", "1", "12"]
    assert cells(page, ["weak", "4"]) == ["0.0%", "0.0%", "100.0%", "0.0%", "100.0%"]  # its right samples are the surest
    assert "an abacus, 1 threads" in page


def test_budgets_are_drawn_and_compared(tmp_path, scorer):
    directories = [
        write(tmp_path / name, scorer, answer, model=name, num_samples=1000, budget=Budget(tokens=6000))
        for name, answer in (("weak", weak), ("strong", strong))
    ]
    write_evaluation_page(directories, tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text()
    assert page.count("<svg") == 1
    assert cells(page, ["weak", "1000"])[2] == "100.0"  # samples finished, of 10 tokens each
    assert cells(page, ["strong", "6000"]) == ["100.0% ± 0.0%", "100.0%", "300.0"]
    assert cells(page, ["vote at 6000 tokens"])[0] == "+100.0%"


def test_what_is_unfinished_or_not_comparable_is_said(tmp_path, scorer):
    first = write(tmp_path / "a", scorer, weak, model="same")
    second = write(tmp_path / "b", scorer, strong, model="same", problems=PROBLEMS[:7])
    with pytest.raises(KeyboardInterrupt):
        write(tmp_path / "c", scorer, strong, model="other", on_record=interrupt_at(3))
    write_run_record(tmp_path / "c", "eval", {"model": "other"})
    write_evaluation_page([first, second, tmp_path / "c"], tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text()
    assert [evaluation.name for evaluation in load_evaluations([first, second])] == [str(first), str(second)]
    assert "differ in problems or prompts" in page
    assert "Unfinished: other has yet to be asked 9 of 12 problems" in page
    assert cells(page, ["pass@1"])[-1] == "7"


def interrupt_at(number):
    def on_record(done, total):
        if done == number:
            raise KeyboardInterrupt

    return on_record


def test_an_evaluation_without_a_problem_is_said(tmp_path):
    (tmp_path / "m1_run.json").write_text(json.dumps({"command": "eval", "config": {}}))
    with pytest.raises(ValueError, match="no problem has been evaluated yet"):
        write_evaluation_page([tmp_path], tmp_path / "page.html")
    assert not is_evaluation(tmp_path / "nowhere")
