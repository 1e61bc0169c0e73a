"""SwiGLU on CUDA, forward and backward, elementwise over rows; gate and up may be halves of one projection's output.

Bytes moved: forward 3 elements an output (gate and up read, y written), backward 5. Floors on an H100 at 3.0 TB/s, bf16,
8,192 columns: 16,384 tokens forward 0.81 GB 0.268 ms, backward 1.34 GB 0.447 ms; 512 tokens 25 MB 8.4 µs.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from m1.kernels.launch import as_rows, cdiv, chaining, wait_for_previous

BLOCK = 2048


@triton.jit
def _forward_kernel(
    gate_ptr, up_ptr, y_ptr, gate_stride, up_stride, num_columns, BLOCK: tl.constexpr, IS_CHAINED: tl.constexpr
):
    wait_for_previous(IS_CHAINED)
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = columns < num_columns
    gate = tl.load(gate_ptr + row * gate_stride + columns, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(up_ptr + row * up_stride + columns, mask=mask, other=0.0).to(tl.float32)
    y = gate * tl.sigmoid(gate) * up
    tl.store(y_ptr + row * num_columns + columns, y.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _backward_kernel(
    gate_ptr, up_ptr, dy_ptr, dgate_ptr, dup_ptr, gate_stride, up_stride, dy_stride, num_columns, BLOCK: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = columns < num_columns
    gate = tl.load(gate_ptr + row * gate_stride + columns, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(up_ptr + row * up_stride + columns, mask=mask, other=0.0).to(tl.float32)
    dy = tl.load(dy_ptr + row * dy_stride + columns, mask=mask, other=0.0).to(tl.float32)
    sigmoid = tl.sigmoid(gate)
    dgate = dy * up * sigmoid * (1 + gate * (1 - sigmoid))
    offsets = row * num_columns + columns
    tl.store(dgate_ptr + offsets, dgate.to(dgate_ptr.dtype.element_ty), mask=mask)
    tl.store(dup_ptr + offsets, (dy * gate * sigmoid).to(dup_ptr.dtype.element_ty), mask=mask)


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return _forward(gate, up)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Any:
        gate, up = ctx.saved_tensors
        rows, up_rows, dy_rows = as_rows(gate), as_rows(up), as_rows(dy)
        dgate = torch.empty(gate.shape, dtype=gate.dtype, device=gate.device)
        dup = torch.empty(up.shape, dtype=up.dtype, device=up.device)
        num_columns = rows.shape[1]
        with torch.cuda.device_of(gate):
            _backward_kernel[(len(rows), cdiv(num_columns, BLOCK))](
                rows, up_rows, dy_rows, dgate, dup, rows.stride(0), up_rows.stride(0), dy_rows.stride(0), num_columns,
                BLOCK=BLOCK, num_warps=4,
            )  # fmt: skip
        return dgate, dup


def _forward(gate: Tensor, up: Tensor) -> Tensor:
    rows, up_rows = as_rows(gate), as_rows(up)
    y = torch.empty(gate.shape, dtype=gate.dtype, device=gate.device)
    num_columns = rows.shape[1]
    with torch.cuda.device_of(gate):
        _forward_kernel[(len(rows), cdiv(num_columns, BLOCK))](
            rows, up_rows, y, rows.stride(0), up_rows.stride(0), num_columns, BLOCK=BLOCK, num_warps=4, **chaining(gate.device)
        )
    return y


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) · up in gate's dtype, computed in fp32; differentiable; the public op's contract."""
    if torch.is_grad_enabled() and (gate.requires_grad or up.requires_grad):
        return _SwiGLU.apply(gate, up)
    return _forward(gate, up)
