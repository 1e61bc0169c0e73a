"""Metrics of several training runs in one picture, a panel a metric.

    python benchmarks/metrics_plot.py hybrid=runs/grpo-hybrid transformer=runs/grpo-transformer \
        --metrics reward entropy length --mean-of 5 --out grpo.svg

A step that lacks a metric (one of GRPO in which nothing taught has no entropy) is left out of its curve.
"""

import argparse
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from m1.run_page import METRICS
from m1.training.metrics import Record, read_metrics

COLORS = {"transformer": "C0", "hybrid": "C1"}
LABELS = {"reward": "mean reward", "entropy": "entropy, nats a token", "length": "tokens an answer"}


def curve(records: list[Record], metric: str, mean_of: int) -> tuple[np.ndarray, np.ndarray]:
    """Steps and values of a metric, means over `mean_of` neighbours, the last of them fewer if they don't divide."""
    known = [(float(record["step"]), float(record[metric])) for record in records if metric in record]
    groups = [np.array(known[start : start + mean_of]).mean(0) for start in range(0, len(known), mean_of)]
    points = np.array(groups).reshape(-1, 2)
    return points[:, 0], points[:, 1]


def plot(runs: dict[str, list[Record]], metrics: list[str], mean_of: int) -> Figure:
    figure = Figure(figsize=(6.4, 2.0 * len(metrics) + 0.8))
    panels = figure.subplots(len(metrics), sharex=True, squeeze=False)[:, 0]
    for axes, metric in zip(panels, metrics, strict=True):
        for name, records in runs.items():
            axes.plot(*curve(records, metric, mean_of), color=COLORS.get(name), label=name)
        axes.set_ylabel(LABELS.get(metric, metric))
        axes.set_ylim(bottom=0)
        axes.grid(alpha=0.3)
    panels[0].legend()
    panels[-1].set_xlabel("step" if mean_of == 1 else f"step (means of {mean_of})")
    return figure


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", help="NAME=DIRECTORY of training runs")
    parser.add_argument("--metrics", nargs="+", required=True, help="names in metrics.jsonl")
    parser.add_argument("--mean-of", type=int, default=1, help="steps to a point")
    parser.add_argument("--out", type=Path, required=True, help="an image to write")
    options = parser.parse_args(arguments)
    if options.mean_of < 1:
        parser.error(f"--mean-of: expected at least 1, got {options.mean_of}")
    runs = {}
    for text in options.runs:
        name, separator, directory = text.partition("=")
        if not separator:
            parser.error(f"{text}: expected NAME=DIRECTORY")
        runs[name] = read_metrics(Path(directory) / METRICS)
        for metric in options.metrics:
            if not any(metric in record for record in runs[name]):
                parser.error(f"--metrics: {directory}/{METRICS} has no {metric!r}; it has {', '.join(runs[name][-1])}")
    plot(runs, options.metrics, options.mean_of).savefig(options.out, bbox_inches="tight", metadata={"Date": None})


if __name__ == "__main__":
    main()
