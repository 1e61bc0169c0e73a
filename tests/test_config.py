"""Configuration: every committed recipe parses, and what is wrong in one is named."""

import ast
import dataclasses
import inspect
import itertools
from pathlib import Path

import pytest

from m1.config import COMMANDS
from m1.recipe_file import build, read_recipe

RECIPES = sorted((Path(__file__).parents[1] / "recipes").glob("*.toml"))


def write(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "run.toml"
    path.write_text(text)
    return path


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
@pytest.mark.parametrize("command", COMMANDS)
def test_committed_recipes_parse(path, command):
    build(command, read_recipe(path, command), str(path))


def test_there_are_recipes():
    assert [path.stem for path in RECIPES] == ["llama3.2-3b", "qwen2.5-coder-0.5b", "smollm2-135m"]


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_each_table_of_a_recipe_goes_on_from_the_one_before(path):
    """Models and data that a table takes are what an earlier one wrote, or the base's; documents fit into batches."""
    stages = ("sample", "convert", "align", "select", "distill", "on-policy", "sft", "grpo")
    written, base = set(), read_recipe(path, "convert")["base"]
    for command in stages:
        config = build(command, read_recipe(path, command), str(path))
        for name in ("model", "teacher", "base"):
            assert getattr(config, name, base) in {base, *written}, (command, name)
        for source in [*getattr(config, "data", []), *getattr(config, "calibration", [])]:
            name, _, part = source.partition(":")
            if command in ("sample", "grpo") and name.startswith("runs/problems/"):
                assert name.endswith("_rest.jsonl"), "what benchmarks/split_problems.py left for training"
                continue
            assert name == "gym" or name in written, (command, source)
            assert name == "gym" or part == ("held_out" if command == "select" else "train"), "choose on what is held out"
        if hasattr(config, "tokens_per_step"):
            assert config.max_length <= config.tokens_per_batch
        if command in ("align", "distill", "sft"):
            batches = config.tokens_per_step / config.tokens_per_batch
            assert batches == int(batches)
        assert config.out not in written
        written.add(config.out)


def test_a_table_goes_over_the_shared_one(tmp_path):
    path = write(tmp_path, '[all]\nseed = 7\nteacher = "t"\n[sft]\nseed = 8\n')
    assert read_recipe(path, "sft") == {"seed": 8}
    assert read_recipe(path, "distill") == {"seed": 7, "teacher": "t"}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[sft]\nlerning_rate = 1.0\n", r"run.toml: \[sft\] has an unknown key 'lerning_rate'; did you mean 'learning_rate'"),
        ("[stf]\nseed = 1\n", r"unknown table \[stf\]; did you mean 'sft'"),
        ("seed = 1\n", r"seed = … stands outside a table"),
        ("[sft\n", "not valid TOML"),
    ],
)
def test_bad_recipe(tmp_path, text, message):
    with pytest.raises(ValueError, match=message):
        read_recipe(write(tmp_path, text), "sft")


def test_missing_recipe(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"none\.toml: no such recipe"):
        read_recipe(tmp_path / "none.toml", "sft")


@pytest.mark.parametrize(
    ("key", "value"),
    [("steps", "ten"), ("steps", 1.5), ("steps", True), ("learning_rate", "1e-4"), ("precision", "fp8"), ("data", "one.jsonl"),
     ("betas", [0.9]), ("mixer_learning_rate", "no")],
)  # fmt: skip
def test_value_of_the_wrong_type(key, value):
    with pytest.raises(ValueError, match=f"here: {key} = .* expected"):
        build("sft", {key: value}, "here")


def test_integers_are_numbers_and_lists_are_tuples():
    config = build("sft", {"learning_rate": 1, "betas": [0.9, 0.99], "mixer_learning_rate": 2e-4}, "here")
    assert (config.learning_rate, config.betas, config.mixer_learning_rate) == (1, (0.9, 0.99), 2e-4)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_field_has_help(command):
    """tyro takes the text under a field as its help; a field without one would stand bare in --help."""
    documented = set()
    for cls in COMMANDS[command].__mro__[:-1]:
        body = ast.parse(inspect.getsource(cls)).body[0].body
        for node, after in itertools.pairwise(body):
            if isinstance(node, ast.AnnAssign) and isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant):
                documented.add(node.target.id)
    assert documented == {field.name for field in dataclasses.fields(COMMANDS[command])}
