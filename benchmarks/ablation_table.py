"""What ablation.py found, as a table for the docs and a plot: KL to the Transformer against tokens, a line an arm.

python benchmarks/ablation_table.py results/ablation_*.json --plot results/ablation.svg
"""

import argparse
import json
from pathlib import Path
from typing import Any

from m1.evaluation.report import line_plot

COLUMNS = ("hybrid", "attention", "tokens", "KL", "agreement", "dev greedy", "length", "tokens/s", "state, KiB")


def cells(name: str, row: dict[str, Any]) -> tuple[str, ...]:
    """One line of the table; a dash where a row has no such number."""
    dev, layers = row["dev"], row["attention_layers"]
    trained = sum(row[stage]["tokens"] for stage in ("align", "distill") if stage in row)
    error = dev["pass@1_standard_error"]
    return (
        name,
        "all" if "kl" not in row else ", ".join(map(str, layers)),
        f"{trained / 1e6:.1f}M" if trained else "–",
        f"{row['kl']:.3f}" if "kl" in row else "–",
        f"{row['agreement']:.1%}" if "kl" in row else "–",
        f"{dev['pass@1']:.1%}" + (f" ± {error:.1%}" if error is not None else ""),
        f"{dev['mean_tokens']:.0f}",
        f"{row['decode']['tokens_per_second']:,.0f}",
        f"{row['state_bytes'] / 1024:,.0f}",
    )


def table(rows: dict[str, dict[str, Any]]) -> str:
    lines = [COLUMNS, ("---",) * len(COLUMNS), *(cells(name, row) for name, row in rows.items())]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", nargs="+", type=Path, help="what ablation.py wrote")
    parser.add_argument("--plot", type=Path, help="an image to write")
    options = parser.parse_args(arguments)
    rows: dict[str, dict[str, Any]] = {}
    for path in options.results:
        rows |= json.loads(path.read_text(encoding="utf-8"))["rows"]
    print(table(rows))
    curves = {name: row["distill"]["curve"] for name, row in rows.items() if "distill" in row}
    if options.plot and curves:
        lines = {name: ([x / 1e6 for x, _ in points], [y for _, y in points]) for name, points in curves.items()}
        figure = line_plot(lines, x_label="million tokens of distillation", y_label="KL, nats a token", log_y=True)
        figure.savefig(options.plot, bbox_inches="tight", metadata={"Date": None})


if __name__ == "__main__":
    main()
