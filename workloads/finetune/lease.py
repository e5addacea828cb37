"""One trainer at a time on a run: a lock on this machine, a heartbeat in a shared folder, and a lease at Blob.

A mounted container knows no locks between machines. So the holder writes a growing number into `lease.json` every few
seconds, and who comes later watches it: while it grows the run is held, and when it stands still the run is free.
Nobody compares clocks: each measures, by its own monotonic clock, how long the other's number stands still.

A run whose checkpoints go to Blob is held there, by a lease of Azure's own: trainers whose disks know nothing of each
other share the mirror.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from planner.errors import PlannerError
from workloads.blobs import Leases, Lost, Place
from workloads.store import Patience

BEAT_SECONDS = 5.0
# a mounted container hands out what it read for two minutes (blobfuse2's default), and a minute more for a late beat;
# a trainer that was stopped by a signal takes its lease away: nobody waits
STANDS_STILL_SECONDS = 180.0
LEASE_SECONDS = 60  # the longest that ends by itself: its holder may have been killed
RENEW_SECONDS = 15.0  # three renewals may be lost
LONGER_SECONDS = 10.0  # who waits for a lease to end waits so much longer than it lasts


class RunIsHeld(PlannerError):
    """Another trainer works on the run. It may be gone when this one is started again."""

    exit_code = 1


@contextlib.contextmanager
def hold(
    folder: Path,
    *,
    beat_seconds: float = BEAT_SECONDS,
    stands_still_seconds: float = STANDS_STILL_SECONDS,
    lost: Callable[[], None] | None = None,
) -> Iterator[None]:
    """Hold a run's folder. RunIsHeld when another trainer does. lost: called when another has taken it meanwhile."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "lease.json"
    with (folder / "lease.lock").open("a") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise RunIsHeld(f"{folder} is used by another trainer on this machine: wait for it, or stop it") from error
        except OSError:
            locked = False  # a mount without locks: the heartbeat tells
        else:
            locked = True
        _wait_for_silence(path, stands_still_seconds, beat_seconds, locked)
        me = {"owner": uuid.uuid4().hex, "host": socket.gethostname(), "pid": os.getpid(), "boot": _boot()}
        stop = threading.Event()
        _beat(path, me, 0)
        beating = threading.Thread(target=_keep_beating, args=(path, me, beat_seconds, stop, lost), daemon=True)
        beating.start()
        try:
            yield
        finally:
            stop.set()
            beating.join()
            if (_read(path) or {}).get("owner") == me["owner"]:
                path.unlink(missing_ok=True)


def _wait_for_silence(path: Path, seconds: float, beat_seconds: float, locked: bool) -> None:
    """Return when nobody holds the run: no lease, one of a dead process of this machine, or one that stands still."""
    first = _read(path)
    if first is None or _is_dead(first, locked):
        return
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        time.sleep(min(beat_seconds, seconds) / 4)
        now = _read(path)
        if now is None:
            return
        if now != first:
            raise RunIsHeld(
                f"{path.parent} is used by another trainer ({now.get('host')}, process {now.get('pid')}): wait for it,"
                " or stop it"
            )


def _keep_beating(
    path: Path, me: dict[str, Any], seconds: float, stop: threading.Event, lost: Callable[[], None] | None
) -> None:
    count = 0
    while not stop.wait(seconds):
        count += 1
        now = _read(path)
        if now is not None and now.get("owner") != me["owner"]:
            if lost is not None:
                lost()
            return
        with contextlib.suppress(OSError):  # a full or absent disk: the checkpoint will tell
            _beat(path, me, count)


def _beat(path: Path, me: dict[str, Any], count: int) -> None:
    beside = path.with_name(f".lease.{me['owner']}")
    beside.write_text(json.dumps(me | {"beat": count}), encoding="utf-8")
    beside.replace(path)


def _read(path: Path) -> dict[str, Any] | None:
    """What the lease says: None without one; one that cannot be read says nothing, but is there."""
    try:
        said = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError):
        return {}
    return said if isinstance(said, dict) else {}


def _boot() -> str:
    """This machine, since it was started, as its processes number themselves: pids mean something only within."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip() + str(Path("/proc/self/ns/pid").readlink())
    except OSError:
        return ""


def _is_dead(lease: dict[str, Any], locked: bool) -> bool:
    """Whether the holder was a process of this machine that is no more. locked: this machine's lock is ours."""
    if not lease.get("boot") or lease["boot"] != _boot() or lease.get("host") != socket.gethostname():
        return False
    try:
        os.kill(int(lease["pid"]), 0)
    except ProcessLookupError:
        return True
    except (OSError, ValueError, KeyError, TypeError):
        return False
    return locked  # the number may have come back for another process, which would not hold the lock


# --- at Blob ----------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def hold_at(
    place: Place,
    blobs: Leases,
    *,
    lost: Callable[[], None],
    seconds: int = LEASE_SECONDS,
    renew_seconds: float = RENEW_SECONDS,
    longer_seconds: float = LONGER_SECONDS,
) -> Iterator[None]:
    """Hold a run's folder at Blob by a lease on the blob `lease` in it, which a thread renews.

    RunIsHeld when another trainer still has it after the time in which a killed one would have lost it. lost: called
    when another has it. While Blob does not answer the run goes on, and the first answer tells.
    """
    name, me = place.name("lease"), str(uuid.uuid4())
    stop = threading.Event()
    renewing = threading.Thread(target=_keep_renewing, args=(name, me, blobs, renew_seconds, stop, lost), daemon=True)
    try:  # a signal may come between the answer and the next line
        _wait_for_lease(place, name, me, blobs, seconds, longer_seconds)
        renewing.start()
        yield
    finally:
        stop.set()  # first: what renews now finds the lease given up, not lost
        with contextlib.suppress(Lost, PlannerError):  # it ends by itself
            blobs.release(name, me)


def _wait_for_lease(place: Place, name: str, me: str, blobs: Leases, seconds: int, longer_seconds: float) -> None:
    ask = Patience()
    until = time.monotonic() + seconds + longer_seconds
    while not ask(f"asking for the lease of {place}", lambda: blobs.acquire(name, me, seconds)):
        if time.monotonic() > until:
            raise RunIsHeld(f"{place} is used by another trainer: wait for it, or stop it")
        time.sleep(seconds / 20)


def _keep_renewing(
    name: str, me: str, blobs: Leases, seconds: float, stop: threading.Event, lost: Callable[[], None]
) -> None:
    while not stop.wait(seconds):
        try:
            ours = blobs.renew(name, me)
        except (Lost, PlannerError):  # no answer, or an identity that is refused just now: the mirror will tell
            continue
        if not ours:
            if not stop.is_set():
                lost()
            return
