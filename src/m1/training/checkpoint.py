"""Checkpoints: trainable parameters, optimizer, weight average, random state, and the position of a run.

A checkpoint is a directory with one file a rank, which has the rows that the rank holds of every tensor, and state.json,
which says what is where and carries checksums: a damaged one is told from a whole one and passed over. Any number of ranks
can read what another number wrote. safetensors and JSON only: reading one executes nothing. Frozen parameters are not in it,
they come from the model that the run started from. How one comes to be written is in `checkpoint_writer.py`.
"""

import json
import shutil
import warnings
import zlib
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from m1.distributed import barrier, from_first, gather, is_first, num_ranks, rank
from m1.training.average import WeightAverage
from m1.training.sharding import first_row, local

STATE = "state.json"
PREFIX = "step-"
_MOMENTS = ("exp_avg", "exp_avg_sq")  # of AdamW, shaped as the parameter; its "step" is a number


@dataclass
class TrainingState:
    """What a checkpoint holds: a model, its AdamW, whose groups carry `names`, and maybe an average of the weights."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    average: WeightAverage | None = None

    def tensors(self) -> dict[str, Tensor]:
        """All of it as KIND:NAME, tensors that are divided among the ranks as they are."""
        found = {f"parameter:{name}": parameter.detach() for name, parameter in self.trainable().items()}
        for name, parameter in self._optimized():
            found |= {f"{kind}:{name}": value for kind, value in self.optimizer.state.get(parameter, {}).items()}
        if self.average is not None:
            found |= {f"average:{name}": value for name, value in self.average.weights.items()}
        return found

    def trainable(self) -> dict[str, nn.Parameter]:
        return {name: parameter for name, parameter in self.model.named_parameters() if parameter.requires_grad}

    def num_bytes(self) -> int:
        """Size of a checkpoint, all ranks together: every trainable parameter, two moments, and maybe its average."""
        copies = 3 if self.average is None else 4
        return copies * sum(parameter.numel() * parameter.element_size() for parameter in self.trainable().values())

    @torch.no_grad()
    def restore(self, saved: "_Reader") -> None:
        """Take everything from a checkpoint; ValueError for one of another model, or without the average that is wanted."""
        mine = self.trainable()
        theirs = {key.removeprefix("parameter:"): shape for key, shape in saved.shapes.items() if key.startswith("parameter:")}
        wrong = [name for name in mine.keys() | theirs.keys() if name not in mine or list(mine[name].shape) != theirs.get(name)]
        if wrong:
            raise ValueError(
                f"{saved.path}: a checkpoint of another model ({len(wrong)} parameters differ, such as {min(wrong)})"
            )
        for name, parameter in mine.items():
            saved.fill(f"parameter:{name}", parameter)
        for name, optimized in self._optimized():
            if f"step:{name}" in saved.shapes:  # a parameter that never had a gradient has no moments
                moments = {kind: torch.zeros_like(optimized) for kind in _MOMENTS}
                for kind, moment in moments.items():
                    saved.fill(f"{kind}:{name}", moment)
                self.optimizer.state[optimized] = {"step": saved.number(f"step:{name}").to(optimized.device), **moments}
        if self.average is not None:
            for name, average in self.average.weights.items():
                saved.fill(f"average:{name}", average)
        saved.restore_random_state()

    def _optimized(self) -> Iterator[tuple[str, Tensor]]:
        for group in self.optimizer.param_groups:
            yield from zip(group["names"], group["params"], strict=True)


def random_state() -> dict[str, Tensor]:
    """Of this rank."""
    state = {"random:cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        state["random:cuda"] = torch.cuda.get_rng_state()
    return state


def load_newest_checkpoint(directory: Path, state: TrainingState) -> tuple[int, dict[str, Any]] | None:
    """Put the newest whole checkpoint into `state`; (steps done, position of the data), or None without one.

    Damaged ones are passed over with a warning. Raises ValueError for one of another model, and if all are damaged: what to do
    then is not for a program to decide.
    """
    paths = from_first(list_checkpoints(directory))
    for path in paths:
        if damage := next(filter(None, gather(_damage(path))), None):
            if is_first():
                warnings.warn(f"{path} is damaged ({damage}): going back to the checkpoint before it", stacklevel=2)
            continue
        manifest = read_manifest(path)
        with ExitStack() as stack:
            state.restore(_Reader(path, manifest, stack))
        return manifest["step"], manifest["position"]
    if paths:
        raise ValueError(f"{directory}: every checkpoint is damaged; restore one, or delete this directory to start anew")
    return None


def list_checkpoints(directory: Path) -> list[Path]:
    """Checkpoint directories, newest first."""
    return sorted((path for path in directory.glob(f"{PREFIX}*") if path.is_dir()), reverse=True)


def remove_leftovers(directory: Path) -> None:
    """Delete what a killed process left half-written here."""
    if is_first():
        for path in directory.glob(f".{PREFIX}*"):
            shutil.rmtree(path)
    barrier()


def shard_name(number: int) -> str:
    return f"rank-{number:05d}.safetensors"


def seal(manifest: Mapping[str, Any]) -> dict[str, Any]:
    """The manifest with its own checksum."""
    return {**manifest, "checksum": _checksum_of(manifest)}


def read_manifest(path: Path) -> dict[str, Any]:
    """state.json of a checkpoint; raises OSError, ValueError or KeyError where it is damaged."""
    manifest = json.loads((path / STATE).read_text(encoding="utf-8"))
    if manifest.pop("checksum") != _checksum_of(manifest):
        raise ValueError(f"{STATE} does not fit its checksum")
    return manifest


def checksum(path: Path) -> int:
    value = 0
    with path.open("rb") as file:
        while block := file.read(2**24):
            value = zlib.crc32(block, value)
    return value


def _damage(path: Path) -> str | None:
    """What is wrong with a checkpoint, as far as this rank's share of its files tells."""
    try:
        files = read_manifest(path)["files"]
        for name in sorted(files)[rank() :: num_ranks()]:
            if checksum(path / name) != files[name]["checksum"]:
                return f"{name} does not fit its checksum"
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return str(error)
    return None


class _Reader:
    """The tensors of a checkpoint, read by rows from whichever files have them. Open until `stack` closes."""

    def __init__(self, path: Path, manifest: Mapping[str, Any], stack: ExitStack) -> None:
        self.path, self.shapes = path, manifest["shapes"]
        self.files = [
            (stack.enter_context(safe_open(path / name, framework="pt")), manifest["files"][name]["first_rows"])
            for name in sorted(manifest["files"])
        ]

    def fill(self, key: str, tensor: Tensor) -> None:
        """Read the rows of `key` that this rank holds of `tensor` into it."""
        mine, start = local(tensor), first_row(tensor)
        name, missing = key.partition(":")[2], mine.shape[0]
        for file, first_rows in self.files:
            rows, first = file.get_slice(key), first_rows[name]
            low, high = max(start, first), min(start + mine.shape[0], first + rows.get_shape()[0])
            if low < high:
                mine[low - start : high - start].copy_(rows[low - first : high - first])
                missing -= high - low
        if missing:
            raise ValueError(f"{self.path}: {missing} rows of {key} are in none of its files")

    def number(self, key: str) -> Tensor:
        return self.files[0][0].get_tensor(key)

    def restore_random_state(self) -> None:
        """Of the rank of this number, as far as there was one."""
        file, _ = self.files[rank() % len(self.files)]
        torch.set_rng_state(file.get_tensor("random:cpu"))
        if torch.cuda.is_available() and "random:cuda" in file.keys():  # noqa: SIM118  (no container)
            torch.cuda.set_rng_state(file.get_tensor("random:cuda"))


def _checksum_of(manifest: Mapping[str, Any]) -> int:
    return zlib.crc32(json.dumps(manifest, sort_keys=True).encode())
