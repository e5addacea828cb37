"""AKS node pools as Kubernetes sees them: the Node object that Azure would make of a pool's settings."""

from collections.abc import Mapping
from typing import Any

from planner.catalog import hardware
from planner.errors import PlannerError

Pool = dict[str, Any]

SPOT_KEY = "kubernetes.azure.com/scalesetpriority"
GPU = "nvidia.com/gpu"
GPUS_ANNOTATION = "tonnage.test/gpus"
# Slices of one GPU by the pool's MIG profile. Source: AKS docs, gpu-multi-instance.md (2026-08-21).
MIG_SLICES = {"MIG1g": 7, "MIG2g": 3, "MIG3g": 2, "MIG4g": 1, "MIG7g": 1}
# Millicores that AKS keeps for itself by vCPUs. Source: AKS docs, node-resource-reservations.md (2026-08-21).
_RESERVED_CPU_M = {1: 60, 2: 100, 4: 140, 8: 180, 16: 260, 32: 420, 64: 740}
_MIB = 1024**2
_GIB = 1024**3


def pool_of(profile: Mapping[str, Any], *, region: str) -> Pool:
    """A pool from the properties of an ARM agent pool (or of an inline agentPoolProfile), sizes from the catalog.

    Keys: name, vm_size, region, arch, vcpu, ram_gib, gpus, spot, mode, count, min_count, max_count, max_pods,
    os_disk_gib, node_labels, node_taints, gpu_driver, mig_profile. Without autoscaling min and max are the count.
    Raises PlannerError for a size that the catalog does not have.
    """
    size = profile["vmSize"]
    try:
        sku = hardware.sku(size)
        gpus, vcpu, ram_gib, arch = sku.gpu_count or 0, sku.vcpu or 0, sku.ram_gib or 0, sku.cpu_arch
        nvidia = sku.driver != "rocm"
    except PlannerError:
        cpu = hardware.cpu_size(size)
        gpus, vcpu, ram_gib, nvidia = 0, cpu.vcpus, cpu.ram_gib, False
        arch = "arm64" if "p" in size.removeprefix("Standard_").lower().partition("_")[0] else "x64"
    count = int(profile.get("count") or 0)
    scaled = bool(profile.get("enableAutoScaling"))
    return {
        "name": profile.get("agentPoolName") or profile["name"],
        "vm_size": size,
        "region": region,
        "arch": "arm64" if arch == "arm64" else "amd64",
        "vcpu": vcpu,
        "ram_gib": ram_gib,
        "gpus": gpus if nvidia else 0,
        "spot": profile.get("scaleSetPriority") == "Spot",
        "mode": profile.get("mode") or "User",
        "count": count,
        "min_count": int(profile.get("minCount") or 0) if scaled else count,
        "max_count": int(profile.get("maxCount") or 0) if scaled else count,
        "max_pods": int(profile.get("maxPods") or 250),
        "os_disk_gib": int(profile.get("osDiskSizeGB") or 128),
        "node_labels": dict(profile.get("nodeLabels") or {}),
        "node_taints": list(profile.get("nodeTaints") or ()),
        "gpu_driver": (profile.get("gpuProfile") or {}).get("driver") or "Install",
        "mig_profile": profile.get("gpuInstanceProfile"),
    }


def node_name(pool: Pool, index: int) -> str:
    """The name of a node, as AKS makes it: scale set, then the instance in base 36."""
    return f"{scale_set(pool)}{index:06d}"


def scale_set(pool: Pool) -> str:
    """The name of the pool's scale set, which is the node group that the autoscaler's expander matches."""
    return f"aks-{pool['name']}-12345678-vmss"


def node_of(pool: Pool, index: int) -> dict[str, Any]:
    """The Node object of a pool's instance. It has no GPU yet: that comes when the device plugin registers it."""
    spot, gpus = bool(pool.get("spot")), int(pool.get("gpus") or 0)
    name, labels = node_name(pool, index), dict(pool.get("node_labels") or {})
    reserved = [key for key in labels if key.startswith("kubernetes.azure.com/") and key != SPOT_KEY]
    if reserved:
        raise PlannerError(f"pool {pool['name']} sets the label {reserved[0]}, whose prefix AKS keeps: use another key")
    labels |= {
        "agentpool": pool["name"],
        "kubernetes.azure.com/agentpool": pool["name"],
        "kubernetes.azure.com/mode": str(pool.get("mode") or "User").lower(),
        "kubernetes.io/arch": pool.get("arch") or "amd64",
        "kubernetes.io/hostname": name,
        "kubernetes.io/os": "linux",
        "node.kubernetes.io/instance-type": pool["vm_size"],
        "topology.kubernetes.io/region": pool["region"],
        "topology.kubernetes.io/zone": "0",
    }
    taints = [_taint(text) for text in pool.get("node_taints") or ()]
    if gpus:
        labels["kubernetes.azure.com/accelerator"] = "nvidia"
    if spot:
        labels[SPOT_KEY] = "spot"
        taints = [taint for taint in taints if taint["key"] != SPOT_KEY]
        taints.append({"key": SPOT_KEY, "value": "spot", "effect": "NoSchedule"})
    capacity, allocatable = _resources(pool)
    return {
        "apiVersion": "v1",
        "kind": "Node",
        "metadata": {
            "name": name,
            "labels": labels,
            "annotations": {"kwok.x-k8s.io/node": "fake", GPUS_ANNOTATION: str(_registered_gpus(pool))},
        },
        "spec": {"taints": taints, "providerID": f"azure:///subscriptions/virtualMachineScaleSets/{name}"},
        "status": {"capacity": capacity, "allocatable": allocatable},
    }


def _registered_gpus(pool: Pool) -> int:
    """What the device plugin can register: nothing without a driver, slices where MIG cuts the cards."""
    if pool.get("gpu_driver") == "None":
        return 0
    return int(pool.get("gpus") or 0) * MIG_SLICES.get(str(pool.get("mig_profile")), 1)


def _resources(pool: Pool) -> tuple[dict[str, str], dict[str, str]]:
    """Capacity and allocatable.

    Reserved memory: the smaller of 20 MiB per pod + 50 MiB and a quarter, and 100 MiB of eviction threshold (AKS docs,
    node-resource-reservations.md, Kubernetes 1.29 and newer, 2026-08-21). A tenth of the disk is kept (kubelet's
    default nodefs.available threshold).
    """
    vcpu, ram_bytes = int(pool["vcpu"]), int(pool["ram_gib"]) * _GIB
    max_pods, disk_bytes = int(pool.get("max_pods") or 250), int(pool.get("os_disk_gib") or 128) * _GIB
    kept_cpu_m = next((kept for cores, kept in sorted(_RESERVED_CPU_M.items(), reverse=True) if vcpu >= cores), 60)
    kept_bytes = min((20 * max_pods + 50) * _MIB, ram_bytes // 4) + 100 * _MIB
    capacity = {"cpu": str(vcpu), "memory": str(ram_bytes), "ephemeral-storage": str(disk_bytes), "pods": str(max_pods)}
    allocatable = capacity | {
        "cpu": f"{vcpu * 1000 - kept_cpu_m}m",
        "memory": str(ram_bytes - kept_bytes),
        "ephemeral-storage": str(disk_bytes * 9 // 10),
    }
    return capacity, allocatable


def _taint(text: str) -> dict[str, str]:
    """`sku=gpu:NoSchedule` as a taint. Raises PlannerError for another form."""
    pair, _, effect = text.rpartition(":")
    key, _, value = pair.partition("=")
    if not key or effect not in ("NoSchedule", "PreferNoSchedule", "NoExecute"):
        raise PlannerError(f"{text!r} is not a node taint: write it as key=value:NoSchedule")
    return {"key": key, "effect": effect} | ({"value": value} if value else {})
