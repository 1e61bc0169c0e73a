"""Triton sampling: token for token against the torch reference on the same noise, and frequencies by chi-squared tests."""

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.numerics import SAMPLE_LOGPROB

pytest.importorskip("triton")
import triton
import triton.language as tl

from m1.kernels.sampling import reference, triton_impl
from m1.kernels.sampling.triton_noise import gumbel, row_key, uniform

# Small tiles, so that a small vocabulary has several tiles, more groups than candidates, and a last tile that is not full.
SMALL = triton_impl.SampleConfig(tile=256, num_splits=2, group=8, candidates=16)

# Each names the part of the kernel that must decide, at SMALL's 16 candidate groups.
FILTERS: dict[str, dict[str, float]] = {
    "temperature alone": {},
    "greedy": {"temperature": 0.0},
    "top_k among candidates": {"top_k": 10},
    "top_k by passes": {"top_k": 200},
    "top_k by passes, fewer than candidates hold": {"top_k": 100},
    "top_p among candidates": {"top_p": 0.5},
    "top_p by passes": {"top_p": 0.6},
    "min_p among candidates": {"min_p": 0.2},
    "min_p by passes": {"min_p": 0.3},
    "top_k and top_p among candidates": {"top_k": 12, "top_p": 0.8},
    "top_k and top_p by passes": {"top_k": 300, "top_p": 0.6},
    "all among candidates": {"top_k": 9, "top_p": 0.8, "min_p": 0.05},
    "all by passes": {"top_k": 500, "top_p": 0.9, "min_p": 0.3},
}


@pytest.fixture(autouse=True)
def _poisoned_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fill what torch.empty returns with NaN or a number far out of range: a value a kernel forgets to write is seen."""
    empty = torch.empty

    def poisoned(*args: Any, **kwargs: Any) -> Tensor:
        tensor = empty(*args, **kwargs)
        return tensor.fill_(float("nan") if tensor.is_floating_point() else -(10**6))

    monkeypatch.setattr(torch, "empty", poisoned)


def _settings(rows: list[dict[str, float]], device: str) -> dict[str, Tensor]:
    """Sampling settings of each row, with random seeds and positions."""

    def column(name: str, off: float, dtype: torch.dtype) -> Tensor:
        return torch.tensor([row.get(name, off) for row in rows], dtype=dtype, device=device)

    return {
        "temperature": column("temperature", 0.8, torch.float32),
        "top_k": column("top_k", 0, torch.int64),
        "top_p": column("top_p", 1.0, torch.float32),
        "min_p": column("min_p", 0.0, torch.float32),
        "seeds": torch.randint(-(2**63), 2**63 - 1, (len(rows),), device=device),
        "positions": torch.randint(0, 10**5, (len(rows),), device=device),
    }


def _assert_equals_reference(logits: Tensor, settings: dict[str, Tensor], config: Any = None, mistakes: int = 0) -> None:
    """`mistakes`: rows that may differ, where two scores are one rounding apart."""
    token, logprob = triton_impl.sample(logits, **settings, config=config)
    right, right_logprob = reference.sample(logits, **settings)
    assert token.dtype == torch.int64
    assert logprob.dtype == torch.float32
    is_equal = token == right
    assert (~is_equal).sum() <= mistakes
    assert (logprob - right_logprob)[is_equal].abs().max() < SAMPLE_LOGPROB


@pytest.mark.parametrize("name", FILTERS)
def test_equals_reference(name: str, device: str) -> None:
    torch.manual_seed(1)
    spread = 0.3 if "passes" in name else 2.0  # flat logits: many tokens are kept, and many are not
    logits = spread * torch.randn(4, 1000, device=device)
    _assert_equals_reference(logits, _settings([FILTERS[name]] * 4, device), SMALL)


def test_the_best_of_many_tiles_wins(device: str) -> None:
    """Tiles where nothing can win are skipped: no winner may be, however narrowly it wins."""
    torch.manual_seed(11)
    many = triton_impl.SampleConfig(tile=32, num_splits=2, group=8)
    logits = 0.1 * torch.randn(12, 500, device=device)
    _assert_equals_reference(logits, _settings([{"temperature": 1.0}] * 12, device), many)


def test_rows_of_a_batch_have_their_own_filters_and_strides(device: str) -> None:
    torch.manual_seed(2)
    rows = list(FILTERS.values())
    padded = torch.full((len(rows), 2 * 1000), 1e4, device=device)  # what lies beside a row would win
    padded[:, :600] = 2 * torch.randn(len(rows), 600, device=device)
    _assert_equals_reference(padded[:, :600], _settings(rows, device), SMALL)


def test_ties_are_kept_together(device: str) -> None:
    """Coarse bf16 logits: many tokens equal the k-th, and the greedy choice is the first of the highest."""
    torch.manual_seed(3)
    logits = torch.randint(-3, 3, (8, 700), device=device).to(torch.bfloat16)
    rows = [{"top_k": 5}, {"top_p": 0.3}, {"top_k": 400, "top_p": 0.5}, {"temperature": 0.0}] * 2
    _assert_equals_reference(logits, _settings(rows, device), SMALL)


def test_draws_depend_on_seed_and_position_only(device: str) -> None:
    torch.manual_seed(4)
    rows = [{}, {"top_k": 20}, {"top_p": 0.9}]
    logits = 2 * torch.randn(3, 500, device=device)
    settings = _settings(rows, device)
    token, logprob = triton_impl.sample(logits, **settings, config=SMALL)
    order = torch.tensor([2, 0, 1], device=device)
    moved = {name: values[order] for name, values in settings.items()}
    other = triton_impl.SampleConfig(tile=128, num_splits=4, group=4, candidates=8)
    again, again_logprob = triton_impl.sample(logits[order], **moved, config=other)
    assert torch.equal(again, token[order])
    assert torch.allclose(again_logprob, logprob[order], atol=SAMPLE_LOGPROB)


def test_forbidden_tokens_and_rows_without_numbers(device: str) -> None:
    """-inf is never drawn; a padding row of NaN or of -inf alone ends, with a token inside the vocabulary."""
    torch.manual_seed(5)
    rows = [{}, {"top_k": 30}, {"top_k": 30, "top_p": 0.99}, {"top_p": 0.9}, {"min_p": 0.1}, {"temperature": 0.0}]
    logits = torch.full((len(rows), 300), -float("inf"), device=device)
    allowed = torch.randperm(300, device=device)[:5]
    logits[:, allowed] = torch.randn(len(rows), 5, device=device)
    token, logprob = triton_impl.sample(logits, **_settings(rows, device), config=SMALL)
    assert torch.isin(token, allowed).all()
    assert logprob.isfinite().all()
    for bad in (float("nan"), -float("inf")):
        token, _ = triton_impl.sample(torch.full_like(logits, bad), **_settings(rows, device), config=SMALL)
        assert ((token >= 0) & (token < 300)).all()


@triton.jit
def _noise_kernel(seed_ptr, position_ptr, out_ptr, BLOCK: tl.constexpr):
    row = tl.program_id(0)
    tokens = tl.arange(0, BLOCK)
    tl.store(out_ptr + row * BLOCK + tokens, gumbel(uniform(tokens, row_key(seed_ptr, position_ptr, row))))


def test_noise_is_the_references(device: str) -> None:
    torch.manual_seed(6)
    settings = _settings([{}] * 4, device)
    noise = torch.empty(4, 4096, device=device)
    _noise_kernel[(4,)](settings["seeds"], settings["positions"], noise, BLOCK=4096)
    expected = reference.gumbel_noise(settings["seeds"], settings["positions"], 4096)
    torch.testing.assert_close(noise, expected, rtol=1e-5, atol=1e-5)


def _assert_frequencies(tokens: Tensor, probabilities: Tensor) -> None:
    """Pearson's test at four standard deviations (Wilson and Hilferty's approximation); cells below 5 expected are merged."""
    observed = torch.bincount(tokens, minlength=len(probabilities)).double().cpu()
    expected = probabilities.double().cpu() * len(tokens)
    assert (observed[expected == 0] == 0).all()
    is_big = expected >= 5
    observed = torch.cat([observed[is_big], observed[~is_big].sum()[None]])
    expected = torch.cat([expected[is_big], expected[~is_big].sum()[None]])
    statistic = ((observed - expected).square() / expected.clamp_min(1e-9))[expected > 0].sum().item()
    freedom = int((expected > 0).sum()) - 1
    limit = freedom * (1 - 2 / (9 * freedom) + 4 * (2 / (9 * freedom)) ** 0.5) ** 3
    assert statistic < limit


def _kept_probabilities(logits: Tensor, row: dict[str, float]) -> Tensor:
    """What a row's draws must follow, by sorting: temperature, min_p, top_k, top_p in this order; no ties in `logits`."""
    p = (logits.double() / row.get("temperature", 0.8)).softmax(-1)
    p = torch.where(p >= row.get("min_p", 0.0) * p.max(), p, 0)
    if row.get("top_k", 0):
        p = torch.where(p >= p.sort(descending=True).values[int(row["top_k"]) - 1], p, 0)
    p /= p.sum()
    order = p.argsort(descending=True)
    before = p[order].cumsum(0) - p[order]
    p[order[before >= row.get("top_p", 1.0)]] = 0
    return p / p.sum()


def test_frequencies_small(device: str) -> None:
    torch.manual_seed(7)
    logits = torch.randn(6, device=device)
    tokens, _ = triton_impl.sample(
        logits.expand(200, 6), **_settings([{}] * 200, device),
        config=triton_impl.SampleConfig(tile=8, num_splits=1, group=4, candidates=2),
    )  # fmt: skip
    _assert_frequencies(tokens, _kept_probabilities(logits, {}))


@pytest.mark.gpu
@pytest.mark.parametrize("name", [name for name in FILTERS if name != "greedy"])
@pytest.mark.parametrize("num_tokens", [50, 1000])
def test_frequencies(name: str, num_tokens: int) -> None:
    """A million draws a filter; with 50 tokens every kept one is seen, so the support is the filters' exactly."""
    torch.manual_seed(8)
    row = dict(FILTERS[name])
    row["top_k"] = min(int(row.get("top_k", 0)), num_tokens)
    logits = torch.randn(num_tokens, device="cuda")
    probabilities = _kept_probabilities(logits, row)
    draws = []
    for _ in range(10):
        settings = _settings([row], "cuda")
        settings = {key: value.expand(100_000) for key, value in settings.items()}
        settings["seeds"] = torch.randint(-(2**63), 2**63 - 1, (100_000,), device="cuda")
        draws.append(triton_impl.sample(logits.expand(100_000, -1), **settings, config=SMALL)[0])
    tokens = torch.cat(draws)
    _assert_frequencies(tokens, probabilities)
    is_certain = probabilities > 1e-4
    assert (torch.bincount(tokens, minlength=num_tokens)[is_certain] > 0).all()


@pytest.mark.gpu
@pytest.mark.parametrize("spread", [0.02, 1.0, 4.0])
@pytest.mark.parametrize(
    ("num_rows", "num_tokens", "dtype"),
    [(1, 128256, torch.float32), (63, 151936, torch.bfloat16), (300, 49152, torch.float32), (2, 50257, torch.bfloat16)],
)
def test_model_sizes(num_rows: int, num_tokens: int, spread: float, dtype: torch.dtype) -> None:
    torch.manual_seed(9)
    logits = (spread * torch.randn(num_rows, num_tokens, device="cuda")).to(dtype)
    kinds = [
        {}, {"temperature": 0.0}, {"top_k": 50}, {"top_k": 50, "top_p": 0.95}, {"top_p": 0.95}, {"min_p": 0.05},
        {"top_k": 1}, {"top_k": 5000}, {"top_k": 5000, "top_p": 0.9}, {"top_k": 40, "top_p": 0.9, "min_p": 0.02},
    ]  # fmt: skip
    for start in range(0, len(kinds), num_rows):
        rows = [kinds[(start + i) % len(kinds)] for i in range(num_rows)]
        # A cumulative mass summed in another order may keep one token more or less of a flat row's thousands.
        _assert_equals_reference(logits, _settings(rows, "cuda"), mistakes=num_rows // 100)


@pytest.mark.gpu
def test_replays_in_a_graph_with_other_settings() -> None:
    torch.manual_seed(10)
    rows = [{}, {"temperature": 0.0}, {"top_k": 50, "top_p": 0.9}, {"min_p": 0.1}]
    logits = 3 * torch.randn(4, 128256, device="cuda")
    settings = _settings(rows, "cuda")
    torch.cuda.set_sync_debug_mode("error")
    try:
        triton_impl.sample(logits, **settings)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        token, _ = triton_impl.sample(logits, **settings)
    for _ in range(3):
        for name, values in _settings(rows[::-1], "cuda").items():
            settings[name].copy_(values)
        graph.replay()
        assert torch.equal(token, reference.sample(logits, **settings)[0])


def test_batches_of_any_size_share_their_compiled_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Compiling takes seconds: nothing that is compiled in may depend on how many sequences there are."""
    compiled: dict[str, set[tuple[Any, ...]]] = {}

    class Recorder:
        def __init__(self, name: str) -> None:
            self.name = name

        def __getitem__(self, grid: Any) -> Any:
            return lambda *_, **constants: compiled.setdefault(self.name, set()).add(tuple(sorted(constants.items())))

    for name in ("_scan_kernel", "_finish_kernel"):
        monkeypatch.setattr(triton_impl, name, Recorder(name))
    splits = set()
    for num_rows in (1, 7, 33, 100, 600, 2048):
        rows = {name: torch.ones(num_rows) for name in ("temperature", "top_p", "min_p")}
        whole = {name: torch.ones(num_rows, dtype=torch.int64) for name in ("top_k", "seeds", "positions")}
        triton_impl.sample(torch.randn(num_rows, 20_000), **rows, **whole)
        splits.add(triton_impl.choose_config(num_rows, 200_000, 132).num_splits)
    assert {name: len(constants) for name, constants in compiled.items()} == {"_scan_kernel": 1, "_finish_kernel": 1}
    assert len(splits) > 3
    assert max(splits) <= triton_impl.MAX_SPLITS
