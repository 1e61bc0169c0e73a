"""What benchmarks/training.py times: packed text as it is at hand, the data of `m1 distill`, or random tokens."""

import gzip
import json
import sys
from pathlib import Path

import pytest
import torch

from m1.training.packing import Document

sys.path.append(str(Path(__file__).parent.parent / "benchmarks"))
import training
import training_text

SIZES = {"vocab_size": 5000, "num_tokens": 20_000, "max_length": 2048}


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(training_text, "TRAINED_ON", 800)
    training_text._tokenizer.cache_clear()


def total(documents: list[Document]) -> int:
    return sum(len(document.token_ids) for document in documents)


def test_the_text_at_hand_has_the_lengths_that_its_tokenizer_gave():
    documents = training_text.documents_of([], None, **SIZES)
    assert 20_000 <= total(documents) < 20_000 + 1400
    with gzip.open(training_text.COMPLETIONS, "rt", encoding="utf-8") as file:
        records = [json.loads(line) for _, line in zip(range(10), file)][1:]
    samples = [sample for record in records for sample in record["samples"]]
    recorded = [sample["num_tokens"] for sample in samples[: len(documents)]]
    ours = [document.num_targets for document in documents]  # the completion, and its end
    assert len(recorded) == len(ours)
    assert sum(ours) == pytest.approx(sum(recorded), rel=0.1)
    assert all(not document.is_target[0] for document in documents)
    described = training.describe(documents)
    assert described["mean_length"] == pytest.approx(total(documents) / len(documents), abs=0.1)
    assert 0.7 < described["targets"] < 0.95


def test_other_text_and_other_tokenizers(tmp_path):
    path = tmp_path / "sums.jsonl"
    rows = [{"prompt": f"{a} + {b} =", "completion": f" {a + b}"} for a in range(9) for b in range(9)]
    path.write_text("\n".join(map(json.dumps, rows)))
    documents = training_text.documents_of([str(path)], None, **SIZES)
    assert len(documents) == 81  # all there are, though they are fewer tokens than asked for
    with pytest.raises(ValueError, match=r"--tokenizer: it has \d+ tokens, the model 100; name one of this --sizes"):
        training_text.documents_of([str(path)], None, **SIZES | {"vocab_size": 100})


def test_random_tokens():
    documents = training_text.documents_of(["random"], None, **SIZES)
    assert 20_000 <= total(documents) < 20_000 + 2048
    assert max(int(document.token_ids.max()) for document in documents) < 5000
    assert training.describe(documents)["targets"] == pytest.approx(0.8, abs=0.01)


def test_a_case_is_measured(monkeypatch):
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 2}
    monkeypatch.setitem(training.SIZES, "135m", shape | {"vocab_size": 300, "num_key_value_heads": 1, "head_dim": 16})
    monkeypatch.setattr(training, "MAX_LENGTH", 64)
    monkeypatch.setattr(training, "MATRIX_LIMIT", 1e9)
    monkeypatch.setattr(sys, "argv", ["training.py", "--steps", "1", "--tokens-per-batch", "128", "--data", "random"])
    result = training.measure("135m", "mamba2", "distill", 2, "auto", torch.device("cpu"), training.parse())
    assert (result.tokens_per_batch, result.batches, result.num_ranks, result.is_divided) == (128, 2, 1, False)
    assert result.tokens_per_second > 0
    assert 0 < result.matrix_limit_share < 100
    assert result.documents["max_length"] <= 64
