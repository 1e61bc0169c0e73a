"""Time every Triton kernel against its floor, its torch reference and torch.compile of that, on one GPU.

    PYTHONPATH=src python benchmarks/kernels.py                         # the table; JSON into results/kernels.json
    PYTHONPATH=src python benchmarks/kernels.py --only selective_scan --skip-reference
    PYTHONPATH=src python benchmarks/kernels.py --compile rms_norm "swiglu 3B"   # torch.compile of these cases' references too
    PYTHONPATH=src python benchmarks/kernels.py --sweep --only "3B 4 x 4096"   # try the launch sizes, best first

The cases are in kernel_cases_*.py. Kernels are first compiled in several processes at once; then a worker process times
one case after the other. If it crashes or hangs, the case is marked as failed and another worker goes on with the next; the
JSON file is written after every case. Times are medians of replayed CUDA graphs over input sets larger than the L2 cache; a
backward's time is that of forward and backward less the forward's. References run without a graph, torch.compile of them over
one input set alone, which is to its advantage where that fits the cache.
"""

import argparse
import functools
import itertools
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

import kernel_cases_decode
import torch
from kernel_cases_decode import Calls, Case, time_calls

CASE_SECONDS, SWEEP_SECONDS = 120, 240  # after which a worker counts as hung
REFERENCE_SECONDS = 0.3  # roughly what timing one reference may take
COMPILED = "torch.compile of the reference"  # a job of the processes that compile


def all_cases() -> list[Case]:
    import kernel_cases_scan
    import kernel_cases_ssd

    return [*kernel_cases_scan.cases(), *kernel_cases_ssd.cases(), *kernel_cases_decode.cases()]


def is_named(case: Case, patterns: list[str]) -> bool:
    """Whether the case's name contains one of the patterns, or there are none."""
    return not patterns or any(pattern in case.name for pattern in patterns)


def chosen_cases(patterns: list[str]) -> list[Case]:
    """The cases that the patterns name, in the patterns' order: what is wanted most is timed first."""
    chosen = [case for case in all_cases() if is_named(case, patterns)]
    return sorted(chosen, key=lambda case: next((i for i, pattern in enumerate(patterns) if pattern in case.name), 0))


def is_compiled_too(case: Case, options: argparse.Namespace) -> bool:
    """Whether torch.compile of the case's reference is timed."""
    asked = options.compile is not None and not options.skip_reference and not options.sweep
    return asked and case.build_reference is not None and is_named(case, options.compile)


def time_eagerly(calls: Calls) -> float:
    """Median seconds a call without a graph, of as many repetitions as REFERENCE_SECONDS allow."""
    for call in calls[:2]:
        call()
    times: list[float] = []
    for call in itertools.cycle(calls):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        call()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / 1000)
        if len(times) >= 20 or (len(times) >= 3 and sum(times) > REFERENCE_SECONDS):
            return sorted(times)[len(times) // 2]
    raise AssertionError("a case has at least one call")


def time_ours(build: Callable[[], Calls]) -> tuple[float, str]:
    """Seconds a call, and a note if the calls could not be captured in a graph."""
    calls = build()
    try:
        return time_calls(calls), ""
    except RuntimeError as error:
        if not any(word in str(error) for word in ("captur", "stream")):
            raise
        torch.cuda.synchronize()
        return time_eagerly(calls), "without a graph"


def time_case(case: Case, config: Any = None) -> tuple[float, str]:
    """Seconds of a case as chosen, or in another configuration, less what it says to subtract."""
    build = case.build if config is None else (lambda: case.build_with(config))  # type: ignore[attr-defined]
    seconds, note = time_ours(build)
    forward = getattr(case, "build_forward", None)
    if forward is not None:
        seconds -= time_ours(lambda: forward(config))[0]
    return seconds, note


def time_reference(case: Case, is_compiled: bool) -> float | None:
    """Seconds of the torch reference, or of torch.compile of it; None where the case has none."""
    if case.build_reference is None:
        return None

    def calls_of(build: Callable[[], Calls]) -> Calls:
        calls = build()
        return [torch.compile(call) for call in calls[:1]] if is_compiled else calls

    seconds = time_eagerly(calls_of(case.build_reference))
    forward = getattr(case, "build_reference_forward", None)
    return seconds - (0.0 if forward is None or case.build_reference is forward else time_eagerly(calls_of(forward)))


def run_case(case: Case, options: argparse.Namespace) -> dict[str, Any]:
    seconds, note = time_case(case)
    row: dict[str, Any] = {
        "name": case.name,
        "seconds": seconds,
        "bytes": case.bytes_moved,
        "floor_seconds": case.floor_seconds,
        "times_floor": seconds / case.floor_seconds,
        "bytes_a_second": case.bytes_moved / seconds,
        "note": note,
    }
    for name, is_compiled in (("reference", False), ("compiled", True)):
        if options.skip_reference or (is_compiled and not is_compiled_too(case, options)):
            continue
        try:
            reference = time_reference(case, is_compiled)
        except Exception as error:  # the table says so, and ours is worth more
            row[f"{name}_error"] = str(error)[:500]
            continue
        if reference is not None:
            row |= {f"{name}_seconds": reference, f"{name}_over_ours": reference / seconds}
    return row


def variants(case: Case) -> list[tuple[str, Any]]:
    """The configurations that a sweep begins with: each field's values, the others as chosen."""
    fields = getattr(case, "fields", {})
    start = case.default() if fields else None  # type: ignore[attr-defined]
    return [(f"{name}={value}", start._replace(**{name: value})) for name, values in fields.items() for value in values]


def sweep_case(case: Case) -> dict[str, Any]:
    """Improve one field after another, keeping the best value; or time every entry of a case that lists whole sweeps."""
    tried: list[dict[str, Any]] = []

    def attempt(label: str, measure: Callable[[], float]) -> float:
        try:
            seconds = measure()
        except Exception as error:
            if "CUDA error" in str(error):
                raise
            tried.append({"config": label, "error": str(error)[:300]})
            return float("inf")
        tried.append({"config": label, "seconds": seconds})
        return seconds

    best_seconds = attempt("as chosen", lambda: time_case(case)[0])
    for label, build in case.sweep.items():
        attempt(label, lambda build=build: time_ours(build)[0])  # type: ignore[misc]
    fields = getattr(case, "fields", {})
    if fields:
        best = case.default()  # type: ignore[attr-defined]
        for name, values in fields.items():
            for value in values:
                config = best._replace(**{name: value})
                if config == best:
                    continue
                seconds = attempt(str(config), lambda config=config: time_case(case, config)[0])  # type: ignore[misc]
                if seconds < best_seconds:
                    best_seconds, best = seconds, config
    tried.sort(key=lambda entry: entry.get("seconds", float("inf")))
    return {"name": case.name, "floor_seconds": case.floor_seconds, "bytes": case.bytes_moved, "sweep": tried}


def warm(patterns: list[str], index: int, label: str | None) -> str:
    """In a process of its own: compile what one case, or one of its configurations, needs, by running it once."""
    case = chosen_cases(patterns)[index]
    if label is None:
        calls = case.build()
    elif label == COMPILED:
        assert case.build_reference is not None
        calls = [torch.compile(case.build_reference()[0])]
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
    jobs: list[tuple[int, str | None]] = [(i, COMPILED) for i, case in enumerate(cases) if is_compiled_too(case, options)]
    jobs += [(index, None) for index in range(len(cases))]
    if options.sweep:
        for index, case in enumerate(cases):
            jobs += [(index, label) for label in [*case.sweep, *(label for label, _ in variants(case))]]
    began, num_failed = time.monotonic(), 0
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(max_workers=options.jobs, mp_context=context) as pool:
        for job in as_completed([pool.submit(warm, options.only, *job) for job in jobs]):
            num_failed += job.exception() is not None
    print(f"compiled for {len(jobs)} cases in {time.monotonic() - began:.0f} s, {num_failed} failed", flush=True)


def work(options: argparse.Namespace) -> None:
    """The worker: time cases from number `worker` on, a line of JSON each on stdout."""
    for index, case in enumerate(chosen_cases(options.only)):
        if index < options.worker:
            continue
        try:
            row = sweep_case(case) if options.sweep else run_case(case, options)
        except Exception as error:
            row = {"name": case.name, "error": f"{type(error).__name__}: {error}"[:2000]}
        print("ROW " + json.dumps(row), flush=True)
        if "CUDA error" in row.get("error", ""):
            sys.exit(3)  # this process's context is lost
        torch.cuda.empty_cache()


def run_workers(options: argparse.Namespace, keep: Callable[[list[dict[str, Any]]], None]) -> list[dict[str, Any]]:
    """Rows of all cases, from as many workers as it takes; `keep` gets all that there are after each."""
    names = [case.name for case in chosen_cases(options.only)]
    rows: list[dict[str, Any]] = []
    limit = SWEEP_SECONDS if options.sweep else CASE_SECONDS
    while len(rows) < len(names):
        command = [sys.executable, __file__, *sys.argv[1:], "--worker", str(len(rows))]
        worker = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env={**os.environ, "PYTHONUNBUFFERED": "1"})
        lines: queue.Queue[str | None] = queue.Queue()
        reader = multiprocessing.dummy.Process(target=_read_lines, args=(worker, lines))
        reader.start()
        expected = len(rows)
        while True:
            try:
                line = lines.get(timeout=limit)
            except queue.Empty:
                worker.kill()
                rows.append({"name": names[len(rows)], "error": f"no result in {limit} s"})
                break
            if line is None:
                if len(rows) < len(names) and worker.wait() not in (0, 3):
                    rows.append({"name": names[len(rows)], "error": f"the worker died with status {worker.returncode}"})
                elif len(rows) == expected:
                    raise RuntimeError("a worker ended without timing anything")
                break
            if line.startswith("ROW "):
                rows.append(json.loads(line[4:]))
                keep(rows)
                print(f"[{len(rows)}/{len(names)}] {summary(rows[-1])}", flush=True)
            else:
                print(line, end="", flush=True)
        reader.join()
    return rows


def _read_lines(worker: subprocess.Popen[str], lines: "queue.Queue[str | None]") -> None:
    assert worker.stdout is not None
    for line in worker.stdout:
        lines.put(line)
    lines.put(None)


def summary(row: dict[str, Any]) -> str:
    if "error" in row:
        return f"{row['name']}: FAILED {row['error'].splitlines()[0][:150]}"
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
