"""A stand-in for a server that speaks OpenAI's API, on 127.0.0.1: streams what a test says, keeps what it was asked."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Any

Fault = Callable[["Handler"], None]
KEY = "right-key"


class ChatServer:
    """Answers /v1/models with `models` and a chat with the `events`; a fault answers in the place of a path.

    asked: path, key and body of every request; key: which one it wants, None takes any
    """

    def __init__(self, *events: dict[str, Any] | str, models: Sequence[str] = ("qwen3-8b",)) -> None:
        self.events, self.models = events or saying("Good ", "day."), list(models)
        self.key: str | None = None
        self.faults: dict[str, Fault] = {}
        self.asked: list[tuple[str, str | None, dict[str, Any]]] = []
        self._server = _Server(("127.0.0.1", 0), Handler)
        self._server.chat = self
        self.port = int(self._server.server_address[1])
        self.url = f"http://127.0.0.1:{self.port}"

    def __enter__(self) -> ChatServer:
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.01})
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()

    @property
    def questions(self) -> list[dict[str, Any]]:
        """The bodies of the chats."""
        return [body for path, _, body in self.asked if path == "/v1/chat/completions"]


class _Server(ThreadingHTTPServer):
    chat: ChatServer

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Clients that give up are what some tests are about."""


class Handler(BaseHTTPRequestHandler):
    server: _Server

    def do_GET(self) -> None:
        self._answer({})

    def do_POST(self) -> None:
        self._answer(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))

    def _answer(self, body: dict[str, Any]) -> None:
        chat = self.server.chat
        key = self.headers.get("Authorization")
        chat.asked.append((self.path, key, body))
        if chat.key is not None and key != f"Bearer {chat.key}":
            self.send(401, {"error": "Unauthorized"})
        elif self.path in chat.faults:
            chat.faults[self.path](self)
        elif self.path == "/v1/models":
            self.send(200, {"object": "list", "data": [{"id": name} for name in chat.models]})
        elif self.path == "/v1/chat/completions":
            self.stream([*chat.events, "[DONE]"])
        else:
            self.send(404, {"detail": "Not Found"})

    def send(self, code: int, content: dict[str, Any] | str, headers: dict[str, str] | None = None) -> None:
        text = content if isinstance(content, str) else json.dumps(content)
        self.send_response(code)
        for name, value in ((headers or {}) | {"Content-Length": str(len(text.encode()))}).items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(text.encode())

    def stream(self, events: Sequence[dict[str, Any] | str]) -> None:
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.end_headers()
        self.wfile.write(b": a comment that keeps the connection alive\n\n")
        for event in events:
            text = event if isinstance(event, str) else json.dumps(event)
            self.wfile.write(f"data: {text}\n\n".encode())
            self.wfile.flush()

    def log_message(self, format: str, *args: Any) -> None:
        """Quiet."""


def delta(**fields: str) -> dict[str, Any]:
    return {"choices": [{"index": 0, "delta": fields, "finish_reason": None}]}


def end(tokens: int, reason: str = "stop") -> tuple[dict[str, Any], ...]:
    """The last piece, and the usage that comes after it."""
    finish = {"choices": [{"index": 0, "delta": {}, "finish_reason": reason}]}
    return finish, {"choices": [], "usage": {"prompt_tokens": 7, "completion_tokens": tokens}}


def saying(*pieces: str) -> tuple[dict[str, Any], ...]:
    return (delta(role="assistant"), *(delta(content=piece) for piece in pieces), *end(len(pieces)))


def status(code: int, content: dict[str, Any] | str, **headers: str) -> Fault:
    return lambda handler: handler.send(code, content, headers)


def half(*events: dict[str, Any] | str) -> Fault:
    """Streams these and ends without [DONE]."""
    return lambda handler: handler.stream(events)
