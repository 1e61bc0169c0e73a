"""What the Triton files of several ops need to launch a kernel: sizes, row views, operand types; no kernel lives here.

Imports triton, so only triton_impl.py files (and the kernels beside them) may import it.
"""

import functools
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

# TRITON_INTERPRET=1 runs kernels in numpy, which has no bfloat16: there matrix products take fp32 operands instead.
IS_INTERPRETED = bool(triton.knobs.runtime.interpret)


@functools.cache
def num_multiprocessors(device: torch.device) -> int:
    """Streaming multiprocessors of `device`; an H100's 132 stand in on the CPU, where only the interpreter runs."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 132


def cdiv(count: int, size: int) -> int:
    """⌈count / size⌉. Triton's own wraps its arguments for use inside kernels, which costs a launch several microseconds."""
    return -(-count // size)


def next_power_of_2(number: int) -> int:
    """The least power of two that is at least `number` > 0; see `cdiv`."""
    return 1 << (number - 1).bit_length()


def dot_dtype(dtype: torch.dtype) -> tl.dtype:
    """The operand type of tl.dot for data stored as `dtype`: fp8 is widened to fp16 (exact, and one instruction a pair)."""
    if dtype == torch.float32 or (IS_INTERPRETED and dtype == torch.bfloat16):
        return tl.float32
    return tl.bfloat16 if dtype == torch.bfloat16 else tl.float16


def as_rows(x: Tensor) -> Tensor:
    """View [..., D] as [rows, D] with adjacent elements in a row; copies only where the strides leave no other way."""
    rows = x if x.dim() == 2 else x.reshape(-1, x.shape[-1])
    return rows if rows.stride(-1) == 1 else rows.contiguous()


def with_unit_stride(x: Tensor) -> Tensor:
    """`x` itself if its last dimension is contiguous in memory, else a contiguous copy."""
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


@functools.cache
def _can_chain(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0)


def chaining(device: torch.device, is_wanted: bool = True) -> dict[str, Any]:
    """Launch options of a kernel that calls `wait_for_previous(IS_CHAINED)` before it reads or writes anything.

    It may then start before the kernel ahead of it in its stream has ended (programmatic dependent launch), where the GPU
    knows that: between the short kernels of a decoding step nothing else fills the time. Kernels that don't call it see no
    difference, whichever side they are on.
    """
    if is_wanted and _can_chain(device):
        return {"IS_CHAINED": True, "launch_pdl": True}
    return {"IS_CHAINED": False}


@triton.jit
def wait_for_previous(IS_CHAINED: tl.constexpr):
    """Let the next kernel start, as far as there is room, and wait until the previous one has ended and can be read."""
    if IS_CHAINED:
        gdc_launch_dependents()
        gdc_wait()
