"""Where training data comes from: JSON-lines files (.gz too), directories of `m1 sample`, `datasets` names, and
reasoning-gym generators as gym:NAME.

A row is checked here, and an error names its file and line; how it becomes tokens is decided in `data.py`.
"""

import dataclasses
import hashlib
import importlib.metadata
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from m1.json_lines import Files, files_of, is_file_name, numbered_lines
from m1.reasoning.problems import Problem, generate_problems, read_problems
from m1.reasoning.rewards import require_reward_name

GYM_PREFIX = "gym:"
_SHAPES = "'messages', or 'prompt' and 'completion', or 'problem' and 'answer'"


@dataclass(frozen=True)
class Row:
    """One checked row: its fields, and where they stand (for errors)."""

    fields: Mapping[str, Any]
    where: str


def read_rows(sources: Sequence[str], *, num_problems: int, seed: int, only_correct: bool = False) -> list[Row]:
    """All rows of `sources`; see `iterate_rows`, which does not hold them all at once."""
    return list(iterate_rows(sources, num_problems=num_problems, seed=seed, only_correct=only_correct))


def iterate_rows(sources: Sequence[str], *, num_problems: int, seed: int, only_correct: bool = False) -> Iterator[Row]:
    """Rows of `sources` in their order: files, directories, `datasets` names (NAME or NAME:SPLIT), generators (gym:NAME).
    FILE:held_out means the few rows of a file or directory that FILE:train leaves out (`json_lines.is_held_out`).

    only_correct: leave out rows whose `is_correct` is there and not true.

    Raises FileNotFoundError for a missing file, and ValueError for a malformed line (named by file and number), a row of
    another shape, an empty source, an unknown generator, or a `datasets` name when `datasets` is not installed.
    """
    _require_sources(sources)
    for source in sources:
        num_rows = num_kept = 0
        for row in _rows_of(source, num_problems, seed):
            num_rows += 1
            if not only_correct or row.fields.get("is_correct", True) is True:
                num_kept += 1
                yield row
        if not num_rows:
            raise ValueError(f"{source}: the data set is empty")
        if not num_kept:
            raise ValueError(f"{source}: no sample in it is correct; --no-only-correct takes all")


def fingerprints(sources: Sequence[str], *, num_problems: int, seed: int) -> list[Any]:
    """What tells the contents of `sources` from others, as plain JSON: hashes of files, versions and seeds of generators.

    Raises as `iterate_rows` does for sources that aren't there.
    """
    _require_sources(sources)
    found: list[Any] = []
    for source in sources:
        if source.startswith(GYM_PREFIX):
            found.append([source, num_problems, seed, importlib.metadata.version("reasoning-gym")])
        elif is_file_name(source):
            files = files_of(source)
            for path in files.paths:
                with path.open("rb") as file:
                    found.append([path.suffix, hashlib.file_digest(file, "sha256").hexdigest(), files.split])
        else:
            found.append([source, _load_dataset(source)._fingerprint])
    return found


def _require_sources(sources: Sequence[str]) -> None:
    if not sources:
        raise ValueError("--data is needed: JSON-lines files, `datasets` names, or gym:NAME")


def _rows_of(source: str, num_problems: int, seed: int) -> Iterator[Row]:
    if source.startswith(GYM_PREFIX):
        for problem in generate_problems(source.removeprefix(GYM_PREFIX), num_problems, seed):
            yield Row({"problem": problem.problem, "answer": problem.answer}, problem.id)
    elif is_file_name(source):
        files = files_of(source)
        yield from (row for path in files.paths for row in _read_json_lines(path) if files.has(row.fields))
    else:
        yield from _read_dataset(source)


def read_problem_set(sources: Sequence[str], *, num_problems: int, seed: int, reward: str = "auto") -> list[Problem]:
    """All problems of `sources`, as for `read_rows`, with the reward "auto" (each problem's own) or the one named.

    Problems of a directory of `m1 sample` have their share of correct samples as "pass_rate" in their metadata.

    Raises as `read_rows` does, and ValueError for rows without problem and answer, and a `reward` that is no name of one.
    """
    if not sources:
        raise ValueError("--data is needed: JSON-lines files or `datasets` names with problem and answer, or gym:NAME")
    problems: list[Problem] = []
    for source in sources:
        if source.startswith(GYM_PREFIX):
            problems += generate_problems(source.removeprefix(GYM_PREFIX), num_problems, seed)
        elif is_file_name(source):
            problems += _problems_of(files_of(source))
        else:
            problems += [_problem_of(row) for row in _read_dataset(source)]
    if reward == "auto":
        return problems
    require_reward_name(reward)
    return [dataclasses.replace(problem, reward=reward) for problem in problems]


def read_prompts(sources: Sequence[str], *, num_problems: int, seed: int, suffix: str) -> list[str]:
    """What is asked in the rows of `sources`, each text once: prompts as they stand, problems with `suffix`.

    Raises as `read_rows` does, and ValueError for messages with more in them than a question and its answer.
    """
    texts: dict[str, None] = {}
    for row in read_rows(sources, num_problems=num_problems, seed=seed):
        fields = row.fields
        if "messages" in fields:
            if [message["role"] for message in fields["messages"]] != ["user", "assistant"]:
                raise ValueError(f"{row.where}: expected a user's message and an assistant's, to sample answers to the first")
            texts[fields["messages"][0]["content"]] = None
        else:
            texts[fields["prompt"] if "prompt" in fields else fields["problem"] + suffix] = None
    return list(texts)


def check_row(fields: Any, where: str) -> Row:
    """The row, if it has one of the three shapes; else ValueError that says `where` and what is wrong."""
    if not isinstance(fields, Mapping):
        raise ValueError(f"{where}: expected an object with {_SHAPES}, got {type(fields).__name__}")
    if "messages" in fields:
        _check_messages(fields["messages"], where)
    elif "prompt" in fields and "completion" in fields:
        _check_texts(fields, ("prompt", "completion"), where)
    elif "problem" in fields and "answer" in fields:
        if isinstance(fields["answer"], (int, float)) and not isinstance(fields["answer"], bool):
            fields = {**fields, "answer": str(fields["answer"])}
        _check_texts(fields, ("problem", "answer"), where)
    else:
        raise ValueError(f"{where}: expected {_SHAPES}; the row has {', '.join(map(repr, fields)) or 'nothing'}")
    return Row(fields, where)


def as_rows(rows: Iterable[Row | Mapping[str, Any]]) -> Iterator[Row]:
    """Rows given in memory, checked as they come; they are named by their number from 1."""
    return (row if isinstance(row, Row) else check_row(row, f"row {number}") for number, row in enumerate(rows, start=1))


def _read_json_lines(path: Path) -> Iterator[Row]:
    for number, line in numbered_lines(path):
        where = f"{path}, line {number}"
        try:
            fields = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{where}: malformed JSON ({error.msg} at column {error.colno})") from error
        except UnicodeDecodeError as error:
            raise ValueError(f"{where}: not UTF-8 ({error.reason})") from error
        yield check_row(fields, where)


def _read_dataset(source: str) -> Iterator[Row]:
    for number, fields in enumerate(_load_dataset(source)):
        yield check_row(fields, f"{source}, row {number}")


def _load_dataset(source: str) -> Any:
    name, _, split = source.partition(":")
    try:
        import datasets
    except ImportError as error:
        raise ValueError(
            f"{source}: no such file, and reading it by its `datasets` name needs that library: pip install 'm1-reasoner[data]'"
        ) from error
    return datasets.load_dataset(name, split=split or "train")


def _problems_of(files: Files) -> list[Problem]:
    if not files.are_samples:
        return [one for path in files.paths for one in read_problems(path) if files.has({"problem": one.problem})]
    rows: dict[str, list[Mapping[str, Any]]] = {}
    for row in (row for path in files.paths for row in _read_json_lines(path)):
        if row.fields.get("answer") is not None and files.has(row.fields):
            rows.setdefault(row.fields["id"], []).append(row.fields)
    problems = []
    for identity, samples in rows.items():
        checked = [bool(sample["is_correct"]) for sample in samples if sample["is_correct"] is not None]
        metadata = samples[0].get("metadata", {}) | ({"pass_rate": sum(checked) / len(checked)} if checked else {})
        problems.append(Problem(identity, samples[0]["problem"], samples[0]["answer"], samples[0]["reward"], metadata))
    return problems


def _problem_of(row: Row) -> Problem:
    if "problem" not in row.fields or "answer" not in row.fields:
        raise ValueError(f"{row.where}: expected 'problem' and 'answer'; the row has {', '.join(map(repr, row.fields))}")
    return Problem(str(row.fields.get("id", row.where)), row.fields["problem"], row.fields["answer"])


def _check_messages(messages: Any, where: str) -> None:
    if not isinstance(messages, Sequence) or isinstance(messages, str) or not messages:
        raise ValueError(f"{where}: 'messages' must be a list of objects with role and content")
    for message in messages:
        if not isinstance(message, Mapping):
            raise ValueError(f"{where}: a message must be an object with role and content, got {type(message).__name__}")
        _check_texts(message, ("role", "content"), f"{where}, in a message")
    roles = [message["role"] for message in messages]
    if "assistant" not in roles or roles[0] == "assistant":
        raise ValueError(f"{where}: 'messages' needs an assistant turn after another one; its roles are {', '.join(roles)}")


def _check_texts(fields: Mapping[str, Any], names: tuple[str, ...], where: str) -> None:
    for name in names:
        if not isinstance(fields.get(name), str):
            raise ValueError(f"{where}: {name!r} must be a string, got {type(fields.get(name)).__name__}")
