"""The divergence of two distributions in torch: the truth in tests, and the CPU path. See the package for the contract."""

import torch
from torch import Tensor


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
    """In fp32; memory that the caller gave away (fp32 logits and teacher) is used again."""
    wide = logits.float()  # the logits themselves where they are fp32; the gradient ends up here
    zero = wide.new_zeros(len(wide))
    columns = targets[:, None] if targets is not None else None
    needs_own_softmax = columns is not None and (temperature != 1.0 or teacher is None)
    ce_log_probs = torch.log_softmax(wide, -1) if needs_own_softmax else None
    if teacher is None:
        assert ce_log_probs is not None and columns is not None
        ce = -ce_log_probs.gather(1, columns).squeeze(1)
        if wants_gradient:
            _put(_subtract_at(torch.exp(ce_log_probs, out=wide), columns, 1.0), logits)
        return torch.stack([zero, ce, zero], 1)
    theirs = teacher.float()
    agrees = (wide.argmax(-1) == theirs.argmax(-1)).float() if counts_agreement else zero
    if temperature != 1.0:
        wide, theirs = wide.div_(temperature), theirs.div_(temperature)
    mine, theirs = torch.log_softmax(wide, -1), torch.log_softmax(theirs, -1)
    ce = zero
    if columns is not None:
        ce = -(mine if ce_log_probs is None else ce_log_probs).gather(1, columns).squeeze(1)
    kl = (_forward_kl if kind == "forward" else _reverse_kl)(mine, theirs, wide if wants_gradient else None)
    if wants_gradient:
        scale = (1 - ce_weight) / temperature
        gradient = wide if scale == 1.0 else wide.mul_(scale)
        if ce_weight:
            assert columns is not None
            probs = mine if ce_log_probs is None else ce_log_probs.exp_()
            gradient = _subtract_at(gradient.add_(probs, alpha=ce_weight), columns, ce_weight)
        _put(gradient, logits)
    return torch.stack([kl, ce, agrees], 1)


def _forward_kl(mine: Tensor, theirs: Tensor, gradient: Tensor | None) -> Tensor:
    """KL(teacher || student) [C] from log-probs [C, V]; p_student - p_teacher into `gradient`; `mine` becomes probabilities."""
    teacher_probs = theirs.exp()
    kl = torch.linalg.vecdot(teacher_probs, theirs.sub_(mine))
    if gradient is not None:
        torch.sub(mine.exp_(), teacher_probs, out=gradient)
    return kl


def _reverse_kl(mine: Tensor, theirs: Tensor, gradient: Tensor | None) -> Tensor:
    """KL(student || teacher) [C]; p_student · (log ratio - KL) into `gradient`; `mine` becomes probabilities."""
    log_ratio = torch.sub(mine, theirs, out=theirs)
    probs = mine.exp_()
    kl = torch.linalg.vecdot(probs, log_ratio)
    if gradient is not None:
        torch.mul(log_ratio.sub_(kl[:, None]), probs, out=gradient)
    return kl


def _put(gradient: Tensor, logits: Tensor) -> None:
    """Write the gradient over the logits, unless it was made there."""
    if gradient is not logits:
        logits.copy_(gradient)


def _subtract_at(values: Tensor, columns: Tensor, amount: float) -> Tensor:
    """values[r, columns[r]] -= amount, in place."""
    return values.scatter_add_(1, columns, values.new_full(columns.shape, -amount))
