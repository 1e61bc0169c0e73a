"""The loop: accumulation, resumption after anything, divergence, and the model at the end."""

import json
import os
import signal

import pytest
import torch
from safetensors.torch import load_file

from m1.config import SFTConfig
from m1.modeling.loading import load_model, load_tokenizer
from m1.storage import read_run_record
from m1.training import checkpoint_writer, saving
from m1.training.checkpoint import TrainingState, list_checkpoints
from m1.training.interruption import Stop
from m1.training.loop import Step, TrainingDivergedError, _accumulate, _train_step, train
from m1.training.metrics import read_metrics
from m1.training.optimizer import build_optimizer, learning_rate_factor, select_trainable, squared_gradient_norm
from m1.training.packing import pack
from m1.training.run_directory import RunDirectory
from m1.training.sft import SFTStage
from tests.numerics import REL_RMS, rel_rms
from tests.training import tiny


def make_config(out="", **fields):
    defaults = {
        "steps": 6,
        "tokens_per_step": 60,
        "tokens_per_batch": 30,
        "max_length": 30,
        "learning_rate": 1e-2,
        "warmup_steps": 2,
        "precision": "float32",
        "checkpoint_every": 2,
        "dtype": "float32",
    }
    return SFTConfig(out=str(out), **defaults | fields)


class InterruptedStage(SFTStage):
    """Fails in whatever way `failure` does, when step `at` is drawn."""

    def __init__(self, model, config, at=None, failure=None):
        super().__init__(model, tiny.documents(20), config)
        self.at, self.failure = at, failure

    def draw(self, step):
        if step == self.at:
            self.failure()
        return super().draw(step)


def run(out, *, at=None, failure=None, **fields):
    """One process's attempt at a run of 6 steps: the trained model."""
    config = make_config(out, **fields)
    model = tiny.model()
    select_trainable(model, ["embeddings"])
    directory = RunDirectory("sft", config)
    directory.create()
    train(model, InterruptedStage(model, config, at, failure), config, directory=directory, progress=False)
    return model


def fail():
    raise RuntimeError("lost")


def assert_equal(model, other):
    state, expected = model.state_dict(), other.state_dict()
    assert state.keys() == expected.keys()
    for name, tensor in state.items():
        assert torch.equal(tensor, expected[name]), name


def metrics(out):
    timing = ("seconds", "tokens_per_second")
    return [{k: v for k, v in record.items() if k not in timing} for record in read_metrics(out / "metrics.jsonl")]


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    out = tmp_path_factory.mktemp("run") / "out"
    model = run(out)
    return model, metrics(out)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_an_accumulated_gradient_is_the_large_batchs(precision):
    model, documents = tiny.model(), tiny.documents(9)
    config = make_config(precision=precision)
    stage = SFTStage(model, documents, config)
    whole, norm = _accumulate(model, stage, [pack(documents)], config)
    expected = {name: p.grad.clone() for name, p in model.named_parameters()}
    parts = [pack(documents[:1]), pack(documents[1:7]), pack(documents[7:])]
    assert len({part.num_targets for part in parts}) == 3
    sums, norm_of_parts = _accumulate(model, stage, parts, config)
    tolerance = REL_RMS[getattr(torch, precision)]
    for name, parameter in model.named_parameters():
        assert rel_rms(parameter.grad, expected[name]) < tolerance, name
    assert sums["loss"] == pytest.approx(whole["loss"], rel=tolerance)
    assert norm_of_parts == pytest.approx(norm, rel=tolerance)
    assert norm == pytest.approx(torch.cat([g.flatten() for g in expected.values()]).norm().item(), rel=1e-5)


def test_metrics_have_a_line_a_step(uninterrupted, tmp_path):
    _, records = uninterrupted
    assert [record["step"] for record in records] == [1, 2, 3, 4, 5, 6]
    assert all({"loss", "lr", "grad_norm", "tokens", "targets"} <= record.keys() for record in records)
    assert records[-1]["loss"] < records[0]["loss"]
    expected = [1e-2 * learning_rate_factor(step, make_config()) for step in range(6)]
    assert [record["lr"] for record in records] == pytest.approx(expected)
    run(tmp_path / "other", log_every=4)
    assert [record["step"] for record in metrics(tmp_path / "other")] == [1, 5, 6]


def test_a_step_clips_its_gradient():
    model, config = tiny.model(), make_config(max_grad_norm=0.1)
    optimizer = build_optimizer(model, config)
    record = _train_step(model, optimizer, InterruptedStage(model, config), 0, config, None)
    assert record["grad_norm"] > 0.5
    assert squared_gradient_norm(model.parameters()).item() == pytest.approx(0.1**2, rel=1e-3)


def test_frozen_parameters_stay(uninterrupted):
    model, start = uninterrupted[0], tiny.model()
    assert torch.equal(model.lm_head.weight, start.lm_head.weight)
    assert not torch.equal(model.model.layers[0].mixer.in_proj.weight, start.model.layers[0].mixer.in_proj.weight)


@pytest.mark.parametrize("at", [1, 2, 5])
def test_resumed_is_uninterrupted(tmp_path, uninterrupted, at):
    with pytest.raises(RuntimeError, match="lost"):
        run(tmp_path / "out", at=at, failure=fail)
    assert_equal(run(tmp_path / "out"), uninterrupted[0])
    assert metrics(tmp_path / "out") == uninterrupted[1]


def test_interruption_saves_the_running_step(tmp_path, uninterrupted):
    handler = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "out", at=2, failure=lambda: os.kill(os.getpid(), signal.SIGINT))
    assert [path.name for path in list_checkpoints(tmp_path / "out" / "checkpoints")] == ["step-00000003", "step-00000002"]
    assert signal.getsignal(signal.SIGINT) is handler
    assert_equal(run(tmp_path / "out"), uninterrupted[0])
    assert metrics(tmp_path / "out") == uninterrupted[1]


def truncate(path):
    (path / "rank-00000.safetensors").write_bytes((path / "rank-00000.safetensors").read_bytes()[:-7])


def flip_a_bit(path):
    content = bytearray((path / "rank-00000.safetensors").read_bytes())
    content[-9] ^= 4
    (path / "rank-00000.safetensors").write_bytes(content)


def change_the_state(path):
    (path / "state.json").write_text((path / "state.json").read_text().replace('"step": 4', '"step": 3'))


def cut_the_state(path):
    (path / "state.json").write_text((path / "state.json").read_text()[:40])


def remove_a_file(path):
    (path / "rank-00000.safetensors").unlink()


@pytest.mark.parametrize("damage", [truncate, flip_a_bit, change_the_state, cut_the_state, remove_a_file])
def test_a_damaged_checkpoint_falls_back_to_the_one_before(tmp_path, uninterrupted, damage):
    with pytest.raises(RuntimeError, match="lost"):
        run(tmp_path / "out", at=5, failure=fail)
    newest, before = list_checkpoints(tmp_path / "out" / "checkpoints")
    assert (newest.name, before.name) == ("step-00000004", "step-00000002")
    damage(newest)
    with pytest.warns(UserWarning, match=r"step-00000004 is damaged .*going back"):
        model = run(tmp_path / "out")
    assert_equal(model, uninterrupted[0])
    assert metrics(tmp_path / "out") == uninterrupted[1]


def test_a_run_whose_checkpoints_are_all_damaged_is_not_begun_anew(tmp_path):
    with pytest.raises(RuntimeError, match="lost"):
        run(tmp_path / "out", at=5, failure=fail)
    for path in list_checkpoints(tmp_path / "out" / "checkpoints"):
        flip_a_bit(path)
    lines = (tmp_path / "out" / "metrics.jsonl").read_text()
    with pytest.warns(UserWarning, match="is damaged"), pytest.raises(ValueError, match="every checkpoint is damaged; restore"):
        run(tmp_path / "out")
    assert (tmp_path / "out" / "metrics.jsonl").read_text() == lines


class Disk:
    """Takes the place of safetensors' writer; the saves of the numbers in `full` find no room."""

    def __init__(self, monkeypatch, full):
        self.real, self.full, self.saves = checkpoint_writer.save_file, full, 0
        monkeypatch.setattr(checkpoint_writer, "save_file", self.save_file)
        monkeypatch.setattr(saving, "PAUSE", 0.01)

    def save_file(self, tensors, path):
        self.saves += 1
        if self.saves in self.full:
            raise OSError(28, "No space left on device")
        self.real(tensors, path)


def names_of(directory):
    return sorted(path.name for path in (directory / "checkpoints").iterdir())


def test_a_checkpoint_without_room_is_tried_again(tmp_path, uninterrupted, monkeypatch, capsys):
    """The save after step 4 finds no room; that after step 5, which is not due, takes its place."""
    Disk(monkeypatch, full=(2,))
    assert_equal(run(tmp_path / "out", keep_checkpoints=9, async_save=False), uninterrupted[0])
    assert "step 4: a checkpoint could not be written ([Errno 28] No space left on device)" in capsys.readouterr().out
    assert names_of(tmp_path / "out") == ["step-00000002", "step-00000005", "step-00000006"]


def test_tries_become_rarer(tmp_path, uninterrupted, monkeypatch, capsys):
    """After step 1, which fails, comes step 2, then 4: twice as long as before."""
    Disk(monkeypatch, full=(1, 2))
    config = make_config(tmp_path / "out", checkpoint_every=100, async_save=False)
    model, directory = tiny.model(), RunDirectory("sft", config)
    directory.create()
    state = TrainingState(model, build_optimizer(model, config))
    saver = saving.RunSaver(model, SFTStage(model, tiny.documents(20), config), config, directory, state)
    saver._next_try = 1
    for step in range(1, 6):
        saver.keep(step, Stop())
    said = capsys.readouterr().out
    assert "step 1: a" in said
    assert "again after step 2" in said
    assert "step 2: a" in said
    assert "again after step 4" in said
    assert names_of(tmp_path / "out") == ["step-00000004"]


def test_a_save_beside_the_training_that_fails_is_heard_of(tmp_path, uninterrupted, monkeypatch, capsys):
    Disk(monkeypatch, full=(2,))
    assert_equal(run(tmp_path / "out"), uninterrupted[0])
    assert "could not be written" in capsys.readouterr().out
    assert names_of(tmp_path / "out")[-1] == "step-00000006"


def test_a_disk_that_stays_full_leaves_the_checkpoint_before(tmp_path, uninterrupted, monkeypatch):
    Disk(monkeypatch, full=range(2, 99))
    monkeypatch.setattr(saving, "PATIENCE", 0.05)
    with pytest.raises(OSError, match="No space left"):
        run(tmp_path / "out")
    assert names_of(tmp_path / "out") == ["step-00000002"]
    monkeypatch.undo()
    assert_equal(run(tmp_path / "out"), uninterrupted[0])


def test_the_last_checkpoint_waits_for_room(tmp_path, uninterrupted, monkeypatch, capsys):
    disk = Disk(monkeypatch, full=range(2, 9))
    assert_equal(run(tmp_path / "out"), uninterrupted[0])
    assert disk.saves == 9
    assert "Ctrl-C gives up" in capsys.readouterr().out
    assert names_of(tmp_path / "out") == ["step-00000002", "step-00000006"]


def test_a_model_without_room_is_left_out(tmp_path, uninterrupted, monkeypatch, capsys):
    def export_step(directory, model, step):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(RunDirectory, "export_step", export_step)
    assert_equal(run(tmp_path / "out", export_every=3), uninterrupted[0])
    assert "step 3: the model could not be written" in capsys.readouterr().out


def test_the_newest_checkpoints_are_kept(tmp_path):
    run(tmp_path / "out", checkpoint_every=1, keep_checkpoints=3)
    names = [path.name for path in list_checkpoints(tmp_path / "out" / "checkpoints")]
    assert names == ["step-00000006", "step-00000005", "step-00000004"]


def test_a_checkpoint_of_another_model_is_refused(tmp_path):
    run(tmp_path / "out", steps=2)
    model, config = tiny.model(intermediate_size=64), make_config(tmp_path / "out", steps=2)
    select_trainable(model, ["embeddings"])
    with pytest.raises(ValueError, match=r"another model.*6 parameters differ, such as model\.layers\.0\.mlp"):
        train(model, SFTStage(model, tiny.documents(20), config), config, directory=RunDirectory("sft", config))


@pytest.mark.parametrize("has_directory", [True, False])
def test_a_loss_that_is_not_finite_stops_with_everything_intact(tmp_path, has_directory):
    class Poisoned(InterruptedStage):
        def draw(self, step):
            self.step = step
            return super().draw(step)

        def backward(self, batch, num_targets):
            sums = super().backward(batch, num_targets)
            return sums if self.step < 3 else {"loss": sums["loss"] * float("nan")}

    config = make_config(tmp_path / "out")
    model = tiny.model()
    directory = RunDirectory("sft", config) if has_directory else None
    if directory:
        directory.create()
    with pytest.raises(TrainingDivergedError, match=r"step 4: the loss is nan"):
        train(model, Poisoned(model, config), config, directory=directory, progress=False)
    before = tiny.model()  # stopped by something else, at the same step
    with pytest.raises(RuntimeError, match="lost"):
        train(before, InterruptedStage(before, config, 3, fail), make_config(), progress=False)
    assert_equal(model, before)
    if directory:
        saved = load_file(tmp_path / "out" / "diverged-step-00000004.safetensors")
        assert {"0.input_ids", "0.cu_seqlens", "1.input_ids"} <= saved.keys()
        assert [path.name for path in list_checkpoints(directory.checkpoints)] == ["step-00000002"]


def test_a_gradient_that_is_not_finite_stops_too():
    class Poisoned(InterruptedStage):
        def backward(self, batch, num_targets):
            sums = super().backward(batch, num_targets)
            self.model.model.norm.weight.grad[3] = float("inf")
            return sums

    model, config = tiny.model(), make_config()
    with pytest.raises(TrainingDivergedError, match="the gradient norm inf"):
        train(model, Poisoned(model, config), config, progress=False)
    assert_equal(model, tiny.model())


def test_gradient_checkpointing_changes_nothing(uninterrupted, tmp_path):
    assert_equal(run(tmp_path / "out", gradient_checkpointing=True), uninterrupted[0])


def test_the_average_of_the_weights(tmp_path, uninterrupted):
    """After every step, average <- 0.7 · average + 0.3 · weights; it is what a run ends with, resumed or not."""
    seen = []

    class Recording(InterruptedStage):
        def draw(self, step):
            seen.append({name: p.detach().clone() for name, p in self.model.named_parameters()})
            return super().draw(step)

    config = make_config(ema_decay=0.7)
    model = tiny.model()
    select_trainable(model, ["embeddings"])
    train(model, Recording(model, config), config, progress=False)
    seen.append(dict(uninterrupted[0].named_parameters()))
    for name, average in model.named_parameters():
        expected = seen[0][name]
        for weights in seen[1:]:
            expected = 0.7 * expected + 0.3 * weights[name]
        torch.testing.assert_close(average, expected, rtol=1e-5, atol=1e-7)
    with pytest.raises(RuntimeError, match="lost"):
        run(tmp_path / "out", at=3, failure=fail, ema_decay=0.7, export_every=2)
    resumed = run(tmp_path / "out", ema_decay=0.7, export_every=2)
    assert_equal(resumed, model)
    exports = sorted((tmp_path / "out" / "exports").iterdir())
    assert [path.name for path in exports] == ["step-00000002", "step-00000004"]  # the last one is the run's own
    average_of_two = 0.7 * (0.7 * seen[0]["model.norm.weight"] + 0.3 * seen[1]["model.norm.weight"])
    average_of_two += 0.3 * seen[2]["model.norm.weight"]
    torch.testing.assert_close(load_file(exports[0] / "model.safetensors")["model.norm.weight"], average_of_two)
    with pytest.raises(ValueError, match="ema_decay: expected a number between 0 and 1"):
        run(tmp_path / "other", ema_decay=1.0)


def test_a_step_without_updates_is_logged_and_changes_nothing():
    class Empty(InterruptedStage):
        def draw(self, step):
            return Step([], {"reward": 0.0})

    model, config = tiny.model(), make_config(steps=2)
    result = train(model, Empty(model, config), config, progress=False)
    assert [record["reward"] for record in result.metrics] == [0.0, 0.0]
    assert_equal(model, tiny.model())


def test_the_run_becomes_a_model(tmp_path, uninterrupted):
    config = make_config(tmp_path / "out", model="base")
    directory = RunDirectory("sft", config)
    assert not directory.is_finished
    directory.create(tiny.byte_tokenizer())
    model = uninterrupted[0]
    directory.export(model, metrics={"loss": 1.5})
    assert directory.is_finished
    assert RunDirectory("sft", config).is_finished
    assert_equal(load_model(tmp_path / "out"), model)
    assert load_tokenizer(tmp_path / "out", needs_chat_template=True).eos_token_id == 0
    record = read_run_record(tmp_path / "out")
    assert (record["command"], record["metrics"], record["config"]["steps"]) == ("sft", {"loss": 1.5}, 6)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "float32"
    assert not [path for path in (tmp_path / "out").iterdir() if path.name.startswith((".", "export"))]


def test_written_weights_have_the_dtype_asked_for(tmp_path):
    config, model = make_config(tmp_path / "out", dtype="bfloat16"), tiny.model()
    RunDirectory("sft", config).create()
    RunDirectory("sft", config).export(model)
    assert {t.dtype for t in load_file(tmp_path / "out" / "model.safetensors").values()} == {torch.bfloat16}
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "bfloat16"
    assert model.lm_head.weight.dtype == torch.float32


def test_a_failed_export_leaves_nothing_that_looks_like_a_model(tmp_path, monkeypatch):
    config = make_config(tmp_path / "out")
    directory = RunDirectory("sft", config)
    directory.create()

    def write_run_record(*arguments, **facts):
        raise OSError("disk")

    monkeypatch.setattr("m1.training.run_directory.write_run_record", write_run_record)
    with pytest.raises(OSError, match="disk"):
        directory.export(tiny.model())
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["run.json"]
    assert not directory.is_finished


def test_a_run_is_resumed_with_its_own_config_only(tmp_path):
    RunDirectory("sft", make_config(tmp_path / "out")).create()
    RunDirectory("sft", make_config(tmp_path / "out", checkpoint_every=5, device="cpu"))
    with pytest.raises(ValueError, match=r"begun with learning_rate = 0.01, not 0.02"):
        RunDirectory("sft", make_config(tmp_path / "out", learning_rate=2e-2))
    with pytest.raises(ValueError, match="a run of `m1 sft`, not of `m1 grpo`"):
        RunDirectory("grpo", make_config(tmp_path / "out"))
    (tmp_path / "other").mkdir()
    RunDirectory("sft", make_config(tmp_path / "other"))
    (tmp_path / "other" / "file").write_text("mine")
    with pytest.raises(FileExistsError, match="holds no run"):
        RunDirectory("sft", make_config(tmp_path / "other"))
    with pytest.raises(FileExistsError, match="is a file"):
        RunDirectory("sft", make_config(tmp_path / "other" / "file"))
