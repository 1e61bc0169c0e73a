r"""Which pairs of answers are equal, or unequal, without any algebra, and which are too dangerous to evaluate.

`settle` decides plain numbers, words and choices in microseconds. What it leaves open goes to math-verify in a killable
process (`verify.py`). Formulas that would blow up there (`10^{10^{10}}`, `(10^9)!`) are recognised here by their
spelling; the recognition only saves time, the limits of the process are what protects.
"""

import re
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache

from m1.reasoning.answers import LONGEST_NORMALIZED, normalize_answer, split_choice

LONGEST_EVALUATED = 1000  # characters
DEEPEST_NESTING = 30  # braces and parentheses; legible mathematics stays below ten
LARGEST_EXPONENT = 10_000
LARGEST_FACTORIAL = 1_000
LARGEST_SUM_POWER = 20  # exponent of a sum with letters, which algebra expands into about exponent^letters terms

# math-verify rounds to six places where a float is involved; that alone would make 1e-9 equal to 0.
_DECIMAL_PLACES = 6
_RELATIVE_TOLERANCE = Fraction(1, 10_000)
_MOST_DIGITS = 300  # longer numbers are compared as strings

_INTEGER = r"(?:\d{1,3}(?:,\d{3})+|\d+)"
_DECIMAL = re.compile(rf"([+-]?)\s?({_INTEGER}\.?\d*|\.\d+)\s?(%?)")
_RATIO = re.compile(
    rf"([+-]?)\s?(?:\\frac\s?(?:\{{\s?([+-]?{_INTEGER})\s?\}}\s?\{{\s?([+-]?{_INTEGER})\s?\}}|(\d)\s?(\d))"
    rf"|({_INTEGER})\s?/\s?({_INTEGER}))"
)
_ASSIGNMENT = re.compile(r"[a-zA-Z](?:_\w|_\{\w{1,9}\})?\s?=\s?")
_WORDS = re.compile(r"[a-zA-Z]{4,}(?:[ '-][a-zA-Z]+)*")  # shorter ones may be products of variables
_IDLE_SPACE = re.compile(r"(?<!\w)\s|\s(?!\w)")
_DIGITS = re.compile(r"\d+")
_FACTORIAL = re.compile(r"(\d+|[)}])\s*!(\s*!)?")
_POWER = re.compile(r"\^\s*")
_BARE_EXPONENT = re.compile(r"[+-]?\s?(?:\d+|\\?\w*)")
_NUMBER_TO_A_NUMBER = re.compile(r"(\d+)\s*\^\s*\{?\s*(\d+)")
_SYMBOL = re.compile(r"(?<![\\a-zA-Z])[a-zA-Z]")


def settle(gold: str, answer: str) -> bool | tuple[str, str]:
    """Whether `answer` equals `gold` where the spelling tells, else the pair in the form that algebra should compare.

    Numbers are compared exactly, as rationals; where one is written as a decimal they need only agree when rounded to six
    places (math-verify's rule, so 0.333333 is 1/3 and 0.333 is not) and to one part in 10,000. A percentage equals both its
    value and its number (50% is 0.5 and 50, again math-verify's rule). A choice is compared by its letter where `gold` is
    one, and taken off where `gold` is not: "(C) 12" is 12. A number equals a letter said to be it: `x = 5` is 5. Answers too
    long, too deeply nested or too explosive to evaluate are unequal unless they are spelled alike.
    """
    if gold == answer:
        return bool(answer.strip())
    if max(len(gold), len(answer)) > LONGEST_NORMALIZED:  # not even looked at: a vote compares every answer with every other
        return False
    gold, answer = normalize_answer(gold), normalize_answer(answer)
    if not gold or not answer:
        return False
    gold_choice, gold_rest = split_choice(gold)
    answer_choice, answer_rest = split_choice(answer)
    if gold_choice and answer_choice:
        return gold_choice == answer_choice
    return _settle_unlabelled(gold_rest or gold, answer_rest or answer)


def _settle_unlabelled(gold: str, answer: str) -> bool | tuple[str, str]:
    if _IDLE_SPACE.sub("", gold) == _IDLE_SPACE.sub("", answer):
        return True
    gold_number, answer_number = parse_number(gold), parse_number(answer)
    if gold_number and not answer_number:
        answer_number = _assigned_number(answer)
    elif answer_number and not gold_number:
        gold_number = _assigned_number(gold)
    if gold_number and answer_number:
        return _numbers_equal(gold_number, answer_number)
    if _WORDS.fullmatch(gold) and _WORDS.fullmatch(answer):
        return gold.casefold() == answer.casefold()
    if is_explosive(gold) or is_explosive(answer):
        return False
    return gold, answer


@dataclass(frozen=True, slots=True)
class WrittenNumber:
    """A rational number as an answer writes it; the `value` of "50%" is 1/2."""

    value: Fraction
    is_decimal: bool = False
    is_percentage: bool = False


@lru_cache(maxsize=65_536)
def parse_number(text: str) -> WrittenNumber | None:
    r"""The rational number that a normalised answer is (12, 1,234, -.5, 3/4, \frac{3}{4}, \frac34, 50%), else None."""
    if len(text) > _MOST_DIGITS:
        return None
    if decimal := _DECIMAL.fullmatch(text):
        sign, digits, percent = decimal.groups()
        value = Fraction(digits.replace(",", "").rstrip(".")) * (-1 if sign == "-" else 1)
        return WrittenNumber(value / 100 if percent else value, "." in digits or bool(percent), bool(percent))
    if ratio := _RATIO.fullmatch(text):
        sign, *parts = ratio.groups()
        numerator, denominator = (int(part.replace(",", "")) for part in parts if part is not None)
        if denominator:
            return WrittenNumber(Fraction(numerator, denominator) * (-1 if sign == "-" else 1))
    return None


def _assigned_number(text: str) -> WrittenNumber | None:
    """The number that a letter is said to be: 58,500 in `N = 58,500`."""
    assignment = _ASSIGNMENT.match(text)
    return parse_number(text[assignment.end() :]) if assignment else None


def _numbers_equal(gold: WrittenNumber, answer: WrittenNumber) -> bool:
    is_decimal = gold.is_decimal or answer.is_decimal
    if _values_equal(gold.value, answer.value, is_decimal):
        return True
    if gold.is_percentage == answer.is_percentage:
        return False
    as_numbers = [number.value * (100 if number.is_percentage else 1) for number in (gold, answer)]
    return _values_equal(as_numbers[0], as_numbers[1], is_decimal)


def _values_equal(gold: Fraction, answer: Fraction, is_decimal: bool) -> bool:
    if gold == answer or not is_decimal:
        return gold == answer
    agree_rounded = round(gold, _DECIMAL_PLACES) == round(answer, _DECIMAL_PLACES)
    return agree_rounded and abs(gold - answer) <= _RELATIVE_TOLERANCE * abs(gold)


@lru_cache(maxsize=65_536)
def is_explosive(formula: str) -> bool:
    r"""Whether evaluating a normalised formula may take unbounded time or memory, judged by its spelling.

    Too long, too deeply nested, numeric towers (`10^{10^{10}}`; `e^{x^2}` is fine), large exponents and factorials,
    factorials of powers or factorials, high powers of sums with letters.
    """
    if len(formula) > LONGEST_EVALUATED:
        return True
    partner = _bracket_pairs(formula)
    if partner is None:
        return True
    for factorial in _FACTORIAL.finditer(formula):
        operand = factorial.group(1)
        if operand in ")}":
            operand = formula[partner.get(factorial.start(1), 0) : factorial.start(1)]
        if factorial.group(2) or "!" in operand or "^" in operand or _largest_number(operand) > LARGEST_FACTORIAL:
            return True
    return any(_power_explodes(formula, power, partner) for power in _POWER.finditer(formula))


def _power_explodes(formula: str, power: re.Match[str], partner: dict[int, int]) -> bool:
    start = power.end()
    bare = _BARE_EXPONENT.match(formula, start)
    assert bare is not None  # it matches the empty string
    exponent = formula[start : partner[start] + 1] if start in partner else bare.group()
    is_tower = exponent.count("^") > 1 or formula[start + len(exponent) :].lstrip().startswith("^")
    inner = [int(base[:6]) ** min(int(power[:6]), 64) for base, power in _NUMBER_TO_A_NUMBER.findall(exponent)]
    if max(_largest_number(exponent), *inner, 0) > LARGEST_EXPONENT:
        return True
    if _DIGITS.search(exponent) and (is_tower or ("!" in exponent and _largest_number(exponent) > 7)):
        return True  # 7! is the last factorial below the largest exponent
    base_end = len(formula[: power.start()].rstrip()) - 1
    base = formula[partner[base_end] : base_end] if partner.get(base_end, base_end) < base_end else ""
    has_sum_with_letters = re.search(r"[+-]", base) and _SYMBOL.search(base)
    return bool(has_sum_with_letters) and _largest_number(exponent) > LARGEST_SUM_POWER


def _largest_number(text: str) -> int:
    """The largest integer literal in `text`; literals of more than ten digits count as 10^10."""
    return max((int(digits) if len(digits) <= 10 else 10**10 for digits in _DIGITS.findall(text)), default=0)


def _bracket_pairs(formula: str) -> dict[int, int] | None:
    """Position of each parenthesis or brace to that of its partner; None when they nest too deeply.

    Parentheses and braces are matched apart, and without a complaint where one stays alone, as in the interval `(1,2]`.
    """
    partner: dict[int, int] = {}
    stacks: dict[str, list[int]] = {")": [], "}": []}
    for position, char in enumerate(formula):
        if char in "({":
            stacks[")" if char == "(" else "}"].append(position)
        elif char in ")}" and stacks[char]:
            opening = stacks[char].pop()
            partner[opening], partner[position] = position, opening
        if len(stacks[")"]) + len(stacks["}"]) > DEEPEST_NESTING:
            return None
    return partner
