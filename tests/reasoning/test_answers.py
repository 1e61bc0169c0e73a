"""Extraction and normalisation: what is found, what is preferred, and that hostile text takes linear time."""

import json
import random
import time

import pytest

from m1.reasoning.answers import extract_answer, normalize_answer, split_choice
from m1.reasoning.equality import settle

EXTRACTIONS = [
    # Boxes: the last balanced one that holds something.
    (r"so \boxed{17}, no: \boxed{204}.", "204"),
    (r"\boxed{\frac{1}{2}}", r"\frac{1}{2}"),
    (r"\boxed{x^{2^{n}} + \{1\}}", r"x^{2^{n}} + \{1\}"),
    (r"\boxed{\}}", r"\}"),
    (r"\boxed {5}", "5"),
    (r"\boxed 5 apples", "5"),
    (r"\fbox{5}", "5"),
    (r"\boxed{17} and then \boxed{20", "17"),
    (r"{ \boxed{17} and then", "17"),
    (r"} } \boxed{17} }", "17"),
    (r"\boxed{\boxed{5}}", "5"),
    (r"Put it in \boxed{}. It is \boxed{5}. Now \boxed{ }", "5"),
    (r"<think>\boxed{3}</think> The answer is 4: $\boxed{4}$", "4"),
    (r"The answer is 7. \boxed{8}", "8"),
    (r"\boxed{8}. The answer is 7.", "8"),
    (r"\\boxed{5}", "5"),
    # GSM8K's line; a Markdown heading is none.
    ("3 + 4 = 7\n#### 7", "7"),
    ("#### 1,234\n", "1,234"),
    ("#### 7\nanything else 9", "7"),
    ("#### $7\n\nThanks.", "$7"),
    ("#### Step 4: sum\nIt gives 12 in all", "12"),
    ("#### Conclusion\n#### 7", "7"),
    ("####", None),
    # Phrases.
    (r"The final answer is $\frac{1}{2}$. I hope it is correct.", r"\frac{1}{2}"),
    (r"The final answer is: $\boxed{5}$. I hope it is correct.", "5"),
    (r"The answer is \(x^2\), as shown in step 3.", "x^2"),
    (r"The answer is \[ 3 \]", "3"),
    ("The answer is 18 dollars per day, for 2 days.", "18"),
    ("The answer is $5 per day.", "5"),
    ("The answer is their sum, 3 + 4 = 7.", "7"),
    ("The answer is 3.5.", "3.5"),
    ("The answer is: **42**", "42"),
    ("**Answer:** 5", "5"),
    ("**Final Answer**: 5", "5"),
    ("Answer: (3, 4)", "(3, 4)"),
    ("The answer is x = 5.", "x = 5"),
    ("The answer is 3.\nWait, the answer is 4.", "4"),
    ("The answer is Navin.", "Navin"),
    ("Answer: Let's think step by step about this. 3 + 4 = 7 apples", "7"),
    ("FINAL ANSWER IS 12", "12"),
    # Choices.
    ("The answer is (C).", "C"),
    ("The answer is C", "C"),
    ("The answer is (C) 12.", "C"),
    (r"\boxed{(C)}", "C"),
    (r"\boxed{\text{(C)}}", "C"),
    (r"\boxed{\textbf{(C)}}", "C"),
    (r"\boxed{\textbf{(C) }12}", r"\textbf{(C) }12"),
    (r"\boxed{C}", "C"),
    (r"\boxed{(c)}", "c"),
    (r"\boxed{(F)}", "(F)"),
    # The last number.
    ("3 plus 4 makes 7", "7"),
    ("it costs $1,234.50 in all", "1,234.50"),
    ("from 10 to -5", "-5"),
    ("10-5", "5"),
    ("it is -$5", "-$5"),
    ("roughly 3/4 of it", "3/4"),
    (r"so it is \frac{3}{4}", r"\frac{3}{4}"),
    ("up by 50%", "50%"),
    ("1, 2, 3.", "3"),
    ("version .5", ".5"),
    # Nothing.
    ("", None),
    ("I do not know.", None),
    ("\x00\x01", None),
]

MEGABYTE = 1_000_000
HOSTILE_TEXTS = {
    "opening braces": "{" * MEGABYTE,
    "boxes never closed": r"\boxed{" * (MEGABYTE // 7),
    "boxes closed at the end": r"\boxed{" * (MEGABYTE // 8) + "}" * (MEGABYTE // 8),
    "empty boxes": r"\boxed{}" * (MEGABYTE // 8),
    "one deep box": r"\boxed{" + "{" * (MEGABYTE // 2) + "}" * (MEGABYTE // 2) + "}",
    "nested fractions": r"\boxed{" + r"\frac{1}{" * 10_000 + "2" + "}" * 10_000 + "}",
    "backslashes": "\\" * MEGABYTE,
    "hashes": "#" * MEGABYTE,
    "hash lines": "####\n" * (MEGABYTE // 5),
    "answers": "answer is " * (MEGABYTE // 10),
    "answer and spaces": "answer" + " " * MEGABYTE,
    "digits": "1" * MEGABYTE,
    "thousands": "1" + ",111" * (MEGABYTE // 4) + "1",
    "fractions": "1/" * (MEGABYTE // 2),
    "signs": "-" * MEGABYTE,
    "dots": "1." * (MEGABYTE // 2),
    "stars": "The answer is " + "*" * MEGABYTE,
    "dollars": "The answer is " + "$" * MEGABYTE,
    "letters": "a" * MEGABYTE,
    "control characters": "".join(map(chr, range(32))) * (MEGABYTE // 32),
    "surrogates": "\ud800" * MEGABYTE,
}


@pytest.mark.parametrize(("text", "expected"), EXTRACTIONS)
def test_extract_answer(text, expected):
    assert extract_answer(text) == expected


@pytest.mark.parametrize("name", HOSTILE_TEXTS)
def test_hostile_text_is_read_in_linear_time(name):
    start = time.process_time()
    answer = extract_answer(HOSTILE_TEXTS[name])
    if answer is not None:
        normalize_answer(answer)
        split_choice(answer)
    assert time.process_time() - start < 5.0  # a quadratic step over a megabyte takes minutes


def test_any_text_is_read_without_an_exception():
    generator = random.Random(0)
    pieces = [r"\boxed{", "}", "{", "#### ", "\n", "answer is ", "$", "(C)", "12", "-", ",", r"\frac{1}{2}", "\\", "\x00", "é"]
    for _ in range(3000):
        text = "".join(generator.choices(pieces, k=generator.randrange(12)))
        answer = extract_answer(text)
        assert answer is None or answer.strip(), text
        if answer is not None:
            normalize_answer(answer)


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        (r"\left( 3, \dfrac{\pi}{2} \right)", r"( 3, \frac{\pi}{2} )"),
        (r"11,\! 111,\! 100", "11,111,100"),
        (r"12{,}000", "12,000"),
        (r"\$32,\!348", "32,348"),
        (r"5.4 \text{ cents}", "5.4"),
        (r"$45^{\circ}$", "45"),
        ("50 percent", "50%"),
        ("2**3", "2^3"),
        ("18 dollars per day.", "18"),
        (r"\text{Evelyn}", "Evelyn"),
        (r"5 \text{ or } 6", r"5 \text{ or } 6"),
        ("4\x002", "4 2"),
        (r"\begin{pmatrix}1\\-2\\ 3\end{pmatrix}", r"\begin{pmatrix}1\\-2\\ 3\end{pmatrix}"),
        (r"a \leq b \leftarrow c", r"a \le b \leftarrow c"),
    ],
)
def test_normalize_answer(answer, expected):
    assert normalize_answer(answer) == expected
    assert normalize_answer(expected) == expected


@pytest.mark.parametrize("name", ["math500", "olympiad_bench", "aime25", "amc23"])
def test_gold_answers_survive_being_boxed(shared_data, name):
    """Every benchmark answer comes back out of the text that a perfect model would write."""
    for line in (shared_data / f"{name}.jsonl").open():
        gold = json.loads(line)["answer"]
        extracted = extract_answer(rf"First \boxed{{0}}, but then $\boxed{{{gold}}}$.")
        assert extracted is not None
        assert settle(gold, extracted) is True, (gold, extracted)
