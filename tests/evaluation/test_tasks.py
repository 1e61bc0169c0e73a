"""Benchmarks by name: local files, Hugging Face's fields, generators, and what is refused."""

import os
import sys
import types
from pathlib import Path

import pytest

from m1.evaluation.tasks import TASKS, load_task, parse_tasks, problems_of_rows, task_name

SIZES = {"math500": 500, "aime24": 30, "aime25": 30, "amc23": 40, "olympiadbench": 675, "gsm8k": 1319, "aime_1983_2023": 975}


@pytest.fixture(scope="session")
def shared_data() -> Path:
    path = Path(os.environ.get("M1_SHARED_DATA", Path(__file__).parents[3] / "shared" / "data"))
    if not path.is_dir():
        pytest.skip(f"no benchmark files at {path}; set M1_SHARED_DATA")
    return path


@pytest.mark.parametrize("task", SIZES)
def test_local_files_hold_whole_benchmarks(shared_data, task):
    problems = load_task(task, data_dir=str(shared_data))
    assert len(problems) == SIZES[task]
    assert len({problem.id for problem in problems}) == SIZES[task]
    assert [problem.id for problem in load_task(task, data_dir=str(shared_data), limit=3)] == [p.id for p in problems[:3]]


# A row as each dataset has it on Hugging Face, and the reference answer in it.
ROWS = {
    "math500": ({"unique_id": "test/a/1.json", "problem": "p", "solution": "s", "answer": r"\pi", "level": 3}, r"\pi"),
    "aime24": ({"id": 60, "problem": "p", "solution": "s", "answer": "204", "url": "u", "year": "2024"}, "204"),
    "aime25": ({"id": "0", "problem": "p", "answer": "70"}, "70"),
    "amc23": ({"id": 0, "question": "p", "answer": 27.0, "url": "u"}, "27.0"),
    "olympiadbench": ({"id": 1606, "question": "p", "final_answer": ["2", "3"], "unit": None, "image_1": None}, "2, 3"),
    "gsm8k": ({"question": "p", "answer": "Janet sells 9.\n#### 1,018"}, "1018"),
    "gsm8k_train": ({"question": "p", "answer": "#### -3"}, "-3"),
    "math_train": ({"problem": "p", "level": "Level 5", "type": "x", "solution": r"So $x = \boxed{\frac12}$."}, r"\frac12"),
    "minerva": ({"question": "p", "answer": "4.5e33"}, "4.5e33"),
    "aime_1983_2023": ({"ID": "1983-1", "Year": 1983, "Question": "p", "Answer": "60", "Part": "I"}, "60"),
}  # fmt: skip


@pytest.mark.parametrize("task", TASKS)
def test_rows_become_problems(task):
    row, answer = ROWS[task]
    [problem] = problems_of_rows(task, [row])
    assert (problem.problem, problem.answer, problem.reward) == ("p", answer, "math")
    assert problem.id.startswith(f"{task}/")
    with pytest.raises(ValueError, match=r"row 0: no field .* has it changed\?"):
        problems_of_rows(task, [{"something": "else"}])
    with pytest.raises(ValueError, match="is empty"):
        problems_of_rows(task, [])


def test_hugging_face_is_asked_for_name_subset_and_split(monkeypatch):
    asked = []

    def load_dataset(*names, split):
        asked.append((*names, split))
        return [ROWS["aime_1983_2023"][0], {**ROWS["aime_1983_2023"][0], "ID": "2024-1", "Year": 2024}]

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    assert len(load_task("aime_1983_2023")) == 1
    assert asked == [("di-zhang-fdu/AIME_1983_2024", None, "train")]


def test_without_the_library_the_remedy_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ValueError, match=r"pip install 'm1-reasoner\[data\]'; or give --data-dir"):
        load_task("gsm8k")


def test_files_and_generators(tmp_path):
    path = tmp_path / "my problems.jsonl"
    path.write_text('{"problem": "1 + 1?", "answer": 2}\n')
    assert load_task(str(path))[0].answer == "2"
    assert task_name(str(path)) == "my_problems"
    assert task_name("gym:chain_sum") == "gym_chain_sum"
    assert len(load_task("gym:chain_sum", limit=4, seed=1)) == 4
    assert parse_tasks(f"math500, gym:chain_sum,{path}") == ["math500", "gym:chain_sum", str(path)]


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ("", "expected names"),
        ("math50", r"unknown task 'math50'; did you mean 'math500'\? Or a file"),
        ("chess", "unknown task 'chess'; known are math500, .*, or a file of JSON lines"),
        ("aime24,aime24", "names a task twice"),
        ("a/x.jsonl,b/x.jsonl", "names a task twice"),
    ],
)
def test_bad_names_are_refused(names, message):
    with pytest.raises(ValueError, match=message):
        parse_tasks(names)


def test_missing_files_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"none of olympiadbench\.jsonl, olympiad_bench\.jsonl is there"):
        load_task("olympiadbench", data_dir=str(tmp_path))
    with pytest.raises(FileNotFoundError, match="no such directory"):
        load_task("aime24", data_dir=str(tmp_path / "nowhere"))
    with pytest.raises(FileNotFoundError, match="no such file of problems"):
        load_task(str(tmp_path / "x.jsonl"))
    with pytest.raises(ValueError, match="--limit"):
        load_task("aime24", limit=-1)
