"""`m1 eval`, `m1 report` and `m1 solve` as a user runs them, on a tiny model: records, kills, pages, mistakes."""

import json
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from m1 import cli
from m1.evaluation.records import open_records, read_records
from m1.evaluation.sampling import Sample
from m1.reasoning.voting import AnswerGroup, Vote
from m1.solve import Solution, print_text
from m1.storage import read_run_record, write_run_record
from tests.fake_server import fake_server
from tests.training.tiny import byte_tokenizer


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> dict[str, Path]:
    """A Transformer, and the hybrid that `m1 convert` makes of it."""
    directory = tmp_path_factory.mktemp("models")
    tokenizer = byte_tokenizer()
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    LlamaForCausalLM(config).save_pretrained(directory / "base")
    tokenizer.save_pretrained(directory / "base")
    assert m1("convert", "--base", directory / "base", "--out", directory / "hybrid", "--device", "cpu") == 0
    return {name: directory / name for name in ("base", "hybrid")}


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("data")
    rows = [{"id": f"p{number}", "problem": f"{number} + 1 =", "answer": str(number + 1)} for number in range(5)]
    for name in ("aime24", "gsm8k_test"):
        (directory / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return directory


def m1(*words: object) -> int:
    return cli.main([str(word) for word in words])


FEW = ["--samples", 4, "--max-new-tokens", 6, "--device", "cpu", "--concurrency", 8]


def evaluate(model, data, out, *more) -> int:
    return m1("eval", model, "--tasks", "aime24,gsm8k", "--data-dir", data, "--out", out, *FEW, *more)


def test_an_evaluation_and_its_report(models, data, tmp_path, capsys):
    for name in ("base", "hybrid"):
        assert evaluate(models[name], data, tmp_path / name) == 0
    printed = capsys.readouterr().out
    assert "10 samples in all" not in printed
    assert "4 samples a problem, 40 in all" in printed
    assert "aime24" in printed
    assert "maj@4" in printed
    assert f"m1 report {tmp_path / 'hybrid'}" in printed.replace("\n", "")

    record = json.loads((tmp_path / "hybrid" / "m1_run.json").read_text())
    assert record["command"] == "eval"
    assert record["config"]["temperature"] == 0.7
    assert record["versions"].keys() >= {"python", "torch", "transformers", "math-verify"}
    assert record["hardware"]["cpu"]
    assert record["backend"]["mixer_layers"] + record["backend"]["attention_layers"] == 2
    assert record["results"]["gsm8k"]["num_problems"] == 5
    run, records = read_records(tmp_path / "hybrid" / "gsm8k.jsonl.gz")
    assert run["params"] == {"temperature": 0.7, "top_p": 1.0, "max_tokens": 6, "seed": 0}
    assert sorted(one["id"] for one in records) == [f"p{number}" for number in range(5)]
    assert all(len(one["samples"]) == 4 for one in records)

    assert m1("report", tmp_path / "base", tmp_path / "hybrid", "--out", tmp_path / "both.html") == 0
    page = (tmp_path / "both.html").read_text()
    assert "Evaluation: base, hybrid" in page
    assert page.count("<svg") == 4  # against k and against tokens, for two tasks
    assert page.count("hybrid against base, paired by problem") == 2
    assert "best-logprob" in page
    assert not re.search(r'(src|href)="(?!#)', page), "the page fetches something"
    assert m1("report", tmp_path / "base") == 0
    assert "paired by problem:" not in (tmp_path / "base" / "report.html").read_text()


def test_the_prompt_is_the_papers_unless_told_otherwise(models, data, tmp_path, monkeypatch):
    asked = []

    def listen(requests, watch):
        asked.extend(requests)
        raise OSError("heard enough")

    monkeypatch.setattr("m1.backends.engine.engine_backend", lambda engine: listen)
    assert evaluate(models["base"], data, tmp_path / "a") == 2
    assert asked[0].prompt[0]["content"] == ("0 + 1 =\nLet's think step by step and output the final answer within \\boxed{}.")
    asked.clear()
    assert evaluate(models["base"], data, tmp_path / "b", "--suffix", "") == 2
    assert asked[0].prompt[0]["content"] == "0 + 1 ="


def test_an_evaluation_goes_on_after_a_kill(models, data, tmp_path):
    out = tmp_path / "out"
    path = out / "aime24.jsonl.gz"
    words = ["eval", models["base"], "--tasks", "aime24", "--data-dir", data, "--out", out, "--device", "cpu"]
    words += ["--samples", 20, "--concurrency", 20, "--max-new-tokens", 150]
    program = subprocess.Popen([sys.executable, "-m", "m1.cli", *map(str, words)], stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and (not path.exists() or not read_records(path)[1]):
        time.sleep(0.05)
    program.send_signal(signal.SIGKILL)
    program.wait()
    done = read_records(path)[1]
    assert 1 <= len(done) < 5
    assert m1("report", out) == 0
    assert "Unfinished" in (out / "report.html").read_text()
    assert m1(*words) == 0
    records = read_records(path)[1]
    assert [one["id"] for one in records][: len(done)] == [one["id"] for one in done]
    assert sorted(one["id"] for one in records) == [f"p{number}" for number in range(5)]


def test_budgets_are_measured(models, data, tmp_path, capsys):
    outs = [tmp_path / "a", tmp_path / "b"]
    for model, out in zip(models.values(), outs, strict=True):
        words = ["--data-dir", data, "--out", out, "--max-new-tokens", 6, "--device", "cpu", "--concurrency", 4, "--limit", 2]
        words += ["--time-budgets", "0.2,1", "--token-budgets", "5000"]
        assert m1("eval", model, "--tasks", "gsm8k", *words) == 0
    assert "each problem alone for 1 s" in capsys.readouterr().out
    summary = json.loads((outs[0] / "m1_run.json").read_text())["results"]["gsm8k"]
    assert [point["budget"] for point in summary["time_budgets"]] == [0.2, 1]
    assert summary["time_budgets"][0]["mean_samples"] <= summary["time_budgets"][1]["mean_samples"]
    records = read_records(outs[0] / "gsm8k.jsonl.gz")[1]
    assert all(one["ended_by"] in ("seconds", "tokens") and one["seconds"] < 10 for one in records)
    assert m1("report", *outs) == 0
    page = (outs[0] / "report.html").read_text()
    assert page.count("<svg") == 2
    assert "vote at 1 seconds" in page


def test_an_adaptive_evaluation(models, data, tmp_path):
    assert evaluate(models["base"], data, tmp_path / "out", "--adaptive", "0.9") == 0
    summary = json.loads((tmp_path / "out" / "m1_run.json").read_text())["results"]["gsm8k"]
    assert "pass@1" not in summary
    assert 1 <= summary["mean_samples"] <= 4
    assert m1("report", tmp_path / "out") == 0


def test_other_backends(models, data, tmp_path):
    assert evaluate(models["hybrid"], data, tmp_path / "transformers", "--backend", "transformers") == 0
    record = json.loads((tmp_path / "transformers" / "m1_run.json").read_text())
    assert record["backend"]["class"] == "M1ForCausalLM"
    assert record["results"]["gsm8k"]["session"]["samples"] == 20
    with fake_server() as server:
        assert evaluate("some-model", data, tmp_path / "server", "--url", server.url) == 0
        assert server.seen[0]["max_tokens"] == 6
    run, records = read_records(tmp_path / "server" / "gsm8k.jsonl.gz")
    assert run["description"] == {"model": "some-model", "backend": "server", "url": server.url}
    assert records[0]["samples"][0]["text"].endswith("is it")


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--tasks", "chess"], "unknown task 'chess'"),
        (["--time-budgets", "1,two"], "--time-budgets: expected numbers"),
        (["--token-budgets", "0,5"], "--token-budgets: expected numbers above 0"),
        (["--samples", "-1"], "--samples: expected at least 0"),
        (["--adaptive", "0.3"], "--adaptive: expected"),
        (["--temperature", "0"], "add --samples 1"),
        (["--verifier", "judge"], "--verifier: expected MODULE:FUNCTION"),
        (["--verifier", "no.such:judge"], "cannot load"),
        (["--data-dir", "./nowhere"], "no such directory"),
    ],
)
def test_mistakes_are_told_before_anything_is_written(models, data, tmp_path, capsys, more, message):
    assert m1("eval", models["base"], "--tasks", "aime24", "--data-dir", data, "--out", tmp_path / "out", *more) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_another_runs_directory_is_not_touched(models, data, tmp_path, capsys):
    assert evaluate(models["base"], data, tmp_path / "out") == 0
    before = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    assert evaluate(models["base"], data, tmp_path / "out", "--seed", 1) == 2
    refusal = capsys.readouterr().err
    assert "params differ" in refusal and "another --out, or --overwrite" in refusal
    assert evaluate(models["hybrid"], data, tmp_path / "out") == 2
    assert "description differ" in capsys.readouterr().err
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == before
    assert evaluate(models["hybrid"], data, tmp_path / "out", "--overwrite") == 0
    assert evaluate(models["base"], data, models["base"]) == 2
    assert "holds no evaluation" in capsys.readouterr().err
    assert m1("report", tmp_path / "out", models["base"]) == 2
    assert "expected an evaluation's directory: only these can be compared" in capsys.readouterr().err


def solve(capsys, model, *more) -> dict:
    assert m1("solve", "1 + 1 =", "--model", model, "--max-new-tokens", 6, "--device", "cpu", "--json", *more) == 0
    return json.loads(capsys.readouterr().out)


def test_solve_within_budgets(models, capsys):
    answer = solve(capsys, models["base"], "--seconds", "1.5", "--concurrency", 4)
    assert answer["ended_by"] == "seconds"
    assert 1.5 <= answer["seconds"] < 10
    assert answer["samples"]
    answer = solve(capsys, models["base"], "--tokens", "100", "--concurrency", 4)
    assert answer["ended_by"] == "tokens"
    assert 100 <= answer["tokens"] <= 104 + 4
    answer = solve(capsys, models["base"], "--samples", 6)
    assert (len(answer["samples"]), answer["ended_by"]) == (6, "samples")
    again = solve(capsys, models["base"], "--samples", 6)
    assert [one["text"] for one in again["samples"]] == [one["text"] for one in answer["samples"]]


@pytest.mark.parametrize("vote", ["logprob", "tail", "best-tail", "tests.test_evaluate:shortest"])
def test_solve_votes_in_every_way(models, capsys, vote):
    answer = solve(capsys, models["hybrid"], "--samples", 5, "--vote", vote)
    assert len(answer["samples"]) == 5


def test_a_solution_cannot_steer_the_terminal(capsys):
    hostile = "\x1b[2J\x07[red]5[/]\u202e\n\\boxed{\x1b]0;5}"
    vote = Vote("\x1b]0;5", 1.0, (AnswerGroup("\x1b]0;5", (0,), 1.0),), 0)
    print_text(Solution("p", [Sample(hostile, 9, "stop")], ["\x1b]0;5"], vote, 1.0, 9, "samples"))
    printed = capsys.readouterr().out
    assert "[red]5[/]" in printed
    assert not {"\x1b", "\x07", "\u202e"} & set(printed)


def shortest(problem, completion):
    assert problem == "1 + 1 ="
    return 1 / (1 + len(completion))


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--vote", "loudest"], "--vote: expected"),
        (["--vote", "tail", "--adaptive", "0.9"], "only a majority vote can be decided early"),
        (["--seconds", "-1"], "--seconds: expected more than 0"),
        (["--samples", "-2"], "--samples"),
    ],
)
def test_mistakes_of_solve(models, capsys, more, message):
    assert m1("solve", "1 + 1 =", "--model", models["base"], *more) == 2
    assert message in capsys.readouterr().err


def test_completions_are_judged_again_without_the_model(data, tmp_path, capsys):
    evaluated, again = tmp_path / "evaluated", tmp_path / "again"
    run = {"num_problems": 3, "num_samples": 2, "params": {}, "adaptive": None, "budget": None, "description": {}, "digest": ""}
    texts = [["\\boxed{2}", "\\boxed{3}"], ["\\boxed{4.0}", "no"], ["\\boxed{6}", "\\boxed{06}"]]
    with open_records(evaluated / "gsm8k.jsonl.gz", run) as file:
        for number, pair in enumerate(texts):
            sample = {"num_tokens": 3, "finish_reason": "stop", "answer": None, "reward": 0.0, "reason": None}
            samples = [sample | {"text": text, "index": index} for index, text in enumerate(pair)]
            file.append(
                {"id": f"p{number}", "problem": "?", "answer": str(2 + 2 * number), "labels": [0, 0], "samples": samples}
            )
    write_run_record(evaluated, "eval", {"model": "some"})
    assert m1("eval", "--regrade", evaluated, "--out", again) == 0
    assert "4 verdicts changed" in capsys.readouterr().out
    _, records = read_records(again / "gsm8k.jsonl.gz")
    assert [record["labels"] for record in records] == [[0, 1], [0, -1], [0, 0]]
    assert [[sample["reward"] for sample in record["samples"]] for record in records] == [[1, 0], [1, 0], [1, 1]]
    assert read_run_record(again)["results"]["gsm8k"]["pass@1"] == pytest.approx(4 / 6)
    first = (again / "gsm8k.jsonl.gz").read_bytes()
    assert m1("eval", "--regrade", evaluated, "--out", again) == 0  # all there: nothing is judged twice
    assert (again / "gsm8k.jsonl.gz").read_bytes() == first and "4 verdicts changed" in capsys.readouterr().out


def test_what_cannot_be_judged_again(tmp_path, capsys):
    assert m1("eval", "--regrade", tmp_path, "--out", tmp_path / "again") == 2
    assert "no evaluation there" in capsys.readouterr().err
    run = {"num_problems": 1, "num_samples": 1}
    with open_records(tmp_path / "gym.jsonl.gz", run) as file:
        file.append({"id": "p", "problem": "?", "answer": "2", "reward": "reasoning_gym:chain_sum", "samples": []})
    write_run_record(tmp_path, "eval", {"model": "some"})
    assert m1("eval", "--regrade", tmp_path, "--out", tmp_path / "again") == 2
    assert "judged by reasoning_gym:chain_sum" in capsys.readouterr().err
    assert m1("eval", "--regrade", tmp_path, "--out", tmp_path) == 2
    assert "is the evaluation itself" in capsys.readouterr().err
