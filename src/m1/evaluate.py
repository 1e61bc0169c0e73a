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
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from tqdm import tqdm

from m1.backends import Backend, open_backend, other_ranks_serving
from m1.config import EvalConfig, require, require_possible
from m1.distributed import ranks
from m1.evaluation.budget import MOST_SAMPLES, Budget, parse_budgets
from m1.evaluation.records import read_records
from m1.evaluation.regrade import regrade
from m1.evaluation.runner import evaluate, summarize_run
from m1.evaluation.sampling import Prompt
from m1.evaluation.tasks import TASKS, load_task, parse_tasks, task_name
from m1.evaluation.text import summary_columns, summary_rows
from m1.evaluation.votes import Verify, load_verifier
from m1.reasoning.answers import ANSWER_INSTRUCTION
from m1.reasoning.problems import Problem
from m1.reasoning.rewards import Scorer
from m1.storage import read_run_record, write_run_record

COMMAND = "eval"
PAPER_SAMPLES = 64
RECORDS_SUFFIX = ".jsonl.gz"
_WARM_UP_TOKENS = 32
_RANK_TIMEOUT = 600.0  # seconds that ranks wait for each other at the beginning and the end
_BAR_SECONDS, _LOG_SECONDS = 0.1, 30.0  # between two states of a progress bar, on a terminal and in a file
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
    """The command. Raises ValueError, OSError or MemoryError for users' mistakes; every problem done is kept.

    Under `torchrun` the ranks share the problems: the first one does all that is here, the others sample for it.
    """
    if config.regrade:
        run_again(config)
        return
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        _run(config)
        return
    if config.backend != "engine" or config.url or config.time_budgets or config.token_budgets:
        raise ValueError(
            "torchrun: only --backend engine without budgets, whose problems are sampled alone, uses several ranks"
        )
    with ranks(config.device, _RANK_TIMEOUT), other_ranks_serving(config) as is_first:
        if is_first:
            _run(config)


def _run(config: EvalConfig) -> None:
    require(config, "model")
    tasks = parse_tasks(config.tasks)
    seconds = parse_budgets(config.time_budgets, "--time-budgets")
    tokens = parse_budgets(config.token_budgets, "--token-budgets")
    budget = Budget(max(seconds) if seconds else None, int(max(tokens)) if tokens else None)
    check(config)
    verifier = load_verifier(config.verifier) if config.verifier else None
    if config.verifier and verifier is None:
        raise ValueError(f"--verifier: expected MODULE:FUNCTION, got {config.verifier!r}")
    problems = {task: load_task(task, data_dir=config.data_dir, limit=config.limit, seed=config.seed) for task in tasks}
    out = Path(config.out or Path("runs/eval") / task_name(config.model.strip("/").split("/")[-1]))
    require_free(out)
    console = Console(width=None if sys.stdout.isatty() else _LOG_WIDTH)
    texts = [problem.problem + suffix_of(task, config.suffix) for task in tasks for problem in problems[task]]
    backend = open_backend(config, texts, has_deadline=budget.seconds is not None)
    evaluation = Evaluation(config, backend, out, budget, verifier)
    if config.overwrite:
        shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True, exist_ok=True)
    console.print(f"[bold]{escape(evaluation.backend.description)}[/]")
    console.print(_plan(config, problems, evaluation.num_samples, budget))
    record = read_run_record(out) or {}
    results: dict[str, Any] = record.get("results", {})
    if not record:  # else it stands until the first task has shown that the records there are of the same run
        evaluation.write_record(results)
    with Scorer() as scorer:
        for task in tasks:
            results[task_name(task)] = evaluation.measure(task, problems[task], scorer)
            evaluation.write_record(results)
    print_results(console, {task_name(task): results[task_name(task)] for task in tasks})
    console.print(f"Records and results: {escape(str(out))}\nNext: m1 report {escape(str(out))}")


def run_again(config: EvalConfig) -> None:
    """`--regrade`: judge what an evaluation recorded, with today's rules. Raises FileNotFoundError if there is none."""
    require(config, "out")
    source, out = Path(config.regrade), Path(config.out)
    before = read_run_record(source)
    if before is None or before["command"] != COMMAND:
        raise FileNotFoundError(f"--regrade {source}: no evaluation there; give the --out of one")
    if source.resolve() == out.resolve():
        raise ValueError(f"--out {out} is the evaluation itself; give another directory")
    require_free(out)
    if config.overwrite:
        shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True, exist_ok=True)
    results, console = {}, Console(width=None if sys.stdout.isatty() else _LOG_WIDTH)
    with Scorer() as scorer:
        for path in sorted(source.glob(f"*{RECORDS_SUFFIX}")):
            task = path.name.removesuffix(RECORDS_SUFFIX)
            results[task] = regrade(path, out / path.name, scorer)
            console.print(f"{task}: {results[task]['changed_verdicts']} verdicts changed")
    record = {key: before[key] for key in ("hardware", "backend", "config") if key in before}
    write_run_record(out, COMMAND, dataclasses.asdict(config), versions=versions(), regraded=record, results=results)
    print_results(console, results)


def check(config: EvalConfig) -> None:
    """Raise ValueError for options that are out of range."""
    for name in ("samples", "limit"):
        if getattr(config, name) < 0:
            raise ValueError(f"--{name}: expected at least 0, got {getattr(config, name)}")
    if config.max_new_tokens < 1:
        raise ValueError(f"--max-new-tokens: expected at least 1, got {config.max_new_tokens}")
    require_possible(config)
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


class Evaluation:
    """One model, one way of sampling it, one output directory."""

    def __init__(self, config: EvalConfig, backend: Backend, out: Path, budget: Budget, verifier: Verify | None) -> None:
        self.config, self.backend, self.out, self.budget, self.verifier = config, backend, out, budget, verifier
        self.num_samples = config.samples or (MOST_SAMPLES if budget else PAPER_SAMPLES)

    def write_record(self, results: dict[str, Any]) -> None:
        """`m1_run.json`: what runs, on what, and the results so far."""
        about = self.backend.identity | self.backend.facts | {"concurrency": self.backend.concurrency}
        facts = {"versions": versions(), "hardware": hardware(), "backend": about}
        write_run_record(self.out, COMMAND, dataclasses.asdict(self.config), **facts, results=results)

    def measure(self, task: str, problems: Sequence[Problem], scorer: Scorer) -> dict[str, Any]:
        """Evaluate one task with a progress bar; its summary, and what this `session` sampled of it."""
        config, backend = self.config, self.backend
        suffix = suffix_of(task, config.suffix)

        def to_prompt(problem: Problem) -> Prompt:
            return backend.prompt(problem.problem + suffix)

        if self.budget.seconds:
            backend.warm_up(to_prompt(problems[0]), _WARM_UP_TOKENS, config.temperature)
        path = self.out / f"{task_name(task)}{RECORDS_SUFFIX}"
        params = {"temperature": config.temperature, "top_p": config.top_p, "max_tokens": config.max_new_tokens}
        with Progress(task_name(task), len(problems)) as progress:
            summary = evaluate(
                problems,
                backend.generate,
                num_samples=self.num_samples,
                params=params | {"seed": config.seed},
                records_path=path,
                description=backend.identity | ({"verifier": config.verifier} if config.verifier else {}),
                to_prompt=to_prompt,
                scorer=scorer,
                verifier=self.verifier,
                adaptive=config.adaptive or None,
                budget=self.budget,
                on_record=progress.on_record,
                on_step=progress.on_step,
            )
        if self.budget:
            run_line, records = read_records(path, with_texts=False)
            seconds, tokens = parse_budgets(config.time_budgets), parse_budgets(config.token_budgets)
            summary |= summarize_run(run_line, records, seconds=seconds, tokens=tokens)
        return summary | {"session": progress.session}


class Progress:
    """The bar of one task: problems done, samples, tokens a second. `session` holds the last two."""

    def __init__(self, name: str, num_problems: int) -> None:
        self.session: dict[str, float] = {}
        seconds = _BAR_SECONDS if sys.stderr.isatty() else _LOG_SECONDS
        self._bar = tqdm(total=num_problems, desc=name, unit="problem", mininterval=seconds)
        self._start = time.perf_counter()

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *exception: object) -> None:
        self._bar.close()

    def on_record(self, done: int, total: int) -> None:
        if self._bar.n == 0:
            self._bar.initial = self._bar.n = done - 1  # of an earlier run: they count for nothing in the rate
        self._bar.update(done - self._bar.n)

    def on_step(self, num_samples: int, num_tokens: int) -> None:
        seconds = time.perf_counter() - self._start
        rate = num_tokens / seconds
        self.session.update(samples=num_samples, tokens=num_tokens, seconds=seconds, tokens_per_second=rate)
        self._bar.set_postfix_str(f"{num_samples} samples, {rate:,.0f} tokens/s", refresh=False)
        self._bar.update(0)


def suffix_of(task: str, given: str | None) -> str:
    """What is added to a problem of `task`: the suffix given, the task's, or the paper's."""
    if given is not None:
        return given
    own = TASKS[task].suffix if task in TASKS else None
    return f"\n{ANSWER_INSTRUCTION}" if own is None else own


def print_results(console: Console, results: dict[str, Any]) -> None:
    """One table a kind of run."""
    summaries = list(results.values())
    table = Table(*summary_columns(summaries), title="Results", title_justify="left")
    for task, cells in zip(results, summary_rows(summaries), strict=True):
        table.add_row(task, *cells)
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


def hardware() -> dict[str, Any]:
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
