"""`DecodeTable`: the sequences that decode, a row a slot, in numpy: a step costs the host a few array operations, not a loop.

Steps are planned before the tokens of earlier ones are read. So a row knows two counts: the tokens that its state will hold
once every planned step has run, and those that have been read. What a step computed for a sequence that has since left (it
ended, or gave way) is recognised by the serial number of its stay, and dropped. No tensors, pages or text here.
"""

from dataclasses import dataclass

import numpy as np

from m1.engine.sequence import Sequence

NO_TOKEN = -1  # fills rows of stop tokens


@dataclass(frozen=True)
class News:
    """A token that must be looked at one by one: it may end its sequence, or someone waits for it.

    place: row in the arrays of its step. is_full: the sequence may not grow further.
    """

    sequence: Sequence
    place: int
    token: int
    logprob: float
    is_full: bool


class DecodeTable:
    """Rows for sequences in slots 0 … num_slots - 1. The sequences' own lists of tokens are extended when they leave."""

    def __init__(self, num_slots: int) -> None:
        self.num_slots, self.num_sequences = num_slots, 0
        self.num_wanting_top = 0  # sequences that ask for the most likely tokens
        self.lengths = np.zeros(num_slots, np.int64)  # tokens in the state once all planned steps have run
        self.capacities = np.zeros(num_slots, np.int64)  # tokens that its pages hold
        self._final = np.zeros(num_slots, np.int64)  # length at which its last allowed token is planned
        self._is_active = np.zeros(num_slots, bool)  # whether the next step advances it
        self._is_watched = np.zeros(num_slots, bool)  # whether each of its tokens is news
        self._serials = np.zeros(num_slots, np.int64)  # of the stay; 0: nobody is there
        self._last_serial = 0
        self._sequences: list[Sequence | None] = [None] * num_slots
        self._stop_ids = np.full((num_slots, 2), NO_TOKEN, np.int64)
        self._counts = np.zeros(num_slots, np.int64)  # tokens read since it came
        self._room = np.zeros(num_slots, np.int64)  # tokens it may generate here
        self._tokens = np.zeros((num_slots, 64), np.int32)
        self._logprobs = np.zeros((num_slots, 64), np.float32)

    def start(self, sequence: Sequence, capacity: int) -> None:
        """Let a sequence whose tokens but the last are in its state decode from the next step on."""
        slot, request = sequence.slot, sequence.request
        assert slot is not None and self._sequences[slot] is None and sequence.is_ready
        self.num_sequences += 1
        self.num_wanting_top += bool(request.params.logprobs)
        self._last_serial += 1
        self._sequences[slot], self._serials[slot] = sequence, self._last_serial
        self._counts[slot] = 0
        self.lengths[slot] = sequence.num_computed
        self.limit(sequence, request.max_tokens)
        self.capacities[slot] = capacity
        self._is_active[slot] = True
        self._is_watched[slot] = request.wants_every_token
        if len(request.stop_ids) > self._stop_ids.shape[1]:
            more = len(request.stop_ids) - self._stop_ids.shape[1]
            self._stop_ids = np.pad(self._stop_ids, ((0, 0), (0, more)), constant_values=NO_TOKEN)
        self._stop_ids[slot] = NO_TOKEN
        self._stop_ids[slot, : len(request.stop_ids)] = list(request.stop_ids)

    def limit(self, sequence: Sequence, max_tokens: int) -> None:
        """Let a sequence that has just come generate `max_tokens` tokens in all."""
        slot = sequence.slot
        self._room[slot] = max_tokens - sequence.num_generated
        self._final[slot] = sequence.num_computed + self._room[slot]

    def stop(self, sequence: Sequence) -> None:
        """Take a sequence out and give it the tokens that were read; what is still computed for it will be dropped."""
        slot = sequence.slot
        assert slot is not None and self._sequences[slot] is sequence
        count = self._counts[slot]
        sequence.tokens += self._tokens[slot, :count].tolist()
        sequence.logprobs += self._logprobs[slot, :count].tolist()
        self.num_sequences -= 1
        self.num_wanting_top -= bool(sequence.request.params.logprobs)
        self._sequences[slot], self._serials[slot], self._is_active[slot] = None, 0, False

    def holds(self, sequence: Sequence) -> bool:
        return sequence.slot is not None and self._sequences[sequence.slot] is sequence

    def active_slots(self) -> np.ndarray:
        """Rows that the next step advances, ascending: neighbouring states can be stepped without being gathered."""
        return np.flatnonzero(self._is_active)

    def short_of_pages(self) -> list[Sequence]:
        """Sequences whose pages can't take the next token, in the order of their slots."""
        slots = np.flatnonzero(self._is_active & (self.lengths >= self.capacities))
        return [sequence for slot in slots.tolist() if (sequence := self._sequences[slot]) is not None]

    def serials_of(self, slots: np.ndarray) -> np.ndarray:
        return self._serials[slots]

    def advance(self, slots: np.ndarray) -> None:
        """One more token for each of `slots` is on its way."""
        lengths = self.lengths[slots] + 1
        self.lengths[slots] = lengths
        self._is_active[slots] = lengths < self._final[slots]

    def receive(
        self, slots: np.ndarray, serials: np.ndarray, tokens: np.ndarray, logprobs: np.ndarray
    ) -> tuple[int, list[News]]:
        """Enter the tokens [n] that a step sampled for `slots`, as they were then; returns (how many counted, the news)."""
        places = np.flatnonzero(self._serials[slots] == serials)
        slots, tokens, logprobs = slots[places], tokens[places], logprobs[places]
        counts = self._counts[slots]
        if len(slots) and counts.max() >= self._tokens.shape[1]:
            self._tokens = np.concatenate([self._tokens, np.zeros_like(self._tokens)], axis=1)
            self._logprobs = np.concatenate([self._logprobs, np.zeros_like(self._logprobs)], axis=1)
        self._tokens[slots, counts] = tokens
        self._logprobs[slots, counts] = logprobs
        counts += 1
        self._counts[slots] = counts
        is_full = counts >= self._room[slots]
        is_stop = (self._stop_ids[slots] == tokens[:, None]).any(axis=1)
        rows = np.flatnonzero(is_full | is_stop | self._is_watched[slots])
        news = []
        for row, slot in zip(rows.tolist(), slots[rows].tolist(), strict=True):
            sequence = self._sequences[slot]
            assert sequence is not None
            news.append(News(sequence, int(places[row]), int(tokens[row]), float(logprobs[row]), bool(is_full[row])))
        return len(slots), news
