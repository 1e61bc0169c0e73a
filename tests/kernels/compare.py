"""How an op is compared with its naive float64 form: same inputs, same output gradients, relative RMS of every result."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from tests.numerics import rel_rms


def gradients_and_outputs(op: Callable[..., Any], inputs: dict[str, Tensor], seed: int = 1) -> dict[str, Tensor]:
    """Run op(**inputs), a tuple of tensors, and backpropagate random gradients: its outputs and every input's gradient."""
    leaves = {name: tensor.detach().requires_grad_() for name, tensor in inputs.items()}
    outputs = op(**leaves)
    generator = torch.Generator().manual_seed(seed)
    upstream = [torch.randn(output.shape, generator=generator).to(output.dtype) for output in outputs]
    torch.autograd.backward(outputs, upstream)
    results = {f"output {index}": output.detach() for index, output in enumerate(outputs)}
    for name, leaf in leaves.items():
        assert leaf.grad is not None, f"no gradient reaches {name}"
        results[f"d{name}"] = leaf.grad
    return results


def assert_close(actual: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float) -> None:
    assert actual.keys() == expected.keys()
    errors = {name: rel_rms(actual[name], expected[name]) for name in expected}
    assert all(error < tolerance for error in errors.values()), errors
