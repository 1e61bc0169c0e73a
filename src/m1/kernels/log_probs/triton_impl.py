"""Log-probabilities, entropies and their gradient on CUDA: one program a row, one pass over its logits each.

The first op keeps denominator and mean logit as it goes, rescaled whenever a greater logit turns up (the online softmax of
arXiv 1805.02867); the entropy is their difference. Bytes moved a bf16 logit: 2, and 4 for the gradient. Floors on an H100 at
3.0 TB/s, 1,766 rows of 151,936: 0.54 GB 0.179 ms, 1.07 GB 0.358 ms.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from m1.kernels.launch import cdiv

BLOCK = 4096


@triton.jit
def _log_probs_kernel(
    logits_ptr, targets_ptr, rows_ptr, logits_stride, num_columns, inverse_temperature, BLOCK: tl.constexpr
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    logits_ptr += row * logits_stride
    top, denominator, weighted = -float("inf"), 0.0, 0.0
    for start in range(0, num_columns, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        mask = columns < num_columns
        z = tl.load(logits_ptr + columns, mask=mask, other=-float("inf")).to(tl.float32) * inverse_temperature
        new_top = tl.maximum(top, tl.max(z, axis=0))
        scale = tl.exp(top - new_top)
        e = tl.exp(z - new_top)
        denominator = denominator * scale + tl.sum(e, axis=0)
        weighted = weighted * scale + tl.sum(e * tl.where(mask, z, 0.0), axis=0)
        top = new_top
    log_z = top + tl.log(denominator)
    target = tl.load(logits_ptr + tl.load(targets_ptr + row)).to(tl.float32) * inverse_temperature
    tl.store(rows_ptr + row * 3, target - log_z)
    tl.store(rows_ptr + row * 3 + 1, log_z - weighted / denominator)
    tl.store(rows_ptr + row * 3 + 2, log_z)


@triton.jit
def _gradient_kernel(
    logits_ptr, targets_ptr, rows_ptr, slope_ptr, logits_stride, num_columns, inverse_temperature, entropy_slope,
    BLOCK: tl.constexpr, HAS_ENTROPY: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = columns < num_columns
    logits_ptr += row * logits_stride + columns
    slope = tl.load(slope_ptr + row)
    log_p = tl.load(logits_ptr, mask=mask, other=0.0).to(tl.float32) * inverse_temperature - tl.load(rows_ptr + row * 3 + 2)
    factor = -slope
    if HAS_ENTROPY:
        factor = factor - entropy_slope * (log_p + tl.load(rows_ptr + row * 3 + 1))
    is_target = columns == tl.load(targets_ptr + row)
    gradient = (tl.exp(log_p) * factor + tl.where(is_target, slope, 0.0)) * inverse_temperature
    tl.store(logits_ptr, gradient.to(logits_ptr.dtype.element_ty), mask=mask)


def token_log_probs(logits: Tensor, targets: Tensor, *, temperature: float = 1.0) -> Tensor:
    """The public op's contract."""
    of_rows = torch.empty((len(logits), 3), dtype=torch.float32, device=logits.device)
    with torch.cuda.device_of(logits):
        _log_probs_kernel[(len(logits),)](
            logits, targets, of_rows, logits.stride(0), logits.shape[1], 1 / temperature, BLOCK=BLOCK, num_warps=8
        )
    return of_rows


def log_prob_gradient_(
    logits: Tensor, targets: Tensor, of_rows: Tensor, slope: Tensor, *, entropy_slope: float = 0.0, temperature: float = 1.0
) -> None:
    """The public op's contract."""
    with torch.cuda.device_of(logits):
        _gradient_kernel[(len(logits), cdiv(logits.shape[1], BLOCK))](
            logits, targets, of_rows.contiguous(), slope.contiguous(), logits.stride(0), logits.shape[1],
            1 / temperature, float(entropy_slope), BLOCK=BLOCK, HAS_ENTROPY=entropy_slope != 0, num_warps=8,
        )  # fmt: skip
