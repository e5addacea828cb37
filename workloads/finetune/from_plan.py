"""The configuration of a run from a plan's lock, so that what is trained is what was counted and paid for."""

from __future__ import annotations

from collections.abc import Mapping
from decimal import Decimal
from typing import Any, NamedTuple

from planner.errors import PlannerError
from planner.plan.lock import Lock, LockedWorkload
from workloads.finetune.config import FinetuneConfig, parse_config

NOT_ALLOCATED = ("allocator slack", "CUDA context")  # parts of the receipt beside torch's own allocations
OTHERWISE_SECONDS = 1800  # between checkpoints on machines that nobody evicts: an hour is lost at most with its restart


class Paths(NamedTuple):
    """Where a run finds and leaves its files; each a path, or a Blob URL where the configuration takes one."""

    train: str
    checkpoints: str
    result: str
    evaluation: str | None = None
    upload: str | None = None
    mirror: str | None = None
    textfile: str | None = None


def config_of(
    lock: Lock, workload: LockedWorkload, *, run: str, paths: Paths, choices: Mapping[str, Any] | None = None
) -> FinetuneConfig:
    """The configuration of a planned run. choices: fields that no plan decides, such as epochs or learning_rate.

    PlannerError for what the program does not do as planned, and for a choice that would change the planned memory.
    """
    said = workload.settings
    _check(workload)
    bf16 = lock.pool(workload.pool).supports_bf16
    sixteen = "bf16" if bf16 else "fp16"
    hours = workload.checkpoint_interval_hours
    planned: dict[str, Any] = {
        "run": run,
        "model": workload.hub_id or workload.model,
        "task": said.get("task", "sft"),
        "method": said["method"],
        "data": {"train": paths.train, "evaluation": paths.evaluation},
        "max_length": workload.context,
        "micro_batch": int(said.get("micro_batch", "1")),
        "gradient_accumulation_steps": int(said.get("gradient_accumulation_steps", "1")),
        "weights": sixteen if said.get("weights_dtype") != "fp32" else "fp32",
        "precision": sixteen,
        "gradient_checkpointing": said.get("gradient_checkpointing", "True") == "True",
        "attention": "eager" if said.get("attention") == "eager" else "sdpa",
        "loss": said.get("loss", "chunked"),
        "optimizer": said.get("optimizer", "adamw_torch_fused"),
        "gpus": workload.gpus,
        "checkpoints": {
            "folder": paths.checkpoints,
            "every_seconds": float(hours * Decimal(3600)) if hours else OTHERWISE_SECONDS,
            "keep": lock.around.storage.checkpoints_kept or 1,
            "mirror": paths.mirror,
        },
        "result": paths.result,
        "upload": paths.upload,
        "predicted": {
            "allocated_bytes": sum(size for name, size in workload.memory_bytes.items() if name not in NOT_ALLOCATED)
        },
        "metrics": {"textfile": paths.textfile},
    }
    if planned["method"] != "full":
        targets = said.get("lora_targets", "all-linear")
        planned |= {
            "lora_rank": int(said.get("lora_rank", "16")),
            "lora_dropout": float(said.get("lora_dropout", "0")),
            "lora_targets": targets,
        }
    if planned["method"] in ("qlora", "qdora"):
        planned["base_quantization"] = said.get("base_quantization", "nf4-double")
    chosen = dict(choices or {})
    if "epochs" not in chosen and "max_steps" not in chosen:
        chosen["epochs"] = 1
    for name, value in chosen.items():
        if isinstance(value, Mapping) and isinstance(planned.get(name), Mapping):
            chosen[name] = {**planned[name], **value}
        elif name in planned and planned[name] != value:
            raise PlannerError(
                f"{workload.name}: {name} is decided by the plan ({planned[name]}): change the intent and plan again"
            )
    return parse_config(planned | chosen, f"the configuration of {workload.name}")


# settings of a plan that the program would not do as they were counted, with the value that it does
_DONE = {
    "trainer": ("trl",),
    "parallelism": ("none", "ddp"),
    "offload": ("frozenset()",),
    "trained_embeddings": ("False",),
    "kbit_prepare": ("False",),
    "optimizer_in_backward": ("False",),
    "loss": ("chunked", "liger"),
    "base_quantization": ("nf4", "nf4-double"),
    "autocast": ("True",),
    "weights_dtype": ("bf16", "fp16", "fp32"),
}


def _check(workload: LockedWorkload) -> None:
    if workload.task != "finetune":
        raise PlannerError(f"{workload.name} serves and does not train: name a fine-tuning workload")
    for name, done in _DONE.items():
        value = workload.settings.get(name, done[0])
        if value not in done:
            raise PlannerError(
                f"{workload.name}: the program does not train with {name} {value}: set it to {' or '.join(done)} in the"
                " intent's settings, or give the run to the trainer that you planned for"
            )
