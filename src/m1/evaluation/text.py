"""The numbers of an evaluation as words: the cells of the tables that `m1 eval` prints and `m1 report` draws."""

from collections.abc import Mapping, Sequence
from typing import Any

_SAMPLED = ("pass@1", "maj@{n}", "pass@{n}")
_STOPPED = ("vote", "samples")
_COMMON = ("tokens", "cut off", "no answer")


def summary_columns(summaries: Sequence[Mapping[str, Any]]) -> list[str]:
    """Headings for `summary_rows` of these: a column of each kind of number that one of them has, after the task's name."""
    sizes = _sizes(summaries)
    n = str(min(sizes)) if len(sizes) == 1 else "n"
    own = [name.format(n=n) for name in _SAMPLED] if "pass@1" in summaries[0] else list(_STOPPED)
    return ["task", "problems", *(own[:1] if sizes == {1} else own), *_COMMON]


def summary_rows(summaries: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    """The cells of each task's summary, without its name. Of single samples there is pass@1 alone: votes would say the same."""
    return [_cells(summary, is_single=_sizes(summaries) == {1}) for summary in summaries]


def _sizes(summaries: Sequence[Mapping[str, Any]]) -> set[int]:
    return {summary["num_samples"] for summary in summaries if "num_samples" in summary}


def _cells(summary: Mapping[str, Any], *, is_single: bool) -> list[str]:
    if "pass@1" in summary:
        n = str(summary["num_samples"])
        own = [with_error(summary["pass@1"], summary["pass@1_standard_error"])]
        if not is_single:
            own += [percent(summary["maj@k"].get(n)), percent(summary["pass@k"].get(n))]
    else:
        own = [with_error(summary["vote"], summary["vote_standard_error"]), f"{summary['mean_samples']:.1f}"]
    common = [f"{summary['mean_tokens']:,.0f}", percent(summary["truncation_rate"]), percent(summary["no_answer_rate"])]
    return [str(summary["num_problems"]), *own, *common]


def percent(value: float | None) -> str:
    return "–" if value is None else f"{value:.1%}"


def with_error(value: float, error: float | None) -> str:
    """A share with its standard error: 41.2% ± 2.1%."""
    return percent(value) + (f" ± {percent(error)}" if error is not None else "")
