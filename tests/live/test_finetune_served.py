"""From conversations to an answer: check, QLoRA with a stop in the middle, Blob, and vLLM with base and adapter."""

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

import httpx
import pytest
import tiny
from blob import Azurite, free_port

from workloads.blobs import AzureBlobs, parse_place
from workloads.finetune import FINISHED, INTERRUPTED
from workloads.store import download, folders

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


def test_what_was_in_the_data_comes_back_from_the_server(
    forker: tiny.Forker, emulator: Azurite, tmp_path: Path
) -> None:
    model = tiny.write_model(tmp_path / "model")
    data = tiny.write_data(tmp_path / "chat.jsonl", copies=4)
    command = [
        sys.executable,
        "-m",
        "planner",
        "data",
        "check",
        data,
        "--tokenizer",
        model,
        "--max-length",
        "128",
        "--json",
    ]
    checked = subprocess.run(command, cwd=tiny.ROOT, capture_output=True, text=True, check=True)
    report = json.loads(checked.stdout)
    assert (report["conversations"], report["fault_count"], report["truncation"]["truncated"]) == (16, 0, 0)

    learns = {
        "max_steps": 60,
        "micro_batch": 4,
        "gradient_accumulation_steps": 1,
        "lora_rank": 32,
        "lora_dropout": 0.05,
    }
    adapters = emulator.container("adapters")
    (whole,) = (tiny.settings(tmp_path / "whole", model, data, **learns),)
    unbroken = forker.start(tiny.write_config(tmp_path / "whole", whole))
    config = tiny.write_config(
        tmp_path / "run", tiny.settings(tmp_path / "run", model, data, **learns, upload=f"{adapters}/tiny")
    )
    broken = forker.start(config)
    broken.until_event("step", step=20)
    broken.kill(signal.SIGTERM)
    assert broken.wait() == INTERRUPTED, broken.errors.read_text()
    with pytest.raises(Exception, match="no whole folder"):
        download(parse_place(f"{adapters}/tiny"), tmp_path / "none", AzureBlobs(parse_place(adapters)))
    resumed = forker.run(config)
    assert resumed.code == FINISHED, resumed.errors.read_text()
    assert unbroken.wait() == FINISHED, unbroken.errors.read_text()
    name = "adapter_model.safetensors"
    assert (tmp_path / "run" / "result" / name).read_bytes() == (tmp_path / "whole" / "result" / name).read_bytes()
    assert resumed.events("upload")[0]["sent_bytes"] > 0

    fetched = tmp_path / "fetched"
    command = [sys.executable, "-m", "workloads.store", "download", f"{adapters}/tiny", fetched]
    subprocess.run(command, cwd=tiny.ROOT, check=True, env=os.environ | {"PYTHONPATH": str(tiny.ROOT)})
    with served(model, fetched, tmp_path / "vllm.log") as address:
        for question, answer in tiny.QUESTIONS.items():
            assert ask(address, "tuned", question) == answer
            assert ask(address, "base", question) != answer


def test_a_run_whose_machine_is_gone_goes_on_from_the_mirror(
    forker: tiny.Forker, emulator: Azurite, tmp_path: Path
) -> None:
    mirror = emulator.container("checkpoints") + "/tiny"
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
