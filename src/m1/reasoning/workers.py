"""Calling a function that may crash, hang or eat memory, safely: in processes that are killed when they do.

The processes (`worker.py`) are started by name, not forked and not spawned by multiprocessing, so that they import
neither torch nor the program that uses them. They talk JSON over pipes. No answers or rewards here: `verify.py` and
`rewards.py` say what is called.
"""

import contextlib
import json
import os
import selectors
import signal
import subprocess
import sys
import threading
import time
import weakref
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

_START_LIMIT = 60.0  # seconds to import the function's module, also on a busy machine
_BATCH_CALLS = 32
_BATCH_BYTES = 16_384  # what a pipe surely takes at once, so that writing to a worker that hangs never blocks


@dataclass(frozen=True, slots=True)
class Outcome:
    """What came of a call: its `value`, or None and the `error` that says why there is none."""

    value: Any = None
    error: str | None = None


class _Worker:
    """One process, the calls that it still owes, and the moment by which it must have said something."""

    def __init__(self, command: Sequence[str], environment: dict[str, str]):
        # An own process group keeps the terminal's Ctrl-C from it: the parent decides when it ends.
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0, env=environment, process_group=0
        )
        self.is_ready = False
        self.owed: deque[int] = deque()
        self.deadline = time.monotonic() + _START_LIMIT
        self._unread = b""

    def send(self, calls: Iterable[tuple[int, bytes]], time_limit: float) -> None:
        assert self.process.stdin is not None
        calls = list(calls)
        self.owed.extend(index for index, _ in calls)
        self.deadline = time.monotonic() + time_limit
        unsent = memoryview(b"".join(line for _, line in calls))
        with contextlib.suppress(BrokenPipeError):  # it has died; reading will tell
            while unsent:
                unsent = unsent[self.process.stdin.write(unsent) :]

    def receive(self) -> list[dict] | None:
        """The messages that have come in, or None when the process has ended."""
        assert self.process.stdout is not None
        data = os.read(self.process.stdout.fileno(), 65_536)
        if not data:
            return None
        *lines, self._unread = (self._unread + data).split(b"\n")
        return [json.loads(line) for line in lines]

    def end(self) -> str:
        """Kill the process if it still runs, reap it, and say how it ended."""
        self.process.kill()
        code = self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout):
            assert pipe is not None
            pipe.close()
        return f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"


class WorkerPool:
    """Processes that call one function, `module:function`, with JSON arguments; a context manager.

    A call that takes longer than `time_limit` seconds, or than `cpu_limit` seconds of processor time, is killed together
    with its process, and one that needs more than `memory_limit` bytes of address space fails in it; all give an `Outcome`
    with an error and leave the other calls alone. What is cut off by `cpu_limit` does not depend on how busy the machine is.
    Processes start when first needed, are replaced when they end, and end with the context, the interpreter or their
    parent. Safe to use from several threads (they take turns) and after a fork (the child starts its own).
    """

    def __init__(
        self,
        function: str,
        *,
        time_limit: float,
        memory_limit: int,
        cpu_limit: float | None = None,
        num_workers: int | None = None,
    ):
        if num_workers is not None and num_workers < 1:
            raise ValueError(f"num_workers must be at least 1, got {num_workers}")
        self.function = function
        self.time_limit = time_limit
        self.cpu_limit = cpu_limit
        self.num_workers = num_workers or min(4, _num_cores())
        limits = [str(time_limit), str(cpu_limit or 0), str(memory_limit)]
        self._command = [sys.executable, "-P", "-m", "m1.reasoning.worker", function, *limits]
        self._workers: list[_Worker] = []
        self._has_started = False  # whether any process ever imported the function
        self._lock = threading.Lock()
        self._owner = os.getpid()
        weakref.finalize(self, _end_all, self._workers, self._owner)

    def __enter__(self) -> "WorkerPool":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """End all processes. The pool starts new ones if it is used again."""
        with self._lock:
            _end_all(self._workers, self._owner)

    def call_many(self, arguments: Sequence[Sequence[Any]]) -> list[Outcome]:
        """Call the function once for each list of arguments, in parallel; outcomes in the order of the calls.

        Raises ValueError when the function can't be imported.
        """
        lines = [json.dumps(call).encode() + b"\n" for call in arguments]
        with self._lock:
            if self._owner != os.getpid():  # after a fork: those processes are the parent's
                self._workers, self._owner = [], os.getpid()
                weakref.finalize(self, _end_all, self._workers, self._owner)
            try:
                return self._call_many(lines)
            except BaseException:  # interrupted with calls under way whose replies nobody will read
                _end_all(self._workers, self._owner)
                raise

    def _call_many(self, lines: list[bytes]) -> list[Outcome]:
        outcomes: list[Outcome | None] = [None] * len(lines)
        pending = deque(range(len(lines)))
        num_wanted = min(self.num_workers, -(-len(lines) // 4))  # starting a process costs more than a few calls
        while pending or any(worker.owed for worker in self._workers):
            while len(self._workers) < num_wanted and len(self._workers) < max(1, len(pending)):
                self._workers.append(_Worker(self._command, _environment()))
            for worker in self._workers:
                if worker.is_ready and not worker.owed and pending and worker.process.poll() is None:
                    share = -(-len(pending) // len(self._workers))
                    worker.send([(index, lines[index]) for index in _take_batch(pending, lines, share)], self.time_limit)
            for worker in self._wait():
                self._attend(worker, pending, outcomes)
        return [outcome for outcome in outcomes if outcome is not None]

    def _wait(self) -> list[_Worker]:
        """The workers that said something, ended, or are past their deadlines; waits until there is one."""
        busy = [worker for worker in self._workers if worker.owed or not worker.is_ready]
        with selectors.DefaultSelector() as selector:
            for worker in self._workers:
                assert worker.process.stdout is not None
                selector.register(worker.process.stdout, selectors.EVENT_READ, worker)
            timeout = max(0.0, min(worker.deadline for worker in busy) - time.monotonic()) if busy else 0.0
            spoke = [key.data for key, _ in selector.select(timeout)]
        now = time.monotonic()
        return spoke + [worker for worker in busy if worker.deadline <= now and worker not in spoke]

    def _attend(self, worker: _Worker, pending: deque[int], outcomes: list[Outcome | None]) -> None:
        is_late = worker.deadline <= time.monotonic()
        messages = worker.receive() if _has_input(worker) else []
        for message in messages or []:
            if not worker.is_ready:
                self._welcome(worker, message)
                continue
            outcomes[worker.owed.popleft()] = Outcome(message.get("value"), message.get("error"))
            worker.deadline = time.monotonic() + self.time_limit
        if messages is None or (is_late and not messages):
            self._bury(worker, pending, outcomes, is_late=messages is not None)

    def _welcome(self, worker: _Worker, message: dict) -> None:
        if "error" in message and not self._has_started:
            raise ValueError(f"cannot load {self.function!r}: {message['error']}")
        worker.is_ready = "error" not in message
        self._has_started = self._has_started or worker.is_ready

    def _bury(self, worker: _Worker, pending: deque[int], outcomes: list[Outcome | None], *, is_late: bool) -> None:
        """Remove a worker that hangs or has died: its current call failed, the ones behind it go back to the queue."""
        self._workers.remove(worker)
        ending = worker.end()
        if worker.is_ready and is_late:
            error = f"took more than {self.time_limit:g} s"
        elif worker.is_ready:
            is_over_cpu_limit = self.cpu_limit is not None and "SIGPROF" in ending
            error = f"took more than {self.cpu_limit:g} s of processor time" if is_over_cpu_limit else f"its process {ending}"
        else:
            error = f"its process did not start within {_START_LIMIT:g} s" if is_late else f"its process {ending} at the start"
            if not self._has_started:
                raise ValueError(f"cannot load {self.function!r}: {error}")
        failed = worker.owed.popleft() if worker.owed else (pending.popleft() if pending and not worker.is_ready else None)
        if failed is not None:
            outcomes[failed] = Outcome(error=error)
        pending.extend(worker.owed)


def _has_input(worker: _Worker) -> bool:
    with selectors.DefaultSelector() as selector:
        assert worker.process.stdout is not None
        selector.register(worker.process.stdout, selectors.EVENT_READ)
        return bool(selector.select(0))


def _take_batch(pending: deque[int], lines: list[bytes], share: int) -> list[int]:
    batch = [pending.popleft()]
    num_bytes = len(lines[batch[0]])
    while pending and len(batch) < min(share, _BATCH_CALLS) and num_bytes + len(lines[pending[0]]) <= _BATCH_BYTES:
        num_bytes += len(lines[pending[0]])
        batch.append(pending.popleft())
    return batch


def _num_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _environment() -> dict[str, str]:
    """The parent's, with its import path; the working directory comes last, so that it can replace no installed module."""
    path = [entry or os.getcwd() for entry in sys.path] + [os.getcwd()]
    return dict(os.environ, PYTHONPATH=os.pathsep.join(path), OMP_NUM_THREADS="1")


def _end_all(workers: list[_Worker], owner: int) -> None:
    if owner == os.getpid():
        while workers:
            workers.pop().end()
