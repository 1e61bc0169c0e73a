"""Attention in torch: the truth in tests and the CPU path. Documents of like length share one padded SDPA call.

A causal mask hides padding on the right from every real query, so padded documents need no mask of their own.
Legend: T flat tokens, n sequences, H query heads, G key/value heads, K head_dim, L padded length.
"""

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from m1.kernels.rope.reference import apply_rotary

DECODE_BYTES = 2**21  # keys and values of the sequences that decode together
MOST_PADDING = 1.5  # documents go in one call while the padded area of scores is at most this multiple of their own


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
    """See m1.kernels.attention.varlen_attention."""
    if cu_seqlens is None or cu_seqlens.shape[0] == 2:
        return _attend_padded(q[None], k[None], v[None], scale, window)[0]
    starts, stops = cu_seqlens[:-1].long(), cu_seqlens[1:].long()
    outputs, rows = [], []
    for documents, length in _groups_of_like_length((stops - starts).tolist()):
        index = torch.tensor(documents, device=q.device)
        places = starts[index, None] + torch.arange(length, device=q.device)  # [n, L]
        is_real = places < stops[index, None]
        tokens = torch.minimum(places, stops[index, None] - 1)  # padding repeats its own document's last token
        attended = _attend_padded(q[tokens], k[tokens], v[tokens], scale, window)
        outputs.append(attended[is_real])
        rows.append(tokens[is_real])
    if len(outputs) == 1:
        return outputs[0]
    order = torch.cat(rows).argsort()
    return torch.cat(outputs)[order]


@torch.no_grad()
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
    """See m1.kernels.attention.paged_attention: pages are gathered into one padded batch, one masked SDPA call."""
    if max_seqlen == 1:
        return _decode(q, key_pages, value_pages, block_tables, context_lens, scale, window, k_scale, v_scale)
    num_pages, page_size = key_pages.shape[:2]
    longest = int(context_lens.max())
    pages = block_tables[:, : -(-longest // page_size)].clamp(0, num_pages - 1).long()  # a short row's tail may name anything
    places = torch.arange(longest, device=q.device)
    is_context = (places < context_lens[:, None])[:, :, None, None]  # [n, context, 1, 1]
    # what lies beyond the context was never written: a masked weight of 0 would not silence a NaN there
    keys, values = (
        _unscaled(tensor[pages].flatten(1, 2)[:, :longest], own, q.dtype).masked_fill(~is_context, 0).transpose(1, 2)
        for tensor, own in ((key_pages, k_scale), (value_pages, v_scale))
    )
    lengths = cu_seqlens.diff()
    offsets = torch.arange(max_seqlen, device=q.device)
    is_real = offsets < lengths[:, None]  # [n, L]
    tokens = (cu_seqlens[:-1, None] + offsets).clamp_max(q.shape[0] - 1)
    positions = (context_lens - lengths)[:, None] + offsets  # [n, L] of the queries
    distance = positions[:, :, None] - places  # [n, L, context]
    mask = distance >= 0
    if window is not None:
        mask &= distance < window
    mask |= ~is_real[:, :, None]  # a query that is padding must see something, or its softmax is NaN
    with torch.autocast(q.device.type, enabled=False):
        out = scaled_dot_product_attention(
            q[tokens].transpose(1, 2),
            keys,
            values,
            attn_mask=mask[:, None],
            scale=scale,
            enable_gqa=q.shape[1] != key_pages.shape[2],
        )
    return out.transpose(1, 2)[is_real]


def _decode(
    q: Tensor,
    key_pages: Tensor,
    value_pages: Tensor,
    block_tables: Tensor,
    context_lens: Tensor,
    scale: float | None,
    window: int | None,
    k_scale: Tensor | None,
    v_scale: Tensor | None,
) -> Tensor:
    """One query a sequence, [n, H, K] -> [n, H, K]. A group's heads are the rows of one small attention over its keys.

    Sequences of like length go together, few enough that their gathered pages stay in a core's cache.
    """
    num_pages, page_size, num_groups, width = key_pages.shape
    lengths = context_lens.tolist()
    order = sorted(range(len(lengths)), key=lengths.__getitem__)
    grouped = q.unflatten(1, (num_groups, -1))  # [n, G, H/G, K]
    out = torch.empty_like(grouped)
    while order:
        longest = lengths[order[-1]]
        num_rows = max(1, DECODE_BYTES // (longest * 2 * num_groups * width * q.element_size()))
        members, order = order[-num_rows:], order[:-num_rows]
        rows = torch.tensor(members, device=q.device)
        pages = block_tables[rows, : -(-longest // page_size)].clamp(0, num_pages - 1).flatten()  # a tail may name anything
        keys, values = (
            _unscaled(tensor.index_select(0, pages).view(len(members), -1, num_groups, width)[:, :longest], own, q.dtype)
            for tensor, own in ((key_pages, k_scale), (value_pages, v_scale))
        )
        for row, member in enumerate(members):  # what was never written may be NaN, which a masked weight does not silence
            if lengths[member] < longest:
                keys[row, lengths[member] :] = 0
                values[row, lengths[member] :] = 0
        places, ends = torch.arange(longest, device=q.device), context_lens[rows][:, None]
        mask = places < ends  # [k, context]
        if window is not None:
            mask &= places >= ends - window
        with torch.autocast(q.device.type, enabled=False):
            out[rows] = scaled_dot_product_attention(
                grouped[rows], keys.transpose(1, 2), values.transpose(1, 2), attn_mask=mask[:, None, None], scale=scale
            )
    return out.flatten(1, 2)


@torch.no_grad()
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
    """See m1.kernels.attention.write_kv."""
    is_kept = kv_slots >= 0
    if not is_kept.all():
        k, v, kv_slots = k[is_kept], v[is_kept], kv_slots[is_kept]
    where = (kv_slots // key_pages.shape[1], kv_slots % key_pages.shape[1])
    key_pages[where] = _scaled(k, k_scale, key_pages.dtype)
    value_pages[where] = _scaled(v, v_scale, value_pages.dtype)


@torch.no_grad()
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
    """See m1.kernels.attention.rope_write_kv."""
    write_kv(apply_rotary(k, cos, sin), v, key_pages, value_pages, kv_slots, k_scale=k_scale, v_scale=v_scale)
    return apply_rotary(q, cos, sin)


def _scaled(x: Tensor, scale: Tensor | None, dtype: torch.dtype) -> Tensor:
    """[T, G, K] as pages of `dtype` hold it: divided by the scale, saturated at the largest number of 8 bits."""
    if scale is not None:
        x = x.float() / scale.view(-1, 1)
    if dtype.itemsize == 1:
        x = x.clamp(-torch.finfo(dtype).max, torch.finfo(dtype).max)
    return x.to(dtype)


def _unscaled(held: Tensor, scale: Tensor | None, dtype: torch.dtype) -> Tensor:
    """What pages hold, […, G, K], as the numbers it stands for."""
    return held.to(dtype) if scale is None else (held.float() * scale.view(-1, 1)).to(dtype)


def _groups_of_like_length(lengths: list[int]) -> list[tuple[list[int], int]]:
    """Documents to run together, with the length they are padded to. One group, in order, where that wastes little."""
    longest = max(lengths)
    if len(lengths) * longest**2 <= MOST_PADDING * sum(length**2 for length in lengths):
        return [(list(range(len(lengths))), longest)]
    groups: list[tuple[list[int], int]] = []
    area = 0
    for document in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        own = lengths[document] ** 2
        if groups and (len(groups[-1][0]) + 1) * groups[-1][1] ** 2 <= MOST_PADDING * (area + own):
            groups[-1][0].append(document)
            area += own
        else:
            groups.append(([document], lengths[document]))
            area = own
    return groups


def _attend_padded(q: Tensor, k: Tensor, v: Tensor, scale: float | None, window: int | None) -> Tensor:
    """[n, L, heads, K] each -> [n, L, H, K], causal from the first position on."""
    length = q.shape[1]
    mask = None
    if window is not None and window < length:
        distance = torch.arange(length, device=q.device)[:, None] - torch.arange(length, device=q.device)
        mask = (distance >= 0) & (distance < window)
    with torch.autocast(q.device.type, enabled=False):
        out = scaled_dot_product_attention(
            q.transpose(1, 2),
            k.transpose(1, 2),
            v.transpose(1, 2),
            attn_mask=mask,
            is_causal=mask is None,
            scale=scale,
            enable_gqa=q.shape[2] != k.shape[2],
        )
    return out.transpose(1, 2)
