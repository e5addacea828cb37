"""The Kubernetes objects that a plan asks for, as plain mappings; what only Azure knows stands in them as given."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pulumi

from planner.plan.lock import Lock, LockedPool, LockedWorkload

NAMESPACE, GPU_NAMESPACE = "tonnage", "gpu-system"
SECRETS = "tonnage-secrets"
SPOT_KEY = "kubernetes.azure.com/scalesetpriority"
POOL_KEY = "kubernetes.azure.com/agentpool"
GPU = "nvidia.com/gpu"
NODE_SECONDS = 20 * 60  # until a GPU machine is there, its driver installed and its images pulled
READ_BYTES_PER_SECOND = 50_000_000  # weights from the hub or Blob into the machine, when it goes badly
PORT = 8000
# variable -> secret of the vault, by kind of workload: nobody mounts what is not theirs
NEEDED_SECRETS = {
    "serve": {"VLLM_API_KEY": "api-key", "HF_TOKEN": "hf-token"},
    "finetune": {"HF_TOKEN": "hf-token"},
}
SAVE_STEPS = 50  # a step takes seconds to a minute: an eviction costs less than an hour of work
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
# Azure's own Kubernetes service keeps the rest of a node for itself and its agents
CPU_SHARE, MEMORY_REQUEST_SHARE, MEMORY_LIMIT_SHARE = 0.75, 0.6, 0.8
KEPT_VCPUS = 1.5  # of a small machine: its kubelet, network, logs, metrics and the GPU's own agents

Manifest = dict[str, Any]


@dataclass(frozen=True)
class Values:
    """What Azure decides.

    client_ids: of the identity of each kind of workload; secrets: names in the vault; train_image: None if none trains
    """

    client_ids: Mapping[str, pulumi.Input[str]]
    tenant_id: pulumi.Input[str]
    vault_name: pulumi.Input[str]
    secrets: Sequence[str]
    resource_group_name: pulumi.Input[str]
    storage_account: pulumi.Input[str]
    train_image: pulumi.Input[str] | None


def manifests(lock: Lock, values: Values) -> list[Manifest]:
    """Every object of a plan, in the order in which the cluster needs them."""
    found = [*_namespaces(), *_scaling(lock), *_gpu_plumbing(lock), *_boundaries(lock)]
    for workload in lock.workloads:
        found.append(_service_account(workload, values))
        found.append(_secrets(workload, values))
        if workload.task == "serve":
            found += _server(lock, workload, values)
        else:
            found += _training(lock, workload, values)
    return found


def _object(api: str, kind: str, name: str, namespace: str | None, **fields: Any) -> Manifest:
    metadata: dict[str, Any] = {"name": name, **({"namespace": namespace} if namespace else {})}
    labels = {"app.kubernetes.io/part-of": "tonnage", "app.kubernetes.io/managed-by": "pulumi"}
    return {"apiVersion": api, "kind": kind, "metadata": metadata | {"labels": labels}, **fields}


def _namespaces() -> list[Manifest]:
    """Workloads are held to the restricted standard; what reaches into the machines lives apart."""
    made = []
    for name, level in ((NAMESPACE, "restricted"), (GPU_NAMESPACE, "privileged")):
        namespace = _object("v1", "Namespace", name, None)
        namespace["metadata"]["labels"] |= {
            f"pod-security.kubernetes.io/{mode}": level for mode in ("enforce", "audit", "warn")
        }
        made.append(namespace)
    return made


def _scaling(lock: Lock) -> list[Manifest]:
    """The order in which the autoscaler tries pools: spot first, its twin on demand when there is no spot machine."""
    twins = [pool for pool in lock.pools if pool.fallback]
    if not twins:
        return []
    first = [pool for pool in lock.pools if not pool.fallback]
    lines = [
        f"{weight}:\n" + "".join(f"  - .*-{pool.name}-.*\n" for pool in pools)
        for weight, pools in ((20, first), (10, twins))
    ]
    return [
        _object(
            "v1",
            "ConfigMap",
            "cluster-autoscaler-priority-expander",
            "kube-system",
            data={"priorities": "".join(lines)},
        )
    ]


def _gpu_plumbing(lock: Lock) -> list[Manifest]:
    """What makes a GPU a resource that pods can ask for, and its temperature and use a metric."""
    images = lock.platform.images
    mig = any(pool.gpu_instance_profile for pool in lock.pools)
    plugin = {
        "name": "device-plugin",
        "image": images["device_plugin"],
        "env": [
            {"name": "FAIL_ON_INIT_ERROR", "value": "false"},
            {"name": "MIG_STRATEGY", "value": "single" if mig else "none"},
            *([{"name": "NVIDIA_MIG_MONITOR_DEVICES", "value": "all"}] if mig else []),
        ],
        # MIG devices are watched through a capability of the driver's
        "securityContext": {"capabilities": {"add": ["SYS_ADMIN"]}}
        if mig
        else {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}},
        "resources": _small("64Mi"),
        "volumeMounts": [{"name": "kubelet", "mountPath": "/var/lib/kubelet/device-plugins"}],
    }
    exporter = {
        "name": "dcgm-exporter",
        "image": images["dcgm_exporter"],
        "env": [{"name": "DCGM_EXPORTER_KUBERNETES", "value": "true"}],
        "ports": [{"name": "metrics", "containerPort": 9400}],
        # profiling counters ask for it
        "securityContext": {"runAsUser": 0, "capabilities": {"add": ["SYS_ADMIN"]}},
        "resources": _small("512Mi"),
        "volumeMounts": [{"name": "kubelet", "mountPath": "/var/lib/kubelet/pod-resources", "readOnly": True}],
    }
    return [
        _node_agent("nvidia-device-plugin", plugin, "/var/lib/kubelet/device-plugins"),
        _node_agent("dcgm-exporter", exporter, "/var/lib/kubelet/pod-resources"),
        _pod_monitor("dcgm-exporter", GPU_NAMESPACE, {"app.kubernetes.io/name": "dcgm-exporter"}, lock),
    ]


def _small(memory: str) -> Manifest:
    return {"requests": {"cpu": "50m", "memory": memory}, "limits": {"memory": memory}}


def _node_agent(name: str, container: Manifest, folder: str) -> Manifest:
    """A DaemonSet on every GPU machine, spot ones too."""
    labels = {"app.kubernetes.io/name": name}
    return _object(
        "apps/v1",
        "DaemonSet",
        name,
        GPU_NAMESPACE,
        spec={
            "selector": {"matchLabels": labels},
            "updateStrategy": {"type": "RollingUpdate"},
            "template": {
                "metadata": {"labels": labels},
                "spec": {
                    "priorityClassName": "system-node-critical",
                    "automountServiceAccountToken": False,
                    "nodeSelector": {"kubernetes.azure.com/accelerator": "nvidia"},
                    "tolerations": tolerations(spot=True),
                    "containers": [container],
                    "volumes": [{"name": "kubelet", "hostPath": {"path": folder}}],
                },
            },
        },
    )


def _pod_monitor(name: str, namespace: str, labels: Mapping[str, str], lock: Lock, port: str = "metrics") -> Manifest:
    """Of the group that AKS's managed Prometheus reads; it ignores the one that Prometheus Operator brings."""
    endpoint = {"port": port, "path": "/metrics", "interval": f"{lock.around.cluster.scrape_interval_seconds}s"}
    return _object(
        "azmonitoring.coreos.com/v1",
        "PodMonitor",
        name,
        namespace,
        spec={"selector": {"matchLabels": dict(labels)}, "podMetricsEndpoints": [endpoint]},
    )


def tolerations(*, spot: bool) -> list[Manifest]:
    """Of the GPU pools' taint, and of the one that AKS puts on spot machines."""
    found = [{"key": "sku", "operator": "Equal", "value": "gpu", "effect": "NoSchedule"}]
    if spot:
        found.append({"key": SPOT_KEY, "operator": "Equal", "value": "spot", "effect": "NoSchedule"})
    return found


def _boundaries(lock: Lock) -> list[Manifest]:
    """No more GPUs than the pools can have, and nobody talks to the workloads but their namespace and Prometheus."""
    gpus = sum(pool.max_nodes * pool.gpus_per_node for pool in lock.pools)
    neighbours = [
        {"podSelector": {}},
        {"namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": "kube-system"}}},
    ]
    return [
        _object("v1", "ResourceQuota", "gpus", NAMESPACE, spec={"hard": {f"requests.{GPU}": str(gpus)}}),
        _object(
            "networking.k8s.io/v1",
            "NetworkPolicy",
            "own-namespace-only",
            NAMESPACE,
            spec={"podSelector": {}, "policyTypes": ["Ingress"], "ingress": [{"from": neighbours}]},
        ),
    ]


def _service_account(workload: LockedWorkload, values: Values) -> Manifest:
    account = _object("v1", "ServiceAccount", workload.name, NAMESPACE, automountServiceAccountToken=False)
    account["metadata"]["annotations"] = {"azure.workload.identity/client-id": values.client_ids[workload.task]}
    return account


def _secrets(workload: LockedWorkload, values: Values) -> Manifest:
    """Which secrets of the vault the workload's pods mount, as its identity; also kept as a Secret for variables."""
    names = [name for name in NEEDED_SECRETS[workload.task].values() if name in values.secrets]
    listed = "".join(f"  - |\n    objectName: {name}\n    objectType: secret\n" for name in names)
    return _object(
        "secrets-store.csi.x-k8s.io/v1",
        "SecretProviderClass",
        workload.name,
        NAMESPACE,
        spec={
            "provider": "azure",
            "parameters": {
                "usePodIdentity": "false",
                "clientID": values.client_ids[workload.task],
                "keyvaultName": values.vault_name,
                "tenantId": values.tenant_id,
                "objects": f"array:\n{listed}" if listed else "array: []\n",
            },
            "secretObjects": [
                {
                    "secretName": f"{workload.name}-{SECRETS}",
                    "type": "Opaque",
                    "data": [{"objectName": name, "key": name} for name in names],
                }
            ]
            if names
            else [],
        },
    )


def pools_of(lock: Lock, workload: LockedWorkload) -> list[LockedPool]:
    """The pool that the plan means for a workload, and its twin on demand where there is one."""
    return [pool for pool in lock.pools if workload.name in pool.workloads]


def _pod(lock: Lock, workload: LockedWorkload, container: Manifest, volumes: Sequence[Manifest]) -> Manifest:
    """A pod on the plan's pools: their taints tolerated, their names selected, spot preferred, nothing privileged."""
    pools = pools_of(lock, workload)
    spot = [pool.name for pool in pools if pool.priority == "spot"]
    affinity: Manifest = {
        "requiredDuringSchedulingIgnoredDuringExecution": {
            "nodeSelectorTerms": [{"matchExpressions": [_in([pool.name for pool in pools])]}]
        }
    }
    if spot and len(pools) > len(spot):
        affinity["preferredDuringSchedulingIgnoredDuringExecution"] = [
            {"weight": 100, "preference": {"matchExpressions": [_in(spot)]}}
        ]
    return {
        "serviceAccountName": workload.name,
        "automountServiceAccountToken": False,
        "enableServiceLinks": False,  # a Service called vllm would set VLLM_PORT
        "securityContext": {
            "runAsNonRoot": True,
            "runAsUser": 1000,
            "runAsGroup": 1000,
            "fsGroup": 1000,
            "seccompProfile": {"type": "RuntimeDefault"},
        },
        "tolerations": tolerations(spot=bool(spot)),
        "affinity": {"nodeAffinity": affinity},
        "containers": [
            container
            | {
                "securityContext": {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}},
                "resources": _resources(pools[0], workload),
            }
        ],
        "volumes": [
            *volumes,
            {"name": "cache", "emptyDir": {}},
            {"name": "shm", "emptyDir": {"medium": "Memory", "sizeLimit": "1Gi" if workload.gpus == 1 else "8Gi"}},
            {
                "name": "secrets",
                "csi": {
                    "driver": "secrets-store.csi.k8s.io",
                    "readOnly": True,
                    "volumeAttributes": {"secretProviderClass": workload.name},
                },
            },
        ],
    }


def _in(pools: Sequence[str]) -> Manifest:
    return {"key": POOL_KEY, "operator": "In", "values": list(pools)}


def _resources(pool: LockedPool, workload: LockedWorkload) -> Manifest:
    """The share of a machine that goes with its share of the GPUs."""
    share = workload.gpus / pool.gpus_per_node
    memory = pool.ram_gib_per_node * share
    return {
        "requests": {
            "cpu": f"{int(min(pool.vcpus_per_node * CPU_SHARE, pool.vcpus_per_node - KEPT_VCPUS) * share * 1000)}m",
            "memory": f"{int(memory * MEMORY_REQUEST_SHARE)}Gi",
            GPU: str(workload.gpus),
        },
        "limits": {"memory": f"{int(memory * MEMORY_LIMIT_SHARE)}Gi", GPU: str(workload.gpus)},
    }


def _environment(workload: LockedWorkload, values: Values) -> list[Manifest]:
    """Variables: every cache in the volume that the user may write to, and those secrets that the vault has."""
    plain = {
        "HOME": "/cache",
        "USER": "tonnage",  # PyTorch's compiler asks for a user's name, and 1000 has none in the image
        "HF_HOME": "/cache/huggingface",
        "VLLM_CACHE_ROOT": "/cache/vllm",
        "TORCHINDUCTOR_CACHE_DIR": "/cache/inductor",
        "TRITON_CACHE_DIR": "/cache/triton",
    }
    found: list[Manifest] = [{"name": name, "value": value} for name, value in plain.items()]
    for variable, secret in NEEDED_SECRETS[workload.task].items():
        if secret in values.secrets:
            source = {"secretKeyRef": {"name": f"{workload.name}-{SECRETS}", "key": secret}}
            found.append({"name": variable, "valueFrom": source})
    return found


SHARES = ("datasets", "checkpoints", "adapters")  # containers of the storage account that a run mounts
MOUNTS = (
    {"name": "cache", "mountPath": "/cache"},
    {"name": "shm", "mountPath": "/dev/shm"},
    {"name": "secrets", "mountPath": "/mnt/secrets", "readOnly": True},
)


def start_seconds(workload: LockedWorkload) -> int:
    """How long a server may take from its container's start to its first answer, in whole minutes.

    Weights / 50 MB/s, and ten minutes for loading, compiling and capturing graphs.
    """
    weights = workload.memory_bytes.get("weights", 0)
    return -(-(weights // READ_BYTES_PER_SECOND + 600) // 60) * 60


def _server(lock: Lock, workload: LockedWorkload, values: Values) -> list[Manifest]:
    """A vLLM Deployment with its Service and its metrics; replicas by the plan's schedule."""
    labels = {"app.kubernetes.io/name": "vllm", "app.kubernetes.io/instance": workload.name}
    start = start_seconds(workload)
    health = {"httpGet": {"path": "/health", "port": "http"}}
    container = {
        "name": "vllm",
        "image": lock.platform.images["vllm"],
        "command": ["vllm", "serve"],
        "args": [
            workload.hub_id or workload.model,
            f"--served-model-name={workload.model}",
            f"--port={PORT}",
            *workload.arguments,
        ],
        "env": _environment(workload, values),
        "ports": [{"name": "http", "containerPort": PORT}],
        "startupProbe": health | {"periodSeconds": 10, "failureThreshold": start // 10},
        "readinessProbe": health | {"periodSeconds": 5, "failureThreshold": 2},
        "livenessProbe": health | {"periodSeconds": 10, "failureThreshold": 6},  # a restart loads the model again
        "volumeMounts": list(MOUNTS),
    }
    pod = _pod(lock, workload, container, [])
    full = all(workload.replicas * workload.gpus >= p.max_nodes * p.gpus_per_node for p in pools_of(lock, workload))
    deployment = _object(
        "apps/v1",
        "Deployment",
        workload.name,
        NAMESPACE,
        spec={
            "replicas": workload.replicas if workload.schedule == "always" else 0,
            "selector": {"matchLabels": labels},
            "strategy": {"type": "Recreate" if full else "RollingUpdate"},
            "progressDeadlineSeconds": NODE_SECONDS + start,
            "template": {
                "metadata": {"labels": labels | {"azure.workload.identity/use": "true"}},
                "spec": pod | {"terminationGracePeriodSeconds": 120},
            },
        },
    )
    service = _object(
        "v1",
        "Service",
        workload.name,
        NAMESPACE,
        spec={"type": "ClusterIP", "selector": labels, "ports": [{"name": "http", "port": 80, "targetPort": "http"}]},
    )
    # off by schedule, or on spot alone, where there may be no machine for hours: then `pulumi up` must not wait
    sure = workload.schedule == "always" and any(pool.priority != "spot" for pool in pools_of(lock, workload))
    for awaited in (deployment, service):
        awaited["metadata"]["annotations"] = (
            {"pulumi.com/timeoutSeconds": str(NODE_SECONDS + start)} if sure else {"pulumi.com/skipAwait": "true"}
        )
    found = [
        deployment,
        service,
        _pod_monitor(workload.name, NAMESPACE, labels, lock, port="http"),
    ]
    if workload.replicas > 1:
        found.append(
            _object(
                "policy/v1",
                "PodDisruptionBudget",
                workload.name,
                NAMESPACE,
                spec={
                    "maxUnavailable": 1,
                    "unhealthyPodEvictionPolicy": "AlwaysAllow",
                    "selector": {"matchLabels": labels},
                },
            )
        )
    if workload.windows:
        found.append(_by_schedule(workload))
    return found


def _by_schedule(workload: LockedWorkload) -> Manifest:
    """KEDA switches the server on in the windows of its schedule, and off outside of them; in UTC."""
    triggers = []
    for window in workload.windows:
        start, end = (_cron(minute) for minute in (window.start_minute, window.end_minute))
        metadata = {"timezone": "Etc/UTC", "start": start, "end": end, "desiredReplicas": str(workload.replicas)}
        triggers.append({"type": "cron", "metadata": metadata})
    return _object(
        "keda.sh/v1alpha1",
        "ScaledObject",
        workload.name,
        NAMESPACE,
        spec={
            "scaleTargetRef": {"name": workload.name},
            "minReplicaCount": 0,
            "maxReplicaCount": workload.replicas,
            "cooldownPeriod": 300,
            "triggers": triggers,
        },
    )


def _cron(minute: int) -> str:
    """A minute of the week, from Monday 00:00, as cron writes it: Sunday is 0."""
    day, rest = divmod(minute % (7 * 1440), 1440)
    return f"{rest % 60} {rest // 60} * * {(day + 1) % 7}"


def _training(lock: Lock, workload: LockedWorkload, values: Values) -> list[Manifest]:
    """A training Job whose pods outlive evictions: they are retried without counting as failures."""
    name = f"{workload.name}-{_fingerprint(lock, workload)}"
    labels = {"app.kubernetes.io/name": "finetune", "app.kubernetes.io/instance": workload.name}
    claims = [_share(workload, values, container) for container in SHARES]
    container = {
        "name": "trainer",
        "image": values.train_image,
        "command": ["python", "-c", TRAINER],
        "args": [f"--{option}={value}" for option, value in _options(lock, workload, name).items()],
        "env": [
            *_environment(workload, values),
            {"name": "RESULT_DIR", "value": f"/adapters/{name}-$(JOB_COMPLETION_INDEX)"},
        ],
        "volumeMounts": [
            *MOUNTS,
            {"name": "datasets", "mountPath": "/datasets", "readOnly": True},
            {"name": "checkpoints", "mountPath": "/checkpoints"},
            {"name": "adapters", "mountPath": "/adapters"},
        ],
    }
    volumes = [{"name": kind, "persistentVolumeClaim": {"claimName": f"{workload.name}-{kind}"}} for kind in SHARES]
    job = _object(
        "batch/v1",
        "Job",
        name,
        NAMESPACE,
        spec={
            "suspend": True,  # nobody pays for a machine before the data is there and somebody starts the run
            "completionMode": "Indexed",  # runs at the same time must not write over each other
            "parallelism": workload.replicas,
            "completions": workload.replicas,
            "backoffLimit": 3,
            # twice the hours that the plan pays for: a run that hangs must not cost a month
            "activeDeadlineSeconds": int(workload.hours_per_month * 2 * 3600),
            "podFailurePolicy": {
                "rules": [
                    {"action": "Ignore", "onPodConditions": [{"type": "DisruptionTarget"}]},
                    {
                        "action": "FailJob",  # arguments that it refuses will be refused again
                        "onExitCodes": {"containerName": "trainer", "operator": "In", "values": [2]},
                    },
                ]
            },
            "template": {
                "metadata": {"labels": labels | {"azure.workload.identity/use": "true"}},
                "spec": _pod(lock, workload, container, volumes) | {"restartPolicy": "Never"},
            },
        },
    )
    job["metadata"]["annotations"] = {"pulumi.com/skipAwait": "true"}  # it takes hours
    return [*(part for pair in claims for part in pair), job]


def _fingerprint(lock: Lock, workload: LockedWorkload) -> str:
    """Eight digits that change when the run changes, and not when only prices do: a Job cannot be edited."""
    pools = ",".join(f"{pool.name}={pool.sku}" for pool in pools_of(lock, workload))
    return hashlib.sha256(f"{workload.model_dump_json()} {pools}".encode()).hexdigest()[:8]


def _share(workload: LockedWorkload, values: Values, container: str) -> tuple[Manifest, Manifest]:
    """A container of the storage account as a volume, mounted as the workload's identity: there are no keys."""
    name = f"{workload.name}-{container}"
    reads = container == "datasets"
    volume = _object(
        "v1",
        "PersistentVolume",
        name,
        None,
        spec={
            "capacity": {"storage": "1Ti"},  # Blob has no size of its own, but the field must be there
            "accessModes": ["ReadOnlyMany" if reads else "ReadWriteMany"],
            "persistentVolumeReclaimPolicy": "Retain",
            "mountOptions": ["-o allow_other", "--file-cache-timeout-in-seconds=120"],
            "claimRef": {"apiVersion": "v1", "kind": "PersistentVolumeClaim", "namespace": NAMESPACE, "name": name},
            "csi": {
                "driver": "blob.csi.azure.com",
                **({"readOnly": True} if reads else {}),  # what is empty or false is not kept, and would look changed
                "volumeHandle": f"{NAMESPACE}-{name}",
                "volumeAttributes": {
                    "resourceGroup": values.resource_group_name,
                    "storageAccount": values.storage_account,
                    "containerName": container,
                    "protocol": "fuse2",
                    "clientID": values.client_ids[workload.task],
                    "mountWithWorkloadIdentityToken": "true",
                },
            },
        },
    )
    claim = _object(
        "v1",
        "PersistentVolumeClaim",
        name,
        NAMESPACE,
        spec={
            "accessModes": volume["spec"]["accessModes"],
            "storageClassName": "",
            "volumeName": name,
            "resources": {"requests": {"storage": "1Ti"}},
        },
    )
    return volume, claim


def _options(lock: Lock, workload: LockedWorkload, run: str) -> dict[str, str]:
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
    if method in ("qlora", "qdora"):
        found |= {"load_in_4bit": "true", "bnb_4bit_quant_type": "nf4", "use_bnb_nested_quant": "true"}
    if method in ("dora", "qdora"):
        found["use_dora"] = "true"
    return found
