"""Scoring completions by the reward that their problem names; nothing a completion or a reward does ends the run.

    math                        1 where the extracted answer equals the problem's (verify.py), else 0
    reasoning_gym:<generator>   1 where the generator's own scoring gives full marks, else 0
    <module>:<function>         function(problem, completion) -> float of the user's, run in a killable process

Groups, advantages and losses are the trainer's business.
"""

import math
import re
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from m1.reasoning.answers import extract_answer, normalize_answer
from m1.reasoning.equality import parse_number
from m1.reasoning.problems import Problem
from m1.reasoning.verify import Verifier
from m1.reasoning.workers import Outcome, WorkerPool

TIME_LIMIT = 10.0  # seconds a call of a reward function
MEMORY_LIMIT = 4 << 30  # bytes of address space of a reward's process
_FULL_MARKS = 1.0  # reasoning-gym's scores are not binary: 0.01 for an attempt, parts for an answer inside other text
_GYM_FUNCTION = "m1.reasoning.gym_reward:score"
_REWARD_NAME = re.compile(r"math|reasoning_gym:\w+|(?!reasoning_gym:)[A-Za-z_][\w.]*:[A-Za-z_]\w*")


@dataclass(frozen=True, slots=True)
class Score:
    """A completion's reward and extracted answer; `reason` says why a reward could not be computed and is 0."""

    reward: float
    answer: str | None
    reason: str | None = None


class Scorer:
    """Scores completions; a context manager that owns the processes of every reward it has met.

    `time_limit` (seconds) and `memory_limit` (bytes) hold for a call of reasoning-gym's or the user's functions; checking
    mathematics has the limits of `verifier`, which stays open if it was passed in.
    """

    def __init__(
        self,
        *,
        verifier: Verifier | None = None,
        time_limit: float = TIME_LIMIT,
        memory_limit: int = MEMORY_LIMIT,
        num_workers: int | None = None,
    ):
        self._owns_verifier = verifier is None
        self.verifier = verifier or Verifier(num_workers=num_workers)
        self._limits: dict[str, Any] = {
            "time_limit": time_limit,
            "memory_limit": memory_limit,
            "num_workers": num_workers,
        }
        self._pools: dict[str, WorkerPool] = {}

    def __enter__(self) -> "Scorer":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """End all processes."""
        for pool in self._pools.values():
            pool.close()
        if self._owns_verifier:
            self.verifier.close()

    def score_many(self, problems: Sequence[Problem], completions: Sequence[str]) -> list[Score]:
        """Score `completions[i]` against `problems[i]`, each by its problem's reward; in their order.

        A reward that raises, hangs, dies or returns no finite number gives 0 and the reason. Raises ValueError where a
        problem names a reward that does not exist or can't be imported, because then no score would mean anything.
        """
        if len(problems) != len(completions):
            raise ValueError(f"problems and completions must pair up, got {len(problems)} and {len(completions)}")
        by_reward = defaultdict(list)
        for index, problem in enumerate(problems):
            by_reward[_function_of(problem)].append(index)
        scores: dict[int, Score] = {}
        for function, indices in by_reward.items():
            some = [problems[index] for index in indices]
            texts = [completions[index] for index in indices]
            answers = [extract_answer(text) for text in texts]
            if function == "math":
                scored = self._score_math(some, answers)
            elif function == _GYM_FUNCTION:
                scored = self._score_gym(some, answers)
            else:
                scored = self._score_by_function(function, some, texts, answers)
            scores.update(zip(indices, scored))
        return [scores[index] for index in range(len(problems))]

    def _score_math(self, problems: list[Problem], answers: list[str | None]) -> list[Score]:
        verdicts = self.verifier.judge_many(zip((problem.answer for problem in problems), answers))
        return [Score(float(verdict.is_equal), answer, verdict.reason) for verdict, answer in zip(verdicts, answers)]

    def _score_gym(self, problems: list[Problem], answers: list[str | None]) -> list[Score]:
        calls = {
            index: [
                problem.reward.removeprefix("reasoning_gym:"),
                problem.metadata.get("config", {}),
                _gym_entry(problem),
                _spellings(answer),
            ]
            for index, (problem, answer) in enumerate(zip(problems, answers))
            if answer is not None
        }
        outcomes = dict(zip(calls, self._pool(_GYM_FUNCTION).call_many(list(calls.values()))))
        scores = [_to_score(outcomes.get(index, Outcome(0.0)), answer) for index, answer in enumerate(answers)]
        return [Score(float(score.reward >= _FULL_MARKS), score.answer, score.reason) for score in scores]

    def _score_by_function(
        self, function: str, problems: list[Problem], completions: list[str], answers: list[str | None]
    ) -> list[Score]:
        calls = [[asdict(problem), completion] for problem, completion in zip(problems, completions)]
        return [_to_score(outcome, answer) for outcome, answer in zip(self._pool(function).call_many(calls), answers)]

    def _pool(self, function: str) -> WorkerPool:
        if function not in self._pools:
            self._pools[function] = WorkerPool(function, **self._limits)
        return self._pools[function]


def require_reward_name(name: str) -> None:
    """Raise ValueError unless `name` has the form of a reward's name; says nothing about whether it can be imported."""
    if not _REWARD_NAME.fullmatch(name):
        raise ValueError(f"reward must be `math`, `reasoning_gym:<generator>` or `<module>:<function>`, got {name!r}")


def _function_of(problem: Problem) -> str:
    try:
        require_reward_name(problem.reward)
    except ValueError as error:
        raise ValueError(f"problem {problem.id!r}: {error}") from error
    return _GYM_FUNCTION if problem.reward.startswith("reasoning_gym:") else problem.reward


def _gym_entry(problem: Problem) -> dict[str, Any]:
    if "entry" not in problem.metadata:
        raise ValueError(
            f"problem {problem.id!r} has the reward {problem.reward!r} but no reasoning-gym entry in its metadata; "
            "make it with generate_problems or use the reward `math`"
        )
    return problem.metadata["entry"]


def _spellings(answer: str) -> list[str]:
    r"""`answer` as given and in the plain forms that reasoning-gym's string comparisons expect: 1234, 3/4, no LaTeX."""
    plain = re.sub(r"\\frac\s?\{([^{}]*)\}\s?\{([^{}]*)\}", r"\1/\2", normalize_answer(answer))
    if parse_number(plain):
        plain = plain.replace(",", "")
    return list(dict.fromkeys((answer, normalize_answer(answer), plain)))


def _to_score(outcome: Outcome, answer: str | None) -> Score:
    if outcome.error is not None:
        return Score(0.0, answer, outcome.error)
    value = outcome.value
    if not isinstance(value, int | float) or not math.isfinite(value):
        return Score(0.0, answer, f"returned {value!r}, not a finite number")
    return Score(float(value), answer)
