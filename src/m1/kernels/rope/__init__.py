"""Rotary position embedding: checks and dispatch; the tables of cosines and sines are the model's business."""

from torch import Tensor

from m1.kernels.dispatch import implementation_for, require, require_rank, require_tensor


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
