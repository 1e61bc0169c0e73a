"""The selective scan in torch: the truth for the kernel, and the path on which a CPU trains and decodes.

Step sizes, skip and gate are here; the recurrence itself, with its backward, is in recurrence.py.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from m1.kernels.chunks import Chunks
from m1.kernels.selective_scan.recurrence import CHUNK, Recurrence
from m1.kernels.state_rows import state_blocks


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
) -> Any:
    """See m1.kernels.selective_scan.selective_scan."""
    wide = x.float()
    initial = None if initial_state is None else initial_state.float()
    chunks = Chunks(cu_seqlens, x.shape[0], CHUNK, x.device)
    delta = _step_size(dt, dt_bias, dt_softplus)
    y, final_state = Recurrence.apply(wide, delta, A.float(), B.float(), C.float(), initial, chunks)
    y = _skip_and_gate(y, wide, D, z).to(x.dtype)
    return (y, final_state) if output_final_state else y


@torch.no_grad()
def selective_state_update(
    ssm_state: Tensor,
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
    slots: Tensor | None = None,
) -> Tensor:
    """See m1.kernels.selective_scan.selective_state_update."""
    num_heads, width, d_state = A.shape
    num_groups = B.shape[1]
    A, B, C, wide = A.float(), B.float(), C.float(), x.float()
    delta = _step_size(dt, dt_bias, dt_softplus)  # [n, H, P]
    u = (delta * _repeat(wide, num_heads)).view(len(x), num_groups, -1, 1)  # [n, G, H/G·P, 1]
    y = torch.empty_like(delta)
    with torch.autocast(x.device.type, enabled=False):
        for rows, state in state_blocks(ssm_state, slots, len(x)):  # [k, H, P, N]
            state.mul_(torch.mul(delta[rows][..., None], A).exp_())
            state.view(-1, num_groups, num_heads // num_groups * width, d_state).addcmul_(u[rows], B[rows][:, :, None])
            read = torch.bmm(state.view(-1, width, d_state), C[rows].reshape(-1, d_state, 1))
            y[rows] = read.view(-1, num_heads, width)
    return _skip_and_gate(y, wide, D, z).to(x.dtype)


def _step_size(dt: Tensor, dt_bias: Tensor | None, dt_softplus: bool) -> Tensor:
    delta = dt.float() if dt_bias is None else dt.float() + dt_bias.float()
    return F.softplus(delta) if dt_softplus else delta


def _skip_and_gate(y: Tensor, x: Tensor, D: Tensor | None, z: Tensor | None) -> Tensor:
    """(y + D·x) · silu(z), [rows, H, P]."""
    if D is not None:
        y = torch.addcmul(y, D.float(), _repeat(x, y.shape[1]))
    return y if z is None else y * F.silu(z.float())


def _repeat(grouped: Tensor, num_heads: int) -> Tensor:
    """[rows, G, …] to [rows, H, …]: each group for its H/G neighbouring heads."""
    repeats = num_heads // grouped.shape[1]
    return grouped if repeats == 1 else grouped.repeat_interleave(repeats, 1)
