"""The teacher on disk: its distributions at the targets of each document, written once and memory-mapped after that.

Documents are found by a hash of their tokens and targets, so that neither their order nor their packing matters, and runs
share a cache, also at the same time. A directory holds, beside cache.json, for every process that wrote:

    ids-N.bin, log_probs-N.bin, tails-N.bin    rows, one a target token
    index-N.bin                                hash, first row and number of rows of each document

Rows are written before the index, so what a kill cuts off was never there.
"""

import fcntl
import hashlib
import itertools
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from torch import Tensor

from m1.distributed import barrier, is_first, num_ranks, rank
from m1.modeling import M1Config, M1ForCausalLM
from m1.storage import require_disk, write_json
from m1.training.loop import autocast
from m1.training.losses import head_loss, target_states
from m1.training.packing import AnnotatedBatch, Document, PackedBatch
from m1.training.top_k import TopK, TopKRecorder

DESCRIPTION = "cache.json"
_ENTRY = np.dtype([("hash", "V16"), ("first", "<i8"), ("count", "<i8")])
_PARTS = ("ids", "log_probs", "tails")


@dataclass(frozen=True)
class CachedBatch(AnnotatedBatch):
    """A `loop.Batch` with what the teacher says at its targets."""

    teacher: TopK

    def to(self, device: torch.device) -> "CachedBatch":
        return CachedBatch(self.packed.to(device), self.teacher.to(device))

    def tensors(self) -> dict[str, Tensor]:
        return self.packed.tensors() | {"teacher_" + name: tensor for name, tensor in vars(self.teacher).items()}


class _Rows:
    """One process's files, memory-mapped for reading."""

    def __init__(self, directory: Path, number: int, k: int, dtype: np.dtype) -> None:
        self.paths = {part: directory / f"{part}-{number:05d}.bin" for part in (*_PARTS, "index")}
        self.types = {"ids": np.dtype(("<i4", k)), "log_probs": np.dtype((dtype, k)), "tails": np.dtype("<f4")}
        self._maps: dict[str, np.ndarray] = {}

    def entries(self) -> np.ndarray:
        """The whole entries of the index whose rows are all there."""
        path = self.paths["index"]
        content = path.read_bytes() if path.is_file() else b""
        entries = np.frombuffer(content[: len(content) // _ENTRY.itemsize * _ENTRY.itemsize], _ENTRY)
        num_rows = min(
            (self.paths[part].stat().st_size // self.types[part].itemsize for part in _PARTS if self.paths[part].is_file()),
            default=0,
        )
        return entries[: np.searchsorted(entries["first"] + entries["count"], num_rows, side="right")]

    def read(self, first: int, count: int) -> list[np.ndarray]:
        if not self._maps or first + count > len(self._maps["tails"]):  # the files have grown
            self._maps = {
                part: np.memmap(self.paths[part], dtype=self.types[part].base, mode="r").reshape(-1, *self.types[part].shape)
                for part in _PARTS
            }
        return [self._maps[part][first : first + count] for part in _PARTS]


class TeacherCache:
    """Looks up and adds what a teacher says; each process writes files of its own and reads those that all had at the start.

    description: what must agree with the cache that is there (teacher, top_k, temperature, vocabulary). dtype: of the kept
    log-probs; float16 errs by at most 2**-11 of their value. Raises ValueError naming what differs.
    """

    def __init__(self, directory: str | Path, description: dict[str, Any], *, dtype: Any = np.float16) -> None:
        self.directory, self.k, self.dtype = Path(directory), int(description["top_k"]), np.dtype(dtype)
        self._describe(description | {"dtype": self.dtype.name})
        self._places: dict[bytes, tuple[int, int, int]] = {}  # hash -> whose files, first row, number of rows
        self._rows: dict[int, _Rows] = {}
        barrier()  # every rank reads what all had before this run
        for path in sorted(self.directory.glob("index-*.bin")):
            self._open(int(path.stem.removeprefix("index-")))
        barrier()
        self._number, self._num_rows = rank(), 0
        self._files = self._open_for_writing()

    def _describe(self, description: dict[str, Any]) -> None:
        path = self.directory / DESCRIPTION
        if is_first() and not path.is_file():
            self.directory.mkdir(parents=True, exist_ok=True)
            if any(self.directory.iterdir()):
                raise ValueError(f"--teacher-cache {self.directory}: exists and is no teacher's cache; give another directory")
            write_json(path, description)
        barrier()
        found = json.loads(path.read_text(encoding="utf-8"))
        for key in sorted(description):
            if found.get(key) != description[key]:
                raise ValueError(
                    f"--teacher-cache {self.directory}: made with {key} {found.get(key)}, not {description[key]}; give another "
                    "directory"
                )

    def _open(self, number: int) -> _Rows:
        rows = self._rows[number] = _Rows(self.directory, number, self.k, self.dtype)
        for entry in rows.entries():
            self._places[entry["hash"].tobytes()] = (number, int(entry["first"]), int(entry["count"]))
        return rows

    def _open_for_writing(self) -> dict[str, IO[bytes]]:
        """Files that no other process writes, at their ends; what a kill left half-written there is cut off."""
        while not _is_locked(index := (self.directory / f"index-{self._number:05d}.bin").open("ab")):
            index.close()
            self._number += num_ranks()
        rows = self._open(self._number)
        entries = rows.entries()
        self._num_rows = int(entries[-1]["first"] + entries[-1]["count"]) if len(entries) else 0
        files: dict[str, IO[bytes]] = {part: rows.paths[part].open("ab") for part in _PARTS}
        for part in _PARTS:
            files[part].truncate(self._num_rows * rows.types[part].itemsize)
        index.truncate(len(entries) * _ENTRY.itemsize)
        return files | {"index": index}

    def num_missing(self, documents: Sequence[Document]) -> int:
        """Target tokens of the documents that are not here."""
        return sum(document.num_targets for document in documents if hash_of(document) not in self._places)

    def look_up(self, batch: PackedBatch) -> TopK | None:
        """What the teacher says at the batch's targets, in their order; None if one of its documents is not here."""
        places = [self._places.get(hash_) for hash_ in hashes_of(batch)]
        found = [self._rows[place[0]].read(*place[1:]) for place in places if place is not None]
        if len(found) < len(places):
            return None
        ids, log_probs, tails = (torch.from_numpy(np.concatenate(parts)) for parts in zip(*found, strict=True))
        return TopK(ids, log_probs, tails)

    def add(self, batch: PackedBatch, said: TopK) -> None:
        """Keep what the teacher said at the batch's targets. Raises OSError for a full disk; what was there before stands."""
        bounds = np.cumsum([0, *_targets_of_documents(batch)])
        values = dict(zip(_PARTS, (said.ids, said.log_probs, said.log_tail)))
        entries = []
        for hash_, (first, end) in zip(hashes_of(batch), itertools.pairwise(bounds.tolist()), strict=True):
            if hash_ in self._places:
                continue
            for part, tensor in values.items():
                kind = self._rows[self._number].types[part].base
                self._files[part].write(tensor[first:end].cpu().numpy().astype(kind).tobytes())
            entries.append((hash_, self._num_rows, end - first))
            self._places[hash_] = (self._number, self._num_rows, end - first)
            self._num_rows += end - first
        for part in _PARTS:
            self._files[part].flush()
        self._files["index"].write(np.array(entries, dtype=_ENTRY).tobytes())
        self._files["index"].flush()


class CachedTeacher:
    """A teacher that is asked once about each document: loaded when the cache lacks one for the first time."""

    def __init__(
        self, load: Callable[[], M1ForCausalLM], config: M1Config, cache: TeacherCache, *, temperature: float, precision: str
    ) -> None:
        self.load, self.config, self.cache = load, config, cache
        self.temperature, self.precision = temperature, precision
        self._model: M1ForCausalLM | None = None

    def say(self, batch: PackedBatch) -> CachedBatch:
        """The batch with what the teacher says, as it is kept: the same the first time and later."""
        said = self.cache.look_up(batch)
        if said is None:
            self.cache.add(batch, self._ask(batch))
            said = self.cache.look_up(batch)
            assert said is not None, "what was just added is there"
        return CachedBatch(batch, said)

    @torch.no_grad()
    def _ask(self, batch: PackedBatch) -> TopK:
        if self._model is None:
            self._model = self.load().eval()
        batch = batch.to(self._model.device)
        recorder = TopKRecorder(batch.num_targets, self.cache.k, self.temperature, self._model.device)
        with autocast(self.precision, self._model.device):
            head_loss(recorder, target_states(self._model, batch))
        return recorder.found

    def require_disk(self, documents: Sequence[Document]) -> None:
        """OSError unless there is room for what the documents will add."""
        bytes_a_token = self.cache.k * (4 + self.cache.dtype.itemsize) + 4
        require_disk(self.cache.directory, self.cache.num_missing(documents) * bytes_a_token, "the teacher's cache")


def _is_locked(file: IO[bytes]) -> bool:
    """Lock a file for this process; False if another has it."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def hash_of(document: Document) -> bytes:
    """A hash of a document's tokens and targets; the first token never is one."""
    is_target = document.is_target.copy()
    is_target[:1] = False
    return _hash(document.token_ids, is_target)


def hashes_of(batch: PackedBatch) -> list[bytes]:
    """The hash of each document of a batch, in their order; the batch is on the host."""
    is_target = np.zeros(batch.num_tokens, dtype=bool)
    is_target[batch.target_positions.numpy() + 1] = True
    ids = batch.input_ids.numpy()
    return [_hash(ids[a:b], is_target[a:b]) for a, b in itertools.pairwise(batch.layout.cu_seqlens.tolist())]


def _hash(ids: np.ndarray, is_target: np.ndarray) -> bytes:
    content = ids.astype("<i4").tobytes() + is_target.astype(np.bool_).tobytes()
    return hashlib.blake2b(content, digest_size=16).digest()


def _targets_of_documents(batch: PackedBatch) -> list[int]:
    """How many targets each document has."""
    bounds = np.searchsorted(batch.target_positions.numpy() + 1, batch.layout.cu_seqlens.numpy())
    return np.diff(bounds).tolist()
