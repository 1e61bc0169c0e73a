"""The fused Mamba-1 decoding step: the public op's checks, and the Triton kernel against the two update ops in torch."""

import pytest
import torch
from torch import Tensor

from m1.kernels.mamba1_step import mamba1_step
from tests.kernels.triton_cases import TOLERANCE, as_slices, poison_memory
from tests.numerics import rel_rms

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
        "conv_state": random(n + 2, channels, width - 1).to(dtype),
        "ssm_state": random(n + 2, H, P, N),
        **as_slices({name: tensor.to(dtype) for name, tensor in rows.items()}),
        "conv_weight": random(channels, width),
        "conv_bias": random(channels),
        "A": -random(H, P, N).exp(),
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
    check(make_inputs(3, dims, 4, is_repeated_first, dtype, device), slots)
    check(make_inputs(3, dims, 2, is_repeated_first, dtype, device), None)


def test_rows_without_a_slot_change_nothing(device: str) -> None:
    inputs = make_inputs(3, (4, 2, 2, 2), 4, True, torch.float32, device)
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
    for config in (None, kernel.StepConfig(1, 1), kernel.StepConfig(8, 8)):
        check(make_inputs(33, dims, 4, is_repeated_first, dtype, "cuda"), slots, config)
