"""What the product itself leaves open, each with the reason, and what of public checklists no rule asks."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from infra.policy.cluster import CLUSTER
from infra.policy.kube import named, pods, workload_kind
from infra.policy.nouns import Context, Recorded, at, listed, of_kind
from infra.policy.objects import is_device_agent
from infra.policy.pools import POOL, pool_name

Judge = Callable[[Recorded | None, Sequence[Recorded], Context], bool]


@dataclass(frozen=True)
class Excuse:
    """Rules that may be broken, why, and when: a finding is still shown, with this reason."""

    rules: tuple[str, ...]
    reason: str
    when: Judge


def _dev(_: Recorded | None, __: Sequence[Recorded], context: Context) -> bool:
    return not context.prod


def _dev_without_endpoints(_: Recorded | None, __: Sequence[Recorded], context: Context) -> bool:
    return not context.prod and not context.lock.around.cluster.private_endpoints


def _dev_on_free_tier(_: Recorded | None, __: Sequence[Recorded], context: Context) -> bool:
    return not context.prod and context.lock.around.cluster.tier == "free"


def _dev_on_basic_registry(_: Recorded | None, __: Sequence[Recorded], context: Context) -> bool:
    return not context.prod and context.lock.around.cluster.registry == "basic"


def _dev_without_defender(_: Recorded | None, __: Sequence[Recorded], context: Context) -> bool:
    return not context.prod and not context.lock.around.cluster.defender


def _dev_with_one_copy(_: Recorded | None, __: Sequence[Recorded], context: Context) -> bool:
    return not context.prod and context.lock.around.storage.redundancy == "lrs"


def _planned_public(_: Recorded | None, __: Sequence[Recorded], context: Context) -> bool:
    return not context.prod and not context.lock.around.private_cluster


def _private(one: Recorded | None, _: Sequence[Recorded], __: Context) -> bool:
    return one is not None and at(one.inputs, "apiServerAccessProfile.enablePrivateCluster") is True


def _gpu_pool(one: Recorded | None, _: Sequence[Recorded], context: Context) -> bool:
    return _is(one, POOL) and one is not None and pool_name(one) in {pool.name for pool in context.lock.pools}


def _system_pool(one: Recorded | None, _: Sequence[Recorded], __: Context) -> bool:
    """Its pool is a property of the cluster."""
    return _is(one, CLUSTER)


def _dev_system_pool(one: Recorded | None, _: Sequence[Recorded], context: Context) -> bool:
    return _is(one, CLUSTER) and not context.prod


def _no_room(one: Recorded | None, _: Sequence[Recorded], context: Context) -> bool:
    """Of GPU pools the plan knows; of the system pool its size says: a d behind the number is a disk of its own."""
    if one is None:
        return False
    if _is(one, CLUSTER):
        sizes = [str(at(pool, "vmSize")) for pool in listed(at(one.inputs, "agentPoolProfiles"))]
        return not any(re.match(r"standard_[a-z]+\d+[a-z]*d", size.lower()) for size in sizes)
    planned = {pool.name: pool.os_disk_type for pool in context.lock.pools}
    return planned.get(pool_name(one)) == "Managed"


def _device_agent(one: Recorded | None, _: Sequence[Recorded], __: Context) -> bool:
    return one is not None and any(is_device_agent(pod) for pod in pods([one]))


def _home_of_device_agents(one: Recorded | None, resources: Sequence[Recorded], _: Context) -> bool:
    if one is None or workload_kind(one) != "Namespace":
        return False
    inside = [pod for pod in pods(resources) if pod.namespace == named(one)]
    return bool(inside) and all(is_device_agent(pod) for pod in inside)


def _kubelet_without_registry(one: Recorded | None, _: Sequence[Recorded], context: Context) -> bool:
    return one is not None and one.name == "kubelet" and context.lock.around.cluster.registry == "none"


def _always(_: Recorded | None, __: Sequence[Recorded], ___: Context) -> bool:
    return True


def _is(one: Recorded | None, kind: str) -> bool:
    return one is not None and bool(list(of_kind([one], kind)))


EXCUSES = (
    Excuse(
        (
            "storage-private",
            "storage-private-endpoint",
            "vault-private",
            "vault-private-endpoint",
            "registry-private",
        ),
        "the dev posture pays for no private endpoint: storage and vault let in the nodes' subnet and nobody else, the"
        " registry asks for a login",
        _dev_without_endpoints,
    ),
    Excuse(
        ("vault-purge-protection",),
        "a protected vault keeps its name for up to 90 days, and a dev stack is there to be destroyed and made again",
        _dev,
    ),
    Excuse(("registry-tier",), "the dev posture pays for a Basic registry", _dev_on_basic_registry),
    Excuse(("paid-tier",), "the dev posture runs on the Free tier, which has no SLA", _dev_on_free_tier),
    Excuse(("defender",), "the dev posture does not pay for Defender", _dev_without_defender),
    Excuse(
        ("storage-replicated",),
        "the dev posture pays for one zone: weights and data can be fetched again",
        _dev_with_one_copy,
    ),
    Excuse(
        ("private-cluster",),
        "the dev posture is administered from people's own machines; from which addresses, the rule api-addresses asks",
        _planned_public,
    ),
    Excuse(
        ("api-addresses",),
        "a private cluster has no public address to guard, and Azure refuses address ranges beside it",
        _private,
    ),
    Excuse(
        ("min-nodes",),
        "a GPU pool goes to zero machines when nothing runs: that is what makes it affordable",
        _gpu_pool,
    ),
    Excuse(("min-nodes", "zones"), "the dev posture pays for two system machines, in any zone", _dev_system_pool),
    Excuse(
        ("zones",),
        "Azure has a GPU size often in a single zone of a region: a pool that names zones finds fewer machines",
        _gpu_pool,
    ),
    Excuse(
        ("autoscaling",),
        "the bill counts a fixed number of system machines: only GPU pools follow the load",
        _system_pool,
    ),
    Excuse(
        ("ephemeral-disk",),
        "the size has no disk of its own with room for the system's 128 GiB, and the bill counts one",
        _no_room,
    ),
    Excuse(
        ("host-encryption",),
        "encryption at host must be registered for the subscription before a pool may ask for it",
        _always,
    ),
    Excuse(
        ("storage-own-key", "disk-own-key", "etcd-own-key"),
        "all is encrypted with keys that Microsoft keeps: a key of one's own that is lost takes the data along, and"
        " needs a vault before everything else",
        _always,
    ),
    Excuse(
        ("log-network",),
        "closing it takes an Azure Monitor private link scope, which the bill does not count: who reads or writes logs"
        " must log in as an identity",
        _always,
    ),
    Excuse(
        ("secret-expiry",),
        "who issued a token decides when it ends: a date in the vault would only be a guess",
        _always,
    ),
    Excuse(
        ("no-escalation", "capabilities-dropped", "not-root", "seccomp", "no-host-paths"),
        "the device plugin and the GPU exporter speak to the kubelet through a folder of the machine, as root",
        _device_agent,
    ),
    Excuse(
        ("identity-has-role",),
        "AKS wants an identity for its kubelets, and without a registry there is nothing for it to pull",
        _kubelet_without_registry,
    ),
    Excuse(
        ("pod-security",),
        "nothing lives in this namespace but the device plugin and the GPU exporter, which reach into the machine",
        _home_of_device_agents,
    ),
)

# ids of public checklists that no rule asks: one line each why
NOT_ASKED = {
    "CKV_AZURE_84, CKV_AZURE_87, Azure.Defender.KeyVault, Azure.Defender.Storage, Azure.Storage.DefenderCloud": (
        "set for a whole subscription, not by a stack"
    ),
    "CKV_AZURE_40, CKV_AZURE_112, 152b15f7-8e1f-4c1f-ab71-8c010ba5dbc0, Azure.KeyVault.AutoRotationPolicy": (
        "about keys: the vault holds secrets alone"
    ),
    "CKV_AZURE_43": "Azure refuses other names itself, and infra/names.py makes none",
    "CKV_AZURE_163, CKV_AZURE_164, CKV_AZURE_165, CKV_AZURE_166, CKV_AZURE_167, CKV_AZURE_233, CKV_AZURE_237": (
        "scanning, signing, quarantine, retention, geo-replication, zones and data endpoints of the registry: one image"
        " that is built from source in the stack's region needs none of them"
    ),
    "CKV_AZURE_182": "the network uses Azure's own DNS",
    "Azure.PublicIP.StandardSKU, Azure.PublicIP.AvailabilityZone, Azure.PublicIP.IsAttached": (
        "AKS makes and keeps the one public address"
    ),
}
