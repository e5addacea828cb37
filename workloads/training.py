"""A training run as values for its template: TRL's command line, and what a pod that may be evicted needs."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from planner.plan.lock import Lock, LockedWorkload
from workloads.pods import MOUNTS, NAMESPACE, USER, Manifest, environment, labels_of, place, resources, volumes

SHARES = {"datasets": False, "checkpoints": True, "adapters": True}  # container -> whether a run writes to it
SAVE_STEPS = 50  # a step takes seconds to a minute: an eviction costs less than an hour of work
FILES_OF_4_BIT = 3  # bytes of the 16-bit files a byte of weights in 4 bits, whose embeddings stay in 16
SPARE_DISK_BYTES = 20 << 30  # compiled code, and a blobfuse cache that lies on the machine
# `trl sft` with what a pod that may be evicted needs: data first, the newest whole checkpoint, and the result kept
TRAINER = """
import os, shutil, subprocess, sys
from pathlib import Path

def option(name):
    return next(a.partition("=")[2] for a in sys.argv[1:] if a.startswith(f"--{name}="))

out, kept = Path(option("output_dir")), Path(os.environ["RESULT_DIR"])
if not any(Path(option("dataset_name")).iterdir()):
    sys.exit("there is no dataset: upload one to the container `datasets`, then start the run again")
whole = [p.parent for p in out.glob("checkpoint-*/trainer_state.json")]
newest = max(whole, key=lambda p: int(p.name.rpartition("-")[2]), default=None)
resume = [] if newest is None else [f"--resume_from_checkpoint={newest}"]
code = subprocess.run(["trl", "sft", *sys.argv[1:], *resume]).returncode
if code == 0:
    shutil.copytree(out, kept, dirs_exist_ok=True, ignore=shutil.ignore_patterns("checkpoint-*"))
sys.exit(code)
"""


def values(
    lock: Lock, workload: LockedWorkload, name: str, mounted: Sequence[Manifest], secrets: Collection[str]
) -> Manifest:
    """What run.yaml.j2 asks for. mounted: kind and claim of each container of Blob that it uses."""
    labels = labels_of(workload)
    own = [
        {"name": one["kind"], "mountPath": f"/{one['kind']}", **({} if SHARES[one["kind"]] else {"readOnly": True})}
        for one in mounted
    ]
    disk = disk_bytes(lock, workload)
    return {
        "name": name,
        "namespace": NAMESPACE,
        "runs": workload.replicas,
        # twice the hours that the plan pays for: a run that hangs must not cost a month
        "deadline_seconds": int(workload.hours_per_month * 2 * 3600),
        "pod_labels": labels | {"azure.workload.identity/use": "true"},
        "pod": place(lock, workload)
        | {
            "account": workload.name,
            "user": USER,
            "labels": labels,
            "spread": False,
            "grace_seconds": None,
            "restart": "Never",
            "container": "trainer",
            "image": "${TRAIN_IMAGE}",
            "command": ["python", "-c", TRAINER],
            "args": [f"--{option}={value}" for option, value in options(lock, workload, name).items()],
            "env": [
                *environment(workload, secrets),
                {"name": "RESULT_DIR", "value": f"/adapters/{name}-$(JOB_COMPLETION_INDEX)"},
            ],
            "port": None,
            "health": None,
            "resources": resources(lock, workload, disk),
            "mounts": [*MOUNTS, *own],
            "volumes": volumes(workload, disk, mounted),
        },
    }


def disk_bytes(lock: Lock, workload: LockedWorkload) -> int:
    """Of the machine's disk: the base model's 16-bit files, which a run may hold in 4 bits, and room to work.

    At most the share of it that pods may have.
    """
    stored = workload.memory_bytes.get("weights", 0) * (FILES_OF_4_BIT if "load_in_4bit" in _weights(workload) else 1)
    pool = lock.pool(workload.pool)
    return min(stored + SPARE_DISK_BYTES, int(pool.os_disk_gib * lock.platform.shares["disk"] * (1 << 30)))


def reason(option: str) -> str:
    """Why a run is given an option, for `planner render --explain`."""
    reasons = {
        "model_name_or_path": "the workload's checkpoint, read from the hub",
        "dataset_name": "the container `datasets`, mounted",
        "output_dir": "the container `checkpoints`, mounted; RUN is the Job's own name",
        "save_strategy": "an evicted run goes on from its newest whole checkpoint",
        "save_steps": "an eviction costs less than an hour of work",
        "save_total_limit": "storage.checkpoints_kept of the intent, which the bill counts",
        "bf16": "what the card computes in",
        "fp16": "what the card computes in",
    }
    return reasons.get(option, "the setting that the memory receipt rests on")


def options(lock: Lock, workload: LockedWorkload, run: str) -> dict[str, str]:
    """TRL's options for a run: what the plan's memory rests on, and checkpoints by which an evicted run goes on."""
    settings = workload.settings
    method = settings.get("method", "qlora")
    weights = settings.get("weights_dtype", "bf16")
    bf16 = lock.pool(workload.pool).supports_bf16
    dtype = {"bf16": "bfloat16" if bf16 else "float16", "fp16": "float16", "fp32": "float32"}[weights]
    found = {
        "model_name_or_path": workload.hub_id or workload.model,
        "dataset_name": "/datasets",
        "output_dir": f"/checkpoints/{run}-$(JOB_COMPLETION_INDEX)",  # another run must not go on from these
        "max_length": str(workload.context),
        "per_device_train_batch_size": settings.get("micro_batch", "1"),
        "gradient_accumulation_steps": settings.get("gradient_accumulation_steps", "1"),
        "dtype": dtype,
        "bf16": str(bf16).lower(),
        "fp16": str(not bf16).lower(),
        "save_strategy": "steps",
        "save_steps": str(SAVE_STEPS),
        "save_total_limit": str(lock.around.storage.checkpoints_kept or 1),
    }
    if method != "full":
        found |= {
            "use_peft": "true",
            "lora_r": settings.get("lora_rank", "16"),
            "lora_dropout": settings.get("lora_dropout", "0.0"),
            "lora_target_modules": settings.get("lora_targets", "all-linear"),
        }
    found |= _weights(workload)
    if method in ("dora", "qdora"):
        found["use_dora"] = "true"
    return found


def _weights(workload: LockedWorkload) -> dict[str, str]:
    """How a run keeps the base model's weights: in 4 bits, or as they are."""
    if workload.settings.get("method", "qlora") in ("qlora", "qdora"):
        return {"load_in_4bit": "true", "bnb_4bit_quant_type": "nf4", "use_bnb_nested_quant": "true"}
    return {}
