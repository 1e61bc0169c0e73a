"""The selective scan on a GPU: the order of kernels, their launch sizes, and the autograd function that binds them.

A document is cut into chunks that run in parallel (Blelloch's three phases, arXiv 2312.00752 §3.3 in another shape):
every chunk's effect on a zero state, the carry from chunk to chunk, then every chunk again from its true state with its
outputs. The backward goes the same way with gradients; it keeps no states but the one that enters each chunk.
B and x are read per key/value head and repeated by indexing. The kernels are in triton_forward.py, triton_backward.py
and triton_update.py.

Floors on an H100 (3.0 TB/s; 132 multiprocessors x 16 exponentials x 1.7 GHz = 3.6e12/s) at M1-3B dimensions
(H = 192 heads of P = 16, G = 64, N = 16) and T = 16,384 tokens in bf16, x unrepeated:
- forward: reads x, dt, B, C, z, writes y: 2T(4·H·P + 2·G·P) = 470 MB, 157 µs; T·H·P·(N + 2) exponentials (decay,
  softplus, gate), 252 µs: floor 252 µs. This implementation takes each decay twice.
- backward: reads x, dt, B, C, z, dy and writes dx, ddt, dB, dC, dz: 2T(7·H·P + 4·G·P) = 839 MB, 280 µs; 252 µs of
  exponentials: floor 280 µs. This implementation takes each decay twice, reads x, dt, B, C, z, dy twice, and writes and
  reads 4T·H·P·(1 + 3N/chunk) as scratch. Its sweeps take about 38 instructions for each of the T·H·P·N states.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from m1.kernels.chunk_table import ChunkTable, cut_documents, document_bounds
from m1.kernels.launch import IS_INTERPRETED, cdiv, next_power_of_2, num_multiprocessors, with_unit_stride
from m1.kernels.partial_sums import sum_partials
from m1.kernels.selective_scan import triton_backward as backward
from m1.kernels.selective_scan import triton_forward as forward
from m1.kernels.selective_scan.triton_update import selective_state_update
from m1.kernels.strides import stride_unit

__all__ = ["ScanConfig", "Tile", "choose_config", "selective_scan", "selective_state_update"]

CARRY_BLOCK, CARRY_ROWS, SUM_BLOCK = 128, 8, 1024
WARP = 32
MOST_HEADS = 16  # that a program's tensor-core sums over rows have columns for
COMMON = {"zero": 0, "IS_INTERPRETED": IS_INTERPRETED}


class Tile(NamedTuple):
    """What one program works on at a time: tokens, and for each lane of its warps some channels, side by side, so that what a
    lane reads of B and C serves them all; and how it is launched.
    """

    steps: int
    num_warps: int = 1
    num_stages: int = 1
    max_registers: int | None = None
    channels: int = 1

    @property
    def launch(self) -> dict[str, Any]:
        return {"num_warps": self.num_warps, "maxnreg": self.max_registers}

    def sizes(self, P: int, N: int) -> dict[str, int]:
        """Constants of the kernels. A lane holds all states of its channels, so many states leave room for few others."""
        states = next_power_of_2(N)
        channels = min(self.channels, next_power_of_2(P), max(32 // states, 1))
        rows = min(next_power_of_2(P), WARP * self.num_warps * channels)
        return {
            "P": P,
            "N": N,
            "BN": states,
            "STEPS": min(self.steps, max(64 // states, 1)),
            "HB": WARP * self.num_warps * channels // rows,
            "PB": rows,
            "CHANNELS": channels,
            "STAGES": self.num_stages,
        }


class ScanConfig(NamedTuple):
    """Chunk length and the tiles of the four scanning kernels; benchmarks/kernels.py --sweep tries several."""

    chunk: int
    states: Tile
    outputs: Tile
    readers: Tile
    writers: Tile


def choose_config(num_tokens: int, num_channels: int, multiprocessors: int) -> ScanConfig:
    """Chunks as long as leave about 12 warps of 64 channels a multiprocessor, between 32 and 256 tokens (longer ones cost
    accuracy: see triton_backward.py).
    """
    length = max(num_tokens * num_channels // (2 * WARP * 12 * multiprocessors), 1)
    chunk = min(max(1 << (length.bit_length() - 1), 32), 256)
    return ScanConfig(
        chunk,
        states=Tile(4, 1, 3, channels=2),
        outputs=Tile(4, 1, 3, channels=2),
        readers=Tile(1, 1, 4, channels=2),
        writers=Tile(1, 1, 4, channels=2),
    )


def selective_scan(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    *,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = True,
    cu_seqlens: Tensor | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    config: ScanConfig | None = None,
) -> Any:
    """See m1.kernels.selective_scan.selective_scan; `config` overrides the launch sizes."""
    if config is None:
        config = choose_config(x.shape[0], A.shape[0] * A.shape[1], num_multiprocessors(x.device))
    bounds = document_bounds(cu_seqlens, x.shape[0], x.device)
    y, final_state = _SelectiveScan.apply(
        x, dt, A, B, C, D, z, dt_bias, initial_state, bounds, dt_softplus, output_final_state, config
    )
    return (y, final_state) if output_final_state else y


class _SelectiveScan(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        dt: Tensor,
        A: Tensor,
        B: Tensor,
        C: Tensor,
        D: Tensor | None,
        z: Tensor | None,
        dt_bias: Tensor | None,
        initial_state: Tensor | None,
        bounds: Tensor,
        softplus: bool,
        output_final_state: bool,
        config: ScanConfig,
    ) -> tuple[Tensor, Tensor | None]:
        inputs = _Inputs.prepare(x, dt, A, B, C, D, z, dt_bias, softplus)
        chunks = cut_documents(bounds, x.shape[0], config.chunk)
        initial = None if initial_state is None else initial_state.float().contiguous()
        entry = _entry_states(inputs, chunks, initial, config)
        y = torch.empty(inputs.shape, dtype=x.dtype, device=x.device)
        final_state = None
        if output_final_state:
            final_state = torch.empty(chunks.num_sequences, *A.shape, dtype=torch.float32, device=x.device)
        _scan_chunks(inputs, chunks, config.outputs, entry, None, y, final_state)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, dt, A, B, C, D, z, dt_bias, initial_state, entry)
        ctx.chunks, ctx.softplus, ctx.config = chunks, softplus, config
        return y, final_state

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None, d_final: Tensor | None) -> Any:
        x, dt, A, B, C, D, z, dt_bias, initial_state, entry = ctx.saved_tensors
        inputs, chunks = _Inputs.prepare(x, dt, A, B, C, D, z, dt_bias, ctx.softplus), ctx.chunks
        dy = x.new_zeros(inputs.shape) if dy is None else with_unit_stride(dy)
        d_final = None if d_final is None else d_final.float().contiguous()
        swept = _sweep_readers(inputs, chunks, ctx.config.readers, dy, entry, d_final is not None)
        gradients = _sweep_writers(inputs, chunks, ctx.config.writers, dy, entry, d_final, swept, initial_state is not None)
        originals = (x, dt, A, B, C, D, z, dt_bias, initial_state)
        typed = [g if t is None or g is None else g.to(t.dtype) for g, t in zip(gradients, originals, strict=True)]
        return *typed, None, None, None, None


class _Inputs(NamedTuple):
    """The tensors as kernels want them: unit stride in the last dimension; parameters fp32, A as [N, H·P]."""

    x: Tensor
    dt: Tensor
    A: Tensor
    B: Tensor
    C: Tensor
    D: Tensor | None
    z: Tensor | None
    dt_bias: Tensor | None
    softplus: bool
    state_shape: tuple[int, int, int]  # H, P, N

    @classmethod
    def prepare(
        cls,
        x: Tensor,
        dt: Tensor,
        A: Tensor,
        B: Tensor,
        C: Tensor,
        D: Tensor | None,
        z: Tensor | None,
        dt_bias: Tensor | None,
        softplus: bool,
    ) -> "_Inputs":
        x, dt, B, C = (with_unit_stride(tensor) for tensor in (x, dt, B, C))
        z = None if z is None else with_unit_stride(z)
        D, dt_bias = (None if p is None else p.float().contiguous() for p in (D, dt_bias))
        transposed = A.float().flatten(0, 1).t().contiguous()
        return cls(x, dt, transposed, B, C, D, z, dt_bias, softplus, (A.shape[0], A.shape[1], A.shape[2]))

    @property
    def shape(self) -> tuple[int, int, int]:
        """T, H, P."""
        return (self.x.shape[0], *self.state_shape[:2])

    def strides(self, dy: Tensor | None = None) -> dict[str, int]:
        """Token and head strides of the activations (and of dy), token strides in units of UNIT."""
        named = {"x": self.x, "dt": self.dt, "b": self.B, "c": self.C, "z": self.x if self.z is None else self.z}
        named |= {} if dy is None else {"dy": dy}
        unit = stride_unit([tensor.stride(0) for tensor in named.values()])
        tokens = {f"{name}_token": tensor.stride(0) // unit for name, tensor in named.items()}
        return tokens | {f"{name}_head": tensor.stride(1) for name, tensor in named.items()} | {"UNIT": unit}

    @property
    def heads(self) -> dict[str, int]:
        num_heads = self.state_shape[0]
        return {"H": num_heads, "x_repeat": num_heads // self.x.shape[1], "b_repeat": num_heads // self.B.shape[1]}


def _num_programs(tile: Tile, H: int, P: int, N: int) -> int:
    """Blocks of channels: heads, and blocks of rows where a head is wide."""
    sizes = tile.sizes(P, N)
    return cdiv(H, sizes["HB"]) * cdiv(P, sizes["PB"])


def _scan_chunks(
    inputs: _Inputs,
    chunks: ChunkTable,
    tile: Tile,
    entry: Tensor | None,
    delta_sum: Tensor | None,
    y: Tensor | None,
    final_state: Tensor | None,
) -> None:
    """Launch the forward kernel: towards `y` from `entry`, or, where y is None, towards `entry` and `delta_sum`."""
    H, P, N = inputs.state_shape
    forward.scan_chunk_kernel[(_num_programs(tile, H, P, N), chunks.num_chunks)](
        inputs.x, inputs.dt, inputs.A, inputs.B, inputs.C, inputs.D, inputs.z, inputs.dt_bias,
        entry, delta_sum, final_state, y, chunks.rows,
        **inputs.strides(), **inputs.heads, **tile.sizes(P, N),
        HAS_D=inputs.D is not None, HAS_Z=inputs.z is not None, HAS_BIAS=inputs.dt_bias is not None,
        HAS_ENTRY=entry is not None, HAS_FINAL=final_state is not None, SOFTPLUS=inputs.softplus,
        WITH_OUTPUT=y is not None, ENTRY_IS_OUTER=chunks.is_one_each, **COMMON, **tile.launch,
    )  # fmt: skip


def _entry_states(inputs: _Inputs, chunks: ChunkTable, initial: Tensor | None, config: ScanConfig) -> Tensor | None:
    """The state that enters each chunk, [chunks, N, H·P]; of documents of one chunk, `initial` itself; None for zeros."""
    if chunks.is_one_each:
        return initial
    states = torch.empty(chunks.num_chunks, *inputs.A.shape, dtype=torch.float32, device=inputs.x.device)
    delta_sum = torch.empty(chunks.num_chunks, inputs.A.shape[1], dtype=torch.float32, device=inputs.x.device)
    _scan_chunks(inputs, chunks, config.states, states, delta_sum, None, None)
    _carry(states, delta_sum, inputs, chunks, initial, reverse=False)
    return states


def _carry(
    states: Tensor, delta_sum: Tensor, inputs: _Inputs, chunks: ChunkTable, carried_in: Tensor | None, reverse: bool
) -> None:
    H, P, N = inputs.state_shape
    forward.carry_kernel[(cdiv(inputs.A.numel(), CARRY_BLOCK), chunks.num_sequences)](
        states, delta_sum, inputs.A, chunks.first_chunk, carried_in, H, P, N, CARRY_BLOCK, CARRY_ROWS,
        HAS_CARRY=carried_in is not None, REVERSE=reverse, num_warps=1,
    )  # fmt: skip


class _Swept(NamedTuple):
    """What the backward's first sweep leaves; see reader_gradient_kernel. `q` only where documents have several chunks."""

    dC: Tensor
    dA: Tensor
    dz: Tensor | None
    correlation: Tensor
    q: Tensor | None
    delta_sum: Tensor
    final_state: Tensor | None


def _is_half(inputs: _Inputs, sizes: dict[str, int]) -> bool:
    """Whether the sums over rows may be as inexact as halves are: see store_row_sums."""
    return inputs.B.dtype != torch.float32 and inputs.C.dtype != torch.float32 and sizes["HB"] <= MOST_HEADS


def _rows_of_dB(inputs: _Inputs, sizes: dict[str, int]) -> tuple[int, int, int]:
    """For the writer's kernel: rows of its partial dB a program, heads a row, and rows a token. A row is of a head, or, where a
    program has several heads and B is shared, of those of a program's heads that share it.
    """
    H, HB = inputs.state_shape[0], sizes["HB"]
    share = H // inputs.B.shape[1]
    if HB == 1 or share == 1 or not _is_half(inputs, sizes):
        return HB, 1, H
    slots = min(HB, (HB + share - 2) // share + 1)
    return slots, share, cdiv(H, HB) * slots


def _sweep_readers(
    inputs: _Inputs, chunks: ChunkTable, tile: Tile, dy: Tensor, entry: Tensor | None, has_final: bool
) -> _Swept:
    T, H, P = inputs.shape
    N, sizes, device = inputs.state_shape[2], tile.sizes(P, inputs.state_shape[2]), dy.device
    states = (chunks.num_chunks, N, H * P)
    swept = _Swept(
        dC=torch.empty(T, H, cdiv(P, sizes["PB"]), N, dtype=inputs.C.dtype, device=device),
        dA=torch.empty(states, dtype=torch.float32, device=device),
        dz=None if inputs.z is None else torch.empty(T, H, P, dtype=inputs.z.dtype, device=device),
        correlation=torch.empty(T, H, P, dtype=torch.float32, device=device),
        q=None if chunks.is_one_each else torch.empty(states, dtype=torch.float32, device=device),
        delta_sum=torch.empty(chunks.num_chunks, H * P, dtype=torch.float32, device=device),
        final_state=torch.empty(chunks.num_sequences, *states[1:], dtype=torch.float32, device=device) if has_final else None,
    )
    backward.reader_gradient_kernel[(_num_programs(tile, H, P, N), chunks.num_chunks)](
        inputs.x, inputs.dt, inputs.A, inputs.B, inputs.C, inputs.D, inputs.z, inputs.dt_bias, dy, entry, *swept, chunks.rows,
        **inputs.strides(dy), **inputs.heads, **sizes,
        HAS_D=inputs.D is not None, HAS_Z=inputs.z is not None, HAS_BIAS=inputs.dt_bias is not None,
        HAS_ENTRY=entry is not None, HAS_FINAL=has_final, WITH_Q=swept.q is not None, SOFTPLUS=inputs.softplus,
        ENTRY_IS_OUTER=chunks.is_one_each, IS_HALF=_is_half(inputs, sizes), **COMMON, **tile.launch,
    )  # fmt: skip
    return swept


def _sweep_writers(
    inputs: _Inputs,
    chunks: ChunkTable,
    tile: Tile,
    dy: Tensor,
    entry: Tensor | None,
    d_final: Tensor | None,
    swept: _Swept,
    has_initial: bool,
) -> tuple[Tensor | None, ...]:
    """Gradients of x, dt, A, B, C, D, z, dt_bias and initial_state."""
    T, H, P = inputs.shape
    N, sizes, device = inputs.state_shape[2], tile.sizes(P, inputs.state_shape[2]), dy.device
    has_bias, has_D = inputs.dt_bias is not None, inputs.D is not None
    q_end = d_final
    if swept.q is not None:
        _carry(swept.q, swept.delta_sum, inputs, chunks, d_final, reverse=True)
        q_end = swept.q
    dx = torch.empty(T, H, P, dtype=inputs.x.dtype, device=device)
    ddt = torch.empty(T, H, P, dtype=inputs.dt.dtype, device=device)
    slots, share, rows = _rows_of_dB(inputs, sizes)
    dB = torch.empty(T, rows, cdiv(P, sizes["PB"]), N, dtype=inputs.B.dtype, device=device)
    dD, d_bias = (
        torch.empty(chunks.num_chunks, H, P, dtype=torch.float32, device=device) if is_wanted else None
        for is_wanted in (has_D, has_bias)
    )
    shape = (chunks.num_sequences, H, P, N)
    d_initial = torch.empty(shape, dtype=torch.float32, device=device) if has_initial else None
    backward.writer_gradient_kernel[(_num_programs(tile, H, P, N), chunks.num_chunks)](
        inputs.x, inputs.dt, inputs.A, inputs.B, inputs.C, inputs.D, inputs.z, inputs.dt_bias, dy,
        entry, q_end, swept.correlation, swept.delta_sum, swept.final_state,
        dx, ddt, swept.dA, dB, dD, d_bias, d_initial, chunks.rows,
        **inputs.strides(dy), **inputs.heads, dB_rows=rows, **sizes, SLOTS=slots, SHARE=share,
        HAS_D=has_D, HAS_Z=inputs.z is not None, HAS_BIAS=has_bias, HAS_END=q_end is not None,
        HAS_FINAL=d_final is not None, HAS_INITIAL=has_initial, SOFTPLUS=inputs.softplus,
        STATES_ARE_OUTER=chunks.is_one_each, IS_HALF=_is_half(inputs, sizes), **COMMON, **tile.launch,
    )  # fmt: skip
    dx = _sum_repeats(dx.view(T, inputs.x.shape[1], -1, P))
    dB = _sum_repeats(dB.view(T, inputs.B.shape[1], -1, N)) if share == 1 else _sum_slots(dB, inputs, slots, share, sizes["HB"])
    dA = sum_partials(swept.dA).t().reshape(inputs.state_shape)
    sums = [None if partial is None else sum_partials(partial) for partial in (dD, d_bias)]
    return dx, ddt, dA, dB, _sum_repeats(swept.dC), sums[0], swept.dz, sums[1], d_initial


def _sum_repeats(partial: Tensor) -> Tensor:
    """[T, heads, repeats, width] summed over repeats, in fp32, to partial's dtype."""
    T, heads, repeats, width = partial.shape
    if repeats == 1:
        return partial[:, :, 0]
    total = torch.empty(T, heads, width, dtype=partial.dtype, device=partial.device)
    grid = (cdiv(total.numel(), SUM_BLOCK),)
    backward.sum_heads_kernel[grid](partial, total, total.numel(), width, repeats, SUM_BLOCK)
    return total


def _sum_slots(partial: Tensor, inputs: _Inputs, slots: int, share: int, heads: int) -> Tensor:
    """dB [T, G, N] from what programs of `heads` heads left in [T, rows, 1, N]."""
    total = torch.empty(inputs.B.shape, dtype=partial.dtype, device=partial.device)
    _, num_groups, width = total.shape
    grid = (partial.shape[0], cdiv(num_groups * width, SUM_BLOCK))
    backward.sum_slots_kernel[grid](partial, total, num_groups, partial.shape[1], width, share, heads, slots, SUM_BLOCK)
    return total
