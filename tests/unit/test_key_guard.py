"""The middleware that asks for the API key, before an ASGI application that says who came."""

from __future__ import annotations

import asyncio
import os
import runpy
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from hypothesis import given
from hypothesis import strategies as st

import workloads
from workloads.arguments import GUARD

FILE = str(Path(workloads.__file__).parent / f"{GUARD}.py")
KEY = "k-1"
RIGHT = (b"authorization", b"Bearer k-1")
Scope = dict[str, Any]


def guard_of(environment: dict[str, str]) -> Any:
    """The class, of a module that is imported in this environment."""
    with mock.patch.dict(os.environ, environment, clear=True):
        return runpy.run_path(FILE)["KeyGuard"]


GUARD_OF_KEY = guard_of({"VLLM_API_KEY": KEY})


def asked(scope: Scope, guard: Any = GUARD_OF_KEY) -> tuple[bool, list[dict[str, Any]]]:
    """Whether the application behind the guard was asked, and what the guard itself answered."""
    came: list[Scope] = []
    sent: list[dict[str, Any]] = []

    async def app(scope: Scope, receive: Any, send: Any) -> None:
        came.append(scope)

    async def receive() -> dict[str, Any]:
        raise AssertionError("the guard reads no body")

    async def send(message: dict[str, Any]) -> None:
        sent.append(message)

    asyncio.run(guard(app)(scope, receive, send))
    assert came in ([], [scope])
    return bool(came), sent


def request(path: str, *headers: tuple[bytes, bytes], method: str = "POST") -> Scope:
    return {"type": "http", "method": method, "path": path, "headers": list(headers)}


PATHS = ("/v1/chat/completions", "/invocations", "/adapters", "/tokenize", "/sleep", "/docs", "/openapi.json", "/", "")
NEAR = ("/health/", "/health/x", "/Health", "//health", "/metrics/", "/metrics/../v1/models", "/ping", "/version")


@pytest.mark.parametrize("path", [*PATHS, *NEAR])
def test_every_path_asks_for_the_key(path: str) -> None:
    came, sent = asked(request(path))
    assert not came
    assert [message["type"] for message in sent] == ["http.response.start", "http.response.body"]
    headers = dict(sent[0]["headers"])
    assert (sent[0]["status"], sent[1]["body"]) == (401, b'{"error": "Unauthorized"}')
    assert headers == {
        b"content-type": b"application/json",
        b"content-length": b"25",  # of the body: 7 + 1 for "error":, a blank, 14 for "Unauthorized", and two braces
        b"www-authenticate": b"Bearer",
    }
    assert asked(request(path, RIGHT)) == (True, [])


@pytest.mark.parametrize("path", ["/health", "/metrics"])
@pytest.mark.parametrize("headers", [(), ((b"authorization", b"Bearer no"),)])
def test_probes_and_prometheus_need_no_key(path: str, headers: tuple[tuple[bytes, bytes], ...]) -> None:
    assert asked(request(path, *headers, method="GET")) == (True, [])


def test_a_browser_may_ask_what_it_may_do() -> None:
    assert asked(request("/v1/models", method="OPTIONS")) == (True, [])
    assert not asked(request("/v1/models", method="options"))[0]  # which is another method


@pytest.mark.parametrize("told", [b"bearer k-1", b"BEARER k-1"])
def test_the_scheme_is_written_as_one_likes(told: bytes) -> None:
    assert asked(request("/tokenize", (b"authorization", told)))[0]


@pytest.mark.parametrize(
    "told",
    [b"", b"Bearer", b"Bearer ", b"k-1", b"Basic k-1", b"Bearer  k-1", b"Bearer k-1 ", b"Bearer k-11", b"Bearer K-1"],
)
def test_what_is_not_the_key_is_refused(told: bytes) -> None:
    assert not asked(request("/tokenize", (b"authorization", told)))[0]


@given(st.binary(max_size=40))
def test_no_other_header_is_let_in_and_none_breaks_it(told: bytes) -> None:
    assert asked(request("/invocations", (b"authorization", told)))[0] == (
        told[:7].lower() == b"bearer " and told[7:] == KEY.encode()
    )


def test_of_several_headers_the_first_counts_as_vllm_counts_them() -> None:
    wrong = (b"authorization", b"Bearer no")
    assert asked(request("/invocations", RIGHT, wrong))[0]
    assert not asked(request("/invocations", wrong, RIGHT))[0]
    assert not asked(request("/invocations", (b"x-authorization", RIGHT[1])))[0]


def test_a_key_beyond_ascii_is_read_from_the_wire_as_latin_1() -> None:
    guard = guard_of({"VLLM_API_KEY": "schlüssel"})
    assert asked(request("/invocations", (b"authorization", "Bearer schlüssel".encode("latin-1"))), guard)[0]
    assert not asked(request("/invocations", (b"authorization", b"Bearer schl")), guard)[0]


def test_a_web_socket_asks_for_the_key_everywhere_and_is_closed_before_it_opens() -> None:
    for path in ("/v1/realtime", "/health", "/metrics"):
        socket: Scope = {"type": "websocket", "path": path, "headers": []}
        assert asked(socket) == (False, [{"type": "websocket.close", "code": 1008}])
        assert asked(socket | {"headers": [RIGHT]}) == (True, [])


def test_the_server_s_own_start_and_end_pass() -> None:
    assert asked({"type": "lifespan"}) == (True, [])


def test_without_a_key_the_server_does_not_start() -> None:
    with pytest.raises(KeyError, match="VLLM_API_KEY"):
        guard_of({})
    with pytest.raises(ValueError, match="VLLM_API_KEY is empty"):
        guard_of({"VLLM_API_KEY": ""})
