"""`M1Config`: the shape of a hybrid model, and how the four base families map to it.

A config says for every layer whether it is attention or a linear mixer, and of which kind the mixers are. What a base
model's `config.json` says is translated by `M1Config.from_base`; a family or value that M1 can't represent is refused by
name, never approximated.
"""

import math
from collections.abc import Sequence
from dataclasses import field
from typing import Any, Literal

from transformers import PreTrainedConfig

FULL_ATTENTION = "full_attention"
SLIDING_ATTENTION = "sliding_attention"
LINEAR_ATTENTION = "linear_attention"  # transformers' name for any layer with a fixed-size state
LAYER_TYPES = (FULL_ATTENTION, SLIDING_ATTENTION, LINEAR_ATTENTION)

SUPPORTED_FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
SUPPORTED_ROPE_TYPES = ("default", "linear", "llama3", "yarn")
MIXERS = ("mamba1", "mamba2")


class M1Config(PreTrainedConfig):
    """Configuration of `M1ForCausalLM`. The Transformer's fields have transformers' names and meaning.

    The mixer's fields (Mamba's names; method of arXiv 2504.10449 and arXiv 2408.15237):
        layer_types: per layer "full_attention", "sliding_attention" or "linear_attention" (a mixer).
        mixer: "mamba1" (M1's grouped Mamba-1: heads of width `d_state`) or "mamba2" (heads of width head_dim).
        d_state: state entries a channel; 16 for mamba1; mamba2 has head_dim.
        d_conv: width of the causal convolution.
        dt_rank: rank of the step-size projection (mamba1); ceil(hidden_size / 16) unless given.
        conv_activation: "silu" as in M1, or None.
        repeat_kv_before_conv: mamba1: whether x is repeated to all query heads before the convolution.
        mixer_bias: whether `in_proj` has a bias (bases with QKV bias, or a gate that starts open).
        mixer_rope: whether B and C are rotated by their positions as q and k were.
        output_norm: mamba2: whether a gated RMSNorm a head stands before `out_proj`; otherwise the gate alone.
    """

    model_type = "m1"
    keys_to_ignore_at_inference = ["past_key_values"]  # noqa: RUF012  (transformers reads it as is)

    vocab_size: int = 32000
    hidden_size: int = 1024
    intermediate_size: int = 2816
    num_hidden_layers: int = 4
    num_attention_heads: int = 16
    num_key_value_heads: int = 0  # 0: as many as attention heads
    head_dim: int = 0  # 0: hidden_size / num_attention_heads
    hidden_act: str = "silu"
    max_position_embeddings: int = 4096
    initializer_range: float = 0.02
    rms_norm_eps: float = 1e-6
    use_cache: bool = True
    tie_word_embeddings: bool = False
    rope_parameters: dict | None = None
    sliding_window: int | None = None
    attention_bias: bool = False
    attention_output_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    base_model_type: str | None = None

    layer_types: list[str] = field(default_factory=list)  # none: full attention everywhere
    mixer: str = "mamba1"
    d_state: int = 0  # 0: 16 for mamba1, head_dim for mamba2
    d_conv: int = 4
    dt_rank: int = 0  # 0: ceil(hidden_size / 16)
    conv_activation: Literal["silu"] | None = "silu"
    repeat_kv_before_conv: bool = True
    mixer_bias: bool = False
    mixer_rope: bool = False
    output_norm: bool = True

    def __post_init__(self, **kwargs: Any) -> None:
        if not self.num_key_value_heads:
            self.num_key_value_heads = self.num_attention_heads
        if not self.head_dim:
            self.head_dim = self.hidden_size // self.num_attention_heads
        if not self.layer_types:
            self.layer_types = [FULL_ATTENTION] * self.num_hidden_layers
        if not self.d_state:
            self.d_state = 16 if self.mixer == "mamba1" else self.head_dim
        if not self.dt_rank:
            self.dt_rank = math.ceil(self.hidden_size / 16)
        super().__post_init__(**kwargs)
        self._validate()

    def _validate(self) -> None:
        """Refuse what the modules can't compute, naming the field."""
        if self.mixer not in MIXERS:
            raise ValueError(f"config.mixer: expected one of {MIXERS}, got {self.mixer!r}")
        if len(self.layer_types) != self.num_hidden_layers:
            raise ValueError(
                f"config.layer_types: expected {self.num_hidden_layers} entries, a layer each, got {len(self.layer_types)}"
            )
        for index, kind in enumerate(self.layer_types):
            if kind not in LAYER_TYPES:
                raise ValueError(f"config.layer_types[{index}]: expected one of {LAYER_TYPES}, got {kind!r}")
        if SLIDING_ATTENTION in self.layer_types and not self.sliding_window:
            raise ValueError("config.sliding_window: layer_types has 'sliding_attention', but no window is given")
        if self.hidden_act != "silu":
            raise ValueError(f"config.hidden_act: expected 'silu', got {self.hidden_act!r}")
        if self.conv_activation not in (None, "silu"):
            raise ValueError(f"config.conv_activation: expected 'silu' or null, got {self.conv_activation!r}")
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"config.num_key_value_heads: {self.num_key_value_heads} does not divide num_attention_heads "
                f"{self.num_attention_heads}"
            )
        has_mixers = bool(self.mixer_layers)  # a Transformer with a head size that no mixer has is still a model
        if has_mixers and self.mixer == "mamba1" and (self.head_dim % self.d_state or self.d_state % 2):
            raise ValueError(f"config.d_state: expected an even divisor of head_dim {self.head_dim}, got {self.d_state}")
        if has_mixers and self.mixer == "mamba2" and self.d_state != self.head_dim:
            raise ValueError(f"config.d_state: mamba2 needs d_state == head_dim {self.head_dim}, got {self.d_state}")
        if not 1 <= self.d_conv <= 4:
            raise ValueError(f"config.d_conv: expected 1 to 4, got {self.d_conv}")
        rope_type = (self.rope_parameters or {}).get("rope_type", "default")
        if rope_type not in SUPPORTED_ROPE_TYPES:
            raise ValueError(
                f"config.rope_parameters: rope_type {rope_type!r} is not supported; one of {SUPPORTED_ROPE_TYPES} is"
            )

    @property
    def d_inner(self) -> int:
        """Channels of the mixer on the query side, all query heads side by side (M1: equal to hidden_size)."""
        return self.num_attention_heads * self.head_dim

    @property
    def d_xb(self) -> int:
        """Channels of x and of B: all key/value heads side by side."""
        return self.num_key_value_heads * self.head_dim

    @property
    def attention_layers(self) -> list[int]:
        return [i for i, kind in enumerate(self.layer_types) if kind != LINEAR_ATTENTION]

    @property
    def mixer_layers(self) -> list[int]:
        return [i for i, kind in enumerate(self.layer_types) if kind == LINEAR_ATTENTION]

    @classmethod
    def from_base(cls, base: PreTrainedConfig, *, mixer_layers: Sequence[int] = (), **mixer_options: Any) -> "M1Config":
        """The M1 config of a base model in which the layers `mixer_layers` become mixers and all else stays as it is.

        `base` is a Llama, Mistral, Qwen2 or Qwen3 config (or an M1 config, whose fields are kept). Raises ValueError for any
        other family, and for a value that would change the model's outputs and that M1 does not implement.
        """
        if isinstance(base, cls):
            fields = {k: v for k, v in base.to_dict().items() if k in cls.__annotations__ or k in _GENERATION_FIELDS}
        else:
            fields = _fields_of_base(base)
        layer_types = list(fields.pop("layer_types"))
        for index in mixer_layers:
            if not 0 <= index < len(layer_types):
                raise ValueError(
                    f"mixer_layers: layer {index} does not exist; the model has layers 0 to {len(layer_types) - 1}"
                )
            layer_types[index] = LINEAR_ATTENTION
        return cls(layer_types=layer_types, **{**fields, **mixer_options})


_GENERATION_FIELDS = ("dtype", "architectures")
_COPIED_FIELDS = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "hidden_act",
    "max_position_embeddings",
    "initializer_range",
    "rms_norm_eps",
    "tie_word_embeddings",
    "pad_token_id",
    "bos_token_id",
    "eos_token_id",
)


def _fields_of_base(base: PreTrainedConfig) -> dict[str, Any]:
    """M1's fields of a base config of another library class. Source: transformers' models of the four families."""
    family = base.model_type
    if family not in SUPPORTED_FAMILIES:
        raise ValueError(f"model family {family!r} is not supported; M1 converts {', '.join(SUPPORTED_FAMILIES)}")
    if getattr(base, "attention_dropout", 0.0):
        raise ValueError(f"{family} config: attention_dropout {base.attention_dropout} is not supported, only 0.0")
    if getattr(base, "pretraining_tp", 1) != 1:
        raise ValueError(f"{family} config: pretraining_tp {base.pretraining_tp} is not supported, only 1")
    fields = {name: getattr(base, name) for name in _COPIED_FIELDS}
    fields["head_dim"] = getattr(base, "head_dim", None) or base.hidden_size // base.num_attention_heads
    has_bias = bool(getattr(base, "attention_bias", False)) if family in ("llama", "qwen3") else False
    rope = dict(base.rope_parameters or {})
    rope.setdefault("rope_type", "default")
    rope.setdefault("rope_theta", getattr(base, "default_theta", 10000.0))
    if rope.get("partial_rotary_factor", 1.0) != 1.0:
        raise ValueError(f"{family} config: partial_rotary_factor {rope['partial_rotary_factor']} is not supported, only 1.0")
    fields |= {
        "attention_bias": has_bias or family == "qwen2",
        "attention_output_bias": has_bias,
        "mlp_bias": bool(getattr(base, "mlp_bias", False)),
        "qk_norm": family == "qwen3",
        "rope_parameters": rope,
        "base_model_type": family,
    }
    fields |= _windows_of_base(base)
    return fields


def _windows_of_base(base: PreTrainedConfig) -> dict[str, Any]:
    """`sliding_window` and `layer_types` of a base config: Mistral slides in every layer, Qwen from a given layer on."""
    window = getattr(base, "sliding_window", None)
    if base.model_type == "llama" or not window:
        return {"sliding_window": None, "layer_types": [FULL_ATTENTION] * base.num_hidden_layers}
    if base.model_type == "mistral":
        return {"sliding_window": window, "layer_types": [SLIDING_ATTENTION] * base.num_hidden_layers}
    return {"sliding_window": window, "layer_types": list(base.layer_types)}
