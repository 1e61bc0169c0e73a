"""The product of triton_product with tiles that the GPU's copy engine brings (bulk copies of Hopper's TMA).

There a warp computes the addresses of all that it asks for, and with 128 tokens it asks for twice as many bytes of tokens as
of weights: four warps, one on each scheduler, spend up to half of their time between dependent instructions. Here a tile is
one instruction. Sums are taken in the same order, so the results are the same bits. Splits of k are not added up here: there is
one, or the norm that follows adds the parts.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from m1.kernels.decode_linear.triton_product import LINE_BITS, fetch_lines, finish_product

ROW_BYTES = 16  # what the bytes of a row, and of what lies before it, must be multiples of


@triton.jit(do_not_specialize=["T", "splits", "ahead"])
def bulk_kernel(
    x_tiles, w_tiles, w_ptr, x_scale_ptr, w_scale_ptr, bias_ptr, y_ptr, T, N, K, splits, ahead,
    BT: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, HAS_SCALE: tl.constexpr, HAS_BIAS: tl.constexpr,
    IS_PAIR: tl.constexpr, LEAVES_PARTS: tl.constexpr, AHEAD_LINES: tl.constexpr, IS_CHAINED: tl.constexpr,
):  # fmt: skip
    """Grid, tiles and arguments as in product_kernel; x_tiles, w_tiles: descriptors of x [T, K] and w [N or 2 N, K]."""
    tile, split = tl.program_id(0), tl.program_id(1)
    n = tile * BN + tl.arange(0, BN)
    t = tl.arange(0, BT)
    steps = tl.cdiv(tl.cdiv(K, BK), splits)
    begin = split * steps * BK
    end = tl.minimum(begin + steps * BK, K)
    if IS_CHAINED:
        gdc_launch_dependents()
        if AHEAD_LINES > 0:
            line: tl.constexpr = LINE_BITS // w_ptr.dtype.element_ty.primitive_bitwidth
            count = tl.minimum(end - begin, ahead)
            fetch_lines(w_ptr, n, N, K, begin, count, AHEAD_LINES, line)
            if IS_PAIR:
                fetch_lines(w_ptr + N.to(tl.int64) * K, n, N, K, begin, count, AHEAD_LINES, line)
        gdc_wait()

    total = tl.zeros([BN, BT], tl.float32)
    up_total = tl.zeros([BN, BT], tl.float32) if IS_PAIR else None
    for k in range(begin, end, BK):
        w = w_tiles.load([tile * BN, k])
        x = x_tiles.load([0, k]).T
        total = tl.dot(w, x, total)
        if IS_PAIR:
            up_total = tl.dot(w_tiles.load([N + tile * BN, k]), x, up_total)

    finish_product(
        total, up_total, x_scale_ptr, w_scale_ptr, bias_ptr, y_ptr, n, t, split, T, N,
        HAS_SCALE, HAS_BIAS, IS_PAIR, LEAVES_PARTS,
    )  # fmt: skip


def can_copy_in_bulk(x: Tensor, weight: Tensor) -> bool:
    """Whether the copy engine takes rows that lie so, and the GPU has one."""
    size = x.element_size()
    is_aligned = all(number % ROW_BYTES == 0 for number in (x.data_ptr(), weight.data_ptr(), x.stride(0) * size))
    has_engine = not x.is_cuda or torch.cuda.get_device_capability(x.device) >= (9, 0)
    return has_engine and is_aligned and size <= 2 and x.stride(1) == 1 and x.shape[1] * size % ROW_BYTES == 0
