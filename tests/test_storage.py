"""Outputs appear whole or not at all, also when the process is killed while it writes."""

import json
import signal
import subprocess
import sys

import pytest
import torch
from safetensors.torch import save_file

from m1 import storage


def test_a_directory_appears_when_it_is_complete(tmp_path):
    with storage.new_directory(tmp_path / "out") as path:
        (path / "file").write_text("x")
        assert not (tmp_path / "out").exists()
    assert (tmp_path / "out" / "file").read_text() == "x"
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_a_failure_leaves_nothing(tmp_path):
    def write_half() -> None:
        with storage.new_directory(tmp_path / "out") as path:
            (path / "file").write_text("x")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        write_half()
    assert not list(tmp_path.iterdir())


def test_an_existing_directory_stays_unless_told(tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "old").write_text("x")
    with pytest.raises(FileExistsError, match="--overwrite"), storage.new_directory(out):
        pass
    with pytest.raises(RuntimeError), storage.new_directory(out, overwrite=True):
        raise RuntimeError
    assert (out / "old").exists()
    with storage.new_directory(out, overwrite=True) as path:
        (path / "new").write_text("y")
    assert [p.name for p in out.iterdir()] == ["new"]
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_killed_while_writing(tmp_path):
    code = (
        "import sys, time; from m1.storage import new_directory\n"
        f"with new_directory({str(tmp_path / 'out')!r}) as path:\n"
        "    (path / 'config.json').write_text('{}'); print('written', flush=True); time.sleep(60)"
    )
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline().strip() == "written"
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "out").exists()
    assert all(p.name.startswith(".out.partial-") for p in tmp_path.iterdir())


def test_text_is_replaced_whole(tmp_path, monkeypatch):
    path = tmp_path / "file.json"
    storage.write_json(path, {"a": 1})
    monkeypatch.setattr(storage.Path, "write_text", _full_disk)
    with pytest.raises(OSError, match="No space left"):
        storage.write_json(path, {"a": 2})
    monkeypatch.undo()
    assert json.loads(path.read_text()) == {"a": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["file.json"]


def _full_disk(*arguments, **options):
    raise OSError(28, "No space left on device")


def test_run_record_keeps_the_history(tmp_path):
    for name, earlier in (("first", ""), ("second", "first"), ("third", "second")):
        (tmp_path / name).mkdir()
        storage.write_run_record(tmp_path / name, name, {"model": str(tmp_path / earlier) if earlier else ""}, loss=1.0)
    record = storage.read_run_record(tmp_path / "third")
    assert [one["command"] for one in record["history"]] == ["first", "second"]
    assert record["loss"] == 1.0
    assert storage.read_run_record(tmp_path) is None


def test_too_little_disk_or_memory_is_said_in_numbers(tmp_path):
    with pytest.raises(OSError, match=r"the test needs 1073741824\.00 GiB on the disk of .*, [\d.]+ GiB are free"):
        storage.require_disk(tmp_path / "not" / "there", 2**60, "the test")
    with pytest.raises(MemoryError, match=r"the test needs about 1073741824\.0 GiB of memory, [\d.]+ GiB are available"):
        storage.require_memory(2**60, "the test")
    storage.require_disk(tmp_path, 1, "the test")
    storage.require_memory(1, "the test")


def test_a_copy_without_git_says_of_which_revision_it_is(tmp_path, monkeypatch):
    monkeypatch.setenv("M1_REVISION", "0123456789ab")
    storage.write_run_record(tmp_path, "eval", {})
    assert storage.read_run_record(tmp_path)["revision"] == "0123456789ab"


def test_models_that_differ_in_one_small_tensor_are_told_apart(tmp_path):
    """As after a training with frozen embeddings: both ends of the file are what they were."""
    tensors = {name: torch.randn(400_000) for name in ("embed", "lm_head")}
    for name, norm in (("before", 1.0), ("after", 1.001), ("copy", 1.0)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text("{}")
        save_file(tensors | {"layers.0.norm": torch.full((8,), norm)}, tmp_path / name / "model.safetensors")
    before, after, copy = (storage.weights_fingerprint(tmp_path / name) for name in ("before", "after", "copy"))
    assert before == copy != after
    (tmp_path / "copy" / "config.json").write_text('{"rope_theta": 1}')
    assert storage.weights_fingerprint(tmp_path / "copy") != before
    assert storage.weights_fingerprint("owner/name") is None
