"""The fused Mamba-2 decoding step: the public op's checks, and the Triton kernel against the single ops in torch."""

from typing import Any

import pytest
import torch
from torch import Tensor

from m1.kernels import mamba2_step
from tests.kernels.triton_cases import TOLERANCE, as_slices, poison_memory
from tests.numerics import rel_rms

pytest.importorskip("triton")
from m1.kernels.mamba2_step import reference
from m1.kernels.mamba2_step import triton_impl as kernel

Dims = tuple[int, int, int, int]  # H, G, P, N


@pytest.fixture(autouse=True)
def _poisoned_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    poison_memory(monkeypatch)


def make_inputs(n: int, dims: Dims, width: int, dtype: torch.dtype, device: str) -> dict[str, Any]:
    """Arguments in order; two more state slots than rows; rows are slices of one projection, as after in_proj."""
    H, G, P, N = dims
    torch.manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, device=device)

    channels = G * (P + N) + H * N
    rows = {"z": random(n, H, P), "xBC": random(n, channels), "dt": random(n, H)}
    return {
        "conv_state": random(n + 2, channels, width - 1).to(dtype),
        "ssm_state": random(n + 2, H, P, N),
        **as_slices({name: tensor.to(dtype) for name, tensor in rows.items()}),
        "conv_weight": random(channels, width),
        "conv_bias": random(channels),
        "A_log": random(H),
        "D": random(H),
        "dt_bias": random(H) - 2,
        "norm_weight": random(H * P),
        "norm_eps": 1e-5,
    }


def check(inputs: dict[str, Any], slots: Tensor | None, config: kernel.StepConfig | None = None, **options: Any) -> None:
    dtype = inputs["xBC"].dtype
    copies = {name: t.float().clone() if isinstance(t, Tensor) else t for name, t in inputs.items()}
    y = kernel.mamba2_step(**inputs, **options, slots=slots, config=config)
    expected = reference.mamba2_step(**copies, **options, slots=slots)
    assert y.dtype == dtype
    assert rel_rms(y, expected) < TOLERANCE[dtype]
    assert rel_rms(inputs["ssm_state"], copies["ssm_state"]) < TOLERANCE[dtype]
    assert torch.equal(inputs["conv_state"].float(), copies["conv_state"])


@pytest.mark.parametrize(
    ("dims", "dtype"),
    [
        ((6, 2, 5, 3), torch.float32),
        ((2, 2, 2, 4), torch.float32),
        ((3, 1, 3, 17), torch.float32),
        # Not narrower: where a few outputs of a head nearly cancel, its norm magnifies their rounding without limit.
        ((6, 2, 16, 32), torch.bfloat16),
    ],
)
def test_against_the_single_ops(dims: Dims, dtype: torch.dtype, device: str) -> None:
    slots = torch.tensor([3, 0, 4], device=device)
    check(make_inputs(3, dims, 4, dtype, device), slots)
    check(make_inputs(3, dims, 2, dtype, device), None)


@pytest.mark.parametrize("absent", [("norm_weight",), ("conv_bias", "D", "dt_bias")])
def test_optional_inputs(absent: tuple[str, ...], device: str) -> None:
    inputs = make_inputs(2, (4, 2, 3, 3), 3, torch.float32, device)
    check(inputs | dict.fromkeys(absent), None, conv_activation=None, dt_softplus="dt_bias" not in absent)


@pytest.mark.parametrize("state_dtype", [torch.float32, torch.bfloat16])
def test_states_of_any_layout_and_dtype(state_dtype: torch.dtype, device: str) -> None:
    """Windows with channels side by side, as the model keeps them for a CPU; states with heads outermost."""
    inputs = make_inputs(2, (4, 2, 3, 3), 4, torch.float32, device)
    inputs["conv_state"] = inputs["conv_state"].mT.contiguous().mT
    inputs["ssm_state"] = inputs["ssm_state"].to(state_dtype).transpose(0, 1).contiguous().transpose(0, 1)
    copies = {name: t.clone() if isinstance(t, Tensor) else t for name, t in inputs.items()}
    slots = torch.tensor([3, 1], device=device)
    y, expected = kernel.mamba2_step(**inputs, slots=slots), reference.mamba2_step(**copies, slots=slots)
    assert rel_rms(y, expected) < TOLERANCE[torch.float32]
    assert rel_rms(inputs["ssm_state"], copies["ssm_state"]) < TOLERANCE[state_dtype]
    assert torch.equal(inputs["conv_state"], copies["conv_state"])


def test_rows_without_a_slot_change_nothing(device: str) -> None:
    inputs = make_inputs(3, (4, 2, 2, 2), 4, torch.float32, device)
    before = {name: inputs[name].clone() for name in ("conv_state", "ssm_state")}
    y = kernel.mamba2_step(**inputs, slots=torch.tensor([-1, 1, 5], device=device))
    assert (y[[0, 2]] == 0).all()
    assert (y[1] != 0).all()
    for name, states in before.items():
        assert torch.equal(inputs[name][[0, 2, 3, 4]], states[[0, 2, 3, 4]])
        assert not torch.equal(inputs[name][1], states[1])


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("z", lambda t: t[:2]),
        ("xBC", lambda t: t[:, :-1]),
        ("xBC", lambda t: t.long()),
        ("dt", lambda t: t[:, :1]),
        ("A_log", lambda t: t[:1]),
        ("D", lambda t: t[:1]),
        ("dt_bias", lambda t: t.long()),
        ("conv_weight", lambda t: t[:3]),
        ("conv_bias", lambda t: t[:3]),
        ("conv_state", lambda t: t[:, :, :1]),
        ("ssm_state", lambda t: t[0]),
        ("norm_weight", lambda t: t[:3]),
        ("norm_eps", lambda t: -1.0),
        ("slots", lambda t: torch.tensor([0, 1, 5])),
        ("conv_activation", lambda t: "relu"),
    ],
)
def test_public_op_names_bad_arguments(name: str, change: Any) -> None:
    inputs = make_inputs(3, (4, 2, 2, 2), 4, torch.float32, "cpu")
    assert mamba2_step(**inputs).shape == (3, 4, 2)
    with pytest.raises(ValueError, match=rf"`{name}` must be .*given: "):
        mamba2_step(**inputs | {name: change(inputs.get(name))})


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dims", [(24, 8, 128, 128), (14, 2, 64, 64), (9, 3, 64, 64), (5, 5, 24, 100), (2, 1, 16, 256)])
def test_at_model_sizes(dims: Dims, dtype: torch.dtype) -> None:
    slots = torch.randperm(35, device="cuda")[:33]
    for config in (None, kernel.StepConfig(1024), kernel.StepConfig(4096)):
        check(make_inputs(33, dims, 4, dtype, "cuda"), slots, config)


@pytest.mark.gpu
def test_in_a_cuda_graph() -> None:
    """Replayed steps go on from the states and rows that lie in the graph's tensors then."""
    inputs = make_inputs(5, (9, 3, 64, 64), 4, torch.bfloat16, "cuda")
    slots = torch.tensor([6, 1, 0, 3, 2], device="cuda")
    start = {name: inputs[name].clone() for name in ("conv_state", "ssm_state")}
    kernel.mamba2_step(**inputs, slots=slots)  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = kernel.mamba2_step(**inputs, slots=slots)
    for name, tensor in start.items():
        inputs[name].copy_(tensor)
    copies = {name: t.float().clone() if isinstance(t, Tensor) else t for name, t in inputs.items()}
    for _ in range(2):
        graph.replay()
        expected = reference.mamba2_step(**copies, slots=slots)
        assert rel_rms(y, expected) < TOLERANCE[torch.bfloat16]
    assert rel_rms(inputs["ssm_state"], copies["ssm_state"]) < TOLERANCE[torch.bfloat16]
