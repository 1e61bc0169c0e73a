"""Scheduler and cache without a model: whatever arrives, forks or is preempted, tokens are those of a sequence alone."""

import itertools
import random
from collections import deque
from dataclasses import dataclass

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from m1.engine.cache import Move, StateCache
from m1.engine.outputs import OutputProcessor
from m1.engine.prompts import RequestFactory
from m1.engine.runner import independent_groups
from m1.engine.sampling_params import SamplingParams
from m1.engine.scheduler import Batch, Scheduler
from m1.engine.sequence import Request
from tests.engine.fake_runner import VOCABULARY, FakeModel, FakeRunner

EOS = 7
PARTS = {"hybrid": (True, True), "dense": (False, True), "mamba": (True, False)}  # has_state, has_pages


@dataclass(frozen=True)
class Sizes:
    max_num_seqs: int = 4
    max_num_batched_tokens: int = 16
    page_size: int = 4
    num_prefix_slots: int = 3
    num_pages: int = 24
    max_model_len: int = 48
    keeps_prefixes: bool = True
    has_state: bool = True
    has_pages: bool = True
    num_steps_ahead: int = 0
    admission_interval: int = 1


class House:
    """The engine's step with a fake runner, and every invariant checked at every step."""

    def __init__(self, sizes: Sizes) -> None:
        self.sizes, self.model = sizes, FakeModel(sizes.has_state, sizes.has_pages)
        num_slots = sizes.max_num_seqs + (sizes.num_prefix_slots if sizes.keeps_prefixes else 0)
        self.cache = StateCache(
            num_slots,
            sizes.num_pages,
            sizes.page_size,
            needs_state=sizes.has_state,
            needs_pages=sizes.has_pages,
            keeps_prefixes=sizes.keeps_prefixes,
        )
        self.scheduler = Scheduler(self.cache, sizes.max_num_seqs, sizes.max_num_batched_tokens, sizes.admission_interval)
        self.runner = FakeRunner(self.model, num_slots, sizes.num_pages, sizes.page_size)
        self.factory = RequestFactory(None, VOCABULARY, frozenset([EOS]), sizes.max_model_len)
        self.outputs = OutputProcessor(None)
        self.requests: list[Request] = []
        self.in_flight: deque[tuple[Batch, tuple[np.ndarray, np.ndarray]]] = deque()
        self.num_taken = 0
        self.admitted: list[int] = []  # request numbers in the order in which they first ran

    def submit(self, prompt: list[int], **params: object) -> Request:
        request = self.factory.make(prompt, SamplingParams(**params))
        self.requests.append(request)
        self.scheduler.add(request)
        return request

    def abort(self, request: Request) -> None:
        for sequence in self.scheduler.sequences_of(request):
            self.scheduler.finish(sequence)
            self.outputs.close(sequence, "abort")
            for index in sequence.pending:
                self.outputs.close_unborn(request, index)

    def step(self) -> Batch:
        """`Engine.step`: results are read `num_steps_ahead` steps after they were computed."""
        batch = self.scheduler.schedule()
        self.check(batch)
        if not batch.is_empty:
            self.in_flight.append((batch, self.runner.launch(batch)))
            self.scheduler.advance(batch)
        num_ahead = self.sizes.num_steps_ahead if batch.num_tokens else max(0, len(self.in_flight) - 1)
        while len(self.in_flight) > num_ahead:
            self.read(*self.in_flight.popleft())
        return batch

    def read(self, batch: Batch, results: tuple[np.ndarray, np.ndarray]) -> None:
        num_taken, news = self.scheduler.receive(batch, *results)
        self.num_taken += num_taken
        for item in news:
            reason = self.outputs.take(item)
            if reason is not None:
                self.scheduler.finish(item.sequence)
                self.outputs.close(item.sequence, reason)

    def drain(self, max_steps: int = 20_000) -> int:
        """Step until all is done, within bounds: nobody starves."""
        for count in range(max_steps):
            if self.scheduler.is_idle:
                return count
            self.step()
        raise AssertionError(f"not done after {max_steps} steps: {self.scheduler.running}, {self.scheduler.waiting}")

    def check(self, batch: Batch) -> None:
        running = self.scheduler.running
        for sequence in running:
            if sequence.request.number not in self.admitted:
                self.admitted.append(sequence.request.number)
        assert len(running) <= self.sizes.max_num_seqs
        assert batch.num_tokens <= self.sizes.max_num_batched_tokens
        assert [s.key for s in running] == sorted(s.key for s in running)
        assert (np.diff(batch.slots) > 0).all()
        of_slot = {s.slot: s for s in running}
        lengths = self.scheduler.table.lengths[batch.slots]
        for slot, length in zip(batch.slots.tolist(), lengths.tolist(), strict=True):
            assert len(of_slot[slot].pages) == self.cache.pages_for(length + 1)
            assert length + 1 <= batch.max_context
        assert self.scheduler.table.num_sequences == sum(map(self.scheduler.table.holds, running))
        self.check_memory()

    def check_memory(self) -> None:
        """Every page has as many references as holders, every slot one holder, and the counts are right."""
        references = [0] * self.cache.pages.num_pages
        slots = [s.slot for s in self.scheduler.running]
        for sequence in self.scheduler.running:
            for page in sequence.pages:
                references[page] += 1
        cached = []
        if self.cache.tree is not None:
            nodes = [self.cache.tree._root]
            while nodes:
                node = nodes.pop()
                nodes += node.children.values()
                slots += [node.slot] if node.slot is not None else []
                cached += [node.page] if node.page is not None else []
        for page in cached:
            references[page] += 1
        assert references == self.cache.pages.references
        assert self.cache.pages.num_free == references.count(0)
        assert self.cache.pages.num_reclaimable == sum(references[page] == 1 for page in cached)
        assert sorted(slots + self.cache.slots._free) == list(range(self.cache.slots.num_slots))

    def check_results(self) -> None:
        """Nothing is left behind, and every completion has the tokens of a sequence alone (aborted: the first of them)."""
        self.check_memory()
        assert not self.scheduler.running
        assert self.scheduler.table.num_sequences == 0
        assert self.scheduler.num_waiting == 0
        self.cache.forget_prefixes()
        assert self.cache.pages.num_free == self.cache.pages.num_pages
        assert self.cache.slots.num_free == self.cache.slots.num_slots
        for request in self.requests:
            assert sorted(request.completions) == list(range(request.params.n))
            for index, completion in request.completions.items():
                expected = self.model.generate(request.prompt, request.seeds[index], request.max_tokens, request.stop_ids)
                assert completion.logprobs == [float(token) for token in completion.token_ids]
                if completion.finish_reason == "abort":
                    assert completion.token_ids == expected[: len(completion.token_ids)]
                else:
                    assert completion.token_ids == expected
                    is_stopped = completion.token_ids[-1] in request.stop_ids
                    assert completion.finish_reason == ("stop" if is_stopped else "length")


def random_prompt(rng: random.Random, sizes: Sizes) -> list[int]:
    """Often the beginning of an earlier prompt (of one of three families), then something of its own."""
    family = random.Random(rng.randrange(3))
    shared = [family.randrange(VOCABULARY) for _ in range(sizes.max_model_len)]
    cut = rng.randrange(sizes.max_model_len - 1)
    own = [rng.randrange(VOCABULARY) for _ in range(rng.randrange(8))]
    return (shared[:cut] + own)[: sizes.max_model_len - 1] or [1]


def run_random_events(sizes: Sizes, seed: int, num_events: int) -> House:
    rng, house = random.Random(seed), House(sizes)
    for _ in range(num_events):
        event = rng.random()
        if event < 0.25 and house.scheduler.num_waiting < 8:
            house.submit(
                random_prompt(rng, sizes),
                n=rng.choice([1, 1, 2, 3, 7]),
                seed=rng.randrange(2**40),
                max_tokens=rng.choice([1, 3, 12, None]),
                ignore_eos=rng.random() < 0.5,
                stop_token_ids=[rng.randrange(VOCABULARY)] if rng.random() < 0.2 else None,
            )
        elif event < 0.29 and house.requests:
            house.abort(rng.choice(house.requests))
            house.check_memory()
        elif event < 0.295:
            house.scheduler.preempt_all()
            house.check_memory()
        else:
            house.step()
    house.drain()
    house.check_results()
    return house


@pytest.mark.parametrize("num_steps_ahead", [0, 2])
@pytest.mark.parametrize(("has_state", "has_pages"), PARTS.values(), ids=PARTS)
def test_ten_thousand_random_events(has_state, has_pages, num_steps_ahead):
    preemptions = prefix_tokens = 0
    for seed in range(8):
        sizes = Sizes(
            num_pages=12 + 4 * seed,
            max_num_seqs=1 + seed,
            has_state=has_state,
            has_pages=has_pages,
            num_steps_ahead=num_steps_ahead,
            admission_interval=1 + 2 * (seed % 3),
        )
        house = run_random_events(sizes, seed, num_events=10_000 // 8)
        preemptions += house.scheduler.num_preemptions
        prefix_tokens += house.cache.num_prefix_tokens
    assert preemptions > 20
    assert prefix_tokens > 200


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    seed=st.integers(0, 2**30),
    max_num_seqs=st.integers(1, 6),
    extra_tokens=st.integers(1, 40),
    page_size=st.sampled_from([1, 2, 4, 16]),
    num_prefix_slots=st.integers(1, 4),
    extra_pages=st.integers(0, 20),
    keeps_prefixes=st.booleans(),
    parts=st.sampled_from(list(PARTS.values())),
    num_steps_ahead=st.integers(0, 4),
    admission_interval=st.integers(1, 9),
)
def test_any_sizes(
    seed,
    max_num_seqs,
    extra_tokens,
    page_size,
    num_prefix_slots,
    extra_pages,
    keeps_prefixes,
    parts,
    num_steps_ahead,
    admission_interval,
):
    sizes = Sizes(
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=max_num_seqs + extra_tokens,
        page_size=page_size,
        num_prefix_slots=num_prefix_slots,
        num_pages=-(-48 // page_size) + extra_pages,
        keeps_prefixes=keeps_prefixes,
        has_state=parts[0],
        has_pages=parts[1],
        num_steps_ahead=num_steps_ahead,
        admission_interval=admission_interval,
    )
    run_random_events(sizes, seed, num_events=60)


def test_requests_start_in_order_of_arrival():
    house = House(Sizes(max_num_seqs=3, num_pages=12))
    rng = random.Random(0)
    for _ in range(20):
        house.submit(random_prompt(rng, house.sizes), n=rng.choice([1, 4]), seed=1, max_tokens=5)
    house.drain()
    assert house.admitted == sorted(house.admitted)
    house.check_results()


def test_a_long_prompt_is_prefilled_beside_decoding_sequences():
    house = House(Sizes(max_num_seqs=4, max_num_batched_tokens=8, num_pages=40))
    house.submit([1, 2], seed=0, max_tokens=40, ignore_eos=True)
    house.step()
    house.submit(list(range(40)), seed=1, max_tokens=4, ignore_eos=True)
    batches = [house.step() for _ in range(8)]
    mixed = [batch for batch in batches if len(batch.slots) and batch.prefill]
    assert len(mixed) >= 5  # 39 tokens in chunks of at most 7
    house.drain()
    house.check_results()


def test_samples_of_a_prompt_share_one_prefill_and_its_pages():
    house = House(Sizes(max_num_seqs=8, max_num_batched_tokens=64, num_pages=40, keeps_prefixes=False))
    request = house.submit(list(range(18)), n=5, seed=3, max_tokens=6, ignore_eos=True)
    prefilled = 0
    while not house.scheduler.is_idle:
        batch = house.step()
        prefilled += sum(chunk.end - chunk.start for chunk in batch.prefill)
        if batch.starting:
            assert len(batch.starting) == 5
            whole = {tuple(s.pages[:4]) for s in batch.starting}  # 17 tokens: four whole pages and a begun one
            assert len(whole) == 1
            assert len({s.pages[4] for s in batch.starting}) == 5
    assert prefilled == 17
    assert len({tuple(c.token_ids) for c in request.completions.values()}) == 5
    house.check_results()


def test_more_samples_than_places():
    house = House(Sizes(max_num_seqs=3, num_pages=30))
    house.submit(list(range(10)), n=20, seed=3, max_tokens=6)
    later = house.submit([1, 2, 3], seed=4, max_tokens=2)
    house.drain()
    assert later.is_finished
    house.check_results()


def test_samples_that_have_yet_to_fork_keep_their_places():
    """Otherwise every place would be taken by a leader that waits for places."""
    house = House(Sizes(max_num_seqs=4, max_num_batched_tokens=64, num_pages=60, keeps_prefixes=False))
    for seed in range(4):
        house.submit(list(range(10)), n=4, seed=seed, max_tokens=6)
    house.drain()
    assert house.scheduler.num_preemptions == 0
    house.check_results()


def test_the_youngest_gives_way_when_pages_run_out():
    house = House(Sizes(max_num_seqs=4, num_pages=12, keeps_prefixes=False))
    old = house.submit([1] * 8, seed=0, max_tokens=40, ignore_eos=True)
    young = house.submit([2] * 8, seed=1, max_tokens=40, ignore_eos=True)
    while not old.is_finished:
        house.step()
    assert house.scheduler.num_preemptions > 0
    assert not young.is_finished
    house.drain()
    house.check_results()


def test_a_prompt_seen_before_is_found_up_to_its_last_whole_page():
    house = House(Sizes(max_num_batched_tokens=64))
    house.submit(list(range(15)), seed=0, max_tokens=2)
    house.drain()
    house.submit(list(range(15)), seed=1, max_tokens=2)
    house.drain()
    assert house.cache.num_prefix_tokens == 12  # three pages of four of the 14 tokens before the last
    house.check_results()


def test_the_third_prompt_after_a_common_beginning_finds_it():
    """The second shows where prompts part, and leaves its state there."""
    house = House(Sizes(max_num_batched_tokens=64, num_pages=60))
    found = []
    for index in range(3):
        house.submit([*range(8), *([40 + index] * 8)], seed=index, max_tokens=2)
        house.drain()
        found.append(house.cache.num_prefix_tokens)
    assert found == [0, 0, 8]
    house.check_results()


@pytest.mark.parametrize("interval", [1, 4])
def test_a_busy_house_lets_prompts_in_together(interval: int) -> None:
    """Places become free one by one; while only one of eight is, prompts start in steps that lie `interval` apart."""
    house = House(Sizes(max_num_seqs=8, num_pages=90, max_num_batched_tokens=40, admission_interval=interval))
    for index in range(40):
        house.submit([index + 1], max_tokens=20 + 7 * index % 16, ignore_eos=True)
    steps, num_steps = [], 0
    while not house.scheduler.is_idle:
        num_admitted, is_busy = len(house.admitted), len(house.scheduler.running) >= 7
        house.step()
        num_steps += 1
        if len(house.admitted) > num_admitted:
            steps.append((num_steps, is_busy))
    house.check_results()
    gaps = [(step - before, is_busy) for (before, _), (step, is_busy) in itertools.pairwise(steps)]
    assert min(gap for gap, is_busy in gaps if is_busy) == interval
    assert min(gap for gap, _ in gaps) < max(interval, 2)  # at the beginning, and when two are free


@pytest.mark.parametrize(("budget", "expected"), [(36, [5, 8, 11, 14, 16]), (60, [8, 14, 16])])
def test_prompts_that_a_step_has_no_room_for_start_in_the_next(budget: int, expected: list[int]) -> None:
    """Also when only one of eight places is free by then: all are taken in as few steps as the prompts' tokens need."""
    house = House(Sizes(max_num_seqs=16, num_pages=200, max_num_batched_tokens=budget, admission_interval=9))
    for index in range(20):
        house.submit([index + 1] * 11, max_tokens=30, ignore_eos=True)
    found = []
    for _ in expected:
        house.step()
        found.append(len(house.scheduler.running))
    assert found == expected
    house.drain()
    house.check_results()


def test_abort_frees_everything_at_once():
    house = House(Sizes(max_num_seqs=3, keeps_prefixes=False))
    requests = [house.submit(list(range(9)), n=4, seed=i, max_tokens=20) for i in range(3)]
    for _ in range(4):
        house.step()
    for request in requests:
        house.abort(request)
        assert request.is_finished
    assert house.scheduler.is_idle
    assert house.cache.pages.num_free == house.cache.pages.num_pages
    house.check_results()


def test_moves_that_touch_one_another_are_not_done_at_once():
    moves = [Move("slot", 0, 1), Move("slot", 0, 2), Move("slot", 2, 3), Move("slot", 4, 0), Move("reset", -1, 5)]
    assert [len(group) for group in independent_groups(moves)] == [2, 2, 1]


def test_samples_that_part_from_a_prompt_are_two_runs_of_moves():
    forks = [move for i in range(1, 9) for move in (Move("slot", 0, i), Move("page", 0, i))]
    groups = list(independent_groups([*forks, Move("page", 3, 20)]))
    assert [(group[0].kind, len(group)) for group in groups] == [("slot", 8), ("page", 8), ("page", 1)]


def test_a_token_budget_that_starves_prefill_is_refused():
    with pytest.raises(ValueError, match="max_num_batched_tokens"):
        Scheduler(StateCache(4, 8, 4), max_num_seqs=4, max_num_batched_tokens=4)
