"""Which weight of an attention layer becomes which weight of a mixer: pure maps from tensors to tensors.

Nothing here runs a model or knows about files. The correspondence is M1's (arXiv 2504.10449 §3.1, arXiv 2408.15237 §2):
v -> x, k -> B, q -> C, o -> out_proj; what attention has no counterpart for (gate, step sizes, convolution, A, D) comes from
a fresh mixer. Legend: H query heads, G key/value heads, K head_dim, N d_state, R = K / N narrow heads a head (mamba1).
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from m1.modeling import M1Config

_LAYER = "model.layers.{}.{}."


def in_proj_slices(config: M1Config) -> dict[str, slice]:
    """Where z, x, B, C and dt stand in the rows of a mixer's `in_proj`."""
    num_steps = config.dt_rank if config.mixer == "mamba1" else config.num_attention_heads
    slices, start = {}, 0
    for name, rows in zip(("z", "x", "B", "C", "dt"), (config.d_inner, config.d_xb, config.d_xb, config.d_inner, num_steps)):
        slices[name] = slice(start, start + rows)
        start += rows
    return slices


def output_order(config: M1Config) -> Tensor:
    """For each channel that a mixer hands to `out_proj` the channel of attention's output that it stands for; [d_inner] int64.

    The identity, except for mamba1 with rotated heads: those stand in the order (key/value head, narrow head, query head of
    the group), so that C meets the same dimensions of B and of x as q met of k and v (`Mamba1Mixer._state_heads`).
    """
    channels = torch.arange(config.d_inner)
    if config.mixer != "mamba1" or not config.mixer_rope:
        return channels
    groups, width = config.num_key_value_heads, config.d_state
    members, narrow = config.num_attention_heads // groups, config.head_dim // width
    return channels.view(groups, members, narrow, width).transpose(1, 2).flatten()


def attention_to_mixer(attention: Mapping[str, Tensor], fresh: Mapping[str, Tensor], config: M1Config) -> dict[str, Tensor]:
    """The state dict of a mixer that starts from an attention layer.

    Args:
        attention: `q_proj.weight` … `o_proj.weight`, with biases and `q_norm`, `k_norm` where the base has them.
        fresh: the state dict of a newly initialised mixer of `config`; what attention does not give is taken from here.
    Returns:
        new tensors under the mixer's names. Rows of z and dt of `in_proj.bias` are zero where the base has a bias.
    Raises:
        ValueError: if attention has a bias and `config.mixer_bias` is false, which would drop it.
    """
    if "q_proj.bias" in attention and not config.mixer_bias:
        raise ValueError("config.mixer_bias: expected true, because the base's q, k and v have biases")
    rows = in_proj_slices(config)
    state = {name: tensor.clone() for name, tensor in fresh.items()}
    for source, target in {"v_proj": "x", "k_proj": "B", "q_proj": "C"}.items():
        state["in_proj.weight"][rows[target]] = attention[f"{source}.weight"].to(state["in_proj.weight"].dtype)
    if config.mixer_bias:
        bias = torch.zeros_like(state["in_proj.bias"])
        for source, target in {"v_proj": "x", "k_proj": "B", "q_proj": "C"}.items():
            if f"{source}.bias" in attention:
                bias[rows[target]] = attention[f"{source}.bias"].to(bias.dtype)
        state["in_proj.bias"] = bias
    order = output_order(config).to(attention["o_proj.weight"].device)
    state["out_proj.weight"] = attention["o_proj.weight"][:, order].to(state["out_proj.weight"].dtype)
    for source, target in {
        "o_proj.bias": "out_proj.bias",
        "q_norm.weight": "q_norm.weight",
        "k_norm.weight": "k_norm.weight",
    }.items():
        if source in attention:
            state[target] = attention[source].clone().to(state[target].dtype)
    return state


def layer_weights(state: Mapping[str, Tensor], layer: int, module: str) -> dict[str, Tensor]:
    """The weights of `module` ("self_attn" or "mixer") of one layer, under their names inside it."""
    prefix = _LAYER.format(layer, module)
    return {name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)}


def hybrid_weights(base: Mapping[str, Tensor], mixers: Mapping[int, Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """The hybrid's state dict: the base's under the same names, but the attention of the layers in `mixers` replaced."""
    dropped = tuple(_LAYER.format(layer, "self_attn") for layer in mixers)
    state = {name: tensor for name, tensor in base.items() if not name.startswith(dropped)}
    for layer, weights in mixers.items():
        state |= {_LAYER.format(layer, "mixer") + name: tensor for name, tensor in weights.items()}
    return state
