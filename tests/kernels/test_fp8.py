"""8-bit quantisation and products: the torch reference against float64, and the Triton kernels against the reference."""

import importlib
from types import ModuleType

import pytest
import torch
from torch import Tensor

from m1.kernels import (
    fp8_linear,
    fp8_linear_parts,
    quantize_fp8,
    rms_norm,
    rms_norm_fp8,
    rms_norm_fp8_of_parts,
    rms_norm_of_parts,
    swiglu,
    swiglu_fp8,
)
from m1.kernels.decode_linear import MAX_TOKENS
from m1.kernels.fp8 import reference
from tests.kernels.triton_cases import poison_memory
from tests.numerics import FP8_QUANTIZED, REL_RMS, REL_RMS_KERNEL_FP32, rel_rms

FP8 = torch.float8_e4m3fn


@pytest.fixture(autouse=True)
def _poisoned_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    poison_memory(monkeypatch)


@pytest.fixture
def kernel() -> ModuleType:
    pytest.importorskip("triton")
    return importlib.import_module("m1.kernels.fp8.triton_impl")


def meaning(values: Tensor, scale: Tensor) -> Tensor:
    return values.double() * scale.double()


def random_rows(num_rows: int, width: int, dtype: torch.dtype = torch.bfloat16, device: str = "cpu", seed: int = 0) -> Tensor:
    """Rows of very different sizes, not contiguous."""
    generator = torch.Generator().manual_seed(seed)
    sizes = 10.0 ** torch.linspace(-4, 3, num_rows)[:, None]
    return (torch.randn(num_rows, 2 * width, generator=generator) * sizes).to(dtype).to(device)[:, :width]


def quantized_pair(num_tokens: int, width: int, num_outputs: int, device: str = "cpu") -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x, x_scale, weight, weight_scale."""
    x = random_rows(num_tokens, width, device=device)
    weight = random_rows(num_outputs, width, device=device, seed=1)
    return *reference.quantize_fp8(x), *reference.quantize_fp8(weight)


def test_a_row_uses_the_whole_range_and_is_close() -> None:
    x = random_rows(5, 48)
    values, scale = quantize_fp8(x)
    assert values.dtype == FP8
    assert scale.shape == (5, 1)
    assert (values.float().abs().amax(1) == 448).all()
    for row, approximation in zip(x, meaning(values, scale), strict=True):  # each row by itself: small ones lose nothing
        assert rel_rms(approximation, row) < FP8_QUANTIZED
    zeros, scale = quantize_fp8(torch.zeros(2, 16))
    assert (meaning(zeros, scale) == 0).all()


def test_the_fused_forms_quantize_what_the_plain_ops_give() -> None:
    x, residual = random_rows(5, 48), random_rows(5, 48, seed=2)
    weight = 1 + 0.3 * torch.randn(48)
    for more in ((), (residual,)):
        values, scale, *rest = rms_norm_fp8(x, weight, 1e-5, *more)
        normed = rms_norm(x, weight, 1e-5, *more)
        if more:
            normed, summed = normed
            assert torch.equal(rest[0], summed)
        expected = reference.quantize_fp8(normed)
        assert torch.equal(values.float(), expected[0].float())
        assert torch.equal(scale, expected[1])
    gate, up = random_rows(3, 64).chunk(2, 1)
    assert rel_rms(meaning(*swiglu_fp8(gate, up)), swiglu(gate.double(), up.double())) < FP8_QUANTIZED


@pytest.mark.parametrize("has_bias", [False, True])
def test_product_of_what_the_numbers_stand_for(has_bias: bool) -> None:
    x, x_scale, weight, weight_scale = quantized_pair(5, 48, 32)
    bias = torch.randn(32) if has_bias else None
    expected = meaning(x, x_scale) @ meaning(weight, weight_scale).t()
    if bias is not None:
        expected += bias.double()
    y = fp8_linear(x, x_scale, weight, weight_scale, bias, torch.float32)
    assert rel_rms(y, expected) < REL_RMS[torch.float32]
    assert torch.equal(fp8_linear_parts(x, x_scale, weight, weight_scale, bias).sum(0), y)
    with pytest.raises(ValueError, match="`x` must be of 1 to 128 tokens"):
        fp8_linear_parts(*quantized_pair(129, 48, 32))
    assert fp8_linear(x, x_scale, weight, weight_scale, bias).dtype == torch.bfloat16


@pytest.mark.parametrize("op", ["rms_norm", "rms_norm_fp8"])
def test_norms_add_parts_up_and_round_the_sum(op: str) -> None:
    parts, residual = torch.randn(3, 5, 48), torch.randn(5, 48).bfloat16()
    weight = 1 + 0.3 * torch.randn(48)
    of_parts, plain = {
        "rms_norm": (rms_norm_of_parts, rms_norm),
        "rms_norm_fp8": (rms_norm_fp8_of_parts, rms_norm_fp8),
    }[op]
    for mine, own in zip(
        of_parts(parts, weight, 1e-5, residual), plain(parts.sum(0).bfloat16(), weight, 1e-5, residual), strict=True
    ):
        assert mine.dtype == own.dtype
        assert torch.equal(mine.float(), own.float())
    with pytest.raises(ValueError, match="`residual`"):
        of_parts(parts, weight, 1e-5, residual[:4])
    with pytest.raises(ValueError, match="`parts`"):
        of_parts(parts.bfloat16(), weight, 1e-5, residual)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("x", torch.ones(5, 48)),
        ("x", torch.ones(5, 40).to(FP8)),
        ("weight", torch.ones(30, 48).to(FP8)),
        ("weight", torch.ones(48, 32).to(FP8).t()),
        ("x_scale", torch.ones(5)),
        ("weight_scale", torch.ones(1, 32)),
        ("bias", torch.ones(31)),
        ("out_dtype", torch.float16),
    ],
)
def test_bad_arguments_are_named(name: str, value: object) -> None:
    names = ("x", "x_scale", "weight", "weight_scale")
    arguments = dict(zip(names, quantized_pair(5, 48, 32), strict=True)) | {name: value}
    if name == "x" and value.shape[1] == 40:  # type: ignore[attr-defined]
        arguments["weight"] = arguments["weight"][:, :40].contiguous()
    with pytest.raises(ValueError, match=f"`{name}` must be"):
        fp8_linear(**arguments)  # type: ignore[arg-type]


@pytest.mark.parametrize("shape", [(1, 16), (3, 100), (4, 1200)])
def test_quantizing_kernels(shape: tuple[int, int], kernel: ModuleType, device: str) -> None:
    """The interpreter's rounding to 8 bits loses carries, which concerns one number in thirty; it has no bfloat16."""
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    x, residual = random_rows(*shape, dtype, device), random_rows(*shape, dtype, device, seed=2)
    weight = 1 + 0.3 * torch.randn(shape[1], device=device)
    cases = [("quantize_fp8", (x,)), ("rms_norm_fp8", (x, weight, 1e-5)), ("swiglu_fp8", (x, residual))]
    for name, arguments in [*cases, ("rms_norm_fp8", (x, weight, 1e-5, residual))]:
        values, scale, *summed = getattr(kernel, name)(*arguments)
        expected_values, expected_scale, *expected_sum = getattr(reference, name)(*arguments)
        assert values.dtype == FP8
        assert rel_rms(scale, expected_scale) < REL_RMS[dtype]
        assert (values.float() != expected_values.float()).sum() <= 1 + 0.1 * values.numel()
        if summed:
            assert rel_rms(summed[0], expected_sum[0]) < REL_RMS[dtype]


@pytest.mark.parametrize("is_bulk", [False, True])
@pytest.mark.parametrize("splits", [1, 3])
@pytest.mark.parametrize(("num_tokens", "width", "num_outputs"), [(1, 32, 16), (5, 80, 48), (17, 160, 32)])
def test_few_token_product(
    num_tokens: int, width: int, num_outputs: int, splits: int, is_bulk: bool, kernel: ModuleType, device: str
) -> None:
    from m1.kernels.decode_linear.triton_launch import few_token_product
    from m1.kernels.decode_linear.triton_product import ProductConfig

    pair = x, _, weight, _ = quantized_pair(num_tokens, width, num_outputs, device)
    scales = pair[1], pair[3]
    bias = torch.randn(num_outputs, device=device)
    config = ProductConfig(64 if device == "cuda" else 16, 32, splits, is_bulk=is_bulk)
    for own in (bias, None):  # twice: the counters must be zero again
        expected = reference.fp8_linear(*pair, own, torch.float32)
        y = few_token_product(x, weight, own, torch.float32, config, scales=scales)
        assert rel_rms(y, expected) < FP8_PRODUCT[device]
        parts = kernel.fp8_linear_parts(*pair, own, config)
        assert parts.shape == (splits, num_tokens, num_outputs)
        assert rel_rms(parts.sum(0), expected) < FP8_PRODUCT[device]


@pytest.mark.parametrize("num_parts", [1, 3])
def test_norms_of_parts(num_parts: int, kernel: ModuleType, device: str) -> None:
    check_norms_of_parts(kernel, num_parts, 7, 200, device)


@pytest.mark.gpu
@pytest.mark.parametrize("num_parts", [1, 2])
@pytest.mark.parametrize(("num_tokens", "width"), [(1, 3072), (32, 3072), (128, 3072), (128, 896), (33, 576)])
def test_norms_of_parts_at_model_sizes(num_tokens: int, width: int, num_parts: int, kernel: ModuleType) -> None:
    check_norms_of_parts(kernel, num_parts, num_tokens, width, "cuda")


def check_norms_of_parts(kernel: ModuleType, num_parts: int, num_tokens: int, width: int, device: str) -> None:
    from m1.kernels.norm import reference as norm_reference
    from m1.kernels.norm import triton_impl as norm

    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    parts = torch.randn(num_parts, num_tokens, width, device=device)
    residual, weight = random_rows(num_tokens, width, dtype, device), 1 + 0.3 * torch.randn(width, device=device)
    y, summed = norm.rms_norm_of_parts(parts, weight, 1e-5, residual)
    expected, expected_sum = norm_reference.rms_norm_of_parts(parts, weight, 1e-5, residual)
    assert y.dtype == summed.dtype == dtype
    assert rel_rms(y, expected) < REL_RMS[dtype]
    assert rel_rms(summed, expected_sum) < REL_RMS[dtype]
    values, scale, again = kernel.rms_norm_fp8_of_parts(parts, weight, 1e-5, residual)
    assert rel_rms(again, expected_sum) < REL_RMS[dtype]
    assert rel_rms(scale, reference.quantize_fp8(expected)[1]) < REL_RMS[dtype]
    assert (values.float() != reference.quantize_fp8(expected)[0].float()).sum() <= 1 + 0.1 * values.numel()


# The hardware adds 8-bit products with fewer bits than fp32 has.
FP8_PRODUCT = {"cpu": REL_RMS_KERNEL_FP32, "cuda": REL_RMS[torch.bfloat16]}


@pytest.mark.gpu
@pytest.mark.parametrize("num_tokens", [1, 16, 33, 128, 129, 1000])
@pytest.mark.parametrize(("width", "num_outputs"), [(3072, 8384), (8192, 3072), (896, 2112), (576, 1536)])
def test_products_at_model_sizes(num_tokens: int, width: int, num_outputs: int, kernel: ModuleType) -> None:
    pair = quantized_pair(num_tokens, width, num_outputs, "cuda")
    bias = torch.randn(num_outputs, device="cuda", dtype=torch.bfloat16)
    expected = reference.fp8_linear(*pair, bias, torch.float32)
    for _ in range(3):
        assert rel_rms(fp8_linear(*pair, bias), expected) < REL_RMS[torch.bfloat16]
        if num_tokens <= MAX_TOKENS:
            assert rel_rms(fp8_linear_parts(*pair, bias).sum(0), expected) < REL_RMS[torch.bfloat16]


@pytest.mark.gpu
@pytest.mark.parametrize("width", [576, 3072, 8192])
def test_quantizing_rounds_as_torch_does(width: int, kernel: ModuleType) -> None:
    x = random_rows(700, width, device="cuda")
    values, scale = quantize_fp8(x)
    expected_values, expected_scale = reference.quantize_fp8(x)
    assert rel_rms(scale, expected_scale) < REL_RMS[torch.float32]
    assert (values.float() != expected_values.float()).float().mean() < 1e-3
    gate, up = x.clone(), random_rows(700, width, device="cuda", seed=2)
    for actual, expected in (
        (swiglu_fp8(gate, up), reference.swiglu_fp8(gate, up)),
        (rms_norm_fp8(gate, up[0], 1e-5), reference.rms_norm_fp8(gate, up[0], 1e-5)),
    ):
        assert (actual[0].float() != expected[0].float()).float().mean() < 0.02
        assert rel_rms(meaning(*actual), meaning(*expected)) < REL_RMS[torch.bfloat16]


@pytest.mark.gpu
def test_nothing_waits_for_the_gpu_and_a_graph_replays(kernel: ModuleType) -> None:
    weight, weight_scale = reference.quantize_fp8(random_rows(3072, 1024, device="cuda"))
    x = random_rows(32, 1024, device="cuda").contiguous()

    def step() -> Tensor:
        return fp8_linear(*quantize_fp8(x), weight, weight_scale)

    expected = step().clone()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = step()
    for factor in (1, 2, 4):
        out.zero_()
        graph.replay()
        assert torch.equal(out, expected * factor), factor  # powers of two: the scales alone change
        x *= 2
