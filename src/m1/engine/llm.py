"""`Engine`: the way in. Takes prompts, steps until they are completed, hands out completions; streams, aborts, new weights.

A step is: take in what arrived, plan (scheduler), launch (runner), read an earlier step's tokens (scheduler), see who is done
(outputs). Planning, memory, the model and text each have a file of their own; here they only meet.
"""

import contextlib
import logging
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
from m1.engine.cache import StateCache
from m1.engine.capacity import plan_capacity
from m1.engine.fp8 import FP8
from m1.engine.metrics import Metrics
from m1.engine.outputs import OutputProcessor
from m1.engine.prompts import Prompt, RequestFactory
from m1.engine.runner import ModelRunner
from m1.engine.sampling_params import SamplingParams
from m1.engine.scheduler import Batch, Scheduler
from m1.engine.sequence import Completion, Delta, Request
from m1.engine.transfer import Download
from m1.engine.weights import copy_weights, load_for_sampling, sampling_copy
from m1.modeling.hybrid import M1ForCausalLM
from m1.modeling.loading import load_tokenizer

logger = logging.getLogger(__name__)

# Steps that are launched before the tokens of one are read. A sequence that ends is computed for so many steps too long.
STEPS_AHEAD = {"cpu": 0, "cuda": 2}
# Steps between admissions to an engine that is at least half full. A prefill is launched kernel by kernel.
ADMISSION_INTERVAL = {"cpu": 1, "cuda": 16}


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
        self._source: M1ForCausalLM | None = None  # the trainer's model, if the sampler has a copy of it
        if isinstance(model, (str, Path)):
            tokenizer = tokenizer or load_tokenizer(model)
            model = load_for_sampling(model, dtype, device or "cpu", quantization is not None)
        else:
            if device is not None and torch.device(device).type != model.device.type:
                raise ValueError(f"device: the model is on {model.device}, given {device}; move the model first")
            own_dtype = model.model.embed_tokens.weight.dtype
            if dtype not in (None, own_dtype) or quantization is not None:
                self._source, model = model, sampling_copy(model, dtype or own_dtype, quantization is not None)
        kv_dtype = FP8 if kv_cache_dtype == "fp8" else None
        weight, config = model.model.embed_tokens.weight, model.config
        self.model, self.tokenizer = model, tokenizer
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
        size = self.capacity
        self.cache = StateCache(
            size.num_slots,
            size.num_pages,
            page_size,
            needs_state=bool(config.mixer_layers),
            needs_pages=bool(config.attention_layers),
            keeps_prefixes=enable_prefix_caching,
        )
        self.scheduler = Scheduler(
            self.cache, size.max_num_seqs, size.max_num_batched_tokens, ADMISSION_INTERVAL[weight.device.type]
        )
        self.runner = ModelRunner(
            model,
            num_slots=size.num_slots,
            num_pages=size.num_pages,
            page_size=page_size,
            max_model_len=size.max_model_len,
            state_dtype=state_dtype,
            kv_dtype=kv_dtype,
            uses_graphs=weight.is_cuda and not enforce_eager,
        )
        self.num_steps_ahead = STEPS_AHEAD[weight.device.type] if num_steps_ahead is None else num_steps_ahead
        self._in_flight: deque[tuple[Batch, Download]] = deque()  # steps launched and not yet read, oldest first
        self.outputs = OutputProcessor(tokenizer)
        self._factory = RequestFactory(tokenizer, config.vocab_size, _eos_ids(model, tokenizer), size.max_model_len)
        self._lock = threading.Lock()  # held while a step runs: whoever holds it may touch scheduler, cache and runner
        self._inbox: deque[Callable[[], None]] = deque()  # what arrived meanwhile
        self._driver = streaming.Driver(self)
        self.is_closed = False
        self._num_steps = self._num_prompt_tokens = self._num_generated = 0
        self._seconds = 0.0

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
                self.step()
                while unfinished and unfinished[0].is_finished:
                    unfinished.popleft()
                if progress:
                    bar.n = sum(len(request.completions) for request in requests)
                    bar.set_postfix_str(f"{self.metrics.tokens_per_second:,.0f} tokens/s", refresh=False)
                    bar.update(0)

    def stream(self, prompt: Prompt, params: SamplingParams) -> AsyncIterator[Delta]:
        """Complete one prompt and hand out text and tokens as they come, those of all n completions interleaved.

        Raises ValueError at once for a prompt that can't be completed; other requests go on. Leaving the iteration early
        aborts the request. Steps run in a thread of their own.
        """
        return streaming.stream(self, self._driver, prompt, params)

    def submit(self, prompt: Prompt, params: SamplingParams, on_delta: Callable[[Delta], None] | None = None) -> Request:
        """Queue a prompt; `step` until `request.is_finished`. on_delta is called from whichever thread steps."""
        request = self._factory.make(prompt, params, on_delta)
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
        self._inbox.append(lambda: self._abort(request))
        if self._lock.acquire(blocking=False):
            try:
                self._receive()
            finally:
                self._lock.release()

    def _abort(self, request: Request) -> None:
        for sequence in self.scheduler.sequences_of(request):
            self.scheduler.finish(sequence)
            self.outputs.close(sequence, "abort")
            for index in sequence.pending:
                self.outputs.close_unborn(request, index)

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

    def step(self) -> None:
        """Launch a step that advances every running sequence by one token, and prompts by what the token budget allows; then
        read the tokens of the oldest step that is more than `num_steps_ahead` back."""
        with self._lock:
            self._require_open()
            start = time.perf_counter()
            self._receive()
            try:
                batch = self.scheduler.schedule()
                if not batch.is_empty:
                    self._in_flight.append((batch, self.runner.launch(batch)))
                    self.scheduler.advance(batch)
                # Where there is nothing to compute, wait for the oldest step: its tokens end sequences or let others start.
                num_ahead = self.num_steps_ahead if batch.num_tokens else max(0, len(self._in_flight) - 1)
                while len(self._in_flight) > num_ahead:
                    self._read_step(*self._in_flight.popleft())
            except torch.OutOfMemoryError as error:
                if not self._make_room():
                    self._drop_all(error)
                    raise
            except BaseException as error:
                self._drop_all(error)
                raise
            if self.scheduler.is_idle:
                self._in_flight.clear()  # computed for sequences that have ended
            self._num_steps += 1
            self._seconds += time.perf_counter() - start

    def _read_step(self, batch: Batch, results: Download) -> None:
        """Enter a step's tokens, and end the sequences that are done."""
        if not len(batch.slots):
            return
        tokens, logprobs, *top = results.read()
        num_taken, news = self.scheduler.receive(batch, tokens, logprobs)
        self._num_generated += num_taken
        for item in news:
            count = item.sequence.request.params.logprobs
            alternatives = None
            if count:
                values, ids = (array[item.place, :count].tolist() for array in top)
                alternatives = dict(zip(ids, values, strict=True))
            reason = self.outputs.take(item, alternatives)
            if reason is not None:
                self.scheduler.finish(item.sequence)
                self.outputs.close(item.sequence, reason)

    def _make_room(self) -> bool:
        """After a step that found no memory for its activations: recompute everything in smaller steps from now on.

        False if steps are as small as they can be.
        """
        if not self.scheduler.shrink():
            return False
        logger.warning(
            "out of memory: from now on at most %d sequences and %d tokens a step, running ones are recomputed; "
            "a lower memory_fraction leaves more to activations",
            self.scheduler.max_num_seqs,
            self.scheduler.max_num_batched_tokens,
        )
        self._in_flight.clear()
        self.scheduler.preempt_all()
        if self.runner.device.type == "cuda":
            torch.cuda.empty_cache()
        return True

    def _drop_all(self, error: BaseException | None) -> None:
        """After a step that failed half-way, states are undefined: end every request and forget every prefix."""
        self._in_flight.clear()
        for request in {s.request.number: s.request for s in (*self.scheduler.running, *self.scheduler.waiting)}.values():
            request.error = error
            self._abort(request)
        self.cache.forget_prefixes()

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
            self.runner.weights_changed()
            self.scheduler.preempt_all()

    def sleep(self) -> None:
        """Free the memory of states and pages until `wake`. Running sequences will be recomputed; stepping meanwhile wakes."""
        with self._lock:
            self._require_open()
            self.scheduler.preempt_all()
            self.cache.take_moves()
            self.runner.free()

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
            self._drop_all(None)
            self.is_closed, self._source = True, None
            self.runner.free()
            del self.runner, self.model

    def __enter__(self) -> "Engine":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _require_open(self) -> None:
        if self.is_closed:
            raise ValueError("the engine is closed; make a new one")

    @property
    def metrics(self) -> Metrics:
        num_pages, num_running = self.cache.pages.num_pages, len(self.scheduler.running)
        return Metrics(
            num_running=num_running,
            num_waiting=self.scheduler.num_waiting,
            num_steps=self._num_steps,
            num_preemptions=self.scheduler.num_preemptions,
            num_prompt_tokens=self._num_prompt_tokens,
            num_prefix_tokens=self.cache.num_prefix_tokens,
            num_generated_tokens=self._num_generated,
            seconds=self._seconds,
            page_use=1 - self.cache.num_available_pages / num_pages if num_pages else 0.0,
            slot_use=num_running / self.cache.slots.num_slots,
        )


def _eos_ids(model: M1ForCausalLM, tokenizer: PreTrainedTokenizerBase | None) -> frozenset[int]:
    """Every end token that the config, the generation config or the tokenizer names."""
    named = [model.config.eos_token_id, getattr(tokenizer, "eos_token_id", None)]
    with contextlib.suppress(AttributeError):
        named.append(model.generation_config.eos_token_id)
    ids: set[int] = set()
    for value in named:
        ids.update([value] if isinstance(value, int) else value or [])
    return frozenset(ids)
