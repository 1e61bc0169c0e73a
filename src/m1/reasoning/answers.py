r"""Reading the final answer out of a model's text, and writing it in one form.

Here live `extract_answer` (which part of a completion is its answer) and `normalize_answer` (one spelling for answers
that differ only in typesetting). Whether two answers are equal is decided in `equality.py` and `verify.py`.

Everything here takes time linear in its input, so that hostile text costs no more than honest text.
"""

import re
import unicodedata
from functools import lru_cache

# What the M1 paper puts behind every problem; `extract_answer` finds what it asks for.
ANSWER_INSTRUCTION = "Let's think step by step and output the final answer within \\boxed{}."

_BOX = r"\\(?:boxed|fbox)"
# A box's opening brace, a box around a bare number (`\boxed 5`), an escaped character (`\{` is no brace), or a brace.
_BOX_TOKEN = re.compile(rf"{_BOX}\s*\{{|{_BOX}\s+(?P<bare>-?\d[\d.,/]*)|\\.|[{{}}]", re.DOTALL)
_BOX_START = re.compile(_BOX)

_HASH_LINE = re.compile(r"####+[ \t]*(?P<answer>[^\n]*)")
_PHRASE = re.compile(r"\b(?:final\s+)?answer\**(?:\s+is\b\s*:?|\s*:)[\s*]*", re.IGNORECASE)
_MATH_DELIMITERS = (("$$", "$$"), ("$", "$"), (r"\(", r"\)"), (r"\[", r"\]"))
_SENTENCE_END = re.compile(r"\n|[.?](?=\s|\*|$)|!(?=\s+[A-Z]|\s*$)")
_PROSE_WORD = re.compile(r"(?<![\\a-zA-Z])(?!sin|cos|tan|log|exp|sqrt|frac)[a-zA-Z]{3,}")
_LONGEST_PROSE_ANSWER = 4  # words; a longer phrase without a number is the start of an explanation

# A minus sign counts where nothing stands before it that it could be subtracted from.
_NUMBER = re.compile(
    r"(?:(?<![\w.)}])[-−])?\\[dt]?frac\s*\{[-−]?\d+\}\s*\{\d+\}"
    r"|(?:(?<![\w.)}])[-−]\\?\$?)?(?:(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|(?<!\d)\.\d+)"
    r"(?:\s?/\s?\d+(?![\d.]))?(?:\s?\\?%)?"
)
# A choice and nothing else: "(C)", "C", "**C**", "C.", "Option C", "\text{(C)}", also "(c)".
_CHOICE = re.compile(
    r"(?:(?i:option|choice)\s+)?\**(?:\\(?:text|textbf|mathrm|mathbf)\s*\{\s*)?"
    r"(?:\(\s*(?P<enclosed>[A-Ea-e])\s*\)|(?P<bare>[A-E]))[).:]?\s*\}?\**\.?"
)
# A choice with its value behind it: "(C) 12", "\textbf{(C) }12", "(C): 12".
_LABEL = re.compile(r"(?:\\text(?:bf)?\s*\{\s*)?\(([A-E])\)\s*\}?[\s:.]*(?=\S)")

_UNICODE = str.maketrans(
    {"−": "-", "–": "-", "×": r"\times ", "·": r"\cdot ", "÷": "/", "π": r"\pi ", "∞": r"\infty ", "√": r"\sqrt ",
     "≤": r"\le ", "≥": r"\ge ", "∪": r"\cup ", "°": r"^\circ", "（": "(", "）": ")", "，": ",", "²": "^2", "³": "^3"}
)  # fmt: skip
_REWRITES = tuple(
    (re.compile(pattern), replacement)
    for pattern, replacement in (
        (r"\\(?:left|right|[bB]igg?[lr]?|displaystyle|limits)(?![a-zA-Z])\s?(?:\.(?!\d))?", ""),
        (r"(?<!\\)\\!\s*", ""),  # with the comma before it a thousands separator
        (r"\{,\}\s?", ","),
        (r"(?<!\\)\\[,;: ]|\\q?quad(?![a-zA-Z])|~", " "),
        (r"\\[dtc]frac(?![a-zA-Z])", r"\\frac"),
        (r"\\(?:textnormal|textrm|textit|textbf|mbox|mathrm)(?![a-zA-Z])", r"\\text"),
        (r"\\(l|g|n)eq(?![a-zA-Z])", r"\\\1e"),
        (r"\\%|\s+percent\b", "%"),
        (r"(?<!\\)\\[()\[\]]|\\?\$", ""),
        (r"\s+", " "),
        (r"^\*+|\*+$", ""),
        (r"\*\*", "^"),
    )
)
# Words that are units wherever they stand behind a number; single letters are not among them: "2 m" may be twice m.
_UNIT_WORDS = (
    "dollars? cents? euros? pounds? degrees? radians? units? square cubic sq per inch inches feet foot ft yards? miles? "
    "mph met(?:er|re)s? cm mm km kg kilograms? grams? lit(?:er|re)s? seconds? minutes? hours? days? weeks? months? years? "
    "people students? points? ways? times"
)
_UNITS = re.compile(
    r"(?<=[\d})])\s*(?:\^\s*\{?\s*\\circ\s*\}?|\\text\s*\{[a-zA-Z .^/0-9]*\}(?:\^\{?[23]\}?)?"
    rf"|(?<=\s)(?:(?:{'|'.join(_UNIT_WORDS.split())})\b[\s.]*)+(?:\^\{{?[23]\}}?)?)$"
)
_WHOLE_TEXT = re.compile(r"\\text\s*\{([^{}\\]*)\}")

LONGEST_NORMALIZED = 4000  # characters; the longest answer of the usual benchmarks has about 200


def extract_answer(text: str) -> str | None:
    r"""The final answer that `text` states, as it is written there, or None where it states none.

    The first of these that exists: the last `\boxed{...}` or `\fbox{...}` whose braces balance and that holds something;
    the last `#### answer` line (GSM8K's form); the last "(final) answer is ..." or "answer: ..."; the last number. A box or
    phrase that holds only a choice, (A)-(E) in any dress, gives the bare letter. Linear in the length of `text`.
    """
    for candidate in (_last_box(text), _last_hash_line(text), _last_phrase(text)):
        if candidate:
            choice = _CHOICE.fullmatch(candidate)
            return choice.group("enclosed") or choice.group("bare") if choice else candidate
    numbers = _numbers(text)
    return numbers[-1] if numbers else None


def normalize_answer(answer: str) -> str:
    r"""One spelling for answers that differ only in typesetting, in a unit at the end, or in invisible characters.

    Drops `$`, `\left`/`\right`, spacing commands, a full stop at the end and a unit behind a number ("18 dollars",
    `5\text{ cm}`, `90^\circ`); unifies `\dfrac`, `\textbf`, Unicode signs and thousands (`10,\!080`). Control characters
    become spaces, so that they never join two numbers. An answer of more than 4,000 characters comes back as it is.
    """
    return answer if len(answer) > LONGEST_NORMALIZED else _normalize(answer)


@lru_cache(maxsize=65_536)
def _normalize(answer: str) -> str:
    if not answer.isascii() or not answer.isprintable():
        answer = "".join(" " if unicodedata.category(char)[0] in "CZ" else char for char in answer).translate(_UNICODE)
    box = _last_box(answer) if _BOX_START.match(answer.strip("$ ")) else None
    answer = box or answer
    for pattern, replacement in _REWRITES:
        answer = pattern.sub(replacement, answer)
    answer = _UNITS.sub("", answer.strip().rstrip(".,;: "))
    whole = _WHOLE_TEXT.fullmatch(answer)
    return (whole.group(1) if whole else answer).strip()


def split_choice(answer: str) -> tuple[str | None, str]:
    """Split "(C) 12" into the choice "C" and the rest "12"; ("C", "") for a choice alone, (None, answer) without one."""
    choice = _CHOICE.fullmatch(answer)
    if choice:
        return (choice.group("enclosed") or choice.group("bare")).upper(), ""
    label = _LABEL.match(answer)
    return (label.group(1), answer[label.end() :]) if label else (None, answer)


def _last_box(text: str) -> str | None:
    """What the last box holds that is closed and not empty. One pass with a stack, so unclosed boxes cost nothing extra."""
    first = _BOX_START.search(text)
    if first is None:
        return None
    best: tuple[int, int] | None = None  # span of the content of the latest box so far
    open_braces: list[int | None] = []  # where the content starts if the brace is a box's, else None
    for token in _BOX_TOKEN.finditer(text, first.start()):
        kind = token.group()
        if token.group("bare"):
            best = token.span("bare")
        elif kind == "}":
            start = open_braces.pop() if open_braces else None
            if start is not None and (best is None or start > best[0]) and text[start : token.start()].strip():
                best = (start, token.start())
        elif kind.endswith("{") and kind != r"\{":
            open_braces.append(token.end() if len(kind) > 1 else None)
    return text[slice(*best)].strip() if best else None


def _last_hash_line(text: str) -> str | None:
    """The last `####` line that holds a bare number or closes the text: the others are headings."""
    end_of_text = len(text.rstrip())
    answer = None
    for line in _HASH_LINE.finditer(text):
        content = line.group("answer").strip("* \t\r")
        if content and (line.end() >= end_of_text or _NUMBER.fullmatch(content.lstrip("$ "))):
            answer = content
    return answer


def _last_phrase(text: str) -> str | None:
    starts = [match.end() for match in _PHRASE.finditer(text)]
    if not starts:
        return None
    rest = text[starts[-1] : starts[-1] + LONGEST_NORMALIZED]
    for opening, closing in _MATH_DELIMITERS:
        close = rest.find(closing, len(opening)) if rest.startswith(opening) else -1
        if close > 0 and "\n\n" not in rest[:close]:
            return rest[len(opening) : close].strip() or None
    end = _SENTENCE_END.search(rest)
    phrase = rest[: end.start() if end else None].strip("*`\" '\t\r")
    if label := split_choice(phrase)[0]:
        return label
    if not _PROSE_WORD.search(phrase):
        return phrase or None
    numbers = _numbers(phrase)
    if numbers:  # "18 dollars for 2 days" states the number it starts with; "their sum, so 3 + 4 = 7" the last one
        return numbers[0] if phrase.lstrip("$ ").startswith(numbers[0]) else numbers[-1]
    return phrase if len(phrase.split()) <= _LONGEST_PROSE_ANSWER else None


def _numbers(text: str) -> list[str]:
    return [match.group().strip() for match in _NUMBER.finditer(text)]
