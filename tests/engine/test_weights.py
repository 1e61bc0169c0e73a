"""Sampling from a model that is being trained: shared weights, a copy in another dtype, modes, sleep."""

import copy

import pytest
import torch

from m1.engine import SamplingParams, few_tokens, parts
from m1.engine.merging import MergedAttention, MergedMLP
from m1.engine.packing import PackedLinear, can_pack
from m1.engine.weights import sampling_copy
from m1.modeling import M1ForCausalLM
from tests.engine.models import FULL, LINEAR, random_prompts, tiny_engine, tiny_model
from tests.numerics import FP8_QUANTIZED, REL_RMS, rel_rms

PROMPTS = random_prompts((3, 9, 20))
GREEDY = SamplingParams(temperature=0, max_tokens=10)


def tokens_of(model: M1ForCausalLM, **options: object) -> list[list[int]]:
    return [c.token_ids for (c,) in tiny_engine(model, **options).generate(PROMPTS, GREEDY)]


def train(model: M1ForCausalLM) -> None:
    """Change every weight in place, as an optimizer does."""
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.2 * parameter.abs().mean() * torch.randn(parameter.shape, generator=generator)


def test_a_shared_model_is_sampled_as_it_is_now():
    """Also its prefixes: a state of the old weights must not be found again."""
    model = tiny_model()
    engine = tiny_engine(model)
    before = [c.token_ids for (c,) in engine.generate(PROMPTS, GREEDY)]
    train(model)
    engine.update_weights()
    after = [c.token_ids for (c,) in engine.generate(PROMPTS, GREEDY)]
    assert after == tokens_of(model)
    assert after != before


def test_running_sequences_are_recomputed_with_new_weights():
    model = tiny_model()
    engine = tiny_engine(model)
    request = engine.submit(PROMPTS[1], SamplingParams(temperature=0, max_tokens=10, ignore_eos=True))
    for _ in range(5):
        engine.step()
    train(model)
    engine.update_weights()
    old = engine.scheduler.waiting[0].generated
    assert len(old) == 4  # the first step prefilled
    while not request.is_finished:
        engine.step()
    tokens = request.completions[0].token_ids
    assert tokens[: len(old)] == old
    params = SamplingParams(temperature=0, max_tokens=10 - len(old), ignore_eos=True)
    assert tokens[len(old) :] == tiny_engine(model).generate([PROMPTS[1] + old], params)[0][0].token_ids


@pytest.mark.parametrize("variant", ["mamba1", "mamba2", "dense"])
def test_a_bf16_copy_follows_its_source(variant):
    model = tiny_model(variant)
    engine = tiny_engine(model, dtype=torch.bfloat16)
    before = [c.token_ids for (c,) in engine.generate(PROMPTS, GREEDY)]
    assert before == tokens_of(model, dtype=torch.bfloat16)
    train(model)
    assert [c.token_ids for (c,) in engine.generate(PROMPTS, GREEDY)] == before
    engine.update_weights()
    after = [c.token_ids for (c,) in engine.generate(PROMPTS, GREEDY)]
    assert after == tokens_of(model, dtype=torch.bfloat16)
    assert after != before
    assert model.model.embed_tokens.weight.dtype == torch.float32


def test_a_copy_takes_named_parameters_and_refuses_others():
    model, other = tiny_model(), tiny_model()
    train(other)
    engine = tiny_engine(model, dtype=torch.bfloat16)
    engine.update_weights(other.named_parameters())
    assert [c.token_ids for (c,) in engine.generate(PROMPTS, GREEDY)] == tokens_of(other, dtype=torch.bfloat16)
    with pytest.raises(ValueError, match="no parameter 'x'"):
        engine.update_weights([("x", torch.ones(1))])
    with pytest.raises(ValueError, match="shape"):
        engine.update_weights([("lm_head.weight", torch.ones(1))])
    with pytest.raises(ValueError, match="were not given"):
        engine.update_weights(list(other.named_parameters())[:-1])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_merged_projections_are_the_plain_ones(dtype):
    """Also with biases, and after new weights: each part is found under the name that it has in a plain model."""
    model = tiny_model(mlp_bias=True, attention_bias=True)
    engine = tiny_engine(model, dtype=dtype)
    assert isinstance(engine.model.model.layers[0].mlp, MergedMLP)
    assert isinstance(engine.model.model.layers[1].self_attn, MergedAttention)
    for _ in range(2):
        plain = copy.deepcopy(model).to(dtype)
        x = torch.randn(5, 32, generator=torch.Generator().manual_seed(1)).to(dtype)
        with torch.no_grad():
            for mine, other in zip(engine.model.model.layers, plain.model.layers, strict=True):
                assert rel_rms(mine.mlp(x), other.mlp(x)) < REL_RMS[dtype]
                if not mine.is_mixer:
                    for part, own in zip(mine.self_attn.project(x), other.self_attn.project(x), strict=True):
                        assert rel_rms(part, own) < REL_RMS[dtype]
        train(model)
        with torch.no_grad():
            assert rel_rms(mine.mlp(x), copy.deepcopy(model).to(dtype).model.layers[-1].mlp(x)) > REL_RMS[dtype]
        engine.update_weights()


@pytest.mark.parametrize("most_tokens", [0, 3, 128])
def test_streamed_products_are_the_plain_ones(most_tokens, monkeypatch):
    """Below, at and above the number of tokens where the kernel takes over; new weights go to the same places."""
    for name, value in (
        ("MOST_TOKENS", most_tokens),
        ("MOST_TOKENS_IF_WIDE", most_tokens),
        ("LEAST_WEIGHTS", 0),
        ("ALIGNMENT", 1),
    ):
        monkeypatch.setattr(few_tokens, name, value)
    model = tiny_model(mlp_bias=True, attention_bias=True)
    engine = tiny_engine(model, dtype=torch.float64)
    few_tokens.stream_linears(engine.model)
    parts.leave_parts(engine.model)
    mixer = engine.model.model.layers[0].mixer
    assert isinstance(mixer.in_proj, few_tokens.StreamedLinear)
    assert isinstance(mixer.dt_proj, few_tokens.StreamedLinear)
    with torch.no_grad():
        assert isinstance(mixer.out_proj(torch.ones(2, mixer.out_proj.in_features).double()), parts.Parts) == (most_tokens > 1)
    assert [c.token_ids for (c,) in engine.generate(PROMPTS, GREEDY)] == tokens_of(model)
    train(model)
    engine.update_weights()
    assert [c.token_ids for (c,) in engine.generate(PROMPTS, GREEDY)] == tokens_of(model)


def test_tied_weights_stay_tied_in_a_copy():
    model = tiny_model(tie_word_embeddings=True)
    engine = tiny_engine(model, dtype=torch.bfloat16)
    train(model)
    engine.update_weights()
    with torch.no_grad():
        units = torch.eye(32, dtype=torch.bfloat16)
        assert torch.equal(engine.model.lm_head(units), model.lm_head.weight.bfloat16().T)
        assert torch.equal(engine.model.model.embed_tokens.weight, model.lm_head.weight.bfloat16())


def test_the_dynamics_of_a_copy_stay_exact():
    model = tiny_model()
    layer = tiny_engine(model, dtype=torch.bfloat16).model.model.layers[0]
    assert torch.equal(layer.mixer.A_log, model.model.layers[0].mixer.A_log)
    assert layer.input_layernorm.weight.dtype == torch.bfloat16


@pytest.mark.parametrize("checkpointing", [False, True])
def test_sampling_leaves_a_training_model_as_it_is(checkpointing):
    """In the middle of a backward pass: modes, gradients and the graph survive, and the tokens are the usual ones."""
    model = tiny_model()
    expected = tokens_of(model)
    if checkpointing:
        model.gradient_checkpointing_enable()
    model.train()
    model.model.layers[1].eval()
    modes = [module.training for module in model.modules()]
    ids = torch.tensor([PROMPTS[2]])
    loss = model(ids, labels=ids, use_cache=False).loss
    engine = tiny_engine(model)
    assert [c.token_ids for (c,) in engine.generate(PROMPTS, GREEDY)] == expected
    loss.backward()
    assert [module.training for module in model.modules()] == modes
    assert all(parameter.requires_grad and parameter.grad is not None for parameter in model.parameters())
    model(ids, labels=ids, use_cache=False).loss.backward()


def test_sleep_frees_states_and_waking_goes_on():
    engine = tiny_engine(tiny_model())
    params = SamplingParams(temperature=0, max_tokens=10, ignore_eos=True)
    expected = engine.generate(PROMPTS, params)
    requests = [engine.submit(prompt, params) for prompt in PROMPTS]
    for _ in range(4):
        engine.step()
    engine.sleep()
    assert engine.runner.state is None
    engine.wake()
    while engine.has_work:
        engine.step()
    assert [[r.completions[0].token_ids] for r in requests] == [[c.token_ids for c in row] for row in expected]


@pytest.mark.skipif(not can_pack(torch.ones(1, dtype=torch.bfloat16)), reason="this CPU multiplies no packed bf16 weights")
@pytest.mark.parametrize("rows", [1, 7, 64, 300])
def test_a_packed_linear_is_a_linear(rows):
    torch.manual_seed(0)
    linear = torch.nn.Linear(48, 80).bfloat16()
    packed = PackedLinear(linear)
    x = torch.randn(rows, 48).bfloat16()
    with torch.no_grad():
        assert rel_rms(packed(x), linear(x)) < REL_RMS[torch.bfloat16]
        other = torch.nn.Linear(48, 80)
        packed.load(other.weight)
        expected = torch.nn.functional.linear(x, other.weight.bfloat16(), linear.bias)
        assert rel_rms(packed(x), expected) < REL_RMS[torch.bfloat16]


def test_weights_of_the_engines_own_are_packed_and_shared_ones_are_not():
    model = tiny_model().bfloat16()
    assert isinstance(tiny_engine(model).model.lm_head, torch.nn.Linear)
    copied = tiny_engine(tiny_model().train(), dtype=torch.bfloat16).model
    assert isinstance(copied.lm_head, PackedLinear) == can_pack(copied.model.embed_tokens.weight)
    assert not copied.training
    assert isinstance(tiny_model().lm_head, torch.nn.Linear)


@pytest.mark.gpu
@pytest.mark.parametrize("is_quantized", [False, True])
def test_products_of_few_tokens_at_model_sizes(is_quantized: bool) -> None:
    """Layers of M1-3B's sizes: a prompt's first tokens get alone, by products that stream and leave parts, what they get among
    more tokens, by those that do neither."""
    sizes = {
        "hidden_size": 3072,
        "intermediate_size": 8192,
        "num_attention_heads": 24,
        "num_key_value_heads": 8,
        "head_dim": 128,
    }
    kinds = {"num_hidden_layers": 2, "layer_types": [LINEAR, FULL], "initializer_range": 0.02, "max_position_embeddings": 256}
    with torch.device("cuda"):
        model = sampling_copy(tiny_model(**sizes, **kinds), torch.bfloat16, is_quantized)
        ids = torch.randint(0, 256, (1, 200))
        x = torch.randn(128, 3072, dtype=torch.bfloat16)
    with torch.no_grad():
        assert isinstance(model.model.layers[0].mlp(x), parts.Parts)
        expected = model.model(ids, use_cache=False).last_hidden_state
        for num_tokens in (1, 32, 33, 100, 128):
            found = model.model(ids[:, :num_tokens], use_cache=False).last_hidden_state
            # Numbers that differ in their last bits are rounded to other ones of eight bits, layer after layer.
            tolerance = 4 * FP8_QUANTIZED if is_quantized else REL_RMS[torch.bfloat16]
            assert rel_rms(found, expected[:, :num_tokens]) < tolerance, num_tokens
