"""The hybrid model through every door: padded, packed, cached, saved, checkpointed. All must agree with the plain forward."""

import pytest
import torch
from transformers import AutoModelForCausalLM, DynamicCache

from m1.modeling import M1Config, M1ForCausalLM, SequenceLayout
from tests.numerics import CACHED_EQUALS_PLAIN, PACKED_EQUALS_ALONE

LINEAR, FULL, SLIDING = "linear_attention", "full_attention", "sliding_attention"
VARIANTS = {
    "mamba1": {"mixer": "mamba1"},
    "mamba1-late-repeat": {"mixer": "mamba1", "repeat_kv_before_conv": False},
    "mamba1-rope": {"mixer": "mamba1", "mixer_rope": True, "conv_activation": None, "mixer_bias": True},
    "mamba2": {"mixer": "mamba2"},
    "mamba2-rope": {"mixer": "mamba2", "mixer_rope": True, "output_norm": False},
    "mamba1-only": {"mixer": "mamba1", "layer_types": [LINEAR] * 3},
    "mamba2-sliding": {"mixer": "mamba2", "layer_types": [LINEAR, SLIDING, FULL], "sliding_window": 5},
    "qk-norm": {"mixer": "mamba1", "qk_norm": True, "head_dim": 32},
}


def tiny_model(**options) -> M1ForCausalLM:
    torch.manual_seed(0)
    fields = {
        "vocab_size": 97,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "layer_types": [LINEAR, FULL, LINEAR],
        "initializer_range": 0.2,  # large enough that a leak or a wrong state shows in the logits
        "eos_token_id": 1,
        "pad_token_id": 0,
    }
    return M1ForCausalLM(M1Config(**{**fields, **options})).eval()


@pytest.fixture(params=VARIANTS, ids=VARIANTS)
def model(request) -> M1ForCausalLM:
    return tiny_model(**VARIANTS[request.param])


@pytest.fixture
def texts() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(2, 97, (length,), generator=generator) for length in (7, 1, 19, 12)]


def alone(model: M1ForCausalLM, text: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model(text[None], use_cache=False).logits[0]


def padded(texts: list[torch.Tensor], side: str) -> tuple[torch.Tensor, torch.Tensor]:
    width = max(map(len, texts))
    ids, mask = torch.zeros(len(texts), width, dtype=torch.long), torch.zeros(len(texts), width, dtype=torch.long)
    for row, text in enumerate(texts):
        where = slice(width - len(text), width) if side == "left" else slice(0, len(text))
        ids[row, where], mask[row, where] = text, 1
    return ids, mask


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("use_cache", [False, True])
def test_padding_changes_nothing(model, texts, side, use_cache):
    ids, mask = padded(texts, side)
    with torch.no_grad():
        logits = model(ids, attention_mask=mask, use_cache=use_cache).logits
    for row, text in enumerate(texts):
        torch.testing.assert_close(logits[row][mask[row].bool()], alone(model, text), atol=PACKED_EQUALS_ALONE, rtol=0)


@pytest.mark.parametrize("how", ["position_ids", "cu_seq_lens_q", "layout"])
def test_packed_equals_alone(model, texts, how):
    lengths = [len(text) for text in texts]
    flat = torch.cat(texts)
    with torch.no_grad():
        if how == "position_ids":
            positions = torch.cat([torch.arange(n) for n in lengths])[None]
            logits = model(flat[None], position_ids=positions).logits[0]  # use_cache left at its default on purpose
        elif how == "cu_seq_lens_q":
            bounds = torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], dtype=torch.int32)
            logits = model(flat[None], cu_seq_lens_q=bounds, cu_seq_lens_k=bounds, max_length_q=max(lengths)).logits[0]
        else:
            hidden = model.model.forward_packed(model.model.embed_tokens(flat), SequenceLayout.from_lengths(lengths))
            logits = model.lm_head(hidden)
    for part, text in zip(logits.split(lengths), texts, strict=True):
        torch.testing.assert_close(part, alone(model, text), atol=PACKED_EQUALS_ALONE, rtol=0)


def test_an_earlier_document_gets_no_gradient_from_a_later_one(model, texts):
    flat = torch.cat(texts)
    embedded = model.model.embed_tokens(flat).detach().requires_grad_()
    hidden = model.model.forward_packed(embedded, SequenceLayout.from_lengths([len(t) for t in texts]))
    hidden[len(texts[0]) + len(texts[1]) :].square().sum().backward()
    assert embedded.grad[: len(texts[0]) + len(texts[1])].abs().max() == 0
    assert embedded.grad[len(texts[0]) + len(texts[1]) :].abs().max() > 0


def test_cached_steps_equal_the_plain_forward(model, texts):
    """Prefill of left-padded rows, then a chunk of three tokens, then single tokens."""
    total = [torch.cat([text, torch.arange(2, 8)]) for text in texts]
    ids, mask = padded(texts, "left")
    with torch.no_grad():
        outputs = [model(ids, attention_mask=mask, use_cache=True)]
        for new in (torch.arange(2, 5), torch.tensor([5]), torch.tensor([6]), torch.tensor([7])):
            mask = torch.cat([mask, torch.ones(len(texts), len(new), dtype=torch.long)], dim=1)
            cache = outputs[-1].past_key_values
            outputs.append(model(new.expand(len(texts), -1), attention_mask=mask, past_key_values=cache, use_cache=True))
    got = torch.cat([output.logits for output in outputs[1:]], dim=1)
    for row, text in enumerate(total):
        torch.testing.assert_close(got[row], alone(model, text)[-6:], atol=CACHED_EQUALS_PLAIN, rtol=0)


@pytest.mark.parametrize(
    "how", [{}, {"num_beams": 3}, {"num_beams": 2, "num_return_sequences": 2}], ids=["greedy", "beams", "two-beams"]
)
def test_generate_with_a_cache_equals_generate_without(model, texts, how):
    ids, mask = padded(texts, "left")
    results = [
        model.generate(ids, attention_mask=mask, max_new_tokens=9, do_sample=False, use_cache=use_cache, **how)
        for use_cache in (True, False)
    ]
    assert torch.equal(*results)


def test_sampling_with_a_cache_equals_sampling_without(model, texts):
    ids, mask = padded(texts, "left")
    results = []
    for use_cache in (True, False):
        torch.manual_seed(3)
        results.append(model.generate(ids, attention_mask=mask, max_new_tokens=9, do_sample=True, top_k=0, use_cache=use_cache))
    assert torch.equal(*results)


def test_generation_goes_past_a_page(texts):
    """64 tokens fill the cache's first page; growth must keep what is there."""
    model = tiny_model()
    results = [
        model.generate(texts[2][None], max_new_tokens=60, min_new_tokens=60, do_sample=False, use_cache=use_cache)
        for use_cache in (True, False)
    ]
    assert results[0].shape[1] == len(texts[2]) + 60
    assert torch.equal(*results)


def test_save_and_load(model, texts, tmp_path):
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    assert isinstance(loaded, M1ForCausalLM)
    assert loaded.config.layer_types == model.config.layer_types
    for (name, before), (_, after) in zip(model.named_parameters(), loaded.named_parameters(), strict=True):
        assert torch.equal(before, after), name
    assert torch.equal(alone(loaded, texts[0]), alone(model, texts[0]))


def test_tied_embeddings_stay_tied(texts, tmp_path):
    model = tiny_model(tie_word_embeddings=True)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    assert torch.equal(alone(loaded, texts[0]), alone(model, texts[0]))


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_gradient_checkpointing_gives_the_same_gradients(model, texts, use_reentrant):
    ids, mask = padded(texts, "right")
    gradients = []
    for checkpointing in (False, True):
        model.train()
        if checkpointing:
            enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
            enable({"use_reentrant": use_reentrant})
            model.enable_input_require_grads()
        model.zero_grad()
        labels = ids.masked_fill(mask == 0, -100)
        model(ids, attention_mask=mask, labels=labels).loss.backward()
        gradients.append({name: p.grad.clone() for name, p in model.named_parameters()})
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, atol=1e-6, rtol=1e-4, msg=name)


def test_the_pad_token_learns():
    """transformers' padding_idx would leave that embedding row without gradient; with pad == eos the end is never learnt."""
    model = tiny_model(pad_token_id=5, eos_token_id=5)
    ids = torch.tensor([[3, 5, 4]])
    model(ids, labels=ids).loss.backward()
    assert model.model.embed_tokens.weight.grad[5].abs().max() > 0


class TestBadInput:
    def test_foreign_cache(self):
        with pytest.raises(ValueError, match=r"past_key_values.*M1Cache.*DynamicCache"):
            tiny_model()(torch.tensor([[2, 3]]), past_key_values=DynamicCache())

    def test_row_without_tokens(self):
        with pytest.raises(ValueError, match="row has no token"):
            tiny_model()(torch.tensor([[2, 3], [2, 3]]), attention_mask=torch.tensor([[1, 1], [0, 0]]))

    def test_four_dimensional_mask(self):
        with pytest.raises(ValueError, match="attention_mask: expected"):
            tiny_model()(torch.tensor([[2, 3]]), attention_mask=torch.ones(1, 1, 2, 2))

    def test_caching_packed_documents(self):
        with pytest.raises(ValueError, match="packed documents can't be cached"):
            tiny_model()(torch.tensor([[2, 3, 4]]), position_ids=torch.tensor([[0, 1, 0]]), use_cache=True)

    def test_cu_seq_lens_of_another_batch(self):
        with pytest.raises(ValueError, match="cu_seq_lens_q: ends at 4, but the row has 3"):
            tiny_model()(torch.tensor([[2, 3, 4]]), cu_seq_lens_q=torch.tensor([0, 4]))

    @pytest.mark.parametrize(
        ("field", "value"),
        [
            ("mixer", "mamba3"),
            ("layer_types", [FULL]),
            ("layer_types", [FULL, FULL, "chunked_attention"]),
            ("hidden_act", "gelu"),
            ("conv_activation", "gelu"),
            ("num_key_value_heads", 3),
            ("d_state", 5),
            ("d_conv", 9),
            ("rope_parameters", {"rope_type": "longrope", "rope_theta": 1e4}),
        ],
    )
    def test_config_value(self, field, value):
        with pytest.raises(ValueError, match=field):
            tiny_model(**{field: value})
