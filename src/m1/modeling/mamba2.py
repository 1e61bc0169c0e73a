"""The Mamba-2 mixer (arXiv 2405.21060; as a converted attention layer: arXiv 2408.15237): one decay a head, a larger state.

Heads are the attention layer's query heads and d_state = head_dim, so that the whole product of q and k is kept. x, B and C
pass the causal convolution before x and B are shared by their group of heads.
Legend: T flat tokens, H query heads, G key/value heads, P head width, N d_state; here P = N = head_dim.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import initialization as init

from m1.kernels import (
    apply_rotary,
    causal_conv1d,
    causal_conv1d_update,
    gated_rms_norm,
    mamba2_step,
    ssd_scan,
    ssd_state_update,
)
from m1.modeling.aligned_linear import AlignedLinear, split_rows
from m1.modeling.attention import RMSNorm
from m1.modeling.configuration import M1Config
from m1.modeling.mamba1 import inverse_softplus
from m1.modeling.state import ModelState, SequenceLayout, conv_channels


class Mamba2Mixer(nn.Module):
    """One mixer layer. `in_proj` rows are ordered z (d_inner), x (d_xb), B (d_xb), C (d_inner), dt (heads)."""

    def __init__(self, config: M1Config, layer: int) -> None:
        super().__init__()
        self.layer, self.config = layer, config
        self.num_heads = config.num_attention_heads
        self.splits = [config.d_inner, config.d_xb, config.d_xb, config.d_inner, self.num_heads]
        self.in_proj = AlignedLinear(config.hidden_size, sum(self.splits), bias=config.mixer_bias, alignment=16)
        channels = conv_channels(config)
        self.conv1d = nn.Conv1d(channels, channels, config.d_conv, groups=channels, bias=True)
        self.dt_bias = nn.Parameter(torch.empty(self.num_heads))
        self.A_log = nn.Parameter(torch.empty(self.num_heads))
        self.D = nn.Parameter(torch.empty(self.num_heads))
        self.norm = RMSNorm(config.d_inner, config.rms_norm_eps) if config.output_norm else None
        self.out_proj = nn.Linear(config.d_inner, config.hidden_size, bias=config.attention_output_bias)
        self.q_norm = RMSNorm(config.head_dim, config.rms_norm_eps) if config.qk_norm else nn.Identity()
        self.k_norm = RMSNorm(config.head_dim, config.rms_norm_eps) if config.qk_norm else nn.Identity()
        self.reset_dynamics()

    @torch.no_grad()
    def reset_dynamics(self, dt_min: float = 1e-3, dt_max: float = 0.1) -> None:
        """Fresh convolution, A ~ U(1, 16), D = 1, log-uniform step sizes (the defaults of Mamba-2's published code).

        Goes through transformers' `init`, which leaves weights alone that `from_pretrained` has just loaded.
        """
        init.uniform_(self.conv1d.weight, -(self.config.d_conv**-0.5), self.config.d_conv**-0.5)
        assert self.conv1d.bias is not None
        init.zeros_(self.conv1d.bias)
        init.copy_(self.A_log, torch.empty_like(self.A_log).uniform_(1, 16).log())
        init.ones_(self.D)
        steps = torch.empty_like(self.dt_bias).uniform_(math.log(dt_min), math.log(dt_max)).exp().clamp_min(1e-4)
        init.copy_(self.dt_bias, inverse_softplus(steps))

    def forward(
        self, x: Tensor, layout: SequenceLayout, rotary: tuple[Tensor, Tensor], state: ModelState | None = None
    ) -> Tensor:
        """x [T, hidden] -> [T, hidden]. With a state, it goes on from `layout.slots` and leaves the new states there."""
        config = self.config
        z, vkq, dt = self._project(x)
        z = z.unflatten(-1, (-1, config.head_dim))
        if state is not None and layout.is_decode and not (config.mixer_rope or config.qk_norm):
            return self.out_proj(self._step(z, vkq, dt, layout, state).flatten(1))
        vkq = self._convolve(vkq, layout, state)
        v, k, q = vkq.split(self.splits[1:4], dim=-1)
        v, k, q = self.split_heads(v, k, q, rotary)
        y = self._scan(v, dt, k, q, layout, state)  # [T, H, P]
        if self.norm is not None:
            return self.out_proj(gated_rms_norm(y, z, self.norm.weight, self.norm.eps).flatten(1))
        return self.out_proj((y * nn.functional.silu(z)).flatten(1))

    def _project(self, x: Tensor) -> Sequence[Tensor]:
        """z [T, d_inner], convolution's channels [T, 2·d_xb + d_inner], dt [T, H]: views of one projection."""
        return split_rows(self.in_proj(x), [self.splits[0], sum(self.splits[1:4]), self.num_heads])

    def split_heads(self, v: Tensor, k: Tensor, q: Tensor, rotary: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """Convolved x, B, C, [T, d_xb], [T, d_xb], [T, d_inner] -> [T, G, P], [T, G, N], [T, H, N], normed and rotated."""
        v, k, q = (t.unflatten(-1, (-1, self.config.head_dim)) for t in (v, k, q))
        k, q = self.k_norm(k), self.q_norm(q)
        if self.config.mixer_rope:
            k, q = apply_rotary(k, *rotary), apply_rotary(q, *rotary)
        return v, k, q

    def _convolve(self, vkq: Tensor, layout: SequenceLayout, state: ModelState | None) -> Tensor:
        weight, bias, activation = self.conv1d.weight.squeeze(1), self.conv1d.bias, self.config.conv_activation
        if state is None:
            return causal_conv1d(vkq, weight, bias, activation=activation, cu_seqlens=layout.cu_seqlens)
        windows, slots = state.of_mixer(self.layer)[0], layout.slots
        if layout.is_decode:
            return causal_conv1d_update(vkq, windows, weight, bias, activation=activation, slots=slots)
        vkq, window = causal_conv1d(
            vkq,
            weight,
            bias,
            activation=activation,
            cu_seqlens=layout.cu_seqlens,
            initial_state=windows[slots],
            output_final_state=True,
        )
        windows[slots] = window.to(windows.dtype)
        return vkq

    def _step(self, z: Tensor, vkq: Tensor, dt: Tensor, layout: SequenceLayout, state: ModelState) -> Tensor:
        """One token a sequence where nothing stands between convolution and scan: gated, normed outputs [n, H, P]."""
        return mamba2_step(
            *state.of_mixer(self.layer),
            z,
            vkq,
            dt,
            self.conv1d.weight.squeeze(1),
            self.conv1d.bias,
            self.A_log,
            D=self.D,
            dt_bias=self.dt_bias,
            conv_activation=self.config.conv_activation,
            norm_weight=None if self.norm is None else self.norm.weight,
            norm_eps=0.0 if self.norm is None else self.norm.eps,
            slots=layout.slots,
        )

    def _dynamics(self) -> tuple[Tensor, dict[str, Any]]:
        """A, and the scan's other parameters, in fp32."""
        return -self.A_log.float().exp(), {"D": self.D.float(), "dt_bias": self.dt_bias.float()}

    def _scan(self, v: Tensor, dt: Tensor, B: Tensor, C: Tensor, layout: SequenceLayout, state: ModelState | None) -> Tensor:
        A, scan = self._dynamics()
        if state is None:
            return ssd_scan(v, dt, A, B, C, **scan, cu_seqlens=layout.cu_seqlens)
        states, slots = state.of_mixer(self.layer)[1], layout.slots
        if layout.is_decode:
            return ssd_state_update(states, v, dt, A, B, C, **scan, slots=slots)
        y, final = ssd_scan(
            v,
            dt,
            A,
            B,
            C,
            **scan,
            cu_seqlens=layout.cu_seqlens,
            initial_state=states[slots].float(),
            output_final_state=True,
        )
        states[slots] = final.to(states.dtype)
        return y
