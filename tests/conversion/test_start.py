"""The improved start is linear attention with decay, head by head; the fit brings it nearer to attention on unseen text too."""

import math

import pytest
import torch

from m1.conversion.bases import assemble
from m1.conversion.convert import _start_mixers, convert, hybrid_config
from m1.conversion.start import (
    LayerFit,
    Mixer,
    balance,
    fit_mixers,
    improved_options,
    open_mixer,
    relative_errors,
    set_half_lives,
)
from m1.conversion.weights import in_proj_slices, output_order
from m1.modeling import M1Config, M1ForCausalLM, SequenceLayout
from m1.modeling.hybrid import MIXER_CLASSES
from tests.conversion.tiny import tiny_base, vocabulary
from tests.numerics import REL_RMS, rel_rms


def dense_model(family: str = "llama") -> M1ForCausalLM:
    base = tiny_base(family)
    return assemble(M1Config.from_base(base.config), base.state_dict(), source=family)


def opened_mixers(dense: M1ForCausalLM, mixer: str = "mamba1", layers: tuple[int, ...] = (0, 1, 2)) -> dict[int, Mixer]:
    """Mixers as they are before the fit."""
    attention = [layer for layer in range(dense.config.num_hidden_layers) if layer not in layers]
    return _start_mixers(dense, hybrid_config(dense.config, attention, 0.0, mixer, "improved"), "improved", 0)


def documents(count: int, length: int = 60, seed: int = 0) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, len(vocabulary()), (count, length), generator=generator).tolist()


def rotate(x: torch.Tensor, theta: float) -> torch.Tensor:
    """[T, K] float64, the half-rotation written out."""
    half = x.shape[1] // 2
    angles = torch.arange(x.shape[0])[:, None].double() * theta ** (-torch.arange(half).double() / half)
    first, second = x[:, :half], x[:, half:]
    return torch.cat([first * angles.cos() - second * angles.sin(), second * angles.cos() + first * angles.sin()], dim=1)


def naive_output(dense: M1ForCausalLM, x: torch.Tensor, half_lives: torch.Tensor, mixer: str) -> torch.Tensor:
    """Decayed linear attention of layer 0 in float64, head by head: mamba1's narrow head j of R has the pairs j, j + R, …"""
    config, attention = dense.config, dense.model.layers[0].self_attn
    size, heads, groups = config.head_dim, config.num_attention_heads, config.num_key_value_heads
    narrow = size // 16 if mixer == "mamba1" else 1
    q, k, v = (
        torch.nn.functional.linear(x.double(), p.weight.double(), None if p.bias is None else p.bias.double())
        for p in (attention.q_proj, attention.k_proj, attention.v_proj)
    )
    distance = (torch.arange(len(x))[:, None] - torch.arange(len(x))).double()
    out = torch.zeros(len(x), heads * size, dtype=torch.float64)
    for head in range(heads):
        group, member = divmod(head, heads // groups)
        query, key = q[:, head * size :][:, :size], k[:, group * size :][:, :size]
        if config.qk_norm:
            query, key = (
                t / (t.square().mean(1, keepdim=True) + config.rms_norm_eps).sqrt() * norm.weight.double()
                for t, norm in ((query, attention.q_norm), (key, attention.k_norm))
            )
        query, key = (rotate(t, config.rope_parameters["rope_theta"]) for t in (query, key))
        for part in range(narrow):
            pairs = torch.arange(size) % (size // 2) % narrow == part
            values = slice(part * size // narrow, (part + 1) * size // narrow)
            step = math.log(2) / half_lives[(group * narrow + part) * (heads // groups) + member].double()
            scores = query[:, pairs] @ key[:, pairs].T * size**-0.5
            weights = torch.where(distance >= 0, step * torch.exp(-step * distance.clamp_min(0)) * scores, 0.0)
            out[:, head * size + values.start : head * size + values.stop] = weights @ v[:, group * size :][:, values]
    return out @ attention.o_proj.weight.double().T


@pytest.mark.parametrize("mixer", ["mamba1", "mamba2"])
@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
@torch.no_grad()
def test_opened_mixer_is_decayed_linear_attention(family: str, mixer: str) -> None:
    dense = dense_model(family)
    hybrid = convert(dense, attention_layers=[], mixer=mixer, start="improved")
    opened = hybrid.model.layers[0].mixer
    half_lives = torch.linspace(1.5, 40, opened.num_heads)
    set_half_lives(opened, half_lives)
    layout = SequenceLayout.from_lengths([50])
    x = torch.randn(50, dense.config.hidden_size, generator=torch.Generator().manual_seed(3))
    given = opened(x, layout, hybrid.model.rotary(layout.positions))
    assert rel_rms(given, naive_output(dense, x, half_lives, mixer)) < REL_RMS[torch.float32]


@pytest.mark.parametrize("mixer", ["mamba1", "mamba2"])
def test_gradients_reach_what_starts_at_zero(mixer: str) -> None:
    hybrid = convert(dense_model(), attention_layers=[1], mixer=mixer, start="improved")
    assert all(parameter.requires_grad for parameter in hybrid.parameters())
    hybrid(torch.tensor(documents(1)), use_cache=False).logits.square().mean().backward()
    opened = hybrid.model.layers[0].mixer
    step_rows = opened.dt_proj.weight if mixer == "mamba1" else opened.in_proj.weight[-opened.num_heads :]
    assert not step_rows.any()  # constant steps at first
    gradients = {"in_proj": opened.in_proj.weight.grad[: hybrid.config.d_inner], "D": opened.D.grad, "A": opened.A_log.grad}
    gradients["steps"] = opened.dt_proj.weight.grad if mixer == "mamba1" else opened.in_proj.weight.grad[-opened.num_heads :]
    assert all(gradient.abs().max() > 0 for gradient in gradients.values())


@pytest.mark.parametrize("mixer", ["mamba1", "mamba2"])
@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_fit_comes_nearer_also_on_unseen_text(family: str, mixer: str) -> None:
    dense = dense_model(family)
    seen, unseen = documents(40), documents(10, seed=1)
    fits: list[LayerFit] = []
    fitted = convert(dense, attention_layers=[1], mixer=mixer, start="improved", calibration=seen, on_layer=fits.append)
    raw = convert(dense, attention_layers=[1], mixer=mixer, start="improved")
    mixers = [{layer: model.model.layers[layer].mixer for layer in (0, 2)} for model in (raw, fitted)]
    before, after = (relative_errors(dense, each, unseen) for each in mixers)
    assert [fit.layer for fit in fits] == [0, 2]
    assert all(after[layer] < 0.98 * before[layer] for layer in (0, 2)), (before, after)
    assert after[0] < 0.95
    for fit in fits:  # the errors reported are those of documents that were held out, so they hold for others
        assert fit.is_held_out
        assert fit.error_after == pytest.approx(after[fit.layer], rel=0.15)
        assert fit.error_before == pytest.approx(before[fit.layer], rel=0.15)


def test_fit_reports_what_the_mixer_does() -> None:
    dense, seen = dense_model(), documents(3)
    mixers = opened_mixers(dense)
    before = relative_errors(dense, mixers, seen)
    fits = fit_mixers(dense, mixers, seen)
    after = relative_errors(dense, mixers, seen)
    for fit in fits:  # too few documents to hold one out, so they are measured on these
        assert not fit.is_held_out
        assert fit.error_before == pytest.approx(before[fit.layer], rel=1e-4)
        assert fit.error_after == pytest.approx(after[fit.layer], rel=1e-4)


class Pretender(torch.nn.Module):
    """Stands where attention stood, with its o_proj, but its heads are a mixer's, mixed by `mix` [d_inner, d_inner]."""

    def __init__(self, mixer: torch.nn.Module, attention: torch.nn.Module, mix: torch.Tensor) -> None:
        super().__init__()
        self.mixer, self.o_proj, self.mix = mixer, attention.o_proj, mix

    def forward(self, x, layout, rotary, state=None):
        heads = []
        hook = self.mixer.out_proj.register_forward_pre_hook(lambda _, arguments: heads.append(arguments[0]))
        self.mixer(x, layout, rotary)
        hook.remove()
        return self.o_proj(heads[0] @ self.mix)


def fit_to_pretender(half_lives: torch.Tensor, mix: torch.Tensor) -> LayerFit:
    """The fit of layer 0 where attention is replaced by a linear attention that the mixer can imitate."""
    dense = dense_model()
    teacher, student = (opened_mixers(dense, "mamba2")[0] for _ in range(2))
    set_half_lives(teacher, half_lives)
    dense.model.layers[0].self_attn = Pretender(teacher, dense.model.layers[0].self_attn, mix)
    (fit,) = fit_mixers(dense, {0: student}, documents(60))
    return fit


def test_fit_finds_the_half_lives_that_made_the_target() -> None:
    truth = torch.tensor([2.0, 8.0, 32.0, 128.0])
    fit = fit_to_pretender(truth, torch.eye(128))
    assert fit.half_lives == truth.tolist()
    assert fit.error_after < 1e-3


def test_fit_finds_the_projection_that_no_scale_of_heads_gives() -> None:
    mix = torch.eye(128) + torch.randn(128, 128, generator=torch.Generator().manual_seed(4)) / 128**0.5
    fit = fit_to_pretender(torch.full((4,), 8.0), mix)
    assert fit.half_lives == [8.0] * 4
    assert fit.error_after < 0.2  # what the ridge leaves; scales of heads alone leave 0.7


@pytest.mark.parametrize("mixer", ["mamba1", "mamba2"])
@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
@torch.no_grad()
def test_balanced_weights_are_of_one_size_and_compute_the_same(family: str, mixer: str) -> None:
    dense = dense_model(family)
    opened = opened_mixers(dense, mixer)[0]
    config, rows = opened.config, in_proj_slices(opened.config)
    generator = torch.Generator().manual_seed(5)
    heads = torch.rand(config.num_attention_heads, generator=generator).mul(12).sub(10).exp()  # as a fit leaves them
    order = output_order(config)
    opened.out_proj.weight *= heads.repeat_interleave(config.head_dim)[order]
    opened.in_proj.bias.normal_(generator=generator)
    layout = SequenceLayout.from_lengths([30, 20])
    x = torch.randn(50, config.hidden_size, generator=generator)
    rotary = dense.model.rotary(layout.positions)
    before = opened(x, layout, rotary)
    balance(opened)
    assert rel_rms(opened(x, layout, rotary), before) < REL_RMS[torch.float32]
    sizes = {name: opened.in_proj.weight[rows[name]] for name in ("x", "B", "C")}
    sizes["out"] = opened.out_proj.weight[:, order.argsort()].T
    groups = config.num_key_value_heads
    of_groups = {
        name: w.unflatten(0, (groups, -1, config.head_dim)).square().mean((2, 3)).sqrt().log() for name, w in sizes.items()
    }
    if config.qk_norm:  # the norms of B and C take their scale away: only x and out have one
        assert torch.allclose(of_groups["x"].squeeze(1), of_groups["out"].mean(1), atol=1e-4)
        return
    assert torch.allclose(of_groups["C"], of_groups["out"], atol=1e-4)
    for name in ("x", "B"):
        assert torch.allclose(of_groups[name].squeeze(1), of_groups["out"].mean(1), atol=1e-4)


def test_options_of_the_start_are_needed() -> None:
    config = M1Config.from_base(tiny_base().config, mixer_layers=[0])
    with pytest.raises(ValueError, match="mixer_bias"):
        open_mixer(MIXER_CLASSES["mamba1"](config, 0))
    options = improved_options("mamba2") | {"output_norm": True}
    config = M1Config.from_base(tiny_base().config, mixer_layers=[0], mixer="mamba2", **options)
    with pytest.raises(ValueError, match="output_norm"):
        open_mixer(MIXER_CLASSES["mamba2"](config, 0))
