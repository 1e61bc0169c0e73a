"""The scan of Mamba-2 (SSD: one scalar decay a head): checks and dispatch; arithmetic in reference.py, triton_impl.py.

Recurrence (Dao & Gu 2024, arXiv 2405.21060), for each head h of group g = h // (H/G), row p and state n:

    Δ = softplus(dt + dt_bias);  h_t = exp(Δ·A) · h_{t-1} + Δ·x_t·B_t;  y_t = Σ_n C_t·h_t + D·x_t

The gate z of Mamba-2 is not here: its mixer applies a gated RMSNorm afterwards (m1.kernels.norm).
"""

from typing import Any

from torch import Tensor

from m1.kernels.dispatch import (
    implementation_for,
    require,
    require_cu_seqlens,
    require_groups,
    require_rank,
    require_slots,
    require_tensor,
)


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
) -> Any:
    """Run the recurrence over packed documents, restarting at each one.

    Args:
        x: [T, Gx, P] with Gx dividing H (G: not yet repeated, H: already repeated).
        dt: [T, H] step sizes before bias and softplus; A: [H], negative; B: [T, G, N]; C: [T, H, N].
        D: [H] skip weights; dt_bias: [H]; dt_softplus: False takes dt + dt_bias as it is.
        cu_seqlens: [n+1] int32, None for one document; initial_state: [n, H, P, N].
        output_final_state: also return the state after each document's last token.
        chunk_size: tokens a chunk of the matrix form (a GPU takes the next power of 2); it changes speed and rounding only.
            None: what suits the device and the sizes.
    Returns:
        y [T, H, P] in x's dtype, or (y, final_state [n, H, P, N] fp32). Computed in fp32; differentiable in every
        floating input, also through final_state.
    Raises:
        ValueError: for a wrong shape, dtype, device or chunk size.
    """
    _check_inputs("T", x, dt, A, B, C, D, dt_bias)
    num_sequences = require_cu_seqlens(cu_seqlens, x.shape[0], x)
    require(chunk_size is None or chunk_size > 0, "chunk_size", "at least 1", chunk_size)
    if initial_state is not None:
        shape = (num_sequences, C.shape[1], x.shape[2], C.shape[2])
        require_tensor("initial_state", initial_state, "n H P N", shape, x)
    implementation = implementation_for(x, __name__)
    return implementation.ssd_scan(
        x,
        dt,
        A,
        B,
        C,
        D=D,
        dt_bias=dt_bias,
        dt_softplus=dt_softplus,
        cu_seqlens=cu_seqlens,
        initial_state=initial_state,
        output_final_state=output_final_state,
        chunk_size=chunk_size,
    )


def ssd_state_update(
    ssm_state: Tensor,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    *,
    D: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = True,
    slots: Tensor | None = None,
) -> Tensor:
    """Advance the states of n sequences by one token each, in place; without gradient.

    Args:
        ssm_state: [S, H, P, N] in any floating dtype, updated in place.
        x: [n, Gx, P]; dt: [n, H]; A: [H]; B: [n, G, N]; C: [n, H, N]; D, dt_bias: [H].
        slots: [n] int64, the state of each row; None means arange(n).
    Returns:
        y [n, H, P] in x's dtype.
    Raises:
        ValueError: for a wrong shape, dtype, device or (on the CPU) a slot out of range.
    """
    _check_inputs("n", x, dt, A, B, C, D, dt_bias)
    require_rank("ssm_state", ssm_state, "S H P N")
    num_slots = ssm_state.shape[0]
    shape = (num_slots, C.shape[1], x.shape[2], C.shape[2])
    require_tensor("ssm_state", ssm_state, "S H P N", shape, x)
    require_slots(slots, x.shape[0], num_slots, x)
    implementation = implementation_for(x, __name__, "ssd_state_update")
    return implementation.ssd_state_update(
        ssm_state, x, dt, A, B, C, D=D, dt_bias=dt_bias, dt_softplus=dt_softplus, slots=slots
    )


def _check_inputs(
    rows: str, x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, dt_bias: Tensor | None
) -> None:
    """Check what scan and step share; `rows` names the leading dimension (T tokens or n sequences)."""
    require_rank("x", x, f"{rows} Gx P")
    require_rank("B", B, f"{rows} G N")
    require_rank("C", C, f"{rows} H N")
    num_rows, num_heads, d_state = x.shape[0], C.shape[1], C.shape[2]
    require_groups("x", num_heads, x.shape[1])
    require_groups("B", num_heads, B.shape[1])
    require_tensor("A", A, "H", (num_heads,), x)
    require_tensor("dt", dt, f"{rows} H", (num_rows, num_heads), x)
    require_tensor("B", B, f"{rows} G N", (num_rows, B.shape[1], d_state), x)
    require_tensor("C", C, f"{rows} H N", (num_rows, num_heads, d_state), x)
    if D is not None:
        require_tensor("D", D, "H", (num_heads,), x)
    if dt_bias is not None:
        require_tensor("dt_bias", dt_bias, "H", (num_heads,), x)
