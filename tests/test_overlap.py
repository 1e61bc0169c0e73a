"""What benchmarks/overlap.py finds in training problems that were made from test problems, and in others."""

import json
import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parent.parent / "benchmarks"))

import overlap

TEST = "Mary has 16 apples and sells three of them every morning at the market. How many apples does she have after 4 days?"
TEMPLATE = "Zoe has 92 pears and sells three of them every morning at the market. How many pears does she have after 5 days?"
OTHER = "A train leaves the station at noon and travels north for seven hours at a speed of 60 miles an hour."


def test_a_copy_a_template_and_another_problem():
    tests = overlap.TestProblems([OTHER.replace("train", "bus"), TEST])
    assert tests.nearest(TEST.replace("16", "1,600.50").upper()) == (1.0, TEST)
    share, test = tests.nearest(TEMPLATE)
    assert 0.3 < share < 0.9 and test == TEST
    assert tests.nearest("How many legs do nine spiders and four tigers have, if none of them is missing any?") == (0.0, "")


def test_a_file_of_samples_is_counted_by_problem(tmp_path, monkeypatch, capsys):
    suffix = "\nLet's think step by step and output the final answer within \\boxed{}."
    problems = [
        TEST,
        TEST,
        TEMPLATE,
        "Too short.",
        "Some text about nothing in particular that no benchmark has ever asked for.",
    ]
    rows = [{"prompt": problem + suffix, "completion": "4"} for problem in problems]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "gsm8k.jsonl").write_text(json.dumps({"problem": TEST, "answer": "4"}) + "\n")
    out = tmp_path / "overlap.json"
    options = ["--tests", "gsm8k", "--data-dir", str(tmp_path), "--show", "--out", str(out)]
    monkeypatch.setattr(sys, "argv", ["overlap", str(tmp_path / "rows.jsonl"), *options])
    overlap.main()
    (row,) = json.loads(out.read_text())["rows"]
    assert (row["problems"], row["close"], row["same"]) == (3, 2, 1) and TEST not in out.read_text()
    assert f"1.000  {TEST!r}" in capsys.readouterr().out


def test_short_problems_are_left_out():
    row = overlap.overlap("sums", ["1 + 1 =", "2 + 2 ="], overlap.TestProblems([TEST]), 0.4)
    assert (row.problems, row.mean_share, row.close, row.closest) == (0, 0.0, 0, ())
