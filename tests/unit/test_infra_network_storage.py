"""Network, storage, vault and registry as the program registers them, on plain mappings recorded without Azure.

The ids in tests' names and comments are checkov's (CKV...), for the rows of Azure's public security rules.
"""

from __future__ import annotations

import base64
import inspect
import re
import subprocess
import tomllib
from collections.abc import Iterable, Sequence
from importlib import import_module
from ipaddress import ip_network
from typing import Any
from uuid import UUID

import pulumi
import pytest
import yaml
from locks import ROOT, shipped
from packaging.requirements import Requirement
from recording import SECRET, Row, fake_id, named, one, record

from infra.cluster import POD_CIDR, SERVICE_CIDR
from infra.names import names
from infra.network import ENDPOINTS_CIDR, NODES_CIDR, VNET_CIDR, Network, NetworkArgs
from infra.registry import DOCKERFILE, Registry, RegistryArgs, image_tag
from infra.storage import Grant, Storage, StorageArgs
from infra.vault import Vault, VaultArgs
from planner.errors import PlannerError
from planner.plan.lock import Lock

GROUP, SUBSCRIPTION, TENANT = "group", "sub-1", "tenant-1"
TAGS = {"project": "tonnage", "stack": "dev-32k"}
CANARY = "canary-3f1c"
NODES, ENDPOINTS = fake_id("nodes"), fake_id("endpoints")
BASE = "docker.io/library/python:3.12.11-slim-bookworm"
ANSWERS = {"train-image": {"identity": {"type": "SystemAssigned", "principalId": "task-principal"}}}


def plan(
    posture: str = "dev", registry: str | None = None, training: bool = True, storage: dict[str, Any] | None = None
) -> Lock:
    """The lock of dev-32k (a training and a server) with another posture around it: that of prod-standard."""
    lock = shipped("dev-32k")[1]
    around = (lock if posture == "dev" else shipped("prod-standard")[1]).around
    cluster = around.cluster.model_copy(update={"registry": registry} if registry else {})
    around = around.model_copy(update={"cluster": cluster, "storage": around.storage.model_copy(update=storage or {})})
    workloads = [workload for workload in lock.workloads if training or workload.task != "finetune"]
    return lock.model_copy(update={"around": around, "workloads": tuple(workloads)})


PARTS = ("storage", "vault", "registry")


def build(
    lock: Lock, parts: Sequence[str] = PARTS, endpoints: int | None = None, subscription: str = SUBSCRIPTION
) -> list[Row]:
    """The network of a plan and those parts, wired as the program wires them."""
    protect = lock.around.posture == "prod"
    count = (lock.around.cluster.private_endpoints or 0) if endpoints is None else endpoints

    def program() -> None:
        common: dict[str, Any] = {
            "location": lock.region,
            "resource_group_name": GROUP,
            "tags": TAGS,
            "names": names("dev-32k"),
        }
        network = Network("network", NetworkArgs(private_endpoints=count, **common))
        common |= {"endpoints": network.endpoints, "subscription_id": subscription}
        held: dict[str, Any] = {"around": lock.around, "nodes_subnet_id": network.nodes_subnet_id, "protect": protect}
        if "storage" in parts:
            grants = [
                Grant("serve-reads-models", "serve-principal", "models", "Storage Blob Data Reader"),
                Grant("finetune-writes", "finetune-principal", None, "Storage Blob Data Contributor"),
            ]
            Storage("storage", StorageArgs(grants=grants, **held, **common))
        if "vault" in parts:
            secrets = {"hf-token": pulumi.Output.secret(CANARY), "api-key": f"{CANARY}-key"}
            readers = {"serve-reads-secrets": "serve-principal"}
            Vault("vault", VaultArgs(tenant_id=TENANT, secrets=secrets, readers=readers, **held, **common))
        if "registry" in parts:
            Registry("registry", RegistryArgs(lock=lock, kubelet_principal_id="kubelet-principal", **common))

    return record(program, outputs=ANSWERS)


@pytest.fixture(scope="module")
def dev() -> list[Row]:
    return build(plan("dev"))


@pytest.fixture(scope="module")
def prod() -> list[Row]:
    return build(plan("prod"))


@pytest.fixture(params=["dev", "prod"])
def either(request: pytest.FixtureRequest) -> list[Row]:
    rows: list[Row] = request.getfixturevalue(request.param)
    return rows


# ---- network


def inbound(rows: list[Row], group: str) -> list[dict[str, Any]]:
    rules = one(rows, ":NetworkSecurityGroup", group).inputs["securityRules"]
    return sorted((rule for rule in rules if rule["direction"] == "Inbound"), key=lambda rule: rule["priority"])


def verdict(rules: list[dict[str, Any]], source: str, port: str) -> str:
    """What the first rule that fits says of TCP from a source (a tag or a range), Azure's own Deny after them all."""
    for rule in rules:
        sources = rule.get("sourceAddressPrefixes") or [rule["sourceAddressPrefix"]]
        ports = rule.get("destinationPortRanges") or [rule["destinationPortRange"]]
        if rule["protocol"] in ("*", "Tcp") and {source, "*"} & set(sources) and {port, "*"} & set(ports):
            return str(rule["access"])
    return "Deny"


@pytest.mark.parametrize("port", ["22", "53", "80", "443", "3389", "8000"])
def test_nothing_gets_in_from_the_internet(prod: list[Row], port: str) -> None:
    """CKV_AZURE_9, 10, 77, 160."""
    for group in ("nodes", "endpoints"):
        rules = inbound(prod, group)
        assert verdict(rules, "Internet", port) == "Deny"
        assert any(rule["access"] == "Deny" and rule["sourceAddressPrefix"] == "Internet" for rule in rules[-2:])


def test_nodes_and_pods_talk_to_each_other_and_azure_may_probe_them(dev: list[Row]) -> None:
    rules = inbound(dev, "nodes")
    for source in (NODES_CIDR, POD_CIDR, "VirtualNetwork", "AzureLoadBalancer"):
        assert verdict(rules, source, "10250") == "Allow"
    among = next(rule for rule in rules if "sourceAddressPrefixes" in rule)
    assert among["destinationAddressPrefixes"] == among["sourceAddressPrefixes"] == [NODES_CIDR, POD_CIDR]


def test_private_endpoints_answer_https_from_inside_and_nothing_else(prod: list[Row]) -> None:
    rules = inbound(prod, "endpoints")
    assert verdict(rules, "VirtualNetwork", "443") == "Allow"
    assert verdict(rules, "VirtualNetwork", "80") == "Deny"
    assert verdict(rules, "AzureLoadBalancer", "443") == "Deny"
    # or the rules would not be asked
    assert one(prod, ":Subnet", "endpoints").inputs["privateEndpointNetworkPolicies"] == "NetworkSecurityGroupEnabled"


def test_a_node_cannot_open_a_remote_shell_on_another(dev: list[Row]) -> None:
    rules = one(dev, ":NetworkSecurityGroup", "nodes").inputs["securityRules"]
    (out,) = [rule for rule in rules if rule["direction"] == "Outbound"]
    assert (out["access"], out["destinationPortRanges"]) == ("Deny", ["22", "3389"])


def test_priorities_are_azures_and_unique_by_direction(prod: list[Row]) -> None:
    for group in named(prod, ":NetworkSecurityGroup").values():
        taken = [(rule["direction"], rule["priority"]) for rule in group.inputs["securityRules"]]
        assert len(set(taken)) == len(taken)
        assert all(100 <= priority <= 4096 for _, priority in taken)  # Azure's bounds


def test_every_subnet_has_a_security_group_of_its_own_and_no_default_way_out(either: list[Row]) -> None:
    for subnet in named(either, ":Subnet").values():
        assert subnet.inputs["networkSecurityGroup"]["id"] == fake_id(subnet.name)
        assert subnet.inputs["defaultOutboundAccess"] is False


def test_ranges_lie_beside_each_other() -> None:
    ranges = [ip_network(text) for text in (VNET_CIDR, POD_CIDR, SERVICE_CIDR)]
    assert not any(a.overlaps(b) for a in ranges for b in ranges if a is not b)
    nodes, endpoints, network = ip_network(NODES_CIDR), ip_network(ENDPOINTS_CIDR), ranges[0]
    assert not nodes.overlaps(endpoints)
    assert {nodes.supernet(new_prefix=12), endpoints.supernet(new_prefix=12)} == {network}


def test_subnets_are_written_one_after_another(prod: list[Row]) -> None:
    subnets = named(prod, ":Subnet")
    assert subnets["nodes"].urn in subnets["endpoints"].dependencies
    for link in named(prod, ":VirtualNetworkLink").values():
        assert subnets["endpoints"].urn in link.dependencies


ZONES = {
    "blob": "privatelink.blob.core.windows.net",
    "vault": "privatelink.vaultcore.azure.net",
    "registry": "privatelink.azurecr.io",
}


@pytest.mark.parametrize(
    ("count", "services"),
    [(0, ["Microsoft.Storage", "Microsoft.KeyVault"]), (1, ["Microsoft.KeyVault"]), (2, []), (3, [])],
)
def test_what_has_no_private_endpoint_is_reached_by_a_service_endpoint(count: int, services: list[str]) -> None:
    rows = build(plan("prod"), endpoints=count)
    kinds = list(ZONES)[:count]
    nodes = one(rows, ":Subnet", "nodes").inputs
    assert [entry["service"] for entry in nodes["serviceEndpoints"]] == services
    zones = named(rows, ":PrivateZone")
    assert {kind: zone.inputs["privateZoneName"] for kind, zone in zones.items()} == {k: ZONES[k] for k in kinds}
    assert set(named(rows, ":VirtualNetworkLink")) == set(named(rows, ":PrivateEndpoint")) == set(kinds)
    assert ("endpoints" in named(rows, ":Subnet")) is (count > 0)
    for kind in kinds:
        assert one(rows, ":VirtualNetworkLink", kind).inputs["registrationEnabled"] is False
        assert one(rows, ":VirtualNetworkLink", kind).inputs["virtualNetwork"] == {"id": fake_id("network")}


@pytest.mark.parametrize("count", [-1, 4])
def test_more_private_endpoints_than_services_are_refused(count: int) -> None:
    with pytest.raises(PlannerError, match="set it to 0"):
        build(plan("prod"), (), endpoints=count)


@pytest.mark.parametrize("kind", ["blob", "vault", "registry"])
def test_an_endpoint_is_in_its_subnet_and_its_name_in_private_dns(prod: list[Row], kind: str) -> None:
    """CKV2_AZURE_33 (blob), CKV2_AZURE_32 (vault), policy e8eef0a8 (registry)."""
    endpoint = one(prod, ":PrivateEndpoint", kind).inputs
    assert endpoint["subnet"]["id"] == ENDPOINTS
    (connection,) = endpoint["privateLinkServiceConnections"]
    assert connection == {"name": kind, "groupIds": [kind], "privateLinkServiceId": fake_id("tndev32k")}
    group = one(prod, ":PrivateDnsZoneGroup", kind)
    assert group.inputs["privateDnsZoneConfigs"] == [{"name": kind, "privateDnsZoneId": fake_id(kind)}]
    assert one(prod, ":VirtualNetworkLink", kind).urn in group.dependencies


# ---- storage


def account(rows: list[Row]) -> Row:
    return one(rows, ":StorageAccount")


def test_an_account_answers_the_security_rules_for_storage(either: list[Row]) -> None:
    given = account(either).inputs
    assert given["enableHttpsTrafficOnly"] is True  # CKV_AZURE_3
    assert given["minimumTlsVersion"] == "TLS1_2"  # CKV_AZURE_44
    assert given["allowBlobPublicAccess"] is False  # CKV_AZURE_190, CKV2_AZURE_47
    assert given["allowSharedKeyAccess"] is False  # CKV2_AZURE_40
    assert given["allowCrossTenantReplication"] is False  # policy 92a89a79
    assert given["isLocalUserEnabled"] is False  # CKV_AZURE_244
    assert given["defaultToOAuthAuthentication"] is True
    assert given["encryption"]["requireInfrastructureEncryption"] is True  # policy 4733ea7b
    assert given["sasPolicy"] == {"expirationAction": "Block", "sasExpirationPeriod": "1.00:00:00"}  # CKV2_AZURE_41
    firewall = given["networkRuleSet"]
    assert (firewall["defaultAction"], firewall["bypass"]) == ("Deny", "AzureServices")  # CKV_AZURE_35, 36
    assert (given["kind"], given["accessTier"]) == ("StorageV2", "Hot")


def test_an_account_gets_its_name_from_pulumi(either: list[Row]) -> None:
    assert account(either).name == "tndev32k"
    assert "accountName" not in account(either).inputs


def test_in_development_only_the_nodes_reach_the_account(dev: list[Row]) -> None:
    given = account(dev).inputs
    assert given["sku"] == {"name": "Standard_LRS"}
    assert given["publicNetworkAccess"] == "Enabled"
    assert given["networkRuleSet"]["virtualNetworkRules"] == [{"virtualNetworkResourceId": NODES, "action": "Allow"}]
    assert not named(dev, ":PrivateEndpoint")


def test_in_production_the_account_is_reached_inside_the_network_alone(prod: list[Row]) -> None:
    given = account(prod).inputs
    assert given["sku"] == {"name": "Standard_ZRS"}  # CKV_AZURE_206
    assert given["publicNetworkAccess"] == "Disabled"  # CKV_AZURE_59
    assert given["networkRuleSet"]["virtualNetworkRules"] == []


def test_what_is_stored_outlives_a_production_stack_and_no_other(dev: list[Row], prod: list[Row]) -> None:
    for rows, kept in ((dev, False), (prod, True)):
        holders = [account(rows), *named(rows, ":BlobContainer").values()]
        assert len(holders) == 5
        assert {(row.options["protect"], row.options["retainOnDelete"]) for row in holders} == {(kept, kept)}
        vault = [row for row in rows if row.type.endswith((":keyvault:Vault", ":keyvault:Secret"))]
        assert {row.options["protect"] for row in vault} == {kept}
        others = [row for row in rows if row not in (*holders, *vault)]
        assert not any(row.options["protect"] for row in others)


def test_four_containers_are_closed_to_the_public(either: list[Row]) -> None:
    """CKV_AZURE_34."""
    containers = named(either, ":BlobContainer")
    assert set(containers) == {"models", "datasets", "checkpoints", "adapters"}
    assert {row.inputs["publicAccess"] for row in containers.values()} == {"None"}
    assert all(row.inputs["containerName"] == name for name, row in containers.items())


@pytest.mark.parametrize(
    ("days", "policy"),
    [(7, {"enabled": True, "days": 7}), (14, {"enabled": True, "days": 14}), (0, {"enabled": False})],
)
def test_deleted_blobs_stay_for_as_long_as_the_bill_counts_them(days: int, policy: dict[str, Any]) -> None:
    """CKV2_AZURE_38."""
    given = one(build(plan(storage={"soft_delete_days": days}), ["storage"]), ":BlobServiceProperties").inputs
    assert given["deleteRetentionPolicy"] == given["containerDeleteRetentionPolicy"] == policy
    assert given["isVersioningEnabled"] is False
    assert given["blobServicesName"] == "default"


def lifecycle(rows: list[Row]) -> dict[str, tuple[list[str], dict[str, Any]]]:
    rules = one(rows, ":ManagementPolicy").inputs["policy"]["rules"]
    assert {rule["type"] for rule in rules} == {"Lifecycle"}
    assert all(re.fullmatch("[A-Za-z0-9]+", rule["name"]) for rule in rules)  # what Azure takes as a rule's name
    return {
        rule["name"]: (rule["definition"]["filters"]["prefixMatch"], rule["definition"]["actions"]["baseBlob"])
        for rule in rules
    }


STALE = {"checkpointsEnd": (["checkpoints/"], {"delete": {"daysAfterModificationGreaterThan": 30}})}


def test_what_is_hot_stays_where_it_is_and_stale_checkpoints_end(dev: list[Row]) -> None:
    assert lifecycle(dev) == STALE


def test_what_the_plan_keeps_in_another_tier_moves_there() -> None:
    tiers = {"weights_tier": "cool", "datasets_tier": "archive", "adapters_tier": "cold", "checkpoints_tier": "cool"}
    at_once = {"daysAfterModificationGreaterThan": 0}
    assert lifecycle(build(plan(storage=tiers), ["storage"])) == STALE | {
        "modelsToCool": (["models/"], {"tierToCool": at_once}),
        "datasetsToArchive": (["datasets/"], {"tierToArchive": at_once}),
        "adaptersToCold": (["adapters/"], {"tierToCold": at_once}),
        "checkpointsToCool": (["checkpoints/"], {"tierToCool": at_once}),
    }


def test_a_grant_is_a_role_on_its_container_or_on_the_account(dev: list[Row]) -> None:
    reads, writes = (one(dev, ":RoleAssignment", name) for name in ("serve-reads-models", "finetune-writes"))
    assert reads.inputs["scope"] == fake_id("models")
    assert writes.inputs["scope"] == fake_id("tndev32k")
    definitions = "/subscriptions/sub-1/providers/Microsoft.Authorization/roleDefinitions/"
    # learn.microsoft.com/azure/role-based-access-control/built-in-roles/storage
    assert reads.inputs["roleDefinitionId"] == definitions + "2a2b9908-6ea1-4ae2-8e65-a410df84e7d1"
    assert writes.inputs["roleDefinitionId"] == definitions + "ba92f5b4-2d11-453d-a403-e96b0029c9fe"
    assert (reads.inputs["principalId"], reads.inputs["principalType"]) == ("serve-principal", "ServicePrincipal")


def assignment_names(rows: Iterable[Row]) -> dict[str, str]:
    return {row.name: row.inputs["roleAssignmentName"] for row in rows if row.type.endswith(":RoleAssignment")}


def test_a_role_assignment_has_the_same_name_each_time_and_another_in_another_subscription(dev: list[Row]) -> None:
    ours, again = assignment_names(dev), assignment_names(build(plan("dev"), ["storage"]))
    assert len(set(ours.values())) == len(ours) == 4
    assert len(again) == 2
    assert again.items() <= ours.items()
    assert all(UUID(name).version == 5 for name in ours.values())
    other = assignment_names(build(plan("dev"), ["storage"], subscription="sub-2"))
    assert not set(other.values()) & set(ours.values())


def test_a_role_assignment_goes_before_its_successor_comes(dev: list[Row]) -> None:
    assert all(row.options["deleteBeforeReplace"] for row in named(dev, ":RoleAssignment").values())


# ---- vault


def vault(rows: list[Row]) -> dict[str, Any]:
    properties: dict[str, Any] = one(rows, ":keyvault:Vault").inputs["properties"]
    return properties


def test_a_vault_answers_the_security_rules_for_vaults(either: list[Row]) -> None:
    given = vault(either)
    assert given["enableRbacAuthorization"] is True  # Azure.KeyVault.RBAC
    assert given["enableSoftDelete"] is True  # CKV_AZURE_111
    firewall = given["networkAcls"]
    assert (firewall["defaultAction"], firewall["bypass"]) == ("Deny", "AzureServices")  # CKV_AZURE_109
    assert given["sku"] == {"family": "A", "name": "standard"}
    assert given["tenantId"] == TENANT
    assert "vaultName" not in one(either, ":keyvault:Vault").inputs


def test_a_production_vault_cannot_be_purged_and_a_development_vault_can(dev: list[Row], prod: list[Row]) -> None:
    """CKV_AZURE_42, 110. Unset in development: Azure refuses False once it was True."""
    assert "enablePurgeProtection" not in vault(dev)
    assert vault(prod)["enablePurgeProtection"] is True
    assert (vault(dev)["softDeleteRetentionInDays"], vault(prod)["softDeleteRetentionInDays"]) == (7, 90)


def test_a_vault_is_reached_by_the_nodes_or_inside_the_network_alone(dev: list[Row], prod: list[Row]) -> None:
    assert vault(dev)["publicNetworkAccess"] == "enabled"
    assert vault(dev)["networkAcls"]["virtualNetworkRules"] == [{"id": NODES}]
    assert vault(prod)["publicNetworkAccess"] == "disabled"  # CKV_AZURE_189
    assert vault(prod)["networkAcls"]["virtualNetworkRules"] == []


def test_a_secret_is_one_to_pulumi_and_says_what_it_is(either: list[Row]) -> None:
    secrets = named(either, ":keyvault:Secret")
    assert {name: row.inputs["properties"][SECRET]["value"] for name, row in secrets.items()} == {
        "hf-token": CANARY,
        "api-key": f"{CANARY}-key",
    }
    for name, row in secrets.items():
        assert row.inputs["secretName"] == name
        assert row.inputs["properties"][SECRET]["contentType"] == "text/plain"  # CKV_AZURE_114


def test_no_secret_value_is_anywhere_else(either: list[Row]) -> None:
    for row in either:
        open_inputs = {
            key: value for key, value in row.inputs.items() if not (isinstance(value, dict) and SECRET in value)
        }
        assert CANARY not in repr(open_inputs)


def test_a_secret_is_left_to_the_vault_to_delete(either: list[Row]) -> None:
    """Deleting one goes through the vault's firewall, and whoever runs Pulumi is outside."""
    assert all(row.options["retainOnDelete"] for row in named(either, ":keyvault:Secret").values())


def test_a_reader_of_secrets_may_read_them_and_no_more(either: list[Row]) -> None:
    given = one(either, ":RoleAssignment", "serve-reads-secrets").inputs
    # learn.microsoft.com/azure/role-based-access-control/built-in-roles/security: Key Vault Secrets User
    assert given["roleDefinitionId"].endswith("/4633458b-17de-408a-b874-0445c86b69e6")
    assert (given["principalId"], given["scope"]) == ("serve-principal", fake_id("tndev32k"))


# ---- registry


def registry(rows: list[Row]) -> dict[str, Any]:
    return one(rows, ":containerregistry:Registry").inputs


@pytest.mark.parametrize("tier", ["basic", "standard", "premium"])
@pytest.mark.parametrize("posture", ["dev", "prod"])
def test_no_registry_has_an_admin_or_anonymous_readers(posture: str, tier: str) -> None:
    """CKV_AZURE_137, 138."""
    given = registry(build(plan(posture, tier, training=False), ["registry"], endpoints=0))
    assert (given["adminUserEnabled"], given["anonymousPullEnabled"]) == (False, False)
    assert given["sku"] == {"name": tier.capitalize()}
    assert len({"policies", "dataEndpointEnabled"} & set(given)) == (2 if tier == "premium" else 0)
    assert (given["zoneRedundancy"] == "Enabled") is ((posture, tier) == ("prod", "premium"))


def test_a_production_registry_is_zone_redundant_private_and_forgets_what_has_no_tag(prod: list[Row]) -> None:
    given = registry(prod)
    assert given["publicNetworkAccess"] == "Disabled"  # CKV_AZURE_139
    assert given["networkRuleSet"] == {"defaultAction": "Deny"}
    assert given["zoneRedundancy"] == "Enabled"  # CKV_AZURE_233
    assert given["dataEndpointEnabled"] is True  # CKV_AZURE_237
    assert given["policies"] == {
        "retentionPolicy": {"days": 7, "status": "enabled"},  # CKV_AZURE_167
        "exportPolicy": {"status": "disabled"},
    }


def test_a_registry_without_a_private_endpoint_is_open_to_those_with_a_role(dev: list[Row]) -> None:
    given = registry(dev)
    assert given["publicNetworkAccess"] == "Enabled"
    assert "networkRuleSet" not in given


@pytest.mark.parametrize("tier", ["basic", "standard"])
def test_a_private_endpoint_for_a_registry_that_cannot_have_one_is_refused(tier: str) -> None:
    with pytest.raises(PlannerError, match=r"set cluster\.registry to premium"):
        build(plan("prod", tier), ["registry"])


def test_the_nodes_may_pull(either: list[Row]) -> None:
    given = one(either, ":RoleAssignment", "kubelet-pulls").inputs
    # learn.microsoft.com/azure/role-based-access-control/built-in-roles/containers: AcrPull
    assert given["roleDefinitionId"].endswith("/7f951dda-4ed3-4680-a7ca-43fe172d538d")
    assert given["principalId"] == "kubelet-principal"


def task(rows: list[Row]) -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load(
        base64.b64decode(one(rows, ":containerregistry:Task").inputs["step"]["encodedTaskContent"])
    )
    return found


def test_the_task_writes_the_dockerfile_as_it_is(dev: list[Row], tmp_path: Any) -> None:
    """The step's command, as the registry's agent runs it: by sh, in the directory that the steps share."""
    write = task(dev)["steps"][0]
    subprocess.run(["sh", "-c", write["cmd"]], cwd=tmp_path, check=True)
    assert (tmp_path / "Dockerfile").read_bytes() == DOCKERFILE.read_bytes()


def test_the_task_builds_and_pushes_the_image_that_the_pods_name(dev: list[Row]) -> None:
    found = task(dev)
    _, build_step, push = found["steps"]
    image = f"$Registry/tonnage-train:{image_tag(DOCKERFILE.read_bytes(), BASE)}"
    assert build_step["build"] == f"-t {image} --build-arg BASE={BASE} -f Dockerfile ."
    assert push["push"] == [image]
    # $ begins an alias in a task: there is no other
    assert set(re.findall(r"\$\w*", yaml.safe_dump(found))) == {"$Registry"}
    # sum of the steps' limits: write has the default of 600 seconds
    limit = one(dev, ":containerregistry:Task").inputs["timeout"]
    assert limit >= 600 + build_step["timeout"] + push["timeout"]
    assert limit <= 28800  # the most that Azure takes


def test_the_image_is_built_again_when_what_it_is_made_of_changes(dev: list[Row]) -> None:
    run = one(dev, ":TaskRun")
    assert run.inputs["forceUpdateTag"] == image_tag(DOCKERFILE.read_bytes(), BASE)
    request = run.inputs["runRequest"]
    assert (request["type"], request["taskId"]) == ("TaskRunRequest", fake_id("train-image"))
    assert run.options["timeouts"] == {"create": "190m", "update": "190m"}
    tags = {image_tag(content, base) for content in (b"FROM a", b"FROM b") for base in ("python:1", "python:2")}
    assert len(tags) == 4
    assert all(re.fullmatch("[0-9a-f]{12}", tag) for tag in tags)


def test_nothing_is_built_where_nothing_is_trained() -> None:
    rows = build(plan("prod", training=False), ["registry"])
    assert not [row for row in rows if row.type.endswith((":Task", ":TaskRun", ":Deployment"))]


def test_an_open_registry_gives_its_own_leave_to_the_task(dev: list[Row]) -> None:
    given = one(dev, ":containerregistry:Task").inputs
    assert given["credentials"] == {"sourceRegistry": {"loginMode": "Default"}}
    assert "identity" not in given
    assert "train-image-pushes" not in named(dev, ":RoleAssignment")


def test_a_private_registry_lets_the_tasks_own_identity_in_before_it_runs(prod: list[Row]) -> None:
    given = one(prod, ":containerregistry:Task").inputs
    assert given["identity"] == {"type": "SystemAssigned"}
    assert given["credentials"] == {
        "sourceRegistry": {"loginMode": "None"},
        "customRegistries": {"tndev32k.azurecr.io": {"identity": "[system]"}},
    }
    pushes = one(prod, ":RoleAssignment", "train-image-pushes")
    # learn.microsoft.com/azure/role-based-access-control/built-in-roles/containers: AcrPush
    assert pushes.inputs["roleDefinitionId"].endswith("/8311e382-0749-4cb8-b61a-304f252e45ec")
    assert pushes.inputs["principalId"] == "task-principal"
    waits = set(one(prod, ":TaskRun").dependencies)
    assert {pushes.urn, one(prod, ":Deployment").urn, one(prod, ":PrivateDnsZoneGroup", "registry").urn} <= waits


def test_the_way_in_for_tasks_leaves_the_rest_of_a_private_registry_as_it_is(prod: list[Row]) -> None:
    given = one(prod, ":Deployment").inputs["properties"]
    (body,) = given["template"]["resources"]
    assert given["mode"] == "Incremental"
    assert body["properties"].pop("networkRuleBypassAllowedForTasks") is True
    said = registry(prod)
    assert body["properties"] == {key: said[key] for key in body["properties"]}
    assert {"sku", "tags", "location"} <= set(said)
    assert {key: body[key] for key in ("sku", "tags", "location")} == {
        key: said[key] for key in ("sku", "tags", "location")
    }
    assert set(said) - set(body["properties"]) == {"sku", "tags", "location", "resourceGroupName"}


# ---- the training image


def pins() -> dict[str, str]:
    return dict(re.findall(r"^\s+([a-z0-9-]+)==([0-9.]+)", DOCKERFILE.read_text(encoding="utf-8"), re.MULTILINE))


def test_the_image_has_the_versions_that_the_live_tests_run() -> None:
    live = (ROOT / "tests" / "live" / "requirements.txt").read_text(encoding="utf-8")
    tested = dict(re.findall(r"^([a-z0-9-]+)==([0-9.]+)$", live, re.MULTILINE))
    frameworks = {"torch", "transformers", "peft", "trl", "bitsandbytes", "accelerate"}
    small = {"pydantic", "pyyaml", "jinja2", "rich", "azure-storage-blob", "azure-identity"}
    assert set(pins()) == frameworks | small | {"liger-kernel"}
    assert {name: pins()[name] for name in frameworks | small} == {name: tested[name] for name in frameworks | small}
    assert pins()["liger-kernel"] == "0.8.5"  # runs on GPUs alone; trl 1.16.0 asks for 0.8.2 or newer


def test_the_image_has_what_the_extra_for_training_asks_for() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    for wanted in map(Requirement, project["optional-dependencies"]["train"]):
        assert pins()[wanted.name] in wanted.specifier


def test_the_image_does_not_run_as_root() -> None:
    users = re.findall(r"^USER (\S+)$", DOCKERFILE.read_text(encoding="utf-8"), re.MULTILINE)
    assert [int(user) for user in users] == [10001]


# ---- all of them


def test_everything_that_takes_tags_has_them(either: list[Row]) -> None:
    seen = 0
    for row in either:
        if not row.type.startswith("azure-native:"):
            continue
        _, module, kind = row.type.split(":")
        made_by = getattr(import_module(f"pulumi_azure_native.{module}"), kind)
        if "tags" in inspect.signature(made_by._internal_init).parameters:
            assert row.inputs["tags"] == TAGS, row.urn
            seen += 1
    assert seen >= 8  # network, its group, account, vault, two secrets, registry, task


def test_everything_belongs_to_its_component(either: list[Row]) -> None:
    components = {row.urn for row in either if row.type.startswith("tonnage:")}
    assert len(components) == 4
    assert all(row.parent in components for row in either if row.type.startswith("azure-native:"))
