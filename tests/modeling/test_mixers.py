"""The mixers alone: a GPU agrees with a CPU (kernels, padded projection), prefill and steps with the plain forward."""

import copy

import pytest
import torch
from torch import Tensor, nn

from m1.modeling import M1Config, SequenceLayout
from m1.modeling.aligned_linear import AlignedLinear
from m1.modeling.configuration import LINEAR_ATTENTION
from m1.modeling.hybrid import MIXER_CLASSES
from m1.modeling.rotary import RotaryEmbedding
from m1.modeling.state import ModelState
from tests.numerics import REL_RMS, REL_RMS_KERNEL_FP32, rel_rms

VARIANTS = {
    "mamba1": {"mixer": "mamba1"},
    "mamba1, biases": {"mixer": "mamba1", "conv_activation": None, "mixer_bias": True},
    "mamba1, rope and norms": {"mixer": "mamba1", "mixer_rope": True, "qk_norm": True},
    "mamba2": {"mixer": "mamba2"},
    "mamba2, gate alone": {"mixer": "mamba2", "output_norm": False, "conv_activation": None, "mixer_bias": True},
    "mamba2, rope and norms": {"mixer": "mamba2", "mixer_rope": True, "qk_norm": True},
}


def make_mixer(**options: object) -> nn.Module:
    """9 heads: the rows of in_proj are an odd number of elements long."""
    torch.manual_seed(0)
    config = M1Config(
        hidden_size=144,
        num_attention_heads=9,
        num_key_value_heads=3,
        num_hidden_layers=1,
        layer_types=[LINEAR_ATTENTION],
        **options,
    )
    return MIXER_CLASSES[config.mixer](config, 0)


def run(mixer: nn.Module, x: Tensor, lengths: list[int], upstream: Tensor) -> dict[str, Tensor]:
    """Output and gradients of packed documents."""
    device = x.device
    layout = SequenceLayout.from_lengths(lengths, device)
    x = x.detach().requires_grad_()
    y = mixer(x, layout, RotaryEmbedding(mixer.config)(layout.positions))
    names = ["x", *(name for name, _ in mixer.named_parameters())]
    gradients = torch.autograd.grad(y, [x, *mixer.parameters()], upstream.to(device))
    return {"y": y.detach(), **dict(zip(names, gradients, strict=True))}


@pytest.mark.parametrize("options", VARIANTS.values(), ids=VARIANTS)
def test_padding_rows_changes_nothing(options: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    mixer, lengths = make_mixer(**options), [20, 1, 9]
    x, upstream = torch.randn(30, 144), torch.randn(30, 144)
    expected = run(mixer, x, lengths, upstream)
    padded_rows = []
    monkeypatch.setattr(AlignedLinear, "is_padding", staticmethod(lambda x: padded_rows.append(len(x)) or True))
    actual = run(mixer, x, lengths, upstream)
    assert padded_rows == [30]
    errors = {name: rel_rms(actual[name], tensor) for name, tensor in expected.items()}
    assert all(error < REL_RMS[torch.float32] for error in errors.values()), errors


@pytest.mark.gpu
@pytest.mark.parametrize("options", VARIANTS.values(), ids=VARIANTS)
def test_training_on_a_gpu_equals_a_cpu(options: dict) -> None:
    mixer, lengths = make_mixer(**options), [300, 1, 70]
    x, upstream = torch.randn(371, 144), torch.randn(371, 144)
    expected = run(mixer, x, lengths, upstream)
    actual = run(copy.deepcopy(mixer).cuda(), x.cuda(), lengths, upstream)
    errors = {name: rel_rms(actual[name].cpu(), tensor) for name, tensor in expected.items()}
    assert all(error < REL_RMS_KERNEL_FP32 for error in errors.values()), errors


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("options", VARIANTS.values(), ids=VARIANTS)
def test_prefill_and_steps_equal_the_plain_forward(options: dict, device: str) -> None:
    """Two sequences in slots 2 and 0: 20 and 7 tokens at once, then three steps of one token each."""
    mixer = make_mixer(**options).to(device)
    rotary, slots = RotaryEmbedding(mixer.config), torch.tensor([2, 0], device=device)
    texts = [torch.randn(23, 144, device=device), torch.randn(10, 144, device=device)]
    state = ModelState(mixer.config, 3, 0, device=device)
    with torch.no_grad():
        whole = []
        for text in texts:
            layout = SequenceLayout.from_lengths([len(text)], device)
            whole.append(mixer(text, layout, rotary(layout.positions)))
        prompts = SequenceLayout.from_lengths([20, 7], device)
        prompts = SequenceLayout(prompts.cu_seqlens, prompts.positions, 20, slots)
        got = [mixer(torch.cat([texts[0][:20], texts[1][:7]]), prompts, rotary(prompts.positions), state)]
        for step in range(3):
            positions = torch.tensor([20 + step, 7 + step], device=device)
            layout = SequenceLayout(torch.arange(3, dtype=torch.int32, device=device), positions, 1, slots, has_context=True)
            rows = torch.stack([texts[0][20 + step], texts[1][7 + step]])
            got.append(mixer(rows, layout, rotary(positions), state))
    expected = torch.cat([whole[0][:20], whole[1][:7], *(torch.stack([whole[0][20 + i], whole[1][7 + i]]) for i in range(3))])
    assert rel_rms(torch.cat(got), expected) < REL_RMS_KERNEL_FP32
