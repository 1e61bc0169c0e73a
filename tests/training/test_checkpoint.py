"""Checkpoints: what a kill, a lost rank, a full disk, a NaN, or another number of ranks leaves of a run."""

import os
import random
import re
import resource
import shutil
import signal
import time
import warnings

import pytest
import torch
from safetensors.torch import load_file

from m1.distributed import LostRankError, rank
from m1.training import checkpoint_writer, saving
from m1.training.checkpoint import TrainingState, list_checkpoints, load_newest_checkpoint, read_manifest
from m1.training.checkpoint_writer import CheckpointWriter
from m1.training.loop import TrainingDivergedError
from m1.training.metrics import read_metrics
from m1.training.optimizer import build_optimizer
from m1.training.sft import SFTStage
from tests.numerics import RANKS_EQUAL_ONE, rel_rms
from tests.training import ranks, tiny

NUM_KILLS = int(os.environ.get("M1_TEST_KILLS", "20"))


def checkpoints_of(out):
    return [path.name for path in list_checkpoints(out / "checkpoints")]


def assert_same_weights(out, other):
    mine, theirs = ranks.weights_of(out), ranks.weights_of(other)
    assert mine.keys() == theirs.keys()
    assert [name for name in mine if not torch.equal(mine[name], theirs[name])] == []


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    """By number of ranks, and whether they replicate the model: a run that nothing disturbed, and the seconds of its steps."""
    made = {}
    for count, replicate in ((1, "never"), (2, "never"), (2, "always")):
        out = tmp_path_factory.mktemp(f"uninterrupted-{count}-{replicate}") / "out"
        ranks.run_ranks(count, ranks.run_sft, out, {"replicate": replicate})
        made[count, replicate] = (out, sum(record["seconds"] for record in read_metrics(out / "metrics.jsonl")))
    return made


@pytest.mark.parametrize(
    ("count", "replicate", "num_kills", "is_async"),
    [
        (1, "never", NUM_KILLS, True),
        (1, "never", NUM_KILLS // 4, False),
        (2, "never", NUM_KILLS // 10, True),
        (2, "always", NUM_KILLS // 10, True),
    ],
)
def test_kills_at_random_moments_change_nothing(tmp_path, uninterrupted, count, replicate, num_kills, is_async):
    whole, seconds = uninterrupted[count, replicate]
    out, generator, killed_at = tmp_path / "out", random.Random(), []
    fields = {"async_save": is_async, "replicate": replicate}
    while len(killed_at) < num_kills:
        (out / ranks.BEGUN).unlink(missing_ok=True)
        processes = ranks.start_ranks(count, ranks.run_sft, out, fields)
        while not (out / ranks.BEGUN).exists():
            time.sleep(0.001)
        time.sleep(generator.uniform(0, seconds / 3))
        for process in generator.sample(processes, count):  # one of them goes first
            process.kill()
        ranks.join(processes)
        if all(process.exitcode == 0 for process in processes):  # it was done before it could be killed: once more
            assert_same_weights(out, whole)
            shutil.rmtree(out)
        else:
            killed_at.append(checkpoints_of(out)[:1])
    print("newest checkpoints at the kills:", killed_at)
    ranks.run_ranks(count, ranks.run_sft, out, fields)
    assert_same_weights(out, whole)
    assert checkpoints_of(out) == ["step-00000020", "step-00000019"]
    assert not [path for path in (out / "checkpoints").iterdir() if path.name.startswith(".")]


def kill_in_the_second_save(out):
    real, saved = checkpoint_writer.save_file, []

    def save_file(tensors, path):
        real(tensors, path)
        saved.append(path)
        if len(saved) == 2:
            with path.open("r+b") as file:
                file.truncate(100)
            os.kill(os.getpid(), signal.SIGKILL)

    checkpoint_writer.save_file = save_file
    ranks.run_sft(out, {"checkpoint_every": 2})


def test_a_kill_in_the_middle_of_a_save_leaves_the_one_before(tmp_path, uninterrupted):
    out = tmp_path / "out"
    processes = ranks.start_ranks(1, kill_in_the_second_save, out)
    ranks.join(processes)
    assert processes[0].exitcode == -signal.SIGKILL
    assert checkpoints_of(out) == ["step-00000002"]
    assert len(list((out / "checkpoints").iterdir())) == 2  # the half-written one is there, under another name
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ranks.run_sft(out, {"checkpoint_every": 2})
    assert [path.name for path in sorted((out / "checkpoints").iterdir())] == ["step-00000018", "step-00000020"]
    assert_same_weights(out, uninterrupted[1, "never"][0])


class KilledAtStep7(SFTStage):
    """The last rank dies there, as if its host had."""

    def draw(self, step):
        if step == 7 and rank() == int(os.environ.get("WORLD_SIZE", "1")) - 1:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().draw(step)


def run_and_tell(out, fields, stage, error):
    """A run that must end with `error`, whose message goes into a file a rank."""
    with pytest.raises(error) as caught:
        ranks.run_sft(out, fields, stage)
    (out / f"error-{rank()}").write_text(str(caught.value))


@pytest.mark.parametrize(
    ("before", "after", "replicate"),
    [
        (1, 2, ("never", "never")),
        (2, 1, ("never", "never")),
        (2, 2, ("never", "never")),
        (2, 1, ("always", "never")),
        (2, 2, ("always", "never")),
        (2, 2, ("never", "auto")),
        (2, 2, ("auto", "auto")),
    ],
)
def test_a_run_goes_on_with_any_number_of_ranks(tmp_path, uninterrupted, before, after, replicate):
    """And with the model divided or replicated, whichever it was."""
    out = tmp_path / "out"
    fields = {"checkpoint_every": 3, "replicate": replicate[0], "async_save": False}  # or the kill may come before the file
    processes = ranks.start_ranks(before, ranks.run_sft, out, fields, KilledAtStep7)
    ranks.join(processes)
    assert [process.exitcode for process in processes] == [1] * (before - 1) + [-signal.SIGKILL]
    assert checkpoints_of(out) == ["step-00000006", "step-00000003"]
    manifest = read_manifest(out / "checkpoints" / "step-00000006")
    assert list(manifest["files"]) == [f"rank-{number:05d}.safetensors" for number in range(before)]
    ranks.run_ranks(after, ranks.run_sft, out, {"checkpoint_every": 3, "replicate": replicate[1]})
    if before == after and replicate[0] == replicate[1]:
        assert_same_weights(out, uninterrupted[before, "never" if replicate[0] == "never" else "always"][0])
    else:
        expected = ranks.weights_of(uninterrupted[1, "never"][0])
        for name, weight in ranks.weights_of(out).items():
            assert rel_rms(weight, expected[name]) < RANKS_EQUAL_ONE[torch.float32], name


def test_damage_that_one_rank_sees_sends_all_back(tmp_path, uninterrupted):
    """Each rank checks its share of the files: what the second finds, the first must hear of."""
    out, fields = tmp_path / "out", {"checkpoint_every": 3, "async_save": False}
    ranks.join(ranks.start_ranks(2, ranks.run_sft, out, fields, KilledAtStep7))
    newest, before = list_checkpoints(out / "checkpoints")
    assert (newest.name, before.name) == ("step-00000006", "step-00000003")
    with (newest / "rank-00001.safetensors").open("r+b") as file:
        file.seek(-9, os.SEEK_END)
        file.write(b"\xff\x7f")
    ranks.run_ranks(2, run_with_a_warning, out, fields)
    assert (out / "warning-0").read_text().count("step-00000006 is damaged (rank-00001.safetensors does not fit") == 1
    assert (out / "warning-1").read_text() == ""  # the first rank speaks
    assert_same_weights(out, uninterrupted[2, "never"][0])


def run_with_a_warning(out, fields):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UserWarning)
        ranks.run_sft(out, fields)
    told = [str(warning.message) for warning in caught if "damaged" in str(warning.message)]
    (out / f"warning-{rank()}").write_text("\n".join(told))


def lose_a_rank(out):
    """One of two ranks, from outside the process group: writes what it ended with."""
    with pytest.raises(LostRankError) as caught, ranks.process_group("cpu", 20):
        ranks.run_sft(out, {"checkpoint_every": 3}, KilledAtStep7)
    (out / "error").write_text(str(caught.value))


def test_a_lost_rank_is_named(tmp_path):
    out, began = tmp_path / "out", time.monotonic()
    processes = ranks.start_ranks(2, lose_a_rank, out, has_group=False)
    ranks.join(processes)
    assert time.monotonic() - began < 20
    assert [process.exitcode for process in processes] == [0, -signal.SIGKILL]
    error = (out / "error").read_text()
    assert re.match(r"rank 0: another rank ended, or did not answer for 20 s \(.*\)\. The newest checkpoint stands", error)
    assert checkpoints_of(out) == ["step-00000006", "step-00000003"]


class PoisonedOnTheLastRank(SFTStage):
    def draw(self, step):
        self.step = step
        return super().draw(step)

    def backward(self, batch, num_targets):
        sums = super().backward(batch, num_targets)
        is_poisoned = self.step == 4 and rank() == 1
        return {"loss": sums["loss"] * float("nan")} if is_poisoned else sums


def diverge(out):
    run_and_tell(out, {"checkpoint_every": 2}, PoisonedOnTheLastRank, TrainingDivergedError)


def test_a_loss_that_is_not_finite_on_one_rank_stops_all(tmp_path):
    out = tmp_path / "out"
    ranks.run_ranks(2, diverge, out)
    for number in (0, 1):
        assert "step 5: the loss is nan" in (out / f"error-{number}").read_text()
        assert load_file(out / f"diverged-step-00000005.rank-{number:05d}.safetensors")["0.input_ids"].numel() > 1
    assert checkpoints_of(out) == ["step-00000004", "step-00000002"]


class InterruptedOnTheLastRank(SFTStage):
    def draw(self, step):
        if step == 4 and rank() == 1:
            os.kill(os.getpid(), signal.SIGINT)
        return super().draw(step)


def interrupt(out):
    run_and_tell(out, {"checkpoint_every": 3}, InterruptedOnTheLastRank, KeyboardInterrupt)


def test_an_interrupted_rank_stops_all_after_the_same_step(tmp_path):
    out = tmp_path / "out"
    ranks.run_ranks(2, interrupt, out)
    assert (out / "error-0").exists()
    assert (out / "error-1").exists()
    assert checkpoints_of(out) == ["step-00000005", "step-00000003"]


class FullAtStep5(SFTStage):
    """From there on, the last rank's files can't grow beyond 20 kB, which a checkpoint does."""

    def draw(self, step):
        if step == 5 and rank() == 1:
            resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, resource.RLIM_INFINITY))
        return super().draw(step)


def fill_the_disk(out):
    saving.PATIENCE = 0.1  # of this process
    saving.PAUSE = 0.05
    run_and_tell(out, {"checkpoint_every": 2}, FullAtStep5, OSError)


def test_a_write_that_fails_on_one_rank_is_raised_on_all(tmp_path, uninterrupted):
    out = tmp_path / "out"
    ranks.run_ranks(2, fill_the_disk, out)
    assert "could not be written: rank 1" in (out / "error-0").read_text()
    assert "File too large" in (out / "error-1").read_text()
    assert checkpoints_of(out) == ["step-00000004", "step-00000002"]
    assert not [path for path in (out / "checkpoints").iterdir() if path.name.startswith(".")]
    ranks.run_ranks(2, ranks.run_sft, out, {})
    assert_same_weights(out, uninterrupted[2, "never"][0])


def make_state(seed=0):
    model = tiny.model(seed=seed)
    optimizer = build_optimizer(model, ranks.SFTConfig(**ranks.RUN))
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    optimizer.step()
    return TrainingState(model, optimizer)


def test_saving_beside_the_training_waits_for_nothing_but_the_save_before(tmp_path, monkeypatch):
    """What is written is the state at the call, whatever happens to the weights while it is written."""
    real = checkpoint_writer.save_file

    def slow(tensors, path):
        time.sleep(0.5)
        real(tensors, path)

    monkeypatch.setattr(checkpoint_writer, "save_file", slow)
    state, writer = make_state(), CheckpointWriter(tmp_path, keep=5, is_async=True, timeout=9)
    expected = {key: tensor.clone() for key, tensor in state.tensors().items()}
    began = time.monotonic()
    writer.save(state, 1, {"index": 3})
    assert time.monotonic() - began < 0.4
    with torch.no_grad():
        for parameter in state.model.parameters():
            parameter.add_(1)
    assert list_checkpoints(tmp_path) == []
    writer.save(state, 2, {"index": 4})
    assert 0.4 < time.monotonic() - began < 0.9
    assert [path.name for path in list_checkpoints(tmp_path)] == ["step-00000001"]
    writer.wait()
    assert [path.name for path in list_checkpoints(tmp_path)] == ["step-00000002", "step-00000001"]
    list_checkpoints(tmp_path)[0].rename(tmp_path / "elsewhere")
    other = make_state(seed=1)
    assert load_newest_checkpoint(tmp_path, other) == (1, {"index": 3})
    for key, tensor in other.tensors().items():
        assert torch.equal(tensor, expected[key]), key


def test_an_error_beside_the_training_is_raised_by_the_next_save_and_by_waiting(tmp_path, monkeypatch):
    def fail(tensors, path):
        raise OSError(28, "No space left on device")

    state, writer = make_state(), CheckpointWriter(tmp_path, keep=5, is_async=True, timeout=9)
    monkeypatch.setattr(checkpoint_writer, "save_file", fail)
    writer.save(state, 1, {})
    with pytest.raises(OSError, match="No space left"):
        writer.save(state, 2, {})
    writer.save(state, 3, {})
    with pytest.raises(OSError, match="No space left"):
        writer.wait()
    writer.wait()
    assert list(tmp_path.iterdir()) == []
