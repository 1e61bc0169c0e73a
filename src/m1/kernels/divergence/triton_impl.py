"""The divergence of two distributions on CUDA: one program a row, two passes over its logits.

The first pass keeps both softmax denominators and the sum of the KL as it goes, rescaled whenever a greater logit turns up
(the online softmax of arXiv 1805.02867); the second writes the gradient over the logits. Nothing but the logits is moved.

Bytes moved a logit: first pass 2 reads, second pass 2 reads and a write; bf16 10 bytes, cross-entropy alone 6. Floor on an
H100 at 3.0 TB/s, 883 rows of 151,936: 1.34 GB 0.447 ms.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 4096


@triton.jit
def _write_gradient(
    logits_ptr, teacher_ptr, num_columns, inverse_temperature, ce_weight, log_z, log_z_at_1, teacher_log_z, kl, target,
    HAS_TEACHER: tl.constexpr, HAS_TARGETS: tl.constexpr, IS_FORWARD: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The second pass over one row: its gradient, over its logits."""
    kl_slope = (1.0 - ce_weight) * inverse_temperature
    for start in range(0, num_columns, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        mask = columns < num_columns
        s = tl.load(logits_ptr + columns, mask=mask, other=0.0).to(tl.float32)
        gradient = tl.zeros([BLOCK], tl.float32)
        if HAS_TEACHER:
            t = tl.load(teacher_ptr + columns, mask=mask, other=0.0).to(tl.float32)
            p = tl.exp(s * inverse_temperature - log_z)
            if IS_FORWARD:
                gradient = (p - tl.exp(t * inverse_temperature - teacher_log_z)) * kl_slope
            else:
                gradient = p * ((s - t) * inverse_temperature - log_z + teacher_log_z - kl) * kl_slope
        if HAS_TARGETS:
            gradient += ce_weight * (tl.exp(s - log_z_at_1) - (columns == target).to(tl.float32))
        tl.store(logits_ptr + columns, gradient.to(logits_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _divergence_kernel(
    logits_ptr, teacher_ptr, targets_ptr, sums_ptr, logits_stride, teacher_stride, num_columns,
    inverse_temperature, ce_weight,
    HAS_TEACHER: tl.constexpr, HAS_TARGETS: tl.constexpr, IS_FORWARD: tl.constexpr, IS_TEMPERED: tl.constexpr,
    WANTS_GRADIENT: tl.constexpr, COUNTS_AGREEMENT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    logits_ptr += row * logits_stride
    teacher_ptr += row * teacher_stride
    infinity = float("inf")
    # Of the student: greatest logit so far and where, denominator at the temperature and at 1; of the teacher the same; and
    # the sum of probability times difference, over the denominator of the distribution that the KL averages over.
    top, argtop, denominator, denominator_at_1 = -infinity, 0, 0.0, 0.0
    teacher_top, teacher_argtop, teacher_denominator = -infinity, 0, 0.0
    weighted = 0.0
    for start in range(0, num_columns, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        mask = columns < num_columns
        s = tl.load(logits_ptr + columns, mask=mask, other=-infinity).to(tl.float32)
        block_top = tl.max(s, axis=0)
        new_top = tl.maximum(top, block_top)
        scale = tl.exp((top - new_top) * inverse_temperature)
        e = tl.exp((s - new_top) * inverse_temperature)
        denominator = denominator * scale + tl.sum(e, axis=0)
        if IS_TEMPERED:
            denominator_at_1 = denominator_at_1 * tl.exp(top - new_top) + tl.sum(tl.exp(s - new_top), axis=0)
        if HAS_TEACHER:
            t = tl.load(teacher_ptr + columns, mask=mask, other=-infinity).to(tl.float32)
            teacher_block_top = tl.max(t, axis=0)
            new_teacher_top = tl.maximum(teacher_top, teacher_block_top)
            teacher_scale = tl.exp((teacher_top - new_teacher_top) * inverse_temperature)
            f = tl.exp((t - new_teacher_top) * inverse_temperature)
            teacher_denominator = teacher_denominator * teacher_scale + tl.sum(f, axis=0)
            difference = tl.where(mask, t - s, 0.0) * inverse_temperature
            if IS_FORWARD:
                weighted = weighted * teacher_scale + tl.sum(f * difference, axis=0)
            else:
                weighted = weighted * scale - tl.sum(e * difference, axis=0)
            if COUNTS_AGREEMENT:
                argtop = tl.where(block_top > top, start + tl.argmax(s, axis=0), argtop)
                teacher_argtop = tl.where(teacher_block_top > teacher_top, start + tl.argmax(t, axis=0), teacher_argtop)
            teacher_top = new_teacher_top
        top = new_top

    log_z = top * inverse_temperature + tl.log(denominator)
    log_z_at_1 = log_z
    if IS_TEMPERED:
        log_z_at_1 = top + tl.log(denominator_at_1)
    kl, agrees, teacher_log_z = 0.0, 0.0, 0.0
    if HAS_TEACHER:
        teacher_log_z = teacher_top * inverse_temperature + tl.log(teacher_denominator)
        if IS_FORWARD:
            kl = weighted / teacher_denominator - teacher_log_z + log_z
        else:
            kl = weighted / denominator - log_z + teacher_log_z
        if COUNTS_AGREEMENT:
            agrees = tl.where(argtop == teacher_argtop, 1.0, 0.0)
    ce, target = 0.0, -1
    if HAS_TARGETS:
        target = tl.load(targets_ptr + row)
        ce = log_z_at_1 - tl.load(logits_ptr + target).to(tl.float32)
    tl.store(sums_ptr + row * 3, kl)
    tl.store(sums_ptr + row * 3 + 1, ce)
    tl.store(sums_ptr + row * 3 + 2, agrees)

    if WANTS_GRADIENT:
        tl.debug_barrier()  # the target's logit is read before it is overwritten
        _write_gradient(
            logits_ptr, teacher_ptr, num_columns, inverse_temperature, ce_weight, log_z, log_z_at_1, teacher_log_z, kl, target,
            HAS_TEACHER, HAS_TARGETS, IS_FORWARD, BLOCK,
        )  # fmt: skip


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
    """The public op's contract."""
    sums = torch.empty((len(logits), 3), dtype=torch.float32, device=logits.device)
    options: dict[str, Any] = {
        "HAS_TEACHER": teacher is not None,
        "HAS_TARGETS": targets is not None,
        "IS_FORWARD": kind == "forward",
        "IS_TEMPERED": temperature != 1.0,
        "WANTS_GRADIENT": wants_gradient,
        "COUNTS_AGREEMENT": counts_agreement,
    }
    theirs, wanted = logits if teacher is None else teacher, sums if targets is None else targets
    with torch.cuda.device_of(logits):
        _divergence_kernel[(len(logits),)](
            logits, theirs, wanted, sums, logits.stride(0), theirs.stride(0), logits.shape[1],
            1 / temperature, float(ce_weight), **options, BLOCK=BLOCK, num_warps=8,
        )  # fmt: skip
    return sums
