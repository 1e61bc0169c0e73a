"""SSD in torch, in its chunked matrix form (Dao & Gu 2024, arXiv 2405.21060, section 6): the truth in tests, the CPU path.

Every document is cut into chunks of Q tokens, so that no chunk holds two documents. Inside a chunk the recurrence is a
masked product of C and B, weighted by decays; between a document's chunks one state a head is handed on, for all documents
at once. Decays are exponentials of sums of log decays between two positions, never above 1, so nothing overflows.
Legend: T tokens, J chunks, Q tokens a chunk, n documents, H = G·R query heads, G groups, R heads a group, P width, N d_state.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import softplus


def ssd_scan(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    *,
    D: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = True,
    cu_seqlens: Tensor | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    chunk_size: int = 64,
) -> Any:
    """See `m1.kernels.ssd.ssd_scan`."""
    groups, out_dtype = B.shape[1], x.dtype
    per_group = (groups, C.shape[1] // groups)
    chunks = _cut(cu_seqlens, x, chunk_size)
    delta = _step_sizes(dt, dt_bias, dt_softplus)  # [T, H]
    x, C = x.float(), C.float()
    if x.shape[1] == groups:
        x = x[:, :, None].expand(-1, -1, per_group[1], -1)
    x = x.reshape(x.shape[0], *per_group, -1)

    is_real = chunks.is_real[:, :, None, None]
    steps = delta.unflatten(1, per_group)[chunks.tokens] * is_real  # [J, Q, G, R]; padding neither decays nor adds
    log_decay = (steps * A.float().view(per_group)).cumsum(1)  # [J, Q, G, R], from the chunk's start to each token
    u = x[chunks.tokens] * steps[..., None]  # [J, Q, G, R, P]
    keys = B.float()[chunks.tokens]  # [J, Q, G, N]
    queries = C.unflatten(1, per_group)[chunks.tokens]  # [J, Q, G, R, N]

    y = _within_chunks(u, keys, queries, log_decay)
    first = None if initial_state is None else initial_state.float().unflatten(1, per_group)
    entry, final = _between_chunks(u, keys, log_decay, chunks, first)
    if entry is not None:
        y = y + torch.einsum("jqgrn,jgrpn->jqgrp", queries, entry) * log_decay.exp()[..., None]
    y = y[chunks.is_real]  # [T, G, R, P]
    if D is not None:
        y = y + x * D.float().view(*per_group, 1)
    y = y.flatten(1, 2).to(out_dtype)
    return (y, final.flatten(1, 2)) if output_final_state else y


@dataclass(frozen=True)
class _Chunks:
    """tokens [J, Q]: the token at each place; is_real [J, Q]: false where a document's last chunk is padded;
    rounds: for r = 0, 1, …: (documents, chunks), both [m]: the documents that have an r-th chunk, and which it is."""

    tokens: Tensor
    is_real: Tensor
    rounds: list[tuple[Tensor, Tensor]]
    num_documents: int


def _cut(cu_seqlens: Tensor | None, x: Tensor, chunk_size: int) -> _Chunks:
    if cu_seqlens is None:
        cu_seqlens = torch.tensor([0, x.shape[0]], device=x.device)
    bounds = cu_seqlens.long()
    lengths = bounds.diff()
    size = min(chunk_size, int(lengths.max()))
    counts = (lengths + size - 1) // size
    firsts = counts.cumsum(0) - counts
    owner = torch.arange(len(lengths), device=x.device).repeat_interleave(counts)
    rank = torch.arange(len(owner), device=x.device) - firsts[owner]
    tokens = (bounds[owner] + rank * size)[:, None] + torch.arange(size, device=x.device)
    is_real = tokens < bounds[owner + 1][:, None]
    rounds = []
    for r in range(int(counts.max())):
        documents = (counts > r).nonzero().flatten()
        rounds.append((documents, firsts[documents] + r))
    return _Chunks(tokens.clamp_max(x.shape[0] - 1), is_real, rounds, len(lengths))


def _step_sizes(dt: Tensor, dt_bias: Tensor | None, dt_softplus: bool) -> Tensor:
    delta = dt.float() if dt_bias is None else dt.float() + dt_bias.float()
    return softplus(delta) if dt_softplus else delta


def _within_chunks(u: Tensor, keys: Tensor, queries: Tensor, log_decay: Tensor) -> Tensor:
    """What each token gets from its own chunk: y_q = Σ_{s ≤ q} exp(l_q - l_s) (C_q·B_s) u_s. [J, Q, G, R, P]."""
    size = u.shape[1]
    log_decay = log_decay.permute(0, 2, 3, 1)  # [J, G, R, Q]
    future = torch.ones(size, size, dtype=torch.bool, device=u.device).triu(1)
    weights = (log_decay[..., :, None] - log_decay[..., None, :]).masked_fill(future, -torch.inf).exp()
    scores = torch.einsum("jqgrn,jsgn->jgrqs", queries, keys)
    return torch.einsum("jgrqs,jsgrp->jqgrp", scores * weights, u)


def _between_chunks(
    u: Tensor, keys: Tensor, log_decay: Tensor, chunks: _Chunks, first: Tensor | None
) -> tuple[Tensor | None, Tensor]:
    """Each chunk's first state [J, G, R, P, N] (None if all are zero), and each document's last [n, G, R, P, N]."""
    to_end = (log_decay[:, -1:] - log_decay).exp()  # [J, Q, G, R]
    added = torch.einsum("jqgrp,jqgn->jgrpn", u * to_end[..., None], keys)
    if first is None and len(chunks.rounds) == 1:
        return None, added
    decay = log_decay[:, -1].exp()[..., None, None]  # [J, G, R, 1, 1]
    state = added.new_zeros(chunks.num_documents, *added.shape[1:]) if first is None else first
    entries = []
    for documents, which in chunks.rounds:
        before = state[documents]
        entries.append(before)
        state = state.index_copy(0, documents, before * decay[which] + added[which])
    order = torch.cat([which for _, which in chunks.rounds])
    return torch.cat(entries)[order.argsort()], state


def ssd_state_update(
    ssm_state: Tensor,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    *,
    D: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = True,
    slots: Tensor | None = None,
) -> Tensor:
    """See `m1.kernels.ssd.ssd_state_update`."""
    heads = C.shape[1]
    state = (ssm_state if slots is None else ssm_state[slots]).float()  # [n, H, P, N]
    delta = _step_sizes(dt, dt_bias, dt_softplus)
    repeated = x.float().repeat_interleave(heads // x.shape[1], dim=1)  # [n, H, P]
    keys = B.float().repeat_interleave(heads // B.shape[1], dim=1)  # [n, H, N]
    state = state * (delta * A.float()).exp()[..., None, None] + (delta[..., None] * repeated)[..., None] * keys[:, :, None]
    if slots is None:
        ssm_state.copy_(state)
    else:
        ssm_state[slots] = state.to(ssm_state.dtype)
    y = torch.einsum("nhpk,nhk->nhp", state, C.float())
    if D is not None:
        y = y + repeated * D.float()[:, None]
    return y.to(x.dtype)
