"""The page of one training run: what ran, where it began and ended, and its metrics as plots. Reads files only, no torch."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from m1.evaluation.report import Report, line_plot
from m1.storage import RUN_CONFIG, read_run_record
from m1.training.metrics import Record, read_metrics

METRICS = "metrics.jsonl"
MEASURED = "measured.jsonl"  # of models on the run's way, on data that it did not see (benchmarks/measure_run.py)
# Steps drawn as they are; where there are more, the mean over windows of them is drawn, and the page says how many.
MOST_POINTS = 200


@dataclass(frozen=True)
class Plot:
    """One figure: the metrics on it with their names in the legend, and what to say below."""

    keys: dict[str, str]
    y_label: str
    caption: str
    log_y: bool = False


PLOTS = {
    "Learning": (
        Plot({"loss": "loss"}, "loss", "The loss that was minimised, mean over target tokens."),
        Plot({"kl": "KL"}, "nats a token", "KL divergence from the teacher (GRPO: from the starting model).", log_y=True),
        Plot({"ce": "cross-entropy"}, "nats a token", "Cross-entropy on the data's own tokens."),
    ),
    "Reward": (
        Plot(
            {"reward": "reward", "pass_at_1": "pass@1", "pass_at_k": "pass@k of the group"},
            "mean over the step's samples",
            "What the samples earned, before each step's update.",
        ),
        Plot({"length": "tokens"}, "tokens", "Mean length of a sample."),
        Plot(
            {"truncated": "cut off", "dropped_groups": "groups of one score", "clip_share": "clipped tokens"},
            "share",
            "Samples cut off at the token limit, groups that taught nothing, tokens whose gradient the clip removed.",
        ),
    ),
    "Policy": (
        Plot({"entropy": "entropy"}, "nats a token", "Entropy of the policy at the sampled tokens."),
        Plot(
            {"log_prob_gap": "mean |difference| of log-probs"},
            "nats a token",
            "Between the sampler's arithmetic and the trainer's; importance weights correct for it.",
        ),
    ),
    "Optimizer": (
        Plot({"lr": "learning rate", "lr_mixers": "of the mixers"}, "learning rate", "Learning rates."),
        Plot({"grad_norm": "gradient norm"}, "norm", "Global norm of the gradient, before clipping.", log_y=True),
    ),
    "Speed": (
        Plot(
            {
                "tokens_per_second": "whole step",
                "sampled_tokens_per_second": "sampling",
                "trained_tokens_per_second": "training",
            },
            "tokens/s",
            "Tokens a second.",
        ),
        Plot(
            {
                "seconds": "whole step",
                "seconds_sampling": "sampling",
                "seconds_rewards": "rewards",
                "seconds_training": "training",
            },
            "seconds",
            "Where a step's time went.",
        ),
    ),
}


HELD_OUT = {
    "kl": "KL to the Transformer, nats a token",
    "agreement": "same most probable token, share",
    "pass_at_1": "pass@1, greedy",
    "pass_at_1_error": "its standard error",
    "length": "mean tokens of an answer",
    "truncated": "answers cut off, share",
}


def write_run_page(directory: Path, page: Path) -> None:
    """Write the page of the training run in `directory`. Raises ValueError for a run without a step, or a damaged file."""
    records = read_metrics(directory / METRICS)
    if not records:
        raise ValueError(f"{directory / METRICS} is empty: the run has not done a step yet")
    begun = _read_json(directory / RUN_CONFIG)
    finished = read_run_record(directory)
    command, config = begun.get("command", "training"), begun.get("config", {})
    report = Report(f"m1 {command}: {directory.name}")
    report.text(_summary(records, config, finished))
    window = -(-len(records) // MOST_POINTS)
    if window > 1:
        report.text(f"The plots show means over {window} lines of the log.")
    report.table(("metric", "first", "last", "least", "most"), _table(records))
    for heading, plots in PLOTS.items():
        figures = [(plot, _draw(records, plot, window)) for plot in plots]
        if any(figure is not None for _, figure in figures):
            report.heading(heading)
        for plot, figure in figures:
            if figure is not None:
                report.figure(figure, plot.caption)
    _layers(report, records)
    _held_out(report, directory / MEASURED)
    report.heading("Settings")
    report.code(json.dumps(config, indent=2, ensure_ascii=False))
    report.write(page)


def _summary(records: Sequence[Record], config: dict[str, Any], finished: dict[str, Any] | None) -> str:
    last = records[-1]["step"]
    steps, tokens = config.get("steps", last), sum(record.get("tokens", 0) for record in records)
    words = f"{config.get('model', 'The model')}: {last:,} of {steps:,} steps, {tokens:,} tokens in the lines of the log"
    if finished is None:
        return words + "; not finished, the same command goes on with it."
    return words + f"; finished {finished['time']}, code {finished['revision'] or 'of unknown revision'}."


def _table(records: Sequence[Record]) -> list[tuple[str, ...]]:
    rows = []
    for key in _keys(records):
        _, values = _series(records, key)
        if values:
            rows.append((key, *(f"{value:.4g}" for value in (values[0], values[-1], min(values), max(values)))))
    return rows


def _draw(records: Sequence[Record], plot: Plot, window: int) -> Figure | None:
    """The plot's figure, or None if the run has none of its metrics."""
    lines = {name: _smooth(*_series(records, key), window) for key, name in plot.keys.items()}
    lines = {name: (steps, values) for name, (steps, values) in lines.items() if values}
    if not lines:
        return None
    can_be_log = plot.log_y and all(value > 0 for _, values in lines.values() for value in values)
    return line_plot(lines, x_label="step", y_label=plot.y_label, log_y=can_be_log)


def _layers(report: Report, records: Sequence[Record]) -> None:
    """Alignment: how far each mixer is from its attention, at the start and at the end."""
    keys = [key for key in _keys(records) if key.startswith("error_")]
    if not keys:
        return
    report.heading("Layers")
    layers = [int(key.removeprefix("error_")) for key in keys]
    errors = {"first step": records[0], "last step": records[-1]}
    lines = {name: (layers, [record.get(key, np.nan) for key in keys]) for name, record in errors.items()}
    caption = "Distance of each layer's mixer from the teacher's attention: 0 is equal, 1 is a mixer that gives nothing."
    report.figure(line_plot(lines, x_label="layer", y_label="relative error"), caption)


def _held_out(report: Report, path: Path) -> None:
    """What was measured of the run's models on held-out data, against the tokens that they had seen."""
    records = read_metrics(path) if path.is_file() else []
    if not records:
        return
    report.heading("Held-out data")
    columns = [key for key in HELD_OUT if any(record.get(key) is not None for record in records)]
    shown = [["–" if record.get(key) is None else f"{record[key]:.4g}" for key in columns] for record in records]
    report.table(
        ("step", "tokens", *(HELD_OUT[key] for key in columns)),
        [(f"{record['step']:,}", f"{record['tokens']:,}", *row) for record, row in zip(records, shown)],
    )
    for key in columns:
        points = [(record["tokens"] / 1e6, record[key]) for record in records if record.get(key) is not None]
        if not key.endswith("_error"):
            line = {HELD_OUT[key]: ([x for x, _ in points], [y for _, y in points])}
            report.figure(line_plot(line, x_label="million tokens", y_label=HELD_OUT[key]), f"{HELD_OUT[key]}, by tokens seen.")


def _keys(records: Sequence[Record]) -> list[str]:
    """Every metric's name, in the order in which they first stand in the log."""
    return [key for key in dict.fromkeys(key for record in records for key in record) if key != "step"]


def _series(records: Sequence[Record], key: str) -> tuple[list[float], list[float]]:
    """Steps and values of one metric, where it is a number."""
    points = [(record["step"], record[key]) for record in records if isinstance(record.get(key), (int, float))]
    return [step for step, _ in points], [value for _, value in points]


def _smooth(steps: list[float], values: list[float], window: int) -> tuple[list[float], list[float]]:
    """Means over windows of neighbouring points."""
    starts = range(0, len(values), window)
    return (
        [float(np.mean(steps[start : start + window])) for start in starts],
        [float(np.mean(values[start : start + window])) for start in starts],
    )


def _read_json(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
