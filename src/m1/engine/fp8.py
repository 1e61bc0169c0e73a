"""Sampling with 8-bit weights and caches: a model's linear layers replaced by ones whose products are of e4m3 numbers.

A weight has a scale an output channel, found when it is loaded; activations have one a token, found where they arise: norms
and SwiGLU hand on `QuantizedRows`. Embedding, convolution, step sizes, norms' weights and the mixers' dynamics stay as they
are. Keys and values have a scale a key/value head. Arithmetic is in m1.kernels.
"""

from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from m1.engine.merging import MergedMLP
from m1.engine.parts import Parts
from m1.kernels import (
    fp8_linear,
    fp8_linear_parts,
    quantize_fp8,
    rms_norm_fp8,
    rms_norm_fp8_of_parts,
    swiglu_fp8,
)
from m1.kernels.decode_linear import MAX_TOKENS
from m1.modeling.attention import RMSNorm
from m1.modeling.hybrid import HybridBlock, M1ForCausalLM
from m1.modeling.mamba1 import StepSizeProjection
from m1.modeling.state import ModelState, SequenceLayout

FP8 = torch.float8_e4m3fn
ALIGNMENT = 16  # of the sizes of a product
FIRST_CAPABILITY = (8, 9)  # GPUs before it multiply no 8-bit floating-point numbers
CALIBRATION_TOKENS = 512
HEADROOM = 2.0  # of the largest key or value seen, before numbers saturate


class QuantizedRows(NamedTuple):
    """x [T, K] as values [T, K] float8_e4m3fn times scale [T, 1] fp32."""

    values: Tensor
    scale: Tensor


class Fp8Linear(nn.Module):
    """x [T, in] -> [T, out], as `nn.Linear`, without gradient; x plain or quantized. `load` replaces the weight in place.

    leaves_parts: give `Parts` for few tokens.
    """

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.shape, self.bias = linear.weight.shape, linear.bias
        self.out_dtype, self.leaves_parts = linear.weight.dtype, False
        num_outputs, width = self.shape
        if width % ALIGNMENT:
            raise ValueError(f"quantization: fp8 needs layers whose inputs {ALIGNMENT} divides; one has {width} inputs")
        num_rows = -(-num_outputs // ALIGNMENT) * ALIGNMENT  # padded with zeros
        self.values = torch.zeros(num_rows, width, dtype=FP8, device=linear.weight.device)
        self.scale = torch.ones(num_rows, 1, device=linear.weight.device)
        self.load(linear.weight)

    @torch.no_grad()
    def load(self, weight: Tensor) -> None:
        """Take over `weight` [out, in] of any floating dtype, by way of the sampler's, as one made anew would."""
        values, scale = quantize_fp8(weight.to(self.values.device, self.out_dtype))
        self.values[: len(values)].copy_(values)
        self.scale[: len(scale)].copy_(scale)

    def forward(self, x: Tensor | QuantizedRows) -> Any:
        values, scale = x if isinstance(x, QuantizedRows) else quantize_fp8(x)
        num_outputs = self.shape[0]
        if len(self.values) == num_outputs:
            if self.leaves_parts and len(values) <= MAX_TOKENS:
                return Parts(fp8_linear_parts(values, scale, self.values, self.scale, self.bias))
            return fp8_linear(values, scale, self.values, self.scale, self.bias, self.out_dtype)
        y = fp8_linear(values, scale, self.values, self.scale, None, self.out_dtype)[:, :num_outputs]
        return y if self.bias is None else y + self.bias


class Fp8Norm(nn.Module):
    """`RMSNorm` whose output is quantized."""

    def __init__(self, norm: RMSNorm) -> None:
        super().__init__()
        self.weight, self.eps = norm.weight, norm.eps

    def forward(self, x: Tensor | Parts, residual: Tensor | None = None) -> Any:
        """x [T, D] -> QuantizedRows; with a residual, (those of x + residual, x + residual)."""
        if isinstance(x, Parts):
            assert residual is not None, "parts are of a branch"
            values, scale, total = rms_norm_fp8_of_parts(x.values, self.weight, self.eps, residual)
            return QuantizedRows(values, scale), total
        values, scale, *summed = rms_norm_fp8(x, self.weight, self.eps, residual)
        rows = QuantizedRows(values, scale)
        return (rows, *summed) if summed else rows


class Fp8MLP(nn.Module):
    """`MergedMLP` whose hidden numbers are quantized as they arise. Gives what down_proj gives."""

    def __init__(self, mlp: MergedMLP) -> None:
        super().__init__()
        self.gate_up_proj, self.down_proj = mlp.gate_up_proj, mlp.down_proj

    def forward(self, x: Tensor | QuantizedRows) -> Any:
        return self.down_proj(QuantizedRows(*swiglu_fp8(*self.gate_up_proj(x))))


def quantize_model(model: M1ForCausalLM) -> None:
    """Replace the linear layers of a model that nobody else uses, after `merge_projections`, and what feeds them, in place.

    Raises ValueError for a device or sizes that have no 8-bit product.
    """
    weight = model.model.embed_tokens.weight
    if weight.is_cuda and torch.cuda.get_device_capability(weight.device) < FIRST_CAPABILITY:
        name = torch.cuda.get_device_name(weight.device)
        raise ValueError(f"quantization: fp8 needs a GPU of compute capability 8.9 or later, {name} is older; leave it out")
    if weight.is_cuda and weight.dtype != torch.bfloat16:
        raise ValueError(f"quantization: on a GPU fp8 products give bfloat16, the model has {weight.dtype}; set dtype=bfloat16")
    _replace_linears(model)
    for block in cast("list[HybridBlock]", model.model.layers):
        for name in ("input_layernorm", "post_attention_layernorm"):
            setattr(block, name, Fp8Norm(getattr(block, name)))
        assert isinstance(block.mlp, MergedMLP)
        setattr(block, "mlp", Fp8MLP(block.mlp))  # noqa: B010  (of another class, on purpose)
    model.train(model.training)


def _replace_linears(module: nn.Module) -> None:
    """One by one, so that no weight is held twice for long."""
    for name, child in list(module.named_children()):
        if isinstance(child, nn.Linear) and not isinstance(child, StepSizeProjection):
            setattr(module, name, Fp8Linear(child))
        else:
            _replace_linears(child)


@torch.inference_mode()
def kv_scales(model: M1ForCausalLM, page_size: int = 64) -> tuple[Tensor, Tensor]:
    """Scales of 8-bit keys and values, [attention layers, G] fp32 each, from those of random tokens.

    Keys are large because of their projection's weights and biases more than because of the text; e4m3 keeps its three bits
    over five decades, so a scale that is off by some powers of two costs nothing until numbers saturate.
    """
    weight, config = model.model.embed_tokens.weight, model.config
    num_tokens = min(CALIBRATION_TOKENS, config.max_position_embeddings)
    num_pages = -(-num_tokens // page_size)
    state = ModelState(config, 1, num_pages, page_size=page_size, dtype=weight.dtype, device=weight.device)
    ids = torch.randint(0, config.vocab_size, (num_tokens,), generator=torch.Generator().manual_seed(0))
    tokens = torch.arange(num_tokens, device=weight.device)
    length = torch.full((1,), num_tokens, dtype=torch.int32, device=weight.device)
    layout = SequenceLayout(
        cu_seqlens=torch.nn.functional.pad(length, (1, 0)),
        positions=tokens,
        max_seqlen=num_tokens,
        slots=tokens[:1],
        context_lens=length,
        block_tables=torch.arange(num_pages, dtype=torch.int32, device=weight.device)[None],
        kv_slots=tokens,
    )
    model.model.forward_packed(model.model.embed_tokens(ids.to(weight.device)), layout, state)
    largest = [stack.float().abs().amax((1, 2, 4)) for stack in state.page_stacks]  # of [layers, pages, page_size, G, K]
    limit = torch.finfo(FP8).max
    keys, values = (torch.where(top > 0, HEADROOM * top / limit, torch.ones_like(top)) for top in largest)
    return keys, values
