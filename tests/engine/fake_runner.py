"""A runner without a model, for tests of the scheduler and the cache, and what it must generate.

Its states and pages hold fingerprints of the tokens that made them, so that any page or slot that is mixed up, stale, freed
too early or forked at the wrong place changes the tokens that come out. It keeps rows a slot, as the real runner does.
"""

import zlib

import numpy as np

from m1.engine.cache import Move
from m1.engine.runner import independent_groups
from m1.engine.scheduler import Batch

VOCABULARY = 50


def fingerprint(*values: object) -> int:
    return zlib.crc32(repr(values).encode())


class FakeModel:
    """One step of arithmetic: a state that every token changes, and an entry a position that the next one reads."""

    def __init__(self, has_state: bool, has_pages: bool) -> None:
        self.has_state, self.has_pages = has_state, has_pages

    def advance(self, state: int, previous: int, token: int) -> tuple[int, int]:
        """(state, entry) after `token`, from the state before it and the entry of the position before it."""
        state = fingerprint(state, token) if self.has_state else 0
        return state, fingerprint(state, previous, token)

    def next_token(self, state: int, context: list[int], seed: int) -> int:
        return fingerprint(state, context if self.has_pages else None, seed) % VOCABULARY

    def generate(self, prompt: list[int], seed: int, max_tokens: int, stop_ids: frozenset[int]) -> list[int]:
        """What a sequence generates alone, with no scheduler and no cache."""
        tokens, state, context = list(prompt), 0, [0]
        for place in range(len(prompt) + max_tokens - 1):
            state, entry = self.advance(state, context[-1], tokens[place])
            context.append(entry)
            if place + 1 == len(tokens):
                tokens.append(self.next_token(state, context[1:], seed))
                if tokens[-1] in stop_ids:
                    break
        return tokens[len(prompt) :]


class FakeRunner:
    """Executes batches of a `FakeModel` on slots and pages that start out full of garbage."""

    def __init__(self, model: FakeModel, num_slots: int, num_pages: int, page_size: int) -> None:
        self.model, self.page_size = model, page_size
        self.slots = [fingerprint("never reset", slot) for slot in range(num_slots)]
        self.pages = [[fingerprint("never written", page)] * page_size for page in range(num_pages)]
        self.rows: list[dict] = [{} for _ in range(num_slots)]

    def launch(self, batch: Batch) -> tuple[np.ndarray, np.ndarray]:
        """What the step samples, for each of `batch.slots`; the log-probability is the token itself."""
        for group in independent_groups(batch.moves):
            self._move_at_once(group)
        for sequence in batch.starting:
            self.rows[sequence.slot] = {
                "token": sequence.tokens[-1],
                "length": sequence.num_computed,
                "pages": list(sequence.pages),
                "seed": sequence.seed,
            }
        for sequence in batch.growing:
            self.rows[sequence.slot]["pages"].append(sequence.pages[-1])
        tokens = np.array([self._decode(slot) for slot in batch.slots.tolist()], np.int64)
        for chunk in batch.prefill:
            assert chunk.sequence.num_computed == chunk.start < chunk.end
            for position in range(chunk.start, chunk.end):
                self._advance(chunk.sequence.slot, chunk.sequence.pages, position, chunk.sequence.tokens[position])
        return tokens, tokens.astype(np.float32)

    def _move_at_once(self, group: list[Move]) -> None:
        """As a device does: everything is read, then everything is written."""
        if group[0].kind == "page":
            read = [list(self.pages[move.source]) for move in group]
        else:
            read = [0 if move.kind == "reset" else self.slots[move.source] for move in group]
        for move, value in zip(group, read, strict=True):
            (self.pages if move.kind == "page" else self.slots)[move.target] = value

    def _entry(self, pages: list[int], position: int) -> int:
        return self.pages[pages[position // self.page_size]][position % self.page_size] if position >= 0 else 0

    def _advance(self, slot: int, pages: list[int], position: int, token: int) -> None:
        previous = self._entry(pages, position - 1) if self.model.has_pages else 0
        self.slots[slot], entry = self.model.advance(self.slots[slot], previous, token)
        if self.model.has_pages:
            self.pages[pages[position // self.page_size]][position % self.page_size] = entry

    def _decode(self, slot: int) -> int:
        row = self.rows[slot]
        self._advance(slot, row["pages"], row["length"], row["token"])
        row["length"] += 1
        context = [self._entry(row["pages"], p) for p in range(row["length"])] if self.model.has_pages else []
        row["token"] = self.model.next_token(self.slots[slot], context, row["seed"])
        return row["token"]
