"""Equality by algebra: math-verify, run only inside the killable processes of `workers.py`.

Nothing else imports this module, because importing it takes 0.4 s and evaluating what models write is unsafe.
"""

import logging
from functools import lru_cache
from typing import Any

import math_verify
from sympy import Expr, UnevaluatedExpr

# Its own time limits use SIGALRM, which the worker needs; it warns once when they are off.
logging.getLogger("math_verify").setLevel(logging.ERROR)

# Numbers further apart than this are unequal under every rule of math-verify, whose loosest rounds to six places.
_CLEARLY_APART = 1e-5


def are_equal(gold: str, answer: str) -> bool:
    """Whether math-verify holds `answer` for equal to `gold`; the order matters to it (`5` accepts `x = 5`).

    Constants that clearly differ in value are told apart by evaluating them, which spares the search for a proof of
    equality: 1 ms instead of 10 for a pair of square roots.
    """
    parsed_gold, parsed_answer = _parse(gold), _parse(answer)
    if parsed_gold and parsed_answer:
        gold_value, answer_value = _value(parsed_gold[0]), _value(parsed_answer[0])
        if gold_value is not None and answer_value is not None and abs(gold_value - answer_value) > _CLEARLY_APART:
            return False
    return math_verify.verify(parsed_gold, parsed_answer, timeout_seconds=None)


@lru_cache(maxsize=4096)
def _parse(answer: str) -> list[Any]:
    return math_verify.parse(f"\\boxed{{{answer}}}", parsing_timeout=None)


def _value(parsed: Any) -> complex | None:
    """The value of a finite constant; None for anything else, percentages among it (they equal two numbers)."""
    if not isinstance(parsed, Expr) or not parsed.is_number or parsed.has(UnevaluatedExpr):
        return None
    try:
        return complex(parsed.evalf(20))
    except (TypeError, ValueError, OverflowError):  # nan, zoo, infinities and what only `doit` would evaluate
        return None
