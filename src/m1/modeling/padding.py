"""From transformers' batches to the flat token axis: padding removed, packed documents found.

Knows every way in which a caller may say where sequences are (`attention_mask`, `position_ids`, `cu_seq_lens_q`, a cache) and
turns it into one `SequenceLayout`. Legend: B rows, L padded length, T real tokens, n sequences.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from m1.modeling.state import SequenceLayout


@dataclass(frozen=True)
class FlatBatch:
    """token_index [T]: where each real token stands in the flattened [B * L] batch; is_dense: there is no padding."""

    layout: SequenceLayout
    token_index: Tensor
    is_dense: bool


def flatten_batch(
    batch: int,
    length: int,
    device: torch.device,
    attention_mask: Tensor | None,
    position_ids: Tensor | None,
    cu_seq_lens: Tensor | None,
    num_seen: int = 0,
) -> FlatBatch:
    """Find the sequences of a [batch, length] call: a row is one, or several where its positions jump.

    `num_seen` is the padded length that a cache already holds. Raises ValueError for a mask that is not 2-D or of the wrong
    width, a row without tokens, and `cu_seq_lens` that don't fit.
    """
    token_index = torch.arange(batch * length, device=device)
    if cu_seq_lens is not None:
        if batch != 1 or num_seen:
            raise ValueError("cu_seq_lens_q: packed documents come in one row and without a cache (use_cache=False)")
        if int(cu_seq_lens[-1]) != length:
            raise ValueError(f"cu_seq_lens_q: ends at {int(cu_seq_lens[-1])}, but the row has {length} tokens")
        return FlatBatch(SequenceLayout.from_cu_seqlens(cu_seq_lens.to(device)), token_index, True)

    mask = _mask_of_new_tokens(batch, length, attention_mask, num_seen)
    is_dense = mask is None or bool(mask.all())
    if mask is not None and not is_dense:
        token_index = mask.flatten().nonzero().flatten()
    rows = token_index // length
    starts = torch.ones_like(rows, dtype=torch.bool)
    starts[1:] = rows[1:] != rows[:-1]
    if int(starts.sum()) != batch:
        raise ValueError("attention_mask: a row has no token at all")
    positions = None
    if position_ids is not None:
        positions = position_ids.to(device).expand(batch, length).flatten()[token_index].long()
        starts[1:] |= positions[1:] != positions[:-1] + 1
    return FlatBatch(SequenceLayout.from_starts(starts, positions), token_index, is_dense)


def _mask_of_new_tokens(batch: int, length: int, mask: Tensor | None, num_seen: int) -> Tensor | None:
    """The part [B, L] of the mask that speaks of this call's tokens, as booleans."""
    if mask is None:
        return None
    if mask.ndim != 2 or mask.shape[0] != batch:
        raise ValueError(f"attention_mask: expected [{batch}, length] of zeros and ones, got shape {tuple(mask.shape)}")
    if mask.shape[1] not in (length, num_seen + length):
        raise ValueError(f"attention_mask: expected width {num_seen + length} (cached + new), got {mask.shape[1]}")
    return mask[:, -length:].bool()
