"""Products of few tokens on a GPU in the model's own dtype: sizes of the launches. The kernel is in triton_product.py."""

import torch
import triton
from torch import Tensor

from m1.kernels.decode_linear.triton_product import ProductConfig, few_token_product, fill
from m1.kernels.launch import num_multiprocessors, with_unit_stride


def choose_config(num_tokens: int, num_outputs: int, width: int, multiprocessors: int, is_pair: bool) -> ProductConfig:
    """A launch from shapes alone."""
    block_n, block_k = 64, 64 if is_pair else 128
    splits = fill(triton.cdiv(num_outputs, block_n), width // block_k, multiprocessors, 4)
    return ProductConfig(block_n, block_k, splits, num_ahead=512)


def _launch(x: Tensor, weight: Tensor, bias: Tensor | None, is_pair: bool, config: ProductConfig | None) -> Tensor:
    x, weight = with_unit_stride(x), weight.contiguous()
    num_outputs = weight.shape[0] // 2 if is_pair else weight.shape[0]
    config = config or choose_config(x.shape[0], num_outputs, x.shape[1], num_multiprocessors(x.device), is_pair)
    return few_token_product(x, weight, bias, x.dtype, config, is_pair=is_pair)


@torch.no_grad()
def decode_linear(x: Tensor, weight: Tensor, bias: Tensor | None, config: ProductConfig | None = None) -> Tensor:
    """The public op's contract. `config` overrides the launch sizes."""
    return _launch(x, weight, bias, False, config)


@torch.no_grad()
def decode_swiglu(x: Tensor, weight: Tensor, bias: Tensor | None, config: ProductConfig | None = None) -> Tensor:
    """The public op's contract; as decode_linear."""
    return _launch(x, weight, bias, True, config)
