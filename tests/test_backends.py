"""Every backend keeps one contract: the same samples for a seed, watches that are heard and obeyed, log-probs, times."""

import sys
import time
import types
from collections import Counter

import pytest
import torch

from m1.backends import engine_backend, open_backend
from m1.backends.opening import _load_engine
from m1.backends.server import server_backend
from m1.backends.transformers import transformers_backend
from m1.backends.vllm import vllm_backend
from m1.config import SolveConfig
from m1.engine import Engine
from m1.evaluation.sampling import SampleRequest, Watch
from tests.engine.models import byte_tokenizer, tiny_model
from tests.fake_server import fake_server
from tests.numerics import ENGINE_LOGPROBS

PARAMS = {"temperature": 0.9, "max_tokens": 12, "seed": 3}


class Listener(Watch):
    """Records what it hears; cancels a request at its `most`-th sample; ends all at `most_tokens`."""

    def __init__(self, most=None, most_tokens=None):
        self.heard, self.most, self.most_tokens, self.tokens = [], most, most_tokens, []

    def on_sample(self, request, sample):
        self.heard.append((request, sample))
        return self.most is not None and sum(number == request for number, _ in self.heard) >= self.most

    def is_over(self, num_tokens):
        self.tokens.append(num_tokens)
        return self.most_tokens is not None and num_tokens >= self.most_tokens


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setattr("m1.backends.server._FIRST_PAUSE", 0.01)
    with fake_server() as handler:
        yield handler


class FakeVLLM:
    """As much of vLLM as the backend uses: every step adds a token to every request; request i of a prompt has 3 + i."""

    def __init__(self):
        self.llm_engine, self.requests, self.aborted = self, {}, []

    def get_tokenizer(self):
        return types.SimpleNamespace(
            apply_chat_template=lambda messages, **options: messages[0]["content"], encode=lambda text, **options: [len(text)]
        )

    def add_request(self, name, prompt, params):
        self.requests[name] = [prompt, params, []]

    def abort_request(self, names):
        self.aborted += names
        for name in names:
            del self.requests[name]

    def step(self):
        outputs = []
        for name, (_, params, tokens) in list(self.requests.items()):
            tokens.append(len(tokens))
            is_finished = len(tokens) == min(params.max_tokens, 3 + int(name.rsplit("-", 1)[1]))
            logprobs = [{tokens[-1]: types.SimpleNamespace(logprob=-0.1 * tokens[-1])}]
            one = types.SimpleNamespace(
                text=f"{params.seed} ", token_ids=tokens[-1:], logprobs=logprobs, finish_reason="stop" if is_finished else None
            )
            outputs.append(types.SimpleNamespace(request_id=name, finished=is_finished, outputs=[one]))
            if is_finished:
                del self.requests[name]
        return outputs


@pytest.fixture
def fake_vllm(monkeypatch):
    module = types.ModuleType("vllm")
    module.SamplingParams = lambda **options: types.SimpleNamespace(**options)
    params = types.ModuleType("vllm.sampling_params")
    params.RequestOutputKind = types.SimpleNamespace(DELTA=1)
    monkeypatch.setitem(sys.modules, "vllm", module)
    monkeypatch.setitem(sys.modules, "vllm.sampling_params", params)
    return FakeVLLM()


@pytest.fixture(params=["engine", "transformers", "server", "vllm"])
def generate(request):
    if request.param == "engine":
        return engine_backend(Engine(tiny_model(), byte_tokenizer(), max_num_seqs=4, memory_fraction=0.01))
    if request.param == "transformers":
        return transformers_backend(tiny_model(), byte_tokenizer(), concurrency=3)
    if request.param == "server":
        return server_backend(request.getfixturevalue("server").url, "name", concurrency=3)
    return vllm_backend(request.getfixturevalue("fake_vllm"), concurrency=2)


def requests(n=5, **params):
    return [SampleRequest(text, n, PARAMS | params) for text in ("a b", "1 + 1 =", "xyz")]


def test_every_sample_comes_once_in_order_and_is_heard_once(generate):
    watch = Listener()
    samples = generate(requests(), watch)
    assert [[sample.index for sample in of_request] for of_request in samples] == [list(range(5))] * 3
    assert Counter(number for number, _ in watch.heard) == {0: 5, 1: 5, 2: 5}
    assert {(number, sample.index) for number, sample in watch.heard} == {(n, i) for n in range(3) for i in range(5)}
    for sample in (sample for of_request in samples for sample in of_request):
        assert 1 <= sample.num_tokens <= 12
        assert sample.finish_reason in ("stop", "length")
        assert sample.mean_logprob <= 0
        assert sample.tail_logprob <= 0
        assert sample.seconds > 0
    spent = [sample.tokens_spent for _, sample in watch.heard]
    assert spent == sorted(spent)
    total = sum(sample.num_tokens for of_request in samples for sample in of_request)
    assert max(spent) == total


def test_a_seed_repeats_and_samples_differ(generate):
    def texts(seed):
        return [[sample.text for sample in of_request] for of_request in generate(requests(seed=seed), Watch())]

    first = texts(3)
    assert first == texts(3)
    assert first != texts(100)
    assert len(set(first[0])) > 1


def test_a_cancelled_request_ends_and_the_others_go_on(generate):
    watch = Listener()
    watch.on_sample = lambda request, sample: Listener.on_sample(watch, request, sample) or request == 1
    samples = generate(requests(n=9), watch)
    assert [len(of_request) for of_request in samples] == [9, 1, 9]
    assert Counter(number for number, _ in watch.heard) == {0: 9, 1: 1, 2: 9}
    assert [len(of_request) for of_request in generate(requests(n=2), Watch())] == [2, 2, 2]  # nothing was left behind


def test_an_ended_run_keeps_what_had_finished(generate):
    watch = Listener(most_tokens=80)
    samples = generate(requests(n=50), watch)
    num_finished = sum(map(len, samples))
    assert num_finished == len(watch.heard)
    assert 0 < num_finished < 40
    assert max(watch.tokens) < 110
    assert [len(of_request) for of_request in generate(requests(n=2), Watch())] == [2, 2, 2]


def model_that_stops():
    """Every twelfth token ends a completion, so that those of a batch end at different times."""
    model = tiny_model()
    model.config.eos_token_id = model.generation_config.eos_token_id = list(range(0, 256, 12))
    return model


@pytest.mark.parametrize("name", ["engine", "transformers"])
def test_what_is_cancelled_or_over_is_no_longer_computed(name):
    model, asked = model_that_stops(), [SampleRequest("a b", 8, PARAMS | {"max_tokens": 40})]
    engine = Engine(model, byte_tokenizer(), max_num_seqs=8, memory_fraction=0.01)
    generate = engine_backend(engine) if name == "engine" else transformers_backend(model, byte_tokenizer(), concurrency=8)
    [samples] = generate(asked, Watch())
    lengths = sorted(sample.num_tokens for sample in samples)
    assert sum(lengths) > 8 * (lengths[0] + 2)  # so that the first to end is well before the last
    for watch in (Listener(most=1), Listener(most_tokens=8 * lengths[0])):
        before = engine.metrics.num_generated_tokens
        generate(asked, watch)
        assert max(watch.tokens) <= 8 * (lengths[0] + 1)
        assert engine.metrics.num_generated_tokens - before <= 8 * (lengths[0] + 1)
        assert engine.metrics.num_running == engine.metrics.num_waiting == 0


@pytest.mark.parametrize("params", [{"temperature": 0}, {"temperature": 0.5, "top_k": 1}, {"temperature": 2.0, "top_k": 1}])
def test_log_probs_of_engine_and_transformers_are_the_models(params):
    """The most likely tokens are the same, so are their log-probs, at the temperature that was asked for, before top_k."""
    asked = [SampleRequest("1 + 1 =", 1, {**params, "max_tokens": 10})]
    engine = engine_backend(Engine(tiny_model(), byte_tokenizer(), memory_fraction=0.01))
    [[ours]] = engine(asked, Watch())
    [[theirs]] = transformers_backend(tiny_model(), byte_tokenizer())(asked, Watch())
    assert (ours.text, ours.num_tokens, ours.finish_reason) == (theirs.text, theirs.num_tokens, theirs.finish_reason)
    assert ours.mean_logprob == pytest.approx(theirs.mean_logprob, abs=ENGINE_LOGPROBS)
    assert ours.mean_logprob < -0.01


def test_transformers_options():
    model = tiny_model()
    generate = transformers_backend(model, byte_tokenizer())
    with pytest.raises(ValueError, match=r"unknown sampling parameters \['stop'\]"):
        generate([SampleRequest("a", 1, {"stop": "x"})], Watch())
    with pytest.raises(ValueError, match="leaves no room"):
        generate([SampleRequest("a" * 200, 1, {})], Watch())
    [[sample]] = generate([SampleRequest("a", 1, {"max_tokens": 10**6, "seed": 1, "top_k": 5, "top_p": 0.9})], Watch())
    assert sample.num_tokens <= model.config.max_position_embeddings - 2
    torch.manual_seed(0)


def test_what_a_server_is_asked(server, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    chat = [{"role": "user", "content": "hello"}]
    generate = server_backend(server.url + "/", "name", concurrency=1)
    [[first, second], [text]] = generate([SampleRequest(chat, 2, PARAMS), SampleRequest("plain", 1, PARAMS)], Watch())
    asked = {"model": "name", "n": 1, "temperature": 0.9, "max_tokens": 12, "key": "Bearer secret"}
    assert server.seen[0] == asked | {"path": "/v1/chat/completions", "messages": chat, "seed": 3, "logprobs": True}
    assert server.seen[1]["seed"] == 4
    assert server.seen[2] == asked | {"path": "/v1/completions", "prompt": "plain", "seed": 3, "logprobs": 0}
    assert (first.text, second.text, first.mean_logprob, text.mean_logprob) == ("3 is it", "4 is it", -0.5, -1.0)
    server_backend(server.url, "name", logprobs=False)([SampleRequest("plain", 1, {})], Watch())
    assert "logprobs" not in server.seen[-1]


def test_a_busy_server_is_asked_again(server):
    server.failures = 3
    [[sample]] = server_backend(server.url, "name")([SampleRequest("plain", 1, {})], Watch())
    assert sample.num_tokens == 3
    assert len(server.seen) == 4
    server.failures = 99
    with pytest.raises(OSError, match="answered 503 5 times"):
        server_backend(server.url, "name")([SampleRequest("plain", 1, {})], Watch())


@pytest.mark.parametrize(
    ("status", "reason", "message"),
    [(400, "max_tokens is too large", "refused the request .400.: .*too large"), (422, "no logprobs here", "--no-logprobs")],
)
def test_a_refusal_is_told(server, status, reason, message):
    server.status, server.reason = status, reason
    with pytest.raises(ValueError, match=message):
        server_backend(server.url, "name")([SampleRequest("plain", 1, {})], Watch())
    assert len(server.seen) == 1


def test_a_slow_server_does_not_hold_up_the_end(server):
    server.delay = 30.0
    start = time.perf_counter()

    class Impatient(Watch):
        def is_over(self, num_tokens):
            return time.perf_counter() - start > 0.3

    assert server_backend(server.url, "name")([SampleRequest("plain", 4, {})], Impatient()) == [[]]
    assert time.perf_counter() - start < 5


def test_no_server_and_no_url(monkeypatch):
    monkeypatch.setattr("m1.backends.server._FIRST_PAUSE", 0.01)
    with pytest.raises(OSError, match="no answer from the server"):
        server_backend("http://127.0.0.1:9/v1", "name")([SampleRequest("plain", 1, {})], Watch())
    for url in ("localhost:8000", "ftp://x/v1", ""):
        with pytest.raises(ValueError, match="--url: expected"):
            server_backend(url, "name")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"model": ""}, "--model is needed"),
        ({"model": "m", "backend": "server"}, "--url is needed"),
        ({"model": "m", "backend": "vllm", "url": "http://x"}, "leave out --backend vllm"),
        ({"model": "m", "concurrency": -1}, "--concurrency"),
        ({"model": "m", "quantization": "fp8", "backend": "transformers"}, "--quantization fp8: M1's engine alone"),
        ({"model": "m", "quantization": "fp8", "url": "http://x"}, "--quantization fp8: M1's engine alone"),
        ({"model": "m", "state_dtype": "bfloat16", "backend": "vllm"}, "--state-dtype bfloat16: M1's engine alone"),
        ({"model": "./nowhere"}, "no such model directory"),
        ({"model": "./nowhere", "backend": "transformers"}, "no such model directory"),
    ],
)
def test_what_cannot_be_opened_is_named(options, message):
    with pytest.raises((ValueError, OSError), match=message):
        open_backend(SolveConfig(**options))


def test_an_engine_in_8_bits_says_so(tmp_path):
    """And its samples are not taken for those of the same model in 16: they are close, and other ones."""
    tiny_model(initializer_range=0.1).save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    plain, quantized = (
        open_backend(SolveConfig(model=str(tmp_path), device="cpu", quantization=kind)) for kind in ("none", "fp8")
    )
    assert " in fp8, " in quantized.description
    assert quantized.facts["dtype"] == "fp8"
    assert quantized.identity == plain.identity | {"quantization": "fp8"}
    params = {"temperature": 0.0, "max_tokens": 1, "seed": 0}
    found = [backend.generate([SampleRequest("ab", 1, params)], Watch())[0][0] for backend in (plain, quantized)]
    assert 0 < abs(found[0].mean_logprob - found[1].mean_logprob) < 0.5


def test_states_of_16_bits_take_half_the_memory_and_are_told(tmp_path):
    tiny_model("mamba2").save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    for kind, dtype in (("float32", torch.float32), ("bfloat16", torch.bfloat16)):
        config = SolveConfig(model=str(tmp_path), device="cpu", state_dtype=kind)
        engine = _load_engine(config, has_deadline=False, max_model_len=None)
        assert engine.runner.state.slot_stacks[1].dtype == dtype
        assert open_backend(config).identity.get("state_dtype", "float32") == kind


@pytest.mark.parametrize("is_chat", [False, True])
def test_an_engine_has_room_for_what_will_be_asked(tmp_path, is_chat):
    """And no more; where that is not known, or more than the model can hold, for the model's whole context."""
    tokenizer = byte_tokenizer()
    if is_chat:
        tokenizer.chat_template = "{% for message in messages %}<bos>{{ message.content }}!{% endfor %}"
    tiny_model().save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    config = SolveConfig(model=str(tmp_path), device="cpu", max_new_tokens=10)
    texts = ["ab", "a longer one", "abc"]
    backend = open_backend(config, texts)
    longest = 1 + len("a longer one") + is_chat
    assert backend.facts["max_model_len"] == longest + 10
    params = {"temperature": 1.0, "max_tokens": 10, "seed": 0, "ignore_eos": True}
    found = backend.generate([SampleRequest(backend.prompt(text), 2, params) for text in texts], Watch())
    assert [[sample.num_tokens for sample in samples] for samples in found] == [[10, 10]] * 3
    assert open_backend(config).facts["max_model_len"] == 128
    too_long = open_backend(config, ["a" * 128])
    assert too_long.facts["max_model_len"] == 128
    with pytest.raises(ValueError, match=r"requests\[0\]: the prompt has 1\d\d tokens"):
        too_long.generate([SampleRequest(too_long.prompt("a" * 128), 1, params)], Watch())


def test_what_vllm_gives_in_pieces_is_put_together(fake_vllm):
    chat = [{"role": "user", "content": "hello"}]
    [[first, second]] = vllm_backend(fake_vllm)([SampleRequest(chat, 2, PARAMS)], Watch())
    assert (first.text, first.num_tokens, second.text, second.num_tokens) == ("3 3 3 ", 3, "4 4 4 4 ", 4)
    assert first.mean_logprob == pytest.approx(-0.1)
    assert second.mean_logprob == pytest.approx(-0.15)


def test_vllm_that_is_not_installed_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "vllm", None)
    with pytest.raises(ValueError, match="install vLLM, or use --backend engine"):
        open_backend(SolveConfig(model="m", backend="vllm"))
