"""The configurations for other trainers, by those trainers' own schemas."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from workloads.finetune.config import parse_config
from workloads.finetune.emit import emit

pytest.importorskip("torch", reason="the schemas need torch: run make live")

ROOT = Path(__file__).parents[2]
SCHEMAS = {
    "axolotl": ("axolotl==0.19.0", "from axolotl.utils.schemas.config import AxolotlInputConfig as Schema"),
    "unsloth": ("unsloth==2026.10.9", "from unsloth_cli.config import Config as Schema"),
}


def installed(package: str) -> Path:
    """The package alone, without what it needs, in the cache."""
    uv = shutil.which("uv") or str(ROOT / ".tools" / "bin" / "uv")
    key = hashlib.sha256(f"{package} {sys.version_info[:2]}".encode()).hexdigest()[:16]
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "tonnage" / f"schema-{key}"
    if not (folder / ".ready").exists():
        shutil.rmtree(folder, ignore_errors=True)
        command = [
            uv,
            "pip",
            "install",
            "--quiet",
            "--no-deps",
            "--python",
            sys.executable,
            "--target",
            folder,
            package,
        ]
        subprocess.run(command, check=True)
        (folder / ".ready").touch()
    return folder


@pytest.mark.parametrize("trainer", list(SCHEMAS))
def test_the_trainers_own_schema_takes_every_method(trainer: Any, tmp_path: Path) -> None:
    package, schema = SCHEMAS[trainer]
    runs = []
    for method in ("full", "lora", "qlora", "dora", "qdora"):
        packed = method == "lora"
        said = {
            "run": "tune-1",
            "model": "Qwen/Qwen3-8B",
            "method": method,
            "data": {"train": "/datasets/chat.jsonl", "loss_on": "assistant", "packing": packed},
            "attention": "flash_attention_2" if packed else "sdpa",
            "max_length": 2048,
            "epochs": 2,
            "checkpoints": {"folder": "/checkpoints", "every_steps": 50},
            "result": "/adapters",
        }
        runs.append(yaml.safe_load(emit(parse_config(said, "x"), trainer)))
    program = (
        f"import json, sys\n{schema}\n"
        "for run in json.load(sys.stdin):\n"
        "    aliases = {f.alias for f in Schema.model_fields.values()}\n"
        "    unknown = set(run) - set(Schema.model_fields) - aliases\n"
        "    assert not unknown, unknown\n"
        "    print(json.dumps(Schema(**run).model_dump(mode='json', exclude_none=True)))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        input=json.dumps(runs),
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONPATH": str(installed(package)), "HF_HUB_OFFLINE": "1"},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    made = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert len(made) == len(runs)
    sizes = {"axolotl": lambda run: run["sequence_len"], "unsloth": lambda run: run["training"]["max_seq_length"]}
    assert [sizes[trainer](run) for run in made] == [2048] * len(runs)
