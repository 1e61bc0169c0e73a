"""Rotary position embedding, of attention's heads and of a mixer's: checks and dispatch. The model makes the tables."""

from torch import Tensor

from m1.kernels.dispatch import implementation_for, require, require_groups, require_rank, require_tensor


def apply_rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate each head by its token's angles (Su et al. 2021, arXiv 2104.09864), in Hugging Face's half-split pairing.

    y = x · cos + rotate_half(x) · sin with rotate_half([a, b]) = [-b, a] on the two halves of K.

    Args:
        x: [T, H, K], K even; cos, sin: [T, K], each half holding the same K/2 angles.
    Returns:
        [T, H, K] in x's dtype, computed in fp32. Differentiable in x; cos and sin are constants.
    Raises:
        ValueError: for a wrong shape, dtype, device or an odd K.
    """
    require_rank("x", x, "T H K")
    num_tokens, _, width = x.shape
    require(width % 2 == 0, "x", "of an even head width K", list(x.shape))
    require_tensor("cos", cos, "T K", (num_tokens, width), x)
    require_tensor("sin", sin, "T K", (num_tokens, width), x)
    implementation = implementation_for(x, __name__)
    return implementation.apply_rotary(x, cos, sin)


def rotary_state_heads(x: Tensor, cos: Tensor, sin: Tensor, *, num_groups: int, width: int) -> Tensor:
    """Rotate as apply_rotary does, and deal each head's rotated pairs out to K/width narrow heads of the Mamba-1 mixer.

    A narrow head takes every (K/width)-th pair, both numbers of it, so that its inner products depend on the distance alone.
    Narrow heads stand in the order (group, narrow head, member of the group), as the scan's grouping wants them.

    Args:
        x: [T, heads, K], head h in group h // (heads / num_groups); cos, sin: [T, K].
        num_groups: key/value heads; width: N, the numbers of a narrow head, an even divisor of K.
    Returns:
        [T, heads · K / width, width] in x's dtype: the first numbers of the pairs, then the second. Differentiable in x.
    Raises:
        ValueError: for a wrong shape, dtype, device, number of groups or width.
    """
    require_rank("x", x, "T heads K")
    num_tokens, num_heads, head_width = x.shape
    require_groups("x", num_heads, num_groups)
    require(width > 0 and width % 2 == 0 and head_width % width == 0, "width", f"an even divisor of K={head_width}", width)
    require_tensor("cos", cos, "T K", (num_tokens, head_width), x)
    require_tensor("sin", sin, "T K", (num_tokens, head_width), x)
    implementation = implementation_for(x, __name__, "rotary_state_heads")
    return implementation.rotary_state_heads(x, cos, sin, num_groups=num_groups, width=width)
