"""Plans that are applied to a control plane as Pulumi's provider applies them, and the pools that the program makes."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

from control_plane import ControlPlane
from pools import pool_of
from recording import named, record
from standin.cluster import ApiError, is_true

from infra.objects import Values, manifests
from infra.pools import CPU_TAINT, GPU_TAINT, GpuPools, GpuPoolsArgs
from planner.catalog.prices import DEFAULT, load_sheet
from planner.plan import make_plan, parse_intent
from planner.plan.lock import Lock, lock_of
from planner.stack import read_stack, stack_names
from workloads.render import NAMESPACE

Object = dict[str, Any]

MANAGER = "pulumi-kubernetes"
REGION = "eastus"
VALUES = Values(
    client_ids={"serve": "11111111-1111-4111-8111-111111111111", "finetune": "22222222-2222-4222-8222-222222222222"},
    tenant_id="33333333-3333-4333-8333-333333333333",
    vault_name="tonnage-vault",
    secrets=("api-key", "hf-token"),
    resource_group_name="tonnage",
    storage_account="tonnagedata",
    train_image="tonnage.azurecr.io/train:0123abcd",
)
# the system nodes, and pools of somebody else's that tolerations and room would allow
SYSTEM = {"name": "system", "vmSize": "Standard_D4s_v5", "count": 3, "mode": "System"}
STRANGERS = {"name": "strangers", "vmSize": "Standard_NC24ads_A100_v4", "count": 2, "nodeTaints": [GPU_TAINT]}
OTHERS = {"name": "others", "vmSize": "Standard_D8s_v5", "count": 2, "nodeTaints": [CPU_TAINT]}
STACKS = stack_names()
# of all that is rendered here, but the namespaces
KINDS = sorted(
    {("v1", "PersistentVolume"), ("v1", "PersistentVolumeClaim"), ("policy/v1", "PodDisruptionBudget")}
    | {(one["apiVersion"], one["kind"]) for stack in STACKS for one in manifests(read_stack(stack).lock, VALUES)}
    - {("v1", "Namespace")}
)


def stored(plane: ControlPlane, version: str, kind: str) -> bool:
    """Whether objects of a kind can be asked for: not in the first moments after its definition."""
    try:
        plane.cluster.list(version, kind)
    except ApiError as error:
        if error.status == 429:
            return False
        raise
    return True


def leftovers(plane: ControlPlane) -> list[Object]:
    """Objects of a plan that are there, but the namespaces."""
    labels = "app.kubernetes.io/part-of=tonnage"
    return [one for kind in KINDS for one in plane.cluster.list(*kind, labelSelector=labels)]


def shipped(stack: str) -> Lock:
    return read_stack(stack).lock


def planned(stack: str, change: Callable[[dict[str, Any]], None]) -> Lock:
    """The plan of a stack whose intent a person has edited, on machines of the sizes that it has, at any price."""
    file = read_stack(stack)
    wanted = dict(file.config["tonnage:intent"])
    wanted["workloads"] = [dict(workload) for workload in wanted["workloads"]]
    wanted |= {"approved_usd_per_month": 20_000, "skus": sorted({pool.sku for pool in file.lock.pools})}
    change(wanted)
    intent = parse_intent(wanted, "the test's intent")
    return lock_of(make_plan(intent, load_sheet(DEFAULT)), intent)


def server_of(wanted: dict[str, Any]) -> dict[str, Any]:
    return next(workload for workload in wanted["workloads"] if workload["kind"] == "serve")


def key_of(one: Object) -> tuple[str, str, str, str]:
    metadata = one["metadata"]
    return one["apiVersion"], one["kind"], metadata.get("namespace", ""), metadata["name"]


def apply(plane: ControlPlane, lock: Lock, before: Lock | None = None) -> list[Object]:
    """Everything of a plan, in its order; what the plan before had and this one has not goes. As it is afterwards."""
    wanted = manifests(lock, VALUES)
    applied = [plane.cluster.apply(one, manager=MANAGER, force=True) for one in wanted]
    if before is not None:
        kept = {key_of(one) for one in wanted}
        for one in manifests(before, VALUES):
            if key_of(one) not in kept:
                plane.cluster.delete(one)
    return applied


def machines(plane: ControlPlane, lock: Lock, *others: Object) -> None:
    """The program's pools for a plan grow as AKS grows them, from no machine; beside the cluster's own and others'."""

    def pools() -> None:
        given = {"resource_group_name": "g", "tags": {}, "cluster_name": "c", "nodes_subnet_id": "/s"}
        GpuPools("pools", GpuPoolsArgs(**given, pools=lock.pools))

    made = named(record(pools), ":AgentPool")
    profiles = [SYSTEM, *others, *(row.inputs for row in made.values())]
    assert set(made) == {pool.name for pool in lock.pools}
    plane.autoscale([pool_of(profile, region=REGION) for profile in profiles])


def workload_pods(plane: ControlPlane, name: str | None = None) -> list[Object]:
    """Pods of workloads that are not on their way out, of one workload or of all."""
    found = plane.pods(NAMESPACE, "" if name is None else f"app.kubernetes.io/instance={name}")
    return [pod for pod in found if not pod["metadata"].get("deletionTimestamp")]


def ready(plane: ControlPlane, name: str, count: int = 1, arguments: Sequence[str] | None = None) -> list[Object]:
    """The ready pods of a workload, when there are so many and no other, all with these arguments; else nothing."""
    pods = workload_pods(plane, name)
    good = [
        pod
        for pod in pods
        if is_true(pod, "Ready") and (arguments is None or pod["spec"]["containers"][0]["args"] == list(arguments))
    ]
    return good if len(good) == len(pods) == count else []


def scale(plane: ControlPlane, name: str, replicas: int) -> None:
    """As `kubectl scale` does, and KEDA."""
    found = plane.cluster.get("apps/v1", "Deployment", name, NAMESPACE)
    assert found is not None
    plane.cluster.merge(found, {"spec": {"replicas": replicas}}, manager="kubectl")


def run_of(applied: Sequence[Object], name: str) -> Object:
    (job,) = (one for one in applied if one["kind"] == "Job" and one["metadata"]["name"].rpartition("-")[0] == name)
    return job


def deployment_of(applied: Sequence[Object]) -> Object:
    (deployment,) = (one for one in applied if one["kind"] == "Deployment")
    return deployment


def arguments_of(applied: Sequence[Object]) -> list[str]:
    """Of the server's command line."""
    container = deployment_of(applied)["spec"]["template"]["spec"]["containers"][0]
    return list(container["args"])


def state(one: Object) -> Object:
    """An object without what controllers and the server itself write."""
    kept = {key: value for key, value in one["metadata"].items() if key not in ("resourceVersion", "managedFields")}
    return {key: value for key, value in one.items() if key not in ("status", "metadata")} | {"metadata": kept}


def at_rest(plane: ControlPlane, objects: Sequence[Object]) -> list[Object]:
    """The state of objects once controllers have written into them what they write: a second long the same."""
    seen: list[list[Object]] = [[]]

    def same() -> list[Object]:
        time.sleep(1)
        seen.append([state(plane.cluster.request("GET", plane.cluster.path_of(one))) for one in objects])
        return seen[-1] if seen[-1] == seen[-2] else []

    return plane.wait_for(same, 60, "the controllers to come to rest")
