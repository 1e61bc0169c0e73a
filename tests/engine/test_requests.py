"""What a request may ask and what it gets: limits, stops, text, seeds, errors, aborts, streams, failures."""

import asyncio
import gc
import time
import weakref

import pytest
import torch

from m1.engine import Engine, SamplingParams
from tests.engine.models import EOS, VOCABULARY, assert_all_free, byte_tokenizer, random_prompts, tiny_engine, tiny_model


@pytest.fixture(scope="module")
def model():
    return tiny_model(initializer_range=0.1)  # flat enough that samples differ and the end token appears


@pytest.fixture(params=[0, 2], ids=["read at once", "two steps ahead"])
def engine(model, request) -> Engine:
    return tiny_engine(model, tokenizer=byte_tokenizer(), num_steps_ahead=request.param)


def test_seeds(engine):
    """The same seed repeats; another seed, another sample, and no seed at all give something else."""
    prompt = random_prompts((6,))
    seeded = SamplingParams(n=3, seed=5, max_tokens=12, ignore_eos=True)
    first, again = engine.generate(prompt, seeded)[0], engine.generate(prompt, seeded)[0]
    assert [c.token_ids for c in first] == [c.token_ids for c in again]
    fresh = SamplingParams(n=3, max_tokens=12, ignore_eos=True)
    others = [
        *engine.generate(prompt, SamplingParams(n=3, seed=6, max_tokens=12, ignore_eos=True))[0],
        *engine.generate(prompt, fresh)[0],
        *engine.generate(prompt, fresh)[0],
    ]
    assert len({tuple(c.token_ids) for c in (*first, *others)}) == 12
    alone = engine.generate(prompt, SamplingParams(seed=5, max_tokens=12, ignore_eos=True))[0]
    assert alone[0].token_ids == first[0].token_ids


def test_the_end_token_is_in_the_ids_and_not_in_the_text(engine):
    params = SamplingParams(n=24, seed=0, max_tokens=30, temperature=1.5)
    completions = engine.generate(["abc"], params)[0]
    stopped = [c for c in completions if c.finish_reason == "stop"]
    assert stopped
    for completion in completions:
        is_stopped = completion.token_ids[-1] == EOS
        assert completion.finish_reason == ("stop" if is_stopped else "length")
        assert EOS not in completion.token_ids[:-1]
        assert len(completion.token_ids) == len(completion.logprobs) <= 30
        assert is_stopped or len(completion.token_ids) == 30
        assert completion.text == engine.tokenizer.decode(completion.token_ids, skip_special_tokens=True)


def test_ignore_eos_goes_on(engine):
    params = SamplingParams(n=24, seed=0, max_tokens=30, temperature=1.5, ignore_eos=True)
    completions = engine.generate(["abc"], params)[0]
    assert any(EOS in c.token_ids[:-1] for c in completions)
    assert all(len(c.token_ids) == 30 and c.finish_reason == "length" for c in completions)


def test_stop_strings_and_stop_tokens_cut_the_same_tokens(engine):
    """Against the unstopped completion of the same seed: it ends with the first stop, whose text is left out."""
    free = engine.generate(["abc"], SamplingParams(seed=3, max_tokens=40, ignore_eos=True))[0][0]
    text = free.text
    stop = text[10:13]
    stopped = engine.generate(["abc"], SamplingParams(seed=3, max_tokens=40, ignore_eos=True, stop=["never!", stop]))[0][0]
    assert stopped.finish_reason == "stop"
    assert stopped.text == text[: text.index(stop)]
    assert stopped.token_ids == free.token_ids[: len(stopped.token_ids)]
    assert stop in engine.tokenizer.decode(stopped.token_ids)
    assert stop not in engine.tokenizer.decode(stopped.token_ids[:-1])

    token = free.token_ids[20]
    place = free.token_ids.index(token)
    for stop in (None, "never!"):  # text made at the end, and as it comes
        params = SamplingParams(seed=3, max_tokens=40, ignore_eos=True, stop_token_ids=[token], stop=stop)
        stopped = engine.generate(["abc"], params)[0][0]
        assert (stopped.token_ids, stopped.finish_reason) == (free.token_ids[: place + 1], "stop")
        assert stopped.text == engine.tokenizer.decode(free.token_ids[:place])


@pytest.mark.parametrize("max_tokens", [None, 50])
def test_a_completion_ends_at_max_model_len(model, max_tokens):
    engine = tiny_engine(model, max_model_len=20)
    completion = engine.generate(random_prompts((12,)), SamplingParams(max_tokens=max_tokens, ignore_eos=True))[0][0]
    assert len(completion.token_ids) == 8
    assert completion.finish_reason == "length"


def test_messages_are_templated(engine):
    engine.tokenizer.chat_template = (
        "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}{% if add_generation_prompt %}<reply>{% endif %}"
    )
    prompt = engine.submit([{"role": "user", "content": "hi"}], SamplingParams()).prompt
    assert engine.tokenizer.decode(prompt) == "<user>hi<reply>"  # a template writes its own special tokens


def test_text_gets_the_tokenizers_special_tokens(engine):
    assert engine.tokenizer.decode(engine.submit("hi", SamplingParams()).prompt) == "<bos>hi"


BAD_PROMPTS = {
    "empty ids": ([], "empty"),
    "too long": ([1] * 128, "128 tokens, but max_model_len 128"),
    "outside the vocabulary": ([1, 2, VOCABULARY], f"token 2 is {VOCABULARY}"),
    "negative": ([-1], "token 0 is -1"),
    "not tokens": ([1, "a"], "token 1 is 'a'"),
    "messages without template": ([{"role": "user", "content": "x"}], "chat template"),
    "not a message": ([{"content": "x"}], "message 0"),
    "not a prompt": (17, "given int"),
}


@pytest.mark.parametrize(("prompt", "message"), BAD_PROMPTS.values(), ids=BAD_PROMPTS)
def test_a_bad_prompt_is_named_before_anything_starts(engine, prompt, message):
    with pytest.raises(ValueError, match=message) as error:
        engine.generate([[1, 2], prompt], SamplingParams())
    assert str(error.value).startswith("prompts[1]: ")
    assert not engine.has_work


def test_text_needs_a_tokenizer(model):
    engine = tiny_engine(model)
    with pytest.raises(ValueError, match="no tokenizer"):
        engine.generate(["text"], SamplingParams())
    with pytest.raises(ValueError, match="stop strings need a tokenizer"):
        engine.generate([[1]], SamplingParams(stop="x"))
    assert engine.generate([[1]], SamplingParams(max_tokens=2))[0][0].text == ""


@pytest.mark.parametrize(
    "values",
    [
        {"n": 0},
        {"n": 2, "temperature": 0},
        {"temperature": -0.1},
        {"temperature": float("nan")},
        {"top_p": 0},
        {"top_p": 1.1},
        {"top_k": -2},
        {"top_k": 1.5},
        {"min_p": 2},
        {"max_tokens": 0},
        {"stop": [""]},
        {"stop_token_ids": [-1]},
        {"logprobs": 21},
        {"seed": 0.5},
    ],
    ids=str,
)
def test_impossible_sampling_values_are_refused_by_name(values):
    with pytest.raises(ValueError, match=f"sampling {next(iter(values))}: expected"):
        SamplingParams(**values)


def test_params_a_prompt(engine):
    outputs = engine.generate([[1], [2]], [SamplingParams(max_tokens=2, ignore_eos=True), SamplingParams(n=2, max_tokens=3)])
    assert [len(completions) for completions in outputs] == [1, 2]
    with pytest.raises(ValueError, match="one for each of the 2 prompts, given 1"):
        engine.generate([[1], [2]], [SamplingParams()])
    with pytest.raises(ValueError, match="expected a list of prompts"):
        engine.generate("one prompt", SamplingParams())


def test_abort_ends_a_request_and_frees_everything(engine):
    params = SamplingParams(n=3, max_tokens=50, ignore_eos=True, seed=1)
    expected = engine.generate([[5, 6, 7]], params)[0]
    request, other = engine.submit([5, 6, 7], params), engine.submit([8], SamplingParams(max_tokens=9, ignore_eos=True))
    for _ in range(6):
        engine.step()
    engine.abort(request)
    assert request.is_finished
    for index, completion in request.completions.items():
        assert completion.finish_reason == "abort"
        assert 0 < len(completion.token_ids) < 50
        assert completion.token_ids == expected[index].token_ids[: len(completion.token_ids)]
    while engine.has_work:
        engine.step()
    assert len(other.completions[0].token_ids) == 9
    assert_all_free(engine)


def test_a_failing_step_ends_its_requests_and_the_engine_goes_on(engine, monkeypatch):
    params = SamplingParams(max_tokens=10, seed=0)
    expected = engine.generate([[1, 2, 3]], params)

    def fail(*arguments):
        raise MemoryError("no memory")

    with monkeypatch.context() as context:
        context.setattr(engine.runner, "decode", fail)
        with pytest.raises(MemoryError):
            engine.generate([[1, 2, 3], [4]], params)
    assert_all_free(engine)
    assert engine.generate([[1, 2, 3]], params) == expected


@pytest.mark.parametrize("most_tokens", [25, 7, 2, 0])
def test_steps_that_find_no_memory_are_made_smaller(model, most_tokens, monkeypatch):
    """Everything is recomputed and comes out as it would have; only where no step is small enough, the error is raised."""
    prompts = random_prompts((9, 20, 4))
    params = SamplingParams(n=3, seed=5, max_tokens=12)
    expected = tiny_engine(model).generate(prompts, params)
    engine = tiny_engine(model, max_num_seqs=16, max_num_batched_tokens=64, num_steps_ahead=1)
    launch, num_failures = engine.runner.launch, 0

    def launch_if_small(batch):
        nonlocal num_failures
        if batch.num_tokens > most_tokens:
            num_failures += 1
            raise torch.OutOfMemoryError("no memory")
        return launch(batch)

    monkeypatch.setattr(engine.runner, "launch", launch_if_small)
    if most_tokens == 0:
        with pytest.raises(torch.OutOfMemoryError):
            engine.generate(prompts, params)
        monkeypatch.undo()
        assert_all_free(engine)
    outputs = engine.generate(prompts, params)
    assert [[c.token_ids for c in row] for row in outputs] == [[c.token_ids for c in row] for row in expected]
    assert num_failures > 0
    assert_all_free(engine)


@pytest.mark.gpu
def test_a_gpu_with_too_little_memory_for_a_step():
    """A prefill of 8,000 tokens finds no room for its activations: the same tokens come out of smaller steps."""
    model = tiny_model(hidden_size=64, intermediate_size=8192, max_position_embeddings=2048).to("cuda")
    engine = Engine(model, max_num_seqs=8, max_num_batched_tokens=8192, enable_prefix_caching=False, num_pages=200)
    prompts, params = random_prompts((1000,) * 8), SamplingParams(temperature=0, max_tokens=5, ignore_eos=True)
    expected = engine.generate(prompts, params)
    assert engine.scheduler.max_num_batched_tokens == 8192
    torch.cuda.empty_cache()
    room = torch.cuda.memory_reserved() + 128 * 2**20
    torch.cuda.set_per_process_memory_fraction(room / torch.cuda.get_device_properties(0).total_memory)
    try:
        found = engine.generate(prompts, params)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert engine.scheduler.max_num_batched_tokens < 8192
    assert [c.token_ids for (c,) in found] == [c.token_ids for (c,) in expected]
    assert_all_free(engine)


async def collect(stream) -> dict:
    found: dict = {}
    async for delta in stream:
        text, ids, logprobs, reasons = found.setdefault(delta.index, ([], [], [], []))
        text.append(delta.text)
        ids.extend(delta.token_ids)
        logprobs.extend(delta.logprobs)
        reasons.extend([delta.finish_reason] if delta.finish_reason else [])
    return {index: ("".join(text), ids, logprobs, *reasons) for index, (text, ids, logprobs, reasons) in found.items()}


def test_streams_add_up_to_completions(engine):
    """Several at once, with several samples, stops and characters of several bytes."""
    params = [
        SamplingParams(n=3, seed=1, max_tokens=30),
        SamplingParams(seed=2, max_tokens=30, ignore_eos=True),
        SamplingParams(seed=2, max_tokens=30, ignore_eos=True),
    ]
    prompts = ["abc", "größe", "größe"]
    stop = engine.generate([prompts[2]], params[2])[0][0].text[12:14]
    params[2] = SamplingParams(seed=2, max_tokens=30, ignore_eos=True, stop=stop)
    expected = engine.generate(prompts, params)

    async def main():
        return await asyncio.gather(*(collect(engine.stream(p, own)) for p, own in zip(prompts, params, strict=True)))

    for streamed, completions in zip(asyncio.run(main()), expected, strict=True):
        for c in completions:
            text, ids, logprobs, reason = streamed[c.index]
            assert (text, ids, reason) == (c.text, c.token_ids, c.finish_reason)
            assert logprobs == pytest.approx(c.logprobs, abs=1e-4)
    assert_all_free(engine)


def test_leaving_a_stream_aborts_it_and_a_bad_one_fails_alone(engine):
    async def leave():
        stream = engine.stream("abc", SamplingParams(max_tokens=100, ignore_eos=True))
        async for _ in stream:
            break
        await stream.aclose()

    async def main():
        good = asyncio.create_task(collect(engine.stream("abc", SamplingParams(seed=4, max_tokens=20, ignore_eos=True))))
        await asyncio.sleep(0)
        with pytest.raises(ValueError, match="empty"):
            engine.stream([], SamplingParams())
        await leave()
        return await good

    result = asyncio.run(main())
    assert len(result[0][1]) == 20
    while engine.has_work:  # the abort of the one that was left may still be in the inbox
        engine.step()
    assert engine.metrics.num_generated_tokens < 110
    assert_all_free(engine)


def test_a_client_whose_loop_is_closed_hurts_nobody(engine):
    async def start():
        return engine.stream("abc", SamplingParams(max_tokens=100, ignore_eos=True))

    async def other():
        return await collect(engine.stream("abc", SamplingParams(seed=4, max_tokens=20, ignore_eos=True)))

    loop = asyncio.new_event_loop()
    left = loop.run_until_complete(start())
    loop.close()
    assert len(asyncio.run(other())[0][1]) == 20
    while engine.has_work:
        engine.step()
    del left
    assert_all_free(engine)


def test_a_failing_step_is_raised_by_every_stream(engine, monkeypatch):
    def fail(*arguments):
        raise MemoryError("no memory")

    monkeypatch.setattr(engine.runner, "decode", fail)

    async def main():
        streams = [engine.stream("abc", SamplingParams(max_tokens=5)) for _ in range(2)]
        return await asyncio.gather(*map(collect, streams), return_exceptions=True)

    assert [type(result) for result in asyncio.run(main())] == [MemoryError, MemoryError]
    assert_all_free(engine)


def test_metrics_count(engine):
    engine.generate([[1, 2, 3], [4, 5]], SamplingParams(n=2, max_tokens=7, ignore_eos=True))
    metrics = engine.metrics
    assert (metrics.num_prompt_tokens, metrics.num_generated_tokens) == (5, 28)
    assert (metrics.num_running, metrics.num_waiting, metrics.num_preemptions) == (0, 0, 0)
    assert metrics.tokens_per_second > 0
    assert metrics.page_use == metrics.slot_use == 0


def test_sizes_that_contradict_or_do_not_fit_are_refused(model, monkeypatch):
    monkeypatch.setattr("m1.engine.capacity.available_memory", lambda: 2**24)
    with pytest.raises(ValueError, match="num_pages"):
        tiny_engine(model, num_pages=4, max_model_len=100)
    with pytest.raises(ValueError, match="num_slots"):
        tiny_engine(model, num_slots=8)
    with pytest.raises(ValueError, match="memory_fraction"):
        tiny_engine(model, memory_fraction=0)
    with pytest.raises(MemoryError, match="max_model_len"):
        tiny_engine(model, max_model_len=10**6)
    with pytest.raises(MemoryError, match="max_num_seqs"):
        tiny_engine(model, max_num_seqs=10**6, max_num_batched_tokens=2 * 10**6)
    assert tiny_engine(model, num_pages=10).capacity.max_model_len == 40
    assert tiny_engine(model, memory_fraction=0.006).capacity.max_model_len < 128  # rather a shorter limit than no engine


@pytest.mark.parametrize("ending", ["closed", "left by with", "forgotten"])
def test_an_engine_that_ends_frees_its_memory_at_once(model, ending):
    """Without the garbage collector: nothing an engine holds points back to it, not even after a stream."""
    gc.collect()
    gc.disable()
    try:
        engine = tiny_engine(model, dtype=torch.bfloat16)
        engine.submit([1, 2, 3], SamplingParams(max_tokens=50))
        engine.generate([[4, 5]], SamplingParams(max_tokens=3))

        async def stream():
            await collect(engine.stream([1], SamplingParams(max_tokens=3)))

        asyncio.run(stream())
        del stream
        kept = [weakref.ref(x) for x in (engine.model, engine.runner.state.slot_stacks[0])]
        if ending == "forgotten":
            kept.append(weakref.ref(engine))
            del engine
        elif ending == "closed":
            engine.close()
        else:
            with engine:
                pass
        deadline = time.monotonic() + 10  # the thread that served the stream may be about to end
        while any(ref() is not None for ref in kept) and time.monotonic() < deadline:
            time.sleep(0.01)
        assert [ref() for ref in kept] == [None] * len(kept)
    finally:
        gc.enable()


def test_a_closed_engine_says_so(engine):
    request = engine.submit([1, 2, 3], SamplingParams(max_tokens=50))
    engine.step()
    engine.close()
    engine.close()
    assert request.completions[0].finish_reason == "abort"
    assert_all_free(engine)
    for use in (
        engine.step,
        engine.sleep,
        engine.wake,
        engine.update_weights,
        lambda: engine.generate([[1]], SamplingParams()),
        lambda: engine.submit([1], SamplingParams()),
    ):
        with pytest.raises(ValueError, match="closed"):
            use()
