"""The benchmarks that `m1 eval` knows by name, and how their problems are loaded: from Hugging Face or from local JSON lines.

A task is a few lines of `TASKS`. How problems are asked is the runner's business, how answers are judged `m1.reasoning`'s.
"""

import difflib
import json
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from m1.reasoning.answers import extract_answer
from m1.reasoning.problems import Problem, generate_problems, read_problems

GYM_PREFIX = "gym:"
NUM_GENERATED = 100  # problems drawn from a reasoning-gym generator where no limit is given


def _plain(answer: Any) -> str:
    return str(answer).strip()


def _after_hashes(answer: Any) -> str:
    """GSM8K's answers are solutions that end in `#### 1,234`."""
    return str(answer).rpartition("####")[2].strip().replace(",", "")


def _in_last_box(answer: Any) -> str:
    """MATH's solutions end with the answer in a box; a few have none."""
    return extract_answer(str(answer)) or ""


def _joined(answer: Any) -> str:
    """OlympiadBench's answers are lists of one or more values."""
    return ", ".join(map(str, answer)).strip() if isinstance(answer, (list, tuple)) else str(answer).strip()


@dataclass(frozen=True, slots=True)
class Task:
    """A benchmark: where its problems are, which fields hold them, and what is asked beside the problem.

    dataset, subset, split: its place on Hugging Face. problem, answer, id: field names there (id empty: numbered).
    read_answer: from the answer field to the reference answer, which is judged by mathematical equality.
    keep: which rows belong. files: names under which a data directory may hold it as JSON lines with `problem` and `answer`.
    suffix: added to each problem; None is the instruction of the M1 paper.
    """

    dataset: str
    split: str = "test"
    subset: str | None = None
    problem: str = "problem"
    answer: str = "answer"
    id: str = ""
    read_answer: Callable[[Any], str] = _plain
    keep: Callable[[Mapping[str, Any]], bool] = field(default=lambda row: True)
    files: tuple[str, ...] = ()
    suffix: str | None = None


TASKS: dict[str, Task] = {
    "math500": Task("HuggingFaceH4/MATH-500", id="unique_id"),
    "aime24": Task("HuggingFaceH4/aime_2024", split="train", id="id"),
    "aime25": Task("math-ai/aime25", id="id"),
    "amc23": Task("math-ai/amc23", problem="question", id="id"),
    "olympiadbench": Task(
        "Hothan/OlympiadBench", subset="OE_TO_maths_en_COMP", split="train", problem="question", answer="final_answer", id="id",
        read_answer=_joined, files=("olympiad_bench",),
    ),
    "gsm8k": Task("openai/gsm8k", subset="main", problem="question", read_answer=_after_hashes, files=("gsm8k_test",)),
    "gsm8k_train": Task("openai/gsm8k", subset="main", split="train", problem="question", read_answer=_after_hashes),
    "math_train": Task(
        "DigitalLearningGmbH/MATH-lighteval", subset="default", split="train", answer="solution", read_answer=_in_last_box,
    ),
    "minerva": Task("math-ai/minervamath", problem="question"),
    "aime_1983_2023": Task(
        "di-zhang-fdu/AIME_1983_2024", split="train", problem="Question", answer="Answer", id="ID",
        keep=lambda row: int(row["Year"]) <= 2023,
    ),
}  # fmt: skip


def parse_tasks(names: str) -> list[str]:
    """The task names in a comma-separated list. Raises ValueError for an unknown one (naming near ones) and for repetitions."""
    tasks = [name.strip() for name in names.split(",") if name.strip()]
    if not tasks:
        raise ValueError(f"--tasks: expected names with commas between them; known are {', '.join(TASKS)}")
    for name in tasks:
        if name not in TASKS and not name.startswith(GYM_PREFIX) and not _is_file(name):
            near = difflib.get_close_matches(name, TASKS, n=1)
            hint = f"did you mean {near[0]!r}? Or" if near else f"known are {', '.join(TASKS)}, or"
            raise ValueError(f"--tasks: unknown task {name!r}; {hint} a file of JSON lines, or gym:GENERATOR")
    short = [task_name(name) for name in tasks]
    if len(set(short)) < len(short):
        raise ValueError(f"--tasks: {names!r} names a task twice; each writes records of its own name")
    return tasks


def task_name(task: str) -> str:
    """A task's name as part of a file name: `gym:chain_sum` is gym_chain_sum, `data/mine.jsonl` is mine."""
    stem = Path(task).stem if _is_file(task) else task
    return re.sub(r"[^\w.-]+", "_", stem)


def load_task(task: str, *, data_dir: str = "", limit: int = 0, seed: int = 0) -> list[Problem]:
    """The problems of a task: its first `limit`, or all for 0.

    task: a name of `TASKS`, read from `data_dir` if that has it and from Hugging Face if no `data_dir` is given; a file of
    JSON lines; or gym:GENERATOR, which draws `limit` problems (or 100) with `seed`. Raises FileNotFoundError for a missing
    file, ValueError for rows without the fields, a limit below 0, and when `datasets` is needed and not installed.
    """
    if limit < 0:
        raise ValueError(f"--limit: expected at least 0, got {limit}")
    if task.startswith(GYM_PREFIX):
        return generate_problems(task.removeprefix(GYM_PREFIX), limit or NUM_GENERATED, seed)
    if _is_file(task):
        problems = read_problems(_existing(Path(task)))
    elif data_dir:
        problems = read_problems(_find(Path(data_dir), task))
    else:
        problems = _load_dataset(task)
    return problems[:limit] if limit else problems


def _is_file(name: str) -> bool:
    return name not in TASKS and (Path(name).suffix in (".jsonl", ".json") or Path(name).is_file())


def _existing(path: Path) -> Path:
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file of problems")
    return path


def _find(directory: Path, task: str) -> Path:
    if not directory.is_dir():
        raise FileNotFoundError(f"--data-dir {directory}: no such directory")
    names = [f"{name}.jsonl" for name in (task, *TASKS[task].files)]
    for name in names:
        if (directory / name).is_file():
            return directory / name
    raise FileNotFoundError(
        f"--data-dir {directory}: none of {', '.join(names)} is there; leave --data-dir out to download {task}"
    )


def _load_dataset(name: str) -> list[Problem]:
    task = TASKS[name]
    try:
        import datasets
    except ImportError as error:
        raise ValueError(
            f"{name}: downloading {task.dataset} needs the `datasets` library: pip install 'm1-reasoner[data]'; "
            "or give --data-dir with JSON lines"
        ) from error
    rows = datasets.load_dataset(task.dataset, task.subset, split=task.split)
    return problems_of_rows(name, filter(task.keep, rows))


def problems_of_rows(name: str, rows: Iterable[Mapping[str, Any]]) -> list[Problem]:
    """The problems in rows of task `name`'s dataset. Raises ValueError for a row that lacks a field, or if there are none."""
    task, problems = TASKS[name], []
    for number, row in enumerate(rows):
        for key in (task.problem, task.answer):
            if key not in row:
                raise ValueError(f"{task.dataset}, row {number}: no field {key!r}; it has {', '.join(row)}: has it changed?")
        identity = str(row[task.id]) if task.id and task.id in row else str(number)
        known = (task.problem, task.answer, task.id, "solution")
        rest = json.loads(json.dumps({key: value for key, value in row.items() if key not in known}, default=str))
        problems.append(
            Problem(f"{name}/{identity}", str(row[task.problem]), task.read_answer(row[task.answer]), metadata=rest)
        )
    if not problems:
        raise ValueError(f"{task.dataset}: the split {task.split} is empty")
    return problems
