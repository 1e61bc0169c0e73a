"""The attention layer of a hybrid: grouped-query, rotary, causal, optionally windowed, over a flat packed batch.

Legend: T flat tokens, H query heads, G key/value heads, K head_dim.
"""

from typing import Any

import torch
from torch import Tensor, nn

from m1.kernels import apply_rotary, paged_attention, rms_norm, rope_write_kv, varlen_attention, write_kv
from m1.modeling.configuration import SLIDING_ATTENTION, M1Config
from m1.modeling.state import ModelState, SequenceLayout


class RMSNorm(nn.Module):
    """Root-mean-square normalisation with a weight, in transformers' numerics (arXiv 1910.07467)."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Any:
        """x [..., D] -> its norm; with a residual, (norm of x + residual, x + residual)."""
        return rms_norm(x, self.weight, self.eps, residual)


class Attention(nn.Module):
    """Causal self-attention of one layer; weights named as in the base model (`q_proj` … `o_proj`, `q_norm`, `k_norm`)."""

    def __init__(self, config: M1Config, layer: int) -> None:
        super().__init__()
        self.layer = layer
        self.head_dim = config.head_dim
        self.scale = config.head_dim**-0.5
        self.window = config.sliding_window if config.layer_types[layer] == SLIDING_ATTENTION else None
        self.q_proj = nn.Linear(config.hidden_size, config.d_inner, bias=config.attention_bias)
        self.k_proj = nn.Linear(config.hidden_size, config.d_xb, bias=config.attention_bias)
        self.v_proj = nn.Linear(config.hidden_size, config.d_xb, bias=config.attention_bias)
        self.o_proj = nn.Linear(config.d_inner, config.hidden_size, bias=config.attention_output_bias)
        self.q_norm = RMSNorm(config.head_dim, config.rms_norm_eps) if config.qk_norm else nn.Identity()
        self.k_norm = RMSNorm(config.head_dim, config.rms_norm_eps) if config.qk_norm else nn.Identity()

    def forward(
        self, x: Tensor, layout: SequenceLayout, rotary: tuple[Tensor, Tensor], state: ModelState | None = None
    ) -> Tensor:
        """x [T, hidden] -> [T, hidden]. With a state, the new keys and values are written to it first."""
        q, k, v = (t.unflatten(-1, (-1, self.head_dim)) for t in self.project(x))  # [T, H, K], [T, G, K], [T, G, K]
        q, k = self.q_norm(q), self.k_norm(k)
        if state is not None and (layout.has_context or state.key_scale is not None):
            # 8-bit pages are read even by a prompt that is all here: its outputs then don't depend on how it is chunked
            return self.o_proj(self._attend_cached(q, k, v, layout, rotary, state).flatten(-2))
        q, k = apply_rotary(q, *rotary), apply_rotary(k, *rotary)
        if state is not None:
            assert layout.kv_slots is not None
            key_pages, value_pages = state.of_attention(self.layer)
            write_kv(k, v, key_pages, value_pages, layout.kv_slots)
        attended = varlen_attention(
            q, k, v, cu_seqlens=layout.cu_seqlens, max_seqlen=layout.max_seqlen, scale=self.scale, window=self.window
        )
        return self.o_proj(attended.flatten(-2))

    def project(self, x: Tensor) -> tuple[Tensor, ...]:
        """x [T, hidden] -> q [T, H·K], k [T, G·K], v [T, G·K]."""
        return self.q_proj(x), self.k_proj(x), self.v_proj(x)

    def _attend_cached(
        self, q: Tensor, k: Tensor, v: Tensor, layout: SequenceLayout, rotary: tuple[Tensor, Tensor], state: ModelState
    ) -> Tensor:
        """Unrotated q, k, v of new tokens, written to the state first, -> [T, H, K]."""
        assert layout.kv_slots is not None and layout.block_tables is not None and layout.context_lens is not None
        key_pages, value_pages = state.of_attention(self.layer)
        scales = state.kv_scales(self.layer)
        q = rope_write_kv(q, k, v, *rotary, key_pages, value_pages, layout.kv_slots, **scales)
        return paged_attention(
            q,
            key_pages,
            value_pages,
            block_tables=layout.block_tables,
            context_lens=layout.context_lens,
            cu_seqlens=layout.cu_seqlens,
            max_seqlen=layout.max_seqlen,
            scale=self.scale,
            window=self.window,
            **scales,
        )
