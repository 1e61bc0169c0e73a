"""What trains at which rate: parameter groups, frozen sets, AdamW, the schedule, and clipping by global norm."""

import math
from collections.abc import Collection, Iterable

import torch
from torch import Tensor, nn

from m1.config import TrainConfig
from m1.training.sharding import local

GROUPS = ("mixers", "attention", "mlp", "norms", "embeddings")
_MARKS = {"mixer": "mixers", "self_attn": "attention", "mlp": "mlp", "embed_tokens": "embeddings", "lm_head": "embeddings"}


def group_of(name: str) -> str:
    """The group of a parameter of `M1ForCausalLM`, from its name; norms inside a mixer or an attention belong to that."""
    return next((_MARKS[part] for part in name.split(".") if part in _MARKS), "norms")


def is_decayed(name: str, parameter: Tensor) -> bool:
    """Whether weight decay applies: on matrices and filters.

    Not on vectors (norms, biases, D, dt_bias), nor A_log (a rate in disguise), nor embeddings: rows of tokens that the data
    lacks would only shrink.
    """
    return parameter.ndim >= 2 and group_of(name) != "embeddings" and not name.endswith("A_log")


def select_trainable(model: nn.Module, frozen: Collection[str]) -> None:
    """Let every parameter train that is not of a `frozen` group; ValueError for an unknown group, or if none is left."""
    for group in frozen:
        if group not in GROUPS:
            raise ValueError(f"frozen: expected some of {', '.join(GROUPS)}, got {group!r}")
    is_any_left = False
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(group_of(name) not in frozen)
        is_any_left |= parameter.requires_grad
    if not is_any_left:
        raise ValueError(f"frozen: {', '.join(frozen)} leaves no parameter of this model to train")


def peak_rates(config: TrainConfig) -> dict[str, float]:
    """The peak rate of each group that has one of its own; all others have `learning_rate`. ValueError for an unknown group."""
    rates: dict[str, float] = {} if config.mixer_learning_rate is None else {"mixers": config.mixer_learning_rate}
    for group in config.learning_rates or {}:
        if group not in GROUPS:
            raise ValueError(f"learning_rates: expected rates of some of {', '.join(GROUPS)}, got one of {group!r}")
    return rates | dict(config.learning_rates or {})


def build_optimizer(model: nn.Module, config: TrainConfig) -> torch.optim.AdamW:
    """AdamW (arXiv 1711.05101) over the trainable parameters; each group has `peak_lr`, which `set_learning_rates` scales.

    Groups keep `names` beside `params`, in the same order, so that checkpoints are by name.
    """
    rates = peak_rates(config)
    groups: dict[tuple[float, bool], dict] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        if parameter.dtype != torch.float32:
            raise ValueError(f"model: master weights must be float32, {name} is {parameter.dtype}; load it with dtype=float32")
        rate, decays = rates.get(group_of(name), config.learning_rate), is_decayed(name, parameter)
        group = groups.setdefault(
            (rate, decays),
            {
                "params": [],
                "names": [],
                "peak_lr": rate,
                "weight_decay": config.weight_decay if decays else 0.0,
            },
        )
        group["params"].append(parameter)
        group["names"].append(name)
    return torch.optim.AdamW(list(groups.values()), lr=0.0, betas=config.betas, eps=1e-8, fused=True)


def learning_rate_factor(step: int, config: TrainConfig) -> float:
    """Share of the peak rate at `step` (from 0): linear warm-up, then a cosine down to `min_learning_rate_ratio`."""
    if step < config.warmup_steps:
        return (step + 1) / config.warmup_steps
    progress = min(1.0, (step - config.warmup_steps) / max(1, config.steps - config.warmup_steps))
    floor = config.min_learning_rate_ratio
    return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * progress))


def set_learning_rates(optimizer: torch.optim.Optimizer, step: int, config: TrainConfig) -> dict[str, float]:
    """Set every group's rate for `step`; the rates by what they drive: "lr", and "lr_mixers" and so on where given apart."""
    factor = learning_rate_factor(step, config)
    for group in optimizer.param_groups:
        group["lr"] = group["peak_lr"] * factor
    apart = {f"lr_{name}": peak * factor for name, peak in peak_rates(config).items()}
    return {"lr": config.learning_rate * factor, **apart}


def squared_gradient_norm(parameters: Iterable[Tensor]) -> Tensor:
    """Squared L2 norm, float64, of the gradients that this rank holds; over all ranks these add up."""
    gradients = [local(parameter.grad) for parameter in parameters if parameter.grad is not None]
    assert gradients, "no parameter has a gradient"
    return torch.nn.utils.get_total_norm(gradients).double().square()


def clip_gradients(parameters: Iterable[Tensor], norm: float, max_norm: float) -> None:
    """Scale all gradients, whose norm over all ranks is `norm`, so that it is at most `max_norm`."""
    if norm > max_norm:
        gradients = [local(parameter.grad) for parameter in parameters if parameter.grad is not None]
        torch._foreach_mul_(gradients, max_norm / (norm + 1e-6))
