"""The torch norms, rotary embedding and SwiGLU against their formulas in float64: outputs and gradients."""

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers.models.llama.modeling_llama import LlamaRMSNorm, apply_rotary_pos_emb

from m1.kernels import apply_rotary, gated_rms_norm, rms_norm, rotary_state_heads, swiglu
from tests.kernels.compare import assert_close, gradients_and_outputs
from tests.numerics import REL_RMS

EPS = 1e-2  # large enough that leaving it out shows


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def compare(op: Any, formula: Any, inputs: dict[str, Tensor]) -> None:
    """`op` on fp32 inputs, also not contiguous, and on bf16 inputs, against `formula` on the same values in float64."""
    strided = {name: torch.stack([tensor, tensor + 1], -1)[..., 0] for name, tensor in inputs.items()}
    narrow = {name: tensor.bfloat16() for name, tensor in inputs.items()}
    for given, dtype in ((inputs, torch.float32), (strided, torch.float32), (narrow, torch.bfloat16)):
        wide = {name: tensor.double() for name, tensor in given.items()}
        actual = gradients_and_outputs(op, given)
        assert {tensor.dtype for tensor in actual.values()} == {dtype}
        assert_close(actual, gradients_and_outputs(formula, wide), REL_RMS[dtype])


@pytest.mark.parametrize("shape", [(5,), (7, 33), (2, 3, 64)])
def test_rms_norm(shape: tuple[int, ...]) -> None:
    inputs = {"x": random(*shape), "weight": random(shape[-1], seed=1)}

    def formula(x: Tensor, weight: Tensor) -> tuple[Tensor]:
        return (weight * x / (x.square().mean(-1, keepdim=True) + EPS).sqrt(),)

    compare(lambda x, weight: (rms_norm(x, weight, EPS),), formula, inputs)


def test_rms_norm_with_residual() -> None:
    inputs = {"x": random(7, 33), "weight": random(33, seed=1), "residual": random(7, 33, seed=2)}

    def formula(x: Tensor, weight: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        total = x + residual
        return weight * total / (total.square().mean(-1, keepdim=True) + EPS).sqrt(), total

    compare(lambda x, weight, residual: rms_norm(x, weight, EPS, residual), formula, inputs)


def test_rms_norm_rounds_as_transformers_does() -> None:
    x, weight = random(50, 64).bfloat16(), random(64, seed=1).bfloat16()
    module = LlamaRMSNorm(64, EPS)
    module.weight.data = weight
    assert torch.equal(rms_norm(x, weight, EPS), module(x))


def test_gated_rms_norm() -> None:
    inputs = {"x": random(7, 3, 5), "z": random(7, 3, 5, seed=1), "weight": random(15, seed=2)}

    def formula(x: Tensor, z: Tensor, weight: Tensor) -> tuple[Tensor]:
        gated = x * z * torch.sigmoid(z)
        return (gated / (gated.square().mean(-1, keepdim=True) + EPS).sqrt() * weight.unflatten(0, (3, 5)),)

    compare(lambda x, z, weight: (gated_rms_norm(x, z, weight, EPS),), formula, inputs)


def test_rotary_is_a_rotation_of_pairs_of_halves() -> None:
    angles = torch.rand(9, 4) * 6
    cos, sin = angles.cos().repeat(1, 2), angles.sin().repeat(1, 2)

    def formula(x: Tensor) -> tuple[Tensor]:
        pairs = torch.complex(x[..., :4], x[..., 4:]) * torch.polar(torch.ones(9, 1, 4), angles[:, None]).to(torch.complex128)
        return (torch.cat([pairs.real, pairs.imag], -1),)

    compare(lambda x: (apply_rotary(x, cos, sin),), formula, {"x": random(9, 3, 8)})


def test_state_heads_are_every_nth_pair_of_a_rotated_head() -> None:
    """Each number by its place: group g, member m, narrow head n of three, pair p of two, half 0 or 1."""
    cos, sin = torch.randn(2, 4, 12)
    x = random(4, 6, 12)  # 2 groups of 3 heads

    def op(x: Tensor) -> tuple[Tensor]:
        return (rotary_state_heads(x, cos, sin, num_groups=2, width=4),)

    def formula(x: Tensor) -> tuple[Tensor]:
        half = torch.cat([-x[..., 6:], x[..., :6]], -1)
        rotated = x * cos[:, None].to(x.dtype) + half * sin[:, None].to(x.dtype)
        heads = [
            torch.stack([rotated[:, 3 * g + m, 6 * part + 3 * p + n] for part in range(2) for p in range(2)], -1)
            for g in range(2)
            for n in range(3)
            for m in range(3)
        ]
        return (torch.stack(heads, 1),)

    compare(op, formula, {"x": x})


def test_rotary_is_transformers_rotary() -> None:
    x, angles = random(9, 3, 8), torch.rand(9, 8) * 6  # other angles in the two halves
    cos, sin = angles.cos(), angles.sin()
    expected, _ = apply_rotary_pos_emb(x.transpose(0, 1)[None], x.transpose(0, 1)[None], cos[None], sin[None])
    assert_close({"y": apply_rotary(x, cos, sin)}, {"y": expected[0].transpose(0, 1)}, REL_RMS[torch.float32])


@pytest.mark.parametrize("shape", [(), (5,), (7, 33)])
def test_swiglu(shape: tuple[int, ...]) -> None:
    inputs = {"gate": random(*shape), "up": random(*shape, seed=1)}
    compare(lambda gate, up: (swiglu(gate, up),), lambda gate, up: (gate * torch.sigmoid(gate) * up,), inputs)


@pytest.mark.parametrize(
    ("name", "call"),
    [
        ("x", lambda: rms_norm(torch.ones(3, 4, dtype=torch.int32), torch.ones(4), EPS)),
        ("weight", lambda: rms_norm(torch.ones(3, 4), torch.ones(3), EPS)),
        ("weight", lambda: rms_norm(torch.ones(3, 4), torch.ones(4, device="meta"), EPS)),
        ("eps", lambda: rms_norm(torch.ones(3, 4), torch.ones(4), -1e-6)),
        ("residual", lambda: rms_norm(torch.ones(3, 4), torch.ones(4), EPS, torch.ones(4))),
        ("residual", lambda: rms_norm(torch.ones(3, 4), torch.ones(4), EPS, torch.ones(3, 4).bfloat16())),
        ("x", lambda: gated_rms_norm(torch.ones(3, 4), torch.ones(3, 4), torch.ones(4), EPS)),
        ("z", lambda: gated_rms_norm(torch.ones(3, 2, 4), torch.ones(3, 4, 2), torch.ones(8), EPS)),
        ("weight", lambda: gated_rms_norm(torch.ones(3, 2, 4), torch.ones(3, 2, 4), torch.ones(4), EPS)),
        ("x", lambda: apply_rotary(torch.ones(3, 2, 5), torch.ones(3, 5), torch.ones(3, 5))),
        ("width", lambda: rotary_state_heads(torch.ones(3, 2, 12), *torch.ones(2, 3, 12), num_groups=1, width=8)),
        ("x", lambda: rotary_state_heads(torch.ones(3, 2, 12), *torch.ones(2, 3, 12), num_groups=4, width=4)),
        ("cos", lambda: apply_rotary(torch.ones(3, 2, 4), torch.ones(3, 2), torch.ones(3, 4))),
        ("sin", lambda: apply_rotary(torch.ones(3, 2, 4), torch.ones(3, 4), torch.ones(2, 4))),
        ("gate", lambda: swiglu(torch.ones(3, dtype=torch.int64), torch.ones(3))),
        ("up", lambda: swiglu(torch.ones(3), torch.ones(4))),
        ("up", lambda: swiglu(torch.ones(3), torch.ones(3, device="meta"))),
    ],
)
def test_bad_inputs_are_named(name: str, call: Any) -> None:
    with pytest.raises(ValueError, match=rf"`{name}` must be .*given: "):
        call()
