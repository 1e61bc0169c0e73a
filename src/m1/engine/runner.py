"""`ModelRunner`: carries out a planned step on the device: moves state, runs the model, samples. No planning and no text.

What a decode step needs lies in tensors with a row a slot, on the device: the next input token, the length so far, the block
table, the sampling values. A step reads and advances them there; the host writes a row only when a sequence starts, and one
entry of a block table when it grows. So `decode` is a function of `slots` alone, may run as a graph, and the next step can be
launched before anything of this one is read. One slot and one page more than the cache knows of are scratch: rows that pad a
batch use them.
Legend: S slots, n sequences of this step, T tokens.
"""

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from m1.engine.cache import Move
from m1.engine.fp8 import kv_scales
from m1.engine.graphs import DecodeGraphs, next_of, table_widths
from m1.engine.sampling_params import MAX_LOGPROBS
from m1.engine.scheduler import Batch, Chunk
from m1.engine.sequence import Sequence
from m1.engine.transfer import Download, upload
from m1.kernels import sample
from m1.kernels.decode_rows import advance_rows, gather_rows
from m1.modeling.hybrid import M1ForCausalLM
from m1.modeling.state import ModelState, SequenceLayout

Arrays = dict[str, np.ndarray]
Tensors = dict[str, Tensor]


class ModelRunner:
    """Runs `model` for sequences that live in `num_slots` slots and `num_pages` pages.

    max_model_len: longest sequence in tokens, which sets the width of the block tables. uses_graphs: replay decode steps as
    CUDA graphs, captured when a size of batch is first met. kv_dtype: of keys and values, the model's unless given; 8-bit ones
    get their scales from `kv_scales`.
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
        kv_dtype: torch.dtype | None = None,
        uses_graphs: bool = False,
    ) -> None:
        self.model, self.page_size = model, page_size
        self.device = model.model.embed_tokens.weight.device
        self.has_pages = bool(model.config.attention_layers)
        self._state_options: dict[str, Any] = {
            "page_size": page_size,
            "dtype": model.model.embed_tokens.weight.dtype,
            "state_dtype": state_dtype,
            "kv_dtype": kv_dtype,
            "device": self.device,
        }
        self.scratch_slot, self.scratch_page = num_slots, num_pages if self.has_pages else 0
        self._sizes = (num_slots + 1, num_pages + 1 if self.has_pages else 0)
        self.state: ModelState | None = None
        self.max_width = -(-max_model_len // page_size)
        self._widths = table_widths(self.max_width)

        # [values, S+1]: next input token, tokens in the state, seed, top_k; temperature (scratch: greedy), top_p, min_p
        self._integers = torch.zeros(4, num_slots + 1, dtype=torch.int64, device=self.device)
        self._floats = torch.zeros(3, num_slots + 1, dtype=torch.float32, device=self.device)
        self._floats[1] = 1.0
        self._block_tables = torch.full(
            (num_slots + 1, self.max_width), self.scratch_page, dtype=torch.int32, device=self.device
        )
        self._bounds = torch.arange(num_slots + 2, dtype=torch.int32, device=self.device)
        self._uses_graphs = uses_graphs
        self._graphs: DecodeGraphs | None = None
        self._places: list[int] = []  # of the weights that the graphs read
        self.allocate()

    def allocate(self) -> None:
        """Take the memory of all slots and pages."""
        if self.state is None:
            self.state = ModelState(self.model.config, *self._sizes, **self._state_options)
            self._set_kv_scales()

    def _set_kv_scales(self) -> None:
        """Measure the scales of 8-bit keys and values with the weights as they are."""
        state = self.state
        if state is not None and state.key_scale is not None and state.value_scale is not None:
            for mine, measured in zip((state.key_scale, state.value_scale), kv_scales(self.model), strict=True):
                mine.copy_(measured)

    @property
    def num_state_bytes(self) -> int:
        """Of all slots and pages, while they are there."""
        stacks = [] if self.state is None else [*self.state.slot_stacks, *self.state.page_stacks]
        return sum(stack.numel() * stack.element_size() for stack in stacks)

    def free(self) -> None:
        """Give that memory back, and what was captured with it; `allocate` before the next step."""
        self.state = self._graphs = None

    def _current_graphs(self) -> DecodeGraphs | None:
        """The graphs, made anew if the states are."""
        if self._uses_graphs and self._graphs is None:
            self._graphs = DecodeGraphs(self.scratch_slot, self.max_width, self.scratch_slot, self.device)
            self._places = self._weight_places()
        return self._graphs

    def _weight_places(self) -> list[int]:
        return [parameter.data_ptr() for parameter in self.model.parameters()]

    def weights_changed(self) -> None:
        """Forget graphs that read weights where they no longer are; what was changed in place is read as it is."""
        self._set_kv_scales()
        if self._graphs is not None and self._places != self._weight_places():
            self._graphs = None

    @torch.inference_mode()
    def warm_up(self) -> None:
        """Compile the kernels of decode steps and capture their graphs, where steps are graphs."""
        self.allocate()
        graphs = self._current_graphs()
        if graphs is not None:
            graphs.capture_ahead(self.decode)

    @torch.inference_mode()
    def launch(self, batch: Batch) -> Download:
        """Start a step. What is read later, for each of `batch.slots` in that order: a token and its log-probability; if one of
        the sequences asks for them, also log-probabilities and ids of the MAX_LOGPROBS most likely tokens [n, MAX_LOGPROBS].
        """
        self.allocate()
        graphs = self._current_graphs()
        groups = list(independent_groups(batch.moves))
        arrays: Arrays = {}
        for number, group in enumerate(groups):
            arrays[f"source {number}"] = np.array([move.source for move in group])
            arrays[f"target {number}"] = np.array([move.target for move in group])
        if batch.starting:
            arrays |= self._starting_rows(batch.starting)
        if batch.growing:
            arrays |= _growing_pages(batch.growing)
        width = next_of(self._widths, -(-batch.max_context // self.page_size)) if self.has_pages else self._widths[0]
        num_top = MAX_LOGPROBS if batch.wants_top else 0
        key = graphs.choose(len(batch.slots), width, num_top) if graphs is not None and len(batch.slots) else None
        if len(batch.slots):
            arrays["slots"] = batch.slots if key is None else self.pad(batch.slots, key.size)
        if batch.prefill:
            arrays |= self._prefill_arrays(batch.prefill)
        sent = upload(arrays, self.device)
        self._move([(group[0].kind, sent[f"source {i}"], sent[f"target {i}"]) for i, group in enumerate(groups)])
        self._write_rows(sent)
        result = Download([])
        if len(batch.slots):
            if graphs is not None and key is not None:
                outputs = graphs.run(self.decode, key, sent["slots"])
            else:
                outputs = self.decode(sent["slots"], width, num_top)
            result = Download([output[: len(batch.slots)] for output in outputs])
        if batch.prefill:
            self.prefill(batch.prefill, sent)
        return result

    def pad(self, slots: np.ndarray, size: int) -> np.ndarray:
        """`slots` and then the scratch slot, up to `size`."""
        return np.pad(slots, (0, size - len(slots)), constant_values=self.scratch_slot)

    def decode(self, slots: Tensor, width: int, num_top: int = 0) -> tuple[Tensor, ...]:
        """Feed each sequence its next token and sample the one after: (tokens [n] int64, log-probabilities [n] fp32), and with
        num_top (log-probabilities [n, num_top] fp32, ids [n, num_top]) of the most likely ones.

        slots [n] int64: their rows, which move on by one token. width: pages of their block tables that may be in use.
        """
        rotary = self.model.model.rotary
        rows = gather_rows(
            self._integers,
            self._floats,
            self._block_tables if self.has_pages else None,
            slots,
            rotary.frequencies_on(self.device),
            scaling=rotary.scaling,
            width=width,
            page_size=self.page_size,
        )
        layout = SequenceLayout(
            cu_seqlens=self._bounds[: slots.shape[0] + 1],
            positions=rows.positions,
            max_seqlen=1,
            slots=slots,
            context_lens=rows.context_lens,
            block_tables=rows.block_tables,
            kv_slots=rows.kv_slots,
            has_context=True,
            rotary=(rows.cos, rows.sin),
        )
        hidden = self.model.model.embed_tokens(rows.tokens)
        logits = self.model.lm_head(self.model.model.forward_packed(hidden, layout, self.state))  # [n, vocab]
        tokens, logprobs = sample(
            logits,
            temperature=rows.temperature,
            top_k=rows.top_k,
            top_p=rows.top_p,
            min_p=rows.min_p,
            seeds=rows.seeds,
            positions=rows.next_positions,
        )
        advance_rows(self._integers, slots, tokens, self.scratch_slot)
        if num_top:
            return tokens, logprobs, *_most_likely(logits, rows.temperature, num_top)
        return tokens, logprobs

    def prefill(self, chunks: list[Chunk], sent: Tensors) -> None:
        """Advance the states of sequences by their chunks, packed into one forward. Nothing is sampled."""
        layout = SequenceLayout(
            cu_seqlens=sent["bounds"],
            positions=sent["positions"],
            max_seqlen=max(chunk.end - chunk.start for chunk in chunks),
            slots=sent["prefill slots"],
            context_lens=sent["context lengths"],
            block_tables=sent.get("prefill tables"),
            kv_slots=sent.get("kv slots"),
            has_context=any(chunk.start for chunk in chunks),
        )
        self.model.model.forward_packed(self.model.model.embed_tokens(sent["ids"]), layout, self.state)

    def _prefill_arrays(self, chunks: list[Chunk]) -> Arrays:
        lengths = np.array([chunk.end - chunk.start for chunk in chunks])
        positions = np.concatenate([np.arange(chunk.start, chunk.end) for chunk in chunks])
        arrays = {
            "ids": np.concatenate([np.array(chunk.sequence.tokens[chunk.start : chunk.end]) for chunk in chunks]),
            "bounds": np.concatenate([[0], lengths.cumsum()]).astype(np.int32),
            "positions": positions,
            "prefill slots": np.array([_slot(chunk.sequence) for chunk in chunks]),
            "context lengths": np.array([chunk.end for chunk in chunks], np.int32),
        }
        if self.has_pages:
            tables = _tables([chunk.sequence for chunk in chunks])
            pages = tables[np.arange(len(chunks)).repeat(lengths), positions // self.page_size].astype(np.int64)
            arrays |= {"prefill tables": tables, "kv slots": pages * self.page_size + positions % self.page_size}
        return arrays

    def _starting_rows(self, sequences: list[Sequence]) -> Arrays:
        """What sequences that start to decode feed next, and how they sample: rows for `_write_rows`."""
        params = [s.request.params for s in sequences]
        arrays = {
            "starting slots": np.array([_slot(s) for s in sequences]),
            "integers": np.array(
                [
                    [s.tokens[-1] for s in sequences],
                    [s.num_computed for s in sequences],
                    [s.seed for s in sequences],
                    [max(p.top_k, 0) for p in params],
                ],
                np.int64,
            ),
            "floats": np.array(
                [[p.temperature for p in params], [p.top_p for p in params], [p.min_p for p in params]], np.float32
            ),
        }
        if self.has_pages:
            arrays["tables"] = _tables(sequences)
        return arrays

    def _write_rows(self, sent: Tensors) -> None:
        if "starting slots" in sent:
            slots = sent["starting slots"]
            self._integers.index_copy_(1, slots, sent["integers"])
            self._floats.index_copy_(1, slots, sent["floats"])
            if self.has_pages:
                tables = sent["tables"]
                self._block_tables[:, : tables.shape[1]].index_copy_(0, slots, tables)
        if "growing slots" in sent:
            self._block_tables.index_put_((sent["growing slots"], sent["columns"]), sent["pages"])

    def _move(self, groups: list[tuple[str, Tensor, Tensor]]) -> None:
        assert self.state is not None
        for kind, source, target in groups:
            match kind:
                case "reset":
                    self.state.reset_slots(target)
                case "slot":
                    self.state.copy_slots(source, target)
                case "page":
                    self.state.copy_pages(source, target)


def _most_likely(logits: Tensor, temperature: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Log-probabilities [n, count] and ids of the most likely tokens at each row's temperature (greedy: at 1)."""
    scaled = logits.float() / torch.where(temperature == 0, 1.0, temperature)[:, None]
    values, ids = scaled.topk(min(count, scaled.shape[1]), dim=-1)
    return values - scaled.logsumexp(-1, keepdim=True), ids


def _growing_pages(sequences: list[Sequence]) -> Arrays:
    """The newest page of each sequence, and where it enters its block table."""
    return {
        "growing slots": np.array([_slot(s) for s in sequences]),
        "columns": np.array([len(s.pages) - 1 for s in sequences]),
        "pages": np.array([s.pages[-1] for s in sequences], np.int32),
    }


def _tables(sequences: list[Sequence]) -> np.ndarray:
    """Block tables [n, pages] int32 as wide as the longest; page 0 stands where a sequence has none."""
    tables = np.zeros((len(sequences), max(1, max(len(s.pages) for s in sequences))), np.int32)
    for row, sequence in enumerate(sequences):
        tables[row, : len(sequence.pages)] = sequence.pages
    return tables


def _slot(sequence: Sequence) -> int:
    assert sequence.slot is not None
    return sequence.slot


def independent_groups(moves: list[Move]) -> Iterator[list[Move]]:
    """Cut moves into runs that may be done at once: of one kind, and none touching what another writes.

    Slots and pages are different memory, so the runs of slots come first, then those of pages, each in their order: a dozen
    samples that part from a prompt, a slot and a page each, are two runs.
    """
    for kinds in (("reset", "slot"), ("page",)):
        yield from _runs([move for move in moves if move.kind in kinds])


def _runs(moves: list[Move]) -> Iterator[list[Move]]:
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
