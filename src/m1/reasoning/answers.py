"""Reading a final answer out of a model's text, and writing it in one form.

Here live `extract_answer` (which part of a completion is its answer) and `normalize_answer` (one spelling for answers
that differ only in typesetting). Whether two answers are equal is decided in `equality.py` and `verify.py`.

Everything here is linear in the length of its input, so that hostile text costs no more than honest text.
"""

import re
import unicodedata
from functools import lru_cache

# A box, an escaped character (so that `\{` is no brace) or a brace; `\boxed 5` without braces is matched by the second form.
_BOX_TOKEN = re.compile(r"\\f?box(?:ed)?\s*\{|\\f?box(?:ed)?\s+(?P<bare>[^\s\\{}$]+)|\\.|[{}]", re.DOTALL)
_BOX_START = re.compile(r"\\(?:boxed|fbox)(?![a-zA-Z])")

_PHRASE = re.compile(r"\b(?:final\s+)?answer(?:\s+is\s*:?|\s*:)[\s*]*", re.IGNORECASE)
_SENTENCE_END = re.compile(r"\.(?=\s|\*|$)|\n|[!?](?=\s+[A-Z])")
_DELIMITERS = (("$$", "$$"), ("$", "$"), ("\\(", "\\)"), ("\\[", "\\]"))

_NUMBER = re.compile(
    r"(?<![\w.)}])[-−]?\\[dt]?frac\s*\{[-−]?\d+\}\s*\{\d+\}"  # \frac{3}{4}
    r"|(?:(?<![\w.)}])[-−])?(?:(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|(?<!\d)\.\d+)(?:\s?/\s?\d+(?![\d.]))?(?:\s?\\?%)?"
)
# A choice as it stands in prose: "(C)", "C", "**C**", "C)", "C: 12", "\text{(C)}", and nothing that goes on like a word.
_CHOICE = re.compile(
    r"(?:option|choice)?\s*\**(?:\\(?:text|textbf|mathrm|mathbf)\s*\{\s*)?"
    r"(?:\(\s*(?P<boxed>[A-Ea-e])\s*\)|(?P<bare>[A-E])(?![\w(^+*/=\\'-]))[).:]?\s*\}?\**"
)
_PROSE_WORD = re.compile(r"(?<![\\a-zA-Z])(?!sin|cos|tan|log|exp|sqrt)[a-zA-Z]{3,}")

_UNICODE = str.maketrans(
    {"−": "-", "–": "-", "×": "\\times ", "·": "\\cdot ", "÷": "/", "π": "\\pi ", "∞": "\\infty ", "√": "\\sqrt ",
     "≤": "\\le ", "≥": "\\ge ", "∪": "\\cup ", "°": "^\\circ", "%": "%", "（": "(", "）": ")", "，": ",", "²": "^2", "³": "^3"}
)  # fmt: skip
_REWRITES = tuple(
    (re.compile(pattern), replacement)
    for pattern, replacement in (
        (r"\\(?:left|right|[bB]igg?[lr]?|displaystyle|limits)(?![a-zA-Z])\.?", ""),
        (r"\\!|\{,\}\s?", lambda match: "," if "," in match.group() else ""),
        (r"\\[,;: ]|\\q?quad(?![a-zA-Z])|~", " "),
        (r"\\[dtc]frac(?![a-zA-Z])", r"\\frac"),
        (r"\\(?:textnormal|textrm|textit|textbf|mbox|mathbf|mathrm)(?![a-zA-Z])", r"\\text"),
        (r"\\(leq|geq|neq)(?![a-zA-Z])", lambda match: "\\" + match.group(1)[:2]),
        (r"\\%", "%"),
        (r"\\\$|\$|\\[()\[\]]|\*\*(?=\D|$)", ""),
        (r"\s+", " "),
    )
)
_UNIT_WORDS = (
    "dollars? cents? euros? pounds? degrees? radians? percent units? square cubic sq per "
    "inch inches in feet foot ft yards? miles? mph meters? metres? m cm mm km kg kilograms? grams? g liters? litres? "
    "seconds? minutes? hours? days? weeks? months? years? people students? apples? eggs? points? ways? times"
)
_UNITS = re.compile(
    r"(?<=[\d})])\s*(?:(?:\^\s*\{?\s*\\circ\s*\}?)|\\text\s*\{[a-zA-Z .^/0-9]*\}(?:\^\{?[23]\}?)?"
    rf"|\s(?:(?:{'|'.join(_UNIT_WORDS.split())})\b[\s.]*)+(?:\^\{{?[23]\}}?)?)$"
)
_WHOLE_TEXT = re.compile(r"\\text\s*\{([^{}\\]*)\}")
_MAX_NORMALIZED_LENGTH = 4000


def extract_answer(text: str) -> str | None:
    r"""The final answer that `text` states, as written there, or None when it states none.

    In this order: the last `\boxed{...}` or `\fbox{...}` whose braces balance and that holds something; the last
    `#### answer` line (GSM8K's form); the last "(final) answer is ..." or "answer: ..."; the last number. A box or phrase
    that holds a choice (A)-(E) gives the bare letter. Linear in the length of `text`.
    """
    for candidate in (_last_box(text), _last_hash_line(text), _last_phrase(text)):
        if candidate:
            choice = _CHOICE.fullmatch(candidate)
            return _choice_letter(choice) if choice else candidate
    return _last_number(text)


def normalize_answer(answer: str) -> str:
    r"""One spelling for answers that differ only in typesetting, units at the end, or invisible characters.

    Drops `$`, `\left`/`\right`, spacing commands, a trailing full stop and a unit after a number ("18 dollars",
    `5\text{ cm}`, `90^\circ`); unifies `\dfrac`, `\textbf`, unicode signs, thin-space thousands (`10,\!080`).
    Answers longer than 4,000 characters come back unchanged: no benchmark has one, so they are equal only as strings.
    """
    return answer if len(answer) > _MAX_NORMALIZED_LENGTH else _normalize(answer)


@lru_cache(maxsize=65_536)
def _normalize(answer: str) -> str:
    answer = "".join(" " if unicodedata.category(char)[0] in "CZ" else char for char in answer)
    answer = answer.translate(_UNICODE)
    box = _last_box(answer)
    if box is not None and _BOX_START.match(answer.strip().lstrip("$")):
        answer = box
    for pattern, replacement in _REWRITES:
        answer = pattern.sub(replacement, answer)
    answer = answer.strip().rstrip(".,;: ")
    without_units = _UNITS.sub("", answer)
    whole = _WHOLE_TEXT.fullmatch(without_units)
    return (whole.group(1) if whole else without_units).strip()


def choice_label(answer: str) -> tuple[str | None, str]:
    """Split "(C) 12" into its label "C" and the rest "12"; ("C", "") when the label is all; (None, answer) without one."""
    answer = normalize_answer(answer)
    whole = _CHOICE.fullmatch(answer)
    if whole:
        return _choice_letter(whole), ""
    labelled = re.match(r"(?:\\text\s*\{\s*)?\(([A-E])\)\s*\}?[\s:.]*(?=\S)", answer)
    return (labelled.group(1), answer[labelled.end() :]) if labelled else (None, answer)


def _choice_letter(match: re.Match[str]) -> str:
    return (match.group("boxed") or match.group("bare")).upper()


def _last_box(text: str) -> str | None:
    """Content of the last box that is closed and not empty. One pass with a stack: unclosed boxes cost nothing extra."""
    first = _BOX_START.search(text)
    if first is None:
        return None
    best: tuple[int, int] | None = None  # [start, end) of the content of the latest-starting box seen closed
    open_braces: list[int | None] = []  # start of the content for a box's brace, None for any other
    for token in _BOX_TOKEN.finditer(text, first.start()):
        kind = token.group()
        if kind == "}":
            start = open_braces.pop() if open_braces else None
            if start is not None and (best is None or start > best[0]) and not text[start : token.start()].isspace():
                best = (start, token.start()) if start < token.start() else best
        elif token.group("bare"):
            best = token.span("bare")
        elif kind.endswith("{") and kind != "\\{":
            open_braces.append(token.end() if len(kind) > 1 else None)
    return text[slice(*best)].strip() if best else None


def _last_hash_line(text: str) -> str | None:
    """What follows the last `####` that holds an answer: a bare number, or whatever closes the text (not a heading)."""
    end = len(text)
    last_line = True
    while (at := text.rfind("####", 0, end)) >= 0:
        stop = text.find("\n", at, end)
        line = text[at : stop if stop >= 0 else end].strip("# \t*\r")
        last_line = last_line and (stop < 0 or not text[stop:end].strip())
        if line and (last_line or _NUMBER.fullmatch(line.lstrip("$ "))):
            return line
        last_line = last_line and not line
        end = at
    return None


def _last_phrase(text: str) -> str | None:
    match = None
    for match in _PHRASE.finditer(text):  # noqa: B007 - the last match is what we want
        pass
    if match is None:
        return None
    rest = text[match.end() : match.end() + _MAX_NORMALIZED_LENGTH]
    for opening, closing in _DELIMITERS:
        if rest.startswith(opening) and not (opening == "$" and re.match(r"\$\d[\d,.]*(?![^\n]*\$)", rest)):
            close = rest.find(closing, len(opening))
            if close > 0:
                return rest[len(opening) : close].strip() or None
    end = _SENTENCE_END.search(rest)
    phrase = rest[: end.start() if end else None].strip().strip('*`"').strip()
    if _CHOICE.fullmatch(phrase):
        return phrase
    lettered = re.match(r"\(?([A-E])\)[\s:.]", phrase)
    if lettered:
        return lettered.group(1)
    numbers = [number.group() for number in _NUMBER.finditer(phrase)] if _PROSE_WORD.search(phrase) else []
    if numbers:  # "18 dollars per day": the number that it starts with; "the sum, which is 7": the last one
        starts = _NUMBER.match(phrase.lstrip("$ "))
        return (starts.group() if starts else numbers[-1]).strip()
    return phrase or None


def _last_number(text: str) -> str | None:
    last = None
    for last in _NUMBER.finditer(text):  # noqa: B007 - the last match is what we want
        pass
    return last.group().strip() if last else None
