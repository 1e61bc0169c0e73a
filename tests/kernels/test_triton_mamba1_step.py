"""The fused Mamba-1 decoding step: the public op's checks, and the Triton kernel against the two update ops in torch."""

import pytest
import torch
from torch import Tensor

from m1.kernels import causal_conv1d_update, mamba1_step, selective_state_update
from tests.kernels.triton_cases import TOLERANCE, as_slices, poison_memory
from tests.numerics import REL_RMS, rel_rms

pytest.importorskip("triton")
from m1.kernels.mamba1_step import reference
from m1.kernels.mamba1_step import triton_impl as kernel


@pytest.fixture(autouse=True)
def _poisoned_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    poison_memory(monkeypatch)


def make_inputs(
    n: int, dims: tuple[int, int, int, int], width: int, is_repeated_first: bool, dtype: torch.dtype, device: str
) -> dict[str, Tensor]:
    """Arguments in order; dims = H, G, P, N; two more state slots than rows."""
    H, G, P, N = dims
    torch.manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, device=device)

    channels = H * P if is_repeated_first else G * P
    rows = {"z": random(n, H, P), "x": random(n, G, P), "B": random(n, G, N), "C": random(n, H, N), "dt": random(n, H, P)}
    return {
        "conv_state": random(n + 2, width - 1, G * P).to(dtype).mT,
        "ssm_state": random(n + 2, H, P, N),
        **as_slices({name: tensor.to(dtype) for name, tensor in rows.items()}),
        "conv_weight": random(channels, width),
        "conv_bias": random(channels),
        "A_log": random(H, P, N),
        "D": random(H, P),
        "dt_bias": random(H, P) - 2,
    }


def check(inputs: dict[str, Tensor], slots: Tensor | None, config: kernel.StepConfig | None = None) -> None:
    dtype = inputs["x"].dtype
    copies = {name: tensor.float().clone() for name, tensor in inputs.items()}
    y = kernel.mamba1_step(**inputs, slots=slots, config=config)  # type: ignore[arg-type]
    expected = reference.mamba1_step(**copies, slots=slots)  # type: ignore[arg-type]
    assert y.dtype == dtype
    assert rel_rms(y, expected) < TOLERANCE[dtype]
    assert rel_rms(inputs["ssm_state"], copies["ssm_state"]) < TOLERANCE[dtype]
    assert torch.equal(inputs["conv_state"].float(), copies["conv_state"])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("is_repeated_first", [False, True])
@pytest.mark.parametrize("dims", [(6, 3, 5, 3), (3, 1, 2, 4), (2, 2, 3, 130)])
def test_against_the_separate_ops(
    dims: tuple[int, int, int, int], is_repeated_first: bool, dtype: torch.dtype, device: str
) -> None:
    slots = torch.tensor([3, 0, 4], device=device)
    check(make_inputs(3, dims, 4, is_repeated_first, dtype, device), slots, kernel.StepConfig(2, 4, channels=2))
    check(make_inputs(3, dims, 2, is_repeated_first, dtype, device), None)


@pytest.mark.parametrize("is_repeated_first", [False, True])
@pytest.mark.parametrize("dims", [(6, 3, 5, 3), (7, 1, 4, 16), (2, 2, 3, 130)])
def test_half_states(dims: tuple[int, int, int, int], is_repeated_first: bool, device: str) -> None:
    launches = (kernel.StepConfig(2, 4), torch.tensor([3, 0, 4], device=device)), (None, None)
    for config, slots in launches:
        inputs = make_inputs(3, dims, 4, is_repeated_first, torch.bfloat16, device)
        inputs["ssm_state"] = inputs["ssm_state"].bfloat16()
        check(inputs, slots, config)


@pytest.mark.parametrize("is_repeated_first", [False, True])
def test_reference_is_repetition_then_convolution_then_scan(is_repeated_first: bool) -> None:
    """With x and its window repeated in memory, each op called by itself."""
    inputs = make_inputs(3, (6, 2, 4, 3), 4, is_repeated_first, torch.float32, "cpu")
    x, window, states = inputs["x"], inputs["conv_state"].clone(), inputs["ssm_state"].clone()
    slots = torch.tensor([3, 0, 4])
    if is_repeated_first:
        x = x.repeat_interleave(3, 1)
        window = window.unflatten(1, (2, 4)).repeat_interleave(3, 1).flatten(1, 2)
    filters = (inputs["conv_weight"], inputs["conv_bias"])
    x = causal_conv1d_update(x.flatten(1), window, *filters, activation="silu", slots=slots).unflatten(1, (-1, 4))
    A = -inputs["A_log"].exp()
    scan = {name: inputs[name] for name in ("D", "z", "dt_bias")}
    expected = selective_state_update(states, x, inputs["dt"], A, inputs["B"], inputs["C"], **scan, slots=slots)
    y = mamba1_step(**inputs, slots=slots)  # type: ignore[arg-type]
    assert rel_rms(y, expected) < REL_RMS[torch.float32]
    assert torch.equal(inputs["ssm_state"], states)
    if is_repeated_first:
        window = window.unflatten(1, (2, 3, 4))[:, :, 0].flatten(1, 2)
    assert torch.equal(inputs["conv_state"], window)


@pytest.mark.parametrize("state_dtype", [torch.float32, torch.bfloat16])
def test_rows_without_a_slot_change_nothing(state_dtype: torch.dtype, device: str) -> None:
    inputs = make_inputs(3, (4, 2, 2, 2), 4, True, torch.float32, device)
    inputs["ssm_state"] = inputs["ssm_state"].to(state_dtype)
    before = {name: inputs[name].clone() for name in ("conv_state", "ssm_state")}
    y = kernel.mamba1_step(**inputs, slots=torch.tensor([-1, 1, 5], device=device))  # type: ignore[arg-type]
    assert (y[[0, 2]] == 0).all()
    assert (y[1] != 0).all()
    for name, states in before.items():
        assert torch.equal(inputs[name][[0, 2, 3, 4]], states[[0, 2, 3, 4]])
        assert not torch.equal(inputs[name][1], states[1])


def test_public_op_checks_its_arguments() -> None:
    inputs = make_inputs(3, (4, 2, 2, 2), 4, False, torch.float32, "cpu")
    y = mamba1_step(**inputs)  # type: ignore[arg-type]
    assert y.shape == (3, 4, 2)
    with pytest.raises(ValueError, match="conv_weight"):
        mamba1_step(**inputs | {"conv_weight": inputs["conv_weight"][:3]})  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"`z`.*n=3"):
        mamba1_step(**inputs | {"z": inputs["z"][:2]})  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"`slots`.*within 0 … 4"):
        mamba1_step(**inputs, slots=torch.tensor([0, 1, 5]))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="conv_activation"):
        mamba1_step(**inputs, conv_activation="relu")  # type: ignore[arg-type]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("is_repeated_first", [False, True])
@pytest.mark.parametrize("dims", [(56, 8, 16, 16), (36, 12, 16, 16), (5, 5, 24, 64), (2, 1, 64, 128)])
def test_at_model_sizes(dims: tuple[int, int, int, int], is_repeated_first: bool, dtype: torch.dtype) -> None:
    slots = torch.randperm(35, device="cuda")[:33]
    # the second: programs with fewer elements than threads, so that several threads hold the same one
    for config in (None, kernel.StepConfig(1, 8)):
        check(make_inputs(33, dims, 4, is_repeated_first, dtype, "cuda"), slots, config)


@pytest.mark.gpu
def test_bf16_states_are_rounded_once() -> None:
    inputs = make_inputs(33, (192, 64, 16, 16), 4, True, torch.bfloat16, "cuda")
    inputs["ssm_state"] = inputs["ssm_state"].bfloat16()
    inputs["conv_state"] = inputs["conv_state"].contiguous()  # the other layout of a window
    for config in (None, kernel.StepConfig(2, 1), kernel.StepConfig(1, 4)):
        check(inputs, torch.randperm(35, device="cuda")[:33], config)


@pytest.mark.gpu
@pytest.mark.parametrize("state_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dims", [(192, 64, 16, 16), (56, 8, 16, 16), (36, 12, 16, 16), (5, 5, 24, 64)])
def test_launch_sizes_do_not_matter(dims: tuple[int, int, int, int], state_dtype: torch.dtype) -> None:
    slots = torch.randperm(35, device="cuda")[:33]
    for groups, channels in ((1, 4), (1, 8), (1, 16), (2, 4), (2, 8), (2, 16), (4, 4)):
        inputs = make_inputs(33, dims, 4, True, torch.bfloat16, "cuda")
        inputs["ssm_state"] = inputs["ssm_state"].to(state_dtype)
        check(inputs, slots, kernel.StepConfig(groups, channels=channels))


@pytest.mark.gpu
def test_wrong_slots_on_a_gpu() -> None:
    """Far slots, an illegal access if they were followed; also for the convolution's and the scan's own steps."""
    for dtype in (torch.float32, torch.bfloat16):
        test_rows_without_a_slot_change_nothing(dtype, "cuda")
    inputs = make_inputs(3, (4, 2, 2, 2), 4, True, torch.float32, "cuda")
    before = {name: inputs[name].clone() for name in ("conv_state", "ssm_state")}
    slots = torch.tensor([2**40, -(2**40), 10**6], device="cuda")
    assert (mamba1_step(**inputs, slots=slots) == 0).all()  # type: ignore[arg-type]
    A, x = -inputs["A_log"].exp(), inputs["x"]
    rows = {name: inputs[name] for name in ("dt", "B", "C", "z", "D", "dt_bias")}
    assert (selective_state_update(inputs["ssm_state"], x, A=A, **rows, slots=slots) == 0).all()
    weight, channels = inputs["conv_weight"], x.flatten(1)
    assert (causal_conv1d_update(channels, inputs["conv_state"], weight, slots=slots, head_width=2) == 0).all()
    assert all(torch.equal(inputs[name], states) for name, states in before.items())
