"""The causal convolution on a GPU: launch sizes and the autograd function; the kernels are in triton_kernels.py.

Floors on an H100 at 3.0 TB/s, M1-3B dimensions (D = 3072 channels, x repeated first) and T = 16,384 tokens in bf16:
- forward: reads x, writes y: 4·T·D = 201 MB, 67 µs (2 special functions an element: 28 µs).
- backward: reads x and dy, writes dx: 6·T·D = 302 MB, 101 µs.
- update, batch 512: reads and writes W - 1 = 3 elements of state, reads x, writes y: 16 bytes a channel, 25 MB, 8.4 µs.
With D = d_xb = 1024 channels (x repeated afterwards) a third of each. Where x is repeated by indexing (1024 channels of x,
3072 of the filter) x and its gradient are a third: forward 134 MB, 45 µs; backward 168 MB, 56 µs; update 12.6 MB, 4.2 µs.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from m1.kernels.causal_conv1d.triton_kernels import conv_backward_kernel, conv_kernel, conv_update_kernel
from m1.kernels.chunk_table import cut_documents, document_bounds
from m1.kernels.launch import cdiv, next_power_of_2, num_multiprocessors, with_unit_stride
from m1.kernels.strides import stride_unit

FEW_PROGRAMS = 8  # a multiprocessor: with fewer of the forward, chunks are halved
MOST_MEMBERS = 8  # heads of filters that one program of the backward serves: what its registers hold


class ConvConfig(NamedTuple):
    """Launch sizes; the sweep tries several.

    chunk: tokens a program; steps, num_warps: of the forward, a tile's tokens and warps of 256 channels, or of as many as
    there are; backward_steps, which divides chunk, backward_warps and backward_channels: of the backward, the last a
    thread's, None for 2, or 1 where a thread serves many filters.
    """

    chunk: int = 64
    steps: int = 8
    num_warps: int = 1
    backward_steps: int = 8
    backward_warps: int = 1
    backward_channels: int | None = None

    def forward_sizes(self, width: int, num_sources: int) -> dict[str, int]:
        taps = next_power_of_2(width)
        block = min(256 * self.num_warps, max(next_power_of_2(num_sources), 32))
        return {"WIDTH": width, "TAPS": taps, "STEPS": max(self.steps, taps), "BLOCK": block}

    def backward_sizes(self, width: int, repeat: int) -> dict[str, int]:
        members = max(number for number in range(1, MOST_MEMBERS + 1) if repeat % number == 0)
        channels = self.backward_channels or (2 if members <= 4 else 1)
        steps = max(self.backward_steps, next_power_of_2(max(width - 1, 1)))
        assert self.chunk % steps == 0
        return {"WIDTH": width, "STEPS": steps, "BLOCK": 32 * self.backward_warps * channels, "MEMBERS": members}


def choose_config(num_tokens: int, num_sources: int, repeat: int, multiprocessors: int) -> ConvConfig:
    """Launch sizes for `num_tokens` of `num_sources` channels of x, each read by `repeat` filters."""
    config = ConvConfig()
    blocks = cdiv(num_sources, config.forward_sizes(1, num_sources)["BLOCK"]) * repeat
    is_small = blocks * cdiv(num_tokens, config.chunk) < FEW_PROGRAMS * multiprocessors
    return config._replace(chunk=config.chunk // 2) if is_small else config


def _repetition(num_channels: int, num_sources: int, head_width: int | None) -> dict[str, int]:
    """How many heads of filters read a head of x, and its width (of no account where each has its own)."""
    repeat = num_channels // num_sources
    return {"REPEAT": repeat, "HEAD": 1 if repeat == 1 or head_width is None else head_width}


def causal_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    activation: str | None = None,
    cu_seqlens: Tensor | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    head_width: int | None = None,
    config: ConvConfig | None = None,
) -> Any:
    """See m1.kernels.causal_conv1d.causal_conv1d; `config` overrides the launch sizes."""
    bounds = document_bounds(cu_seqlens, x.shape[0], x.device)
    repetition = _repetition(weight.shape[0], x.shape[1], head_width)
    config = config or choose_config(x.shape[0], x.shape[1], repetition["REPEAT"], num_multiprocessors(x.device))
    y, final_state = _CausalConv1d.apply(
        x, weight, bias, initial_state, bounds, activation == "silu", output_final_state, repetition, config
    )
    return (y, final_state) if output_final_state else y


class _CausalConv1d(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        initial_state: Tensor | None,
        bounds: Tensor,
        silu: bool,
        output_final_state: bool,
        repetition: dict[str, int],
        config: ConvConfig,
    ) -> tuple[Tensor, Tensor | None]:
        T, num_sources = x.shape
        D, width = weight.shape
        chunks = cut_documents(bounds, T, config.chunk)
        x = with_unit_stride(x)
        weight = weight.contiguous()
        initial = None if initial_state is None else initial_state.contiguous()
        y = torch.empty(T, D, dtype=x.dtype, device=x.device)
        final_state = None
        if output_final_state:
            final_state = torch.empty(chunks.num_sequences, num_sources, width - 1, dtype=x.dtype, device=x.device)
        sizes, unit = config.forward_sizes(width, num_sources), stride_unit([x.stride(0)])
        conv_kernel[(cdiv(num_sources, sizes["BLOCK"]) * repetition["REPEAT"], chunks.num_chunks)](
            x, weight, bias, initial, y, final_state, chunks.rows, bounds, x.stride(0) // unit, num_sources,
            **sizes, **repetition, UNIT=unit, HAS_BIAS=bias is not None, HAS_INITIAL=initial is not None,
            HAS_FINAL=output_final_state, SILU=silu, num_warps=config.num_warps,
        )  # fmt: skip
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, weight, bias, initial, bounds, chunks.rows)
        ctx.silu, ctx.repetition, ctx.config = silu, repetition, config
        return y, final_state

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None, d_final: Tensor | None) -> Any:
        x, weight, bias, initial, bounds, rows = ctx.saved_tensors
        T, num_sources = x.shape
        D, width = weight.shape
        dy = x.new_zeros(T, D) if dy is None else with_unit_stride(dy)
        d_final = None if d_final is None else d_final.contiguous()
        dx = torch.empty(T, num_sources, dtype=x.dtype, device=x.device)
        d_filter = torch.empty(rows.shape[0], width + 1, D, dtype=torch.float32, device=x.device)
        d_initial = None if initial is None else torch.empty_like(initial)
        sizes, unit = ctx.config.backward_sizes(width, D // num_sources), stride_unit([x.stride(0), dy.stride(0)])
        conv_backward_kernel[(cdiv(num_sources, sizes["BLOCK"]), rows.shape[0])](
            x, weight, bias, initial, dy, d_final, dx, d_filter, d_initial, rows, bounds,
            x.stride(0) // unit, dy.stride(0) // unit, num_sources, **sizes, **ctx.repetition, UNIT=unit,
            HAS_BIAS=bias is not None, HAS_INITIAL=initial is not None, HAS_FINAL=d_final is not None,
            SILU=ctx.silu, num_warps=ctx.config.backward_warps,
        )  # fmt: skip
        total = d_filter.sum(0)  # [W+1, D]
        d_bias = None if bias is None else total[width].to(bias.dtype)
        return dx, total[:width].t().to(weight.dtype), d_bias, d_initial, None, None, None, None, None


@torch.no_grad()
def causal_conv1d_update(
    x: Tensor,
    conv_state: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    activation: str | None = None,
    slots: Tensor | None = None,
    head_width: int | None = None,
    block: int = 256,
    num_warps: int = 4,
) -> Tensor:
    """See m1.kernels.causal_conv1d.causal_conv1d_update; the last two arguments are launch sizes.

    A row whose slot is not one of the state's is skipped: no state changes, and its y is zero.
    """
    x = with_unit_stride(x)
    n, num_sources = x.shape
    D, width = weight.shape
    y = torch.empty(n, D, dtype=x.dtype, device=x.device)
    conv_update_kernel[(cdiv(num_sources, block), n)](
        x, conv_state, weight.contiguous(), bias, slots, y, x.stride(0), *conv_state.stride(), conv_state.shape[0],
        num_sources, width, next_power_of_2(max(width - 1, 1)), block, **_repetition(D, num_sources, head_width),
        HAS_BIAS=bias is not None, HAS_SLOTS=slots is not None, SILU=activation == "silu", num_warps=num_warps,
    )  # fmt: skip
    return y
