"""`m1 convert`, in memory and as a command: which layers stay, what is written, and that a bad input leaves nothing behind."""

import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
from collections import namedtuple
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from m1 import cli, storage
from m1.conversion.bases import import_base, load_base
from m1.conversion.convert import choose_attention_layers, convert
from m1.modeling import M1ForCausalLM
from m1.modeling.hybrid import count_parameters
from m1.modeling.loading import load_config, load_model
from tests.conversion.tiny import tiny_base, vocabulary

Usage = namedtuple("Usage", "total used free")


@pytest.fixture
def calibration(tmp_path: Path) -> Path:
    path = tmp_path / "text.jsonl"
    rows = [
        {"messages": [{"role": "user", "content": "hello 12 plus 30"}, {"role": "assistant", "content": "that is 42"}]},
        {"prompt": "hello, what is 3 times 4?", "completion": "it is 12, I think"},
        {"problem": "how many legs have 7 cats?", "answer": "28", "solution": "each has four, so 28"},
        {"text": "some text that is nothing but text, long enough to matter"},
    ]
    path.write_text("\n".join(json.dumps(row) for row in rows) + "\n\n")
    return path


def logits(model: torch.nn.Module) -> torch.Tensor:
    ids = torch.randint(0, len(vocabulary()), (2, 30), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        return model(ids, use_cache=False).logits


def run_cli(*arguments: object) -> int:
    return cli.main(["convert", *map(str, arguments)])


def left_behind(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


def test_six_of_28_are_m1s_layers() -> None:
    assert choose_attention_layers(28, 6 / 28) == [3, 8, 13, 18, 23, 27]


@pytest.mark.parametrize("num_layers", [1, 2, 3, 24, 28, 30, 32])
def test_kept_layers_are_evenly_spaced(num_layers: int) -> None:
    assert choose_attention_layers(num_layers, 0) == []
    assert choose_attention_layers(num_layers, 1) == list(range(num_layers))
    for percent in range(1, 101):
        kept = choose_attention_layers(num_layers, percent / 100)
        assert abs(len(kept) - num_layers * percent / 100) <= 0.5 or len(kept) == 1
        assert kept[-1] == num_layers - 1
        gaps = {after - before for before, after in itertools.pairwise(kept)}
        assert all(gap > 0 for gap in gaps)
        assert not gaps or max(gaps) - min(gaps) <= 1
    for fraction in (-0.1, 1.1):
        with pytest.raises(ValueError, match="attention_fraction"):
            choose_attention_layers(num_layers, fraction)


@pytest.mark.parametrize("start", ["m1", "improved"])
@pytest.mark.parametrize("mixer", ["mamba1", "mamba2"])
@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3"])
def test_every_family_converts_and_is_read_back(family: str, mixer: str, start: str, tmp_path: Path) -> None:
    base = tiny_base(family, tie_word_embeddings=family == "qwen2")
    base.save_pretrained(tmp_path / "base")
    dense = load_model(tmp_path / "base")
    hybrid = convert(dense, attention_layers=[1], mixer=mixer, start=start)
    assert hybrid.config.attention_layers == [1]
    assert hybrid.config.mixer_layers == [0, 2]
    assert torch.equal(hybrid.model.layers[1].self_attn.q_proj.weight, dense.model.layers[1].self_attn.q_proj.weight)
    assert torch.equal(hybrid.model.layers[2].mlp.up_proj.weight, dense.model.layers[2].mlp.up_proj.weight)
    assert (hybrid.lm_head.weight is hybrid.model.embed_tokens.weight) == (family == "qwen2")
    hybrid.save_pretrained(tmp_path / "hybrid")
    for read in (load_model(tmp_path / "hybrid"), AutoModelForCausalLM.from_pretrained(tmp_path / "hybrid")):
        assert torch.equal(logits(read), logits(hybrid))
    assert count_parameters(hybrid.config) == sum(parameter.numel() for parameter in hybrid.parameters())


def test_converting_nothing_changes_nothing(base_directory: Path) -> None:
    dense, _ = load_base(base_directory)
    assert torch.equal(logits(convert(dense, attention_fraction=1)), logits(dense))


def test_of_a_transformer_the_command_says_what_it_is_for(base_directory, tmp_path, capsys) -> None:
    assert run_cli("--base", base_directory, "--out", tmp_path / "teacher", "--attention-fraction", 1) == 0
    printed = capsys.readouterr().out
    assert "m1 sample --model" in printed and "m1 align" not in printed


def test_base_and_hybrid_share_nothing(base_directory: Path) -> None:
    dense, _ = load_base(base_directory)
    before = logits(dense)
    hybrid = convert(dense, attention_layers=[1])
    with torch.no_grad():
        for parameter in hybrid.parameters():
            parameter.add_(1)
    assert torch.equal(logits(dense), before)


def test_seed_decides_the_fresh_weights(base_directory: Path) -> None:
    dense, _ = load_base(base_directory)
    state = torch.random.get_rng_state()
    first, again, other = (convert(dense, attention_layers=[], seed=seed) for seed in (1, 1, 2))
    assert torch.equal(logits(first), logits(again))
    assert not torch.equal(logits(first), logits(other))
    assert torch.equal(torch.random.get_rng_state(), state)  # the caller's random numbers go on as if nothing happened


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"attention_layers": [0, 3]}, "layer 3 does not exist"),
        ({"attention_layers": [-1]}, "layer -1 does not exist"),
        ({"attention_fraction": 2.0}, "attention_fraction"),
        ({"mixer": "mamba3"}, "mamba3"),
        ({"start": "magic"}, "magic"),
        ({"calibration": ["hello"]}, "calibration"),
        ({"calibration": ["hello"], "start": "improved"}, "no tokenizer"),
        ({"calibration": [[]], "start": "improved"}, "at least one text"),
    ],
)
def test_wrong_arguments_are_named(arguments: dict, named: str, base_directory: Path) -> None:
    dense, _ = load_base(base_directory)
    with pytest.raises(ValueError, match=named):
        convert(dense, **arguments)


def test_a_hybrid_is_not_converted_again(base_directory: Path) -> None:
    dense, _ = load_base(base_directory)
    with pytest.raises(ValueError, match=r"layers \[0, 2\] are mixers already"):
        convert(convert(dense, attention_layers=[1]))


@pytest.mark.parametrize("source", ["gguf_file", "base_directory"])
def test_command_writes_a_whole_model(
    source: str, request: pytest.FixtureRequest, calibration: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base, out = request.getfixturevalue(source), tmp_path / "runs" / "hybrid"
    options = ["--attention-layers", "1", "--start", "improved", "--calibration", calibration, "--dtype", "float32"]
    assert run_cli("--base", base, "--out", out, *options) == 0
    printed = capsys.readouterr().out
    assert "attention stays in layers: 1" in printed
    assert f"m1 align --model {out}" in printed
    model, tokenizer = load_model(out), AutoTokenizer.from_pretrained(out)
    assert model.config.mixer_layers == [0, 2]
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id == 2
    assert tokenizer.chat_template == load_base(base)[1].chat_template
    assert tokenizer.tokenize("hello 123") == ["hello", "Ġ", "1", "2", "3"]
    record = storage.read_run_record(out)
    assert record["command"] == "convert"
    assert record["config"]["base"] == str(base)
    assert [fit["layer"] for fit in record["fits"]] == [0, 2]
    assert all(fit["error_after"] < fit["error_before"] for fit in record["fits"])
    assert left_behind(out.parent) == ["hybrid"]
    # The directory is what convert gives in memory.
    dense, base_tokenizer = load_base(base)
    texts = [json.loads(line) for line in calibration.read_text().splitlines() if line]
    chats = [
        texts[0]["messages"],
        *([{"role": "user", "content": a}, {"role": "assistant", "content": b}] for a, b in (
            (texts[1]["prompt"], texts[1]["completion"]), (texts[2]["problem"], texts[2]["solution"]))),
        texts[3]["text"],
    ]  # fmt: skip
    expected = convert(dense, attention_layers=[1], start="improved", calibration=chats, tokenizer=base_tokenizer)
    assert torch.equal(logits(model), logits(expected))


def test_generation_ends_where_base_and_tokenizer_end(base_directory: Path, tmp_path: Path) -> None:
    source = tmp_path / "base"
    shutil.copytree(base_directory, source)
    generation = {"eos_token_id": 0, "temperature": 0.6, "do_sample": True}
    (source / "generation_config.json").write_text(json.dumps(generation))
    assert run_cli("--base", source, "--out", tmp_path / "hybrid") == 0
    import_base(source, tmp_path / "imported")
    for written in ("hybrid", "imported"):
        config = GenerationConfig.from_pretrained(tmp_path / written)
        assert sorted(config.eos_token_id) == [0, 2]
        assert config.temperature == 0.6


def test_written_dtype_and_skipped_calibration(
    base_directory: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_cli("--base", base_directory, "--out", tmp_path / "hybrid", "--start", "improved", "--mixer", "mamba2") == 0
    assert "not calibrated" in capsys.readouterr().out
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "hybrid", dtype="auto")
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert load_config(tmp_path / "hybrid").mixer == "mamba2"


def test_existing_output_is_kept_unless_told(base_directory: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "hybrid"
    out.mkdir()
    (out / "mine.txt").write_text("precious")
    assert run_cli("--base", base_directory, "--out", out) == 2
    assert "--overwrite" in capsys.readouterr().err
    assert left_behind(out) == ["mine.txt"]
    assert run_cli("--base", base_directory, "--out", out, "--overwrite") == 0
    assert "mine.txt" not in left_behind(out)
    assert load_config(out).mixer_layers


def test_what_is_there_already_is_not_made_again(
    base_directory: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "hybrid"
    assert run_cli("--base", base_directory, "--out", out, "--seed", 1) == 0
    written = (out / "model.safetensors").stat().st_mtime_ns
    assert run_cli("--base", base_directory, "--out", out, "--seed", 1, "--device", "cpu") == 0
    assert "is finished already" in capsys.readouterr().out
    assert run_cli("--base", base_directory, "--out", out, "--seed", 2) == 2
    assert "exists already" in capsys.readouterr().err
    assert (out / "model.safetensors").stat().st_mtime_ns == written
    assert run_cli("--base", base_directory, "--out", out, "--seed", 1, "--overwrite") == 0
    assert (out / "model.safetensors").stat().st_mtime_ns > written


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ([], "--base is needed"),
        (["--base", "{tmp}/absent"], "absent: no such model directory"),
        (["--base", "{tmp}/absent.gguf"], "absent.gguf: no such GGUF file"),
        (["--base", "{base}", "--attention-layers", "7"], "layer 7 does not exist"),
        (["--base", "{base}", "--start", "improved", "--calibration", "{tmp}/none.jsonl"], "none.jsonl: no such data file"),
        (["--base", "{base}", "--start", "improved", "--calibration", "{tmp}/bad.jsonl"], "bad.jsonl, line 2: not valid JSON"),
        (["--base", "{base}", "--start", "improved", "--calibration", "{tmp}/odd.jsonl"], "odd.jsonl, line 1: expected"),
        (["--base", "{base}", "--start", "improved", "--calibration", "{tmp}/empty.jsonl"], "empty.jsonl: no rows"),
        (["--base", "{base}", "--calibration", "{tmp}/good.jsonl"], "only the improved start is calibrated"),
    ],
)
def test_bad_input_is_one_line_and_leaves_nothing(
    options: list[str], named: str, base_directory: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "bad.jsonl").write_text('{"text": "fine"}\n{"text": \n')
    (tmp_path / "odd.jsonl").write_text('{"question": "what?"}\n')
    (tmp_path / "good.jsonl").write_text('{"text": "fine"}\n')
    (tmp_path / "empty.jsonl").write_text("\n")
    before = left_behind(tmp_path)
    arguments = [option.format(tmp=tmp_path, base=base_directory) for option in options]
    assert run_cli("--out", tmp_path / "hybrid", *arguments) == 2
    error = capsys.readouterr().err
    assert named in error
    assert error.count("\n") == 1
    assert left_behind(tmp_path) == before


def test_output_must_not_be_the_base(gguf_file: Path, base_directory: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = left_behind(base_directory)
    assert run_cli("--base", base_directory, "--out", base_directory, "--overwrite") == 2
    assert "is the base itself" in capsys.readouterr().err
    assert left_behind(base_directory) == before


@pytest.mark.parametrize("scarce", ["disk", "memory"])
def test_too_little_room_is_said_before_anything_is_written(
    scarce: str, base_directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    if scarce == "disk":
        monkeypatch.setattr(storage.shutil, "disk_usage", lambda path: Usage(10**12, 10**12 - 1000, 1000))
    else:
        monkeypatch.setattr(storage, "available_memory", lambda: 1000)
    assert run_cli("--base", base_directory, "--out", tmp_path / "hybrid") == 2
    assert scarce in capsys.readouterr().err
    assert left_behind(tmp_path) == []


def test_a_checkpoint_of_another_model_is_refused(
    base_directory: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny_base(num_hidden_layers=2).save_pretrained(tmp_path / "mixed")
    for file in base_directory.glob("*"):
        if file.suffix != ".safetensors":
            (tmp_path / "mixed" / file.name).write_bytes(file.read_bytes())
    assert run_cli("--base", tmp_path / "mixed", "--out", tmp_path / "hybrid") == 2
    assert "does not fit its config.json" in capsys.readouterr().err
    with pytest.raises(ValueError, match=r"does not fit its config\.json"):
        import_base(tmp_path / "mixed", tmp_path / "imported")
    assert left_behind(tmp_path) == ["mixed"]


def test_an_exception_on_the_way_leaves_nothing(base_directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def save_half(self: M1ForCausalLM, directory: Path, **options: object) -> None:
        self.config.save_pretrained(directory)
        raise KeyboardInterrupt

    monkeypatch.setattr(M1ForCausalLM, "save_pretrained", save_half)
    assert run_cli("--base", base_directory, "--out", tmp_path / "hybrid") == 130
    assert left_behind(tmp_path) == []


KILLED = """
import os, signal, sys
from m1 import cli
from m1.conversion import convert
def killed_before_the_record(*arguments, **options):
    os.kill(os.getpid(), signal.SIGKILL)
convert.storage.write_run_record = killed_before_the_record
cli.main(["convert", "--base", sys.argv[1], "--out", sys.argv[2]])
"""


def test_a_killed_conversion_leaves_no_model(base_directory: Path, tmp_path: Path) -> None:
    """Killed when weights and tokenizer are written and only the record is missing: the name must not be there."""
    out = tmp_path / "hybrid"
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", KILLED, base_directory, out], env=environment, capture_output=True, timeout=300
    )
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert [name for name in left_behind(tmp_path) if not name.startswith(".hybrid.partial-")] == []
    with pytest.raises(FileNotFoundError, match="no such model directory"):
        load_model(out)
    assert run_cli("--base", base_directory, "--out", out) == 0
    assert load_config(out).mixer_layers
