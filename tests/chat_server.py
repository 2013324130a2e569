"""A chat endpoint on loopback that misbehaves as its script says, for tests of what asks an endpoint."""

from __future__ import annotations

import contextlib
import json
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from selfevo.dialogue import Example, Turn
from selfevo.evaluation.endpoint import Endpoint, EndpointSettings


def completion(text: Any, finish: str = "stop") -> bytes:
    message = {"role": "assistant", "content": text}
    return json.dumps({"choices": [{"index": 0, "finish_reason": finish, "message": message}]}).encode()


class Server:
    """A chat endpoint on loopback; the n-th request for a conversation meets the n-th behaviour of the script."""

    def __init__(self) -> None:
        self.script: list[Any] = []
        self.requests: list[dict[str, Any]] = []
        self.met: Counter[str] = Counter()
        self.running = self.most_running = 0
        self.lock = threading.Lock()
        self.release = threading.Event()
        server = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                sent = self.rfile.read(int(self.headers["Content-Length"]))
                if not sent:  # a client that has gone
                    self.close_connection = True
                    return
                body = json.loads(sent)
                with server.lock:
                    headers = {"authorization": self.headers.get("Authorization"), "path": self.path}
                    server.requests.append(body | headers)
                    number = server.met[json.dumps(body["messages"])]
                    server.met[json.dumps(body["messages"])] += 1
                    server.running += 1
                    server.most_running = max(server.most_running, server.running)
                try:
                    server.script[min(number, len(server.script) - 1)](self)
                finally:
                    with server.lock:
                        server.running -= 1

            def log_message(self, *_: Any) -> None:
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.http.daemon_threads = True
        self.http.selfevo = self  # type: ignore[attr-defined]
        threading.Thread(target=self.http.serve_forever, args=(0.01,), daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.http.server_address[1]}/v1"

    @property
    def paths(self) -> list[str]:
        """Where requests went."""
        return [request["path"] for request in self.requests]

    def endpoint(self, cache: Path, **changes: Any) -> Endpoint:
        settings = {"url": self.url, "model": "judge-1", "timeout": 0.5, **changes}
        return Endpoint(EndpointSettings(**settings), cache)


@contextlib.contextmanager
def made_server() -> Iterator[Server]:
    made = Server()
    yield made
    made.release.set()
    made.http.shutdown()
    made.http.server_close()


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    for name in ("SELFEVO_API_KEY", "OPENAI_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    with made_server() as made:
        yield made


Behaviour = Callable[[Any], None]


def says(text: Any, finish: str = "stop") -> Behaviour:
    return raw(completion(text, finish))


def raw(body: bytes, status: int = 200, headers: Mapping[str, str] | None = None) -> Behaviour:
    def behave(handler: Any) -> None:
        handler.send_response(status)
        for name, value in {"Content-Type": "application/json", **(headers or {})}.items():
            handler.send_header(name, value)
        handler.send_header("Content-Length", str(len(body)))
        handler.end_headers()
        handler.wfile.write(body)

    return behave


def cut_off(handler: Any) -> None:
    """Promises more than it sends."""
    handler.send_response(200)
    handler.send_header("Content-Length", "1000")
    handler.end_headers()
    handler.wfile.write(completion("half")[:20])
    handler.close_connection = True


def hang_up(handler: Any) -> None:
    handler.close_connection = True


def example(text: str) -> Example:
    return Example(f"d{text}", 1, (Turn("seeker", text),), Turn("supporter", "golden"))


# --- the endpoint -----------------------------------------------------------------------------------------------------
