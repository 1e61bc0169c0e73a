"""Records files: whatever a kill leaves of one, what was whole is read, and the rest is written after it."""

import gzip
import random

import pytest

from m1.evaluation.records import open_records, read_records

RUN = {"num_problems": 5, "params": {"temperature": 0.7}}
RECORDS = [
    {"id": f"p{index}", "labels": [0], "samples": [{"text": "line\nof a sample\u2028" * (index + 1), "reward": 1.0}]}
    for index in range(4)
]


def write(path, records):
    with open_records(path, RUN) as file:
        for record in records:
            if record["id"] not in file.records:
                file.append(record)


@pytest.mark.parametrize("name", ["records.jsonl", "records.jsonl.gz"])
def test_a_file_cut_anywhere_is_continued(tmp_path, name):
    write(tmp_path / name, RECORDS)
    content = (tmp_path / name).read_bytes()
    assert read_records(tmp_path / name) == (RUN, RECORDS)
    cuts = [0, 1, len(content) - 1, *random.Random(0).sample(range(len(content)), 40)]
    for cut in cuts:
        path = tmp_path / f"{cut}-{name}"
        path.write_bytes(content[:cut])
        run, found = read_records(path)
        assert run in ({}, RUN)
        assert found == RECORDS[: len(found)]
        assert len(found) < len(RECORDS)
        write(path, RECORDS)
        assert read_records(path) == (RUN, RECORDS)
        assert path.read_bytes() == content


def test_other_tools_read_what_is_compressed(tmp_path):
    path = tmp_path / "records.jsonl.gz"
    write(path, RECORDS)
    with gzip.open(path, "rt", encoding="utf-8") as lines:
        assert len(lines.read().splitlines(keepends=False)) >= len(RECORDS) + 1
    plain = tmp_path / "records.jsonl"
    write(plain, RECORDS)
    assert gzip.decompress(path.read_bytes()) == plain.read_bytes()


def test_a_file_compressed_as_one_is_read_and_appended_to(tmp_path):
    write(tmp_path / "records.jsonl.gz", RECORDS[:3])
    whole = gzip.decompress((tmp_path / "records.jsonl.gz").read_bytes())
    path = tmp_path / "one.jsonl.gz"
    path.write_bytes(gzip.compress(whole))
    assert read_records(path) == (RUN, RECORDS[:3])
    write(path, RECORDS)
    assert read_records(path) == (RUN, RECORDS)


def test_texts_are_not_kept_in_memory(tmp_path):
    path = tmp_path / "records.jsonl.gz"
    with open_records(path, RUN) as file:
        file.append(RECORDS[0])
        assert file.records["p0"]["samples"] == [{"reward": 1.0}]
    with open_records(path, RUN) as file:
        assert file.records["p0"]["samples"] == [{"reward": 1.0}]
    assert read_records(path, with_texts=False)[1][0]["samples"] == [{"reward": 1.0}]


def test_a_record_is_not_written_twice(tmp_path):
    with open_records(tmp_path / "records.jsonl", RUN) as file:
        file.append(RECORDS[0])
        with pytest.raises(AssertionError):
            file.append(RECORDS[0])
