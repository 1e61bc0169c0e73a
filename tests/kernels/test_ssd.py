"""The torch SSD scan against the token-by-token recurrence in float64: outputs, states and every gradient."""

from typing import Any

import pytest
import torch
from torch import Tensor

from m1.kernels import ssd_scan, ssd_state_update
from tests.kernels import naive
from tests.kernels.compare import assert_close, gradients_and_outputs
from tests.numerics import REL_RMS

H, G, P, N = 4, 2, 3, 5


def make_inputs(num_tokens: int, num_sequences: int, num_x_heads: int = G, seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    return {
        "x": random(num_tokens, num_x_heads, P),
        "dt": random(num_tokens, H),
        "A": -random(H).exp(),
        "B": random(num_tokens, G, N),
        "C": random(num_tokens, H, N),
        "D": random(H),
        "dt_bias": random(H) - 2,
        "initial_state": random(num_sequences, H, P, N),
    }


def run_naive(inputs: dict[str, Tensor], lengths: list[int], **options: Any) -> dict[str, Tensor]:
    wide = {name: tensor.double() for name, tensor in inputs.items()}
    return gradients_and_outputs(lambda **kw: naive.scan(kw, lengths, **options), wide)


def run_op(inputs: dict[str, Tensor], lengths: list[int], **options: Any) -> dict[str, Tensor]:
    bounds = naive.cu_seqlens(lengths)
    return gradients_and_outputs(lambda **kw: ssd_scan(**kw, cu_seqlens=bounds, output_final_state=True, **options), inputs)


@pytest.mark.parametrize("num_x_heads", [G, H, 1])
@pytest.mark.parametrize("lengths", [[1], [63], [1000], [64], [65], [1, 2, 1], [70, 1, 133, 5, 64], [3] * 20])
def test_outputs_states_and_gradients(lengths: list[int], num_x_heads: int) -> None:
    inputs = make_inputs(sum(lengths), len(lengths), num_x_heads)
    assert_close(run_op(inputs, lengths), run_naive(inputs, lengths), REL_RMS[torch.float32])


@pytest.mark.parametrize("chunk_size", [1, 16, 100])
def test_chunk_size_changes_nothing(chunk_size: int) -> None:
    lengths = [50, 31]
    inputs = make_inputs(81, 2)
    assert_close(run_op(inputs, lengths, chunk_size=chunk_size), run_naive(inputs, lengths), REL_RMS[torch.float32])


@pytest.mark.parametrize("lengths", [[70, 3], [5, 4]])
@pytest.mark.parametrize("absent", [("D",), ("dt_bias",), ("initial_state",), ("D", "dt_bias", "initial_state")])
def test_optional_inputs(lengths: list[int], absent: tuple[str, ...]) -> None:
    inputs = make_inputs(sum(lengths), len(lengths))
    inputs = {name: tensor for name, tensor in inputs.items() if name not in absent}
    assert_close(run_op(inputs, lengths), run_naive(inputs, lengths), REL_RMS[torch.float32])


def test_step_sizes_without_softplus() -> None:
    lengths = [80, 7]
    inputs = make_inputs(87, 2)
    inputs["dt"], inputs["dt_bias"] = inputs["dt"].abs() * 0.3, inputs["dt_bias"].abs() * 0.1
    expected = run_naive(inputs, lengths, dt_softplus=False)
    assert_close(run_op(inputs, lengths, dt_softplus=False), expected, REL_RMS[torch.float32])


def test_strong_decays_do_not_overflow() -> None:
    """Log decays that sum to -3000 in a chunk: a product of two exponentials would be 0 · inf."""
    inputs = make_inputs(100, 1)
    inputs["A"], inputs["dt"] = torch.tensor([-8.0, -16.0, -4.0, -1e-3]), inputs["dt"] + 3
    assert_close(run_op(inputs, [100]), run_naive(inputs, [100]), REL_RMS[torch.float32])


def test_non_contiguous_and_bf16_inputs() -> None:
    lengths = [37, 90]
    inputs = {name: tensor.bfloat16() for name, tensor in make_inputs(127, 2).items()}
    strided = {name: torch.stack([tensor, tensor + 1], -1)[..., 0] for name, tensor in inputs.items()}
    actual, expected = run_op(strided, lengths), run_naive(inputs, lengths)
    assert actual["output 0"].dtype == torch.bfloat16
    assert actual["output 1"].dtype == torch.float32
    assert_close(actual, expected, REL_RMS[torch.bfloat16])
    assert_close({"state": actual["output 1"]}, {"state": expected["output 1"]}, REL_RMS[torch.float32])


def test_autocast_changes_nothing_in_fp32() -> None:
    inputs = make_inputs(90, 2)
    bounds = naive.cu_seqlens([60, 30])

    def under_autocast(**kw: Tensor) -> tuple[Tensor, Tensor]:
        with torch.autocast("cpu", torch.bfloat16):
            return ssd_scan(**kw, cu_seqlens=bounds, output_final_state=True)

    assert_close(gradients_and_outputs(under_autocast, inputs), run_op(inputs, [60, 30]), REL_RMS[torch.float32])


def test_one_document_never_reaches_another() -> None:
    lengths = [45, 20, 70]
    inputs = make_inputs(135, 3)
    clean = run_op(inputs, lengths)
    inputs["x"][45:65] = torch.nan
    poisoned = run_op(inputs, lengths)
    for name in ("output 0", "dx", "ddt", "dB", "dC"):
        assert torch.equal(poisoned[name][:45], clean[name][:45]), name
        assert torch.equal(poisoned[name][65:], clean[name][65:]), name
    for name in ("output 1", "dinitial_state"):
        assert torch.equal(poisoned[name][[0, 2]], clean[name][[0, 2]]), name


def test_final_state_then_steps_equals_longer_scan() -> None:
    inputs = make_inputs(78, 1)
    y, final = ssd_scan(**inputs, output_final_state=True)
    per_token = ("x", "dt", "B", "C")
    head = {name: tensor[:70] if name in per_token else tensor for name, tensor in inputs.items()}
    y_head, state = ssd_scan(**head, output_final_state=True)
    pool = torch.randn(3, H, P, N)
    pool[1] = state[0]
    rest = pool[[0, 2]].clone()
    constants = {name: inputs[name] for name in ("A", "D", "dt_bias")}
    steps = [
        ssd_state_update(pool, **{name: inputs[name][t : t + 1] for name in per_token}, **constants, slots=torch.tensor([1]))
        for t in range(70, 78)
    ]
    assert_close({"y": torch.cat([y_head, *steps]), "state": pool[1]}, {"y": y, "state": final[0]}, REL_RMS[torch.float32])
    assert torch.equal(pool[[0, 2]], rest)


@pytest.mark.parametrize("state_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("slots", [[4, 0, 2], None])
def test_update_of_slots(state_dtype: torch.dtype, slots: list[int] | None) -> None:
    inputs = make_inputs(3, 1)
    pool = torch.randn(5, H, P, N).to(state_dtype)
    index = [0, 1, 2] if slots is None else slots
    untouched = [slot for slot in range(5) if slot not in index]
    before = pool.clone()
    wide = {name: tensor.double() for name, tensor in inputs.items()} | {"initial_state": pool[index].double()}
    y_expected, state_expected = naive.scan(wide, [1, 1, 1])
    arguments = {name: tensor.requires_grad_() for name, tensor in inputs.items() if name != "initial_state"}
    y = ssd_state_update(pool, **arguments, slots=None if slots is None else torch.tensor(slots))
    assert not y.requires_grad
    assert_close({"y": y}, {"y": y_expected}, REL_RMS[torch.float32])
    assert_close({"state": pool[index]}, {"state": state_expected}, REL_RMS[state_dtype])
    assert torch.equal(pool[untouched], before[untouched])


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("x", lambda t: t.long()),
        ("x", lambda t: t[:, :, 0]),
        ("x", lambda t: t[:, :1].expand(-1, 3, -1)),
        ("dt", lambda t: t[:-1]),
        ("A", lambda t: t[:-1]),
        ("B", lambda t: t[:, :, :-1]),
        ("C", lambda t: t[:-1]),
        ("C", lambda t: t.to("meta")),
        ("D", lambda t: t[0]),
        ("dt_bias", lambda t: t[:-1]),
        ("initial_state", lambda t: t[..., :-1]),
        ("chunk_size", lambda t: 0),
    ],
)
def test_bad_inputs_are_named(name: str, change: Any) -> None:
    arguments: dict[str, Any] = make_inputs(10, 2)
    arguments[name] = change(arguments.get(name))
    with pytest.raises(ValueError, match=rf"`{name}` must be .*given: "):
        ssd_scan(**arguments, cu_seqlens=naive.cu_seqlens([4, 6]))


@pytest.mark.parametrize("slots", [[0, 5], [-1, 0], [0, 1, 2]])
def test_bad_slots(slots: list[int]) -> None:
    inputs = {name: tensor for name, tensor in make_inputs(2, 1).items() if name != "initial_state"}
    with pytest.raises(ValueError, match="`slots` must be"):
        ssd_state_update(torch.randn(5, H, P, N), **inputs, slots=torch.tensor(slots))
