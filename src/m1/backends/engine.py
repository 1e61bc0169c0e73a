"""The engine of this project as a `generate` callable."""

import time
from collections.abc import Callable, Sequence

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
        indices = iter(range(len(requests)))
        most = 2 * engine.capacity.max_num_seqs
        run = EngineRun(engine, requests, watch, lambda: next(indices, None), num_ahead=most)
        try:
            run.sample()
        finally:  # nothing stays in the engine when the watch ends it, a step fails or the user interrupts
            run.abort()
        return [sorted(samples, key=lambda one: one.index) for samples in run.samples]

    return generate


class EngineRun:
    """One call: which requests are in the engine, and the samples so far, by request.

    take: the index of the next request to sample here, None when there is no more; called while fewer than num_ahead samples
    are unfinished. taken: those that it gave.
    """

    def __init__(
        self,
        engine: Engine,
        requests: Sequence[SampleRequest],
        watch: Watch,
        take: Callable[[], int | None],
        num_ahead: int,
    ) -> None:
        self.engine, self.requests, self.watch = engine, requests, watch
        self.samples: list[list[Sample]] = [[] for _ in requests]
        self.taken: set[int] = set()
        self._take, self._num_ahead, self._is_left = take, num_ahead, True
        self._open: dict[int, tuple[int, Request]] = {}  # by number in the engine, with their index in the call
        self._num_unfinished = 0  # completions of open requests
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
                    self._hear(request, completion)

    def cancel(self, index: int) -> None:
        """Leave what is unfinished of a request."""
        for at, request in list(self._open.values()):
            if at == index:
                self._leave(request)

    def abort(self) -> None:
        """Leave everything that is unfinished."""
        for _, request in list(self._open.values()):
            self._leave(request)

    def _submit(self) -> None:
        while self._is_left and self._num_unfinished < self._num_ahead:
            index = self._take()
            if index is None:
                self._is_left = False
                return
            self.taken.add(index)
            asked = self.requests[index]
            try:
                request = self.engine.submit(asked.prompt, SamplingParams(n=asked.n, **asked.params))
            except ValueError as error:
                raise ValueError(f"requests[{index}]: {error}") from error
            self._open[request.number] = index, request
            self._num_unfinished += asked.n

    def _hear(self, request: Request, completion: Completion) -> None:
        index, _ = self._open[request.number]
        sample = self._to_sample(completion)
        self.samples[index].append(sample)
        if self.watch.on_sample(index, sample) or len(self.samples[index]) == request.params.n:
            self._leave(request)
        else:
            self._num_unfinished -= 1

    def _leave(self, request: Request) -> None:
        del self._open[request.number]
        self._num_unfinished = sum(request.params.n - len(self.samples[index]) for index, request in self._open.values())
        self.engine.abort(request)

    def _to_sample(self, completion: Completion) -> Sample:
        mean_logprob, tail_logprob = confidences(completion.logprobs)
        return Sample(
            text=completion.text,
            num_tokens=len(completion.token_ids),
            finish_reason=completion.finish_reason,
            mean_logprob=mean_logprob,
            tail_logprob=tail_logprob,
            index=completion.index,
            seconds=time.perf_counter() - self._seconds_start,
            tokens_spent=self.num_tokens,
        )
