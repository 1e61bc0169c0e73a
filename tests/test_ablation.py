"""The comparison of hybrids (benchmarks/ablation.py) on a model of seconds, and the split of problems that it relies on."""

import gzip
import json
import random
import re
import sys
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from m1 import cli
from m1.modeling.loading import load_config
from m1.reasoning.problems import Problem, read_problems
from m1.training.metrics import read_metrics
from tests.training.tiny import byte_tokenizer

sys.path.append(str(Path(__file__).parent.parent / "benchmarks"))

import ablation
import ablation_table
import hybrid_arms
import measure_run
import split_problems


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
    monkeypatch.setattr(hybrid_arms, "SPEED_TOKENS", 4)


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A Transformer, samples, problems to choose by, and a recipe."""
    path = tmp_path_factory.mktemp("ablation")
    tokenizer = byte_tokenizer()
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "head_dim": 16}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1}
    config = LlamaConfig(vocab_size=len(tokenizer), eos_token_id=tokenizer.eos_token_id, **sizes, **heads)
    LlamaForCausalLM(config).save_pretrained(path / "teacher")
    tokenizer.save_pretrained(path / "teacher")
    generator, rows = random.Random(0), []
    for number in range(400):
        a, b = generator.randint(1, 99), generator.randint(1, 99)
        rows.append({"problem": f"{a} + {b} ={number}", "prompt": f"{a} + {b} =", "completion": f"\\boxed{{{a + b}}}"})
    with gzip.open(path / "samples.jsonl.gz", "wt") as file:
        file.write("".join(json.dumps(row) + "\n" for row in rows))
    (path / "dev.jsonl").write_text('{"id": "a", "problem": "1 + 1 =", "answer": "2"}\n')
    (path / "recipe.toml").write_text('[distill]\nfrozen = ["embeddings", "attention"]\n')
    return path


def arguments(place: Path, out: Path, *more: str) -> list[str]:
    files = ["--teacher", place / "teacher", "--data", place / "samples.jsonl.gz", "--dev", place / "dev.jsonl"]
    sizes = "--align-tokens 256 --distill-tokens 512 --tokens-per-step 256 --tokens-per-batch 256 --max-length 128"
    tokens = "--calibration-tokens 256 --held-out-tokens 60 --selection-tokens 20 --max-new-tokens 4 --num-seqs 2"
    where = ["--recipe", place / "recipe.toml", "--work", out.parent / "work", "--out", out, "--device", "cpu"]
    return [*map(str, files), *sizes.split(), *tokens.split(), *map(str, where), *more]


def test_arms_are_made_measured_and_not_made_twice(place, tmp_path, capsys):
    out = tmp_path / "results.json"
    only = ["--mixers", "mamba2", "--only", "teacher|start improved|mamba2 even|mamba2 selected"]
    ablation.main(arguments(place, out, *only))
    content = json.loads(out.read_text())
    rows = content["rows"]
    assert list(rows) == ["teacher", "mamba2 start improved", "mamba2 even", "mamba2 selected"]
    assert rows["teacher"]["attention_layers"] == [0, 1, 2, 3] and "kl" not in rows["teacher"]
    assert rows["mamba2 even"]["attention_layers"] == [3] and len(rows["mamba2 selected"]["attention_layers"]) == 1
    assert load_config(tmp_path / "work" / "distilled-mamba2-even").attention_layers == [3]
    for name in list(rows)[1:]:
        assert rows[name]["kl"] > 0 and 0 <= rows[name]["agreement"] <= 1 and rows[name]["state_bytes"] > 0
        assert rows[name]["decode"]["tokens_per_second"] > 0 and rows[name]["dev"]["num_problems"] == 1
    assert rows["mamba2 even"]["distill"]["tokens"] > 256 and len(rows["mamba2 even"]["distill"]["curve"]) == 2
    assert (tmp_path / "work" / "records" / "mamba2-even.jsonl.gz").is_file()
    capsys.readouterr()
    ablation_table.main([str(out), "--plot", str(tmp_path / "plot.svg")])
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(" | ")[0] for line in lines[2:]] == [f"| {name}" for name in rows]
    assert "| mamba2 even | 3 | 0.0M |" in lines[4] and (tmp_path / "plot.svg").read_text().count("<svg") == 1
    ablation.main(arguments(place, out, *only))
    assert "mamba2" not in capsys.readouterr().out and json.loads(out.read_text()) == content
    with pytest.raises(ValueError, match=r"align_tokens = 256\.0, not 512\.0"):
        ablation.main(arguments(place, out, "--align-tokens", "512"))


def test_the_restored_layers_are_the_transformers_and_shared_with_nobody(place, tmp_path):
    bench = ablation.Bench(ablation.parse(arguments(place, tmp_path / "x.json")))
    hybrid = bench.restore(bench.convert("mamba1", "improved", []), "mamba1", [2])
    own, given = hybrid.model.layers[2].self_attn.q_proj.weight, bench.exact.model.layers[2].self_attn.q_proj.weight
    assert torch.equal(own, given) and own.data_ptr() != given.data_ptr()
    with torch.no_grad():
        for parameter in hybrid.parameters():
            parameter.zero_()
    assert all(parameter.any() for name, parameter in bench.exact.named_parameters() if "bias" not in name)


def test_a_setting_goes_over_the_recipe(place, tmp_path):
    settings = ["distill.mixer_learning_rate=5e-4", "align.betas=[0.8, 0.9]"]
    bench = ablation.Bench(ablation.parse([*arguments(place, tmp_path / "x.json"), "--set", *settings]))
    (distill, _), (align, _) = bench._stage("distill", 512, "completion"), bench._stage("align", 512, "all")
    assert distill.mixer_learning_rate == 5e-4 and align.mixer_learning_rate == 1e-3 and align.betas == (0.8, 0.9)
    for wrong in ("sft.steps=1", "distill.steps", "distill.steps=one"):
        with pytest.raises(ValueError, match=f"--set {wrong}"):
            hybrid_arms.read_setting(wrong)


def test_what_measures_kl_does_not_choose_layers(place, tmp_path):
    bench = ablation.Bench(ablation.parse(arguments(place, tmp_path / "x.json")))
    choosing, measuring = ({tuple(d.token_ids) for d in some} for some in (bench.for_selection, bench.for_measuring))
    assert choosing and measuring and not choosing & measuring


def test_a_runs_models_are_measured_once_each(place, tmp_path, capsys):
    run = tmp_path / "run"
    cli.main(["convert", "--base", str(place / "teacher"), "--out", str(tmp_path / "start"), "--device", "cpu"])
    sizes = "--steps 2 --tokens-per-step 256 --tokens-per-batch 256 --max-length 256 --export-every 1 --device cpu"
    files = ["--teacher", str(place / "teacher"), "--data", str(place / "samples.jsonl.gz"), "--out", str(run)]
    cli.main(["distill", "--model", str(tmp_path / "start"), *files, *sizes.split()])
    data = ["--data", str(place / "samples.jsonl.gz"), "--dev", str(place / "dev.jsonl"), "--device", "cpu"]
    small = "--held-out-tokens 60 --selection-tokens 20 --max-new-tokens 4 --num-seqs 2"
    for _ in range(2):
        measure_run.main([str(run), "--teacher", str(place / "teacher"), *data, *small.split()])
    lines = read_metrics(run / "measured.jsonl")
    assert [line["step"] for line in lines] == [0, 1, 2] and lines[2]["tokens"] > lines[1]["tokens"] > lines[0]["tokens"] == 0
    assert all(line["kl"] > 0 and 0 <= line["pass_at_1"] <= 1 and line["length"] > 0 for line in lines)
    assert lines[0]["kl"] != lines[2]["kl"]
    assert (run / "measured" / "step-00000001.jsonl.gz").is_file()
    with pytest.raises(FileNotFoundError, match="expected the directory of a training run"):
        measure_run.main([str(tmp_path), "--teacher", str(place / "teacher"), *data])


def test_a_row_that_takes_too_long_is_passed_over(place, tmp_path, capsys):
    ablation.main(arguments(place, tmp_path / "x.json", "--seconds", "1", "--only", "mamba2 even", "--mixers", "mamba2"))
    assert "mamba2 even              passed over" in capsys.readouterr().out
    assert not (tmp_path / "x.json").exists()


def test_problems_are_held_out_by_their_text(tmp_path):
    problems = [Problem(str(number), f"What is {number % 90}?", "1") for number in range(100)]
    dev, rest = split_problems.split(problems, 20)
    assert len(dev) + len(rest) == 100 and 20 <= len(dev) <= 21
    assert not {problem.problem for problem in dev} & {problem.problem for problem in rest}
    shuffled = random.Random(1).sample(problems, 100)
    assert {problem.id for problem in split_problems.split(shuffled, 20)[0]} == {problem.id for problem in dev}
    with pytest.raises(ValueError, match="expected 1 to 99"):
        split_problems.split(problems, 100)


def test_the_split_is_written_as_problems(tmp_path, monkeypatch):
    lines = [{"problem": f"What is {number}?", "answer": "" if number == 3 else "1"} for number in range(10)]
    (tmp_path / "set.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    monkeypatch.setattr(sys, "argv", ["split", str(tmp_path / "set.jsonl"), "--held-out", "4", "--out", str(tmp_path)])
    split_problems.main()
    dev, rest = (read_problems(tmp_path / f"set_{name}.jsonl") for name in ("dev", "rest"))
    assert (len(dev), len(rest)) == (4, 5) and "What is 3?" not in {problem.problem for problem in dev + rest}


def test_the_sums_of_the_quickstart_are_split_under_names_of_their_own(tmp_path, monkeypatch):
    monkeypatch.setattr(split_problems, "NUM_SUMS", 60)
    monkeypatch.setattr(sys, "argv", ["split", "quickstart", "--held-out", "20", "--out", str(tmp_path)])
    split_problems.main()
    dev, rest = (read_problems(tmp_path / f"quickstart_{name}.jsonl") for name in ("dev", "rest"))
    assert (len(dev), len(rest)) == (20, 40) and not {one.problem for one in dev} & {one.problem for one in rest}
    assert all(one.id.startswith("quickstart/") and one.reward == "reasoning_gym:chain_sum" for one in dev + rest)
    assert re.fullmatch(r".*: \d\d? [+-] \d\d? =", dev[0].problem)
