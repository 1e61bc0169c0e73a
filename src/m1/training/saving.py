"""What a run leaves on its way: checkpoints, models at intervals, and what happens when there is no room for them.

How a checkpoint is written is in `checkpoint_writer.py`, what is in it in `checkpoint.py`; when there is one is decided here.
A checkpoint that can't be written does not end a run: the steps since the last one would be lost with it. It is reported, and
tried again one step later, then two, four, … The last one of a run is tried again for `PATIENCE` seconds.
"""

import time
from typing import Any, Protocol

from safetensors import SafetensorError

from m1.config import TrainConfig
from m1.distributed import is_any, say, sum_over_ranks
from m1.modeling import M1ForCausalLM
from m1.training.checkpoint import TrainingState, load_newest_checkpoint, remove_leftovers
from m1.training.checkpoint_writer import CheckpointWriter
from m1.training.interruption import Stop
from m1.training.metrics import MetricsLog
from m1.training.run_directory import RunDirectory

PATIENCE, PAUSE = 600.0, 10.0  # seconds for which the last checkpoint is tried, and between two tries


class HasPosition(Protocol):
    """A stage, as far as it is saved: where its data stands, as plain JSON."""

    def state_dict(self) -> dict[str, Any]: ...
    def load_state_dict(self, state: dict[str, Any]) -> None: ...


class RunSaver:
    """Saves a run into its directory; without one it does nothing. All ranks call each method after the same steps."""

    def __init__(
        self,
        model: M1ForCausalLM,
        stage: HasPosition,
        config: TrainConfig,
        directory: RunDirectory | None,
        state: TrainingState,
    ) -> None:
        self.model, self.stage, self.config, self.directory, self.state = model, stage, config, directory, state
        self._next_try, self._delay = 0, 0  # after a failure: the step of the next try, and how many steps it came after
        self._writer: CheckpointWriter | None = None
        if directory is not None:
            self._writer = CheckpointWriter(
                directory.checkpoints, keep=config.keep_checkpoints, is_async=config.async_save, timeout=config.timeout
            )

    def resume(self, log: MetricsLog) -> int:
        """Steps already done, according to the newest whole checkpoint, which is now in place."""
        if self.directory is None:
            return 0
        remove_leftovers(self.directory.checkpoints)
        found = load_newest_checkpoint(self.directory.checkpoints, self.state)
        step, position = found if found else (0, None)
        if position is not None:
            self.stage.load_state_dict(position)
        log.resume(step)
        return step

    def keep(self, step: int, stop: Stop) -> bool:
        """After `step` steps: a checkpoint and a model, if it is time for them. Returns whether the run is to end here.

        Raises OSError if the checkpoint that ends a run can't be written.
        """
        failed_here = self._writer is not None and self._writer.has_failed
        is_stopped, has_failed = (count > 0 for count in sum_over_ranks([stop.is_requested, failed_here]))
        is_last = step == self.config.steps
        if self._writer is None or self.directory is None:
            return is_stopped and not is_last
        if has_failed and not (is_last or is_stopped):
            self._collect(step)
        if is_last:
            self._save_at_last(stop)
        elif is_stopped:
            self._let_go()
            self._save(step)
        elif step % self.config.checkpoint_every == 0:
            self._delay = 0
            self._try_to_save(step)
        elif step == self._next_try:
            self._try_to_save(step)
        if self.config.export_every and step % self.config.export_every == 0 and not is_last:
            self._export(self.directory, step)
        return is_stopped and not is_last

    def wait(self) -> None:
        """Return when the checkpoint that is being written is there; raise what kept it from that."""
        if self._writer is not None:
            self._writer.wait()

    def _save(self, step: int) -> None:
        assert self._writer is not None
        self._writer.save(self.state, step, self.stage.state_dict())

    def _collect(self, step: int) -> None:
        """Hear how the save before went."""
        try:
            self.wait()
        except OSError as error:
            self._missed(step, error)

    def _try_to_save(self, step: int) -> None:
        self._collect(step)
        try:
            self._save(step)
        except OSError as error:
            self._missed(step, error)

    def _missed(self, step: int, error: OSError) -> None:
        self._delay = min(max(1, 2 * self._delay), self.config.checkpoint_every)
        self._next_try = step + self._delay
        say(
            f"\nstep {step}: a checkpoint could not be written ({error}). The run goes on and tries again after step "
            f"{self._next_try}; those before it stand. Make room where {self.config.out} is."
        )

    def _let_go(self) -> None:
        """Don't mind how the save before went: the one that comes now is the last, and takes its place."""
        try:
            self.wait()
        except OSError as error:
            say(f"\nThe checkpoint before could not be written ({error})")

    def _save_at_last(self, stop: Stop) -> None:
        """The checkpoint of a finished run, which nothing comes after."""
        self._let_go()
        began = time.monotonic()
        while True:
            try:
                self._save(self.config.steps)
                self.wait()
                return
            except OSError as error:
                if is_any(stop.is_requested or time.monotonic() - began > PATIENCE):
                    raise
                say(
                    f"\nThe last checkpoint could not be written ({error}). Make room where {self.config.out} is; it is tried "
                    f"again for {PATIENCE - time.monotonic() + began:.0f} seconds. Ctrl-C gives up."
                )
                time.sleep(PAUSE)

    def _export(self, directory: RunDirectory, step: int) -> None:
        """The model after `step` steps, averaged if the run averages; one for which there is no room is left out."""
        if self.state.average is not None:
            self.state.average.swap()
        try:
            directory.export_step(self.model, step)
        except (OSError, SafetensorError) as error:
            say(f"\nstep {step}: the model could not be written ({error}); the run goes on without it")
        finally:
            if self.state.average is not None:
                self.state.average.swap()
