"""`Scheduler`: which sequences prefill and which decode in the next step, and who must wait. No tensors and no text.

First come, first served: waiting requests start in order of arrival and none overtakes the first; when pages run out, the
youngest running sequence gives way and is recomputed later. So the oldest always moves on, and nobody starves.

A step is planned from counts alone, so the next ones can be planned before its tokens are read: `schedule`, `advance`, and
some steps later `receive`. A sequence that turns out to have ended meanwhile was computed for nothing for so many steps.
"""

import bisect
import heapq
from dataclasses import dataclass, field

import numpy as np

from m1.engine.cache import Move, StateCache
from m1.engine.decode_table import DecodeTable, News
from m1.engine.sequence import Request, Sequence, Status

BUSY_SHARE = 8  # a house is busy while at most one of so many places is free


@dataclass(frozen=True)
class Chunk:
    """Tokens start:end of a sequence, to be prefilled."""

    sequence: Sequence
    start: int
    end: int


def _no_rows() -> np.ndarray:
    return np.zeros(0, np.int64)


@dataclass
class Batch:
    """One step, in the order in which the runner carries it out: moves, then decoding, then prefill.

    slots: [n] int64, ascending, of the sequences that decode; serials: which sequences these are, for `Scheduler.receive`.
    starting: those of them that decode for the first time since they were given their slot.
    growing: the others that were given one more page, the last of their pages.
    max_context: tokens of the longest of them with its new one. wants_top: whether one asks for the most likely tokens.
    """

    moves: list[Move] = field(default_factory=list)
    starting: list[Sequence] = field(default_factory=list)
    growing: list[Sequence] = field(default_factory=list)
    slots: np.ndarray = field(default_factory=_no_rows)
    serials: np.ndarray = field(default_factory=_no_rows)
    prefill: list[Chunk] = field(default_factory=list)
    max_context: int = 0
    wants_top: bool = False

    @property
    def num_tokens(self) -> int:
        return len(self.slots) + sum(chunk.end - chunk.start for chunk in self.prefill)

    @property
    def is_empty(self) -> bool:
        return not (len(self.slots) or self.prefill or self.moves)


class Scheduler:
    """Continuous batching under three limits: sequences running at once, tokens a step, and pages.

    max_num_batched_tokens must exceed max_num_seqs, so that prefill advances beside a full house of decoding sequences.
    admission_interval: while at most an eighth of the places is free, prompts start only in every so many-th step, together (as
    many steps in a row as their tokens fill): a prefill of one prompt costs the host about as much as one of many.
    """

    def __init__(self, cache: StateCache, max_num_seqs: int, max_num_batched_tokens: int, admission_interval: int = 1) -> None:
        if not 1 <= max_num_seqs < max_num_batched_tokens:
            raise ValueError(
                f"max_num_batched_tokens: expected more than max_num_seqs ({max_num_seqs}, at least 1), "
                f"given {max_num_batched_tokens}"
            )
        self.cache, self.max_num_seqs, self.max_num_batched_tokens = cache, max_num_seqs, max_num_batched_tokens
        self.table = DecodeTable(cache.slots.num_slots)
        self.running: list[Sequence] = []  # oldest first
        self._preparing: list[Sequence] = []  # those of them that do not decode yet, oldest first
        self._waiting: list[tuple[tuple[int, int], Sequence]] = []  # heap by age; finished ones are skipped
        self.num_waiting = self.num_preemptions = 0
        self.admission_interval, self._steps_since_admission = admission_interval, admission_interval

    @property
    def waiting(self) -> list[Sequence]:
        """Sequences that hold nothing yet, oldest first."""
        return [sequence for _, sequence in sorted(self._waiting) if sequence.status is Status.WAITING]

    @property
    def steps_to_admission(self) -> int:
        """In how many steps waiting prompts will be looked at, where the house is so full that they are let in together."""
        is_held = self.num_waiting and self._is_busy
        return max(0, self.admission_interval - self._steps_since_admission) if is_held else self.admission_interval

    @property
    def _is_busy(self) -> bool:
        return BUSY_SHARE * (self.max_num_seqs - len(self.running)) <= self.max_num_seqs

    @property
    def is_idle(self) -> bool:
        return not self.running and not self.num_waiting

    def add(self, request: Request) -> None:
        self._wait(Sequence(request, 0, pending=list(range(1, request.params.n))))

    def _wait(self, sequence: Sequence) -> None:
        sequence.status = Status.WAITING
        self.num_waiting += 1
        heapq.heappush(self._waiting, (sequence.key, sequence))

    def schedule(self) -> Batch:
        """Plan the next step. Without tokens if nothing runs or waits, sequences had to give way first, or all of those that
        run await the reading of their last token."""
        batch = Batch()
        self._fork()
        self._plan_decode(batch)
        budget = self.max_num_batched_tokens - len(batch.slots)
        budget = self._plan_prefill(batch, budget)
        num_admitted = self._admit(batch, budget)
        if self.running and not (batch.num_tokens or num_admitted or self.table.num_sequences):
            self._unblock()
        batch.moves = self.cache.take_moves()
        return batch

    def _fork(self) -> None:
        """Let samples part from leaders that have prefilled their prompt, as far as there is room."""
        for leader in [s for s in self._preparing if s.pending and s.is_ready]:
            while leader.pending and len(self.running) < self.max_num_seqs and self.cache.can_fork(leader, self._reserve):
                other = leader.sibling(leader.pending.pop(0))
                self.cache.fork(leader, other)
                self._run(other)

    def _plan_decode(self, batch: Batch) -> None:
        """Sequences that are ready join, all that decode get room for their next token, the oldest before others."""
        ready = [s for s in self._preparing if s.is_ready and not s.pending]
        for sequence in sorted([*ready, *self.table.short_of_pages()], key=lambda s: s.key):
            if sequence.status is not Status.RUNNING:
                continue
            is_new = not self.table.holds(sequence)
            length = sequence.num_computed + 1 if is_new else int(self.table.lengths[_slot(sequence)]) + 1
            num_pages = len(sequence.pages)
            while sequence.status is Status.RUNNING and not self.cache.grow(sequence, length):
                self._preempt(self.running[-1])
            if sequence.status is not Status.RUNNING:
                continue
            if is_new:
                _remove(self._preparing, sequence)
                self.table.start(sequence, self.cache.capacity_of(sequence))
                batch.starting.append(sequence)
            elif len(sequence.pages) > num_pages:
                self.table.capacities[_slot(sequence)] = self.cache.capacity_of(sequence)
                batch.growing.append(sequence)
        batch.slots = self.table.active_slots()
        batch.serials = self.table.serials_of(batch.slots)
        batch.wants_top = self.table.num_wanting_top > 0
        batch.max_context = int(self.table.lengths[batch.slots].max()) + 1 if len(batch.slots) else 0

    def _plan_prefill(self, batch: Batch, budget: int) -> int:
        """Go on with the prompts that are under way, oldest first; returns what is left of the budget."""
        for sequence in self._preparing:
            if budget == 0:
                break
            if not sequence.is_ready:
                budget -= self._plan_chunk(batch, sequence, budget)
        return budget

    def _plan_chunk(self, batch: Batch, sequence: Sequence, budget: int) -> int:
        start = sequence.num_computed
        end = min(sequence.num_prefill, start + budget)
        end = min([end, *(cut for cut in sequence.cuts if cut > start)])
        batch.prefill.append(Chunk(sequence, start, end))
        return end - start

    def _admit(self, batch: Batch, budget: int) -> int:
        """Start waiting sequences in order, as long as samples that have yet to fork keep their places.

        Where the budget ends before those that wait, the others start in the next step, not an interval later.
        """
        num_admitted = 0
        self._steps_since_admission += 1
        if self._is_busy and self._steps_since_admission < self.admission_interval:
            return 0
        while self._waiting and budget > 0:
            sequence = self._waiting[0][1]
            if sequence.status is not Status.WAITING:
                heapq.heappop(self._waiting)
                continue
            num_places = len(self.running) + sum(len(s.pending) for s in self._preparing)
            if num_places >= self.max_num_seqs or not self.cache.start(sequence, self._reserve):
                break
            heapq.heappop(self._waiting)
            self.num_waiting -= 1
            self._run(sequence)
            num_admitted += 1
            self._steps_since_admission = 0
            if not sequence.is_ready:
                budget -= self._plan_chunk(batch, sequence, budget)
        if budget == 0:
            self._steps_since_admission = self.admission_interval
        return num_admitted

    @property
    def _reserve(self) -> int:
        """Pages to leave to running sequences, so that a newcomer is not preempted in the next step: about one for each."""
        return min(len(self.running), self.cache.pages.num_pages // 10)

    def _run(self, sequence: Sequence) -> None:
        sequence.status = Status.RUNNING
        for group in (self.running, self._preparing):
            bisect.insort(group, sequence, key=lambda s: s.key)

    def _preempt(self, sequence: Sequence) -> None:
        self._stop_running(sequence)
        self._wait(sequence)
        self.num_preemptions += 1

    def _stop_running(self, sequence: Sequence) -> None:
        _remove(self.running, sequence)
        if self.table.holds(sequence):
            self.table.stop(sequence)
        else:
            _remove(self._preparing, sequence)
        self.cache.release(sequence)
        sequence.num_computed = 0

    def _unblock(self) -> None:
        """Only leaders run, and no sample of theirs finds room: the youngest gives way, or a lone one goes on without them."""
        youngest = self.running[-1]
        assert youngest.pending
        if len(self.running) > 1:
            self._preempt(youngest)
        else:
            rest, youngest.pending = youngest.pending, []
            self._wait(Sequence(youngest.request, rest[0], pending=rest[1:]))

    def advance(self, batch: Batch) -> None:
        """The step is on its way: later ones are planned as if it had run."""
        self.table.advance(batch.slots)
        for chunk in batch.prefill:
            chunk.sequence.num_computed = chunk.end
            self.cache.record(chunk.sequence)

    def receive(self, batch: Batch, tokens: np.ndarray, logprobs: np.ndarray) -> tuple[int, list[News]]:
        """Enter what a step computed, a token and its log-probability for each of `batch.slots`, in that order.

        Returns how many of them were for sequences that still run, and which tokens must be looked at.
        """
        return self.table.receive(batch.slots, batch.serials, tokens, logprobs)

    def finish(self, sequence: Sequence) -> None:
        """Take a running or waiting sequence out and free what it holds."""
        if sequence.status is Status.RUNNING:
            self._stop_running(sequence)
        elif sequence.status is Status.WAITING:
            self.num_waiting -= 1
        sequence.status = Status.FINISHED

    def sequences_of(self, request: Request) -> list[Sequence]:
        """The unfinished sequences of a request (samples that have yet to fork are in their leader's `pending`)."""
        return [s for s in (*self.running, *self.waiting) if s.request is request]

    def shrink(self) -> bool:
        """Make steps smaller: half the tokens, or where prefill has no more than its share, half the sequences.

        False if that is not possible. Sequences that run beyond the new limit must give way (`preempt_all`).
        """
        tokens = max(self.max_num_batched_tokens // 2, self.max_num_seqs + 1)
        if tokens == self.max_num_batched_tokens:
            if self.max_num_seqs == 1:
                return False
            self.max_num_seqs //= 2
            tokens = self.max_num_seqs + 1
        self.max_num_batched_tokens = tokens
        return True

    def preempt_all(self) -> None:
        """Send every running sequence back to be recomputed, and forget cached prefixes: the weights have changed."""
        for sequence in reversed(list(self.running)):
            self._preempt(sequence)
        self.cache.forget_prefixes()


def _slot(sequence: Sequence) -> int:
    assert sequence.slot is not None
    return sequence.slot


def _remove(group: list[Sequence], sequence: Sequence) -> None:
    """Take a sequence out of a list that is ordered by age."""
    place = bisect.bisect_left(group, sequence.key, key=lambda s: s.key)
    assert group[place] is sequence
    del group[place]
