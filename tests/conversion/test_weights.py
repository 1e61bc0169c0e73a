"""Attention's weights land where the mixer reads them; what attention has no word for stays fresh; inputs stay as they were."""

import pytest
import torch

from m1.conversion.weights import attention_to_mixer, hybrid_weights, in_proj_slices, layer_weights, output_order
from m1.modeling import M1Config
from m1.modeling.hybrid import MIXER_CLASSES
from tests.conversion.tiny import tiny_base

BASES = {
    "llama": ("llama", {}),
    "llama-bias": ("llama", {"attention_bias": True}),
    "qwen2": ("qwen2", {}),
    "qwen3": ("qwen3", {}),
}


def converted(family: str, options: dict, mixer: str, **mixer_options) -> tuple[dict, dict, dict, M1Config]:
    """(attention's weights, a fresh mixer's, what became of them, config) of layer 1."""
    base = tiny_base(family, **options)
    dense = M1Config.from_base(base.config)
    mixer_options = {"mixer_bias": dense.attention_bias, **mixer_options}
    config = M1Config.from_base(base.config, mixer_layers=[1], mixer=mixer, **mixer_options)
    attention = layer_weights(base.state_dict(), 1, "self_attn")
    fresh = MIXER_CLASSES[mixer](config, 1).state_dict()
    return attention, fresh, attention_to_mixer(attention, fresh, config), config


@pytest.mark.parametrize("mixer", ["mamba1", "mamba2"])
@pytest.mark.parametrize(("family", "options"), BASES.values(), ids=BASES)
def test_projections_land_in_their_rows(family: str, options: dict, mixer: str) -> None:
    attention, fresh, state, config = converted(family, options, mixer)
    inner, grouped = config.d_inner, config.d_xb
    weight = state["in_proj.weight"]
    assert torch.equal(weight[inner : inner + grouped], attention["v_proj.weight"])
    assert torch.equal(weight[inner + grouped : inner + 2 * grouped], attention["k_proj.weight"])
    assert torch.equal(weight[inner + 2 * grouped : 2 * inner + 2 * grouped], attention["q_proj.weight"])
    for rows in (slice(0, inner), slice(2 * inner + 2 * grouped, None)):  # z and dt
        assert torch.equal(weight[rows], fresh["in_proj.weight"][rows])
    assert torch.equal(state["out_proj.weight"], attention["o_proj.weight"])
    for source, target in {
        "q_norm.weight": "q_norm.weight",
        "k_norm.weight": "k_norm.weight",
        "o_proj.bias": "out_proj.bias",
    }.items():
        assert (source in attention) == (target in state)
        if source in attention:
            assert torch.equal(state[target], attention[source])
    taken = {"in_proj.weight", "in_proj.bias", "out_proj.weight", "out_proj.bias", "q_norm.weight", "k_norm.weight"}
    assert state.keys() == fresh.keys()
    for name in fresh.keys() - taken:
        assert torch.equal(state[name], fresh[name]), name


@pytest.mark.parametrize("mixer", ["mamba1", "mamba2"])
def test_biases_land_beside_their_weights(mixer: str) -> None:
    attention, _, state, config = converted("qwen2", {}, mixer)
    rows, bias = in_proj_slices(config), state["in_proj.bias"]
    for name, source in {"x": "v_proj", "B": "k_proj", "C": "q_proj"}.items():
        assert torch.equal(bias[rows[name]], attention[f"{source}.bias"])
    assert not bias[rows["z"]].any()
    assert not bias[rows["dt"]].any()
    with pytest.raises(ValueError, match="mixer_bias"):
        converted("qwen2", {}, mixer, mixer_bias=False)


def test_inputs_are_left_alone() -> None:
    attention, fresh, state, _ = converted("qwen2", {}, "mamba1")
    before = {name: tensor.clone() for name, tensor in (attention | fresh).items()}
    for tensor in state.values():
        tensor.mul_(2).add_(1)
    assert all(torch.equal(tensor, before[name]) for name, tensor in (attention | fresh).items())


def test_rotated_narrow_heads_keep_their_columns() -> None:
    attention, _, state, config = converted("llama", {}, "mamba1", mixer_rope=True)
    order = output_order(config)
    assert sorted(order.tolist()) == list(range(config.d_inner))
    # Heads in groups of two, two narrow heads each: after head 0's first half comes head 1's first half, then the second ones.
    assert order[::16].tolist() == [0, 32, 16, 48, 64, 96, 80, 112]
    assert torch.equal(state["out_proj.weight"][:, 16:32], attention["o_proj.weight"][:, 32:48])


def test_the_rest_keeps_its_names() -> None:
    base = tiny_base().state_dict()
    state = hybrid_weights(base, {1: {"D": torch.ones(3)}})
    gone = {name for name in base if name.startswith("model.layers.1.self_attn.")}
    assert len(gone) == 4
    assert state.keys() == (base.keys() - gone) | {"model.layers.1.mixer.D"}
    assert all(state[name] is base[name] for name in base.keys() - gone)


def test_layer_one_is_not_layer_eleven() -> None:
    state = {"model.layers.1.self_attn.a": torch.ones(1), "model.layers.11.self_attn.a": torch.zeros(1)}
    assert layer_weights(state, 1, "self_attn") == {"a": state["model.layers.1.self_attn.a"]}
    assert "model.layers.11.self_attn.a" in hybrid_weights(state, {1: {}})
