"""The Triton selective scan against the torch one in fp32: outputs, states, gradients; small sizes in the interpreter."""

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.kernels.triton_cases import LONG_LENGTHS, TOLERANCE, as_slices, bounds_of, compare, poison_memory
from tests.numerics import rel_rms

pytest.importorskip("triton")
from m1.kernels.chunk_table import cut_documents
from m1.kernels.selective_scan import reference
from m1.kernels.selective_scan import triton_impl as kernel

Dims = tuple[int, int, int, int, int]  # H, G, Gx, P, N
SMALL_TILE = kernel.Tile(4)
SMALL = kernel.ScanConfig(8, SMALL_TILE, SMALL_TILE, SMALL_TILE, kernel.Tile(2, channels=2))


@pytest.fixture(autouse=True)
def _poisoned_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    poison_memory(monkeypatch)


def make_inputs(num_tokens: int, num_sequences: int, dims: Dims, dtype: torch.dtype, device: str) -> dict[str, Tensor]:
    """Sizes of Δ and A as models have them; activations are slices of one tensor, as after in_proj."""
    H, G, Gx, P, N = dims
    torch.manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, device=device)

    activations = {
        "x": random(num_tokens, Gx, P),
        "dt": random(num_tokens, H, P),
        "B": random(num_tokens, G, N),
        "C": random(num_tokens, H, N),
        "z": random(num_tokens, H, P),
    }
    inputs = as_slices({name: tensor.to(dtype) for name, tensor in activations.items()})
    inputs |= {"A": -random(H, P, N).exp(), "D": random(H, P), "dt_bias": random(H, P) - 2}
    return inputs | {"initial_state": random(num_sequences, H, P, N)}


def check(inputs: dict[str, Tensor], lengths: list[int], config: kernel.ScanConfig | None, **options: Any) -> None:
    x = inputs["x"]
    options |= {"cu_seqlens": bounds_of(lengths, x.device.type), "output_final_state": True}
    compare(
        lambda **kw: kernel.selective_scan(**kw, **options, config=config),
        lambda **kw: reference.selective_scan(**kw, **options),
        inputs,
        x.dtype,
    )


def test_documents_are_cut_into_chunks(device: str) -> None:
    chunks = cut_documents(bounds_of([5, 1, 33, 16], device), 55, 16)
    assert chunks.rows.tolist() == [
        [0, 5, 0, 3],
        [5, 6, 1, 3],
        [6, 22, 2, 1],
        [22, 38, 2, 0],
        [38, 39, 2, 2],
        [39, 55, 3, 3],
    ] + [[0, 0, 0, 0] for _ in range(chunks.num_chunks - 6)]
    assert chunks.first_chunk.tolist() == [0, 1, 2, 5, 6]
    many = cut_documents(bounds_of([2, 3] * 150, device), 750, 2)
    assert many.first_chunk.tolist() == [0, *torch.tensor([1, 2] * 150).cumsum(0)]
    assert many.rows[:450, 2].tolist() == [i for pair in range(150) for i in (2 * pair, 2 * pair + 1, 2 * pair + 1)]


def test_a_table_serves_while_its_bounds_are_the_same(device: str) -> None:
    bounds = bounds_of([5, 1, 33, 16], device)
    table = cut_documents(bounds, 55, 16)
    assert cut_documents(bounds, 55, 16) is table
    assert cut_documents(bounds, 55, 8).num_chunks > table.num_chunks
    assert cut_documents(bounds.clone(), 55, 16) is not table
    bounds[1] = 4
    assert cut_documents(bounds, 55, 16).rows[:2, :2].tolist() == [[0, 4], [4, 6]]
    with torch.inference_mode():
        uncounted = bounds_of([5, 1, 33, 16], device)
        assert cut_documents(uncounted, 55, 16) is not cut_documents(uncounted, 55, 16)


@pytest.mark.parametrize(
    ("lengths", "dims", "dtype"),
    [
        ([1], (2, 1, 1, 2, 3), torch.float32),
        ([17, 1, 30], (3, 1, 3, 4, 4), torch.float32),
        ([23], (2, 2, 1, 3, 130), torch.float32),
        ([9, 12], (4, 2, 2, 16, 16), torch.bfloat16),
        ([11], (9, 3, 9, 8, 4), torch.bfloat16),  # groups that programs of 8 heads divide
    ],
)
def test_outputs_states_and_gradients(lengths: list[int], dims: Dims, dtype: torch.dtype, device: str) -> None:
    check(make_inputs(sum(lengths), len(lengths), dims, dtype, device), lengths, SMALL)


@pytest.mark.parametrize("lengths", [[5, 3], [18]])
@pytest.mark.parametrize("absent", [("D",), ("z",), ("D", "z", "dt_bias", "initial_state")])
def test_optional_inputs(absent: tuple[str, ...], lengths: list[int], device: str) -> None:
    inputs = make_inputs(sum(lengths), len(lengths), (2, 1, 1, 2, 2), torch.float32, device)
    check({name: tensor for name, tensor in inputs.items() if name not in absent}, lengths, SMALL)


def test_step_sizes_without_softplus(device: str) -> None:
    inputs = make_inputs(7, 1, (2, 1, 1, 2, 2), torch.float32, device)
    inputs |= {"dt": inputs["dt"].abs() + 2, "dt_bias": inputs["dt_bias"].abs() * 0.1}
    check(inputs, [7], SMALL, dt_softplus=False)


def test_gradient_of_outputs_or_of_states_alone(device: str) -> None:
    inputs = make_inputs(20, 1, (2, 1, 1, 2, 2), torch.float32, device)
    for chosen in (slice(0, 1), slice(1, 2)):
        names = ("x", "dt", "A", "B", "initial_state")
        rest = {name: tensor for name, tensor in inputs.items() if name not in names}

        def ours(chosen: slice = chosen, rest: dict = rest, **kw: Tensor) -> Any:
            return kernel.selective_scan(**kw, **rest, output_final_state=True, config=SMALL)[chosen]

        def truth(chosen: slice = chosen, rest: dict = rest, **kw: Tensor) -> Any:
            return reference.selective_scan(**kw, **rest, output_final_state=True)[chosen]

        compare(ours, truth, {name: inputs[name] for name in names}, torch.float32)


@pytest.mark.parametrize("state_dtype", [torch.float32, torch.bfloat16])
def test_update_advances_the_states_it_is_given(state_dtype: torch.dtype, device: str) -> None:
    """Rows whose slot does not exist change nothing and yield zeros; the states' layout is free."""
    inputs = make_inputs(4, 6, (5, 1, 5, 3, 3), torch.float32, device)
    states = inputs.pop("initial_state").to(state_dtype).transpose(1, 2).contiguous().transpose(1, 2)
    expected_states = states.clone()
    slots = torch.tensor([4, -1, 0, 6], device=device)
    is_real = torch.tensor([True, False, True, False], device=device)
    y = kernel.selective_state_update(states, **inputs, slots=slots)
    rows = {name: t[is_real] if name in ("x", "dt", "B", "C", "z") else t for name, t in inputs.items()}
    expected = reference.selective_state_update(expected_states, **rows, slots=slots[is_real])
    assert rel_rms(y[is_real], expected) < TOLERANCE[torch.float32]
    assert rel_rms(states, expected_states) < TOLERANCE[state_dtype]
    assert (y[~is_real] == 0).all()


def test_step_continues_scan(device: str) -> None:
    inputs = make_inputs(11, 1, (2, 1, 1, 2, 3), torch.float32, device)
    activations = ("x", "dt", "B", "C", "z")
    whole, last = kernel.selective_scan(**inputs, output_final_state=True, config=SMALL)
    head = {name: t[:10] if name in activations else t for name, t in inputs.items()}
    _, state = kernel.selective_scan(**head, output_final_state=True, config=SMALL)
    tail = {name: t[10:] if name in activations else t for name, t in inputs.items() if name != "initial_state"}
    y = kernel.selective_state_update(state, **tail)
    assert rel_rms(y[0], whole[10]) < TOLERANCE[torch.float32]
    assert rel_rms(state, last) < TOLERANCE[torch.float32]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dims", [(6, 2, 2, 16, 16), (5, 1, 5, 16, 16), (4, 2, 2, 64, 64), (3, 1, 1, 24, 128)], ids=str)
@pytest.mark.parametrize("lengths", LONG_LENGTHS, ids=lambda lengths: f"{len(lengths)}x{max(lengths)}")
def test_at_length(lengths: list[int], dims: Dims, dtype: torch.dtype) -> None:
    check(make_inputs(sum(lengths), len(lengths), dims, dtype, "cuda"), lengths, None)


@pytest.mark.gpu
@pytest.mark.parametrize(
    "config",
    [
        kernel.ScanConfig(128, *(kernel.Tile(8, 1, 2),) * 4),
        kernel.ScanConfig(100, *(kernel.Tile(4, 2, 3),) * 4),
        kernel.ScanConfig(64, *(kernel.Tile(2, max_registers=128),) * 4),
        kernel.ScanConfig(256, *(kernel.Tile(2, channels=2),) * 4),
    ],
)
def test_launch_sizes_do_not_matter(config: kernel.ScanConfig) -> None:
    lengths = [700, 1, 1300]
    check(make_inputs(2001, 3, (6, 2, 6, 16, 16), torch.float32, "cuda"), lengths, config)


@pytest.mark.gpu
def test_gradients_are_reproducible() -> None:
    inputs = make_inputs(3000, 2, (6, 2, 2, 16, 16), torch.bfloat16, "cuda")
    leaves = [tensor.requires_grad_() for tensor in inputs.values()]
    runs = []
    for _ in range(2):
        y = kernel.selective_scan(**inputs, cu_seqlens=bounds_of([1000, 2000], "cuda"))
        runs.append(torch.autograd.grad(y.float().square().sum(), leaves))
    assert all(torch.equal(first, second) for first, second in zip(*runs, strict=True))


@pytest.mark.gpu
def test_nothing_waits_for_the_gpu() -> None:
    inputs = make_inputs(300, 2, (4, 2, 2, 16, 16), torch.bfloat16, "cuda")
    leaves = {name: tensor.requires_grad_() for name, tensor in inputs.items()}
    bounds, slots = bounds_of([200, 100], "cuda"), torch.tensor([1, 0], device="cuda")
    for is_warm in (False, True):  # the first time compiles
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error" if is_warm else "default")
        try:
            y, state = kernel.selective_scan(**leaves, cu_seqlens=bounds, output_final_state=True)
            (y.sum() + state.sum()).backward()
            rows = {name: t[:2] if t.shape[0] == 300 else t for name, t in inputs.items() if name != "initial_state"}
            kernel.selective_scan(**rows)
            kernel.selective_state_update(state.detach(), **rows, slots=slots)
        finally:
            torch.cuda.set_sync_debug_mode("default")
