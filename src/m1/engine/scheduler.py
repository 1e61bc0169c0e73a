"""`Scheduler`: which sequences prefill and which decode in the next step, and who must wait. No tensors and no text.

First come, first served: waiting requests start in order of arrival and none overtakes the first; when pages run out, the
youngest running sequence gives way and is recomputed later. So the oldest always moves on, and nobody starves.
"""

import bisect
import heapq
from dataclasses import dataclass, field

from m1.engine.cache import Move, StateCache
from m1.engine.sequence import Request, Sequence, Status


@dataclass(frozen=True)
class Chunk:
    """Tokens start:end of a sequence, to be prefilled."""

    sequence: Sequence
    start: int
    end: int


@dataclass
class Batch:
    """One step, in the order in which the runner carries it out: moves, then decoding, then prefill.

    starting: those of `decode` that decode for the first time since they were given their slot.
    growing: the others that were given one more page, the last of their pages.
    """

    moves: list[Move] = field(default_factory=list)
    starting: list[Sequence] = field(default_factory=list)
    growing: list[Sequence] = field(default_factory=list)
    decode: list[Sequence] = field(default_factory=list)
    prefill: list[Chunk] = field(default_factory=list)

    @property
    def num_tokens(self) -> int:
        return len(self.decode) + sum(chunk.end - chunk.start for chunk in self.prefill)


class Scheduler:
    """Continuous batching under three limits: sequences running at once, tokens a step, and pages.

    max_num_batched_tokens must exceed max_num_seqs, so that prefill advances beside a full house of decoding sequences.
    """

    def __init__(self, cache: StateCache, max_num_seqs: int, max_num_batched_tokens: int) -> None:
        if not 1 <= max_num_seqs < max_num_batched_tokens:
            raise ValueError(
                f"max_num_batched_tokens: expected more than max_num_seqs ({max_num_seqs}, at least 1), "
                f"given {max_num_batched_tokens}"
            )
        self.cache, self.max_num_seqs, self.max_num_batched_tokens = cache, max_num_seqs, max_num_batched_tokens
        self.running: list[Sequence] = []  # oldest first
        self._waiting: list[tuple[tuple[int, int], Sequence]] = []  # heap by age; finished ones are skipped
        self.num_waiting = self.num_preemptions = 0

    @property
    def waiting(self) -> list[Sequence]:
        """Sequences that hold nothing yet, oldest first."""
        return [sequence for _, sequence in sorted(self._waiting) if sequence.status is Status.WAITING]

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
        """Plan the next step. Empty only if nothing runs or waits, or when sequences had to give way first: call again."""
        batch = Batch()
        self._fork()
        self._plan_decode(batch)
        budget = self.max_num_batched_tokens - len(batch.decode)
        budget = self._plan_prefill(batch, budget)
        num_admitted = self._admit(batch, budget)
        if not (batch.num_tokens or num_admitted) and self.running:
            self._unblock()
        batch.decode.sort(key=lambda sequence: sequence.slot or 0)  # neighbouring states are stepped without being gathered
        batch.moves = self.cache.take_moves()
        return batch

    def _fork(self) -> None:
        """Let samples part from leaders that have prefilled their prompt, as far as there is room."""
        for leader in [s for s in self.running if s.pending and s.is_ready]:
            while leader.pending and len(self.running) < self.max_num_seqs and self.cache.can_fork(leader, self._reserve):
                other = leader.sibling(leader.pending.pop(0))
                self.cache.fork(leader, other)
                self._run(other)

    def _plan_decode(self, batch: Batch) -> None:
        for sequence in list(self.running):
            if sequence.status is not Status.RUNNING or not sequence.is_ready or sequence.pending:
                continue
            num_pages = len(sequence.pages)
            while sequence.status is Status.RUNNING and not self.cache.grow(sequence):
                self._preempt(self.running[-1])
            if sequence.status is not Status.RUNNING:
                continue
            batch.decode.append(sequence)
            if not sequence.is_decoding:
                sequence.is_decoding = True
                batch.starting.append(sequence)
            elif len(sequence.pages) > num_pages:
                batch.growing.append(sequence)

    def _plan_prefill(self, batch: Batch, budget: int) -> int:
        """Go on with the prompts that are under way, oldest first; returns what is left of the budget."""
        for sequence in self.running:
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
        """Start waiting sequences in order, as long as samples that have yet to fork keep their places."""
        num_admitted = 0
        while self._waiting and budget > 0:
            sequence = self._waiting[0][1]
            if sequence.status is not Status.WAITING:
                heapq.heappop(self._waiting)
                continue
            num_places = len(self.running) + sum(len(s.pending) for s in self.running)
            if num_places >= self.max_num_seqs or not self.cache.start(sequence, self._reserve):
                break
            heapq.heappop(self._waiting)
            self.num_waiting -= 1
            self._run(sequence)
            num_admitted += 1
            if not sequence.is_ready:
                budget -= self._plan_chunk(batch, sequence, budget)
        return num_admitted

    @property
    def _reserve(self) -> int:
        """Pages to leave to running sequences, so that a newcomer is not preempted in the next step: about one for each."""
        return min(len(self.running), self.cache.pages.num_pages // 10)

    def _run(self, sequence: Sequence) -> None:
        sequence.status = Status.RUNNING
        bisect.insort(self.running, sequence, key=lambda s: s.key)

    def _preempt(self, sequence: Sequence) -> None:
        self._stop_running(sequence)
        self._wait(sequence)
        self.num_preemptions += 1

    def _stop_running(self, sequence: Sequence) -> None:
        self.running.remove(sequence)
        self.cache.release(sequence)
        sequence.num_computed, sequence.is_decoding = 0, False

    def _unblock(self) -> None:
        """Only leaders run, and no sample of theirs finds room: the youngest gives way, or a lone one goes on without them."""
        youngest = self.running[-1]
        assert youngest.pending
        if len(self.running) > 1:
            self._preempt(youngest)
        else:
            rest, youngest.pending = youngest.pending, []
            self._wait(Sequence(youngest.request, rest[0], pending=rest[1:]))

    def complete(self, batch: Batch, tokens: list[int], logprobs: list[float]) -> None:
        """Enter what a step computed: one token and its log-probability for each of `batch.decode`, in that order."""
        for sequence, token, logprob in zip(batch.decode, tokens, logprobs, strict=True):
            sequence.num_computed += 1
            sequence.tokens.append(token)
            sequence.logprobs.append(logprob)
        for chunk in batch.prefill:
            chunk.sequence.num_computed = chunk.end
            self.cache.record(chunk.sequence)

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

    def preempt_all(self) -> None:
        """Send every running sequence back to be recomputed, and forget cached prefixes: the weights have changed."""
        for sequence in reversed(list(self.running)):
            self._preempt(sequence)
        self.cache.forget_prefixes()
