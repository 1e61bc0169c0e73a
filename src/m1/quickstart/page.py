"""The quickstart's report: one HTML page with what was measured, in the order in which it happened."""

from pathlib import Path

from matplotlib.figure import Figure

from m1.evaluation.report import Report, grouped_bars, line_plot
from m1.quickstart.findings import MODELS, STAGES, Findings, majority


def write_page(findings: Findings, path: str | Path) -> None:
    setting = findings.setting
    report = Report("M1 quickstart: a Transformer made hybrid")
    report.text(
        f"{setting['base']}: {setting['layers'] - len(setting['attention_layers'])} of {setting['layers']} attention layers "
        f"became {setting['mixer']} mixers; attention stays at {', '.join(map(str, setting['attention_layers']))}. "
        f"Run on {setting['device']} in {setting['precision']}: {setting['seconds']:.0f} seconds, code {setting['revision']}."
    )
    _accuracy(report, findings)
    _similarity(report, findings)
    _training(report, findings)
    _vote(report, findings)
    _time(report, findings)
    report.write(path)


def _accuracy(report: Report, findings: Findings) -> None:
    report.heading("Do they solve problems?")
    first = findings.accuracy["Transformer"][STAGES[0]]
    k = first["num_samples"]
    report.text(
        "Before SFT stand the Transformer, which was taught the problems, and the hybrid that was converted from it, aligned "
        "and distilled. From there both were fine-tuned (SFT) and reinforced (GRPO) alike. Each model was sampled "
        f"{k} times on each of {first['num_problems']} held-out problems: pass@1 is the mean over samples, maj@{k} the vote of "
        f"the {k}. The bars' lines are standard errors over problems."
    )
    summaries = {name: [findings.accuracy[name][stage] for stage in STAGES] for name in MODELS}
    pass1 = {name: [summary["pass@1"] for summary in of_model] for name, of_model in summaries.items()}
    errors = {name: [summary["pass@1_standard_error"] for summary in of_model] for name, of_model in summaries.items()}
    votes = {name: [majority(summary) for summary in of_model] for name, of_model in summaries.items()}
    report.figure(grouped_bars(STAGES, pass1, y_label="pass@1", errors=errors), "Accuracy of single samples by stage.")
    report.figure(grouped_bars(STAGES, votes, y_label=f"maj@{k}"), f"Accuracy of the vote of {k} samples by stage.")
    rows = [
        (name, stage, f"{s['pass@1']:.1%} ± {s['pass@1_standard_error']:.1%}", f"{majority(s):.1%}",
         f"{s['pass@k'][str(k)]:.1%}", f"{s['mean_tokens']:.1f}", f"{s['truncation_rate']:.1%}", f"{s['no_answer_rate']:.1%}",
         f"{s['tokens_per_second']:,.0f}")
        for name in MODELS
        for stage, s in findings.accuracy[name].items()
    ]  # fmt: skip
    columns = ("model", "stage", "pass@1", f"maj@{k}", f"pass@{k}", "tokens", "cut off", "no answer", "tokens/s")
    report.table(columns, rows)


def _similarity(report: Report, findings: Findings) -> None:
    report.heading("How near is the hybrid to the Transformer it came from?")
    stages = list(findings.similarity)
    tokens = findings.similarity[stages[0]]["targets"]
    report.text(
        f"On {tokens:.0f} tokens of the Transformer's own answers to held-out problems: the KL divergence of the hybrid's "
        "next-token distribution from the taught Transformer's (nats, lower is nearer), and how often both find "
        "the same token likeliest."
    )
    kl = {"hybrid": [findings.similarity[stage]["kl"] for stage in stages]}
    agreement = {"hybrid": [findings.similarity[stage]["agreement"] for stage in stages]}
    report.figure(grouped_bars(stages, kl, y_label="KL, nats", percent=False), "KL(Transformer || hybrid) after each stage.")
    report.figure(grouped_bars(stages, agreement, y_label="same next token"), "Top-1 agreement after each stage.")


def _training(report: Report, findings: Findings) -> None:
    report.heading("Training")
    names = {"loss": "loss", "reward": "mean reward"}
    for stage, records in findings.curves.items():
        key = "reward" if stage.startswith("GRPO") else "loss"
        report.figure(_curve(records, key, names[key]), stage)


def _curve(records: list[dict], key: str, label: str) -> Figure:
    points = [(record["step"], record[key]) for record in records if key in record]
    return line_plot({label: ([step for step, _ in points], [value for _, value in points])}, x_label="step", y_label=label)


def _vote(report: Report, findings: Findings) -> None:
    vote = findings.vote
    report.heading("One vote")
    report.text("The held-out problem on which the hybrid's samples disagreed most while their vote was right (if any was):")
    report.code(vote["problem"])
    report.table(("sample", "answer"), [(index + 1, answer or "none") for index, answer in enumerate(vote["answers"])])
    report.text(
        f"The vote: {vote['winner']} with {vote['share']:.0%}. Right is {vote['gold']}: the vote is "
        f"{'right' if vote['is_right'] else 'wrong'}. One of its solutions:"
    )
    report.code(vote["solution"])


def _time(report: Report, findings: Findings) -> None:
    report.heading("Where the time went")
    report.table(("stage", "seconds"), [(stage, f"{seconds:.1f}") for stage, seconds in findings.seconds.items()])
