"""Azurite on this machine: a Blob Storage that can be stopped, and a wire before it that can be cut."""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

PINNED = Path(__file__).with_name("azurite")
# the same everywhere and published: learn.microsoft.com, "Use the Azurite emulator", well-known storage account and key
ACCOUNT = "devstoreaccount1"
KEY = "Eby8vdM02xNOcqFlqUwJPLlmEtlCDXJ1OUzFT50uSRZ6IFsuFq2UVErCz4I6tq/K1SZFPTOtr/KBHBeksoGMGw=="


def installed() -> Path:
    """Azurite's program, installed once by npm into the cache, by what its lock file pins."""
    npm = shutil.which("npm")
    if npm is None:
        pytest.skip("Azurite needs node and npm: install them (on Debian and Ubuntu the package npm)")
    key = hashlib.sha256((PINNED / "package-lock.json").read_bytes()).hexdigest()[:16]
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "tonnage" / f"azurite-{key}"
    program = cache / "node_modules" / ".bin" / "azurite-blob"
    if not (cache / ".ready").exists():
        shutil.rmtree(cache, ignore_errors=True)
        cache.mkdir(parents=True)
        for name in ("package.json", "package-lock.json"):
            shutil.copy(PINNED / name, cache)
        subprocess.run([npm, "ci", "--no-audit", "--no-fund"], cwd=cache, check=True, capture_output=True)
        (cache / ".ready").touch()
    return program


def free_port() -> int:
    with socket.socket() as made:
        made.bind(("127.0.0.1", 0))
        port: int = made.getsockname()[1]
        return port


class Azurite:
    """One emulator with its folder; it can be stopped and started again on the same port."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.port = folder, free_port()
        self._program = installed()
        self._process: subprocess.Popen[bytes] | None = None
        self.start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/{ACCOUNT}"

    def start(self) -> None:
        options = ["--blobHost", "127.0.0.1", "--blobPort", str(self.port), "--location", str(self.folder)]
        self._process = subprocess.Popen(
            [self._program, *options, "--silent", "--skipApiVersionCheck", "--disableTelemetry"],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        end = time.monotonic() + 60
        while time.monotonic() < end:
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", self.port), 1):
                return
            time.sleep(0.05)
        raise AssertionError("Azurite did not start in a minute")

    def stop(self) -> None:
        assert self._process is not None
        self._process.send_signal(signal.SIGTERM)
        self._process.wait(timeout=30)

    def container(self, name: str) -> str:
        """The URL of a new container."""
        from workloads.blobs import AzureBlobs, parse_place

        AzureBlobs(parse_place(f"{self.url}/{name}"))._client.create_container()
        return f"{self.url}/{name}"


class Wire:
    """A way to a port on this machine that is cut after so many bytes, once for each number given."""

    def __init__(self, port: int, cuts: list[int]) -> None:
        self._to, self._cuts = port, cuts
        self._listening = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listening.getsockname()[1]
        self.cut = 0
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self) -> None:
        while True:
            try:
                client, _ = self._listening.accept()
            except OSError:
                return
            try:
                server = socket.create_connection(("127.0.0.1", self._to))
            except OSError:
                client.close()
                continue
            threading.Thread(target=self._carry, args=(client, server, True), daemon=True).start()
            threading.Thread(target=self._carry, args=(server, client, False), daemon=True).start()

    def _carry(self, source: socket.socket, target: socket.socket, up: bool) -> None:
        carried = 0
        with contextlib.suppress(OSError):
            while content := source.recv(1 << 16):
                carried += len(content)
                if up and self._cuts and carried > self._cuts[0]:
                    self._cuts.pop(0)
                    self.cut += 1
                    break
                target.sendall(content)
        for end in (source, target):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
            end.close()

    def close(self) -> None:
        self._listening.close()


@contextlib.contextmanager
def azurite(folder: Path) -> Iterator[Azurite]:
    made = Azurite(folder)
    try:
        yield made
    finally:
        made.stop()
