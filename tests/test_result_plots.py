"""Benchmarks that put results together: what is joined belongs together, and pictures are written."""

import gzip
import json
import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parent.parent / "benchmarks"))

import accuracy_against_time
import kernel_table
import measured_plot
import metrics_plot
import numpy as np

from tests.engine.models import byte_tokenizer, tiny_model


def read_records(path):
    return gzip.decompress(path.read_bytes()).decode().splitlines()[1:]


def measured(path, lines):
    path.mkdir(parents=True)
    (path / "measured.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def line(step, tokens, kl, solved):
    return {"step": step, "tokens": tokens, "kl": kl, "pass_at_1": solved, "pass_at_1_error": 0.02}


def test_runs_that_go_on_from_one_another_are_one_line(tmp_path):
    first = measured(tmp_path / "a", [line(0, 0, 0.5, 0.1), line(20, 2000, 0.2, 0.3), line(10, 1000, 0.3, 0.2)])
    second = measured(tmp_path / "b", [line(0, 0, 0.2, 0.3), line(5, 700, 0.1, 0.4)])
    lines = measured_plot.joined([first, second], 30_000)
    assert [(one["tokens"], one["kl"]) for one in lines] == [(30_000, 0.5), (31_000, 0.3), (32_000, 0.2), (32_700, 0.1)]
    out = tmp_path / "recovery.svg"
    measured_plot.main([str(first), str(second), "--tokens-before", "30000", "--transformer", "0.4", "--out", str(out)])
    assert out.stat().st_size > 10_000


def test_kl_on_other_tokens_is_a_line_of_its_own(tmp_path):
    first = measured(tmp_path / "a", [line(n, 100 * n, 0.5 - n / 10, 0.2) | {"targets": 80} for n in (0, 2)])
    second = measured(tmp_path / "b", [line(n, 100 * n, 0.25, 0.2) | {"targets": 20} for n in (0, 3)])
    lines = measured_plot.joined([first, second], 0)
    assert [(one["tokens"], one["targets"]) for one in lines] == [(0, 80), (200, 80), (200, 20), (500, 20)]
    above, _ = measured_plot.plot(lines, None).axes
    assert [list(curve.get_xdata() * 1e6) for curve in above.lines] == [[0, 200], [200, 500]]
    assert [text.get_text() for text in above.get_legend().get_texts()] == ["80 held-out tokens", "20 held-out tokens"]


def timed(path, name, **setting):
    rows = [
        {"name": name, "num_problems": 8, "num_samples": n, "vote": 0.1 * n, "seconds": 2.0 * n, "tokens_per_second": 9.0}
        for n in (1, 4)
    ]
    common = {"problems": ["x.jsonl", 8], "temperature": 0.7, "commands": [[name]]}
    path.write_text(json.dumps({"setting": common | setting, "rows": rows}))
    return str(path)


def test_times_of_several_commands_are_joined(tmp_path):
    files = [timed(tmp_path / f"{name}.json", name) for name in ("hybrid", "transformer")]
    out, picture = tmp_path / "out.json", tmp_path / "out.svg"
    accuracy_against_time.main(["--join", *files, "--out", str(out), "--plot", str(picture)])
    found = json.loads(out.read_text())
    assert found["setting"]["commands"] == [["hybrid"], ["transformer"]]
    assert [(row["name"], row["num_samples"]) for row in found["rows"]] == [
        ("hybrid", 1),
        ("hybrid", 4),
        ("transformer", 1),
        ("transformer", 4),
    ]
    assert picture.stat().st_size > 10_000


def test_times_of_unlike_settings_are_not(tmp_path):
    files = [timed(tmp_path / "a.json", "a"), timed(tmp_path / "b.json", "b", temperature=0.9)]
    with pytest.raises(ValueError, match=r"b\.json: temperature is 0\.9, in .*a\.json 0\.7"):
        accuracy_against_time.main(["--join", *files, "--out", str(tmp_path / "out.json")])


def test_a_run_is_timed_by_its_sampling_alone(tmp_path):
    """Each number of samples is a run of its own, with its completions; the first of all is done twice and counted once."""
    model = tmp_path / "model"
    tiny_model("mamba2").save_pretrained(model)
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
    tokenizer.save_pretrained(model)
    problems = tmp_path / "problems.jsonl"
    problems.write_text("".join(json.dumps({"problem": f"{n} + 1 =", "answer": str(n + 1)}) + "\n" for n in range(3)))
    sizes = ["--samples", "1", "3", "--max-new-tokens", "8", "--num-seqs", "4", "--max-prompt", "200"]
    records, out = tmp_path / "records", tmp_path / "out.json"
    accuracy_against_time.main(
        [f"tiny={model}", "--problems", str(problems), "--records", str(records), "--out", str(out), "--device", "cpu", *sizes]
    )
    rows = json.loads(out.read_text())["rows"]
    assert [(row["num_samples"], row["num_problems"]) for row in rows] == [(1, 3), (3, 3)]
    for row in rows:
        assert row["tokens_per_second"] * row["seconds"] == pytest.approx(3 * row["num_samples"] * row["mean_tokens"])
        assert len(read_records(records / f"tiny-{row['num_samples']}.jsonl.gz")) == 3


def run_with(path, records):
    path.mkdir()
    (path / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def test_metrics_of_several_runs_are_one_picture(tmp_path):
    records = [{"step": 1, "reward": 0.1, "entropy": 0.5}, {"step": 2, "reward": 0.3}, {"step": 3, "reward": 0.8}]
    steps, values = metrics_plot.curve(records, "reward", 2)
    np.testing.assert_allclose(steps, [1.5, 3])
    np.testing.assert_allclose(values, [0.2, 0.8])
    assert metrics_plot.curve(records, "entropy", 2)[0].tolist() == [1]  # steps that lack it don't count
    runs = [f"{name}={run_with(tmp_path / name, records)}" for name in ("hybrid", "transformer")]
    out = tmp_path / "grpo.svg"
    metrics_plot.main([*runs, "--metrics", "reward", "entropy", "--out", str(out)])
    assert out.stat().st_size > 10_000


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--metrics", "kl"], "has no 'kl'; it has step, reward"),
        (["--metrics", "reward", "--mean-of", "0"], "at least 1, got 0"),
    ],
)
def test_a_picture_of_metrics_that_are_not_there(tmp_path, capsys, options, words):
    run = run_with(tmp_path / "a", [{"step": 1, "reward": 0.1}])
    with pytest.raises(SystemExit):
        metrics_plot.main([f"a={run}", *options, "--out", str(tmp_path / "x.svg")])
    assert words in capsys.readouterr().err


def test_the_docs_quote_the_kernels_results():
    root = Path(__file__).parent.parent
    if not (root / "results" / "kernels.json").exists():
        pytest.skip("a checkout without results/")
    rows = json.loads((root / "results" / "kernels.json").read_text(encoding="utf-8"))["cases"]
    names = {row["name"] for row in rows}
    lines = (root / "docs" / "kernels.md").read_text(encoding="utf-8").splitlines()
    quoted = [line for line in lines if line.removeprefix("| ").split(" | ")[0] in names]
    assert len(quoted) > 50
    assert set(quoted) <= set(kernel_table.table(rows, []).splitlines())
    assert len(kernel_table.table(rows, ["causal_conv1d 0.5B", "0.5B 896"]).splitlines()) == 2 + 2  # each case once
