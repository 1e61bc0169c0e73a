"""Paged attention and the writes into its cache, on CUDA: the launches and the write kernels.

The attention kernels are in triton_decode.py (one new token a sequence) and triton_prefill.py (several); packed attention
for training is torch_varlen.py. Shapes: T tokens; H query heads; G key/value heads; K head width.

Bytes moved by write_kv: k and v read, as many elements written: 4 · T · G · K elements; rope_write_kv adds q once each way
and the cosines and sines. Floors on an H100 at 3.0 TB/s, bf16, 8 heads of 128 (24 of q): 512 tokens write_kv 4.2 MB
1.4 µs, rope_write_kv 10.7 MB 3.6 µs (a launch costs more); 16,384 tokens 0.045 ms and 0.115 ms.

fp8 pages (e4m3) hold k / k_scale and v / v_scale, saturated at ±448; the scales are fp32 [1] or [G] tensors on the device
(one for all heads, or one a key/value head), None means 1.

Wrong indices are not seen by the host here, and must not become illegal accesses: a slot beyond the pages writes nothing,
a page that does not exist is read as another one, and a context ends with its block table.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from m1.kernels.attention.triton_decode import paged_decode
from m1.kernels.attention.triton_prefill import paged_prefill
from m1.kernels.dispatch import require
from m1.kernels.launch import chaining, wait_for_previous, with_unit_stride


def paged_attention(
    q: Tensor,
    key_pages: Tensor,
    value_pages: Tensor,
    *,
    block_tables: Tensor,
    context_lens: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    scale: float | None = None,
    window: int | None = None,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
) -> Tensor:
    """Attend from each sequence's newest tokens to its cached keys and values; the public op's contract.

    k_scale, v_scale: see the module. Graph-capturable: nothing is read back, grids depend on shapes and max_seqlen.
    """
    _check_pages(key_pages, value_pages)
    q = with_unit_stride(q)
    block_tables = with_unit_stride(block_tables)
    context_lens, cu_seqlens = context_lens.contiguous(), cu_seqlens.contiguous()
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    pages = (key_pages, value_pages, block_tables, context_lens)
    with torch.cuda.device_of(q):
        if max_seqlen == 1:
            return paged_decode(q, *pages, scale=scale, window=window, k_scale=k_scale, v_scale=v_scale)
        return paged_prefill(q, *pages, cu_seqlens, max_seqlen, scale=scale, window=window, k_scale=k_scale, v_scale=v_scale)


@triton.jit
def _to_page_dtype(x, scale_ptr, scales, mask, HAS_SCALE: tl.constexpr, DTYPE: tl.constexpr):
    """Divide by each row's scale and convert; fp8 saturates (its conversion would give NaN beyond 448)."""
    x = x.to(tl.float32)
    if HAS_SCALE:
        x = x / tl.load(scale_ptr + scales, mask=mask, other=1.0)[:, None]
    if DTYPE.primitive_bitwidth == 8:
        x = tl.minimum(tl.maximum(x, -448.0), 448.0)
    return x.to(DTYPE)


@triton.jit
def _write_kernel(
    k_ptr, v_ptr, key_ptr, value_ptr, slot_ptr, k_scale_ptr, v_scale_ptr, num_slots,
    k_stride_t, k_stride_h, v_stride_t, v_stride_h, scale_stride,
    key_stride_p, key_stride_r, key_stride_g, value_stride_p, value_stride_r, value_stride_g,
    G: tl.constexpr, K: tl.constexpr, PAGE: tl.constexpr, BLOCK_G: tl.constexpr, BLOCK_K: tl.constexpr,
    HAS_SCALE: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    slot = tl.load(slot_ptr + token)
    if (slot >= 0) & (slot < num_slots):
        groups = tl.arange(0, BLOCK_G)
        columns = tl.arange(0, BLOCK_K)
        mask = (groups < G)[:, None] & (columns < K)[None, :]
        page, row = slot // PAGE, slot % PAGE
        k = tl.load(k_ptr + token * k_stride_t + groups[:, None] * k_stride_h + columns[None, :], mask=mask)
        v = tl.load(v_ptr + token * v_stride_t + groups[:, None] * v_stride_h + columns[None, :], mask=mask)
        scales = groups * scale_stride
        k = _to_page_dtype(k, k_scale_ptr, scales, groups < G, HAS_SCALE, key_ptr.dtype.element_ty)
        v = _to_page_dtype(v, v_scale_ptr, scales, groups < G, HAS_SCALE, value_ptr.dtype.element_ty)
        key_row = key_ptr + page * key_stride_p + row * key_stride_r
        value_row = value_ptr + page * value_stride_p + row * value_stride_r
        tl.store(key_row + groups[:, None] * key_stride_g + columns[None, :], k, mask=mask)
        tl.store(value_row + groups[:, None] * value_stride_g + columns[None, :], v, mask=mask)


@triton.jit
def _rotate(x_ptr, c1, s1, c2, s2, offsets, mask, HALF: tl.constexpr):
    """The two rotated halves (fp32) of head rows whose first halves lie at x_ptr + offsets."""
    a = tl.load(x_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    b = tl.load(x_ptr + offsets + HALF, mask=mask, other=0.0).to(tl.float32)
    return a * c1 - b * s1, b * c2 + a * s2


@triton.jit
def _rope_write_kernel(
    q_ptr, k_ptr, v_ptr, cos_ptr, sin_ptr, out_ptr, key_ptr, value_ptr, slot_ptr, k_scale_ptr, v_scale_ptr,
    num_slots, q_stride_t, q_stride_h, k_stride_t, k_stride_h, v_stride_t, v_stride_h, cos_stride, sin_stride, scale_stride,
    key_stride_p, key_stride_r, key_stride_g, value_stride_p, value_stride_r, value_stride_g,
    H: tl.constexpr, G: tl.constexpr, K: tl.constexpr, PAGE: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_G: tl.constexpr,
    HALF: tl.constexpr, BLOCK_HALF: tl.constexpr, BLOCK_K: tl.constexpr, HAS_SCALE: tl.constexpr,
    IS_CHAINED: tl.constexpr,
):  # fmt: skip
    wait_for_previous(IS_CHAINED)
    token = tl.program_id(0).to(tl.int64)
    half = tl.arange(0, BLOCK_HALF)
    in_half = half < HALF
    c1 = tl.load(cos_ptr + token * cos_stride + half, mask=in_half, other=0.0).to(tl.float32)[None, :]
    c2 = tl.load(cos_ptr + token * cos_stride + half + HALF, mask=in_half, other=0.0).to(tl.float32)[None, :]
    s1 = tl.load(sin_ptr + token * sin_stride + half, mask=in_half, other=0.0).to(tl.float32)[None, :]
    s2 = tl.load(sin_ptr + token * sin_stride + half + HALF, mask=in_half, other=0.0).to(tl.float32)[None, :]
    heads = tl.arange(0, BLOCK_H)
    q_mask = (heads < H)[:, None] & in_half[None, :]
    q_offsets = token * q_stride_t + heads[:, None] * q_stride_h + half[None, :]
    a, b = _rotate(q_ptr, c1, s1, c2, s2, q_offsets, q_mask, HALF)
    out_offsets = (token * H + heads[:, None]) * K + half[None, :]
    tl.store(out_ptr + out_offsets, a.to(out_ptr.dtype.element_ty), mask=q_mask)
    tl.store(out_ptr + out_offsets + HALF, b.to(out_ptr.dtype.element_ty), mask=q_mask)

    slot = tl.load(slot_ptr + token)
    if (slot >= 0) & (slot < num_slots):
        page, row = slot // PAGE, slot % PAGE
        groups = tl.arange(0, BLOCK_G)
        in_groups = groups < G
        k_mask = in_groups[:, None] & in_half[None, :]
        scales = groups * scale_stride
        k_offsets = token * k_stride_t + groups[:, None] * k_stride_h + half[None, :]
        k1, k2 = _rotate(k_ptr, c1, s1, c2, s2, k_offsets, k_mask, HALF)
        # What write_kv after apply_rotary would store: rounded to k's dtype on the way.
        k1, k2 = k1.to(k_ptr.dtype.element_ty), k2.to(k_ptr.dtype.element_ty)
        key_row = key_ptr + page * key_stride_p + row * key_stride_r + groups[:, None] * key_stride_g + half[None, :]
        key_type = key_ptr.dtype.element_ty
        tl.store(key_row, _to_page_dtype(k1, k_scale_ptr, scales, in_groups, HAS_SCALE, key_type), mask=k_mask)
        tl.store(key_row + HALF, _to_page_dtype(k2, k_scale_ptr, scales, in_groups, HAS_SCALE, key_type), mask=k_mask)
        columns = tl.arange(0, BLOCK_K)
        v_mask = in_groups[:, None] & (columns < K)[None, :]
        v = tl.load(v_ptr + token * v_stride_t + groups[:, None] * v_stride_h + columns[None, :], mask=v_mask, other=0.0)
        v = _to_page_dtype(v, v_scale_ptr, scales, in_groups, HAS_SCALE, value_ptr.dtype.element_ty)
        value_row = value_ptr + page * value_stride_p + row * value_stride_r
        tl.store(value_row + groups[:, None] * value_stride_g + columns[None, :], v, mask=v_mask)


def write_kv(
    k: Tensor,
    v: Tensor,
    key_pages: Tensor,
    value_pages: Tensor,
    kv_slots: Tensor,
    *,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
) -> None:
    """Write new keys and values [T, G, K] into the pages, in place; the public op's contract. Scales: see the module."""
    _check_pages(key_pages, value_pages)
    num_tokens, num_groups, width = k.shape
    k, v = with_unit_stride(k), with_unit_stride(v)
    with torch.cuda.device_of(k):
        _write_kernel[(num_tokens,)](
            k, v, key_pages, value_pages, kv_slots.contiguous(), k_scale, v_scale, key_pages.shape[0] * key_pages.shape[1],
            *k.stride()[:2], *v.stride()[:2], 0 if k_scale is None or k_scale.numel() == 1 else 1,
            *key_pages.stride()[:3], *value_pages.stride()[:3],
            G=num_groups, K=width, PAGE=key_pages.shape[1], BLOCK_G=triton.next_power_of_2(num_groups),
            BLOCK_K=triton.next_power_of_2(width), HAS_SCALE=k_scale is not None, num_warps=4,
        )  # fmt: skip


def rope_write_kv(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cos: Tensor,
    sin: Tensor,
    key_pages: Tensor,
    value_pages: Tensor,
    kv_slots: Tensor,
    *,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
) -> Tensor:
    """Rotate q and k and write k and v, in one launch; the public op's contract."""
    _check_pages(key_pages, value_pages)
    (num_tokens, num_heads, width), num_groups = q.shape, k.shape[1]
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    q, k, v, cos, sin = (with_unit_stride(x) for x in (q, k, v, cos, sin))
    with torch.cuda.device_of(q):
        _rope_write_kernel[(num_tokens,)](
            q, k, v, cos, sin, out, key_pages, value_pages, kv_slots.contiguous(), k_scale, v_scale,
            key_pages.shape[0] * key_pages.shape[1],
            *q.stride()[:2], *k.stride()[:2], *v.stride()[:2], cos.stride(0), sin.stride(0),
            0 if k_scale is None or k_scale.numel() == 1 else 1,
            *key_pages.stride()[:3], *value_pages.stride()[:3],
            H=num_heads, G=num_groups, K=width, PAGE=key_pages.shape[1], BLOCK_H=triton.next_power_of_2(num_heads),
            BLOCK_G=triton.next_power_of_2(num_groups), HALF=width // 2,
            BLOCK_HALF=triton.next_power_of_2(width // 2), BLOCK_K=triton.next_power_of_2(width),
            HAS_SCALE=k_scale is not None, num_warps=4, **chaining(q.device),
        )  # fmt: skip
    return out


def _check_pages(key_pages: Tensor, value_pages: Tensor) -> None:
    for name, pages in (("key_pages", key_pages), ("value_pages", value_pages)):
        require(pages.stride(-1) == 1, name, "contiguous in its last dimension", f"strides {pages.stride()}")
    require(value_pages.dtype == key_pages.dtype, "value_pages", f"{key_pages.dtype} like key_pages", value_pages.dtype)
