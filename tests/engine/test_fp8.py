"""Sampling with 8-bit weights and caches: each replaced part against the plain one, and the engine with both."""

import pytest
import torch

from m1.engine import SamplingParams
from m1.engine.fp8 import FP8, Fp8Linear, Fp8MLP, Fp8Norm, QuantizedRows, kv_scales
from m1.engine.packing import PackedLinear
from m1.engine.parts import Parts, leave_parts
from m1.kernels import quantize_fp8
from m1.modeling import M1ForCausalLM
from m1.modeling.state import ModelState
from tests.engine.models import random_prompts, tiny_engine, tiny_model
from tests.engine.test_weights import train
from tests.numerics import FP8_QUANTIZED, rel_rms

PROMPTS = random_prompts((3, 9, 20))
GREEDY = SamplingParams(temperature=0, max_tokens=10, ignore_eos=True)
PRODUCT = 2 * FP8_QUANTIZED  # both factors are rounded


def tokens_of(model: M1ForCausalLM, **options: object) -> list[list[int]]:
    return [c.token_ids for (c,) in tiny_engine(model, **options).generate(PROMPTS, GREEDY)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("num_outputs", "has_bias"), [(48, False), (48, True), (45, False), (45, True)])
def test_a_linear_layer(num_outputs: int, has_bias: bool, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    linear = torch.nn.Linear(64, num_outputs, bias=has_bias).to(dtype)
    quantized = Fp8Linear(linear)
    x = torch.randn(7, 64).to(dtype)
    with torch.no_grad():
        y = quantized(x)
        assert y.dtype == dtype
        assert y.shape == (7, num_outputs)
        assert rel_rms(y, linear(x)) < PRODUCT
        other = torch.nn.Linear(64, num_outputs)
        place = quantized.values.data_ptr()
        quantized.load(other.weight)
        assert quantized.values.data_ptr() == place  # a captured graph reads it there
        assert rel_rms(quantized(x), torch.nn.functional.linear(x, other.weight.to(dtype), linear.bias)) < PRODUCT
    with pytest.raises(ValueError, match=r"quantization: .*40 inputs"):
        Fp8Linear(torch.nn.Linear(40, 16))


def test_norms_and_mlps_are_close_and_hand_on_quantized_rows() -> None:
    model = tiny_model(mlp_bias=True)
    block, plain = tiny_engine(model, quantization="fp8").model.model.layers[0], model.model.layers[0]
    assert isinstance(block.input_layernorm, Fp8Norm)
    assert isinstance(block.mlp, Fp8MLP)
    x, residual = torch.randn(2, 5, 32)
    with torch.no_grad():
        rows, summed = block.input_layernorm(x, residual)
        expected, expected_sum = plain.input_layernorm(x, residual)
        assert isinstance(rows, QuantizedRows)
        assert torch.equal(summed, expected_sum)
        assert rel_rms(rows.values.float() * rows.scale, expected) < FP8_QUANTIZED
        assert rel_rms(block.mlp(rows), plain.mlp(expected)) < 2 * PRODUCT


@pytest.mark.parametrize("variant", ["mamba1", "dense"])
def test_parts_are_added_up_in_norms(variant: str) -> None:
    """What a GPU does for few tokens, with the references: as close to the plain model, and new weights arrive."""
    model = tiny_model(variant, initializer_range=0.1, mlp_bias=True)
    engine = tiny_engine(model, quantization="fp8")
    leave_parts(engine.model)
    for _ in range(2):
        with torch.no_grad():
            rows = QuantizedRows(*quantize_fp8(torch.randn(3, 32)))
            assert isinstance(engine.model.model.layers[0].mlp(rows), Parts)
        assert 1e-4 < rel_rms(hidden_states(engine.model), hidden_states(model)) < 3 * PRODUCT
        train(model)
        engine.update_weights()


def hidden_states(model: M1ForCausalLM) -> torch.Tensor:
    with torch.no_grad():
        return model.model(torch.tensor([PROMPTS[2]]), use_cache=False).last_hidden_state.float()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("variant", ["mamba1", "mamba2", "dense"])
def test_a_quantized_model_is_nearly_the_model(variant: str, dtype: torch.dtype) -> None:
    """Also after new weights; and every product is of 8 bits."""
    model = tiny_model(variant, initializer_range=0.1)
    engine = tiny_engine(model, quantization="fp8", dtype=dtype)
    kinds = {type(module) for name, module in engine.model.named_modules() if not name.endswith("dt_proj")}
    assert Fp8Linear in kinds
    assert not kinds & {torch.nn.Linear, PackedLinear}
    for _ in range(2):
        assert 1e-4 < rel_rms(hidden_states(engine.model), hidden_states(model)) < 3 * PRODUCT
        train(model)
        assert rel_rms(hidden_states(engine.model), hidden_states(model)) > 4 * PRODUCT
        engine.update_weights()
        fresh = tiny_engine(model, quantization="fp8", dtype=dtype)
        assert torch.equal(hidden_states(engine.model), hidden_states(fresh.model))
    assert any(type(module) is torch.nn.Linear for module in model.modules())  # the trainer's is left alone


@pytest.mark.parametrize("variant", ["mamba1", "mamba2", "dense"])
def test_sampling_with_both(variant: str) -> None:
    """The log-probability of a prompt's next token, states in 16 and keys and values in 8 bits, against the plain engine's."""
    model = tiny_model(variant, initializer_range=0.1)
    params = SamplingParams(temperature=0, max_tokens=1, ignore_eos=True)
    options = {"quantization": "fp8", "kv_cache_dtype": "fp8", "state_dtype": torch.bfloat16}
    found, plain = (tiny_engine(model, **more).generate(PROMPTS, params) for more in (options, {}))
    pairs = [(mine, other) for (mine,), (other,) in zip(found, plain, strict=True) if mine.token_ids == other.token_ids]
    assert len(pairs) >= 2
    differences = [abs(mine.logprobs[0] - other.logprobs[0]) for mine, other in pairs]
    assert all(0 < difference < 4 * PRODUCT for difference in differences), differences  # of logits of about 1


def test_pages_take_half_the_memory_and_scales_fit_what_they_hold() -> None:
    model = tiny_model("dense").bfloat16()
    engine = tiny_engine(model, kv_cache_dtype="fp8", num_pages=40)
    state = engine.runner.state
    assert state is not None
    assert state.key_pages[0].dtype == state.value_pages[2].dtype == FP8
    engine.generate(PROMPTS, GREEDY)
    keys, values = kv_scales(model)
    assert torch.equal(state.key_scale, keys)
    assert keys.shape == values.shape == (3, 2)
    for pages, scale in ((state.key_pages, keys), (state.value_pages, values)):
        for layer, own in enumerate(scale):
            held = pages[layer].float().abs().amax((0, 1, 3))  # of each head, over pages, rows and columns
            assert (held < 448).all()
            assert (held * own > 0.1 * 448 * own).all(), "the range is hardly used"
    assert ModelState.bytes_per_page(model.config, 4, FP8) * 2 == ModelState.bytes_per_page(model.config, 4, torch.bfloat16)


@pytest.mark.parametrize("variant", ["mamba1", "dense"])
def test_fp8_keys_and_values_are_copied_with_their_pages(variant: str) -> None:
    """Forked samples and cached prefixes give what lone prompts give."""
    model = tiny_model(variant)
    params = SamplingParams(n=3, temperature=1.0, seed=5, max_tokens=10, ignore_eos=True)
    options = {"kv_cache_dtype": "fp8", "enable_prefix_caching": False}
    alone = [[c.token_ids for c in tiny_engine(model, **options).generate([prompt], params)[0]] for prompt in PROMPTS]
    engine = tiny_engine(model, kv_cache_dtype="fp8")
    for _ in range(2):
        completions = engine.generate(PROMPTS, params)
        assert [[c.token_ids for c in row] for row in completions] == alone


def test_unknown_kinds_are_refused() -> None:
    model = tiny_model()
    with pytest.raises(ValueError, match="quantization: expected None or 'fp8'"):
        tiny_engine(model, quantization="int4")
    with pytest.raises(ValueError, match="kv_cache_dtype: expected 'auto' or 'fp8'"):
        tiny_engine(model, kv_cache_dtype="int8")


@pytest.mark.gpu
@pytest.mark.parametrize("variant", ["mamba1", "mamba2", "dense"])
def test_on_a_gpu_the_same_as_on_a_cpu(variant: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Hidden states of a prompt, and graphs of decode steps that follow new weights."""
    monkeypatch.setattr(
        "m1.engine.graphs.PATIENCE", 0
    )  # every size in its own graph, or batches are padded and round otherwise
    model = tiny_model(variant)
    ids = torch.tensor([PROMPTS[2]])
    options = {"quantization": "fp8", "kv_cache_dtype": "fp8", "dtype": torch.bfloat16}
    hidden = []
    for device in ("cpu", "cuda"):
        engine = tiny_engine(model.to(device), **options)
        with torch.no_grad():
            hidden.append(engine.model.model(ids.to(device), use_cache=False).last_hidden_state.cpu())
    assert rel_rms(hidden[1], hidden[0]) < 3 * PRODUCT
    before = engine.generate(PROMPTS, GREEDY)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.2 * parameter.abs().mean() * torch.randn_like(parameter)
    engine.update_weights()
    after = [[c.token_ids for c in row] for row in engine.generate(PROMPTS, GREEDY)]
    assert after == [[c.token_ids for c in row] for row in tiny_engine(model, **options).generate(PROMPTS, GREEDY)]
    assert after != [[c.token_ids for c in row] for row in before]
