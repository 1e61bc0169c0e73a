"""Dispatch: what each op runs on which device, and that reference and kernel answer to the public signature."""

import importlib
import importlib.util
import inspect

import pytest
import torch

import m1.kernels
from m1.kernels import dispatch

PUBLIC = [getattr(m1.kernels, name) for name in m1.kernels.__all__]
PACKAGES = sorted({op.__module__ for op in PUBLIC})


@pytest.mark.parametrize("op", PUBLIC, ids=m1.kernels.__all__)
@pytest.mark.parametrize("module", ["reference", "triton_impl"])
def test_implementations_take_what_the_public_op_takes(op: object, module: str) -> None:
    if module == "triton_impl":
        pytest.importorskip("triton")
        if op.__module__ in dispatch.REFERENCE_ONLY or op.__name__ == "varlen_attention":  # that one is torch_varlen's
            pytest.skip("the op has no Triton kernel")
    implementation = getattr(importlib.import_module(f"{op.__module__}.{module}"), op.__name__)
    public, own = (inspect.signature(function).parameters for function in (op, implementation))
    assert list(public) == list(own)[: len(public)]
    for name, parameter in public.items():
        assert (parameter.kind, parameter.default) == (own[name].kind, own[name].default), name
    extra = [parameter for name, parameter in own.items() if name not in public]
    assert all(parameter.default is not inspect.Parameter.empty for parameter in extra)


@pytest.mark.parametrize("package", PACKAGES)
def test_every_device_gets_a_module_that_exists(package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    tensor = torch.ones(1)
    assert dispatch.implementation_for(tensor, package).__name__ == f"{package}.reference"
    has_kernel = importlib.util.find_spec(f"{package}.triton_impl") is not None
    assert has_kernel == (package not in dispatch.REFERENCE_ONLY)
    pytest.importorskip("triton")
    monkeypatch.setattr(dispatch, "use_triton", lambda tensor: True)
    expected = "triton_impl" if has_kernel and package not in dispatch.UNVERIFIED else "reference"
    assert dispatch.implementation_for(tensor, package).__name__ == f"{package}.{expected}"
