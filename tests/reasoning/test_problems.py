"""Problems from files and generators, and that bad input is named by file and line."""

import json
import re
from dataclasses import asdict

import pytest

from m1.reasoning.problems import Problem, generate_problems, read_problems, write_problems


def write(tmp_path, *lines):
    path = tmp_path / "problems.jsonl"
    path.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    return path


def test_read_problems(tmp_path):
    path = write(
        tmp_path,
        '{"id": "one", "problem": "1+1?", "answer": "2", "level": 3}',
        "",
        '{"problem": "½+½?", "answer": 1}',
        '{"problem": "?", "answer": " x ", "reward": "my:reward", "id": 7}',
    )
    assert read_problems(path) == [
        Problem("one", "1+1?", "2", "math", {"level": 3}),
        Problem("problems/3", "½+½?", "1"),
        Problem("7", "?", "x", "my:reward"),
    ]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"problem": "p", "answer"', "malformed JSON"),
        ('["p", "a"]', "expected a JSON object with `problem` and `answer`, got list"),
        ('{"problem": "p", "solution": "s"}', "`answer` is missing; the line has problem, solution"),
        ("{}", "`problem` is missing; the line has no keys"),
        ('{"problem": "p", "answer": ["1"]}', "`answer` must be a string, got list"),
        ('{"problem": "p", "answer": true}', "`answer` must be a string, got bool"),
        ('{"problem": 5, "answer": "1"}', "`problem` must be a string, got int"),
        ('{"problem": " ", "answer": "1"}', "the problem is empty"),
        ('{"problem": "p", "answer": ""}', "the answer is empty"),
        ('{"problem": "p", "answer": "1", "id": "a"}', "the id 'a' stands in an earlier line too"),
    ],
)
def test_a_bad_line_is_named(tmp_path, line, message):
    path = write(tmp_path, '{"id": "a", "problem": "p", "answer": "1"}', "", line)
    with pytest.raises(ValueError, match=re.escape(f"{path}, line 3: {message}")):
        read_problems(path)


def test_empty_and_missing_files(tmp_path):
    with pytest.raises(ValueError, match="holds no problems"):
        read_problems(write(tmp_path, "", " "))
    with pytest.raises(FileNotFoundError):
        read_problems(tmp_path / "absent.jsonl")


def test_unanswered_lines_can_be_skipped(tmp_path):
    path = write(tmp_path, '{"problem": "p", "answer": ""}', '{"problem": "q", "answer": "1"}')
    assert [problem.problem for problem in read_problems(path, skip_unanswered=True)] == ["q"]


def test_benchmark_files_can_be_read(shared_data):
    for path in sorted(shared_data.glob("*.jsonl")):
        assert len(read_problems(path, skip_unanswered=True)) >= 30


def test_generated_problems_are_plain_json_and_reproducible():
    problems = generate_problems("chain_sum", 5, seed=3, min_terms=2, max_terms=3)
    assert problems == generate_problems("chain_sum", 5, seed=3, min_terms=2, max_terms=3)
    assert problems != generate_problems("chain_sum", 5, seed=4, min_terms=2, max_terms=3)
    assert [Problem(**json.loads(json.dumps(asdict(problem)))) for problem in problems] == problems
    assert len({problem.id for problem in problems}) == 5
    for problem in problems:
        assert problem.reward == "reasoning_gym:chain_sum"
        assert len(re.findall(r"\d+", problem.problem)) in (2, 3)


@pytest.mark.parametrize(
    ("name", "config", "message"),
    [
        ("chain_sums", {}, "unknown reasoning-gym generator 'chain_sums'; near names: chain_sum"),
        ("chain_sum", {"min_term": 2}, "chain_sum refuses the config .*min_term"),
        ("chain_sum", {"min_terms": 0}, "chain_sum refuses the config"),
        ("propositional_logic", {}, "propositional_logic has no single reference answer"),
        ("rearc", {}, "rearc scores its own answer 0.05"),
    ],
)
def test_useless_generators_and_configs_are_errors(name, config, message):
    with pytest.raises(ValueError, match=message):
        generate_problems(name, 2, seed=1, **config)
    with pytest.raises(ValueError, match="size must be at least 1"):
        generate_problems("chain_sum", 0, seed=1)


def test_problems_are_read_as_they_were_written(tmp_path):
    problems = [*generate_problems("lcm", 2, seed=3), Problem("a", "x\u2028 ü?", "5", metadata={"level": 3})]
    write_problems(tmp_path / "problems.jsonl", problems)
    assert read_problems(tmp_path / "problems.jsonl") == problems
