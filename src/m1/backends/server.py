"""A server that speaks OpenAI's HTTP protocol (vLLM, llama.cpp, m1 serve, a hosted model) as a `generate` callable.

Only the standard library: threads that post, one sample a request, and the caller's thread that listens.
"""

import contextlib
import http.client
import json
import os
import queue
import threading
import time
import urllib.parse
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from m1.evaluation.sampling import Generate, Sample, SampleRequest, Watch, confidences

API_KEY = "OPENAI_API_KEY"
_ATTEMPTS = 5
_FIRST_PAUSE = 0.5  # seconds before the second attempt; doubles with each
_CONNECT_LIMIT = 30.0  # seconds until a server that does not take the connection counts as unreachable
_TICK = 0.05  # seconds between looks at the budget while nothing comes
_RETRIED = {408, 409, 429, 500, 502, 503, 504}
_LONGEST_REASON = 300  # characters of a server's complaint that are shown


def server_backend(
    url: str, model: str, *, concurrency: int = 16, logprobs: bool = True, timeout: float = 3600.0, api_key: str | None = None
) -> Generate:
    """Samples from a server at `url` (http://host:port/v1), `concurrency` requests at once, each for one sample.

    Chat messages go to /chat/completions, text to /completions; `params` of a request go along as they are. The key is
    `api_key` or the variable OPENAI_API_KEY. Without `logprobs` none are asked for. What a busy or failing server refuses is
    tried again up to five times. Sampling that is cancelled or over closes its connections; tokens of unfinished samples are
    not known, so token budgets count finished samples alone. Raises ValueError for a URL that is none and for a request the
    server refuses, OSError for a server that can't be reached, fails, or does not answer within `timeout` seconds.
    """
    parts = urllib.parse.urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ValueError(f"--url: expected http://HOST:PORT/v1 or https://…, got {url!r}")
    if concurrency < 1:
        raise ValueError(f"concurrency: expected at least 1, got {concurrency}")
    key = api_key or os.environ.get(API_KEY)
    headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {key}"} if key else {})
    server = _Server(parts, model, headers, logprobs, timeout)

    def generate(requests: Sequence[SampleRequest], watch: Watch) -> list[list[Sample]]:
        run = _Run(server, requests)
        threads = [threading.Thread(target=run.work, name="m1-server", daemon=True) for _ in range(concurrency)]
        for thread in threads:
            thread.start()
        try:
            samples = run.listen(watch, len(threads))
        finally:
            run.cancel_all()
            for thread in threads:
                thread.join()
        return [sorted(drawn, key=lambda one: one.index) for drawn in samples]

    return generate


@dataclass
class _Server:
    """Where to post, and what every request has in common."""

    parts: urllib.parse.SplitResult
    model: str
    headers: dict[str, str]
    logprobs: bool
    timeout: float

    def connect(self) -> http.client.HTTPConnection:
        kind = http.client.HTTPSConnection if self.parts.scheme == "https" else http.client.HTTPConnection
        assert self.parts.hostname is not None
        return kind(self.parts.hostname, self.parts.port, timeout=_CONNECT_LIMIT)

    def message(self, request: SampleRequest, index: int) -> tuple[str, bytes]:
        """Path and body of the request for one sample."""
        params = {key: value for key, value in request.params.items() if value is not None}
        if "seed" in params:
            params["seed"] += index
        is_chat = not isinstance(request.prompt, str)
        body: dict[str, Any] = {"model": self.model, "n": 1, **params, "messages" if is_chat else "prompt": request.prompt}
        if self.logprobs:
            body["logprobs"] = True if is_chat else 0
        path = self.parts.path.rstrip("/") + ("/chat/completions" if is_chat else "/completions")
        return path, json.dumps(body).encode()

    def to_sample(self, reply: dict[str, Any], index: int, seconds: float) -> Sample:
        choice = reply["choices"][0]
        found = choice.get("logprobs") or {}
        logprobs = [token["logprob"] for token in found["content"]] if found.get("content") else found.get("token_logprobs")
        mean_logprob, tail_logprob = confidences([one for one in logprobs or () if one is not None])
        message = choice.get("message")
        text = choice["text"] if message is None else (message.get("content") or "")
        num_tokens = (reply.get("usage") or {}).get("completion_tokens")
        if num_tokens is None:
            raise ValueError(f"{self.where}: the reply has no usage.completion_tokens, without which lengths can't be counted")
        return Sample(
            text, num_tokens, choice.get("finish_reason") or "stop", mean_logprob, tail_logprob, index=index, seconds=seconds
        )

    @property
    def where(self) -> str:
        return self.parts.geturl()


@dataclass
class _Run:
    """One call: what is yet to be asked, the open connections, and what has come, for the caller's thread to hear."""

    server: _Server
    requests: Sequence[SampleRequest]
    news: "queue.Queue[tuple[int, Sample] | BaseException | None]" = field(default_factory=queue.Queue)
    start: float = field(default_factory=time.perf_counter)

    def __post_init__(self) -> None:
        self._lock = threading.Lock()
        self._todo = iter([(number, index) for number, request in enumerate(self.requests) for index in range(request.n)])
        self._open: dict[http.client.HTTPConnection, int] = {}
        self._cancelled: set[int] = set()
        self._over = threading.Event()

    def work(self) -> None:
        """A thread's life: ask for one sample after the other, until there is nothing left or all is over."""
        try:
            while not self._over.is_set():
                with self._lock:
                    number, index = next(self._todo, (-1, -1))
                if number < 0:
                    break
                sample = None if number in self._cancelled else self._ask(number, index)
                if sample is not None:
                    self.news.put((number, sample))
        except BaseException as error:
            self.news.put(error)
        finally:
            self.news.put(None)

    def listen(self, watch: Watch, num_threads: int) -> list[list[Sample]]:
        samples: list[list[Sample]] = [[] for _ in self.requests]
        num_tokens = 0
        while num_threads and not watch.is_over(num_tokens):
            try:
                news = self.news.get(timeout=_TICK)
            except queue.Empty:
                continue
            if news is None:
                num_threads -= 1
            elif isinstance(news, BaseException):
                raise news
            elif news[0] not in self._cancelled:
                number, sample = news
                num_tokens += sample.num_tokens
                sample = replace(sample, tokens_spent=num_tokens)
                samples[number].append(sample)
                if watch.on_sample(number, sample):
                    self._cancel(number)
        return samples

    def cancel_all(self) -> None:
        self._over.set()
        self._close(lambda number: True)

    def _cancel(self, number: int) -> None:
        self._cancelled.add(number)
        self._close(lambda of_request: of_request == number)

    def _close(self, which: Any) -> None:
        with self._lock:
            for connection, number in self._open.items():
                if which(number) and connection.sock is not None:
                    with contextlib.suppress(OSError):  # it has ended by itself
                        connection.sock.shutdown(2)

    def _is_unwanted(self, number: int) -> bool:
        return self._over.is_set() or number in self._cancelled

    def _ask(self, number: int, index: int) -> Sample | None:
        """One sample; None if it was cancelled meanwhile."""
        path, body = self.server.message(self.requests[number], index)
        for attempt in range(_ATTEMPTS):
            if self._is_unwanted(number):
                return None
            try:
                status, reply = self._post(number, path, body)
            except (OSError, http.client.HTTPException) as error:
                if self._is_unwanted(number):
                    return None
                if attempt + 1 == _ATTEMPTS:
                    raise OSError(f"{self.server.where}: no answer from the server: {error!r}") from error
            else:
                if status == 200:
                    return self.server.to_sample(json.loads(reply), index, time.perf_counter() - self.start)
                self._require_retry(status, reply, attempt)
            self._over.wait(_FIRST_PAUSE * 2**attempt)
        return None

    def _post(self, number: int, path: str, body: bytes) -> tuple[int, bytes]:
        connection = self.server.connect()
        try:
            connection.connect()
            connection.sock.settimeout(self.server.timeout)
            with self._lock:
                self._open[connection] = number
            if self._is_unwanted(number):  # it was cancelled while the connection was made
                raise ConnectionAbortedError
            connection.request("POST", path, body, self.server.headers)
            response = connection.getresponse()
            return response.status, response.read()
        finally:
            with self._lock:
                self._open.pop(connection, None)
            connection.close()

    def _require_retry(self, status: int, reply: bytes, attempt: int) -> None:
        reason = " ".join(reply.decode(errors="replace").split())[:_LONGEST_REASON]
        if status in _RETRIED:
            if attempt + 1 == _ATTEMPTS:
                raise OSError(f"{self.server.where}: the server answered {status} {_ATTEMPTS} times: {reason}")
            return
        hint = "; if it gives no log-probs, add --no-logprobs" if self.server.logprobs and "logprob" in reason else ""
        raise ValueError(f"{self.server.where}: the server refused the request ({status}): {reason}{hint}")
