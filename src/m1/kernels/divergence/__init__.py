"""How far two next-token distributions are apart, and the gradient in the place of the logits: checks and dispatch."""

import torch
from torch import Tensor

from m1.kernels.dispatch import implementation_for, require, require_tensor


def divergence_(
    logits: Tensor,
    teacher: Tensor | None = None,
    targets: Tensor | None = None,
    *,
    kind: str = "forward",
    temperature: float = 1.0,
    ce_weight: float = 0.0,
    wants_gradient: bool = True,
    counts_agreement: bool = False,
) -> Tensor:
    """Per row: KL between softmax(teacher / temperature) and softmax(logits / temperature), cross-entropy, and agreement.

    The logits are overwritten by the gradient of (1 - ce_weight) · KL + ce_weight · CE with respect to themselves; without
    `wants_gradient` they are left as they are, or as anything. CE is at temperature 1. No factor temperature² is applied.

    Args:
        logits: [C, V] of any floating type, rows contiguous; computed in fp32.
        teacher: [C, V], or None for cross-entropy alone, with ce_weight 1. May be overwritten.
        targets: [C] int64 within 0 … V - 1 (on a GPU not checked), or None: then CE is 0 and ce_weight must be.
        kind: "forward" is KL(teacher || student), "reverse" KL(student || teacher).
    Returns:
        [C, 3] fp32: KL in nats, CE in nats, and with `counts_agreement` 1 where the most probable tokens coincide, else 0.
    Raises:
        ValueError: for shapes, types, a kind or numbers that don't fit.
    """
    require(logits.dim() == 2 and logits.is_floating_point(), "logits", "a floating tensor [C, V]", list(logits.shape))
    require(logits.stride(-1) == 1, "logits", "rows that are contiguous", logits.stride())
    require(kind in ("forward", "reverse"), "kind", "'forward' or 'reverse'", repr(kind))
    require(temperature > 0, "temperature", "more than 0", temperature)
    require(0 <= ce_weight <= 1, "ce_weight", "0 to 1", ce_weight)
    require(targets is not None or not ce_weight, "targets", "given with a ce_weight above 0", None)
    require(teacher is not None or ce_weight == 1, "ce_weight", "1 without a teacher", ce_weight)
    if teacher is not None:
        require_tensor("teacher", teacher, "C V", logits.shape, logits)
        require(teacher.stride(-1) == 1, "teacher", "rows that are contiguous", teacher.stride())
    if targets is not None:
        require_tensor("targets", targets, "C", logits.shape[:1], logits, (torch.int64,))
    implementation = implementation_for(logits, __name__)
    return implementation.divergence_(
        logits,
        teacher,
        targets,
        kind=kind,
        temperature=temperature,
        ce_weight=ce_weight,
        wants_gradient=wants_gradient,
        counts_agreement=counts_agreement and teacher is not None,
    )
