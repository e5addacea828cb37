"""The six stacks through the real Pulumi engine, on a real Kubernetes control plane, with Azure stood in."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import tools
from control_plane import ControlPlane
from world import CANARY_KEY, NAMESPACE, World, world

from workloads.render import GPU

DEV = ("dev-cpu", "dev-2k", "dev-32k")
PROD = ("prod-budget", "prod-standard", "prod-enterprise")
POOL = "azure-native:containerservice:AgentPool"
PROTECTED = {"storageaccounts", "containers", "vaults", "secrets", "resourcegroups"}  # as the ids of Azure say it


@contextmanager
def one_world(folder: Path, stack: str) -> Iterator[World]:
    try:
        with world(folder, stack) as made:
            yield made
    except tools.Missing as why:
        pytest.skip(str(why))


def kinds(made: World) -> set[str]:
    """The kinds of what is left in Azure."""
    return {resource_id.split("/")[-2] for resource_id in made.standins.resources()}


def more_replicas(sku: str) -> Callable[[dict[str, Any]], None]:
    """Twice the servers on the same size of machine, and the money for it."""

    def change(intent: dict[str, Any]) -> None:
        intent["workloads"][-1]["replicas"] = 2
        intent["skus"] = [sku]
        intent["approved_usd_per_month"] = 9000

    return change


def workload_pods(plane: ControlPlane) -> list[dict[str, Any]]:
    return [pod for pod in plane.pods(NAMESPACE) if not pod["metadata"].get("deletionTimestamp")]


def where_pods_run(made: World) -> None:
    """Every running pod of a workload is in a pool that the plan means for it, and asks for its GPUs there."""
    lock = made.lock
    meant = {w.name: {pool.name for pool in lock.pools if w.name in pool.workloads} for w in lock.workloads}
    for pod in workload_pods(made.plane):
        if pod["status"].get("phase") != "Running":
            continue
        name = pod["metadata"]["labels"]["app.kubernetes.io/instance"]
        assert made.plane.pool_of_pod(pod) in meant[name], pod["metadata"]["name"]
        gpus = next(w.gpus for w in lock.workloads if w.name == name)
        assert pod["spec"]["containers"][0]["resources"]["limits"].get(GPU, "0") == str(gpus)


@pytest.mark.parametrize("stack", [*DEV, *PROD])
def test_a_stack_comes_up_stays_as_it_is_changes_only_what_it_should_and_goes(stack: str, tmp_path: Path) -> None:
    with one_world(tmp_path, stack) as made:
        pulumi = made.project
        first = made.up()
        assert set(first.changed().values()) == {"create"}
        for workload in made.lock.workloads:
            if workload.task == "finetune":
                made.start_run(workload.name)
            elif workload.schedule == "always":
                made.wait_running(workload.name)
        where_pods_run(made)

        same = made.ok(pulumi.preview(stack, "--expect-no-changes"))
        assert same.changed() == {}
        made.ok(pulumi.refresh(stack))
        assert made.ok(pulumi.preview(stack, "--expect-no-changes")).changed() == {}

        # more machines in a pool: one update, and the quota of GPUs that goes with it
        made.edit(more_replicas(made.lock.pools[0].sku))
        grown = made.up().changed()
        pools = {key: op for key, op in grown.items() if key.startswith(f"{POOL}::")}
        assert pools
        assert set(pools.values()) == {"update"}, grown
        quota = grown.get("kubernetes:core/v1:ResourceQuota::resourcequota-gpus")
        assert quota == ("update" if any(pool.gpus_per_node for pool in made.lock.pools) else None)
        assert grown["azure-native:consumption:Budget::month"] == "update"
        untouched = (
            "StorageAccount",
            "BlobContainer",
            "Vault",
            "ManagedCluster",
            "VirtualNetwork",
            "Subnet",
            "Registry",
        )
        assert not [key for key in grown if key.partition("::")[0].rpartition(":")[2] in untouched], grown

        # another size of machine of the same card: the pool is replaced, storage is not touched
        bigger = {"cpu": "Standard_D8s_v5", "t4": "NC8as_T4_v3", "a100": "NC48ads_A100_v4"}
        card = made.lock.pools[0].name.rstrip("0123456789").removesuffix("spot").removesuffix("res").removesuffix("od")
        made.edit(lambda intent: intent.update(skus=[bigger[card]]))
        moved = made.up().changed()
        by_kind = {key.partition("::")[0].rpartition(":")[2] for key in moved}
        assert not by_kind & set(untouched), moved
        assert {op for key, op in moved.items() if key.startswith(f"{POOL}::")} == {"replace"}, moved

        gone = made.ok(pulumi.destroy(stack, *(["--exclude-protected"] if stack in PROD else [])))
        assert gone.rc == 0
        left = kinds(made)
        assert left == set() if stack in DEV else left <= PROTECTED, left
        assert not workload_pods(made.plane)
        assert made.plane.cluster.get("v1", "Namespace", NAMESPACE) is None
        assert made.secrets_in_plain_text() == []


def test_a_server_on_spot_goes_to_its_twin_on_demand_and_back_is_no_fault(tmp_path: Path) -> None:
    with one_world(tmp_path, "prod-standard") as made:
        made.up()
        pod = made.wait_running("serve")
        assert made.plane.pool_of_pod(pod) == "a100spot"
        made.plane.unavailable.add("a100spot")
        made.plane.evict_spot(pod["spec"]["nodeName"])
        moved = made.plane.wait_for(
            lambda: next((p for p in workload_pods(made.plane) if made.plane.pool_of_pod(p) == "a100fb"), None),
            90,
            "the server on the pool on demand",
        )
        assert moved["metadata"]["uid"] != pod["metadata"]["uid"]
        where_pods_run(made)


def test_an_evicted_training_run_is_tried_again_and_its_failures_are_not_spent(tmp_path: Path) -> None:
    with one_world(tmp_path, "dev-32k") as made:
        made.up()
        pod = made.start_run("finetune")
        name = pod["metadata"]["labels"]["batch.kubernetes.io/job-name"]
        made.plane.evict_spot(pod["spec"]["nodeName"])
        made.plane.wait_for(
            lambda: next(
                (p for p in workload_pods(made.plane) if p["metadata"]["uid"] != pod["metadata"]["uid"]), None
            ),
            90,
            "the run's next pod",
        )
        again = made.wait_running("finetune")
        job = made.plane.cluster.get("batch/v1", "Job", name, NAMESPACE)
        assert job is not None
        assert job["status"].get("failed", 0) == 0
        assert job["spec"]["backoffLimit"] == 3
        # the run ends well
        made.plane.finish_pod(again["metadata"]["name"], 0, namespace=NAMESPACE)
        made.plane.wait_for(lambda: _condition(made, name, "Complete"), 60, "the Job's end")
        # and the server that took turns with it can have the machine
        made.scale("serve", 1)
        server = made.wait_running("serve")
        assert made.plane.pool_of_pod(server) == "a100spot"
        assert made.ok(made.project.preview("dev-32k", "--expect-no-changes")).changed() == {}


def test_arguments_that_the_trainer_refuses_end_the_run_at_once(tmp_path: Path) -> None:
    with one_world(tmp_path, "dev-2k") as made:
        made.up()
        pod = made.start_run("finetune")
        made.plane.finish_pod(pod["metadata"]["name"], 2, namespace=NAMESPACE)
        name = pod["metadata"]["labels"]["batch.kubernetes.io/job-name"]
        made.plane.wait_for(lambda: _condition(made, name, "Failed"), 60, "the Job's failure")


def _condition(made: World, job: str, kind: str) -> bool:
    found = made.plane.cluster.get("batch/v1", "Job", job, NAMESPACE) or {}
    conditions = found.get("status", {}).get("conditions") or ()
    return any(entry["type"] == kind and entry["status"] == "True" for entry in conditions)


# --- faults: the error names the resource, and the next `up` completes


@pytest.fixture(scope="module")
def faulty(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    with one_world(tmp_path_factory.mktemp("faulty"), "dev-32k") as made:
        yield made


def starts_over(made: World) -> None:
    made.standins.set_faults()
    made.ok(made.project.destroy(made.stack))
    assert kinds(made) == set()


def completes(made: World) -> None:
    """Without the fault, the next `up` ends well, nothing is left over, and nothing more is to be done."""
    made.standins.set_faults()
    made.up()
    made.start_run("finetune")
    in_state = {r["id"].lower() for r in made.project.state(made.stack) if r["type"].startswith("azure-native:")}
    # the cluster's own pool is made with it, and has no state of its own
    orphans = {r for r in made.standins.resources() if r not in in_state and not r.endswith("/agentpools/system")}
    assert orphans == set()
    assert made.ok(made.project.preview(made.stack, "--expect-no-changes")).changed() == {}
    assert made.secrets_in_plain_text() == []
    starts_over(made)


def errors_of(made: World) -> list[tuple[str, str]]:
    failed = made.fails(made.project.up(made.stack, "--skip-preview"))
    return [(resource, message) for resource, message in failed.diagnostics() if resource]


def test_a_quota_that_does_not_suffice_names_the_pool_and_the_family(faulty: World) -> None:
    faulty.standins.set_faults(
        {"type": "AgentPool", "fault": "quota", "family": "StandardNCADSA100v4Family", "required": 24}
    )
    errors = errors_of(faulty)
    assert any(f"{POOL}::a100spot" == resource and "StandardNCADSA100v4Family" in text for resource, text in errors)
    completes(faulty)


def test_a_conflict_on_a_federated_credential_names_it(faulty: World) -> None:
    faulty.standins.set_faults(
        {"type": "FederatedIdentityCredential", "name": "*serve", "fault": "conflict", "times": 1}
    )
    errors = errors_of(faulty)
    assert any("FederatedIdentityCredential::serve" in resource and "409" in text for resource, text in errors)
    completes(faulty)


def test_throttling_is_waited_out(faulty: World) -> None:
    faulty.standins.set_faults({"type": "RoleAssignment", "fault": "throttled", "times": 4})
    faulty.up()
    completes(faulty)


def test_a_create_that_times_out_half_way_is_taken_up_again(faulty: World) -> None:
    faulty.standins.set_faults({"type": "ManagedCluster", "fault": "timeout", "times": 1})
    errors = errors_of(faulty)
    assert any("ManagedCluster::cluster" in resource for resource, _ in errors)
    completes(faulty)


def test_ctrl_c_in_the_middle_leaves_nothing_behind(faulty: World) -> None:
    from pulumi_cli import wait_until

    faulty.standins.set_faults({"type": "ManagedCluster", "fault": "slow", "seconds": 60})
    arguments = ("up", "--yes", "--skip-preview", "--non-interactive")
    before = len(faulty.standins.journal())
    with faulty.project.started(*arguments, stack=faulty.stack, events=True) as running:

        def creating() -> bool:
            new = faulty.standins.journal()[before:]
            return any(e["operation"] == "create" and e["type"].endswith(":ManagedCluster") for e in new)

        assert wait_until(creating, running)
        running.interrupt()
        ended = running.result()
    faulty.seen.append(ended.output)
    assert ended.rc != 0
    completes(faulty)


# --- what the program refuses, as the CLI says it


def refused(made: World) -> str:
    failed = made.fails(made.project.preview(made.stack))
    sentences = [message for _, message in failed.diagnostics() if message]
    assert sentences, failed.output
    assert "Traceback" not in failed.output
    return sentences[0]


def test_a_plan_that_must_not_be_applied_is_refused_in_one_sentence(tmp_path: Path) -> None:
    with one_world(tmp_path, "dev-2k") as made:
        original = made.file.read_text(encoding="utf-8")

        made.rewrite(lambda intent: intent["workloads"][0].update(context=4096))
        assert "answers another intent than the one beside it" in refused(made)
        made.file.write_text(original, encoding="utf-8")

        made.rewrite(lambda intent: intent.update(postur="prod"))
        assert "postur is no field that is known there" in refused(made)
        made.file.write_text(original, encoding="utf-8")

        made.file.write_text(original.replace("max_nodes: 1", "max_nodes: 9"), encoding="utf-8")
        assert "was edited by hand" in refused(made)
        made.file.write_text(original, encoding="utf-8")

        made.ok(made.project.run("config", "rm", "tonnage:apiKey", stack=made.stack))
        assert "the secret tonnage:apiKey is not set: run `pulumi config set --secret tonnage:apiKey" in refused(made)
        made.ok(made.project.run("config", "set", "--plaintext", "tonnage:apiKey", CANARY_KEY, stack=made.stack))
        sentence = refused(made)
        assert "is in the stack file in plain text" in sentence
        assert CANARY_KEY not in sentence
        assert not made.standins.resources()


# --- policy, by the engine


def test_the_policy_pack_passes_the_stack_and_stops_one_that_is_broken(tmp_path: Path) -> None:
    with one_world(tmp_path, "dev-2k") as made:
        pack = ("--policy-pack", "infra/policy_pack")
        made.ok(made.project.preview("dev-2k", *pack))
        made.up()
        made.ok(made.project.preview("dev-2k", *pack))
        # on a first preview the engine does not say what was left out; once the stack is there it does
        made.rewrite(lambda intent: intent.pop("exceptions"))
        made.plan()
        stopped = made.fails(made.project.preview("dev-2k", *pack))
        assert "api-addresses" in stopped.output


if os.environ.get("TONNAGE_NO_SKIP") == "1":

    def test_ci_has_the_engines() -> None:
        tools.engines()
