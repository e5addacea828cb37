"""The configuration of a run from a plan's lock, so that what is trained is what was counted and paid for."""

from __future__ import annotations

from collections.abc import Mapping
from decimal import Decimal
from typing import Any, NamedTuple, get_args

from planner.errors import PlannerError
from planner.plan.lock import Lock, LockedWorkload, again
from planner.plan.training import Training
from workloads.arguments import gpus_of_pod
from workloads.finetune.config import FinetuneConfig, Optimizer, parse_config

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


class NotTrained(PlannerError):
    """The program does not train what is planned. Another trainer may."""


def training_of(workload: LockedWorkload) -> Training:
    """What the lock keeps of a training workload. PlannerError for a server, and for a lock of before."""
    if workload.task != "finetune":
        raise PlannerError(f"{workload.name} serves and does not train: name a fine-tuning workload")
    if workload.training is None:
        raise PlannerError(f"the plan of {workload.name} was made by an older Tonnage: {again()}")
    return workload.training


def config_of(
    lock: Lock,
    workload: LockedWorkload,
    *,
    run: str,
    paths: Paths,
    choices: Mapping[str, Any] | None = None,
    model: str | None = None,
    trainer: str = "trl",
) -> FinetuneConfig:
    """The configuration of a planned run. choices: fields that no plan decides, such as epochs or learning_rate.

    model: where the base model lies, by default on the hub; trainer: who is going to train
    NotTrained for what the program does not do as planned; PlannerError for a choice that the plan has made already.
    """
    said, training = workload.settings, training_of(workload)
    bf16 = lock.pool(workload.pool).supports_bf16
    _check(workload, trainer, bf16)
    sixteen = "bf16" if bf16 else "fp16"
    hours = workload.checkpoint_interval_hours
    planned: dict[str, Any] = {
        "run": run,
        "model": model or workload.hub_id or workload.model,
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
        "gpus": gpus_of_pod(workload),
        "nodes": training.machines,
        "checkpoints": {
            "folder": paths.checkpoints,
            "every_seconds": float(hours * Decimal(3600)) if hours else OTHERWISE_SECONDS,
            "keep": lock.around.storage.checkpoints_kept or 1,
            "mirror": paths.mirror,
        },
        "result": paths.result,
        "upload": paths.upload,
        "predicted": {
            "allocated_bytes": sum(size for name, size in workload.memory_bytes.items() if name not in NOT_ALLOCATED),
            "flops_per_second": training.flops_per_second,
        },
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
    what = f"the configuration of {run}"
    return parse_config(_chosen(planned, choices or {}, what), what)


def _chosen(planned: Mapping[str, Any], choices: Mapping[str, Any], what: str) -> dict[str, Any]:
    """The plan's fields with the choices beside them. PlannerError for a choice that would change what is planned."""
    made = dict(planned)
    if "epochs" not in choices and "max_steps" not in choices:
        made["epochs"] = 1
    for name, value in choices.items():
        before = planned.get(name)
        if isinstance(before, Mapping):
            made[name] = _chosen_within(name, before, value, what) if isinstance(value, Mapping) else value
        elif before is None or str(before) == str(value):
            made[name] = value
        else:
            raise _decided(what, name, before)
    return made


def _chosen_within(outer: str, planned: Mapping[str, Any], chosen: Mapping[str, Any], what: str) -> dict[str, Any]:
    for name, value in chosen.items():
        if planned.get(name) is not None and str(planned[name]) != str(value):
            raise _decided(what, f"{outer}.{name}", planned[name])
    return {**planned, **chosen}


def _decided(what: str, name: str, value: object) -> PlannerError:
    return PlannerError(f"{what}: {name} is decided by the plan ({value}): change the intent and plan again")


# settings of a plan that the program would not do as they were counted, with the value that it does
_DONE = {
    "parallelism": ("none", "ddp"),
    "offload": ("frozenset()",),
    "trained_embeddings": ("False",),
    "kbit_prepare": ("False",),
    "optimizer_in_backward": ("False",),
    "loss": ("chunked", "liger"),
    "base_quantization": ("nf4", "nf4-double"),
    "autocast": ("True",),
    "weights_dtype": ("bf16", "fp16", "fp32"),
    "optimizer": get_args(Optimizer),
    "checkpointing": ("non_reentrant",),
    "attention": ("flash", "efficient", "eager"),
}


def _check(workload: LockedWorkload, trainer: str, bf16: bool) -> None:
    said = workload.settings
    narrow = said["method"] in ("qlora", "qdora") and bf16  # as TRL does it
    own = {"trainer": ("trl", trainer), "adapter_dtype": ("bf16" if narrow else "fp32",)}
    if "kernels" in said:
        raise NotTrained(
            f"{workload.name}: the program trains with the trainer's own kernels: take kernels out of settings"
        )
    for name, done in (_DONE | own).items():
        value = said.get(name, done[0])
        if value not in done:
            raise NotTrained(
                f"{workload.name}: the program does not train with {name} {value}: set it to"
                f" {' or '.join(dict.fromkeys(done))} in the intent's settings, or give the run to the trainer that you"
                " planned for"
            )
