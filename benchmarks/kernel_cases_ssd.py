"""Benchmark cases of the Mamba-2 kernels: the SSD scan, the state update and the decoding step (whole mixers: layers.py).

benchmarks/kernels.py imports `cases()`. Inputs look as in a model: x, B and C are slices of the convolution's output, dt and
z of in_proj's; step sizes log-uniform in 0.001 … 0.1, A in -16 … -1. The floors count the arithmetic of the chunk length that
the kernels choose; m1.kernels.ssd.triton_impl derives them.
"""

import functools
import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from kernel_case import FLOPS_A_SECOND, Calls, bytes_a_second
from kernel_cases_scan import ScanCase, _documents, _gradients, _randn, _sets
from torch import Tensor

MODELS = {"3B": (24, 8, 128), "0.5B": (14, 2, 64), "135M": (9, 3, 64)}  # query heads, key/value heads, width (= d_state)
BATCH = 512


@dataclass(frozen=True)
class SsdCase(ScanCase):
    """A ScanCase bound by memory or by tensor cores."""

    @property
    def floor_seconds(self) -> float:
        return max(self.bytes_moved / bytes_a_second(), self.flops / FLOPS_A_SECOND)


def _rows(model: str, rows: int) -> dict[str, Tensor]:
    """z, x, B, C, dt of `rows` tokens."""
    heads, groups, width = MODELS[model]
    inner, shared = heads * width, groups * width
    projected = _randn(rows, 2 * inner + 2 * shared + heads)
    x, B, C = _randn(rows, 2 * shared + inner).split([shared, shared, inner], 1)
    return {
        "z": projected[:, :inner].view(rows, heads, width),
        "x": x.view(rows, groups, width),
        "B": B.view(rows, groups, width),
        "C": C.view(rows, heads, width),
        "dt": 0.5 * projected[:, -heads:],
    }


def _parameters(model: str) -> dict[str, Tensor]:
    heads = MODELS[model][0]
    steps = torch.empty(heads, device="cuda").uniform_(-6.9, -2.3).exp()
    return {
        "A": -torch.empty(heads, device="cuda").uniform_(1, 16),
        "D": torch.ones(heads, device="cuda"),
        "dt_bias": steps + torch.log(-torch.expm1(-steps)),
    }


def _config(model: str) -> Any:
    from m1.kernels.ssd.triton_impl import choose_config

    return choose_config(MODELS[model][2], 2, 227 * 2**10)


def _tiles() -> list[Any]:
    from m1.kernels.ssd.triton_impl import Tile

    shapes = [(64, 64), (64, 32), (128, 64)]
    return [Tile(*shape, warps, stages) for shape in shapes for warps in (4, 8) for stages in (1, 2, 3)]


def _scan_cases(model: str, lengths: list[int]) -> list[ScanCase]:
    from m1.kernels.ssd import reference

    heads, groups, width = MODELS[model]
    tokens, inner, shared = sum(lengths), heads * width, groups * width

    def inputs() -> dict[str, Any]:
        bounds = torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32, device="cuda")
        rows = {name: tensor for name, tensor in _rows(model, tokens).items() if name != "z"}
        return {**rows, **_parameters(model), "cu_seqlens": bounds}

    def kernel(**kwargs: Any) -> Tensor:
        from m1.kernels.ssd import triton_impl

        return triton_impl.ssd_scan(**kwargs)

    forward_bytes = 2 * tokens * (2 * shared + 2 * inner + heads)

    def forward(config: Any = None) -> Calls:
        return _sets(lambda: functools.partial(kernel, **inputs(), config=config or _config(model)), forward_bytes)

    def both(config: Any = None) -> Calls:
        return _sets(lambda: _gradients(kernel, {**inputs(), "config": config or _config(model)}), forward_bytes)

    def reference_forward() -> Calls:
        return _sets(lambda: functools.partial(reference.ssd_scan, **inputs()), forward_bytes)

    def reference_both() -> Calls:
        return _sets(lambda: _gradients(reference.ssd_scan, inputs()), forward_bytes)

    def default() -> Any:
        return _config(model)

    chunk = 256 if width > 64 else 128
    label = f"{model} {_documents(lengths)}"
    return [
        SsdCase(
            f"ssd_scan {label}", forward_bytes, forward, reference_forward,
            flops=2 * tokens * heads * (chunk // 2 * 2 * width + 2 * width**2),
            build_with=forward, default=default, fields={"outputs": _tiles(), "states": _tiles()},
        ),
        SsdCase(
            f"ssd_scan backward {label}", 2 * tokens * (4 * shared + 3 * inner + 2 * heads), both, reference_both,
            flops=2 * tokens * heads * (chunk // 2 * 7 * width + 4 * width**2),
            build_forward=forward, build_reference_forward=reference_forward,
            build_with=both, default=default, fields={"readers": _tiles(), "writers": _tiles()},
        ),
    ]  # fmt: skip


def _step_cases(model: str, state_dtype: torch.dtype) -> list[ScanCase]:
    """Decoding steps at BATCH sequences, each in its own slot, in random order."""
    from m1.kernels.mamba2_step import reference as step_reference
    from m1.kernels.ssd import reference

    heads, groups, width = MODELS[model]
    inner, shared = heads * width, groups * width
    channels = 2 * shared + inner
    ssm_bytes = 2 * BATCH * inner * width * state_dtype.itemsize

    def update_inputs() -> dict[str, Any]:
        rows = {name: tensor for name, tensor in _rows(model, BATCH).items() if name != "z"}
        state = torch.randn(BATCH, heads, width, width, device="cuda").to(state_dtype)
        return {"ssm_state": state, "slots": torch.randperm(BATCH, device="cuda"), **rows, **_parameters(model)}

    def step_inputs() -> dict[str, Any]:
        inputs = update_inputs()
        inputs["A_log"] = (-inputs.pop("A")).log()
        rows = {
            "xBC": torch.cat([inputs.pop(name).flatten(1) for name in ("x", "B", "C")], 1),
            "z": _randn(BATCH, heads, width),
        }
        return (
            inputs
            | rows
            | {
                "conv_state": _randn(BATCH, channels, 3),
                "conv_weight": torch.randn(channels, 4, device="cuda"),
                "conv_bias": torch.randn(channels, device="cuda"),
                "norm_weight": torch.ones(inner, device="cuda"),
                "norm_eps": 1e-5,
            }
        )

    def update(config: Any = None) -> Calls:
        from m1.kernels.ssd.triton_update import UpdateConfig, ssd_state_update

        config = config or UpdateConfig()
        return _sets(lambda: functools.partial(ssd_state_update, **update_inputs(), config=config), ssm_bytes)

    def step(config: Any = None) -> Calls:
        from m1.kernels.mamba2_step.triton_impl import StepConfig, mamba2_step

        config = config or StepConfig()
        return _sets(lambda: functools.partial(mamba2_step, **step_inputs(), config=config), ssm_bytes)

    def reference_of(op: Callable[..., Any], inputs: Callable[[], dict[str, Any]]) -> Callable[[], Calls]:
        return lambda: _sets(lambda: functools.partial(op, **inputs()), ssm_bytes)

    def default_update() -> Any:
        from m1.kernels.ssd.triton_update import UpdateConfig

        return UpdateConfig()

    def default_step() -> Any:
        from m1.kernels.mamba2_step.triton_impl import StepConfig

        return StepConfig()

    label = f"{model} {BATCH} rows {str(state_dtype).removeprefix('torch.')} states"
    return [
        SsdCase(
            f"ssd_state_update {label}", ssm_bytes + 2 * BATCH * (2 * inner + 2 * shared + heads), update,
            reference_of(reference.ssd_state_update, update_inputs),
            build_with=update, default=default_update,
            fields={"elements": [2048, 4096, 8192], "num_warps": [2, 4, 8]},
        ),
        SsdCase(
            f"mamba2_step {label}", ssm_bytes + 2 * BATCH * (3 * inner + heads + (2 * 3 + 3) * channels), step,
            reference_of(step_reference.mamba2_step, step_inputs),
            build_with=step, default=default_step, fields={"elements": [512, 1024, 2048, 4096]},
        ),
    ]  # fmt: skip


def cases() -> list[ScanCase]:
    """Every case of this file; nothing is allocated yet."""
    found: list[ScanCase] = []
    for model in MODELS:
        for lengths in ([4096] * 4, [16384]):
            found += _scan_cases(model, lengths)
        found += _step_cases(model, torch.float32)
    return found + _step_cases("3B", torch.bfloat16)
