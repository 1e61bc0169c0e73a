"""Packed documents cut into chunks on the device, so that no chunk crosses a document and nothing waits for the GPU.

The number of rows is a bound that the host knows (⌊(T + n(L-1))/L⌋ chunks of at most L tokens); how many are in use,
only the device knows, and programs of unused rows return at once. The torch references have their own chunks.py.

Bytes moved: 4 n + 16 a chunk; a launch of a few microseconds.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

IS_FIRST = tl.constexpr(1)
IS_LAST = tl.constexpr(2)


class ChunkTable(NamedTuple):
    """Chunks in the order of their tokens.

    rows: [num_chunks, 4] int32: first token, end, document, IS_FIRST | IS_LAST of its document; an unused row has end 0.
    first_chunk: [n+1] int32, the row where each document's chunks begin, then the number of rows in use.
    num_chunks: rows, used or not; is_one_each: known on the host that every document is one chunk, and chunk i document i.
    """

    rows: Tensor
    first_chunk: Tensor
    num_chunks: int
    num_sequences: int
    is_one_each: bool


def document_bounds(cu_seqlens: Tensor | None, num_tokens: int, device: torch.device) -> Tensor:
    """`cu_seqlens`, or the bounds of one document of all tokens, made on the device."""
    if cu_seqlens is None:
        return torch.arange(0, num_tokens + 1, num_tokens, dtype=torch.int32, device=device)
    return cu_seqlens.contiguous()


# Of bounds that are still in use: their version and tables by (tokens, length). Every layer of a step asks for the same two.
_known: WeakIdKeyDictionary = WeakIdKeyDictionary()


def cut_documents(bounds: Tensor, num_tokens: int, length: int) -> ChunkTable:
    """Cut documents with the given bounds ([n+1] int32, on the device) into chunks of at most `length` tokens.

    A table serves as long as its bounds live unchanged. Those of inference mode, whose changes nobody counts, are cut every
    time, and so are all while a graph is captured, whose memory is its own.
    """
    if bounds.is_inference() or (bounds.is_cuda and torch.cuda.is_current_stream_capturing()):
        return _cut(bounds, num_tokens, length)
    version, tables = _known.get(bounds, (None, {}))
    if version != bounds._version:
        version, tables = _known[bounds] = (bounds._version, {})
    if (num_tokens, length) not in tables:
        tables[num_tokens, length] = _cut(bounds, num_tokens, length)
    return tables[num_tokens, length]


def _cut(bounds: Tensor, num_tokens: int, length: int) -> ChunkTable:
    num_sequences = len(bounds) - 1
    num_chunks = (num_tokens + num_sequences * (length - 1)) // length
    rows = torch.empty(num_chunks, 4, dtype=torch.int32, device=bounds.device)
    first_chunk = torch.empty(num_sequences + 1, dtype=torch.int32, device=bounds.device)
    _cut_kernel[(num_sequences,)](bounds, rows, first_chunk, num_sequences, num_tokens, length, num_chunks, BLOCK=128)
    return ChunkTable(rows, first_chunk, num_chunks, num_sequences, num_chunks == num_sequences)


@triton.jit
def _cut_kernel(bounds, rows, first_chunk, num_sequences, num_tokens, length, num_chunks, BLOCK: tl.constexpr):
    document = tl.program_id(0)
    offset = tl.arange(0, BLOCK)
    before = tl.zeros([BLOCK], tl.int32)
    for block in range(0, document, BLOCK):
        other = block + offset
        start = tl.load(bounds + other, mask=other < document, other=0)
        end = tl.load(bounds + other + 1, mask=other < document, other=0)
        before += (end - start + length - 1) // length
    row = tl.sum(before, axis=0)
    start = tl.maximum(tl.load(bounds + document), 0)  # a wrong bound must not become an illegal access
    end = tl.minimum(tl.load(bounds + document + 1), num_tokens)
    own = (end - start + length - 1) // length
    tl.store(first_chunk + document, row)
    for block in range(0, own, BLOCK):
        chunk = block + offset
        first = start + chunk * length
        flags = tl.where(chunk == 0, IS_FIRST, 0) + tl.where(chunk == own - 1, IS_LAST, 0)
        entry = rows + (row + chunk) * 4
        in_use = (chunk < own) & (row + chunk < num_chunks)
        tl.store(entry, first, mask=in_use)
        tl.store(entry + 1, tl.minimum(first + length, end), mask=in_use)
        tl.store(entry + 2, document + tl.zeros_like(chunk), mask=in_use)
        tl.store(entry + 3, flags, mask=in_use)
    if document == num_sequences - 1:
        tl.store(first_chunk + num_sequences, row + own)
        for block in range(row + own, num_chunks, BLOCK):
            entry = rows + (block + offset) * 4
            unused = block + offset < num_chunks
            for field in tl.static_range(4):
                tl.store(entry + field, tl.zeros_like(offset), mask=unused)
