"""Copies in the computing type: the gradients of a cast a layer, to the bit, and masters that nobody notices were away."""

import pytest
import torch

from m1.config import SFTConfig
from m1.training import working_copies
from m1.training.loop import _accumulate
from m1.training.optimizer import select_trainable
from m1.training.packing import pack
from m1.training.sft import SFTStage
from m1.training.working_copies import WorkingCopies
from tests.training import tiny


def gradients_of(model, num_parts, copies=None):
    documents = tiny.documents(9)
    config = SFTConfig(precision="bfloat16")
    stage = SFTStage(model, documents, config)
    size = -(-len(documents) // num_parts)
    batches = [pack(documents[start : start + size]) for start in range(0, len(documents), size)]
    sums, norm = _accumulate(model, stage, batches, config, copies)
    return {name: p.grad for name, p in model.named_parameters()}, sums["loss"], norm


@pytest.mark.parametrize("num_parts", [1, 3])
@pytest.mark.parametrize("mixer", ["mamba1", "mamba2"])
@pytest.mark.parametrize("frozen", [[], ["attention", "embeddings"]])
def test_the_gradients_are_autocasts(mixer, num_parts, frozen, monkeypatch):
    model = tiny.model(mixer, mixer_bias=True, attention_bias=True)
    select_trainable(model, frozen)
    copies = WorkingCopies(model, "bfloat16")
    found = gradients_of(model, num_parts, copies)
    again = gradients_of(model, num_parts, copies)  # in memory that was given back meanwhile
    monkeypatch.setattr(working_copies, "is_divided", lambda model: True)  # no copies
    expected = gradients_of(model, num_parts)
    assert found[1:] == again[1:] == expected[1:]
    for name, gradient in expected[0].items():
        if gradient is None:
            assert found[0][name] is None
            continue
        assert gradient.dtype == found[0][name].dtype == torch.float32
        assert torch.equal(found[0][name], gradient), name
        assert torch.equal(again[0][name], gradient), name


def test_masters_stand_where_they_stood():
    model = tiny.model()
    before = dict(model.named_parameters())
    copies = WorkingCopies(model, "bfloat16")
    with copies.in_place():
        within = dict(model.named_parameters())
        assert within.keys() == before.keys()
        assert within["model.layers.0.mixer.in_proj.weight"].dtype == torch.bfloat16
        assert within["model.layers.0.mixer.dt_proj.bias"].dtype == torch.float32
        assert within["model.embed_tokens.weight"] is before["model.embed_tokens.weight"]
    with pytest.raises(ZeroDivisionError), copies.in_place():
        1 / 0  # noqa: B018
    after = dict(model.named_parameters())
    assert all(after[name] is parameter for name, parameter in before.items())
    assert copies._memory.nbytes() == 0
    with WorkingCopies(model, "float32").in_place():
        assert all(parameter.dtype == torch.float32 for parameter in model.parameters())
