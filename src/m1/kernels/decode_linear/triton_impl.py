"""Products of few tokens on a GPU: the weight streams through, each element once.

A program owns a tile of output channels, all tokens, and one split of k. The weight's tile is the first operand of the
tensor-core product, whose first side is at least 64 while the second may be 16: tokens are not padded to 64. Partial sums of
the splits (fp32) lie in a workspace; the split that arrives last, which a counter a tile tells, adds them up in order, so
that results repeat. With gate and up a program owns the same channels of both.

Kernels of a decoding step are short, and between two of them memory would idle. So a program begins by fetching the first
part of its weights into the L2 cache, and with IS_CHAINED it is there to do so before the kernel ahead of it has ended
(programmatic dependent launch): only then does it wait for x.

Bytes moved: N · K of the weight, T · K a tile of channels (from the L2 cache), 8 · T · N a split beyond the first (L2).
Floor on an H100 at 3.0 TB/s, bf16: gate and up of M1-3B 101 MB, 33.6 µs; all products of its decoding step 6.4 GB, 2.14 ms.
"""

import functools
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from m1.kernels.launch import IS_INTERPRETED, dot_dtype, num_multiprocessors, with_unit_stride

MAX_TILES = 2**14


class ProductConfig(NamedTuple):
    """Output channels a tile, a loop iteration's k, splits of k, warps, pipeline stages, and the columns of k that a program
    fetches ahead (a multiple of 64; 0 for none)."""

    block_n: int
    block_k: int
    splits: int
    num_warps: int = 4
    num_stages: int = 4
    num_ahead: int = 0


def choose_config(num_tokens: int, num_outputs: int, width: int, multiprocessors: int, is_pair: bool) -> ProductConfig:
    """A launch from shapes alone: splits so that about two programs a multiprocessor read at once."""
    block_n, block_k = 64, 64 if is_pair else 128
    tiles = triton.cdiv(num_outputs, block_n)
    splits = max(min(2 * multiprocessors // tiles, width // (4 * block_k), 8), 1)
    return ProductConfig(block_n, block_k, splits)


@functools.cache
def _counters(device: torch.device, stream: int) -> Tensor:
    """Zeros, which every launch leaves as zeros; one for each stream, whose launches follow one another."""
    return torch.zeros(MAX_TILES, dtype=torch.int32, device=device)


@triton.jit
def _fetch(w_ptr, n, N, K, begin, AHEAD: tl.constexpr):
    """Start to bring columns begin … begin + AHEAD of rows n into the L2 cache, a line of 64 elements an instruction."""
    lines = begin + 64 * tl.arange(0, AHEAD // 64)
    rows = tl.minimum(n, N - 1).to(tl.int64)[:, None]
    place = w_ptr + rows * K + tl.minimum(lines, K - 1)[None, :]
    tl.inline_asm_elementwise(
        "prefetch.global.L2 [$1]; mov.u32 $0, 0;", "=r,l", [place.to(tl.int64)], dtype=tl.int32, is_pure=False, pack=1
    )


@triton.jit
def _sum_splits(total, partial_at, counter_at, split, SPLITS: tl.constexpr, SIZE: tl.constexpr):
    """Leave this split's part; the last to arrive gets the sum of all, and true."""
    tl.store(partial_at + split * SIZE, total)
    tl.debug_barrier()  # all threads have stored before one of them counts
    arrived = tl.atomic_add(counter_at, 1, sem="acq_rel")
    if arrived == SPLITS - 1:
        total = tl.zeros_like(total)
        for other in range(SPLITS):
            total += tl.load(partial_at + other * SIZE, cache_modifier=".cg")
    return total, arrived == SPLITS - 1


@triton.jit
def _product_kernel(
    x_ptr, w_ptr, bias_ptr, y_ptr, partial_ptr, counter_ptr, x_stride, T, N, K,
    BT: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, SPLITS: tl.constexpr, AHEAD: tl.constexpr,
    IS_EVEN: tl.constexpr, HAS_BIAS: tl.constexpr, IS_PAIR: tl.constexpr, IS_CHAINED: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """Grid (tiles of channels, splits); tiles of y are transposed, [BN, BT]. N: channels of y; with IS_PAIR w has 2 N rows."""
    tile, split = tl.program_id(0), tl.program_id(1)
    n = tile * BN + tl.arange(0, BN)
    t = tl.arange(0, BT)
    inside = tl.arange(0, BK)
    steps = tl.cdiv(tl.cdiv(K, BK), SPLITS)
    begin = split * steps * BK
    end = tl.minimum(begin + steps * BK, K)
    up_ptr = w_ptr + N.to(tl.int64) * K
    if IS_CHAINED:
        gdc_launch_dependents()
    if AHEAD > 0:
        _fetch(w_ptr, n, N, K, begin, AHEAD)
        if IS_PAIR:
            _fetch(up_ptr, n, N, K, begin, AHEAD)
    if IS_CHAINED:
        gdc_wait()

    w_at = w_ptr + n.to(tl.int64)[:, None] * K + inside[None, :]
    up_at = up_ptr + n.to(tl.int64)[:, None] * K + inside[None, :]
    x_at = x_ptr + t[None, :] * x_stride + inside[:, None]
    total = tl.zeros([BN, BT], tl.float32)
    if IS_PAIR:
        up_total = tl.zeros([BN, BT], tl.float32)
    for k in range(begin, end, BK):
        w_mask = (n < N)[:, None]
        x_mask = (t < T)[None, :]
        if not IS_EVEN:
            w_mask = w_mask & (k + inside < K)[None, :]
            x_mask = x_mask & (k + inside < K)[:, None]
        w = tl.load(w_at + k, mask=w_mask, other=0.0, eviction_policy="evict_first").to(DOT)
        x = tl.load(x_at + k, mask=x_mask, other=0.0).to(DOT)
        total = tl.dot(w, x, total, input_precision="ieee")
        if IS_PAIR:
            up = tl.load(up_at + k, mask=w_mask, other=0.0, eviction_policy="evict_first").to(DOT)
            up_total = tl.dot(up, x, up_total, input_precision="ieee")

    if SPLITS > 1:
        SIZE: tl.constexpr = BN * BT
        place = tl.arange(0, BN)[:, None] * BT + t[None, :]
        tiles = tl.num_programs(0)
        if IS_PAIR:
            up_at = partial_ptr + (tiles + tile) * (SPLITS * SIZE) + place
            tl.store(up_at + split * SIZE, up_total)
        total, is_last = _sum_splits(
            total, partial_ptr + tile * (SPLITS * SIZE) + place, counter_ptr + tile, split, SPLITS, SIZE
        )
        if not is_last:
            return
        if IS_PAIR:
            up_total = tl.zeros([BN, BT], tl.float32)
            for other in range(SPLITS):
                up_total += tl.load(up_at + other * SIZE, cache_modifier=".cg")
        tl.store(counter_ptr + tile, 0)
    if HAS_BIAS:
        total += tl.load(bias_ptr + n, mask=n < N, other=0.0).to(tl.float32)[:, None]
    if IS_PAIR:
        if HAS_BIAS:
            up_total += tl.load(bias_ptr + N + n, mask=n < N, other=0.0).to(tl.float32)[:, None]
        total = total * tl.sigmoid(total) * up_total
    is_output = (n < N)[:, None] & (t < T)[None, :]
    tl.store(y_ptr + t.to(tl.int64)[None, :] * N + n[:, None], total.to(y_ptr.dtype.element_ty), mask=is_output)


def _launch(
    x: Tensor, weight: Tensor, bias: Tensor | None, is_pair: bool, config: ProductConfig | None, is_chained: bool
) -> Tensor:
    x, weight = with_unit_stride(x), weight.contiguous()
    num_tokens, width = x.shape
    num_outputs = weight.shape[0] // 2 if is_pair else weight.shape[0]
    config = config or choose_config(num_tokens, num_outputs, width, num_multiprocessors(x.device), is_pair)
    tiles = triton.cdiv(num_outputs, config.block_n)
    block_t = max(triton.next_power_of_2(num_tokens), 16)
    y = torch.empty(num_tokens, num_outputs, dtype=x.dtype, device=x.device)
    partial = counters = None
    if config.splits > 1:
        assert tiles <= MAX_TILES
        stream = torch.cuda.current_stream(x.device).cuda_stream if x.is_cuda else 0
        counters = _counters(x.device, stream)
        partial = torch.empty(1 + is_pair, tiles, config.splits, config.block_n, block_t, device=x.device)
    options = {"launch_pdl": True} if is_chained else {}
    with torch.cuda.device_of(x):
        _product_kernel[(tiles, config.splits)](
            x, weight, bias, y, partial, counters, x.stride(0), num_tokens, num_outputs, width,
            BT=block_t, BN=config.block_n, BK=config.block_k, SPLITS=config.splits,
            AHEAD=0 if IS_INTERPRETED else config.num_ahead, IS_EVEN=width % config.block_k == 0, HAS_BIAS=bias is not None,
            IS_PAIR=is_pair, IS_CHAINED=is_chained, DOT=dot_dtype(x.dtype),
            num_warps=config.num_warps, num_stages=config.num_stages, **options,
        )  # fmt: skip
    return y


def decode_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, config: ProductConfig | None = None, is_chained: bool = False
) -> Tensor:
    """The public op's contract. `config` overrides the launch sizes; is_chained: start before the kernel ahead has ended."""
    return _launch(x, weight, bias, False, config, is_chained)


def decode_swiglu(
    x: Tensor, weight: Tensor, bias: Tensor | None, config: ProductConfig | None = None, is_chained: bool = False
) -> Tensor:
    """The public op's contract; as decode_linear."""
    return _launch(x, weight, bias, True, config, is_chained)
