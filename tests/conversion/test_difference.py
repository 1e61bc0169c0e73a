"""A model from its difference to another: what is kept exactly, how much rounding takes, and what is refused."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from m1.conversion import difference
from m1.conversion.convert import convert
from m1.modeling.loading import load_model
from tests.training import tiny


@pytest.fixture(autouse=True)
def _nothing_is_small(monkeypatch):
    monkeypatch.setattr(difference, "SMALL", 256)


@pytest.fixture
def models(tmp_path):
    """A Transformer, and a trained hybrid of it: mixers new, MLPs and norms changed, embeddings and attention as they were."""
    base = tiny.model(attention=(0, 1, 2)).bfloat16()
    hybrid = convert(base, attention_layers=[1], mixer="mamba2", start="improved")
    with torch.no_grad():
        for name, parameter in hybrid.named_parameters():
            if "mlp" in name or "norm" in name:
                parameter += 0.01 * torch.randn_like(parameter)
    base.save_pretrained(tmp_path / "base")
    hybrid.save_pretrained(tmp_path / "hybrid")
    tiny.byte_tokenizer().save_pretrained(tmp_path / "base")
    return tmp_path / "base", tmp_path / "hybrid"


@pytest.mark.parametrize(("bits", "most_lost"), [(8, 0.006), (4, 0.11)])
def test_a_model_comes_back_up_to_rounding(models, tmp_path, bits, most_lost):
    base, hybrid = models
    loss = difference.write_difference(hybrid, base, tmp_path / "difference", bits=bits)
    assert 0 < loss.error_of_changes < most_lost and 0 < loss.error_of_new < 0.006
    again = difference.apply_difference(tmp_path / "difference", base, tmp_path / "again")
    wanted, found = (load_file(path / "model.safetensors") for path in (hybrid, again))
    before = load_file(base / "model.safetensors")
    assert found.keys() == wanted.keys()
    for name, weight in wanted.items():
        is_same = name in before and before[name].shape == weight.shape and torch.equal(before[name], weight)
        if is_same or weight.ndim != 2:
            assert torch.equal(found[name], weight), name
            continue
        change = weight.float() - before[name].float() if "mlp" in name else weight.float()
        # bf16 rounds the sum once more, by up to 1/256 of the weight.
        bound = 1.2 * (most_lost * change.norm() + weight.float().norm() / 256)
        assert (found[name].float() - weight.float()).norm() < bound, name
    assert load_model(again).config.attention_layers == [1]
    assert (again / "tokenizer.json").is_file()


def test_what_is_the_transformers_is_left_out(models, tmp_path):
    base, hybrid = models
    difference.write_difference(hybrid, base, tmp_path / "difference", bits=4)
    kept = load_file(tmp_path / "difference" / difference.WEIGHTS)
    assert not any("self_attn" in name or "embed" in name for name in kept)
    assert any("mixer" in name for name in kept) and any("mlp" in name for name in kept)
    facts = json.loads((tmp_path / "difference" / difference.FACTS).read_text())
    assert facts["loss"]["num_bytes"] == sum(tensor.numel() * tensor.element_size() for tensor in kept.values())


def test_a_tensor_that_was_only_rounded_is_left_out(models, tmp_path):
    base, hybrid = models
    load_model(base).save_pretrained(tmp_path / "exact")
    weights = load_file(tmp_path / "exact" / "model.safetensors")
    save_file({name: tensor * (1 + 2**-12) for name, tensor in weights.items()}, tmp_path / "exact" / "model.safetensors")
    difference.write_difference(hybrid, tmp_path / "exact", tmp_path / "difference")
    assert not any("embed" in name for name in load_file(tmp_path / "difference" / difference.WEIGHTS))


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("columns", [1, 63, 64, 130])
def test_codes_hold_what_a_block_of_neighbours_needs(bits, columns):
    x = torch.randn(5, columns) * torch.logspace(-8, 3, 5)[:, None]
    x[3] = 0
    back = difference.dequantize(**difference.quantize(x, bits), columns=columns, bits=bits)
    most = 2 ** (bits - 1) - 1
    assert back.shape == x.shape and not back[3].any()
    steps = x.abs().amax(1, keepdim=True) / most
    assert ((back - x).abs() <= steps * (0.5 + most / 256) + 1e-30).all()  # half a step, and the scale's own rounding


def test_another_transformer_is_refused(models, tmp_path):
    base, hybrid = models
    difference.write_difference(hybrid, base, tmp_path / "difference")
    other = tiny.model(attention=(0, 1, 2), seed=3).bfloat16()
    other.save_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match="not the model that"):
        difference.apply_difference(tmp_path / "difference", tmp_path / "other", tmp_path / "again")
    with pytest.raises(FileNotFoundError, match="no safetensors"):
        difference.write_difference(hybrid, tmp_path, tmp_path / "x")
    with pytest.raises(FileNotFoundError, match=r"difference\.json"):
        difference.apply_difference(tmp_path / "nothing", base, tmp_path / "again")
    with pytest.raises(ValueError, match="bits: expected 4 or 8"):
        difference.write_difference(hybrid, base, tmp_path / "x", bits=3)
    assert not (tmp_path / "again").exists() and not (tmp_path / "x").exists()


def test_the_command_line(models, tmp_path, capsys):
    base, hybrid = models
    difference.main(["write", str(hybrid), "--base", str(base), "--out", str(tmp_path / "d"), "--bits", "4"])
    assert "rounding took" in capsys.readouterr().out
    difference.main(["apply", str(tmp_path / "d"), "--base", str(base), "--out", str(tmp_path / "m")])
    assert str(tmp_path / "m") in capsys.readouterr().out
