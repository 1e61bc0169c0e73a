"""M1's grouped Mamba-1 mixer (arXiv 2504.10449 §3, arXiv 2408.15237 §2): a selective SSM that an attention layer can become.

V, K and Q of the attention layer become x, B and C. Heads have width `d_state`: C has d_inner / d_state of them, B and x
have d_xb / d_state, each shared by a group of C's as key/value heads are. Every channel has its own step size.
Legend: T flat tokens, H query-side heads, G key/value-side heads, P head width (= N), N d_state, K head_dim.
"""

import math
from typing import Any

import torch
from torch import Tensor, nn
from transformers import initialization as init

from m1.kernels import causal_conv1d, mamba1_step, rotary_state_heads, selective_scan
from m1.modeling.aligned_linear import AlignedLinear, split_rows
from m1.modeling.attention import RMSNorm
from m1.modeling.configuration import M1Config
from m1.modeling.state import ModelState, SequenceLayout


def inverse_softplus(x: Tensor) -> Tensor:
    """The y with softplus(y) = x, for positive x."""
    return x + torch.log(-torch.expm1(-x))


class StepSizeProjection(nn.Linear):
    """The product of a linear layer; its bias enters inside the scan, added once and in fp32, beside the softplus."""

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.weight)


class Mamba1Mixer(nn.Module):
    """One mixer layer. `in_proj` rows are ordered z (d_inner), x (d_xb), B (d_xb), C (d_inner), dt (dt_rank)."""

    def __init__(self, config: M1Config, layer: int) -> None:
        super().__init__()
        self.layer, self.config = layer, config
        self.num_heads = config.d_inner // config.d_state
        self.num_groups = config.d_xb // config.d_state
        self.splits = [config.d_inner, config.d_xb, config.d_xb, config.d_inner, config.dt_rank]
        self.in_proj = AlignedLinear(config.hidden_size, sum(self.splits), bias=config.mixer_bias, alignment=8)
        channels = config.d_inner if config.repeat_kv_before_conv else config.d_xb
        self.conv1d = nn.Conv1d(channels, channels, config.d_conv, groups=channels, bias=True)
        self.dt_proj = StepSizeProjection(config.dt_rank, config.d_inner, bias=True)
        self.A_log = nn.Parameter(torch.empty(config.d_inner, config.d_state))
        self.D = nn.Parameter(torch.empty(config.d_inner))
        self.out_proj = nn.Linear(config.d_inner, config.hidden_size, bias=config.attention_output_bias)
        self.q_norm = RMSNorm(config.head_dim, config.rms_norm_eps) if config.qk_norm else nn.Identity()
        self.k_norm = RMSNorm(config.head_dim, config.rms_norm_eps) if config.qk_norm else nn.Identity()
        self.reset_dynamics()

    @torch.no_grad()
    def reset_dynamics(self, dt_min: float = 1e-3, dt_max: float = 0.1) -> None:
        """Fresh convolution, A, D and step sizes: A = -(1..d_state), D = 1, log-uniform steps (arXiv 2312.00752 §3.6).

        Goes through transformers' `init`, which leaves weights alone that `from_pretrained` has just loaded.
        """
        init.uniform_(self.conv1d.weight, -(self.config.d_conv**-0.5), self.config.d_conv**-0.5)
        assert self.conv1d.bias is not None
        init.zeros_(self.conv1d.bias)
        init.copy_(self.A_log, torch.arange(1, self.config.d_state + 1, dtype=torch.float32).log().expand_as(self.A_log))
        init.ones_(self.D)
        init.uniform_(self.dt_proj.weight, -(self.config.dt_rank**-0.5), self.config.dt_rank**-0.5)
        steps = torch.empty_like(self.dt_proj.bias).uniform_(math.log(dt_min), math.log(dt_max)).exp().clamp_min(1e-4)
        init.copy_(self.dt_proj.bias, inverse_softplus(steps))

    def forward(
        self, x: Tensor, layout: SequenceLayout, rotary: tuple[Tensor, Tensor], state: ModelState | None = None
    ) -> Tensor:
        """x [T, hidden] -> [T, hidden]. With a state, it goes on from `layout.slots` and leaves the new states there."""
        z, v, k, q, dt = split_rows(self.in_proj(x), self.splits)
        v, k, q = self.split_heads(v, k, q, rotary)
        heads = (self.num_heads, self.config.d_state)
        dt = self.dt_proj(dt).unflatten(-1, heads)
        z = z.unflatten(-1, heads)
        y = self._step(z, v, k, q, dt, layout, state) if layout.is_decode else self._scan(z, v, k, q, dt, layout, state)
        return self.out_proj(y.flatten(1))

    def split_heads(self, v: Tensor, k: Tensor, q: Tensor, rotary: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """Rows x, B, C of `in_proj`, [T, d_xb], [T, d_xb], [T, d_inner] -> [T, G, P], [T, G, N], [T, H, N], normed, rotated."""
        k, q = (t.unflatten(-1, (-1, self.config.head_dim)) for t in (k, q))
        k, q = self._state_heads(self.k_norm(k), rotary), self._state_heads(self.q_norm(q), rotary)
        return v.unflatten(-1, (self.num_groups, -1)), k, q

    def _state_heads(self, x: Tensor, rotary: tuple[Tensor, Tensor]) -> Tensor:
        """[T, heads, K] -> [T, heads * K / N, N], rotated if `mixer_rope`.

        Rotation pairs dimension i with i + K/2. So that each narrow head holds whole pairs, of frequencies spread over the
        spectrum, it takes every (K/N)-th pair: its inner product then depends on the distance alone, as attention's does.
        That holds only where B and C took the same pairs. The scan gives narrow head n of C the group n // (H/G), so rotated
        heads stand in the order (key/value head, narrow head, query head of the group). M1's own order, kept where nothing is
        rotated, is (query head, narrow head), which mixes different parts of q and k.
        """
        width = self.config.d_state
        if not self.config.mixer_rope:
            return x.reshape(x.shape[0], -1, width)
        return rotary_state_heads(x, *rotary, num_groups=self.config.num_key_value_heads, width=width)

    def _dynamics(self) -> tuple[Tensor, dict[str, Any]]:
        """The logarithm of the rates A [H, P, N], and D and the bias of the step size [H, P]; fp32."""
        heads = (self.num_heads, self.config.d_state)
        skip_and_bias = {"D": self.D.float().view(heads), "dt_bias": self.dt_proj.bias.float().view(heads)}
        return self.A_log.float().view(*heads, -1), skip_and_bias

    def _step(
        self, z: Tensor, x: Tensor, B: Tensor, C: Tensor, dt: Tensor, layout: SequenceLayout, state: ModelState | None
    ) -> Tensor:
        """One token a sequence, its states advanced in place: y [n, H, P]."""
        assert state is not None, "a layout of decoding sequences has a state"
        weight, bias = self.conv1d.weight.squeeze(1), self.conv1d.bias
        A_log, dynamics = self._dynamics()
        return mamba1_step(
            *state.of_mixer(self.layer),
            z,
            x,
            B,
            C,
            dt,
            weight,
            bias,
            A_log,
            **dynamics,
            conv_activation=self.config.conv_activation,
            slots=layout.slots,
        )

    def _scan(
        self, z: Tensor, x: Tensor, B: Tensor, C: Tensor, dt: Tensor, layout: SequenceLayout, state: ModelState | None
    ) -> Tensor:
        """Whole documents, or chunks of sequences with a state: y [T, H, P]."""
        width, slots = self.config.d_state, layout.slots
        convolution: dict[str, Any] = {
            "activation": self.config.conv_activation,
            "head_width": width,
            "cu_seqlens": layout.cu_seqlens,
        }
        weight, bias = self.conv1d.weight.squeeze(1), self.conv1d.bias
        A_log, dynamics = self._dynamics()
        scan = {**dynamics, "z": z, "cu_seqlens": layout.cu_seqlens}
        if state is None:
            x = causal_conv1d(x.flatten(1), weight, bias, **convolution).unflatten(-1, (-1, width))
            return selective_scan(x, dt, -A_log.exp(), B, C, **scan)
        windows, states = state.of_mixer(self.layer)
        x, window = causal_conv1d(
            x.flatten(1), weight, bias, **convolution, initial_state=windows[slots], output_final_state=True
        )
        windows[slots] = window.to(windows.dtype)
        y, final = selective_scan(
            x.unflatten(-1, (-1, width)),
            dt,
            -A_log.exp(),
            B,
            C,
            **scan,
            initial_state=states[slots].float(),
            output_final_state=True,
        )
        states[slots] = final.to(states.dtype)
        return y
