"""`EngineCore`: the step. Plan (scheduler), launch (runner), read an earlier step's tokens, see who is done (outputs).

Who may call it when, prompts, text and weights are `Engine`'s business (llm.py).
"""

import logging
from collections import deque
from typing import Any

import torch

from m1.engine.cache import StateCache
from m1.engine.capacity import Capacity
from m1.engine.metrics import Metrics
from m1.engine.outputs import OutputProcessor
from m1.engine.runner import ModelRunner
from m1.engine.scheduler import Batch, Scheduler
from m1.engine.sequence import Completion, Request
from m1.engine.transfer import Download
from m1.modeling.hybrid import M1ForCausalLM

logger = logging.getLogger(__name__)

# Steps that are launched before the tokens of one are read. A sequence that ends is computed for so many steps too long.
STEPS_AHEAD = {"cpu": 0, "cuda": 2}
# Steps between admissions to an engine that is nearly full. A prefill is launched kernel by kernel, which takes the host
# as long as the GPU takes for some steps: so many more are launched unread by then, or the GPU would wait.
ADMISSION_INTERVAL = {"cpu": 1, "cuda": 32}
ADMISSION_LEAD = {"cpu": 0, "cuda": 16}


class EngineCore:
    """Scheduler, cache, runner and outputs of one engine, and the steps on their way.

    num_steps_ahead: steps launched before one is read, STEPS_AHEAD of the device if None; runner_options: `ModelRunner`'s.
    """

    def __init__(
        self,
        model: M1ForCausalLM,
        size: Capacity,
        outputs: OutputProcessor,
        *,
        keeps_prefixes: bool,
        num_steps_ahead: int | None,
        **runner_options: Any,
    ) -> None:
        config, kind = model.config, model.model.embed_tokens.weight.device.type
        self.cache = StateCache(
            size.num_slots,
            size.num_pages,
            size.page_size,
            needs_state=bool(config.mixer_layers),
            needs_pages=bool(config.attention_layers),
            keeps_prefixes=keeps_prefixes,
        )
        self.scheduler = Scheduler(self.cache, size.max_num_seqs, size.max_num_batched_tokens, ADMISSION_INTERVAL[kind])
        self.runner = ModelRunner(
            model,
            num_slots=size.num_slots,
            num_pages=size.num_pages,
            page_size=size.page_size,
            max_model_len=size.max_model_len,
            **runner_options,
        )
        self.outputs = outputs
        self.num_steps_ahead = STEPS_AHEAD[kind] if num_steps_ahead is None else num_steps_ahead
        self._admission_lead = ADMISSION_LEAD[kind] if num_steps_ahead is None else 0
        self.in_flight: deque[tuple[Batch, Download]] = deque()  # steps launched and not yet read, oldest first
        self.num_steps = self.num_generated = 0

    def step(self) -> list[tuple[Request, Completion]]:
        """Launch a step, and read those that are more than `num_steps_ahead` back; returns what ended since the last one.

        A step that finds no memory makes the next ones smaller; any other error ends every request and is raised.
        """
        try:
            batch = self.scheduler.schedule()
            if not batch.is_empty:
                self.in_flight.append((batch, self.runner.launch(batch)))
                self.scheduler.advance(batch)
            # Where there is nothing to compute, wait for the oldest step: its tokens end sequences or let others start.
            num_ahead = self._num_ahead() if batch.num_tokens else max(0, len(self.in_flight) - 1)
            while len(self.in_flight) > num_ahead:
                self._read(*self.in_flight.popleft())
        except torch.OutOfMemoryError as error:
            if not self._make_room():
                self.drop_all(error)
                raise
        except BaseException as error:
            self.drop_all(error)
            raise
        if self.scheduler.is_idle:
            self.in_flight.clear()  # computed for sequences that have ended
        self.num_steps += 1
        return self.outputs.take_ended()

    def _num_ahead(self) -> int:
        """Steps that may stay unread: the more the nearer the next prefill is."""
        return self.num_steps_ahead + max(0, self._admission_lead - self.scheduler.steps_to_admission)

    def _read(self, batch: Batch, results: Download) -> None:
        """Enter a step's tokens, and end the sequences that are done."""
        if not len(batch.slots):
            return
        tokens, logprobs, *top = results.read()
        num_taken, news = self.scheduler.receive(batch, tokens, logprobs)
        self.num_generated += num_taken
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
        self.in_flight.clear()
        self.scheduler.preempt_all()
        if self.runner.device.type == "cuda":
            torch.cuda.empty_cache()
        return True

    def abort(self, request: Request) -> None:
        """End a request's unfinished completions, and free what they hold."""
        for sequence in self.scheduler.sequences_of(request):
            self.scheduler.finish(sequence)
            self.outputs.close(sequence, "abort")
            for index in sequence.pending:
                self.outputs.close_unborn(request, index)

    def drop_all(self, error: BaseException | None) -> None:
        """After a step that failed half-way, states are undefined: end every request and forget every prefix."""
        self.in_flight.clear()
        for request in {s.request.number: s.request for s in (*self.scheduler.running, *self.scheduler.waiting)}.values():
            request.error = error
            self.abort(request)
        self.cache.forget_prefixes()

    def weights_changed(self) -> None:
        """States of the old weights are worth nothing: running sequences are recomputed, prefixes forgotten."""
        self.runner.weights_changed()
        self.scheduler.preempt_all()

    def sleep(self) -> None:
        """Free the memory of states and pages; running sequences will be recomputed."""
        self.scheduler.preempt_all()
        self.cache.take_moves()
        self.runner.free()

    def metrics(self, num_prompt_tokens: int, seconds: float) -> Metrics:
        num_pages, num_running = self.cache.pages.num_pages, len(self.scheduler.running)
        return Metrics(
            num_running=num_running,
            num_waiting=self.scheduler.num_waiting,
            num_steps=self.num_steps,
            num_preemptions=self.scheduler.num_preemptions,
            num_prompt_tokens=num_prompt_tokens,
            num_prefix_tokens=self.cache.num_prefix_tokens,
            num_generated_tokens=self.num_generated,
            seconds=seconds,
            page_use=1 - self.cache.num_available_pages / num_pages if num_pages else 0.0,
            slot_use=num_running / self.cache.slots.num_slots,
        )
