"""The page of one or more evaluations: what ran, tables, plots, paired comparisons, all from the records."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from m1.evaluation.budget import accuracy_at_budgets, parse_budgets, vote_is_right
from m1.evaluation.comparison import paired_difference
from m1.evaluation.records import read_records
from m1.evaluation.report import Curve, Report, curve_plot
from m1.evaluation.runner import summarize_run
from m1.evaluation.summary import majority_at_k, pass_at_k
from m1.evaluation.text import percent, summary_columns, summary_rows, with_error
from m1.storage import read_run_record

RECORDS_SUFFIX = ".jsonl.gz"
EVAL_COMMAND = "eval"
_GRID = 24  # points of a curve against time or tokens

Record = Mapping[str, Any]


@dataclass
class Run:
    """One task of one evaluation: how it was run, its records and their summary."""

    name: str
    settings: Mapping[str, Any]
    records: Sequence[Record]
    summary: Mapping[str, Any]

    @property
    def budget(self) -> Mapping[str, Any]:
        return self.settings.get("budget") or {}

    @property
    def is_stopped_early(self) -> bool:
        return bool(self.budget or self.settings.get("adaptive"))


@dataclass
class Evaluation:
    """One directory: its name on the page, what `m1 eval` recorded about it, and its tasks."""

    name: str
    path: Path
    about: Mapping[str, Any]
    runs: dict[str, Run] = field(default_factory=dict)


def is_evaluation(directory: Path) -> bool:
    """Whether `m1 eval` wrote the directory, finished or not."""
    return (read_run_record(directory) or {}).get("command") == EVAL_COMMAND


def write_evaluation_page(directories: Sequence[Path], path: Path) -> None:
    """Write the page at `path`. Raises ValueError for directories without a finished problem, and for damaged records."""
    evaluations = load_evaluations(directories)
    report = Report("Evaluation: " + ", ".join(evaluation.name for evaluation in evaluations))
    _setting(report, evaluations)
    for task in dict.fromkeys(task for evaluation in evaluations for task in evaluation.runs):
        runs = [evaluation.runs[task] for evaluation in evaluations if task in evaluation.runs]
        report.heading(task)
        for chosen in ([run for run in runs if not run.is_stopped_early], [run for run in runs if run.is_stopped_early]):
            if chosen:
                _task(report, chosen)
    report.heading("What the numbers mean")
    report.text(
        "± is the standard error over problems: how far the number would move with other problems of the same kind. pass@1: "
        "mean share of correct samples. pass@k: unbiased estimate of the share of problems that one of k samples solves. "
        "maj@k: share of problems whose majority of k samples is right, by mathematical equality, ties by lot. cut off: "
        "samples that reached the token limit. no answer: samples in which no answer was found. Differences are paired by "
        "problem, with 95 % intervals from resampling problems and p-values of a sign-flip permutation test. "
        "docs/evaluation.md says more."
    )
    report.write(path)


def load_evaluations(directories: Sequence[Path]) -> list[Evaluation]:
    """The evaluations in `directories`, named by their models, or by their directories where models share a name."""
    abouts = [read_run_record(directory) or {} for directory in directories]
    models = [str(about.get("config", {}).get("model", "")).rstrip("/").rpartition("/")[2] for about in abouts]
    evaluations = []
    for directory, about, model in zip(directories, abouts, models):
        name = model if model and models.count(model) == 1 else str(directory)
        evaluation = Evaluation(name, directory, about)
        for path in sorted(directory.glob(f"*{RECORDS_SUFFIX}")):
            settings, records = read_records(path, with_texts=False)
            if records:
                task = path.name.removesuffix(RECORDS_SUFFIX)
                evaluation.runs[task] = Run(name, settings, records, _summarize(about, settings, records))
        if not evaluation.runs:
            raise ValueError(f"{directory}: no problem has been evaluated yet; run `m1 eval` again to go on")
        evaluations.append(evaluation)
    return evaluations


def _summarize(about: Mapping[str, Any], settings: Mapping[str, Any], records: Sequence[Record]) -> dict[str, Any]:
    config = about.get("config", {})
    return summarize_run(
        settings,
        records,
        seconds=parse_budgets(config.get("time_budgets", "")),
        tokens=parse_budgets(config.get("token_budgets", "")),
    )


def _setting(report: Report, evaluations: Sequence[Evaluation]) -> None:
    names = ("directory", "sampled by", "samples at once", "temperature", "top_p", "token limit", "code", "hardware", "date")
    columns = []
    for evaluation in evaluations:
        about, config = evaluation.about, evaluation.about.get("config", {})
        backend, hardware = about.get("backend", {}), about.get("hardware", {})
        machine = ", ".join(hardware.get("gpus") or []) or f"{hardware.get('cpu')}, {hardware.get('threads')} threads"
        columns.append(
            (evaluation.path, backend.get("backend"), backend.get("concurrency"), config.get("temperature"),
             config.get("top_p"), config.get("max_new_tokens"), about.get("revision"), machine, str(about.get("time"))[:10])
        )  # fmt: skip
    report.table(("", *(evaluation.name for evaluation in evaluations)), list(zip(names, *columns, strict=True)))


def _task(report: Report, runs: Sequence[Run]) -> None:
    for run in runs:
        missing = run.settings["num_problems"] - len(run.records)
        if missing:
            report.text(f"Unfinished: {run.name} has yet to be asked {missing} of {run.settings['num_problems']} problems.")
    if len({run.settings["digest"] for run in runs}) > 1:
        report.text("These runs differ in problems or prompts: the rows of the table are not strictly comparable.")
    summaries = [run.summary for run in runs]
    columns = ["model", *summary_columns(summaries)[1:]]
    report.table(columns, [(run.name, *cells) for run, cells in zip(runs, summary_rows(summaries), strict=True)])
    if runs[0].is_stopped_early:
        _budgets(report, runs, "time_budgets", "seconds")
        _budgets(report, runs, "token_budgets", "tokens")
    else:
        _samples(report, runs)
    for second in runs[1:]:
        _comparison(report, runs[0], second)


def _samples(report: Report, runs: Sequence[Run]) -> None:
    """Curves against k and against tokens, and the other ways to vote."""
    by_k, by_tokens = [], []
    for color, run in enumerate(runs):
        for kind, dashed in (("pass@k", True), ("maj@k", False)):
            sizes = [int(k) for k in run.summary[kind]]
            values = list(run.summary[kind].values())
            band = [_error_at(run, majority_at_k if kind == "maj@k" else pass_at_k, k) for k in sizes]
            name = f"{run.name} {kind}"
            if len(runs) > 2:  # a legend of two lines a run would lie on the curves; the caption says which are dashed
                name = "" if dashed else run.name
            by_k.append(Curve(name, sizes, values, color, dashed, band))
            if kind == "maj@k":
                tokens = [k * run.summary["mean_tokens"] for k in sizes]
                by_tokens.append(Curve(run.name, tokens, values, color, band=band))
    if any(len(curve.x) > 1 for curve in by_k):
        report.figure(
            curve_plot(by_k, x_label="k, samples a problem", y_label="share of problems", x_base=2),
            "Coverage (pass@k, dashed) and majority vote (maj@k) against the number of samples. Bands: one standard error.",
        )
        report.figure(
            curve_plot(by_tokens, x_label="tokens a problem (k times the mean length)", y_label="maj@k"),
            "The vote against the tokens that it takes.",
        )
    votes = [run for run in runs if run.summary["votes"]]
    if votes:
        names = list(votes[0].summary["votes"])
        rows = []
        for run in votes:
            n = str(run.summary["num_samples"])
            others = [percent(run.summary["votes"][name][n]) for name in names]
            rows.append((run.name, n, percent(run.summary["maj@k"].get(n)), *others))
        report.table(("ways to vote", "samples", "majority", *names), rows)


def _error_at(run: Run, of_record: Callable[[Record, int], float], k: int) -> float:
    values = [of_record(record, k) for record in run.records]
    return float(np.std(values, ddof=1) / math.sqrt(len(values))) if len(values) > 1 else 0.0


def _budgets(report: Report, runs: Sequence[Run], key: str, unit: str) -> None:
    """A table of the budgets that were asked for, and a curve through all that the records can tell."""
    rows = [
        (run.name, f"{point['budget']:g}", with_error(point["accuracy"], point["standard_error"]), percent(point["coverage"]),
         f"{point['mean_samples']:.1f}")
        for run in runs
        for point in run.summary.get(key, [])
    ]  # fmt: skip
    if not rows:
        return
    report.table(("model", unit, "vote", "coverage", "samples finished"), rows)
    curves = []
    for color, run in enumerate(runs):
        grid = _grid(run, unit)
        points = accuracy_at_budgets(run.records, grid, unit)
        accuracy = [point["accuracy"] for point in points]
        band = [point["standard_error"] or 0.0 for point in points]
        curves.append(Curve(run.name, grid, accuracy, color, band=band))
        curves.append(Curve(f"{run.name}, coverage", grid, [point["coverage"] for point in points], color, dashed=True))
    what = "measured seconds a problem, alone on the device" if unit == "seconds" else "tokens generated a problem"
    report.figure(
        curve_plot(curves, x_label=what, y_label="share of problems"),
        f"Accuracy of the vote against {what}: at each point the samples that had finished by then voted. Bands: one standard "
        "error over problems. Dashed: problems of which a finished sample was right.",
    )


def _grid(run: Run, unit: str) -> list[float]:
    """Budgets from where the first samples finish to the largest, evenly on a logarithmic axis."""
    field = "seconds" if unit == "seconds" else "tokens_spent"
    times = [sample[field] for record in run.records for sample in record["samples"]]
    points = [point["budget"] for point in run.summary["time_budgets" if unit == "seconds" else "token_budgets"]]
    last = max(points)
    first = min([*times, last / 2])
    return np.geomspace(max(first, last / 2**12), last, _GRID).tolist()


def _comparison(report: Report, first: Run, second: Run) -> None:
    """Paired differences, second minus first, on the problems that both were asked."""
    known = {record["id"]: record for record in first.records}
    pairs = [(known[record["id"]], record) for record in second.records if record["id"] in known]
    if not pairs:
        return
    rows = []
    for name, score in _scores(first, second):
        found = paired_difference([score(one) for one, _ in pairs], [score(other) for _, other in pairs])
        interval = f"{found.low:+.1%} to {found.high:+.1%}"
        rows.append((name, f"{found.mean:+.1%}", interval, f"{found.p_value:.3g}", found.num_problems))
    report.text(f"{second.name} against {first.name}, paired by problem:")
    report.table(("number", "difference", "95 % interval", "p", "problems"), rows)


def _scores(first: Run, second: Run) -> list[tuple[str, Callable[[Record], float]]]:
    if not first.is_stopped_early:
        k = min(first.summary["num_samples"], second.summary["num_samples"])
        return [
            ("pass@1", lambda record: pass_at_k(record, 1)),
            (f"maj@{k}", lambda record: majority_at_k(record, k)),
            (f"pass@{k}", lambda record: pass_at_k(record, k)),
        ]
    scores: list[tuple[str, Callable[[Record], float]]] = [("vote", lambda record: float(vote_is_right(record)))]
    for key, unit in (("time_budgets", "seconds"), ("token_budgets", "tokens")):
        budgets = [{point["budget"] for point in run.summary.get(key, [])} for run in (first, second)]
        scores += [(f"vote at {budget:g} {unit}", _score_at(budget, unit)) for budget in sorted(budgets[0] & budgets[1])]
    return scores


def _score_at(budget: float, unit: str) -> Callable[[Record], float]:
    return lambda record: float(accuracy_at_budgets([record], [budget], unit)[0]["accuracy"])
