"""Ctrl-C and SIGTERM as a wish to stop, which the loop grants between two steps."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


class Stop:
    """Whether someone has asked the run to end."""

    is_requested = False


@contextmanager
def interruptible(*, is_on: bool) -> Iterator[Stop]:
    """Within: the first Ctrl-C or SIGTERM asks to stop after the running step, a second Ctrl-C stops at once."""
    stop = Stop()

    def request(number: int, frame: Any) -> None:
        if stop.is_requested:
            raise KeyboardInterrupt
        stop.is_requested = True

    try:
        before = {number: signal.signal(number, request) for number in (signal.SIGINT, signal.SIGTERM)} if is_on else {}
    except ValueError:  # not the main thread, which alone may set handlers: interruption is the caller's business
        before = {}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
