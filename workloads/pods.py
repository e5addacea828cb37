"""What pods of a plan have in common: where they may land, what they may take of a machine, and what they mount."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Sequence
from typing import Any, NamedTuple

from planner.plan.lock import Lock, LockedPool, LockedWorkload
from planner.plan.serving import Cache
from workloads.arguments import gpus_of_pod
from workloads.finetune.from_plan import training_of

NAMESPACE, GPU_NAMESPACE = "tonnage", "gpu-system"
SPOT_KEY = "kubernetes.azure.com/scalesetpriority"
POOL_KEY = "kubernetes.azure.com/agentpool"
GPU = "nvidia.com/gpu"
NVME = "tonnage-nvme"  # StorageClass of the machine's own NVMe disks
OWN_DISK_BYTES = 8 << 30  # of the system disk, where the cache lies elsewhere: logs, and what programs write beside it
USER = 10001  # of the training image too; above 10,000 so that it is nobody on the machine
# variable -> secret of the vault, by kind of workload: nobody mounts what is not theirs
NEEDED_SECRETS = {
    "serve": {"VLLM_API_KEY": "api-key", "HF_TOKEN": "hf-token"},
    "finetune": {"HF_TOKEN": "hf-token"},
}
VAULT_NAMES = {"apiKey": "api-key", "hfToken": "hf-token"}  # config key -> name in the vault
ALL_SECRETS = tuple(VAULT_NAMES.values())

Manifest = dict[str, Any]


def pools_of(lock: Lock, workload: LockedWorkload) -> list[LockedPool]:
    """The pool that the plan means for a workload, and its twin on demand where there is one."""
    return [pool for pool in lock.pools if workload.name in pool.workloads]


def tolerations(*, spot: bool, device: str = "gpu") -> list[Manifest]:
    """Of the taint of pools with GPUs (or without), and of the one that AKS puts on spot machines."""
    found = [{"key": "sku", "operator": "Equal", "value": device, "effect": "NoSchedule"}]
    if spot:
        found.append({"key": SPOT_KEY, "operator": "Equal", "value": "spot", "effect": "NoSchedule"})
    return found


def labels_of(workload: LockedWorkload) -> dict[str, str]:
    """By which a workload's pods are found: they never change, since a Deployment's selector cannot."""
    name = "vllm" if workload.task == "serve" else "finetune"
    return {"app.kubernetes.io/name": name, "app.kubernetes.io/instance": workload.name}


def secret_name(workload: LockedWorkload) -> str:
    """Of the Secret that the CSI driver keeps beside its mount, for variables."""
    return f"{workload.name}-tonnage-secrets"


def secrets_of(workload: LockedWorkload, secrets: Collection[str]) -> list[str]:
    """Those secrets of the vault that a workload mounts."""
    return [name for name in NEEDED_SECRETS[workload.task].values() if name in secrets]


def place(lock: Lock, workload: LockedWorkload) -> Manifest:
    """Where a workload's pods may land: its pools, their taints tolerated, spot preferred to its twin."""
    pools = pools_of(lock, workload)
    spot = [pool.name for pool in pools if pool.priority == "spot"]
    return {
        "pool_key": POOL_KEY,
        "pools": [pool.name for pool in pools],
        "preferred": spot if spot and len(pools) > len(spot) else [],
        "tolerations": tolerations(spot=bool(spot), device="gpu" if workload.gpus else "cpu"),
    }


class Disk(NamedTuple):
    """What a pod keeps under /cache, and where that lies: on the machine's system disk, or on its NVMe disks."""

    needed_bytes: int
    cache: Cache

    @property
    def system_bytes(self) -> int:
        """Of the machine's system disk."""
        return self.needed_bytes if self.cache == "disk" else OWN_DISK_BYTES


def disk_of(workload: LockedWorkload) -> Disk:
    """The disk of a workload's pods. PlannerError as training_of."""
    if workload.serving is not None:
        return Disk(workload.serving.cache_bytes, workload.serving.cache)
    kept = training_of(workload)
    return Disk(kept.disk_bytes, kept.cache)


def resources(lock: Lock, workload: LockedWorkload) -> Manifest:
    """The share of a machine that goes with its share of the GPUs, all of one without; of its disk what is planned."""
    pool, shares = pools_of(lock, workload)[0], lock.platform.shares
    gpus = gpus_of_pod(workload)
    part = gpus / pool.gpus_per_node if gpus else 1.0
    memory = pool.ram_gib_per_node * part
    vcpus = min(pool.vcpus_per_node * shares["cpu"], pool.vcpus_per_node - shares["kept_vcpus"]) * part
    disk = _gib(disk_of(workload).system_bytes)
    devices = {GPU: str(gpus)} if gpus else {}
    # without a GPU the model itself lies in the machine's memory: then what may be taken is asked for
    asked = shares["memory_request"] if gpus else shares["memory_limit"]
    return {
        "requests": {
            "cpu": f"{int(vcpus * 1000)}m",
            "memory": f"{int(memory * asked)}Gi",
            "ephemeral-storage": disk,
            **devices,
        },
        "limits": {"memory": f"{int(memory * shares['memory_limit'])}Gi", "ephemeral-storage": disk, **devices},
    }


def environment(workload: LockedWorkload, secrets: Collection[str]) -> list[Manifest]:
    """Variables: every cache in the volume that the user may write to, and those secrets that the vault has."""
    plain = {
        "HOME": "/cache",
        "USER": "tonnage",  # PyTorch's compiler asks for a user's name, and the number has none in the image
        "HF_HOME": "/cache/huggingface",
        **({"VLLM_CACHE_ROOT": "/cache/vllm"} if workload.task == "serve" else {}),
        "TORCHINDUCTOR_CACHE_DIR": "/cache/inductor",
        "TRITON_CACHE_DIR": "/cache/triton",
    }
    found: list[Manifest] = [{"name": name, "value": value} for name, value in plain.items()]
    for variable, secret in NEEDED_SECRETS[workload.task].items():
        if secret in secrets:
            source = {"secretKeyRef": {"name": secret_name(workload), "key": secret}}
            found.append({"name": variable, "valueFrom": source})
    return found


MOUNTS = (
    {"name": "cache", "mountPath": "/cache"},
    {"name": "shm", "mountPath": "/dev/shm"},
    {"name": "secrets", "mountPath": "/mnt/secrets", "readOnly": True},
)


def volumes(workload: LockedWorkload, shares: Sequence[Manifest]) -> list[Manifest]:
    """A disk for caches, memory shared between a server's processes, secrets, and containers of Blob.

    Where the plan puts the disk on NVMe it is one that lives as long as the pod.
    """
    disk = disk_of(workload)
    size = _gib(disk.needed_bytes)
    claim = {
        "accessModes": ["ReadWriteOnce"],
        "storageClassName": NVME,
        "resources": {"requests": {"storage": size}},
    }
    cache: Manifest = {"emptyDir": {"sizeLimit": size}}
    if disk.cache == "nvme":
        cache = {"ephemeral": {"volumeClaimTemplate": {"spec": claim}}}
    return [
        *({"name": one["kind"], "persistentVolumeClaim": {"claimName": one["name"]}} for one in shares),
        {"name": "cache", **cache},
        {
            "name": "shm",
            "emptyDir": {"medium": "Memory", "sizeLimit": "8Gi" if gpus_of_pod(workload) > 1 else "1Gi"},
        },
        {
            "name": "secrets",
            "csi": {
                "driver": "secrets-store.csi.k8s.io",
                "readOnly": True,
                "volumeAttributes": {"secretProviderClass": workload.name},
            },
        },
    ]


def _gib(size_bytes: int) -> str:
    """As Kubernetes writes it, in whole GiB that hold it."""
    return f"{-(-size_bytes // (1 << 30))}Gi"


def digest(value: object) -> str:
    """Hex digits of the SHA-256 of anything JSON can hold."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
