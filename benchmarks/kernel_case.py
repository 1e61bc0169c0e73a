"""A line of the kernels' table: what is timed, of how many bytes and operations; the cases are in kernel_cases_*.py.

A case allocates nothing until `build` is called; what `build` returns is a list of calls, one an input set, to be timed in
turn: together the sets exceed the 50 MB of L2, so that no call finds its inputs there.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

COPY_RATES = {"H200": 4.3e12, "H100": 3.0e12}  # of device-to-device copies: bytes read plus bytes written a second
FLOPS_A_SECOND = 800e12  # its bf16 matrix products at 8192³
CACHE_BYTES = 128 * 2**20  # input sets together are at least this
Calls = list[Callable[[], Any]]


@functools.cache
def bytes_a_second() -> float:
    """The rate of copies that floors take: of this machine's GPU, or of an H100."""
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else ""
    return next((rate for part, rate in COPY_RATES.items() if part in name), COPY_RATES["H100"])


@dataclass(frozen=True)
class Case:
    """One line of the table: `build` for our op, `build_reference` for torch's, `sweep` for other configurations of ours.

    Our calls can be captured in a CUDA graph; the references may synchronise and are timed without one. What a backward's calls
    do besides, the forward, is `build_forward` (of a configuration, None for the chosen one) and `build_reference_forward`;
    their times are subtracted.
    """

    name: str
    bytes_moved: int
    build: Callable[[], Calls]
    build_reference: Callable[[], Calls] | None = None
    flops: int = 0
    sweep: dict[str, Callable[[], Calls]] = field(default_factory=dict)
    build_forward: Callable[[Any], Calls] | None = None
    build_reference_forward: Callable[[], Calls] | None = None

    @property
    def floor_seconds(self) -> float:
        """The larger of bytes over bandwidth and arithmetic over the tensor cores' rate."""
        return max(self.bytes_moved / bytes_a_second(), self.flops / FLOPS_A_SECOND)


def num_sets(bytes_moved: int) -> int:
    """How many input sets of that size exceed the L2 cache."""
    return max(-(-CACHE_BYTES // max(bytes_moved, 1)), 1)


def gradients_of(function: Callable[[], Any], leaves: list[Tensor]) -> Callable[[], Any]:
    """A call that runs `function` forwards and then backwards to `leaves`."""
    upstream: list[Tensor] = []

    def call() -> Any:
        out = function()
        outputs = out if isinstance(out, tuple) else (out,)
        if not upstream:
            upstream.extend(torch.randn_like(x) for x in outputs)
        return torch.autograd.grad(outputs, leaves, upstream)

    return call
