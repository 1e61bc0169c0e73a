"""Time every Triton kernel against its floor, its torch reference and torch.compile of that, on one GPU.

    PYTHONPATH=src python benchmarks/kernels.py                         # the table; JSON into results/kernels.json
    PYTHONPATH=src python benchmarks/kernels.py --only selective_scan --skip-reference
    PYTHONPATH=src python benchmarks/kernels.py --compile rms_norm "swiglu 3B"   # torch.compile of these cases' references too
    PYTHONPATH=src python benchmarks/kernels.py --sweep --only "3B 4 x 4096"   # try the launch sizes, best first

The cases are in kernel_cases_*.py, how one is timed in kernel_timing.py. Kernels are first compiled in several processes at
once; then a worker process times all our kernels one after the other, then the references, then torch.compile of them. If it
crashes or hangs, the job is marked as failed and another worker goes on with the next; the JSON file is written after each.
"""

import argparse
import functools
import json
import multiprocessing
import multiprocessing.dummy
import os
import queue
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import torch
from kernel_timing import (
    COMPILED,
    OURS,
    chosen_cases,
    compiled_calls,
    is_compiled_too,
    jobs_of,
    run_job,
    sweep_case,
    time_eagerly,
    variants,
)

CASE_SECONDS, SWEEP_SECONDS = 120, 240  # after which a worker counts as hung


def warm(patterns: list[str], index: int, kind: str, label: str | None) -> str:
    """In a process of its own: compile what one case, or one of its configurations, needs, by running it once."""
    case = chosen_cases(patterns)[index]
    if kind == COMPILED:
        calls = compiled_calls(case)
    elif label is None:
        calls = case.build()
    elif label in case.sweep:
        calls = case.sweep[label]()
    else:
        calls = case.build_with(dict(variants(case))[label])  # type: ignore[attr-defined]
    calls[0]()
    torch.cuda.synchronize()
    return case.name


def warm_all(options: argparse.Namespace) -> None:
    """Fill Triton's cache on disk from several processes; errors are left for the run that times."""
    cases = chosen_cases(options.only)
    jobs: list[tuple[int, str, str | None]] = [(i, COMPILED, None) for i, c in enumerate(cases) if is_compiled_too(c, options)]
    jobs += [(index, OURS, None) for index in range(len(cases))]
    if options.sweep:
        for index, case in enumerate(cases):
            jobs += [(index, OURS, label) for label in [*case.sweep, *(label for label, _ in variants(case))]]
    began, num_failed = time.monotonic(), 0
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(max_workers=options.jobs, mp_context=context) as pool:
        for job in as_completed([pool.submit(warm, options.only, *job) for job in jobs]):
            num_failed += job.exception() is not None
    print(f"compiled for {len(jobs)} cases in {time.monotonic() - began:.0f} s, {num_failed} failed", flush=True)


def work(options: argparse.Namespace) -> None:
    """The worker: jobs from number `worker` on, a line of JSON each on stdout."""
    for index, (kind, case) in enumerate(jobs_of(options)):
        if index < options.worker:
            continue
        try:
            row = sweep_case(case) if options.sweep else run_job(kind, case)
        except Exception as error:
            row = {name_of_error(kind): f"{type(error).__name__}: {error}"[:2000]}
        print("ROW " + json.dumps(row), flush=True)
        if "CUDA error" in row.get(name_of_error(kind), ""):
            sys.exit(3)  # this process's context is lost
        torch.compiler.reset()
        torch.cuda.empty_cache()


def name_of_error(kind: str) -> str:
    """The field of a row that says why a job of it failed."""
    return "error" if kind == OURS else f"{kind}_error"


def run_workers(options: argparse.Namespace, keep: Callable[[list[dict[str, Any]]], None]) -> list[dict[str, Any]]:
    """Rows of all cases, from as many workers as it takes; `keep` gets all that there are after each job."""
    jobs = [(kind, case.name) for kind, case in jobs_of(options)]
    rows: dict[str, dict[str, Any]] = {}
    num_done = 0

    def add(found: dict[str, Any]) -> None:
        nonlocal num_done
        kind, name = jobs[num_done]
        num_done += 1
        row = rows.setdefault(name, {"name": name})
        row |= found
        if kind != OURS and f"{kind}_seconds" in row and "seconds" in row:
            row[f"{kind}_over_ours"] = row[f"{kind}_seconds"] / row["seconds"]
        keep(list(rows.values()))
        print(f"[{num_done}/{len(jobs)}] {summary(row, kind)}", flush=True)

    while num_done < len(jobs):
        num_before = num_done
        status = run_worker(options, num_done, add)
        if status is None:
            add({name_of_error(jobs[num_done][0]): f"no result in {limit_of(options)} s"})
        elif num_done < len(jobs) and status not in (0, 3):
            add({name_of_error(jobs[num_done][0]): f"the worker died with status {status}"})
        elif num_done == num_before:
            raise RuntimeError("a worker ended without timing anything")
    return list(rows.values())


def limit_of(options: argparse.Namespace) -> int:
    """Seconds after which a worker that says nothing counts as hung."""
    return SWEEP_SECONDS if options.sweep else CASE_SECONDS


def run_worker(options: argparse.Namespace, first: int, add: Callable[[dict[str, Any]], None]) -> int | None:
    """Give `add` what a worker finds from job `first` on. Returns its exit status, None if it hung."""
    command = [sys.executable, __file__, *sys.argv[1:], "--worker", str(first)]
    worker = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env={**os.environ, "PYTHONUNBUFFERED": "1"})
    lines: queue.Queue[str | None] = queue.Queue()
    reader = multiprocessing.dummy.Process(target=_read_lines, args=(worker, lines))
    reader.start()
    is_hung = False
    while True:
        try:
            line = lines.get(timeout=limit_of(options))
        except queue.Empty:
            worker.kill()
            is_hung = True
            break
        if line is None:
            break
        if line.startswith("ROW "):
            add(json.loads(line[4:]))
        else:
            print(line, end="", flush=True)
    reader.join()
    return None if is_hung else worker.wait()


def _read_lines(worker: subprocess.Popen[str], lines: "queue.Queue[str | None]") -> None:
    assert worker.stdout is not None
    for line in worker.stdout:
        lines.put(line)
    lines.put(None)


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


def print_sweeps(rows: list[dict[str, Any]]) -> None:
    for row in rows:
        print(summary(row))
        for entry in row.get("sweep", [])[:6]:
            if "seconds" in entry:
                print(f"    {entry['seconds'] * 1e6:9.1f} us  {entry['config']}")
        chosen = [entry for entry in row.get("sweep", []) if entry["config"] == "as chosen" and "seconds" in entry]
        for entry in chosen:
            print(f"    {entry['seconds'] * 1e6:9.1f} us  as chosen")
        errors = [entry for entry in row.get("sweep", []) if "error" in entry]
        for entry in errors[:2]:
            print(f"    {len(errors)} failed, e.g. {entry['config']}: {entry['error'].splitlines()[0][:120]}")


def print_table(rows: list[dict[str, Any]]) -> None:
    width = max(len(row["name"]) for row in rows)
    print(f"{'':{width}}      us      GB  floor us  x floor   TB/s  x reference  x compiled")
    for row in rows:
        if "error" in row:
            print(f"{row['name']:{width}}  FAILED: {row['error'].splitlines()[0][:120]}")
            continue
        speedups = [
            f"{row[key]:10.1f}" if key in row else f"{'failed' if key.split('_')[0] + '_error' in row else '':>10}"
            for key in ("reference_over_ours", "compiled_over_ours")
        ]
        print(
            f"{row['name']:{width}} {row['seconds'] * 1e6:7.1f} {row['bytes'] / 1e9:7.3f}   {row['floor_seconds'] * 1e6:7.1f}"
            f"  {row['times_floor']:7.2f} {row['bytes_a_second'] / 1e12:6.2f}   {speedups[0]}  {speedups[1]}  {row['note']}"
        )


def copy_rate() -> float:
    """Bytes read plus written a second by a 2 GiB device-to-device copy."""
    source = torch.randint(0, 255, (2**31,), dtype=torch.uint8, device="cuda")
    return 2 * source.numel() / time_eagerly([functools.partial(torch.empty_like(source).copy_, source)])


def revision() -> str:
    """The commit, "+" if files differ from it, or "unknown" outside a repository."""
    git = ["git", "-C", str(Path(__file__).parent)]
    try:
        commit = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
        changed = subprocess.run([*git, "status", "--porcelain", "-uno"], capture_output=True, text=True, check=True).stdout
    except (FileNotFoundError, subprocess.CalledProcessError):
        return "unknown"
    return commit + ("+" if changed.strip() else "")


def hardware() -> dict[str, Any]:
    import triton

    properties = torch.cuda.get_device_properties(0)
    return {
        "gpu": properties.name,
        "multiprocessors": properties.multi_processor_count,
        "copy_bytes_a_second": copy_rate(),
        "torch": torch.__version__,
        "triton": triton.__version__,
    }


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", action="append", default=[], metavar="TEXT", help="cases whose name contains it; repeatable")
    parser.add_argument("--sweep", action="store_true", help="try the launch sizes instead of printing the table")
    parser.add_argument("--skip-reference", action="store_true", help="time our kernels only")
    parser.add_argument(
        "--compile", nargs="*", metavar="TEXT", help="also time torch.compile of references: of cases whose name contains it"
    )
    parser.add_argument("--jobs", type=int, default=8, help="processes that compile first; 0 compiles while timing")
    parser.add_argument("--list", action="store_true", help="print the cases' names and floors, time nothing")
    parser.add_argument("--output", type=Path, help="JSON file; results/kernels.json or results/kernel_sweep.json")
    parser.add_argument("--revision", default="", help="recorded instead of what git says")
    parser.add_argument("--worker", type=int, help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    options = parse()
    if options.worker is not None:
        work(options)
        return
    if options.list:
        for case in chosen_cases(options.only):
            print(f"{case.floor_seconds * 1e6:9.1f} us  {case.bytes_moved / 1e9:7.3f} GB  {case.name}")
        return
    if options.jobs:
        warm_all(options)
    found = {"command": " ".join(sys.argv), "revision": options.revision or revision(), "hardware": hardware()}
    torch.cuda.empty_cache()  # the worker wants the memory
    name = "kernel_sweep.json" if options.sweep else "kernels.json"
    output = options.output or Path(__file__).parent.parent / "results" / name
    output.parent.mkdir(parents=True, exist_ok=True)

    def keep(rows: list[dict[str, Any]]) -> None:
        output.write_text(json.dumps(found | {"cases": rows}, indent=1) + "\n")

    rows = run_workers(options, keep)
    keep(rows)
    print(f"\n{found['hardware']['gpu']}: copies {found['hardware']['copy_bytes_a_second'] / 1e12:.2f} TB/s; {output}")
    print_sweeps(rows) if options.sweep else print_table(rows)


if __name__ == "__main__":
    main()
