"""The readiness probe's own program, against a server that says what it was asked."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from workloads.server import program

KEY = "k-1"
pytestmark = pytest.mark.skipif(not Path("/proc/1/stat").exists(), reason="it runs in a container on Linux")


class Server(ThreadingHTTPServer):
    """healthy: what /health answers; tokens: of an answer; asked: every request, with the model of a completion."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.healthy, self.tokens = 200, 1
        self.asked: list[tuple[str, str]] = []


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        self.server.asked.append((self.path, ""))
        self.reply(self.server.healthy, {})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.asked.append((self.path, body["model"]))
        known = self.headers.get("Authorization") == f"Bearer {KEY}"
        self.reply(200 if known else 401, {"usage": {"completion_tokens": self.server.tokens}})

    def reply(self, code: int, body: dict[str, Any]) -> None:
        text = json.dumps(body).encode()
        self.send_response(code)
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    def log_message(self, *_: object) -> None:
        """Nothing on stderr."""


@pytest.fixture
def server() -> Iterator[Server]:
    with Server() as made:
        thread = threading.Thread(target=made.serve_forever)
        thread.start()
        yield made
        made.shutdown()
        thread.join()


def look(port: int, folder: Path, key: str = KEY) -> subprocess.CompletedProcess[str]:
    """One look of the kubelet's, as the manifest's command runs it."""
    environment = {"PATH": os.environ["PATH"], "READY_FOLDER": str(folder), "VLLM_API_KEY": key}
    command = [sys.executable, "-c", program("ready"), str(port), "qwen3-8b"]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


def test_the_first_look_asks_for_a_real_answer_and_the_next_for_health_alone(server: Server, tmp_path: Path) -> None:
    assert look(server.server_port, tmp_path).returncode == 0
    assert server.asked == [("/health", ""), ("/v1/completions", "qwen3-8b")]
    assert look(server.server_port, tmp_path).returncode == 0
    assert server.asked[2:] == [("/health", "")]


def test_a_server_that_does_not_answer_is_not_ready(server: Server, tmp_path: Path) -> None:
    server.tokens = 0
    done = look(server.server_port, tmp_path)
    assert (done.returncode, done.stderr.strip()) == (1, "the server answers without a token")
    server.tokens = 1
    assert look(server.server_port, tmp_path).returncode == 0  # it is asked again until it has answered once


def test_a_server_that_refuses_the_key_is_not_ready(server: Server, tmp_path: Path) -> None:
    done = look(server.server_port, tmp_path, key="another")
    assert done.returncode == 1
    assert "401" in done.stderr
    assert "another" not in done.stderr


def test_a_server_that_has_answered_and_is_ill_is_not_ready(server: Server, tmp_path: Path) -> None:
    look(server.server_port, tmp_path)
    server.healthy = 503
    done = look(server.server_port, tmp_path)
    assert done.returncode == 1
    assert "503" in done.stderr


def test_nobody_there_is_not_ready_and_no_traceback(tmp_path: Path) -> None:
    with Server() as made:
        port = made.server_port
    done = look(port, tmp_path)
    assert done.returncode == 1
    assert done.stderr.startswith("not ready: ")
    assert "Traceback" not in done.stderr
