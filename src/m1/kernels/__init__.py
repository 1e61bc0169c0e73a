"""The public ops: one folder each, holding the checked entry point, the torch reference and the Triton kernel.

Shapes everywhere: T flat packed tokens, n sequences, S state slots, H query-side heads, G key/value-side heads (head h
reads group h // (H/G)), P width of a head of x, N d_state, W convolution width, K attention head_dim, D channels.
Nothing here imports another part of m1.
"""

from m1.kernels.activation import swiglu
from m1.kernels.attention import paged_attention, rope_write_kv, varlen_attention, write_kv
from m1.kernels.causal_conv1d import causal_conv1d, causal_conv1d_update
from m1.kernels.divergence import divergence_
from m1.kernels.fp8 import (
    fp8_linear,
    fp8_linear_parts,
    quantize_fp8,
    rms_norm_fp8,
    rms_norm_fp8_of_parts,
    swiglu_fp8,
)
from m1.kernels.log_probs import log_prob_gradient_, token_log_probs
from m1.kernels.mamba1_step import mamba1_step
from m1.kernels.mamba2_step import mamba2_step
from m1.kernels.norm import gated_rms_norm, rms_norm, rms_norm_of_parts
from m1.kernels.rope import apply_rotary, rotary_state_heads
from m1.kernels.sampling import sample
from m1.kernels.selective_scan import selective_scan, selective_state_update
from m1.kernels.ssd import ssd_scan, ssd_state_update

__all__ = [
    "apply_rotary",
    "causal_conv1d",
    "causal_conv1d_update",
    "divergence_",
    "fp8_linear",
    "fp8_linear_parts",
    "gated_rms_norm",
    "log_prob_gradient_",
    "mamba1_step",
    "mamba2_step",
    "paged_attention",
    "quantize_fp8",
    "rms_norm",
    "rms_norm_fp8",
    "rms_norm_fp8_of_parts",
    "rms_norm_of_parts",
    "rope_write_kv",
    "rotary_state_heads",
    "sample",
    "selective_scan",
    "selective_state_update",
    "ssd_scan",
    "ssd_state_update",
    "swiglu",
    "swiglu_fp8",
    "token_log_probs",
    "varlen_attention",
    "write_kv",
]
