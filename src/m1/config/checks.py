"""Checks of options that several commands make before they begin."""

from typing import Any

from m1.config.sampling import SampleConfig, SamplingConfig


def require(config: Any, *names: str) -> None:
    """ValueError that names the fields that are empty, if any: these have no sensible default."""
    missing = [name for name in names if not getattr(config, name)]
    if missing:
        flags = [f"--{name.replace('_', '-')}" for name in missing]
        words = f"{', '.join(flags[:-1])} and {flags[-1]} are" if len(flags) > 1 else f"{flags[0]} is"
        raise ValueError(f"{words} needed (or {', '.join(f'{name} = …' for name in missing)} in the recipe)")


def require_possible(config: SamplingConfig | SampleConfig) -> None:
    """ValueError that names an option of sampling that is out of range."""
    if not 0 <= config.temperature < float("inf"):
        raise ValueError(f"--temperature: expected at least 0, got {config.temperature}")
    if not 0 < config.top_p <= 1:
        raise ValueError(f"--top-p: expected more than 0 and at most 1, which is off, got {config.top_p}")
