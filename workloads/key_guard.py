"""Asks for the API key on a vLLM server's whole port: ASGI middleware, `vllm serve --middleware=key_guard.KeyGuard`.

vLLM 0.32 asks below /v1, /v2, /inference and /cohere alone (its entrypoints/serve/middleware/authenticate.py): whoever
reaches the port could chat at /invocations and load adapters at /adapters. Only the paths of probes and of Prometheus
take no key, and OPTIONS, which browsers send without one. A server that has no key to ask for does not start.
"""

import hmac
import os
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

Message = MutableMapping[str, Any]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Message, Callable[[], Awaitable[Message]], Send], Awaitable[None]]

OPEN = ("/health", "/metrics")
KEY = os.environ["VLLM_API_KEY"].encode()
if not KEY:
    raise ValueError("VLLM_API_KEY is empty, and everybody would have it: set the secret api-key of the vault")
REFUSAL = b'{"error": "Unauthorized"}'
HEADERS = [
    (b"content-type", b"application/json"),
    (b"content-length", str(len(REFUSAL)).encode()),
    (b"www-authenticate", b"Bearer"),
]


class KeyGuard:
    """Passes on what has the key or needs none; answers 401, and closes a web socket before it opens."""

    def __init__(self, app: App) -> None:
        self.app = app

    async def __call__(self, scope: Message, receive: Callable[[], Awaitable[Message]], send: Send) -> None:
        if _needs_none(scope) or _has_key(scope):
            await self.app(scope, receive, send)
        elif scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008})  # which is 403 before it is accepted
        else:
            await send({"type": "http.response.start", "status": 401, "headers": HEADERS})
            await send({"type": "http.response.body", "body": REFUSAL})


def _needs_none(scope: Message) -> bool:
    if scope["type"] == "http":
        return scope["method"] == "OPTIONS" or scope["path"] in OPEN
    return bool(scope["type"] == "lifespan")  # the server's own start and end


def _has_key(scope: Message) -> bool:
    """Read as vLLM reads it: the first header of that name, latin-1 on the wire."""
    told = next((value for name, value in scope["headers"] if name == b"authorization"), b"")
    scheme, _, key = told.decode("latin-1").partition(" ")
    return scheme.lower() == "bearer" and hmac.compare_digest(key.encode(), KEY)
