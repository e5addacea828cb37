"""The Blob store against Azurite, with the real SDK: whole, resumed, and through faults of the network."""

from __future__ import annotations

import hashlib
import threading
import time
import uuid
from pathlib import Path

import pytest
from blob import ACCOUNT, Azurite, Wire, azurite

from planner.errors import PlannerError
from workloads import store
from workloads.blobs import AzureBlobs, Place, parse_place
from workloads.store import Patience, download, upload

pytest.importorskip("azure.storage.blob", reason="the store needs azure-storage-blob: run make live")

MIB = 1 << 20


@pytest.fixture
def container(emulator: Azurite, request: pytest.FixtureRequest) -> str:
    return emulator.container("c" + hashlib.sha256(request.node.name.encode()).hexdigest()[:16])


def content(mib: int) -> bytes:
    """Bytes that do not repeat."""
    return b"".join(hashlib.sha256(i.to_bytes(8, "big")).digest() for i in range(mib * MIB // 32))


def test_a_folder_goes_up_and_comes_down_the_same(container: str, tmp_path: Path) -> None:
    made = tmp_path / "a"
    (made / "inner").mkdir(parents=True)
    (made / "large").write_bytes(content(20))  # three blocks
    (made / "empty").touch()
    (made / "inner" / "naïve name").write_text("x")
    place = parse_place(f"{container}/run/result")
    blobs = AzureBlobs(place)
    assert upload(made, place, blobs) == 20 * MIB + 1
    assert upload(made, place, blobs) == 0
    assert download(place, tmp_path / "b", blobs) == 20 * MIB + 1
    for name in ("large", "empty", "inner/naïve name"):
        assert (tmp_path / "b" / name).read_bytes() == (made / name).read_bytes()
    assert store.folders(parse_place(f"{container}/run"), blobs) == ["result"]
    store.remove(place, blobs)
    assert store.folders(parse_place(f"{container}/run"), blobs) == []


def test_a_connection_cut_in_the_middle_of_an_upload_costs_only_the_block_that_was_under_way(
    container: str, emulator: Azurite, tmp_path: Path
) -> None:
    made = tmp_path / "a"
    made.mkdir()
    (made / "large").write_bytes(content(40))  # five blocks
    # both cut in the middle of a block: 12 MiB is within the second
    wire = Wire(emulator.port, [12 * MIB, 3 * MIB])
    place = Place(f"http://127.0.0.1:{wire.port}/{ACCOUNT}", parse_place(container).container, "run")
    sent: list[int] = []
    blobs = AzureBlobs(place)
    stage = blobs.stage
    blobs.stage = lambda name, block, part: (sent.append(len(part)), stage(name, block, part))[1]  # type: ignore[method-assign,func-returns-value]
    upload(made, place, blobs, patience=Patience(60))
    wire.close()
    assert wire.cut == 2
    assert len(sent) == 5 + 2  # each block once, and again what was cut
    direct = parse_place(f"{container}/run")
    download(direct, tmp_path / "b", AzureBlobs(direct))
    assert (tmp_path / "b" / "large").read_bytes() == content(40)


def test_an_upload_that_was_killed_goes_on_with_the_blocks_that_arrived(container: str, tmp_path: Path) -> None:
    made = tmp_path / "a"
    made.mkdir()
    (made / "large").write_bytes(content(32))  # four blocks
    place = parse_place(f"{container}/run")
    blobs = AzureBlobs(place)
    stage, staged = blobs.stage, []

    def killed(name: str, block: str, part: bytes) -> None:
        if len(staged) == 3:
            raise KeyboardInterrupt
        stage(name, block, part)
        staged.append(block)

    blobs.stage = killed  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt):
        upload(made, place, blobs)
    with pytest.raises(PlannerError, match="no whole folder"):
        download(place, tmp_path / "b", blobs)
    assert upload(made, place, AzureBlobs(place)) == 8 * MIB
    assert download(place, tmp_path / "b", blobs) == 32 * MIB


def test_blob_that_is_gone_for_a_minute_is_waited_for(tmp_path: Path) -> None:
    with azurite(tmp_path / "azurite") as emulator:
        place = parse_place(f"{emulator.container('results')}/run")
        made = tmp_path / "a"
        made.mkdir()
        (made / "large").write_bytes(content(16))
        emulator.stop()
        back = threading.Timer(60, emulator.start)
        back.start()
        began = time.monotonic()
        assert upload(made, place, AzureBlobs(place), patience=Patience(300)) == 16 * MIB
        assert time.monotonic() - began >= 60
        back.join()
        assert download(place, tmp_path / "b", AzureBlobs(place)) == 16 * MIB


def test_a_lease_is_one_holders_and_other_folders_are_written_and_taken_away_beside_it(
    container: str, tmp_path: Path
) -> None:
    base = parse_place(f"{container}/run")
    blobs = AzureBlobs(base)
    me, other = str(uuid.uuid4()), str(uuid.uuid4())
    ours: list[bool] = []
    # made by whoever is first, and nobody fails who finds it made meanwhile
    ids = [str(uuid.uuid4()) for _ in range(4)]
    racing = [threading.Thread(target=lambda i=i: ours.append(blobs.acquire("race/lease", i, 15))) for i in ids]
    for one in racing:
        one.start()
    for one in racing:
        one.join()
    assert sorted(ours) == [False, False, False, True]

    assert blobs.acquire("run/lease", me, 15)
    assert blobs.acquire("run/lease", me, 15)  # asked again, as after an answer that was lost
    assert not blobs.acquire("run/lease", other, 15)
    assert not blobs.renew("run/lease", other)
    blobs.release("run/lease", other)  # not theirs: nothing happens
    assert blobs.renew("run/lease", me)
    (tmp_path / "file").write_text("x")
    for name in ("checkpoint-1", "checkpoint-2"):
        upload(tmp_path, base._replace(prefix=f"run/{name}"), blobs)
    assert store.folders(base, blobs) == ["checkpoint-1", "checkpoint-2"]
    store.remove(base._replace(prefix="run/checkpoint-1"), blobs)
    assert store.folders(base, blobs) == ["checkpoint-2"]
    blobs.release("run/lease", me)
    assert not blobs.renew("run/lease", me)
    assert blobs.acquire("run/lease", other, 15)
    blobs._client.get_blob_client("run/lease").delete_blob(lease=other)
    assert not blobs.renew("run/lease", other)
    blobs.release("run/lease", other)
    with pytest.raises(PlannerError, match="has no container nowhere"):
        AzureBlobs(base._replace(container="nowhere")).acquire("run/lease", me, 15)


def test_az_is_a_place_in_the_account_of_the_environment(
    container: str, emulator: Azurite, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AZURE_STORAGE_ACCOUNT_NAME", emulator.url)
    made = tmp_path / "a"
    made.mkdir()
    (made / "file").write_text("x")
    url = f"az://{container.rpartition('/')[2]}/run"
    assert parse_place(url) == parse_place(f"{container}/run")
    assert store.main(["upload", str(made), url]) == 0
    assert store.main(["download", url, str(tmp_path / "b")]) == 0
    assert (tmp_path / "b" / "file").read_text() == "x"


def test_what_is_not_there_and_what_is_refused_are_sentences(emulator: Azurite, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    nowhere = parse_place(f"{emulator.url}/nowhere/run")
    with pytest.raises(PlannerError, match=f"{emulator.url} has no container nowhere: create it, or correct the URL"):
        upload(tmp_path, nowhere, AzureBlobs(nowhere))
    wrong = {"account_name": ACCOUNT, "account_key": "bm90IHRoZSBrZXk="}
    with pytest.raises(PlannerError, match="is refused: give this identity the role Storage Blob Data Contributor"):
        upload(tmp_path, nowhere, AzureBlobs(nowhere, credential=wrong))
