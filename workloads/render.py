"""Kubernetes manifests of a plan. What only Azure knows stands in them as ${NAME}, to be put in where they are applied.

Values are computed here and beside; the templates hold structure alone, write every one as JSON, and are parsed back.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

import jinja2
import yaml

from planner.plan.lock import Lock, LockedPool, LockedWorkload
from workloads import server, training
from workloads.arguments import explained_arguments, vllm_arguments
from workloads.pods import (
    ALL_SECRETS,
    GPU,
    GPU_NAMESPACE,
    NAMESPACE,
    NVME,
    Manifest,
    digest,
    disk_of,
    labels_of,
    secret_name,
    secrets_of,
    tolerations,
)

__all__ = ["GPU", "NAMESPACE", "PLACEHOLDERS", "Manifest", "explained_arguments", "render", "vllm_arguments"]

# what Azure decides, by what it is: each stands in a manifest as ${NAME}
PLACEHOLDERS = {
    "CLIENT_ID_SERVE": "client id of the identity of servers",
    "CLIENT_ID_FINETUNE": "client id of the identity of training runs",
    "TENANT_ID": "the Entra ID tenant",
    "VAULT_NAME": "the Key Vault",
    "RESOURCE_GROUP": "the resource group",
    "STORAGE_ACCOUNT": "the storage account",
    "TRAIN_IMAGE": "the training image in the stack's registry",
}
# how blobfuse2 reads: whole files, kept on the machine's disk for a while, or blocks in its memory, as they are wanted
# sizes in MB: 2,048 of blocks are what the smallest GPU machine leaves beside its pods
# source: Azure/azure-storage-fuse README, block-cache; kaito-project/kaito mounts its mirror of models in the same way
CACHED = ("--file-cache-timeout-in-seconds=120",)
STREAMED = ("--block-cache", "--block-cache-block-size=16", "--block-cache-pool-size=2048", "--use-attr-cache=true")
PART_OF = {"app.kubernetes.io/part-of": "tonnage", "app.kubernetes.io/managed-by": "pulumi"}


def render(lock: Lock, secrets: Collection[str] = ALL_SECRETS) -> list[Manifest]:
    """Every object of a plan, in the order in which the cluster needs them.

    secrets: those that the vault has; the others are neither mounted nor named
    """
    found = [
        *_made("namespaces", namespaces=_namespaces(lock)),
        *(_made("nvme", name=NVME) if any(disk_of(workload).cache == "nvme" for workload in lock.workloads) else []),
        *_made("scaling", priorities=_priorities(lock)),
        *(_made("gpu", **_gpu_agents(lock)) if _has_gpus(lock) else []),
        *_made("boundaries", namespace=NAMESPACE, gpus=str(sum(p.max_nodes * p.gpus_per_node for p in lock.pools))),
    ]
    if any(workload.task == "finetune" for workload in lock.workloads):
        found += _made("program", **training.program_map())
    for workload in lock.workloads:
        own = _identity(workload, secrets)
        if workload.task == "serve":
            own += _shares(workload)
            own += _made("server", **server.values(lock, workload, _share_names(workload), secrets))
        else:
            for run in training.planned_runs(lock, workload):
                own += _run(lock, workload, run, secrets)
        found += [_labelled(one, labels_of(workload)) for one in own]
    return [_labelled(one, PART_OF) for one in found]


@cache
def _templates() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(str(files("workloads") / "templates"))),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.policies["json.dumps_kwargs"] = {"sort_keys": False}
    return environment


def _made(template: str, **values: Any) -> list[Manifest]:
    """The objects of a template, parsed back."""
    text = _templates().get_template(f"{template}.yaml.j2").render(values)
    # in C where it is there: a tenth of the time
    return list(yaml.load_all(text, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader)))


def _labelled(manifest: Manifest, labels: Mapping[str, str]) -> Manifest:
    metadata = manifest["metadata"]
    return manifest | {"metadata": metadata | {"labels": {**metadata.get("labels", {}), **labels}}}


def _namespaces(lock: Lock) -> list[Manifest]:
    """Workloads are held to the restricted standard; what reaches into GPU machines lives apart."""
    levels = {NAMESPACE: "restricted"} | ({GPU_NAMESPACE: "privileged"} if _has_gpus(lock) else {})
    return [
        {"name": name, "labels": {f"pod-security.kubernetes.io/{mode}": level for mode in ("enforce", "audit", "warn")}}
        for name, level in levels.items()
    ]


def _has_gpus(lock: Lock) -> bool:
    return any(pool.gpus_per_node for pool in lock.pools)


def _priorities(lock: Lock) -> str:
    """The order in which the autoscaler tries pools: spot first, its twin on demand when there is no spot machine."""
    twins = [pool for pool in lock.pools if pool.fallback]
    if not twins:
        return ""
    first = [pool for pool in lock.pools if not pool.fallback]

    def line(weight: int, pools: Sequence[LockedPool]) -> str:
        return f"{weight}:\n" + "".join(f"  - .*-{pool.name}-.*\n" for pool in pools)

    return line(20, first) + line(10, twins)


def _gpu_agents(lock: Lock) -> Manifest:
    """What makes a GPU a resource that pods can ask for, and its temperature and use a metric."""
    images = lock.platform.images
    mig = any(pool.gpu_instance_profile for pool in lock.pools)
    plugin = {
        "name": "nvidia-device-plugin",
        "container": "device-plugin",
        "image": images["device_plugin"],
        "env": [
            {"name": "FAIL_ON_INIT_ERROR", "value": "false"},
            {"name": "MIG_STRATEGY", "value": "single" if mig else "none"},
            *([{"name": "NVIDIA_MIG_MONITOR_DEVICES", "value": "all"}] if mig else []),
        ],
        # MIG devices are watched through a capability of the driver's
        "security": {"capabilities": {"add": ["SYS_ADMIN"]}}
        if mig
        else {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}},
        "memory": "64Mi",
        "folder": "/var/lib/kubelet/device-plugins",
        "reads": False,
        "port": None,
    }
    exporter = {
        "name": "dcgm-exporter",
        "container": "dcgm-exporter",
        "image": images["dcgm_exporter"],
        "env": [{"name": "DCGM_EXPORTER_KUBERNETES", "value": "true"}],
        # profiling counters ask for it
        "security": {"runAsUser": 0, "capabilities": {"add": ["SYS_ADMIN"]}},
        "memory": "512Mi",
        "folder": "/var/lib/kubelet/pod-resources",
        "reads": True,
        "port": 9400,
    }
    agents = [agent | {"labels": {"app.kubernetes.io/name": agent["name"]}} for agent in (plugin, exporter)]
    return {
        "agents": agents,
        "gpu_namespace": GPU_NAMESPACE,
        "tolerations": tolerations(spot=True),
        "scrape_interval": f"{lock.around.cluster.scrape_interval_seconds}s",
    }


def _client_id(workload: LockedWorkload) -> str:
    return "${CLIENT_ID_%s}" % workload.task.upper()  # noqa: UP031


def _identity(workload: LockedWorkload, secrets: Collection[str]) -> list[Manifest]:
    """A service account, and which secrets of the vault its pods mount as its identity."""
    names = secrets_of(workload, secrets)
    listed = "".join(f"  - |\n    objectName: {name}\n    objectType: secret\n" for name in names)
    return _made(
        "identity",
        name=workload.name,
        namespace=NAMESPACE,
        client_id=_client_id(workload),
        vault_name="${VAULT_NAME}",
        tenant_id="${TENANT_ID}",
        objects=f"array:\n{listed}" if listed else "array: []\n",
        secrets=names,
        secret_name=secret_name(workload),
    )


def _share_values(workload: LockedWorkload) -> list[Manifest]:
    """Containers of the storage account that a server mounts, named by what is in the volume: that cannot change."""
    found = []
    for kind in server.shares(workload):
        options = ["-o allow_other", *(STREAMED if kind == "models" else CACHED)]
        one = {"kind": kind, "container": kind, "options": options}
        name = f"{workload.name}-{kind}-{digest({**one, 'client': _client_id(workload)})[:6]}"
        found.append(one | {"name": name, "handle": f"{NAMESPACE}-{name}"})
    return found


def _share_names(workload: LockedWorkload) -> list[Manifest]:
    return [{"kind": one["kind"], "name": one["name"]} for one in _share_values(workload)]


def _shares(workload: LockedWorkload) -> list[Manifest]:
    """A volume and its claim for each, mounted as the workload's identity: there are no keys."""
    return _made(
        "volumes",
        shares=_share_values(workload),
        namespace=NAMESPACE,
        client_id=_client_id(workload),
        resource_group="${RESOURCE_GROUP}",
        storage_account="${STORAGE_ACCOUNT}",
    )


def _run(lock: Lock, workload: LockedWorkload, run: training.Planned, secrets: Collection[str]) -> list[Manifest]:
    """A run's objects. Its Job has eight digits of all that it is in its name: it cannot be edited, but replaced."""

    def made(name: str) -> list[Manifest]:
        return _made("run", **training.values(lock, workload, run, name, secrets))

    return made(f"{run.run.name}-{digest(made(run.run.name)[-1]['spec'])[:8]}")
