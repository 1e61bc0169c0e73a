"""The child side of `workers.py`: one process that calls one function, a JSON line of arguments at a time.

    python -m m1.reasoning.worker MODULE:FUNCTION TIME_LIMIT CPU_LIMIT MEMORY_LIMIT

Standard input carries one JSON list of arguments a line; the reply is one line, {"value": ...} or {"error": "..."}. The
first line it writes is {"ready": true}, or {"error": "..."} when the function can't be imported. What the function prints
goes to standard error. The process ends with its standard input, with its parent, or soon after its time limit.
"""

import importlib
import json
import os
import resource
import signal
import sys
import threading
import time
from typing import IO, Any

_LONGEST_ERROR = 300  # characters; replies must fit the pipe while the parent still writes
_GRACE = 1.0  # seconds; within the limit the parent does the killing, and knows why


def main(target: str, time_limit: float, cpu_limit: float, memory_limit: int) -> None:
    """Serve calls of `target` until standard input ends.

    A call may take `time_limit` seconds and `cpu_limit` seconds of processor time; the process `memory_limit` bytes.
    """
    if sys.platform != "darwin":  # which has no such limit; a call there is limited in time alone
        resource.setrlimit(resource.RLIMIT_AS, (memory_limit, memory_limit))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    replies = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    threading.Thread(target=_end_with_parent, args=(os.getppid(),), daemon=True).start()
    module, _, name = target.partition(":")
    try:
        function = getattr(importlib.import_module(module), name)
    except (Exception, SystemExit) as error:
        _reply(replies, {"error": _describe(error)})
        return
    _reply(replies, {"ready": True})
    for line in sys.stdin:
        _set_timers(time_limit + _GRACE, cpu_limit)
        try:
            reply = json.dumps({"value": function(*json.loads(line))})
        except (Exception, SystemExit) as error:
            reply = json.dumps({"error": _describe(error)})
        _set_timers(0, 0)
        replies.write(reply + "\n")
        replies.flush()


def _reply(replies: IO[str], message: dict[str, Any]) -> None:
    replies.write(json.dumps(message) + "\n")
    replies.flush()


def _set_timers(seconds: float, cpu_seconds: float) -> None:
    """End the process after so much time, 0 for never: by the signals' default action, so also in the middle of a C call."""
    for which, number, limit in (
        (signal.ITIMER_REAL, signal.SIGALRM, seconds),
        (signal.ITIMER_PROF, signal.SIGPROF, cpu_seconds),
    ):
        signal.signal(number, signal.SIG_DFL)
        signal.setitimer(which, limit)


def _describe(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}"[:_LONGEST_ERROR]


def _end_with_parent(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)


if __name__ == "__main__":
    main(sys.argv[1], float(sys.argv[2]), float(sys.argv[3]), int(sys.argv[4]))
