"""How samples vote: the ways that `m1 solve` and `m1 eval` know by name, and the weights that each gives to a sample.

Grouping and counting are `m1.reasoning.voting`'s.
"""

import importlib
from collections.abc import Callable, Sequence

from m1.evaluation.sampling import Sample
from m1.reasoning.voting import Equal, Vote, best_of_n, logprob_weights, majority_vote

CONFIDENCES = {"logprob": "mean_logprob", "tail": "tail_logprob"}
BEST = "best-"

# verifier(problem, completion): how good a completion is. At least 0 if it weighs votes; of any sign if the best is taken.
Verify = Callable[[str, str], float]


def require_vote(method: str) -> None:
    """Raise ValueError unless `method` is a way to vote (see `elect`)."""
    name = method.removeprefix(BEST)
    if method != "majority" and name not in CONFIDENCES and not _is_function(name):
        raise ValueError(
            f"--vote: expected majority, logprob, tail or MODULE:FUNCTION, or best-logprob, best-tail or best-MODULE:FUNCTION, "
            f"got {method!r}"
        )


def load_verifier(method: str) -> Verify | None:
    """The function that a way to vote names, or None if it names none. Raises ValueError if it can't be imported."""
    name = method.removeprefix(BEST)
    if not _is_function(name):
        return None
    module, _, function = name.partition(":")
    try:
        return getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"--vote: cannot load {name!r}: {error}") from error


def elect(
    samples: Sequence[Sample],
    answers: Sequence[str | None],
    equal: Equal,
    *,
    method: str = "majority",
    problem: str = "",
    verifier: Verify | None = None,
) -> Vote:
    """Let `samples`, which gave `answers`, vote by `method`; ties go as in `majority_vote`, by the order of `samples`.

    majority: each sample counts once. logprob, tail: exp of its mean log-prob over all tokens, or over the last
    `TAIL_TOKENS`. With `verifier`: its score of (problem, completion). best-…: the sample that scores highest decides alone.
    Raises ValueError for samples without log-probs where these are needed, or scores that can't be weights.
    """
    require_vote(method)
    if method == "majority" and verifier is None:
        return majority_vote(answers, equal)
    if verifier is not None:
        scores = [float(verifier(problem, sample.text)) for sample in samples]
    else:
        scores = _confidences(samples, CONFIDENCES[method.removeprefix(BEST)])
    if method.startswith(BEST):
        best = best_of_n(answers, scores)
        return majority_vote(answers, equal, [float(index == best) for index in range(len(samples))])
    return majority_vote(answers, equal, scores if verifier is not None else logprob_weights(scores))


def _confidences(samples: Sequence[Sample], field: str) -> list[float]:
    values = [getattr(sample, field) for sample in samples]
    if None in values:
        raise ValueError("these samples have no log-probs, which this vote needs; vote by majority, or use another backend")
    return values


def _is_function(name: str) -> bool:
    module, colon, function = name.partition(":")
    return bool(colon) and function.isidentifier() and all(part.isidentifier() for part in module.split("."))
