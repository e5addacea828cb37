"""Folders to Azure Blob and back: every byte checked, every transfer resumed, the manifest written last.

A folder at a place is whole when `manifest.json` is there and lists it. An upload takes an old manifest away before it
touches the files under it, and writes the new one after them; a download takes nothing without one. What is there
already with the right SHA-256 is not sent again: whole files, and the blocks of a file that an upload left unfinished.
When the network is gone, each request is tried again for `patience_seconds` of the monotonic clock.

    python -m workloads.store upload FOLDER URL
    python -m workloads.store download URL FOLDER

URL: https://ACCOUNT.blob.core.windows.net/CONTAINER/PATH, or az://CONTAINER/PATH in AZURE_STORAGE_ACCOUNT_NAME.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import re
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple, TypeVar

from planner.errors import PlannerError
from workloads.blobs import REQUEST_BYTES, AzureBlobs, Blob, Blobs, Changed, Lost, Place, parse_place

MANIFEST = "manifest.json"
BLOCK_BYTES = REQUEST_BYTES
PATIENCE_SECONDS = 900.0
LONGEST_WAIT_SECONDS = 20.0

Progress = Callable[[int, int], None]
Answer = TypeVar("Answer")


class Unreachable(PlannerError):
    """Blob did not answer for as long as patience lasts. A later try may succeed."""


# --- trying again -----------------------------------------------------------------------------------------------------


class Patience:
    """Tries again what was lost, with growing pauses, until none of it succeeds for so long."""

    def __init__(self, seconds: float = PATIENCE_SECONDS, *, sleep: Callable[[float], None] = time.sleep) -> None:
        self._seconds = seconds
        self._sleep = sleep

    def __call__(self, what: str, ask: Callable[[], Answer]) -> Answer:
        """The answer. Unreachable when patience ends."""
        began = time.monotonic()
        pause = 0.5
        while True:
            try:
                return ask()
            except Lost as error:
                if time.monotonic() - began + pause > self._seconds:
                    raise Unreachable(
                        f"{what} did not succeed in {self._seconds:.0f} s ({error}): see to the network, then start"
                        " again: it goes on where it stopped"
                    ) from error
                # pauses differ between pods, which all lost it at the same time
                self._sleep(pause * random.uniform(0.75, 1.25))
                pause = min(2 * pause, LONGEST_WAIT_SECONDS)


# --- up ---------------------------------------------------------------------------------------------------------------


def upload(
    folder: Path, place: Place, blobs: Blobs, *, patience: Patience | None = None, progress: Progress | None = None
) -> int:
    """Put a folder at a place, whole or not at all to readers. Returns the bytes that had to be sent.

    Blobs at the place that the folder does not have stay where they are, outside the manifest. Raises PlannerError for
    a folder without files, Unreachable when patience ends.
    """
    ask = patience or Patience()
    if not folder.is_dir():
        raise PlannerError(f"{folder} is no folder: give the folder to upload")
    files = {name: summed(path) for name, path in files_in(folder).items()}
    if not files:
        raise PlannerError(f"{folder} holds no file: there is nothing to upload")
    text = _manifest(folder, {name: one.facts for name, one in files.items()})
    there = ask("listing", lambda: blobs.find(place.prefix))
    manifest = place.name(MANIFEST)
    total = sum(one.size for one in files.values())
    if manifest in there and there[manifest].sha256 == _sha256(text):
        missing = [n for n, one in files.items() if not _same(there.get(place.name(n)), one)]
        if not missing:
            _tell(progress, total, total)
            return 0
    if manifest in there:
        ask("removing the old manifest", lambda: blobs.delete(manifest))
    done = sent = 0
    for name, one in files.items():
        target = place.name(name)
        if not _same(there.get(target), one):
            sent += _send(one, target, blobs, ask, _from(done, total, progress))
        done += one.size
        _tell(progress, done, total)
    ask("writing the manifest", lambda: blobs.put(manifest, text, _sha256(text)))
    return sent


class Summed(NamedTuple):
    """A file with its size and SHA-256 in hex."""

    path: Path
    size: int
    sha256: str

    @property
    def facts(self) -> dict[str, Any]:
        return {"bytes": self.size, "sha256": self.sha256}


def files_in(folder: Path) -> dict[str, Path]:
    """Every file under a folder but its manifest, by its path with slashes, in order."""
    found = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.is_file()}
    return {name: found[name] for name in sorted(found) if name != MANIFEST}


def summed(path: Path) -> Summed:
    """A file's size and sum, read once."""
    digest = hashlib.sha256()
    size = 0
    with path.open("rb") as file:
        while block := file.read(BLOCK_BYTES):
            digest.update(block)
            size += len(block)
    return Summed(path, size, digest.hexdigest())


def _same(blob: Blob | None, one: Summed) -> bool:
    return blob is not None and blob.size == one.size and blob.sha256 == one.sha256


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _manifest(folder: Path, files: dict[str, dict[str, Any]]) -> bytes:
    """The folder's own manifest where it has one, with all else that it says; a new one where not.

    PlannerError where the folder is not what its manifest says: what is broken here must not look whole there.
    """
    own = folder / MANIFEST
    if not own.is_file():
        return json.dumps({"version": 1, "files": files}, indent=1, sort_keys=True).encode()
    text = own.read_bytes()
    try:
        listed = json.loads(text)["files"]
    except (ValueError, KeyError, TypeError):
        listed = None
    if listed != files:
        raise PlannerError(
            f"{folder} is not what its manifest says: make it again, or remove {own} and upload what is there"
        )
    return text


def _send(one: Summed, target: str, blobs: Blobs, ask: Patience, tell: Callable[[int], None]) -> int:
    """One file. Blocks are named by the file's sum, so that those of another content are not taken for its own."""
    if one.size <= BLOCK_BYTES:
        content = one.path.read_bytes()
        _check(content, one)
        ask(f"uploading {target}", lambda: blobs.put(target, content, one.sha256))
        return one.size
    ready = ask("asking for what was sent before", lambda: blobs.staged(target))
    blocks: list[str] = []
    sent = 0
    digest = hashlib.sha256()
    with one.path.open("rb") as file:
        while content := file.read(BLOCK_BYTES):
            digest.update(content)
            block = f"{one.sha256[:16]}-{len(blocks):06d}"
            blocks.append(block)
            if ready.get(block) != len(content):
                ask(f"uploading {target}", lambda b=block, c=content: blobs.stage(target, b, c))  # type: ignore[misc]
                sent += len(content)
            tell(min(len(blocks) * BLOCK_BYTES, one.size))
    if digest.hexdigest() != one.sha256:
        raise PlannerError(
            f"{one.path} changed while it was uploaded: upload the folder again when nobody writes to it"
        )
    ask(f"finishing {target}", lambda: blobs.commit(target, blocks, one.sha256))
    return sent


def _check(content: bytes, one: Summed) -> None:
    if _sha256(content) != one.sha256:
        raise PlannerError(
            f"{one.path} changed while it was uploaded: upload the folder again when nobody writes to it"
        )


def _from(base: int, total: int, progress: Progress | None) -> Callable[[int], None]:
    """Tells the progress of one file among others."""
    return lambda inside: _tell(progress, base + inside, total)


def _tell(progress: Progress | None, done: int, total: int) -> None:
    if progress is not None:
        progress(done, total)


# --- down -------------------------------------------------------------------------------------------------------------


def manifest_at(place: Place, blobs: Blobs, *, patience: Patience | None = None) -> dict[str, Any] | None:
    """What the manifest of a whole folder says; None where there is none, or none that can be read."""
    ask = patience or Patience()
    name = place.name(MANIFEST)
    blob = ask("listing", lambda: blobs.find(name)).get(name)
    if blob is None:
        return None
    try:
        said = json.loads(_fetched(name, blob, blobs, ask))
    except (ValueError, Changed):
        return None
    return said if isinstance(said, dict) else None


def download(
    place: Place, folder: Path, blobs: Blobs, *, patience: Patience | None = None, progress: Progress | None = None
) -> int:
    """Fetch a whole folder. Returns the bytes that had to be fetched; the folder's manifest is written last.

    Raises PlannerError where no manifest is (the upload is not finished), or a file is not what the manifest says.
    """
    ask = patience or Patience()
    there = ask("listing", lambda: blobs.find(place.prefix))
    manifest = place.name(MANIFEST)
    if manifest not in there:
        raise PlannerError(
            f"there is no whole folder at {place}: upload it with python -m workloads.store upload FOLDER URL, wait"
            " until that is finished, or correct the URL"
        )
    text = _fetched(manifest, there[manifest], blobs, ask)
    files = _listed(text, place)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / MANIFEST).unlink(missing_ok=True)
    total = sum(facts["bytes"] for facts in files.values())
    done = got = 0
    for name, facts in files.items():
        blob = there.get(place.name(name))
        if blob is None or blob.size != facts["bytes"]:
            raise PlannerError(f"{name} at {place} is not what the manifest says: upload the folder again")
        target = folder / name
        if not (target.is_file() and target.stat().st_size == blob.size and summed(target).sha256 == facts["sha256"]):
            got += _fetch(place.name(name), blob, target, facts["sha256"], blobs, ask, _from(done, total, progress))
        done += facts["bytes"]
        _tell(progress, done, total)
    beside = folder / f".{MANIFEST}.part"
    beside.write_bytes(text)
    beside.replace(folder / MANIFEST)
    return got


def download_file(
    place: Place, target: Path, blobs: Blobs, *, patience: Patience | None = None, progress: Progress | None = None
) -> int:
    """Fetch one blob, such as a dataset that somebody put there by hand; its sum is checked where it has one."""
    ask = patience or Patience()
    there = ask("listing", lambda: blobs.find(place.prefix))
    blob = there.get(place.prefix)
    if blob is None:
        raise PlannerError(f"there is no blob at {place}: upload the file, or correct the URL")
    if blob.sha256 and target.is_file() and summed(target).sha256 == blob.sha256:
        return 0
    return _fetch(
        place.prefix, blob, target, blob.sha256, blobs, ask, lambda inside: _tell(progress, inside, blob.size)
    )


def _listed(text: bytes, place: Place) -> dict[str, dict[str, Any]]:
    """The files of a manifest. PlannerError for one that is none, or whose names leave the folder."""
    try:
        said = json.loads(text)
        files = {str(name): {"bytes": int(f["bytes"]), "sha256": str(f["sha256"])} for name, f in said["files"].items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise PlannerError(f"the manifest at {place} cannot be read: upload the folder again") from error
    for name in files:
        path = PurePosixPath(name)
        if path.is_absolute() or ".." in path.parts or name != path.as_posix() or "\\" in name or name == MANIFEST:
            raise PlannerError(
                f"the manifest at {place} names {name!r}, which is outside of the folder: do not trust it"
            )
    return files


def _fetched(name: str, blob: Blob, blobs: Blobs, ask: Patience) -> bytes:
    return ask(f"reading {name}", lambda: blobs.read(name, 0, blob.size, blob.etag)) if blob.size else b""


def _fetch(
    name: str,
    blob: Blob,
    target: Path,
    sha256: str | None,
    blobs: Blobs,
    ask: Patience,
    tell: Callable[[int], None],
) -> int:
    """One blob into a file, going on with what an earlier try left of the same content."""
    target.parent.mkdir(parents=True, exist_ok=True)
    mark = re.sub(r"[^0-9A-Za-z]", "", sha256 or blob.etag)[:16]
    part = target.with_name(f".{target.name}.{mark}.part")
    got = 0
    for again in (False, True):
        if again or (part.exists() and part.stat().st_size > blob.size):
            part.unlink(missing_ok=True)
        start = part.stat().st_size if part.exists() else 0
        with part.open("ab") as file:
            for content in _blocks(name, blob, start, blobs, ask):
                file.write(content)
                got += len(content)
                tell(file.tell())
            file.flush()
            os.fsync(file.fileno())
        if sha256 is None or summed(part).sha256 == sha256:
            part.replace(target)
            return got
    part.unlink(missing_ok=True)
    raise PlannerError(f"{name} does not have the SHA-256 that it was uploaded with: upload the folder again")


def _blocks(name: str, blob: Blob, start: int, blobs: Blobs, ask: Patience) -> Iterator[bytes]:
    while start < blob.size:
        size = min(BLOCK_BYTES, blob.size - start)
        try:
            content = ask(f"downloading {name}", lambda s=start, n=size: blobs.read(name, s, n, blob.etag))  # type: ignore[misc]
        except Changed as error:
            raise PlannerError(f"{name} was written anew while it was downloaded: download it again") from error
        if not content:
            raise PlannerError(f"{name} is shorter than it was said to be: upload it again")
        start += len(content)
        yield content


def remove(place: Place, blobs: Blobs, *, patience: Patience | None = None) -> None:
    """Take a folder away: its manifest first, so that it does not count from the first moment on."""
    ask = patience or Patience()
    there = ask("listing", lambda: blobs.find(f"{place.prefix}/"))
    for name in sorted(there, key=lambda name: name != place.name(MANIFEST)):
        ask(f"removing {name}", lambda n=name: blobs.delete(n))  # type: ignore[misc]


def folders(place: Place, blobs: Blobs, *, patience: Patience | None = None) -> list[str]:
    """Names of the whole folders right under a place."""
    there = (patience or Patience())("listing", lambda: blobs.find(f"{place.prefix}/" if place.prefix else ""))
    inner = (name.removeprefix(f"{place.prefix}/" if place.prefix else "") for name in there)
    return sorted(
        name.removesuffix(f"/{MANIFEST}") for name in inner if name.count("/") == 1 and name.endswith(f"/{MANIFEST}")
    )


# --- as a command -----------------------------------------------------------------------------------------------------


def main(arguments: list[str] | None = None) -> int:
    """`upload FOLDER URL` or `download URL FOLDER`, with a bar on a terminal; one JSON line in the end."""
    parser = argparse.ArgumentParser(prog="python -m workloads.store", description="A folder to Blob, or back.")
    parser.add_argument("direction", choices=("upload", "download"))
    parser.add_argument("source", help="the folder, or the URL, to read")
    parser.add_argument("target", help="the URL, or the folder, to write")
    options = parser.parse_args(arguments)
    try:
        with bar(options.direction) as tell:
            if options.direction == "upload":
                place = parse_place(options.target)
                moved = upload(Path(options.source), place, AzureBlobs(place), progress=tell)
            else:
                place = parse_place(options.source)
                moved = download(place, Path(options.target), AzureBlobs(place), progress=tell)
    except Unreachable as error:
        print(f"store: {error}", file=sys.stderr)
        return 1
    except PlannerError as error:
        print(f"store: {error}", file=sys.stderr)
        return 2
    print(json.dumps({"event": options.direction, "place": str(place), "moved_bytes": moved}))
    return 0


class bar:  # noqa: N801  # reads as the context manager that it is
    """A progress bar on stderr where that is a terminal; elsewhere nothing."""

    def __init__(self, title: str) -> None:
        self._title = title
        self._progress: Any = None

    def __enter__(self) -> Progress:
        if not sys.stderr.isatty() or shutil.get_terminal_size().columns < 20:
            return lambda done, total: None
        from rich.console import Console
        from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            DownloadColumn(binary_units=True),
            TimeRemainingColumn(),
            console=Console(stderr=True),
        )
        task = self._progress.add_task(self._title, total=None)
        self._progress.start()
        return lambda done, total: self._progress.update(task, completed=done, total=total)

    def __exit__(self, *_: object) -> None:
        if self._progress is not None:
            self._progress.stop()


if __name__ == "__main__":
    sys.exit(main())
