"""The cache of tokenised data: what comes out is what went in, and anything that would change it is another entry."""

import json

import numpy as np
import pytest

from m1.cli import is_users_mistake
from m1.config import SFTConfig
from m1.training import command, data
from m1.training.data import iterate_documents, make_documents
from m1.training.document_cache import CachedDocuments, cache_directory, write_documents
from m1.training.packing import BatchStream
from m1.training.sources import read_rows
from tests.training import tiny

ROWS = [{"prompt": f"{a}+{b}=", "completion": str(a + b)} for a in range(30) for b in range(50)]  # more than are read at once


@pytest.fixture
def config(tmp_path):
    path = tmp_path / "sums.jsonl"
    path.write_text("\n".join(map(json.dumps, ROWS)))
    return SFTConfig(data=[str(path)], cache_dir=str(tmp_path / "cache"), max_length=100, tokens_per_batch=100)


def entries(config):
    return sorted(cache_directory(config.cache_dir).iterdir())


def read(config, tokenizer=None, loss_on="completion"):
    return command.read_documents(config, tokenizer or tiny.byte_tokenizer(), loss_on)


def test_cached_documents_are_the_documents(config):
    documents, words = read(config)
    expected = make_documents(ROWS, tiny.byte_tokenizer(), max_length=100)
    assert len(documents) == len(expected) == 1500
    for mine, theirs in zip(documents, expected, strict=True):
        assert np.array_equal(mine.token_ids, theirs.token_ids)
        assert np.array_equal(mine.is_target, theirs.is_target)
    assert np.array_equal(documents[-1].token_ids, expected[-1].token_ids)
    assert [len(d.token_ids) for d in documents[3:6]] == [len(d.token_ids) for d in expected[3:6]]
    with pytest.raises(IndexError):
        documents[1500]
    tokens, targets = sum(len(d.token_ids) for d in expected), sum(d.num_targets for d in expected)
    assert f"1,500 documents, {tokens:,} tokens, {targets:,} of them targets" in words
    of_cache, of_memory = BatchStream(documents, 100, seed=3), BatchStream(expected, 100, seed=3)
    for _ in range(5):
        assert of_cache.next_batches(1)[0].input_ids.tolist() == of_memory.next_batches(1)[0].input_ids.tolist()
    assert of_cache.state_dict() == of_memory.state_dict()


def test_the_second_run_tokenises_nothing(config, monkeypatch):
    first, _ = read(config)
    monkeypatch.setattr(command, "iterate_rows", lambda *arguments, **options: pytest.fail("read again"))
    second, _ = read(config)
    assert [d.token_ids.tolist() for d in first] == [d.token_ids.tolist() for d in second]


def test_what_changes_the_documents_is_another_entry(config, tmp_path):
    (tmp_path / "sums.jsonl").write_text("\n".join(map(json.dumps, ROWS[:20])))
    read(config)
    other = tiny.byte_tokenizer("{{ '>' }}" + tiny.CHATML)
    more = tiny.byte_tokenizer()
    more.add_tokens(["+1="])
    read(config, other)
    read(config, more)
    read(config, loss_on="all")
    for name, value in {"max_length": 99, "suffix": "!"}.items():
        setattr(config, name, value)
        read(config)
    assert len(entries(config)) == 6
    (tmp_path / "copy.jsonl").write_bytes((tmp_path / "sums.jsonl").read_bytes())
    config.data = [str(tmp_path / "copy.jsonl")]
    read(config)
    assert len(entries(config)) == 6  # the contents count, not the name
    with (tmp_path / "copy.jsonl").open("a") as file:
        file.write('\n{"prompt": "1+1=", "completion": "3"}')
    assert len(read(config)[0]) == 21
    config.data, config.num_problems = ["gym:chain_sum"], 3
    read(config)
    config.seed = 1
    read(config)
    assert len(entries(config)) == 9


def test_bad_data_leaves_no_entry(config, tmp_path):
    with (tmp_path / "sums.jsonl").open("a") as file:
        file.write("\nnonsense")
    with pytest.raises(ValueError, match=r"sums\.jsonl, line 1501: malformed JSON"):
        read(config)
    assert not entries(config)
    config.max_length = 1
    (tmp_path / "sums.jsonl").write_text(json.dumps(ROWS[0]))
    with pytest.raises(ValueError, match="no document has a completion within --max-length 1"):
        read(config)
    assert not entries(config)
    config.data = [str(tmp_path / "nothing.jsonl")]
    with pytest.raises(FileNotFoundError, match="no such data file"):
        read(config)


def test_a_cut_entry_is_told(config):
    read(config)
    (entry,) = entries(config)
    with (entry / "token_ids").open("r+b") as file:
        file.truncate(100)
    with pytest.raises(ValueError, match=r"token_ids: 100 bytes, expected .* it is made anew"):
        read(config)


def test_rows_stream(tmp_path):
    """A document is written before the last row is read."""
    written = []

    def rows():
        yield from ROWS[:1100]
        written.extend(path.stat().st_size for path in tmp_path.glob(".entry*/token_ids"))
        yield ROWS[0]

    write_documents(tmp_path / "entry", iterate_documents(rows(), tiny.byte_tokenizer(), max_length=50))
    assert written[0] > 0
    assert len(CachedDocuments(tmp_path / "entry")) == 1101


def test_several_processes_make_the_same_entry(config, tmp_path, monkeypatch):
    """To the byte, and from the command, too."""
    monkeypatch.setattr(data, "_BLOCKS_OF_SMALL_DATA", 1)
    monkeypatch.setattr(data, "_ROWS_AT_ONCE", 150)
    rows = [row | {"finish_reason": "length" if i % 7 else "stop", "id": i} for i, row in enumerate(ROWS)]
    written = []
    for number in (1, 2):
        documents = iterate_documents(rows, tiny.byte_tokenizer(), max_length=50, num_processes=number)
        write_documents(tmp_path / str(number), documents)
        written.append({path.name: path.read_bytes() for path in (tmp_path / str(number)).iterdir()})
    assert written[0] == written[1]
    assert len(written[0]["ends"]) == 1500 * 8
    monkeypatch.setattr(command, "num_processes_here", lambda: 2)
    read(config)
    (entry,) = entries(config)
    assert np.array_equal(
        CachedDocuments(entry)[1499].token_ids, make_documents(ROWS[-1:], tiny.byte_tokenizer(), max_length=100)[0].token_ids
    )


def test_a_mistake_that_another_process_finds_is_named_as_ever(tmp_path, monkeypatch):
    monkeypatch.setattr(data, "_BLOCKS_OF_SMALL_DATA", 1)
    tokenizer = tiny.byte_tokenizer()
    tokenizer.chat_template = None
    rows = [*ROWS, {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}]
    with pytest.raises(ValueError, match=r"row 1501: 'messages' need a chat template") as caught:
        write_documents(tmp_path / "entry", iterate_documents(rows, tokenizer, max_length=50, num_processes=2))
    assert is_users_mistake(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_all_rows_and_rows_one_by_one_are_the_same(config):
    rows = read_rows(config.data, num_problems=1, seed=0)
    assert [dict(row.fields) for row in rows] == ROWS
