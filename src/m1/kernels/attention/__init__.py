"""Softmax attention over packed documents and over paged caches: checks and dispatch.

Arithmetic lives in reference.py (torch, every device), torch_varlen.py (torch's packed flash attention on CUDA) and
triton_impl.py (paged attention and cache writes on CUDA). Projections and rotary embedding are not here.
"""

import torch
from torch import Tensor

from m1.kernels.dispatch import (
    implementation_for,
    require,
    require_cu_seqlens,
    require_groups,
    require_rank,
    require_tensor,
)


def varlen_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    cu_seqlens: Tensor | None,
    max_seqlen: int,
    scale: float | None = None,
    window: int | None = None,
) -> Tensor:
    """Attend causally within each packed document, with grouped queries; differentiable.

    Args:
        q: [T, H, K]; k, v: [T, G, K], G dividing H.
        cu_seqlens: [n+1] int32, None for one document; max_seqlen: the longest document's tokens.
        scale: of the scores, 1/sqrt(K) if None; window: positions visible including itself, None for all.
    Returns:
        [T, H, K] in q's dtype.
    Raises:
        ValueError: for a wrong shape, dtype, device, window or (on the CPU) a max_seqlen below the longest document.
    """
    require_rank("q", q, "T H K")
    require_cu_seqlens(cu_seqlens, q.shape[0], q)
    _check_new_keys(q, k, v)
    _check_lengths(cu_seqlens, q, max_seqlen, window)
    if q.is_cuda and q.dtype in (torch.bfloat16, torch.float16):
        from m1.kernels.attention.torch_varlen import varlen_attention as attend
    else:
        from m1.kernels.attention.reference import varlen_attention as attend
    return attend(q, k, v, cu_seqlens=cu_seqlens, max_seqlen=max_seqlen, scale=scale, window=window)


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
    """Attend from each sequence's newest tokens to its cached keys and values; without gradient.

    The keys of sequence i are positions 0 … context_lens[i]-1 in its pages, the new ones included (write_kv comes
    first); its q tokens are the last cu_seqlens[i+1] - cu_seqlens[i] of these positions.

    Args:
        q: [T, H, K]; key_pages, value_pages: [pages, page_size, G, K].
        block_tables: [n, max_pages] int32, the pages of each sequence in order; context_lens: [n] int32.
        cu_seqlens: [n+1] int32 of q; max_seqlen: the most q tokens of a sequence (1 is decoding).
        scale: of the scores, 1/sqrt(K) if None; window: positions visible including itself, None for all.
        k_scale, v_scale: [1] or [G] fp32, what a cached key or value is multiplied by (see write_kv); None is 1.
    Returns:
        [T, H, K] in q's dtype.
    Raises:
        ValueError: for a wrong shape, dtype, device, window or (on the CPU) lengths or pages out of range. On a GPU such a
            page is read as another one, and a context ends with its block table.
    """
    require_rank("q", q, "T H K")
    require_rank("key_pages", key_pages, "pages page_size G K")
    num_pages, page_size, num_groups, _ = key_pages.shape
    shape = (num_pages, page_size, num_groups, q.shape[2])
    require_groups("key_pages", q.shape[1], num_groups)
    require_tensor("key_pages", key_pages, "pages page_size G K", shape, q)
    require_tensor("value_pages", value_pages, "pages page_size G K", shape, q)
    require(cu_seqlens is not None, "cu_seqlens", "an int32 tensor [n+1]", cu_seqlens)
    num_sequences = require_cu_seqlens(cu_seqlens, q.shape[0], q)
    _check_lengths(cu_seqlens, q, max_seqlen, window)
    is_decode = max_seqlen == 1
    require(not is_decode or num_sequences == q.shape[0], "q", f"of {num_sequences} tokens, one a sequence", q.shape[0])
    _check_scales(k_scale, v_scale, key_pages)
    require(block_tables.dim() == 2, "block_tables", "a tensor [n, max_pages]", list(block_tables.shape))
    max_pages = block_tables.shape[1]
    require_tensor("block_tables", block_tables, "n max_pages", (num_sequences, max_pages), q, (torch.int32,))
    require_tensor("context_lens", context_lens, "n", (num_sequences,), q, (torch.int32,))
    if q.device.type == "cpu":
        _check_context(block_tables, context_lens, cu_seqlens, num_pages, page_size)
    implementation = implementation_for(q, __name__)
    return implementation.paged_attention(
        q,
        key_pages,
        value_pages,
        block_tables=block_tables,
        context_lens=context_lens,
        cu_seqlens=cu_seqlens,
        max_seqlen=max_seqlen,
        scale=scale,
        window=window,
        k_scale=k_scale,
        v_scale=v_scale,
    )


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
    """Write new keys and values into the pages, in place; without gradient.

    Args:
        k, v: [T, G, K]; key_pages, value_pages: [pages, page_size, G, K], whose dtype the values take. Pages of
            float8_e4m3fn saturate at ±448.
        kv_slots: [T] int64, page · page_size + offset of each token; a negative one is skipped.
        k_scale, v_scale: [1] or [G] fp32, for all or for each key/value head: pages hold k / k_scale and v / v_scale;
            None is 1.
    Raises:
        ValueError: for a wrong shape, dtype, device or (on the CPU) a slot beyond the pages, which a GPU skips.
    """
    require_rank("k", k, "T G K")
    _check_pages(k, v, key_pages, value_pages, kv_slots)
    _check_scales(k_scale, v_scale, key_pages)
    implementation = implementation_for(k, __name__)
    implementation.write_kv(k, v, key_pages, value_pages, kv_slots, k_scale=k_scale, v_scale=v_scale)


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
    """Rotate q and k as apply_rotary does, and write k and v as write_kv does; without gradient.

    Args:
        q: [T, H, K]; k, v: [T, G, K], K even; cos, sin: [T, K].
        key_pages, value_pages, kv_slots, k_scale, v_scale: as for write_kv. A skipped slot skips k and v, never q.
    Returns:
        the rotated q [T, H, K] in its dtype.
    Raises:
        ValueError: as write_kv and apply_rotary do.
    """
    require_rank("q", q, "T H K")
    num_tokens, _, width = q.shape
    require(width % 2 == 0, "q", "of an even head width K", list(q.shape))
    require_rank("k", k, "T G K")
    require_groups("k", q.shape[1], k.shape[1])
    require_tensor("k", k, "T G K", (num_tokens, k.shape[1], width), q, (q.dtype,))
    require_tensor("cos", cos, "T K", (num_tokens, width), q)
    require_tensor("sin", sin, "T K", (num_tokens, width), q)
    _check_pages(k, v, key_pages, value_pages, kv_slots)
    _check_scales(k_scale, v_scale, key_pages)
    implementation = implementation_for(q, __name__)
    return implementation.rope_write_kv(q, k, v, cos, sin, key_pages, value_pages, kv_slots, k_scale=k_scale, v_scale=v_scale)


def _check_pages(k: Tensor, v: Tensor, key_pages: Tensor, value_pages: Tensor, kv_slots: Tensor) -> None:
    require_rank("key_pages", key_pages, "pages page_size G K")
    require_tensor("v", v, "T G K", k.shape, k)
    num_pages, page_size = key_pages.shape[:2]
    shape = (num_pages, page_size, *k.shape[1:])
    require_tensor("key_pages", key_pages, "pages page_size G K", shape, k)
    require_tensor("value_pages", value_pages, "pages page_size G K", shape, k)
    require_tensor("kv_slots", kv_slots, "T", k.shape[:1], k, (torch.int64,))
    if kv_slots.device.type == "cpu" and len(kv_slots) > 0:
        highest = int(kv_slots.max())
        require(highest < num_pages * page_size, "kv_slots", f"below {num_pages * page_size}", highest)


def _check_scales(k_scale: Tensor | None, v_scale: Tensor | None, key_pages: Tensor) -> None:
    require((k_scale is None) == (v_scale is None), "v_scale", "given exactly when k_scale is", v_scale)
    if k_scale is None or v_scale is None:
        return
    count = 1 if k_scale.numel() == 1 else key_pages.shape[2]
    require_tensor("k_scale", k_scale, "G", (count,), key_pages, (torch.float32,))
    require_tensor("v_scale", v_scale, "G", (count,), key_pages, (torch.float32,))


def _check_new_keys(q: Tensor, k: Tensor, v: Tensor) -> None:
    require_rank("k", k, "T G K")
    require_groups("k", q.shape[1], k.shape[1])
    shape = (q.shape[0], k.shape[1], q.shape[2])
    require_tensor("k", k, "T G K", shape, q, (q.dtype,))
    require_tensor("v", v, "T G K", shape, q, (q.dtype,))


def _check_lengths(cu_seqlens: Tensor | None, q: Tensor, max_seqlen: int, window: int | None) -> None:
    require(window is None or window > 0, "window", "None or at least 1", window)
    if cu_seqlens is None:
        longest = q.shape[0]
    elif q.device.type == "cpu":
        longest = int(cu_seqlens.diff().max())
    else:
        longest = 1
    require(max_seqlen >= longest, "max_seqlen", f"at least {longest}, the longest sequence", max_seqlen)


def _check_context(block_tables: Tensor, context_lens: Tensor, cu_seqlens: Tensor, num_pages: int, page_size: int) -> None:
    lengths, new = context_lens.tolist(), cu_seqlens.diff().tolist()
    capacity = block_tables.shape[1] * page_size
    require(
        all(count <= length <= capacity for count, length in zip(new, lengths, strict=True)),
        "context_lens",
        f"between each sequence's new tokens {new} and the {capacity} positions of its block table",
        lengths,
    )
    for row, length in zip(block_tables.tolist(), lengths, strict=True):
        used = row[: -(-length // page_size)]
        require(all(0 <= page < num_pages for page in used), "block_tables", f"of pages 0 … {num_pages - 1}", used)
