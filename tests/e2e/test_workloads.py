"""The rendered objects on a real Kubernetes control plane with the definitions that AKS brings; machines are pretended.

Nothing but the API server, its admission, its controllers and its scheduler says here what is right. Objects are
applied as Pulumi's provider applies them, by server-side apply, without Pulumi: `test_stacks` goes the whole way.
"""

from __future__ import annotations

from typing import Any

import pytest
from applied import (
    KINDS,
    MANAGER,
    OTHERS,
    STACKS,
    STRANGERS,
    VALUES,
    Object,
    apply,
    arguments_of,
    at_rest,
    deployment_of,
    key_of,
    machines,
    planned,
    ready,
    run_of,
    scale,
    server_of,
    shipped,
    state,
    workload_pods,
)
from control_plane import ControlPlane
from standin.cluster import ApiError, condition

from infra.objects import manifests
from planner.plan.lock import Lock
from workloads.render import GPU, NAMESPACE

each_stack = pytest.mark.parametrize("stack", STACKS)


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


def _tuning(wanted: dict[str, Any], **changes: Any) -> None:
    for workload in wanted["workloads"]:
        if workload["kind"] == "finetune":
            workload.update(changes)


def _other_runs(wanted: dict[str, Any]) -> None:
    _tuning(wanted, recipe={"epochs": 2}, runs={"a": {}, "b": {"seed": 7}}, queue="team", weights="blob")


def _over_machines(wanted: dict[str, Any]) -> None:
    _tuning(wanted, machines=2, settings={"parallelism": "ddp"})


CHANGES = (_shorter, _more, _own_weights, _other_schedule, _for_the_network, _other_runs, _over_machines)


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
