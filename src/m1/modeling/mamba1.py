"""M1's grouped Mamba-1 mixer (arXiv 2504.10449 §3, arXiv 2408.15237 §2): a selective SSM that an attention layer can become.

V, K and Q of the attention layer become x, B and C. Heads have width `d_state`: C has d_inner / d_state of them, B and x
have d_xb / d_state, each shared by a group of C's as key/value heads are. Every channel has its own step size.
Legend: T flat tokens, H query-side heads, G key/value-side heads, P head width (= N), N d_state, K head_dim.
"""

import math

import torch
from torch import Tensor, nn
from transformers import initialization as init

from m1.kernels import apply_rotary, causal_conv1d, causal_conv1d_update, selective_scan, selective_state_update
from m1.modeling.attention import RMSNorm
from m1.modeling.configuration import M1Config
from m1.modeling.state import ModelState, SequenceLayout, conv_channels


def inverse_softplus(x: Tensor) -> Tensor:
    """The y with softplus(y) = x, for positive x."""
    return x + torch.log(-torch.expm1(-x))


class Mamba1Mixer(nn.Module):
    """One mixer layer. `in_proj` rows are ordered z (d_inner), x (d_xb), B (d_xb), C (d_inner), dt (dt_rank)."""

    def __init__(self, config: M1Config, layer: int) -> None:
        super().__init__()
        self.layer, self.config = layer, config
        self.num_heads = config.d_inner // config.d_state
        self.num_groups = config.d_xb // config.d_state
        self.is_repeated = config.repeat_kv_before_conv
        self.splits = [config.d_inner, config.d_xb, config.d_xb, config.d_inner, config.dt_rank]
        self.in_proj = nn.Linear(config.hidden_size, sum(self.splits), bias=config.mixer_bias)
        channels = conv_channels(config)
        self.conv1d = nn.Conv1d(channels, channels, config.d_conv, groups=channels, bias=True)
        self.dt_proj = nn.Linear(config.dt_rank, config.d_inner, bias=True)
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
        z, v, k, q, dt = self.in_proj(x).split(self.splits, dim=-1)
        v, k, q = self.split_heads(v, k, q, rotary)
        v = (v.repeat_interleave(self.num_heads // self.num_groups, dim=1) if self.is_repeated else v).flatten(1)
        heads = (self.num_heads, self.config.d_state)
        # The bias enters inside the scan, added once and in fp32, beside the softplus.
        dt = nn.functional.linear(dt, self.dt_proj.weight).unflatten(-1, heads)
        scan = {
            "D": self.D.float().view(heads),
            "z": z.unflatten(-1, heads),
            "dt_bias": self.dt_proj.bias.float().view(heads),
        }
        A = -self.A_log.float().exp().view(*heads, -1)
        return self.out_proj(self._scan(v, dt, A, k, q, scan, layout, state).flatten(1))

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
        x = apply_rotary(x, *rotary).unflatten(-1, (2, width // 2, -1)).unflatten(1, (self.config.num_key_value_heads, -1))
        x = x.permute(0, 1, 5, 2, 3, 4)  # from [T, group, member, half, pair, narrow head]
        return x.reshape(x.shape[0], -1, width)

    def _scan(
        self,
        v: Tensor,
        dt: Tensor,
        A: Tensor,
        B: Tensor,
        C: Tensor,
        scan: dict,
        layout: SequenceLayout,
        state: ModelState | None,
    ) -> Tensor:
        weight, bias = self.conv1d.weight.squeeze(1), self.conv1d.bias
        activation, width = self.config.conv_activation, self.config.d_state
        if state is None:
            v = causal_conv1d(v, weight, bias, activation=activation, cu_seqlens=layout.cu_seqlens)
            return selective_scan(v.unflatten(-1, (-1, width)), dt, A, B, C, **scan, cu_seqlens=layout.cu_seqlens)
        (windows, states), slots = state.of_mixer(self.layer), layout.slots
        if layout.is_decode:
            v = causal_conv1d_update(v, windows, weight, bias, activation=activation, slots=slots)
            return selective_state_update(states, v.unflatten(-1, (-1, width)), dt, A, B, C, **scan, slots=slots)
        v, window = causal_conv1d(
            v,
            weight,
            bias,
            activation=activation,
            cu_seqlens=layout.cu_seqlens,
            initial_state=windows[slots],
            output_final_state=True,
        )
        windows[slots] = window.to(windows.dtype)
        y, final = selective_scan(
            v.unflatten(-1, (-1, width)),
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
