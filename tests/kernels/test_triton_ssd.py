"""The Triton SSD scan against the torch one in fp32: outputs, states, gradients; small sizes in the interpreter."""

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.kernels.triton_cases import LONG_LENGTHS, TOLERANCE, as_slices, bounds_of, compare, poison_memory
from tests.numerics import rel_rms

pytest.importorskip("triton")
from m1.kernels.ssd import reference
from m1.kernels.ssd import triton_impl as kernel

Dims = tuple[int, int, int, int, int]  # H, G, Gx, P, N
SMALL = kernel.SsdConfig(32, *(kernel.Tile(16, 16, 1, 1),) * 4)
ACTIVATIONS = ("x", "dt", "B", "C")


@pytest.fixture(autouse=True)
def _poisoned_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    poison_memory(monkeypatch)


def make_inputs(num_tokens: int, num_sequences: int, dims: Dims, dtype: torch.dtype, device: str) -> dict[str, Tensor]:
    """Sizes of Δ and A as models have them; activations are slices of one tensor, as after the convolution."""
    H, G, Gx, P, N = dims
    torch.manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, device=device)

    activations = {
        "x": random(num_tokens, Gx, P),
        "dt": random(num_tokens, H),
        "B": random(num_tokens, G, N),
        "C": random(num_tokens, H, N),
    }
    inputs = as_slices({name: tensor.to(dtype) for name, tensor in activations.items()})
    inputs |= {"A": -random(H).exp(), "D": random(H), "dt_bias": random(H) - 2}
    return inputs | {"initial_state": random(num_sequences, H, P, N)}


def check(inputs: dict[str, Tensor], lengths: list[int], config: kernel.SsdConfig | None, **options: Any) -> None:
    x = inputs["x"]
    options |= {"cu_seqlens": bounds_of(lengths, x.device.type), "output_final_state": True}
    compare(
        lambda **kw: kernel.ssd_scan(**kw, **options, config=config),
        lambda **kw: reference.ssd_scan(**kw, **options),
        inputs,
        x.dtype,
    )


@pytest.mark.parametrize(
    ("lengths", "dims", "dtype"),
    [
        ([1], (2, 1, 1, 2, 3), torch.float32),
        ([35, 1, 32], (3, 1, 1, 4, 5), torch.float32),
        ([3, 40], (4, 2, 4, 3, 20), torch.float32),
        ([34], (4, 2, 1, 20, 3), torch.float32),
        ([33, 5], (4, 2, 2, 16, 16), torch.bfloat16),
    ],
)
def test_outputs_states_and_gradients(lengths: list[int], dims: Dims, dtype: torch.dtype, device: str) -> None:
    check(make_inputs(sum(lengths), len(lengths), dims, dtype, device), lengths, SMALL)


@pytest.mark.parametrize("tile", [(32, 16), (64, 64)])
def test_tiles_of_unequal_sides(tile: tuple[int, int], device: str) -> None:
    config = kernel.SsdConfig(64, kernel.Tile(16, 32, 1, 1), *(kernel.Tile(*tile, 1, 1),) * 3)
    check(make_inputs(42, 2, (1, 1, 1, 3, 4), torch.float32, device), [38, 4], config)


@pytest.mark.parametrize("absent", [("D",), ("dt_bias",), ("D", "dt_bias", "initial_state")])
def test_optional_inputs(absent: tuple[str, ...], device: str) -> None:
    inputs = make_inputs(37, 2, (2, 1, 1, 2, 2), torch.float32, device)
    check({name: tensor for name, tensor in inputs.items() if name not in absent}, [34, 3], SMALL)


def test_step_sizes_without_softplus(device: str) -> None:
    inputs = make_inputs(40, 1, (2, 1, 1, 2, 2), torch.float32, device)
    inputs |= {"dt": inputs["dt"].abs() * 0.3, "dt_bias": inputs["dt_bias"].abs() * 0.1}
    check(inputs, [40], SMALL, dt_softplus=False)


def test_strong_decays_do_not_overflow(device: str) -> None:
    """Log decays that sum to -1500 in a chunk: a product of two exponentials would be 0 · inf."""
    inputs = make_inputs(50, 1, (4, 2, 2, 2, 2), torch.float32, device)
    inputs |= {"A": torch.tensor([-8.0, -16.0, -4.0, -1e-3], device=device), "dt": inputs["dt"] + 3}
    check(inputs, [50], SMALL)


@pytest.mark.parametrize("chunk_size", [20, 100])
def test_chunk_size_changes_nothing(chunk_size: int, device: str) -> None:
    inputs = make_inputs(41, 2, (1, 1, 1, 2, 2), torch.float32, device)
    check(inputs, [37, 4], SMALL, chunk_size=chunk_size)


def test_gradient_of_outputs_or_of_states_alone(device: str) -> None:
    inputs = make_inputs(33, 1, (1, 1, 1, 2, 2), torch.float32, device)
    for chosen in (slice(0, 1), slice(1, 2)):
        names = ("x", "dt", "A", "B", "initial_state")
        rest = {name: tensor for name, tensor in inputs.items() if name not in names}

        def ours(chosen: slice = chosen, rest: dict = rest, **kw: Tensor) -> Any:
            return kernel.ssd_scan(**kw, **rest, output_final_state=True, config=SMALL)[chosen]

        def truth(chosen: slice = chosen, rest: dict = rest, **kw: Tensor) -> Any:
            return reference.ssd_scan(**kw, **rest, output_final_state=True)[chosen]

        compare(ours, truth, {name: inputs[name] for name in names}, torch.float32)


def test_one_document_never_reaches_another(device: str) -> None:
    """NaN in one document leaves its neighbours' outputs, states and gradients bit for bit as they were."""
    inputs = make_inputs(50, 3, (1, 1, 1, 3, 3), torch.float32, device)
    bounds = bounds_of([10, 5, 35], device)

    def run() -> list[Tensor]:
        leaves = {name: tensor.detach().clone().requires_grad_() for name, tensor in inputs.items()}
        y, state = kernel.ssd_scan(**leaves, cu_seqlens=bounds, output_final_state=True, config=SMALL)
        names = [*ACTIVATIONS, "initial_state"]
        return [y, state, *torch.autograd.grad(y.sum() + state.sum(), [leaves[name] for name in names])]

    clean = run()
    inputs["x"][10:15] = torch.nan
    for index, (one, other) in enumerate(zip(run(), clean, strict=True)):
        inside = slice(1, 2) if one.shape[0] == 3 else slice(10, 15)
        keep = torch.ones(one.shape[0], dtype=torch.bool)
        keep[inside] = False
        assert torch.equal(one[keep.to(device)], other[keep.to(device)]), index


@pytest.mark.parametrize("state_dtype", [torch.float32, torch.bfloat16])
def test_update_advances_the_states_it_is_given(state_dtype: torch.dtype, device: str) -> None:
    """Rows whose slot does not exist change nothing and yield zeros; the states' layout is free."""
    inputs = make_inputs(4, 6, (4, 2, 1, 3, 5), torch.float32, device)
    states = inputs.pop("initial_state").to(state_dtype).transpose(1, 2).contiguous().transpose(1, 2)
    expected_states = states.clone(memory_format=torch.contiguous_format)
    slots = torch.tensor([4, -1, 0, 6], device=device)
    is_real = torch.tensor([True, False, True, False], device=device)
    config = kernel.UpdateConfig(16, 1)  # blocks of two rows
    y = kernel.ssd_state_update(states, **inputs, slots=slots, config=config)
    rows = {name: t[is_real] if name in ACTIVATIONS else t for name, t in inputs.items()}
    expected = reference.ssd_state_update(expected_states, **rows, slots=slots[is_real])
    assert rel_rms(y[is_real], expected) < TOLERANCE[torch.float32]
    assert rel_rms(states, expected_states) < TOLERANCE[state_dtype]
    assert (y[~is_real] == 0).all()


def test_step_continues_scan(device: str) -> None:
    inputs = make_inputs(37, 1, (2, 1, 1, 2, 3), torch.float32, device)
    whole, last = kernel.ssd_scan(**inputs, output_final_state=True, config=SMALL)
    head = {name: t[:36] if name in ACTIVATIONS else t for name, t in inputs.items()}
    _, state = kernel.ssd_scan(**head, output_final_state=True, config=SMALL)
    tail = {name: t[36:] if name in ACTIVATIONS else t for name, t in inputs.items() if name != "initial_state"}
    y = kernel.ssd_state_update(state, **tail)
    assert rel_rms(y[0], whole[36]) < TOLERANCE[torch.float32]
    assert rel_rms(state, last) < TOLERANCE[torch.float32]


def test_heads_too_wide_are_refused(device: str) -> None:
    inputs = make_inputs(3, 1, (1, 1, 1, 129, 2), torch.float32, device)
    with pytest.raises(ValueError, match="no wider than 128"):
        kernel.ssd_scan(**inputs)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "dims", [(6, 2, 2, 16, 16), (9, 3, 3, 64, 64), (6, 2, 2, 128, 128), (5, 1, 5, 24, 100), (2, 1, 1, 256, 256)], ids=str
)
@pytest.mark.parametrize("lengths", LONG_LENGTHS, ids=lambda lengths: f"{len(lengths)}x{max(lengths)}")
def test_at_length(lengths: list[int], dims: Dims, dtype: torch.dtype) -> None:
    if dims[-1] > 128 and dtype == torch.float32:
        pytest.skip("heads too wide for this dtype")
    check(make_inputs(sum(lengths), len(lengths), dims, dtype, "cuda"), lengths, None)


@pytest.mark.gpu
@pytest.mark.parametrize("dims", [(24, 8, 8, 128, 128), (14, 2, 2, 64, 64)], ids=str)
def test_at_model_sizes(dims: Dims) -> None:
    lengths = [1000, 300, 1]
    check(make_inputs(sum(lengths), len(lengths), dims, torch.bfloat16, "cuda"), lengths, None)


@pytest.mark.gpu
def test_gradients_are_reproducible() -> None:
    inputs = make_inputs(3000, 2, (6, 2, 2, 64, 64), torch.bfloat16, "cuda")
    leaves = [tensor.requires_grad_() for tensor in inputs.values()]
    runs = []
    for _ in range(2):
        y = kernel.ssd_scan(**inputs, cu_seqlens=bounds_of([1000, 2000], "cuda"))
        runs.append(torch.autograd.grad(y.float().square().sum(), leaves))
    assert all(torch.equal(first, second) for first, second in zip(*runs, strict=True))


@pytest.mark.gpu
def test_nothing_waits_for_the_gpu() -> None:
    inputs = make_inputs(300, 2, (4, 2, 2, 64, 64), torch.bfloat16, "cuda")
    leaves = {name: tensor.requires_grad_() for name, tensor in inputs.items()}
    bounds, slots = bounds_of([200, 100], "cuda"), torch.tensor([1, 0], device="cuda")
    for is_warm in (False, True):  # the first time compiles
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error" if is_warm else "default")
        try:
            y, state = kernel.ssd_scan(**leaves, cu_seqlens=bounds, output_final_state=True)
            (y.sum() + state.sum()).backward()
            rows = {name: t[:2] if t.shape[0] == 300 else t for name, t in inputs.items() if name != "initial_state"}
            kernel.ssd_scan(**rows)
            kernel.ssd_state_update(state.detach(), **rows, slots=slots)
        finally:
            torch.cuda.set_sync_debug_mode("default")
