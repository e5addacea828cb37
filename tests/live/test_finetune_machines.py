"""Runs that have nothing but Blob: one trainer at a time, several machines, and disks that come back empty."""

from __future__ import annotations

import json
import shutil
import signal
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import tiny
from blob import Azurite, azurite, free_port

from workloads import store
from workloads.blobs import AzureBlobs, Place, parse_place
from workloads.finetune import FAILED, FINISHED, INTERRUPTED, REFUSED
from workloads.store import download, folders, upload

for needed in ("torch", "transformers", "peft", "trl", "bitsandbytes", "azure.storage.blob"):
    pytest.importorskip(needed, reason=f"the program needs {needed}: run make live")

SOON = "from workloads.finetune import __main__ as program\nprogram.ELSEWHERE_SECONDS = 1.0\n"
ADAPTER = "adapter_model.safetensors"
EXACT = {
    "method": "lora",
    "lora_dropout": 0.0,
    "weights": "fp32",
    "precision": "fp32",
    "micro_batch": 1,
    "gradient_accumulation_steps": 1,
}


class Bucket(NamedTuple):
    """A storage account as a Job sees it: what its environment says, and what it reads."""

    environment: dict[str, str]
    model: str
    data: str

    def place(self, url: str) -> Place:
        container, _, path = url.removeprefix("az://").partition("/")
        return parse_place(f"{self.environment['AZURE_STORAGE_ACCOUNT_NAME']}/{container}/{path}")

    def settings(self, folder: Path, name: str, **more: Any) -> dict[str, Any]:
        """Of a run that has nothing but Blob: mirror and result are by its name."""
        checkpoints = {"folder": str(folder / "checkpoints"), "mirror": f"az://checkpoints/{name}"}
        said = tiny.settings(folder, self.model, self.data, upload=f"az://adapters/{name}", **more)
        return said | {"checkpoints": said["checkpoints"] | checkpoints}


@pytest.fixture(scope="module")
def emulator(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Azurite]:
    """One of this file's own: a test stops it."""
    with azurite(tmp_path_factory.mktemp("azurite")) as made:
        yield made


@pytest.fixture(scope="module")
def bucket(emulator: Azurite, tmp_path_factory: pytest.TempPathFactory) -> Bucket:
    folder = tmp_path_factory.mktemp("inputs")
    for name in ("models", "datasets", "checkpoints", "adapters"):
        emulator.container(name)
    made = Bucket({"AZURE_STORAGE_ACCOUNT_NAME": emulator.url}, "az://models/tiny", "az://datasets/chat.jsonl")
    place = made.place(made.model)
    upload(tiny.write_model(folder / "model"), place, AzureBlobs(place))
    # by another tool, which notes no sum
    data = AzureBlobs(made.place(made.data))._client.get_blob_client("chat.jsonl")
    data.upload_blob(tiny.write_data(folder / "chat.jsonl", copies=4).read_bytes())
    return made


def mirrored(bucket: Bucket, name: str) -> list[str]:
    place = bucket.place(f"az://checkpoints/{name}")
    return folders(place, AzureBlobs(place))


def result(bucket: Bucket, name: str, folder: Path) -> bytes:
    """The adapter that a run uploaded."""
    place = bucket.place(f"az://adapters/{name}")
    download(place, folder, AzureBlobs(place))
    return (folder / ADAPTER).read_bytes()


def plain_result(forker: tiny.Forker, bucket: Bucket, folder: Path, **more: Any) -> bytes:
    """The adapter of the same run with nothing in its way."""
    said = tiny.settings(folder, bucket.model, bucket.data, **more)
    done = forker.run(tiny.write_config(folder, said), environment=bucket.environment)
    assert done.code == FINISHED, done.errors.read_text()
    return (folder / "result" / ADAPTER).read_bytes()


# --- one trainer at a time --------------------------------------------------------------------------------------------


def test_a_run_is_one_trainers_until_it_ends_or_its_lease_does(
    forker: tiny.Forker, bucket: Bucket, tmp_path: Path
) -> None:
    often = {"checkpoints": {"every_steps": 2, "keep": 2}, "max_steps": 400}
    configs = [tiny.write_config(tmp_path / name, bucket.settings(tmp_path / name, "held", **often)) for name in "abcd"]
    around = {"environment": bucket.environment, "patch": tiny.SHORT_LEASE}
    first = forker.start(configs[0], **around)
    first.until_event("mirrored", checkpoint="checkpoint-4")
    second = forker.run(configs[1], **around)
    assert second.code == FAILED, second.errors.read_text()
    assert "checkpoints/held is used by another trainer: wait for it, or stop it" in second.errors.read_text()
    assert second.events() == []
    assert not (tmp_path / "b" / "scratch").exists()  # refused before anything was fetched

    first.kill(signal.SIGKILL)
    assert first.wait() == -signal.SIGKILL
    began = time.monotonic()
    third = forker.start(configs[2], **around)
    third.until_event("start")
    assert time.monotonic() - began > 5  # nobody released it
    assert third.events("from-mirror")[0]["checkpoint"] == third.events("start")[0]["resumed_from"]
    third.until_event("mirrored")
    third.kill(signal.SIGTERM)
    assert third.wait() == INTERRUPTED, third.errors.read_text()

    fourth = forker.start(configs[3], **around)
    began = time.monotonic()
    fourth.until_event("start")
    assert time.monotonic() - began < 14  # released: not waited for
    assert fourth.events("start")[0]["resumed_from"] == f"checkpoint-{third.events('interrupted')[0]['step']}"
    place = bucket.place("az://checkpoints/held")
    lease = AzureBlobs(place)._client.get_blob_client("held/lease")
    from azure.storage.blob import BlobLeaseClient

    BlobLeaseClient(lease).break_lease(0)
    lease.acquire_lease(15)
    assert fourth.wait() == FAILED
    assert "another trainer has taken the run over: this one ends" in fourth.errors.read_text()
    assert "Traceback" not in fourth.errors.read_text()


def test_while_blob_is_gone_the_run_goes_on_and_what_was_not_mirrored_is_sent_by_the_next_try(
    forker: tiny.Forker, bucket: Bucket, emulator: Azurite, tmp_path: Path
) -> None:
    often = {"checkpoints": {"every_steps": 2, "keep": 2}, "max_steps": 40}
    config = tiny.write_config(tmp_path / "a", bucket.settings(tmp_path / "a", "gone", **often))
    quick = tiny.SHORT_LEASE + "program.MIRROR_SECONDS = 0.0\n"
    run = forker.start(config, environment=bucket.environment, patch=quick)
    run.until_event("mirrored", checkpoint="checkpoint-2")
    emulator.stop()
    try:
        run.until_event("not-mirrored")
        run.until(lambda: len(run.events("not-mirrored")) >= 2)
        run.kill(signal.SIGTERM)
        assert run.wait() == INTERRUPTED, run.errors.read_text()
    finally:
        emulator.start()
    stopped = run.events("interrupted")[0]["step"]
    assert f"checkpoint-{stopped}" not in mirrored(bucket, "gone")
    again = forker.run(config, environment=bucket.environment, patch=tiny.SHORT_LEASE)
    assert again.code == FINISHED, again.errors.read_text()
    assert again.events("mirrored")[0]["checkpoint"] == again.events("start")[0]["resumed_from"]
    assert again.events("start")[0]["resumed_from"] == f"checkpoint-{stopped}"


def test_the_best_checkpoint_outlives_the_disk(forker: tiny.Forker, bucket: Bucket, tmp_path: Path) -> None:
    """The best is evaluated early, and the pod is replaced when only newer ones would be kept."""
    held = tiny.write_jsonl(
        tmp_path / "held.jsonl", [tiny.conversation(question, "zzzz") for question in tiny.QUESTIONS]
    )
    evaluated = {
        "evaluation": {"every_steps": 2, "patience": 3},
        "data": {"evaluation": str(held)},
        "max_steps": 40,
        "method": "lora",
    }
    kept = {"checkpoints": {"every_steps": 1, "keep": 1}}
    expected = plain_result(forker, bucket, tmp_path / "plain", **evaluated)
    first = tiny.write_config(tmp_path / "a", bucket.settings(tmp_path / "a", "best", **evaluated, **kept))
    run = forker.start(first, environment=bucket.environment)
    run.until(lambda: [e for e in run.events("evaluation") if e["step"] >= e["best_step"] + 4] != [])
    run.kill(signal.SIGTERM)
    assert run.wait() == INTERRUPTED, run.errors.read_text()
    best = run.events("evaluation")[-1]["best_step"]
    assert f"checkpoint-{best}" in mirrored(bucket, "best")
    other = tiny.write_config(tmp_path / "b", bucket.settings(tmp_path / "b", "best", **evaluated, **kept))
    resumed = forker.run(other, environment=bucket.environment)
    assert resumed.code == FINISHED, resumed.errors.read_text()
    assert [event["checkpoint"] for event in resumed.events("from-mirror")][1:] == [f"checkpoint-{best}"]
    assert result(bucket, "best", tmp_path / "best") == expected


def test_a_finished_run_is_finished_for_a_pod_with_an_empty_disk(
    forker: tiny.Forker, bucket: Bucket, tmp_path: Path
) -> None:
    configs = [
        tiny.write_config(tmp_path / name, bucket.settings(tmp_path / name, "done", max_steps=1)) for name in "ab"
    ]
    assert forker.run(configs[0], environment=bucket.environment).code == FINISHED
    again = forker.run(configs[1], environment=bucket.environment)
    assert again.code == FINISHED, again.errors.read_text()
    assert [event["event"] for event in again.events()] == ["data", "finished"]
    # and another run that was told the same place writes over nothing
    before = result(bucket, "done", tmp_path / "before")
    other = bucket.settings(tmp_path / "c", "done", max_steps=1, seed=7)
    refused = forker.run(tiny.write_config(tmp_path / "c", other), environment=bucket.environment)
    assert refused.code == REFUSED
    assert "az://adapters/done was made with another config" in refused.errors.read_text()
    assert refused.events("start") == []
    assert result(bucket, "done", tmp_path / "after") == before


def test_checkpoints_of_other_data_are_refused_before_a_model_is_loaded(
    forker: tiny.Forker, bucket: Bucket, tmp_path: Path
) -> None:
    often = {"checkpoints": {"every_steps": 2}, "max_steps": 400}
    first = forker.start(
        tiny.write_config(tmp_path / "a", bucket.settings(tmp_path / "a", "data", **often)),
        environment=bucket.environment,
    )
    first.until_event("mirrored")
    first.kill(signal.SIGTERM)
    assert first.wait() == INTERRUPTED
    said = bucket.settings(tmp_path / "b", "data", **often)
    said["data"] = {"train": str(tiny.write_data(tmp_path / "other.jsonl", copies=2))}
    refused = forker.run(tiny.write_config(tmp_path / "b", said), environment=bucket.environment)
    assert refused.code == REFUSED
    assert "was made with another data" in refused.errors.read_text()
    assert refused.events("start") == refused.events("from-mirror") == []


@pytest.mark.parametrize(
    ("field", "url", "said"),
    [
        ("model", "az://models/none", "there is no whole folder at {account}/models/none: upload it with python -m"),
        ("train", "az://datasets/none.jsonl", "there is no blob at {account}/datasets/none.jsonl: upload the file"),
        ("model", "az://nowhere/tiny", "{account} has no container nowhere: create it, or correct the URL"),
        ("train", "az://nowhere/chat.jsonl", "{account} has no container nowhere"),
        ("mirror", "az://nowhere/run", "{account} has no container nowhere"),
        ("upload", "az://nowhere/run", "{account} has no container nowhere"),
    ],
)
def test_what_is_not_at_blob_is_refused_before_anything_is_trained(
    field: str, url: str, said: str, forker: tiny.Forker, bucket: Bucket, tmp_path: Path
) -> None:
    settings = bucket.settings(tmp_path, "refused")
    inner = {"train": "data", "mirror": "checkpoints"}.get(field)
    (settings[inner] if inner else settings)[field] = url
    done = forker.run(tiny.write_config(tmp_path, settings), environment=bucket.environment)
    assert done.code == REFUSED, done.errors.read_text()
    (sentence,) = done.errors.read_text().splitlines()
    assert said.format(account=bucket.environment["AZURE_STORAGE_ACCOUNT_NAME"]) in sentence
    assert done.events("start") == []
    place = bucket.place("az://checkpoints/refused")  # what is refused holds nobody up
    me = str(uuid.uuid4())
    assert AzureBlobs(place).acquire("refused/lease", me, 15)
    AzureBlobs(place).release("refused/lease", me)


def test_a_stop_in_the_upload_is_gone_on_with_by_the_next_try(
    forker: tiny.Forker, bucket: Bucket, tmp_path: Path
) -> None:
    configs = [
        tiny.write_config(tmp_path / name, bucket.settings(tmp_path / name, "cut", max_steps=2)) for name in "ab"
    ]
    stop = (
        "import os, signal\nfrom workloads import store\nplain = store._send\n"
        f"def send(one, *rest):\n    if one.path.name == {ADAPTER!r} and 'result' in str(one.path):\n"
        "        os.kill(os.getpid(), signal.SIGTERM)\n    return plain(one, *rest)\nstore._send = send\n"
    )
    cut = forker.run(configs[0], environment=bucket.environment, patch=stop)
    assert cut.code == INTERRUPTED, cut.errors.read_text()
    place = bucket.place("az://adapters/cut")
    assert store.manifest_at(place, AzureBlobs(place)) is None
    again = forker.run(configs[0], environment=bucket.environment)
    assert again.code == FINISHED, again.errors.read_text()
    assert again.events("start") == []
    expected = result(bucket, "cut", tmp_path / "cut")
    store.remove(place, AzureBlobs(place))
    empty = forker.run(configs[1], environment=bucket.environment)
    assert empty.code == FINISHED, empty.errors.read_text()
    assert result(bucket, "cut", tmp_path / "empty") == expected


# --- several machines -------------------------------------------------------------------------------------------------


class Machines:
    """A run on two machines: two programs with a folder each, as the pods of an Indexed Job are started."""

    def __init__(self, forker: tiny.Forker, bucket: Bucket, folder: Path, name: str, **more: Any) -> None:
        self.forker, self.bucket, self.folder = forker, bucket, folder
        self.configs = [
            tiny.write_config(
                folder / str(i),
                bucket.settings(folder / str(i), name, **EXACT | {"nodes": 2, "max_steps": STEPS} | more),
            )
            for i in range(2)
        ]
        self.port = str(free_port())

    def start(self, machine: int) -> tiny.Program:
        pod = {"JOB_COMPLETION_INDEX": str(machine), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": self.port}
        return self.forker.start(
            self.configs[machine], environment=self.bucket.environment | pod, patch=tiny.SHORT_LEASE + SOON
        )

    def both(self) -> tuple[tiny.Program, tiny.Program]:
        return self.start(0), self.start(1)


STEPS = 40


def losses(*programs: tiny.Program) -> list[float]:
    return [event["loss"] for program in programs for event in program.events("step")]


def ended(*programs: tiny.Program) -> list[int]:
    return [program.wait() for program in programs]


def errors(*programs: tiny.Program) -> str:
    return "".join(program.errors.read_text() for program in programs)


@pytest.fixture(scope="module")
def whole(forker: tiny.Forker, bucket: Bucket, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[float]]:
    """The first machine's folder and the losses of a run on two that nothing stopped; its result is `whole`."""
    folder = tmp_path_factory.mktemp("whole")
    first, other = Machines(forker, bucket, folder, "whole", checkpoints={"every_steps": 20}).both()
    assert ended(first, other) == [FINISHED, FINISHED], errors(first, other)
    assert len(first.events("upload")) == 1
    assert [event["event"] for event in other.events()] == ["data", "finished"]
    assert not (folder / "1" / "result").exists()
    return folder / "0", losses(first)


def test_two_machines_learn_what_one_with_two_processes_learns(
    forker: tiny.Forker, bucket: Bucket, whole: tuple[Path, list[float]], tmp_path: Path
) -> None:
    said = tiny.settings(tmp_path, bucket.model, bucket.data, **EXACT, gpus=2, max_steps=STEPS)
    one = forker.run(
        tiny.write_config(tmp_path, said), environment=bucket.environment | {"MASTER_PORT": str(free_port())}
    )
    assert one.code == FINISHED, one.errors.read_text()
    assert losses(one) == whole[1]


def test_a_stop_of_one_machine_stops_all_and_with_empty_disks_the_result_is_bit_for_bit_the_same(
    forker: tiny.Forker, bucket: Bucket, whole: tuple[Path, list[float]], tmp_path: Path
) -> None:
    first, other = Machines(forker, bucket, tmp_path / "before", "broken").both()
    first.until_event("step", step=2)
    other.kill(signal.SIGTERM)
    assert ended(first, other) == [INTERRUPTED, INTERRUPTED], errors(first, other)
    step = first.events("interrupted")[0]["step"]
    assert 2 <= step < STEPS
    assert mirrored(bucket, "broken") == [f"checkpoint-{step}"]

    again = Machines(forker, bucket, tmp_path / "after", "broken").both()
    assert ended(*again) == [FINISHED, FINISHED], errors(*again)
    assert again[0].events("start")[0]["resumed_from"] == f"checkpoint-{step}"
    assert [p.events("from-mirror")[0]["checkpoint"] for p in again] == [f"checkpoint-{step}"] * 2
    assert [len(p.events("upload")) for p in again] == [1, 0]
    assert losses(first, again[0]) == whole[1]
    assert result(bucket, "broken", tmp_path / "broken") == result(bucket, "whole", tmp_path / "whole")


def test_a_machine_that_is_lost_ends_the_others_with_a_sentence_and_all_go_on_from_the_mirror(
    forker: tiny.Forker, bucket: Bucket, whole: tuple[Path, list[float]], tmp_path: Path
) -> None:
    often = {"checkpoints": {"every_steps": 2}}
    first, other = Machines(forker, bucket, tmp_path / "before", "lost", **often).both()
    first.until_event("mirrored")
    other.kill(signal.SIGKILL)
    assert ended(first, other) == [FAILED, -signal.SIGKILL]
    assert "another process of the run is gone" in errors(first)
    assert "Traceback" not in errors(first)
    again = Machines(forker, bucket, tmp_path / "after", "lost", **often).both()
    assert ended(*again) == [FINISHED, FINISHED], errors(*again)
    assert result(bucket, "lost", tmp_path / "lost") == result(bucket, "whole", tmp_path / "whole")


def without_mirror(machines: Machines, **more: Any) -> Machines:
    """The same without checkpoints.mirror; more: fields that are the same on both."""
    for path in machines.configs:
        said = json.loads(path.read_text()) | more
        said["checkpoints"] |= {"mirror": None} | more.get("checkpoints", {})
        path.write_text(json.dumps(said))
    return machines


def test_machines_that_share_a_folder_need_no_mirror(forker: tiny.Forker, bucket: Bucket, tmp_path: Path) -> None:
    shared = {"checkpoints": {"folder": str(tmp_path / "checkpoints"), "every_steps": 1}}
    machines = Machines(forker, bucket, tmp_path, "shared", max_steps=2)
    without_mirror(machines, result=str(tmp_path / "result"), upload=None, **shared)
    both = machines.both()
    assert ended(*both) == [FINISHED, FINISHED], errors(*both)
    assert (tmp_path / "result" / ADAPTER).exists()
    again = machines.both()
    assert ended(*again) == [FINISHED, FINISHED], errors(*again)
    assert [program.events("start") for program in again] == [[], []]


def test_a_machine_that_lacks_the_checkpoint_ends_the_run_with_a_sentence(
    forker: tiny.Forker, bucket: Bucket, whole: tuple[Path, list[float]], tmp_path: Path
) -> None:
    machines = without_mirror(Machines(forker, bucket, tmp_path, "apart"))
    shutil.copytree(whole[0] / "checkpoints" / "checkpoint-20", tmp_path / "0" / "checkpoints" / "checkpoint-20")
    both = machines.both()
    assert ended(*both) == [FAILED, FAILED], errors(*both)
    for program in both:
        said = "checkpoint-20, from which the run goes on, is not on machine 1: start it again"
        assert said in program.errors.read_text()
        assert "Traceback" not in program.errors.read_text()


def test_a_run_that_is_done_on_the_first_machine_is_finished_for_the_other_that_waits_for_it(
    forker: tiny.Forker, bucket: Bucket, whole: tuple[Path, list[float]], tmp_path: Path
) -> None:
    machines = Machines(forker, bucket, tmp_path, "late")
    shutil.copytree(whole[0] / "result", tmp_path / "0" / "result")
    other = machines.start(1)
    other.until_event("data")
    first = machines.start(0)
    assert ended(first, other) == [FINISHED, FINISHED], errors(first, other)
    assert first.events("start") == []
    assert result(bucket, "late", tmp_path / "late") == result(bucket, "whole", tmp_path / "whole")
