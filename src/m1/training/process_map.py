"""A function applied to many items in several processes: results in the items' order, few items waiting, nothing left behind.

The processes are started anew, not forked from this one, which may have a GPU, threads and a process group. What is computed in
them is no business of this file.
"""

import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from itertools import chain, islice
from multiprocessing.connection import wait
from typing import Any, TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")
MOST_PROCESSES = 16
_WAITING = 2  # items a process that are computed, or wait for it, before the first of them is taken
_act: Callable[[Any], Any]  # in a process of the pool: what it does


def num_processes_here() -> int:
    """As many as are worth starting: half of the cores, at most 16; 1 (none beside this one) with fewer than four cores."""
    num_cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(MOST_PROCESSES, num_cores // 2))


def map_in_processes(
    act: Callable[[Item], Result], items: Iterable[Item], *, num_processes: int, num_here: int, preload: str
) -> Iterator[Result]:
    """`act(item)` of each item, in their order; `act` and items must be picklable.

    The first `num_here` items are done in this process, so that small work starts no others; nor does `num_processes` 1.
    preload: a module that `act` needs, imported once for all processes. Items are drawn as they are needed. A ValueError of
    `act` is raised here as it is. Raises BrokenProcessPool if a process is killed.
    """
    items = iter(items)
    for item in islice(items, num_here) if num_processes > 1 else items:
        yield act(item)
    for item in items:  # there is more: only now is it worth the processes' start
        yield from _in_pool(act, chain([item], items), num_processes, preload)


def _in_pool(act: Callable[[Item], Result], items: Iterable[Item], num_processes: int, preload: str) -> Iterator[Result]:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([preload])
    with ProcessPoolExecutor(num_processes, mp_context=context, initializer=_begin, initargs=(act,)) as pool:
        waiting: deque[Any] = deque()
        try:
            for item in items:
                waiting.append(pool.submit(_call, item))
                if len(waiting) == _WAITING * num_processes:
                    yield _unpack(waiting.popleft().result())
            while waiting:
                yield _unpack(waiting.popleft().result())
        finally:
            for future in waiting:  # something failed, here or with whoever takes the results
                future.cancel()


def _begin(act: Callable[[Any], Any]) -> None:
    """Make a process of the pool ready. Ctrl-C is the parent's business; its death ends this process too."""
    global _act
    _act = act
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # there are as many processes as cores
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    wait([parent.sentinel])
    os._exit(1)


def _call(item: Any) -> tuple[Any, ValueError | None]:
    try:
        return _act(item), None
    except ValueError as error:  # a mistake in the data: raised where the results are wanted
        return None, error


def _unpack(outcome: tuple[Any, ValueError | None]) -> Any:
    value, error = outcome
    if error is not None:
        raise error
    return value
