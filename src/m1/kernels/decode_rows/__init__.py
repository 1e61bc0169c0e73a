"""The beginning and the end of a decoding step: what the rows of a batch feed and how they sample, and their moving on.

Some twenty operations on a few numbers a row, each of which would be a launch: one launch before the model, one after it.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from m1.kernels.dispatch import implementation_for, require, require_rank, require_slots, require_tensor

TOKEN, LENGTH, SEED, TOP_K = range(4)  # rows of `integers`
TEMPERATURE, TOP_P, MIN_P = range(3)  # rows of `floats`


class DecodeRows(NamedTuple):
    """Of each row of a batch: what it feeds, where it stands, how it samples. cos, sin as rotary embedding takes them.

    tokens, positions, next_positions, seeds, top_k [n] int64; context_lens [n] int32; temperature, top_p, min_p [n] fp32;
    block_tables [n, width] int32 and kv_slots [n] int64, None without pages; cos, sin [n, K] fp32.
    """

    tokens: Tensor
    positions: Tensor
    next_positions: Tensor
    context_lens: Tensor
    seeds: Tensor
    top_k: Tensor
    temperature: Tensor
    top_p: Tensor
    min_p: Tensor
    block_tables: Tensor | None
    kv_slots: Tensor | None
    cos: Tensor
    sin: Tensor


def gather_rows(
    integers: Tensor,
    floats: Tensor,
    block_tables: Tensor | None,
    slots: Tensor,
    inv_freq: Tensor,
    *,
    scaling: float,
    width: int,
    page_size: int,
) -> DecodeRows:
    """What the step needs of the rows `slots`.

    Args:
        integers: [4, S] int64, the next input token, the tokens in the state, the seed and top_k of each slot.
        floats: [3, S] fp32, temperature, top_p and min_p. block_tables: [S, W] int32, None for a model without pages.
        slots: [n] int64. inv_freq: [K/2] fp32, the rotary frequencies; scaling multiplies cos and sin.
        width: leading pages of the block tables to take. page_size: tokens a page.
    Raises:
        ValueError: for a wrong shape, dtype or device, or (on the CPU) a slot out of range.
    """
    require_rank("floats", floats, "3 S")
    num_slots = floats.shape[1]
    require_tensor("floats", floats, "3 S", (3, num_slots), inv_freq, (torch.float32,))
    require_tensor("integers", integers, "4 S", (4, num_slots), inv_freq, (torch.int64,))
    require_tensor("inv_freq", inv_freq, "K/2", inv_freq.shape[:1], floats, (torch.float32,))
    require_slots(slots, slots.shape[0], num_slots, floats)
    if block_tables is not None:
        require_tensor("block_tables", block_tables, "S W", (num_slots, block_tables.shape[-1]), floats, (torch.int32,))
        require(0 < width <= block_tables.shape[1], "width", f"1 to {block_tables.shape[1]}", width)
    implementation = implementation_for(floats, __name__)
    return implementation.gather_rows(
        integers, floats, block_tables, slots, inv_freq, scaling=scaling, width=width, page_size=page_size
    )


def advance_rows(integers: Tensor, slots: Tensor, tokens: Tensor, scratch: int) -> None:
    """Let rows feed `tokens` [n] next and be one token longer, in place; slot `scratch`, which may come often, stays at 0."""
    require(integers.dim() == 2 and integers.shape[0] == 4, "integers", "an int64 tensor [4, S]", list(integers.shape))
    require_slots(slots, slots.shape[0], integers.shape[1], integers)
    require_tensor("tokens", tokens, "n", slots.shape, integers, (torch.int64,))
    implementation_for(integers, __name__).advance_rows(integers, slots, tokens, scratch)
