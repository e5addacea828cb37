"""Rules for node pools: the system pool inside the cluster, and the GPU pools, which are the plan's."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from infra.policy.cluster import CLUSTER
from infra.policy.nouns import (
    UNKNOWN,
    Area,
    Book,
    Context,
    Fault,
    OfAll,
    Recorded,
    Severity,
    at,
    holds,
    listed,
    of_kind,
    says,
)
from planner.plan.lock import LockedPool

POOL = "containerservice:AgentPool"
GPU_TAINT, CPU_TAINT = "sku=gpu:NoSchedule", "sku=cpu:NoSchedule"
SYSTEM_TAINT = "CriticalAddonsOnly=true:NoSchedule"
GPU_SIZES = "standard_n"  # Azure's sizes with a GPU are NC, ND, NG and NV
LEAST_SYSTEM_NODES = 3
AREA: Area = "pools"

pools = Book(AREA)


def inline(cluster: Recorded, resources: Sequence[Recorded]) -> list[dict[str, Any]]:
    """The pools that are properties of a cluster. Once made, Azure tells of those of their own among them: not here."""
    apart = {pool_name(one) for one in of_kind(resources, POOL)}
    given = listed(at(cluster.inputs, "agentPoolProfiles"))
    return [pool for pool in given if isinstance(pool, dict) and pool.get("name") not in apart]


def every_pool(resources: Sequence[Recorded]) -> Iterator[tuple[Recorded, dict[str, Any]]]:
    """Every pool with the properties that both kinds share: those inside a cluster, and those of their own."""
    for one in of_kind(resources, CLUSTER):
        yield from ((one, pool) for pool in inline(one, resources))
    yield from ((one, one.inputs) for one in of_kind(resources, POOL))


def is_system(pool: dict[str, Any]) -> bool:
    """Whether the cluster's own services run on it."""
    return str(at(pool, "mode")).lower() == "system"


def is_gpu(pool: dict[str, Any]) -> bool:
    """Whether its machines have a GPU, by the name of their size."""
    return str(at(pool, "vmSize")).lower().startswith(GPU_SIZES)


def pool_name(resource: Recorded) -> str:
    """What Azure calls an AgentPool; once made, it is told as name."""
    return str(at(resource.inputs, "agentPoolName") or at(resource.inputs, "name") or resource.name)


def _of_pools(
    path: str, allowed: Sequence[object], name: str, what: str, severity: Severity, *answers: str, otherwise: str
) -> OfAll:
    """A rule that a property of every pool has one of the allowed values."""

    def faults(resources: Sequence[Recorded], _: Context) -> list[Fault]:
        return [(one, otherwise) for one, pool in every_pool(resources) if not says(at(pool, path), *allowed)]

    return pools.over(name, what, severity, *answers)(faults)


_of_pools(
    "type",
    ["VirtualMachineScaleSets"],
    "scale-sets",
    "pools are scale sets",
    "medium",
    "CKV_AZURE_169",
    "Azure.AKS.PoolScaleSet",
    otherwise="the pool cannot grow: set type to VirtualMachineScaleSets",
)
_of_pools(
    "enableNodePublicIP",
    [False],
    "no-node-address",
    "no machine has a public address",
    "high",
    "CKV_AZURE_143",
    otherwise="each machine may get a public address: set enable_node_public_ip to False",
)
_of_pools(
    "securityProfile.sshAccess",
    ["Disabled"],
    "no-ssh",
    "nobody logs in to machines",
    "medium",
    "28257686",
    otherwise="machines take SSH logins: set the security profile's ssh_access to Disabled",
)
_of_pools(
    "enableEncryptionAtHost",
    [True],
    "host-encryption",
    "disks are encrypted on the host too",
    "low",
    "CKV_AZURE_227",
    "41425d9f",
    otherwise="what a machine's own disk holds is not encrypted by its host: set enable_encryption_at_host to True",
)
_of_pools(
    "osDiskType",
    ["Ephemeral"],
    "ephemeral-disk",
    "machines start from a disk of their own, which costs nothing",
    "low",
    "CKV_AZURE_226",
    "Azure.AKS.EphemeralOSDisk",
    otherwise="the system disk is one that is billed: set os_disk_type to Ephemeral where the size has room",
)


@pools.over("max-pods", "a machine takes 50 pods at least", "low", "CKV_AZURE_168", "Azure.AKS.NodeMinPods")
def max_pods(resources: Sequence[Recorded], _: Context) -> list[Fault]:
    return [
        (one, f"a machine takes {most or 'an unstated number of'} pods: set max_pods to 50 or more")
        for one, pool in every_pool(resources)
        if (most := at(pool, "maxPods")) != UNKNOWN and not (most or 0) >= 50
    ]


@pools.over("autoscaling", "pools grow and shrink with what is asked of them", "medium", "Azure.AKS.AutoScaling")
def autoscaling(resources: Sequence[Recorded], _: Context) -> list[Fault]:
    return [
        (one, "its machines are there whether needed or not: set enable_auto_scaling to True")
        for one, pool in every_pool(resources)
        if not says(at(pool, "enableAutoScaling"), True)
    ]


@pools.over(
    "min-nodes", "three system machines, and one of each other pool, are always there", "low", "Azure.AKS.MinNodeCount"
)
def min_nodes(resources: Sequence[Recorded], _: Context) -> list[Fault]:
    found: list[Fault] = []
    for one, pool in every_pool(resources):
        path = "minCount" if says(at(pool, "enableAutoScaling"), True) else "count"
        least, wanted = at(pool, path), LEAST_SYSTEM_NODES if is_system(pool) else 1
        if least != UNKNOWN and not (least or 0) >= wanted:
            found.append(
                (one, f"{int(least or 0)} of its machines are always there, and {wanted} should be: raise {path}")
            )
    return found


@pools.over("system-nodes", "two system machines at least: one may fail or be upgraded", "high")
def system_nodes(resources: Sequence[Recorded], _: Context) -> list[Fault]:
    return [
        (one, "a single system machine takes the cluster's own services down with it: make it two at least")
        for one, pool in every_pool(resources)
        if is_system(pool) and (count := at(pool, "count")) != UNKNOWN and not (count or 0) >= 2
    ]


@pools.over("zones", "machines are spread over zones", "low", "Azure.AKS.AvailabilityZone")
def zones(resources: Sequence[Recorded], _: Context) -> list[Fault]:
    return [
        (one, "all machines may stand in one building: set availability_zones")
        for one, pool in every_pool(resources)
        if not listed(at(pool, "availabilityZones"))
    ]


@pools.over("system-taint", "only the cluster's own services run on the system pool", "medium", "CKV_AZURE_232")
def system_taint(resources: Sequence[Recorded], _: Context) -> list[Fault]:
    return [
        (one, f"workloads may crowd out the cluster's own services: add the taint {SYSTEM_TAINT}")
        for one, pool in every_pool(resources)
        if is_system(pool) and not holds(at(pool, "nodeTaints"), SYSTEM_TAINT)
    ]


@pools.over("gpu-taint", "only who asks for a GPU runs on a machine with one, or on one that is a server's own", "high")
def gpu_taint(resources: Sequence[Recorded], context: Context) -> list[Fault]:
    own = {pool.name for pool in context.lock.pools if not pool.gpus_per_node}
    found: list[Fault] = [
        (one, f"any pod may keep a GPU machine awake: add the taint {GPU_TAINT}")
        for one, pool in every_pool(resources)
        if is_gpu(pool) and not holds(at(pool, "nodeTaints"), GPU_TAINT)
    ]
    return found + [
        (one, f"any pod may keep its machines awake: add the taint {CPU_TAINT}")
        for one in of_kind(resources, POOL)
        if pool_name(one) in own and not holds(at(one.inputs, "nodeTaints"), CPU_TAINT)
    ]


@pools.over("one-inline-pool", "every pool but the system pool is a resource of its own", "high")
def one_inline_pool(resources: Sequence[Recorded], _: Context) -> list[Fault]:
    found: list[Fault] = []
    for one in of_kind(resources, CLUSTER):
        own = inline(one, resources)
        known = UNKNOWN not in listed(at(one.inputs, "agentPoolProfiles"))
        if known and not (len(own) == 1 and says(at(own[0], "mode"), "System")):
            found.append(
                (
                    one,
                    "a change to one pool inside the cluster touches all: keep the system pool there, and make every"
                    " other an AgentPool",
                )
            )
    return found


@pools.over("gpu-pool-apart", "a GPU pool is a resource of its own, with a mode of its own", "high")
def gpu_pool_apart(resources: Sequence[Recorded], _: Context) -> list[Fault]:
    return [
        (one, "a GPU pool is inside the cluster or a system pool: make it an AgentPool with mode User")
        for one, pool in every_pool(resources)
        if is_gpu(pool) and (one.kind.endswith("ManagedCluster") or not says(at(pool, "mode"), "User"))
    ]


@pools.each(POOL, "spot-pool", "spot pools pay up to the price on demand, and evicted machines are deleted", "high")
def spot_pool(resource: Recorded, _: Context) -> str | None:
    if not says(at(resource.inputs, "scaleSetPriority"), "Spot") or at(resource.inputs, "scaleSetPriority") == UNKNOWN:
        return None
    if not says(at(resource.inputs, "scaleSetEvictionPolicy"), "Delete"):
        return "evicted machines stay and their disks are billed: set scale_set_eviction_policy to Delete"
    if not says(at(resource.inputs, "spotMaxPrice"), -1):
        return "machines go when the price moves: set spot_max_price to -1, which is the price on demand"
    return None


@pools.each(POOL, "autoscaler-decides", "a change to the plan does not undo what the autoscaler decided", "medium")
def autoscaler_decides(resource: Recorded, _: Context) -> str | None:
    if "count" in resource.ignore_changes or not says(at(resource.inputs, "enableAutoScaling"), True):
        return None
    return "the next `pulumi up` would take away machines at work: add count to ignore_changes"


@pools.over("pools-as-planned", "the GPU pools are the plan's, machine by machine", "high")
def pools_as_planned(resources: Sequence[Recorded], context: Context) -> list[Fault]:
    found: list[Fault] = []
    made = {pool_name(one): one for one in of_kind(resources, POOL)}
    planned = {pool.name: pool for pool in context.lock.pools}
    for name, one in made.items():
        if name in planned:
            found += [(one, sentence) for sentence in _differences(one, planned[name])]
        elif name != UNKNOWN:
            found.append((one, "no pool of the plan has this name: plan it, or take it out"))
    missing = [] if UNKNOWN in made else [name for name in planned if name not in made]
    return found + [(None, f"the plan's pool {name} is not made: make its AgentPool") for name in missing]


def _differences(resource: Recorded, pool: LockedPool) -> Iterator[str]:
    wanted = {
        "vmSize": pool.sku,
        "maxCount": pool.max_nodes,
        "osDiskType": pool.os_disk_type,
        "gpuProfile.driver": pool.driver if pool.gpu else None,
        "gpuInstanceProfile": pool.gpu_instance_profile,
    }
    for path, value in wanted.items():
        if not says(at(resource.inputs, path), value):
            yield f"{path} is {at(resource.inputs, path)} and the plan's is {value}: take it from the plan"
    # Azure counts machines as text, and adds one where nothing is said; spot pools are upgraded without
    surge = at(resource.inputs, "upgradeSettings.maxSurge")
    if pool.priority != "spot" and not says(surge, str(pool.max_surge), pool.max_surge):
        yield f"upgradeSettings.maxSurge is {surge} and the plan's is {pool.max_surge}: take it from the plan"
    spot = at(resource.inputs, "scaleSetPriority")
    if spot != UNKNOWN and says(spot, "Spot") != (pool.priority == "spot"):
        yield f"the plan buys it {pool.priority}: take scale_set_priority from the plan"


@pools.each(POOL, "idle-gpu", "a GPU machine is kept only for a workload that always runs", "medium")
def idle_gpu(resource: Recorded, context: Context) -> str | None:
    least = at(resource.inputs, "minCount")
    if least == UNKNOWN or not least or not is_gpu(resource.inputs):
        return None
    name = pool_name(resource)
    named = {pool.name: pool for pool in context.lock.pools}.get(name)
    if name == UNKNOWN:
        return None
    if named and any(work.schedule == "always" for work in context.lock.workloads if work.name in named.workloads):
        return None
    return f"{int(least)} GPU machines are paid for while nothing runs: set min_count to 0"


RULES = tuple(pools.rules)
