"""A vLLM server as values for its template: how many, where, which command, when it is ready, and who may reach it."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Sequence
from functools import cache
from importlib.resources import files

from planner.plan.lock import Lock, LockedWorkload
from workloads.arguments import ADAPTERS, GUARD, MODELS, PORT, gpus_of_pod, serving_of, vllm_arguments
from workloads.pods import (
    MOUNTS,
    NAMESPACE,
    NEEDED_SECRETS,
    USER,
    Manifest,
    environment,
    labels_of,
    place,
    pools_of,
    resources,
    volumes,
)
from workloads.timing import PROBE_SECONDS, serving_timing

INTERNAL = "service.beta.kubernetes.io/azure-load-balancer-internal"
GUARD_FOLDER = "/etc/tonnage"  # from which Python takes the module that asks for the API key
CLIENTS = "tonnage/client"  # a namespace with this label may call the servers
PRIVATE_RANGES = ("10.0.0.0/8", "172.16.0.0/12", "192.168.0.0/16")
LWS_ROLE = "leaderworkerset.sigs.k8s.io/worker-index"
WORKER_PORT = 29501  # on which the machines of one replica find each other


def values(lock: Lock, workload: LockedWorkload, mounted: Sequence[Manifest], secrets: Collection[str]) -> Manifest:
    """What server.yaml.j2 asks for. mounted: kind and claim of each container of Blob that it reads."""
    serving, timing = serving_of(workload), serving_timing(serving_of(workload))
    labels = labels_of(workload)
    several = serving.machines > 1
    leader = labels | ({LWS_ROLE: "0"} if several else {})
    pod = _pod(lock, workload, mounted, secrets)
    return {
        "name": workload.name,
        "namespace": NAMESPACE,
        "machines": serving.machines,
        "replicas": _replicas(workload),
        "most_replicas": workload.replicas,
        "labels": labels,
        "leader_labels": leader,
        "pod_labels": labels | {"azure.workload.identity/use": "true"},
        "worker_labels": labels | {"azure.workload.identity/use": "true"},
        "annotations": _awaited(lock, workload),
        "guard": _guard(workload) if is_guarded(secrets) else None,
        "service_annotations": _awaited(lock, workload) | ({INTERNAL: "true"} if serving.expose == "internal" else {}),
        "service_type": "LoadBalancer" if serving.expose == "internal" else "ClusterIP",
        "strategy": strategy(lock, workload),
        "deadline_seconds": timing.deadline_seconds,
        "pod": pod,
        "worker": _worker(workload, pod) if several else None,
        "clients": _clients(workload),
        "port": PORT,
        "scrape_interval": f"{lock.around.cluster.scrape_interval_seconds}s",
        "triggers": _windows(workload),
        "gateway": None if serving.gateway is None else serving.gateway.model_dump(mode="json"),
        "request_timeout": f"{timing.shutdown_seconds}s",
    }


def image(lock: Lock, workload: LockedWorkload) -> str:
    """vLLM for NVIDIA's GPUs, or for CPUs."""
    return lock.platform.images["vllm" if serving_of(workload).device == "gpu" else "vllm_cpu"]


def is_guarded(secrets: Collection[str]) -> bool:
    """Whether servers have an API key: then their whole port asks for it."""
    return NEEDED_SECRETS["serve"]["VLLM_API_KEY"] in secrets


def _guard(workload: LockedWorkload) -> Manifest:
    """The ConfigMap of workloads/key_guard.py, named by what it says: another text is another object for other pods."""
    text = program(GUARD)
    name = f"{workload.name}-key-guard-{hashlib.sha256(text.encode()).hexdigest()[:8]}"
    return {"name": name, "data": {f"{GUARD}.py": text}}


def shares(workload: LockedWorkload) -> list[str]:
    """Containers of the storage account that a server mounts, none of which it writes to."""
    serving = serving_of(workload)
    adapters = serving.runtime_adapters or any(adapter.folder for adapter in serving.adapters)
    return [*(["models"] if serving.weights == "blob" else []), *(["adapters"] if adapters else [])]


def _replicas(workload: LockedWorkload) -> int | None:
    """None where KEDA decides; 0 where a person does, by `kubectl scale`, within the hours of the plan."""
    if workload.windows:
        return None
    return workload.replicas if workload.schedule == "always" else 0


def strategy(lock: Lock, workload: LockedWorkload) -> Manifest:
    """How a new version replaces the old: a pod more where the pool has GPUs to spare, else a pod less.

    A single server on a full pool is stopped before the next starts, which would wait for its GPU for ever.
    """
    pool = pools_of(lock, workload)[0]
    gpus = gpus_of_pod(workload) or 1
    places = pool.max_nodes * ((pool.gpus_per_node or 1) // gpus)
    beside = [one for one in lock.workloads if one.name in pool.workloads and one.name != workload.name]
    others = sum((one.gpus or 1) * one.replicas for one in beside)
    if places - -(-others // gpus) > workload.replicas:
        return {"type": "RollingUpdate", "rollingUpdate": {"maxSurge": 1, "maxUnavailable": 0}}
    if workload.replicas == 1:
        return {"type": "Recreate"}
    return {"type": "RollingUpdate", "rollingUpdate": {"maxSurge": 0, "maxUnavailable": 1}}


def _awaited(lock: Lock, workload: LockedWorkload) -> dict[str, str]:
    """Off by schedule, or on spot alone, where there may be no machine for hours: then `pulumi up` must not wait."""
    sure = workload.schedule == "always" and any(pool.priority != "spot" for pool in pools_of(lock, workload))
    if not sure:
        return {"pulumi.com/skipAwait": "true"}
    return {"pulumi.com/timeoutSeconds": str(serving_timing(serving_of(workload)).deadline_seconds)}


@cache
def program(name: str) -> str:
    """The source of a module of workloads/ that runs in the server's container: ready, key_guard."""
    return (files("workloads") / f"{name}.py").read_text(encoding="utf-8")


def ready_command(workload: LockedWorkload) -> list[str]:
    """The readiness probe's command."""
    return ["python3", "-c", program("ready"), str(PORT), workload.model]


def _pod(lock: Lock, workload: LockedWorkload, mounted: Sequence[Manifest], secrets: Collection[str]) -> Manifest:
    serving, timing = serving_of(workload), serving_timing(serving_of(workload))
    folders = {"models": MODELS, "adapters": ADAPTERS}
    own = [{"name": one["kind"], "mountPath": folders[one["kind"]], "readOnly": True} for one in mounted]
    env, guarded = environment(workload, secrets), is_guarded(secrets)
    guards: list[Manifest] = []
    if guarded:
        env.append({"name": "PYTHONPATH", "value": GUARD_FOLDER})
        own.append({"name": "key-guard", "mountPath": GUARD_FOLDER, "readOnly": True})
        guards.append({"name": "key-guard", "configMap": {"name": _guard(workload)["name"]}})
    if serving.weights == "blob" and not _asks_hub(workload):
        env.append({"name": "HF_HUB_OFFLINE", "value": "1"})
    if serving.runtime_adapters:
        env.append({"name": "VLLM_ALLOW_RUNTIME_LORA_UPDATING", "value": "1"})
    if serving.sleep_level:
        env.append({"name": "VLLM_SERVER_DEV_MODE", "value": "1"})  # without it there is no way to say so
    return place(lock, workload) | {
        "account": workload.name,
        "user": USER,
        "labels": labels_of(workload),
        "spread": workload.replicas > 1,
        "subdomain": None,
        "grace_seconds": timing.grace_seconds,
        "restart": None,
        "container": "vllm",
        "image": image(lock, workload),
        "command": ["vllm", "serve"],
        "args": vllm_arguments(workload, guarded=guarded)
        + (group(serving.machines, "0") if serving.machines > 1 else []),
        "env": env,
        "port": PORT,
        "health": {
            "period_seconds": PROBE_SECONDS,
            "start_failures": timing.start_failures,
            "pre_stop_seconds": timing.pre_stop_seconds,
            "ready_command": ready_command(workload),
        },
        "resources": resources(lock, workload),
        "mounts": [*MOUNTS, *own],
        "volumes": [
            *volumes(workload, mounted),
            *guards,
        ],
    }


def _asks_hub(workload: LockedWorkload) -> bool:
    """Whether something beside the weights comes from the hub: an adapter, a draft model."""
    adapters = any(adapter.hub_id for adapter in serving_of(workload).adapters)
    return adapters or any(one.startswith("--speculative-config") for one in workload.arguments)


def group(machines: int, rank: str) -> list[str]:
    """How the machines of a replica find each other; the variables are LeaderWorkerSet's own."""
    return [
        f"--nnodes={machines}",
        f"--node-rank={rank}",
        "--master-addr=$(LWS_LEADER_ADDRESS)",
        f"--master-port={WORKER_PORT}",
    ]


def _worker(workload: LockedWorkload, pod: Manifest) -> Manifest:
    """A machine that is not the first: it computes and answers nobody."""
    args = [*vllm_arguments(workload), *group(serving_of(workload).machines, "$(LWS_WORKER_INDEX)"), "--headless"]
    return pod | {"args": args, "port": None, "health": None}


def _clients(workload: LockedWorkload) -> list[Manifest]:
    """Who may call a server: its namespace, the cluster's agents, namespaces of clients, whom it is exposed to."""
    serving = serving_of(workload)
    found: list[Manifest] = [
        {"podSelector": {}},
        {"namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": "kube-system"}}},
        {"namespaceSelector": {"matchLabels": {CLIENTS: "true"}}},
    ]
    if serving.expose == "internal":
        found += [{"ipBlock": {"cidr": cidr}} for cidr in PRIVATE_RANGES]
    if serving.gateway is not None:
        found.append({"namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": serving.gateway.namespace}}})
    return found


def _windows(workload: LockedWorkload) -> list[dict[str, str]]:
    """When KEDA switches a server on and off."""
    return [{"start": cron(one.start_minute), "end": cron(one.end_minute)} for one in workload.windows]


def cron(minute: int) -> str:
    """A minute of the week, from Monday 00:00, as cron writes it: Sunday is 0."""
    day, rest = divmod(minute % (7 * 1440), 1440)
    return f"{rest % 60} {rest // 60} * * {(day + 1) % 7}"
