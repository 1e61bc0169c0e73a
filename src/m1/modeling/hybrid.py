"""The hybrid model: blocks of attention or mixer with a SwiGLU MLP, and `M1ForCausalLM`, a transformers citizen.

`forward_packed` is the model: a flat token axis, a `SequenceLayout`, maybe a `ModelState`. The training loop and the engine
call it; `M1ForCausalLM.forward` translates transformers' padded batches and packed keys into it and back.
Legend: B batch rows, L padded length, T flat real tokens.
"""

from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import GenerationMixin, PreTrainedModel
from transformers import initialization as init
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast

from m1.kernels import swiglu
from m1.modeling.attention import Attention, RMSNorm
from m1.modeling.configuration import LINEAR_ATTENTION, M1Config
from m1.modeling.generation_cache import M1Cache
from m1.modeling.mamba1 import Mamba1Mixer
from m1.modeling.mamba2 import Mamba2Mixer
from m1.modeling.padding import flatten_batch
from m1.modeling.rotary import RotaryEmbedding
from m1.modeling.state import ModelState, SequenceLayout

MIXER_CLASSES: dict[str, type[nn.Module]] = {"mamba1": Mamba1Mixer, "mamba2": Mamba2Mixer}


class MLP(nn.Module):
    """SwiGLU feed-forward, weights named as in the base model (arXiv 2002.05202)."""

    def __init__(self, config: M1Config) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=config.mlp_bias)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=config.mlp_bias)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=config.mlp_bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(swiglu(self.gate_proj(x), self.up_proj(x)))


class HybridBlock(GradientCheckpointingLayer):
    """One layer. Its token mixer is `self_attn` (attention) or `mixer` (Mamba); everything else is the base model's."""

    def __init__(self, config: M1Config, layer: int) -> None:
        super().__init__()
        self.is_mixer = config.layer_types[layer] == LINEAR_ATTENTION
        if self.is_mixer:
            self.mixer = MIXER_CLASSES[config.mixer](config, layer)
        else:
            self.self_attn = Attention(config, layer)
        self.mlp = MLP(config)
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    @property
    def token_mixer(self) -> nn.Module:
        """The module that moves information between tokens: what alignment compares with the teacher's attention."""
        return self.mixer if self.is_mixer else self.self_attn

    def forward(
        self,
        x: Tensor,
        branch: Tensor | None,
        layout: SequenceLayout,
        rotary: tuple[Tensor, Tensor],
        state: ModelState | None = None,
    ) -> tuple[Tensor, Tensor]:
        """x [T, hidden] and `branch`, what the layer before has yet to add to it -> the same two for the next layer.

        So every addition is in the launch of the norm that follows it.
        """
        normed, x = (self.input_layernorm(x), x) if branch is None else self.input_layernorm(branch, x)
        mixed = self.token_mixer(normed, layout, rotary, state)
        normed, x = self.post_attention_layernorm(mixed.to(x.dtype), x)
        return x, self.mlp(normed).to(x.dtype)


class M1PreTrainedModel(PreTrainedModel):
    config: M1Config
    config_class = M1Config
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["HybridBlock"]  # noqa: RUF012  (transformers reads it as is)
    _supports_sdpa = True
    _is_stateful = True

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, (Mamba1Mixer, Mamba2Mixer)):
            module.reset_dynamics()
        elif isinstance(module, RMSNorm):
            init.ones_(module.weight)


class M1Model(M1PreTrainedModel):
    """The hybrid without its language-model head."""

    def __init__(self, config: M1Config) -> None:
        super().__init__(config)
        # No padding_idx: it would keep the pad token, often the end token, from being learnt.
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(HybridBlock(config, layer) for layer in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.rotary = RotaryEmbedding(config)
        self.post_init()

    def forward_packed(self, hidden: Tensor, layout: SequenceLayout, state: ModelState | None = None) -> Tensor:
        """Embedded tokens [T, hidden] -> final normalised hidden states [T, hidden]. `state` is read and written in place."""
        rotary = layout.rotary or self.rotary(layout.positions)
        branch = None
        for block in self.layers:
            hidden, branch = block(hidden, branch, layout, rotary, state)
        assert branch is not None, "a model has layers"
        return self.norm(branch, hidden)[0]

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: M1Cache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        cu_seq_lens_q: Tensor | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """Padded or packed batch [B, L] -> hidden states [B, L, hidden], zeros at padding. See `M1ForCausalLM.forward`."""
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("expected exactly one of input_ids and inputs_embeds")
        if past_key_values is not None and not isinstance(past_key_values, M1Cache):
            raise ValueError(
                f"past_key_values: expected an M1Cache, or None to start one, got {type(past_key_values).__name__}"
            )
        embedded = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        batch, length = embedded.shape[:2]
        wants_cache = self.config.use_cache and not self.training if use_cache is None else use_cache
        num_seen = past_key_values.num_seen if past_key_values is not None else 0
        flat = flatten_batch(batch, length, embedded.device, attention_mask, position_ids, cu_seq_lens_q, num_seen)
        is_packed = flat.layout.num_sequences != batch or cu_seq_lens_q is not None
        if is_packed and (use_cache or past_key_values is not None):
            raise ValueError("packed documents can't be cached: pass use_cache=False and no past_key_values")
        if wants_cache and not is_packed and past_key_values is None:
            past_key_values = M1Cache(self.config, batch, embedded.dtype, embedded.device)

        hidden = embedded.flatten(0, 1)
        hidden = hidden if flat.is_dense else hidden[flat.token_index]
        if past_key_values is None:
            hidden = self.forward_packed(hidden, flat.layout)
        else:
            hidden = self.forward_packed(hidden, past_key_values.extend(flat.layout, length), past_key_values.state)
        if not flat.is_dense:
            hidden = hidden.new_zeros(batch * length, hidden.shape[-1]).index_copy(0, flat.token_index, hidden)
        return BaseModelOutputWithPast(
            last_hidden_state=cast(torch.FloatTensor, hidden.view(batch, length, -1)),
            past_key_values=past_key_values if wants_cache else None,
        )


class M1ForCausalLM(M1PreTrainedModel, GenerationMixin):
    """A hybrid language model: `generate()`, `save_pretrained`, the Auto classes and stock trainers work with it."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012  (transformers reads it as is)

    def __init__(self, config: M1Config) -> None:
        super().__init__(config)
        self.model = M1Model(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        """`generate` leaves the cache to forward, which makes an `M1Cache`."""
        return False

    def packed_states(self, input_ids: Tensor, layout: SequenceLayout) -> Tensor:
        """Flat tokens [T] -> final normalised hidden states [T, hidden]: what training puts a loss on. No cache.

        Under autocast the states between the layers have its type too, as those of a model in that type (a teacher, a sampler).
        """
        hidden, device = self.model.embed_tokens(input_ids), input_ids.device.type
        if torch.is_autocast_enabled(device):
            hidden = hidden.to(torch.get_autocast_dtype(device))
        return self.model.forward_packed(hidden, layout)

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: M1Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        cu_seq_lens_q: Tensor | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Logits [B, L, vocab] (the last `logits_to_keep` positions only, when given) of padded or packed batches.

        attention_mask [B, L] (with a cache: [B, cached + L]) marks real tokens, wherever the padding is. Packing: one row of
        documents side by side, told apart by `position_ids` [1, L] that start again, or by `cu_seq_lens_q` [n+1]; other keys
        of padding-free collators (`max_length_q`, `seq_idx`, …) are accepted and not needed. Raises ValueError for 4-D masks,
        rows without a token, and foreign caches.
        """
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            cu_seq_lens_q=cu_seq_lens_q,
        )
        keep = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(outputs.last_hidden_state[:, keep, :])
        loss = None
        if labels is not None:
            wanted = {k: v for k, v in kwargs.items() if k in ("num_items_in_batch", "shift_labels")}
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **wanted)
        return CausalLMOutputWithPast(loss=loss, logits=logits, past_key_values=outputs.past_key_values)


def count_parameters(config: M1Config) -> int:
    """Parameters of the model of this config, tied ones once, without making it."""
    with torch.device("meta"):
        model = M1ForCausalLM(config)
    return sum(parameter.numel() for parameter in model.parameters())
