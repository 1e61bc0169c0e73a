"""Benchmark cases of the decoding and pointwise kernels: paged attention, cache writes, norms, rotation, SwiGLU, sampling.

benchmarks/kernels.py imports `cases()` and prints the table; what a case is stands in kernel_case.py.
"""

import functools
import itertools
from collections.abc import Callable
from typing import Any

import torch
from kernel_case import Calls, Case, gradients_of, num_sets
from torch import Tensor

MODELS = {  # hidden, intermediate, query heads, key/value heads, head width, vocabulary
    "3B": (3072, 8192, 24, 8, 128, 128256),
    "0.5B": (896, 4864, 14, 2, 64, 151936),
    "135M": (576, 1536, 9, 3, 64, 49152),
}
PAGE = 64
DECODE_LAUNCHES = [  # block_n, num_warps, num_stages
    (32, 2, 4), (32, 4, 4), (64, 2, 3), (64, 4, 2), (64, 4, 3), (64, 4, 4), (64, 8, 3), (128, 4, 2), (128, 4, 3), (128, 8, 3),
]  # fmt: skip


def _randn(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.randn(*shape, device="cuda", dtype=torch.bfloat16 if dtype.itemsize == 1 else dtype).to(dtype)


def _paged_inputs(contexts: list[int], model: str, dtype: torch.dtype, num_new: int) -> dict[str, Any]:
    """Pages in random order, and the tables, of sequences of `contexts` positions whose last num_new are queries."""
    _, _, heads, groups, width, _ = MODELS[model]
    counts = [-(-context // PAGE) for context in contexts]
    order = torch.randperm(sum(counts), dtype=torch.int32)
    tables = torch.zeros(len(contexts), max(counts), dtype=torch.int32)
    for row, pages in enumerate(order.split(counts)):
        tables[row, : len(pages)] = pages
    key_pages, value_pages = (torch.empty(sum(counts), PAGE, groups, width, dtype=dtype, device="cuda") for _ in range(2))
    for pages in (key_pages, value_pages):
        for part in pages.split(1024):
            part.copy_(_randn(*part.shape))
    return {
        "q": _randn(len(contexts) * num_new, heads, width),
        "key_pages": key_pages,
        "value_pages": value_pages,
        "block_tables": tables.cuda(),
        "context_lens": torch.tensor(contexts, dtype=torch.int32, device="cuda"),
        "cu_seqlens": torch.arange(len(contexts) + 1, dtype=torch.int32, device="cuda") * num_new,
        "max_seqlen": num_new,
    }


def _decode_case(model: str, dtype: torch.dtype, contexts: list[int], label: str) -> Case:
    _, _, heads, groups, width, _ = MODELS[model]
    bytes_moved = sum(contexts) * groups * width * 2 * dtype.itemsize + len(contexts) * heads * width * 4
    is_fp8 = dtype.itemsize == 1

    def build(op: Callable[..., Any] | None = None, config: Any = None) -> Calls:
        from m1.kernels.attention import triton_decode, triton_impl

        scales = {name: torch.full((1,), 0.5, device="cuda") for name in ("k_scale", "v_scale")} if is_fp8 else {}
        calls: Calls = []
        for _ in range(num_sets(bytes_moved)):
            inputs = _paged_inputs(contexts, model, dtype, 1)
            if op is not None:
                calls.append(lambda inputs=inputs: op(**inputs))
            elif config is None:
                calls.append(lambda inputs=inputs: triton_impl.paged_attention(**inputs, **scales))
            else:
                pages = [inputs[name] for name in ("q", "key_pages", "value_pages", "block_tables", "context_lens")]
                calls.append(lambda pages=pages: triton_decode.paged_decode(*pages, scale=width**-0.5, config=config, **scales))
        return calls

    def reference() -> Calls:
        from m1.kernels.attention import reference

        return build(op=reference.paged_attention)

    def configured(block_n: int, warps: int, stages: int, splits: int) -> Callable[[], Calls]:
        def builder() -> Calls:
            from m1.kernels.attention.triton_decode import DecodeConfig

            return build(config=DecodeConfig(block_n, splits, 512, warps, stages))

        return builder

    sweep = {
        f"block_n={launch[0]} warps={launch[1]} stages={launch[2]} splits={splits}": configured(*launch, splits)
        for launch in DECODE_LAUNCHES
        for splits in (1, 2, 4, 8)
    }
    name = f"decode attention {model} {str(dtype).removeprefix('torch.')} {label}"
    return Case(name, bytes_moved, build, None if is_fp8 else reference, sweep=sweep)


def _prefill_case(model: str, num_sequences: int, length: int) -> Case:
    _, _, heads, groups, width, _ = MODELS[model]
    tokens = num_sequences * length

    def build(op: Callable[..., Any] | None = None) -> Calls:
        from m1.kernels.attention import triton_impl

        inputs = _paged_inputs([length] * num_sequences, model, torch.bfloat16, length)
        return [lambda: (op or triton_impl.paged_attention)(**inputs)]

    return Case(
        f"prefill attention {model} {num_sequences} x {length}",
        tokens * (2 * heads + 2 * groups) * width * 2,
        build,
        flops=2 * num_sequences * length * (length + 1) * heads * width,
    )


def _training_case(model: str, lengths: list[int], label: str) -> Case:
    """Packed attention, forward and backward together; documents of one length take cuDNN's, others flash attention."""
    _, _, heads, groups, width, _ = MODELS[model]
    tokens = sum(lengths)

    def build_for(module: str) -> Calls:
        import importlib

        op = importlib.import_module(f"m1.kernels.attention.{module}").varlen_attention
        inputs = [_randn(tokens, count, width).requires_grad_() for count in (heads, groups, groups)]
        upstream = _randn(tokens, heads, width)
        bounds = torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32, device="cuda")

        def call() -> Any:
            return torch.autograd.grad(op(*inputs, cu_seqlens=bounds, max_seqlen=max(lengths)), inputs, upstream)

        return [call]

    return Case(
        f"training attention {model} {label}",
        tokens * (4 * heads + 6 * groups) * width * 2,
        lambda: build_for("torch_varlen"),
        lambda: build_for("reference"),
        flops=7 * sum(length**2 for length in lengths) * heads * width,
    )


def _write_case(model: str, tokens: int, is_rotating: bool, dtype: torch.dtype) -> Case:
    _, _, heads, groups, width, _ = MODELS[model]
    bytes_moved = tokens * groups * width * 2 * (2 + dtype.itemsize)
    bytes_moved += tokens * (heads * width * 4 + width * 8) if is_rotating else 0

    def build() -> Calls:
        from m1.kernels.attention import triton_impl

        calls: Calls = []
        for _ in range(min(num_sets(bytes_moved), 32)):
            merged = _randn(tokens, heads + 2 * groups, width)
            q, k, v = merged.split([heads, groups, groups], 1)
            cos, sin = (torch.rand(tokens, width, device="cuda") for _ in range(2))
            pages = _randn(2, 2 * tokens // PAGE + 1, PAGE, groups, width, dtype=dtype)
            slots = torch.randperm(pages[0, ..., 0, 0].numel(), device="cuda")[:tokens]
            if is_rotating:
                calls.append(
                    lambda a=(q, k, v, cos, sin, pages[0], pages[1], slots): triton_impl.rope_write_kv(*a)  # type: ignore[misc]
                )
            else:
                calls.append(lambda a=(k, v, pages[0], pages[1], slots): triton_impl.write_kv(*a))  # type: ignore[misc]
        return calls

    op = "rope_write_kv" if is_rotating else "write_kv"
    return Case(f"{op} {model} {str(dtype).removeprefix('torch.')} {tokens} tokens", bytes_moved, build)


def _pointwise_case(
    name: str, bytes_moved: int, module: str, op: str, inputs: Callable[[], list[Any]], num_grads: int = 0, **options: Any
) -> Case:
    """An op of m1.kernels.<module>; with num_grads, the backward to its first inputs. options: its keywords."""

    def build_for(implementation: str, is_backward: bool) -> Calls:
        import importlib

        function = functools.partial(getattr(importlib.import_module(f"m1.kernels.{module}.{implementation}"), op), **options)
        calls: Calls = []
        for _ in range(min(num_sets(bytes_moved), 32)):
            given = [x.requires_grad_() if i < num_grads else x for i, x in enumerate(inputs())]
            calls.append(functools.partial(function, *given))
            if is_backward:
                calls[-1] = gradients_of(calls[-1], given[:num_grads])
        return calls

    return Case(
        name,
        bytes_moved,
        lambda: build_for("triton_impl", num_grads > 0),
        lambda: build_for("reference", num_grads > 0),
        build_forward=(lambda _: build_for("triton_impl", False)) if num_grads else None,
        build_reference_forward=(lambda: build_for("reference", False)) if num_grads else None,
    )


def _pointwise_cases(model: str, tokens: int) -> list[Case]:
    hidden, intermediate, heads, groups, width, _ = MODELS[model]
    row, wide, head = tokens * hidden * 2, tokens * intermediate * 2, tokens * heads * width * 2

    def norm_inputs(count: int) -> Callable[[], list[Any]]:
        return lambda: [_randn(tokens, hidden), _randn(hidden), 1e-5, *([_randn(tokens, hidden)] * (count - 1))]

    def gated_inputs() -> list[Any]:
        return [_randn(tokens, heads, width), _randn(tokens, heads, width), _randn(heads * width), 1e-5]

    def rotary_inputs() -> list[Any]:
        return [_randn(tokens, heads, width), *(torch.rand(tokens, width, device="cuda") for _ in range(2))]

    def gate_and_up() -> list[Any]:
        return list(_randn(tokens, 2 * intermediate).chunk(2, -1))

    label = f"{model} {tokens} tokens"
    narrow = {"num_groups": groups, "width": 16}
    return [
        _pointwise_case(f"rms_norm {label}", 2 * row, "norm", "rms_norm", norm_inputs(1)),
        _pointwise_case(f"rms_norm + residual {label}", 4 * row, "norm", "rms_norm", norm_inputs(2)),
        _pointwise_case(f"rms_norm backward {label}", 3 * row, "norm", "rms_norm", norm_inputs(1), 2),
        _pointwise_case(f"rms_norm + residual backward {label}", 4 * row, "norm", "rms_norm", norm_inputs(2), 2),
        _pointwise_case(f"gated_rms_norm {label}", 3 * head, "norm", "gated_rms_norm", gated_inputs),
        _pointwise_case(f"gated_rms_norm backward {label}", 5 * head, "norm", "gated_rms_norm", gated_inputs, 3),
        _pointwise_case(f"rope {label}", 2 * head + tokens * width * 8, "rope", "apply_rotary", rotary_inputs),
        _pointwise_case(f"rope backward {label}", 2 * head + tokens * width * 8, "rope", "apply_rotary", rotary_inputs, 1),
        _pointwise_case(f"state heads {label}", 2 * head, "rope", "rotary_state_heads", rotary_inputs, **narrow),
        _pointwise_case(f"state heads backward {label}", 2 * head, "rope", "rotary_state_heads", rotary_inputs, 1, **narrow),
        _pointwise_case(f"swiglu {label}", 3 * wide, "activation", "swiglu", gate_and_up),
        _pointwise_case(f"swiglu backward {label}", 5 * wide, "activation", "swiglu", gate_and_up, 2),
    ]


def _fp8_cases(model: str, tokens: int) -> list[Case]:
    """What an 8-bit decoding step adds: quantisation, and its products (the reference is cuBLAS's product in bf16)."""
    hidden, intermediate, heads, groups, width, vocabulary = MODELS[model]
    inner, shared = heads * width, groups * width
    shapes = {
        "in_proj": (-(-(2 * inner + 2 * shared + -(-hidden // 16)) // 16) * 16, hidden),
        "out_proj": (hidden, inner),
        "gate_up": (2 * intermediate, hidden),
        "down": (hidden, intermediate),
        "head": (vocabulary, hidden),
    }

    def product(num_outputs: int, inputs: int, is_fp8: bool) -> Calls:
        from m1.kernels import fp8_linear, quantize_fp8

        x, calls = _randn(tokens, inputs), []
        for _ in range(min(num_sets(num_outputs * inputs), 40)):
            weight = _randn(num_outputs, inputs)
            given = (*quantize_fp8(x), *quantize_fp8(weight))
            if is_fp8:
                calls.append(functools.partial(fp8_linear, *given))
            else:
                calls.append(functools.partial(torch.nn.functional.linear, x, weight))
        return calls

    label = f"{model} {tokens} tokens"
    row, wide = tokens * hidden, tokens * intermediate
    found = [
        _pointwise_case(f"quantize_fp8 {label}", 3 * row, "fp8", "quantize_fp8", lambda: [_randn(tokens, hidden)]),
        _pointwise_case(
            f"rms_norm_fp8 + residual {label}", 7 * row, "fp8", "rms_norm_fp8",
            lambda: [_randn(tokens, hidden), _randn(hidden), 1e-5, _randn(tokens, hidden)],
        ),
        _pointwise_case(
            f"swiglu_fp8 {label}", 5 * wide, "fp8", "swiglu_fp8", lambda: list(_randn(tokens, 2 * intermediate).chunk(2, -1))
        ),
    ]  # fmt: skip
    for name, (num_outputs, inputs) in shapes.items():
        build = functools.partial(product, num_outputs, inputs)
        bytes_moved = num_outputs * inputs + tokens * (inputs + 2 * num_outputs)
        found.append(
            Case(
                f"fp8_linear {name} {label}", bytes_moved, functools.partial(build, True), functools.partial(build, False),
                flops=tokens * num_outputs * inputs,  # 8-bit products have twice the rate
            )
        )  # fmt: skip
    return found


def _sample_case(model: str, rows: int, dtype: torch.dtype, spread: float, label: str, **filters: float) -> Case:
    """Gaussian logits: spread 0.1 is flat as random weights are, 4 leaves about as many likely tokens as a trained model."""
    vocabulary = MODELS[model][5]
    bytes_moved = rows * vocabulary * dtype.itemsize

    def build_for(module: str, **options: Any) -> Calls:
        import importlib

        sample = importlib.import_module(f"m1.kernels.sampling.{module}").sample
        calls: Calls = []
        for _ in range(num_sets(bytes_moved)):
            settings = {
                "temperature": torch.full((rows,), filters.get("temperature", 0.7), device="cuda"),
                "top_k": torch.full((rows,), int(filters.get("top_k", 0)), device="cuda"),
                "top_p": torch.full((rows,), filters.get("top_p", 1.0), device="cuda"),
                "min_p": torch.full((rows,), filters.get("min_p", 0.0), device="cuda"),
                "seeds": torch.randint(0, 2**62, (rows,), device="cuda"),
                "positions": torch.arange(rows, device="cuda"),
            }
            logits = (spread * torch.randn(rows, vocabulary, device="cuda")).to(dtype)
            calls.append(lambda logits=logits, settings=settings: sample(logits, **settings, **options))
        return calls

    def configured(**fields: int) -> Callable[[], Calls]:
        def builder() -> Calls:
            from m1.kernels.sampling.triton_impl import SampleConfig

            return build_for("triton_impl", config=SampleConfig(**fields))

        return builder

    sweep = {
        f"tile={tile} warps={warps} splits={splits}": configured(tile=tile, scan_warps=warps, num_splits=splits)
        for tile, warps in ((1024, 4), (2048, 4), (2048, 8), (4096, 8))
        for splits in (1, 2, 4, 8)
    }
    if filters:
        sweep = {
            f"candidates={candidates} finish_warps={warps}": configured(candidates=candidates, finish_warps=warps, num_splits=2)
            for candidates in (64, 128)
            for warps in (4, 8)
        }
    name = f"sample {model} {rows} rows {str(dtype).removeprefix('torch.')} {label}"
    return Case(name, bytes_moved, lambda: build_for("triton_impl"), lambda: build_for("reference"), sweep=sweep)


def cases() -> list[Case]:
    """Every case of this file; nothing is allocated yet."""
    generator = torch.Generator().manual_seed(0)
    mixed = torch.randint(1, 8193, (128,), generator=generator).tolist()
    bf16, fp8 = torch.bfloat16, torch.float8_e4m3fn
    found = [_decode_case(model, dtype, [4096] * 128, "128 x 4096") for model in MODELS for dtype in (bf16, fp8)]
    found += [_decode_case("3B", dtype, mixed, "128 x 1 to 8192") for dtype in (bf16, fp8)]
    found += [_decode_case("3B", bf16, [2304] * 32, "32 x 2304"), _decode_case("3B", bf16, [2304] * 512, "512 x 2304")]
    found += [_decode_case("3B", bf16, [16384], "1 x 16384"), _decode_case("0.5B", bf16, [512] * 1024, "1024 x 512")]
    found += [_prefill_case("3B", 8, 2048), _prefill_case("0.5B", 64, 256)]
    found += [
        _training_case("3B", [4096] * 4, "4 x 4096"),
        _training_case("3B", [16384], "1 x 16384"),
        _training_case("3B", [3000, 5192, 4096, 4096], "4 of 3000 to 5192"),
        _training_case("0.5B", [4096] * 4, "4 x 4096"),
    ]
    for tokens in (512, 16384):
        found += [_write_case("3B", tokens, is_rotating, dtype) for is_rotating in (False, True) for dtype in (bf16, fp8)]
    for model, tokens in (("3B", 512), ("3B", 16384), ("0.5B", 16384)):
        found += _pointwise_cases(model, tokens)
    for model, tokens in (("3B", 32), ("3B", 128), ("3B", 512), ("0.5B", 1024)):
        found += _fp8_cases(model, tokens)
    for model, rows in (("3B", 1), ("3B", 128), ("3B", 512), ("0.5B", 1024)):
        found.append(_sample_case(model, rows, torch.float32, 4.0, "temperature"))
    found += [
        _sample_case("0.5B", 1024, bf16, 4.0, "temperature"),
        _sample_case("0.5B", 1024, torch.float32, 0.1, "temperature, flat"),
        _sample_case("0.5B", 1024, torch.float32, 4.0, "top_k 50", top_k=50),
        _sample_case("0.5B", 1024, torch.float32, 4.0, "top_k 50 top_p 0.95", top_k=50, top_p=0.95),
        _sample_case("0.5B", 1024, torch.float32, 4.0, "top_p 0.95", top_p=0.95),
        _sample_case("0.5B", 1024, torch.float32, 0.1, "top_p 0.95, flat", top_p=0.95),
    ]
    return found
