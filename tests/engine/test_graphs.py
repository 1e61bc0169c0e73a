"""Decode steps padded to a graph's size: real rows get what they get alone, nothing else is touched; graph equals eager."""

import copy

import pytest
import torch

from m1.engine import Engine, SamplingParams
from m1.engine.graphs import PATIENCE, DecodeGraphs, Key, batch_sizes, next_of, table_widths
from m1.engine.runner import ModelRunner
from tests.engine.models import VARIANTS, random_prompts, tiny_engine, tiny_model
from tests.numerics import ENGINE_LOGPROBS, REL_RMS, rel_rms

LENGTHS = (1, 3, 9, 17, 22)
PARAMS = [
    SamplingParams(seed=i, temperature=t, top_p=0.9, max_tokens=30, ignore_eos=True) for i, t in enumerate([0, 1, 1, 2, 1])
]


def engine_under_way(variant: str, device: str = "cpu", **options: object) -> Engine:
    """An engine whose five sequences have decoded a few tokens, and have pages for more."""
    engine = tiny_engine(tiny_model(variant).to(device), max_num_batched_tokens=128, page_size=64, **options)
    for prompt, params in zip(random_prompts(LENGTHS), PARAMS, strict=True):
        engine.submit(prompt, params)
    for _ in range(5):
        engine.step()
    assert engine.scheduler.table.num_sequences == 5
    return engine


def copy_of(runner: ModelRunner) -> ModelRunner:
    """The same rows, states and pages once more, of the same model."""
    return copy.deepcopy(runner, {id(runner.model): runner.model, id(runner._graphs): None})


def decode(runner: ModelRunner, slots, width: int) -> tuple[torch.Tensor, ...]:
    with torch.inference_mode():
        return runner.decode(torch.as_tensor(slots, device=runner.device), width, 3)


def states_of(runner: ModelRunner) -> list[torch.Tensor]:
    return [*runner.state.slot_stacks, *runner.state.page_stacks]


@pytest.mark.parametrize("variant", VARIANTS)
def test_padding_touches_nothing_but_scratch(variant):
    engine = engine_under_way(variant)
    slots = engine.scheduler.table.active_slots()
    plain, padded, before = copy_of(engine.runner), copy_of(engine.runner), copy_of(engine.runner)
    rows = padded.pad(slots, 8)
    assert rows.tolist() == [*slots.tolist(), *[padded.scratch_slot] * 3]
    for _ in range(6):  # scratch rows stay where they are, however long it goes on
        expected, results = decode(plain, slots, plain.max_width), decode(padded, rows, padded.max_width)
        assert results[0][:5].tolist() == expected[0].tolist()
        torch.testing.assert_close(results[1][:5], expected[1], atol=ENGINE_LOGPROBS, rtol=0)
        assert results[3][:5].tolist() == expected[3].tolist()
    assert torch.equal(padded._integers[:, slots], plain._integers[:, slots])
    assert padded._integers[1, padded.scratch_slot] == 0
    scratch = [padded.scratch_slot] * 2 + [padded.scratch_page] * 2
    for mine, other, old, place in zip(*map(states_of, (padded, plain, before)), scratch, strict=True):
        if old.numel() == 0:
            continue
        assert rel_rms(mine[:, :place], other[:, :place]) < REL_RMS[torch.float32]
        assert not torch.equal(mine[:, :place], old[:, :place])
        assert torch.equal(other[:, place:], old[:, place:])  # the unpadded step knows no scratch
        untouched = (other == old).flatten(2).all(-1)[:, :place]  # other slots and pages
        assert torch.equal((mine == old).flatten(2).all(-1)[:, :place], untouched)
        assert untouched.any()


def test_sizes_waste_little():
    for largest in (1, 2, 3, 40, 512, 1000, 1088):
        sizes = batch_sizes(largest)
        assert sizes == sorted(set(sizes))
        assert sizes[-1] == largest
        for count in range(1, largest + 1):
            assert count <= next_of(sizes, count) <= max(2 * count, count + 31 if count <= 512 else count + 63)
    assert table_widths(16) == [16]
    assert table_widths(1000) == [16, 64, 256, 1000]


def test_a_size_that_is_passed_by_runs_in_a_larger_graph():
    """In the smallest that has room, if that is not more than twice too large, until it has come often."""
    graphs = DecodeGraphs(600, 100, 600, torch.device("cpu"))
    assert graphs.choose(40, 3, 0) == Key(64, 16, 0)
    graphs._captured = dict.fromkeys([Key(128, 16, 0), Key(128, 64, 0), Key(96, 100, 0), Key(512, 16, 20)], (None, ()))
    assert graphs.choose(120, 16, 0) == Key(128, 16, 0)
    assert graphs.choose(70, 16, 0) == Key(96, 100, 0)
    assert graphs.choose(90, 30, 0) == Key(96, 100, 0)
    assert graphs.choose(100, 30, 0) == Key(128, 64, 0)
    assert graphs.choose(20, 16, 0) == Key(32, 16, 0)  # 96 are too many
    assert graphs.choose(200, 16, 0) == Key(256, 16, 0)  # rather than 224
    assert graphs.choose(580, 16, 0) == Key(600, 16, 0)  # the largest
    assert graphs.choose(400, 16, 20) == Key(512, 16, 20)
    assert graphs.choose(120, 16, 20) == Key(128, 16, 20)
    assert [graphs.choose(70, 16, 0) for _ in range(PATIENCE)] == [Key(96, 100, 0)] * (PATIENCE - 1) + [Key(96, 16, 0)]


def test_an_engine_that_has_filled_and_drained_meets_no_new_sizes():
    graphs = DecodeGraphs(1000, 100, 1000, torch.device("cpu"))
    way = [*range(31, 1000, 31), *range(1000, 0, -16)]
    for count in way:
        graphs._captured.setdefault(graphs.choose(count, 3, 0), (None, ()))
    assert sorted(key.size for key in graphs._captured) == [8, 32, 64, 128, 256, 512, 1000]
    assert all(graphs.choose(count + 5, 3, 0) in graphs._captured for count in way if 10 < count < 990)


def test_all_powers_of_two_can_be_captured_ahead(monkeypatch):
    graphs = DecodeGraphs(100, 40, 100, torch.device("cpu"))
    monkeypatch.setattr(graphs, "_capture", lambda decode, key: (key, ()))
    graphs.capture_ahead(lambda *arguments: ())
    assert sorted(graphs._captured) == [Key(size, width, 0) for size in (1, 2, 4, 8, 16, 32, 64, 100) for width in (16, 40)]
    assert all(graphs.choose(count, width, 0) in graphs._captured for count in range(1, 101) for width in (1, 16, 40))


@pytest.mark.gpu
def test_nothing_is_captured_after_a_warm_up():
    engine = tiny_engine(tiny_model().to("cuda"), max_num_seqs=5)
    engine.warm_up()
    num_captured = engine.runner._graphs.num_captured
    prompts, params = random_prompts((1, 5, 9, 17, 22, 30, 3)), SamplingParams(temperature=0, max_tokens=10)
    found = engine.generate(prompts, params)
    assert engine.runner._graphs.num_captured == num_captured > 3
    expected = tiny_engine(tiny_model()).generate(prompts, params)
    assert [c.token_ids for (c,) in found] == [c.token_ids for (c,) in expected]


@pytest.mark.gpu
@pytest.mark.parametrize("variant", VARIANTS)
def test_a_graph_is_its_eager_step(variant):
    """Bit for bit, at the same padded batch, several steps on."""
    engine = engine_under_way(variant, "cuda", enforce_eager=True)
    eager, captured = copy_of(engine.runner), copy_of(engine.runner)
    captured._uses_graphs = True
    graphs = captured._current_graphs()
    key = Key(next_of(graphs.sizes, 5), eager.max_width, 3)
    slots = torch.as_tensor(eager.pad(engine.scheduler.table.active_slots(), key.size), device="cuda")
    with torch.inference_mode():
        for _ in range(4):
            expected = [t.clone() for t in eager.decode(slots, key.width, 3)]
            for mine, other in zip(graphs.run(captured.decode, key, slots), expected, strict=True):
                assert torch.equal(mine[:5], other[:5])
    assert graphs.num_captured == 1
    for mine, other in zip(states_of(captured), states_of(eager), strict=True):
        assert torch.equal(mine[:, :-1], other[:, :-1])


@pytest.mark.gpu
@pytest.mark.parametrize("variant", VARIANTS)
def test_the_engine_with_graphs_is_the_engine_without(variant, monkeypatch):
    """Sequences come and go, prompts are prefilled beside them, states are freed and taken again; greedy: the CPU's tokens."""
    prompts = random_prompts((1, 5, 9, 17, 22, 30, 3, 8, 12, 40))
    params = [SamplingParams(seed=i, temperature=i % 3, max_tokens=10 + 2 * i) for i in range(10)]
    outputs = []
    for options in ({}, {"num_steps_ahead": 0}, {"enforce_eager": True}):
        monkeypatch.setattr("m1.engine.graphs.PATIENCE", 3)
        engine = tiny_engine(tiny_model(variant).to("cuda"), **options)
        outputs.append(engine.generate(prompts, params))
        engine.sleep()
        assert [c.token_ids for (c,) in engine.generate(prompts, params)] == [c.token_ids for (c,) in outputs[-1]]
    on_cpu = tiny_engine(tiny_model(variant)).generate(prompts, params)
    for rows in zip(*outputs, strict=True):
        assert len({tuple(c.token_ids) for (c,) in rows}) == 1
    for (mine,), (other,), own in zip(outputs[0], on_cpu, params, strict=True):
        assert own.temperature or mine.token_ids == other.token_ids


@pytest.mark.gpu
@pytest.mark.parametrize("variant", VARIANTS)
def test_launching_a_step_never_waits_for_the_gpu(variant):
    """Neither decoding nor prefill, nor moves of states and pages: torch raises where one would. (In fp32 prefill's attention
    is the reference, which reads lengths.)"""
    engine = tiny_engine(tiny_model(variant).to("cuda", torch.bfloat16), enforce_eager=True, num_slots=10, num_pages=32)
    launch = engine.runner.launch

    def launch_watched(batch):
        torch.cuda.set_sync_debug_mode("error")
        try:
            return launch(batch)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    prompts = random_prompts((30, 5, 9, 17, 22, 30, 3, 8, 12, 40))
    params = [SamplingParams(n=1 + i % 3, seed=i, temperature=1.0, top_p=0.9, max_tokens=20, logprobs=i % 2) for i in range(10)]
    engine.generate(prompts, params)  # kernels are compiled, constants are on the device
    engine.runner.launch = launch_watched
    engine.generate(prompts, params)
    assert engine.metrics.num_preemptions > 10 or variant == "mamba1-only"


@pytest.mark.gpu
def test_graphs_follow_weights(monkeypatch):
    """Changed in place they are read as they are; moved, the graphs are made anew."""
    monkeypatch.setattr("m1.engine.graphs.PATIENCE", 0)
    model = tiny_model().to("cuda")
    engine, params = tiny_engine(model), SamplingParams(temperature=0, max_tokens=10)
    prompts = random_prompts((4, 9))
    engine.generate(prompts, params)
    for is_moved in (False, True):
        with torch.no_grad():
            for parameter in model.parameters():
                changed = parameter * 1.5
                if is_moved:
                    parameter.data = changed
                else:
                    parameter.copy_(changed)
        engine.update_weights()
        expected = tiny_engine(model, enforce_eager=True).generate(prompts, params)
        assert [c.token_ids for (c,) in engine.generate(prompts, params)] == [c.token_ids for (c,) in expected]
