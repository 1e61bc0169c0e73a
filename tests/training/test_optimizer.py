"""Groups, frozen sets, schedule and clipping."""

import itertools

import pytest
import torch

from m1.config import TrainConfig
from m1.training.optimizer import (
    build_optimizer,
    clip_gradients,
    group_of,
    is_decayed,
    learning_rate_factor,
    select_trainable,
    set_learning_rates,
    squared_gradient_norm,
)
from tests.training import tiny


def test_every_parameter_has_its_group():
    names = [name for name, _ in tiny.model(tie_word_embeddings=False, qk_norm=True).named_parameters()]
    groups = {name.removeprefix("model."): group_of(name) for name in names}
    assert groups["embed_tokens.weight"] == groups["lm_head.weight"] == "embeddings"
    assert groups["layers.0.mixer.A_log"] == groups["layers.0.mixer.q_norm.weight"] == "mixers"
    assert groups["layers.1.self_attn.q_proj.weight"] == groups["layers.1.self_attn.k_norm.weight"] == "attention"
    assert groups["layers.0.mlp.down_proj.weight"] == "mlp"
    assert groups["norm.weight"] == groups["layers.0.input_layernorm.weight"] == "norms"
    assert groups["layers.1.post_attention_layernorm.weight"] == "norms"


@pytest.mark.parametrize("mixer", ["mamba1", "mamba2"])
def test_decay_is_on_matrices_only(mixer):
    model = tiny.model(mixer, mixer_bias=True)
    decayed = {name.rsplit("layers.", 1)[-1] for name, p in model.named_parameters() if is_decayed(name, p)}
    assert {"0.mixer.in_proj.weight", "0.mixer.conv1d.weight", "1.self_attn.o_proj.weight", "1.mlp.up_proj.weight"} <= decayed
    assert not [name for name in decayed if name.endswith(("bias", "A_log", "D", "norm.weight")) or "embed" in name]


def test_groups_have_their_rates_and_frozen_ones_are_absent():
    model = tiny.model()
    select_trainable(model, ["attention", "embeddings"])
    config = TrainConfig(learning_rate=1e-3, mixer_learning_rate=5e-3, weight_decay=0.1)
    optimizer = build_optimizer(model, config)
    seen = {}
    for group in optimizer.param_groups:
        for name, parameter in zip(group["names"], group["params"], strict=True):
            assert parameter is model.get_parameter(name)
            assert group["peak_lr"] == (5e-3 if ".mixer." in name else 1e-3)
            assert group["weight_decay"] == (0.1 if is_decayed(name, parameter) else 0.0)
            seen[name] = group_of(name)
    assert set(seen.values()) == {"mixers", "mlp", "norms"}
    assert len(seen) == sum(p.requires_grad for p in model.parameters())
    select_trainable(model, [])
    assert all(p.requires_grad for p in model.parameters())


def test_every_group_can_have_its_own_rate():
    """The mixers' own goes before mixer_learning_rate; what is not named has learning_rate."""
    named = {"mixers": 3e-3, "attention": 2e-6, "embeddings": 1e-6}
    config = TrainConfig(learning_rate=1e-3, mixer_learning_rate=5e-3, learning_rates=named, warmup_steps=0)
    optimizer = build_optimizer(tiny.model(), config)
    rates = {group_of(name): group["peak_lr"] for group in optimizer.param_groups for name in group["names"]}
    assert rates == named | {"mlp": 1e-3, "norms": 1e-3}
    logged = {"lr": 1e-3, "lr_mixers": 3e-3, "lr_attention": 2e-6, "lr_embeddings": 1e-6}
    assert set_learning_rates(optimizer, 0, config) == pytest.approx(logged)


def test_mistakes_are_named():
    model = tiny.model()
    with pytest.raises(ValueError, match=r"learning_rates: expected rates of some of mixers, .* got one of 'heads'"):
        build_optimizer(model, TrainConfig(learning_rates={"heads": 1e-3}))
    with pytest.raises(ValueError, match="frozen: expected some of mixers"):
        select_trainable(model, ["heads"])
    with pytest.raises(ValueError, match="leaves no parameter"):
        select_trainable(model, ["mixers", "attention", "mlp", "norms", "embeddings"])
    select_trainable(model, [])
    with pytest.raises(ValueError, match=r"must be float32, .* is torch\.bfloat16"):
        build_optimizer(model.to(torch.bfloat16), TrainConfig())


def test_schedule():
    config = TrainConfig(steps=110, warmup_steps=10, min_learning_rate_ratio=0.1)
    factors = [learning_rate_factor(step, config) for step in range(112)]
    assert factors[:10] == pytest.approx([(i + 1) / 10 for i in range(10)])
    assert factors[10] == pytest.approx(1.0)
    assert factors[60] == pytest.approx(0.55)
    assert factors[110] == factors[111] == pytest.approx(0.1)
    assert all(a > b for a, b in itertools.pairwise(factors[10:111]))
    assert learning_rate_factor(0, TrainConfig(steps=1, warmup_steps=0)) == 1.0


def test_rates_are_set_for_the_step():
    config = TrainConfig(steps=20, warmup_steps=4, learning_rate=1e-3, mixer_learning_rate=4e-3)
    optimizer = build_optimizer(tiny.model(), config)
    assert set_learning_rates(optimizer, 1, config) == pytest.approx({"lr": 5e-4, "lr_mixers": 2e-3})
    for group in optimizer.param_groups:
        assert group["lr"] == pytest.approx(2e-3 if ".mixer." in group["names"][0] else 5e-4)


def test_clipping_by_global_norm():
    parameters = [torch.randn(7, 5, requires_grad=True), torch.randn(3, requires_grad=True), torch.randn(2)]
    for parameter in parameters[:2]:
        parameter.grad = torch.randn_like(parameter)
    before = [parameter.grad.clone() for parameter in parameters[:2]]
    norm = squared_gradient_norm(parameters).item() ** 0.5
    assert norm == pytest.approx(torch.cat([g.flatten() for g in before]).norm().item())
    clip_gradients(parameters, norm, max_norm=norm * 2)
    assert torch.equal(parameters[0].grad, before[0])
    clip_gradients(parameters, norm, max_norm=norm / 2)
    assert squared_gradient_norm(parameters).item() ** 0.5 == pytest.approx(norm / 2, rel=1e-5)
    torch.testing.assert_close(parameters[1].grad, before[1] / 2, rtol=1e-5, atol=0)
