"""Items through several processes: in order, drawn as needed, and no process outlives its parent."""

import multiprocessing
import os
import signal
import time

import pytest

from m1.training import process_map
from m1.training.process_map import map_in_processes, num_processes_here
from tests.training.process_work import PRELOAD, refuse_seven, square, work_for_long

OPTIONS = {"num_here": 3, "preload": PRELOAD}


@pytest.mark.parametrize("count", [0, 1, 3, 4, 40])
def test_results_come_in_order_and_small_work_stays_here(count):
    results = list(map_in_processes(square, range(count), num_processes=2, **OPTIONS))
    assert [value for value, _ in results] == [item * item for item in range(count)]
    assert {number for _, number in results[:3]} <= {os.getpid()}
    assert os.getpid() not in {number for _, number in results[3:]}
    alone = list(map_in_processes(square, range(count), num_processes=1, **OPTIONS))
    assert {number for _, number in alone} <= {os.getpid()}


def test_items_are_drawn_as_they_are_needed():
    drawn = []

    def items():
        for item in range(100):
            drawn.append(item)
            yield item

    results = map_in_processes(square, items(), num_processes=2, **OPTIONS)
    for number in range(20):
        assert next(results)[0] == number * number
        assert len(drawn) <= number + 1 + 2 * 2
    results.close()
    assert len(drawn) < 30


def test_a_mistake_comes_in_its_turn():
    results = map_in_processes(refuse_seven, range(20), num_processes=2, **OPTIONS)
    assert [next(results) for _ in range(7)] == list(range(7))
    with pytest.raises(ValueError, match="item 7 is wrong"):
        next(results)


def test_no_process_outlives_a_killed_parent(tmp_path):
    parent = multiprocessing.get_context("forkserver").Process(target=work_for_long, args=(tmp_path,))
    parent.start()
    limit = time.monotonic() + 60
    while len(list(tmp_path.iterdir())) < 2:
        assert time.monotonic() < limit
        time.sleep(0.02)
    workers = [int(path.name) for path in tmp_path.iterdir()]
    assert parent.pid not in workers
    parent.kill()
    parent.join(60)
    assert parent.exitcode == -signal.SIGKILL
    while any(is_running(worker) for worker in workers):
        assert time.monotonic() < limit
        time.sleep(0.02)


def is_running(number):
    try:
        with open(f"/proc/{number}/stat") as file:
            return file.read().rsplit(")", 1)[1].split()[0] not in "ZX"
    except FileNotFoundError:
        return False


def test_few_cores_start_no_processes(monkeypatch):
    for cores, expected in ((1, 1), (2, 1), (3, 1), (4, 2), (16, 8), (64, 16)):
        monkeypatch.setattr(process_map.os, "sched_getaffinity", lambda process, cores=cores: range(cores), raising=False)
        assert num_processes_here() == expected
