"""The tables of an evaluation: which columns there are, and that rows fit them."""

import pytest

from m1.evaluation.text import summary_columns, summary_rows


def summary(num_samples: int) -> dict:
    at_k = {str(num_samples): 0.5}
    return {
        "num_problems": 8,
        "num_samples": num_samples,
        "pass@1": 0.25,
        "pass@1_standard_error": 0.1,
        "maj@k": at_k,
        "pass@k": at_k,
        "mean_tokens": 9.0,
        "truncation_rate": 0.0,
        "no_answer_rate": 0.0,
    }


@pytest.mark.parametrize(
    ("sizes", "own"),
    [
        ((1,), ["pass@1"]),
        ((1, 1), ["pass@1"]),
        ((4, 4), ["pass@1", "maj@4", "pass@4"]),
        ((1, 4), ["pass@1", "maj@n", "pass@n"]),
    ],
)
def test_single_samples_have_one_column_of_their_own(sizes, own):
    summaries = [summary(size) for size in sizes]
    columns = summary_columns(summaries)
    assert columns == ["task", "problems", *own, "tokens", "cut off", "no answer"]
    for row in summary_rows(summaries):
        assert len(row) == len(columns) - 1 and row[1] == "25.0% ± 10.0%"
