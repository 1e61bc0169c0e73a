"""The engine of this project as a `generate` callable."""

import time
from collections import deque
from collections.abc import Sequence

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
        run = _Run(engine, requests, watch)
        try:
            run.sample()
        finally:  # nothing stays in the engine when the watch ends it, a step fails or the user interrupts
            for _, request in run.open.values():
                engine.abort(request)
        return [sorted(samples, key=lambda one: one.index) for samples in run.samples]

    return generate


class _Run:
    """One call: the requests in the engine by their number there, with their place in the call, and the samples so far."""

    def __init__(self, engine: Engine, requests: Sequence[SampleRequest], watch: Watch) -> None:
        self.engine, self.watch = engine, watch
        self.waiting = deque(enumerate(requests))
        self.open: dict[int, tuple[int, Request]] = {}
        self._num_unfinished = 0  # completions of open requests
        self.samples: list[list[Sample]] = [[] for _ in requests]
        self._num_before = engine.metrics.num_generated_tokens
        self._seconds_start = time.perf_counter()

    @property
    def num_tokens(self) -> int:
        return self.engine.metrics.num_generated_tokens - self._num_before

    def sample(self) -> None:
        while self.waiting or self.open:
            self._submit()
            if self.watch.is_over(self.num_tokens):
                return
            for request, completion in self.engine.step():
                if request.error is not None:
                    raise request.error
                if request.number in self.open:
                    self._hear(request, completion)

    def _submit(self) -> None:
        """Keep twice as much in the engine as it can run at once."""
        while self.waiting and self._num_unfinished < 2 * self.engine.capacity.max_num_seqs:
            index, asked = self.waiting.popleft()
            try:
                request = self.engine.submit(asked.prompt, SamplingParams(n=asked.n, **asked.params))
            except ValueError as error:
                raise ValueError(f"requests[{index}]: {error}") from error
            self.open[request.number] = index, request
            self._num_unfinished += asked.n

    def _hear(self, request: Request, completion: Completion) -> None:
        index, _ = self.open[request.number]
        sample = self._to_sample(completion)
        self.samples[index].append(sample)
        self._num_unfinished -= 1
        is_cancelled = self.watch.on_sample(index, sample)
        if is_cancelled or len(self.samples[index]) == request.params.n:
            self._num_unfinished -= request.params.n - len(self.samples[index])
            del self.open[request.number]
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
