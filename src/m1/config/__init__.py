"""What each command can be told: one dataclass a command. No torch here, so that `--help` is quick.

The text under a field is its help, and its value the default. What a TOML file and flags make of it is in `recipe_file.py`.
"""

from m1.config.checks import require, require_possible
from m1.config.commands import COMMANDS, ConvertConfig, QuickstartConfig, ReportConfig
from m1.config.sampling import EvalConfig, SampleConfig, SamplingConfig, SolveConfig
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
from m1.config.values import PROBLEM_SUFFIX, DeviceName, MixerName, ParameterGroup

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
