"""Triton products of few tokens against the torch reference in float64."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from m1.kernels.decode_linear import MAX_TOKENS, decode_linear, decode_linear_parts, decode_swiglu, reference
from tests.kernels.triton_cases import poison_memory
from tests.numerics import REL_RMS, REL_RMS_KERNEL_FP32, rel_rms

pytest.importorskip("triton")
from m1.kernels.decode_linear import triton_impl as kernel
from m1.kernels.decode_linear.triton_bulk import can_copy_in_bulk
from m1.kernels.fp8 import triton_impl as fp8_kernel

TOLERANCE = {torch.float32: REL_RMS_KERNEL_FP32, torch.bfloat16: REL_RMS[torch.bfloat16]}


@pytest.fixture(autouse=True)
def _poisoned_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    poison_memory(monkeypatch)


def make_inputs(
    num_tokens: int, num_outputs: int, width: int, dtype: torch.dtype, device: str
) -> tuple[Tensor, Tensor, Tensor]:
    """x (a part of wider rows), weight, bias."""
    generator = torch.Generator().manual_seed(num_tokens + width)
    x = torch.randn(num_tokens, 2 * width, generator=generator)[:, :width]
    weight = torch.randn(num_outputs, width, generator=generator) / width**0.5
    return *(t.to(device, dtype) for t in (x, weight)), torch.randn(num_outputs, generator=generator).to(device, dtype)


def swiglu_of(gate_and_up: Tensor) -> Tensor:
    gate, up = gate_and_up.chunk(2, dim=-1)
    return F.silu(gate) * up


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("splits", [1, 3])
@pytest.mark.parametrize(("num_tokens", "num_outputs", "width"), [(1, 70, 72), (3, 16, 256), (17, 130, 96), (40, 64, 64)])
def test_products(num_tokens, num_outputs, width, splits, dtype, device):
    """Sizes that fill no tile, splits of which the last is short or has nothing, with and without bias; twice, for the
    counters must be zero again."""
    check_products(num_tokens, num_outputs, width, kernel.ProductConfig(64, 32, splits, num_ahead=128), dtype, device)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("num_tokens", [1, 33, 128])
def test_products_at_model_sizes(num_tokens, dtype):
    check_products(num_tokens, 1030, 3072, None, dtype, "cuda")


@pytest.mark.gpu
@pytest.mark.parametrize("config", [kernel.ProductConfig(64, 64, 5, 4, 3, 512), kernel.ProductConfig(128, 64, 1, 8, 3)])
def test_other_launches(config):
    check_products(33, 1030, 3072, config, torch.bfloat16, "cuda")


@pytest.mark.gpu
@pytest.mark.parametrize("num_tokens", [1, 33, 128])
@pytest.mark.parametrize("splits", [1, 2])
def test_bulk_copies_give_the_same_bits(num_tokens, splits):
    """Of tiles that are not full, of rows that lie apart; alone, as pair and in parts."""
    x, weight, bias = make_inputs(num_tokens, 1030, 3072, torch.bfloat16, "cuda")
    config = kernel.ProductConfig(64, 64, splits, 4, 4, 256)
    in_bulk = config._replace(is_bulk=True)
    assert can_copy_in_bulk(x, weight)
    for own in (None, bias):
        for op in (kernel.decode_linear, kernel.decode_swiglu, kernel.decode_linear_parts):
            for _ in range(2):
                assert torch.equal(op(x, weight, own, in_bulk), op(x, weight, own, config))
    check_products(num_tokens, 1030, 3072, in_bulk, torch.bfloat16, "cuda")


def check_products(num_tokens, num_outputs, width, config, dtype, device):
    x, weight, bias = make_inputs(num_tokens, num_outputs, width, dtype, device)
    for own in (None, bias):
        wide = F.linear(x.double(), weight.double(), None if own is None else own.double())
        for _ in range(2):
            assert rel_rms(kernel.decode_linear(x, weight, own, config), wide) < TOLERANCE[dtype]
            assert rel_rms(kernel.decode_swiglu(x, weight, own, config), swiglu_of(wide)) < TOLERANCE[dtype]
        parts = kernel.decode_linear_parts(x, weight, own, config)
        assert parts.dtype == torch.float32
        assert config is None or len(parts) == config.splits
        assert rel_rms(parts.sum(0), wide) < TOLERANCE[dtype]


def test_products_of_many_rows_come_in_bulk():
    """Those of M1-3B that were measured to be faster so."""
    shapes = {"in": (8384, 3072), "out": (3072, 3072), "down": (3072, 8192), "head": (128256, 3072), "step sizes": (3072, 192)}
    for tokens, expected in (
        (32, set()),
        (64, set()),
        (65, {"in", "out", "down", "head"}),
        (128, {"in", "out", "down", "head"}),
    ):
        found = {name for name, shape in shapes.items() if kernel.choose_config(tokens, *shape, 132, False).is_bulk}
        assert found == expected
        assert kernel.choose_config(tokens, 8192, 3072, 132, True).is_bulk == (tokens > 64)
        in_8_bits = {name for name, shape in shapes.items() if fp8_kernel.choose_config(tokens, *shape, 132, True).is_bulk}
        assert in_8_bits == expected - {"down"}
    assert not kernel.choose_config(128, 8384, 3072, 132, False, 4).is_bulk


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_reference(dtype):
    x, weight, bias = make_inputs(5, 48, 40, dtype, "cpu")
    wide = F.linear(x.double(), weight.double(), bias.double())
    assert rel_rms(decode_linear(x, weight, bias), wide) < REL_RMS[dtype]
    assert rel_rms(decode_swiglu(x, weight, bias), swiglu_of(wide)) < REL_RMS[dtype]
    assert torch.equal(reference.decode_linear(x, weight, None), F.linear(x, weight))
    parts = decode_linear_parts(x, weight, bias)
    assert parts.shape == (1, 5, 48)
    assert parts.dtype == torch.float32
    assert rel_rms(parts[0], wide) < REL_RMS[torch.float32]  # not rounded before they are added up


def test_bad_arguments_are_named():
    x, weight, bias = make_inputs(5, 48, 40, torch.float32, "cpu")
    with pytest.raises(ValueError, match="`x`"):
        decode_linear(x.new_ones(MAX_TOKENS + 1, 40), weight)
    with pytest.raises(ValueError, match="`weight`"):
        decode_linear(x, weight[:, :30])
    with pytest.raises(ValueError, match="`weight`"):
        decode_swiglu(x, weight[:47])
    with pytest.raises(ValueError, match="`bias`"):
        decode_linear(x, weight, bias[:3])


@pytest.mark.gpu
@pytest.mark.parametrize("num_tokens", [1, 32, 128])
def test_model_sizes_in_a_chain(num_tokens):
    """A decoding MLP again and again, each kernel launched before the one ahead has ended: nobody reads too early."""
    x, gate_up, _ = make_inputs(num_tokens, 2 * 8192, 3072, torch.bfloat16, "cuda")
    _, down, _ = make_inputs(num_tokens, 3072, 8192, torch.bfloat16, "cuda")
    config = kernel.ProductConfig(64, 64, 2, num_ahead=256)
    for _ in range(20):
        hidden = kernel.decode_swiglu(x, gate_up, None, config)
        chained = kernel.decode_linear(hidden, down, None, config)
        expected = reference.decode_linear(reference.decode_swiglu(x, gate_up, None), down, None)
        assert rel_rms(chained, expected) < 2 * REL_RMS[torch.bfloat16]
        x = chained / chained.float().square().mean(-1, keepdim=True).sqrt().to(chained.dtype)
