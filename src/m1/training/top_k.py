"""A teacher's distributions by their k most probable tokens and the mass of all others: recorded, and learnt from.

The divergence is that between distributions over k + 1 outcomes, the last of which is "any other token": it never exceeds the
divergence over the vocabulary, and equals it where k is the vocabulary. Where they are kept is in `teacher_cache.py`.
Legend: N target tokens, k kept tokens, V vocabulary, R rows of a block.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from m1.training.packing import move

# Log-probs below this count as this: ratios of probabilities stay finite in fp32, and -inf (an empty tail) is no exception.
LEAST_LOG_PROB = -80.0


@dataclass(frozen=True)
class TopK:
    """ids [N, k] int32, log_probs [N, k], and the log of the mass of all other tokens, log_tail [N] float32 (-inf: none)."""

    ids: Tensor
    log_probs: Tensor
    log_tail: Tensor

    def to(self, device: torch.device) -> "TopK":
        return TopK(*(move(tensor, device) for tensor in (self.ids, self.log_probs, self.log_tail)))


class TopKRecorder:
    """A `losses.TokenLoss` without gradient: after `head_loss` has run, `found` holds each token's distribution."""

    names: tuple[str, ...] = ("mass",)
    takes_any_dtype = False

    def __init__(self, num_tokens: int, k: int, temperature: float, device: torch.device) -> None:
        self.temperature = temperature
        self.found = TopK(
            torch.empty((num_tokens, k), dtype=torch.int32, device=device),
            torch.empty((num_tokens, k), device=device),
            torch.empty(num_tokens, device=device),
        )

    def __call__(
        self, logits: Tensor, teacher: Tensor | None, rows: slice, wants_gradient: bool
    ) -> tuple[Tensor, Tensor | None]:
        assert not wants_gradient, "TopKRecorder has no gradient: call it under torch.no_grad()"
        log_probs = torch.log_softmax(logits.div_(self.temperature), -1)
        top, ids = log_probs.topk(self.found.ids.shape[1], -1)
        self.found.ids[rows], self.found.log_probs[rows] = ids.int(), top
        self.found.log_tail[rows] = log_probs.scatter_(1, ids, -torch.inf).logsumexp(-1)
        return top.exp().sum()[None], None


class TopKDivergence:
    """KL between a recorded teacher and the student over k + 1 outcomes, mixed with cross-entropy, summed over tokens.

    `loss`, `kl` and `ce` mean what they do in `losses.Divergence`, whose arguments these are; the teacher was recorded at the
    same temperature.
    """

    names: tuple[str, ...] = ("loss", "kl", "ce")
    takes_any_dtype = False

    def __init__(
        self, teacher: TopK, targets: Tensor, *, kind: str = "forward", temperature: float = 1.0, ce_weight: float = 0.0
    ) -> None:
        self.teacher, self.targets = teacher, targets
        self.kind, self.temperature, self.ce_weight = kind, temperature, ce_weight

    def __call__(
        self, logits: Tensor, teacher: Tensor | None, rows: slice, wants_gradient: bool
    ) -> tuple[Tensor, Tensor | None]:
        targets, ids = self.targets[rows, None], self.teacher.ids[rows].long()
        plain = torch.log_softmax(logits, -1)  # at temperature 1, for the cross-entropy
        mine = plain if self.temperature == 1.0 else torch.log_softmax(logits / self.temperature, -1)
        ce = -plain.gather(1, targets).sum()
        outcomes = torch.cat(
            [mine.gather(1, ids), mine.scatter(1, ids, -torch.inf).logsumexp(-1, keepdim=True)], 1
        )  # [R, k + 1]
        kl, slope = _divergence(outcomes, self._recorded(rows), self.kind)
        sums = torch.stack([(1 - self.ce_weight) * kl + self.ce_weight * ce, kl, ce])
        if not wants_gradient:
            return sums, None
        # A token's part in the gradient is its probability times its outcome's slope; all others share the last one.
        factors = slope[:, -1:].expand_as(mine).scatter(1, ids, slope[:, :-1])
        gradient = mine.exp().mul_(factors).mul_((1 - self.ce_weight) / self.temperature)
        if self.ce_weight:
            gradient.add_(plain.exp(), alpha=self.ce_weight)
            gradient.scatter_add_(1, targets, gradient.new_full(targets.shape, -self.ce_weight))
        return sums, gradient

    def _recorded(self, rows: slice) -> Tensor:
        """The teacher's log-probs of the k + 1 outcomes [R, k + 1]; they sum to one again after rounding."""
        log_probs = torch.cat([self.teacher.log_probs[rows].float(), self.teacher.log_tail[rows, None]], 1)
        return torch.log_softmax(log_probs, -1)


def _divergence(mine: Tensor, theirs: Tensor, kind: str) -> tuple[Tensor, Tensor]:
    """Sum of KL over log-probs of outcomes [R, k + 1], and s such that the gradient for a token's logit is its probability
    times s of its outcome.

    forward KL(theirs || mine): s = 1 - theirs / mine. reverse KL(mine || theirs): s = log ratio - KL. An outcome that both
    exclude has no part.
    """
    mine, theirs = mine.clamp_min(LEAST_LOG_PROB), theirs.clamp_min(LEAST_LOG_PROB)
    ratio = theirs - mine
    if kind == "forward":
        return (theirs.exp() * ratio).sum(), 1 - ratio.exp()
    kl = -(mine.exp() * ratio).sum(-1, keepdim=True)
    return kl.sum(), -ratio - kl
