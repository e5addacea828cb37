"""A plan's lock becomes the program's configuration, and that becomes other trainers' ones, or is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from planner.errors import PlannerError
from planner.plan.lock import Lock, LockedWorkload
from workloads.finetune.config import FinetuneConfig, parse_config
from workloads.finetune.emit import emit
from workloads.finetune.from_plan import Paths, config_of

ROOT = Path(__file__).parents[2]
PATHS = Paths(train="/datasets/chat.jsonl", checkpoints="/checkpoints/run", result="/adapters/run")


@pytest.fixture(scope="module")
def lock() -> Lock:
    said = yaml.safe_load((ROOT / "stacks" / "Pulumi.dev-32k.yaml").read_text(encoding="utf-8"))
    return Lock.model_validate(said["config"]["tonnage:plan"])


def tuned(lock: Lock, **settings: str) -> LockedWorkload:
    (workload,) = (workload for workload in lock.workloads if workload.task == "finetune")
    return workload.model_copy(update={"settings": workload.settings | settings})


def test_what_is_trained_is_what_was_planned(lock: Lock) -> None:
    made = config_of(lock, tuned(lock), run="tune-1", paths=PATHS)
    assert (made.model, made.method, made.max_length, made.micro_batch) == ("Qwen/Qwen3-8B", "qlora", 32768, 1)
    assert (made.lora_rank, made.lora_targets, made.base_quantization) == (16, "all-linear", "nf4-double")
    assert (made.weights, made.precision, made.epochs) == ("bf16", "bf16", 1)
    workload = tuned(lock)
    assert workload.checkpoint_interval_hours is not None
    assert made.checkpoints.every_seconds == pytest.approx(float(workload.checkpoint_interval_hours) * 3600)
    # the receipt without what torch's allocator does not count
    parts = workload.memory_bytes
    assert made.predicted.allocated_bytes == sum(parts.values()) - parts["allocator slack"] - parts["CUDA context"]


def test_a_card_without_bf16_trains_in_fp16(lock: Lock) -> None:
    old = lock.model_copy(update={"pools": tuple(p.model_copy(update={"supports_bf16": False}) for p in lock.pools)})
    made = config_of(old, tuned(lock), run="tune-1", paths=PATHS)
    assert (made.weights, made.precision) == ("fp16", "fp16")


def test_choices_that_no_plan_decides_are_taken_and_others_are_refused(lock: Lock) -> None:
    chosen = {"epochs": 3, "learning_rate": 1e-5, "data": {"packing": True}}
    made = config_of(lock, tuned(lock), run="tune-1", paths=PATHS, choices=chosen)
    assert (made.epochs, made.learning_rate, made.data.packing) == (3, 1e-5, True)
    assert made.data.train == "/datasets/chat.jsonl"
    with pytest.raises(
        PlannerError, match=r"lora_rank is decided by the plan \(16\): change the intent and plan again"
    ):
        config_of(lock, tuned(lock), run="tune-1", paths=PATHS, choices={"lora_rank": 64})


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"trainer": "unsloth"}, "does not train with trainer unsloth: set it to trl"),
        ({"parallelism": "fsdp"}, "does not train with parallelism fsdp: set it to none or ddp"),
        ({"base_quantization": "gptq4"}, "does not train with base_quantization gptq4"),
        ({"trained_embeddings": "True"}, "does not train with trained_embeddings True"),
        ({"optimizer": "adamw_4bit"}, "does not train with optimizer adamw_4bit: set it to adamw_torch_fused or"),
        ({"checkpointing": "offloaded"}, "does not train with checkpointing offloaded: set it to non_reentrant"),
        ({"adapter_dtype": "fp32"}, "does not train with adapter_dtype fp32: set it to bf16"),  # TRL on a 4-bit base
        ({"kernels": "norm=True"}, "with the trainer's own kernels: take kernels out of settings"),
    ],
)
def test_what_the_program_would_not_do_as_counted_is_refused(lock: Lock, settings: dict[str, str], said: str) -> None:
    with pytest.raises(PlannerError, match=said):
        config_of(lock, tuned(lock, **settings), run="tune-1", paths=PATHS)


def test_a_server_is_no_run(lock: Lock) -> None:
    (server,) = (workload for workload in lock.workloads if workload.task == "serve")
    with pytest.raises(PlannerError, match="serves and does not train"):
        config_of(lock, server, run="tune-1", paths=PATHS)


# --- other trainers ---------------------------------------------------------------------------------------------------


def config(**more: Any) -> FinetuneConfig:
    said: dict[str, Any] = {
        "run": "tune-1",
        "model": "Qwen/Qwen3-8B",
        "data": {"train": "/datasets/chat.jsonl", "loss_on": "assistant"},
        "max_length": 2048,
        "epochs": 2,
        "lora_rank": 8,
        "checkpoints": {"folder": "/checkpoints", "every_steps": 50},
        "result": "/adapters",
    }
    return parse_config(said | more, "x")


def test_axolotl_is_told_the_same_run() -> None:
    said = yaml.safe_load(emit(config(method="qdora"), "axolotl"))
    assert (said["base_model"], said["adapter"], said["load_in_4bit"], said["peft_use_dora"]) == (
        "Qwen/Qwen3-8B",
        "qlora",
        True,
        True,
    )
    assert (said["lora_r"], said["lora_alpha"], said["lora_target_linear"]) == (8, 16, True)
    assert said["bnb_config_kwargs"] == {"bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}
    assert (said["sequence_len"], said["num_epochs"], said["save_steps"]) == (2048, 2, 50)
    assert said["datasets"][0]["roles_to_train"] == ["assistant"]


def test_unsloth_is_told_the_same_run() -> None:
    said = yaml.safe_load(emit(config(method="lora", max_steps=10, epochs=None), "unsloth"))
    assert (said["model"], said["training"]["load_in_4bit"], said["training"]["max_steps"]) == (
        "Qwen/Qwen3-8B",
        False,
        10,
    )
    assert said["lora"]["target_modules"] == "q_proj,k_proj,v_proj,o_proj,gate_proj,up_proj,down_proj"
    assert said["training"]["train_on_completions"] is True


@pytest.mark.parametrize(
    ("trainer", "more", "said"),
    [
        ("axolotl", {"task": "dpo", "data": {"train": "/d"}}, "Axolotl cannot be given this run: its preferences"),
        (
            "axolotl",
            {"data": {"train": "/d"}},
            "it learns every answer of a conversation: set data.loss_on to assistant",
        ),
        ("unsloth", {"gpus": 2}, "Unsloth cannot be given this run: it trains on one GPU"),
        ("unsloth", {"scheduler": "cosine"}, "its scheduler is linear"),
        ("unsloth", {"model": "https://a.blob.core.windows.net/m/x"}, "its model and data are no Blob URLs"),
        ("unsloth", {"epochs": 1.5}, "its epochs are whole"),
    ],
)
def test_a_run_that_another_trainer_would_do_otherwise_is_refused(trainer: Any, more: Any, said: str) -> None:
    with pytest.raises(PlannerError, match=said):
        emit(config(**more), trainer)
