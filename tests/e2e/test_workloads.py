"""The rendered objects on a real Kubernetes control plane with the definitions that AKS brings; machines are pretended.

Nothing but the API server, its admission, its controllers and its scheduler says here what is right. Objects are
applied as Pulumi's provider applies them, by server-side apply, without Pulumi: `test_stacks` goes the whole way.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
from control_plane import AKS_CRDS, ControlPlane, control_plane
from pools import pool_of
from recording import named, record
from standin.cluster import ApiError, condition, is_true
from tools import Missing, engines

from infra.objects import Values, manifests
from infra.pools import CPU_TAINT, GPU_TAINT, GpuPools, GpuPoolsArgs
from planner.catalog.prices import DEFAULT, load_sheet
from planner.plan import make_plan, parse_intent
from planner.plan.lock import Lock, lock_of
from planner.stack import read_stack, stack_names
from workloads.render import GPU, NAMESPACE

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
each_stack = pytest.mark.parametrize("stack", STACKS)


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ControlPlane]:
    try:
        programs = engines()
    except Missing as reason:
        if os.environ.get("CI"):
            pytest.fail(str(reason))
        pytest.skip(str(reason))
    crds = (*AKS_CRDS, "leaderworkerset.x-k8s.io")
    with control_plane(tmp_path_factory.mktemp("plane"), programs=programs, crds=crds) as plane:
        plane.wait_for(lambda: all(stored(plane, *kind) for kind in KINDS), 60, "storage for every kind")
        yield plane


def stored(plane: ControlPlane, version: str, kind: str) -> bool:
    """Whether objects of a kind can be asked for: not in the first moments after its definition."""
    try:
        plane.cluster.list(version, kind)
    except ApiError as error:
        if error.status == 429:
            return False
        raise
    return True


@pytest.fixture
def plane(running: ControlPlane) -> Iterator[ControlPlane]:
    """The control plane, without nodes and without objects of a plan but the namespaces, which take long to go."""
    yield running
    running.autoscale([])
    running.unavailable.clear()

    def left() -> list[Object]:
        labels = "app.kubernetes.io/part-of=tonnage"
        return [one for kind in KINDS for one in running.cluster.list(*kind, labelSelector=labels)]

    for one in left():
        running.cluster.delete(one)
    for pod in running.pods(NAMESPACE):
        running.cluster.delete(pod, grace_s=0)
    running.wait_for(lambda: not running.pods(NAMESPACE) and not left(), 60, "everything to go")
    for node in running.nodes():
        running.cluster.delete(node)


# --------------------------------------------------------------------------------------------- plans, and applying them


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


# ----------------------------------------------------------------------------------------------------- as it is shipped


@each_stack
def test_a_stack_is_taken_twice_and_the_second_time_changes_nothing(plane: ControlPlane, stack: str) -> None:
    lock = shipped(stack)
    machines(plane, lock)
    first = apply(plane, lock)
    assert [key_of(one) for one in first] == [key_of(one) for one in manifests(lock, VALUES)]
    for workload in lock.workloads:
        if workload.task == "serve" and workload.schedule == "always":
            plane.wait_for(lambda name=workload.name: ready(plane, name), 90, f"a ready {workload.name}")
    pods = {pod["metadata"]["uid"] for pod in workload_pods(plane)}
    settled = at_rest(plane, first)
    second = apply(plane, lock)
    for before, after in zip(settled, second, strict=True):
        assert state(after) == before  # metadata.generation among it, which counts changes of the spec
    assert {pod["metadata"]["uid"] for pod in workload_pods(plane)} == pods


@each_stack
def test_every_pod_lands_on_its_own_pool_and_asks_for_its_gpus_there(plane: ControlPlane, stack: str) -> None:
    lock = shipped(stack)
    machines(plane, lock, STRANGERS, OTHERS)
    applied = apply(plane, lock)
    plane.wait_for(lambda: len(plane.nodes("strangers")) == 2, 30, "the strangers' machines")
    for workload in lock.workloads:
        if workload.task == "serve":
            if workload.schedule != "always":
                # of KEDA's servers there is one until it has looked at the clock: their manifest says no number
                assert deployment_of(applied)["spec"]["replicas"] == (1 if workload.windows else 0)
                scale(plane, workload.name, workload.replicas)
            count = workload.replicas
        else:
            job = run_of(applied, workload.name)
            assert job["spec"]["suspend"] is True
            plane.cluster.merge(job, {"spec": {"suspend": False}})
            count = int(job["spec"].get("parallelism", 1))
        found = plane.wait_for(
            lambda name=workload.name, count=count: ready(plane, name, count), 90, f"ready pods of {workload.name}"
        )
        meant = {pool.name for pool in lock.pools if workload.name in pool.workloads}
        for pod in found:
            assert plane.pool_of_pod(pod) in meant
            limits = pod["spec"]["containers"][0]["resources"]["limits"]
            assert limits.get(GPU, "0") == str(workload.gpus)
        # they may take turns on one machine: the next one gets it
        if workload.task == "serve":
            scale(plane, workload.name, 0)
        else:
            plane.cluster.merge(job, {"spec": {"suspend": True}})
        plane.wait_for(lambda name=workload.name: not plane.pods(NAMESPACE, f"app.kubernetes.io/instance={name}"), 60)
    # a GPU is nothing to the cluster before its agents run: they are wherever there is one
    with_gpus = {pool.name for pool in lock.pools if pool.gpus_per_node and plane.nodes(pool.name)}
    expected = {"strangers", *with_gpus} if with_gpus else set()
    assert {plane.pool_of_pod(pod) for pod in plane.pods("gpu-system")} == expected


# ------------------------------------------------------------------------------------------------------- planned anew


def _shorter(wanted: dict[str, Any]) -> None:
    for workload in wanted["workloads"]:
        workload["context"] = 1024


def _more(wanted: dict[str, Any]) -> None:
    server_of(wanted)["replicas"] = 2


def _own_weights(wanted: dict[str, Any]) -> None:
    server_of(wanted).update(weights="blob", runtime_adapters=True)


def _other_schedule(wanted: dict[str, Any]) -> None:
    server_of(wanted)["schedule"] = "mon-fri 08:00-18:00"


def _for_the_network(wanted: dict[str, Any]) -> None:
    server_of(wanted)["expose"] = "internal"


CHANGES = (_shorter, _more, _own_weights, _other_schedule, _for_the_network)


@each_stack
def test_every_change_of_the_intent_can_be_applied_over_what_is_there_and_taken_back(
    plane: ControlPlane, stack: str
) -> None:
    """No field that cannot be changed is changed: the API server would refuse it."""
    before = shipped(stack)
    machines(plane, before)
    apply(plane, before)
    original = {key_of(one) for one in manifests(before, VALUES)}
    current = before
    for change in CHANGES:
        lock = planned(stack, change)
        apply(plane, lock, current)
        current = lock
    apply(plane, before, current)
    for version, kind, namespace, name in original:
        assert plane.cluster.get(version, kind, name, namespace or None) is not None, (kind, name)
    # and what the changes had brought is gone
    for version, kind in KINDS:
        kept = {name for _, other, _, name in original if other == kind}

        def only(version: str = version, kind: str = kind, kept: set[str] = kept) -> bool:
            found = plane.cluster.list(version, kind, labelSelector="app.kubernetes.io/part-of=tonnage")
            return {one["metadata"]["name"] for one in found} == kept

        plane.wait_for(only, 60, f"nothing but the plan's own {kind}")


def test_a_run_that_is_planned_anew_is_another_job_and_an_edit_of_the_old_one_is_refused(plane: ControlPlane) -> None:
    before = shipped("dev-2k")
    name = next(workload.name for workload in before.workloads if workload.task == "finetune")
    old = run_of(apply(plane, before), name)
    lock = planned("dev-2k", _shorter)
    new = run_of(apply(plane, lock, before), name)
    assert new["metadata"]["name"] != old["metadata"]["name"]
    plane.wait_for(lambda: plane.cluster.get("batch/v1", "Job", old["metadata"]["name"], NAMESPACE) is None, 30)
    # the reason for the name: its pods' template cannot be changed
    edited = run_of(manifests(before, VALUES), name)
    edited = edited | {"metadata": edited["metadata"] | {"name": new["metadata"]["name"]}}
    edited["spec"]["template"]["spec"]["containers"][0]["image"] = "elsewhere.azurecr.io/train:1"
    with pytest.raises(ApiError, match="field is immutable"):
        plane.cluster.apply(edited, manager=MANAGER, force=True)


def test_what_keda_has_scaled_stays_so_when_the_plan_is_applied_again(plane: ControlPlane) -> None:
    lock = planned("prod-standard", _other_schedule)
    applied = apply(plane, lock)
    assert [one["kind"] for one in applied].count("ScaledObject") == 1
    scale(plane, "serve", 0)
    again = deployment_of(apply(plane, lock))
    assert again["spec"]["replicas"] == 0


# ------------------------------------------------------------------------------------------- updates, drains, eviction


def filled(plane: ControlPlane, replicas: int) -> Lock:
    """prod-enterprise with so many servers, which fill its pool; as soon as all are ready."""
    lock = planned("prod-enterprise", lambda wanted: server_of(wanted).update(replicas=replicas, context=8192))
    assert sum(pool.max_nodes * pool.gpus_per_node for pool in lock.pools) == replicas
    machines(plane, lock)
    applied = apply(plane, lock)
    plane.wait_for(lambda: ready(plane, "serve", replicas, arguments_of(applied)), 90, "the servers")
    return lock


@pytest.mark.parametrize("replicas", [1, 2])
def test_a_rolling_update_on_a_full_pool_comes_to_its_end(plane: ControlPlane, replicas: int) -> None:
    before = filled(plane, replicas)
    lock = planned("prod-enterprise", lambda wanted: server_of(wanted).update(replicas=replicas, context=4096))
    assert [pool.max_nodes for pool in lock.pools] == [pool.max_nodes for pool in before.pools]
    applied = apply(plane, lock, before)
    new = arguments_of(applied)
    assert "--max-model-len=4096" in new
    plane.wait_for(lambda: ready(plane, "serve", replicas, new), 60, "the new servers in the old ones' places")
    assert len(plane.nodes(lock.pools[0].name)) == lock.pools[0].max_nodes


def test_one_server_too_many_during_an_update_would_wait_for_ever(plane: ControlPlane) -> None:
    """Why a full pool has another strategy than Kubernetes' own: what happens with that one."""
    before = filled(plane, 1)
    lock = planned("prod-enterprise", lambda wanted: server_of(wanted).update(replicas=1, context=4096))
    deployment = deployment_of(manifests(lock, VALUES))
    deployment["spec"]["strategy"] = {"type": "RollingUpdate", "rollingUpdate": {"maxSurge": 1, "maxUnavailable": 0}}
    plane.cluster.apply(deployment, manager=MANAGER, force=True)

    def stuck() -> str:
        found = plane.cluster.get("apps/v1", "Deployment", "serve", NAMESPACE) or {}
        return str(condition(found, "ReplicaFailure").get("message", ""))

    assert "exceeded quota: gpus" in plane.wait_for(stuck, 30, "the new server's failure")
    # and without the quota it would be the GPU that is missing
    plane.cluster.delete(
        {"apiVersion": "v1", "kind": "ResourceQuota", "metadata": {"name": "gpus", "namespace": NAMESPACE}}
    )

    def waits() -> str:
        told = [condition(pod, "PodScheduled") for pod in workload_pods(plane, "serve")]
        return next((str(one["message"]) for one in told if one.get("status") == "False"), "")

    assert f"Insufficient {GPU}" in plane.wait_for(waits, 60, "a pod that waits")
    assert len(plane.nodes(before.pools[0].name)) == before.pools[0].max_nodes


def evict(plane: ControlPlane, pod: Object) -> None:
    """As `kubectl drain` does, with the eviction API."""
    metadata = {key: pod["metadata"][key] for key in ("name", "namespace")}
    body = {"apiVersion": "policy/v1", "kind": "Eviction", "metadata": metadata}
    plane.cluster.request("POST", plane.cluster.path_of(pod, subresource="eviction"), body=body)


def cordon(plane: ControlPlane, name: str, *, on: bool = True) -> None:
    node = plane.cluster.get("v1", "Node", name)
    assert node is not None
    plane.cluster.merge(node, {"spec": {"unschedulable": on}})


def test_a_drain_takes_one_of_two_servers_and_waits_for_its_successor(plane: ControlPlane) -> None:
    filled(plane, 2)
    first, second = ready(plane, "serve", 2)
    budget = lambda: (plane.cluster.get("policy/v1", "PodDisruptionBudget", "serve", NAMESPACE) or {})["status"]  # noqa: E731
    plane.wait_for(lambda: budget().get("disruptionsAllowed") == 1, 30, "the budget to count the servers")
    nodes = [pod["spec"]["nodeName"] for pod in (first, second)]
    assert nodes[0] != nodes[1]
    for node in nodes:
        cordon(plane, node)
    evict(plane, first)
    plane.wait_for(lambda: budget().get("disruptionsAllowed") == 0, 30, "the budget to count again")
    with pytest.raises(ApiError, match="would violate the pod's disruption budget") as refused:
        evict(plane, second)
    assert refused.value.status == 429
    # the machine comes back, and with it the successor: then the other may go
    cordon(plane, nodes[0], on=False)
    plane.wait_for(lambda: ready(plane, "serve", 2), 60, "the successor")
    plane.wait_for(lambda: budget().get("disruptionsAllowed") == 1, 30, "the budget to count the successor")
    evict(plane, second)


def test_a_single_server_holds_no_drain_back(plane: ControlPlane) -> None:
    filled(plane, 1)
    (pod,) = ready(plane, "serve")
    assert plane.cluster.list("policy/v1", "PodDisruptionBudget", NAMESPACE) == []
    cordon(plane, pod["spec"]["nodeName"])
    evict(plane, pod)
    plane.wait_for(
        lambda: pod["metadata"]["uid"] not in {one["metadata"]["uid"] for one in plane.pods(NAMESPACE)}, 60, "its end"
    )


# ------------------------------------------------------------------------------------------------------------ admission


def test_the_namespace_of_workloads_takes_restricted_pods_alone(plane: ControlPlane) -> None:
    lock = shipped("prod-standard")
    applied = apply(plane, lock)
    template = deployment_of(applied)["spec"]["template"]["spec"]

    def attempt(name: str, namespace: str, **more: Any) -> Object:
        spec = {**template, **more}
        return plane.cluster.apply(
            {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": name, "namespace": namespace}, "spec": spec},
            manager="test",
            dry_run=True,
        )

    attempt("as-rendered", NAMESPACE)
    (container,) = template["containers"]
    root = container | {"securityContext": {"privileged": True}}
    for spec, words in (
        ({"containers": [root]}, "privileged"),
        ({"hostNetwork": True}, "host namespaces"),
        ({"securityContext": {}}, "runAsNonRoot"),
        ({"volumes": [*template["volumes"], {"name": "host", "hostPath": {"path": "/"}}]}, "hostPath"),
    ):
        with pytest.raises(ApiError, match=rf'violates PodSecurity "restricted:[^"]*": .*{words}') as refused:
            attempt("against-the-rules", NAMESPACE, **spec)
        assert refused.value.status == 403


def test_servers_of_several_machines_are_taken_by_the_definition_of_their_kind(plane: ControlPlane) -> None:
    """The controller of LeaderWorkerSets is not here: that its objects are well formed is what this holds."""
    lock = shipped("prod-standard")
    apply(plane, lock)
    workloads = []
    for workload in lock.workloads:
        assert workload.serving is not None
        serving = workload.serving.model_copy(update={"machines": 2})
        workloads.append(workload.model_copy(update={"serving": serving, "gpus": 2}))
    several = lock.model_copy(update={"workloads": tuple(workloads)})
    sets = [one for one in manifests(several, VALUES) if one["kind"] == "LeaderWorkerSet"]
    assert len(sets) == len(lock.workloads)
    for one in sets:
        taken = plane.cluster.apply(one, manager=MANAGER, dry_run=True)
        assert taken["spec"]["leaderWorkerTemplate"]["size"] == 2
    broken = sets[0] | {"spec": sets[0]["spec"] | {"startupPolicy": "Whenever"}}
    with pytest.raises(ApiError, match="startupPolicy"):
        plane.cluster.apply(broken, manager=MANAGER, dry_run=True)
