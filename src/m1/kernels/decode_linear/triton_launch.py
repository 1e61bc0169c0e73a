"""Launching products of few tokens: which of the two kernels, its buffers and its grid. Sizes are chosen by the callers."""

import functools
from typing import Any

import torch
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from m1.kernels.decode_linear.triton_bulk import bulk_kernel, can_copy_in_bulk
from m1.kernels.decode_linear.triton_product import LINE, ProductConfig, product_kernel
from m1.kernels.launch import cdiv, chaining, dot_dtype, next_power_of_2

MAX_TILES = 2**14


@functools.cache
def _counters(device: torch.device, stream: int) -> Tensor:
    """Zeros, which every launch leaves as zeros; one for each stream, whose launches follow one another."""
    return torch.zeros(MAX_TILES, dtype=torch.int32, device=device)


def few_token_product(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    out_dtype: torch.dtype,
    config: ProductConfig,
    *,
    scales: tuple[Tensor, Tensor] | None = None,
    is_pair: bool = False,
    leaves_parts: bool = False,
    is_chained: bool = True,
) -> Tensor:
    """x [T, K] · weightᵀ [N, K] + bias, times scales ([T, 1], [N, 1] fp32) of 8-bit numbers.

    is_pair: swiglu of the halves. leaves_parts: [splits, T, N], whose sum is the product. is_chained: begin before the kernel
    ahead has ended, where the GPU knows how. Tiles come in bulk as the config says, where splits need not be added up and rows
    lie as the copy engine wants them.
    """
    num_tokens, width = x.shape
    num_outputs = weight.shape[0] // 2 if is_pair else weight.shape[0]
    tiles, block_t = cdiv(num_outputs, config.block_n), max(next_power_of_2(num_tokens), 16)
    is_summing = config.splits > 1 and not leaves_parts
    shape = (config.splits, num_tokens, num_outputs) if leaves_parts else (num_tokens, num_outputs)
    y = torch.empty(shape, dtype=out_dtype, device=x.device)
    x_scale, w_scale = scales or (None, None)
    ahead_lines = cdiv(config.num_ahead * weight.element_size(), LINE)
    options: dict[str, Any] = {
        "BT": block_t,
        "BN": config.block_n,
        "BK": config.block_k,
        "HAS_SCALE": scales is not None,
        "HAS_BIAS": bias is not None,
        "IS_PAIR": is_pair,
        "LEAVES_PARTS": leaves_parts,
        "AHEAD_LINES": next_power_of_2(ahead_lines) if ahead_lines else 0,
        "num_warps": config.num_warps,
        "num_stages": config.num_stages,
        **chaining(x.device, is_chained),
    }
    grid = (tiles, config.splits)
    with torch.cuda.device_of(x):
        if config.is_bulk and not is_summing and can_copy_in_bulk(x, weight):
            x_tiles = TensorDescriptor.from_tensor(x, [block_t, config.block_k])
            w_tiles = TensorDescriptor.from_tensor(weight, [config.block_n, config.block_k])
            bulk_kernel[grid](
                x_tiles, w_tiles, weight, x_scale, w_scale, bias, y, num_tokens, num_outputs, width,
                config.splits, config.num_ahead, **options,
            )  # fmt: skip
            return y
        partial = counters = None
        if is_summing:
            assert tiles <= MAX_TILES
            counters = _counters(x.device, torch.cuda.current_stream(x.device).cuda_stream if x.is_cuda else 0)
            room = (1 + is_pair, tiles, config.splits, config.block_n, block_t)
            partial = torch.empty(room, dtype=torch.float32, device=x.device)
        product_kernel[grid](
            x, x_scale, weight, w_scale, bias, y, partial, counters,
            x.stride(0), num_tokens, num_outputs, width, config.splits, config.num_ahead,
            IS_SPLIT=is_summing, IS_EVEN=width % config.block_k == 0, DOT=dot_dtype(x.dtype), **options,
        )  # fmt: skip
    return y
