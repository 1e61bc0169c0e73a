"""Depthwise causal convolution in torch: the truth for the kernel, and the CPU path.

Every document is laid out behind its own W-1 rows of state in one padded axis. There the convolution is W shifted
products without any boundary, and the final state of a document is the last W-1 rows of its
stretch. Where several heads of filters read a head of x, they are a broadcast dimension of these products.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from m1.kernels.state_rows import rows_of


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
) -> Any:
    """See m1.kernels.causal_conv1d.causal_conv1d."""
    num_tokens, num_channels = x.shape
    halo = weight.shape[1] - 1
    if cu_seqlens is None:
        cu_seqlens = torch.tensor([0, num_tokens], dtype=torch.int32, device=x.device)
    num_sequences = len(cu_seqlens) - 1
    document = torch.arange(num_sequences, device=x.device).repeat_interleave(cu_seqlens.diff(), output_size=num_tokens)  # [T]
    window_start = torch.arange(num_tokens, device=x.device) + document * halo  # row where a token's window begins
    offsets = torch.arange(halo, device=x.device)

    padded = torch.zeros(num_tokens + num_sequences * halo, num_channels, device=x.device)
    padded = padded.index_copy(0, window_start + halo, x.float())
    if initial_state is not None:
        state_rows = (cu_seqlens[:-1].long() + torch.arange(num_sequences, device=x.device) * halo)[:, None] + offsets
        state = initial_state.float().transpose(1, 2)  # [n, W-1, D]
        padded = padded.index_copy(0, state_rows.flatten(), state.reshape(-1, num_channels))

    y = _filter(padded, weight, bias, len(padded) - halo, head_width).index_select(0, window_start)
    y = (F.silu(y) if activation == "silu" else y).to(x.dtype)
    if not output_final_state:
        return y
    last_rows = (cu_seqlens[1:].long() + torch.arange(num_sequences, device=x.device) * halo)[:, None] + offsets
    final_state = padded.index_select(0, last_rows.flatten()).view(num_sequences, halo, num_channels)
    return y, final_state.transpose(1, 2).to(x.dtype).contiguous()


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
) -> Tensor:
    """See m1.kernels.causal_conv1d.causal_conv1d_update."""
    *taps, newest_tap = _heads_of_filter(weight, x.shape[1], head_width)
    past = conv_state.transpose(1, 2)  # [S, W-1, Dx]
    rows = rows_of(slots, len(x))
    window = past[rows] if isinstance(rows, slice) else past.index_select(0, rows)  # a slice is stepped in place
    y = _by_head(x.float(), newest_tap) * newest_tap  # [n, Gx, R, P]
    for offset, tap in enumerate(taps):
        y.addcmul_(_by_head(window[:, offset].float(), tap), tap)
    for offset in range(len(taps) - 1):
        window[:, offset] = window[:, offset + 1]
    if taps:
        window[:, -1] = x
    if not isinstance(rows, slice):
        past.index_copy_(0, rows, window)
    y = y.flatten(1)
    if bias is not None:
        y += bias.float()
    return (F.silu(y) if activation == "silu" else y).to(x.dtype)


def _heads_of_filter(weight: Tensor, num_sources: int, head_width: int | None) -> list[Tensor]:
    """Each of the W taps in fp32 as [Gx, R, P]: R successive heads of filters read a head of x; [1, 1, D] where R is 1."""
    repeat = weight.shape[0] // num_sources
    width = weight.shape[0] if repeat == 1 or head_width is None else head_width
    return list(weight.float().t().contiguous().view(weight.shape[1], -1, repeat, width).unbind(0))


def _by_head(rows: Tensor, tap: Tensor) -> Tensor:
    """[…, Dx] to [rows, Gx, 1, P], to be multiplied with a tap [Gx, R, P]."""
    return rows.unflatten(-1, (tap.shape[0], 1, tap.shape[2]))


def _filter(padded: Tensor, weight: Tensor, bias: Tensor | None, num_windows: int, head_width: int | None) -> Tensor:
    """bias + Σ_w weight[:, w] · padded[i + w] for the window that begins at each row i, [num_windows, D]."""
    taps = _heads_of_filter(weight, padded.shape[1], head_width)
    y = _by_head(padded[:num_windows], taps[0]) * taps[0]
    for offset, tap in enumerate(taps[1:], start=1):
        y = torch.addcmul(y, _by_head(padded[offset : offset + num_windows], tap), tap)
    y = y.flatten(1)
    return y if bias is None else y + bias.float()
