"""`ModelRunner`: carries out a planned step on the device: moves state, runs the model, samples. No planning and no text.

What a decode step needs lies in tensors with a row a slot, on the device: the next input token, the length so far, the block
table, the sampling values. A step reads and advances them there; the host writes a row only when a sequence starts, and one
entry of a block table when it grows. So `decode` is a function of `slots` alone.
Legend: S slots, n sequences of this step, T tokens.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from m1.engine.cache import Move
from m1.engine.scheduler import Batch, Chunk
from m1.engine.sequence import Sequence
from m1.kernels import sample
from m1.modeling.hybrid import M1ForCausalLM
from m1.modeling.state import ModelState, SequenceLayout


class ModelRunner:
    """Runs `model` for sequences that live in `num_slots` slots and `num_pages` pages.

    max_model_len: longest sequence in tokens, which sets the width of the block tables.
    """

    def __init__(
        self,
        model: M1ForCausalLM,
        *,
        num_slots: int,
        num_pages: int,
        page_size: int,
        max_model_len: int,
        state_dtype: torch.dtype = torch.float32,
    ) -> None:
        self.model, self.page_size = model, page_size
        self.device = model.model.embed_tokens.weight.device
        self.has_pages = bool(model.config.attention_layers)
        self._state_options: dict[str, Any] = {
            "page_size": page_size,
            "dtype": model.model.embed_tokens.weight.dtype,
            "state_dtype": state_dtype,
            "device": self.device,
        }
        self._sizes = (num_slots, num_pages if self.has_pages else 0)
        self.state: ModelState | None = None
        self.allocate()

        def rows(dtype: torch.dtype, *shape: int) -> Tensor:
            return torch.zeros(num_slots, *shape, dtype=dtype, device=self.device)

        self.tokens, self.lengths = rows(torch.int64), rows(torch.int64)  # next input token; tokens in the state
        self.block_tables = rows(torch.int32, -(-max_model_len // page_size))  # [S, pages]
        self.temperature, self.top_p, self.min_p = rows(torch.float32), rows(torch.float32), rows(torch.float32)
        self.top_k, self.seeds = rows(torch.int64), rows(torch.int64)
        self._bounds = torch.arange(num_slots + 1, dtype=torch.int32, device=self.device)
        self._last_slots: list[int] = []
        self._slots = self._index([])

    def allocate(self) -> None:
        """Take the memory of all slots and pages."""
        self.state = ModelState(self.model.config, *self._sizes, **self._state_options)

    def free(self) -> None:
        """Give that memory back; `allocate` before the next step."""
        self.state = None

    @torch.inference_mode()
    def execute(self, batch: Batch) -> tuple[list[int], list[float]]:
        """Carry out a step; returns a token and its log-probability for each of `batch.decode`, in that order."""
        if self.state is None:
            self.allocate()
        self._move(batch.moves)
        if batch.starting:
            self._write_rows(batch.starting)
        if batch.growing:
            self._write_pages(batch.growing)
        tokens, logprobs = None, None
        if batch.decode:
            slots = self._slots_of(batch.decode)
            width = max(len(s.pages) for s in batch.decode)
            tokens, logprobs = self.decode(slots, width)
        if batch.prefill:
            self.prefill(batch.prefill)
        if tokens is None or logprobs is None:
            return [], []
        return tokens.tolist(), logprobs.tolist()

    def decode(self, slots: Tensor, width: int) -> tuple[Tensor, Tensor]:
        """Feed each sequence its next token and sample the one after: (tokens [n] int64, log-probabilities [n] fp32).

        slots [n] int64: their rows, which move on by one token. width: pages of the longest block table among them.
        """
        positions = self.lengths[slots]
        tables = kv_slots = None
        if self.has_pages:
            tables = self.block_tables[slots, :width]
            kv_slots = self._kv_slots(tables, positions // self.page_size, positions % self.page_size)
        layout = SequenceLayout(
            cu_seqlens=self._bounds[: slots.shape[0] + 1],
            positions=positions,
            max_seqlen=1,
            slots=slots,
            context_lens=(positions + 1).to(torch.int32),
            block_tables=tables,
            kv_slots=kv_slots,
            has_context=True,
        )
        hidden = self.model.model.embed_tokens(self.tokens[slots])
        logits = self.model.lm_head(self.model.model.forward_packed(hidden, layout, self.state))  # [n, vocab]
        tokens, logprobs = sample(
            logits,
            temperature=self.temperature[slots],
            top_k=self.top_k[slots],
            top_p=self.top_p[slots],
            min_p=self.min_p[slots],
            seeds=self.seeds[slots],
            positions=positions + 1,
        )
        self.tokens[slots] = tokens
        self.lengths[slots] = positions + 1
        return tokens, logprobs

    def prefill(self, chunks: list[Chunk]) -> None:
        """Advance the states of sequences by their chunks, packed into one forward. Nothing is sampled."""
        lengths = [chunk.end - chunk.start for chunk in chunks]
        ids = [token for chunk in chunks for token in chunk.sequence.tokens[chunk.start : chunk.end]]
        bounds = self._bounds.new_tensor([0, *lengths]).cumsum(0, dtype=torch.int32)
        positions = torch.cat([torch.arange(chunk.start, chunk.end) for chunk in chunks]).to(self.device)
        tables = kv_slots = None
        if self.has_pages:
            tables = self._tables([chunk.sequence for chunk in chunks])
            rows = torch.arange(len(chunks), device=self.device).repeat_interleave(self._index(lengths), output_size=len(ids))
            pages = positions // self.page_size
            kv_slots = tables[rows, pages].long() * self.page_size + positions % self.page_size
        layout = SequenceLayout(
            cu_seqlens=bounds,
            positions=positions,
            max_seqlen=max(lengths),
            slots=self._index([_slot(chunk.sequence) for chunk in chunks]),
            context_lens=self._bounds.new_tensor([chunk.end for chunk in chunks]),
            block_tables=tables,
            kv_slots=kv_slots,
            has_context=any(chunk.start for chunk in chunks),
        )
        self.model.model.forward_packed(self.model.model.embed_tokens(self._index(ids)), layout, self.state)

    def _kv_slots(self, tables: Tensor, columns: Tensor, offsets: Tensor) -> Tensor:
        return tables.gather(1, columns[:, None])[:, 0].long() * self.page_size + offsets

    def _index(self, values: list[int]) -> Tensor:
        return torch.tensor(values, dtype=torch.int64, device=self.device)

    def _slots_of(self, sequences: list[Sequence]) -> Tensor:
        """The rows of a batch, as a tensor that stays the same object while the batch does."""
        slots = [_slot(s) for s in sequences]
        if slots != self._last_slots:
            self._last_slots, self._slots = slots, self._index(slots)
        return self._slots

    def _tables(self, sequences: list[Sequence]) -> Tensor:
        """Block tables [n, pages] int32 as wide as the longest; page 0 stands where a sequence has none."""
        width = max(1, max(len(s.pages) for s in sequences))
        return self._bounds.new_tensor([s.pages + [0] * (width - len(s.pages)) for s in sequences])

    def _write_rows(self, sequences: list[Sequence]) -> None:
        """Tell the device what sequences that start to decode feed next and how they sample."""
        slots = self._index([_slot(s) for s in sequences])
        params = [s.request.params for s in sequences]
        self.tokens[slots] = self._index([s.tokens[-1] for s in sequences])
        self.lengths[slots] = self._index([s.num_computed for s in sequences])
        self.seeds[slots] = self._index([s.seed for s in sequences])
        self.top_k[slots] = self._index([max(p.top_k, 0) for p in params])
        for rows, values in (
            (self.temperature, [p.temperature for p in params]),
            (self.top_p, [p.top_p for p in params]),
            (self.min_p, [p.min_p for p in params]),
        ):
            rows[slots] = rows.new_tensor(values)
        if self.has_pages:
            tables = self._tables(sequences)
            self.block_tables[slots, : tables.shape[1]] = tables

    def _write_pages(self, sequences: list[Sequence]) -> None:
        """Enter the newest page of each sequence in its block table."""
        slots, columns = self._index([_slot(s) for s in sequences]), self._index([len(s.pages) - 1 for s in sequences])
        self.block_tables[slots, columns] = self.block_tables.new_tensor([s.pages[-1] for s in sequences])

    def _move(self, moves: list[Move]) -> None:
        assert self.state is not None
        for group in independent_groups(moves):
            source, target = self._index([m.source for m in group]), self._index([m.target for m in group])
            match group[0].kind:
                case "reset":
                    self.state.reset_slots(target)
                case "slot":
                    self.state.copy_slots(source, target)
                case "page":
                    self.state.copy_pages(source, target)


def _slot(sequence: Sequence) -> int:
    assert sequence.slot is not None
    return sequence.slot


def independent_groups(moves: list[Move]) -> Iterator[list[Move]]:
    """Cut moves into runs, in order, that may be done at once: of one kind, and none touching what another writes."""
    group: list[Move] = []
    sources: set[int] = set()
    targets: set[int] = set()
    for move in moves:
        is_clash = move.source in targets or move.target in targets or move.target in sources
        if group and (move.kind != group[0].kind or is_clash):
            yield group
            group, sources, targets = [], set(), set()
        group.append(move)
        sources.add(move.source)
        targets.add(move.target)
    if group:
        yield group
