"""What the cluster autoscaler does for AKS pools, as a pure function: pending pods and nodes in, pools that grow out.

Like the real one it asks of a pool's template node what the scheduler asks of a node (taints, labels, room) and lets
the priority expander choose. It does not know topology spread, pod affinity or volumes, and never scales down.
"""

import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import yaml
from pools import GPU, GPUS_ANNOTATION, Pool, node_of, scale_set
from standin.cluster import Object, condition, milli

Amounts = dict[str, int]

_STARTING = {"node.kubernetes.io/not-ready", "node.kubernetes.io/network-unavailable", "node.kubernetes.io/unreachable"}


def grow(
    pods: Sequence[Object],
    nodes: Sequence[Object],
    daemon_sets: Sequence[Object],
    pools: Sequence[Pool],
    *,
    unavailable: Collection[str] = (),
    priorities: str = "",
) -> list[Pool]:
    """The pools to add a node to, one entry for each node.

    A pod that will fit on a node that is there, also on one whose GPUs are not registered yet, asks for nothing.
    unavailable: names of pools that Azure has no machines for; priorities: text of the expander's ConfigMap.
    """
    counts = {pool["name"]: sum(_pool_name(node) == pool["name"] for node in nodes) for pool in pools}
    room = [(_once_ready(node), _free(node, pods)) for node in nodes if not node["spec"].get("unschedulable")]
    grown: list[Pool] = []
    for pod in pods:
        if not _is_unschedulable(pod) or _place(pod, room):
            continue
        options = []
        for pool in pools:
            if pool["name"] in unavailable or counts[pool["name"]] >= int(pool["max_count"]):
                continue
            node = node_of(pool, 0)
            free = _minus(
                _allocatable(node), *(_requests(ds["spec"]["template"]["spec"]) for ds in _on(daemon_sets, node))
            )
            if admits(pod["spec"], node) and _covers(free, _requests(pod["spec"])):
                options.append((pool, node, free))
        if options:
            pool, node, free = max(options, key=lambda option: _priority(option[0], priorities))
            counts[pool["name"]] += 1
            grown.append(pool)
            room.append((node, _minus(free, _requests(pod["spec"]))))
    return grown


def admits(spec: Mapping[str, Any], node: Object) -> bool:
    """Whether taints, node selector and required node affinity let a pod of that spec onto the node."""
    tolerations = spec.get("tolerations") or ()
    hard = [taint for taint in node["spec"].get("taints") or () if taint["effect"] in ("NoSchedule", "NoExecute")]
    if not all(any(_tolerates(toleration, taint) for toleration in tolerations) for taint in hard):
        return False
    labels: Mapping[str, str] = node["metadata"]["labels"]
    if any(labels.get(key) != value for key, value in (spec.get("nodeSelector") or {}).items()):
        return False
    affinity = (spec.get("affinity") or {}).get("nodeAffinity") or {}
    required = affinity.get("requiredDuringSchedulingIgnoredDuringExecution")
    if required is None:
        return True
    fields = {"metadata.name": node["metadata"]["name"]}
    return any(
        all(_matches(labels, expression) for expression in term.get("matchExpressions") or ())
        and all(_matches(fields, expression) for expression in term.get("matchFields") or ())
        for term in required["nodeSelectorTerms"]
    )


def _tolerates(toleration: Mapping[str, Any], taint: Mapping[str, Any]) -> bool:
    if toleration.get("effect") not in (None, "", taint["effect"]):
        return False
    if not toleration.get("key"):
        return toleration.get("operator") == "Exists"
    if toleration["key"] != taint["key"]:
        return False
    return toleration.get("operator") == "Exists" or (toleration.get("value") or "") == (taint.get("value") or "")


def _matches(labels: Mapping[str, str], expression: Mapping[str, Any]) -> bool:
    value, values = labels.get(expression["key"]), expression.get("values") or []
    match expression["operator"]:
        case "In":
            return value in values
        case "NotIn":
            return value not in values
        case "Exists":
            return value is not None
        case "DoesNotExist":
            return value is None
        case "Gt":
            return value is not None and int(value) > int(values[0])
        case "Lt":
            return value is not None and int(value) < int(values[0])
        case other:
            raise ValueError(f"{other!r} is no operator of a node selector")


def _is_unschedulable(pod: Object) -> bool:
    if pod["spec"].get("nodeName") or pod["metadata"].get("deletionTimestamp"):
        return False
    owners = pod["metadata"].get("ownerReferences") or ()
    if any(owner["kind"] == "DaemonSet" for owner in owners):
        return False
    return condition(pod, "PodScheduled").get("reason") == "Unschedulable"


def _place(pod: Object, room: list[tuple[Object, Amounts]]) -> bool:
    """Takes the pod's room on the first node that has it."""
    wanted = _requests(pod["spec"])
    for index, (node, free) in enumerate(room):
        if admits(pod["spec"], node) and _covers(free, wanted):
            room[index] = (node, _minus(free, wanted))
            return True
    return False


def _on(daemon_sets: Sequence[Object], node: Object) -> list[Object]:
    return [item for item in daemon_sets if admits(item["spec"]["template"]["spec"], node)]


def _free(node: Object, pods: Sequence[Object]) -> Amounts:
    here = [pod for pod in pods if pod["spec"].get("nodeName") == node["metadata"]["name"]]
    running = [pod for pod in here if (pod.get("status") or {}).get("phase") not in ("Succeeded", "Failed")]
    return _minus(_allocatable(node), *(_requests(pod["spec"]) for pod in running))


def _allocatable(node: Object) -> Amounts:
    """What a node offers, its GPUs as they will be once the device plugin runs."""
    amounts = {key: milli(value) or 0 for key, value in node["status"]["allocatable"].items()}
    return amounts | {GPU: 1000 * int(node["metadata"].get("annotations", {}).get(GPUS_ANNOTATION, 0))}


def _requests(spec: Mapping[str, Any]) -> Amounts:
    """What the scheduler counts for a pod: its containers together, or one init container where that is more."""
    total: Amounts = {"pods": 1000}
    for container in spec["containers"]:
        _add(total, _of(container))
    sidecars: Amounts = {}
    for container in spec.get("initContainers") or ():
        if container.get("restartPolicy") == "Always":
            _add(total, _of(container))
            _add(sidecars, _of(container))
        else:
            peak = dict(sidecars)
            _add(peak, _of(container))
            for key, value in peak.items():
                total[key] = max(total.get(key, 0), value)
    return total


def _of(container: Mapping[str, Any]) -> Amounts:
    resources = container.get("resources") or {}
    named = (resources.get("limits") or {}) | (resources.get("requests") or {})
    return {key: milli(value) or 0 for key, value in named.items()}


def _add(total: Amounts, more: Amounts) -> None:
    for key, value in more.items():
        total[key] = total.get(key, 0) + value


def _minus(amounts: Amounts, *taken: Amounts) -> Amounts:
    left = dict(amounts)
    for part in taken:
        for key, value in part.items():
            left[key] = left.get(key, 0) - value
    return left


def _covers(free: Amounts, wanted: Amounts) -> bool:
    return all(free.get(key, 0) >= value for key, value in wanted.items() if value)


def _once_ready(node: Object) -> Object:
    """The node without the taints that go when it is up, so that one that still starts counts as room."""
    taints = [taint for taint in node["spec"].get("taints") or () if taint["key"] not in _STARTING]
    return node | {"spec": node["spec"] | {"taints": taints}}


def _pool_name(node: Object) -> str:
    return str(node["metadata"]["labels"].get("agentpool", ""))


def _priority(pool: Pool, priorities: str) -> int:
    """The highest priority one of whose patterns the scale set's name matches; below all where none does."""
    table: Mapping[int, Sequence[str]] = yaml.safe_load(priorities) or {}
    name = scale_set(pool)
    return max((int(p) for p, patterns in table.items() if any(re.search(text, name) for text in patterns)), default=-1)
