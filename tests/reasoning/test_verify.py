"""The grader: verdicts, limits, speed, cache, and that its processes never outlive their use."""

import gc
import os
import random
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from m1.reasoning.verify import Verifier
from m1.reasoning.voting import group_answers
from m1.reasoning.workers import WorkerPool
from tests.reasoning.grader_cases import GRADER_CASES

# Formulas that take minutes or gigabytes; the first three get past the prefilter.
BOMBS = [r"\binom{999999999}{500000000}", r"\prod_{k=1}^{9999} (x+k)", "((x+y)^{20}+z)^{20}", "(10^9)!", "2^{10^9}"]


def test_there_are_enough_cases():
    assert len(GRADER_CASES) >= 150
    assert len({(gold, answer) for gold, answer, _ in GRADER_CASES}) == len(GRADER_CASES)


def test_grader_table(verifier):
    verdicts = verifier.judge_many([(gold, answer) for gold, answer, _ in GRADER_CASES])
    wrong = [
        (gold[:50], answer[:50], expected, verdict)
        for (gold, answer, expected), verdict in zip(GRADER_CASES, verdicts)
        if verdict.is_equal is not expected or verdict.reason
    ]
    assert not wrong


def test_no_answer_is_never_right(verifier):
    assert verifier.check_many([("5", None), ("", ""), ("None", None)]) == [False, False, False]


def test_sameness_does_not_depend_on_the_order(verifier):
    assert verifier.are_same(r"\sqrt{8}", r"2\sqrt{2}")
    assert verifier.check("1 < x < 2", "(1, 2)")
    assert not verifier.check("(1, 2)", "1 < x < 2")
    assert verifier.are_same("(1, 2)", "1 < x < 2")
    assert verifier.are_same("1 < x < 2", "(1, 2)")
    assert not verifier.are_same(r"\sqrt{8}", r"2\sqrt{3}")


def test_numeric_checks_are_fast():
    generator = random.Random(0)
    spellings = [
        str,
        lambda n: f"{n}.0",
        lambda n: f"${n:,}$",
        lambda n: rf"\frac{{{2 * n}}}{{2}}",
        lambda n: f"{n + 1} dollars",
    ]
    pairs = [(str(n), generator.choice(spellings)(n)) for n in (generator.randint(0, 10**6) for _ in range(10_000))]
    with Verifier() as fresh:
        start = time.process_time()  # other work on the machine does not count
        verdicts = fresh.check_many(pairs)
        elapsed = time.process_time() - start
    assert verdicts == ["dollars" not in answer for _, answer in pairs]
    assert len(pairs) / elapsed >= 2000


@pytest.mark.parametrize("bomb", BOMBS)
def test_a_bomb_is_stopped_and_the_other_answers_are_judged(bomb):
    with WorkerPool(
        "m1.reasoning.symbolic:are_equal", time_limit=20.0, cpu_limit=1.0, memory_limit=512 << 20, num_workers=1
    ) as pool:
        pool.call_many([("x", "x")])  # start the process before the clock
        start = time.perf_counter()
        outcomes = pool.call_many([(r"\sqrt{8}", r"2\sqrt{2}"), ("5", bomb), ("x+1", "1+x"), ("x", "y")])
        elapsed = time.perf_counter() - start
    assert [outcomes[index].value for index in (0, 2, 3)] == [True, True, False]
    assert not outcomes[1].value
    assert elapsed < 40  # the limit, a new process, and a busy machine


def test_a_stopped_comparison_is_unequal_with_a_reason_and_not_repeated(monkeypatch):
    with Verifier(num_workers=1, cpu_limit=0.5) as impatient:
        verdict = impatient.judge_many([("5", BOMBS[0])])[0]
        assert not verdict.is_equal
        assert verdict.reason == "took more than 0.5 s of processor time"
        monkeypatch.setattr(impatient._pool, "call_many", None)
        assert impatient.judge_many([("5", BOMBS[0])] * 100) == [verdict] * 100


def test_a_vote_among_bombs_costs_a_limit_or_two_each(monkeypatch):
    """Three that slip past the prefilter, and honest answers among them, which are compared all the same."""
    answers = [rf"\binom{{999999999}}{{50000000{index}}}" for index in range(3)]
    answers = ["x+1", *answers, "1+x", r"\sqrt{8}", r"2\sqrt{2}"]
    with Verifier(num_workers=1, cpu_limit=0.2) as impatient:
        calls = []
        call_many = impatient._pool.call_many
        monkeypatch.setattr(impatient._pool, "call_many", lambda pairs: calls.extend(pairs) or call_many(pairs))
        groups = group_answers(answers, impatient.are_same)
    assert [len(group) for group in groups] == [2, 1, 1, 1, 2]
    with_a_bomb = [pair for pair in calls if any("binom" in side for side in pair)]
    assert len(with_a_bomb) <= 3 * 3


def test_threads_share_a_verifier(verifier):
    cases = [case for case in GRADER_CASES if len(case[1]) < 100][80:140]
    failures = []

    def judge(offset):
        mine = cases[offset::4] + cases[offset:]
        if verifier.check_many([(gold, answer) for gold, answer, _ in mine]) != [expected for *_, expected in mine]:
            failures.append(offset)

    threads = [threading.Thread(target=judge, args=(offset,)) for offset in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


PROGRAM = """
import sys, time
from m1.reasoning.verify import Verifier
verifier = Verifier(num_workers=2, cpu_limit=30.0)
print(verifier.check_many([("x+1", "1+x")] + [("x+%d" % i, "%d+x" % i) for i in range(8)]).count(True), flush=True)
print(*[worker.process.pid for worker in verifier._pool._workers], flush=True)
{then}
"""


def _is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def _start(then: str) -> tuple[subprocess.Popen, list[int]]:
    program = subprocess.Popen([sys.executable, "-c", PROGRAM.format(then=then)], stdout=subprocess.PIPE, text=True)
    assert program.stdout.readline().strip() == "9"
    return program, [int(pid) for pid in program.stdout.readline().split()]


def _wait_until_gone(pids: list[int], seconds: float) -> list[int]:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline and any(map(_is_running, pids)):
        time.sleep(0.05)
    return [pid for pid in pids if _is_running(pid)]


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="reads /proc")
@pytest.mark.parametrize("then", ["time.sleep(60)", f"verifier.check('5', r'{BOMBS[0]}')"])
def test_workers_end_when_their_parent_is_killed(then):
    """Idle ones by the end of their input, busy ones by watching their parent."""
    program, pids = _start(then)
    assert len(pids) == 2
    time.sleep(0.5)
    assert all(map(_is_running, pids))
    program.send_signal(signal.SIGKILL)
    program.wait()
    assert not _wait_until_gone(pids, 10)


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="reads /proc")
def test_workers_end_with_the_interpreter_and_the_context():
    program, pids = _start("")
    assert program.wait(30) == 0
    assert not _wait_until_gone(pids, 5)
    with Verifier(num_workers=1) as mine:
        assert mine.check("x+1", "1+x")
        pids = [worker.process.pid for worker in mine._pool._workers]
        assert _is_running(pids[0])
    assert not _wait_until_gone(pids, 5)


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="reads /proc")
def test_a_forgotten_verifier_leaves_not_even_a_zombie():
    forgotten = Verifier(num_workers=1)
    assert forgotten.check("x+1", "1+x")
    [pid] = [worker.process.pid for worker in forgotten._pool._workers]
    del forgotten
    gc.collect()
    assert not Path(f"/proc/{pid}").exists()


def test_workers_start_with_the_first_question_and_import_no_torch():
    with Verifier(num_workers=1) as mine:
        assert mine.check("5", "5.0")
        assert not mine._pool._workers
    with WorkerPool("tests.reasoning.reward_functions:loaded_modules", time_limit=10, memory_limit=1 << 30) as pool:
        modules = pool.call_many([[]])[0].value
    assert not {"torch", "transformers", "numpy", "m1.reasoning.verify"} & set(modules)


def test_a_fork_gets_its_own_workers(verifier):
    assert verifier.check("x+2", "2+x")
    child = os.fork()
    if child == 0:
        os._exit(0 if verifier.check_many([("x+3", "3+x"), ("x+3", "4+x")]) == [True, False] else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert verifier.check("x+4", "4+x")
