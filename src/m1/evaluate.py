"""`m1 eval`: benchmarks by name, one model, everything recorded; goes on after a kill; ends with a table.

    OUT/m1_run.json        the command, its config, revision, versions, hardware, and the results so far
    OUT/TASK.jsonl.gz      a line about the run, then one a problem, with every completion

The wiring only: models are `m1.backends`', tasks, records and numbers `m1.evaluation`'s. The page is `m1 report`'s.
"""

import dataclasses
import importlib.metadata
import os
import platform
import shutil
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from tqdm import tqdm

from m1.backends import Backend, open_backend
from m1.config import EvalConfig, require
from m1.evaluation.budget import MOST_SAMPLES, Budget
from m1.evaluation.records import read_records
from m1.evaluation.runner import evaluate, summarize_run
from m1.evaluation.sampling import Prompt
from m1.evaluation.tasks import TASKS, load_task, parse_tasks, task_name
from m1.evaluation.text import summary_columns, summary_row
from m1.evaluation.votes import Verify, load_verifier
from m1.reasoning.answers import ANSWER_INSTRUCTION
from m1.reasoning.problems import Problem
from m1.reasoning.rewards import Scorer
from m1.storage import read_run_record, write_run_record

COMMAND = "eval"
PAPER_SAMPLES = 64
RECORDS_SUFFIX = ".jsonl.gz"
_WARM_UP_TOKENS = 32
_LOG_WIDTH = 120  # columns of a table that goes into a file
_PACKAGES = (
    "m1-reasoner",
    "torch",
    "triton",
    "transformers",
    "tokenizers",
    "numpy",
    "math-verify",
    "sympy",
    "reasoning-gym",
    "vllm",
)


def run(config: EvalConfig) -> None:
    """The command. Raises ValueError, OSError or MemoryError for users' mistakes; every problem done is kept."""
    require(config, "model")
    tasks = parse_tasks(config.tasks)
    seconds, tokens = _numbers(config.time_budgets, "--time-budgets"), _numbers(config.token_budgets, "--token-budgets")
    budget = Budget(max(seconds) if seconds else None, int(max(tokens)) if tokens else None)
    check(config)
    problems = {task: load_task(task, data_dir=config.data_dir, limit=config.limit, seed=config.seed) for task in tasks}
    verifier = load_verifier(config.verifier) if config.verifier else None
    if config.verifier and verifier is None:
        raise ValueError(f"--verifier: expected MODULE:FUNCTION, got {config.verifier!r}")
    out = Path(config.out or Path("runs/eval") / task_name(config.model.strip("/").split("/")[-1]))
    require_free(out)
    console = Console(width=None if sys.stdout.isatty() else _LOG_WIDTH)
    backend = open_backend(config)
    if config.overwrite:
        shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True, exist_ok=True)
    num_samples = config.samples or (MOST_SAMPLES if budget else PAPER_SAMPLES)
    console.print(f"[bold]{escape(backend.description)}[/]")
    console.print(_plan(config, problems, num_samples, budget))

    record = read_run_record(out) or {}
    results: dict[str, Any] = record.get("results", {})
    facts = {"versions": versions(), "hardware": hardware(backend), "backend": backend.identity | backend.facts}
    if not record:  # else it stands until the first task has shown that the records there are of the same run
        write_run_record(out, COMMAND, dataclasses.asdict(config), **facts, results=results)
    with Scorer() as scorer:
        for task in tasks:
            to_prompt = prompt_maker(backend, task, config.suffix)
            if budget.seconds:
                backend.warm_up(to_prompt(problems[task][0]), _WARM_UP_TOKENS, config.temperature)
            summary = measure(config, task, problems[task], backend, out, scorer, num_samples, budget, to_prompt, verifier)
            if budget:
                run_line, records = read_records(records_path(out, task), with_texts=False)
                summary |= summarize_run(run_line, records, seconds=seconds, tokens=tokens)
            results[task_name(task)] = summary
            write_run_record(out, COMMAND, dataclasses.asdict(config), **facts, results=results)
    print_results(console, {task_name(task): results[task_name(task)] for task in tasks})
    console.print(f"Records and results: {escape(str(out))}\nNext: m1 report {escape(str(out))}")


def check(config: EvalConfig) -> None:
    """Raise ValueError for options that are out of range."""
    for name in ("samples", "limit"):
        if getattr(config, name) < 0:
            raise ValueError(f"--{name}: expected at least 0, got {getattr(config, name)}")
    if config.adaptive and not 0.5 < config.adaptive <= 1:
        raise ValueError(f"--adaptive: expected a probability above 0.5 and at most 1, got {config.adaptive}")
    if config.temperature == 0 and config.samples != 1:
        raise ValueError("--temperature 0: all samples would be the same; add --samples 1")


def require_free(out: Path) -> None:
    """Raise FileExistsError for an output directory that holds something else than an evaluation."""
    if out.exists() and not out.is_dir():
        raise FileExistsError(f"{out} is a file; give another --out")
    if out.is_dir() and any(out.iterdir()):
        record = read_run_record(out)
        if record is None:
            raise FileExistsError(f"{out} exists and holds no evaluation; give another --out")
        if record is not None and record["command"] != COMMAND:
            raise FileExistsError(f"{out} holds the result of `m1 {record['command']}`; give another --out")


def measure(
    config: EvalConfig,
    task: str,
    problems: Sequence[Problem],
    backend: Backend,
    out: Path,
    scorer: Scorer,
    num_samples: int,
    budget: Budget,
    to_prompt: Callable[[Problem], Prompt],
    verifier: Verify | None,
) -> dict[str, Any]:
    """Evaluate one task with a progress bar; its summary, and what this `session` sampled of it."""
    path = records_path(out, task)
    session: dict[str, float] = {}
    start = time.perf_counter()
    with tqdm(total=len(problems), desc=task_name(task), unit="problem") as bar:

        def show(done: int, total: int) -> None:
            if bar.initial == 0 and bar.n == 0:
                bar.initial = bar.n = done - 1  # of an earlier run: they count for nothing in the rate
            bar.update(done - bar.n)

        def tell(num_samples: int, num_tokens: int) -> None:
            seconds = time.perf_counter() - start
            session.update(samples=num_samples, tokens=num_tokens, seconds=seconds, tokens_per_second=num_tokens / seconds)
            bar.set_postfix_str(f"{num_samples} samples, {num_tokens / seconds:,.0f} tokens/s", refresh=False)
            bar.update(0)

        summary = evaluate(
            problems,
            backend.generate,
            num_samples=num_samples,
            params={
                "temperature": config.temperature,
                "top_p": config.top_p,
                "max_tokens": config.max_new_tokens,
                "seed": config.seed,
            },
            records_path=path,
            description=backend.identity | ({"verifier": config.verifier} if config.verifier else {}),
            to_prompt=to_prompt,
            scorer=scorer,
            verifier=verifier,
            adaptive=config.adaptive or None,
            budget=budget,
            on_record=show,
            on_step=tell,
        )
    return summary | {"session": session}


def records_path(out: Path, task: str) -> Path:
    return out / f"{task_name(task)}{RECORDS_SUFFIX}"


def prompt_maker(backend: Backend, task: str, suffix: str | None) -> Callable[[Problem], Prompt]:
    """How a problem of `task` is asked: the problem and the suffix behind it: the one given, the task's, or the paper's."""
    if suffix is None:
        own = TASKS[task].suffix if task in TASKS else None
        suffix = f"\n{ANSWER_INSTRUCTION}" if own is None else own
    return lambda problem: backend.prompt(problem.problem + suffix)


def print_results(console: Console, results: dict[str, Any]) -> None:
    """One table a kind of run."""
    table = Table(*summary_columns(results.values()), title="Results", title_justify="left")
    for task, summary in results.items():
        table.add_row(task, *summary_row(summary))
    console.print(table)


def versions() -> dict[str, str]:
    """Python's and those of the installed packages that can change a number."""
    found = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue  # optional, or run from a checkout
    return found


def hardware(backend: Backend) -> dict[str, Any]:
    """The machine that samples; for a server, only this one is known."""
    model = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        names = (line.split(":", 1)[1].strip() for line in cpuinfo.read_text().splitlines() if line.startswith("model name"))
        model = next(names, model)
    gpus = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    return {
        "cpu": model,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpus": gpus,
        "cuda": torch.version.cuda if gpus else None,
        "system": platform.platform(),
    }


def _plan(config: EvalConfig, problems: dict[str, list[Problem]], num_samples: int, budget: Budget) -> str:
    sizes = ", ".join(f"{task_name(task)} ({len(some)} problems)" for task, some in problems.items())
    how = f"temperature {config.temperature:g}, top_p {config.top_p:g}, at most {config.max_new_tokens} tokens a solution"
    total = sum(map(len, problems.values()))
    if budget.seconds:
        return f"{sizes}; each problem alone for {budget.seconds:g} s, {total * budget.seconds / 60:.0f} minutes in all; {how}"
    if budget:
        return f"{sizes}; each problem alone until {budget.tokens} tokens are generated; {how}"
    many = f"up to {num_samples} samples" if config.adaptive else f"{num_samples} samples"
    return f"{sizes}; {many} a problem, {total * num_samples:,} in all; {how}"


def _numbers(text: str, option: str) -> list[float]:
    """Ascending positive numbers from a list with commas."""
    try:
        numbers = sorted({float(part) for part in text.split(",") if part.strip()})
    except ValueError as error:
        raise ValueError(f"{option}: expected numbers with commas between them, got {text!r}") from error
    if any(not 0 < number < float("inf") for number in numbers):
        raise ValueError(f"{option}: expected numbers above 0, got {text!r}")
    return numbers
