"""The command line: quick help, one clear line and exit code 2 for users' mistakes, tracebacks for ours."""

import subprocess
import sys
import time

import pytest

from m1 import cli


def m1(*arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-m", "m1.cli", *arguments], capture_output=True, text=True)


def test_help_comes_within_a_second():
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        result = m1("--help")
        seconds.append(time.perf_counter() - start)
    assert result.returncode == 0
    assert all(command in result.stdout for command in cli.COMMANDS)
    assert min(seconds) < 1.0


def test_parsing_loads_no_torch():
    code = "import sys; from m1.cli import parse; parse(['sft', '--steps', '3']); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_help_tells_of_the_words_before_the_options(capsys):
    for command, words in (("eval", "m1 eval MODEL"), ("solve", "m1 solve PROBLEM"), ("sft", "m1 sft RECIPE.toml")):
        with pytest.raises(SystemExit):
            cli.parse([command, "--help"])
        assert words in capsys.readouterr().out


def test_every_command_has_a_runner():
    assert cli.RUNNERS.keys() == cli.COMMANDS.keys()


def test_flags_override_the_recipe(tmp_path):
    path = tmp_path / "run.toml"
    path.write_text("[sft]\nsteps = 5\nseed = 3\nbetas = [0.8, 0.9]\n")
    command, config = cli.parse(["sft", str(path), "--steps", "7"])
    assert (command, config.steps, config.seed, config.betas) == ("sft", 7, 3, (0.8, 0.9))


def test_solve_takes_the_problem_as_first_word():
    assert cli.parse(["solve", "What is 2 + 2?", "--model", "m"])[1].problem == "What is 2 + 2?"
    assert cli.parse(["solve", "-", "--model", "m"])[1].problem == "-"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["distil"], "unknown command 'distil'; did you mean 'distill'?"),
        (["sft", "missing.toml"], "missing.toml: no such recipe"),
        (["convert"], "--base and --out are needed (or base = …, out = … in the recipe)"),
        (["convert", "--base", "./nowhere", "--out", "out"], "nowhere"),
        (["sft", "--out", "out"], "--model is needed"),
        (["solve", "--model", "./nowhere"], "--problem is needed"),
        (["solve", "2 + 2?", "--model", "./nowhere"], "./nowhere: no such model directory"),
    ],
)
def test_mistakes_are_one_line_and_exit_code_2(arguments, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = m1(*arguments)
    assert result.returncode == 2
    assert len(result.stderr.strip().splitlines()) == 1
    assert result.stderr.startswith("m1: error: ")
    assert message in result.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("sample --model ./x --out out --data d --temperature -1", "--temperature: expected at least 0, got -1.0"),
        ("eval ./x --tasks gym:chain_sum --top-p 0", "--top-p: expected more than 0 and at most 1"),
        ("eval ./x --tasks gym:chain_sum --max-new-tokens 0", "--max-new-tokens: expected at least 1, got 0"),
        ("solve 2+2? --model ./x --temperature -1", "--temperature: expected at least 0, got -1.0"),
        ("convert --base smollm2-135M --out out", "did you mean smollm2-135m-instruct?"),
        ("convert --base models/nowhere --out out", "models/nowhere: no such model directory"),
        (
            "convert --base owner/name --out out",
            "owner/name: no such directory here, and not to be had from the hub",
        ),
    ],
)
def test_what_is_asked_is_checked_before_anything_is_written(words, message, tmp_path, monkeypatch, capsys):
    def hub(source: object) -> None:
        raise OSError("no network")

    monkeypatch.setattr("transformers.AutoConfig.from_pretrained", hub)
    monkeypatch.chdir(tmp_path)
    assert cli.main(words.split()) == 2
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_an_unknown_flag_is_refused_with_exit_code_2():
    result = m1("sft", "--lerning-rate", "1")
    assert result.returncode == 2
    assert "learning-rate" in result.stderr + result.stdout


def test_faults_of_ours_are_not_called_mistakes():
    def fault() -> None:
        int("not a number")  # a ValueError, but raised here, outside m1

    with pytest.raises(ValueError) as caught:
        fault()
    assert not cli.is_users_mistake(caught.value)
    assert not cli.is_users_mistake(KeyError("x"))
    assert cli.is_users_mistake(FileNotFoundError("x"))
    assert cli.is_users_mistake(MemoryError("x"))


def test_rates_of_single_groups(tmp_path):
    recipe = tmp_path / "recipe.toml"
    recipe.write_text("[sft.learning_rates]\nattention = 1e-6\n")
    _, config = cli.parse(["sft", str(recipe)])
    assert config.learning_rates == {"attention": 1e-6}
    _, config = cli.parse(["sft", "--learning-rates", "mlp", "2e-5", "norms", "3e-5"])
    assert config.learning_rates == {"mlp": 2e-5, "norms": 3e-5}
    recipe.write_text("[sft.learning_rates]\nheads = 1e-6\n")
    with pytest.raises(ValueError, match=r"learning_rates = .* does not fit"):
        cli.parse(["sft", str(recipe)])
