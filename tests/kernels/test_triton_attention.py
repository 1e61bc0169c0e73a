"""Triton paged attention and cache writes against naive float64 attention over the gathered keys and values."""

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.numerics import REL_RMS, REL_RMS_KERNEL_FP32, rel_rms

pytest.importorskip("triton")
from m1.kernels.attention import reference, triton_decode, triton_impl
from m1.kernels.rope import reference as rope_reference

FP8 = torch.float8_e4m3fn
# fp8 pages are compared with attention over what the pages hold; the weights are rounded to fp16, the output to bf16.
TOLERANCE = {torch.float32: REL_RMS_KERNEL_FP32, torch.bfloat16: REL_RMS[torch.bfloat16], FP8: REL_RMS[torch.bfloat16]}


@pytest.fixture(autouse=True)
def _poisoned_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fill what torch.empty returns with NaN, so that an element a kernel forgets to write is seen."""
    empty = torch.empty

    def poisoned(*args: Any, **kwargs: Any) -> Tensor:
        tensor = empty(*args, **kwargs)
        return tensor.fill_(float("nan")) if tensor.is_floating_point() else tensor

    monkeypatch.setattr(torch, "empty", poisoned)


class Cache:
    """Pages of random keys and values of `contexts` positions, scattered, with NaN wherever no position lies."""

    def __init__(
        self, contexts: list[int], page_size: int, num_groups: int, width: int, dtype: torch.dtype, device: str,
        spare_pages: int = 3, scale: tuple[Tensor, Tensor] | None = None,
    ) -> None:  # fmt: skip
        counts = [-(-context // page_size) for context in contexts]
        order = torch.randperm(sum(counts) + spare_pages)
        self.tables = torch.full((len(contexts), max([*counts, 1]) + 1), -(10**6), dtype=torch.int32)
        pages = torch.full((2, len(order), page_size, num_groups, width), float("nan"))
        self.keys, self.values = [], []  # per sequence [context, G, K], float64, as the pages hold them
        start = 0
        for row, (context, count) in enumerate(zip(contexts, counts, strict=True)):
            mine = order[start : start + count]
            start += count
            self.tables[row, :count] = mine.int()
            for which, store in enumerate((self.keys, self.values)):
                held = torch.randn(context, num_groups, width).to(dtype).float()
                flat = pages[which, mine].flatten(0, 1)
                flat[:context] = held
                pages[which, mine] = flat.view(count, page_size, num_groups, width)
                store.append(held.double() if scale is None else held.double() * scale[which].cpu().double().view(-1, 1))
        self.key_pages, self.value_pages = pages.to(dtype).to(device)  # two slices of one tensor: strided pages
        self.tables = self.tables.to(device)
        self.context_lens = torch.tensor(contexts, dtype=torch.int32, device=device)


def naive(cache: Cache, q: Tensor, lengths: list[int], scale: float, window: int | None = None) -> Tensor:
    """Causal attention of the last `lengths[i]` positions of each sequence, in float64."""
    outputs = []
    start = 0
    for keys, values, length in zip(cache.keys, cache.values, lengths, strict=True):
        repeats = q.shape[1] // keys.shape[1]
        keys, values = keys.to(q.device), values.to(q.device)
        queries = q[start : start + length].double()
        start += length
        context = len(keys)
        scores = torch.einsum("qhk,chk->hqc", queries, keys.repeat_interleave(repeats, 1)) * scale
        position = torch.arange(context - length, context, device=q.device)[:, None]
        other = torch.arange(context, device=q.device)[None]
        is_seen = (other <= position) & (other > position - (window or context + 1))
        weights = scores.masked_fill(~is_seen, -torch.inf).softmax(-1)
        outputs.append(torch.einsum("hqc,chk->qhk", weights, values.repeat_interleave(repeats, 1)))
    return torch.cat(outputs)


def _attend(cache: Cache, q: Tensor, lengths: list[int], **options: Any) -> Tensor:
    bounds = torch.tensor([0, *lengths]).cumsum(0).int().to(q.device)
    return triton_impl.paged_attention(
        q, cache.key_pages, cache.value_pages, block_tables=cache.tables, context_lens=cache.context_lens,
        cu_seqlens=bounds, max_seqlen=max(lengths), **options,
    )  # fmt: skip


def _queries(num_tokens: int, num_heads: int, width: int, dtype: torch.dtype, device: str) -> Tensor:
    """Heads of q as a slice of a merged projection: not contiguous."""
    dtype = torch.bfloat16 if dtype == FP8 else dtype
    return torch.randn(num_tokens, num_heads + 2, width, device=device).to(dtype)[:, 1:-1]


HEADS = [(6, 2, 32), (7, 1, 64), (3, 3, 24)]  # with groups of 3, 7 and 1: none fills the padded 16 rows
CONTEXTS = [1, 63, 140, 129]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, FP8])
@pytest.mark.parametrize("page_size", [16, 128])
@pytest.mark.parametrize(("num_heads", "num_groups", "width"), HEADS)
def test_decode(num_heads: int, num_groups: int, width: int, page_size: int, dtype: torch.dtype, device: str) -> None:
    torch.manual_seed(1)
    cache = Cache(CONTEXTS, page_size, num_groups, width, dtype, device)
    q = _queries(4, num_heads, width, dtype, device)
    out = _attend(cache, q, [1] * 4)
    assert out.dtype == q.dtype
    assert rel_rms(out, naive(cache, q, [1] * 4, width**-0.5)) < TOLERANCE[dtype]


@pytest.mark.parametrize(("num_splits", "window"), [(1, None), (1, 70), (2, None), (8, None), (8, 1), (8, 70)])
def test_decode_splits_and_windows(num_splits: int, window: int | None, device: str) -> None:
    torch.manual_seed(2)
    cache = Cache(CONTEXTS, 16, 2, 32, torch.float32, device)
    q = _queries(4, 6, 32, torch.float32, device)
    config = triton_decode.DecodeConfig(16, num_splits, 32, 4, 2)
    pages = (cache.key_pages, cache.value_pages, cache.tables, cache.context_lens)
    out = triton_decode.paged_decode(q, *pages, scale=0.3, window=window, config=config)
    assert rel_rms(out, naive(cache, q, [1] * 4, 0.3, window)) < REL_RMS_KERNEL_FP32


@pytest.mark.parametrize("num_splits", [1, 4])
def test_padding_rows_of_a_captured_batch_are_zero(num_splits: int, device: str) -> None:
    torch.manual_seed(3)
    cache = Cache([0, 40, 0], 16, 1, 16, torch.float32, device)
    q = _queries(3, 2, 16, torch.float32, device)
    config = triton_decode.DecodeConfig(16, num_splits, 16, 4, 2)
    pages = (cache.key_pages, cache.value_pages, cache.tables, cache.context_lens)
    out = triton_decode.paged_decode(q, *pages, scale=1.0, config=config)
    assert (out[[0, 2]] == 0).all()
    assert out[1].isfinite().all()


@pytest.mark.parametrize("is_per_head", [False, True])
@pytest.mark.parametrize("length", [1, 5])
def test_fp8_scales(length: int, is_per_head: bool, device: str) -> None:
    torch.manual_seed(4)
    scale = tuple(0.1 + torch.rand(2 if is_per_head else 1, device=device) for _ in range(2))
    cache = Cache([70, 33], 16, 2, 32, FP8, device, scale=scale)
    q = _queries(2 * length, 6, 32, FP8, device)
    out = _attend(cache, q, [length] * 2, k_scale=scale[0], v_scale=scale[1])
    assert rel_rms(out, naive(cache, q, [length] * 2, 32**-0.5)) < TOLERANCE[FP8]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, FP8])
@pytest.mark.parametrize("page_size", [16, 128])
@pytest.mark.parametrize(("num_heads", "num_groups", "width"), HEADS)
def test_chunked_prefill_mixed_with_decoding(
    num_heads: int, num_groups: int, width: int, page_size: int, dtype: torch.dtype, device: str
) -> None:
    torch.manual_seed(5)
    cache = Cache([1, 63, 90, 129, 20], page_size, num_groups, width, dtype, device)
    lengths = [1, 63, 1, 40, 7]  # a first token, a whole prompt, a decoding row, chunks after 89 and 13 cached positions
    q = _queries(sum(lengths), num_heads, width, dtype, device)
    out = _attend(cache, q, lengths)
    assert out.dtype == q.dtype
    assert rel_rms(out, naive(cache, q, lengths, width**-0.5)) < TOLERANCE[dtype]


@pytest.mark.parametrize("window", [1, 30])
def test_prefill_window(window: int, device: str) -> None:
    torch.manual_seed(6)
    cache = Cache([90, 45], 16, 2, 32, torch.float32, device)
    q = _queries(80, 6, 32, torch.float32, device)
    out = _attend(cache, q, [50, 30], window=window, scale=0.3)
    assert rel_rms(out, naive(cache, q, [50, 30], 0.3, window)) < REL_RMS_KERNEL_FP32


def _written(num_tokens: int, num_pages: int, page_size: int, device: str) -> Tensor:
    """Distinct random slots, every third one negative (skipped)."""
    slots = torch.randperm(num_pages * page_size)[:num_tokens].to(device)
    slots[::3] = -1
    return slots


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, FP8])
def test_write_kv(dtype: torch.dtype, device: str) -> None:
    torch.manual_seed(7)
    # Values that fp8 holds exactly, at scales that keep them so: the interpreter's rounding to fp8 loses carries.
    k, v = (torch.randn(11, 5, 24, device=device).to(FP8).to(torch.bfloat16)[:, ::2] for _ in range(2))
    k[1] *= 2**12  # beyond what fp8 can hold: saturates
    before = torch.randn(2, 4, 16, 3, 24, device=device).to(dtype)
    pages = before.clone()
    slots = _written(11, 4, 16, device)
    if dtype == FP8:
        scale = 2.0 ** torch.randint(-3, 1, (2, 3), device=device)
        triton_impl.write_kv(k, v, *pages, slots, k_scale=scale[0], v_scale=scale[1])
        k, v = ((x.float() / s[:, None]).clamp(-448, 448) for x, s in zip((k, v), scale, strict=True))
    else:
        triton_impl.write_kv(k, v, *pages, slots)
    expected = before.float()
    expected.flatten(1, 2)[0, slots[slots >= 0]] = k[slots >= 0].float()
    expected.flatten(1, 2)[1, slots[slots >= 0]] = v[slots >= 0].float()
    assert torch.equal(pages.float(), expected)


@pytest.mark.gpu
@pytest.mark.parametrize("count", [1, 8])
def test_write_kv_rounds_to_fp8_as_torch_does(count: int) -> None:
    torch.manual_seed(12)
    k, v = (10 * torch.randn(600, 8, 128, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    scale = 0.05 + torch.rand(2, count, device="cuda")
    pages = torch.zeros(2, 10, 64, 8, 128, device="cuda").to(FP8)
    slots = torch.randperm(640, device="cuda")[:600]
    triton_impl.write_kv(k, v, *pages, slots, k_scale=scale[0], v_scale=scale[1])
    for x, page, one in zip((k, v), pages, scale, strict=True):
        expected = (x.float() / one[:, None]).clamp(-448, 448).to(FP8)
        written = page.flatten(0, 1)[slots]
        assert (written.float() != expected.float()).float().mean() < 1e-3  # the kernel's division is off by an ulp at times


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("num_heads", "num_groups", "width"), [(6, 2, 32), (7, 1, 48)])
def test_rope_write_kv_is_rotation_then_write(
    num_heads: int, num_groups: int, width: int, dtype: torch.dtype, device: str
) -> None:
    torch.manual_seed(8)
    merged = torch.randn(11, num_heads + 2 * num_groups, width, device=device).to(dtype)
    q, k, v = merged.split([num_heads, num_groups, num_groups], 1)
    cos, sin = (torch.randn(11, width, device=device) for _ in range(2))
    pages = torch.randn(2, 4, 16, num_groups, width, device=device).to(dtype)
    expected = pages.clone()
    slots = _written(11, 4, 16, device)
    rotated = triton_impl.rope_write_kv(q, k, v, cos, sin, *pages, slots)
    triton_impl.write_kv(rope_reference.apply_rotary(k, cos, sin), v, *expected, slots)
    assert rel_rms(rotated, rope_reference.apply_rotary(q.float(), cos, sin)) < TOLERANCE[dtype]
    assert torch.equal(pages[1], expected[1])
    assert rel_rms(pages[0], expected[0]) < TOLERANCE[dtype]


def test_unusable_pages_are_refused(device: str) -> None:
    cache = Cache([5], 16, 2, 32, torch.float32, device)
    q = _queries(1, 6, 32, torch.float32, device)
    cache.key_pages = cache.key_pages.transpose(2, 3).contiguous().transpose(2, 3)
    with pytest.raises(ValueError, match=r"key_pages.*contiguous"):
        _attend(cache, q, [1])


@pytest.mark.parametrize("length", [1, 5])
@pytest.mark.parametrize("page_size", [16, 128])
def test_wrong_pages_and_lengths_stay_inside_memory(page_size: int, length: int, device: str) -> None:
    """Far pages in the table's used part, a context beyond the table: that row means nothing, the others are right."""
    torch.manual_seed(12)
    cache = Cache([40, 70, 33], page_size, 2, 32, torch.float32, device)
    cache.key_pages[cache.key_pages.isnan()], cache.value_pages[cache.value_pages.isnan()] = 0.0, 0.0
    cache.tables[0, 0] = 10**9
    cache.tables[1, :] = -(10**9)
    cache.context_lens[1] = 10**6
    q = _queries(3 * length, 6, 32, torch.float32, device)
    out = _attend(cache, q, [length] * 3)
    assert out.isfinite().all()
    expected = naive(cache, q, [length] * 3, 32**-0.5)
    assert rel_rms(out[2 * length :], expected[2 * length :]) < REL_RMS_KERNEL_FP32


def test_wrong_slots_write_nothing(device: str) -> None:
    torch.manual_seed(13)
    q, k, v = (torch.randn(3, heads, 16, device=device) for heads in (4, 2, 2))
    cos, sin = (torch.randn(3, 16, device=device) for _ in range(2))
    for write in (triton_impl.write_kv, lambda k, v, *rest: triton_impl.rope_write_kv(q, k, v, cos, sin, *rest)):
        pages = torch.randn(2, 4, 16, 2, 16, device=device)
        before = pages.clone()
        write(k, v, *pages, torch.tensor([64, 5, 10**12], device=device))
        changed = (pages != before).flatten(1, 2).any(-1).any(-1)
        assert changed[:, 5].all()
        assert changed.sum() == 2


@pytest.mark.gpu
def test_wrong_indices_on_a_gpu() -> None:
    """An illegal access would be reported here, when the GPU is waited for, or poison every later test."""
    for page_size, length in ((16, 1), (16, 5), (128, 1), (128, 5)):
        test_wrong_pages_and_lengths_stay_inside_memory(page_size, length, "cuda")
    test_wrong_slots_write_nothing("cuda")
    torch.cuda.synchronize()


@pytest.mark.parametrize("num_sequences", [1, 32, 128, 512, 1024])
@pytest.mark.parametrize(("num_heads", "num_groups", "width"), [(24, 8, 128), (14, 2, 64), (9, 3, 64)])
@pytest.mark.parametrize("capacity", [16, 2304, 32768])
def test_chosen_launches_fit(num_sequences: int, num_heads: int, num_groups: int, width: int, capacity: int) -> None:
    config = triton_decode.choose_config(num_sequences, num_heads, num_groups, width, 2, capacity, 132)
    assert config.num_splits & (config.num_splits - 1) == 0
    assert 1 <= config.num_splits <= triton_decode.MAX_SPLITS
    assert config.num_splits * num_sequences * num_heads * width * 4 <= max(
        triton_decode.PARTIAL_BYTES, num_sequences * num_heads * width * 4
    )
    if capacity == 16:
        assert config.num_splits == 1
    if capacity == 32768 and num_sequences * num_groups < 132:
        assert num_sequences * num_groups * config.num_splits >= 132


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("num_heads", "num_groups", "width", "page_size", "dtype"),
    [
        (24, 8, 128, 256, torch.float32),
        *((*case, dtype) for dtype in (torch.bfloat16, FP8)
          for case in ((24, 8, 128, 16), (24, 8, 128, 256), (14, 2, 64, 64), (9, 3, 64, 16))),
    ],
)  # fmt: skip
def test_model_sizes(num_heads: int, num_groups: int, width: int, page_size: int, dtype: torch.dtype) -> None:
    torch.manual_seed(9)
    contexts = [1, 63, 1000, 4097, 64, 2048]
    cache = Cache(contexts, page_size, num_groups, width, dtype, "cuda")
    for lengths in ([1] * 6, [1, 63, 300, 1, 64, 1000]):
        q = _queries(sum(lengths), num_heads, width, dtype, "cuda")
        for window in (None, 512):
            out = _attend(cache, q, lengths, window=window)
            assert rel_rms(out, naive(cache, q, lengths, width**-0.5, window)) < TOLERANCE[dtype]


@pytest.mark.gpu
@pytest.mark.parametrize("count", [1, 8])
def test_rope_write_kv_in_fp8_at_model_size(count: int) -> None:
    """What is written is what torch would write, but for roundings that the rotation's last bit tips."""
    torch.manual_seed(14)
    q, k, v = torch.randn(600, 40, 128, device="cuda", dtype=torch.bfloat16).split([24, 8, 8], 1)
    cos, sin = (torch.randn(600, 128, device="cuda") for _ in range(2))
    scale = 0.05 + torch.rand(2, count, device="cuda")
    pages = torch.zeros(2, 10, 64, 8, 128, device="cuda").to(FP8)
    expected = pages.clone()
    slots = torch.randperm(640, device="cuda")[:600]
    scales = {"k_scale": scale[0], "v_scale": scale[1]}
    rotated = triton_impl.rope_write_kv(q, k, v, cos, sin, *pages, slots, **scales)
    expected_rotated = reference.rope_write_kv(q, k, v, cos, sin, *expected, slots, **scales)
    assert rel_rms(rotated, expected_rotated) < REL_RMS[torch.bfloat16]
    assert (pages.float() != expected.float()).float().mean() < 0.02
    assert rel_rms(pages.float(), expected.float()) < REL_RMS[torch.bfloat16]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, FP8])
def test_decode_replays_in_a_graph_with_other_lengths(dtype: torch.dtype) -> None:
    """Captured once at full lengths without synchronising, replayed with the lengths changed on the device."""
    torch.manual_seed(10)
    cache = Cache([3000, 800, 129], 64, 8, 128, dtype, "cuda")
    q = _queries(3, 24, 128, dtype, "cuda")
    bounds = torch.arange(4, dtype=torch.int32, device="cuda")

    def step() -> Tensor:
        return triton_impl.paged_attention(
            q, cache.key_pages, cache.value_pages, block_tables=cache.tables, context_lens=cache.context_lens,
            cu_seqlens=bounds, max_seqlen=1,
        )  # fmt: skip

    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = step()
    for lengths in ([3000, 800, 129], [1, 64, 128], [2999, 0, 65]):
        cache.context_lens.copy_(torch.tensor(lengths, dtype=torch.int32))
        graph.replay()
        for row, length in enumerate(lengths):
            if length == 0:
                assert (out[row] == 0).all()
                continue
            alone = Cache.__new__(Cache)
            alone.keys, alone.values = [cache.keys[row][:length]], [cache.values[row][:length]]
            assert rel_rms(out[row : row + 1], naive(alone, q[row : row + 1], [1], 128**-0.5)) < TOLERANCE[dtype]


def test_agrees_with_the_torch_reference(device: str) -> None:
    torch.manual_seed(11)
    cache = Cache([40, 7, 33], 16, 2, 32, torch.float32, device)
    scales = {name: 0.3 + torch.rand(2, device=device) for name in ("k_scale", "v_scale")}
    for lengths, more in (([1, 1, 1], {}), ([9, 7, 1], {}), ([1, 1, 1], scales), ([9, 7, 1], scales)):
        q = _queries(sum(lengths), 6, 32, torch.float32, device)
        bounds = torch.tensor([0, *lengths]).cumsum(0).int().to(device)
        options = {"block_tables": cache.tables, "context_lens": cache.context_lens, "cu_seqlens": bounds, **more}
        expected = reference.paged_attention(q, cache.key_pages, cache.value_pages, max_seqlen=max(lengths), **options)
        assert rel_rms(_attend(cache, q, lengths, **more), expected) < REL_RMS_KERNEL_FP32
