"""Writing checkpoints beside the training: a copy on the host, a thread that writes it, and one rename when all have.

Every rank writes its file into a directory with a temporary name. When all of them are there, the first rank adds state.json
and gives the directory its name: a checkpoint exists whole or not at all. The threads agree over a process group of their own,
so they never meet the collectives of the training.
"""

import shutil
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from threading import Thread
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch import Tensor

from m1.distributed import gather, is_first, num_ranks, rank
from m1.storage import require_disk, write_json
from m1.training.checkpoint import PREFIX, STATE, TrainingState, checksum, list_checkpoints, random_state, seal, shard_name
from m1.training.sharding import rows_to_write

# Of the timeout of a step's collectives: writing takes longer than a step, and not equally long on all ranks.
_PATIENCE = 6


class CheckpointWriter:
    """Saves the state of a run into `directory`/step-N, and deletes all but the newest `keep`.

    is_async: `save` returns once the state is copied to the host (a second copy of weights and moments in main memory); the
    next `save`, or `wait`, waits for the writing and raises what went wrong with it. Otherwise `save` does. All ranks call
    each at the same steps; an error of one, such as a full disk, is raised on all, and leaves the checkpoints before it.
    """

    def __init__(self, directory: Path, *, keep: int, is_async: bool, timeout: float) -> None:
        self.directory, self.keep, self.is_async = directory, max(keep, 1), is_async
        patience = timedelta(seconds=_PATIENCE * timeout)
        self._group = dist.new_group(backend="gloo", timeout=patience) if num_ranks() > 1 else None
        self._buffers: dict[str, Tensor] = {}
        self._thread: Thread | None = None
        self._error: Exception | None = None

    def save(self, state: TrainingState, step: int, position: dict[str, Any]) -> None:
        """Save the state after `step` steps; `position` is plain JSON: where the stage's data stands."""
        self.wait()
        tensors = state.tensors()
        mine = {key: rows_to_write(tensor) for key, tensor in tensors.items()}
        copies = self._on_host({key: rows for key, (rows, _) in mine.items()}) | random_state()
        first_rows = {key.partition(":")[2]: first for key, (rows, first) in mine.items() if rows.ndim}
        shapes = {key: list(tensor.shape) for key, tensor in tensors.items()}
        manifest = {"step": step, "position": position, "shapes": shapes}
        if not self.is_async:
            self._write(copies, first_rows, manifest)
            return
        self._thread = Thread(target=self._try_to_write, args=(copies, first_rows, manifest), name=f"checkpoint-{step}")
        self._thread.start()

    @property
    def has_failed(self) -> bool:
        """Whether `wait` would raise at once."""
        return self._error is not None

    def wait(self) -> None:
        """Return when the checkpoint that is being written is there; raise what kept it from that."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._error is not None:
            error, self._error = self._error, None
            raise error

    def _on_host(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Copies in main memory, in buffers that serve for every checkpoint."""
        for key, tensor in tensors.items():
            if key not in self._buffers:
                self._buffers[key] = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
            self._buffers[key].copy_(tensor, non_blocking=True)
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return {key: self._buffers[key] for key in tensors}

    def _try_to_write(self, tensors: dict[str, Tensor], first_rows: dict[str, int], manifest: dict[str, Any]) -> None:
        try:
            self._write(tensors, first_rows, manifest)
        except Exception as error:  # whatever it is, `wait` raises it in the thread that trains
            self._error = error

    def _write(self, tensors: dict[str, Tensor], first_rows: dict[str, int], manifest: dict[str, Any]) -> None:
        name = f"{PREFIX}{manifest['step']:08d}"
        partial = self.directory / f".{name}.partial"

        def write_shard() -> dict[str, Any]:
            partial.mkdir(parents=True, exist_ok=True)
            require_disk(partial, sum(tensor.nbytes for tensor in tensors.values()), "a checkpoint")
            path = partial / shard_name(rank())
            save_file(tensors, path)
            return {"checksum": checksum(path), "first_rows": first_rows}

        def commit() -> None:
            if is_first():
                write_json(partial / STATE, seal({**manifest, "files": files}))
                self._rename(partial, self.directory / name)

        try:
            files = {shard_name(number): facts for number, facts in enumerate(self._together(write_shard))}
            self._together(commit)
        except OSError:
            if is_first():
                shutil.rmtree(partial, ignore_errors=True)
            raise

    def _rename(self, partial: Path, path: Path) -> None:
        """Give a whole checkpoint its name, in the place of a damaged one that the run went back behind, and drop old ones."""
        if path.exists():
            _discard(path)
        partial.rename(path)
        for old in list_checkpoints(self.directory)[self.keep :]:
            _discard(old)

    def _together(self, act: Callable[[], Any]) -> list[Any]:
        """What `act` gives on every rank; OSError on all if it fails on one."""
        result, failure = None, None
        try:
            result = act()
        except Exception as error:  # raised below, once the others know
            failure = error
        outcomes = gather((result, failure and f"rank {rank()}: {failure}"), self._group)
        if failure is not None:
            raise failure if isinstance(failure, OSError) else OSError(str(failure)) from failure
        if message := next((text for _, text in outcomes if text), None):
            raise OSError(f"the checkpoint could not be written: {message}")
        return [outcome for outcome, _ in outcomes]


def _discard(path: Path) -> None:
    """Delete a checkpoint; hidden first, so that a kill meanwhile leaves none that is half deleted."""
    hidden = path.with_name(f".{path.name}.old")
    path.rename(hidden)
    shutil.rmtree(hidden)
