"""`Engine`: the way in. Takes prompts, steps until they are completed, hands out completions; streams, aborts, new weights.

The step itself is in core.py; planning, memory, the model and text each have a file of their own.
"""

import contextlib
import threading
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from m1.engine import streaming
from m1.engine.capacity import plan_capacity
from m1.engine.core import EngineCore
from m1.engine.fp8 import FP8
from m1.engine.metrics import Metrics
from m1.engine.outputs import OutputProcessor
from m1.engine.prompts import Prompt, RequestFactory
from m1.engine.residency import Residency
from m1.engine.sampling_params import SamplingParams
from m1.engine.sequence import Completion, Delta, Request
from m1.engine.weights import copy_weights, prepare_model
from m1.modeling.hybrid import M1ForCausalLM


class Engine:
    """Samples completions of many prompts at once from a hybrid or dense model.

    model: an `M1ForCausalLM`, whose weights are shared (it may be trained meanwhile, see `update_weights`), or a checkpoint
    directory or hub name. tokenizer: the checkpoint's own if a path is given; without one, prompts must be token ids and
    `Completion.text` is empty.
    max_num_seqs: sequences that run at once. max_num_batched_tokens: tokens computed in one step, decoding and prefill
    together. max_model_len: longest prompt with completion. page_size: tokens a page of keys and values, and granularity of
    prefix caching. num_slots, num_pages: sizes of the state, else chosen from memory_fraction of the free memory.
    dtype: of weights and activations, the model's unless given; a dtype other than a given model's makes a copy for sampling.
    On a CPU, bf16 weights of the engine's own (a path, a copy) are laid out for its matrix units and sample fastest.
    state_dtype: of SSM states. quantization: "fp8" samples from a copy whose linear layers (the head too) multiply e4m3
    numbers, with a scale an output channel and a token; on a GPU in bfloat16. kv_cache_dtype: "fp8" keeps keys and values as
    e4m3 numbers.
    enforce_eager: on a GPU, launch a decode step's kernels one by one instead of as a CUDA graph.
    enable_prefix_caching: keep states and pages of prompts for later prompts that begin alike.
    Raises ValueError for contradicting sizes, MemoryError for a model that does not fit.
    """

    def __init__(
        self,
        model: M1ForCausalLM | str | Path,
        tokenizer: PreTrainedTokenizerBase | None = None,
        *,
        max_num_seqs: int | None = None,
        max_num_batched_tokens: int | None = None,
        max_model_len: int | None = None,
        page_size: int = 64,
        num_slots: int | None = None,
        num_pages: int | None = None,
        memory_fraction: float | None = None,
        dtype: torch.dtype | None = None,
        state_dtype: torch.dtype = torch.float32,
        quantization: Literal["fp8"] | None = None,
        kv_cache_dtype: Literal["auto", "fp8"] = "auto",
        device: torch.device | str | None = None,
        enable_prefix_caching: bool = True,
        enforce_eager: bool = False,
        num_steps_ahead: int | None = None,
    ) -> None:
        if quantization not in (None, "fp8"):
            raise ValueError(f"quantization: expected None or 'fp8', given {quantization!r}")
        if kv_cache_dtype not in ("auto", "fp8"):
            raise ValueError(f"kv_cache_dtype: expected 'auto' or 'fp8', given {kv_cache_dtype!r}")
        # _source: the trainer's model, if the sampler has a copy of it
        self.model, self.tokenizer, self._source = prepare_model(model, tokenizer, dtype, device, quantization is not None)
        kv_dtype = FP8 if kv_cache_dtype == "fp8" else None
        weight, config = self.model.model.embed_tokens.weight, self.model.config
        self.capacity = plan_capacity(
            config,
            weight.device,
            weight.dtype,
            state_dtype,
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=max_num_batched_tokens,
            max_model_len=max_model_len,
            page_size=page_size,
            num_slots=num_slots,
            num_pages=num_pages,
            memory_fraction=memory_fraction,
            keeps_prefixes=enable_prefix_caching,
            kv_dtype=kv_dtype,
        )
        self._core = EngineCore(
            self.model,
            self.capacity,
            OutputProcessor(self.tokenizer),
            keeps_prefixes=enable_prefix_caching,
            num_steps_ahead=num_steps_ahead,
            state_dtype=state_dtype,
            kv_dtype=kv_dtype,
            uses_graphs=weight.is_cuda and not enforce_eager,
        )
        self.cache, self.scheduler, self.runner = self._core.cache, self._core.scheduler, self._core.runner
        eos_ids = _eos_ids(self.model, self.tokenizer)
        self._factory = RequestFactory(self.tokenizer, config.vocab_size, eos_ids, self.capacity.max_model_len)
        self._lock = threading.Lock()  # held while a step runs: whoever holds it may touch the core
        self._inbox: deque[Callable[[], None]] = deque()  # what arrived meanwhile
        self._driver = streaming.Driver(self)
        self._residency = Residency(weight.device) if weight.is_cuda else None
        self.is_closed = False
        self._num_prompt_tokens, self._seconds = 0, 0.0

    def generate(
        self, prompts: list[Prompt], params: SamplingParams | list[SamplingParams], *, progress: bool = False
    ) -> list[list[Completion]]:
        """Complete every prompt: for each, its `params.n` completions in order of their index.

        prompts: raw text, token ids, or chat messages, each. params: for all, or one for each prompt.
        Raises ValueError naming the prompt's index before anything starts, if one of them can't be completed.
        """
        requests = self.make_requests(prompts, params)
        try:
            self._run(requests, progress)
        finally:  # nothing of these stays behind when a step fails or the user interrupts
            for request in requests:
                self.abort(request)
        for request in requests:
            if request.error is not None:  # of a step in the thread that serves streams
                raise request.error
        return [[request.completions[index] for index in range(request.params.n)] for request in requests]

    def make_requests(self, prompts: list[Prompt], params: SamplingParams | list[SamplingParams]) -> list[Request]:
        """Check prompts and their parameters, for all or one for each; nothing is queued.

        Raises ValueError naming the index of the first prompt that can't be completed.
        """
        if not isinstance(prompts, list):
            raise ValueError(f"prompts: expected a list of prompts, given {type(prompts).__name__}")
        each = params if isinstance(params, list) else [params] * len(prompts)
        if len(each) != len(prompts):
            raise ValueError(f"params: expected one for each of the {len(prompts)} prompts, given {len(each)}")
        requests = []
        for index, (prompt, own) in enumerate(zip(prompts, each, strict=True)):
            try:
                requests.append(self._factory.make(prompt, own))
            except ValueError as error:
                raise ValueError(f"prompts[{index}]: {error}") from error
        return requests

    def _run(self, requests: list[Request], progress: bool) -> None:
        for request in requests:
            self._submit(request)
        unfinished = deque(requests)
        total = sum(request.params.n for request in requests)
        with tqdm(total=total, unit="completion", disable=not progress) as bar:
            while unfinished:
                ended = self.step()
                while unfinished and unfinished[0].is_finished:
                    unfinished.popleft()
                if progress:
                    bar.set_postfix_str(f"{self.metrics.tokens_per_second:,.0f} tokens/s", refresh=False)
                    bar.update(len(ended))

    def stream(self, prompt: Prompt, params: SamplingParams) -> AsyncIterator[Delta]:
        """Complete one prompt and hand out text and tokens as they come, those of all n completions interleaved.

        Raises ValueError at once for a prompt that can't be completed; other requests go on. Leaving the iteration early
        aborts the request. Steps run in a thread of their own.
        """
        return streaming.stream(self, self._driver, prompt, params)

    def submit(
        self,
        prompt: Prompt,
        params: SamplingParams,
        on_delta: Callable[[Delta], None] | None = None,
        first_sample: int = 0,
    ) -> Request:
        """Queue a prompt; `step` until `request.is_finished`. on_delta is called from whichever thread steps. first_sample:
        for a part of a larger request, the number there of its first completion."""
        request = self._factory.make(prompt, params, on_delta, first_sample)
        self._submit(request)
        return request

    def _submit(self, request: Request) -> None:
        self._require_open()
        self._num_prompt_tokens += len(request.prompt)
        self._inbox.append(partial(self.scheduler.add, request))

    def abort(self, request: Request) -> None:
        """End a request's unfinished completions now, with finish_reason "abort", and free what they hold.

        From another thread than the one that steps, it takes effect before the next step.
        """
        if request.is_finished:
            return
        self._inbox.append(partial(self._core.abort, request))
        if self._lock.acquire(blocking=False):
            try:
                self._receive()
            finally:
                self._lock.release()

    def _receive(self) -> None:
        while self._inbox:
            self._inbox.popleft()()

    @property
    def has_work(self) -> bool:
        return bool(self._inbox) or not self.scheduler.is_idle

    @property
    def has_room(self) -> bool:
        """Whether everything that was submitted has started: more would not wait for it in vain."""
        return not self._inbox and not self.scheduler.num_waiting

    def step(self) -> list[tuple[Request, Completion]]:
        """Launch a step that advances every running sequence by one token, and prompts by what the token budget allows; then
        read the tokens of the oldest step that is more than `num_steps_ahead` back.

        Returns the completions that have ended since the last step, aborted ones too.
        """
        with self._lock:
            self._require_open()
            start = time.perf_counter()
            if self._residency is not None:
                self._residency.back()
            self._receive()
            ended = self._core.step()
            self._seconds += time.perf_counter() - start
            return ended

    def warm_up(self) -> None:
        """Compile and capture on a GPU what decode steps of any size need, which otherwise happens when a size is first met.

        Takes about a tenth of a second for each power of two up to max_num_seqs and each width of block tables; longer where
        kernels are compiled for the first time.
        """
        with self._lock:
            self._require_open()
            self.runner.warm_up()

    def update_weights(self, named_parameters: Iterable[tuple[str, Tensor]] | None = None) -> None:
        """Sample from changed weights from now on.

        A model shared with a trainer has changed already; a copy in another dtype takes the values of the model it was made
        of, or of `named_parameters`. States of the old weights are dropped: cached prefixes are forgotten, and running
        sequences recomputed. Raises ValueError if `named_parameters` are not the model's.
        """
        with self._lock:
            self._require_open()
            if named_parameters is not None:
                copy_weights(named_parameters, self.model)
            elif self._source is not None:
                copy_weights(self._source.named_parameters(), self.model)
            self._core.weights_changed()

    def sleep(self) -> None:
        """Free the memory of states and pages until `wake`. Running sequences will be recomputed; stepping meanwhile wakes."""
        with self._lock:
            self._require_open()
            self._core.sleep()

    def sleep_unless_room(self) -> None:
        """`sleep`, if whoever uses the device meanwhile may need the memory: on a GPU, until they have been seen to do with
        what is left. So states and captured graphs stay between rollouts where there is room for them; see residency.py."""
        own_bytes = self.runner.num_state_bytes
        if self._residency is None or not self._residency.leave(own_bytes):
            self.sleep()

    def wake(self) -> None:
        """Take the memory of states and pages again."""
        with self._lock:
            self._require_open()
            self.runner.allocate()

    def close(self) -> None:
        """End every request, and let go of weights, states and pages at once; the engine can't be used afterwards.

        `with Engine(…) as engine:` does it at the end. An engine that nobody refers to any more needs no closing.
        """
        with self._lock:
            if self.is_closed:
                return
            self._receive()
            self._core.drop_all(None)
            self.is_closed, self._source = True, None
            self.runner.free()
            del self._core.runner, self.runner, self.model

    def __enter__(self) -> "Engine":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _require_open(self) -> None:
        if self.is_closed:
            raise ValueError("the engine is closed; make a new one")

    @property
    def metrics(self) -> Metrics:
        return self._core.metrics(self._num_prompt_tokens, self._seconds)


def _eos_ids(model: M1ForCausalLM, tokenizer: PreTrainedTokenizerBase | None) -> frozenset[int]:
    """Every end token that the config, the generation config or the tokenizer names."""
    named = [model.config.eos_token_id, getattr(tokenizer, "eos_token_id", None)]
    with contextlib.suppress(AttributeError):
        named.append(model.generation_config.eos_token_id)
    ids: set[int] = set()
    for value in named:
        ids.update([value] if isinstance(value, int) else value or [])
    return frozenset(ids)
