"""The pinned tables of tests/oracles say what the libraries say today: a sample of each is made anew."""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("torch", reason="the oracles need torch, transformers and peft: run make live")

ROOT = Path(__file__).parents[2]
ORACLES = ROOT / "tests" / "oracles"
sys.path.insert(0, str(ORACLES))
SAMPLE = ("qwen3-8b", "gemma-3-4b", "phi-4", "qwen3-30b-a3b", "deepseek-v2-lite", "mistral-small-3.1-24b")


def rows(name: str) -> list[dict[str, str]]:
    with (ORACLES / name).open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize("name", SAMPLE)
def test_transformers_counts_the_parameters_of_the_table(name: str) -> None:
    from params_meta import build, models

    (row,) = [row for row in rows("params_meta.csv") if row["model"] == name]
    assert sum(p.numel() for p in build(models()[name]["config"]).parameters()) == int(row["parameters"])


@pytest.mark.parametrize("name", ["qwen3-8b", "phi-4"])
def test_peft_counts_the_adapters_of_the_table(name: str) -> None:
    from lora_counts import TARGETS, count
    from params_meta import models

    for row in rows("lora_counts.csv"):
        if row["model"] == name and row["rank"] == "8":
            assert str(count(models()[name]["config"], TARGETS[row["targets"]], 8)) == row["trainable"]


def test_vllm_gives_the_weights_and_blocks_of_the_table() -> None:
    pytest.importorskip("vllm", reason="the oracle needs vLLM: run make live")
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "VLLM_LOGGING_LEVEL": "ERROR"}
    names = ["qwen3-8b", "gemma-3-1b", "deepseek-v2-lite"]
    done = subprocess.run(
        [sys.executable, ORACLES / "vllm_kv.py", *names],
        capture_output=True,
        text=True,
        check=True,
        env=environment,
        cwd=ROOT,
    )
    made = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    table = [json.loads(line) for line in (ORACLES / "vllm_kv.jsonl").read_text(encoding="utf-8").splitlines()]
    assert made == [record for record in table if record["model"] in names]
    assert len(made) > len(names)
