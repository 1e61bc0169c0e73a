"""Triton RMSNorm, gated RMSNorm, rotary embedding and SwiGLU against the fp32 torch references: outputs and gradients."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.numerics import REL_RMS, REL_RMS_KERNEL_FP32, rel_rms

pytest.importorskip("triton")
from m1.kernels.activation import reference as activation_reference
from m1.kernels.activation import triton_impl as activation
from m1.kernels.norm import reference as norm_reference
from m1.kernels.norm import triton_impl as norm
from m1.kernels.rope import reference as rope_reference
from m1.kernels.rope import triton_impl as rope

TOLERANCE = {torch.float32: REL_RMS_KERNEL_FP32, torch.bfloat16: REL_RMS[torch.bfloat16]}
DTYPES = [torch.float32, torch.bfloat16]


@pytest.fixture(autouse=True)
def _poisoned_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fill what torch.empty returns with NaN, so that an element a kernel forgets to write is seen."""
    empty = torch.empty

    def poisoned(*args: Any, **kwargs: Any) -> Tensor:
        tensor = empty(*args, **kwargs)
        return tensor.fill_(float("nan")) if tensor.is_floating_point() else tensor.fill_(-(10**6))

    monkeypatch.setattr(torch, "empty", poisoned)


def _compare(
    op: Callable[..., Any], reference: Callable[..., Any], inputs: list[Tensor], num_differentiable: int, dtype: torch.dtype
) -> None:
    """Outputs and gradients of `op` against `reference` on the same values in fp32."""
    leaves = [x.detach().requires_grad_() if i < num_differentiable else x for i, x in enumerate(inputs)]
    wide = [x.detach().float().requires_grad_() if i < num_differentiable else x for i, x in enumerate(inputs)]
    outputs, expected = op(*leaves), reference(*wide)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    expected = expected if isinstance(expected, tuple) else (expected,)
    assert len(outputs) == len(expected)
    upstream = [torch.randn(out.shape, device=out.device) for out in outputs]
    for out, right in zip(outputs, expected, strict=True):
        assert out.dtype == dtype
        assert out.shape == right.shape
        assert rel_rms(out, right) < TOLERANCE[dtype]
    gradients = torch.autograd.grad(outputs, leaves[:num_differentiable], [g.to(dtype) for g in upstream])
    right_gradients = torch.autograd.grad(expected, wide[:num_differentiable], [g.to(dtype).float() for g in upstream])
    for gradient, right in zip(gradients, right_gradients, strict=True):
        assert rel_rms(gradient, right) < TOLERANCE[dtype]


def _random(*shape: int, dtype: torch.dtype, device: str) -> Tensor:
    return torch.randn(*shape, device=device).to(dtype)


SMALL_NORM = [(1, 64), (5, 96), (7, 576), (3, 5, 48)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SMALL_NORM)
@pytest.mark.parametrize("has_residual", [False, True])
def test_rms_norm(shape: tuple[int, ...], has_residual: bool, dtype: torch.dtype, device: str) -> None:
    torch.manual_seed(1)
    x = _random(*shape, dtype=dtype, device=device)
    weight = 1 + 0.3 * _random(shape[-1], dtype=dtype, device=device)
    rest = [_random(*shape, dtype=dtype, device=device)] if has_residual else []
    _compare(
        lambda x, w, *r: norm.rms_norm(x, w, 1e-5, *r),
        lambda x, w, *r: norm_reference.rms_norm(x, w, 1e-5, *r),
        [x, weight, *rest],
        len(rest) + 2,
        dtype,
    )


@pytest.mark.gpu
def test_rms_norm_rounds_as_hugging_face_does() -> None:
    """Bit-equal to the reference in bf16 except where the summation order tips a rounding (the interpreter truncates)."""
    torch.manual_seed(2)
    device = "cuda"
    x, residual = (_random(9, 320, dtype=torch.bfloat16, device=device) for _ in range(2))
    weight = 1 + 0.3 * _random(320, dtype=torch.bfloat16, device=device)
    y, summed = norm.rms_norm(x, weight, 1e-6, residual)
    right, right_sum = norm_reference.rms_norm(x, weight, 1e-6, residual)
    assert torch.equal(summed, right_sum)
    assert (y != right).float().mean() < 0.01


def test_rms_norm_without_gradient_and_on_strided_rows(device: str) -> None:
    torch.manual_seed(3)
    wide = _random(6, 2, 80, dtype=torch.float32, device=device)
    weight = _random(160, dtype=torch.float32, device=device)[::2]
    x = wide[:, 1]
    assert not x.is_contiguous()
    with torch.no_grad():
        assert rel_rms(norm.rms_norm(x, weight, 1e-5), norm_reference.rms_norm(x, weight, 1e-5)) < REL_RMS_KERNEL_FP32
        transposed = wide[:, 0].t().contiguous().t()  # adjacent rows, not columns
        expected = norm_reference.rms_norm(transposed, weight, 1e-5)
        assert rel_rms(norm.rms_norm(transposed, weight, 1e-5), expected) < REL_RMS_KERNEL_FP32


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 1, 16), (70, 3, 48), (5, 24, 64)])
def test_gated_rms_norm(shape: tuple[int, int, int], dtype: torch.dtype, device: str) -> None:
    torch.manual_seed(4)
    merged = _random(shape[0], 2, *shape[1:], dtype=dtype, device=device)  # x and z as slices of one projection
    weight = 1 + 0.3 * _random(shape[1] * shape[2], dtype=dtype, device=device)
    _compare(
        lambda x, z, w: norm.gated_rms_norm(x, z, w, 1e-5),
        lambda x, z, w: norm_reference.gated_rms_norm(x, z, w, 1e-5),
        [merged[:, 0], merged[:, 1], weight],
        3,
        dtype,
    )


def test_weight_gradients_add_up_over_a_programs_rows(monkeypatch: pytest.MonkeyPatch, device: str) -> None:
    """Few programs and small tiles: each backward program walks several tiles, the last of them not full."""
    torch.manual_seed(8)
    monkeypatch.setattr(norm, "TILE", 128)
    monkeypatch.setattr(norm, "num_multiprocessors", lambda device: 1)
    x, residual = (_random(27, 64, dtype=torch.float32, device=device) for _ in range(2))
    weight = 1 + 0.3 * _random(64, dtype=torch.float32, device=device)
    _compare(
        lambda x, w, r: norm.rms_norm(x, w, 1e-5, r),
        lambda x, w, r: norm_reference.rms_norm(x, w, 1e-5, r),
        [x, weight, residual],
        3,
        torch.float32,
    )
    x, z = (_random(27, 5, 60, dtype=torch.float32, device=device) for _ in range(2))
    weight = 1 + 0.3 * _random(300, dtype=torch.float32, device=device)
    _compare(
        lambda x, z, w: norm.gated_rms_norm(x, z, w, 1e-5),
        lambda x, z, w: norm_reference.gated_rms_norm(x, z, w, 1e-5),
        [x, z, weight],
        3,
        torch.float32,
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 1, 16), (63, 3, 64), (6, 14, 24)])
def test_apply_rotary(shape: tuple[int, int, int], dtype: torch.dtype, device: str) -> None:
    torch.manual_seed(5)
    x = _random(shape[0], 2 * shape[1], shape[2], dtype=dtype, device=device)[:, ::2]
    # Unrelated halves: a kernel that reads only one half of the tables is found out.
    cos, sin = (_random(shape[0], shape[2], dtype=torch.float32, device=device) for _ in range(2))
    _compare(rope.apply_rotary, rope_reference.apply_rotary, [x, cos, sin], 1, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("num_tokens", "num_heads", "num_groups", "head_width", "width"), [(1, 1, 1, 16, 16), (5, 6, 2, 24, 4), (3, 7, 1, 64, 16)]
)
def test_rotary_state_heads(
    num_tokens: int, num_heads: int, num_groups: int, head_width: int, width: int, dtype: torch.dtype, device: str
) -> None:
    torch.manual_seed(9)
    x = _random(num_tokens, 2 * num_heads, head_width, dtype=dtype, device=device)[:, ::2]
    cos, sin = (_random(num_tokens, head_width, dtype=torch.float32, device=device) for _ in range(2))
    options = {"num_groups": num_groups, "width": width}
    _compare(
        lambda *a: rope.rotary_state_heads(*a, **options),
        lambda *a: rope_reference.rotary_state_heads(*a, **options),
        [x, cos, sin],
        1,
        dtype,
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 1), (3, 2500), (4, 3, 130)])
def test_swiglu(shape: tuple[int, ...], dtype: torch.dtype, device: str) -> None:
    torch.manual_seed(6)
    merged = 2 * _random(*shape[:-1], 2 * shape[-1], dtype=dtype, device=device)
    gate, up = merged.chunk(2, -1)
    _compare(activation.swiglu, activation_reference.swiglu, [gate, up], 2, dtype)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("num_tokens", [1, 63, 1000, 4097])
@pytest.mark.parametrize(
    ("hidden", "intermediate", "heads", "width"), [(3072, 8192, 24, 128), (896, 4864, 14, 64), (576, 1536, 9, 64)]
)
def test_model_sizes(num_tokens: int, hidden: int, intermediate: int, heads: int, width: int, dtype: torch.dtype) -> None:
    torch.manual_seed(7)
    device = "cuda"
    x, residual = (_random(num_tokens, hidden, dtype=dtype, device=device) for _ in range(2))
    weight = 1 + 0.3 * _random(hidden, dtype=dtype, device=device)
    for rest in ([], [residual]):
        _compare(
            lambda x, w, *r: norm.rms_norm(x, w, 1e-5, *r),
            lambda x, w, *r: norm_reference.rms_norm(x, w, 1e-5, *r),
            [x, weight, *rest],
            2 + len(rest),
            dtype,
        )
    gate, up = _random(num_tokens, 2 * intermediate, dtype=dtype, device=device).chunk(2, -1)
    _compare(activation.swiglu, activation_reference.swiglu, [gate, up], 2, dtype)
    q, z = (_random(num_tokens, heads, width, dtype=dtype, device=device) for _ in range(2))
    cos, sin = (_random(num_tokens, width, dtype=torch.float32, device=device) for _ in range(2))
    _compare(rope.apply_rotary, rope_reference.apply_rotary, [q, cos, sin], 1, dtype)
    _compare(
        lambda *a: rope.rotary_state_heads(*a, num_groups=heads // 3 if heads % 3 == 0 else 2, width=16),
        lambda *a: rope_reference.rotary_state_heads(*a, num_groups=heads // 3 if heads % 3 == 0 else 2, width=16),
        [q, cos, sin],
        1,
        dtype,
    )
    head_weight = 1 + 0.3 * _random(heads * width, dtype=dtype, device=device)
    _compare(
        lambda x, z, w: norm.gated_rms_norm(x, z, w, 1e-5),
        lambda x, z, w: norm_reference.gated_rms_norm(x, z, w, 1e-5),
        [q, z, head_weight],
        3,
        dtype,
    )
