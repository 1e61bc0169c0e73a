"""The layout of a GGUF file: its metadata, and where its tensors lie. What they mean stands in gguf.py.

The package `gguf` reads these files too, by a numpy object for each string: ten seconds for a vocabulary of 150,000 tokens and
its merges. This takes a second. Format: the GGUF specification of ggml, versions 2 and 3, little-endian.
"""

import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

_MAGIC, _VERSIONS, _ALIGNMENT = b"GGUF", (2, 3), 32
_BOOL, _STRING, _ARRAY = 7, 8, 9
_NUMBERS = {0: "u1", 1: "i1", 2: "<u2", 3: "<i2", 4: "<u4", 5: "<i4", 6: "<f4", _BOOL: "?", 10: "<u8", 11: "<i8", 12: "<f8"}


@dataclass(frozen=True)
class StoredTensor:
    """A tensor on disk: its shape as torch has it, and its bytes uint8 [*rows, bytes a row], which `gguf.dequantize` takes."""

    shape: tuple[int, ...]
    tensor_type: GGMLQuantizationType
    data: np.ndarray

    @property
    def n_bytes(self) -> int:
        return self.data.nbytes


def read_gguf(path: str | Path) -> tuple[dict[str, Any], dict[str, StoredTensor]]:
    """Metadata by key, and tensors by name, which are mapped into memory, not read.

    Raises ValueError for another version, an unknown type, and a file that ends too early.
    """
    content = np.memmap(path, dtype=np.uint8, mode="r").view(np.ndarray)
    cursor = _Cursor(memoryview(content.data))
    if cursor.bytes(4) != _MAGIC:
        raise ValueError("its first bytes are not 'GGUF'")
    version = cursor.number("<u4")
    if version not in _VERSIONS:
        raise ValueError(f"version {version} of the format; {' and '.join(map(str, _VERSIONS))} are read")
    num_tensors, num_fields = cursor.number("<u8"), cursor.number("<u8")
    metadata = {cursor.string(): cursor.value(cursor.number("<u4")) for _ in range(num_fields)}
    places: dict[str, tuple[tuple[int, ...], GGMLQuantizationType, int]] = {}
    for _ in range(num_tensors):
        name, num_dims = cursor.string(), cursor.number("<u4")
        dims = [cursor.number("<u8") for _ in range(num_dims)]
        places[name] = (tuple(reversed(dims)), GGMLQuantizationType(cursor.number("<u4")), cursor.number("<u8"))
    alignment = metadata.get("general.alignment", _ALIGNMENT)
    start = -(-cursor.position // alignment) * alignment
    tensors = {name: _tensor(content, start + offset, shape, kind) for name, (shape, kind, offset) in places.items()}
    return metadata, tensors


def _tensor(content: np.ndarray, start: int, shape: tuple[int, ...], kind: GGMLQuantizationType) -> StoredTensor:
    weights_a_block, bytes_a_block = GGML_QUANT_SIZES[kind]
    if not shape or shape[-1] % weights_a_block:
        raise ValueError(f"a tensor {list(shape)} is not made of {kind.name} blocks of {weights_a_block}")
    stored = (*shape[:-1], shape[-1] // weights_a_block * bytes_a_block)
    end = start + int(np.prod(stored, dtype=np.int64))
    if end > len(content):
        raise ValueError(f"it ends at byte {len(content)}, within a tensor that goes on to {end}")
    return StoredTensor(shape, kind, content[start:end].reshape(stored))


class _Cursor:
    """Reads one thing after another."""

    def __init__(self, content: memoryview) -> None:
        self._content, self.position = content, 0

    def bytes(self, count: int) -> bytes:
        end = self.position + count
        if end > len(self._content):
            raise ValueError(f"it ends at byte {len(self._content)}, {end} are needed")
        found = bytes(self._content[self.position : end])
        self.position = end
        return found

    def number(self, dtype: str) -> Any:
        kind = np.dtype(dtype)
        return np.frombuffer(self.bytes(kind.itemsize), kind)[0].item()

    def string(self) -> str:
        return self.bytes(struct.unpack("<Q", self.bytes(8))[0]).decode()

    def value(self, kind: int) -> Any:
        """A metadata value: a number, a string, or a list of such."""
        if kind == _STRING:
            return self.string()
        if kind != _ARRAY:
            if kind not in _NUMBERS:
                raise ValueError(f"a metadata value of the unknown type {kind}")
            return self.number(_NUMBERS[kind])
        kind, count = self.number("<u4"), self.number("<u8")
        if kind in _NUMBERS:
            dtype = np.dtype(_NUMBERS[kind])
            return np.frombuffer(self.bytes(count * dtype.itemsize), dtype).tolist()
        return [self.value(kind) for _ in range(count)]
