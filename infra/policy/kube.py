"""Kubernetes objects as rules read them: pods wherever they are described, and on which pools they may land."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from infra.policy.nouns import UNKNOWN, Context, Recorded, at, listed, of_kind, says
from infra.policy.pools import CPU_TAINT, GPU_TAINT, POOL, SYSTEM_TAINT, pool_name
from planner.plan.lock import LockedPool

GPU = "nvidia.com/gpu"
SPOT_TAINT = "kubernetes.azure.com/scalesetpriority=spot:NoSchedule"
POOL_LABELS = ("kubernetes.azure.com/agentpool", "agentpool")
# labels with these beginnings are set by others than the program: what is not known of them may match
OTHERS_LABELS = ("kubernetes.azure.com/", "topology.", "node.kubernetes.io/", "beta.kubernetes.io/", "nvidia.com/")
DECIDED = ("kubernetes.azure.com/scalesetpriority", "kubernetes.azure.com/accelerator")


@dataclass(frozen=True)
class Pods:
    """Pods that a resource asks for. replicas: at once, at most; None: one on every node, or not known."""

    resource: Recorded
    kind: str
    namespace: str
    template: Mapping[str, Any]
    replicas: int | None

    @property
    def spec(self) -> Any:
        """What Kubernetes calls a PodSpec."""
        return at(self.template, "spec")

    @property
    def labels(self) -> Mapping[str, Any]:
        """Of each pod."""
        found = at(self.template, "metadata.labels")
        return found if isinstance(found, Mapping) else {}

    @property
    def containers(self) -> list[Mapping[str, Any]]:
        """All containers, those that only prepare included."""
        found = [*listed(at(self.spec, "initContainers")), *listed(at(self.spec, "containers"))]
        return [one for one in found if isinstance(one, Mapping)]

    @property
    def gpus(self) -> int:
        """GPUs of one pod."""
        return sum(gpus_of(one) for one in listed(at(self.spec, "containers")) if isinstance(one, Mapping))

    @property
    def images(self) -> list[str]:
        """Of all containers."""
        return [str(at(one, "image")) for one in self.containers]


def workload_kind(resource: Recorded) -> str:
    """`Deployment` of kubernetes:apps/v1:Deployment; empty for what is no Kubernetes object."""
    return resource.kind.rpartition(":")[2] if resource.kind.startswith("kubernetes:") else ""


def api_group(resource: Recorded) -> str:
    """`apps/v1` of kubernetes:apps/v1:Deployment."""
    return resource.kind.split(":")[1]


def metadata(resource: Recorded) -> Any:
    """A Kubernetes object's metadata; None where it has none."""
    return at(resource.inputs, "metadata")


def named(resource: Recorded) -> str:
    """What Kubernetes calls an object, else Pulumi's name for it."""
    return str(at(metadata(resource), "name") or resource.name)


def pods(resources: Sequence[Recorded]) -> Iterator[Pods]:
    """The pods of Deployments, Jobs, DaemonSets and whatever else has a template, and those that stand alone."""
    for one in resources:
        kind = workload_kind(one)
        template: Any = one.inputs if kind == "Pod" else at(one.inputs, "spec.template")
        if kind == "CronJob":
            template = at(one.inputs, "spec.jobTemplate.spec.template")
        if kind == "LeaderWorkerSet":
            yield from _of_group(one)
            continue
        if kind and isinstance(template, Mapping) and listed(at(template, "spec.containers")):
            space = str(at(metadata(one), "namespace") or "default")
            yield Pods(one, kind, space, template, _replicas(one, kind, resources))


def _of_group(one: Recorded) -> Iterator[Pods]:
    """The pods of a LeaderWorkerSet: the first of each group, and the others."""
    space = str(at(metadata(one), "namespace") or "default")
    groups, size = at(one.inputs, "spec.replicas"), at(one.inputs, "spec.leaderWorkerTemplate.size")
    for part, pods_of_group in (("leaderTemplate", 1), ("workerTemplate", None)):
        template = at(one.inputs, f"spec.leaderWorkerTemplate.{part}")
        if not isinstance(template, Mapping):
            continue
        each = (size - 1 if isinstance(size, int) else None) if pods_of_group is None else pods_of_group
        count = None if UNKNOWN in (groups, size) or each is None else (1 if groups is None else int(groups)) * each
        yield Pods(one, "LeaderWorkerSet", space, template, count)


def _replicas(one: Recorded, kind: str, resources: Sequence[Recorded]) -> int | None:
    """How many pods there may be at once; of what KEDA scales, its most."""
    if kind == "DaemonSet":
        return None
    path = {"Job": "spec.parallelism", "CronJob": "spec.jobTemplate.spec.parallelism"}.get(kind, "spec.replicas")
    stated = at(one.inputs, path)
    if stated == UNKNOWN:
        return None
    counts = [1 if stated is None else int(stated)]
    for scaler in resources:
        if workload_kind(scaler) == "ScaledObject" and says(at(scaler.inputs, "spec.scaleTargetRef.name"), named(one)):
            most = at(scaler.inputs, "spec.maxReplicaCount")
            counts.append(100 if most is None else 0 if most == UNKNOWN else int(most))  # 100: KEDA's default
    return max(counts)


def gpus_of(container: Mapping[str, Any]) -> int:
    """GPUs, or MIG slices, that a container asks for. Requests and limits of a GPU are the same."""
    found = 0
    for part in ("limits", "requests"):
        amounts = at(container, f"resources.{part}")
        if isinstance(amounts, Mapping):
            asked = [v for k, v in amounts.items() if (k == GPU or k.startswith("nvidia.com/mig-")) and v != UNKNOWN]
            found = max(found, sum(int(v) for v in asked))
    return found


@dataclass(frozen=True)
class Nodes:
    """The machines of a pool as a scheduler sees them.

    gpus: of one machine, or MIG devices where its GPUs are cut; planned: None for the system pool
    """

    name: str
    labels: Mapping[str, str]
    taints: tuple[str, ...]
    gpus: int
    planned: LockedPool | None


def nodes(resources: Sequence[Recorded], context: Context) -> list[Nodes]:
    """The pools of the plan, with what their AgentPools say of taints and labels, and the system pool."""
    made = {pool_name(one): one.inputs for one in of_kind(resources, POOL)}
    system = {"kubernetes.azure.com/mode": "system", "kubernetes.io/os": "linux", "kubernetes.io/arch": "amd64"}
    found = [Nodes("system", system | dict.fromkeys(POOL_LABELS, "system"), (SYSTEM_TAINT,), 0, None)]
    for pool in context.lock.pools:
        inputs = made.get(pool.name, {})
        own = at(inputs, "nodeLabels")
        spot = pool.priority == "spot"
        labels = {
            "kubernetes.azure.com/mode": "user",
            **({"kubernetes.azure.com/accelerator": "nvidia"} if pool.gpus_per_node else {}),
            "kubernetes.azure.com/scalesetpriority": "spot" if spot else "regular",
            "kubernetes.io/os": "linux",
            "kubernetes.io/arch": "amd64",
            "node.kubernetes.io/instance-type": pool.sku,
            **dict.fromkeys(POOL_LABELS, pool.name),
            **(own if isinstance(own, Mapping) else {}),
        }
        if not spot:  # AKS labels spot machines alone
            del labels["kubernetes.azure.com/scalesetpriority"]
        taints = [t for t in listed(at(inputs, "nodeTaints")) if t != UNKNOWN] or [
            GPU_TAINT if pool.gpus_per_node else CPU_TAINT
        ]
        found.append(Nodes(pool.name, labels, (*taints, *((SPOT_TAINT,) if spot else ())), pool.gpus_per_node, pool))
    return found


def tolerates(pod: Pods, taint: str) -> bool:
    """Whether a pod may run on a machine with that taint, by Kubernetes' rules for tolerations."""
    pair, _, effect = taint.rpartition(":")
    key, _, value = pair.partition("=")
    for one in listed(at(pod.spec, "tolerations")):
        if one == UNKNOWN:
            return True
        exists = at(one, "operator") in ("Exists", UNKNOWN)
        if at(one, "effect") not in (None, "", effect, UNKNOWN):
            continue
        if exists and at(one, "key") in (None, "", key, UNKNOWN):
            return True
        if not exists and says(at(one, "key"), key) and says(at(one, "value") or "", value):
            return True
    return False


def selects(pod: Pods, node: Nodes) -> bool:
    """Whether a pod's selector and required affinity let it onto a machine."""
    wanted = at(pod.spec, "nodeSelector")
    if isinstance(wanted, Mapping) and not all(_matches(k, "In", [v], node.labels) for k, v in wanted.items()):
        return False
    terms = at(pod.spec, "affinity.nodeAffinity.requiredDuringSchedulingIgnoredDuringExecution.nodeSelectorTerms")
    if terms in (None, UNKNOWN):
        return True
    return any(
        all(
            _matches(str(at(e, "key")), str(at(e, "operator")), listed(at(e, "values")), node.labels)
            for e in listed(at(term, "matchExpressions"))
        )
        for term in listed(terms)
    )


def _matches(key: str, operator: str, values: Sequence[Any], labels: Mapping[str, str]) -> bool:
    has = labels.get(key)
    if UNKNOWN in (key, operator):
        return True
    if has is None and key.startswith(OTHERS_LABELS) and key not in DECIDED:
        return True
    if operator == "In":
        return has is not None and any(says(value, has) for value in values)
    if operator == "NotIn":
        return has is None or has not in values
    if operator in ("Exists", "Gt", "Lt"):
        return has is not None
    return has is None  # DoesNotExist


def may_land(pod: Pods, node: Nodes) -> bool:
    """Whether a scheduler could put a pod onto an empty machine of a pool, memory and CPU aside."""
    return selects(pod, node) and all(tolerates(pod, taint) for taint in node.taints) and node.gpus >= pod.gpus
