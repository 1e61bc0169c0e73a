"""The engine of this project as a `generate` callable."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from m1.engine.llm import Engine
from m1.engine.sampling_params import SamplingParams
from m1.engine.sequence import Completion, Request
from m1.evaluation.sampling import Generate, Sample, SampleRequest, Watch, confidences


def engine_backend(engine: Engine) -> Generate:
    """Samples from `engine`, which nobody else may use meanwhile. `params` of a request are `SamplingParams` fields but n.

    Requests are handed over as places become free, so the engine stays full without holding everything. A cancelled request
    ends before the next step; times are taken after the step in which a sample ended.
    """

    def generate(requests: Sequence[SampleRequest], watch: Watch) -> list[list[Sample]]:
        pieces = iter([Piece(index, 0, request.n) for index, request in enumerate(requests)])
        most = 2 * engine.capacity.max_num_seqs
        run = EngineRun(engine, requests, watch, lambda: next(pieces, None), num_ahead=most)
        try:
            run.sample()
        finally:  # nothing stays in the engine when the watch ends it, a step fails or the user interrupts
            run.abort()
        return [sorted(samples, key=lambda one: one.index) for samples in run.samples]

    return generate


@dataclass(frozen=True)
class Piece:
    """`count` samples of requests[index] from number `first` on."""

    index: int
    first: int
    count: int


@dataclass
class _Open:
    """A piece in the engine, and how many of its samples have not been heard of."""

    piece: Piece
    request: Request
    num_left: int


class EngineRun:
    """One call: what of its requests is in the engine, and the samples so far, by request.

    take: the next piece to sample here, None when there is no more; called while fewer than num_ahead samples are unfinished.
    """

    def __init__(
        self,
        engine: Engine,
        requests: Sequence[SampleRequest],
        watch: Watch,
        take: Callable[[], Piece | None],
        num_ahead: int,
    ) -> None:
        self.engine, self.requests, self.watch = engine, requests, watch
        self.samples: list[list[Sample]] = [[] for _ in requests]
        self._take, self._num_ahead, self._is_left = take, num_ahead, True
        self._open: dict[int, _Open] = {}  # by number in the engine
        self._num_unfinished = 0  # samples of open pieces
        self._num_before = engine.metrics.num_generated_tokens
        self._seconds_start = time.perf_counter()

    @property
    def num_tokens(self) -> int:
        return self.engine.metrics.num_generated_tokens - self._num_before

    def sample(self) -> None:
        """Step until everything is sampled or the watch ends it."""
        while True:
            self._submit()
            if not self._open or self.watch.is_over(self.num_tokens):
                return
            for request, completion in self.engine.step():
                if request.error is not None:
                    raise request.error
                if request.number in self._open:
                    self._hear(self._open[request.number], completion)

    def cancel(self, index: int) -> None:
        """Leave what is unfinished of a request."""
        for entry in list(self._open.values()):
            if entry.piece.index == index:
                self._leave(entry)

    def abort(self) -> None:
        """Leave everything that is unfinished."""
        for entry in list(self._open.values()):
            self._leave(entry)

    def _submit(self) -> None:
        while self._is_left and self._num_unfinished < self._num_ahead:
            piece = self._take()
            if piece is None:
                self._is_left = False
                return
            asked = self.requests[piece.index]
            try:
                params = SamplingParams(n=piece.count, **asked.params)
                request = self.engine.submit(asked.prompt, params, first_sample=piece.first)
            except ValueError as error:
                raise ValueError(f"requests[{piece.index}]: {error}") from error
            self._open[request.number] = _Open(piece, request, piece.count)
            self._num_unfinished += piece.count

    def _hear(self, entry: _Open, completion: Completion) -> None:
        index = entry.piece.index
        sample = self._to_sample(completion, entry.piece.first)
        self.samples[index].append(sample)
        entry.num_left -= 1
        self._num_unfinished -= 1
        if self.watch.on_sample(index, sample):
            self.cancel(index)
        elif not entry.num_left:
            self._leave(entry)

    def _leave(self, entry: _Open) -> None:
        del self._open[entry.request.number]
        self._num_unfinished -= entry.num_left
        self.engine.abort(entry.request)

    def _to_sample(self, completion: Completion, first: int) -> Sample:
        mean_logprob, tail_logprob = confidences(completion.logprobs)
        return Sample(
            text=completion.text,
            num_tokens=len(completion.token_ids),
            finish_reason=completion.finish_reason,
            mean_logprob=mean_logprob,
            tail_logprob=tail_logprob,
            index=first + completion.index,
            seconds=time.perf_counter() - self._seconds_start,
            tokens_spent=self.num_tokens,
        )
