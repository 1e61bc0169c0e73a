"""Several new tokens a sequence (a prompt or a chunk of one) against paged keys and values; decoding rows may be mixed in.

Shapes: T packed new tokens of n sequences; H query heads; G key/value heads, R = H/G query heads share one; K head width.

A program owns a block of one sequence's new tokens for one key/value head: its rows are (token, query head) pairs, so
that a page is read once for all R heads, and a decoding row in a mixed batch costs R rows and no more. Nothing needs the
lengths on the host: T // tokens-a-block + n programs a head always suffice, and each finds its sequence by counting.

Bytes moved: T · H · 2K elements of q and output, and the context's G · 2K elements once per block of tokens (from L2 when
blocks of a sequence run together). Prompts of more than about 300 tokens are bound by arithmetic instead:
4 · K · H flop a (query, visible key) pair, 0.33 ms for 8 prompts of 2,048 at 24 heads of 128 and 600 TFLOP/s.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from m1.kernels.attention.triton_decode import load_pages
from m1.kernels.launch import dot_dtype


@triton.jit(do_not_specialize=["num_sequences", "window", "num_pages", "capacity"])
def _prefill_kernel(
    q_ptr, k_ptr, v_ptr, table_ptr, context_ptr, cu_ptr, k_scale_ptr, v_scale_ptr, out_ptr,
    scale_log2, num_sequences, window, num_pages, capacity,
    q_stride_t, q_stride_h, k_stride_p, k_stride_r, k_stride_g, v_stride_p, v_stride_r, v_stride_g,
    table_stride, scale_stride,
    R: tl.constexpr, K: tl.constexpr, PAGE: tl.constexpr, BLOCK_M: tl.constexpr, TOKENS: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_N: tl.constexpr, SEARCH: tl.constexpr, DOT: tl.constexpr, HAS_SCALE: tl.constexpr,
):  # fmt: skip
    block, group = tl.program_id(0), tl.program_id(1)
    num_heads = tl.num_programs(1) * R
    # Sequence i owns the blocks from cu[i] // TOKENS + i on: increasing in i, and enough for its tokens.
    seq = tl.full([], -1, tl.int32)
    for start in range(0, num_sequences, SEARCH):
        candidates = start + tl.arange(0, SEARCH)
        starts = tl.load(cu_ptr + candidates, mask=candidates < num_sequences, other=2**30)
        seq += tl.sum((starts // TOKENS + candidates <= block).to(tl.int32), 0)
    q_start = tl.load(cu_ptr + seq)
    q_len = tl.load(cu_ptr + seq + 1) - q_start
    first_token = (block - (q_start // TOKENS + seq)) * TOKENS
    if first_token < q_len:
        context = tl.minimum(tl.load(context_ptr + seq), capacity)
        rows = tl.arange(0, BLOCK_M)
        columns = tl.arange(0, BLOCK_K)
        offsets = tl.arange(0, BLOCK_N)
        tokens = first_token + rows // R
        is_row = (rows < TOKENS * R) & (tokens < q_len)
        q_positions = context - q_len + tokens
        mask = is_row[:, None] & (columns < K)[None, :]
        flat = (q_start + tokens).to(tl.int64)
        heads = group * R + rows % R
        q = tl.load(q_ptr + flat[:, None] * q_stride_t + heads[:, None] * q_stride_h + columns[None, :], mask, 0.0).to(DOT)
        if HAS_SCALE:
            scale_log2 *= tl.load(k_scale_ptr + group * scale_stride)
        end = tl.minimum(context, context - q_len + first_token + TOKENS)
        visible = tl.where(window > 0, tl.maximum(context - q_len + first_token - window + 1, 0), 0)
        oldest = tl.where(window > 0, q_positions - window + 1, 0)
        table_row = table_ptr + seq.to(tl.int64) * table_stride
        k_base = k_ptr + group * k_stride_g + columns[None, :]
        v_base = v_ptr + group * v_stride_g + columns[None, :]

        accumulated = tl.zeros([BLOCK_M, BLOCK_K], tl.float32)
        total = tl.zeros([BLOCK_M], tl.float32)
        highest = tl.full([BLOCK_M], -1e30, tl.float32)  # finite: a row may see nothing of a block
        for position in range(visible // BLOCK_N * BLOCK_N, end, BLOCK_N):
            positions = position + offsets
            pages = load_pages(table_row, position, offsets, visible, end, num_pages, PAGE, BLOCK_N)
            if PAGE % BLOCK_N != 0:
                pages = pages[:, None]
            inside = (positions % PAGE)[:, None]
            is_read = ((positions >= visible) & (positions < end))[:, None] & (columns < K)[None, :]
            k = tl.load(k_base + (pages * k_stride_p + inside * k_stride_r), mask=is_read, other=0.0).to(DOT)
            scores = tl.dot(q, tl.trans(k), input_precision="ieee") * scale_log2
            is_seen = (positions[None, :] <= q_positions[:, None]) & (positions[None, :] >= oldest[:, None])
            scores = tl.where(is_seen, scores, -float("inf"))
            new_highest = tl.maximum(highest, tl.max(scores, 1))
            shrink = tl.exp2(highest - new_highest)
            p = tl.exp2(scores - new_highest[:, None])
            total = total * shrink + tl.sum(p, 1)
            v = tl.load(v_base + (pages * v_stride_p + inside * v_stride_r), mask=is_read, other=0.0).to(DOT)
            accumulated = tl.dot(p.to(DOT), v, accumulated * shrink[:, None], input_precision="ieee")
            highest = new_highest

        out = accumulated / tl.where(total > 0, total, 1.0)[:, None]
        if HAS_SCALE:
            out *= tl.load(v_scale_ptr + group * scale_stride)
        out_offsets = (flat[:, None] * num_heads + heads[:, None]) * K + columns[None, :]
        tl.store(out_ptr + out_offsets, out.to(out_ptr.dtype.element_ty), mask=mask)


def paged_prefill(
    q: Tensor,
    key_pages: Tensor,
    value_pages: Tensor,
    block_tables: Tensor,
    context_lens: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    *,
    scale: float,
    window: int | None = None,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
) -> Tensor:
    """Attend causally from each sequence's last tokens (q [T, H, K], packed by cu_seqlens) to its pages; returns [T, H, K].

    k_scale, v_scale: fp32 [1] or [G] on the device, what a stored element is multiplied by (fp8 pages).
    """
    num_tokens, num_heads, width = q.shape
    num_pages, page_size, num_groups, _ = key_pages.shape
    heads_a_group = num_heads // num_groups
    num_sequences = len(context_lens)
    is_fp32 = dot_dtype(key_pages.dtype) == tl.float32
    # fp32 products run on the ordinary cores: small tiles keep them in registers.
    largest = max(32 if is_fp32 else 128, triton.next_power_of_2(heads_a_group))
    block_m = min(max(triton.next_power_of_2(max_seqlen * heads_a_group), 16), largest)
    tokens = block_m // heads_a_group
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    _prefill_kernel[(num_tokens // tokens + num_sequences, num_groups)](
        q, key_pages, value_pages, block_tables, context_lens, cu_seqlens, k_scale, v_scale, out,
        scale * 1.4426950408889634, num_sequences, window or 0, num_pages, block_tables.shape[1] * page_size,
        *q.stride()[:2], *key_pages.stride()[:3], *value_pages.stride()[:3],
        block_tables.stride(0), 0 if k_scale is None or k_scale.numel() == 1 else 1,
        R=heads_a_group, K=width, PAGE=page_size, BLOCK_M=block_m, TOKENS=tokens,
        BLOCK_K=triton.next_power_of_2(width), BLOCK_N=32 if is_fp32 else 64, SEARCH=256,
        DOT=dot_dtype(key_pages.dtype), HAS_SCALE=k_scale is not None,
        num_warps=8 if block_m >= 128 else 4, num_stages=3 if not is_fp32 else 2,
    )  # fmt: skip
    return out
