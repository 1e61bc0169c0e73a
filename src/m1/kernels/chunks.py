"""How packed tokens are cut into chunks for the torch scans (selective_scan, ssd); no arithmetic lives here."""

import itertools

import torch
from torch import Tensor


class Chunks:
    """T packed tokens as K chunks of Q positions, none crossing a document; a document's last chunk ends in padding.

    Laid out step-major, [Q, K, …]: position q of all chunks is contiguous. Padding repeats its document's last token
    (so nothing of one document reaches another) or holds zeros, as the caller asks. Chunk k is followed by chunk k+1.
    """

    def __init__(self, cu_seqlens: Tensor | None, num_tokens: int, max_length: int, device: torch.device) -> None:
        bounds = [0, num_tokens] if cu_seqlens is None else cu_seqlens.tolist()
        documents = list(itertools.pairwise(bounds))
        self.length = min(max_length, max(end - start for start, end in documents))  # Q
        starts = [range(start, end, self.length) for start, end in documents]  # of each document's chunks
        counts = torch.tensor([len(chunks) for chunks in starts], device=device)
        self.count = sum(map(len, starts))  # K
        self.last = counts.cumsum(0) - 1  # [n], each document's last chunk
        self.first = self.last - counts + 1  # [n]
        # for r = 1, 2, …: the chunks that are the r-th after a document's first, so that one step serves all documents
        self.rounds = [self.first[counts > r] + r for r in range(1, max(map(len, starts)))]

        start = torch.tensor(list(itertools.chain(*starts)), device=device)
        stop = torch.tensor(bounds[1:], device=device).repeat_interleave(counts)
        token = start + torch.arange(self.length, device=device)[:, None]  # [Q, K]
        self._is_padding = token >= stop
        self._token = torch.minimum(token, stop - 1).flatten()
        place = torch.arange(token.numel(), device=device).view(token.shape)
        self._place = place.T[~self._is_padding.T]  # [T], where each token lies

    def cut(self, flat: Tensor) -> Tensor:
        """[T, …] to [Q, K, …]; padding repeats the document's last token."""
        return flat.index_select(0, self._token).view(self.length, self.count, *flat.shape[1:])

    def cut_zero(self, flat: Tensor) -> Tensor:
        """[T, …] to [Q, K, …]; padding is zero."""
        laid = self.cut(flat)
        return laid.masked_fill(self._is_padding.view(self.length, self.count, *[1] * (flat.dim() - 1)), 0)

    def join(self, chunked: Tensor) -> Tensor:
        """[Q, K, …] to [T, …], without the padding."""
        return chunked.flatten(0, 1).index_select(0, self._place)
