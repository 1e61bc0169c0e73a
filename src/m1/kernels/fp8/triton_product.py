"""The 8-bit product for few tokens, where reading the weight is all that counts.

y[t, n] = x_scale[t] · w_scale[n] · Σ_k x[t, k] · w[n, k]. A program owns a tile of output channels, all tokens of a block,
and one split of k; the weight's tile is the first operand of the tensor-core product, whose first side is at least 64
while the second may be 16: so tokens are not padded to 64. Partial sums of the splits (fp32) lie in a workspace; the split
that arrives last, which a counter a tile tells, adds them up in order: results repeat.

Bytes moved: N · K of the weight, T · K a tile of channels (from the L2 cache), 8 · T · N a split beyond the first (L2).
Floor on an H100 at 3.0 TB/s for the products of a decoding step of M1-3B: 3.2 GB, 1.07 ms.
"""

import functools
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from m1.kernels.launch import num_multiprocessors

MAX_TOKENS = 128
MAX_TILES = 2**14


class ProductConfig(NamedTuple):
    """Output channels a tile, a loop iteration's k, splits of k, warps and pipeline stages."""

    block_n: int
    block_k: int
    splits: int
    num_warps: int = 4
    num_stages: int = 4


def choose_config(num_tokens: int, num_outputs: int, width: int, multiprocessors: int) -> ProductConfig:
    """A launch from shapes alone: tiles of 64 channels, and as much of k in flight as fits (best of a sweep on an H100).

    k is split only where there are few tiles and each has a long way to go.
    """
    tiles = triton.cdiv(num_outputs, 64)
    block_k, num_stages = 256, 4
    if num_tokens > 32 and tiles > multiprocessors // 2:  # tokens take the room of weights
        block_k, num_stages = 128, 6 if tiles <= multiprocessors else 4
    steps, splits = triton.cdiv(width, block_k), 1
    while steps >= 18 * splits and 2 * splits * tiles <= 2 * multiprocessors:
        splits *= 2
    return ProductConfig(64, block_k, splits, 4, num_stages)


@functools.cache
def _counters(device: torch.device, stream: int) -> Tensor:
    """Zeros, which every launch leaves as zeros; one for each stream, whose launches follow one another."""
    return torch.zeros(MAX_TILES, dtype=torch.int32, device=device)


@triton.jit
def _product_kernel(
    x_ptr, x_scale_ptr, w_ptr, w_scale_ptr, bias_ptr, y_ptr, partial_ptr, counter_ptr, T, N, K,
    BT: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, SPLITS: tl.constexpr, IS_EVEN: tl.constexpr,
    HAS_BIAS: tl.constexpr,
):  # fmt: skip
    """Grid (tiles of channels, splits); tiles of y are transposed, [BN, BT]."""
    tile, split = tl.program_id(0), tl.program_id(1)
    n = tile * BN + tl.arange(0, BN)
    t = tl.arange(0, BT)
    inside = tl.arange(0, BK)
    steps = tl.cdiv(tl.cdiv(K, BK), SPLITS)
    begin = split * steps * BK
    end = tl.minimum(begin + steps * BK, K)
    w_at = w_ptr + n.to(tl.int64)[:, None] * K + inside[None, :]
    x_at = x_ptr + t[None, :] * K + inside[:, None]
    total = tl.zeros([BN, BT], tl.float32)
    for k in range(begin, end, BK):
        if IS_EVEN:
            w = tl.load(w_at + k, mask=(n < N)[:, None], other=0.0)
            x = tl.load(x_at + k, mask=(t < T)[None, :], other=0.0)
        else:
            w = tl.load(w_at + k, mask=(n < N)[:, None] & (k + inside < K)[None, :], other=0.0)
            x = tl.load(x_at + k, mask=(t < T)[None, :] & (k + inside < K)[:, None], other=0.0)
        total = tl.dot(w, x, total)

    if SPLITS > 1:
        place = tl.arange(0, BN)[:, None] * BT + t[None, :]
        partial_at = partial_ptr + tile * (SPLITS * BN * BT) + place
        tl.store(partial_at + split * (BN * BT), total)
        tl.debug_barrier()  # all threads have stored before one of them counts
        arrived = tl.atomic_add(counter_ptr + tile, 1, sem="acq_rel")
        if arrived != SPLITS - 1:
            return
        total = tl.zeros([BN, BT], tl.float32)
        for other in range(SPLITS):
            total += tl.load(partial_at + other * (BN * BT), cache_modifier=".cg")
        tl.store(counter_ptr + tile, 0)
    is_output = (n < N)[:, None] & (t < T)[None, :]
    y = total * tl.load(w_scale_ptr + n, mask=n < N, other=0.0)[:, None]
    y *= tl.load(x_scale_ptr + t, mask=t < T, other=0.0)[None, :]
    if HAS_BIAS:
        y += tl.load(bias_ptr + n, mask=n < N, other=0.0).to(tl.float32)[:, None]
    tl.store(y_ptr + t.to(tl.int64)[None, :] * N + n[:, None], y.to(y_ptr.dtype.element_ty), mask=is_output)


def few_token_product(
    x: Tensor,
    x_scale: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    out_dtype: torch.dtype,
    config: ProductConfig | None = None,
) -> Tensor:
    """fp8_linear for at most MAX_TOKENS tokens; `config` overrides the launch sizes."""
    (num_tokens, width), num_outputs = x.shape, weight.shape[0]
    assert num_tokens <= MAX_TOKENS
    config = config or choose_config(num_tokens, num_outputs, width, num_multiprocessors(x.device))
    tiles = triton.cdiv(num_outputs, config.block_n)
    block_t = max(triton.next_power_of_2(num_tokens), 16)
    y = torch.empty(num_tokens, num_outputs, dtype=out_dtype, device=x.device)
    partial = counters = None
    if config.splits > 1:
        assert tiles <= MAX_TILES
        stream = torch.cuda.current_stream(x.device).cuda_stream if x.is_cuda else 0
        counters = _counters(x.device, stream)
        partial = torch.empty(tiles, config.splits, config.block_n, block_t, dtype=torch.float32, device=x.device)
    with torch.cuda.device_of(x):
        _product_kernel[(tiles, config.splits)](
            x, x_scale, weight, weight_scale, bias, y, partial, counters, num_tokens, num_outputs, width,
            BT=block_t, BN=config.block_n, BK=config.block_k, SPLITS=config.splits, IS_EVEN=width % config.block_k == 0,
            HAS_BIAS=bias is not None, num_warps=config.num_warps, num_stages=config.num_stages,
        )  # fmt: skip
    return y
