"""What the tests of the Triton scans share: poisoned allocations, and an op compared with its fp32 reference."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.numerics import REL_RMS, REL_RMS_KERNEL_FP32, rel_rms

TOLERANCE = {torch.float32: REL_RMS_KERNEL_FP32, torch.bfloat16: REL_RMS[torch.bfloat16]}
LONG_LENGTHS = [[1], [63], [1000], [4097], [63, 1, 1000, 2, 4097, 64]]


def poison_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fill what torch.empty and empty_like return with NaN or a wild integer: what a kernel leaves unwritten is seen."""
    allocate = {"empty": torch.empty, "empty_like": torch.empty_like}

    def poisoned(name: str) -> Callable[..., Tensor]:
        def make(*args: Any, **kwargs: Any) -> Tensor:
            tensor = allocate[name](*args, **kwargs)
            return tensor.fill_(float("nan")) if tensor.is_floating_point() else tensor.fill_(-(10**6))

        return make

    for name in allocate:
        monkeypatch.setattr(torch, name, poisoned(name))


def as_slices(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same [rows, heads, width] tensors as slices of one wide projection: none contiguous, none at its start."""
    like = next(iter(tensors.values()))
    pad = like.new_full((like.shape[0], 8), float("nan"))
    merged = torch.cat([pad, *(tensor.flatten(1) for tensor in tensors.values()), pad], 1)
    widths = [8, *(tensor[0].numel() for tensor in tensors.values()), 8]
    pieces = merged.split(widths, dim=1)[1:-1]
    return {name: piece.view(tensor.shape) for (name, tensor), piece in zip(tensors.items(), pieces, strict=True)}


def bounds_of(lengths: list[int], device: str) -> Tensor:
    return torch.tensor([0, *torch.tensor(lengths).cumsum(0)], dtype=torch.int32, device=device)


def compare(op: Callable[..., Any], reference: Callable[..., Any], inputs: dict[str, Tensor], dtype: torch.dtype) -> None:
    """Outputs (a tuple) and every gradient of `op` against `reference` on the same values in fp32.

    Each output's incoming gradient has its dtype; an error is named by output number or input.
    """
    leaves = {name: tensor.detach().requires_grad_() for name, tensor in inputs.items()}
    wide = {name: tensor.detach().float().requires_grad_() for name, tensor in inputs.items()}
    outputs, expected = op(**leaves), reference(**wide)
    upstream = [torch.randn(output.shape, device=output.device).to(output.dtype) for output in outputs]
    gradients = torch.autograd.grad(outputs, list(leaves.values()), upstream)
    right = torch.autograd.grad(expected, list(wide.values()), [gradient.float() for gradient in upstream])
    errors = {f"output {index}": rel_rms(*pair) for index, pair in enumerate(zip(outputs, expected, strict=True))}
    errors |= {f"d{name}": rel_rms(*pair) for name, pair in zip(inputs, zip(gradients, right, strict=True), strict=True)}
    assert all(output.shape == other.shape for output, other in zip(outputs, expected, strict=True))
    assert all(gradient.dtype == leaf.dtype for gradient, leaf in zip(gradients, leaves.values(), strict=True))
    assert all(error < TOLERANCE[dtype] for error in errors.values()), errors
