"""vLLM's offline engine as a `generate` callable, where vLLM is installed. It is not among our dependencies."""

import time
from collections.abc import Sequence
from typing import Any

from m1.evaluation.sampling import Generate, Prompt, Sample, SampleRequest, Watch, confidences


def open_vllm(model: str, *, concurrency: int = 0, **options: Any) -> Any:
    """A `vllm.LLM` of a model directory or hub name; `options` are its own. Raises ValueError where vLLM is not installed."""
    try:
        from vllm import LLM
    except ImportError as error:
        raise ValueError(f"--backend vllm: {error}; install vLLM, or use --backend engine") from error
    return LLM(model=model, **({"max_num_seqs": concurrency} if concurrency else {}), **options)


def vllm_backend(llm: Any, *, concurrency: int = 1024) -> Generate:
    """Samples from a `vllm.LLM`. `params` of a request are fields of `vllm.SamplingParams` other than n.

    Every sample is a request of vLLM's with a seed of its own (the prompt's prefix is cached there), so that each is heard
    of when it ends and can be cancelled. At most twice `concurrency` of them are in vLLM at once.
    """

    def generate(requests: Sequence[SampleRequest], watch: Watch) -> list[list[Sample]]:
        run = _Run(llm, requests, watch)
        try:
            run.sample(2 * concurrency)
        finally:
            run.engine.abort_request(list(run.open))
        return [sorted(drawn, key=lambda one: one.index) for drawn in run.samples]

    return generate


class _Run:
    """One call: which samples have yet to be asked for, which are in vLLM, and which have come."""

    def __init__(self, llm: Any, requests: Sequence[SampleRequest], watch: Watch) -> None:
        self.engine, self.tokenizer, self.watch, self.requests = llm.llm_engine, llm.get_tokenizer(), watch, requests
        self.samples: list[list[Sample]] = [[] for _ in requests]
        self.open: dict[str, tuple[int, int]] = {}  # vLLM's name of a sample: its request and index
        self._waiting = iter([(number, index) for number, request in enumerate(requests) for index in range(request.n)])
        self._cancelled: set[int] = set()
        self._parts: dict[str, list[Any]] = {}  # what each open sample has generated, as it came
        self._num_tokens = 0
        self._start = time.perf_counter()

    def sample(self, most_open: int) -> None:
        self._submit(most_open)
        while self.open and not self.watch.is_over(self._num_tokens):
            for output in self.engine.step():
                if output.request_id in self.open:
                    self._hear(output)
            self._submit(most_open)

    def _submit(self, most_open: int) -> None:
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        while len(self.open) < most_open:
            number, index = next(self._waiting, (None, None))
            if number is None or index is None:
                return
            if number in self._cancelled:
                continue
            request = self.requests[number]
            own = dict(request.params)
            if own.get("seed") is not None:
                own["seed"] += index
            name = f"{id(self)}-{number}-{index}"
            params = SamplingParams(n=1, logprobs=0, output_kind=RequestOutputKind.DELTA, **own)
            self.engine.add_request(name, self._encode(request.prompt), params)
            self.open[name], self._parts[name] = (number, index), []

    def _encode(self, prompt: Prompt) -> Any:
        if isinstance(prompt, str):
            return prompt
        text = self.tokenizer.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True)
        return {"prompt_token_ids": self.tokenizer.encode(text, add_special_tokens=False)}

    def _hear(self, output: Any) -> None:
        part = output.outputs[0]
        self._parts[output.request_id].append(part)
        self._num_tokens += len(part.token_ids)
        if not output.finished:
            return
        number, index = self.open.pop(output.request_id)
        seconds = time.perf_counter() - self._start
        sample = _to_sample(self._parts.pop(output.request_id), index, seconds, self._num_tokens)
        self.samples[number].append(sample)
        if self.watch.on_sample(number, sample):
            self._cancelled.add(number)
            cancelled = [name for name, (of_request, _) in self.open.items() if of_request == number]
            self.engine.abort_request(cancelled)
            for name in cancelled:
                del self.open[name], self._parts[name]


def _to_sample(parts: Sequence[Any], index: int, seconds: float, tokens_spent: int) -> Sample:
    """The sample that the deltas of one request make up."""
    tokens = [token for part in parts for token in part.token_ids]
    alternatives = [of_token for part in parts for of_token in part.logprobs or ()]
    mean_logprob, tail_logprob = confidences([of_token[token].logprob for token, of_token in zip(tokens, alternatives)])
    return Sample(
        text="".join(part.text for part in parts),
        num_tokens=len(tokens),
        finish_reason=parts[-1].finish_reason,
        mean_logprob=mean_logprob,
        tail_logprob=tail_logprob,
        index=index,
        seconds=seconds,
        tokens_spent=tokens_spent,
    )
