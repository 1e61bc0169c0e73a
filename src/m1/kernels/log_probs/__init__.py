"""Log-probabilities of tokens and entropies of their distributions, and the gradient in the logits' place: checks, dispatch."""

import torch
from torch import Tensor

from m1.kernels.dispatch import implementation_for, require, require_tensor


def token_log_probs(logits: Tensor, targets: Tensor, *, temperature: float = 1.0) -> Tensor:
    """Of softmax(logits / temperature), row by row: log-probability of the target, entropy, and log of the denominator.

    Args:
        logits: [C, V] of any floating type, rows contiguous; computed in fp32, left as they are.
        targets: [C] int64 within 0 … V - 1 (on a GPU not checked).
    Returns:
        [C, 3] fp32, in nats: log p(target); -Σ p · log p; log Σ exp(logits / temperature).
    Raises:
        ValueError: for shapes, types or a temperature that don't fit.
    """
    _require(logits, targets, temperature)
    return implementation_for(logits, __name__).token_log_probs(logits, targets, temperature=temperature)


def log_prob_gradient_(
    logits: Tensor, targets: Tensor, of_rows: Tensor, slope: Tensor, *, entropy_slope: float = 0.0, temperature: float = 1.0
) -> Tensor:
    """Overwrite the logits by the gradient of Σ (slope · log p(target) + entropy_slope · entropy) with respect to themselves.

    With z = logits / temperature: d log p(target) / dz = onehot - p, d entropy / dz = -p · (log p + entropy).

    Args:
        logits, targets, temperature: as token_log_probs was given them.
        of_rows: [C, 3], what it returned.
        slope: [C] fp32, of each row's log-probability. entropy_slope: of each row's entropy.
    Returns:
        The logits.
    Raises:
        ValueError: for shapes, types or a temperature that don't fit.
    """
    _require(logits, targets, temperature)
    require_tensor("of_rows", of_rows, "C 3", (len(logits), 3), logits, (torch.float32,))
    require_tensor("slope", slope, "C", logits.shape[:1], logits, (torch.float32,))
    implementation = implementation_for(logits, __name__)
    implementation.log_prob_gradient_(logits, targets, of_rows, slope, entropy_slope=entropy_slope, temperature=temperature)
    return logits


def _require(logits: Tensor, targets: Tensor, temperature: float) -> None:
    require(logits.dim() == 2 and logits.is_floating_point(), "logits", "a floating tensor [C, V]", list(logits.shape))
    require(logits.stride(-1) == 1, "logits", "rows that are contiguous", logits.stride())
    require(temperature > 0, "temperature", "more than 0", temperature)
    require_tensor("targets", targets, "C", logits.shape[:1], logits, (torch.int64,))
