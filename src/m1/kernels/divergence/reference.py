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
    mine = logits.float()
    zero = mine.new_zeros(len(mine))
    columns = targets[:, None] if targets is not None else None
    needs_own_softmax = columns is not None and (temperature != 1.0 or teacher is None)
    ce_log_probs = torch.log_softmax(mine, -1) if needs_own_softmax else None
    if teacher is None:
        assert ce_log_probs is not None and columns is not None
        ce = -ce_log_probs.gather(1, columns).squeeze(1)
        if wants_gradient:
            logits.copy_(_subtract_at(ce_log_probs.exp_(), columns, 1.0))
        return torch.stack([zero, ce, zero], 1)
    theirs = teacher.float()
    agrees = (mine.argmax(-1) == theirs.argmax(-1)).float() if counts_agreement else zero
    if temperature != 1.0:
        mine, theirs = mine.div_(temperature), theirs.div_(temperature)
    mine, theirs = torch.log_softmax(mine, -1), torch.log_softmax(theirs, -1)
    ce = zero
    if columns is not None:
        ce = -(mine if ce_log_probs is None else ce_log_probs).gather(1, columns).squeeze(1)
    kl, gradient = (_forward_kl if kind == "forward" else _reverse_kl)(mine, theirs, wants_gradient)
    if gradient is not None:
        scale = (1 - ce_weight) / temperature
        gradient = gradient if scale == 1.0 else gradient.mul_(scale)
        if ce_weight:
            assert columns is not None
            probs = mine if ce_log_probs is None else ce_log_probs.exp_()
            gradient = _subtract_at(gradient.add_(probs, alpha=ce_weight), columns, ce_weight)
        logits.copy_(gradient)
    return torch.stack([kl, ce, agrees], 1)


def _forward_kl(mine: Tensor, theirs: Tensor, wants_gradient: bool) -> tuple[Tensor, Tensor | None]:
    """KL(teacher || student) from log-probs [C, V], gradient p_student - p_teacher. `mine` becomes probabilities."""
    teacher_probs = theirs.exp()
    kl = torch.linalg.vecdot(teacher_probs, theirs.sub_(mine))
    return kl, torch.sub(mine.exp_(), teacher_probs, out=teacher_probs) if wants_gradient else None


def _reverse_kl(mine: Tensor, theirs: Tensor, wants_gradient: bool) -> tuple[Tensor, Tensor | None]:
    """KL(student || teacher), gradient p_student · (log ratio - KL). `mine` becomes probabilities."""
    log_ratio = torch.sub(mine, theirs, out=theirs)
    probs = mine.exp_()
    kl = torch.linalg.vecdot(probs, log_ratio)  # [C]
    return kl, log_ratio.sub_(kl[:, None]).mul_(probs) if wants_gradient else None


def _subtract_at(values: Tensor, columns: Tensor, amount: float) -> Tensor:
    """values[r, columns[r]] -= amount, in place."""
    return values.scatter_add_(1, columns, values.new_full(columns.shape, -amount))
