"""Folders to Blob and back: what is whole, what is sent again, and what happens when the network goes."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from planner.errors import PlannerError
from workloads import store
from workloads.blobs import ACCOUNT, AzureBlobs, Blob, Changed, Lost, Place, is_url, parse_place
from workloads.store import Patience, Unreachable, download, upload

PLACE = Place("https://account.blob.core.windows.net", "adapters", "run-1")


class Memory:
    """A container in memory; `fault` is called before every request and may raise."""

    def __init__(self) -> None:
        self.blobs: dict[str, tuple[bytes, str]] = {}
        self.blocks: dict[str, dict[str, bytes]] = {}
        self.asked: list[str] = []
        self.fault: Callable[[str], None] = lambda what: None

    def _ask(self, what: str) -> None:
        self.asked.append(what)
        self.fault(what)

    def find(self, prefix: str) -> dict[str, Blob]:
        self._ask("find")
        return {n: Blob(len(c), s, f"e{hash(c)}") for n, (c, s) in self.blobs.items() if n.startswith(prefix)}

    def staged(self, name: str) -> dict[str, int]:
        self._ask(f"staged {name}")
        return {block: len(content) for block, content in self.blocks.get(name, {}).items()}

    def stage(self, name: str, block: str, content: bytes) -> None:
        self._ask(f"stage {name} {block}")
        self.blocks.setdefault(name, {})[block] = content

    def commit(self, name: str, blocks: list[str], sha256: str) -> None:
        self._ask(f"commit {name}")
        self.blobs[name] = (b"".join(self.blocks[name][block] for block in blocks), sha256)
        del self.blocks[name]

    def put(self, name: str, content: bytes, sha256: str) -> None:
        self._ask(f"put {name}")
        self.blobs[name] = (content, sha256)

    def read(self, name: str, start: int, size: int, etag: str) -> bytes:
        self._ask(f"read {name} {start}")
        content = self.blobs[name][0]
        if etag != f"e{hash(content)}":
            raise Changed(name)
        return content[start : start + size]

    def delete(self, name: str) -> None:
        self._ask(f"delete {name}")
        self.blobs.pop(name, None)


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store, "BLOCK_BYTES", 4)


def folder(path: Path, **files: bytes) -> Path:
    path.mkdir(exist_ok=True)
    for name, content in files.items():
        (path / name).write_bytes(content)
    return path


def impatient() -> Patience:
    return Patience(0.0, sleep=lambda seconds: None)


def test_what_goes_up_comes_down_the_same(tmp_path: Path) -> None:
    made = folder(tmp_path / "a", small=b"abc", empty=b"", large=b"0123456789")
    (made / "inner").mkdir()
    (made / "inner" / "more").write_bytes(b"x")
    blobs = Memory()
    assert upload(made, PLACE, blobs) == 3 + 0 + 10 + 1
    assert blobs.asked[-1] == "put run-1/manifest.json"
    assert download(PLACE, tmp_path / "b", blobs) == 14
    for name in ("small", "empty", "large", "inner/more"):
        assert (tmp_path / "b" / name).read_bytes() == (made / name).read_bytes()
    said = json.loads((tmp_path / "b" / "manifest.json").read_text())
    assert said["files"]["large"] == {"bytes": 10, "sha256": hashlib.sha256(b"0123456789").hexdigest()}


@settings(max_examples=30, deadline=None)
@given(
    files=st.dictionaries(st.sampled_from(["a", "b", "c"]), st.binary(max_size=20), min_size=1),
    lost_at=st.integers(0, 30),
)
def test_an_upload_cut_anywhere_is_not_whole_and_the_next_one_finishes_it(
    tmp_path_factory: pytest.TempPathFactory, files: dict[str, bytes], lost_at: int
) -> None:
    path = tmp_path_factory.mktemp("cut")
    made, blobs = folder(path / "a", **files), Memory()

    def cut(_: str) -> None:
        if len(blobs.asked) > lost_at:
            raise Lost("connection reset")

    blobs.fault = cut
    try:
        upload(made, PLACE, blobs, patience=impatient())
    except Unreachable:
        assert "run-1/manifest.json" not in blobs.blobs
    blobs.fault = lambda what: None
    before = len(blobs.asked)
    upload(made, PLACE, blobs)
    staged_again = [what for what in blobs.asked[before:] if what.startswith("stage ")]
    assert not set(staged_again) & set(blobs.asked[:lost_at])  # a block that arrived is not sent twice
    assert download(PLACE, path / "b", blobs) == sum(map(len, files.values()))
    assert {p.name: p.read_bytes() for p in (path / "b").iterdir() if p.name != "manifest.json"} == files


def test_an_upload_that_is_there_already_sends_nothing(tmp_path: Path) -> None:
    made, blobs = folder(tmp_path / "a", large=b"0123456789"), Memory()
    upload(made, PLACE, blobs)
    before = len(blobs.asked)
    assert upload(made, PLACE, blobs) == 0
    assert blobs.asked[before:] == ["find"]


def test_only_what_changed_is_sent_and_meanwhile_there_is_no_manifest(tmp_path: Path) -> None:
    made, blobs = folder(tmp_path / "a", one=b"abc", two=b"def"), Memory()
    upload(made, PLACE, blobs)
    (made / "two").write_bytes(b"DEF!")
    before = len(blobs.asked)
    assert upload(made, PLACE, blobs) == 4
    assert blobs.asked[before:] == ["find", "delete run-1/manifest.json", "put run-1/two", "put run-1/manifest.json"]


def test_a_sealed_folder_keeps_what_its_manifest_says_and_a_broken_one_does_not_go_up(tmp_path: Path) -> None:
    made, blobs = folder(tmp_path / "a", one=b"abc"), Memory()
    digest = hashlib.sha256(b"abc").hexdigest()
    said = {"version": 1, "step": 40, "files": {"one": {"bytes": 3, "sha256": digest}}}
    (made / "manifest.json").write_text(json.dumps(said))
    upload(made, PLACE, blobs)
    download(PLACE, tmp_path / "b", blobs)
    assert json.loads((tmp_path / "b" / "manifest.json").read_text()) == said
    (made / "one").write_bytes(b"ab")
    with pytest.raises(PlannerError, match="not what its manifest says"):
        upload(made, PLACE, blobs)


def test_a_minute_without_network_is_waited_through(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made, blobs = folder(tmp_path / "a", large=b"0123456789"), Memory()
    now = [0.0]
    monkeypatch.setattr(store.time, "monotonic", lambda: now[0])

    def sleep(seconds: float) -> None:
        now[0] += seconds

    def gone(_: str) -> None:
        if 0 < now[0] < 60 or len(blobs.asked) == 3:
            raise Lost("unreachable")

    blobs.fault = gone
    assert upload(made, PLACE, blobs, patience=Patience(900, sleep=sleep)) == 10
    assert 60 <= now[0] < 60 + store.LONGEST_WAIT_SECONDS * 1.25
    assert download(PLACE, tmp_path / "b", blobs) == 10


def test_patience_ends_with_a_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made, blobs = folder(tmp_path / "a", one=b"abc"), Memory()
    now = [0.0]
    monkeypatch.setattr(store.time, "monotonic", lambda: now[0])

    def gone(_: str) -> None:
        raise Lost("name or service not known")

    def sleep(seconds: float) -> None:
        now[0] += seconds

    blobs.fault = gone
    with pytest.raises(Unreachable, match=r"did not succeed in 100 s .name or service not known.: see to the network"):
        upload(made, PLACE, blobs, patience=Patience(100, sleep=sleep))
    assert 60 < now[0] <= 100 + store.LONGEST_WAIT_SECONDS


def test_a_download_goes_on_with_what_an_earlier_one_left(tmp_path: Path) -> None:
    made, blobs = folder(tmp_path / "a", large=b"0123456789"), Memory()
    upload(made, PLACE, blobs)

    def cut(what: str) -> None:
        if what == "read run-1/large 8":
            raise Lost("connection reset")

    blobs.fault = cut
    with pytest.raises(Unreachable):
        download(PLACE, tmp_path / "b", blobs, patience=impatient())
    assert not (tmp_path / "b" / "large").exists()
    assert not (tmp_path / "b" / "manifest.json").exists()
    blobs.fault = lambda what: None
    assert download(PLACE, tmp_path / "b", blobs) == 2
    assert (tmp_path / "b" / "large").read_bytes() == b"0123456789"


def test_a_file_that_was_spoiled_on_the_way_or_here_is_fetched_again(tmp_path: Path) -> None:
    made, blobs = folder(tmp_path / "a", large=b"0123456789"), Memory()
    upload(made, PLACE, blobs)
    download(PLACE, tmp_path / "b", blobs)
    (tmp_path / "b" / "large").write_bytes(b"0123456_89")
    assert download(PLACE, tmp_path / "b", blobs) == 10
    assert (tmp_path / "b" / "large").read_bytes() == b"0123456789"


def test_a_folder_without_a_manifest_or_with_a_spoiled_file_is_not_taken(tmp_path: Path) -> None:
    made, blobs = folder(tmp_path / "a", large=b"0123456789"), Memory()
    upload(made, PLACE, blobs)
    content, digest = blobs.blobs["run-1/large"]
    blobs.blobs["run-1/large"] = (content[::-1], digest)
    with pytest.raises(PlannerError, match="does not have the SHA-256"):
        download(PLACE, tmp_path / "b", blobs)
    assert not (tmp_path / "b" / "large").exists()
    blobs.delete("run-1/manifest.json")
    with pytest.raises(PlannerError, match="no whole folder at https"):
        download(PLACE, tmp_path / "c", blobs)


@pytest.mark.parametrize("name", ["../etc/passwd", "/etc/passwd", "a/../../b", "a//b", "a\\..\\b"])
def test_a_manifest_cannot_write_outside_of_its_folder(tmp_path: Path, name: str) -> None:
    blobs = Memory()
    text = json.dumps({"version": 1, "files": {name: {"bytes": 1, "sha256": "0"}}}).encode()
    blobs.blobs = {"run-1/manifest.json": (text, ""), f"run-1/{name}": (b"x", "0")}
    with pytest.raises(PlannerError, match="outside of the folder"):
        download(PLACE, tmp_path / "b", blobs)


def test_whole_folders_are_found_and_taken_away_manifest_first(tmp_path: Path) -> None:
    blobs = Memory()
    base = Place(PLACE.account, "checkpoints", "run-1")
    for step in (10, 20):
        upload(folder(tmp_path / str(step), a=b"1"), base._replace(prefix=f"run-1/checkpoint-{step}"), blobs)
    blobs.delete("run-1/checkpoint-20/manifest.json")
    assert store.folders(base, blobs) == ["checkpoint-10"]
    before = len(blobs.asked)
    store.remove(base._replace(prefix="run-1/checkpoint-10"), blobs)
    assert blobs.asked[before:] == ["find", "delete run-1/checkpoint-10/manifest.json", "delete run-1/checkpoint-10/a"]


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("https://a.blob.core.windows.net/c/x/y/", Place("https://a.blob.core.windows.net", "c", "x/y")),
        ("https://a.blob.core.windows.net/c", Place("https://a.blob.core.windows.net", "c", "")),
        ("http://127.0.0.1:10000/devstoreaccount1/c/x", Place("http://127.0.0.1:10000/devstoreaccount1", "c", "x")),
    ],
)
def test_a_url_names_account_container_and_folder(url: str, expected: Place) -> None:
    assert parse_place(url) == expected


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("https://a.blob.core.windows.net/c?sv=1&sig=secret", "must not carry a signature"),
        ("https://a.blob.core.windows.net/", "names no container"),
        ("http://a.blob.core.windows.net/c/x", "is no Blob URL"),
        ("adapters/run-1", "is no Blob URL"),
        ("https://a.blob.core.windows.net/c/../x", "names no container"),
    ],
)
def test_a_url_that_is_none_is_refused_and_its_secret_is_not_repeated(url: str, said: str) -> None:
    with pytest.raises(PlannerError, match=said) as raised:
        parse_place(url)
    assert "secret" not in str(raised.value)


@pytest.mark.parametrize(
    ("account", "url", "expected"),
    [
        (
            "tonnage1",
            "az://adapters/run 1/a%20b/",
            Place("https://tonnage1.blob.core.windows.net", "adapters", "run 1/a%20b"),
        ),
        (
            "https://a.blob.core.chinacloudapi.cn/",
            "az://data",
            Place("https://a.blob.core.chinacloudapi.cn", "data", ""),
        ),
        (
            "http://127.0.0.1:10000/devstoreaccount1",
            "az://data/x.jsonl",
            Place("http://127.0.0.1:10000/devstoreaccount1", "data", "x.jsonl"),
        ),
    ],
)
def test_az_names_container_and_path_and_the_environment_the_account(
    account: str, url: str, expected: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(ACCOUNT, account)
    assert is_url(url)
    assert parse_place(url) == expected


@pytest.mark.parametrize(
    ("account", "url", "said"),
    [
        (None, "az://data/x", "az://data/x is in the account that AZURE_STORAGE_ACCOUNT_NAME names, which is not set"),
        ("", "az://data/x", "which is not set: set it to the account's name"),
        ("My_Account", "az://data/x", "which is no account"),
        ("AccountKey=secret", "az://data/x", "which is no account"),
        ("https://a.blob.core.windows.net?sig=secret", "az://data/x", "which is no account"),
        ("https://a.blob.core.windows.net/data", "az://data/x", "which is no account"),
        ("http://a.blob.core.windows.net", "az://data/x", "which is no account"),
        ("http://127.0.0.1:10000", "az://data/x", "which is no account"),
        ("az://other", "az://data/x", "which is no account"),
        ("tonnage1", "az://data/x?sv=1&sig=secret", "must not carry a signature"),
        ("tonnage1", "az:///x", "names no container: write az://CONTAINER/FOLDER"),
        ("tonnage1", "az://me@data/x", "names no container"),
        ("tonnage1", "az://data/../x", "names no container"),
    ],
)
def test_az_without_an_account_or_a_container_is_refused(
    account: str | None, url: str, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(ACCOUNT, raising=False)
    if account is not None:
        monkeypatch.setenv(ACCOUNT, account)
    with pytest.raises(PlannerError, match=said) as raised:
        parse_place(url)
    assert "secret" not in str(raised.value)


def test_an_emulator_is_used_by_its_key_and_azure_never(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("AZURE_STORAGE_KEY", raising=False)
    local = parse_place("http://127.0.0.1:10000/devstoreaccount1/data/x")
    with pytest.raises(PlannerError, match="is an emulator's: set AZURE_STORAGE_KEY to its key, which Azurite pub"):
        AzureBlobs(local)
    monkeypatch.setenv("AZURE_STORAGE_KEY", "a2V5")
    assert AzureBlobs(local)._client.credential.account_key == "a2V5"
    azure = AzureBlobs(parse_place("https://account.blob.core.windows.net/data/x"))
    assert not hasattr(azure._client.credential, "account_key")


def test_what_a_whole_folder_says_of_itself_is_read_without_fetching_it(tmp_path: Path) -> None:
    made, blobs = folder(tmp_path / "a", one=b"abc"), Memory()
    assert store.manifest_at(PLACE, blobs) is None
    upload(made, PLACE, blobs)
    assert (store.manifest_at(PLACE, blobs) or {})["files"]["one"]["bytes"] == 3
    blobs.blobs["run-1/manifest.json"] = (b"{", "")
    assert store.manifest_at(PLACE, blobs) is None


def test_a_folder_without_files_is_not_uploaded(tmp_path: Path) -> None:
    with pytest.raises(PlannerError, match="holds no file"):
        upload(tmp_path, PLACE, Memory())
    with pytest.raises(PlannerError, match="is no folder"):
        upload(tmp_path / "none", PLACE, Memory())


def test_the_command_says_what_is_wrong_in_one_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert store.main(["upload", str(tmp_path), "https://a.blob.core.windows.net/"]) == 2
    assert capsys.readouterr().err.startswith("store: https://a.blob.core.windows.net/ names no container")
    assert store.main(["download", "az:///x", str(tmp_path)]) == 2
    assert capsys.readouterr().err.startswith("store: az:///x names no container")
