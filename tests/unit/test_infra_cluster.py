"""Cluster, pools and identities as the program registers them, on plain mappings recorded from a run without Azure."""

from __future__ import annotations

import base64
from typing import Any

import pulumi
import pytest
import yaml
from locks import STACKS, planned, served, shipped
from recording import Row, fake_id, named, one, record

from infra.cluster import Cluster, ClusterArgs, for_programs
from infra.identity import Federation, FederationArgs, Identities, IdentitiesArgs
from infra.names import limited, names
from infra.pools import GpuPools, GpuPoolsArgs
from infra.tags import tags
from planner.errors import PlannerError
from planner.plan import Intent
from planner.plan.lock import Lock

GROUP, SUBNET, WORKSPACE = "group", "/subnets/nodes", "/workspaces/logs"
ANSWERS: dict[str, dict[str, Any]] = {
    "kubelet": {"principalId": "kubelet-principal", "clientId": "kubelet-client"},
    "cluster": {
        "identity": {"type": "UserAssigned"},  # Azure answers a mapping to what is asked as a list
        "oidcIssuerProfile": {"enabled": True, "issuerURL": "https://issuer/"},
    },
}


DEVICE_CODE = """
apiVersion: v1
kind: Config
clusters: [{name: c, cluster: {server: "https://c:443", certificate-authority-data: Q0E=}}]
contexts: [{name: c, context: {cluster: c, user: u}}]
current-context: c
users:
- name: u
  user:
    exec:
      apiVersion: client.authentication.k8s.io/v1beta1
      command: kubelogin
      args: [get-token, --server-id, server-app, --client-id, app, --tenant-id, t, --login, devicecode]
"""
ENCODED = base64.b64encode(DEVICE_CODE.encode()).decode()
CREDENTIALS = "azure-native:containerservice:listManagedClusterUserCredentials"


def build(intent: Intent, lock: Lock) -> list[Row]:
    """Identities, cluster, pools and federation of a plan."""

    def program() -> None:
        named_by = names("dev-32k")
        tagged = tags("dev-32k", lock.around.posture, intent.tags)
        identities = Identities(
            "identities",
            IdentitiesArgs(
                location=lock.region,
                resource_group_name=GROUP,
                tags=tagged,
                names=named_by,
                subscription_id="0000",
                network_scope=SUBNET,
                workloads=["finetune", "serve"],
            ),
        )
        cluster = Cluster(
            "cluster",
            ClusterArgs(
                location=lock.region,
                resource_group_name=GROUP,
                tags=tagged,
                names=named_by,
                lock=lock,
                access=intent.access,
                nodes_subnet_id=SUBNET,
                control_plane=identities.control_plane,
                kubelet=identities.kubelet,
                workspace_id=WORKSPACE,
                roles=identities.roles,
                subscription_id="0000",
                deployer="deployer",
                deployer_type="User",
                resource_group_id="/groups/group",
                login="azurecli",
            ),
        )
        GpuPools(
            "pools",
            GpuPoolsArgs(
                resource_group_name=GROUP,
                tags=tagged,
                cluster_name=cluster.name,
                nodes_subnet_id=SUBNET,
                pools=lock.pools,
            ),
        )
        Federation(
            "federation",
            FederationArgs(
                resource_group_name=GROUP,
                issuer=cluster.issuer,
                namespace="tonnage",
                accounts=[(workload.name, workload.task) for workload in lock.workloads],
                identities=identities.workloads,
            ),
        )

    return record(program, outputs=ANSWERS, calls={CREDENTIALS: {"kubeconfigs": [{"name": "u", "value": ENCODED}]}})


def cluster_of(stack: str) -> dict[str, Any]:
    return one(build(*shipped(stack)), ":ManagedCluster").inputs


def pools_of(rows: list[Row]) -> dict[str, Row]:
    return named(rows, ":AgentPool")


@pytest.mark.parametrize("stack", STACKS)
def test_nobody_enters_the_cluster_but_through_entra_id(stack: str) -> None:
    cluster = cluster_of(stack)
    assert cluster["disableLocalAccounts"] is True
    assert cluster["enableRBAC"] is True
    assert cluster["aadProfile"] == {"managed": True, "enableAzureRBAC": True, "adminGroupObjectIDs": []}
    assert cluster["oidcIssuerProfile"] == {"enabled": True}
    assert cluster["securityProfile"]["workloadIdentity"] == {"enabled": True}


@pytest.mark.parametrize(
    ("stack", "tier", "nodes", "private"), [("dev-32k", "Free", 2, False), ("prod-standard", "Standard", 3, True)]
)
def test_the_posture_decides_tier_nodes_and_who_reaches_the_api(
    stack: str, tier: str, nodes: int, private: bool
) -> None:
    cluster = cluster_of(stack)
    assert cluster["sku"] == {"name": "Base", "tier": tier}
    assert cluster["agentPoolProfiles"][0]["count"] == nodes
    assert cluster["apiServerAccessProfile"]["enablePrivateCluster"] is private
    assert cluster["apiServerAccessProfile"]["disableRunCommand"] is True
    assert ("defender" in cluster["securityProfile"]) is private
    assert cluster["metricsProfile"]["costAnalysis"]["enabled"] is (tier != "Free")


def test_addresses_that_may_call_the_api_are_those_of_the_intent() -> None:
    intent, lock = planned(served(access={"authorized_ip_ranges": ["192.0.2.0/24"]}))
    cluster = one(build(intent, lock), ":ManagedCluster").inputs
    assert cluster["apiServerAccessProfile"]["authorizedIPRanges"] == ["192.0.2.0/24"]


def test_administrators_are_the_groups_of_the_intent() -> None:
    group = "11111111-2222-3333-4444-555555555555"
    intent, lock = planned(served(access={"admin_group_object_ids": [group]}))
    assert one(build(intent, lock), ":ManagedCluster").inputs["aadProfile"]["adminGroupObjectIDs"] == [group]


def test_there_is_one_inline_pool_for_the_systems_own_pods() -> None:
    (pool,) = cluster_of("dev-32k")["agentPoolProfiles"]
    assert pool["mode"] == "System"
    assert pool["nodeTaints"] == ["CriticalAddonsOnly=true:NoSchedule"]
    assert pool["vmSize"] == "Standard_D4s_v5"
    assert pool["maxPods"] >= 50
    assert "enableAutoScaling" not in pool  # the bill counts a fixed number


def test_the_system_pool_is_changed_only_when_asked_and_the_difference_is_said(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    said: list[str] = []
    monkeypatch.setattr(pulumi, "warn", said.append)
    intent, lock = shipped("dev-32k")
    rows = build(intent, lock)
    assert one(rows, ":ManagedCluster").options["ignoreChanges"] == ["agentPoolProfiles"]
    assert said == []
    there = {"name": "system", "count": 5, "vmSize": "Standard_D4s_v5"}  # as Azure has it, and the plan says 2
    monkeypatch.setitem(ANSWERS["cluster"], "agentPoolProfiles", [there, {"name": "a100spot", "count": 1}])
    build(intent, lock)
    assert len(said) == 1
    assert said[0].startswith("the system pool is 5 x Standard_D4s_v5 and the plan says 2 x Standard_D4s_v5: run")


def test_the_network_is_overlay_with_cilium_and_leaves_by_the_load_balancer_of_the_bill() -> None:
    network = cluster_of("dev-32k")["networkProfile"]
    assert (network["networkPlugin"], network["networkPluginMode"]) == ("azure", "overlay")
    assert network["networkDataplane"] == network["networkPolicy"] == "cilium"
    assert (network["loadBalancerSku"], network["outboundType"]) == ("standard", "loadBalancer")


def test_addons_are_those_that_the_plan_rests_on() -> None:
    cluster = cluster_of("dev-32k")
    addons = cluster["addonProfiles"]
    assert addons["azureKeyvaultSecretsProvider"]["config"]["enableSecretRotation"] == "true"
    assert addons["azurepolicy"] == {"enabled": True}
    assert addons["omsagent"]["config"]["logAnalyticsWorkspaceResourceID"] == WORKSPACE
    assert cluster["workloadAutoScalerProfile"]["keda"] == {"enabled": True}
    assert cluster["storageProfile"]["blobCSIDriver"] == {"enabled": True}
    assert cluster["azureMonitorProfile"]["metrics"] == {"enabled": True}
    assert cluster["securityProfile"]["imageCleaner"]["enabled"] is True


def test_the_autoscaler_follows_the_order_of_pools_only_where_there_is_one() -> None:
    assert cluster_of("prod-standard")["autoScalerProfile"]["expander"] == "priority"
    assert cluster_of("dev-32k")["autoScalerProfile"]["expander"] == "least-waste"


def test_the_autoscaler_gives_machines_back_after_the_time_that_the_bill_counts() -> None:
    from planner.catalog.assumptions import assumption

    minutes = assumption("scale_down_hours").expected * 60
    assert cluster_of("dev-32k")["autoScalerProfile"]["scaleDownUnneededTime"] == f"{minutes:.0f}m"


def test_upgrades_wait_for_the_maintenance_window() -> None:
    intent, lock = planned(served(maintenance="tue 21:30-03:30"))
    windows = named(build(intent, lock), ":MaintenanceConfiguration")
    assert set(windows) == {"aksManagedAutoUpgradeSchedule", "aksManagedNodeOSUpgradeSchedule"}
    for window in windows.values():
        assert window.inputs["maintenanceWindow"] == {
            "schedule": {"weekly": {"dayOfWeek": "Tuesday", "intervalWeeks": 1}},
            "startTime": "21:30",
            "durationHours": 6,
            "utcOffset": "+00:00",
        }


@pytest.mark.parametrize("stack", STACKS)
def test_each_pool_is_what_the_plan_says(stack: str) -> None:
    _, lock = shipped(stack)
    rows = pools_of(build(*shipped(stack)))
    assert list(rows) == [pool.name for pool in lock.pools]
    for pool in lock.pools:
        row = rows[pool.name]
        inputs = row.inputs
        assert (inputs["vmSize"], inputs["minCount"], inputs["maxCount"]) == (
            pool.sku,
            0,
            pool.max_nodes,
        )
        kind = "gpu" if pool.gpus_per_node else "cpu"
        assert inputs["nodeTaints"] == [f"sku={kind}:NoSchedule"]
        assert inputs.get("gpuProfile") == ({"driver": "Install"} if pool.gpus_per_node else None)
        assert (inputs["mode"], inputs["enableAutoScaling"]) == ("User", True)
        assert row.options["ignoreChanges"] == ["count"]
        assert row.options["deleteBeforeReplace"] is True
        assert {"scaleSetPriority", "spotMaxPrice", "osDiskType"} <= set(row.options["replaceOnChanges"])
        assert row.options["timeouts"]["create"] == "45m"


def test_a_spot_pool_is_never_taken_back_for_its_price_and_leaves_nothing_behind() -> None:
    spot = pools_of(build(*shipped("prod-standard")))["a100spot"].inputs
    assert (spot["scaleSetPriority"], spot["scaleSetEvictionPolicy"], spot["spotMaxPrice"]) == ("Spot", "Delete", -1)
    assert "upgradeSettings" not in spot  # AKS upgrades spot pools without surge
    twin = pools_of(build(*shipped("prod-standard")))["a100fb"].inputs
    assert twin["scaleSetPriority"] == "Regular"
    assert "spotMaxPrice" not in twin


def test_an_upgrade_takes_a_machine_more_only_where_the_stated_quota_has_room() -> None:
    # one NC24ads_A100_v4 has 24 vCPUs: two of them need 48
    pinned = {"workload": {"settings": {}, "context": 32768}, "pricing": {"spot": False}}
    family = "StandardNCADSA100v4Family"
    for limit, surge in ((47, {"maxSurge": "0", "maxUnavailable": "1"}), (48, {"maxSurge": "1"})):
        wanted = served(**pinned, skus=["NC24ads_A100_v4"], quota={"*": {"family_vcpus": {family: limit}}})
        (pool,) = pools_of(build(*planned(wanted))).values()
        assert pool.inputs["upgradeSettings"] == surge


def test_pools_are_made_one_after_another() -> None:
    rows = pools_of(build(*shipped("prod-standard")))
    assert rows["a100spot"].urn in rows["a100fb"].dependencies


def test_federated_credentials_of_one_identity_are_written_one_after_another() -> None:
    second = {"kind": "serve", "name": "second", "context": 8192, "settings": {"quantization": "awq"}}
    wanted = served()
    wanted["workloads"].append(second)
    credentials = named(build(*planned(wanted)), ":FederatedIdentityCredential")
    assert credentials["serve"].inputs["subject"] == "system:serviceaccount:tonnage:serve"
    assert credentials["second"].inputs["audiences"] == ["api://AzureADTokenExchange"]
    assert credentials["serve"].urn in credentials["second"].dependencies
    assert credentials["second"].inputs["issuer"] == "https://issuer/"


def test_the_cluster_waits_for_the_roles_that_it_cannot_start_without() -> None:
    rows = build(*shipped("dev-32k"))
    roles = named(rows, ":RoleAssignment")
    cluster = one(rows, ":ManagedCluster")
    for role in ("control-plane-joins-network", "control-plane-assigns-kubelet"):
        assert roles[role].inputs["principalType"] == "ServicePrincipal"
        assert roles[role].urn in cluster.dependencies
    kubelet = cluster.inputs["identityProfile"]["kubeletidentity"]
    assert kubelet == {
        "resourceId": fake_id("kubelet"),
        "clientId": "kubelet-client",
        "objectId": "kubelet-principal",
    }


@pytest.mark.parametrize("login", ["azurecli", "workloadidentity"])
def test_the_kubeconfig_logs_in_without_asking_a_person(login: str) -> None:
    config = yaml.safe_load(for_programs(DEVICE_CODE, login))
    command = config["users"][0]["user"]["exec"]
    assert command["args"] == ["get-token", "--login", login, "--server-id", "server-app"]
    assert config["clusters"][0]["cluster"]["certificate-authority-data"] == "Q0E="


def test_a_kubeconfig_with_a_certificate_in_it_is_refused() -> None:
    text = yaml.safe_dump({"users": [{"name": "u", "user": {"client-key-data": "x"}}]})
    with pytest.raises(PlannerError, match="does not log in through kubelogin: keep Entra ID on"):
        for_programs(text, "azurecli")


@pytest.mark.parametrize("stack", ["Dev", "dev_32k", "a--b", "-a", "a.b", "a" * 29])
def test_a_stack_whose_name_azure_would_refuse_is_refused_first(stack: str) -> None:
    with pytest.raises(PlannerError, match="cannot be part of Azure's names: call the stack in at most 28 lower-case"):
        names(stack)


def test_a_name_that_grows_too_long_says_by_how_much() -> None:
    with pytest.raises(
        PlannerError, match=r"would be called a{50}, 50 characters where Azure takes 44: .* shorter by 6"
    ):
        limited("data collection endpoint", "a" * 50)


def test_tags_of_ones_own_stand_beside_tonnages_and_do_not_replace_them() -> None:
    assert tags("s", "dev", {"cost-centre": "42"})["cost-centre"] == "42"
    with pytest.raises(PlannerError, match="the tag Stack is set by Tonnage"):
        tags("s", "dev", {"Stack": "x"})


def test_whoever_makes_the_cluster_administers_it_where_no_group_does() -> None:
    role = named(build(*shipped("dev-32k")), ":RoleAssignment")["deployer-administers-cluster"]
    assert (role.inputs["principalId"], role.inputs["principalType"]) == ("deployer", "User")
    assert role.options["ignoreChanges"] == ["principalId", "principalType"]  # the next one to run it is another
    group = {"admin_group_object_ids": ["11111111-2222-3333-4444-555555555555"]}
    rows = build(*planned(served(access=group)))
    assert "deployer-administers-cluster" not in named(rows, ":RoleAssignment")
