"""What each command can be told: one dataclass a command. No torch here, so that `--help` is quick.

The text under a field is its help, and its value the default. What a TOML file and flags make of it is in `recipe_file.py`.
"""

from m1.config.basics import PROBLEM_SUFFIX, DeviceName, MixerName, ParameterGroup, require
from m1.config.models import (
    ConvertConfig,
    EvalConfig,
    QuickstartConfig,
    ReportConfig,
    SampleConfig,
    SamplingConfig,
    SolveConfig,
    require_possible,
)
from m1.config.training import (
    AlignConfig,
    DistillConfig,
    GRPOConfig,
    OnPolicyConfig,
    RolloutConfig,
    SelectConfig,
    SFTConfig,
    TrainConfig,
)

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

__all__ = [
    "COMMANDS",
    "PROBLEM_SUFFIX",
    "AlignConfig",
    "ConvertConfig",
    "DeviceName",
    "DistillConfig",
    "EvalConfig",
    "GRPOConfig",
    "MixerName",
    "OnPolicyConfig",
    "ParameterGroup",
    "QuickstartConfig",
    "ReportConfig",
    "RolloutConfig",
    "SFTConfig",
    "SampleConfig",
    "SamplingConfig",
    "SelectConfig",
    "SolveConfig",
    "TrainConfig",
    "require",
    "require_possible",
]
