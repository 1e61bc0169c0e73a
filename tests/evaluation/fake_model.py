"""A `generate` callable without a model: answers by a rule, in a scrambled order of finishing, and obeys its watch."""

import random
from collections.abc import Callable, Sequence
from dataclasses import replace

from m1.evaluation.sampling import Sample, SampleRequest, Watch


def number_of(request: SampleRequest) -> int:
    """The first number in the prompt."""
    text = request.prompt if isinstance(request.prompt, str) else request.prompt[0]["content"]
    return int(text.split()[0])


def rule(number: int, index: int) -> Sample:
    """Sample i of problem x is x + 1 where i is even, else 1000 + i; every fourth gives no answer."""
    text = "no idea" if index % 4 == 3 else rf"\boxed{{{number + 1 if index % 2 == 0 else 1000 + index}}}"
    return Sample(text, 10 + index, "length" if index % 4 == 3 else "stop", -0.5, -0.4)


class FakeModel:
    """Finishes samples in an order drawn with `order_seed`; `before_sample` is called before each, and may raise or sleep."""

    def __init__(
        self,
        answer: Callable[[int, int], Sample] = rule,
        *,
        order_seed: int = 0,
        before_sample: Callable[[], None] = lambda: None,
        leave_out: int = 0,
    ) -> None:
        self.answer, self.before_sample, self.leave_out = answer, before_sample, leave_out
        self.calls: list[list[SampleRequest]] = []
        self.num_finished = 0
        self._generator = random.Random(order_seed)

    def __call__(self, requests: Sequence[SampleRequest], watch: Watch) -> list[list[Sample]]:
        self.calls.append(list(requests))
        places = [(number, index) for number, request in enumerate(requests) for index in range(request.n - self.leave_out)]
        self._generator.shuffle(places)
        samples: list[list[Sample]] = [[] for _ in requests]
        cancelled: set[int] = set()
        num_tokens = 0
        for number, index in places:
            if watch.is_over(num_tokens):
                break
            if number in cancelled:
                continue
            self.before_sample()
            sample = self.answer(number_of(requests[number]), index)
            num_tokens += sample.num_tokens
            sample = replace(sample, index=index, tokens_spent=num_tokens)
            samples[number].append(sample)
            self.num_finished += 1
            if watch.on_sample(number, sample):
                cancelled.add(number)
        return samples
