"""A server on this machine that speaks as much of OpenAI's protocol as the backend uses."""

import contextlib
import json
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, ClassVar


class FakeServer(BaseHTTPRequestHandler):
    """Completes with the seed it is given. Fails as its class says."""

    failures = 0  # requests to refuse with 503 before serving
    status, reason = 200, ""
    delay = 0.0
    seen: ClassVar[list[dict]] = []

    def do_POST(self):
        kind = type(self)
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        kind.seen.append({"path": self.path, "key": self.headers.get("Authorization"), **body})
        time.sleep(kind.delay)
        if kind.failures or kind.status != 200:
            status, kind.failures = (503 if kind.failures else kind.status), max(0, kind.failures - 1)
            return self.reply(status, {"error": kind.reason})
        words = [f"{body.get('seed', 0)}", "is", "it"]
        choice = {"index": 0, "finish_reason": "stop"}
        if "messages" in body:
            choice |= {"message": {"role": "assistant", "content": " ".join(words)}}
            choice |= {"logprobs": {"content": [{"token": word, "logprob": -0.5} for word in words]}}
        else:
            choice |= {"text": " ".join(words), "logprobs": {"token_logprobs": [None, -0.5, -1.5]}}
        return self.reply(200, {"choices": [choice], "usage": {"completion_tokens": 3}})

    def reply(self, status, content):
        data = json.dumps(content).encode()
        try:
            self.send_response(status)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)
        except OSError:
            pass  # the client has gone, as a test wants

    def log_message(self, *arguments):
        pass


@contextlib.contextmanager
def fake_server() -> Iterator[Any]:
    """A server that runs while the context lasts: its `url`, what it has `seen`, and fields that make it fail."""
    handler: Any = type("Handler", (FakeServer,), {"seen": []})
    httpd = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=httpd.serve_forever, args=(0.01,), daemon=True).start()
    handler.url = f"http://127.0.0.1:{httpd.server_port}/v1"
    try:
        yield handler
    finally:
        httpd.shutdown()
        httpd.server_close()
