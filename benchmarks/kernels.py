"""Time every Triton kernel against its floor, its torch reference and torch.compile of that, on one GPU.

    PYTHONPATH=src python benchmarks/kernels.py                         # the table; JSON into results/kernels.json
    PYTHONPATH=src python benchmarks/kernels.py --only selective_scan --skip-reference
    PYTHONPATH=src python benchmarks/kernels.py --compile rms_norm "swiglu 3B"   # torch.compile of these cases' references too
    PYTHONPATH=src python benchmarks/kernels.py --sweep --only "3B 4 x 4096"   # try the launch sizes, best first

The cases are in kernel_cases_*.py, how one is timed in kernel_timing.py, the processes in kernel_workers.py. Everything is
first compiled in several processes at once. Then all our kernels are timed one after the other, then torch.compile of the
references, then these themselves; the JSON file is written after each.
"""

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from kernel_timing import chosen_cases
from kernel_workers import HARDWARE, run_jobs, serve, start_workers, summary


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


def revision() -> str:
    """The commit, "+" if files differ from it, or "unknown" outside a repository."""
    git = ["git", "-C", str(Path(__file__).parent)]
    try:
        commit = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
        changed = subprocess.run([*git, "status", "--porcelain", "-uno"], capture_output=True, text=True, check=True).stdout
    except (FileNotFoundError, subprocess.CalledProcessError):
        return "unknown"
    return commit + ("+" if changed.strip() else "")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", action="append", default=[], metavar="TEXT", help="cases whose name contains it; repeatable")
    parser.add_argument("--sweep", action="store_true", help="try the launch sizes instead of printing the table")
    parser.add_argument("--skip-reference", action="store_true", help="time our kernels only")
    parser.add_argument(
        "--compile", nargs="*", metavar="TEXT", help="also time torch.compile of references: of cases whose name contains it"
    )
    parser.add_argument("--jobs", type=int, default=8, help="processes that compile our kernels first; 0: while timing")
    parser.add_argument("--compilers", type=int, default=4, help="processes that compile references")
    parser.add_argument(
        "--start-when", type=Path, metavar="FILE", help="time nothing before it exists; compile ahead until then"
    )
    parser.add_argument("--limit", type=float, default=240, metavar="SECONDS", help="after which a case counts as hung")
    parser.add_argument("--list", action="store_true", help="print the cases' names and floors, time nothing")
    parser.add_argument("--output", type=Path, help="JSON file; results/kernels.json or results/kernel_sweep.json")
    parser.add_argument("--revision", default="", help="recorded instead of what git says")
    parser.add_argument("--worker", type=int, help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    options = parse()
    if options.worker is not None:
        serve(options)
        return
    if options.list:
        for case in chosen_cases(options.only):
            print(f"{case.floor_seconds * 1e6:9.1f} us  {case.bytes_moved / 1e9:7.3f} GB  {case.name}")
        return
    workers = start_workers(options)
    print("ready", flush=True)
    while options.start_when is not None and not options.start_when.exists():
        time.sleep(0.1)
    found = {
        "command": " ".join(sys.argv),
        "revision": options.revision or revision(),
        "hardware": workers[0].ask(HARDWARE),
    }
    name = "kernel_sweep.json" if options.sweep else "kernels.json"
    output = options.output or Path(__file__).parent.parent / "results" / name
    output.parent.mkdir(parents=True, exist_ok=True)

    rows: list[dict[str, Any]] = []

    def keep(found_rows: list[dict[str, Any]]) -> None:
        rows[:] = found_rows
        output.write_text(json.dumps(found | {"cases": rows}, indent=1) + "\n")

    run_jobs(options, workers, keep)
    for worker in workers:
        worker.close()
    print(f"\n{found['hardware']['gpu']}: copies {found['hardware']['copy_bytes_a_second'] / 1e12:.2f} TB/s; {output}")
    print_sweeps(rows) if options.sweep else print_table(rows)


if __name__ == "__main__":
    main()
