"""Products of few tokens on a GPU in the model's own dtype: sizes of the launches, by triton_launch.py."""

import torch
from torch import Tensor

from m1.kernels.decode_linear.triton_launch import few_token_product
from m1.kernels.decode_linear.triton_product import AHEAD, LEAST_WIDTH_IN_BULK, ProductConfig
from m1.kernels.launch import cdiv, num_multiprocessors, with_unit_stride


def choose_config(
    num_tokens: int, num_outputs: int, width: int, multiprocessors: int, is_pair: bool, num_bytes: int = 2
) -> ProductConfig:
    """A launch from shapes and bytes an element alone (best of a sweep over M1-3B's shapes on an H100, 16-bit).

    As much of k is in flight as fits beside the tokens; k is split in two where tiles are fewer than half the multiprocessors
    and each has a long way to go; with more than 64 tokens tiles come as bulk copies.
    """
    tiles = cdiv(num_outputs, 64)
    block_k = 64 if width % 128 or (num_tokens > 64 and (is_pair or tiles > multiprocessors)) else 128
    num_stages = 5 if (num_tokens <= 32 and not is_pair) or (num_tokens > 64 and is_pair) else 4
    splits = 2 if 2 * tiles <= multiprocessors and width >= 16 * block_k else 1
    is_bulk = num_bytes == 2 and num_tokens > 64 and width >= LEAST_WIDTH_IN_BULK
    if num_bytes > 2:
        block_k, num_stages = 32, 3
    if num_bytes == 2 and num_tokens > 64 and not is_pair and tiles > 4 * multiprocessors:
        return ProductConfig(128, 64, 1, 8, 3, AHEAD // num_bytes, is_bulk)  # wider tiles read the tokens less often
    fills = num_tokens <= 32 and splits == 1 and tiles <= multiprocessors < 2 * tiles  # one wave, all of which asks ahead
    return ProductConfig(64, block_k, splits, 4, num_stages, AHEAD // num_bytes // (2 if fills else 1), is_bulk)


def _launch(
    x: Tensor, weight: Tensor, bias: Tensor | None, config: ProductConfig | None, *, is_pair: bool = False, parts: bool = False
) -> Tensor:
    x, weight = with_unit_stride(x), weight.contiguous()
    num_outputs = weight.shape[0] // 2 if is_pair else weight.shape[0]
    if config is None:
        sizes = (x.shape[0], num_outputs, x.shape[1], num_multiprocessors(x.device))
        config = choose_config(*sizes, is_pair, x.element_size())
    out_dtype = torch.float32 if parts else x.dtype
    return few_token_product(x, weight, bias, out_dtype, config, is_pair=is_pair, leaves_parts=parts)


@torch.no_grad()
def decode_linear(x: Tensor, weight: Tensor, bias: Tensor | None, config: ProductConfig | None = None) -> Tensor:
    """The public op's contract. `config` overrides the launch sizes."""
    return _launch(x, weight, bias, config)


@torch.no_grad()
def decode_linear_parts(x: Tensor, weight: Tensor, bias: Tensor | None, config: ProductConfig | None = None) -> Tensor:
    """The public op's contract; as decode_linear."""
    return _launch(x, weight, bias, config, parts=True)


@torch.no_grad()
def decode_swiglu(x: Tensor, weight: Tensor, bias: Tensor | None, config: ProductConfig | None = None) -> Tensor:
    """The public op's contract; as decode_linear."""
    return _launch(x, weight, bias, config, is_pair=True)
