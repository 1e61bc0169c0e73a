"""The product of few tokens with a weight: the kernel, for 16-bit numbers and for 8-bit ones with scales. Launched from
triton_launch.py.

y[t, n] = Σ_k x[t, k] · w[n, k], times x_scale[t] · w_scale[n] for 8-bit numbers. A program owns a tile of output channels, all
tokens, and one split of k. The weight's tile is the first operand of the tensor-core product, whose first side is at least 64
while the second may be 16: tokens are not padded to 64. Partial sums of the splits (fp32) lie in a workspace; the split that
arrives last, which a counter a tile tells, adds them up in order, so that results repeat; or they are the output, and the norm
that follows adds them up, which saves the counting and a second pass. With gate and up (IS_PAIR) a program owns the same
channels of both.

Kernels of a decoding step are short, and between two of them memory would idle. So a program begins by asking for the first
part of its weights to be brought into the L2 cache, and it is there to do so before the kernel ahead of it has ended (see
`chaining` in m1.kernels.launch): only then does it wait for x. It asks line by line, a thread for some lines: the instruction
for many lines at once is issued by one thread after the other.

Bytes moved: N · K elements of the weight, T · K a tile of channels (from the L2 cache), 8 · T · N a split beyond the first.
Floors on an H100 at 3.0 TB/s, M1-3B: gate and up in bf16 101 MB, 33.6 µs; all products of a step bf16 6.9 GB, 2.30 ms, fp8
3.5 GB, 1.15 ms.
"""

from typing import NamedTuple

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

AHEAD = 512  # bytes of each row that are best brought to the L2 cache ahead, as measured on an H100 between 0 and 4,096
LEAST_WIDTH_IN_BULK = 2048  # of products whose tiles are best copied in bulk; measured at 3,072 and 8,192
LINE = 128  # bytes, of the L2 cache
LINE_BITS = tl.constexpr(8 * LINE)


class ProductConfig(NamedTuple):
    """Output channels a tile, a loop iteration's k, splits of k, warps, pipeline stages, the columns of k that a program has
    brought to the L2 cache before x is there (0 for none), and whether its tiles come as bulk copies (triton_bulk.py)."""

    block_n: int
    block_k: int
    splits: int
    num_warps: int = 4
    num_stages: int = 4
    num_ahead: int = 0
    is_bulk: bool = False


@triton.jit
def fetch_lines(w_ptr, n, N, K, begin, count, LINES: tl.constexpr, LINE_SIZE: tl.constexpr):
    """Ask for `count` columns of rows n from `begin` on to be brought into the L2 cache; nobody waits for them."""
    columns = tl.arange(0, LINES) * LINE_SIZE
    place = w_ptr + tl.minimum(n, N - 1).to(tl.int64)[:, None] * K + begin + columns[None, :]
    is_wanted = tl.broadcast_to((columns < count)[None, :], place.shape).to(tl.int32)
    tl.inline_asm_elementwise(
        "{ .reg .pred p; setp.ne.u32 p, $2, 0; @p prefetch.global.L2 [$1]; mov.u32 $0, 0; }",
        "=r,l,r", [place.to(tl.int64), is_wanted], dtype=tl.int32, is_pure=False, pack=1,
    )  # fmt: skip


@triton.jit
def _sum_splits(total, partial_at, counter_at, split, splits, SIZE: tl.constexpr):
    """Leave this split's part; the last to arrive gets the sum of all, and true."""
    tl.store(partial_at + split * SIZE, total)
    tl.debug_barrier()  # all threads have stored before one of them counts
    arrived = tl.atomic_add(counter_at, 1, sem="acq_rel")
    if arrived == splits - 1:
        total = tl.zeros_like(total)
        for other in range(splits):
            total += tl.load(partial_at + other * SIZE, cache_modifier=".cg")
    return total, arrived == splits - 1


@triton.jit
def finish_product(
    total, up_total, x_scale_ptr, w_scale_ptr, bias_ptr, y_ptr, n, t, split, T, N,
    HAS_SCALE: tl.constexpr, HAS_BIAS: tl.constexpr, IS_PAIR: tl.constexpr, LEAVES_PARTS: tl.constexpr,
):  # fmt: skip
    """Scales, bias and swiglu of a tile's sums [BN, BT] of channels n, tokens t; into y. up_total: if IS_PAIR."""
    in_n, in_t = n < N, t < T
    if HAS_SCALE:
        x_scale = tl.load(x_scale_ptr + t, mask=in_t, other=0.0)[None, :]
        total *= tl.load(w_scale_ptr + n, mask=in_n, other=0.0)[:, None] * x_scale
        if IS_PAIR:
            up_total *= tl.load(w_scale_ptr + N + n, mask=in_n, other=0.0)[:, None] * x_scale
    if HAS_BIAS:
        with_bias = in_n
        if LEAVES_PARTS:
            with_bias = n < tl.where(split == 0, N, 0)
        total += tl.load(bias_ptr + n, mask=with_bias, other=0.0).to(tl.float32)[:, None]
        if IS_PAIR:
            up_total += tl.load(bias_ptr + N + n, mask=in_n, other=0.0).to(tl.float32)[:, None]
    if IS_PAIR:
        total = total * tl.sigmoid(total) * up_total
    if LEAVES_PARTS:
        y_ptr += split.to(tl.int64) * T * N
    y_at = y_ptr + t.to(tl.int64)[None, :] * N + n[:, None]
    tl.store(y_at, total.to(y_ptr.dtype.element_ty), mask=in_n[:, None] & in_t[None, :])


@triton.jit(do_not_specialize=["T", "splits", "ahead"])
def product_kernel(
    x_ptr, x_scale_ptr, w_ptr, w_scale_ptr, bias_ptr, y_ptr, partial_ptr, counter_ptr, x_stride, T, N, K, splits, ahead,
    BT: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, IS_SPLIT: tl.constexpr, IS_EVEN: tl.constexpr,
    HAS_SCALE: tl.constexpr, HAS_BIAS: tl.constexpr, IS_PAIR: tl.constexpr, LEAVES_PARTS: tl.constexpr,
    AHEAD_LINES: tl.constexpr, IS_CHAINED: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """Grid (tiles of channels, splits); tiles of y are transposed, [BN, BT]. N: channels of y; with IS_PAIR w has 2 N rows.

    IS_SPLIT: add the splits up here; LEAVES_PARTS: y is [splits, T, N].
    """
    tile, split = tl.program_id(0), tl.program_id(1)
    n = tile * BN + tl.arange(0, BN)
    t = tl.arange(0, BT)
    steps = tl.cdiv(tl.cdiv(K, BK), splits)
    begin = split * steps * BK
    end = tl.minimum(begin + steps * BK, K)
    up_ptr = w_ptr + N.to(tl.int64) * K
    if IS_CHAINED:
        gdc_launch_dependents()
        if AHEAD_LINES > 0:
            line: tl.constexpr = LINE_BITS // w_ptr.dtype.element_ty.primitive_bitwidth  # its columns
            count = tl.minimum(end - begin, ahead)
            fetch_lines(w_ptr, n, N, K, begin, count, AHEAD_LINES, line)
            if IS_PAIR:
                fetch_lines(up_ptr, n, N, K, begin, count, AHEAD_LINES, line)
        gdc_wait()

    inside = tl.arange(0, BK)
    w_at = w_ptr + n.to(tl.int64)[:, None] * K + inside[None, :]
    up_at = up_ptr + n.to(tl.int64)[:, None] * K + inside[None, :]
    x_at = x_ptr + t[None, :] * x_stride + inside[:, None]
    total = tl.zeros([BN, BT], tl.float32)
    up_total = tl.zeros([BN, BT], tl.float32) if IS_PAIR else None
    for k in range(begin, end, BK):
        w_mask = (n < N)[:, None]
        x_mask = (t < T)[None, :]
        if not IS_EVEN:
            w_mask = w_mask & (k + inside < K)[None, :]
            x_mask = x_mask & (k + inside < K)[:, None]
        w = tl.load(w_at + k, mask=w_mask, other=0.0)
        x = tl.load(x_at + k, mask=x_mask, other=0.0)
        if not HAS_SCALE:
            w, x = w.to(DOT), x.to(DOT)
        total = tl.dot(w, x, total, input_precision="ieee")
        if IS_PAIR:
            up = tl.load(up_at + k, mask=w_mask, other=0.0)
            if not HAS_SCALE:
                up = up.to(DOT)
            up_total = tl.dot(up, x, up_total, input_precision="ieee")

    if IS_SPLIT:
        SIZE: tl.constexpr = BN * BT
        place = tl.arange(0, BN)[:, None] * BT + t[None, :]
        tiles = tl.num_programs(0)
        parts = splits * SIZE
        up_part = partial_ptr + (tiles + tile) * parts + place
        if IS_PAIR:
            tl.store(up_part + split * SIZE, up_total)
        total, is_last = _sum_splits(total, partial_ptr + tile * parts + place, counter_ptr + tile, split, splits, SIZE)
        if not is_last:
            return
        if IS_PAIR:
            up_total = tl.zeros([BN, BT], tl.float32)
            for other in range(splits):
                up_total += tl.load(up_part + other * SIZE, cache_modifier=".cg")
        tl.store(counter_ptr + tile, 0)
    finish_product(
        total, up_total, x_scale_ptr, w_scale_ptr, bias_ptr, y_ptr, n, t, split, T, N,
        HAS_SCALE, HAS_BIAS, IS_PAIR, LEAVES_PARTS,
    )  # fmt: skip
