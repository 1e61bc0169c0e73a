"""A linear layer of an odd number of outputs, whose rows a GPU reads and writes in whole words; no mixer's arithmetic here."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn


class AlignedLinear(nn.Linear):
    """`nn.Linear` whose output rows may end in zeros that fill them up to a multiple of `alignment`; see `split_rows`.

    With rows of 1,572 bf16 elements, say, matrix products fall back to kernels that read pieces of eight bytes, and Triton's
    to less. So rows are padded in training on a GPU, where a copy of the weight costs little beside the tokens. Whoever
    wants the weight must call the layer: a divided model gathers it then.

    alignment: elements. 8 bf16 numbers are what matrix products ask for, and kernels that know of `strides.stride_unit`;
    16 are what other Triton kernels see as aligned.
    """

    def __init__(self, in_features: int, out_features: int, *, bias: bool, alignment: int) -> None:
        super().__init__(in_features, out_features, bias=bias)
        self.alignment = alignment

    def forward(self, x: Tensor) -> Tensor:
        """x [..., in] -> [..., out, or out rounded up]."""
        padding = -self.out_features % self.alignment
        if not (padding and torch.is_grad_enabled() and self.is_padding(x)):
            return super().forward(x)
        bias = None if self.bias is None else nn.functional.pad(self.bias, (0, padding))
        return nn.functional.linear(x, nn.functional.pad(self.weight, (0, 0, 0, padding)), bias)

    @staticmethod
    def is_padding(x: Tensor) -> bool:
        """Whether the alignment of rows matters where x is."""
        return x.is_cuda


def split_rows(rows: Tensor, widths: Sequence[int]) -> Sequence[Tensor]:
    """Views of the columns of `AlignedLinear`'s rows, of the given widths, without the padding."""
    return rows.split([*widths, rows.shape[-1] - sum(widths)], dim=-1)[:-1]
