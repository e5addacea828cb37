"""The whole program: its parts hold together, its money is the plan's, its refusals are one sentence each."""

from __future__ import annotations

import json
from decimal import Decimal
from typing import Any

import pulumi
import pytest
from locks import STACKS, planned, served, shipped
from program import CANARY, ISSUER, program, run, run_config
from recording import Row, named, one

from infra.settings import daily_cap_gb
from planner.errors import PlannerError
from planner.plan.lock import parse_lock

TAGGABLE = (  # what has no tags of its own in Azure
    ":RoleAssignment",
    ":FederatedIdentityCredential",
    ":Subnet",
    ":PrivateDnsZoneGroup",
    ":BlobServiceProperties",
    ":BlobContainer",
    ":ManagementPolicy",
    ":MaintenanceConfiguration",
    ":DataCollectionRuleAssociation",
    ":DiagnosticSetting",
    ":Budget",
    ":TaskRun",
)


def kubernetes(rows: tuple[Row, ...], kind: str) -> list[dict[str, Any]]:
    return [row.inputs for row in rows if row.type.startswith("kubernetes:") and row.type.endswith(f":{kind}")]


@pytest.mark.parametrize("stack", STACKS)
def test_issuer_subject_and_service_account_are_one_chain_to_an_identity_with_rights(stack: str) -> None:
    rows = program(stack)
    accounts = {m["metadata"]["name"]: m for m in kubernetes(rows, "ServiceAccount")}
    credentials = named(list(rows), ":FederatedIdentityCredential")
    assert set(credentials) == set(accounts)
    assigned = {row.inputs["principalId"] for row in named(list(rows), ":RoleAssignment").values()}
    for name, credential in credentials.items():
        space = accounts[name]["metadata"]["namespace"]
        assert credential.inputs["issuer"] == ISSUER
        assert credential.inputs["subject"] == f"system:serviceaccount:{space}:{name}"
        client = accounts[name]["metadata"]["annotations"]["azure.workload.identity/client-id"]
        identity = client.removesuffix("-client")
        assert credential.inputs["resourceName"] == identity  # the recorder names things by their logical names
        assert f"{identity}-principal" in assigned
    used = {
        p["spec"]["template"]["spec"]["serviceAccountName"] for k in ("Deployment", "Job") for p in kubernetes(rows, k)
    }
    assert used == set(accounts)


@pytest.mark.parametrize("stack", STACKS)
def test_every_identity_of_a_workload_may_read_secrets_and_the_blobs_that_it_needs(stack: str) -> None:
    rows = list(program(stack))
    roles = named(rows, ":RoleAssignment")
    kinds = {workload.task for workload in shipped(stack)[1].workloads}
    for kind in kinds:
        wanted = {"serve": {"models", "adapters"}, "finetune": {"models", "adapters", "datasets", "checkpoints"}}[kind]
        assert {f"{kind}-{container}" for container in wanted} | {f"{kind}-reads-secrets"} <= set(roles)
    assert all(row.inputs["principalType"] in ("ServicePrincipal", "User") for row in roles.values())


@pytest.mark.parametrize("stack", STACKS)
def test_the_gpu_quota_the_pools_and_the_requests_are_one_number(stack: str) -> None:
    rows, lock = program(stack), shipped(stack)[1]
    (quota,) = kubernetes(rows, "ResourceQuota")
    pools = named(list(rows), ":AgentPool")
    gpus = sum(int(row.inputs["maxCount"]) * lock.pool(name).gpus_per_node for name, row in pools.items())
    assert quota["spec"]["hard"]["requests.nvidia.com/gpu"] == str(gpus)


@pytest.mark.parametrize("stack", STACKS)
def test_taints_of_the_pools_are_tolerated_by_what_runs_on_them(stack: str) -> None:
    rows = program(stack)
    pools = named(list(rows), ":AgentPool")
    for workload in [*kubernetes(rows, "Deployment"), *kubernetes(rows, "Job")]:
        pod = workload["spec"]["template"]["spec"]
        tolerated = {f"{t['key']}={t['value']}:{t['effect']}" for t in pod["tolerations"]}
        terms = pod["affinity"]["nodeAffinity"]["requiredDuringSchedulingIgnoredDuringExecution"]["nodeSelectorTerms"]
        for name in terms[0]["matchExpressions"][0]["values"]:
            assert set(pools[name].inputs["nodeTaints"]) <= tolerated
            if pools[name].inputs["scaleSetPriority"] == "Spot":
                assert "kubernetes.azure.com/scalesetpriority=spot:NoSchedule" in tolerated


@pytest.mark.parametrize("stack", STACKS)
def test_the_azure_budget_is_what_finance_approved(stack: str) -> None:
    intent, _ = shipped(stack)
    budget = one(list(program(stack)), ":consumption:Budget").inputs
    assert intent.approved_usd_per_month is not None
    assert budget["amount"] == float(intent.approved_usd_per_month)
    thresholds = sorted((n["threshold"], n.get("thresholdType", "Actual")) for n in budget["notifications"].values())
    assert thresholds == [(50, "Actual"), (80, "Actual"), (100, "Actual"), (100, "Forecasted")]


@pytest.mark.parametrize("stack", STACKS)
def test_every_resource_that_can_have_tags_has_the_stacks(stack: str) -> None:
    for row in program(stack):
        if row.type.startswith("azure-native:") and not row.type.endswith(TAGGABLE):
            assert row.inputs["tags"]["stack"] == stack, f"{row.type} {row.name}"


@pytest.mark.parametrize("stack", STACKS)
def test_no_secret_is_an_input_in_plain_text(stack: str) -> None:
    for row in program(stack):
        plain = json.dumps(row.inputs, default=str)
        if CANARY in plain:
            assert row.type == "azure-native:keyvault:Secret"
            assert row.inputs["properties"] == {"secret": {**row.inputs["properties"]["secret"]}}, "the value is marked"


@pytest.mark.parametrize("stack", STACKS)
def test_only_what_cannot_be_made_again_is_protected_and_only_in_production(stack: str) -> None:
    protected = {row.type.rpartition(":")[2] for row in program(stack) if row.options["protect"]}
    prod = shipped(stack)[1].around.posture == "prod"
    assert ({"StorageAccount", "Vault"} <= protected) if prod else not protected


@pytest.mark.parametrize("stack", STACKS)
def test_every_object_has_the_explicit_provider_and_waits_for_rights_and_pools(stack: str) -> None:
    rows = program(stack)
    provider = one(list(rows), "pulumi:providers:kubernetes")
    assert set(provider.inputs) >= {"kubeconfig", "clusterIdentifier"}
    pools = {row.urn for row in rows if row.type.endswith(":AgentPool")}
    for row in rows:
        if row.type.startswith("kubernetes:"):
            assert row.options["provider"].startswith(provider.urn)
        if row.type.endswith((":Namespace",)):
            assert pools <= set(row.dependencies)


def test_objects_come_in_the_order_in_which_the_cluster_needs_them() -> None:
    rows = [row for row in program("dev-32k") if row.type.startswith("kubernetes:")]
    by_name = {row.name: row for row in rows}
    assert by_name["namespace-tonnage"].urn in by_name["serviceaccount-serve"].dependencies
    assert by_name["namespace-tonnage"].urn in by_name["serviceaccount-finetune"].dependencies
    config = next(name for name in by_name if name.startswith("configmap-finetune-config-"))
    assert {by_name["serviceaccount-finetune"].urn, by_name[config].urn} <= set(by_name["job-finetune"].dependencies)


def test_an_endpoint_for_each_service_in_production_and_none_in_development() -> None:
    assert len(named(list(program("prod-standard")), ":PrivateEndpoint")) == 3
    assert not named(list(program("dev-32k")), ":PrivateEndpoint")


def test_logs_may_be_three_times_what_the_bill_counts_in_a_day() -> None:
    _, lock = shipped("dev-32k")
    # 10.25 GB in 730 hours are 0.337 a day, three times that 1.01: rounded up
    assert lock.around.cluster.log_gb_per_month == Decimal("10.25")
    assert daily_cap_gb(lock) == 2


# --- refusals


def refused(config: dict[str, Any], stack: str = "dev-32k", secret: tuple[str, ...] = ("apiKey", "hfToken")) -> str:
    """The one sentence with which the program refuses; nothing was registered before it."""
    with pytest.raises(pulumi.RunError) as caught:
        run_config(config, stack, secret)
    cause = caught.value.__cause__
    assert isinstance(cause, PlannerError)
    sentence = str(cause)
    assert "\n" not in sentence
    return sentence


def config_of(stack: str = "dev-32k") -> dict[str, Any]:
    intent, lock = shipped(stack)
    wanted = json.loads(intent.model_dump_json(exclude_defaults=True))
    return {"tonnage:intent": wanted, "tonnage:plan": lock.plain(), "tonnage:apiKey": CANARY}


def test_a_stack_without_an_intent_or_a_plan_is_refused() -> None:
    assert refused(config_of() | {"tonnage:intent": None}).startswith("the stack has no tonnage:intent: make one with")
    sentence = refused(config_of() | {"tonnage:plan": None})
    assert sentence == "the stack has no tonnage:plan: run `planner plan --stack STACK` and commit the result"


def test_an_edited_intent_without_a_new_plan_is_refused() -> None:
    config = config_of()
    config["tonnage:intent"]["approved_usd_per_month"] = "100000"
    assert "answers another intent than the one beside it" in refused(config)


def test_an_unknown_key_of_the_intent_is_named() -> None:
    config = config_of()
    config["tonnage:intent"]["postur"] = "prod"
    assert refused(config) == "tonnage:intent: postur is no field that is known there: check its spelling"


def test_a_plan_that_was_edited_by_hand_is_refused() -> None:
    config = config_of()
    config["tonnage:plan"]["pools"][0]["max_nodes"] = 8
    assert "was edited by hand" in refused(config)


def test_a_plan_of_a_newer_version_is_refused() -> None:
    config = config_of()
    config["tonnage:plan"]["version"] = 2
    assert "was written by a newer Tonnage (format 2, this one reads 1): upgrade tonnage" in refused(config)


def test_a_missing_secret_is_named_with_the_command_that_sets_it() -> None:
    sentence = refused(config_of() | {"tonnage:apiKey": None})
    assert sentence.startswith("the secret tonnage:apiKey is not set: run `pulumi config set --secret tonnage:apiKey")
    assert "--stack dev-32k" in sentence


def test_a_secret_in_plain_text_is_refused_without_printing_it() -> None:
    sentence = refused(config_of(), secret=())
    assert "tonnage:apiKey is in the stack file in plain text" in sentence
    assert CANARY not in sentence


def test_a_stack_name_that_azure_would_not_take_is_refused() -> None:
    assert "cannot be part of Azure's names" in refused(config_of(), stack="Dev_32k")
    assert "at most 28 lower-case" in refused(config_of(), stack="a-name-that-is-much-too-long-for-azure")


def test_more_endpoints_than_services_are_refused() -> None:
    intent, lock = planned(served(cluster={"private_endpoints": 5}))
    with pytest.raises(pulumi.RunError, match="asks for 5 private endpoints and there are 3 services"):
        run(intent, lock)


def test_fine_tuning_without_a_registry_is_refused() -> None:
    wanted = served(cluster={"registry": "none"})
    wanted["workloads"] = [{"kind": "finetune", "context": 2048}]
    intent, lock = planned(wanted)
    with pytest.raises(pulumi.RunError, match="fine-tuning needs a registry for its image"):
        run(intent, lock)


def test_serving_needs_no_registry() -> None:
    rows = run(*planned(served(cluster={"registry": "none"})))
    assert not named(rows, ":Registry")


def test_an_unknown_login_is_refused() -> None:
    assert "tonnage:kubelogin is 'devicecode': set it to one of azurecli" in refused(
        config_of() | {"tonnage:kubelogin": "devicecode"}
    )


def test_the_lock_survives_pulumis_json() -> None:
    _, lock = shipped("prod-standard")
    assert parse_lock(json.loads(json.dumps(lock.plain())), "plan") == lock
