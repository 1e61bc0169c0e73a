"""Decode steps as CUDA graphs: captured once for each size of batch, then launched as a whole.

A step of 28 layers is some hundred launches of a few microseconds each; a graph of them is one. What a graph reads must lie
where it lay at the capture: the rows of the runner, the states, the weights, and `_slots`, which says whose turn it is. So
a batch is padded to the next size with the scratch slot, a row that belongs to nobody, and block tables are cut at the next
of a few widths: attention divides its work by the width and takes the lengths from the device.
"""

from collections.abc import Callable

import torch
from torch import Tensor

Decode = Callable[[Tensor, int, int], tuple[Tensor, ...]]  # (slots, width, num_top) -> outputs
FIRST_WIDTH = 16  # pages
WIDTH_STEP = 4


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
    """Captured steps by (batch size, table width, options), all in one memory pool: they never run at once.

    max_rows: largest batch. scratch: the slot that padding rows use.
    """

    def __init__(self, max_rows: int, max_width: int, scratch: int, device: torch.device) -> None:
        self.sizes, self.widths = batch_sizes(max_rows), table_widths(max_width)
        self._scratch = scratch
        self._slots = torch.full((max_rows,), scratch, dtype=torch.int64, device=device)
        self._pool, self._stream = torch.cuda.graph_pool_handle(), torch.cuda.Stream(device)
        self._captured: dict[tuple[int, int, int], tuple[torch.cuda.CUDAGraph, tuple[Tensor, ...]]] = {}

    def run(self, decode: Decode, slots: Tensor, width: int, num_top: int) -> tuple[Tensor, ...]:
        """What decode(slots, width, num_top) returns, from its graph; overwritten by the next run.

        slots: [one of `sizes`] int64, padded; width: one of `widths`.
        """
        key = (slots.shape[0], width, num_top)
        if key not in self._captured:
            self._captured[key] = self._capture(decode, *key)
        graph, outputs = self._captured[key]
        self._slots[: slots.shape[0]].copy_(slots)
        graph.replay()
        return outputs

    def _capture(self, decode: Decode, size: int, width: int, num_top: int) -> tuple[torch.cuda.CUDAGraph, tuple[Tensor, ...]]:
        slots = self._slots[:size]
        slots.fill_(self._scratch)  # steps before the capture compile kernels; they advance nobody
        current = torch.cuda.current_stream(slots.device)
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            decode(slots, width, num_top)
        current.wait_stream(self._stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"):
            outputs = decode(slots, width, num_top)
        return graph, outputs

    @property
    def num_captured(self) -> int:
        return len(self._captured)
