"""The stand-in for azure-native does what the provider and ARM do, where the program depends on it."""

import base64
import json
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import pytest
import yaml
from google.protobuf import empty_pb2
from google.rpc import status_pb2
from pulumi.runtime.proto import provider_pb2, provider_pb2_grpc
from pulumi_cli import wait_until
from standin import arm_outputs, faults, serve, wire
from standin.azure import AzureProvider

GROUP = "azure-native:resources:ResourceGroup"
NETWORK = "azure-native:network:VirtualNetwork"
SUBNET = "azure-native:network:Subnet"
IDENTITY = "azure-native:managedidentity:UserAssignedIdentity"
CREDENTIAL = "azure-native:managedidentity:FederatedIdentityCredential"
ROLE = "azure-native:authorization:RoleAssignment"
CLUSTER = "azure-native:containerservice:ManagedCluster"
POOL = "azure-native:containerservice:AgentPool"
ACCOUNT = "azure-native:storage:StorageAccount"
VAULT = "azure-native:keyvault:Vault"
SECRET = "azure-native:keyvault:Secret"
CANARY = "canary-value-of-a-secret"


class Refused(Exception):
    """The provider said no; `partial` is the state that came with the error, if any."""

    def __init__(self, message: str, partial: Any) -> None:
        super().__init__(message)
        self.partial = partial


class Engine:
    """What Pulumi's engine sends for one resource after another."""

    def __init__(self, port: int, directory: Path) -> None:
        self.channel = grpc.insecure_channel(f"127.0.0.1:{port}")
        self.stub = provider_pb2_grpc.ResourceProviderStub(self.channel)
        self.directory = directory
        self.configure()

    def configure(self, **settings: str) -> None:
        self.stub.Configure(
            provider_pb2.ConfigureRequest(args=wire.to_struct({"location": "swedencentral", **settings}))
        )

    def check(
        self, token: str, logical: str, inputs: dict[str, Any], olds: dict[str, Any] | None = None
    ) -> tuple[dict[str, Any], list[str]]:
        answer = self.stub.Check(
            provider_pb2.CheckRequest(
                urn=urn(token, logical),
                olds=wire.to_struct(olds or {}),
                news=wire.to_struct(inputs),
                randomSeed=logical.encode(),
            )
        )
        return wire.to_plain(answer.inputs, keep_secrets=True), [failure.reason for failure in answer.failures]

    def create(self, token: str, logical: str, **inputs: Any) -> tuple[str, dict[str, Any], dict[str, Any]]:
        """Check, then create: (id, inputs, outputs)."""
        checked, failures = self.check(token, logical, inputs)
        assert failures == []
        request = provider_pb2.CreateRequest(urn=urn(token, logical), properties=wire.to_struct(checked))
        answer = called(self.stub.Create, request)
        return answer.id, checked, wire.to_plain(answer.properties, keep_secrets=True)

    def update(self, token: str, logical: str, resource_id: str, old: dict[str, Any], **changes: Any) -> dict[str, Any]:
        news, failures = self.check(token, logical, {**old, **changes}, old)
        assert failures == []
        request = provider_pb2.UpdateRequest(
            id=resource_id, urn=urn(token, logical), news=wire.to_struct(news), old_inputs=wire.to_struct(old)
        )
        return wire.to_plain(called(self.stub.Update, request).properties)

    def read(
        self, token: str, logical: str, resource_id: str, inputs: dict[str, Any], outputs: dict[str, Any]
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """(inputs, outputs) as a refresh leaves them."""
        answer = self.stub.Read(
            provider_pb2.ReadRequest(
                id=resource_id,
                urn=urn(token, logical),
                inputs=wire.to_struct(inputs),
                properties=wire.to_struct(outputs),
            )
        )
        return wire.to_plain(answer.inputs, keep_secrets=True), wire.to_plain(answer.properties, keep_secrets=True)

    def delete(self, token: str, logical: str, resource_id: str) -> None:
        called(self.stub.Delete, provider_pb2.DeleteRequest(id=resource_id, urn=urn(token, logical)))

    def diff(self, token: str, old: dict[str, Any], **changes: Any) -> tuple[list[str], list[str]]:
        """(changed, replacing) top-level properties."""
        answer = self.stub.Diff(
            provider_pb2.DiffRequest(
                id="x", urn=urn(token, "x"), old_inputs=wire.to_struct(old), news=wire.to_struct({**old, **changes})
            )
        )
        return list(answer.diffs), list(answer.replaces)

    def set_faults(self, *wanted: dict[str, Any]) -> None:
        faults.write(self.directory / "faults.json", list(wanted))

    def journal(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in (self.directory / "journal.jsonl").read_text().splitlines()]


def urn(token: str, logical: str) -> str:
    return f"urn:pulumi:dev::test::{token}::{logical}"


def called(method: Any, request: Any) -> Any:
    try:
        return method(request)
    except grpc.RpcError as error:
        partial = None
        for key, value in error.trailing_metadata():
            if key == "grpc-status-details-bin":
                partial = provider_pb2.ErrorResourceInitFailed()
                status_pb2.Status.FromString(value).details[0].Unpack(partial)
        raise Refused(error.details(), partial) from error


@pytest.fixture
def engine(tmp_path: Path) -> Iterator[Engine]:
    server, port = serve.served(AzureProvider(serve.arm_in(tmp_path)))
    made = Engine(port, tmp_path)
    yield made
    made.channel.close()
    server.stop(None).wait()


@pytest.fixture
def group(engine: Engine) -> str:
    engine.create(GROUP, "rg", resourceGroupName="rg")
    return "rg"


def network(engine: Engine) -> str:
    """A network with one subnet; the subnet's id."""
    engine.create(
        NETWORK,
        "vnet",
        resourceGroupName="rg",
        virtualNetworkName="vnet",
        addressSpace={"addressPrefixes": ["10.0.0.0/8"]},
    )
    return engine.create(
        SUBNET, "nodes", resourceGroupName="rg", virtualNetworkName="vnet", addressPrefix="10.1.0.0/16"
    )[0]


def cluster(engine: Engine, **more: Any) -> tuple[str, dict[str, Any], dict[str, Any]]:
    inputs = {
        "resourceGroupName": "rg",
        "resourceName": "aks",
        "dnsPrefix": "aks",
        "agentPoolProfiles": [{"name": "system", "mode": "System", "count": 1, "vmSize": "Standard_D4s_v5"}],
        "oidcIssuerProfile": {"enabled": True},
        **more,
    }
    return engine.create(CLUSTER, "aks", **inputs)


def pool(engine: Engine, **more: Any) -> tuple[str, dict[str, Any], dict[str, Any]]:
    inputs = {
        "resourceGroupName": "rg",
        "resourceName": "aks",
        "agentPoolName": "gpu",
        "vmSize": "Standard_NC24ads_A100_v4",
        "enableAutoScaling": True,
        "minCount": 0,
        "maxCount": 2,
        "count": 0,
        **more,
    }
    return engine.create(POOL, "gpu", **inputs)


# -- names, defaults, checks


def test_a_top_level_resource_gets_random_digits_a_nested_one_its_logical_name_a_role_assignment_a_guid(
    engine: Engine,
) -> None:
    checked, _ = engine.check(
        ACCOUNT, "models", {"resourceGroupName": "rg", "kind": "StorageV2", "sku": {"name": "Standard_LRS"}}
    )
    assert checked["accountName"].startswith("models")
    assert len(checked["accountName"]) == len("models") + 8
    again, _ = engine.check(ACCOUNT, "models", {**checked, "accountName": None}, checked)
    assert again["accountName"] == checked["accountName"]
    nested, _ = engine.check(SUBNET, "nodes", {"resourceGroupName": "rg", "virtualNetworkName": "vnet"})
    assert nested["subnetName"] == "nodes"
    role, failures = engine.check(
        ROLE, "reader", {"scope": "/subscriptions/s", "principalId": "p", "roleDefinitionId": "r"}
    )
    assert failures == []
    assert [len(part) for part in role["roleAssignmentName"].split("-")] == [8, 4, 4, 4, 12]


@pytest.mark.parametrize(
    ("token", "key", "name"),
    [
        (ACCOUNT, "accountName", "my-models"),
        (ACCOUNT, "accountName", "a" * 25),
        (VAULT, "vaultName", "two--dashes"),
        (VAULT, "vaultName", "a" * 25),
        (POOL, "agentPoolName", "Gpu"),
        (POOL, "agentPoolName", "thirteenchars"),
        (CLUSTER, "resourceName", "a" * 64),
        (IDENTITY, "resourceName", "ab"),
        ("azure-native:consumption:Budget", "budgetName", "b" * 64),
        ("azure-native:containerregistry:Registry", "registryName", "with-dash"),
        (GROUP, "resourceGroupName", "ends-with-dot."),
    ],
)
def test_a_name_that_arm_does_not_take_is_refused_at_preview(engine: Engine, token: str, key: str, name: str) -> None:
    needed = {
        ACCOUNT: {"kind": "StorageV2", "sku": {"name": "Standard_LRS"}},
        VAULT: {"properties": {"tenantId": arm_outputs.TENANT, "sku": {"family": "A", "name": "standard"}}},
        "azure-native:consumption:Budget": {
            "scope": "/subscriptions/s",
            "amount": 1,
            "category": "Cost",
            "timeGrain": "Monthly",
            "timePeriod": {"startDate": "2026-11-01T00:00:00Z"},
        },
        "azure-native:containerregistry:Registry": {"sku": {"name": "Basic"}},
    }.get(token, {})
    place = {} if "scope" in needed else {"resourceGroupName": "rg"}
    parent = {"resourceName": "aks"} if token == POOL else {}
    _, failures = engine.check(token, "x", {**place, **parent, **needed, key: name})
    assert len(failures) == 1
    assert f"'{key}' is '{name}'" in failures[0]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"vmsize": "x"}, "'vmsize' is not a property of AgentPool"),
        ({"mode": "Sytem"}, "'mode' is 'Sytem', which is none of 'System', 'User', 'Gateway'"),
        ({"maxCount": "2"}, "'maxCount' should be int but got '2'"),
        ({"resourceName": None}, "missing required property 'resourceName'"),
        ({"gpuProfile": {"driver": "Install", "nvidia": {}}}, "'gpuProfile.nvidia' is not a property of GPUProfile"),
        ({"osDiskSizeGB": 4096}, "'osDiskSizeGB' is 4096, outside 0 to 2048"),
    ],
)
def test_inputs_that_the_sdk_or_the_model_does_not_have_are_refused(
    engine: Engine, change: dict[str, Any], reason: str
) -> None:
    _, failures = engine.check(POOL, "gpu", {"resourceGroupName": "rg", "resourceName": "aks", "vmSize": "v", **change})
    assert failures == [reason]


def test_a_type_or_function_that_the_stand_in_does_not_know_is_refused(engine: Engine) -> None:
    with pytest.raises(grpc.RpcError, match="does not know the resource type azure-native:web:WebApp"):
        engine.check("azure-native:web:WebApp", "x", {})
    with pytest.raises(grpc.RpcError, match="does not know the function azure-native:web:listSecrets"):
        engine.stub.Invoke(provider_pb2.InvokeRequest(tok="azure-native:web:listSecrets"))


def test_a_private_zone_lies_in_global_and_nothing_else_does(engine: Engine) -> None:
    zone = {"resourceGroupName": "rg", "privateZoneName": "privatelink.vaultcore.azure.net"}
    _, failures = engine.check("azure-native:privatedns:PrivateZone", "z", zone)
    assert failures == [
        "The provided location 'swedencentral' is not available for resource type 'Microsoft.Network/privateDnsZones'."
    ]
    assert engine.check("azure-native:privatedns:PrivateZone", "z", {**zone, "location": "Global"})[1] == []


# -- diffs


def test_what_replaces_a_pool_and_what_only_updates_it(engine: Engine) -> None:
    old = {"resourceGroupName": "rg", "resourceName": "aks", "agentPoolName": "gpu", "vmSize": "a", "maxCount": 2}
    assert engine.diff(POOL, old) == ([], [])
    assert engine.diff(POOL, old, maxCount=4) == (["maxCount"], [])
    assert engine.diff(POOL, old, vmSize="b") == (["vmSize"], ["vmSize"])
    assert engine.diff(POOL, old, gpuInstanceProfile="MIG1g") == (["gpuInstanceProfile"], ["gpuInstanceProfile"])
    assert engine.diff(POOL, old, agentPoolName="gpu2") == (["agentPoolName"], ["agentPoolName"])
    assert engine.diff(POOL, old, scaleSetPriority="Spot") == (["scaleSetPriority"], [])
    settings = {"networkProfile": {"podCidr": "10.244.0.0/16", "advancedNetworking": {"enabled": False}}}
    changed = {"networkProfile": {"podCidr": "10.250.0.0/16", "advancedNetworking": {"enabled": False}}}
    assert engine.diff(CLUSTER, settings, **changed) == (["networkProfile"], ["networkProfile"])
    updated = {"networkProfile": {"podCidr": "10.244.0.0/16", "advancedNetworking": {"enabled": True}}}
    assert engine.diff(CLUSTER, settings, **updated) == (["networkProfile"], [])


def test_arm_refuses_to_change_the_priority_of_a_pool(engine: Engine, group: str) -> None:
    cluster(engine)
    pool_id, inputs, _ = pool(engine)
    message = r'Status=400 Code="PropertyChangeNotAllowed" .*properties\.scaleSet'
    with pytest.raises(Refused, match=message):
        engine.update(POOL, "gpu", pool_id, inputs, scaleSetPriority="Spot", spotMaxPrice=-1)


# -- what ARM keeps and gives back


def test_the_state_survives_the_end_of_the_process(tmp_path: Path) -> None:
    first = serve.start(tmp_path)
    one = Engine(first.ports["azure-native"], tmp_path)
    _, inputs, outputs = one.create(GROUP, "rg", resourceGroupName="rg")
    identity_id, _, identity = one.create(IDENTITY, "vllm", resourceGroupName="rg", resourceName="vllm")
    one.channel.close()
    first.process.kill()
    first.stop()
    second = serve.start(tmp_path)
    other = Engine(second.ports["azure-native"], tmp_path)
    assert other.read(GROUP, "rg", f"/subscriptions/{arm_outputs.SUBSCRIPTION}/resourceGroups/rg", inputs, outputs) == (
        inputs,
        outputs,
    )
    assert other.read(IDENTITY, "vllm", identity_id, {"resourceName": "vllm"}, identity)[1] == identity
    other.channel.close()
    second.stop()


def test_a_secret_is_kept_as_a_hash_and_given_back_as_a_secret(engine: Engine, group: str) -> None:
    _, _, vault = engine.create(
        VAULT,
        "kv",
        resourceGroupName=group,
        vaultName="kv-test",
        properties={"tenantId": arm_outputs.TENANT, "sku": {"family": "A", "name": "standard"}},
        tags={"note": wire.secret(CANARY)},
    )
    assert vault["tags"] == {"note": wire.secret(CANARY)}
    assert vault["properties"]["vaultUri"] == "https://kv-test.vault.azure.net/"
    _, inputs, secret = engine.create(
        SECRET,
        "hf",
        resourceGroupName=group,
        vaultName="kv-test",
        secretName="hf",
        properties={"value": wire.secret(CANARY)},
    )
    assert inputs["properties"]["value"] == wire.secret(CANARY)
    assert "value" not in secret["properties"]
    wrong = {"resourceGroupName": group, "vaultName": "kv-test", "properties": {"value": [wire.secret(CANARY)]}}
    _, failures = engine.check(SECRET, "hf", wrong)
    assert len(failures) == 1
    assert CANARY not in failures[0]
    kept = [path for path in engine.directory.iterdir() if CANARY.encode() in path.read_bytes()]
    assert kept == []


def test_a_refresh_shows_every_pool_in_the_cluster_but_no_subnet_in_the_network(engine: Engine, group: str) -> None:
    network_inputs = {"addressSpace": {"addressPrefixes": ["10.0.0.0/8"]}}
    network_id, inputs, outputs = engine.create(
        NETWORK, "vnet", resourceGroupName=group, virtualNetworkName="vnet", **network_inputs
    )
    engine.create(SUBNET, "nodes", resourceGroupName=group, virtualNetworkName="vnet", addressPrefix="10.1.0.0/16")
    refreshed, shown = engine.read(NETWORK, "vnet", network_id, inputs, outputs)
    assert refreshed == inputs
    assert [subnet["name"] for subnet in shown["subnets"]] == ["nodes"]
    cluster_id, inputs, outputs = cluster(engine)
    assert engine.read(CLUSTER, "aks", cluster_id, inputs, outputs) == (inputs, outputs)
    pool(engine)
    refreshed, _ = engine.read(CLUSTER, "aks", cluster_id, inputs, outputs)
    assert refreshed["agentPoolProfiles"][0] == inputs["agentPoolProfiles"][0]
    assert [profile["name"] for profile in refreshed["agentPoolProfiles"]] == ["system", "gpu"]
    assert {key: value for key, value in refreshed.items() if key != "agentPoolProfiles"} == {
        key: value for key, value in inputs.items() if key != "agentPoolProfiles"
    }


def test_a_pool_is_not_added_through_the_cluster(engine: Engine, group: str) -> None:
    cluster_id, inputs, _ = cluster(engine)
    system = inputs["agentPoolProfiles"][0]
    with pytest.raises(Refused, match="A new agent pool was introduced"):
        engine.update(CLUSTER, "aks", cluster_id, inputs, agentPoolProfiles=[system, {**system, "name": "more"}])


def test_the_user_kubeconfig_is_kubelogin_with_a_device_code(engine: Engine, group: str) -> None:
    _, _, outputs = cluster(engine)
    answer = engine.stub.Invoke(
        provider_pb2.InvokeRequest(
            tok="azure-native:containerservice:listManagedClusterUserCredentials",
            args=wire.to_struct({"resourceGroupName": "rg", "resourceName": "aks"}),
        )
    )
    credentials = wire.to_plain(getattr(answer, "return"))
    kubeconfig = yaml.safe_load(base64.b64decode(credentials["kubeconfigs"][0]["value"]))
    arguments = kubeconfig["users"][0]["user"]["exec"]["args"]
    assert arguments[arguments.index("--login") + 1] == "devicecode"
    assert kubeconfig["clusters"][0]["cluster"]["server"] == f"https://{outputs['fqdn']}:443"


# -- order, use, soft deletion


def test_a_child_needs_its_parent_and_a_reference_its_target(engine: Engine) -> None:
    with pytest.raises(
        Refused, match='Status=404 Code="ResourceGroupNotFound" Message="Resource group \'rg\' could not be found'
    ):
        engine.create(IDENTITY, "one", resourceGroupName="rg")
    engine.create(GROUP, "rg", resourceGroupName="rg")
    with pytest.raises(
        Refused, match=r"Microsoft\.Network/virtualNetworks/vnet' under resource group 'rg' was not found"
    ):
        engine.create(SUBNET, "s", resourceGroupName="rg", virtualNetworkName="vnet", addressPrefix="10.1.0.0/16")
    with pytest.raises(Refused, match=r"Microsoft\.ContainerService/managedClusters/aks'"):
        pool(engine)
    subnet_id = network(engine)
    cluster(engine)
    with pytest.raises(Refused, match="InvalidResourceReference"):
        pool(engine, vnetSubnetID=subnet_id.replace("nodes", "other"))


def test_a_subnet_in_use_is_kept_and_a_group_goes_with_all_in_it(engine: Engine, group: str) -> None:
    subnet_id = network(engine)
    cluster(engine)
    pool_id, _, _ = pool(engine, vnetSubnetID=subnet_id)
    with pytest.raises(Refused, match="InUseSubnetCannotBeDeleted"):
        engine.delete(SUBNET, "nodes", subnet_id)
    with pytest.raises(Refused, match="InUseSubnetCannotBeDeleted"):
        engine.delete(NETWORK, "vnet", subnet_id.rsplit("/", 2)[0])
    engine.delete(POOL, "gpu", pool_id)
    engine.delete(SUBNET, "nodes", subnet_id)
    engine.delete(GROUP, "rg", f"/subscriptions/{arm_outputs.SUBSCRIPTION}/resourceGroups/rg")
    assert json.loads((engine.directory / "azure.json").read_text())["resources"] == {}


def test_a_deleted_vault_keeps_its_name(engine: Engine, group: str) -> None:
    inputs = {
        "resourceGroupName": group,
        "vaultName": "kv-test",
        "properties": {"tenantId": arm_outputs.TENANT, "sku": {"family": "A", "name": "standard"}},
    }
    vault_id, _, _ = engine.create(VAULT, "kv", **inputs)
    engine.delete(VAULT, "kv", vault_id)
    with pytest.raises(Refused, match="already exists in deleted state"):
        engine.create(VAULT, "kv", **inputs)


def test_a_new_principal_is_unknown_to_a_role_assignment_that_does_not_say_its_type(engine: Engine, group: str) -> None:
    identity_id, _, identity = engine.create(IDENTITY, "vllm", resourceGroupName=group, resourceName="vllm")
    role = {
        "scope": identity_id.split("/providers/")[0],
        "principalId": identity["principalId"],
        "roleDefinitionId": "/subscriptions/s/providers/Microsoft.Authorization/roleDefinitions/r",
    }
    with pytest.raises(Refused, match="PrincipalNotFound"):
        engine.create(ROLE, "one", **role)
    engine.create(ROLE, "one", **role, principalType="ServicePrincipal")
    with pytest.raises(Refused, match="RoleAssignmentExists"):
        engine.create(ROLE, "two", **role, principalType="ServicePrincipal")


def at_once(*work: Any) -> list[str | None]:
    """Do all at the same time; the message of each refusal, None where there was none."""
    ready = threading.Barrier(len(work))

    def one(call: Any) -> str | None:
        ready.wait()
        try:
            call()
        except Refused as error:
            return str(error)
        return None

    with ThreadPoolExecutor(len(work)) as threads:
        return list(threads.map(one, work))


def test_two_credentials_written_at_once_on_one_identity_conflict(engine: Engine, group: str) -> None:
    engine.create(IDENTITY, "vllm", resourceGroupName=group, resourceName="vllm")

    def credential(name: str) -> None:
        engine.create(
            CREDENTIAL,
            name,
            resourceGroupName=group,
            resourceName="vllm",
            issuer="https://issuer",
            subject=f"system:serviceaccount:a:{name}",
            audiences=["api://AzureADTokenExchange"],
        )

    messages = at_once(lambda: credential("one"), lambda: credential("two"))
    assert sorted(message is None for message in messages) == [False, True]
    assert any("ConcurrentFederatedIdentityCredentialsWritesForSingleManagedIdentity" in str(one) for one in messages)


def test_two_subnets_written_at_once_both_come_to_be_because_the_provider_tries_again(
    engine: Engine, group: str
) -> None:
    network(engine)

    def subnet(number: int) -> None:
        place = {"resourceGroupName": group, "virtualNetworkName": "vnet"}
        engine.create(SUBNET, f"s{number}", **place, addressPrefix=f"10.{number}.0.0/16")

    assert at_once(lambda: subnet(2), lambda: subnet(3)) == [None, None]
    assert any("AnotherOperationInProgress" in str(line.get("error")) for line in engine.journal())


# -- faults and quota


def test_quota_is_refused_with_the_family_and_the_numbers(engine: Engine, group: str) -> None:
    cluster(engine)
    sizes = {"Standard_NC24ads_A100_v4": {"family": "StandardNCADSA100v4Family", "vcpus": 24}}
    quota = {"limits": {"StandardNCADSA100v4Family": 40}, "sizes": sizes}
    (engine.directory / "quota.json").write_text(json.dumps(quota))
    # 2 nodes x 24 vCPUs = 48 > 40
    with pytest.raises(
        Refused, match=r"StandardNCADSA100v4Family Cores quota.*Current Limit: 40.*Additional Required: 48"
    ):
        pool(engine)
    pool(engine, maxCount=1)


def test_faults_come_as_often_as_they_are_asked_for(engine: Engine, group: str) -> None:
    engine.set_faults(
        {"type": "UserAssignedIdentity", "name": "vl*", "fault": "conflict", "times": 1},
        {"type": "StorageAccount", "fault": "throttled", "times": 2, "retry_after_s": 0.05},
    )
    with pytest.raises(Refused, match='Status=409 Code="OperationNotAllowed"'):
        engine.create(IDENTITY, "vllm", resourceGroupName=group, resourceName="vllm")
    engine.create(IDENTITY, "vllm", resourceGroupName=group, resourceName="vllm")
    account = {"accountName": "models", "kind": "StorageV2", "sku": {"name": "Standard_LRS"}}
    engine.create(ACCOUNT, "models", resourceGroupName=group, **account)
    assert sum(line["event"] == "retry" for line in engine.journal()) == 2


def test_a_create_that_times_out_tells_the_id_and_one_whose_answer_is_lost_tells_nothing(
    engine: Engine, group: str
) -> None:
    cluster(engine)
    engine.set_faults({"type": "AgentPool", "fault": "timeout", "times": 1})
    with pytest.raises(Refused, match="context deadline exceeded") as timed_out:
        pool(engine)
    assert timed_out.value.partial.id.endswith("/managedClusters/aks/agentPools/gpu")
    assert wire.to_plain(timed_out.value.partial.inputs)["vmSize"] == "Standard_NC24ads_A100_v4"
    engine.set_faults({"type": "UserAssignedIdentity", "fault": "lost", "times": 1})
    with pytest.raises(Refused, match="connection reset by peer") as lost:
        engine.create(IDENTITY, "vllm", resourceGroupName=group, resourceName="vllm")
    assert lost.value.partial is None
    with pytest.raises(Refused, match=r"cannot create already existing resource '/subscriptions/.*/vllm'"):
        engine.create(IDENTITY, "vllm", resourceGroupName=group, resourceName="vllm")


def test_cancel_ends_a_slow_create_and_the_next_run_is_not_cancelled(engine: Engine, group: str) -> None:
    cluster(engine)
    engine.set_faults({"type": "AgentPool", "fault": "slow", "seconds": 600, "times": 1})
    with ThreadPoolExecutor(1) as threads:
        slow = threads.submit(lambda: pool(engine))
        assert wait_until(lambda: any(line["type"] == POOL for line in engine.journal()))
        engine.stub.Cancel(empty_pb2.Empty())
        with pytest.raises(Refused, match="context canceled") as cancelled:
            slow.result(timeout=60)
    assert cancelled.value.partial.id.endswith("/agentPools/gpu")
    engine.configure()
    engine.create(IDENTITY, "vllm", resourceGroupName=group)
