"""The file of an evaluation's records: one JSON line about the run, then one a problem; compressed, appendable, never torn.

A name that ends in .gz is compressed: each line is a gzip member of its own, so that a line can be appended and made durable
without rewriting what stands, and `zcat` reads the whole. A file that was compressed anew as one member, to be kept, is read as
well. What a record holds is the runner's business.
"""

import fcntl
import gzip
import json
import os
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

_START = b'{"run":'
_CHUNK = 1 << 16  # bytes inflated at a time


def read_records(path: str | Path, *, with_texts: bool = True) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The description of the run and the finished problems' records in a records file; a torn last line is left out.

    Without texts, the samples' completions are dropped: they are most of the memory. Raises ValueError naming the file and
    line for a malformed record or one that stands there twice.
    """
    run, records, _ = _read(Path(path), with_texts)
    return run, list(records.values())


class RecordFile:
    """A records file that is open for appending; `records` holds what it has, by problem id, without the texts."""

    def __init__(self, path: Path, descriptor: int, records: dict[str, dict[str, Any]]) -> None:
        self.path, self.records = path, records
        self._descriptor = descriptor

    def append(self, record: Mapping[str, Any]) -> None:
        """Add a problem's record; it is on the disk when this returns."""
        assert record["id"] not in self.records
        self._write(record)
        self.records[record["id"]] = _without_texts(record)

    def _write(self, line: Mapping[str, Any]) -> None:
        content = json.dumps(line).encode() + b"\n"
        if self.path.suffix == ".gz":
            content = gzip.compress(content, mtime=0)
        unsent = memoryview(content)
        while unsent:
            unsent = unsent[os.write(self._descriptor, unsent) :]
        os.fsync(self._descriptor)


@contextmanager
def open_records(path: Path, run: Mapping[str, Any]) -> Iterator[RecordFile]:
    """The records file of `run`, locked against other writers: made, or continued after its last whole line.

    Raises ValueError for records of another run (naming what differs), a file that is being written, or one of another kind.
    """
    run = json.loads(json.dumps(run))
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o644)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ValueError(f"{path} is being written by another evaluation; wait for it or choose another path") from error
        found, records, end = _read(path, with_texts=False)
        if end:
            _require_same_run(path, found, run)
        os.ftruncate(descriptor, end)  # a kill in the middle of a line leaves it torn
        file = RecordFile(path, descriptor, records)
        if not end:
            file._write({"run": run})
        yield file
    finally:
        os.close(descriptor)


def _read(path: Path, with_texts: bool) -> tuple[dict[str, Any], dict[str, dict[str, Any]], int]:
    """The run, the records by problem id, and where in the file the last whole line ends."""
    run: dict[str, Any] = {}
    records: dict[str, dict[str, Any]] = {}
    end = 0
    for number, (line, line_end) in enumerate(_lines(path), start=1):
        if line_end is None:  # torn; nothing comes after it
            if number == 1 and not _START.startswith(line[: len(_START)]):
                raise ValueError(f"{path} exists and holds no records of an evaluation; choose another path")
            break
        end = line_end
        try:
            record = json.loads(line)
            if number == 1:
                run = record["run"]
                continue
            identity = record["id"]
        except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError) as error:
            raise ValueError(f"{path}, line {number}: not a record of an evaluation ({error!r})") from error
        if identity in records:
            raise ValueError(f"{path}, line {number}: the problem {identity!r} has a record already")
        records[identity] = record if with_texts else _without_texts(record)
    return run, records, end


def _lines(path: Path) -> Iterator[tuple[bytes, int | None]]:
    """Each line with the place in the file where it ends; None for the last one if it is torn."""
    content = memoryview(path.read_bytes())
    end = 0
    while end < len(content):
        text, next_end = _inflate(path, content, end) if path.suffix == ".gz" else _split(content, end)
        if next_end is None:
            yield text, None
            return
        for line in text.splitlines():  # of a member that is whole, all lines are
            yield line, next_end
        end = next_end


def _split(content: memoryview, start: int) -> tuple[bytes, int | None]:
    newline = content.obj.find(b"\n", start)  # type: ignore[attr-defined]  # of the bytes underneath
    return (bytes(content[start:newline]), newline + 1) if newline >= 0 else (bytes(content[start:]), None)


def _inflate(path: Path, content: memoryview, start: int) -> tuple[bytes, int | None]:
    member, position, text = zlib.decompressobj(wbits=31), start, bytearray()
    try:
        while not member.eof and position < len(content):
            chunk = content[position : position + _CHUNK]
            text += member.decompress(chunk)
            position += len(chunk)
    except zlib.error as error:
        raise ValueError(
            f"{path} holds no records of an evaluation from byte {start} on ({error}); choose another path"
        ) from error
    return bytes(text), position - len(member.unused_data) if member.eof else None


def _without_texts(record: Mapping[str, Any]) -> dict[str, Any]:
    samples = record.get("samples", ())
    return {**record, "samples": [{key: value for key, value in sample.items() if key != "text"} for sample in samples]}


def _require_same_run(path: Path, found: Mapping[str, Any], run: Mapping[str, Any]) -> None:
    for key, value in run.items():
        if found.get(key) != value:
            what = "problems or prompts" if key == "digest" else key
            raise ValueError(
                f"{path} holds records of another run: {what} differ (there {found.get(key)}, now {value}); "
                "give another --out, or --overwrite to start anew"
            )
