"""What the quickstart does, in numbers: the problems, how much of each stage, how many samples. One recipe a kind of device."""

from dataclasses import dataclass, field, replace
from typing import Any

from m1.config import AlignConfig, DistillConfig, GRPOConfig, SFTConfig

PACKING: dict[str, Any] = {"tokens_per_step": 1024, "tokens_per_batch": 1024, "max_length": 512}


@dataclass(frozen=True)
class Recipe:
    """Sizes of everything.

    generator, generator_config: reasoning-gym problems, narrow enough that a small model half masters them.
    num_teacher_problems: training problems whose answers, sampled from the Transformer, align and distil the hybrid.
    num_samples: samples a held-out problem; pass@1 is their mean, maj@8 their vote.
    teach: how the Transformer learns the problems before it is converted. The other stages are named as the commands.
    """

    generator: str = "chain_sum"
    generator_config: dict[str, Any] = field(
        default_factory=lambda: {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 2}
    )
    num_train_problems: int = 1500
    num_heldout_problems: int = 64
    num_teacher_problems: int = 320
    max_new_tokens: int = 24
    num_samples: int = 8
    temperature: float = 0.7
    mixer: str = "mamba2"
    teach: SFTConfig = field(
        default_factory=lambda: SFTConfig(steps=30, learning_rate=1e-4, warmup_steps=3, suffix="", **PACKING)
    )
    align: AlignConfig = field(
        default_factory=lambda: AlignConfig(steps=28, mixer_learning_rate=1e-3, warmup_steps=3, **PACKING)
    )
    distill: DistillConfig = field(
        default_factory=lambda: DistillConfig(
            steps=22, learning_rate=3e-5, mixer_learning_rate=3e-4, warmup_steps=3, loss_on="all", **PACKING
        )
    )
    sft: SFTConfig = field(default_factory=lambda: SFTConfig(steps=6, learning_rate=3e-5, warmup_steps=1, suffix="", **PACKING))
    grpo: GRPOConfig = field(
        default_factory=lambda: GRPOConfig(
            steps=3,
            problems_per_step=6,
            samples_per_problem=8,
            tokens_per_batch=4096,
            max_length=512,
            max_new_tokens=24,
            learning_rate=1e-5,
            suffix="",
        )
    )


def recipe_for(device: str, precision: str, seed: int) -> Recipe:
    """The recipe of a device ("cpu" or "cuda"), its stages set to that device, precision and seed."""
    recipe = Recipe()
    if device == "cuda":
        recipe = replace(
            recipe,
            num_teacher_problems=600,
            teach=replace(recipe.teach, steps=48),
            align=replace(recipe.align, steps=30),
            distill=replace(recipe.distill, steps=40),
            sft=replace(recipe.sft, steps=12),
            grpo=replace(recipe.grpo, steps=3, problems_per_step=16, tokens_per_batch=16384),
        )
    common: dict[str, Any] = {"device": device, "precision": precision, "seed": seed}
    stages = ("teach", "align", "distill", "sft", "grpo")
    return replace(recipe, **{stage: replace(getattr(recipe, stage), **common) for stage in stages})


def middle_layers(num_layers: int) -> list[int]:
    """The half of the layers that stays attention: the middle one.

    In a run this short the mixers recover little, and the middle layers of a small model are dearest to its answers: with
    them kept, the converted model is nearer to the Transformer than with evenly spaced attention, or the first or last half.
    """
    count = (num_layers + 1) // 2
    first = num_layers - count - (num_layers - count) // 2
    return list(range(first, first + count))
