"""The Triton causal convolution against the torch one in fp32: outputs, states, gradients; small sizes in the interpreter."""

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.kernels.triton_cases import LONG_LENGTHS, TOLERANCE, bounds_of, compare, poison_memory
from tests.numerics import rel_rms

pytest.importorskip("triton")
from m1.kernels.causal_conv1d import reference
from m1.kernels.causal_conv1d import triton_impl as kernel

SMALL = kernel.ConvConfig(chunk=8, steps=4, backward_steps=4)


@pytest.fixture(autouse=True)
def _poisoned_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    poison_memory(monkeypatch)


def make_inputs(
    num_tokens: int, num_sequences: int, channels: int, width: int, dtype: torch.dtype, device: str, num_repeats: int = 1
) -> dict[str, Tensor]:
    torch.manual_seed(0)
    inputs = {
        "x": torch.randn(num_tokens, channels + 3, dtype=dtype, device=device)[:, 1:-2],  # rows of something wider
        "weight": torch.randn(num_repeats * channels, width, dtype=dtype, device=device),
        "bias": torch.randn(num_repeats * channels, dtype=dtype, device=device),
    }
    if width > 1:
        inputs["initial_state"] = torch.randn(num_sequences, channels, width - 1, dtype=dtype, device=device)
    return inputs


def check(
    inputs: dict[str, Tensor],
    lengths: list[int],
    activation: Any,
    config: kernel.ConvConfig | None,
    head_width: int | None = None,
) -> None:
    x = inputs["x"]
    options = {"activation": activation, "cu_seqlens": bounds_of(lengths, x.device.type), "head_width": head_width}
    has_state = inputs["weight"].shape[1] > 1

    def with_state(op: Any, **more: Any) -> Any:
        return lambda **kw: (
            op(**kw, **options, **more, output_final_state=True) if has_state else (op(**kw, **options, **more),)
        )

    ours, truth = with_state(kernel.causal_conv1d, config=config), with_state(reference.causal_conv1d)
    compare(ours, truth, inputs, x.dtype)


@pytest.mark.parametrize(
    ("lengths", "channels", "width", "activation", "dtype"),
    [
        ([1], 3, 4, "silu", torch.float32),
        ([17], 5, 4, None, torch.float32),
        ([1, 3, 9, 2], 260, 4, "silu", torch.float32),
        ([7, 1], 5, 2, "silu", torch.float32),
        ([3, 10], 4, 5, None, torch.float32),
        ([5], 4, 1, "silu", torch.float32),
        ([2, 12], 5, 4, "silu", torch.bfloat16),
    ],
)
def test_outputs_states_and_gradients(
    lengths: list[int], channels: int, width: int, activation: str | None, dtype: torch.dtype, device: str
) -> None:
    check(make_inputs(sum(lengths), len(lengths), channels, width, dtype, device), lengths, activation, SMALL)


@pytest.mark.parametrize(
    ("channels", "head_width", "num_repeats", "most_members", "dtype"),
    [
        (12, 4, 3, 8, torch.float32),
        (12, 4, 3, 8, torch.bfloat16),
        (90, 5, 2, 8, torch.float32),
        (4, 2, 2, 1, torch.float32),  # more members than a program's registers hold
    ],
)
def test_x_repeated_by_indexing(
    channels: int,
    head_width: int,
    num_repeats: int,
    most_members: int,
    dtype: torch.dtype,
    device: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(kernel, "MOST_MEMBERS", most_members)
    lengths = [1, 6]
    inputs = make_inputs(7, 2, channels, 4, dtype, device, num_repeats)
    check(inputs, lengths, "silu", SMALL, head_width)


@pytest.mark.parametrize("absent", [("bias",), ("initial_state",), ("bias", "initial_state")])
def test_optional_inputs(absent: tuple[str, ...], device: str) -> None:
    lengths = [2, 9]
    inputs = make_inputs(11, 2, 5, 4, torch.float32, device)
    check({name: tensor for name, tensor in inputs.items() if name not in absent}, lengths, "silu", SMALL)


def test_gradient_of_the_final_state_alone(device: str) -> None:
    inputs = make_inputs(6, 2, 5, 4, torch.float32, device)
    bounds = bounds_of([5, 1], device)

    def state_of(op: Any) -> Any:
        return lambda **kw: op(**kw, cu_seqlens=bounds, output_final_state=True)[1:]

    wide = {name: inputs[name] for name in ("x", "initial_state")}
    rest = {name: inputs[name] for name in ("weight", "bias")}
    ours, truth = state_of(kernel.causal_conv1d), state_of(reference.causal_conv1d)
    compare(lambda **kw: ours(**kw, **rest), lambda **kw: truth(**kw, **rest), wide, torch.float32)


@pytest.mark.parametrize("num_repeats", [1, 3])
@pytest.mark.parametrize("width", [1, 4])
def test_update_shifts_the_states_it_is_given(width: int, num_repeats: int, device: str) -> None:
    """Rows whose slot does not exist change nothing and yield zeros; the states' layout is free."""
    torch.manual_seed(1)
    x, weight = torch.randn(4, 6, device=device), torch.randn(6 * num_repeats, width, device=device)
    bias = torch.randn(6 * num_repeats, device=device)
    states = torch.randn(width - 1, 6, 6, device=device).permute(1, 2, 0)
    expected_states = states.clone()
    slots = torch.tensor([4, -1, 0, 6], device=device)
    is_real = torch.tensor([True, False, True, False])
    y = kernel.causal_conv1d_update(x, states, weight, bias, activation="silu", slots=slots, head_width=2)
    expected = reference.causal_conv1d_update(
        x[is_real], expected_states, weight, bias, activation="silu", slots=slots[is_real], head_width=2
    )
    assert rel_rms(y[is_real], expected) < TOLERANCE[torch.float32]
    assert torch.equal(states, expected_states)
    assert (y[~is_real] == 0).all()


def test_step_continues_convolution(device: str) -> None:
    inputs = make_inputs(9, 1, 5, 4, torch.float32, device)
    whole = kernel.causal_conv1d(**inputs, activation="silu")
    head = inputs | {"x": inputs["x"][:8]}
    _, state = kernel.causal_conv1d(**head, activation="silu", output_final_state=True)
    y = kernel.causal_conv1d_update(inputs["x"][8:], state, inputs["weight"], inputs["bias"], activation="silu")
    assert rel_rms(y[0], whole[8]) < TOLERANCE[torch.float32]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("channels", [576, 1000])
@pytest.mark.parametrize("lengths", LONG_LENGTHS, ids=lambda lengths: f"{len(lengths)}x{max(lengths)}")
def test_at_length(lengths: list[int], channels: int, dtype: torch.dtype) -> None:
    inputs = make_inputs(sum(lengths), len(lengths), channels, 4, dtype, "cuda")
    check(inputs, lengths, "silu", None)
    check(inputs, lengths, "silu", kernel.ConvConfig(128, 4, 2, 8, 2, 4))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("groups", "num_repeats"), [(64, 3), (8, 7)], ids=["3B", "0.5B"])
@pytest.mark.parametrize("lengths", [[63, 1, 1000, 2, 4097, 64]])
def test_x_repeated_by_indexing_at_length(lengths: list[int], groups: int, num_repeats: int, dtype: torch.dtype) -> None:
    inputs = make_inputs(sum(lengths), len(lengths), 16 * groups, 4, dtype, "cuda", num_repeats)
    check(inputs, lengths, "silu", None, 16)
    check(inputs, lengths, "silu", kernel.ConvConfig(chunk=32, backward_steps=4), 16)


@pytest.mark.gpu
@pytest.mark.parametrize("block", [32, 256])
@pytest.mark.parametrize("is_channel_last", [False, True])
def test_update_at_model_sizes(block: int, is_channel_last: bool) -> None:
    """Also where a program has more threads than channels, so that several hold the same window."""
    torch.manual_seed(2)
    x = torch.randn(300, 1000, device="cuda")
    weight, bias = torch.randn(3000, 4, device="cuda"), torch.randn(3000, device="cuda")
    states = torch.randn(310, 3, 1000, device="cuda").mT if is_channel_last else torch.randn(310, 1000, 3, device="cuda")
    expected_states, slots = states.clone(), torch.randperm(310, device="cuda")[:300]
    y = kernel.causal_conv1d_update(x, states, weight, bias, slots=slots, head_width=20, block=block)
    expected = reference.causal_conv1d_update(x, expected_states, weight, bias, slots=slots, head_width=20)
    assert rel_rms(y, expected) < TOLERANCE[torch.float32]
    assert torch.equal(states, expected_states)


@pytest.mark.gpu
def test_nothing_waits_for_the_gpu() -> None:
    inputs = make_inputs(100, 2, 64, 4, torch.bfloat16, "cuda")
    leaves = {name: tensor.requires_grad_() for name, tensor in inputs.items()}
    bounds, slots = bounds_of([60, 40], "cuda"), torch.tensor([1, 0], device="cuda")
    for _ in range(2):  # the first time compiles
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error" if _ else "default")
        try:
            y, state = kernel.causal_conv1d(**leaves, cu_seqlens=bounds, output_final_state=True)
            (y.sum() + state.sum()).backward()
            kernel.causal_conv1d(inputs["x"], inputs["weight"])
            kernel.causal_conv1d_update(inputs["x"][:2], state.detach(), inputs["weight"], slots=slots)
        finally:
            torch.cuda.set_sync_debug_mode("default")
