"""From conversations to an answer: check, a Job of QLoRA with a stop in the middle, Blob, and vLLM with its adapter."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import tiny
from blob import Azurite, free_port
from pod import Pod

from planner.catalog.prices import DEFAULT, load_sheet
from planner.plan import make_plan, parse_intent
from planner.plan.lock import lock_of
from workloads.blobs import AzureBlobs, parse_place
from workloads.finetune import FINISHED, INTERRUPTED
from workloads.render import render
from workloads.store import folders, summed

for needed in ("torch", "transformers", "peft", "trl", "bitsandbytes", "azure.storage.blob", "vllm"):
    pytest.importorskip(needed, reason=f"the whole way needs {needed}: run make live")

START_SECONDS = 300.0


@contextlib.contextmanager
def served(model: Path, adapter: Path, log: Path) -> Iterator[str]:
    """vLLM with base and adapter; its address."""
    port = free_port()
    command = [sys.executable, Path(__file__).with_name("vllm_command.py"), "serve", str(model)]
    command += ["--served-model-name=base", "--enable-lora", f"--lora-modules=tuned={adapter}", "--max-lora-rank=32"]
    command += ["--max-model-len=256", "--enforce-eager", f"--port={port}", "--host=127.0.0.1", "--max-num-seqs=2"]
    environment = {"VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"}
    with log.open("w") as out:
        process = subprocess.Popen(
            command, stdout=out, stderr=out, env=os.environ | environment, start_new_session=True
        )
    try:
        end = time.monotonic() + START_SECONDS
        while True:
            with contextlib.suppress(httpx.HTTPError):
                if httpx.get(f"http://127.0.0.1:{port}/health", timeout=5).status_code == 200:
                    break
            assert process.poll() is None, log.read_text()[-4000:]
            assert time.monotonic() < end, log.read_text()[-4000:]
            time.sleep(0.5)
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        process.wait(timeout=60)


def ask(address: str, model: str, question: str) -> str:
    said = {"model": model, "messages": [{"role": "user", "content": question}], "temperature": 0, "max_tokens": 8}
    answer = httpx.post(f"{address}/chat/completions", json=said, timeout=120)
    answer.raise_for_status()
    return str(answer.json()["choices"][0]["message"]["content"])


# twice the same run, so that one of them can be stopped
INTENT = {
    "model": "qwen3-8b",
    "skus": ["Standard_NC24ads_A100_v4"],
    "approved_usd_per_month": 5000,
    "workloads": [
        {
            "kind": "finetune",
            "context": 2048,
            "weights": "blob",
            "settings": {"micro_batch": 4, "lora_rank": 32, "lora_dropout": 0.05},
            "recipe": {"max_steps": 60, "learning_rate": 5e-3, "data": {"train": "chat.jsonl"}},
            "runs": {"whole": {}, "stopped": {}},
        }
    ],
}


def test_what_was_in_the_data_comes_back_from_the_server(emulator: Azurite, tmp_path: Path) -> None:
    """The Jobs of a plan, with a tiny model in the place of the planned one: data, evictions, Blob, and vLLM."""
    model = tiny.write_model(tmp_path / "model")
    data = tiny.write_data(tmp_path / "chat.jsonl", copies=4)
    report = checked(data, model)
    assert (report["conversations"], report["fault_count"], report["truncation"]["truncated"]) == (16, 0, 0)
    containers = {name: emulator.container(name) for name in ("models", "datasets", "checkpoints", "adapters")}
    by_hand("upload", model, f"{containers['models']}/Qwen/Qwen3-8B")
    place = parse_place(f"{containers['datasets']}/chat.jsonl")
    AzureBlobs(place).put("chat.jsonl", data.read_bytes(), summed(data).sha256)

    intent = parse_intent(INTENT, "the test's intent")
    made = render(lock_of(make_plan(intent, load_sheet(DEFAULT)), intent))
    whole, stopped = (one for one in made if one["kind"] == "Job")
    account = {"STORAGE_ACCOUNT": emulator.url}
    unbroken = Pod(made, whole, tmp_path / "one", account)
    broken = Pod(made, stopped, tmp_path / "two", account)
    try:
        broken.until("step", step=20)
        broken.signal(signal.SIGTERM)
        assert broken.wait() == INTERRUPTED, broken.errors.read_text()
        (seen,) = broken.events("interrupted")
        assert broken.events("mirrored")[-1]["checkpoint"] == f"checkpoint-{seen['step']}"
        resumed = Pod(made, stopped, tmp_path / "three", account)  # another machine: its disk is empty
        assert resumed.wait() == FINISHED, resumed.errors.read_text()
        assert unbroken.wait() == FINISHED, unbroken.errors.read_text()
    finally:
        unbroken.kill()
        broken.kill()
    assert resumed.events("start")[0]["resumed_from"] == f"checkpoint-{seen['step']}"
    assert resumed.events("start")[0]["method"] == "qlora"
    assert folders(parse_place(containers["adapters"]), AzureBlobs(parse_place(containers["adapters"]))) == sorted(
        pod.events("finished")[0]["upload"].rpartition("/")[2] for pod in (unbroken, resumed)
    )

    adapters = {}
    for pod, name in ((unbroken, "whole"), (resumed, "stopped")):
        adapters[name] = tmp_path / name
        by_hand("download", pod.events("finished")[0]["upload"], adapters[name], account=emulator.url)
    one, other = ((folder / "adapter_model.safetensors").read_bytes() for folder in adapters.values())
    assert one == other
    with served(model, adapters["stopped"], tmp_path / "vllm.log") as address:
        for question, answer in tiny.QUESTIONS.items():
            assert ask(address, "tuned", question) == answer
            assert ask(address, "base", question) != answer


def checked(data: Path, model: Path) -> dict[str, Any]:
    """What `planner data check` says at the desk."""
    command = [sys.executable, "-m", "planner", "data", "check", data, "--tokenizer", model, "--max-length", "128"]
    done = subprocess.run([*command, "--json"], cwd=tiny.ROOT, capture_output=True, text=True, check=True)
    report: dict[str, Any] = json.loads(done.stdout)
    return report


def by_hand(direction: str, source: Path | str, target: Path | str, account: str = "") -> None:
    """`python -m workloads.store`, as a person runs it."""
    environment = os.environ | {"PYTHONPATH": str(tiny.ROOT), "AZURE_STORAGE_ACCOUNT_NAME": account}
    command = [sys.executable, "-m", "workloads.store", direction, source, target]
    subprocess.run(command, cwd=tiny.ROOT, check=True, env=environment)


def test_a_run_whose_machine_is_gone_goes_on_from_the_mirror(
    forker: tiny.Forker, emulator: Azurite, tmp_path: Path
) -> None:
    mirror = emulator.container("mirrors") + "/tiny"
    model, data = tiny.write_model(tmp_path / "model"), tiny.write_data(tmp_path / "chat.jsonl", copies=4)
    often = {"checkpoints": {"every_steps": 2, "keep": 2, "mirror": mirror}}
    first = tiny.write_config(tmp_path / "first", tiny.settings(tmp_path / "first", model, data, **often))
    killed = forker.start(first, patch=tiny.SHORT_LEASE)
    killed.until_event("mirrored", checkpoint="checkpoint-4")
    killed.kill(signal.SIGKILL)
    assert killed.wait() == -signal.SIGKILL
    assert "checkpoint-4" in folders(parse_place(mirror), AzureBlobs(parse_place(mirror)))

    config = tiny.write_config(tmp_path / "other", tiny.settings(tmp_path / "other", model, data, **often))
    other = forker.run(config, patch=tiny.SHORT_LEASE)
    assert other.code == FINISHED, other.errors.read_text()
    assert other.events("start")[0]["resumed_from"] == other.events("from-mirror")[0]["checkpoint"]
    plain = forker.run(tiny.write_config(tmp_path / "plain", tiny.settings(tmp_path / "plain", model, data)))
    assert plain.code == FINISHED
    name = "adapter_model.safetensors"
    assert (tmp_path / "other" / "result" / name).read_bytes() == (tmp_path / "plain" / "result" / name).read_bytes()
    assert folders(parse_place(mirror), AzureBlobs(parse_place(mirror))) == ["checkpoint-4", "checkpoint-6"]
