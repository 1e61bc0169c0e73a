"""The recurrences written token by token in float64: what the references are checked against, with autograd's gradients.

Nothing here is shared with m1: each function follows its op's formula literally, one document and one token at a time.
Legend: T tokens, n sequences, H query-side heads, G groups, Gx heads of x, P width, N d_state, W convolution width, D channels.
"""

import itertools

import torch
from torch import Tensor


def documents(lengths: list[int]) -> list[tuple[int, int]]:
    """(start, end) of packed documents."""
    return list(itertools.pairwise(itertools.accumulate([0, *lengths])))


def cu_seqlens(lengths: list[int]) -> Tensor:
    return torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32)


def repeat_heads(grouped: Tensor, num_heads: int) -> Tensor:
    """[G, …] to [H, …]: head h reads group h // (H/G)."""
    return torch.stack([grouped[head // (num_heads // len(grouped))] for head in range(num_heads)])


def scan(inputs: dict[str, Tensor], lengths: list[int], dt_softplus: bool = True) -> tuple[Tensor, Tensor]:
    """The selective scan (A [H, P, N]) or SSD (A [H]) on float64 tensors: y [T, H, P], final states [n, H, P, N]."""
    x, dt, A, B, C = (inputs[name] for name in ("x", "dt", "A", "B", "C"))
    num_heads, width, d_state = C.shape[1], x.shape[2], C.shape[2]
    ys, finals = [], []
    for index, (start, end) in enumerate(documents(lengths)):
        state = torch.zeros(num_heads, width, d_state, dtype=torch.float64)
        if "initial_state" in inputs:
            state = inputs["initial_state"][index]
        for t in range(start, end):
            step = dt[t] + inputs["dt_bias"] if "dt_bias" in inputs else dt[t]
            step = torch.log1p(step.exp()) if dt_softplus else step
            step = step if step.dim() == 2 else step[:, None]  # [H, P] or [H, 1]
            x_t, B_t = repeat_heads(x[t], num_heads), repeat_heads(B[t], num_heads)
            decay = (step[..., None] * (A if A.dim() == 3 else A[:, None, None])).exp()
            state = decay * state + (step * x_t)[..., None] * B_t[:, None]
            y = (state * C[t][:, None]).sum(-1)
            if "D" in inputs:
                skip = inputs["D"]
                y = y + (skip if skip.dim() == 2 else skip[:, None]) * x_t
            if "z" in inputs:
                y = y * inputs["z"][t] * torch.sigmoid(inputs["z"][t])
            ys.append(y)
        finals.append(state)
    return torch.stack(ys), torch.stack(finals)


def convolution(inputs: dict[str, Tensor], lengths: list[int], activation: str | None) -> tuple[Tensor, Tensor]:
    """The depthwise causal convolution on float64 tensors: y [T, D], final states [n, D, W-1]."""
    x, weight = inputs["x"], inputs["weight"]
    channels, width = weight.shape
    ys, finals = [], []
    for index, (start, end) in enumerate(documents(lengths)):
        window = torch.zeros(channels, width - 1, dtype=torch.float64)
        if "initial_state" in inputs:
            window = inputs["initial_state"][index]
        for t in range(start, end):
            window = torch.cat([window, x[t][:, None]], 1)
            y = (window * weight).sum(1) + inputs.get("bias", 0)
            ys.append(y * torch.sigmoid(y) if activation == "silu" else y)
            window = window[:, 1:]
        finals.append(window)
    return torch.stack(ys), torch.stack(finals)
