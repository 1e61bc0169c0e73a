"""The torch selective scan against the token-by-token recurrence in float64: outputs, states and every gradient."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from m1.kernels import selective_scan, selective_state_update
from m1.kernels.selective_scan.recurrence import CHUNK, LANES
from tests.kernels import naive
from tests.kernels.compare import assert_close, gradients_and_outputs
from tests.numerics import REL_RMS

H, G, P, N = 4, 2, 3, 5
LENGTHS = [[1], [63], [1000], [CHUNK], [CHUNK + 1], [1, 2, 1], [70, 1, 33, 5, 64], [3] * (LANES + 5), [40] * (LANES + 1)]


def make_inputs(num_tokens: int, num_sequences: int, num_x_heads: int = G, seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    return {
        "x": random(num_tokens, num_x_heads, P),
        "dt": random(num_tokens, H, P),
        "A": -random(H, P, N).exp(),
        "B": random(num_tokens, G, N),
        "C": random(num_tokens, H, N),
        "D": random(H, P),
        "z": random(num_tokens, H, P),
        "dt_bias": random(H, P) - 2,
        "initial_state": random(num_sequences, H, P, N),
    }


def run_naive(inputs: dict[str, Tensor], lengths: list[int], **options: Any) -> dict[str, Tensor]:
    wide = {name: tensor.double() for name, tensor in inputs.items()}
    return gradients_and_outputs(lambda **kw: naive.scan(kw, lengths, **options), wide)


def run_op(inputs: dict[str, Tensor], lengths: list[int], **options: Any) -> dict[str, Tensor]:
    bounds = naive.cu_seqlens(lengths)
    return gradients_and_outputs(
        lambda **kw: selective_scan(**kw, cu_seqlens=bounds, output_final_state=True, **options), inputs
    )


@pytest.mark.parametrize("num_x_heads", [G, H, 1])
@pytest.mark.parametrize("lengths", LENGTHS, ids=lambda lengths: f"{len(lengths)}x{max(lengths)}")
def test_outputs_states_and_gradients(lengths: list[int], num_x_heads: int) -> None:
    inputs = make_inputs(sum(lengths), len(lengths), num_x_heads)
    assert_close(run_op(inputs, lengths), run_naive(inputs, lengths), REL_RMS[torch.float32])


@pytest.mark.parametrize("lengths", [[70, 3], [5, 4]])
@pytest.mark.parametrize("absent", [("D",), ("z",), ("dt_bias",), ("initial_state",), ("D", "z", "dt_bias", "initial_state")])
def test_optional_inputs(lengths: list[int], absent: tuple[str, ...]) -> None:
    inputs = make_inputs(sum(lengths), len(lengths))
    inputs = {name: tensor for name, tensor in inputs.items() if name not in absent}
    assert_close(run_op(inputs, lengths), run_naive(inputs, lengths), REL_RMS[torch.float32])


def test_step_sizes_without_softplus() -> None:
    lengths = [40, 7]
    inputs = make_inputs(47, 2)
    inputs["dt"], inputs["dt_bias"] = inputs["dt"].abs() * 0.3, inputs["dt_bias"].abs() * 0.1
    assert_close(
        run_op(inputs, lengths, dt_softplus=False), run_naive(inputs, lengths, dt_softplus=False), REL_RMS[torch.float32]
    )


def test_no_cu_seqlens_is_one_document() -> None:
    inputs = make_inputs(50, 1)
    y, final = selective_scan(**inputs, output_final_state=True)
    expected = run_naive(inputs, [50])
    assert_close({"output 0": y, "output 1": final}, {k: expected[k] for k in ("output 0", "output 1")}, REL_RMS[torch.float32])


def test_non_contiguous_inputs() -> None:
    lengths = [37, 50]
    inputs = make_inputs(87, 2)
    strided = {name: torch.stack([tensor, tensor + 1], -1)[..., 0] for name, tensor in inputs.items()}
    strided["dt"] = inputs["dt"].permute(2, 1, 0).contiguous().permute(2, 1, 0)
    assert not any(tensor.is_contiguous() for tensor in strided.values())
    assert_close(run_op(strided, lengths), run_op(inputs, lengths), REL_RMS[torch.float32])


def test_bf16_inputs_are_computed_in_fp32() -> None:
    lengths = [90]
    inputs = {name: tensor.bfloat16() for name, tensor in make_inputs(90, 1).items()}
    inputs["A"] = inputs["A"].float()
    actual = run_op(inputs, lengths)
    assert actual["output 0"].dtype == torch.bfloat16
    assert actual["output 1"].dtype == torch.float32
    assert actual["ddt"].dtype == torch.bfloat16
    expected = run_naive(inputs, lengths)
    assert_close(actual, expected, REL_RMS[torch.bfloat16])
    assert_close({"state": actual["output 1"]}, {"state": expected["output 1"]}, REL_RMS[torch.float32])


def test_autocast_changes_nothing_in_fp32() -> None:
    inputs = make_inputs(90, 2)
    bounds = naive.cu_seqlens([60, 30])

    def under_autocast(**kw: Tensor) -> tuple[Tensor, Tensor]:
        with torch.autocast("cpu", torch.bfloat16):
            return selective_scan(**kw, cu_seqlens=bounds, output_final_state=True)

    assert_close(gradients_and_outputs(under_autocast, inputs), run_op(inputs, [60, 30]), REL_RMS[torch.float32])


def test_activation_checkpointing() -> None:
    inputs = make_inputs(90, 2)
    bounds = naive.cu_seqlens([60, 30])

    def scan(**kw: Tensor) -> tuple[Tensor, Tensor]:
        return selective_scan(**kw, cu_seqlens=bounds, output_final_state=True)

    actual = gradients_and_outputs(lambda **kw: checkpoint(scan, use_reentrant=False, **kw), inputs)
    assert_close(actual, gradients_and_outputs(scan, inputs), REL_RMS[torch.float32])


def test_one_document_never_reaches_another() -> None:
    """A NaN in one document stays in it, forwards and backwards, through padding and blocks of chunks too."""
    lengths = [45, 20, 40]
    inputs = make_inputs(105, 3)
    clean = run_op(inputs, lengths)
    inputs["x"][45:65] = torch.nan
    poisoned = run_op(inputs, lengths)
    for name in ("output 0", "dx", "ddt", "dB", "dC", "dz"):
        assert torch.equal(poisoned[name][:45], clean[name][:45]), name
        assert torch.equal(poisoned[name][65:], clean[name][65:]), name
        assert poisoned[name][45:65].isnan().any() or name == "dx"
    for name in ("output 1", "dinitial_state"):
        assert torch.equal(poisoned[name][[0, 2]], clean[name][[0, 2]]), name


def test_final_state_then_steps_equals_longer_scan() -> None:
    inputs = make_inputs(48, 1)
    y, final = selective_scan(**inputs, output_final_state=True)
    per_token = ("x", "dt", "B", "C", "z")
    head = {name: tensor[:40] if name in per_token else tensor for name, tensor in inputs.items()}
    y_head, state = selective_scan(**head, output_final_state=True)
    pool = torch.randn(3, H, P, N)
    pool[1] = state[0]
    rest = pool[[0, 2]].clone()
    constants = {name: inputs[name] for name in ("A", "D", "dt_bias")}
    steps = [
        selective_state_update(
            pool, **{name: inputs[name][t : t + 1] for name in per_token}, **constants, slots=torch.tensor([1])
        )
        for t in range(40, 48)
    ]
    assert_close({"y": torch.cat([y_head, *steps]), "state": pool[1]}, {"y": y, "state": final[0]}, REL_RMS[torch.float32])
    assert torch.equal(pool[[0, 2]], rest)


@pytest.mark.parametrize("state_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("num_x_heads", [G, H])
def test_update_of_scattered_slots(state_dtype: torch.dtype, num_x_heads: int) -> None:
    inputs = make_inputs(3, 1, num_x_heads)
    pool = torch.randn(5, H, P, N).to(state_dtype)
    slots = torch.tensor([4, 0, 2])
    before = pool.clone()
    wide = {name: tensor.double() for name, tensor in inputs.items()} | {"initial_state": pool[slots].double()}
    y_expected, state_expected = naive.scan(wide, [1, 1, 1])
    arguments = {name: tensor for name, tensor in inputs.items() if name != "initial_state"}
    y = selective_state_update(pool, **arguments, slots=slots)
    assert_close({"y": y}, {"y": y_expected}, REL_RMS[torch.float32])
    assert_close({"state": pool[slots]}, {"state": state_expected}, REL_RMS[state_dtype])
    assert torch.equal(pool[[1, 3]], before[[1, 3]])


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("x", lambda t: t.long()),
        ("x", lambda t: t[:, :, 0]),
        ("x", lambda t: t[:, :1].expand(-1, 3, -1)),
        ("dt", lambda t: t[:-1]),
        ("dt", lambda t: t.int()),
        ("A", lambda t: t[:, :-1]),
        ("B", lambda t: t[:, :, :-1]),
        ("B", lambda t: t.to("meta")),
        ("C", lambda t: t[:, :-1]),
        ("D", lambda t: t[0]),
        ("z", lambda t: t[:, :-1]),
        ("dt_bias", lambda t: t[:-1]),
        ("initial_state", lambda t: t[:-1]),
    ],
)
def test_bad_inputs_are_named(name: str, change: Any) -> None:
    inputs = make_inputs(10, 2)
    inputs[name] = change(inputs[name])
    with pytest.raises(ValueError, match=rf"`{name}` must be .*given: "):
        selective_scan(**inputs, cu_seqlens=naive.cu_seqlens([4, 6]))


@pytest.mark.parametrize(
    "bounds",
    [
        torch.tensor([0, 4, 10]),
        torch.tensor([0, 4, 9], dtype=torch.int32),
        torch.tensor([1, 4, 10], dtype=torch.int32),
        torch.tensor([0, 4, 4, 10], dtype=torch.int32),
        torch.tensor([0], dtype=torch.int32),
    ],
)
def test_bad_cu_seqlens(bounds: Tensor) -> None:
    inputs = {name: tensor for name, tensor in make_inputs(10, 2).items() if name != "initial_state"}
    with pytest.raises(ValueError, match="`cu_seqlens` must be"):
        selective_scan(**inputs, cu_seqlens=bounds)


@pytest.mark.parametrize("slots", [[0, 5], [-1, 0], [0, 1, 2], None])
def test_bad_slots(slots: list[int] | None) -> None:
    inputs = {name: tensor for name, tensor in make_inputs(2, 1).items() if name != "initial_state"}
    num_slots = 1 if slots is None else 5
    index = None if slots is None else torch.tensor(slots)
    with pytest.raises(ValueError, match="`slots` must be"):
        selective_state_update(torch.randn(num_slots, H, P, N), **inputs, slots=index)
