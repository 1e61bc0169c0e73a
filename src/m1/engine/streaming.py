"""The async form of the engine: a thread that steps while there is work, and an iterator of deltas for each request."""

import asyncio
import logging
import threading
import weakref
from collections.abc import AsyncIterator
from typing import TYPE_CHECKING

from m1.engine.prompts import Prompt
from m1.engine.sampling_params import SamplingParams
from m1.engine.sequence import Delta, Request

if TYPE_CHECKING:
    from m1.engine.llm import Engine

logger = logging.getLogger(__name__)


class Driver:
    """Steps an engine from a thread that ends when there is nothing left to do. It does not keep the engine alive."""

    def __init__(self, engine: "Engine") -> None:
        self._engine = weakref.ref(engine)
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """Make sure that a thread steps; it will see what is in the engine's inbox by now."""
        with self._lock:
            if self._thread is None:
                self._thread = threading.Thread(target=self._drive, name="m1-engine", daemon=True)
                self._thread.start()

    def _drive(self) -> None:
        while True:
            engine = self._engine()
            with self._lock:
                if engine is None or not engine.has_work:
                    self._thread = None
                    return
            try:
                engine.step()
            except Exception:
                if engine.is_closed:
                    return
                # The engine has ended every request with this error, and their iterators raise it. Those to come are served.
                logger.exception("a step failed; every running request was ended")


def stream(engine: "Engine", driver: Driver, prompt: Prompt, params: SamplingParams) -> AsyncIterator[Delta]:
    """See `Engine.stream`. The prompt is checked here, in the caller's frame; the iterator only waits."""
    loop = asyncio.get_running_loop()
    queue: asyncio.Queue[Delta] = asyncio.Queue()

    serving = weakref.ref(engine)  # request and deliver refer to each other, and must not keep the engine with them

    def deliver(delta: Delta) -> None:
        try:
            loop.call_soon_threadsafe(queue.put_nowait, delta)
        except RuntimeError:  # the loop is closed, maybe since a moment ago: the client is gone
            if (its_engine := serving()) is not None:
                its_engine.abort(request)

    request = engine.submit(prompt, params, on_delta=deliver)
    driver.start()
    return _deltas(engine, request, queue)


async def _deltas(engine: "Engine", request: Request, queue: "asyncio.Queue[Delta]") -> AsyncIterator[Delta]:
    num_open = request.params.n
    try:
        while num_open:
            delta = await queue.get()
            if request.error is not None:
                raise request.error
            num_open -= delta.finish_reason is not None
            yield delta
    finally:
        engine.abort(request)
