"""Losses on the language-model head, computed in chunks of tokens: full [N, vocab] logits never exist.

A chunk's logits are made, turned into their own gradient in place, and multiplied back into the gradients of the hidden
states and of the head within the forward pass, so nothing is recomputed: three products with the head a token, as in the
naive version. Between the two products the softmax arithmetic is a kernel or two on a GPU, and runs on blocks of rows small
enough for its cache on a CPU.
What is summed per token is said by a `TokenLoss`; the ones for imitation (cross-entropy, KL) live here, GRPO's in
`policy_loss.py`. Callers select the positions that count before the head and divide by the number of tokens of the step.

Legend: N target tokens, D hidden, V vocabulary, C tokens of a chunk, R rows of a block, k summed quantities.
"""

from collections.abc import Iterator
from typing import Any, Protocol

import torch
from torch import Tensor

from m1.kernels import divergence_, token_log_probs
from m1.modeling import M1ForCausalLM
from m1.training.packing import PackedBatch

# Logits of a chunk: enough tokens that reading the head's weight and adding to its gradient is paid for, few enough for memory
# (bf16: 2 bytes each, once more for a teacher's).
CHUNK_LOGITS = {"cpu": 2**26, "cuda": 2**28}
# fp32 logits of a block: on a CPU a few copies of it stay in the second-level cache (measured: 3x faster than whole chunks).
BLOCK_LOGITS_ON_CPU = 2**19

Head = tuple[Tensor, Tensor]  # hidden states [N, D] and the head's weight [V, D]; logits are hidden @ weight.T


class TokenLoss(Protocol):
    """Sums over tokens, and their gradient with respect to the logits."""

    names: tuple[str, ...]  # of the k sums; the first is the one that is minimised
    takes_any_dtype: bool  # whether it reads and overwrites logits as they are on a GPU, or wants fp32 copies

    def __call__(
        self, logits: Tensor, teacher: Tensor | None, rows: slice, wants_gradient: bool
    ) -> tuple[Tensor, Tensor | None]:
        """Logits [R, V] of the tokens `rows`, free to be overwritten -> sums [k], gradient [R, V] of the first."""


def head_loss(token_loss: TokenLoss, student: Head, teacher: Head | None = None) -> dict[str, Tensor]:
    """Sums of `token_loss` over all tokens, by name; the first is differentiable in the student's hidden states and head.

    student: (hidden [N, D], weight [V, D]); teacher: the same, D may differ, V may not; gets no gradient. Products run in the
    autocast type if autocast is on, else in the hidden states' own; sums are fp32. Raises ValueError for other vocabularies.
    """
    if teacher is not None and teacher[1].shape[0] != student[1].shape[0]:
        raise ValueError(
            f"teacher: expected a vocabulary of {student[1].shape[0]}, as the student's, got {teacher[1].shape[0]}"
        )
    sums = _HeadLoss.apply(*student, token_loss, teacher, torch.is_grad_enabled())
    return {name: value if i == 0 else value.detach() for i, (name, value) in enumerate(zip(token_loss.names, sums))}


def target_states(model: M1ForCausalLM, batch: PackedBatch) -> Head:
    """The hidden states that predict the batch's targets [N, hidden], and the head: what losses take. Prompts cost no head."""
    hidden = model.packed_states(batch.input_ids, batch.layout)
    return hidden.index_select(0, batch.target_positions), model.lm_head.weight


class _HeadLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, token_loss: TokenLoss, teacher: Head | None, is_grad_enabled: bool
    ) -> tuple[Tensor, ...]:
        wants_hidden, wants_weight = (is_grad_enabled and needed for needed in ctx.needs_input_grad[:2])
        wants_gradient = wants_hidden or wants_weight
        states, matrix = _in_compute_dtype(hidden, weight)  # before autocast is off: it says which type that is
        teacher = _in_compute_dtype(*teacher) if teacher is not None else None
        with torch.autocast(hidden.device.type, enabled=False), torch.no_grad():
            grad_hidden = torch.empty_like(states) if wants_hidden else None
            grad_weight = torch.zeros_like(weight, dtype=torch.float32) if wants_weight else None
            sums = torch.zeros(len(token_loss.names), device=hidden.device)
            for chunk in _slices(len(states), max(1, CHUNK_LOGITS[_kind(hidden)] // len(matrix))):
                logits = states[chunk] @ matrix.T  # [C, V], becomes its own gradient below
                teacher_logits = teacher[0][chunk] @ teacher[1].T if teacher is not None else None
                sums += _evaluate(token_loss, logits, teacher_logits, chunk.start, wants_gradient)
                if grad_hidden is not None:
                    torch.mm(logits, matrix, out=grad_hidden[chunk])
                if grad_weight is not None:
                    _add_product(grad_weight, logits.T, states[chunk])
        ctx.gradients = (grad_hidden, grad_weight, hidden.dtype, weight.dtype)
        return sums.unbind()

    @staticmethod
    def backward(ctx: Any, *grad_sums: Tensor) -> tuple[Tensor | None, Tensor | None, None, None, None]:
        grad_hidden, grad_weight, hidden_dtype, weight_dtype = ctx.gradients
        ctx.gradients = None  # scaled in place: good for one backward pass
        if grad_hidden is not None:
            grad_hidden = grad_hidden.mul_(grad_sums[0]).to(hidden_dtype)
        if grad_weight is not None:
            grad_weight = grad_weight.mul_(grad_sums[0]).to(weight_dtype)
        return grad_hidden, grad_weight, None, None, None


def _evaluate(token_loss: TokenLoss, logits: Tensor, teacher_logits: Tensor | None, first: int, wants_gradient: bool) -> Tensor:
    """Sums [k] over one chunk; its logits [C, V] are replaced by their gradient if that is wanted."""
    sums = torch.zeros(len(token_loss.names), device=logits.device)
    is_in_place = token_loss.takes_any_dtype and (_has_kernel(logits) or logits.dtype == torch.float32)
    for block in _slices(len(logits), _block_rows(logits)):
        mine = logits[block] if is_in_place else logits[block].to(torch.float32, copy=True)
        theirs = teacher_logits[block] if teacher_logits is not None else None
        if theirs is not None and not is_in_place:
            theirs = theirs.to(torch.float32, copy=True)
        values, gradient = token_loss(mine, theirs, slice(first + block.start, first + block.stop), wants_gradient)
        sums += values
        if gradient is not None and not is_in_place:
            logits[block] = gradient
    return sums


def _add_product(sums: Tensor, left: Tensor, right: Tensor) -> None:
    """sums += left @ right, sums in fp32: on a GPU without rounding the product, nor writing it down first."""
    if left.is_cuda and left.dtype != torch.float32:
        torch.addmm(sums, left, right, out_dtype=torch.float32, out=sums)
    else:
        sums += left @ right


class CrossEntropy:
    """-log p(target), summed. `targets` [N]: the token that follows each position."""

    names: tuple[str, ...] = ("loss",)
    takes_any_dtype = True

    def __init__(self, targets: Tensor) -> None:
        self.targets = targets

    def __call__(
        self, logits: Tensor, teacher: Tensor | None, rows: slice, wants_gradient: bool
    ) -> tuple[Tensor, Tensor | None]:
        sums = divergence_(logits, None, self.targets[rows], ce_weight=1.0, wants_gradient=wants_gradient)
        return sums.sum(0)[1:2], logits if wants_gradient else None


class Divergence:
    """KL between teacher and student at a temperature, mixed with cross-entropy, summed over tokens.

    `loss` is (1 - ce_weight) · KL + ce_weight · CE; `kl` and `ce` are summed beside it (ce is 0 without targets). forward is
    KL(teacher || student), reverse KL(student || teacher), both on logits / temperature; no factor temperature² is applied.
    CE is at temperature 1. With `counts_agreement`, `agreement` sums the tokens whose two most probable next tokens coincide.
    """

    takes_any_dtype = True

    def __init__(
        self,
        targets: Tensor | None = None,
        *,
        kind: str = "forward",
        temperature: float = 1.0,
        ce_weight: float = 0.0,
        counts_agreement: bool = False,
    ) -> None:
        if kind not in ("forward", "reverse"):
            raise ValueError(f"kl: expected 'forward' or 'reverse', got {kind!r}")
        if temperature <= 0:
            raise ValueError(f"temperature: expected more than 0, got {temperature}")
        if not 0 <= ce_weight <= 1:
            raise ValueError(f"ce_weight: expected 0 to 1, got {ce_weight}")
        if ce_weight and targets is None:
            raise ValueError("targets: needed with a ce_weight above 0")
        self.targets, self.kind, self.temperature, self.ce_weight = targets, kind, temperature, ce_weight
        self.counts_agreement = counts_agreement
        self.names: tuple[str, ...] = ("loss", "kl", "ce", "agreement") if counts_agreement else ("loss", "kl", "ce")

    def __call__(
        self, logits: Tensor, teacher: Tensor | None, rows: slice, wants_gradient: bool
    ) -> tuple[Tensor, Tensor | None]:
        assert teacher is not None, "a divergence needs the teacher's head"
        of_rows = divergence_(
            logits,
            teacher,
            self.targets[rows] if self.targets is not None else None,
            kind=self.kind,
            temperature=self.temperature,
            ce_weight=self.ce_weight,
            wants_gradient=wants_gradient,
            counts_agreement=self.counts_agreement,
        )
        kl, ce, agreement = of_rows.sum(0)
        extra = [agreement] if self.counts_agreement else []
        loss = (1 - self.ce_weight) * kl + self.ce_weight * ce
        return torch.stack([loss, kl, ce, *extra]), logits if wants_gradient else None


class TokenLogProbs:
    """Log-probability of each target and entropy of each distribution, at a temperature; no gradient.

    After `head_loss` has run, `log_probs` and `entropy` hold them, [N] fp32.
    """

    names: tuple[str, ...] = ("log_probs", "entropy")
    takes_any_dtype = True

    def __init__(self, targets: Tensor, temperature: float = 1.0) -> None:
        self.targets, self.temperature = targets, temperature
        self.log_probs, self.entropy = torch.empty((2, len(targets)), device=targets.device).unbind()

    def __call__(
        self, logits: Tensor, teacher: Tensor | None, rows: slice, wants_gradient: bool
    ) -> tuple[Tensor, Tensor | None]:
        assert not wants_gradient, "TokenLogProbs has no gradient: call it under torch.no_grad()"
        of_rows = token_log_probs(logits, self.targets[rows], temperature=self.temperature)
        self.log_probs[rows], self.entropy[rows] = of_rows[:, 0], of_rows[:, 1]
        return of_rows[:, :2].sum(0), None


def _in_compute_dtype(hidden: Tensor, weight: Tensor) -> Head:
    kind = hidden.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else hidden.dtype
    return hidden.detach().to(dtype), weight.detach().to(dtype)


def _has_kernel(logits: Tensor) -> bool:
    """Whether a kernel reads them as they are; a CPU works on copies that stay in its cache."""
    return logits.is_cuda


def _kind(tensor: Tensor) -> str:
    return "cuda" if tensor.is_cuda else "cpu"


def _block_rows(logits: Tensor) -> int:
    return len(logits) if logits.is_cuda else max(1, BLOCK_LOGITS_ON_CPU // logits.shape[1])


def _slices(length: int, size: int) -> Iterator[slice]:
    for start in range(0, length, size):
        yield slice(start, min(start + size, length))
