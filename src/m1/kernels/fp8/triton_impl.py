"""8-bit quantisation and products on a GPU. Up to MAX_TOKENS tokens the product is decode_linear's kernel.

More tokens go to torch's scaled product, which is bound by arithmetic there.

A program quantises one row, which it holds whole. Bytes moved: quantize_fp8 3 a number of x in bf16; rms_norm_fp8 with a
residual 7; swiglu_fp8 5. Floors on an H100 at 3.0 TB/s, 512 tokens: 3,072 wide 1.6 µs, with norm and residual 3.7 µs;
swiglu_fp8 8,192 wide 7.0 µs.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from m1.kernels.decode_linear import MAX_TOKENS
from m1.kernels.decode_linear.triton_launch import few_token_product
from m1.kernels.decode_linear.triton_product import AHEAD, LEAST_WIDTH_IN_BULK, ProductConfig
from m1.kernels.launch import as_rows, cdiv, chaining, num_multiprocessors, wait_for_previous
from m1.kernels.triton_math import sigmoid

LARGEST = tl.constexpr(448.0)
SMALLEST_SCALE = tl.constexpr(1e-12)


@triton.jit
def _store_quantized(row, x, columns, mask, values_ptr, scale_ptr, D):
    """Store a row of fp32 numbers (zeros where masked) as e4m3 numbers and their scale."""
    scale = tl.maximum(tl.max(tl.abs(x), 0) / LARGEST, SMALLEST_SCALE)
    scaled = tl.minimum(tl.maximum(x / scale, -LARGEST), LARGEST)
    tl.store(values_ptr + row * D + columns, scaled.to(values_ptr.dtype.element_ty), mask=mask)
    tl.store(scale_ptr + row, scale)


@triton.jit
def _quantize_kernel(x_ptr, values_ptr, scale_ptr, x_stride, D, BLOCK: tl.constexpr, IS_CHAINED: tl.constexpr):
    wait_for_previous(IS_CHAINED)
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    mask = columns < D
    x = tl.load(x_ptr + row * x_stride + columns, mask=mask, other=0.0).to(tl.float32)
    _store_quantized(row, x, columns, mask, values_ptr, scale_ptr, D)


@triton.jit
def _norm_kernel(
    x_ptr, residual_ptr, weight_ptr, sum_ptr, values_ptr, scale_ptr, x_stride, part_stride, residual_stride, D, eps,
    BLOCK: tl.constexpr, PARTS: tl.constexpr, HAS_RESIDUAL: tl.constexpr, IS_CHAINED: tl.constexpr,
):  # fmt: skip
    """PARTS > 0: x is the sum of so many, rounded to residual's dtype as if it had been stored."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    mask = columns < D
    weight = tl.load(weight_ptr + columns, mask=mask, other=0.0).to(tl.float32)  # no kernel ahead writes it
    wait_for_previous(IS_CHAINED)
    dtype: tl.constexpr = residual_ptr.dtype.element_ty if PARTS > 0 else x_ptr.dtype.element_ty
    x = tl.load(x_ptr + row * x_stride + columns, mask=mask, other=0.0).to(tl.float32)
    if PARTS > 0:
        for part in tl.static_range(1, PARTS):
            x += tl.load(x_ptr + part * part_stride + row * x_stride + columns, mask=mask, other=0.0)
        x = x.to(dtype).to(tl.float32)
    if HAS_RESIDUAL:
        x += tl.load(residual_ptr + row * residual_stride + columns, mask=mask, other=0.0).to(tl.float32)
        summed = x.to(sum_ptr.dtype.element_ty)
        tl.store(sum_ptr + row * D + columns, summed, mask=mask)
        x = summed.to(tl.float32)
    rstd = 1 / tl.sqrt(tl.sum(x * x, 0) / D + eps)
    normed = ((x * rstd).to(dtype).to(tl.float32) * weight).to(dtype).to(tl.float32)  # rounded as between separate ops
    _store_quantized(row, normed, columns, mask, values_ptr, scale_ptr, D)


@triton.jit
def _swiglu_kernel(
    gate_ptr, up_ptr, values_ptr, scale_ptr, gate_stride, up_stride, D, BLOCK: tl.constexpr, IS_CHAINED: tl.constexpr
):
    wait_for_previous(IS_CHAINED)
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    mask = columns < D
    gate = tl.load(gate_ptr + row * gate_stride + columns, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(up_ptr + row * up_stride + columns, mask=mask, other=0.0).to(tl.float32)
    _store_quantized(row, gate * sigmoid(gate) * up, columns, mask, values_ptr, scale_ptr, D)


def _outputs(x: Tensor) -> tuple[Tensor, Tensor]:
    values = torch.empty(x.shape, dtype=torch.float8_e4m3fn, device=x.device)
    return values, torch.empty(x.shape[0], 1, dtype=torch.float32, device=x.device)


def _row_launch(width: int, device: torch.device) -> dict[str, Any]:
    block = triton.next_power_of_2(width)
    return {"BLOCK": block, "num_warps": min(max(block // 512, 1), 16), **chaining(device)}


def quantize_fp8(x: Tensor) -> tuple[Tensor, Tensor]:
    """See m1.kernels.fp8.quantize_fp8."""
    x = as_rows(x)
    values, scale = _outputs(x)
    with torch.cuda.device_of(x):
        _quantize_kernel[(len(x),)](x, values, scale, x.stride(0), x.shape[1], **_row_launch(x.shape[1], x.device))
    return values, scale


def rms_norm_fp8(x: Tensor, weight: Tensor, eps: float, residual: Tensor | None = None) -> Any:
    """See m1.kernels.fp8.rms_norm_fp8."""
    values, scale, summed = _norm(as_rows(x), 0, 0, weight, eps, residual)
    return (values, scale) if residual is None else (values, scale, summed)


def rms_norm_fp8_of_parts(parts: Tensor, weight: Tensor, eps: float, residual: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """See m1.kernels.fp8.rms_norm_fp8_of_parts."""
    parts = parts.contiguous()
    return _norm(parts[0], len(parts), parts.stride(0), weight, eps, residual)


def _norm(x: Tensor, num_parts: int, part_stride: int, weight: Tensor, eps: float, residual: Tensor | None) -> Any:
    """x: rows, or the first of num_parts, each part_stride after the one before."""
    residual = None if residual is None else as_rows(residual)
    summed = None if residual is None else torch.empty(x.shape, dtype=residual.dtype, device=x.device)
    values, scale = _outputs(x)
    with torch.cuda.device_of(x):
        _norm_kernel[(len(x),)](
            x, residual, weight.contiguous(), summed, values, scale,
            x.stride(0), part_stride, 0 if residual is None else residual.stride(0), x.shape[1], eps,
            PARTS=num_parts, HAS_RESIDUAL=residual is not None, **_row_launch(x.shape[1], x.device),
        )  # fmt: skip
    return values, scale, summed


def swiglu_fp8(gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    """See m1.kernels.fp8.swiglu_fp8."""
    gate, up = as_rows(gate), as_rows(up)
    values, scale = _outputs(gate)
    with torch.cuda.device_of(gate):
        _swiglu_kernel[(len(gate),)](
            gate, up, values, scale, gate.stride(0), up.stride(0), gate.shape[1], **_row_launch(gate.shape[1], gate.device)
        )
    return values, scale


def choose_config(
    num_tokens: int, num_outputs: int, width: int, multiprocessors: int, leaves_parts: bool = False
) -> ProductConfig:
    """A product's launch from shapes alone: as much of k in flight as fits (best of sweeps over M1-3B's shapes).

    k is split only where there are few tiles and each has a long way to go, sooner where nobody has to add the parts up here.
    With more than 64 tokens tiles come as bulk copies, but for the longest.
    """
    tiles, is_small = cdiv(num_outputs, 64), num_tokens <= 32
    splits = 2 if 2 * tiles <= multiprocessors and width >= (3072 if leaves_parts else 8192) else 1
    is_bulk = num_tokens > 64 and width >= LEAST_WIDTH_IN_BULK
    if num_tokens > 64 and tiles > 4 * multiprocessors:  # wider tiles read the tokens less often
        return ProductConfig(128, 128, 1, 8, 6, AHEAD, is_bulk)
    if not is_small and splits > 1 and width < 8192:
        return ProductConfig(64, 128, splits, 8, 6, AHEAD, is_bulk)
    if tiles > multiprocessors:
        block_k, num_stages = (256, 4) if is_small else (128, 4)
    elif is_small:
        block_k, num_stages = (512, 3) if splits > 1 and width // splits % 512 == 0 else (256, 6)
    else:
        block_k, num_stages = (256, 3) if 2 * tiles <= multiprocessors else (128, 6)
    return ProductConfig(64, block_k, splits, 4, num_stages, AHEAD, is_bulk and block_k < 256)


def fp8_linear(
    x: Tensor,
    x_scale: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None = None,
    out_dtype: torch.dtype = torch.bfloat16,
    config: ProductConfig | None = None,
) -> Tensor:
    """See m1.kernels.fp8.fp8_linear; `config` overrides the launch sizes of few tokens."""
    if len(x) <= MAX_TOKENS:
        config = config or choose_config(len(x), len(weight), x.shape[1], num_multiprocessors(x.device))
        return few_token_product(x, weight, bias, out_dtype, config, scales=(x_scale, weight_scale))
    y = torch._scaled_mm(x, weight.t(), scale_a=x_scale, scale_b=weight_scale.t(), out_dtype=out_dtype, use_fast_accum=True)
    return y if bias is None else y.add_(bias)


def fp8_linear_parts(
    x: Tensor,
    x_scale: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None = None,
    config: ProductConfig | None = None,
) -> Tensor:
    """See m1.kernels.fp8.fp8_linear_parts; `config` overrides the launch sizes."""
    config = config or choose_config(len(x), len(weight), x.shape[1], num_multiprocessors(x.device), leaves_parts=True)
    return few_token_product(x, weight, bias, torch.float32, config, scales=(x_scale, weight_scale), leaves_parts=True)
