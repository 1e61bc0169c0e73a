"""Types, the suffix and the check that commands of all kinds share."""

from typing import Any, Literal

MixerName = Literal["mamba1", "mamba2"]
DeviceName = Literal["auto", "cpu", "cuda"]
ParameterGroup = Literal["mixers", "attention", "mlp", "norms", "embeddings"]

PROBLEM_SUFFIX = "\nLet's think step by step and output the final answer within \\boxed{}."
"""What is added to every problem, in training and in solving: the instruction that M1 was trained with (arXiv 2504.10449)."""


def require(config: Any, *names: str) -> None:
    """ValueError that names the fields that are empty, if any: these have no sensible default."""
    missing = [name for name in names if not getattr(config, name)]
    if missing:
        flags = [f"--{name.replace('_', '-')}" for name in missing]
        words = f"{', '.join(flags[:-1])} and {flags[-1]} are" if len(flags) > 1 else f"{flags[0]} is"
        raise ValueError(f"{words} needed (or {', '.join(f'{name} = …' for name in missing)} in the recipe)")
