"""Any causal language model under transformers' `generate`, as a `generate` callable: slow, for any architecture."""

import time
from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor
from transformers import (
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    StoppingCriteria,
    StoppingCriteriaList,
)

from m1.evaluation.sampling import Generate, Prompt, Sample, SampleRequest, Watch, confidences

_KNOWN = {"temperature", "top_p", "top_k", "min_p", "max_tokens", "seed"}


def transformers_backend(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, *, concurrency: int = 16) -> Generate:
    """Samples with `model.generate`, one prompt at a time, `concurrency` samples of it together.

    `params` of a request: temperature (0 is greedy), top_p, top_k, min_p, max_tokens, seed. A batch goes on until its last
    sample ends, so a request that is cancelled, or a budget that ends, takes effect at the next token. Log-probs are of the
    distribution at the sampling temperature, before top_k, top_p and min_p. Raises ValueError for other params.
    """

    def generate(requests: Sequence[SampleRequest], watch: Watch) -> list[list[Sample]]:
        start, num_tokens = time.perf_counter(), 0
        samples: list[list[Sample]] = [[] for _ in requests]
        for number, request in enumerate(requests):
            prompt = _encode(tokenizer, request.prompt).to(model.device)
            options = _options(model, request.params, prompt.shape[1])
            for first in range(0, request.n, concurrency):
                listener = _Listener(model, watch, number, first, options, prompt.shape[1], start, num_tokens)
                listener.tokenizer = tokenizer
                if watch.is_over(num_tokens):
                    return samples
                if request.params.get("seed") is not None:
                    torch.manual_seed(request.params["seed"] + first)
                cast(Any, model).generate(
                    prompt,
                    attention_mask=torch.ones_like(prompt),
                    num_return_sequences=min(concurrency, request.n - first),
                    logits_processor=LogitsProcessorList([_Recorder(listener)]),
                    stopping_criteria=StoppingCriteriaList([listener]),
                    pad_token_id=tokenizer.pad_token_id,
                    **options,
                )
                samples[number] += sorted(listener.samples, key=lambda one: one.index)
                num_tokens = listener.num_tokens
                if listener.is_cancelled:
                    break
            if listener.is_over:
                break
        return samples

    return generate


def _encode(tokenizer: PreTrainedTokenizerBase, prompt: Prompt) -> Tensor:
    if isinstance(prompt, str):
        ids = tokenizer.encode(prompt)
    else:
        text = tokenizer.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True)
        ids = tokenizer.encode(str(text), add_special_tokens=False)
    return torch.tensor([ids])


def _options(model: PreTrainedModel, params: Any, prompt_length: int) -> dict[str, Any]:
    unknown = params.keys() - _KNOWN
    if unknown:
        raise ValueError(f"transformers' generate: unknown sampling parameters {sorted(unknown)}; known are {sorted(_KNOWN)}")
    room = model.config.max_position_embeddings - prompt_length
    if room < 1:
        raise ValueError(f"the prompt has {prompt_length} tokens, which leaves no room in the model's {room + prompt_length}")
    options: dict[str, Any] = {"max_new_tokens": min(params.get("max_tokens") or room, room)}
    temperature = params.get("temperature", 1.0)
    if temperature == 0:
        return options | {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
    top_k = params.get("top_k", 0)
    options |= {"do_sample": True, "temperature": temperature, "top_p": params.get("top_p", 1.0), "top_k": max(top_k, 0)}
    return options | ({"min_p": params["min_p"]} if params.get("min_p") else {})


class _Recorder(LogitsProcessor):
    """Keeps the log-probs of the step for the listener, who learns the chosen tokens only afterwards."""

    def __init__(self, listener: "_Listener") -> None:
        self._listener = listener

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        self._listener.logprobs = torch.log_softmax(scores.float() / self._listener.temperature, dim=-1)
        return scores


class _Listener(StoppingCriteria):
    """Sees every token of a batch: notices which samples end, tells the watch, and stops the batch when told."""

    tokenizer: PreTrainedTokenizerBase
    logprobs: Tensor  # [B, V] of the step that is under way

    def __init__(
        self, model: PreTrainedModel, watch: Watch, request: int, first: int, options: dict[str, Any], prompt_length: int,
        start: float, num_tokens: int,
    ) -> None:  # fmt: skip
        generation_config = model.generation_config
        assert generation_config is not None
        eos = cast(Any, generation_config).eos_token_id
        self._eos = {eos} if isinstance(eos, int) else set(eos or ())
        self._watch, self._request, self._first, self._start = watch, request, first, start
        self._prompt_length, self._max_tokens = prompt_length, options["max_new_tokens"]
        self.temperature = options["temperature"] or 1.0
        self.num_tokens = num_tokens
        self.samples: list[Sample] = []
        self._chosen: list[list[float]] = []  # log-probs of each sample's tokens
        self._open: set[int] = set()
        self.is_cancelled = self.is_over = False

    def __call__(self, input_ids: Tensor, scores: Tensor, **kwargs: Any) -> Tensor:
        tokens = input_ids[:, -1].tolist()
        if not self._chosen:
            self._chosen, self._open = [[] for _ in tokens], set(range(len(tokens)))
        chosen = self.logprobs.gather(1, input_ids[:, -1:]).squeeze(1).tolist()
        self.num_tokens += len(self._open)
        for row in sorted(self._open):
            self._chosen[row].append(chosen[row])
        length = input_ids.shape[1] - self._prompt_length
        for row in sorted(self._open):
            if tokens[row] in self._eos or length >= self._max_tokens:
                self._open.remove(row)
                if not self.is_cancelled:
                    self._end(row, input_ids[row, self._prompt_length :], "stop" if tokens[row] in self._eos else "length")
        self.is_over = self.is_over or self._watch.is_over(self.num_tokens)
        is_done = self.is_cancelled or self.is_over
        return torch.full((len(tokens),), is_done, dtype=torch.bool, device=input_ids.device)

    def _end(self, row: int, ids: Tensor, reason: str) -> None:
        mean_logprob, tail_logprob = confidences(self._chosen[row])
        sample = Sample(
            text=str(self.tokenizer.decode(ids, skip_special_tokens=True)),
            num_tokens=len(ids),
            finish_reason=reason,
            mean_logprob=mean_logprob,
            tail_logprob=tail_logprob,
            index=self._first + row,
            seconds=time.perf_counter() - self._start,
            tokens_spent=self.num_tokens,
        )
        self.samples.append(sample)
        self.is_cancelled = self._watch.on_sample(self._request, sample)
