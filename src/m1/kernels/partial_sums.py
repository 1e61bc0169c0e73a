"""Sums of what the programs of a kernel leave, a row each; nothing else lives here.

Bytes moved: the rows once, mostly from the L2 cache, where they have just been written.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

ROWS, COLUMNS = 64, 32  # of a program's tile


def sum_partials(partial: Tensor) -> Tensor:
    """Sum of contiguous fp32 [rows, …] over its rows, in an order that does not depend on the run."""
    rows, shape = partial.shape[0], partial.shape[1:]
    total = torch.empty(shape, dtype=torch.float32, device=partial.device)
    width = total.numel()
    _sum_kernel[(triton.cdiv(width, COLUMNS),)](partial, total, rows, width, ROWS, COLUMNS, num_warps=4)
    return total


@triton.jit
def _sum_kernel(partial, total, rows, width, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    column = (tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS))[None, :]
    row = tl.arange(0, ROWS)[:, None]
    sums = tl.zeros([ROWS, COLUMNS], tl.float32)
    for first in range(0, rows, ROWS):
        at = partial + (first + row).to(tl.int64) * width + column
        sums += tl.load(at, mask=(first + row < rows) & (column < width), other=0.0)
    tl.store(total + column, tl.expand_dims(tl.sum(sums, axis=0), 0), mask=column < width)
