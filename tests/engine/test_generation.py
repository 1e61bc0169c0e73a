"""The engine with a model: its tokens are those of transformers' `generate`, whatever the schedule; so are log-probs."""

import copy
import functools

import pytest
import torch

from m1.engine import Completion, Engine, SamplingParams, core, few_tokens
from m1.modeling import M1ForCausalLM
from tests.engine.models import EOS, VARIANTS, assert_all_free, byte_tokenizer, random_prompts, tiny_engine, tiny_model
from tests.numerics import ENGINE_LOGPROBS, ENGINE_LOGPROBS_BF16

LENGTHS = (1, 2, 5, 17, 33)


@pytest.fixture(params=VARIANTS, ids=VARIANTS)
def model(request) -> M1ForCausalLM:
    return tiny_model(request.param)


def hf_greedy(model: M1ForCausalLM, prompt: list[int], max_tokens: int) -> list[int]:
    ids = model.generate(
        torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt)), max_new_tokens=max_tokens, do_sample=False
    )
    return ids[0, len(prompt) :].tolist()


def forward_logprobs(model: M1ForCausalLM, prompt: list[int], tokens: list[int], temperature: float) -> torch.Tensor:
    """Log-probabilities of `tokens` after `prompt` by one uncached forward."""
    with torch.no_grad():
        logits = model(torch.tensor([prompt + tokens]), use_cache=False).logits[0, len(prompt) - 1 : -1].float()
    return (logits / temperature).log_softmax(-1).gather(1, torch.tensor(tokens)[:, None])[:, 0]


@pytest.mark.parametrize("num_steps_ahead", [0, 2])
def test_greedy_tokens_equal_transformers_generate(model, num_steps_ahead):
    """Mixed lengths, chunks of at most 24 tokens beside decoding sequences."""
    prompts = random_prompts(LENGTHS)
    engine = tiny_engine(model, num_steps_ahead=num_steps_ahead)
    outputs = engine.generate(prompts, SamplingParams(temperature=0, max_tokens=16))
    for prompt, (completion,) in zip(prompts, outputs, strict=True):
        assert completion.token_ids == hf_greedy(model, prompt, 16)
        assert completion.finish_reason == ("stop" if completion.token_ids[-1] == EOS else "length")
    assert_all_free(engine)


def test_forks_are_greedy_sequences_of_their_own(model):
    """top_k 1 makes all samples greedy: each must go on from the prompt as if alone."""
    prompts = random_prompts((1, 6, 8, 9, 21))
    outputs = tiny_engine(model).generate(prompts, SamplingParams(n=3, top_k=1, max_tokens=12))
    for prompt, completions in zip(prompts, outputs, strict=True):
        expected = hf_greedy(model, prompt, 12)
        assert [c.token_ids for c in completions] == [expected] * 3
        assert [c.index for c in completions] == [0, 1, 2]


@pytest.mark.parametrize("filter", [{"top_k": 1}, {"top_p": 1e-6}, {"min_p": 1.0}, {"temperature": 1e-4}], ids=str)
def test_every_sampling_value_reaches_the_sampler(filter):
    """Each at its extreme leaves only the most likely token; in one batch with a request that is free to choose."""
    model = tiny_model(initializer_range=0.1)
    prompts = random_prompts((6, 6))
    values = SamplingParams(seed=1, max_tokens=10, **filter)
    (greedy,), (free,) = tiny_engine(model).generate(prompts, [values, SamplingParams(seed=1, max_tokens=10)])
    assert greedy.token_ids == hf_greedy(model, prompts[0], 10)
    assert free.token_ids != hf_greedy(model, prompts[1], 10)


SCHEDULES = {
    "one at a time": {"max_num_seqs": 1, "max_num_batched_tokens": 64},
    "two at a time": {"max_num_seqs": 2},
    "tiny budget": {"max_num_batched_tokens": 9},
    "everything at once": {"max_num_seqs": 64, "max_num_batched_tokens": 4096},
    "preemption": {"num_pages": 12},
    "no prefixes": {"enable_prefix_caching": False},
    "large pages": {"page_size": 64},
    "two steps ahead": {"num_steps_ahead": 2, "num_pages": 16},
}


SAMPLED_PROMPTS = random_prompts((3, 7, 20))
SAMPLED_PROMPTS.append([*SAMPLED_PROMPTS[2][:16], 5, 6, 7])  # begins as another does
SAMPLED_PARAMS = [SamplingParams(n=3, temperature=0.9, top_p=0.95, seed=i, max_tokens=14) for i in range(4)]


@functools.cache
def each_prompt_alone(variant: str) -> list[list[Completion]]:
    engine = tiny_engine(tiny_model(variant), enable_prefix_caching=False)
    return [engine.generate([prompt], own)[0] for prompt, own in zip(SAMPLED_PROMPTS, SAMPLED_PARAMS, strict=True)]


@pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES)
@pytest.mark.parametrize("variant", ["mamba1", "mamba2", "dense"])
def test_samples_do_not_depend_on_the_schedule(variant, schedule):
    engine = tiny_engine(tiny_model(variant), max_model_len=40, **schedule)
    outputs = engine.generate(SAMPLED_PROMPTS, SAMPLED_PARAMS)
    for completions, alone in zip(outputs, each_prompt_alone(variant), strict=True):
        assert [c.token_ids for c in completions] == [c.token_ids for c in alone]
        for one, other in zip(completions, alone, strict=True):
            torch.testing.assert_close(torch.tensor(one.logprobs), torch.tensor(other.logprobs), atol=ENGINE_LOGPROBS, rtol=0)
    if "num_pages" in schedule:
        assert engine.metrics.num_preemptions > 0
    assert_all_free(engine)


def test_prompts_that_start_together_find_the_host_ahead(monkeypatch):
    """Reading lags behind by as many steps as a prefill takes the host, just before each; the tokens are the same."""
    monkeypatch.setitem(core.ADMISSION_INTERVAL, "cpu", 6)
    monkeypatch.setitem(core.ADMISSION_LEAD, "cpu", 4)
    engine = tiny_engine(tiny_model(), max_num_seqs=3, max_model_len=40)
    requests = [engine.submit(prompt, own) for prompt, own in zip(SAMPLED_PROMPTS, SAMPLED_PARAMS, strict=True)]
    lags = []
    while engine.has_work:
        engine.step()
        lags.append(len(engine._core.in_flight))
    assert max(lags) == 4
    assert 0 < lags.count(0) < len(lags)
    for request, alone in zip(requests, each_prompt_alone("mamba1"), strict=True):
        assert [request.completions[i].token_ids for i in range(3)] == [c.token_ids for c in alone]
    assert_all_free(engine)


@pytest.mark.parametrize("temperature", [0.0, 0.7, 1.3])
def test_logprobs_equal_a_fresh_forward(model, temperature):
    """Of the distribution at the sampling temperature, before top_p; greedy: at temperature 1."""
    prompts = random_prompts(LENGTHS)
    outputs = tiny_engine(model).generate(prompts, SamplingParams(temperature=temperature, top_p=0.9, seed=2, max_tokens=16))
    for prompt, (completion,) in zip(prompts, outputs, strict=True):
        expected = forward_logprobs(model, prompt, completion.token_ids, temperature or 1.0)
        torch.testing.assert_close(torch.tensor(completion.logprobs), expected, atol=ENGINE_LOGPROBS, rtol=0)


def test_alternatives_are_the_most_likely_tokens():
    """As many as each request asks for, in one batch with one that asks for none; at the sampling temperature."""
    model = tiny_model(initializer_range=0.1)
    prompts = random_prompts((4, 9, 6))
    params = [SamplingParams(seed=1, temperature=t, max_tokens=12, logprobs=k) for t, k in ((0.7, 4), (0.0, 20), (1.0, None))]
    (some,), (greedy,), (none,) = tiny_engine(model, num_steps_ahead=1).generate(prompts, params)
    assert none.top_logprobs is None
    for completion, prompt, count, temperature in ((some, prompts[0], 4, 0.7), (greedy, prompts[1], 20, 1.0)):
        with torch.no_grad():
            logits = model(torch.tensor([prompt + completion.token_ids]), use_cache=False).logits[0, len(prompt) - 1 : -1]
        values, ids = (logits / temperature).log_softmax(-1).topk(count)
        assert [list(top) for top in completion.top_logprobs] == ids.tolist()
        found = torch.tensor([list(top.values()) for top in completion.top_logprobs])
        torch.testing.assert_close(found, values, atol=ENGINE_LOGPROBS, rtol=0)
    assert [next(iter(top)) for top in greedy.top_logprobs] == greedy.token_ids


@pytest.mark.gpu
@pytest.mark.parametrize("variant", ["mamba1", "mamba2", "dense"])
def test_products_of_few_tokens_on_a_gpu(variant, monkeypatch):
    """In a model whose layers all stream their weights: eager steps and graphs, kernels that begin before the one ahead has
    ended, give the same tokens, and log-probs are the fp32 model's on a CPU."""
    monkeypatch.setattr(few_tokens, "LEAST_WEIGHTS", 0)
    monkeypatch.setattr(few_tokens, "ALIGNMENT", 16)
    model = tiny_model(variant, initializer_range=0.05, hidden_size=160, intermediate_size=208, mlp_bias=True)
    prompts, params = random_prompts(LENGTHS), SamplingParams(seed=2, max_tokens=32, ignore_eos=True)
    outputs = []
    for options in ({}, {"enforce_eager": True}, {"enforce_eager": True, "num_steps_ahead": 0}):
        on_gpu = copy.deepcopy(model).to("cuda")
        engine = tiny_engine(on_gpu, dtype=torch.bfloat16, max_num_seqs=len(LENGTHS), **options)
        assert not any(type(module) is torch.nn.Linear for module in engine.model.modules())
        outputs.append(engine.generate(prompts, params))
    for rows in zip(*outputs, strict=True):
        assert len({tuple(completion.token_ids) for (completion,) in rows}) == 1
    differences = [
        (torch.tensor(completion.logprobs) - forward_logprobs(model, prompt, completion.token_ids, 1.0)).abs()
        for prompt, (completion,) in zip(prompts, outputs[0], strict=True)
    ]
    assert torch.cat(differences).mean() < ENGINE_LOGPROBS_BF16


@pytest.mark.parametrize("variant", ["mamba1", "mamba2", "dense"])
def test_bf16_copy_samples_close_to_its_fp32_model(variant):
    model = tiny_model(variant, initializer_range=0.05)
    prompts = random_prompts(LENGTHS)
    outputs = tiny_engine(model, dtype=torch.bfloat16).generate(prompts, SamplingParams(seed=2, max_tokens=32))
    differences = [
        (torch.tensor(completion.logprobs) - forward_logprobs(model, prompt, completion.token_ids, 1.0)).abs()
        for prompt, (completion,) in zip(prompts, outputs, strict=True)
    ]
    assert torch.cat(differences).mean() < ENGINE_LOGPROBS_BF16


def test_a_cached_prefix_gives_what_prefill_gives(model):
    """A prompt again, a longer one, one that parts inside: with and without the prefix cache."""
    (base,) = random_prompts((30,))
    prompts = [base, base, base[:13] + [9] * 6, base[:13] + [8] * 6, [*base, 3, 4]]
    params = SamplingParams(temperature=0, max_tokens=12)
    cached, plain = tiny_engine(model), tiny_engine(model, enable_prefix_caching=False)
    for prompt in prompts:
        assert cached.generate([prompt], params)[0][0].token_ids == plain.generate([prompt], params)[0][0].token_ids
    assert cached.metrics.num_prefix_tokens >= 28
    assert plain.metrics.num_prefix_tokens == 0


def test_samples_share_one_prefill():
    engine = tiny_engine(tiny_model(), enable_prefix_caching=False)
    computed = 0
    launch = engine.runner.launch

    def count(batch):
        nonlocal computed
        computed += sum(chunk.end - chunk.start for chunk in batch.prefill)
        return launch(batch)

    engine.runner.launch = count
    engine.generate(random_prompts((30,)), SamplingParams(n=8, max_tokens=2))
    assert computed == 29


def test_a_checkpoint_directory_is_an_engine(tmp_path):
    model, tokenizer = tiny_model(), byte_tokenizer()
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    params = SamplingParams(temperature=0, max_tokens=8)
    (loaded,) = Engine(tmp_path).generate(["a b"], params)[0]
    (shared,) = Engine(model, tokenizer).generate(["a b"], params)[0]
    assert (loaded.text, loaded.token_ids, loaded.finish_reason) == (shared.text, shared.token_ids, shared.finish_reason)
    assert loaded.logprobs == pytest.approx(shared.logprobs, abs=ENGINE_LOGPROBS)  # its products are merged


@pytest.mark.parametrize(("dtype", "itemsize"), [(None, 4), (torch.bfloat16, 4 + 2)])
def test_a_checkpoint_that_does_not_fit_is_not_loaded(tmp_path, monkeypatch, dtype, itemsize):
    model = tiny_model()
    model.save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    size = itemsize * sum(parameter.numel() for parameter in model.parameters())
    monkeypatch.setattr("m1.storage.available_memory", lambda: size - 1)
    with pytest.raises(MemoryError, match=f"loading {tmp_path} needs about"):
        Engine(tmp_path, dtype=dtype)
    monkeypatch.setattr("m1.storage.available_memory", lambda: size)
    Engine(tmp_path, dtype=dtype)
