"""The torch causal convolution against the token-by-token one in float64: outputs, states and every gradient."""

from typing import Any

import pytest
import torch
from torch import Tensor

from m1.kernels import causal_conv1d, causal_conv1d_update
from tests.kernels import naive
from tests.kernels.compare import assert_close, gradients_and_outputs
from tests.numerics import REL_RMS

D = 6


def make_inputs(num_tokens: int, num_sequences: int, width: int = 4, seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        "x": torch.randn(num_tokens, D, generator=generator),
        "weight": torch.randn(D, width, generator=generator),
        "bias": torch.randn(D, generator=generator),
        "initial_state": torch.randn(num_sequences, D, width - 1, generator=generator),
    }


def run_naive(inputs: dict[str, Tensor], lengths: list[int], activation: str | None) -> dict[str, Tensor]:
    wide = {name: tensor.double() for name, tensor in inputs.items()}
    return gradients_and_outputs(lambda **kw: naive.convolution(kw, lengths, activation), wide)


def run_op(inputs: dict[str, Tensor], lengths: list[int], activation: Any) -> dict[str, Tensor]:
    bounds = naive.cu_seqlens(lengths)
    return gradients_and_outputs(
        lambda **kw: causal_conv1d(**kw, activation=activation, cu_seqlens=bounds, output_final_state=True), inputs
    )


@pytest.mark.parametrize("activation", [None, "silu"])
@pytest.mark.parametrize("lengths", [[1], [63], [1000], [1, 2, 3, 4], [5, 1, 70, 2, 33]])
def test_outputs_states_and_gradients(lengths: list[int], activation: str | None) -> None:
    inputs = make_inputs(sum(lengths), len(lengths))
    assert_close(run_op(inputs, lengths, activation), run_naive(inputs, lengths, activation), REL_RMS[torch.float32])


@pytest.mark.parametrize("width", [2, 3, 5])
@pytest.mark.parametrize("absent", [("bias",), ("initial_state",), ("bias", "initial_state")])
def test_widths_and_optional_inputs(width: int, absent: tuple[str, ...]) -> None:
    lengths = [1, 9, 3]
    inputs = {name: tensor for name, tensor in make_inputs(13, 3, width).items() if name not in absent}
    assert_close(run_op(inputs, lengths, "silu"), run_naive(inputs, lengths, "silu"), REL_RMS[torch.float32])


@pytest.mark.parametrize(("head_width", "num_repeats"), [(2, 3), (3, 2), (6, 1)])
def test_heads_of_x_serve_several_heads_of_filters(head_width: int, num_repeats: int) -> None:
    """The same as repeating x and its initial state first: outputs, and gradients summed over the repetitions."""
    lengths = [1, 9, 3]
    inputs = make_inputs(13, 3)
    generator = torch.Generator().manual_seed(5)
    inputs["weight"] = torch.randn(num_repeats * D, 4, generator=generator)
    inputs["bias"] = torch.randn(num_repeats * D, generator=generator)
    index = torch.tensor(
        [h // num_repeats * head_width + p for h in range(num_repeats * D // head_width) for p in range(head_width)]
    )

    def repeated(**kw: Tensor) -> tuple[Tensor, Tensor]:
        wide = kw | {"x": kw["x"][:, index], "initial_state": kw["initial_state"][:, index]}
        y, final = naive.convolution(wide, lengths, "silu")
        own = [channel for channel in range(num_repeats * D) if channel // head_width % num_repeats == 0]
        return y, final[:, own]

    expected = gradients_and_outputs(repeated, {name: tensor.double() for name, tensor in inputs.items()})
    options = {"activation": "silu", "cu_seqlens": naive.cu_seqlens(lengths), "output_final_state": True}
    actual = gradients_and_outputs(lambda **kw: causal_conv1d(**kw, **options, head_width=head_width), inputs)
    assert_close(actual, expected, REL_RMS[torch.float32])

    states = inputs["initial_state"].clone()
    x, weight, bias = inputs["x"][:3], inputs["weight"], inputs["bias"]
    y = causal_conv1d_update(x, states, weight, bias, activation="silu", head_width=head_width)
    wide_states = inputs["initial_state"][:, index]
    assert torch.equal(y, causal_conv1d_update(x[:, index], wide_states, weight, bias, activation="silu"))
    assert torch.equal(states[:, index], wide_states)


def test_width_one_has_no_state() -> None:
    inputs = make_inputs(5, 1, 1)
    y, state = causal_conv1d(**inputs, output_final_state=True)
    assert_close({"y": y}, {"y": inputs["x"] * inputs["weight"][:, 0] + inputs["bias"]}, REL_RMS[torch.float32])
    assert state.shape == (1, D, 0)


def test_non_contiguous_and_bf16_inputs() -> None:
    lengths = [20, 13]
    inputs = {name: tensor.bfloat16() for name, tensor in make_inputs(33, 2).items()}
    strided = {name: torch.stack([tensor, tensor + 1], -1)[..., 0] for name, tensor in inputs.items()}
    actual = run_op(strided, lengths, "silu")
    assert {actual["output 0"].dtype, actual["output 1"].dtype, actual["dx"].dtype} == {torch.bfloat16}
    assert_close(actual, run_naive(inputs, lengths, "silu"), REL_RMS[torch.bfloat16])


def test_without_final_state_only_y_comes_back() -> None:
    inputs = make_inputs(12, 1)
    y = causal_conv1d(**inputs)
    assert torch.equal(y, causal_conv1d(**inputs, output_final_state=True)[0])


def test_one_document_never_reaches_another() -> None:
    inputs = make_inputs(30, 3)
    clean = run_op(inputs, [10, 8, 12], None)
    inputs["x"][10:18] = torch.nan
    poisoned = run_op(inputs, [10, 8, 12], None)
    for rows in (slice(0, 10), slice(18, 30)):
        assert torch.equal(poisoned["output 0"][rows], clean["output 0"][rows])
    assert torch.equal(poisoned["output 1"][[0, 2]], clean["output 1"][[0, 2]])


@pytest.mark.parametrize("activation", [None, "silu"])
def test_final_state_then_steps_equals_longer_convolution(activation: Any) -> None:
    inputs = make_inputs(14, 1)
    y, final = causal_conv1d(**inputs, activation=activation, output_final_state=True)
    head = inputs | {"x": inputs["x"][:2]}  # shorter than the window: the state still holds some of the initial one
    y_head, state = causal_conv1d(**head, activation=activation, output_final_state=True)
    pool = torch.randn(3, D, 3)
    pool[2] = state[0]
    rest = pool[:2].clone()
    filters = (inputs["weight"], inputs["bias"])
    steps = [
        causal_conv1d_update(inputs["x"][t : t + 1], pool, *filters, activation=activation, slots=torch.tensor([2]))
        for t in range(2, 14)
    ]
    assert_close({"y": torch.cat([y_head, *steps])}, {"y": y}, REL_RMS[torch.float32])
    assert torch.equal(pool[2], final[0])
    assert torch.equal(pool[:2], rest)


@pytest.mark.parametrize("state_dtype", [torch.float32, torch.bfloat16])
def test_update_of_scattered_slots(state_dtype: torch.dtype) -> None:
    inputs = make_inputs(3, 1)
    pool = torch.randn(5, D, 3).to(state_dtype)
    slots = torch.tensor([4, 0, 2])
    before = pool.clone()
    wide = {name: tensor.double() for name, tensor in inputs.items()} | {"initial_state": pool[slots].double()}
    y_expected, state_expected = naive.convolution(wide, [1, 1, 1], "silu")
    y = causal_conv1d_update(inputs["x"], pool, inputs["weight"], inputs["bias"], activation="silu", slots=slots)
    assert_close({"y": y}, {"y": y_expected}, REL_RMS[torch.float32])
    assert_close({"state": pool[slots]}, {"state": state_expected}, REL_RMS[state_dtype])
    assert torch.equal(pool[[1, 3]], before[[1, 3]])


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("x", torch.ones(10, D, dtype=torch.int64)),
        ("x", torch.ones(10)),
        ("weight", torch.ones(D - 1, 4)),
        ("weight", torch.ones(D, 0)),
        ("bias", torch.ones(D, 1)),
        ("bias", torch.ones(D, device="meta")),
        ("initial_state", torch.ones(2, D, 4)),
        ("initial_state", torch.ones(1, D, 3)),
        ("activation", "relu"),
    ],
)
def test_bad_inputs_are_named(name: str, value: Any) -> None:
    arguments: dict[str, Any] = make_inputs(10, 2) | {name: value}
    with pytest.raises(ValueError, match=rf"`{name}` must be .*given: "):
        causal_conv1d(**arguments, cu_seqlens=naive.cu_seqlens([4, 6]))


def test_bad_slots_and_states() -> None:
    inputs = make_inputs(2, 1)
    filters = (inputs["weight"], inputs["bias"])
    with pytest.raises(ValueError, match=r"`slots` must be within 0 … 4; given: values from 1 to 5"):
        causal_conv1d_update(inputs["x"], torch.randn(5, D, 3), *filters, slots=torch.tensor([1, 5]))
    with pytest.raises(ValueError, match="`slots` must be"):
        causal_conv1d_update(inputs["x"], torch.randn(1, D, 3), *filters)
    with pytest.raises(ValueError, match="`conv_state` must be"):
        causal_conv1d_update(inputs["x"], torch.randn(5, D, 4), *filters)
