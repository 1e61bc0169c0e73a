"""`m1 report`: what a directory holds becomes one page that fetches nothing; what it is not is said in one line."""

import json
import re

import pytest

from m1.config import ReportConfig
from m1.report import run
from m1.run_page import MOST_POINTS


def write_run(directory, records, *, config=None, torn=""):
    directory.mkdir()
    (directory / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records) + torn)
    (directory / "run.json").write_text(json.dumps({"command": "grpo", "config": config or {"model": "m", "steps": 9}}))
    return directory


def page_of(directory):
    run(ReportConfig(directories=[str(directory)]))
    return (directory / "report.html").read_text()


GRPO = {"loss": 0.1, "reward": 0.5, "entropy": 1.2, "length": 30.0, "lr": 1e-6, "tokens_per_second": 5e3, "tokens": 100}


def test_a_training_runs_page(tmp_path):
    records = [{"step": step, **GRPO, "reward": step / 10} for step in range(1, 6)]
    page = page_of(write_run(tmp_path / "run", records, torn='{"step": 6, "rew'))
    assert "m1 grpo: run" in page
    assert "5 of 9 steps, 500 tokens" in page
    assert "not finished" in page
    assert page.count("<svg") == 6  # loss, reward, length, entropy, learning rate, speed; nothing that was not measured
    assert "<td>reward</td><td>0.1</td><td>0.5</td><td>0.1</td><td>0.5</td>" in page
    assert not re.search(r'(src|href)="(?!#)', page), "the page fetches something"


def test_a_long_run_is_drawn_in_means_and_says_so(tmp_path):
    records = [{"step": step, "loss": 1.0 + step % 2} for step in range(1, 2 * MOST_POINTS + 1)]
    page = page_of(write_run(tmp_path / "run", records))
    assert "means over 2 lines" in page
    assert page.count("<svg") == 1


def test_layers_of_an_alignment_are_compared(tmp_path):
    records = [{"step": step, "loss": 1.0, "error_0": 0.9 / step, "error_3": 0.5} for step in (1, 2)]
    page = page_of(write_run(tmp_path / "run", records))
    assert "Distance of each layer" in page
    assert page.count("<svg") == 2


def test_what_was_measured_on_held_out_data_is_drawn_against_tokens(tmp_path):
    directory = write_run(tmp_path / "run", [{"step": step, "loss": 1.0} for step in (1, 2)])
    lines = [
        {"step": 0, "tokens": 0, "kl": 0.9, "pass_at_1": 0.0, "pass_at_1_error": None},
        {"step": 2, "tokens": 2_000_000, "kl": 0.25, "pass_at_1": 0.125, "pass_at_1_error": 0.01},
    ]
    (directory / "measured.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    page = page_of(directory)
    assert "<td>2,000,000</td><td>0.25</td><td>0.125</td><td>0.01</td>" in page
    assert "<td>0.9</td><td>0</td><td>–</td>" in page
    assert page.count("<svg") == 3  # the loss, KL, pass@1


def test_numbers_that_json_could_not_hold_leave_gaps(tmp_path):
    records = [{"step": 1, "kl": 0.5}, {"step": 2, "kl": None}, {"step": 3, "kl": 0.0}]
    assert page_of(write_run(tmp_path / "run", records)).count("<svg") == 1  # a zero has no logarithm: drawn without


def test_another_place_for_the_page(tmp_path):
    directory = write_run(tmp_path / "run", [{"step": 1, "loss": 1.0}])
    run(ReportConfig(directories=[str(directory)], out=str(tmp_path / "page.html")))
    assert (tmp_path / "page.html").exists()
    assert not (directory / "report.html").exists()


def test_what_is_no_run_is_said(tmp_path):
    with pytest.raises(FileNotFoundError, match="no such directory"):
        run(ReportConfig(directories=[str(tmp_path / "nowhere")]))
    with pytest.raises(ValueError, match="expected an evaluation's or a training run's"):
        run(ReportConfig(directories=[str(tmp_path)]))
    write_run(tmp_path / "run", [{"step": 1, "loss": 1.0}])
    (tmp_path / "notes").mkdir()
    with pytest.raises(ValueError, match=r"named; there are such in it: run$"):
        run(ReportConfig(directories=[str(tmp_path)]))
    with pytest.raises(ValueError, match="has not done a step yet"):
        page_of(write_run(tmp_path / "empty", []))
    with pytest.raises(ValueError, match="line 2: not a record of metrics"):
        page_of(write_run(tmp_path / "damaged", [{"step": 1}, {"loss": 3}]))
