"""reasoning-gym's scoring, run only inside the killable processes of `workers.py` (some generators crash on odd answers)."""

import json
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

from reasoning_gym.factory import create_dataset


def score(generator: str, config: Mapping[str, Any], entry: Mapping[str, Any], spellings: Sequence[str]) -> float:
    """The best score, 0 to 1, that the generator gives any of the `spellings` of one answer to `entry`.

    A spelling on which the generator crashes counts 0 unless it crashes on all; then the last error is raised.
    """
    dataset = _dataset(generator, json.dumps(config))
    scores: list[float] = []
    for spelling in spellings:
        try:
            scores.append(float(dataset.score_answer(spelling, entry)))
        except Exception:
            if spelling == spellings[-1] and not scores:
                raise
    return max(scores)


@lru_cache(maxsize=64)
def _dataset(generator: str, config: str) -> Any:
    return create_dataset(generator, size=1, seed=0, **json.loads(config))
