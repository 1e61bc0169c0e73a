"""Checkpoints: trainable parameters, optimizer, random state, and the position of a run, in a directory a checkpoint.

A checkpoint is written under a temporary name and renamed, and carries checksums: a damaged one is told from a whole one
and passed over. safetensors and JSON only: reading one executes nothing. Frozen parameters are not in it, they come from
the model that the run started from.
"""

import json
import shutil
import warnings
import zlib
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from m1.storage import new_directory, require_disk, write_json

PARAMETERS, OPTIMIZER, STATE = "parameters.safetensors", "optimizer.safetensors", "state.json"
_PREFIX = "step-"


def checkpoint_bytes(model: nn.Module) -> int:
    """Size of one checkpoint: every trainable parameter with its two averages."""
    return 3 * sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad)


def save_checkpoint(
    directory: Path, step: int, model: nn.Module, optimizer: torch.optim.Optimizer, position: dict[str, Any], *, keep: int
) -> None:
    """Write the state after `step` steps to `directory`/step-N and delete all but the newest `keep` checkpoints.

    `position` is plain JSON: where the stage's data stands. Raises OSError for a full disk, and then leaves nothing new.
    """
    require_disk(directory, checkpoint_bytes(model), "a checkpoint")
    with new_directory(directory / f"{_PREFIX}{step:08d}", overwrite=True) as new:
        save_file(_trainable(model), new / PARAMETERS)
        save_file(_optimizer_tensors(optimizer) | _random_state(), new / OPTIMIZER)
        state = {"step": step, "position": position, "checksums": {n: _checksum(new / n) for n in (PARAMETERS, OPTIMIZER)}}
        write_json(new / STATE, {**state, "checksum": _checksum_of_state(state)})
    for old in list_checkpoints(directory)[max(keep, 1) :]:
        shutil.rmtree(old)


def load_newest_checkpoint(
    directory: Path, model: nn.Module, optimizer: torch.optim.Optimizer
) -> tuple[int, dict[str, Any]] | None:
    """Put the newest whole checkpoint into model, optimizer and random state; (steps done, position), or None without one.

    Damaged ones are passed over with a warning. Raises ValueError for one of another model.
    """
    for path in list_checkpoints(directory):
        try:
            step, position, parameters, tensors = _read(path)
        except (OSError, ValueError, KeyError, TypeError) as error:
            warnings.warn(f"{path} is damaged ({error}): going back to the checkpoint before it", stacklevel=2)
            continue
        _restore(path, model, optimizer, parameters, tensors)
        return step, position
    return None


def list_checkpoints(directory: Path) -> list[Path]:
    """Checkpoint directories, newest first."""
    return sorted((path for path in directory.glob(f"{_PREFIX}*") if path.is_dir()), reverse=True)


def remove_leftovers(directory: Path) -> None:
    """Delete what a killed process left half-written here."""
    for path in directory.glob(f".{_PREFIX}*"):
        shutil.rmtree(path)


def _read(path: Path) -> tuple[int, dict[str, Any], dict[str, Tensor], dict[str, Tensor]]:
    """Everything in a checkpoint, checked; raises OSError, ValueError, KeyError or TypeError where it is damaged."""
    state = json.loads((path / STATE).read_text(encoding="utf-8"))
    if state.pop("checksum") != _checksum_of_state(state):
        raise ValueError(f"{STATE} does not fit its checksum")
    for name, checksum in state["checksums"].items():
        if _checksum(path / name) != checksum:
            raise ValueError(f"{name} does not fit its checksum")
    return state["step"], state["position"], load_file(path / PARAMETERS), load_file(path / OPTIMIZER)


@torch.no_grad()
def _restore(
    path: Path,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    parameters: dict[str, Tensor],
    tensors: dict[str, Tensor],
) -> None:
    mine = _trainable(model)
    wrong = [name for name in mine.keys() | parameters.keys() if _shape(mine.get(name)) != _shape(parameters.get(name))]
    if wrong:
        raise ValueError(f"{path}: a checkpoint of another model ({len(wrong)} parameters differ, such as {min(wrong)})")
    for name, parameter in mine.items():
        parameter.copy_(parameters[name])
    for group in optimizer.param_groups:
        for name, parameter in zip(group["names"], group["params"], strict=True):
            saved = {key: tensors[f"{key}:{name}"] for key in ("step", "exp_avg", "exp_avg_sq") if f"{key}:{name}" in tensors}
            if saved:  # a parameter that never had a gradient has no averages
                optimizer.state[parameter] = {key: value.to(parameter.device) for key, value in saved.items()}
    torch.set_rng_state(tensors["random:cpu"])
    if torch.cuda.is_available() and "random:cuda" in tensors:
        torch.cuda.set_rng_state(tensors["random:cuda"])


def _trainable(model: nn.Module) -> dict[str, Tensor]:
    return {name: parameter.detach() for name, parameter in model.named_parameters() if parameter.requires_grad}


def _optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    return {
        f"{key}:{name}": value
        for group in optimizer.param_groups
        for name, parameter in zip(group["names"], group["params"], strict=True)
        for key, value in optimizer.state.get(parameter, {}).items()
    }


def _random_state() -> dict[str, Tensor]:
    state = {"random:cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        state["random:cuda"] = torch.cuda.get_rng_state()
    return state


def _shape(tensor: Tensor | None) -> torch.Size | None:
    return None if tensor is None else tensor.shape


def _checksum(path: Path) -> int:
    value = 0
    with path.open("rb") as file:
        while block := file.read(2**24):
            value = zlib.crc32(block, value)
    return value


def _checksum_of_state(state: dict[str, Any]) -> int:
    return zlib.crc32(json.dumps(state, sort_keys=True).encode())
