"""One `generate` callable over the engines of all ranks that `torchrun` started: samples are drawn by whoever has room.

The first rank's caller asks, the others serve until it is done. They talk through the store of the process group: a call's
requests, a counter from which every rank takes the next piece of one, the samples of the others as they finish, and which
requests are cancelled. Which rank draws a sample has no influence on its tokens, as far as a seed is given.
"""

import pickle
import time
from collections.abc import Callable, Sequence
from datetime import timedelta
from itertools import count
from typing import Any

import torch.distributed as dist

from m1.backends.engine import EngineRun, Piece
from m1.engine.llm import Engine
from m1.evaluation.sampling import Generate, Sample, SampleRequest, Watch

PIECES_A_RANK = 8  # at least: the last ones are what ranks wait for
_POLL_SECONDS = 0.02  # between two looks at what others have written
_PARTING_SECONDS = 60.0  # after which a rank that is dismissed is given up; it may be dead
_ROOM, _CLOSED, _FAILED, _LEFT = "room", "closed", "failed", "left"


class Board:
    """What the ranks write for each other, by name: values, counters, and lists that only grow."""

    def __init__(self) -> None:
        self._store = dist.PrefixStore("m1/sampling", dist.distributed_c10d._get_default_store())
        self._store.set_timeout(timedelta(seconds=60))  # for what is known to be written at this moment

    def put(self, name: str, value: Any) -> None:
        self._store.set(name, pickle.dumps(value))  # type: ignore[arg-type]  # bytes are fine

    def get(self, name: str) -> Any:
        return pickle.loads(self._store.get(name))

    def has(self, name: str) -> bool:
        return self._store.check([name])

    def take(self, name: str) -> int:
        """The next number of a counter, from 0 on; no two ranks get the same."""
        return self._store.add(name, 1) - 1

    def append(self, name: str, value: Any) -> None:
        self.put(f"{name}/{self.take(f'{name}/length')}", value)

    def after(self, name: str, num_seen: int) -> list[Any]:
        """What a list has beyond its first `num_seen` entries."""
        return [self.get(f"{name}/{index}") for index in range(num_seen, self.length(name))]

    def length(self, name: str) -> int:
        return self._store.add(f"{name}/length", 0)


def announce(max_model_len: int | None) -> None:
    """On the first rank, before it loads its engine: how much room those of the others need; they load theirs meanwhile."""
    Board().put(_ROOM, max_model_len)


def shared_backend(engine: Engine) -> Generate:
    """On the first rank: samples by the engines of all ranks, of which the others are in `serve` until they are dismissed.

    Raises RuntimeError when another rank has failed.
    """
    board = Board()
    calls = count()

    def generate(requests: Sequence[SampleRequest], watch: Watch) -> list[list[Sample]]:
        call = f"call {next(calls)}"
        board.put(f"{call}/requests", list(requests))
        caller = _Caller(board, call, requests, watch)
        run = caller.run = _run_of(engine, board, call, requests, caller)
        try:
            run.sample()
            while caller.is_waiting and not caller.is_over(run.num_tokens):  # for what others draw
                time.sleep(_POLL_SECONDS)
        finally:
            run.abort()
            board.put(f"{call}/over", True)
        return [sorted(own + other, key=lambda one: one.index) for own, other in zip(run.samples, caller.samples, strict=True)]

    return generate


def dismiss() -> None:
    """On the first rank, when it asks for nothing more, or has failed: the others return from `serve`, and it waits for that,
    since the store may end with it."""
    board = Board()
    board.put(_CLOSED, True)
    end = time.monotonic() + _PARTING_SECONDS
    while board.length(_LEFT) < dist.get_world_size() - 1 and time.monotonic() < end:
        time.sleep(_POLL_SECONDS)


def serve(open_engine: Callable[[int | None], Engine]) -> None:
    """On every rank but the first: sample for its calls, until it dismisses. A failure is told to it, and raised.

    open_engine: of the `max_model_len` that the first rank announces.
    """
    board = Board()
    try:
        while not board.has(_ROOM):
            if board.has(_CLOSED):
                return
            time.sleep(_POLL_SECONDS)
        engine = open_engine(board.get(_ROOM))
        for number in count():
            call = f"call {number}"
            while not board.has(f"{call}/requests"):
                if board.has(_CLOSED):
                    return
                time.sleep(_POLL_SECONDS)
            server = _Server(board, call)
            server.run = _run_of(engine, board, call, board.get(f"{call}/requests"), server)
            try:
                server.run.sample()
            finally:
                server.run.abort()
            server.send(server.run.num_tokens)
    except Exception as error:
        board.append(_FAILED, f"rank {dist.get_rank()}: {type(error).__name__}: {error}")
        raise
    finally:
        board.append(_LEFT, dist.get_rank())


def _run_of(
    engine: Engine, board: Board, call: str, requests: Sequence[SampleRequest], watch: "_Caller | _Server"
) -> EngineRun:
    """This rank's part of a call: it holds no more than its share of all samples at a time, nor more than it can run."""
    total = sum(request.n for request in requests)
    share = -(-total // dist.get_world_size())
    pieces = cut(requests, max(1, share // PIECES_A_RANK))

    def take() -> Piece | None:
        while (number := board.take(f"{call}/next")) < len(pieces):
            if pieces[number].index not in watch.left:
                return pieces[number]
        return None

    return EngineRun(engine, requests, watch, take, num_ahead=min(share, engine.capacity.max_num_seqs))


def cut(requests: Sequence[SampleRequest], most: int) -> list[Piece]:
    """Pieces of at most `most` samples, in order."""
    return [
        Piece(index, first, min(most, request.n - first))
        for index, request in enumerate(requests)
        for first in range(0, request.n, most)
    ]


class _Caller(Watch):
    """The first rank's watch: also hears what the others have sampled, and tells them what is cancelled."""

    run: EngineRun

    def __init__(self, board: Board, call: str, requests: Sequence[SampleRequest], watch: Watch) -> None:
        self.board, self.call, self.watch = board, call, watch
        self.samples: list[list[Sample]] = [[] for _ in requests]
        self._wanted = {index: request.n for index, request in enumerate(requests)}  # samples of unfinished requests
        self.left: set[int] = set()  # requests that were cancelled
        self._num_heard = 0
        self._num_tokens: dict[int, int] = {}  # of the other ranks, by rank
        self._last_look = 0.0

    def on_sample(self, request: int, sample: Sample) -> bool:
        self._wanted[request] -= 1
        is_cancelled = self.watch.on_sample(request, sample)
        if is_cancelled:
            self.board.append(f"{self.call}/cancelled", request)
            self.left.add(request)
        if is_cancelled or not self._wanted[request]:
            del self._wanted[request]
        return is_cancelled

    def is_over(self, num_tokens: int) -> bool:
        if time.monotonic() - self._last_look > _POLL_SECONDS:
            self._listen()
            self._last_look = time.monotonic()
        return self.watch.is_over(num_tokens + sum(self._num_tokens.values()))

    @property
    def is_waiting(self) -> bool:
        """Whether samples are missing."""
        return bool(self._wanted)

    def _listen(self) -> None:
        for failure in self.board.after(_FAILED, 0):
            raise RuntimeError(f"sampling failed on {failure}")
        news = self.board.after(f"{self.call}/samples", self._num_heard)
        self._num_heard += len(news)
        for rank, num_tokens, found in news:
            self._num_tokens[rank] = num_tokens
            for index, sample in found:
                if index not in self._wanted:
                    continue  # it was cancelled while this was on its way
                self.samples[index].append(sample)
                if self.on_sample(index, sample):
                    self.run.cancel(index)


class _Server(Watch):
    """Another rank's watch: sends what finishes to the first, and hears from it what to leave."""

    run: EngineRun

    def __init__(self, board: Board, call: str) -> None:
        self.board, self.call = board, call
        self._found: list[tuple[int, Sample]] = []
        self.left: set[int] = set()  # requests that were cancelled
        self._num_cancelled, self._last_look = 0, 0.0

    def on_sample(self, request: int, sample: Sample) -> bool:
        self._found.append((request, sample))
        return False

    def is_over(self, num_tokens: int) -> bool:
        if time.monotonic() - self._last_look < _POLL_SECONDS:
            return False
        self._last_look = time.monotonic()
        self.send(num_tokens)
        cancelled = self.board.after(f"{self.call}/cancelled", self._num_cancelled)
        self._num_cancelled += len(cancelled)
        self.left.update(cancelled)
        for index in cancelled:
            self.run.cancel(index)
        return self.board.has(f"{self.call}/over")

    def send(self, num_tokens: int) -> None:
        self.board.append(f"{self.call}/samples", (dist.get_rank(), num_tokens, self._found))
        self._found = []
