"""Which implementation an op uses, and the checks that every public op shares; no arithmetic lives here.

Errors name the argument, what was expected and what was given. Values of tensors are checked on the CPU only: on a GPU
that would synchronise, so there an index out of range is the caller's responsibility.
"""

import functools
import importlib
import importlib.util
import itertools
from collections.abc import Sequence
from types import ModuleType

import torch
from torch import Tensor

REFERENCE_ONLY: frozenset[str] = frozenset()  # packages without a Triton kernel: the reference serves every device
# Kernels that agree with their reference in Triton's interpreter, but have not been compared with it on a GPU yet
# (`pytest -m gpu tests/kernels`): until they have, the reference serves. Packages, or "package.op" for one op of a package.
UNVERIFIED: frozenset[str] = frozenset()


@functools.cache
def has_triton() -> bool:
    """Whether triton is installed (its kernels are imported only when a tensor needs them)."""
    return importlib.util.find_spec("triton") is not None


def use_triton(tensor: Tensor) -> bool:
    """Whether an op on `tensor` runs its Triton kernel: on CUDA where triton is installed; else the torch reference."""
    return tensor.is_cuda and has_triton()


def implementation_for(tensor: Tensor, package: str, op: str = "") -> ModuleType:
    """The module of an op's `package` that computes for `tensor`: its triton_impl or its reference, imported when used.

    `op` is the op's name where only some of the package's kernels are verified.
    """
    return _implementation(use_triton(tensor), package, op)


@functools.cache  # asked for at every call of an op
def _implementation(has_kernel: bool, package: str, op: str) -> ModuleType:
    is_triton = has_kernel and {package, f"{package}.{op}"}.isdisjoint(REFERENCE_ONLY | UNVERIFIED)
    return importlib.import_module(f"{package}.triton_impl" if is_triton else f"{package}.reference")


def require(is_met: bool, argument: str, expected: str, given: object) -> None:
    """Raise ValueError naming the argument, what was expected and what was given, unless `is_met`."""
    if not is_met:
        raise ValueError(f"`{argument}` must be {expected}; given: {given}")


def is_like(tensor: Tensor, shape: Sequence[int], like: Tensor, dtypes: tuple[torch.dtype, ...] | None = None) -> bool:
    """What require_tensor requires."""
    is_dtype_right = tensor.is_floating_point() if dtypes is None else tensor.dtype in dtypes
    return is_dtype_right and tensor.shape == tuple(shape) and tensor.device == like.device


def require_tensor(
    argument: str,
    tensor: Tensor,
    layout: str,
    shape: Sequence[int],
    like: Tensor,
    dtypes: tuple[torch.dtype, ...] | None = None,
) -> None:
    """Check shape, device and dtype of a tensor argument.

    `layout` names the dimensions ("T H P"), `shape` holds their sizes, `like` is the tensor whose device must match;
    `dtypes` None accepts every real floating dtype. Raises ValueError.
    """
    if is_like(tensor, shape, like, dtypes):
        return
    kinds = "floating" if dtypes is None else " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
    sizes = ", ".join(f"{name}={size}" for name, size in zip(layout.split(), shape, strict=True))
    given = f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)} on {tensor.device}"
    raise ValueError(f"`{argument}` must be a {kinds} tensor [{sizes}] on {like.device}; given: {given}")


def require_rank(argument: str, tensor: Tensor, layout: str) -> None:
    """Check that a tensor from which sizes are read is floating and has the dimensions that `layout` names."""
    if tensor.dim() != len(layout.split()) or not tensor.is_floating_point():
        names = ", ".join(layout.split())
        given = f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"
        raise ValueError(f"`{argument}` must be a floating tensor [{names}]; given: {given}")


def require_cu_seqlens(cu_seqlens: Tensor | None, num_tokens: int, like: Tensor) -> int:
    """Check cumulative sequence lengths ([n+1] int32, 0 … num_tokens, no empty sequence) and return n.

    None means one sequence of all tokens. Raises ValueError.
    """
    require(num_tokens > 0, "cu_seqlens", "over at least one token", "0 tokens")
    if cu_seqlens is None:
        return 1
    require(
        cu_seqlens.dim() == 1 and len(cu_seqlens) > 1 and cu_seqlens.dtype == torch.int32,
        "cu_seqlens",
        "an int32 tensor [n+1] with n >= 1",
        f"{cu_seqlens.dtype} {list(cu_seqlens.shape)}",
    )
    require(cu_seqlens.device == like.device, "cu_seqlens", f"on {like.device}", cu_seqlens.device)
    if cu_seqlens.device.type == "cpu":
        bounds = cu_seqlens.tolist()
        is_ordered = all(start < end for start, end in itertools.pairwise(bounds))
        require(
            bounds[0] == 0 and bounds[-1] == num_tokens and is_ordered,
            "cu_seqlens",
            f"strictly increasing from 0 to {num_tokens}, the number of tokens",
            bounds,
        )
    return len(cu_seqlens) - 1


def require_slots(slots: Tensor | None, num_rows: int, num_slots: int, like: Tensor) -> None:
    """Check that `slots` ([n] int64, each below num_slots; None means arange(n)) addresses num_rows states."""
    if slots is None:
        require(num_rows <= num_slots, "slots", f"given when {num_rows} rows exceed {num_slots} state slots", None)
        return
    require_tensor("slots", slots, "n", (num_rows,), like, (torch.int64,))
    if slots.device.type == "cpu" and num_rows > 0:
        low, high = int(slots.min()), int(slots.max())
        require(low >= 0 and high < num_slots, "slots", f"within 0 … {num_slots - 1}", f"values from {low} to {high}")


def require_groups(argument: str, num_heads: int, num_groups: int) -> None:
    """Check that the heads of `argument` (num_groups of them) divide the query-side heads."""
    require(
        num_groups > 0 and num_heads % num_groups == 0,
        argument,
        f"of a number of heads that divides the {num_heads} query-side heads",
        f"{num_groups} heads",
    )
