"""One new token a sequence against its paged keys and values: a split-KV grouped-query kernel and its reduction.

Shapes: n sequences; H query heads; G key/value heads, R = H/G query heads share one; K head width.

A program reads one split (a contiguous run of positions) of one sequence's keys and values for one key/value head and
serves its R query heads at once, so that every cached element is read once; the R rows are padded to the 16 that a
tensor-core instruction wants. The partial results of the splits (normalised output and log2-sum-exp, fp32) are then
combined (Flash-Decoding, arXiv 2311.01282). The grid depends on shapes only; how a sequence's length divides into
splits is decided on the device, so a captured graph serves every length that its block table can hold.

fp8 values are read as pairs of columns in int16: the second product wants its operand transposed, which the hardware does
for 16-bit units only (8-bit ones would be gathered byte by byte). Even and odd columns then make two products. Keys
need no transposition.

Bytes moved: context · G · 2K elements a sequence, plus (K + 1) · H fp32 each way a non-empty split (about 1 %).
Floor on an H100 at 3.0 TB/s, batch 128, context 4,096: 24/8 heads of 128 (M1-3B) bf16 2.15 GB 0.716 ms, fp8 0.358 ms;
14/2 heads of 64 (0.5B) bf16 0.27 GB 0.089 ms; 9/3 heads of 64 (135M) bf16 0.40 GB 0.134 ms.
Arithmetic (4·K·16 flop a cached position and head) stays under a fifth of the tensor cores' rate.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from m1.kernels.launch import chaining, dot_dtype, num_multiprocessors, wait_for_previous

MAX_SPLITS = 128
PARTIAL_BYTES = 64 * 2**20  # most memory that the partial results may take


class DecodeConfig(NamedTuple):
    """How a decode launch divides its work: every field may be swept (benchmarks/kernels.py --sweep does).

    block_n: positions a loop iteration; num_splits: programs a sequence and head (a power of two); min_chunk: fewest
    positions worth a split of their own.
    """

    block_n: int
    num_splits: int
    min_chunk: int
    num_warps: int
    num_stages: int


def choose_config(
    num_sequences: int, num_heads: int, num_groups: int, width: int, itemsize: int, capacity: int, multiprocessors: int
) -> DecodeConfig:
    """Pick a launch from shapes alone: `capacity` is the positions that a block table row can hold.

    Splits cost their partial results: there are as few as give every multiprocessor about three programs, and one for every
    4,096 positions of capacity up to 16, so that one long sequence leaves a short tail (best of a sweep on an H100).
    """
    block_n = 32 if itemsize == 4 else (128 if width * itemsize <= 64 else 64)
    programs = 3 * multiprocessors
    num_pairs = num_sequences * num_groups
    wanted = max(min(triton.cdiv(capacity, 4096), 16), programs // num_pairs)
    affordable = max(PARTIAL_BYTES // (num_sequences * num_heads * width * 4), 1)
    useful = triton.cdiv(capacity, 2 * block_n)
    limit = min(affordable, MAX_SPLITS)
    num_splits = min(triton.next_power_of_2(min(wanted, useful)), 1 << (limit.bit_length() - 1))
    return DecodeConfig(block_n, num_splits, 2048 if num_pairs >= programs // 2 else 2 * block_n, 4, 3)


@triton.jit
def _split_bounds(context, window, num_splits, min_chunk, BLOCK_N: tl.constexpr):
    """First visible position, the block-aligned start of split 0 and the positions a split."""
    visible = tl.where(window > 0, tl.maximum(context - window, 0), 0)
    first = visible // BLOCK_N * BLOCK_N
    chunk = tl.maximum(tl.cdiv(context - first, num_splits), min_chunk)
    return visible, first, tl.cdiv(chunk, BLOCK_N) * BLOCK_N


@triton.jit
def load_pages(table_row, position, offsets, visible, end, num_pages, PAGE: tl.constexpr, BLOCK_N: tl.constexpr):
    """The page of each position of a block in [visible, end): one number where blocks never straddle pages.

    A page that does not exist is replaced by one that does: a wrong table must not become an illegal access.
    """
    if PAGE % BLOCK_N == 0:
        pages = tl.load(table_row + position // PAGE, mask=position < end, other=0)
    else:
        positions = position + offsets
        is_seen = (positions >= visible) & (positions < end)
        pages = tl.load(table_row + positions // PAGE, mask=is_seen, other=0)
    return tl.minimum(tl.maximum(pages, 0), num_pages - 1).to(tl.int64)


@triton.jit(do_not_specialize=["window", "num_splits", "min_chunk", "num_pages", "capacity"])
def _decode_split_kernel(
    q_ptr, k_ptr, v_ptr, table_ptr, context_ptr, k_scale_ptr, v_scale_ptr, out_ptr, partial_ptr, lse_ptr,
    scale_log2, window, num_splits, min_chunk, num_pages, capacity,
    q_stride_t, q_stride_h, k_stride_p, k_stride_r, k_stride_g, v_stride_p, v_stride_r, v_stride_g,
    table_stride, scale_stride,
    R: tl.constexpr, K: tl.constexpr, PAGE: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr,
    BLOCK_N: tl.constexpr, DOT: tl.constexpr, HAS_SCALE: tl.constexpr, IS_DIRECT: tl.constexpr, IS_PACKED: tl.constexpr,
    IS_CHAINED: tl.constexpr,
):  # fmt: skip
    wait_for_previous(IS_CHAINED)
    group, split, seq = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    num_heads = tl.num_programs(0) * R
    context = tl.minimum(tl.load(context_ptr + seq), capacity)
    visible, first, chunk = _split_bounds(context, window, num_splits, min_chunk, BLOCK_N)
    begin = first + split * chunk
    end = tl.minimum(begin + chunk, context)
    if not IS_DIRECT:  # noqa: SIM102 (decided when compiled, the other when run)
        if begin >= end:
            return

    rows = tl.arange(0, BLOCK_R)
    columns = tl.arange(0, BLOCK_K)
    offsets = tl.arange(0, BLOCK_N)
    heads = group * R + rows
    head_mask = (rows < R)[:, None] & (columns < K)[None, :]
    q_offsets = seq.to(tl.int64) * q_stride_t + heads[:, None] * q_stride_h + columns[None, :]
    q = tl.load(q_ptr + q_offsets, mask=head_mask, other=0.0).to(DOT)
    if HAS_SCALE:
        scale_log2 *= tl.load(k_scale_ptr + group * scale_stride)
    k_base = k_ptr + group * k_stride_g + columns[None, :]
    BLOCK_V: tl.constexpr = BLOCK_K // 2 if IS_PACKED else BLOCK_K
    V: tl.constexpr = K // 2 if IS_PACKED else K
    v_columns = tl.arange(0, BLOCK_V)
    v_base = v_ptr + group * v_stride_g + v_columns[None, :]
    table_row = table_ptr + seq.to(tl.int64) * table_stride

    accumulated = tl.zeros([BLOCK_R, BLOCK_V], tl.float32)
    if IS_PACKED:
        accumulated_odd = tl.zeros([BLOCK_R, BLOCK_V], tl.float32)
    # Each lane keeps its own share of the denominator: one reduction at the end instead of one an iteration.
    weights = tl.zeros([BLOCK_R, BLOCK_N], tl.float32)
    highest = tl.full([BLOCK_R], -float("inf"), tl.float32)
    pages = load_pages(table_row, begin, offsets, visible, end, num_pages, PAGE, BLOCK_N)
    for position in range(begin, end, BLOCK_N):
        # The next block's pages are fetched an iteration ahead: the loads of keys never wait for the table.
        next_pages = load_pages(table_row, position + BLOCK_N, offsets, visible, end, num_pages, PAGE, BLOCK_N)
        positions = position + offsets
        is_seen = (positions >= visible) & (positions < end)
        mask = is_seen[:, None] & (columns < K)[None, :]
        inside = (positions % PAGE)[:, None]
        if PAGE % BLOCK_N == 0:
            k_tile = k_base + (pages * k_stride_p + inside * k_stride_r)
            v_tile = v_base + (pages * v_stride_p + inside * v_stride_r)
        else:
            k_tile = k_base + (pages[:, None] * k_stride_p + inside * k_stride_r)
            v_tile = v_base + (pages[:, None] * v_stride_p + inside * v_stride_r)
        k = tl.load(k_tile, mask=mask, other=0.0).to(DOT)
        scores = tl.dot(q, tl.trans(k), input_precision="ieee") * scale_log2
        scores = tl.where(is_seen[None, :], scores, -float("inf"))
        new_highest = tl.maximum(highest, tl.max(scores, 1))
        shrink = tl.exp2(highest - new_highest)
        p = tl.exp2(scores - new_highest[:, None])
        weights = weights * shrink[:, None] + p
        v_mask = is_seen[:, None] & (v_columns < V)[None, :]
        v = tl.load(v_tile, mask=v_mask, other=0)
        p = p.to(DOT)
        if IS_PACKED:
            v_odd = (v >> 8).to(tl.int8).to(tl.float8e4nv, bitcast=True).to(DOT)
            accumulated_odd = tl.dot(p, v_odd, accumulated_odd * shrink[:, None])
            v = v.to(tl.int8).to(tl.float8e4nv, bitcast=True)  # the low byte: the even column
        accumulated = tl.dot(p, v.to(DOT), accumulated * shrink[:, None], input_precision="ieee")
        highest = new_highest
        pages = next_pages

    total = tl.sum(weights, 1)
    if IS_PACKED:
        accumulated = tl.interleave(accumulated, accumulated_odd)
    out = accumulated / tl.where(total > 0, total, 1.0)[:, None]
    if HAS_SCALE:
        out *= tl.load(v_scale_ptr + group * scale_stride)
    head_rows = seq.to(tl.int64) * num_heads + heads
    if IS_DIRECT:
        tl.store(out_ptr + head_rows[:, None] * K + columns[None, :], out.to(out_ptr.dtype.element_ty), mask=head_mask)
    else:
        slots = head_rows * num_splits + split
        tl.store(partial_ptr + slots[:, None] * K + columns[None, :], out, mask=head_mask)
        tl.store(lse_ptr + slots, highest + tl.log2(total), mask=rows < R)


@triton.jit(do_not_specialize=["window", "num_splits", "min_chunk", "capacity"])
def _combine_kernel(
    partial_ptr, lse_ptr, context_ptr, out_ptr, window, num_splits, min_chunk, capacity,
    K: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_N: tl.constexpr, IS_CHAINED: tl.constexpr,
):  # fmt: skip
    wait_for_previous(IS_CHAINED)
    head, seq = tl.program_id(0), tl.program_id(1)
    context = tl.minimum(tl.load(context_ptr + seq), capacity)
    _, first, chunk = _split_bounds(context, window, num_splits, min_chunk, BLOCK_N)
    num_used = tl.cdiv(context - first, chunk)
    splits = tl.arange(0, BLOCK_S)
    columns = tl.arange(0, BLOCK_K)
    row = seq.to(tl.int64) * tl.num_programs(0) + head
    is_used = splits < num_used
    lse = tl.load(lse_ptr + row * num_splits + splits, mask=is_used, other=-float("inf"))
    weights = tl.where(is_used, tl.exp2(lse - tl.max(lse, 0)), 0.0)
    parts = tl.load(
        partial_ptr + (row * num_splits + splits)[:, None] * K + columns[None, :],
        mask=is_used[:, None] & (columns < K)[None, :],
        other=0.0,
    )
    total = tl.sum(weights, 0)
    # A padding row of a captured batch has no context: its output is zero, never NaN.
    out = tl.sum(parts * weights[:, None], 0) / tl.where(total > 0, total, 1.0)
    tl.store(out_ptr + row * K + columns, out.to(out_ptr.dtype.element_ty), mask=columns < K)


def paged_decode(
    q: Tensor,
    key_pages: Tensor,
    value_pages: Tensor,
    block_tables: Tensor,
    context_lens: Tensor,
    *,
    scale: float,
    window: int | None = None,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
    config: DecodeConfig | None = None,
) -> Tensor:
    """Attend from q [n, H, K], one token a sequence, to its pages [pages, page_size, G, K]; returns [n, H, K].

    k_scale, v_scale: fp32 [1] or [G] on the device, what a stored element is multiplied by (fp8 pages). A sequence
    with context_lens 0 gives zeros. `config` None takes choose_config's.
    """
    num_sequences, num_heads, width = q.shape
    num_pages, page_size, num_groups, _ = key_pages.shape
    capacity = block_tables.shape[1] * page_size
    if config is None:
        config = choose_config(
            num_sequences, num_heads, num_groups, width, key_pages.element_size(), capacity, num_multiprocessors(q.device)
        )
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    is_direct = config.num_splits == 1
    parts = (num_sequences, num_heads, config.num_splits)
    partial = out if is_direct else torch.empty((*parts, width), dtype=torch.float32, device=q.device)
    lse = out if is_direct else torch.empty(parts, dtype=torch.float32, device=q.device)
    window = window or 0
    is_packed = value_pages.dtype == torch.float8_e4m3fn
    if is_packed:
        value_pages = value_pages.view(torch.int16)  # pairs of columns: see the module
    block_k = triton.next_power_of_2(width)
    _decode_split_kernel[(num_groups, config.num_splits, num_sequences)](
        q, key_pages, value_pages, block_tables, context_lens, k_scale, v_scale, out, partial, lse,
        scale * 1.4426950408889634, window, config.num_splits, config.min_chunk, num_pages, capacity,
        *q.stride()[:2], *key_pages.stride()[:3], *value_pages.stride()[:3],
        block_tables.stride(0), 0 if k_scale is None or k_scale.numel() == 1 else 1,
        R=num_heads // num_groups, K=width, PAGE=page_size,
        BLOCK_R=max(triton.next_power_of_2(num_heads // num_groups), 16), BLOCK_K=block_k, BLOCK_N=config.block_n,
        DOT=dot_dtype(key_pages.dtype), HAS_SCALE=k_scale is not None, IS_DIRECT=is_direct, IS_PACKED=is_packed,
        num_warps=config.num_warps, num_stages=config.num_stages, **chaining(q.device),
    )  # fmt: skip
    if not is_direct:
        block_s = triton.next_power_of_2(config.num_splits)
        _combine_kernel[(num_heads, num_sequences)](
            partial, lse, context_lens, out, window, config.num_splits, config.min_chunk, capacity,
            K=width, BLOCK_K=block_k, BLOCK_S=block_s, BLOCK_N=config.block_n,
            num_warps=min(max(block_s * block_k // 1024, 1), 8), **chaining(q.device),
        )  # fmt: skip
    return out
