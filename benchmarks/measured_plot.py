"""Runs that went on from one another as one plot: KL to the Transformer and problems solved, against all tokens trained on.

    python benchmarks/measured_plot.py first-leg second-leg --tokens-before 29.9e6 --transformer 0.284 --out recovery.svg

Each run is a directory with the measured.jsonl that measure_run.py wrote; a run's tokens are counted on from the one before it.
KL is drawn as a line of its own for each set of held-out tokens: means over different texts don't belong together.
"""

import argparse
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from m1.run_page import MEASURED
from m1.training.metrics import read_metrics


def joined(runs: list[Path], tokens_before: float) -> list[dict[str, Any]]:
    """The lines of all runs, with `tokens` counted through; what a run began with is the end of the one before it, and is left
    out unless it was measured on other tokens."""
    lines: list[dict[str, Any]] = []
    for run in runs:
        mine = sorted(read_metrics(run / MEASURED), key=lambda line: line["step"])
        start = lines[-1]["tokens"] if lines else tokens_before
        known = {line.get("targets") for line in lines}
        lines += [
            line | {"tokens": start + line["tokens"]} for line in mine if line["step"] or line.get("targets") not in known
        ]
    return lines


def plot(lines: list[dict[str, Any]], transformer: float | None) -> Figure:
    figure = Figure(figsize=(6.4, 4.8))
    above, below = figure.subplots(2, sharex=True)
    tokens = [line["tokens"] / 1e6 for line in lines]
    sets = list(dict.fromkeys(line.get("targets") for line in lines))
    for number, targets in enumerate(sets):
        ours = [line for line in lines if line.get("targets") == targets]
        style = {"marker": "o", "color": "C1", "linestyle": ("-", "--", ":")[number % 3]}
        label = f"{targets:,} held-out tokens" if targets else None
        above.plot([line["tokens"] / 1e6 for line in ours], [line["kl"] for line in ours], label=label, **style)
    if len(sets) > 1:
        above.legend(loc="lower left")
    above.set_ylabel("KL, nats a token")
    above.set_ylim(0, 1.1 * max(line["kl"] for line in lines))
    errors = [line["pass_at_1_error"] or 0.0 for line in lines]
    solved = [line["pass_at_1"] for line in lines]
    below.errorbar(tokens, solved, yerr=errors, marker="o", color="C1", capsize=3, label="hybrid")
    if transformer is not None:
        below.axhline(transformer, color="C0", linestyle="--", label="Transformer")
    below.yaxis.set_major_formatter(PercentFormatter(xmax=1))
    below.set_ylim(bottom=0)
    below.set_ylabel("solved, greedy")
    below.set_xlabel("million tokens trained on")
    below.legend(loc="lower right")
    for axes in (above, below):
        axes.grid(alpha=0.3)
    return figure


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path, help="directories of training runs, in their order")
    parser.add_argument("--tokens-before", type=float, default=0.0, help="trained on before the first of them")
    parser.add_argument("--transformer", type=float, help="share of the problems that it solves")
    parser.add_argument("--out", type=Path, required=True, help="an image to write")
    options = parser.parse_args(arguments)
    figure = plot(joined(options.runs, options.tokens_before), options.transformer)
    figure.savefig(options.out, bbox_inches="tight", metadata={"Date": None})


if __name__ == "__main__":
    main()
