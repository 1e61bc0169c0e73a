"""What kernels.py found, as the Markdown table of docs/kernels.md.

python benchmarks/kernel_table.py results/kernels.json --only selective_scan "3B 16384 tokens"
"""

import argparse
import json
from pathlib import Path
from typing import Any

SPEEDUPS = {"× reference": "reference_over_ours", "× compiled": "compiled_over_ours"}


def number(value: float | None) -> str:
    """Three digits, or as many as stand before the point; nothing for nothing."""
    if value is None:
        return ""
    return f"{value:,.{0 if value >= 100 else 1 if value >= 10 else 2}f}"


def cells(row: dict[str, Any]) -> list[str]:
    """One line: megabytes moved, microseconds, times the floor, and how many times faster than torch."""
    speedups = [number(row.get(field)) for field in SPEEDUPS.values()]
    return [row["name"], number(row["bytes"] / 1e6), number(row["seconds"] * 1e6), number(row["times_floor"]), *speedups]


def table(rows: list[dict[str, Any]], patterns: list[str]) -> str:
    """The rows that a pattern names, in the patterns' order, each once; all if there are none."""
    chosen = {row["name"]: row for pattern in patterns or [""] for row in rows if pattern in row["name"] and "seconds" in row}
    lines = [["case", "MB", "µs", "× floor", *SPEEDUPS], ["---"] * 6, *(cells(row) for row in chosen.values())]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path, help="what kernels.py wrote")
    parser.add_argument("--only", nargs="+", default=[], metavar="TEXT", help="cases whose name contains it")
    options = parser.parse_args(arguments)
    print(table(json.loads(options.results.read_text(encoding="utf-8"))["cases"], options.only))


if __name__ == "__main__":
    main()
