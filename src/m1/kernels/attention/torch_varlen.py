"""Packed causal attention on CUDA in bf16 or fp16 through torch's own kernels; none of ours is needed here.

Documents of any length go to flash attention. Where all have one length, which shapes alone tell, cuDNN's attention may
serve, which knows no packing but is faster (`benchmarks/kernels.py --only "training attention"` times both). It plans anew
for every shape, so it is kept for training, where few shapes come often. (Its own form for packed documents was slower, and
gave wrong gradients in torch 2.11.)
"""

import functools
import inspect
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.varlen import varlen_attn
from torch.nn.functional import scaled_dot_product_attention

LENGTH_UNIT = 256  # of the lengths that cuDNN is planned for
EQUAL_LENGTH_BACKENDS = [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION]  # the second where cuDNN can't, in this order


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
    num_sequences = len(cu_seqlens) - 1
    is_equal = num_sequences * max_seqlen == len(q) and max_seqlen % LENGTH_UNIT == 0 and window is None
    if is_equal and torch.is_grad_enabled() and q.requires_grad:
        return _attend_equal_lengths(q, k, v, num_sequences, scale)
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


def _attend_equal_lengths(q: Tensor, k: Tensor, v: Tensor, num_sequences: int, scale: float | None) -> Tensor:
    """q [T, H, K], k and v [T, G, K] of T / num_sequences tokens a document."""
    query, key, value = (x.unflatten(0, (num_sequences, -1)).transpose(1, 2) for x in (q, k, v))  # [n, heads, L, K]
    with sdpa_kernel(EQUAL_LENGTH_BACKENDS, set_priority=True):
        is_grouped = q.shape[1] != k.shape[1]
        out = scaled_dot_product_attention(query, key, value, is_causal=True, scale=scale, enable_gqa=is_grouped)
    return out.transpose(1, 2).flatten(0, 1)


@functools.cache
def _grouped_queries(is_grouped: bool) -> dict[str, Any]:
    """How to ask for grouped queries: torch 2.11 takes them as they come, later releases want to be told."""
    return {"enable_gqa": is_grouped} if "enable_gqa" in inspect.signature(varlen_attn).parameters else {}
