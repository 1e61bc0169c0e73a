"""How a flat batch of tokens divides into sequences, and where each sequence's state lives.

`SequenceLayout` travels beside the hidden states through every module, as an argument, never through a global. `ModelState`
holds tensors only: which slot or page belongs to whom is decided by its owner (the engine's cache, or `M1Cache` for
`generate`). Legend: T flat tokens, n sequences, S slots, H query heads, G key/value heads, K head_dim, P mixer head
width, N d_state, W d_conv.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from m1.modeling.configuration import LINEAR_ATTENTION, M1Config


@dataclass(frozen=True)
class SequenceLayout:
    """Sequences of one flat batch, and (when cached) where their state is.

    cu_seqlens [n+1] int32: sequence i is tokens cu_seqlens[i]:cu_seqlens[i+1]; no sequence is empty.
    positions [T] int64: position of each token in its own sequence (for RoPE), cached tokens counted.
    max_seqlen: the longest sequence of this batch, new tokens only (host integer: no device read is needed).
    slots [n] int64: rows of the fixed-size states. None without a cache.
    context_lens [n] int32: tokens of each sequence once this batch's are written, cached ones included.
    block_tables [n, max_pages] int32: pages of each sequence, in order.
    kv_slots [T] int64: where each token's key and value go: page * page_size + offset; negative writes nothing.
    has_context: whether any sequence has cached tokens from before this batch.
    rotary: cos and sin of the positions, [T, head_dim] fp32 each, where they are known already.
    """

    cu_seqlens: Tensor
    positions: Tensor
    max_seqlen: int
    slots: Tensor | None = None
    context_lens: Tensor | None = None
    block_tables: Tensor | None = None
    kv_slots: Tensor | None = None
    has_context: bool = False
    rotary: tuple[Tensor, Tensor] | None = None

    @property
    def num_sequences(self) -> int:
        return self.cu_seqlens.shape[0] - 1

    @property
    def num_tokens(self) -> int:
        return self.positions.shape[0]

    @property
    def is_decode(self) -> bool:
        """Every sequence has exactly one new token, and a state to go on from."""
        return self.max_seqlen == 1 and self.has_context and self.num_sequences == self.num_tokens

    @classmethod
    def from_lengths(cls, lengths: list[int], device: torch.device | str = "cpu") -> "SequenceLayout":
        """Sequences of the given lengths side by side, each from position 0."""
        if not lengths or min(lengths) < 1:
            raise ValueError(f"lengths: expected at least one, all positive, got {lengths}")
        counts = torch.tensor(lengths, device=device)
        return cls.from_cu_seqlens(torch.nn.functional.pad(counts.cumsum(0), (1, 0)).to(torch.int32), max(lengths))

    @classmethod
    def from_cu_seqlens(cls, cu_seqlens: Tensor, max_seqlen: int | None = None) -> "SequenceLayout":
        """From cumulative lengths [n+1]; reads `max_seqlen` from the device when it is not given."""
        lengths = cu_seqlens.diff()
        if max_seqlen is None:
            max_seqlen = int(lengths.max())
        num_tokens = int(cu_seqlens[-1])
        starts = cu_seqlens[:-1].repeat_interleave(lengths, output_size=num_tokens)
        positions = torch.arange(num_tokens, device=cu_seqlens.device) - starts
        return cls(cu_seqlens.to(torch.int32), positions, max_seqlen)

    @classmethod
    def from_starts(cls, starts: Tensor, positions: Tensor | None = None) -> "SequenceLayout":
        """From a flag a token [T] bool that is true where a sequence begins. `positions` [T] override 0, 1, 2…"""
        bounds = torch.cat([starts.nonzero().flatten(), starts.new_tensor([starts.shape[0]], dtype=torch.long)])
        layout = cls.from_cu_seqlens(bounds.to(torch.int32))
        if positions is None:
            return layout
        return cls(layout.cu_seqlens, positions, layout.max_seqlen)


def ssm_state_shape(config: M1Config) -> tuple[int, int, int]:
    """(H, P, N) of one mixer layer's state: mamba1 has heads of width d_state, mamba2 heads of width head_dim."""
    width = config.d_state if config.mixer == "mamba1" else config.head_dim
    return config.d_inner // width, width, config.d_state


def conv_channels(config: M1Config) -> int:
    """Channels that enter a mixer's causal convolution: x alone for mamba1, before it is repeated; x, B and C for mamba2."""
    return config.d_xb if config.mixer == "mamba1" else 2 * config.d_xb + config.d_inner


class ModelState:
    """Per-layer state of many sequences: convolution windows and SSM states by slot, keys and values by page.

    conv_states[layer] [S, D, W-1] in `dtype`, ssm_states[layer] [S, H, P, N] in `state_dtype`; None for attention layers.
    key_pages[layer], value_pages[layer] [pages, page_size, G, K] in `kv_dtype` (`dtype` unless given); None for mixer layers.
    key_scale, value_scale [attention layers, G] fp32: what 8-bit pages are multiplied by (ones until set); None otherwise.
    A slot must be `reset` before a new sequence starts in it; pages need no reset.
    """

    def __init__(
        self,
        config: M1Config,
        num_slots: int,
        num_pages: int,
        *,
        page_size: int = 64,
        dtype: torch.dtype = torch.float32,
        state_dtype: torch.dtype = torch.float32,
        kv_dtype: torch.dtype | None = None,
        device: torch.device | str = "cpu",
    ) -> None:
        self.config, self.page_size = config, page_size
        page = (num_pages, page_size, config.num_key_value_heads, config.head_dim)
        window = (num_slots, config.d_conv - 1, conv_channels(config))  # a step reads it as W-1 rows of channels
        num_mixers, num_attention = len(config.mixer_layers), len(config.attention_layers)
        windows = torch.zeros(num_mixers, *window, dtype=dtype, device=device)
        states = torch.zeros(num_mixers, num_slots, *ssm_state_shape(config), dtype=state_dtype, device=device)
        keys, values = (torch.zeros(num_attention, *page, dtype=kv_dtype or dtype, device=device) for _ in range(2))
        # All layers in one tensor, [layers, S or pages, …], so that a slot or page is moved by one launch, not one a layer.
        self.slot_stacks, self.page_stacks = [windows, states], [keys, values]
        self.key_scale = self.value_scale = None
        if keys.element_size() == 1:
            self.page_stacks = [keys.view(torch.uint8), values.view(torch.uint8)]  # which every way of copying knows
            self.key_scale, self.value_scale = (torch.ones(num_attention, page[2], device=device) for _ in range(2))
        self.conv_states = self._by_layer(windows.mT, is_mixer=True)
        self.ssm_states = self._by_layer(states, is_mixer=True)
        self.key_pages = self._by_layer(keys, is_mixer=False)
        self.value_pages = self._by_layer(values, is_mixer=False)

    def _by_layer(self, stack: Tensor, is_mixer: bool) -> list[Tensor | None]:
        places = iter(range(len(stack)))
        return [stack[next(places)] if (kind == LINEAR_ATTENTION) is is_mixer else None for kind in self.config.layer_types]

    def forget_stacks(self) -> None:
        """For an owner that replaces layers' tensors: keep no memory of the first ones. Slots and pages can't be moved then."""
        self.slot_stacks, self.page_stacks = [], []

    @staticmethod
    def bytes_per_slot(config: M1Config, dtype: torch.dtype, state_dtype: torch.dtype = torch.float32) -> int:
        """Bytes of one sequence's fixed-size state over all mixer layers."""
        heads, width, entries = ssm_state_shape(config)
        window = conv_channels(config) * (config.d_conv - 1) * dtype.itemsize
        return len(config.mixer_layers) * (window + heads * width * entries * state_dtype.itemsize)

    @staticmethod
    def bytes_per_page(config: M1Config, page_size: int, dtype: torch.dtype) -> int:
        """Bytes of one page of keys and values over all attention layers."""
        return len(config.attention_layers) * 2 * page_size * config.num_key_value_heads * config.head_dim * dtype.itemsize

    def of_mixer(self, layer: int) -> tuple[Tensor, Tensor]:
        """(convolution windows, SSM states) of a mixer layer, all slots."""
        windows, states = self.conv_states[layer], self.ssm_states[layer]
        assert windows is not None and states is not None, f"layer {layer} is attention"
        return windows, states

    def of_attention(self, layer: int) -> tuple[Tensor, Tensor]:
        """(key pages, value pages) of an attention layer."""
        keys, values = self.key_pages[layer], self.value_pages[layer]
        assert keys is not None and values is not None, f"layer {layer} is a mixer"
        return keys, values

    def kv_scales(self, layer: int) -> dict[str, Tensor]:
        """k_scale and v_scale of an attention layer's pages, as the kernels take them; empty where they hold plain numbers."""
        if self.key_scale is None or self.value_scale is None:
            return {}
        index = self.config.attention_layers.index(layer)
        return {"k_scale": self.key_scale[index], "v_scale": self.value_scale[index]}

    def reset_slots(self, slots: Tensor) -> None:
        """Zero the states of `slots` [m] int64, before new sequences start there."""
        for stack in self.slot_stacks:
            stack.index_fill_(1, slots, 0)

    def copy_slots(self, source: Tensor, target: Tensor) -> None:
        """Copy the fixed-size states of slots `source` [m] to slots `target` [m]; the sets must not overlap."""
        for stack in self.slot_stacks:
            stack.index_copy_(1, target, stack.index_select(1, source))

    def copy_pages(self, source: Tensor, target: Tensor) -> None:
        """Copy whole pages `source` [m] to pages `target` [m]; the sets must not overlap."""
        for stack in self.page_stacks:
            stack.index_copy_(1, target, stack.index_select(1, source))
