"""Benchmark cases of the Mamba-1 kernels: convolution, selective scan, state updates and the fused decoding step.

benchmarks/kernels.py imports `cases()`. Inputs look as in a model: z, B and C are slices of one projection, step sizes
log-uniform in 0.001 … 0.1, A = -(1 … 16). What a launch can be tuned by stands in each case's `fields`.
"""

import functools
import itertools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from kernel_case import Calls, Case, bytes_a_second, gradients_of, num_sets
from torch import Tensor

EXPONENTIALS_A_SECOND = 132 * 16 * 1.7e9  # an H100's special-function units
MODELS = {"3B": (192, 64), "0.5B": (56, 8), "135M": (36, 12)}  # query-side heads, key/value-side heads; all 16 wide
WIDTH = D_STATE = 16
BATCH = 512


@dataclass(frozen=True)
class ScanCase(Case):
    """A Case that knows special functions and its tunable configuration.

    `build_with` takes a configuration; `fields` names those of its fields worth trying, with their values.
    """

    exponentials: float = 0
    build_with: Callable[[Any], Calls] | None = None
    default: Callable[[], Any] | None = None
    fields: dict[str, list[Any]] = field(default_factory=dict)

    @property
    def floor_seconds(self) -> float:
        """The larger of bytes over bandwidth and special functions over their units' rate."""
        return max(self.bytes_moved / bytes_a_second(), self.exponentials / EXPONENTIALS_A_SECOND)


def _randn(*shape: int) -> Tensor:
    return torch.randn(*shape, device="cuda", dtype=torch.bfloat16)


def _parameters(heads: int) -> dict[str, Tensor]:
    steps = torch.empty(heads, WIDTH, device="cuda").uniform_(-6.9, -2.3).exp()
    return {
        "A": -torch.arange(1.0, D_STATE + 1, device="cuda").expand(heads, WIDTH, D_STATE).contiguous(),
        "D": torch.ones(heads, WIDTH, device="cuda"),
        "dt_bias": steps + torch.log(-torch.expm1(-steps)),
    }


def _activations(model: str, rows: int, is_x_repeated: bool) -> dict[str, Tensor]:
    """What a mixer hands to the scan (or, a row a sequence, to the step): z, B, C slices of in_proj's output."""
    heads, groups = MODELS[model]
    inner, shared = heads * WIDTH, groups * WIDTH
    rank = -(-inner // 16)
    z, _, B, C, _ = _randn(rows, 2 * inner + 2 * shared + rank).split([inner, shared, shared, inner, rank], 1)
    return {
        "x": _randn(rows, heads if is_x_repeated else groups, WIDTH),
        "dt": 0.5 * _randn(rows, heads, WIDTH),
        "B": B.view(rows, groups, D_STATE),
        "C": C.view(rows, heads, D_STATE),
        "z": z.view(rows, heads, WIDTH),
    }


def _bounds(lengths: list[int]) -> Tensor:
    return torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32, device="cuda")


def _documents(lengths: list[int]) -> str:
    return f"{len(lengths)} x {lengths[0]}"


def _sets(make: Callable[[], Callable[[], Any]], bytes_moved: int) -> Calls:
    """As many calls, each with inputs of its own, as exceed the L2 cache."""
    return [make() for _ in range(num_sets(bytes_moved))]


def _gradients(op: Callable[..., Tensor], inputs: dict[str, Any]) -> Callable[[], Any]:
    """A call that runs op forwards and backwards to every floating input."""
    leaves = {
        name: x.detach().requires_grad_() if isinstance(x, Tensor) and x.is_floating_point() else x
        for name, x in inputs.items()
    }
    wanted = [x for x in leaves.values() if isinstance(x, Tensor) and x.requires_grad]
    return gradients_of(functools.partial(op, **leaves), wanted)


def _scan_cases(model: str, lengths: list[int], is_x_repeated: bool, has_reference: bool) -> list[ScanCase]:
    from m1.kernels.selective_scan import reference

    heads, groups = MODELS[model]
    tokens = sum(lengths)
    inner, shared = heads * WIDTH, groups * WIDTH
    x_width = inner if is_x_repeated else shared

    def inputs() -> dict[str, Any]:
        return {**_activations(model, tokens, is_x_repeated), **_parameters(heads), "cu_seqlens": _bounds(lengths)}

    def default() -> Any:
        from m1.kernels.launch import num_multiprocessors
        from m1.kernels.selective_scan.triton_impl import choose_config

        return choose_config(tokens, inner, num_multiprocessors(torch.device("cuda", 0)))

    def kernel(**kwargs: Any) -> Tensor:
        from m1.kernels.selective_scan import triton_impl

        return triton_impl.selective_scan(**kwargs)

    forward_bytes = 2 * tokens * (4 * inner + x_width + shared)

    def forward(config: Any = None) -> Calls:
        return _sets(lambda: functools.partial(kernel, **inputs(), config=config or default()), forward_bytes)

    def both(config: Any = None) -> Calls:
        return _sets(lambda: _gradients(kernel, {**inputs(), "config": config or default()}), forward_bytes)

    def reference_forward() -> Calls:
        return _sets(lambda: functools.partial(reference.selective_scan, **inputs()), forward_bytes)

    def reference_both() -> Calls:
        return _sets(lambda: _gradients(reference.selective_scan, inputs()), forward_bytes)

    label = f"{model} {_documents(lengths)}{' x repeated' if is_x_repeated else ''}"
    exponentials = tokens * inner * (D_STATE + 2)
    chunks = [64, 128, 256]
    return [
        ScanCase(
            f"selective_scan {label}",
            forward_bytes,
            forward,
            reference_forward if has_reference else None,
            exponentials=exponentials,
            build_with=forward,
            default=default,
            fields={"chunk": chunks, "states": _forward_tiles(), "outputs": _forward_tiles()},
        ),
        ScanCase(
            f"selective_scan backward {label}",
            2 * tokens * (7 * inner + 2 * x_width + 2 * shared),
            both,
            reference_both if has_reference else None,
            exponentials=exponentials,
            build_forward=forward,
            build_reference_forward=reference_forward,
            build_with=both,
            default=default,
            fields={"readers": _backward_tiles(), "writers": _backward_tiles(), "chunk": chunks},
        ),
    ]


def _forward_tiles() -> list[Any]:
    from m1.kernels.selective_scan.triton_impl import Tile

    return [
        Tile(4, 1, 3), Tile(4, 2, 3), Tile(4, 4, 3), Tile(4, 1, 3, 96), Tile(2, 1, 3, None, 2), Tile(4, 1, 3, None, 2),
        Tile(4, 1, 3, 128, 2), Tile(4, 2, 3, 128, 2), Tile(2, 1, 3, 128, 2), Tile(4, 2, 3, None, 2),
    ]  # fmt: skip


def _backward_tiles() -> list[Any]:
    from m1.kernels.selective_scan.triton_impl import Tile

    return [
        Tile(1, 1, 3, None, 2), Tile(2, 1, 3, None, 2), Tile(2, 1, 2, None, 2), Tile(1, 2, 3, None, 2), Tile(2, 2, 3, None, 2),
        Tile(1, 1, 4, None, 2), Tile(2, 1, 3), Tile(4, 1, 3), Tile(2, 1, 3, 168), Tile(1, 1, 3, 168, 2),
    ]  # fmt: skip


def _conv_cases(model: str, lengths: list[int], is_repeated_first: bool) -> list[ScanCase]:
    from m1.kernels.causal_conv1d import reference

    heads, groups = MODELS[model]
    tokens, channels, sources = sum(lengths), (heads if is_repeated_first else groups) * WIDTH, groups * WIDTH

    def inputs() -> dict[str, Any]:
        return {
            "x": _randn(tokens, sources),
            "head_width": WIDTH,
            "weight": torch.randn(channels, 4, device="cuda"),
            "bias": torch.randn(channels, device="cuda"),
            "activation": "silu",
            "cu_seqlens": _bounds(lengths),
        }

    def default() -> Any:
        from m1.kernels.causal_conv1d.triton_impl import choose_config
        from m1.kernels.launch import num_multiprocessors

        return choose_config(tokens, sources, channels // sources, num_multiprocessors(torch.device("cuda", 0)))

    def kernel(**kwargs: Any) -> Tensor:
        from m1.kernels.causal_conv1d import triton_impl

        return triton_impl.causal_conv1d(**kwargs)

    forward_bytes = 2 * tokens * (sources + channels)

    def forward(config: Any = None) -> Calls:
        return _sets(lambda: functools.partial(kernel, **inputs(), config=config or default()), forward_bytes)

    def both(config: Any = None) -> Calls:
        return _sets(lambda: _gradients(kernel, {**inputs(), "config": config or default()}), forward_bytes)

    def backward_with(chunk: int, steps: int) -> Calls:
        from m1.kernels.causal_conv1d.triton_impl import ConvConfig

        return both(ConvConfig(chunk, backward_steps=steps))

    def reference_forward() -> Calls:
        return _sets(lambda: functools.partial(reference.causal_conv1d, **inputs()), forward_bytes)

    def reference_both() -> Calls:
        return _sets(lambda: _gradients(reference.causal_conv1d, inputs()), forward_bytes)

    label = f"{model} {channels} channels {_documents(lengths)}"
    shared = {"build_with": forward, "default": default}
    fields: dict[str, list[Any]] = {"chunk": [16, 32, 64, 128, 256], "num_warps": [1, 2, 4]}
    return [
        ScanCase(
            f"causal_conv1d {label}", forward_bytes, forward, reference_forward,
            exponentials=2 * tokens * channels,
            fields={**fields, "steps": [4, 8, 16]}, **shared,
        ),
        ScanCase(
            f"causal_conv1d backward {label}", 2 * tokens * (2 * sources + channels), both, reference_both,
            exponentials=2 * tokens * channels, build_forward=forward, build_reference_forward=reference_forward,
            sweep={
                f"forward too: chunk={chunk} backward_steps={steps}": functools.partial(backward_with, chunk, steps)
                for chunk, steps in itertools.product((16, 32, 64, 128), (4, 8))
            },
            **shared | {"build_with": both},
        ),
    ]  # fmt: skip


def _update_cases(model: str, state_dtype: torch.dtype) -> list[ScanCase]:
    """Decoding steps at BATCH sequences, each in its own slot, in random order."""
    from m1.kernels.mamba1_step import reference as step_reference
    from m1.kernels.selective_scan import reference

    heads, groups = MODELS[model]
    inner, shared = heads * WIDTH, groups * WIDTH
    ssm_bytes = 2 * BATCH * inner * D_STATE * state_dtype.itemsize
    row_bytes = 2 * BATCH * (4 * inner + 2 * shared)  # z, C, dt, y; x, B

    def states() -> tuple[Tensor, Tensor]:
        return torch.randn(BATCH, heads, WIDTH, D_STATE, device="cuda").to(state_dtype), torch.randperm(BATCH, device="cuda")

    def update_inputs() -> dict[str, Any]:
        ssm_state, slots = states()
        return {"ssm_state": ssm_state, "slots": slots, **_activations(model, BATCH, True), **_parameters(heads)}

    def step_inputs() -> dict[str, Any]:
        ssm_state, slots = states()
        parameters = _parameters(heads)
        parameters["A_log"] = (-parameters.pop("A")).log()
        return {
            "conv_state": _randn(BATCH, 3, shared).mT,
            "ssm_state": ssm_state,
            "slots": slots,
            "conv_weight": torch.randn(inner, 4, device="cuda"),
            "conv_bias": torch.randn(inner, device="cuda"),
            **_activations(model, BATCH, False),
            **parameters,
        }

    def update(config: Any = None) -> Calls:
        from m1.kernels.selective_scan.triton_update import selective_state_update

        config = config or default_update()
        return _sets(lambda: functools.partial(selective_state_update, **update_inputs(), config=config), ssm_bytes)

    def step(config: Any = None) -> Calls:
        from m1.kernels.mamba1_step.triton_impl import mamba1_step

        return _sets(lambda: functools.partial(mamba1_step, **step_inputs(), config=config or default_step()), ssm_bytes)

    def reference_update() -> Calls:
        return _sets(lambda: functools.partial(reference.selective_state_update, **update_inputs()), ssm_bytes)

    def reference_step() -> Calls:
        return _sets(lambda: functools.partial(step_reference.mamba1_step, **step_inputs()), ssm_bytes)

    def default_update() -> Any:
        from m1.kernels.selective_scan.triton_update import UpdateConfig

        return UpdateConfig()

    def default_step() -> Any:
        from m1.kernels.mamba1_step.triton_impl import choose_config

        return choose_config(state_dtype, heads // groups, D_STATE)

    def configured(groups: int, channels: int) -> Callable[[], Calls]:
        def builder() -> Calls:
            from m1.kernels.mamba1_step.triton_impl import StepConfig

            return step(StepConfig(groups, channels=channels))

        return builder

    label = f"{model} {BATCH} rows {str(state_dtype).removeprefix('torch.')} states"
    warps = [1, 2, 4, 8]
    return [
        ScanCase(
            f"selective_state_update {label}", ssm_bytes + row_bytes + 2 * BATCH * (inner - shared), update,
            reference_update,
            exponentials=BATCH * inner * (D_STATE + 2), build_with=update, default=default_update,
            fields={"heads": [1, 2, 4, 8, 16], "num_warps": warps},
        ),
        ScanCase(
            f"mamba1_step {label}", ssm_bytes + row_bytes + 2 * BATCH * shared * 3 * 2, step,
            reference_step,
            exponentials=BATCH * inner * (2 * D_STATE + 4), build_with=step, default=default_step,
            sweep={
                f"groups={groups} channels={channels}": configured(groups, channels)
                for groups, channels in itertools.product((1, 2, 4), (4, 8, 16))
                if 8 <= groups * channels <= 32
            },
        ),
    ]  # fmt: skip


def cases() -> list[Case]:
    """Every case of this file; nothing is allocated yet."""
    found: list[Case] = []
    for model in MODELS:
        found += _scan_cases(model, [4096] * 4, False, True)
        found += _conv_cases(model, [4096] * 4, True)
    found += _scan_cases("3B", [4096] * 4, True, False)
    found += _scan_cases("3B", [512], False, True)  # short enough for torch.compile of the reference
    for lengths in ([1024] * 16, [16384], [32768]):
        found += _scan_cases("3B", lengths, False, False)
    found += _conv_cases("3B", [4096] * 4, False) + _conv_cases("3B", [256] * 64, True)
    for model, state_dtype in itertools.product(MODELS, (torch.float32, torch.bfloat16)):
        found += _update_cases(model, state_dtype)
    return found
