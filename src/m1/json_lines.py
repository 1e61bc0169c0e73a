"""JSON lines on disk, plain or gzip: which files a source names, reading them, and appending blocks of rows that a kill can't
leave by half.

A block is one gzip member, so a file is what `zcat` and every gzip reader understand; a torn last member is cut off when the
file is opened for appending again. gzip and not zstd, because Python 3.11 reads and writes it by itself. No torch here.
"""

import fcntl
import gzip
import hashlib
import json
import os
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, cast

from m1.storage import RUN_RECORD

GZIP = ".gz"
TRAIN, HELD_OUT, HELD_OUT_ONE_IN = "train", "held_out", 50
_READ_BYTES = 2**20


@dataclass(frozen=True)
class Files:
    """The files that a source names, which of their rows ("train", "held_out", or None: all), and whether they are samples."""

    paths: list[Path]
    split: str | None
    are_samples: bool = False

    def has(self, row: Mapping[str, Any]) -> bool:
        """Whether the row is one of those meant."""
        return self.split is None or is_held_out(row) == (self.split == HELD_OUT)


def is_file_name(source: str) -> bool:
    """Whether a source means files: they exist, or it looks like a path rather than the name of something else."""
    path = Path(_divide(source)[0])
    return path.exists() or path.suffix in (".jsonl", ".json", GZIP) or path.is_absolute() or source.startswith((".", "~"))


def files_of(source: str) -> Files:
    """The file of that name, or the samples in a directory that `m1 sample` finished; NAME:train and NAME:held_out mean a part.

    Raises FileNotFoundError for what is not there, ValueError for a directory without samples or an unfinished one.
    """
    name, split = _divide(source)
    path = Path(name)
    if path.is_file():
        return Files([path], split)
    if not path.is_dir():
        raise FileNotFoundError(f"{name}: no such data file")
    files = sorted(path.glob("samples-*.jsonl.gz"))
    if not files:
        raise ValueError(f"{name}: expected a file, or a directory that `m1 sample` wrote; this one has no samples")
    if not (path / RUN_RECORD).is_file():
        raise ValueError(f"{name}: `m1 sample` has not finished it; run that command again first")
    return Files(files, split, are_samples=True)


def is_held_out(row: Mapping[str, Any]) -> bool:
    """Whether a row is one of the few (1 in 50) that are for choosing, not for training; all rows of a problem are alike."""
    asked = row.get("problem") or row.get("prompt") or (row.get("messages") or [{}])[0].get("content", "")
    return int.from_bytes(hashlib.blake2b(str(asked).encode(), digest_size=8).digest(), "big") % HELD_OUT_ONE_IN == 0


def _divide(source: str) -> tuple[str, str | None]:
    """Name and split, if there is one."""
    name, _, split = source.rpartition(":")
    return (name, split) if split in (TRAIN, HELD_OUT) and name and not Path(source).exists() else (source, None)


def open_lines(path: str | Path) -> IO[bytes]:
    """A file of lines for reading, decompressed if its name ends in .gz."""
    path = Path(path)
    return cast(IO[bytes], gzip.open(path, "rb")) if path.suffix == GZIP else path.open("rb")


def numbered_lines(path: str | Path) -> Iterator[tuple[int, bytes]]:
    """The lines that are not blank, with their numbers from 1. Raises ValueError for a damaged or unfinished .gz file."""
    with open_lines(path) as lines:
        try:
            for number, line in enumerate(lines, start=1):
                if line.strip():
                    yield number, line.strip()
        except (EOFError, gzip.BadGzipFile, zlib.error) as error:
            raise ValueError(f"{path}: the gzip file is damaged or was not finished ({error}); make it again") from error


class BlockWriter:
    """Appends blocks of rows to a .jsonl.gz file; a context manager that holds the file's lock.

    `rows` are those that the file had when it was opened, a torn last block left out. Raises ValueError for a file that
    another process is writing, or whose middle is damaged.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._file = self.path.open("ab")
        try:
            try:
                fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise ValueError(
                    f"{self.path} is being written by another process; wait for it or give another --out"
                ) from error
            self.rows, self._end = read_blocks(self.path)
            self._file.truncate(self._end)
        except BaseException:
            self._file.close()
            raise

    def __enter__(self) -> "BlockWriter":
        return self

    def __exit__(self, *exception: object) -> None:
        self._file.close()

    def append(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Write rows as one block, on disk when this returns. Raises OSError for a full disk; the file is then as before."""
        if not rows:
            return
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        block = gzip.compress(text.encode(), compresslevel=6, mtime=0)
        try:
            self._file.write(block)
            self._file.flush()
            os.fsync(self._file.fileno())
        except OSError as error:
            self._file.close()  # what is left in its buffer would only fail again
            os.truncate(self.path, self._end)
            raise OSError(
                f"{self.path}: can't write {len(block)} bytes ({error.strerror or error}); what was written before stands. "
                "Make room and run the same command again"
            ) from error
        self._end += len(block)


def read_blocks(path: str | Path) -> tuple[list[dict[str, Any]], int]:
    """The rows of all whole gzip members of a file, and the offset where they end. Raises ValueError for a damaged one."""
    rows: list[dict[str, Any]] = []
    end = 0
    with Path(path).open("rb") as file:
        unread = b""
        while True:
            member, text = zlib.decompressobj(wbits=31), []
            size = 0
            while not member.eof:
                piece = unread or file.read(_READ_BYTES)
                if not piece:
                    return rows, end  # the last member was cut off, or there is none
                try:
                    text.append(member.decompress(piece))
                except zlib.error as error:
                    raise ValueError(f"{path}: damaged after {end} bytes ({error}); remove the file to start anew") from error
                unread = member.unused_data
                size += len(piece) - len(unread)
            end += size
            rows += [json.loads(line) for line in b"".join(text).splitlines()]
