"""Fine-tuning Jobs on a real control plane: what the Job controller makes of the program's exit codes and of evictions.

The containers are pretended, so a test says when one ends and with which code; `tests/live` runs the program itself.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import pytest
from applied import MANAGER, VALUES, Object, apply, machines, planned, run_of, shipped, workload_pods
from control_plane import ControlPlane
from standin.cluster import condition, is_true

from infra.objects import manifests
from planner.plan.lock import Lock
from workloads.finetune import FAILED, FINISHED, INTERRUPTED, REFUSED
from workloads.render import GPU, NAMESPACE


def training_alone(wanted: dict[str, Any]) -> dict[str, Any]:
    """The intent without its servers; its fine-tuning workload."""
    wanted["workloads"] = [workload for workload in wanted["workloads"] if workload["kind"] == "finetune"]
    wanted["take_turns"] = False
    (workload,) = wanted["workloads"]
    found: dict[str, Any] = workload
    return found


class Run:
    """A fine-tuning run of a plan that was applied and started."""

    def __init__(self, plane: ControlPlane, lock: Lock, name: str = "finetune") -> None:
        self.plane, self.lock = plane, lock
        machines(plane, lock)
        self.job = run_of(apply(plane, lock), name)
        assert self.job["spec"]["suspend"] is True
        assert plane.pods(NAMESPACE) == []
        self.change(suspend=False)

    @property
    def name(self) -> str:
        return str(self.job["metadata"]["name"])

    def change(self, **spec: Any) -> None:
        """As `kubectl patch`."""
        self.plane.cluster.merge(self.stored(), {"spec": spec}, manager="kubectl")

    def stored(self) -> Object:
        found = self.plane.cluster.get("batch/v1", "Job", self.name, NAMESPACE)
        assert found is not None
        return found

    def failed(self) -> int:
        """Failures that were counted."""
        return int(self.stored()["status"].get("failed", 0))

    def pods(self, count: int = 1, besides: Sequence[Object] = ()) -> list[Object]:
        """Its running pods, once there are so many and none of those."""
        old = {pod["metadata"]["uid"] for pod in besides}

        def alive() -> list[Object]:
            found = [pod for pod in workload_pods(self.plane) if is_true(pod, "Ready")]
            return found if len(found) == count and not old & {pod["metadata"]["uid"] for pod in found} else []

        return self.plane.wait_for(alive, 90, f"{count} running pods of {self.name}")

    def end(self, pods: Sequence[Object], code: int) -> None:
        """The containers end with that code."""
        for pod in pods:
            self.plane.finish_pod(pod["metadata"]["name"], code, namespace=NAMESPACE)

    def ends(self, kind: str) -> Object:
        """The condition with which the Job ends, once it does; nothing of it runs then."""
        self.plane.wait_for(lambda: is_true(self.stored(), kind), 60, f"the Job to be {kind}")
        gone: Callable[[], bool] = lambda: not [p for p in workload_pods(self.plane) if is_true(p, "Ready")]  # noqa: E731
        self.plane.wait_for(gone, 30, "its pods to end")
        return condition(self.stored(), kind)


# --- what the program says --------------------------------------------------------------------------------------------


def test_a_run_that_finishes_is_complete_and_nothing_more_is_started(plane: ControlPlane) -> None:
    run = Run(plane, shipped("dev-32k"))
    run.end(run.pods(), FINISHED)
    run.ends("Complete")
    assert run.failed() == 0


def test_a_run_that_is_interrupted_goes_on_as_often_as_it_takes_and_spends_nothing(plane: ControlPlane) -> None:
    """The controller pauses before it tries again, 10 s and twice as long each time, also where nothing is counted."""
    run = Run(plane, shipped("dev-32k"))
    run.change(backoffLimit=0)  # one counted failure would end it
    pods = run.pods()
    for _ in range(2):
        run.end(pods, INTERRUPTED)
        pods = run.pods(besides=pods)
        assert run.failed() == 0
    run.end(pods, FINISHED)
    run.ends("Complete")


def test_a_run_that_is_refused_ends_at_once_and_is_not_tried_again(plane: ControlPlane) -> None:
    run = Run(plane, shipped("dev-32k"))
    run.end(run.pods(), REFUSED)
    ended = run.ends("Failed")
    assert ended["reason"] == "PodFailurePolicy"
    assert f"exit code {REFUSED}" in ended["message"]
    assert len(plane.pods(NAMESPACE)) == 1  # the one that failed


@pytest.mark.parametrize("code", [FAILED, 137])
def test_a_failure_is_tried_again_until_its_budget_is_spent(plane: ControlPlane, code: int) -> None:
    """Of one retry, since the controller's pause doubles with each: 10 s, 20 s, 40 s. 137: memory of the machine."""
    run = Run(plane, shipped("dev-32k"))
    assert run.job["spec"]["backoffLimit"] == 3
    run.change(backoffLimit=1)
    first = run.pods()
    run.end(first, code)
    second = run.pods(besides=first)
    assert run.failed() == 1
    run.end(second, code)
    assert run.ends("Failed")["reason"] == "BackoffLimitExceeded"
    assert run.failed() == 2


# --- what the cluster does --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("notice", [True, False], ids=["drained", "machine gone"])
def test_an_evicted_run_goes_on_where_the_machine_on_demand_is_and_spends_nothing(
    plane: ControlPlane, notice: bool
) -> None:
    def with_fallback(wanted: dict[str, Any]) -> None:
        training_alone(wanted)
        wanted["pricing"] = {"spot": True, "fallback_on_demand": True}

    lock = planned("dev-32k", with_fallback)
    spot, twin = lock.pools
    assert (spot.priority, twin.priority, twin.fallback) == ("spot", "on-demand", True)
    run = Run(plane, lock)
    run.change(backoffLimit=0)  # one counted failure would end it
    pods = run.pods()
    assert plane.pool_of_pod(pods[0]) == spot.name
    plane.unavailable.add(spot.name)
    plane.evict_spot(pods[0]["spec"]["nodeName"], notice=notice)
    moved = run.pods(besides=pods)
    assert plane.pool_of_pod(moved[0]) == twin.name
    assert moved[0]["spec"]["containers"][0]["resources"]["limits"][GPU] == "1"
    assert run.failed() == 0
    run.end(moved, FINISHED)
    run.ends("Complete")


def test_an_eviction_on_which_the_program_says_that_it_was_interrupted_spends_nothing(plane: ControlPlane) -> None:
    """On SIGTERM the program saves and ends with 75 while its pod is on its way out."""
    run = Run(plane, shipped("dev-32k"))
    run.change(backoffLimit=0)
    pods = run.pods()
    metadata = {key: pods[0]["metadata"][key] for key in ("name", "namespace")}
    run.end(pods, INTERRUPTED)
    body = {"apiVersion": "policy/v1", "kind": "Eviction", "metadata": metadata}
    plane.cluster.request("POST", plane.cluster.path_of(pods[0], subresource="eviction"), body=body)
    again = run.pods(besides=pods)
    assert run.failed() == 0
    run.end(again, FINISHED)
    run.ends("Complete")


def test_the_deadline_ends_a_run_and_gives_its_machine_back(plane: ControlPlane) -> None:
    lock = shipped("dev-32k")
    run = Run(plane, lock)
    (workload,) = (one for one in lock.workloads if one.task == "finetune")
    assert run.job["spec"]["activeDeadlineSeconds"] == 2 * workload.hours_per_month * 3600
    run.pods()
    run.change(activeDeadlineSeconds=3)
    assert run.ends("Failed")["reason"] == "DeadlineExceeded"


def test_a_run_that_was_put_to_rest_has_its_whole_time_again_and_spends_nothing(plane: ControlPlane) -> None:
    run = Run(plane, shipped("dev-32k"))
    run.pods()
    first = run.stored()["status"]["startTime"]
    run.change(suspend=True)
    plane.wait_for(lambda: is_true(run.stored(), "Suspended"), 30, "the Job to rest")
    plane.wait_for(lambda: plane.pods(NAMESPACE) == [], 30, "its pod to go")
    time.sleep(1.1)  # times are in whole seconds
    run.change(suspend=False)
    run.pods()
    assert run.stored()["status"]["startTime"] > first
    assert run.failed() == 0


# --- several machines, several runs -----------------------------------------------------------------------------------


def two_machines(wanted: dict[str, Any]) -> None:
    training_alone(wanted).update(machines=2, settings={"parallelism": "ddp"})


def test_the_machines_of_a_run_have_numbers_and_names_by_which_they_find_the_first(plane: ControlPlane) -> None:
    lock = planned("dev-2k", two_machines)
    run = Run(plane, lock)
    pods = sorted(run.pods(2), key=lambda pod: pod["spec"]["hostname"])
    assert [pod["metadata"]["annotations"]["batch.kubernetes.io/job-completion-index"] for pod in pods] == ["0", "1"]
    assert len({pod["spec"]["nodeName"] for pod in pods}) == 2
    env = {one["name"]: one for one in pods[1]["spec"]["containers"][0]["env"]}
    assert env["MASTER_ADDR"]["value"] == f"{pods[0]['spec']['hostname']}.{pods[0]['spec']['subdomain']}"
    # the index arrives as the variable that the program reads
    assert "job-completion-index" in env["JOB_COMPLETION_INDEX"]["valueFrom"]["fieldRef"]["fieldPath"]
    # and the name leads to the first pod: the endpoints of the Service have it under its host name
    service = pods[0]["spec"]["subdomain"]

    def known() -> dict[str, str]:
        slices = plane.cluster.list(
            "discovery.k8s.io/v1", "EndpointSlice", NAMESPACE, labelSelector=f"kubernetes.io/service-name={service}"
        )
        found = {end.get("hostname"): end["addresses"][0] for one in slices for end in one.get("endpoints") or ()}
        return found if len(found) == 2 else {}

    addresses = plane.wait_for(known, 30, "the Service's endpoints")
    assert addresses == {pod["spec"]["hostname"]: pod["status"]["podIP"] for pod in pods}


def test_a_stop_of_all_machines_starts_all_of_them_again_and_spends_nothing(plane: ControlPlane) -> None:
    run = Run(plane, planned("dev-2k", two_machines))
    pods = run.pods(2)
    run.end(pods, INTERRUPTED)
    again = run.pods(2, besides=pods)
    assert {pod["spec"]["hostname"] for pod in again} == {pod["spec"]["hostname"] for pod in pods}
    assert run.failed() == 0
    run.end(again, FINISHED)
    run.ends("Complete")


def test_a_refusal_of_one_machine_ends_the_whole_run(plane: ControlPlane) -> None:
    run = Run(plane, planned("dev-2k", two_machines))
    pods = run.pods(2)
    run.end(pods[:1], REFUSED)
    assert run.ends("Failed")["reason"] == "PodFailurePolicy"


def test_runs_are_started_one_by_one_and_one_that_fails_leaves_the_others_alone(plane: ControlPlane) -> None:
    lock = planned("dev-2k", lambda wanted: training_alone(wanted).update(replicas=2, runs={"a": {}, "b": {}}))
    first = Run(plane, lock, "finetune-a")
    (pod,) = first.pods()
    second = run_of([plane.cluster.get("batch/v1", "Job", one["metadata"]["name"], NAMESPACE) or {} for one in
                     manifests(lock, VALUES) if one["kind"] == "Job"], "finetune-b")  # fmt: skip
    assert second["spec"]["suspend"] is True
    plane.cluster.merge(second, {"spec": {"suspend": False}}, manager="kubectl")
    pods = first.pods(2)
    first.end([one for one in pods if one["metadata"]["uid"] == pod["metadata"]["uid"]], REFUSED)
    plane.wait_for(lambda: is_true(first.stored(), "Failed"), 60, "the first run's failure")
    (left,) = first.pods(1, besides=[pod])
    assert left["metadata"]["labels"]["tonnage/run"] == "finetune-b"


def test_a_run_in_progress_is_left_alone_when_the_same_plan_is_applied_again(plane: ControlPlane) -> None:
    lock = shipped("dev-32k")
    run = Run(plane, lock)
    pods = run.pods()
    for one in manifests(lock, VALUES):
        if one["kind"] == "Job":  # of suspend Pulumi is told to look away
            one = one | {"spec": {key: value for key, value in one["spec"].items() if key != "suspend"}}
        plane.cluster.apply(one, manager=MANAGER, force=True)
    assert run.stored()["spec"]["suspend"] is False
    assert [pod["metadata"]["uid"] for pod in workload_pods(plane)] == [pods[0]["metadata"]["uid"]]
