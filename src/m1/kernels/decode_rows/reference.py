"""Rows of a decoding step in torch: the truth for the kernel, and the CPU path."""

import torch
from torch import Tensor

from m1.kernels.decode_rows import LENGTH, TOKEN, DecodeRows


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
    """See m1.kernels.decode_rows.gather_rows."""
    tokens, positions, seeds, top_k = integers.index_select(1, slots)
    temperature, top_p, min_p = floats.index_select(1, slots)
    tables = kv_slots = None
    if block_tables is not None:
        tables = block_tables[:, :width].index_select(0, slots)
        pages = tables.gather(1, (positions // page_size)[:, None])[:, 0]
        kv_slots = pages * page_size + positions % page_size
    angles = positions.float()[:, None] * inv_freq[None, :]
    angles = torch.cat([angles, angles], dim=-1)
    return DecodeRows(
        tokens=tokens,
        positions=positions,
        next_positions=positions + 1,
        context_lens=(positions + 1).to(torch.int32),
        seeds=seeds,
        top_k=top_k,
        temperature=temperature,
        top_p=top_p,
        min_p=min_p,
        block_tables=tables,
        kv_slots=kv_slots,
        cos=angles.cos() * scaling,
        sin=angles.sin() * scaling,
    )


def advance_rows(integers: Tensor, slots: Tensor, tokens: Tensor, scratch: int) -> None:
    """See m1.kernels.decode_rows.advance_rows."""
    integers[TOKEN].index_copy_(0, slots, tokens)
    integers[LENGTH].index_copy_(0, slots, integers[LENGTH].index_select(0, slots) + 1)
    integers[LENGTH, scratch : scratch + 1].zero_()
