"""`generate` over the engines of two ranks: the samples of one engine, whoever draws them; cancelled, ended early, failing."""

import json
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch.distributed as dist

from m1.backends import engine_backend, ranks
from m1.backends.ranks import announce, dismiss, serve, shared_backend
from m1.engine import Engine
from m1.evaluation.sampling import Sample, SampleRequest, Watch
from tests.engine.models import byte_tokenizer, tiny_engine, tiny_model
from tests.training.ranks import run_ranks

REQUESTS = [
    SampleRequest(f"{i} + 1 =", 1 + i % 3, {"seed": i, "max_tokens": 4 + 3 * (i % 4), "temperature": 1.0}) for i in range(14)
]


class Listening(Watch):
    """Keeps what it hears; cancels a request at its first sample if so asked; is over after some samples."""

    def __init__(self, cancelled: int | None = None, most: int = 1000) -> None:
        self.heard: list[tuple[int, int]] = []
        self.cancelled, self.most, self.num_tokens = cancelled, most, 0

    def on_sample(self, request: int, sample: Sample) -> bool:
        self.heard.append((request, sample.index))
        return request == self.cancelled

    def is_over(self, num_tokens: int) -> bool:
        assert num_tokens >= self.num_tokens
        self.num_tokens = num_tokens
        return len(self.heard) >= self.most


def slow_engine() -> Engine:
    engine = tiny_engine(tiny_model(), tokenizer=byte_tokenizer(), max_num_seqs=3, max_model_len=64)
    step = engine.step

    def step_slowly():  # so that no rank takes everything before the other has begun
        time.sleep(0.01)
        return step()

    engine.step = step_slowly
    return engine


def texts(samples: list[list[Sample]]) -> list[list[str]]:
    return [[sample.text for sample in of_request] for of_request in samples]


def sample_on_a_rank(out: Path) -> None:
    """Runs in each rank's process."""
    engine = slow_engine()
    if dist.get_rank() == 1:
        serve(lambda max_model_len: engine if max_model_len == 64 else None)
        (out / "1.json").write_text(json.dumps(engine.metrics.num_generated_tokens))
        return
    announce(64)
    generate = shared_backend(engine)
    try:
        found = []
        for _ in range(2):
            watch = Listening()
            found.append(texts(generate(REQUESTS, watch)))
            wanted = [(index, number) for index, request in enumerate(REQUESTS) for number in range(request.n)]
            assert sorted(watch.heard) == wanted
        for cancelled in (2, 5, 8, 11):  # of three samples each, on whichever rank they are
            watch = Listening(cancelled)
            samples = generate(REQUESTS, watch)
            assert len(samples[cancelled]) == 1
            assert sum(map(len, samples)) == len(watch.heard) == len(wanted) - 2
        watch = Listening(most=5)
        samples = generate(REQUESTS, watch)
        assert 5 <= sum(map(len, samples)) == len(watch.heard) < len(wanted)
    finally:
        dismiss()
    (out / "0.json").write_text(json.dumps([found, engine.metrics.num_generated_tokens]))


def test_two_ranks_sample_as_one(tmp_path: Path) -> None:
    run_ranks(2, sample_on_a_rank, tmp_path)
    engine = tiny_engine(tiny_model(), tokenizer=byte_tokenizer())
    expected = texts(engine_backend(engine)(REQUESTS, Watch()))
    found, num_tokens = json.loads((tmp_path / "0.json").read_text())
    assert found == [expected] * 2
    assert num_tokens > 0
    assert json.loads((tmp_path / "1.json").read_text()) > engine.metrics.num_generated_tokens / 4


def fail_on_a_rank(out: Path) -> None:
    if dist.get_rank() == 1:
        engine = slow_engine()
        engine.runner.decode = None  # every step fails there
        with pytest.raises(TypeError):
            serve(lambda max_model_len: engine)
        return
    announce(None)
    generate = shared_backend(slow_engine())
    with pytest.raises(RuntimeError, match="sampling failed on rank 1: TypeError"):
        generate(REQUESTS, Watch())
    dismiss()
    (out / "told").touch()


def test_a_rank_that_fails_is_named(tmp_path: Path) -> None:
    run_ranks(2, fail_on_a_rank, tmp_path)
    assert (tmp_path / "told").exists()


def test_requests_are_cut_into_pieces() -> None:
    requests = [SampleRequest("a", 5), SampleRequest("b", 2), SampleRequest("c", 1)]
    expected = [(0, 0, 2), (0, 2, 2), (0, 4, 1), (1, 0, 2), (2, 0, 1)]
    assert [(piece.index, piece.first, piece.count) for piece in ranks.cut(requests, 2)] == expected
    assert [piece.count for piece in ranks.cut(requests, 9)] == [5, 2, 1]


class Lists:
    """A board of one process."""

    def __init__(self) -> None:
        self.lists: dict[str, list] = {}

    def append(self, name: str, value: object) -> None:
        self.lists.setdefault(name, []).append(value)

    def after(self, name: str, num_seen: int) -> list:
        return self.lists.get(name, [])[num_seen:]

    def has(self, name: str) -> bool:
        return name in self.lists


def test_another_rank_leaves_what_is_cancelled_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ranks, "_POLL_SECONDS", 0.0)
    monkeypatch.setattr(dist, "get_rank", lambda: 1)
    board, left = Lists(), []
    server = ranks._Server(board, "call 0")
    server.run = SimpleNamespace(cancel=left.append)
    assert not server.on_sample(4, Sample("a", 1, "stop"))
    board.append("call 0/cancelled", 7)
    assert not server.is_over(10)
    board.append("call 0/cancelled", 9)
    assert not server.is_over(20)
    assert left == [7, 9]
    assert server.left == {7, 9}
    assert [(tokens, [index for index, _ in found]) for _, tokens, found in board.lists["call 0/samples"]] == [
        (10, [4]),
        (20, []),
    ]
    board.append("call 0/over", True)
    assert server.is_over(30)
