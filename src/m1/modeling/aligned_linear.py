"""A linear layer of an odd number of outputs, whose rows a GPU reads and writes in whole words; no mixer's arithmetic here."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

ROW_ALIGNMENT = 16  # elements: what Triton sees as aligned, and more than matrix products ask for


class AlignedLinear(nn.Linear):
    """`nn.Linear` whose output rows may end in zeros that fill them up to a multiple of 16 elements; see `split_rows`.

    With rows of 1,572 bf16 elements, say, matrix products fall back to kernels that read pieces of eight bytes, and Triton's
    to less. So rows are padded in training on a GPU, where a copy of the weight costs little beside the tokens. Whoever
    wants the weight must call the layer: a divided model gathers it then.
    """

    def forward(self, x: Tensor) -> Tensor:
        """x [..., in] -> [..., out, or out rounded up]."""
        padding = -self.out_features % ROW_ALIGNMENT
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
