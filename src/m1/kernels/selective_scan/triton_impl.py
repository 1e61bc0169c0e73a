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
  exponentials: floor 280 µs. This implementation takes each decay three times, and moves 4T·H·P·(1 + N/chunk) twice as
  scratch.
"""

from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from m1.kernels.chunk_table import ChunkTable, cut_documents, document_bounds
from m1.kernels.launch import IS_INTERPRETED, dot_dtype, num_multiprocessors, with_unit_stride
from m1.kernels.selective_scan import triton_backward as backward
from m1.kernels.selective_scan import triton_forward as forward
from m1.kernels.selective_scan.triton_update import selective_state_update
from m1.kernels.strides import stride_unit

__all__ = ["ScanConfig", "Tile", "choose_config", "selective_scan", "selective_state_update"]

CARRY_BLOCK, CARRY_ROWS, SUM_BLOCK = 128, 8, 1024
WARP = 32
MOST_HEADS = 8  # that a program's tensor-core sums over rows have columns for
COMMON = {"zero": 0, "IS_INTERPRETED": IS_INTERPRETED}


class Tile(NamedTuple):
    """What one program works on at a time: tokens, and a channel a lane of its warps; and how it is launched."""

    steps: int
    num_warps: int = 1
    num_stages: int = 1
    max_registers: int | None = None

    @property
    def launch(self) -> dict[str, Any]:
        return {"num_warps": self.num_warps, "maxnreg": self.max_registers}

    def sizes(self, P: int, N: int) -> dict[str, int]:
        """Constants of the kernels. A lane holds all states of its channel, so many states leave room for few tokens."""
        lanes, states = WARP * self.num_warps, triton.next_power_of_2(N)
        rows = min(triton.next_power_of_2(P), lanes)
        return {
            "P": P,
            "N": N,
            "BN": states,
            "STEPS": min(self.steps, max(64 // states, 1)),
            "HB": lanes // rows,
            "PB": rows,
            "STAGES": self.num_stages,
        }


class ScanConfig(NamedTuple):
    """Chunk length and the tiles of the four scanning kernels; benchmarks/kernels.py --sweep tries several."""

    chunk: int
    states: Tile
    outputs: Tile
    chunk_gradients: Tile
    gradients: Tile


def choose_config(num_tokens: int, num_channels: int, multiprocessors: int) -> ScanConfig:
    """Chunks as long as leave about 24 warps a multiprocessor, between 32 and 128 tokens (see triton_backward on rounding)."""
    length = max(num_tokens * num_channels // (WARP * 24 * multiprocessors), 1)
    chunk = min(max(triton.next_power_of_2(length), 32), 128)
    return ScanConfig(chunk, Tile(4, 4, 3), Tile(4, 2, 3), Tile(4, 1, 3, 112), Tile(2, 1, 3))


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
        q_end = _q_ends(inputs, chunks, dy, d_final, ctx.config.chunk_gradients)
        gradients = _scan_chunks_backward(inputs, chunks, ctx.config, dy, entry, q_end, initial_state is not None)
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
    return triton.cdiv(H, sizes["HB"]) * triton.cdiv(P, sizes["PB"])


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
    forward.carry_kernel[(triton.cdiv(inputs.A.numel(), CARRY_BLOCK), chunks.num_sequences)](
        states, delta_sum, inputs.A, chunks.first_chunk, carried_in, H, P, N, CARRY_BLOCK, CARRY_ROWS,
        HAS_CARRY=carried_in is not None, REVERSE=reverse, num_warps=1,
    )  # fmt: skip


def _q_ends(inputs: _Inputs, chunks: ChunkTable, dy: Tensor, d_final: Tensor | None, tile: Tile) -> Tensor | None:
    """∂L/∂(state that leaves each chunk), in the layout of `_entry_states`; None for zeros everywhere."""
    d_final = None if d_final is None else d_final.float().contiguous()
    if chunks.is_one_each:
        return d_final
    H, P, N = inputs.state_shape
    q = torch.empty(chunks.num_chunks, N, H * P, dtype=torch.float32, device=dy.device)
    delta_sum = torch.empty(chunks.num_chunks, H * P, dtype=torch.float32, device=dy.device)
    strides = {name: stride for name, stride in inputs.strides(dy).items() if name[0] not in "xb"}
    backward.chunk_gradient_kernel[(_num_programs(tile, H, P, N), chunks.num_chunks)](
        inputs.dt, inputs.A, inputs.C, inputs.z, inputs.dt_bias, dy, q, delta_sum, chunks.rows,
        **strides, H=H, **tile.sizes(P, N),
        HAS_Z=inputs.z is not None, HAS_BIAS=inputs.dt_bias is not None, SOFTPLUS=inputs.softplus,
        **COMMON, **tile.launch,
    )  # fmt: skip
    _carry(q, delta_sum, inputs, chunks, d_final, reverse=True)
    return q


def _scan_chunks_backward(
    inputs: _Inputs,
    chunks: ChunkTable,
    config: ScanConfig,
    dy: Tensor,
    entry: Tensor | None,
    q_end: Tensor | None,
    has_initial: bool,
) -> tuple[Tensor | None, ...]:
    """Gradients of x, dt, A, B, C, D, z, dt_bias and initial_state."""
    T, H, P = inputs.shape
    N, tile = inputs.state_shape[2], config.gradients
    sizes = tile.sizes(P, N)
    row_blocks = triton.cdiv(P, sizes["PB"])
    is_half = inputs.B.dtype != torch.float32 and inputs.C.dtype != torch.float32 and sizes["HB"] <= MOST_HEADS
    device = dy.device
    has_bias, has_D, has_z = inputs.dt_bias is not None, inputs.D is not None, inputs.z is not None

    def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(*shape, dtype=dtype, device=device)

    dx, ddt = empty(T, H, P, dtype=inputs.x.dtype), empty(T, H, P, dtype=inputs.dt.dtype)
    dB, dC = (empty(T, H, row_blocks, N, dtype=tensor.dtype) for tensor in (inputs.B, inputs.C))
    dz = empty(T, H, P, dtype=inputs.z.dtype) if inputs.z is not None else None
    dA = empty(chunks.num_chunks, N, H * P)
    dD = empty(chunks.num_chunks, H, P) if has_D else None
    d_bias = empty(chunks.num_chunks, H, P) if has_bias else None
    d_initial = empty(chunks.num_sequences, H, P, N) if has_initial else None
    backward.scan_chunk_backward_kernel[(_num_programs(tile, H, P, N), chunks.num_chunks)](
        inputs.x, inputs.dt, inputs.A, inputs.B, inputs.C, inputs.D, inputs.z, inputs.dt_bias, dy,
        entry, q_end, empty(T, H, P),
        dx, ddt, dA, dB, dC, dD, dz, d_bias, d_initial, chunks.rows,
        **inputs.strides(dy), **inputs.heads,
        **sizes, HAS_D=has_D, HAS_Z=has_z, HAS_BIAS=has_bias, HAS_ENTRY=entry is not None, HAS_END=q_end is not None,
        HAS_INITIAL=has_initial, SOFTPLUS=inputs.softplus, STATES_ARE_OUTER=chunks.is_one_each,
        DOT=dot_dtype(inputs.B.dtype) if is_half else None, **COMMON, **tile.launch,
    )  # fmt: skip
    dx = _sum_repeats(dx.view(T, inputs.x.shape[1], -1, P))
    dB = _sum_repeats(dB.view(T, inputs.B.shape[1], -1, N))
    dC = _sum_repeats(dC)
    sums = [None if partial is None else partial.sum(0) for partial in (dD, d_bias)]
    return dx, ddt, dA.sum(0).t().reshape(inputs.state_shape), dB, dC, sums[0], dz, sums[1], d_initial


def _sum_repeats(partial: Tensor) -> Tensor:
    """[T, heads, repeats, width] summed over repeats, in fp32, to partial's dtype."""
    T, heads, repeats, width = partial.shape
    if repeats == 1:
        return partial[:, :, 0]
    total = torch.empty(T, heads, width, dtype=partial.dtype, device=partial.device)
    grid = (triton.cdiv(total.numel(), SUM_BLOCK),)
    backward.sum_heads_kernel[grid](partial, total, total.numel(), width, repeats, SUM_BLOCK)
    return total
