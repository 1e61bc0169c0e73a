"""Blocks of JSON lines: what a kill, a full disk or a second writer can do to a file, and what every gzip reader sees."""

import errno
import gzip
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from m1.json_lines import BlockWriter, numbered_lines, read_blocks

BLOCKS = [[{"id": "a", "text": "é\n\u2028"}], [{"id": "b"}, {"id": "c", "n": [1, 2]}], [{"id": "d"}]]


def write(path, blocks):
    with BlockWriter(path) as writer:
        for block in blocks:
            writer.append(block)


def test_blocks_are_one_gzip_file_of_lines(tmp_path):
    path = tmp_path / "rows.jsonl.gz"
    write(path, BLOCKS)
    rows = [row for block in BLOCKS for row in block]
    assert [json.loads(line) for line in gzip.decompress(path.read_bytes()).decode().split("\n")[:-1]] == rows
    assert read_blocks(path) == (rows, path.stat().st_size)
    assert [(number, json.loads(line)) for number, line in numbered_lines(path)] == list(enumerate(rows, start=1))


@settings(max_examples=40, deadline=None)
@given(share=st.floats(0, 1), sizes=st.lists(st.integers(1, 5), min_size=1, max_size=4))
def test_wherever_a_kill_cuts_the_file_whole_blocks_stay(tmp_path_factory, share, sizes):
    path = tmp_path_factory.mktemp("cut") / "rows.jsonl.gz"
    blocks = [[{"block": number, "row": row} for row in range(size)] for number, size in enumerate(sizes)]
    ends = [0]
    with BlockWriter(path) as writer:
        for block in blocks:
            writer.append(block)
            ends.append(path.stat().st_size)
    cut = int(share * ends[-1])
    path.write_bytes(path.read_bytes()[:cut])
    kept = max(number for number, end in enumerate(ends) if end <= cut)
    with BlockWriter(path) as writer:
        assert writer.rows == [row for block in blocks[:kept] for row in block]
        for block in blocks[kept:]:
            writer.append(block)
    assert read_blocks(path)[0] == [row for block in blocks for row in block]


def test_a_full_disk_leaves_the_file_as_it_was(tmp_path, monkeypatch):
    path = tmp_path / "rows.jsonl.gz"
    write(path, BLOCKS[:1])
    before = path.read_bytes()

    def full(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    with BlockWriter(path) as writer:
        monkeypatch.setattr("m1.json_lines.os.fsync", full)
        with pytest.raises(OSError, match=r"rows.jsonl.gz: can't write .* bytes \(No space left.*run the same command again"):
            writer.append(BLOCKS[1])
    assert path.read_bytes() == before


def test_one_writer_at_a_time(tmp_path):
    with BlockWriter(tmp_path / "rows.jsonl.gz"), pytest.raises(ValueError, match="being written by another process"):
        BlockWriter(tmp_path / "rows.jsonl.gz")


def test_damage_is_not_taken_for_a_kill(tmp_path):
    path = tmp_path / "rows.jsonl.gz"
    write(path, BLOCKS)
    content = bytearray(path.read_bytes())
    content[30] ^= 255
    path.write_bytes(content)
    with pytest.raises(ValueError, match="damaged after 0 bytes"):
        BlockWriter(path)
    with pytest.raises(ValueError, match="damaged or was not finished"):
        list(numbered_lines(path))


def test_a_torn_file_is_no_data(tmp_path):
    path = tmp_path / "rows.jsonl.gz"
    write(path, BLOCKS)
    path.write_bytes(path.read_bytes()[:-3])
    with pytest.raises(ValueError, match="was not finished"):
        list(numbered_lines(path))
