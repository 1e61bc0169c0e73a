"""Checking answers: quick where the spelling decides, by math-verify in killable processes where it takes algebra.

Here live `Verifier` and its limits and cache. What is equal is defined in `equality.py` (without algebra) and
`symbolic.py` (with it); how processes are kept in check in `workers.py`.
"""

import threading
from collections.abc import Iterable
from dataclasses import dataclass

from m1.reasoning.equality import settle
from m1.reasoning.workers import WorkerPool

CPU_LIMIT = 1.0  # seconds of processor time a comparison; honest ones take up to 0.15
_SECONDS_PER_CPU_SECOND = 20  # after so much time on the clock it ends too, however busy the machine is
MEMORY_LIMIT = 512 << 20  # bytes of address space; math-verify alone takes 60 MB
_MOST_CACHED = 200_000  # pairs; only those that took algebra are kept


@dataclass(frozen=True, slots=True)
class Verdict:
    """Whether an answer equals the gold one; `reason` says why a comparison that should have been made could not be."""

    is_equal: bool
    reason: str | None = None


class Verifier:
    """Says whether answers are mathematically equal; a context manager, safe to use from several threads.

        with Verifier() as verifier:
            verifier.check(gold="\\frac{1}{2}", answer="0.5")

    No answer, whatever it says, takes more than `cpu_limit` seconds or `memory_limit` bytes, crashes the caller or raises:
    what can't be compared within the limits is unequal. The limit is of processor time, so that verdicts do not depend on
    how busy the machine is. Processes start with the first pair that takes algebra and end with the context or the
    interpreter.
    """

    def __init__(self, *, cpu_limit: float = CPU_LIMIT, memory_limit: int = MEMORY_LIMIT, num_workers: int | None = None):
        self._pool = WorkerPool(
            "m1.reasoning.symbolic:are_equal",
            time_limit=cpu_limit * _SECONDS_PER_CPU_SECOND,
            cpu_limit=cpu_limit,
            memory_limit=memory_limit,
            num_workers=num_workers,
        )
        self._cache: dict[tuple[str, str], Verdict] = {}
        self._alone: dict[str, Verdict] = {}  # of answers that a comparison failed on: whether they can be evaluated at all
        self._lock = threading.Lock()

    def __enter__(self) -> "Verifier":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """End the processes; the verifier starts new ones if it is used again."""
        self._pool.close()

    def check(self, gold: str, answer: str | None) -> bool:
        """Whether `answer` equals `gold`. The order matters in rare cases: `5` accepts `x = 5`. No answer is never equal."""
        return self.check_many([(gold, answer)])[0]

    def check_many(self, pairs: Iterable[tuple[str, str | None]]) -> list[bool]:
        """`check` for many (gold, answer) pairs at once, in parallel; in their order."""
        return [verdict.is_equal for verdict in self.judge_many(pairs)]

    def judge_many(self, pairs: Iterable[tuple[str, str | None]]) -> list[Verdict]:
        """`check_many` with the reasons of the comparisons that failed (time, memory, crash)."""
        settled = [False if answer is None else settle(gold, answer) for gold, answer in pairs]
        questions = dict.fromkeys(pair for pair in settled if not isinstance(pair, bool))
        known = {pair: self._cache[pair] for pair in questions if pair in self._cache}
        known |= {pair: verdict for pair in questions if (verdict := self._hopeless(pair)) and pair not in known}
        new = [pair for pair in questions if pair not in known]
        for pair, outcome in zip(new, self._pool.call_many(new)) if new else ():
            known[pair] = Verdict(bool(outcome.value), outcome.error)
            self._remember(pair, known[pair])
        self._learn_from(pair for pair in new if known[pair].reason)
        return [Verdict(pair) if isinstance(pair, bool) else known[pair] for pair in settled]

    def are_same(self, first: str, second: str) -> bool:
        """Whether two answers of equal standing are the same: equal in either order. For grouping votes."""
        return self.check(first, second) or self.check(second, first)

    def _hopeless(self, pair: tuple[str, str]) -> Verdict | None:
        """The verdict on a pair of which one side can't be evaluated."""
        return next((self._alone[side] for side in pair if side in self._alone and self._alone[side].reason), None)

    def _learn_from(self, failed: Iterable[tuple[str, str]]) -> None:
        """Find out which side of each failed comparison was to blame, so that a vote among n bombs costs n limits, not n^2."""
        sides = [side for side in dict.fromkeys(side for pair in failed for side in pair) if side not in self._alone]
        outcomes = self._pool.call_many([(side, side) for side in sides]) if sides else []
        with self._lock:
            self._alone |= {side: Verdict(False, outcome.error) for side, outcome in zip(sides, outcomes)}

    def _remember(self, pair: tuple[str, str], verdict: Verdict) -> None:
        with self._lock:
            self._cache[pair] = verdict
            while len(self._cache) > _MOST_CACHED:
                del self._cache[next(iter(self._cache))]
