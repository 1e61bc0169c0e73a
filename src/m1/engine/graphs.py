"""Decode steps as CUDA graphs: captured once for each size of batch, then launched as a whole.

A step of 28 layers is some hundred launches of a few microseconds each; a graph of them is one. What a graph reads must lie
where it lay at the capture: the rows of the runner, the states, the weights, and `_slots`, which says whose turn it is. So
a batch is padded to the next size with the scratch slot, a row that belongs to nobody, and block tables are cut at the next
of a few widths: attention divides its work by the width and takes the lengths from the device. Every step runs so: launched
one by one, the kernels of a size that is seldom met would each have to be chosen, loaded or compiled for it.
"""

import time
from collections import Counter
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

Decode = Callable[[Tensor, int, int], tuple[Tensor, ...]]  # (slots, width, num_top) -> outputs
FIRST_WIDTH = 16  # pages
WIDTH_STEP = 4
PATIENCE = 64  # steps of a kind that a larger graph serves before it gets one of its own


class Key(NamedTuple):
    """A kind of step: rows of the batch, pages of its block tables, and how many of the most likely tokens it tells."""

    size: int
    width: int
    num_top: int


def batch_sizes(largest: int) -> list[int]:
    """Sizes that batches are padded to: powers of two up to 32, every 32nd up to 512, every 64th beyond, and `largest`."""
    sizes = [1, 2, 4, 8, 16, *range(32, 513, 32), *range(576, largest + 64, 64)]
    return [size for size in sizes if size < largest] + [largest]


def table_widths(widest: int) -> list[int]:
    """Widths of block tables in pages: 16, 64, 256, … and `widest`."""
    widths, width = [], FIRST_WIDTH
    while width < widest:
        widths.append(width)
        width *= WIDTH_STEP
    return [*widths, widest]


def next_of(sizes: list[int], wanted: int) -> int:
    """The smallest of `sizes` (ascending) that is at least `wanted`."""
    return next(size for size in sizes if size >= wanted)


class DecodeGraphs:
    """Captured steps by `Key`, all in one memory pool: they never run at once.

    max_rows: largest batch. scratch: the slot that padding rows use.
    """

    def __init__(self, max_rows: int, max_width: int, scratch: int, device: torch.device) -> None:
        self.sizes, self.widths = batch_sizes(max_rows), table_widths(max_width)
        self._scratch, self._device = scratch, device
        self._slots = torch.full((max_rows,), scratch, dtype=torch.int64, device=device)
        self._place: tuple[Any, torch.cuda.Stream] | None = None  # memory pool and stream of captures
        self._captured: dict[Key, tuple[torch.cuda.CUDAGraph, tuple[Tensor, ...]]] = {}
        self._num_missed: Counter[Key] = Counter()
        self.capture_seconds = 0.0

    def choose(self, count: int, width: int, num_top: int) -> Key:
        """The graph for `count` rows and tables of `width` pages.

        A capture costs as much as some forty steps, so a size that is only passed by, when the engine fills or drains, is not
        worth one: its steps run in a graph that is not more than twice too large. Where there is none, the next power of two
        gets one: whoever has once filled and drained an engine meets no new ones.
        """
        key = Key(next_of(self.sizes, count), next_of(self.widths, width), num_top)
        if key in self._captured:
            return key
        self._num_missed[key] += 1
        if self._num_missed[key] > PATIENCE:
            return key
        larger = [k for k in self._captured if count <= k.size <= 2 * key.size and k.width >= width and k.num_top == num_top]
        power_of_two = min(1 << (count - 1).bit_length(), self.sizes[-1])
        return min(larger, default=key._replace(size=power_of_two))

    def run(self, decode: Decode, key: Key, slots: Tensor) -> tuple[Tensor, ...]:
        """What decode(slots, key.width, key.num_top) returns, from its graph; overwritten by the next run.

        slots: [key.size] int64, padded.
        """
        self._ensure(decode, key)
        graph, outputs = self._captured[key]
        self._slots[: key.size].copy_(slots)
        graph.replay()
        return outputs

    def capture_ahead(self, decode: Decode) -> None:
        """Capture what any steps can run in: the powers of two and the largest size, at every width."""
        powers = [1 << exponent for exponent in range(self.sizes[-1].bit_length()) if 1 << exponent < self.sizes[-1]]
        for size in (self.sizes[-1], *reversed(powers)):  # the largest first: the others fit into its memory
            for width in self.widths:
                self._ensure(decode, Key(size, width, 0))

    def _ensure(self, decode: Decode, key: Key) -> None:
        if key not in self._captured:
            start = time.perf_counter()
            self._captured[key] = self._capture(decode, key)
            self.capture_seconds += time.perf_counter() - start

    def _capture(self, decode: Decode, key: Key) -> tuple[torch.cuda.CUDAGraph, tuple[Tensor, ...]]:
        if self._place is None:
            self._place = torch.cuda.graph_pool_handle(), torch.cuda.Stream(self._device)
        pool, stream = self._place
        slots = self._slots[: key.size]
        slots.fill_(self._scratch)  # steps before the capture compile kernels; they advance nobody
        current = torch.cuda.current_stream(self._device)
        stream.wait_stream(current)
        with torch.cuda.stream(stream):
            decode(slots, key.width, key.num_top)
        current.wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode="thread_local"):
            outputs = decode(slots, key.width, key.num_top)
        return graph, outputs

    @property
    def num_captured(self) -> int:
        return len(self._captured)
