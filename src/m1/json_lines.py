"""JSON lines on disk, plain or gzip: reading either, and appending blocks of rows that a kill can't leave by half.

A block is one gzip member, so a file is what `zcat` and every gzip reader understand; a torn last member is cut off when the
file is opened for appending again. gzip and not zstd, because Python 3.11 reads and writes it by itself. No torch here.
"""

import fcntl
import gzip
import json
import os
import zlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any, cast

GZIP = ".gz"
_READ_BYTES = 2**20


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
