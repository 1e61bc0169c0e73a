"""Rows from files, generators and data sets: what is read, and how mistakes are named."""

import json
import sys

import pytest

from m1.json_lines import is_file_name
from m1.training.sources import check_row, fingerprints, read_problem_set, read_rows

ROW = {"prompt": "1+1", "completion": "2"}


def write_lines(path, *lines):
    path.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines) + "\n", encoding="utf-8")
    return str(path)


def read(*sources, **options):
    return read_rows(sources, **{"num_problems": 3, "seed": 0} | options)


def test_rows_come_in_order_from_all_sources(tmp_path):
    first = write_lines(tmp_path / "a.jsonl", ROW, "", {"problem": "2+2", "answer": 4})
    messages = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]
    second = write_lines(tmp_path / "b.jsonl", {"messages": messages, "id": 7})
    rows = read(first, second)
    assert [row.where for row in rows] == [f"{first}, line 1", f"{first}, line 3", f"{second}, line 1"]
    assert rows[1].fields["answer"] == "4"


def test_generators(tmp_path):
    rows = read("gym:chain_sum", num_problems=5)
    assert len(rows) == 5
    assert all(row.fields["problem"] and row.fields["answer"] for row in rows)
    assert [row.fields for row in rows] == [row.fields for row in read("gym:chain_sum", num_problems=5)]
    assert [row.fields for row in rows] != [row.fields for row in read("gym:chain_sum", num_problems=5, seed=1)]
    with pytest.raises(ValueError, match="chain_some"):
        read("gym:chain_some")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"prompt": "a", ', "line 2: malformed JSON"),
        ('"text"', "line 2: expected an object"),
        ({"text": "a"}, "line 2: expected 'messages', or 'prompt' and 'completion'.*'text'"),
        ({"prompt": "a", "completion": 3}, "line 2: 'completion' must be a string, got int"),
        ({"messages": []}, "line 2: 'messages' must be a list"),
        ({"messages": [{"role": "user"}]}, "line 2, in a message: 'content' must be a string"),
        ({"messages": [{"role": "user", "content": "a"}]}, "line 2: 'messages' needs an assistant turn"),
        ({"messages": [{"role": "assistant", "content": "a"}]}, "line 2: 'messages' needs an assistant turn"),
        ({"problem": "a", "answer": True}, "line 2: 'answer' must be a string, got bool"),
    ],
)
def test_bad_lines_are_named_by_file_and_number(tmp_path, line, message):
    path = write_lines(tmp_path / "data.jsonl", ROW, line)
    with pytest.raises(ValueError, match=f"data.jsonl, {message}"):
        read(path)


def test_bytes_that_are_no_text(tmp_path):
    path = tmp_path / "data.jsonl"
    path.write_bytes(b'{"prompt": "\xff\xfe", "completion": "a"}\n')
    with pytest.raises(ValueError, match=r"data.jsonl, line 1: not UTF-8"):
        read(str(path))


def test_missing_and_empty_sources(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nowhere\.jsonl"):
        read(str(tmp_path / "nowhere.jsonl"))
    with pytest.raises(FileNotFoundError, match=r"nowhere\.jsonl"):
        read_problem_set([str(tmp_path / "nowhere.jsonl")], num_problems=1, seed=0)
    with pytest.raises(ValueError, match=r"empty\.jsonl: the data set is empty"):
        read(write_lines(tmp_path / "empty.jsonl", ""))
    with pytest.raises(ValueError, match="--data is needed"):
        read()


def test_a_dataset_name_without_the_library(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ValueError, match=r"some/name: no such file.*m1-reasoner\[data\]"):
        read("some/name")


def test_a_dataset_name(monkeypatch):
    class FakeDatasets:
        @staticmethod
        def load_dataset(name, split):
            assert (name, split) == ("some/name", "test")
            return [{"problem": "1+1", "answer": "2", "solution": "easy"}, {"problem": "2+2", "answer": "4"}]

    monkeypatch.setitem(sys.modules, "datasets", FakeDatasets)
    assert [row.fields["answer"] for row in read("some/name:test")] == ["2", "4"]
    problems = read_problem_set(["some/name:test"], num_problems=1, seed=0)
    assert [(problem.problem, problem.answer, problem.reward) for problem in problems] == [
        ("1+1", "2", "math"),
        ("2+2", "4", "math"),
    ]


def test_problem_sets_and_rewards(tmp_path):
    path = write_lines(tmp_path / "p.jsonl", {"problem": "1+1", "answer": "2"})
    problems = read_problem_set([path, "gym:gcd"], num_problems=2, seed=0)
    assert [problem.reward for problem in problems] == ["math", "reasoning_gym:gcd", "reasoning_gym:gcd"]
    named = read_problem_set([path, "gym:gcd"], num_problems=2, seed=0, reward="my.module:score")
    assert {problem.reward for problem in named} == {"my.module:score"}
    with pytest.raises(ValueError, match="no good"):
        read_problem_set([path], num_problems=2, seed=0, reward="no good")


def test_rows_given_in_memory_are_checked_too():
    assert check_row(ROW, "row 1").fields == ROW
    with pytest.raises(ValueError, match="row 9"):
        check_row({"completion": "a"}, "row 9")


def test_a_problem_is_held_out_with_all_its_rows(tmp_path):
    path = tmp_path / "rows.jsonl"
    problems = [{"problem": f"{number} + 1", "answer": str(number + 1)} for number in range(400)]
    samples = [{"prompt": one["problem"] + " = ?", "completion": "x", "problem": one["problem"]} for one in problems]
    path.write_text("".join(json.dumps(row) + "\n" for row in problems + samples))

    def read(split):
        return [row.fields["problem"] for row in read_rows([f"{path}{split}"], num_problems=1, seed=0)]

    held_out, train = read(":held_out"), read(":train")
    assert sorted(held_out + train) == sorted(read(""))
    assert not set(held_out) & set(train)
    assert 2 <= len(set(held_out)) <= 20
    assert len(held_out) == 2 * len(set(held_out))
    path.write_text("".join(json.dumps(row) + "\n" for row in problems))
    chosen = read_problem_set([f"{path}:held_out"], num_problems=1, seed=0)
    assert [problem.problem for problem in chosen] == list(dict.fromkeys(held_out))
    assert fingerprints([f"{path}:train"], num_problems=1, seed=0) != fingerprints([str(path)], num_problems=1, seed=0)


def test_a_split_is_not_taken_from_a_name_of_datasets():
    assert not is_file_name("openai/gsm8k:train")
    assert is_file_name("rows.jsonl:train")
    with pytest.raises(FileNotFoundError, match=r"rows\.jsonl: no such data file"):
        read_rows(["rows.jsonl:held_out"], num_problems=1, seed=0)
