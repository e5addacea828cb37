"""The one file that configures a run: what it may not say, and what makes two runs the same."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from planner.errors import PlannerError
from workloads.finetune.config import load_config, parse_config

SAID: dict[str, Any] = {
    "run": "tune-0a1b2c3d",
    "model": "Qwen/Qwen3-8B",
    "data": {"train": "/datasets/chat.jsonl"},
    "max_length": 2048,
    "epochs": 1,
    "checkpoints": {"folder": "/checkpoints", "every_seconds": 600},
    "result": "/adapters",
}


def with_(**more: Any) -> dict[str, Any]:
    return {**SAID, **more}


@pytest.mark.parametrize(
    ("said", "reason"),
    [
        (with_(lerning_rate=1e-4), "there is no field lerning_rate: take it out or correct its name"),
        (with_(method="lora+"), "method: input should be 'full', 'lora', 'qlora', 'dora' or 'qdora'"),
        (with_(optimizer="adamw_4bit"), "optimizer: input should be 'adamw_torch_fused'"),
        (with_(learning_rate=2), "learning_rate: input should be less than 1"),
        (with_(learning_rate=float("nan")), "learning_rate: input should be a finite number"),
        (with_(run="Tune 1"), "run: string should match pattern"),
        (with_(data={"train": "x", "loss_on": "answer"}), "data.loss_on: input should be 'completion'"),
        (with_(max_steps=10), "give epochs or max_steps, exactly one of them"),
        (with_(epochs=None), "give epochs or max_steps, exactly one of them"),
        (with_(checkpoints={"folder": "/c"}), "checkpoints needs every_seconds or every_steps"),
        (with_(evaluation={}), "evaluation needs data.evaluation or data.evaluation_share"),
        (
            with_(data={"train": "x", "evaluation": "y", "evaluation_share": 0.1}),
            "data.evaluation and data.evaluation_share exclude each other",
        ),
        (with_(task="dpo", data={"train": "x", "packing": True}), "packing is for sft"),
        (with_(task="dpo", data={"train": "x", "loss_on": "all"}), "dpo compares answers"),
        (with_(weights="fp32"), "a 4-bit base has no fp32 weights"),
        (with_(method="full", weights="fp16"), "fp16 weights cannot be trained in full"),
        (with_(data={"train": "x", "packing": True}, attention="eager"), "packing needs attention sdpa"),
        (
            with_(nodes=2, checkpoints={"folder": "/c", "every_steps": 5, "mirror": "az://checkpoints/tune"}),
            "several machines that meet at checkpoints.mirror need upload too",
        ),
        ([], "is no mapping of fields"),
    ],
)
def test_a_configuration_that_makes_no_sense_is_refused_with_the_field(said: Any, reason: str) -> None:
    with pytest.raises(PlannerError) as raised:
        parse_config(said, "run.yaml")
    assert str(raised.value).startswith("run.yaml")
    assert reason in str(raised.value)


def test_yaml_and_json_say_the_same(tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text(json.dumps(SAID))
    (tmp_path / "run.yaml").write_text(
        "run: tune-0a1b2c3d\nmodel: Qwen/Qwen3-8B\ndata: {train: /datasets/chat.jsonl}\nmax_length: 2048\nepochs: 1\n"
        "checkpoints: {folder: /checkpoints, every_seconds: 600}\nresult: /adapters\n"
    )
    assert load_config(tmp_path / "run.json") == load_config(tmp_path / "run.yaml")


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("run.json", b"{", "is not JSON"),
        ("run.yaml", b"a: [", "is not YAML"),
        ("run.yaml", b"\xff\xfe", "it is not UTF-8 text"),
        ("run.yaml", b"", "is no mapping of fields"),
        ("other.yaml", None, "No such file or directory"),
    ],
)
def test_a_file_that_cannot_be_read_is_refused(tmp_path: Path, name: str, content: bytes | None, reason: str) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(PlannerError, match=reason):
        load_config(tmp_path / name)


@pytest.mark.parametrize(
    ("field", "value", "same"),
    [
        ("learning_rate", 1e-3, False),
        ("seed", 7, False),
        ("method", "lora", False),
        ("gpus", 2, False),  # the batch is another
        ("data", {"train": "/datasets/chat.jsonl", "packing": True}, False),
        ("data", {"train": "/mnt/elsewhere.jsonl"}, True),  # its content has a digest of its own
        ("result", "/elsewhere", True),
        ("checkpoints", {"folder": "/elsewhere", "every_steps": 5, "keep": 9}, True),
        ("metrics", {"every_steps": 10}, True),
    ],
)
def test_the_digest_is_of_what_decides_what_is_learned(field: str, value: Any, same: bool) -> None:
    one, other = parse_config(SAID, "a"), parse_config(with_(**{field: value}), "b")
    assert (one.digest == other.digest) == same
