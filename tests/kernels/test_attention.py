"""The torch attentions against one softmax a query in float64: packed, paged, windowed, grouped; and cache writes."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend

from m1.kernels import apply_rotary, paged_attention, rope_write_kv, varlen_attention, write_kv
from m1.kernels.attention import torch_varlen
from m1.kernels.attention.reference import _groups_of_like_length
from tests.kernels import naive
from tests.kernels.compare import assert_close, gradients_and_outputs
from tests.numerics import REL_RMS, rel_rms

H, G, K, PAGE = 4, 2, 8, 4


def attend(q: Tensor, k: Tensor, v: Tensor, start: int, window: int | None, scale: float | None) -> Tensor:
    """Queries at positions start, start+1, … over keys at positions 0, 1, …: [L, H, K] by [context, G, K]."""
    rows = []
    for i, query in enumerate(q):
        last = start + i + 1
        first = 0 if window is None else max(0, last - window)
        keys, values = (torch.repeat_interleave(tensor[first:last], H // G, 1) for tensor in (k, v))
        scores = torch.einsum("hk,shk->hs", query, keys) * (K**-0.5 if scale is None else scale)
        rows.append(torch.einsum("hs,shk->hk", scores.softmax(-1), values))
    return torch.stack(rows)


def random_qkv(num_tokens: int, seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(num_tokens, heads, K, generator=generator) for name, heads in (("q", H), ("k", G), ("v", G))}


@pytest.mark.parametrize("window", [None, 5, 1000])
@pytest.mark.parametrize("lengths", [[2], [63], [30, 30, 29], [40, 1, 3, 2, 38, 2]])
def test_packed_outputs_and_gradients(lengths: list[int], window: int | None) -> None:
    inputs = random_qkv(sum(lengths))

    def expected(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor]:
        parts = [slice(*bounds) for bounds in naive.documents(lengths)]
        return (torch.cat([attend(q[part], k[part], v[part], 0, window, 0.3) for part in parts]),)

    def actual(**kw: Tensor) -> tuple[Tensor]:
        bounds = naive.cu_seqlens(lengths)
        return (varlen_attention(**kw, cu_seqlens=bounds, max_seqlen=max(lengths), window=window, scale=0.3),)

    wide = {name: tensor.double() for name, tensor in inputs.items()}
    assert_close(gradients_and_outputs(actual, inputs), gradients_and_outputs(expected, wide), REL_RMS[torch.float32])


@pytest.mark.parametrize(("lengths", "window"), [([1], None), ([1] * 9, None), ([30, 5], 1)])
def test_a_query_that_sees_one_key_takes_its_value(lengths: list[int], window: int | None) -> None:
    def op(**kw: Tensor) -> tuple[Tensor]:
        return (varlen_attention(**kw, cu_seqlens=naive.cu_seqlens(lengths), max_seqlen=max(lengths), window=window),)

    inputs = random_qkv(sum(lengths))
    results = gradients_and_outputs(op, inputs)
    assert_close({"y": results["output 0"]}, {"y": inputs["v"].repeat_interleave(H // G, 1)}, REL_RMS[torch.float32])
    for name in ("dq", "dk"):  # zero but for rounding, beside gradients of v of about 1
        assert results[name].abs().max() < REL_RMS[torch.float32]


def test_default_scale_and_no_cu_seqlens() -> None:
    inputs = random_qkv(20)
    wide = {name: tensor.double() for name, tensor in inputs.items()}
    actual = varlen_attention(**inputs, cu_seqlens=None, max_seqlen=20)
    assert_close({"y": actual}, {"y": attend(**wide, start=0, window=None, scale=None)}, REL_RMS[torch.float32])


def test_long_document_in_bf16() -> None:
    inputs = {name: tensor.bfloat16() for name, tensor in random_qkv(1000).items()}
    actual = varlen_attention(**inputs, cu_seqlens=naive.cu_seqlens([700, 300]), max_seqlen=700)
    assert actual.dtype == torch.bfloat16
    wide = {name: tensor.double() for name, tensor in inputs.items()}
    parts = [{name: tensor[part] for name, tensor in wide.items()} for part in (slice(0, 700), slice(700, 1000))]
    expected = torch.cat([attend(**part, start=0, window=None, scale=None) for part in parts])
    assert_close({"y": actual}, {"y": expected}, REL_RMS[torch.bfloat16])


def test_grouping_keeps_all_documents_and_bounds_the_padding() -> None:
    generator = torch.Generator().manual_seed(0)
    for count in (1, 2, 7, 40):
        lengths = torch.randint(1, 900, (count,), generator=generator).tolist()
        groups = _groups_of_like_length(lengths)
        assert sorted(document for documents, _ in groups for document in documents) == list(range(count))
        assert all(lengths[document] <= length for documents, length in groups for document in documents)
        area = sum(len(documents) * length**2 for documents, length in groups)
        assert area <= 1.5 * sum(length**2 for length in lengths)
        assert len(groups) <= 12


def test_one_document_never_reaches_another() -> None:
    lengths = [9, 12, 10]  # the first is padded to 12
    inputs, bounds = random_qkv(31), naive.cu_seqlens(lengths)
    clean = varlen_attention(**inputs, cu_seqlens=bounds, max_seqlen=12)
    inputs["k"][9:21] = inputs["v"][9:21] = torch.nan
    poisoned = varlen_attention(**inputs, cu_seqlens=bounds, max_seqlen=12)
    assert torch.equal(poisoned[:9], clean[:9])
    assert torch.equal(poisoned[21:], clean[21:])


def fill_cache(contexts: list[int], dtype: torch.dtype = torch.float32) -> tuple[list[dict[str, Tensor]], dict[str, Tensor]]:
    """Each sequence's random q, k, v of `contexts` positions; and pages that hold k and v, with NaN wherever none lies."""
    sequences = [random_qkv(context, seed) for seed, context in enumerate(contexts)]
    counts = [-(-context // PAGE) for context in contexts]
    order = torch.randperm(sum(counts) + 2, generator=torch.Generator().manual_seed(9)).tolist()
    pages = torch.full((2, len(order), PAGE, G, K), torch.nan, dtype=dtype)
    tables = torch.full((len(contexts), max(counts) + 1), -1, dtype=torch.int32)
    for row, (sequence, count) in enumerate(zip(sequences, counts, strict=True)):
        mine = [order.pop() for _ in range(count)]
        tables[row, :count] = torch.tensor(mine)
        slots = torch.tensor([mine[t // PAGE] * PAGE + t % PAGE for t in range(contexts[row])])
        write_kv(sequence["k"], sequence["v"], pages[0], pages[1], slots)
    cache = {"key_pages": pages[0], "value_pages": pages[1], "block_tables": tables}
    return sequences, cache | {"context_lens": torch.tensor(contexts, dtype=torch.int32)}


@pytest.mark.parametrize("window", [None, 1, 6])
@pytest.mark.parametrize("new", [[1, 1, 1, 1], [1, 13, 4, 2], [5, 13, 8, 23]], ids=["decode", "mixed", "prefill"])
def test_paged_attention(new: list[int], window: int | None) -> None:
    contexts = [5, 13, 8, 23]
    sequences, cache = fill_cache(contexts)
    q = torch.cat([sequence["q"][-count:] for sequence, count in zip(sequences, new, strict=True)])
    actual = paged_attention(q, **cache, cu_seqlens=naive.cu_seqlens(new), max_seqlen=max(new), window=window, scale=0.4)
    expected = []
    for sequence, count, context in zip(sequences, new, contexts, strict=True):
        wide = {name: tensor.double() for name, tensor in sequence.items()}
        expected.append(attend(wide["q"][-count:], wide["k"], wide["v"], context - count, window, 0.4))
    assert_close({"y": actual}, {"y": torch.cat(expected)}, REL_RMS[torch.float32])


def test_paged_attention_over_bf16_pages() -> None:
    sequences, cache = fill_cache([9], torch.bfloat16)
    actual = paged_attention(sequences[0]["q"][-3:], **cache, cu_seqlens=naive.cu_seqlens([3]), max_seqlen=3)
    k, v = (sequences[0][name].bfloat16().double() for name in ("k", "v"))
    expected = attend(sequences[0]["q"][-3:].double(), k, v, 6, None, None)
    assert_close({"y": actual}, {"y": expected}, REL_RMS[torch.float32])


def test_write_kv_skips_negative_slots_and_leaves_the_rest() -> None:
    inputs = random_qkv(3)
    pages = torch.randn(2, 6, PAGE, G, K)
    key_pages, value_pages = pages.transpose(1, 2).contiguous().transpose(1, 2)  # not contiguous: a copy would be lost
    before = key_pages.clone(), value_pages.clone()
    write_kv(inputs["k"].requires_grad_(), inputs["v"], key_pages, value_pages, torch.tensor([9, -1, 22]))
    for written, old, new in zip((key_pages, value_pages), before, (inputs["k"], inputs["v"]), strict=True):
        expected = old.clone()
        expected[2, 1], expected[5, 2] = new[0].detach(), new[2].detach()
        assert torch.equal(written, expected)
    write_kv(*(torch.randn(0, G, K) for _ in range(2)), key_pages, value_pages, torch.zeros(0, dtype=torch.int64))


@pytest.mark.parametrize("count", [1, G])
@pytest.mark.parametrize("new", [[1, 1], [3, 5]], ids=["decode", "prefill"])
def test_fp8_pages_with_scales(new: list[int], count: int) -> None:
    """Pages hold what e4m3 makes of k / k_scale; attention is over what they stand for."""
    contexts = [9, 6]
    generator = torch.Generator().manual_seed(3)
    scales = {name: 0.02 + torch.rand(count, generator=generator) for name in ("k_scale", "v_scale")}
    scales["v_scale"][0] = 0.004  # so small that values saturate
    sequences, cache = fill_cache(contexts)
    stored = {"key_pages": "k", "value_pages": "v"}
    eight_bits = {name: torch.zeros_like(cache[name]).to(torch.float8_e4m3fn) for name in stored}
    q, expected = [], []
    for row, (sequence, context, length) in enumerate(zip(sequences, contexts, new, strict=True)):
        places = torch.arange(context)
        slots = cache["block_tables"][row].long()[places // PAGE] * PAGE + places % PAGE
        write_kv(sequence["k"], sequence["v"], *eight_bits.values(), slots, **scales)
        held = {}
        for name, scale in (("k", scales["k_scale"]), ("v", scales["v_scale"])):
            scaled = (sequence[name] / scale[:, None]).clamp(-448, 448)
            held[name] = scaled.to(torch.float8_e4m3fn).double() * scale[:, None].double()
        q.append(sequence["q"][-length:])
        expected.append(attend(q[-1].double(), **held, start=context - length, window=None, scale=None))
    assert eight_bits["value_pages"].float().abs().max() == 448
    arguments = cache | eight_bits | scales | {"cu_seqlens": naive.cu_seqlens(new), "max_seqlen": max(new)}
    actual = paged_attention(torch.cat(q), **arguments)
    assert_close({"y": actual}, {"y": torch.cat(expected)}, REL_RMS[torch.float32])


def test_rope_write_kv_is_rotation_then_write() -> None:
    inputs, pages = random_qkv(5), torch.randn(2, 3, PAGE, G, K)
    expected = pages.clone()
    cos, sin = torch.randn(2, 5, K)
    slots = torch.tensor([4, -1, 0, 11, 7])
    q = rope_write_kv(inputs["q"], inputs["k"], inputs["v"], cos, sin, *pages, slots)
    write_kv(apply_rotary(inputs["k"], cos, sin), inputs["v"], *expected, slots)
    assert torch.equal(q, apply_rotary(inputs["q"], cos, sin))
    assert torch.equal(pages, expected)
    for name, bad in (("k", inputs["k"][:4]), ("v", inputs["v"][:, :1])):
        with pytest.raises(ValueError, match=f"`{name}` must be"):
            rope_write_kv(*(inputs | {name: bad}).values(), cos, sin, *pages, slots)
    with pytest.raises(ValueError, match="`cos` must be"):
        rope_write_kv(inputs["q"], inputs["k"], inputs["v"], cos[:, 1:], sin, *pages, slots)
    with pytest.raises(ValueError, match="`kv_slots` must be below 12"):
        rope_write_kv(inputs["q"], inputs["k"], inputs["v"], cos, sin, *pages, slots + 1)


@pytest.mark.parametrize(
    ("name", "scales"),
    [
        ("v_scale", {"k_scale": torch.ones(1)}),
        ("k_scale", {"k_scale": torch.ones(3), "v_scale": torch.ones(3)}),
        ("v_scale", {"k_scale": torch.ones(G), "v_scale": torch.ones(1)}),
        ("k_scale", {"k_scale": torch.ones(1, dtype=torch.bfloat16), "v_scale": torch.ones(1)}),
    ],
)
def test_bad_scales_are_named(name: str, scales: dict[str, Tensor]) -> None:
    inputs, pages = random_qkv(2), torch.randn(2, 3, PAGE, G, K)
    with pytest.raises(ValueError, match=f"`{name}` must be"):
        write_kv(inputs["k"], inputs["v"], *pages, torch.tensor([0, 1]), **scales)
    _, cache = fill_cache([9])
    with pytest.raises(ValueError, match=f"`{name}` must be"):
        paged_attention(inputs["q"][:1], **cache, cu_seqlens=naive.cu_seqlens([1]), max_seqlen=1, **scales)


def test_what_torch_varlen_asks_of_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    """The CUDA path cannot run here: check its arguments."""
    asked: dict[str, Any] = {}

    def record(*tensors: Any, **options: Any) -> Tensor:
        asked.update(options, lengths=tensors[5:], cu_seqlens=tensors[3].tolist())
        return tensors[0]

    monkeypatch.setattr(torch_varlen, "varlen_attn", record)
    torch_varlen._grouped_queries.cache_clear()
    inputs = random_qkv(20)
    torch_varlen.varlen_attention(**inputs, cu_seqlens=naive.cu_seqlens([12, 8]), max_seqlen=12, window=4, scale=0.5)
    assert asked == {"scale": 0.5, "window_size": (3, 0), "lengths": (12, 12), "cu_seqlens": [0, 12, 20]}
    torch_varlen.varlen_attention(**inputs, cu_seqlens=None, max_seqlen=20, window=20)
    assert asked["window_size"] == (-1, 0)
    assert asked["cu_seqlens"] == [0, 20]
    torch_varlen._grouped_queries.cache_clear()
    monkeypatch.undo()
    assert torch_varlen._grouped_queries(True) in ({}, {"enable_gqa": True})
    torch_varlen._grouped_queries.cache_clear()


@pytest.mark.parametrize("count", [1, 3])
def test_documents_of_one_length_are_a_batch_in_training(count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The CUDA path's other branch, on whatever this machine attends with; and nothing else takes it."""
    monkeypatch.setattr(torch_varlen, "EQUAL_LENGTH_BACKENDS", [SDPBackend.MATH])
    inputs, bounds = random_qkv(256 * count), naive.cu_seqlens([256] * count)
    options = {"cu_seqlens": bounds, "max_seqlen": 256}
    actual = gradients_and_outputs(lambda **kw: (torch_varlen.varlen_attention(**kw, **options),), inputs)
    expected = gradients_and_outputs(lambda **kw: (varlen_attention(**kw, **options),), inputs)
    assert_close(actual, expected, REL_RMS[torch.float32])
    monkeypatch.setattr(torch_varlen, "_attend_equal_lengths", None)  # whoever takes the branch fails
    monkeypatch.setattr(torch_varlen, "varlen_attn", lambda q, *_, **__: q)
    leaves = {name: tensor.requires_grad_() for name, tensor in inputs.items()}
    torch_varlen.varlen_attention(**leaves, cu_seqlens=bounds, max_seqlen=256, window=9)
    torch_varlen.varlen_attention(**leaves, cu_seqlens=bounds, max_seqlen=256 * count + 1)
    odd = {name: tensor[: 100 * count] for name, tensor in leaves.items()}
    torch_varlen.varlen_attention(**odd, cu_seqlens=naive.cu_seqlens([100] * count), max_seqlen=100)
    with torch.no_grad():
        torch_varlen.varlen_attention(**leaves, **options)


@pytest.mark.gpu
@pytest.mark.parametrize("lengths", [[1024] * 3, [512], [300, 724], [1, 63, 1000]])
@pytest.mark.parametrize(("heads", "groups", "width"), [(24, 8, 128), (14, 2, 64), (9, 3, 64)])
def test_packed_attention_on_a_gpu(heads: int, groups: int, width: int, lengths: list[int]) -> None:
    """bf16 against the torch reference in fp32: outputs and gradients, without waiting for the GPU."""
    torch.manual_seed(0)
    tokens, options = sum(lengths), {"cu_seqlens": naive.cu_seqlens(lengths).cuda(), "max_seqlen": max(lengths)}
    inputs = [torch.randn(tokens, n, width, device="cuda").bfloat16().requires_grad_() for n in (heads, groups, groups)]
    wide = [x.detach().float().requires_grad_() for x in inputs]
    dy = torch.randn(tokens, heads, width, device="cuda").bfloat16()
    for _ in range(2):  # the first time plans
        torch.cuda.set_sync_debug_mode("error" if _ else "default")
        try:
            y = varlen_attention(*inputs, **options)
            gradients = torch.autograd.grad(y, inputs, dy)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    expected = varlen_attention(*wide, **options)
    pairs = [(y, expected), *zip(gradients, torch.autograd.grad(expected, wide, dy.float()), strict=True)]
    errors = [rel_rms(*pair) for pair in pairs]
    assert max(errors) < REL_RMS[torch.bfloat16], errors


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("q", torch.ones(10, H, K, dtype=torch.int32)),
        ("k", torch.ones(10, 3, K)),
        ("k", torch.ones(10, G, K + 1)),
        ("v", torch.ones(9, G, K)),
        ("v", torch.ones(10, G, K, dtype=torch.bfloat16)),
        ("v", torch.ones(10, G, K, device="meta")),
        ("max_seqlen", 5),
        ("window", 0),
        ("cu_seqlens", torch.tensor([0, 4, 9], dtype=torch.int32)),
    ],
)
def test_bad_packed_inputs_are_named(name: str, value: Any) -> None:
    arguments: dict[str, Any] = random_qkv(10) | {"cu_seqlens": naive.cu_seqlens([4, 6]), "max_seqlen": 6} | {name: value}
    with pytest.raises(ValueError, match=rf"`{name}` must be .*given: "):
        varlen_attention(**arguments)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("key_pages", torch.ones(9, PAGE, 3, K)),
        ("value_pages", torch.ones(9, PAGE + 1, G, K)),
        ("block_tables", torch.ones(2, 4, dtype=torch.int64)),
        ("block_tables", torch.ones(1, 4, dtype=torch.int32)),
        ("block_tables", torch.full((2, 4), 99, dtype=torch.int32)),
        ("context_lens", torch.tensor([9, 1], dtype=torch.int32)),
        ("context_lens", torch.tensor([9, 99], dtype=torch.int32)),
        ("context_lens", torch.tensor([9, 8])),
        ("cu_seqlens", None),
        ("max_seqlen", 1),
        ("window", -1),
    ],
)
def test_bad_paged_inputs_are_named(name: str, value: Any) -> None:
    sequences, cache = fill_cache([9, 8])
    q = torch.cat([sequences[0]["q"][-1:], sequences[1]["q"][-2:]])
    arguments: dict[str, Any] = {"q": q, **cache, "cu_seqlens": naive.cu_seqlens([1, 2]), "max_seqlen": 2} | {name: value}
    with pytest.raises(ValueError, match=rf"`{name}` must be .*given: "):
        paged_attention(**arguments)


def test_bad_kv_slots() -> None:
    inputs, pages = random_qkv(2), torch.randn(2, 3, PAGE, G, K)
    with pytest.raises(ValueError, match="`kv_slots` must be below 12; given: 12"):
        write_kv(inputs["k"], inputs["v"], *pages, torch.tensor([0, 12]))
    with pytest.raises(ValueError, match="`kv_slots` must be"):
        write_kv(inputs["k"], inputs["v"], *pages, torch.tensor([0, 1], dtype=torch.int32))
