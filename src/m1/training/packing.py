"""Documents side by side on one token axis: best-fit packing, in an order that a seed fixes and a position resumes.

Each document is a sequence of its own in the layout, so nothing leaks between them, and its first token is never a target.
Legend: T tokens of a batch, N targets.
"""

import zlib
from bisect import bisect_left, insort
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from m1.distributed import share
from m1.modeling import SequenceLayout


@dataclass(frozen=True)
class Document:
    """token_ids [length] int32, is_target [length] bool: which tokens the loss is on. The first one never is."""

    token_ids: np.ndarray
    is_target: np.ndarray

    @property
    def num_targets(self) -> int:
        return int(self.is_target[1:].sum())


@dataclass(frozen=True)
class PackedBatch:
    """input_ids [T] int64, their layout, and what is to be predicted: targets [N] int64 after target_positions [N] int64.

    `hidden[target_positions]` are the states that predict `targets`; both are made on the host, so a GPU is never waited for.
    `counts` is False for a batch that is another rank's too, and only keeps this one in step with the others.
    """

    input_ids: Tensor
    layout: SequenceLayout
    target_positions: Tensor
    targets: Tensor
    counts: bool = True

    @property
    def num_tokens(self) -> int:
        return self.input_ids.shape[0]

    @property
    def num_targets(self) -> int:
        return self.targets.shape[0]

    def to(self, device: torch.device) -> "PackedBatch":
        if device.type == self.input_ids.device.type:
            return self
        layout = replace(
            self.layout, cu_seqlens=move(self.layout.cu_seqlens, device), positions=move(self.layout.positions, device)
        )
        moved = [move(t, device) for t in (self.input_ids, self.target_positions, self.targets)]
        return PackedBatch(moved[0], layout, moved[1], moved[2], self.counts)

    def tensors(self) -> dict[str, Tensor]:
        """What a person needs to look into this batch."""
        return {"input_ids": self.input_ids, "cu_seqlens": self.layout.cu_seqlens, "target_positions": self.target_positions}


@dataclass(frozen=True)
class AnnotatedBatch:
    """A packed batch of whose targets a stage knows more than the tokens."""

    packed: PackedBatch

    @property
    def num_tokens(self) -> int:
        return self.packed.num_tokens

    @property
    def num_targets(self) -> int:
        return self.packed.num_targets

    @property
    def counts(self) -> bool:
        return self.packed.counts


def move(tensor: Tensor, device: torch.device) -> Tensor:
    """A host tensor on `device`, sent without waiting; as it is if it is there."""
    if tensor.device.type == device.type:
        return tensor
    return tensor.pin_memory().to(device, non_blocking=True)


def pack(documents: Sequence[Document], *, counts: bool = True) -> PackedBatch:
    """The documents side by side, in their order; targets stand in the same order."""
    lengths = [len(document.token_ids) for document in documents]
    input_ids = np.concatenate([document.token_ids for document in documents]).astype(np.int64)
    is_target = np.concatenate([document.is_target for document in documents])
    starts = np.cumsum([0, *lengths[:-1]])
    is_target[starts] = False
    indices = is_target.nonzero()[0]
    layout = SequenceLayout.from_lengths(lengths)
    positions, targets = torch.from_numpy(indices - 1), torch.from_numpy(input_ids[indices])
    return PackedBatch(torch.from_numpy(input_ids), layout, positions, targets, counts)


def best_fit(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Indices of `lengths` in bins of at most `capacity`: longest first, each into the fullest bin that has room.

    Raises ValueError for a length above the capacity. Ties keep their order, so that a shuffled input gives other bins.
    """
    bins: list[list[int]] = []
    open_bins: list[tuple[int, int]] = []  # (room left, bin), ascending
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        length = lengths[index]
        if length > capacity:
            raise ValueError(f"lengths: a document of {length} tokens does not fit into batches of {capacity}")
        at = bisect_left(open_bins, (length, -1))
        if at < len(open_bins):
            room, number = open_bins.pop(at)
        else:
            room, number = capacity, len(bins)
            bins.append([])
        bins[number].append(index)
        if room > length:
            insort(open_bins, (room - length, number))
    return bins


class BatchStream:
    """Packed batches of at most `capacity` tokens without end: every epoch is shuffled and packed anew from (seed, epoch).

    `state_dict` is the position; a stream over the same documents that loads it goes on with the same batches.
    """

    def __init__(self, documents: Sequence[Document], capacity: int, seed: int) -> None:
        lengths = [len(document.token_ids) if document.num_targets else 0 for document in documents]
        self._usable = np.flatnonzero(lengths)  # documents that can be learnt from, by their number in `documents`
        if not len(self._usable):
            raise ValueError("documents: the data set is empty, or none of its documents has a token to learn from")
        self.documents, self.capacity, self.seed = documents, capacity, seed
        self.epoch, self.index = 0, 0
        self._lengths = np.array(lengths)[self._usable]
        self._bins: list[list[int]] | None = None

    def next_batches(self, num_tokens: int) -> list[PackedBatch]:
        """This rank's share of one optimizer step: of as many batches as would hold `num_tokens` if they were full.

        Which documents a step has, and in which batches, does not depend on the number of ranks.
        """
        bins = [self._next_bin() for _ in range(-(-num_tokens // self.capacity))]
        return [pack([self.documents[i] for i in bin_], counts=counts) for bin_, counts in share(bins)]

    def _next_bin(self) -> list[int]:
        if self._bins is None:
            self._bins = self._pack_epoch()
        if self.index == len(self._bins):
            self.epoch, self.index = self.epoch + 1, 0
            self._bins = self._pack_epoch()
        self.index += 1
        return self._bins[self.index - 1]

    def _pack_epoch(self) -> list[list[int]]:
        generator = np.random.default_rng([self.seed, self.epoch])
        order = generator.permutation(len(self._usable))
        bins = best_fit(self._lengths[order].tolist(), self.capacity)
        numbers = self._usable[order].tolist()
        return [[numbers[i] for i in bins[b]] for b in generator.permutation(len(bins))]

    def state_dict(self) -> dict[str, Any]:
        return {"epoch": self.epoch, "index": self.index, "documents": self._fingerprint}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a position. Raises ValueError if the documents are not those that the position counts."""
        if state["documents"] != self._fingerprint:
            raise ValueError("data: not the documents that this run began with; restore the data, or give another --out")
        self.epoch, self.index, self._bins = state["epoch"], state["index"], None

    @cached_property
    def _fingerprint(self) -> int:
        value = 0
        for document in (self.documents[i] for i in self._usable.tolist()):
            value = zlib.crc32(document.is_target.tobytes(), zlib.crc32(document.token_ids.tobytes(), value))
        return value
