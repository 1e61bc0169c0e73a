"""The SSD scan on a GPU: the order of kernels, their launch sizes, and the autograd function that binds them.

Documents are cut into chunks (Dao & Gu 2024, arXiv 2405.21060, section 6). Forwards: step sizes and decays of all tokens;
what each chunk adds to the state; the carry from chunk to chunk; each chunk's outputs from its entry state and from its
own tokens. Backwards: what each chunk adds to the state's gradient; its carry; ∂C; ∂x and ∂B; ∂dt and the parameters.
Products run on tensor cores with operands of x's dtype (fp32: three TF32 products) and fp32 sums. Between forward and
backward only the state that enters each chunk is kept, in the operands' dtype, and Δ and l [H, T]; scores are computed again.
B and x are read per key/value head by indexing. Kernels: triton_chunks.py, triton_forward.py, triton_backward.py;
the decoding step: triton_update.py.

Floors on an H100 (3.0 TB/s; 790 TFLOP/s in bf16), T = 16,384 tokens in bf16, x unrepeated, chunks of Q tokens:
- forward reads x, B, C, dt and writes y: 2T(2·G·P + 2·H·P + H) bytes (P = N). It computes 2T·H·(Q/2·2P + 2·P²) operations:
  at M1-3B dimensions (H = 24, G = 8, P = 128, Q = 256) 269 MB, 90 µs; 52 GFLOP, 65 µs. Floor 90 µs.
- backward reads those and dy, writes dx, dB, dC, ddt: 2T(4·G·P + 3·H·P + 2·H) bytes; 2T·H·(Q/2·7P + 4·P²) operations, seven
  products in a chunk because scores and G are needed by rows and by columns: 438 MB, 146 µs; 142 GFLOP, 180 µs. Floor 180 µs.
- 0.5B (H = 14, G = 2, P = 64, Q = 128): 67 MB, 22 µs; 109 MB, 36 µs. 135M (9, 3, 64): 51 MB, 17 µs; 82 MB, 27 µs.
Besides, states at chunk borders: T/Q·H·P·N elements, twice in fp32 and twice in bf16 forwards (302 MB at 3B), and the same and
two more reads backwards.
"""

import functools
from typing import Any, NamedTuple

import torch
import triton.language as tl
from torch import Tensor

from m1.kernels.chunk_table import ChunkTable, cut_documents, document_bounds
from m1.kernels.dispatch import require
from m1.kernels.launch import IS_INTERPRETED, cdiv, next_power_of_2, with_unit_stride
from m1.kernels.ssd import triton_backward as backward
from m1.kernels.ssd import triton_chunks as between
from m1.kernels.ssd import triton_forward as forward
from m1.kernels.ssd.triton_update import UpdateConfig, ssd_state_update

__all__ = ["SsdConfig", "Tile", "UpdateConfig", "choose_config", "ssd_scan", "ssd_state_update"]

CARRY_BLOCK, CARRY_ROWS, STEP_HEADS = 128, 8, 4
MAX_WIDTH = {2: 256, 4: 128}  # of P and N, by an operand's bytes: a program holds whole rows of x, B, C and a whole state


class Tile(NamedTuple):
    """What one program works on: tokens (or rows of a state) it owns, tokens it reads at a time; and its launch.

    For tokens, `columns` must divide `rows`, and `rows` the chunk; both are powers of 2 from 16 on.
    """

    rows: int
    columns: int
    num_warps: int
    num_stages: int


class SsdConfig(NamedTuple):
    """Tokens a chunk, and the tiles of the four kernels with matrix products; benchmarks/kernels.py --sweep tries several."""

    chunk: int
    states: Tile
    outputs: Tile
    readers: Tile
    writers: Tile

    def with_chunk(self, chunk: int) -> "SsdConfig":
        """The same with chunks of `chunk` tokens (a power of 2, at least 16), and no tile longer than one."""
        tiles = {name: getattr(self, name) for name in ("outputs", "readers", "writers")}
        cut = {name: t._replace(rows=min(t.rows, chunk), columns=min(t.columns, chunk)) for name, t in tiles.items()}
        return self._replace(chunk=chunk, states=self.states._replace(columns=min(self.states.columns, chunk)), **cut)


def choose_config(width: int, itemsize: int, shared_memory: int) -> SsdConfig:
    """For heads of max(P, N) = width, operands of `itemsize` bytes and that many bytes of shared memory a multiprocessor.

    Raises ValueError for heads too wide.
    """
    limit = MAX_WIDTH[itemsize]
    require(width <= limit, "x", f"of heads no wider than {limit} in this dtype (P and N; wider only on a CPU)", width)
    if width > 128 or itemsize > 2:  # speed is not asked for here, but a program's tiles must fit
        tile = Tile(16, 16, 8, 1) if width > 64 else Tile(32, 32, 8, 1)
        return SsdConfig(64, Tile(32, 32, 8, 1), tile, tile, tile)
    if shared_memory < 160 * 2**10:
        small = Tile(32, 32, 4, 2)
        return SsdConfig(128, Tile(64, 32, 4, 2), small, small, Tile(32, 32, 8, 1))
    if width > 64:
        return SsdConfig(256, Tile(128, 64, 4, 2), Tile(64, 64, 4, 1), Tile(64, 32, 4, 3), Tile(64, 32, 4, 1))
    return SsdConfig(128, Tile(64, 64, 4, 2), Tile(64, 64, 4, 1), Tile(64, 32, 4, 3), Tile(64, 32, 4, 1))


@functools.cache
def _shared_memory(device: torch.device) -> int:
    """Bytes of shared memory of a multiprocessor; an H100's on the CPU, where only the interpreter runs."""
    on_cuda = device.type == "cuda"
    return torch.cuda.get_device_properties(device).shared_memory_per_multiprocessor if on_cuda else 227 * 2**10


def ssd_scan(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    *,
    D: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = True,
    cu_seqlens: Tensor | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    chunk_size: int | None = None,
    config: SsdConfig | None = None,
) -> Any:
    """See m1.kernels.ssd.ssd_scan; `config` overrides the launch sizes. Raises ValueError for heads too wide."""
    if config is None:
        config = choose_config(max(x.shape[2], C.shape[2]), _operand(x).itemsize, _shared_memory(x.device))
    if chunk_size is not None:
        config = config.with_chunk(min(max(next_power_of_2(chunk_size), 16), 1024))
    bounds = document_bounds(cu_seqlens, x.shape[0], x.device)
    y, final_state = _SsdScan.apply(x, dt, A, B, C, D, dt_bias, initial_state, bounds, dt_softplus, output_final_state, config)
    return (y, final_state) if output_final_state else y


class _SsdScan(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        dt: Tensor,
        A: Tensor,
        B: Tensor,
        C: Tensor,
        D: Tensor | None,
        dt_bias: Tensor | None,
        initial_state: Tensor | None,
        bounds: Tensor,
        softplus: bool,
        output_final_state: bool,
        config: SsdConfig,
    ) -> tuple[Tensor, Tensor | None]:
        inputs = _Inputs.prepare(x, dt, A, B, C, D, dt_bias, softplus)
        chunks = cut_documents(bounds, x.shape[0], config.chunk)
        decays = _Decays.of(inputs, chunks, config.chunk)
        initial = None if initial_state is None else initial_state.float().contiguous()
        entry, final_state = _entry_states(inputs, chunks, decays, initial, output_final_state, config.states)
        y = _outputs(inputs, chunks, decays, entry, config)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, dt, A, B, C, D, dt_bias, initial_state, entry, *decays)
        ctx.chunks, ctx.softplus, ctx.config = chunks, softplus, config
        return y, final_state

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None, d_final: Tensor | None) -> Any:
        x, dt, A, B, C, D, dt_bias, initial_state, entry, *decays = ctx.saved_tensors
        inputs, chunks = _Inputs.prepare(x, dt, A, B, C, D, dt_bias, ctx.softplus), ctx.chunks
        dy = x.new_zeros(x.shape[0], *inputs.heads_and_width) if dy is None else with_unit_stride(dy)
        gradients = _backward(inputs, chunks, _Decays(*decays), dy, d_final, entry, initial_state is not None, ctx.config)
        originals = (x, dt, A, B, C, D, dt_bias, initial_state)
        typed = [g if t is None or g is None else g.to(t.dtype) for g, t in zip(gradients, originals, strict=True)]
        return *typed, None, None, None, None


class _Inputs(NamedTuple):
    """The tensors as kernels want them: unit stride in a head; parameters fp32 and contiguous."""

    x: Tensor
    dt: Tensor
    A: Tensor
    B: Tensor
    C: Tensor
    D: Tensor | None
    dt_bias: Tensor | None
    softplus: bool

    @classmethod
    def prepare(
        cls,
        x: Tensor,
        dt: Tensor,
        A: Tensor,
        B: Tensor,
        C: Tensor,
        D: Tensor | None,
        dt_bias: Tensor | None,
        softplus: bool,
    ) -> "_Inputs":
        x, B, C = (with_unit_stride(tensor) for tensor in (x, B, C))
        D, dt_bias = (None if p is None else p.float().contiguous() for p in (D, dt_bias))
        return cls(x, dt, A.float().contiguous(), B, C, D, dt_bias, softplus)

    @property
    def heads_and_width(self) -> tuple[int, int]:
        return self.C.shape[1], self.x.shape[2]

    @property
    def state_shape(self) -> tuple[int, int, int]:
        """H, P, N."""
        return self.C.shape[1], self.x.shape[2], self.C.shape[2]

    @property
    def widths(self) -> dict[str, Any]:
        """Constants of the kernels with matrix products: widths, padded widths, the operands' type and precision."""
        P, N = self.x.shape[2], self.C.shape[2]
        padded = {"BP": max(next_power_of_2(P), 16), "BN": max(next_power_of_2(N), 16)}
        return {"P": P, "N": N} | padded | self.products

    @property
    def products(self) -> dict[str, Any]:
        dtype = _operand(self.x)
        operand = tl.bfloat16 if dtype == torch.bfloat16 and not IS_INTERPRETED else tl.float32
        return {"OPERAND": operand, "PRECISION": "tf32" if operand == tl.bfloat16 else "tf32x3"}

    @property
    def strides(self) -> tuple[int, ...]:
        """Token and head strides of x, B, C."""
        return *self.x.stride()[:2], *self.B.stride()[:2], *self.C.stride()[:2]

    @property
    def repeats(self) -> tuple[int, int]:
        """Query-side heads that read one head of x, of B."""
        H = self.C.shape[1]
        return H // self.x.shape[1], H // self.B.shape[1]


class _Decays(NamedTuple):
    """Of every token Δ and l, in units of log 2, [H, T]; of every chunk the last l, [chunks, H]; fp32."""

    delta: Tensor
    log_decay: Tensor
    chunk_decay: Tensor

    @classmethod
    def of(cls, inputs: _Inputs, chunks: ChunkTable, length: int) -> "_Decays":
        T, H = inputs.dt.shape
        shapes = ((H, T), (H, T), (chunks.num_chunks, H))
        decays = cls(*[torch.empty(shape, dtype=torch.float32, device=inputs.x.device) for shape in shapes])
        between.step_size_kernel[(cdiv(H, STEP_HEADS), chunks.num_chunks)](
            inputs.dt, inputs.A, inputs.dt_bias, *decays, chunks.rows, *inputs.dt.stride(), H, T, length, STEP_HEADS,
            HAS_BIAS=inputs.dt_bias is not None, SOFTPLUS=inputs.softplus,
        )  # fmt: skip
        return decays


def _operand(x: Tensor) -> torch.dtype:
    """What products take: bf16 for bf16, else fp32 (states of fp16 models may exceed its range)."""
    return torch.bfloat16 if x.dtype == torch.bfloat16 else torch.float32


def _sizes(tile: Tile) -> dict[str, int]:
    return {"ROWS": tile.rows, "COLUMNS": tile.columns} | _launch(tile)


def _launch(tile: Tile) -> dict[str, int]:
    return {"num_warps": tile.num_warps, "num_stages": tile.num_stages}


def _chunk_states(
    inputs: _Inputs, chunks: ChunkTable, decays: _Decays, dy: Tensor | None, with_ends: bool, tile: Tile
) -> Tensor:
    """What each chunk adds to the carried state, or, given dy, to its gradient: [chunks, H, P, N] fp32."""
    H, P, N = inputs.state_shape
    values, keys = (inputs.x, inputs.B) if dy is None else (dy, inputs.C)
    rows = min(tile.rows, max(next_power_of_2(P), 16))
    added = torch.empty(chunks.num_chunks, H, P, N, dtype=torch.float32, device=values.device)
    between.chunk_state_kernel[(H * cdiv(P, rows), chunks.num_chunks)](
        values, keys, *decays, added, chunks.rows, *values.stride()[:2], *keys.stride()[:2],
        H, values.shape[0], H // values.shape[1], H // keys.shape[1], P, N, inputs.widths["BN"], rows, tile.columns,
        REVERSE=dy is not None, WITH_ENDS=with_ends, **inputs.products, **_launch(tile),
    )  # fmt: skip
    return added


def _entry_states(
    inputs: _Inputs, chunks: ChunkTable, decays: _Decays, initial: Tensor | None, with_final: bool, tile: Tile
) -> tuple[Tensor, Tensor | None]:
    """The state that enters each chunk, [chunks, H, P, N] in the operands' dtype, and each document's last, fp32."""
    H, P, N = inputs.state_shape
    added = _chunk_states(inputs, chunks, decays, None, with_final, tile)
    entry = torch.empty(added.shape, dtype=_operand(inputs.x), device=added.device)
    final = torch.empty(chunks.num_sequences, H, P, N, dtype=torch.float32, device=added.device) if with_final else None
    between.carry_kernel[(H * cdiv(P * N, CARRY_BLOCK), chunks.num_sequences)](
        added, decays.chunk_decay, chunks.first_chunk, initial, final, entry, None, None,
        H, P * N, CARRY_BLOCK, CARRY_ROWS, HAS_IN=initial is not None, HAS_OUT=with_final, REVERSE=False, num_warps=1,
    )  # fmt: skip
    return entry, final


def _outputs(inputs: _Inputs, chunks: ChunkTable, decays: _Decays, entry: Tensor, config: SsdConfig) -> Tensor:
    T, (H, P) = inputs.x.shape[0], inputs.heads_and_width
    y = torch.empty(T, H, P, dtype=inputs.x.dtype, device=inputs.x.device)
    blocks = config.chunk // config.outputs.rows  # a chunk
    forward.output_kernel[(H, chunks.num_chunks * blocks)](
        inputs.x, inputs.B, inputs.C, inputs.D, decays.delta, decays.log_decay, entry, y, chunks.rows,
        *inputs.strides, H, T, blocks, *inputs.repeats, **inputs.widths, **_sizes(config.outputs), HAS_D=inputs.D is not None,
    )  # fmt: skip
    return y


def _end_gradients(
    inputs: _Inputs,
    chunks: ChunkTable,
    decays: _Decays,
    dy: Tensor,
    d_final: Tensor | None,
    entry: Tensor,
    has_initial: bool,
    tile: Tile,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """∂L/∂(state that leaves each chunk) in the operands' dtype, the parts of exp(l_Q)·q·h [chunks, H, parts], ∂initial."""
    H, P, N = inputs.state_shape
    parts = cdiv(P * N, CARRY_BLOCK)
    d_final = None if d_final is None else d_final.float().contiguous()
    added = _chunk_states(inputs, chunks, decays, dy, has_initial, tile)
    q_end = torch.empty_like(entry)
    crossing = torch.empty(chunks.num_chunks, H, parts, dtype=torch.float32, device=dy.device)
    shape = (chunks.num_sequences, H, P, N)
    d_initial = torch.empty(shape, dtype=torch.float32, device=dy.device) if has_initial else None
    between.carry_kernel[(H * parts, chunks.num_sequences)](
        added, decays.chunk_decay, chunks.first_chunk, d_final, d_initial, q_end, entry, crossing,
        H, P * N, CARRY_BLOCK, CARRY_ROWS, HAS_IN=d_final is not None, HAS_OUT=has_initial, REVERSE=True, num_warps=1,
    )  # fmt: skip
    return q_end, crossing, d_initial


def _backward(
    inputs: _Inputs,
    chunks: ChunkTable,
    decays: _Decays,
    dy: Tensor,
    d_final: Tensor | None,
    entry: Tensor,
    has_initial: bool,
    config: SsdConfig,
) -> tuple[Tensor | None, ...]:
    """Gradients of x, dt, A, B, C, D, dt_bias and initial_state."""
    T, H = inputs.dt.shape
    q_end, crossing, d_initial = _end_gradients(inputs, chunks, decays, dy, d_final, entry, has_initial, config.states)
    sums = torch.empty(5, H, T, dtype=torch.float32, device=dy.device)
    dC = _reader_gradients(inputs, chunks, decays, dy, entry, sums, config)
    dx, dB = _writer_gradients(inputs, chunks, decays, dy, q_end, sums, config)
    ddt = torch.empty(T, H, dtype=inputs.dt.dtype, device=dy.device)
    partial = torch.empty(3, chunks.num_chunks, H, dtype=torch.float32, device=dy.device)
    has_D, has_bias = inputs.D is not None, inputs.dt_bias is not None
    backward.step_size_gradient_kernel[(cdiv(H, STEP_HEADS), chunks.num_chunks)](
        inputs.dt, inputs.A, inputs.dt_bias, sums, crossing, ddt, *partial, chunks.rows, *inputs.dt.stride(), H, T,
        crossing.shape[2], next_power_of_2(crossing.shape[2]), config.chunk, STEP_HEADS,
        HAS_D=has_D, HAS_BIAS=has_bias, SOFTPLUS=inputs.softplus,
    )  # fmt: skip
    dA, dD, d_bias = partial.sum(1)
    return dx, ddt, dA, dB, dC, dD if has_D else None, d_bias if has_bias else None, d_initial


def _reader_gradients(
    inputs: _Inputs, chunks: ChunkTable, decays: _Decays, dy: Tensor, entry: Tensor, sums: Tensor, config: SsdConfig
) -> Tensor:
    """∂C [T, H, N]; fills the READ rows of `sums`."""
    T, (H, _, N) = dy.shape[0], inputs.state_shape
    dC = torch.empty(T, H, N, dtype=inputs.C.dtype, device=dy.device)
    blocks = config.chunk // config.readers.rows  # a chunk
    backward.reader_gradient_kernel[(H, chunks.num_chunks * blocks)](
        inputs.x, inputs.B, inputs.C, dy, decays.delta, decays.log_decay, entry, dC, sums, chunks.rows,
        *inputs.strides, *dy.stride()[:2], H, T, blocks, *inputs.repeats,
        **inputs.widths, **_sizes(config.readers), HAS_D=inputs.D is not None,
    )  # fmt: skip
    return dC


def _writer_gradients(
    inputs: _Inputs, chunks: ChunkTable, decays: _Decays, dy: Tensor, q_end: Tensor, sums: Tensor, config: SsdConfig
) -> tuple[Tensor, Tensor]:
    """∂x and ∂B in the shapes of x and B; fills the WRITTEN rows of `sums`."""
    T, (H, P, N) = dy.shape[0], inputs.state_shape
    x_repeat, b_repeat = inputs.repeats
    blocks = config.chunk // config.writers.rows  # a chunk
    # A program sums the heads that share its x and B; where these are not shared alike, each head has a row, summed below.
    shared = x_repeat if x_repeat == b_repeat else 1
    dx = torch.empty(T, H // shared, P, dtype=inputs.x.dtype, device=dy.device)
    dB = torch.empty(T, H // shared, N, dtype=inputs.B.dtype, device=dy.device)
    backward.writer_gradient_kernel[(H // shared, chunks.num_chunks * blocks)](
        inputs.x, inputs.B, inputs.C, inputs.D, dy, decays.delta, decays.log_decay, decays.chunk_decay, q_end,
        dx, dB, sums, chunks.rows, *inputs.strides, *dy.stride()[:2], H, T, blocks, x_repeat, b_repeat, shared,
        **inputs.widths, **_sizes(config.writers), HAS_D=inputs.D is not None,
    )  # fmt: skip
    return _sum_repeats(dx, inputs.x.shape[1]), _sum_repeats(dB, inputs.B.shape[1])


def _sum_repeats(partial: Tensor, heads: int) -> Tensor:
    """[T, heads · repeats, width] summed over repeats in fp32."""
    if partial.shape[1] == heads:
        return partial
    return partial.unflatten(1, (heads, -1)).sum(2, dtype=torch.float32)
