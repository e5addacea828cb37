"""Checkpoints are whole or do not exist, and one trainer at a time writes them."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from planner.errors import PlannerError
from workloads.blobs import Lost, Place
from workloads.finetune.checkpoint import (
    DiskFull,
    check_same_run,
    clean,
    manifest_of,
    newest,
    prune,
    saved,
    step_of,
    write,
)
from workloads.finetune.lease import RunIsHeld, hold, hold_at

ROOT = Path(__file__).parents[2]
FACTS = {"config": "c0", "data": "d0"}


def make(folder: Path, step: int, content: bytes = b"weights") -> Path:
    def fill(partial: Path) -> None:
        (partial / "adapter.safetensors").write_bytes(content)
        (partial / "inner").mkdir()
        (partial / "inner" / "state.json").write_text("{}")

    return write(folder / f"checkpoint-{step}", fill, FACTS | {"step": step})


def test_a_checkpoint_that_was_written_is_whole_and_says_what_it_is_of(tmp_path: Path) -> None:
    said = manifest_of(make(tmp_path, 20))
    assert said is not None
    assert said["step"] == 20
    assert said["config"] == "c0"
    assert sorted(said["files"]) == ["adapter.safetensors", "inner/state.json"]
    # printf weights | sha256sum
    digest = "9a129038d9a00aed0cf6a7ea059ca50a813449061ab87848cf1a13eafdf33b2c"
    assert said["files"]["adapter.safetensors"] == {"bytes": 7, "sha256": digest}


def test_the_newest_is_the_one_with_the_highest_step_whatever_the_clock_says(tmp_path: Path) -> None:
    for step in (9, 100, 20):
        make(tmp_path, step)
    os.utime(tmp_path / "checkpoint-100", (0, 0))  # a clock that went back to 1970
    assert [step_of(path) for path in saved(tmp_path)] == [100, 20, 9]
    assert newest(tmp_path) == (tmp_path / "checkpoint-100", [])


@pytest.mark.parametrize("damage", ["truncated", "longer", "changed", "missing", "no manifest", "half a manifest"])
def test_a_checkpoint_that_is_not_whole_is_never_resumed(tmp_path: Path, damage: str) -> None:
    make(tmp_path, 10)
    broken = make(tmp_path, 20)
    file, manifest = broken / "adapter.safetensors", broken / "manifest.json"
    match damage:
        case "truncated":
            file.write_bytes(b"weigh")
        case "longer":
            file.write_bytes(b"weights.")
        case "changed":
            file.write_bytes(b"Weights")
        case "missing":
            file.unlink()
        case "no manifest":
            manifest.unlink()
        case "half a manifest":
            manifest.write_text(manifest.read_text()[:40])
    assert newest(tmp_path) == (tmp_path / "checkpoint-10", [broken])


@settings(max_examples=25, deadline=None)  # a disk may be slow
@given(st.data())
def test_a_checkpoint_cut_anywhere_is_not_whole(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    folder = tmp_path_factory.mktemp("cut")
    made = make(folder, 5, bytes(range(256)) * 4)
    files = sorted(path for path in made.rglob("*") if path.is_file())
    file = data.draw(st.sampled_from(files))
    file.write_bytes(file.read_bytes()[: data.draw(st.integers(0, file.stat().st_size - 1))])
    assert manifest_of(made) is None
    assert newest(folder)[0] is None


def test_a_writer_that_fails_leaves_what_was_there_and_nothing_of_its_own(tmp_path: Path) -> None:
    make(tmp_path, 10)

    def fill(partial: Path) -> None:
        (partial / "adapter.safetensors").write_bytes(b"half")
        raise RuntimeError("the driver is gone")

    with pytest.raises(RuntimeError, match="driver"):
        write(tmp_path / "checkpoint-20", fill, FACTS)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-10"]


def test_a_writer_that_is_killed_leaves_a_folder_that_does_not_count_and_is_cleaned_away(tmp_path: Path) -> None:
    make(tmp_path, 10)
    program = (
        "import os, signal, sys\nfrom pathlib import Path\nfrom workloads.finetune.checkpoint import write\n"
        "def fill(partial):\n    (partial / 'adapter.safetensors').write_bytes(b'half')\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
        "write(Path(sys.argv[1]) / 'checkpoint-20', fill, {})"
    )
    done = subprocess.run([sys.executable, "-c", program, tmp_path], cwd=ROOT, check=False)
    assert done.returncode == -9
    assert (tmp_path / "checkpoint-20.partial").is_dir()
    assert newest(tmp_path)[0] == tmp_path / "checkpoint-10"
    assert clean(tmp_path) == ["checkpoint-20.partial"]
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-10"]


def test_broken_checkpoints_are_cleaned_away_so_that_whole_ones_are_not_given_up_for_them(tmp_path: Path) -> None:
    make(tmp_path, 10)
    (make(tmp_path, 20) / "adapter.safetensors").write_bytes(b"")
    assert clean(tmp_path) == ["checkpoint-20"]
    assert prune(tmp_path, keep=1) == []
    assert newest(tmp_path)[0] == tmp_path / "checkpoint-10"


def test_only_the_plans_number_of_checkpoints_stays_and_the_best_one(tmp_path: Path) -> None:
    for step in (10, 20, 30, 40):
        make(tmp_path, step)
    assert prune(tmp_path, keep=2, spare="checkpoint-10") == ["checkpoint-20"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-10", "checkpoint-30", "checkpoint-40"]


def test_files_can_be_read_by_the_server_whatever_the_umask(tmp_path: Path) -> None:
    before = os.umask(0o077)
    try:
        made = make(tmp_path, 10)
    finally:
        os.umask(before)
    assert made.stat().st_mode & 0o555 == 0o555
    for path in made.rglob("*"):
        assert path.stat().st_mode & (0o555 if path.is_dir() else 0o444) == (0o555 if path.is_dir() else 0o444), path


def full(_: Path) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def test_on_a_full_disk_older_checkpoints_are_given_up_and_the_new_one_is_written(tmp_path: Path) -> None:
    for step in (10, 20, 30):
        make(tmp_path, step)
    tries = []

    def fill(partial: Path) -> None:
        tries.append(sorted(path.name for path in tmp_path.iterdir()))
        if len(tries) == 1:
            full(partial)
        (partial / "adapter.safetensors").write_bytes(b"x")

    write(tmp_path / "checkpoint-40", fill, FACTS)
    assert tries[1] == ["checkpoint-30", "checkpoint-40.partial"]
    assert newest(tmp_path)[0] == tmp_path / "checkpoint-40"


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 64 vs 0: PytorchStreamWriter failed"),
        Exception("I/O error: No space left on device (os error 28)"),  # safetensors, in Rust's words
    ],
)
def test_a_disk_that_stays_full_loses_no_whole_checkpoint(tmp_path: Path, error: Exception) -> None:
    make(tmp_path, 10)
    make(tmp_path, 20)

    def fill(_: Path) -> None:
        raise error

    with pytest.raises(DiskFull) as raised:
        write(tmp_path / "checkpoint-30", fill, FACTS)
    assert raised.value.filename == str(tmp_path)
    assert newest(tmp_path) == (tmp_path / "checkpoint-20", [])


def test_a_checkpoint_of_another_configuration_is_refused(tmp_path: Path) -> None:
    made = make(tmp_path, 10)
    said = manifest_of(made) or {}
    check_same_run(made, said, config="c0", data="d0")
    with pytest.raises(PlannerError, match="another data"):
        check_same_run(made, said, config="c0", data="d1")


# --- one trainer at a time --------------------------------------------------------------------------------------------


def test_a_second_trainer_on_this_machine_is_refused(tmp_path: Path) -> None:
    with hold(tmp_path), pytest.raises(RunIsHeld, match="on this machine"), hold(tmp_path):
        pass
    with hold(tmp_path):  # the first is gone
        pass
    assert not (tmp_path / "lease.json").exists()


def foreign(folder: Path, beat: int) -> None:
    said = {"owner": "other", "host": "node-7", "pid": 1, "boot": "elsewhere", "beat": beat}
    beside = folder / "written"
    beside.write_text(json.dumps(said))
    beside.replace(folder / "lease.json")


def test_a_second_trainer_on_another_machine_is_refused_while_the_first_ones_number_grows(tmp_path: Path) -> None:
    foreign(tmp_path, 0)
    stop = threading.Event()

    def beat() -> None:
        count = 0
        while not stop.wait(0.05):
            count += 1
            foreign(tmp_path, count)

    other = threading.Thread(target=beat)
    other.start()
    try:
        with pytest.raises(RunIsHeld, match="node-7, process 1"), hold(tmp_path, stands_still_seconds=5.0):
            pass
    finally:
        stop.set()
        other.join()


def test_a_run_whose_holder_stands_still_is_free(tmp_path: Path) -> None:
    foreign(tmp_path, 17)
    with hold(tmp_path, beat_seconds=0.05, stands_still_seconds=0.2):
        assert json.loads((tmp_path / "lease.json").read_text())["owner"] != "other"


def test_a_killed_trainer_of_this_machine_is_not_waited_for(tmp_path: Path) -> None:
    program = (
        "import os, signal, sys\nfrom pathlib import Path\nfrom workloads.finetune.lease import hold\n"
        "with hold(Path(sys.argv[1])):\n    os.kill(os.getpid(), signal.SIGKILL)"
    )
    subprocess.run([sys.executable, "-c", program, tmp_path], cwd=ROOT, check=False)
    assert (tmp_path / "lease.json").exists()
    began = time.monotonic()
    with hold(tmp_path, stands_still_seconds=60.0):
        assert time.monotonic() - began < 60


def test_who_has_lost_the_run_is_told(tmp_path: Path) -> None:
    lost = threading.Event()
    with hold(tmp_path, beat_seconds=0.05, lost=lost.set):
        foreign(tmp_path, 1)
        assert lost.wait(10)
    assert json.loads((tmp_path / "lease.json").read_text())["owner"] == "other"


@pytest.mark.parametrize("jump", [-3600, 3600])
def test_a_wall_clock_that_jumps_changes_nothing(tmp_path: Path, jump: int, monkeypatch: pytest.MonkeyPatch) -> None:
    now = time.time()
    monkeypatch.setattr(time, "time", lambda: now + jump)
    foreign(tmp_path, 3)
    with hold(tmp_path, beat_seconds=0.05, stands_still_seconds=0.2):
        make(tmp_path, 10)
        make(tmp_path, 20)
    assert newest(tmp_path)[0] == tmp_path / "checkpoint-20"


# --- at Blob ----------------------------------------------------------------------------------------------------------

MIRROR = Place("https://account.blob.core.windows.net", "checkpoints", "run-1")


class Leases:
    """A lease in memory: whose it is; fault: raised by every renewal."""

    def __init__(self, holder: str | None = None) -> None:
        self.holder = holder
        self.fault: Exception | None = None
        self.renewed = threading.Event()

    def acquire(self, name: str, lease: str, seconds: int) -> bool:
        assert name == "run-1/lease"
        self.holder = self.holder or lease
        return self.holder == lease

    def renew(self, name: str, lease: str) -> bool:
        self.renewed.set()
        if self.fault is not None:
            raise self.fault
        return self.holder == lease

    def release(self, name: str, lease: str) -> None:
        if self.holder == lease:
            self.holder = None


def unexpected() -> None:
    raise AssertionError("the lease was not lost")


def test_a_lease_is_held_and_given_up_also_where_the_run_is_refused(tmp_path: Path) -> None:
    leases = Leases()

    def refused() -> None:
        with hold_at(MIRROR, leases, lost=unexpected, renew_seconds=0.01):
            assert leases.renewed.wait(10)
            assert leases.holder is not None
            raise PlannerError("no such model")

    with pytest.raises(PlannerError, match="no such model"):
        refused()
    assert leases.holder is None


@pytest.mark.parametrize("jump", [-3600, 3600])
def test_who_comes_second_waits_as_long_as_a_killed_holder_has_it_and_refuses(
    jump: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    leases, now = Leases("another"), [100.0]

    def sleep(seconds: float) -> None:
        now[0] += seconds

    monkeypatch.setattr(time, "sleep", sleep)
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    monkeypatch.setattr(time, "time", lambda: now[0] * jump)
    said = "checkpoints/run-1 is used by another trainer: wait for it, or stop it"
    with pytest.raises(RunIsHeld, match=said), hold_at(MIRROR, leases, lost=unexpected):
        pass
    assert 70 < now[0] - 100 < 80
    assert leases.holder == "another"

    def freed(seconds: float) -> None:
        sleep(seconds)
        if now[0] > 260:
            leases.holder = None

    now[0] = 200.0
    monkeypatch.setattr(time, "sleep", freed)
    with hold_at(MIRROR, leases, lost=unexpected):
        assert 260 < now[0] < 264


@pytest.mark.parametrize("fault", [Lost("no answer"), PlannerError("access is refused")])
def test_while_blob_does_not_answer_a_holder_goes_on_and_the_first_answer_tells(fault: Exception) -> None:
    leases, lost = Leases(), threading.Event()
    with hold_at(MIRROR, leases, lost=lost.set, renew_seconds=0.01):
        leases.fault = fault
        for _ in range(3):
            leases.renewed.clear()
            assert leases.renewed.wait(10)
        assert not lost.is_set()
        leases.holder, leases.fault = "another", None
        assert lost.wait(10)
    assert leases.holder == "another"
