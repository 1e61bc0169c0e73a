"""Rows of a decoding step on a GPU: a program a row.

Bytes moved: about 100 and twice 4 · width a row: at 1,024 rows of 64 pages 0.6 MB, less than a launch takes.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from m1.kernels.decode_rows import DecodeRows
from m1.kernels.launch import chaining, wait_for_previous


@triton.jit
def _gather_kernel(
    integers_ptr, floats_ptr, table_ptr, slot_ptr, freq_ptr, out_integers_ptr, lens_ptr, out_floats_ptr, out_table_ptr,
    angle_ptr, scaling, integers_stride, floats_stride, table_stride, num_rows, width, half, page_size,
    HAS_PAGES: tl.constexpr, BLOCK_W: tl.constexpr, BLOCK_K: tl.constexpr, IS_CHAINED: tl.constexpr,
):  # fmt: skip
    """out_integers: [6, n] tokens, positions, seeds, top_k, next positions, kv slots; angle: [2, n, K] cos and sin."""
    wait_for_previous(IS_CHAINED)
    row = tl.program_id(0)
    slot = tl.load(slot_ptr + row)
    four = tl.arange(0, 4)
    values = tl.load(integers_ptr + four * integers_stride + slot)
    tl.store(out_integers_ptr + four * num_rows + row, values)
    three = four < 3
    settings = tl.load(floats_ptr + four * floats_stride + slot, mask=three, other=0.0)
    tl.store(out_floats_ptr + four * num_rows + row, settings, mask=three)
    position = tl.load(integers_ptr + integers_stride + slot)
    tl.store(out_integers_ptr + 4 * num_rows + row, position + 1)
    tl.store(lens_ptr + row, (position + 1).to(tl.int32))
    if HAS_PAGES:
        table = table_ptr + slot * table_stride
        page = tl.load(table + position // page_size).to(tl.int64)
        tl.store(out_integers_ptr + 5 * num_rows + row, page * page_size + position % page_size)
        for start in range(0, width, BLOCK_W):
            columns = start + tl.arange(0, BLOCK_W)
            pages = tl.load(table + columns, mask=columns < width, other=0)
            tl.store(out_table_ptr + row.to(tl.int64) * width + columns, pages, mask=columns < width)
    columns = tl.arange(0, BLOCK_K)
    in_half = columns < half
    angle = position.to(tl.float32) * tl.load(freq_ptr + columns, mask=in_half, other=0.0)
    cos, sin = tl.cos(angle) * scaling, tl.sin(angle) * scaling
    cos_at = angle_ptr + row * (2 * half) + columns
    sin_at = cos_at + num_rows * (2 * half)
    tl.store(cos_at, cos, mask=in_half)
    tl.store(cos_at + half, cos, mask=in_half)
    tl.store(sin_at, sin, mask=in_half)
    tl.store(sin_at + half, sin, mask=in_half)


@triton.jit
def _advance_kernel(integers_ptr, slot_ptr, token_ptr, integers_stride, scratch, IS_CHAINED: tl.constexpr):
    wait_for_previous(IS_CHAINED)
    row = tl.program_id(0)
    slot = tl.load(slot_ptr + row)
    tl.store(integers_ptr + slot, tl.load(token_ptr + row))
    length = tl.load(integers_ptr + integers_stride + slot) + 1
    tl.store(integers_ptr + integers_stride + slot, tl.where(slot == scratch, 0, length))


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
    """The public op's contract. Positions must lie within the first `width` pages."""
    count, half = slots.shape[0], inv_freq.shape[0]
    device = slots.device
    out = torch.empty(6, count, dtype=torch.int64, device=device)
    lens = torch.empty(count, dtype=torch.int32, device=device)
    settings = torch.empty(3, count, dtype=torch.float32, device=device)
    angles = torch.empty(2, count, 2 * half, dtype=torch.float32, device=device)
    tables = None if block_tables is None else torch.empty(count, width, dtype=torch.int32, device=device)
    with torch.cuda.device_of(slots):
        _gather_kernel[(count,)](
            integers, floats, block_tables, slots.contiguous(), inv_freq, out, lens, settings, tables, angles,
            scaling, integers.stride(0), floats.stride(0), 0 if block_tables is None else block_tables.stride(0),
            count, width, half, page_size, HAS_PAGES=tables is not None, BLOCK_W=256,
            BLOCK_K=triton.next_power_of_2(half), num_warps=2, **chaining(slots.device),
        )  # fmt: skip
    tokens, positions, seeds, top_k, next_positions, kv_slots = out.unbind()
    temperature, top_p, min_p = settings.unbind()
    return DecodeRows(
        tokens=tokens,
        positions=positions,
        next_positions=next_positions,
        context_lens=lens,
        seeds=seeds,
        top_k=top_k,
        temperature=temperature,
        top_p=top_p,
        min_p=min_p,
        block_tables=tables,
        kv_slots=None if tables is None else kv_slots,
        cos=angles[0],
        sin=angles[1],
    )


def advance_rows(integers: Tensor, slots: Tensor, tokens: Tensor, scratch: int) -> None:
    """The public op's contract."""
    with torch.cuda.device_of(slots):
        _advance_kernel[(slots.shape[0],)](
            integers, slots.contiguous(), tokens.contiguous(), integers.stride(0), scratch, **chaining(slots.device)
        )
