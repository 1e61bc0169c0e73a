"""What the processes of test_process_map.py do; without torch, so that they start at once."""

import os
import time
from pathlib import Path

from m1.training.process_map import map_in_processes

PRELOAD = "tests.training.process_work"


def square(item: int) -> tuple[int, int]:
    """The square, and which process made it."""
    time.sleep(0.002 * (item % 3))  # so that they end in another order
    return item * item, os.getpid()


def refuse_seven(item: int) -> int:
    if item == 7:
        raise ValueError("item 7 is wrong")
    return item


def tell_and_wait(directory: Path) -> None:
    (directory / str(os.getpid())).touch()
    time.sleep(60)


def work_for_long(directory: Path) -> None:
    list(map_in_processes(tell_and_wait, [directory] * 9, num_processes=2, num_here=0, preload=PRELOAD))
