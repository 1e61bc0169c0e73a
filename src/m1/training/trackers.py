"""Where metrics can be watched beside metrics.jsonl: TensorBoard, trackio, Weights & Biases. Imported only when asked for.

What is measured is decided elsewhere; a tracker gets each record as it is written. Runs that resume go on under their name.
"""

import hashlib
import importlib
import importlib.util
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

PROJECT = "m1"
# The module that must be there for each name.
MODULES = {"tensorboard": "tensorboard", "trackio": "trackio", "wandb": "wandb"}


class Tracker(Protocol):
    """Shows records somewhere."""

    def log(self, step: int, values: Mapping[str, float]) -> None: ...
    def close(self) -> None: ...


def require_trackers(names: Sequence[str]) -> None:
    """ValueError naming the first of `names` that is unknown, or whose library is not installed."""
    for name in names:
        if name not in MODULES:
            raise ValueError(f"--track: expected some of {', '.join(MODULES)}, got {name!r}")
        if importlib.util.find_spec(MODULES[name]) is None:
            raise ValueError(
                f"--track {name}: the library {MODULES[name]} is not installed; pip install {MODULES[name]}, or leave it out: "
                "metrics.jsonl is always written"
            )


def open_trackers(names: Sequence[str], directory: Path, config: Mapping[str, Any], *, first_step: int = 0) -> list[Tracker]:
    """A tracker for each of `names`, of the run in `directory`, which goes on from `first_step`. See `require_trackers`."""
    require_trackers(names)
    return [TRACKERS[name](directory, config, first_step) for name in names]


def scalars(record: Mapping[str, Any]) -> dict[str, float]:
    """The finite numbers of a record, without its step."""
    return {
        key: float(value)
        for key, value in record.items()
        if key != "step" and isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    }


class TensorBoard:
    """Event files in `directory`/tensorboard, through torch; what a crashed run wrote from `first_step` on is hidden."""

    def __init__(self, directory: Path, config: Mapping[str, Any], first_step: int) -> None:
        writer = importlib.import_module("torch.utils.tensorboard").SummaryWriter
        self.writer = writer(str(directory / "tensorboard"), purge_step=first_step + 1)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self.writer.add_scalar(name, value, step)

    def close(self) -> None:
        self.writer.close()


class Trackio:
    """A run named as the directory in trackio's local project "m1"."""

    def __init__(self, directory: Path, config: Mapping[str, Any], first_step: int) -> None:
        self.module = importlib.import_module("trackio")
        self.module.init(project=PROJECT, name=run_id(directory), config=dict(config), resume="allow")

    def log(self, step: int, values: Mapping[str, float]) -> None:
        self.module.log(dict(values), step=step)

    def close(self) -> None:
        self.module.finish()


class WeightsAndBiases:
    """A run named as the directory in the project "m1"; offline or online as WANDB_MODE and the login say."""

    def __init__(self, directory: Path, config: Mapping[str, Any], first_step: int) -> None:
        module = importlib.import_module("wandb")
        self.run = module.init(
            project=PROJECT,
            name=directory.name,
            id=run_id(directory),
            resume="allow",
            dir=str(directory.absolute()),
            config=dict(config),
        )

    def log(self, step: int, values: Mapping[str, float]) -> None:
        self.run.log(dict(values), step=step)

    def close(self) -> None:
        self.run.finish()


TRACKERS: dict[str, Callable[[Path, Mapping[str, Any], int], Tracker]] = {
    "tensorboard": TensorBoard,
    "trackio": Trackio,
    "wandb": WeightsAndBiases,
}


def run_id(directory: Path) -> str:
    """A name that the same directory gets again and another one does not: its last part and a hash of its whole path."""
    digest = hashlib.sha256(str(directory.absolute()).encode()).hexdigest()[:8]
    return f"{directory.name}-{digest}"
