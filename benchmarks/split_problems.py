"""Divide a set of training problems in two: some for choosing between models, which no stage may train on, and the rest.

    python benchmarks/split_problems.py gsm8k_train --held-out 500 --out runs/problems

takes a file of JSON lines, a benchmark that `m1 eval` knows by name and downloads, or `quickstart` (sums of two small numbers,
as `m1 quickstart` draws them), and writes gsm8k_train_dev.jsonl and gsm8k_train_rest.jsonl: `m1 eval --tasks` takes the one,
`m1 sample --data` the other. Which problems are held out follows from their texts alone: the same in every run, whatever the
order of the file. Problems without an answer are left out.
"""

import argparse
import hashlib
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from m1.evaluation.tasks import load_task, task_name
from m1.quickstart.problems import draw_problems
from m1.quickstart.recipe import Recipe
from m1.reasoning.problems import Problem, read_problems, write_problems

QUICKSTART, NUM_SUMS = "quickstart", 3500  # how many of the quickstart's problems: a fifth of all that there are


def split(problems: Sequence[Problem], num_held_out: int) -> tuple[list[Problem], list[Problem]]:
    """(held out, the rest), each in the given order; problems of one text stay together, so there may be a few more."""
    if not 0 < num_held_out < len(problems):
        raise ValueError(f"--held-out: expected 1 to {len(problems) - 1} of the {len(problems)} problems, got {num_held_out}")
    texts = sorted({problem.problem for problem in problems}, key=lambda text: hashlib.sha256(text.encode()).digest())
    chosen, found = set[str](), 0
    for text in texts:
        if found >= num_held_out:
            break
        chosen.add(text)
        found += sum(problem.problem == text for problem in problems)
    return [p for p in problems if p.problem in chosen], [p for p in problems if p.problem not in chosen]


def read(name: str, data_dir: str = "") -> list[Problem]:
    """The problems of a file, a benchmark, or the quickstart's, whose ids are others than those of gym:chain_sum."""
    if name == QUICKSTART:
        recipe = replace(Recipe(), num_train_problems=NUM_SUMS, num_heldout_problems=0)
        sums, _ = draw_problems(recipe, seed=0)
        return [replace(problem, id=f"{QUICKSTART}/{number}") for number, problem in enumerate(sums)]
    return read_problems(name, skip_unanswered=True) if Path(name).is_file() else load_task(name, data_dir=data_dir)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("problems", help="JSON lines with problem and answer, a benchmark's name, or quickstart")
    parser.add_argument("--held-out", type=int, default=500, help="how many problems")
    parser.add_argument("--data-dir", default="", help="where benchmarks lie as JSON lines, instead of downloading them")
    parser.add_argument("--out", type=Path, required=True, help="directory to write the two files to")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    problems = read(arguments.problems, arguments.data_dir)
    parts = split([problem for problem in problems if problem.answer], arguments.held_out)
    for name, part in zip(("dev", "rest"), parts, strict=True):
        path = arguments.out / f"{task_name(arguments.problems)}_{name}.jsonl"
        write_problems(path, part)
        print(f"{len(part):6,} problems in {path}")


if __name__ == "__main__":
    main()
