"""States stay on the GPU between rollouts once the others have been seen to leave room for them."""

import pytest
import torch

from m1.engine import SamplingParams
from m1.engine.residency import MARGIN, Residency
from tests.engine.models import random_prompts, tiny_engine, tiny_model

GREEDY = SamplingParams(temperature=0, max_tokens=8)


def test_the_highest_peak_of_the_others_counts() -> None:
    residency = Residency(torch.device("cuda"))
    assert not residency.fits(1, 1000)  # nobody has been seen
    residency.saw(300)
    room = round((1 - MARGIN) * 1000) - 300
    assert residency.fits(room - 1, 1000)
    assert not residency.fits(room, 1000)
    residency.saw(500)
    residency.saw(100)
    assert not residency.fits(room - 1, 1000)
    assert residency.fits(room - 201, 1000)


def test_on_a_cpu_it_sleeps() -> None:
    engine = tiny_engine(tiny_model())
    prompts = random_prompts((5, 9))
    expected = engine.generate(prompts, GREEDY)
    engine.sleep_unless_room()
    assert engine.runner.state is None
    assert engine.runner.num_state_bytes == 0
    assert [c.token_ids for (c,) in engine.generate(prompts, GREEDY)] == [c.token_ids for (c,) in expected]


@pytest.mark.gpu
def test_on_a_gpu_it_stays_from_the_second_time_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """And goes again when others have needed what it holds."""
    engine, prompts = tiny_engine(tiny_model().to("cuda")), random_prompts((5, 9))
    expected = engine.generate(prompts, GREEDY)
    assert engine.runner.num_state_bytes > 0
    for stays in (False, True, True):
        engine.sleep_unless_room()
        assert (engine.runner.state is not None) is stays
        torch.empty(2**20, device="cuda")  # somebody's work
        assert [c.token_ids for (c,) in engine.generate(prompts, GREEDY)] == [c.token_ids for (c,) in expected]
    monkeypatch.setattr("m1.engine.residency.MARGIN", 1.0)
    engine.sleep_unless_room()
    assert engine.runner.state is None
