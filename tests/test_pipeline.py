"""The whole way through the command line, on a model of two seconds: every stage, a recipe of all stages, solve; quickstart."""

import dataclasses
import json
import re
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from m1 import cli
from m1.config import QuickstartConfig
from m1.quickstart.recipe import Recipe, middle_layers
from m1.quickstart.run import WRITTEN, Quickstart, run
from m1.storage import read_run_record
from tests.training.tiny import byte_tokenizer

STEPS = ["--steps", "2", "--tokens-per-step", "256", "--tokens-per-batch", "256", "--max-length", "256", "--device", "cpu"]


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("base")
    tokenizer = byte_tokenizer()
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=4,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    LlamaForCausalLM(config).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


@pytest.fixture
def data(tmp_path) -> Path:
    path = tmp_path / "problems.jsonl"
    rows = [{"problem": f"{a} + {b} =", "answer": str(a + b)} for a in range(6) for b in range(6)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def m1(*words: object) -> None:
    assert cli.main([str(word) for word in words]) == 0


@pytest.mark.parametrize("mixer", ["mamba1", "mamba2"])
def test_every_stage_takes_what_the_one_before_it_gave(base, data, tmp_path, capsys, mixer):
    out = {name: tmp_path / name for name in ("hybrid", "aligned", "distilled", "sft", "grpo")}
    m1("convert", "--base", base, "--out", out["hybrid"], "--mixer", mixer, "--attention-layers", "1", "--start", "improved",
       "--calibration", data)  # fmt: skip
    m1("align", "--model", out["hybrid"], "--teacher", base, "--data", data, "--out", out["aligned"], *STEPS)
    m1("distill", "--model", out["aligned"], "--teacher", base, "--data", data, "--out", out["distilled"], *STEPS)
    m1("sft", "--model", out["distilled"], "--data", data, "--out", out["sft"], *STEPS)
    m1("grpo", "--model", out["sft"], "--data", data, "--out", out["grpo"], *STEPS, "--max-new-tokens", 4,
       "--problems-per-step", 2, "--samples-per-problem", 2, "--suffix", "")  # fmt: skip

    record = read_run_record(out["grpo"])
    assert [one["command"] for one in record["history"]] == ["convert", "align", "distill", "sft"]
    assert len((out["grpo"] / "metrics.jsonl").read_text().splitlines()) == 2
    model = AutoModelForCausalLM.from_pretrained(out["grpo"])
    assert model.config.mixer == mixer
    assert model.config.attention_layers == [1]

    capsys.readouterr()
    m1("solve", "1 + 1 =", "--model", out["grpo"], "--samples", 3, "--max-new-tokens", 5, "--device", "cpu", "--json")
    answer = json.loads(capsys.readouterr().out)
    assert len(answer["samples"]) == 3
    assert {"answer", "share", "votes", "solution", "tokens", "seconds"} <= answer.keys()


RECIPE = """
[all]
teacher = "{base}"
steps = 2
tokens_per_step = 256
tokens_per_batch = 256
max_length = 256
max_new_tokens = 6
device = "cpu"
precision = "float32"
suffix = ""
seed = 1

[sample]
model = "{base}"
out = "{root}/data"
data = ["{problems}"]
invent = 3
samples = 2

[convert]
base = "{base}"
out = "{root}/converted"
attention_fraction = 0
start = "improved"
calibration = ["{root}/data:train"]

[align]
model = "{root}/converted"
out = "{root}/aligned"
data = ["{root}/data:train"]

[select]
model = "{root}/aligned"
out = "{root}/selected"
data = ["{root}/data"]
attention_fraction = 0.5
tokens = 100

[distill]
model = "{root}/selected"
out = "{root}/distilled"
data = ["{root}/data:train"]
teacher_cache = "{root}/teacher"
teacher_top_k = 16

[on-policy]
model = "{root}/distilled"
out = "{root}/on-policy"
data = ["{root}/data:train"]
problems_per_step = 2

[sft]
model = "{root}/on-policy"
out = "{root}/sft"
data = ["{root}/data:train"]
only_correct = false

[grpo]
model = "{root}/sft"
out = "{root}/grpo"
data = ["{problems}"]
problems_per_step = 2
samples_per_problem = 2
refill = 2.0
"""


def test_a_recipe_runs_from_samples_to_a_reinforced_hybrid(base, data, tmp_path, capsys):
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(RECIPE.format(base=base, root=tmp_path, problems=data))
    stages = ("sample", "convert", "align", "select", "distill", "on-policy", "sft", "grpo")
    for stage in stages:
        m1(stage, recipe)
    capsys.readouterr()
    for stage in (
        "sample",
        "align",
        "select",
        "distill",
        "on-policy",
        "sft",
        "grpo",
    ):  # the same line goes on, or says that all is done
        m1(stage, recipe)
        assert "is finished already" in capsys.readouterr().out

    record = read_run_record(tmp_path / "grpo")
    assert [one["command"] for one in record["history"]] == [*stages[1:-1]]
    assert read_run_record(tmp_path / "data")["samples"] >= 36 * 2
    chosen = json.loads((tmp_path / "selected" / "selection.json").read_text())["attention_layers"]
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "grpo").config.attention_layers == chosen
    assert len(chosen) == 2

    m1("convert", "--base", base, "--out", tmp_path / "anew", "--attention-layers", tmp_path / "selected" / "selection.json")
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "anew").config.attention_layers == chosen
    m1("report", tmp_path / "grpo")
    assert "m1 grpo: grpo" in (tmp_path / "grpo" / "report.html").read_text()


def test_solve_prints_the_vote(base, capsys):
    m1("solve", "1 + 1 =", "--model", base, "--samples", 2, "--max-new-tokens", 3, "--device", "cpu")
    assert "of the votes; 2 samples" in capsys.readouterr().out


def test_quickstart(base, tmp_path):
    """Every stage measured, and all of it on the page."""
    recipe = Recipe(num_train_problems=24, num_heldout_problems=4, num_teacher_problems=8, num_samples=2, max_new_tokens=4)
    small = {"steps": 1, "tokens_per_step": 512, "tokens_per_batch": 512, "device": "cpu", "precision": "float32"}
    stages = {
        name: dataclasses.replace(getattr(recipe, name), **small) for name in ("teach", "align", "distill", "sft", "grpo")
    }
    stages["grpo"] = dataclasses.replace(stages["grpo"], problems_per_step=2, samples_per_problem=2, max_new_tokens=4)
    recipe = dataclasses.replace(recipe, **stages)
    out = tmp_path / "quickstart"
    Quickstart(QuickstartConfig(base=str(base), out=str(out), device="cpu"), out, recipe).run()

    results = json.loads((out / "results.json").read_text())
    assert list(results["similarity"]) == ["converted", "aligned", "distilled", "SFT", "GRPO"]
    for name in ("Transformer", "hybrid"):
        assert list(results["accuracy"][name]) == ["before SFT", "SFT", "GRPO"]
    assert results["setting"]["attention_layers"] == [1, 2]
    page = (out / "report.html").read_text()
    assert page.count("<svg") == 4 + len(results["curves"])
    assert not re.search(r'(src|href)="(?!#)', page), "the page fetches something"
    for name in ("transformer", "hybrid"):
        assert AutoModelForCausalLM.from_pretrained(out / name).dtype == torch.bfloat16

    evaluations = [tmp_path / f"evaluated-{name}" for name in ("transformer", "hybrid")]
    for name, directory in zip(("transformer", "hybrid"), evaluations, strict=True):
        m1("eval", out / name, "--tasks", out / "heldout.jsonl", "--out", directory, "--samples", 2, "--suffix", "",
           "--max-new-tokens", 4, "--device", "cpu")  # fmt: skip
    m1("report", *evaluations)
    assert "hybrid against transformer" in (evaluations[0] / "report.html").read_text()

    with pytest.raises(FileExistsError, match="--overwrite"):
        run(QuickstartConfig(base=str(base), out=str(out)))
    with pytest.raises(FileExistsError, match="holds what no quickstart wrote, such as"):
        run(QuickstartConfig(base=str(base), out=str(out / "hybrid")))
    assert {path.name for path in out.iterdir()} == WRITTEN


@pytest.mark.parametrize(("num_layers", "kept"), [(30, list(range(8, 23))), (24, list(range(6, 18))), (3, [1, 2]), (1, [0])])
def test_the_middle_half_stays_attention(num_layers, kept):
    assert middle_layers(num_layers) == kept
