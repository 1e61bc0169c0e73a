"""Trackers: what they are told, in which order, and what is said when their library is not there."""

import sys
import types

import pytest

from m1.config import SFTConfig
from m1.training import trackers
from m1.training.metrics import MetricsLog, read_metrics
from m1.training.run_directory import RunDirectory
from m1.training.sft import sft
from tests.training import tiny


class Calls(list):
    """A stand-in for any library: remembers every call as (name, arguments, keywords)."""

    def method(self, name, result=None):
        def call(*arguments, **keywords):
            self.append((name, arguments, keywords))
            return result

        return call


@pytest.fixture
def libraries(monkeypatch):
    """Stand-ins for tensorboard, trackio and wandb under their import names; what they were told, by name."""
    calls = {name: Calls() for name in trackers.MODULES}

    def put(name, **contents):
        module = types.ModuleType(name)
        module.__spec__ = types.SimpleNamespace(name=name)
        vars(module).update(contents)
        monkeypatch.setitem(sys.modules, name, module)

    def of(name, *methods):
        return types.SimpleNamespace(**{method: calls[name].method(method) for method in methods})

    put("tensorboard")
    put("torch.utils.tensorboard", SummaryWriter=calls["tensorboard"].method("init", of("tensorboard", "add_scalar", "close")))
    put("trackio", **vars(of("trackio", "init", "log", "finish")))
    put("wandb", init=calls["wandb"].method("init", of("wandb", "log", "finish")))
    return calls


CONFIG = {
    "steps": 4,
    "tokens_per_step": 40,
    "tokens_per_batch": 40,
    "max_length": 30,
    "checkpoint_every": 2,
    "precision": "float32",
    "track": ["tensorboard", "trackio", "wandb"],
}


def train(directory, **fields):
    config = SFTConfig(**CONFIG | {"out": str(directory)} | fields)
    run = RunDirectory("sft", config)
    run.create()
    sft(tiny.model(), tiny.documents(5), config, directory=run, progress=False)
    return read_metrics(run.metrics)


def test_every_record_reaches_every_tracker(libraries, tmp_path):
    records = train(tmp_path / "run")
    for name, log in (("trackio", "log"), ("wandb", "log")):
        calls = libraries[name]
        assert [call[0] for call in calls] == ["init", *[log] * 4, "finish"]
        assert calls[0][2]["config"]["steps"] == 4
        assert calls[0][2]["resume"] == "allow"
        for call, record in zip(calls[1:-1], records):
            assert call[2] == {"step": record["step"]}
            assert call[1][0] == {key: value for key, value in record.items() if key != "step"}
    scalars = [call[1] for call in libraries["tensorboard"] if call[0] == "add_scalar"]
    assert [(step, value) for name, value, step in scalars if name == "loss"] == [(r["step"], r["loss"]) for r in records]
    assert libraries["tensorboard"][-1][0] == "close"


def test_a_resumed_run_goes_on_under_its_name(libraries, tmp_path):
    write = MetricsLog.write

    def write_until_the_fourth(log, record):
        if record["step"] == 4:
            raise RuntimeError("lost")
        write(log, record)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(MetricsLog, "write", write_until_the_fourth)
        with pytest.raises(RuntimeError, match="lost"):
            train(tmp_path / "run")
    first = {name: calls[0] for name, calls in libraries.items()}
    assert libraries["wandb"][-1][0] == "finish", "a run that failed closes its trackers"
    for calls in libraries.values():
        calls.clear()
    train(tmp_path / "run")  # from the checkpoint after step 2
    assert libraries["wandb"][0][2]["id"] == first["wandb"][2]["id"]
    assert libraries["trackio"][0][2]["name"] == first["trackio"][2]["name"]
    assert (first["tensorboard"][2]["purge_step"], libraries["tensorboard"][0][2]["purge_step"]) == (1, 3)
    assert [call[2]["step"] for call in libraries["wandb"] if call[0] == "log"] == [3, 4]
    assert trackers.run_id(tmp_path / "run") != trackers.run_id(tmp_path / "other" / "run")


def test_a_library_that_is_missing_is_named_before_anything_is_written(tmp_path, monkeypatch):
    monkeypatch.setattr(trackers.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"--track wandb: the library wandb is not installed; pip install wandb"):
        trackers.require_trackers(["wandb"])
    with pytest.raises(ValueError, match="--track: expected some of tensorboard, trackio, wandb, got 'excel'"):
        trackers.require_trackers(["excel"])
    trackers.require_trackers([])


def test_only_finite_numbers_are_tracked():
    record = {"step": 3, "loss": 1.5, "nan": float("nan"), "none": None, "text": "x", "flag": True, "count": 2}
    assert trackers.scalars(record) == {"loss": 1.5, "count": 2.0}
