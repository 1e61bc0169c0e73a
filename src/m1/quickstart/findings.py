"""What the quickstart found, as plain values, and the words and tables that say it. Nothing is measured here."""

import os
import platform
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.table import Table

STAGES = ("before SFT", "SFT", "GRPO")
MODELS = ("Transformer", "hybrid")


@dataclass
class Findings:
    """similarity: stage -> kl, agreement, ce. accuracy: model -> stage -> summary of `evaluation.runner.summarize`.
    curves: stage -> metrics by step. seconds: stage -> wall-clock. vote: one problem looked at closely."""

    setting: dict[str, Any] = field(default_factory=dict)
    similarity: dict[str, dict[str, float]] = field(default_factory=dict)
    accuracy: dict[str, dict[str, dict[str, Any]]] = field(default_factory=dict)
    curves: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    vote: dict[str, Any] = field(default_factory=dict)


def majority(summary: Mapping[str, Any]) -> float:
    """Accuracy of the vote over all samples of a problem."""
    return summary["maj@k"][str(summary["num_samples"])]


def accuracy_line(name: str, stage: str, summary: Mapping[str, Any]) -> str:
    return (
        f"{name}, {stage}: pass@1 {summary['pass@1']:.1%} ± {summary['pass@1_standard_error']:.1%}, "
        f"maj@{summary['num_samples']} {majority(summary):.1%} on {summary['num_problems']} held-out problems "
        f"({summary['tokens_per_second']:,.0f} tokens/s)"
    )


def summary_table(findings: Findings) -> Table:
    """The end of the run on one screen: both models, each stage."""
    first = findings.accuracy["Transformer"][STAGES[0]]
    table = Table("stage", title="Held-out accuracy: pass@1 ± standard error / vote", title_justify="left")
    for name in MODELS:
        table.add_column(name, justify="right")
    for stage in STAGES:
        cells = []
        for name in MODELS:
            summary = findings.accuracy[name][stage]
            error = summary["pass@1_standard_error"]
            cells.append(f"{summary['pass@1']:.1%} ± {error:.1%} / {majority(summary):.1%}")
        table.add_row(stage, *cells)
    table.caption = f"{first['num_problems']} problems, {first['num_samples']} samples each"
    return table


def without_directory(word: str) -> str:
    """An absolute path's last part, anything else as it is: results are shown to others, whom our directories don't concern."""
    return Path(word).name if Path(word).is_absolute() else word


def describe_device(device: torch.device) -> str:
    """The hardware in words: the GPU's name, or the processor's with the number of threads used."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    model = platform.processor() or platform.machine()
    if os.path.exists("/proc/cpuinfo"):
        with open("/proc/cpuinfo", encoding="utf-8") as lines:
            names = (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
            model = next(names, model)
    return f"{model}, {torch.get_num_threads()} threads"
