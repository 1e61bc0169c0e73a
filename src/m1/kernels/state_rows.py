"""States of a batch's sequences for the torch step ops: in place where slots follow one another, else gathered and put back.

Works in blocks that stay in a core's cache, where a step's few passes over the states then run.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

BLOCK_BYTES = 2**20


def rows_of(slots: Tensor | None, num_rows: int) -> slice | Tensor:
    """Where the states of num_rows sequences lie: a slice if their slots are first, first + 1, …, else the slots.

    slots: [num_rows] int64, None for 0 … num_rows - 1. On a GPU, where looking would wait for it, given slots stay as they are.
    """
    if slots is None:
        return slice(0, num_rows)
    if slots.device.type != "cpu" or num_rows == 0:
        return slots
    first = int(slots[0])
    is_run = int(slots[-1]) - first == num_rows - 1 and bool((slots.diff() == 1).all())
    return slice(first, first + num_rows) if is_run else slots


def state_blocks(states: Tensor, slots: Tensor | None, num_rows: int) -> Iterator[tuple[slice, Tensor]]:
    """Yield (rows, their states [k, …] in fp32), to be advanced in place; what was done to a block is kept.

    states: [S, …] in any floating dtype; slots: [num_rows] int64 without repetition, None for 0 … num_rows - 1.
    """
    where = rows_of(slots, num_rows)
    if isinstance(where, slice):
        states, slots = states[where], None
    num_block = num_rows
    if states.device.type == "cpu":
        num_block = max(1, BLOCK_BYTES // max(1, 4 * states[:1].numel()))
    for low in range(0, num_rows, max(1, num_block)):
        rows = slice(low, min(low + num_block, num_rows))
        if slots is None and states.dtype == torch.float32:
            yield rows, states[rows]
        elif slots is None:
            block = states[rows].float()
            yield rows, block
            states[rows] = block.to(states.dtype)
        else:
            block = states.index_select(0, slots[rows]).float()
            yield rows, block
            states.index_copy_(0, slots[rows], block.to(states.dtype))
