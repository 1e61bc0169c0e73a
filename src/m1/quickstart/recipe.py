"""What the quickstart does, in numbers: the problems, how much of each stage, how many samples. One recipe a kind of device."""

from dataclasses import dataclass, field, replace
from typing import Any

from m1.config import AlignConfig, DistillConfig, GRPOConfig, SFTConfig


@dataclass(frozen=True)
class Recipe:
    """Sizes of everything. `problems`: a reasoning-gym generator with its config, narrow enough for a small model."""

    generator: str = "chain_sum"
    generator_config: dict[str, Any] = field(
        default_factory=lambda: {"min_terms": 3, "max_terms": 3, "min_digits": 1, "max_digits": 2}
    )
    num_train_problems: int = 1500
    num_heldout_problems: int = 64
    num_teacher_problems: int = 384
    """Training problems whose answers, sampled from the Transformer, align and distil the hybrid."""
    max_new_tokens: int = 24
    num_samples: int = 8
    """Samples a held-out problem: pass@1 is their mean, maj@8 their vote."""
    temperature: float = 0.7
    mixer: str = "mamba2"
    attention_fraction: float = 0.4
    """Share of layers that stay attention."""
    align: AlignConfig = field(
        default_factory=lambda: AlignConfig(
            steps=12, tokens_per_step=2048, tokens_per_batch=2048, mixer_learning_rate=1e-3, warmup_steps=2
        )
    )
    distill: DistillConfig = field(
        default_factory=lambda: DistillConfig(
            steps=16, tokens_per_step=2048, tokens_per_batch=2048, learning_rate=3e-5, mixer_learning_rate=3e-4, warmup_steps=2
        )
    )
    sft: SFTConfig = field(
        default_factory=lambda: SFTConfig(
            steps=20, tokens_per_step=2048, tokens_per_batch=2048, learning_rate=1e-4, warmup_steps=2, suffix=""
        )
    )
    grpo: GRPOConfig = field(
        default_factory=lambda: GRPOConfig(
            steps=4,
            problems_per_step=16,
            samples_per_problem=8,
            tokens_per_step=4096,
            tokens_per_batch=4096,
            max_new_tokens=24,
            learning_rate=1e-5,
            suffix="",
        )
    )


def recipe_for(device: str, precision: str, seed: int) -> Recipe:
    """The recipe of a device ("cpu" or "cuda"), its stages set to that device, precision and seed."""
    recipe = Recipe()
    if device == "cuda":
        recipe = replace(recipe, num_teacher_problems=1024)
    common: dict[str, Any] = {"device": device, "precision": precision, "seed": seed}
    return replace(
        recipe,
        align=replace(recipe.align, **common),
        distill=replace(recipe.distill, **common),
        sft=replace(recipe.sft, **common),
        grpo=replace(recipe.grpo, **common),
    )
