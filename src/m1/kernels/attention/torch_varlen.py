"""Packed causal attention on CUDA in bf16 or fp16 through torch's own flash attention; no kernel of ours is needed here."""

import functools
import inspect
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.varlen import varlen_attn


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
    if cu_seqlens is None:
        cu_seqlens = torch.arange(0, len(q) + 1, len(q), dtype=torch.int32, device=q.device)  # made there: no waiting
    left = -1 if window is None or window >= max_seqlen else window - 1
    attended = varlen_attn(
        q,
        k,
        v,
        cu_seqlens,
        cu_seqlens,
        max_seqlen,
        max_seqlen,
        scale=scale,
        window_size=(left, 0),
        **_grouped_queries(q.shape[1] != k.shape[1]),
    )
    assert isinstance(attended, Tensor)  # a tuple only where auxiliary outputs are asked for
    return attended


@functools.cache
def _grouped_queries(is_grouped: bool) -> dict[str, Any]:
    """How to ask for grouped queries: torch 2.11 takes them as they come, later releases want to be told."""
    return {"enable_gqa": is_grouped} if "enable_gqa" in inspect.signature(varlen_attn).parameters else {}
