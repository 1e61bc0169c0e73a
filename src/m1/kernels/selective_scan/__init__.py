"""The selective scan of Mamba-1 with grouped heads: checks and dispatch; arithmetic in reference.py, triton_impl.py.

Recurrence (Gu & Dao 2023, arXiv 2312.00752, eq. 2 with the simplified discretisation of B), for each head h of group
g = h // (H/G), row p and state n:

    Δ = softplus(dt + dt_bias);  h_t = exp(Δ·A) · h_{t-1} + Δ·x_t·B_t;  y_t = (Σ_n C_t·h_t + D·x_t) · silu(z_t)
"""

from typing import Any

from torch import Tensor

from m1.kernels.dispatch import (
    implementation_for,
    require_cu_seqlens,
    require_groups,
    require_rank,
    require_slots,
    require_tensor,
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
) -> Any:
    """Run the recurrence over packed documents, restarting at each one.

    Args:
        x: [T, Gx, P] with Gx dividing H (G: not yet repeated, H: already repeated).
        dt: [T, H, P] step sizes before bias and softplus; A: [H, P, N], negative; B: [T, G, N]; C: [T, H, N].
        D: [H, P] skip weights; z: [T, H, P] gate; dt_bias: [H, P]; dt_softplus: False takes dt + dt_bias as it is.
        cu_seqlens: [n+1] int32, None for one document; initial_state: [n, H, P, N].
        output_final_state: also return the state after each document's last token.
    Returns:
        y [T, H, P] in x's dtype, or (y, final_state [n, H, P, N] fp32). Computed in fp32; differentiable in every
        floating input, also through final_state.
    Raises:
        ValueError: for a wrong shape, dtype or device.
    """
    _check_inputs("T", x, dt, A, B, C, D, z, dt_bias)
    num_sequences = require_cu_seqlens(cu_seqlens, x.shape[0], x)
    if initial_state is not None:
        require_tensor("initial_state", initial_state, "n H P N", (num_sequences, *A.shape), x)
    implementation = implementation_for(x, __name__)
    return implementation.selective_scan(
        x,
        dt,
        A,
        B,
        C,
        D=D,
        z=z,
        dt_bias=dt_bias,
        dt_softplus=dt_softplus,
        cu_seqlens=cu_seqlens,
        initial_state=initial_state,
        output_final_state=output_final_state,
    )


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
    """Advance the states of n sequences by one token each, in place; without gradient.

    Args:
        ssm_state: [S, H, P, N] in any floating dtype, updated in place.
        x: [n, Gx, P]; dt: [n, H, P]; A: [H, P, N]; B: [n, G, N]; C: [n, H, N]; D, dt_bias: [H, P]; z: [n, H, P].
        slots: [n] int64, the state of each row; None means arange(n).
    Returns:
        y [n, H, P] in x's dtype.
    Raises:
        ValueError: for a wrong shape, dtype, device or (on the CPU) a slot out of range.
    """
    _check_inputs("n", x, dt, A, B, C, D, z, dt_bias)
    require_rank("ssm_state", ssm_state, "S H P N")
    num_slots = ssm_state.shape[0]
    require_tensor("ssm_state", ssm_state, "S H P N", (num_slots, *A.shape), x)
    require_slots(slots, x.shape[0], num_slots, x)
    implementation = implementation_for(x, __name__)
    return implementation.selective_state_update(
        ssm_state, x, dt, A, B, C, D=D, z=z, dt_bias=dt_bias, dt_softplus=dt_softplus, slots=slots
    )


def _check_inputs(
    rows: str,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
) -> None:
    """Check what scan and step share; `rows` names the leading dimension (T tokens or n sequences)."""
    require_rank("x", x, f"{rows} Gx P")
    require_rank("A", A, "H P N")
    require_rank("B", B, f"{rows} G N")
    num_rows, num_x_heads, width = x.shape
    num_heads, _, d_state = A.shape
    require_groups("x", num_heads, num_x_heads)
    require_groups("B", num_heads, B.shape[1])
    require_tensor("A", A, "H P N", (num_heads, width, d_state), x)
    require_tensor("dt", dt, f"{rows} H P", (num_rows, num_heads, width), x)
    require_tensor("B", B, f"{rows} G N", (num_rows, B.shape[1], d_state), x)
    require_tensor("C", C, f"{rows} H N", (num_rows, num_heads, d_state), x)
    if D is not None:
        require_tensor("D", D, "H P", (num_heads, width), x)
    if z is not None:
        require_tensor("z", z, f"{rows} H P", (num_rows, num_heads, width), x)
    if dt_bias is not None:
        require_tensor("dt_bias", dt_bias, "H P", (num_heads, width), x)
