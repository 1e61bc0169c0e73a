"""SSD in torch, in its chunked matrix form (Dao & Gu 2024, arXiv 2405.21060, section 6): the truth in tests, the CPU path.

Every document is cut into chunks of Q tokens, so that no chunk holds two documents. Inside a chunk the recurrence is a
masked product of C and B, weighted by decays; between a document's chunks one state a head is handed on, for all documents
at once. Decays are exponentials of sums of log decays between two positions, never above 1, so nothing overflows.
Legend: T tokens, K chunks, Q tokens a chunk, n documents, H = G·R query heads, G groups, R heads a group, P width, N d_state.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from m1.kernels.chunks import Chunks
from m1.kernels.state_rows import state_blocks

CHUNK_SIZE = 64


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
    chunk_size: int | None = None,
) -> Any:
    """See m1.kernels.ssd.ssd_scan."""
    num_heads = C.shape[1]
    heads = (B.shape[1], num_heads // B.shape[1])  # G, R
    chunks = Chunks(cu_seqlens, x.shape[0], chunk_size or CHUNK_SIZE, x.device)
    with torch.autocast(x.device.type, enabled=False):
        repeated = _repeat(x.float(), num_heads)  # [T, H, P]
        delta = _step_size(dt, dt_bias, dt_softplus)  # [T, H]
        delta_cut = chunks.cut_zero(delta).unflatten(2, heads)  # [Q, K, G, R]; in the padding nothing decays or is added
        log_decay = (delta_cut * A.float().view(heads)).cumsum(0)  # from the chunk's start to each token
        u = chunks.cut(repeated).unflatten(2, heads) * delta_cut[..., None]  # [Q, K, G, R, P]
        keys = chunks.cut(B.float())  # [Q, K, G, N]
        queries = chunks.cut(C.float()).unflatten(2, heads)  # [Q, K, G, R, N]

        initial = None if initial_state is None else initial_state.float().unflatten(1, heads)
        entry, final = _between_chunks(u, keys, log_decay, chunks, initial)
        y = _within_chunks(u, keys, queries, log_decay)
        y = y + torch.einsum("qkgrn,kgrpn->qkgrp", queries, entry) * log_decay.exp()[..., None]
        y = chunks.join(y).flatten(1, 2)  # [T, H, P]
        if D is not None:
            y = y + D.float()[:, None] * repeated
    y = y.to(x.dtype)
    return (y, final.flatten(1, 2)) if output_final_state else y


@torch.no_grad()
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
    """See m1.kernels.ssd.ssd_state_update."""
    num_heads, d_state = C.shape[1:]
    num_groups, width = B.shape[1], x.shape[2]
    repeated = _repeat(x.float(), num_heads)  # [n, H, P]
    B, C = B.float(), C.float()
    delta = _step_size(dt, dt_bias, dt_softplus)  # [n, H]
    decay = torch.exp(delta * A.float())[..., None, None]
    u = (delta[..., None] * repeated).view(len(x), num_groups, -1, 1)  # [n, G, H/G·P, 1]
    y = torch.empty_like(repeated)
    with torch.autocast(x.device.type, enabled=False):
        for rows, state in state_blocks(ssm_state, slots, len(x)):  # [k, H, P, N]
            state.mul_(decay[rows])
            state.view(-1, num_groups, num_heads // num_groups * width, d_state).addcmul_(u[rows], B[rows][:, :, None])
            read = torch.bmm(state.view(-1, width, d_state), C[rows].reshape(-1, d_state, 1))
            y[rows] = read.view(-1, num_heads, width)
    if D is not None:
        y += D.float()[:, None] * repeated
    return y.to(x.dtype)


def _within_chunks(u: Tensor, keys: Tensor, queries: Tensor, log_decay: Tensor) -> Tensor:
    """What each token gets from its own chunk: y_q = Σ_{s ≤ q} exp(l_q - l_s) (C_q·B_s) u_s. [Q, K, G, R, P]."""
    size = len(u)
    log_decay = log_decay.permute(1, 2, 3, 0)  # [K, G, R, Q]
    future = torch.ones(size, size, dtype=torch.bool, device=u.device).triu(1)
    weights = (log_decay[..., :, None] - log_decay[..., None, :]).masked_fill(future, -torch.inf).exp()
    scores = torch.einsum("qkgrn,skgn->kgrqs", queries, keys)
    return torch.einsum("kgrqs,skgrp->qkgrp", scores * weights, u)


def _between_chunks(
    u: Tensor, keys: Tensor, log_decay: Tensor, chunks: Chunks, initial: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The state that each chunk starts from, [K, G, R, P, N], and the state after each document, [n, G, R, P, N]."""
    to_end = torch.exp(log_decay[-1] - log_decay)  # [Q, K, G, R]
    added = torch.einsum("qkgrp,qkgn->kgrpn", u * to_end[..., None], keys)
    decay = log_decay[-1].exp()[..., None, None]  # [K, G, R, 1, 1]
    state = added.new_zeros(len(chunks.first), *added.shape[1:]) if initial is None else initial
    which, entries = [chunks.first], [state]  # of each round of chunks
    for here in chunks.rounds:
        before = here - 1
        # the documents that go on are those whose chunk before this one is in the round before
        is_continued = torch.isin(which[-1], before)
        state = entries[-1][is_continued] * decay[before] + added[before]
        which.append(here)
        entries.append(state)
    entry = torch.cat(entries)[torch.cat(which).argsort()]
    return entry, entry[chunks.last] * decay[chunks.last] + added[chunks.last]


def _step_size(dt: Tensor, dt_bias: Tensor | None, dt_softplus: bool) -> Tensor:
    delta = dt.float() if dt_bias is None else dt.float() + dt_bias.float()
    return F.softplus(delta) if dt_softplus else delta


def _repeat(grouped: Tensor, num_heads: int) -> Tensor:
    """[rows, G, …] to [rows, H, …]: each group for its H/G neighbouring heads."""
    repeats = num_heads // grouped.shape[1]
    return grouped if repeats == 1 else grouped.repeat_interleave(repeats, 1)
