"""Checkpoints that are whole or do not exist: written beside, listed in a manifest, checked before they are resumed.

A folder `checkpoint-120` counts when its `manifest.json` lists it whole: every file there, of that size and SHA-256.
The manifest is written last, and the folder gets its name by one rename after it. A disk renames at once; a container
mounted without a hierarchical namespace copies file by file, and then a half-copied folder fails the manifest.
Steps say which is the newest, never a clock.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from planner.errors import PlannerError
from workloads.store import MANIFEST, files_in, summed

NAME = re.compile(r"checkpoint-([0-9]{1,12})")
PARTIAL = ".partial"


class Behind(PlannerError):
    """Another process of the run, or its machine, has not got as far as this one. A later try may succeed."""


class DiskFull(OSError):
    """No space for a checkpoint, also after older ones were given up."""


def step_of(folder: Path) -> int:
    """120 for `checkpoint-120`."""
    match = NAME.fullmatch(folder.name)
    if match is None:
        raise ValueError(f"{folder.name} is no checkpoint's name")
    return int(match[1])


def seal(folder: Path, facts: Mapping[str, Any]) -> None:
    """Make a folder whole: files on the disk and readable by everybody, then the manifest with their sizes and sums."""
    listed = {}
    for name, path in files_in(folder).items():
        path.chmod(path.stat().st_mode | 0o444)
        _sync(path)
        listed[name] = summed(path).facts
    for inner in (folder, *(path for path in folder.rglob("*") if path.is_dir())):
        inner.chmod(inner.stat().st_mode | 0o555)
    text = json.dumps({"version": 1, **facts, "files": listed}, indent=1, sort_keys=True)
    manifest = folder / MANIFEST
    manifest.write_text(text, encoding="utf-8")
    manifest.chmod(0o644)
    _sync(manifest)
    _sync(folder)


def _sync(path: Path) -> None:
    """Onto the disk, as far as the file system can."""
    handle = os.open(path, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError) if path.is_dir() else contextlib.nullcontext():
            os.fsync(handle)
    finally:
        os.close(handle)


def manifest_of(folder: Path) -> dict[str, Any] | None:
    """What a whole folder's manifest says; None where it is not whole."""
    try:
        said = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        if not isinstance(said, dict) or said.get("version") != 1:
            return None
        for name, facts in said["files"].items():
            path = folder / name
            if path.stat().st_size != facts["bytes"] or summed(path).facts != facts:
                return None
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
    return said


def best_of(folder: Path) -> str | None:
    """The name of the best checkpoint of the run so far, as the manifest of a whole one says."""
    best = json.loads((folder / MANIFEST).read_text(encoding="utf-8")).get("best")
    return str(best) if best else None


def saved(folder: Path) -> list[Path]:
    """Folders named like checkpoints, newest step first, whole or not."""
    if not folder.is_dir():
        return []
    return sorted((p for p in folder.iterdir() if NAME.fullmatch(p.name) and p.is_dir()), key=step_of, reverse=True)


def newest(folder: Path) -> tuple[Path | None, list[Path]]:
    """The newest whole checkpoint, and the newer ones that are not whole."""
    broken: list[Path] = []
    for path in saved(folder):
        if manifest_of(path) is not None:
            return path, broken
        broken.append(path)
    return None, broken


def check_same_run(folder: Path | str, said: Mapping[str, Any], **facts: str) -> None:
    """PlannerError when a checkpoint or result, by its manifest, was made by another configuration or of other data."""
    for name, value in facts.items():
        if said.get(name) != value:
            raise PlannerError(
                f"{folder} was made with another {name} ({said.get(name)}, now {value}): give the run another name or"
                " folder, or go on with the old ones"
            )


def clean(folder: Path) -> list[str]:
    """Remove what a killed writer left, and checkpoints newer than the newest whole one: their names.

    They would be taken for the newest when older ones are given up.
    """
    broken = newest(folder)[1]
    if folder.is_dir():
        broken += [path for path in folder.iterdir() if path.name.endswith(PARTIAL) and path.is_dir()]
    for path in broken:
        shutil.rmtree(path, ignore_errors=True)
    return [path.name for path in broken]


def prune(folder: Path, keep: int, spare: str = "") -> list[str]:
    """Remove all but the newest `keep` checkpoints and the spared one: their names."""
    gone = [path for path in saved(folder)[keep:] if path.name != spare]
    for path in gone:
        (path / MANIFEST).unlink(missing_ok=True)  # from here on it does not count, whatever happens
        shutil.rmtree(path, ignore_errors=True)
    return [path.name for path in gone]


@contextlib.contextmanager
def _beside(target: Path) -> Iterator[Path]:
    """A folder to fill that takes the target's name in the end, or goes."""
    partial = target.with_name(target.name + PARTIAL)
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        yield partial
        if target.exists():
            (target / MANIFEST).unlink(missing_ok=True)
            shutil.rmtree(target)
        partial.rename(target)
        _sync(target.parent)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def write(
    target: Path, fill: Callable[[Path], None], facts: Mapping[str, Any], *, make_room: bool = True, spare: str = ""
) -> Path:
    """Write a checkpoint or result: `fill` puts its files into the folder that it is given; facts: for the manifest.

    On a full disk older checkpoints are given up, but the newest and the spared one, and it is tried once more.
    Raises DiskFull when that does not help; what was there whole before is still there.
    """
    try:
        return _write(target, fill, facts)
    except Exception as error:
        if not _is_full(error):
            raise
        freed = prune(target.parent, 1, spare) if make_room else []
        if not freed:
            raise _full(target) from error
    try:
        return _write(target, fill, facts)
    except Exception as error:
        if _is_full(error):
            raise _full(target) from error
        raise


def _write(target: Path, fill: Callable[[Path], None], facts: Mapping[str, Any]) -> Path:
    with _beside(target) as partial:
        fill(partial)
        seal(partial, facts)
    return target


def _full(target: Path) -> DiskFull:
    return DiskFull(errno.ENOSPC, "the disk is full", str(target.parent))


def _is_full(error: BaseException) -> bool:
    """Whether an error means a full disk, also where a library wraps it in words."""
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, OSError) and seen.errno in (errno.ENOSPC, errno.EDQUOT):
            return True
        if "No space left on device" in str(seen) or "os error 28" in str(seen):
            return True
        # torch's zip writer says only that a write went wrong
        if isinstance(seen, RuntimeError) and "PytorchStreamWriter failed" in str(seen):
            return True
        seen = seen.__cause__ or seen.__context__
    return False
