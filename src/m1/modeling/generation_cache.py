"""`M1Cache`: the cache that transformers' `generate()` carries for a hybrid model.

A thin owner of a `ModelState`: row b of the batch has slot b and its own run of pages, which grow with the text. The
engine has an owner of its own, which shares pages and preempts; this one only follows what `generate` does to a batch.
"""

import torch
from torch import Tensor
from transformers import Cache

from m1.modeling.configuration import M1Config
from m1.modeling.state import ModelState, SequenceLayout


class M1Cache(Cache):
    """State of `batch` sequences. Created by the model's forward when `use_cache=True` and no cache is given.

    Padding is never stored: a row's cached length is its number of real tokens. `get_seq_length()` counts padded positions,
    as transformers expects of it. A recurrent state can't be rolled back, so the cache can't be cropped.
    """

    def __init__(self, config: M1Config, batch: int, dtype: torch.dtype, device: torch.device, page_size: int = 64) -> None:
        super().__init__(layers=[])
        self.state = ModelState(config, batch, 0, page_size=page_size, dtype=dtype, device=device)
        self.state.forget_stacks()  # rows are selected and pages grow by replacing layers' tensors
        self.lengths = torch.zeros(batch, dtype=torch.int32, device=device)  # real tokens cached a row
        self.num_seen = 0  # padded positions seen, the same for every row
        self.pages_per_row = 0

    def extend(self, layout: SequenceLayout, num_new: int) -> SequenceLayout:
        """The layout of every row's new tokens, completed with where their state lives. `num_new` is the padded length.

        Makes room for the new keys and values. Positions count a row's real tokens from its first.
        """
        page_size, device = self.state.page_size, self.lengths.device
        has_context = self.num_seen > 0
        self._grow(-(-(self.num_seen + num_new) // page_size))
        self.num_seen += num_new
        lengths = layout.cu_seqlens.diff()
        before, self.lengths = self.lengths, self.lengths + lengths
        rows = torch.arange(self.batch_size, device=device)
        token_rows = rows.repeat_interleave(lengths, output_size=layout.num_tokens)
        offsets = torch.arange(layout.num_tokens, device=device) - layout.cu_seqlens[token_rows]
        positions = before[token_rows] + offsets
        tables = torch.arange(self.batch_size * self.pages_per_row, device=device, dtype=torch.int32)
        return SequenceLayout(
            cu_seqlens=layout.cu_seqlens,
            positions=positions,
            max_seqlen=layout.max_seqlen,
            slots=rows,
            context_lens=self.lengths,
            block_tables=tables.view(self.batch_size, self.pages_per_row),
            kv_slots=token_rows * self.pages_per_row * page_size + positions,
            has_context=has_context,
        )

    def _grow(self, pages: int) -> None:
        """At least `pages` pages a row; doubles, so that a text of length L is copied O(log L) times."""
        if pages <= self.pages_per_row:
            return
        pages = max(pages, 2 * self.pages_per_row)
        batch = self.lengths.shape[0]
        for store in (self.state.key_pages, self.state.value_pages):
            for layer, old in enumerate(store):
                if old is not None:
                    assert old.shape[0] == batch * self.pages_per_row
                    new = old.new_zeros(batch, pages, *old.shape[1:])
                    new[:, : self.pages_per_row] = old.view(batch, self.pages_per_row, *old.shape[1:])
                    store[layer] = new.flatten(0, 1)
        self.pages_per_row = pages

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep (or repeat) the rows `indices` [m], in that order."""
        indices = indices.to(self.lengths.device)
        batch, pages = self.lengths.shape[0], self.pages_per_row
        for store in (self.state.conv_states, self.state.ssm_states):
            store[:] = [None if t is None else t.index_select(0, indices) for t in store]
        for store in (self.state.key_pages, self.state.value_pages):
            store[:] = [
                None if t is None else t.unflatten(0, (batch, pages)).index_select(0, indices).flatten(0, 1) for t in store
            ]
        self.lengths = self.lengths.index_select(0, indices)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self.batch_select_indices(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        rows = torch.arange(self.lengths.shape[0], device=self.lengths.device)
        self.batch_select_indices(rows.repeat_interleave(repeats))

    def reset(self) -> None:
        self.state.reset_slots(torch.arange(self.lengths.shape[0], device=self.lengths.device))
        self.lengths.zero_()
        self.num_seen = 0

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.num_seen

    def get_max_length(self, layer_idx: int | None = None) -> int:
        return -1

    def crop(self, tokens_to_remove: int) -> None:
        raise ValueError("a hybrid's recurrent state can't be rolled back: use generation without assisted decoding")

    @property
    def batch_size(self) -> int:
        return self.lengths.shape[0]

    @property
    def is_compileable(self) -> bool:
        return False

    @property
    def is_croppable(self) -> bool:
        return False

    @property
    def is_initialized(self) -> bool:
        return True
