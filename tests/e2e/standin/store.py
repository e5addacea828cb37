"""What the stand-in keeps: one JSON file, written whole and atomically under a lock, so that it survives any end of
the process.

No secret lies in it in plain text: `seal` puts a hash in its place, `unseal` finds the value again among those that
are sent.
"""

import contextlib
import fcntl
import hashlib
import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from standin import wire

SEAL = "$sha256"


class Store:
    """The state file: `resources` by lower-case id, `deleted` (soft-deleted names), `generations`, `faults`."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.path.parent.mkdir(parents=True, exist_ok=True)

    @contextlib.contextmanager
    def edit(self) -> Iterator[dict[str, Any]]:
        """The state, alone; what is changed in it is kept unless the block raises."""
        with self.path.with_suffix(".lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            state = self._read()
            yield state
            beside = self.path.with_suffix(".new")
            beside.write_text(json.dumps(state, indent=1, sort_keys=True), encoding="utf-8")
            os.replace(beside, self.path)  # noqa: PTH105

    def read(self) -> dict[str, Any]:
        """The state as it is; files are replaced whole, so no lock is needed."""
        return self._read()

    def _read(self) -> dict[str, Any]:
        if not self.path.exists():
            return {"resources": {}, "deleted": {}, "generations": {}, "faults": {}, "writes": 0}
        state = json.loads(self.path.read_text(encoding="utf-8"))
        assert isinstance(state, dict)
        return state


class Journal:
    """Every request as a line of JSON: time, event ("start" or "end"), operation, type, name and what else is told."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.path.parent.mkdir(parents=True, exist_ok=True)

    def add(self, **entry: Any) -> None:
        """Append one line; a line is one write, so lines of several threads do not mix."""
        line = json.dumps({"time": time.time(), **entry}, sort_keys=True) + "\n"
        with self.path.open("ab") as file:
            file.write(line.encode())


def entries(path: Path) -> list[dict[str, Any]]:
    """The journal's lines."""
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def seal(value: Any) -> Any:
    """The value with each secret replaced by its hash."""
    if wire.is_secret(value):
        return {SEAL: _hash(wire.reveal(value))}
    if isinstance(value, dict):
        return {key: seal(part) for key, part in value.items()}
    if isinstance(value, list):
        return [seal(part) for part in value]
    return value


def unseal(value: Any, *sources: Any) -> Any:
    """The value with each hash replaced by its secret (marked), if the sources hold it; else by the hash, marked."""
    return _open(value, {_hash(found): found for source in sources for found in _secrets(source)})


def hide(text: str, *sources: Any) -> str:
    """The text with every secret string of the sources cut out of it."""
    for source in sources:
        for found in _secrets(source):
            if isinstance(found, str) and found:
                text = text.replace(found, "[secret]")
    return text


def _open(value: Any, known: dict[str, Any]) -> Any:
    if isinstance(value, dict) and set(value) == {SEAL}:
        return wire.secret(known.get(value[SEAL], f"sha256:{value[SEAL]}"))
    if isinstance(value, dict):
        return {key: _open(part, known) for key, part in value.items()}
    if isinstance(value, list):
        return [_open(part, known) for part in value]
    return value


def _secrets(value: Any) -> Iterator[Any]:
    if wire.is_secret(value):
        yield wire.reveal(value)
    elif isinstance(value, dict):
        for part in value.values():
            yield from _secrets(part)
    elif isinstance(value, list):
        for part in value:
            yield from _secrets(part)


def _hash(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
