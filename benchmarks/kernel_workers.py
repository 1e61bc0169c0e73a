"""The processes of benchmarks/kernels.py: those that compile, and those that time one job after the other when asked to.

The parent touches no GPU. Worker 0 times our kernels and the references. The other workers share the references that
torch.compile is to make faster: they compile theirs first, all at once, and keep them until each is asked for. So only one
process works on the GPU while times are taken. One that crashes or hangs is started again, its job marked as failed.
"""

import argparse
import faulthandler
import json
import multiprocessing
import os
import queue
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, as_completed
from typing import Any

import torch
from kernel_timing import (
    COMPILED,
    OURS,
    WITHOUT_GRAPH,
    chosen_cases,
    compiled_calls,
    hardware,
    jobs_of,
    run_job,
    sweep_case,
    time_compiled,
    variants,
)

START_SECONDS = 900  # after which a worker that compiles ahead counts as hung
HARDWARE = -1  # the job that says on what


def warm(patterns: list[str], index: int, label: str | None) -> str:
    """In a process of its own: compile what one case, or one of its configurations, needs, by running it once."""
    case = chosen_cases(patterns)[index]
    if label is None:
        calls = case.build()
    elif label in case.sweep:
        calls = case.sweep[label]()
    else:
        calls = case.build_with(dict(variants(case))[label])  # type: ignore[attr-defined]
    calls[0]()
    torch.cuda.synchronize()
    del calls
    torch.cuda.empty_cache()  # other processes are at the same
    return case.name


def warm_all(options: argparse.Namespace, num_processes: int) -> None:
    """Fill Triton's cache on disk from several processes; errors are left for the run that times."""
    cases = chosen_cases(options.only)
    jobs: list[tuple[int, str | None]] = [(index, None) for index in range(len(cases))]
    if options.sweep:
        for index, case in enumerate(cases):
            jobs += [(index, label) for label in [*case.sweep, *(label for label, _ in variants(case))]]
    began, num_failed = time.monotonic(), 0
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(max_workers=num_processes, mp_context=context) as pool:
        for job in as_completed([pool.submit(warm, options.only, *job) for job in jobs]):
            num_failed += job.exception() is not None
            if is_due(options):
                pool.shutdown(wait=True, cancel_futures=True)
                break
    print(f"compiled for {len(jobs)} cases in {time.monotonic() - began:.0f} s, {num_failed} failed", flush=True)


def serve(options: argparse.Namespace) -> None:
    """A worker: compile ahead what is its own, then a line of JSON for each number of a job that comes in."""
    jobs = jobs_of(options)
    held: dict[int, Callable[[], dict[str, Any]]] = {}
    if options.worker > 0:
        torch._dynamo.config.recompile_limit = len(jobs)  # several cases are one function, each for its own sizes
        torch._functorch.config.donated_buffer = False  # or a backward that was compiled could not be called twice
        compiled = [index for index, (kind, _) in enumerate(jobs) if kind == COMPILED]
        for index in compiled[options.worker - 1 :: options.compilers]:
            if is_due(options):
                break
            held[index] = compile_ahead(jobs[index][1])
            torch.cuda.empty_cache()
    torch.zeros(1, device="cuda")
    print("READY", flush=True)
    for line in sys.stdin:
        kind, case = (OURS, None) if int(line) == HARDWARE else jobs[int(line)]
        faulthandler.dump_traceback_later(0.9 * options.limit)  # where it hangs, before it is killed for that
        try:
            if case is None:
                row = hardware()
            elif int(line) in held:
                row = held.pop(int(line))()
            elif kind == COMPILED and options.start_when is not None:
                row = {name_of_error(kind): "not compiled when timing began"}
            else:
                row = sweep_case(case) if options.sweep else run_job(kind, case)
        except Exception as error:
            row = {name_of_error(kind): f"{type(error).__name__}: {error}"[:2000]}
        faulthandler.cancel_dump_traceback_later()
        is_spent = row.get("note") == WITHOUT_GRAPH or "CUDA error" in row.get(name_of_error(kind), "")
        print(("LAST " if is_spent else "ROW ") + json.dumps(row), flush=True)
        if is_spent:
            return
        torch.cuda.empty_cache()


def is_due(options: argparse.Namespace) -> bool:
    """Whether timing shall start, whatever is not compiled yet."""
    return options.start_when is not None and bool(options.start_when.exists())


def compile_ahead(case: Any) -> Callable[[], dict[str, Any]]:
    """What times torch.compile of the case's reference, or says why it could not be compiled."""
    try:
        calls = compiled_calls(case)
        torch.cuda.synchronize()
    except Exception as error:
        message = f"{type(error).__name__}: {error}"[:2000]
        return lambda: {name_of_error(COMPILED): message}
    return lambda: {"compiled_seconds": time_compiled(calls)}


def name_of_error(kind: str) -> str:
    """The field of a row that says why a job of it failed."""
    return "error" if kind == OURS else f"{kind}_error"


class Worker:
    """A process that serves, seen from the parent."""

    def __init__(self, number: int, seconds: float) -> None:
        """Start worker `number`; a job that takes longer than `seconds` hangs."""
        self._number, self._seconds = number, seconds
        self._start()

    def _start(self) -> None:
        command = [sys.executable, *sys.argv, "--worker", str(self._number)]
        environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment)
        self._lines: queue.Queue[str | None] = queue.Queue()
        threading.Thread(target=self._read, args=(self._process, self._lines), daemon=True).start()
        self._is_ready = False

    @staticmethod
    def _read(process: subprocess.Popen[str], lines: "queue.Queue[str | None]") -> None:
        assert process.stdout is not None
        for line in process.stdout:
            lines.put(line)
        lines.put(None)

    def _answer(self, words: tuple[str, ...], seconds: float) -> tuple[str, str]:
        """The next line that begins with one of `words`, and its rest; RuntimeError if the worker ended or hangs."""
        deadline = time.monotonic() + seconds
        while True:
            try:
                line = self._lines.get(timeout=max(deadline - time.monotonic(), 0))
            except queue.Empty:
                self._process.kill()
                raise RuntimeError(f"no result in {seconds} s") from None
            if line is None:
                raise RuntimeError(f"the worker died with status {self._process.wait()}")
            word, _, rest = line.partition(" ")
            if word.rstrip() in words:
                return word, rest
            print(line, end="", flush=True)

    def wait(self) -> None:
        """Return when it can be asked; RuntimeError if it never can."""
        if not self._is_ready:
            self._answer(("READY",), START_SECONDS)
            self._is_ready = True

    def ask(self, index: int) -> dict[str, Any]:
        """What it finds for job `index`; RuntimeError if it dies or hangs over that, and then it has been started again."""
        try:
            self.wait()
            assert self._process.stdin is not None
            print(index, file=self._process.stdin, flush=True)
            word, row = self._answer(("ROW", "LAST"), self._seconds)
        except (RuntimeError, BrokenPipeError) as error:
            self._process.kill()
            self._start()
            raise RuntimeError(str(error)) from error
        if word == "LAST":  # it cannot go on, and has ended itself
            self._process.wait()
            self._start()
        return json.loads(row)  # type: ignore[no-any-return]

    def close(self) -> None:
        """End it."""
        self._process.kill()
        self._process.wait()


def start_workers(options: argparse.Namespace) -> list[Worker]:
    """Worker 0 and those that compile references, ready to be asked; our kernels are compiled meanwhile."""
    has_compiled = any(kind == COMPILED for kind, _ in jobs_of(options))
    compilers = [Worker(number + 1, options.limit) for number in range(options.compilers if has_compiled else 0)]
    if options.jobs:
        warm_all(options, options.jobs)
    workers = [Worker(0, options.limit), *compilers]
    for worker in workers:
        worker.wait()
    return workers


def run_jobs(options: argparse.Namespace, workers: list[Worker], keep: Callable[[list[dict[str, Any]]], None]) -> None:
    """Ask for one job after the other; `keep` gets the rows of all cases that there are after each."""
    jobs = [(kind, case.name) for kind, case in jobs_of(options)]
    first_compiled = sum(kind == OURS for kind, _ in jobs)
    rows: dict[str, dict[str, Any]] = {}
    began = time.monotonic()
    for index, (kind, name) in enumerate(jobs):
        number = 0 if kind != COMPILED else 1 + (index - first_compiled) % options.compilers
        row = rows.setdefault(name, {"name": name})
        try:
            row |= workers[number].ask(index)
        except RuntimeError as error:
            row[name_of_error(kind)] = str(error)
        if kind != OURS and f"{kind}_seconds" in row and "seconds" in row:
            row[f"{kind}_over_ours"] = row[f"{kind}_seconds"] / row["seconds"]
        keep(list(rows.values()))
        print(f"{time.monotonic() - began:4.0f} s [{index + 1}/{len(jobs)}] {summary(row, kind)}", flush=True)


def summary(row: dict[str, Any], kind: str = OURS) -> str:
    if name_of_error(kind) in row:
        return f"{row['name']}: {kind} FAILED {row[name_of_error(kind)].splitlines()[0][:150]}"
    if kind != OURS:
        return f"{row['name']}: {kind} {row[f'{kind}_seconds'] * 1e6:.1f} us, {row.get(f'{kind}_over_ours', 0):.1f} x ours"
    if "sweep" in row:
        best = row["sweep"][0]
        if "seconds" not in best:
            return f"{row['name']}: FAILED in every configuration: {best['error'].splitlines()[0][:150]}"
        times_floor = best["seconds"] / row["floor_seconds"]
        return f"{row['name']}: {best['seconds'] * 1e6:.1f} us, {times_floor:.2f} x floor, {best['config']}"
    return f"{row['name']}: {row['seconds'] * 1e6:.1f} us, {row['times_floor']:.2f} x floor"
