"""A chat endpoint on this machine that answers as a test wants it to."""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Reply = tuple[int, dict[str, str], bytes]
Answer = Callable[[int, str], "str | Reply"]
"""(number of the request from 0, question) -> the text of an answer, or status, headers and body."""


def completion(text: str | None, finish_reason: str = "stop", **message: Any) -> Reply:
    """A chat completion as a server sends it: 10 tokens read, 5 written."""
    body = {
        "choices": [{"message": {"role": "assistant", "content": text, **message}, "finish_reason": finish_reason}],
        "usage": {"prompt_tokens": 10, "completion_tokens": 5},
    }
    return 200, {}, json.dumps(body).encode()


def failure(status: int, message: str = "no", **headers: str) -> Reply:
    return status, headers, json.dumps({"error": {"message": message}}).encode()


def responses(question: str) -> tuple[str, str]:
    """The two responses that the default question shows."""
    found = re.findall(r"^<<< response [AB] (\w{16})\n(.*?)\n>>> end of response [AB] \1$", question, re.DOTALL | re.M)
    assert len(found) == 2
    return found[0][1], found[1][1]


def longer(number: int, question: str) -> str:
    """The longer response is more helpful, and the first of two as long."""
    a, b = responses(question)
    return f"Comparison: one is longer.\nMore helpful: {'A' if len(a) >= len(b) else 'B'}"


class Stub:
    """What was asked, and where."""

    def __init__(self, answer: Answer) -> None:
        self.answer = answer
        self.requests: list[dict[str, Any]] = []
        """Bodies, in the order in which they came."""
        self.headers: list[dict[str, str]] = []
        self.most_at_a_time = 0
        self._now = 0
        self._lock = threading.Lock()
        self.base_url = ""

    @property
    def questions(self) -> list[str]:
        return [body["messages"][0]["content"] for body in self.requests]

    def handle(self, handler: BaseHTTPRequestHandler) -> None:
        body = json.loads(handler.rfile.read(int(handler.headers["Content-Length"])))
        with self._lock:
            number = len(self.requests)
            self.requests.append(body)
            self.headers.append(dict(handler.headers))
            self._now += 1
            self.most_at_a_time = max(self.most_at_a_time, self._now)
        try:
            reply = self.answer(number, body["messages"][0]["content"])
        finally:
            with self._lock:
                self._now -= 1
        status, headers, content = completion(reply) if isinstance(reply, str) else reply
        handler.send_response(status)
        for name, value in {"Content-Length": str(len(content)), **headers}.items():
            handler.send_header(name.replace("_", "-"), value)
        handler.end_headers()
        handler.wfile.write(content)


@contextmanager
def endpoint(answer: Answer = longer) -> Iterator[Stub]:
    stub = Stub(answer)

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            try:
                assert self.path == "/v1/chat/completions"
                stub.handle(self)
            except (BrokenPipeError, ConnectionResetError):
                pass  # who asked has given up

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    stub.base_url = f"http://127.0.0.1:{server.server_port}/v1"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield stub
    finally:
        server.shutdown()
        server.server_close()
