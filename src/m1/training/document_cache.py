"""Tokenised data on disk: made once for a content, a tokenizer and its template, then mapped into memory by every run and rank.

A cache entry is a directory named by the hash of everything that decides its contents, so a changed file, template or
option is another entry and an entry is never stale. Rows stream through the tokenizer: a corpus need not fit into memory.
Any entry, or the whole cache, can be deleted between runs.
"""

import hashlib
import json
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, overload

import numpy as np
from transformers import PreTrainedTokenizerBase

from m1.storage import new_directory, write_json
from m1.training.packing import Document

# Raise it when the same rows become other tokens, so that older entries are not taken for newer ones.
_FORMAT = 1
_FACTS = "facts.json"
_FILES = {"token_ids": np.int32, "is_target": np.bool_, "ends": np.int64}


class CachedDocuments(Sequence[Document]):
    """The documents of a cache entry; each is a view of the mapped files. `facts`: rows, documents, tokens, targets."""

    def __init__(self, path: Path) -> None:
        self.facts: dict[str, int] = json.loads((path / _FACTS).read_text(encoding="utf-8"))
        arrays = {}
        for name, dtype in _FILES.items():
            file = path / name
            expected = self.facts["documents" if name == "ends" else "tokens"] * np.dtype(dtype).itemsize
            if file.stat().st_size != expected:
                raise ValueError(f"{file}: {file.stat().st_size} bytes, expected {expected}; delete {path}, it is made anew")
            arrays[name] = np.memmap(file, dtype=dtype, mode="r")
        self._token_ids, self._is_target = arrays["token_ids"], arrays["is_target"]
        self._bounds = np.concatenate([[0], arrays["ends"]])

    def __len__(self) -> int:
        return len(self._bounds) - 1

    @overload
    def __getitem__(self, index: int) -> Document: ...
    @overload
    def __getitem__(self, index: slice) -> list[Document]: ...
    def __getitem__(self, index: int | slice) -> Document | list[Document]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        if not -len(self) <= index < len(self):
            raise IndexError(index)
        start, end = self._bounds[index % len(self) :][:2]
        return Document(self._token_ids[start:end], self._is_target[start:end])


def cache_directory(configured: str) -> Path:
    """Where entries are: the directory given, else M1_CACHE of the environment, else ~/.cache/m1."""
    return Path(configured or os.environ.get("M1_CACHE") or "~/.cache/m1").expanduser() / "documents"


def cache_key(tokenizer: PreTrainedTokenizerBase, **decides: Any) -> str:
    """Hash of the tokenizer, its template, and whatever else decides what the documents are (plain JSON)."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    vocabulary = backend.to_str() if backend is not None else json.dumps(sorted(tokenizer.get_vocab().items()))
    facts = {
        "format": _FORMAT,
        "tokenizer": hashlib.sha256(vocabulary.encode()).hexdigest(),
        "template": tokenizer.chat_template,
        "special": [tokenizer.bos_token_id, tokenizer.eos_token_id],
        **decides,
    }
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:32]


def write_documents(path: Path, documents: Iterable[Document]) -> None:
    """Make the entry `path` out of documents as they come. Raises OSError for a full disk, and then leaves nothing."""
    counts = dict.fromkeys(("documents", "tokens", "targets"), 0)
    with new_directory(path, overwrite=True) as new:
        with (new / "token_ids").open("wb") as ids, (new / "is_target").open("wb") as flags, (new / "ends").open("wb") as ends:
            for document in documents:
                counts["documents"] += 1
                counts["tokens"] += len(document.token_ids)
                counts["targets"] += document.num_targets
                ids.write(document.token_ids.astype(np.int32).tobytes())
                flags.write(document.is_target.astype(np.bool_).tobytes())
                ends.write(np.int64(counts["tokens"]).tobytes())
        write_json(new / _FACTS, counts)
