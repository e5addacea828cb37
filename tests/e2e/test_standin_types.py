"""Every type that the stand-in for azure-native knows is made from plausible inputs, and read back unchanged."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from standin import arm_outputs, serve
from standin.arm_table import TYPES
from standin.azure import AzureProvider
from test_standin_azure import Engine

SUBSCRIPTION = f"/subscriptions/{arm_outputs.SUBSCRIPTION}"
GROUP_ID = f"{SUBSCRIPTION}/resourceGroups/rg"
IN_GROUP = {"resourceGroupName": "rg"}
IDENTITIES = f"{GROUP_ID}/providers/Microsoft.ManagedIdentity/userAssignedIdentities"
NETWORKS = f"{GROUP_ID}/providers/Microsoft.Network"
INSIGHTS = f"{GROUP_ID}/providers/Microsoft.Insights"
SUBNET_ID = f"{NETWORKS}/virtualNetworks/vnet/subnets/nodes"
CLUSTER_ID = f"{GROUP_ID}/providers/Microsoft.ContainerService/managedClusters/aks"
LOGS_ID = f"{GROUP_ID}/providers/Microsoft.OperationalInsights/workspaces/logs"
METRICS_ID = f"{GROUP_ID}/providers/Microsoft.Monitor/accounts/metrics"
VAULT_ID = f"{GROUP_ID}/providers/Microsoft.KeyVault/vaults/kv-test"
PROMETHEUS = "Microsoft-PrometheusMetrics"

RESOURCES: list[tuple[str, dict[str, Any]]] = [
    ("resources:ResourceGroup", {**IN_GROUP, "tags": {"owner": "ml"}}),
    (
        "network:NetworkSecurityGroup",
        {
            **IN_GROUP,
            "networkSecurityGroupName": "nsg",
            "securityRules": [
                {
                    "name": "deny",
                    "access": "Deny",
                    "direction": "Inbound",
                    "protocol": "*",
                    "priority": 100,
                    "sourceAddressPrefix": "*",
                    "sourcePortRange": "*",
                    "destinationAddressPrefix": "*",
                    "destinationPortRange": "*",
                }
            ],
        },
    ),
    (
        "network:VirtualNetwork",
        {**IN_GROUP, "virtualNetworkName": "vnet", "addressSpace": {"addressPrefixes": ["10.0.0.0/8"]}},
    ),
    (
        "network:Subnet",
        {
            **IN_GROUP,
            "virtualNetworkName": "vnet",
            "subnetName": "nodes",
            "addressPrefix": "10.1.0.0/16",
            "networkSecurityGroup": {"id": f"{NETWORKS}/networkSecurityGroups/nsg"},
            "delegations": [{"name": "aks", "serviceName": "Microsoft.ContainerService/managedClusters"}],
        },
    ),
    (
        "privatedns:PrivateZone",
        {**IN_GROUP, "privateZoneName": "privatelink.vaultcore.azure.net", "location": "Global"},
    ),
    (
        "privatedns:VirtualNetworkLink",
        {
            **IN_GROUP,
            "privateZoneName": "privatelink.vaultcore.azure.net",
            "location": "Global",
            "virtualNetwork": {"id": f"{NETWORKS}/virtualNetworks/vnet"},
            "registrationEnabled": False,
        },
    ),
    ("managedidentity:UserAssignedIdentity", {**IN_GROUP, "resourceName": "control-plane"}),
    (
        "managedidentity:FederatedIdentityCredential",
        {
            **IN_GROUP,
            "resourceName": "control-plane",
            "issuer": "https://issuer/",
            "subject": "system:serviceaccount:serve:vllm",
            "audiences": ["api://AzureADTokenExchange"],
        },
    ),
    (
        "authorization:RoleAssignment",
        {
            "scope": GROUP_ID,
            "principalId": arm_outputs.DEPLOYER,
            "principalType": "User",
            "roleDefinitionId": f"{SUBSCRIPTION}/providers/Microsoft.Authorization/roleDefinitions/r",
        },
    ),
    (
        "operationalinsights:Workspace",
        {
            **IN_GROUP,
            "workspaceName": "logs",
            "sku": {"name": "PerGB2018"},
            "retentionInDays": 30,
            "workspaceCapping": {"dailyQuotaGb": 1.5},
        },
    ),
    (
        "monitor:AzureMonitorWorkspace",
        {**IN_GROUP, "azureMonitorWorkspaceName": "metrics", "publicNetworkAccess": "Enabled"},
    ),
    (
        "monitor:DataCollectionEndpoint",
        {
            **IN_GROUP,
            "dataCollectionEndpointName": "dce",
            "kind": "Linux",
            "networkAcls": {"publicNetworkAccess": "Enabled"},
        },
    ),
    (
        "monitor:DataCollectionRule",
        {
            **IN_GROUP,
            "dataCollectionRuleName": "dcr",
            "kind": "Linux",
            "dataCollectionEndpointId": f"{INSIGHTS}/dataCollectionEndpoints/dce",
            "dataSources": {"prometheusForwarder": [{"name": "p", "streams": [PROMETHEUS]}]},
            "destinations": {"monitoringAccounts": [{"accountResourceId": METRICS_ID, "name": "m"}]},
            "dataFlows": [{"destinations": ["m"], "streams": [PROMETHEUS]}],
        },
    ),
    (
        "containerservice:ManagedCluster",
        {
            **IN_GROUP,
            "resourceName": "aks",
            "dnsPrefix": "aks",
            "kubernetesVersion": "1.35",
            "sku": {"name": "Base", "tier": "Standard"},
            "identity": {"type": "UserAssigned", "userAssignedIdentities": [f"{IDENTITIES}/control-plane"]},
            "identityProfile": {"kubeletidentity": {"resourceId": f"{IDENTITIES}/control-plane"}},
            "agentPoolProfiles": [
                {
                    "name": "system",
                    "mode": "System",
                    "count": 2,
                    "minCount": 2,
                    "maxCount": 3,
                    "enableAutoScaling": True,
                    "vmSize": "Standard_D4ds_v5",
                    "vnetSubnetID": SUBNET_ID,
                    "osDiskType": "Ephemeral",
                    "nodeTaints": ["CriticalAddonsOnly=true:NoSchedule"],
                    "upgradeSettings": {"maxSurge": "33%"},
                }
            ],
            "aadProfile": {"managed": True, "enableAzureRBAC": True},
            "disableLocalAccounts": True,
            "oidcIssuerProfile": {"enabled": True},
            "securityProfile": {
                "workloadIdentity": {"enabled": True},
                "imageCleaner": {"enabled": True, "intervalHours": 48},
                "defender": {
                    "logAnalyticsWorkspaceResourceId": LOGS_ID,
                    "securityMonitoring": {"enabled": True},
                },
            },
            "addonProfiles": {
                "azureKeyvaultSecretsProvider": {"enabled": True, "config": {"enableSecretRotation": "true"}},
                "azurepolicy": {"enabled": True},
            },
            "networkProfile": {
                "networkPlugin": "azure",
                "networkPluginMode": "overlay",
                "networkDataplane": "cilium",
                "networkPolicy": "cilium",
                "podCidr": "10.244.0.0/16",
            },
            "autoScalerProfile": {"expander": "priority", "maxNodeProvisionTime": "20m"},
            "azureMonitorProfile": {"metrics": {"enabled": True}},
            "storageProfile": {"blobCSIDriver": {"enabled": True}},
            "workloadAutoScalerProfile": {"keda": {"enabled": True}},
            "autoUpgradeProfile": {"upgradeChannel": "patch", "nodeOSUpgradeChannel": "NodeImage"},
            "nodeResourceGroupProfile": {"restrictionLevel": "ReadOnly"},
        },
    ),
    (
        "containerservice:AgentPool",
        {
            **IN_GROUP,
            "resourceName": "aks",
            "agentPoolName": "gpuspot",
            "mode": "User",
            "vmSize": "Standard_NC24ads_A100_v4",
            "enableAutoScaling": True,
            "minCount": 0,
            "maxCount": 2,
            "count": 0,
            "scaleSetPriority": "Spot",
            "scaleSetEvictionPolicy": "Delete",
            "spotMaxPrice": -1,
            "gpuProfile": {"driver": "Install"},
            "gpuInstanceProfile": "MIG1g",
            "nodeTaints": ["sku=gpu:NoSchedule"],
            "vnetSubnetID": SUBNET_ID,
            "upgradeSettings": {"maxUnavailable": "1", "maxSurge": "0"},
        },
    ),
    (
        "containerservice:MaintenanceConfiguration",
        {
            **IN_GROUP,
            "resourceName": "aks",
            "configName": "aksManagedNodeOSUpgradeSchedule",
            "maintenanceWindow": {
                "schedule": {"weekly": {"dayOfWeek": "Sunday", "intervalWeeks": 1}},
                "durationHours": 4,
                "startTime": "02:00",
            },
        },
    ),
    (
        "monitor:DataCollectionRuleAssociation",
        {
            "resourceUri": CLUSTER_ID,
            "associationName": "MSProm-swedencentral-aks",
            "dataCollectionRuleId": f"{INSIGHTS}/dataCollectionRules/dcr",
        },
    ),
    (
        "monitor:DiagnosticSetting",
        {
            "resourceUri": CLUSTER_ID,
            "name": "logs",
            "workspaceId": LOGS_ID,
            "logs": [{"category": "kube-audit-admin", "enabled": True}],
        },
    ),
    (
        "monitor:ActionGroup",
        {
            **IN_GROUP,
            "actionGroupName": "owners",
            "groupShortName": "owners",
            "location": "Global",
            "emailReceivers": [{"name": "one", "emailAddress": "one@example.org", "useCommonAlertSchema": True}],
        },
    ),
    (
        "alertsmanagement:PrometheusRuleGroup",
        {
            **IN_GROUP,
            "ruleGroupName": "gpu",
            "scopes": [METRICS_ID],
            "clusterName": "aks",
            "interval": "PT1M",
            "rules": [
                {"record": "a:b", "expression": "sum(x)"},
                {
                    "alert": "GpuIdle",
                    "expression": "x < 1",
                    "for": "PT5M",
                    "severity": 2,
                    "actions": [{"actionGroupId": f"{INSIGHTS}/actionGroups/owners"}],
                },
            ],
        },
    ),
    (
        "dashboard:Grafana",
        {
            **IN_GROUP,
            "workspaceName": "grafana",
            "sku": {"name": "Standard"},
            "identity": {"type": "SystemAssigned"},
            "properties": {
                "grafanaIntegrations": {
                    "azureMonitorWorkspaceIntegrations": [{"azureMonitorWorkspaceResourceId": METRICS_ID}]
                }
            },
        },
    ),
    (
        "storage:StorageAccount",
        {
            **IN_GROUP,
            "accountName": "models",
            "kind": "StorageV2",
            "sku": {"name": "Standard_LRS"},
            "allowBlobPublicAccess": False,
            "allowSharedKeyAccess": False,
            "isHnsEnabled": True,
            "networkRuleSet": {"defaultAction": "Deny", "bypass": "AzureServices"},
        },
    ),
    (
        "storage:BlobServiceProperties",
        {
            **IN_GROUP,
            "accountName": "models",
            "blobServicesName": "default",
            "deleteRetentionPolicy": {"enabled": True, "days": 7},
        },
    ),
    ("storage:BlobContainer", {**IN_GROUP, "accountName": "models", "containerName": "datasets"}),
    (
        "storage:ManagementPolicy",
        {
            **IN_GROUP,
            "accountName": "models",
            "managementPolicyName": "default",
            "policy": {
                "rules": [
                    {
                        "name": "checkpoints",
                        "type": "Lifecycle",
                        "definition": {
                            "actions": {"baseBlob": {"delete": {"daysAfterModificationGreaterThan": 90}}},
                            "filters": {"blobTypes": ["blockBlob"], "prefixMatch": ["checkpoints/"]},
                        },
                    }
                ]
            },
        },
    ),
    (
        "keyvault:Vault",
        {
            **IN_GROUP,
            "vaultName": "kv-test",
            "properties": {
                "tenantId": arm_outputs.TENANT,
                "sku": {"family": "A", "name": "standard"},
                "enableRbacAuthorization": True,
                "enablePurgeProtection": True,
                "softDeleteRetentionInDays": 7,
            },
        },
    ),
    ("keyvault:Secret", {**IN_GROUP, "vaultName": "kv-test", "secretName": "hf", "properties": {"value": "v"}}),
    (
        "network:PrivateEndpoint",
        {
            **IN_GROUP,
            "privateEndpointName": "pe",
            "subnet": {"id": SUBNET_ID},
            "privateLinkServiceConnections": [{"name": "kv", "privateLinkServiceId": VAULT_ID, "groupIds": ["vault"]}],
        },
    ),
    (
        "network:PrivateDnsZoneGroup",
        {
            **IN_GROUP,
            "privateEndpointName": "pe",
            "privateDnsZoneGroupName": "default",
            "privateDnsZoneConfigs": [
                {
                    "name": "kv",
                    "privateDnsZoneId": f"{NETWORKS}/privateDnsZones/privatelink.vaultcore.azure.net",
                }
            ],
        },
    ),
    (
        "containerregistry:Registry",
        {**IN_GROUP, "registryName": "registry", "sku": {"name": "Premium"}, "adminUserEnabled": False},
    ),
    (
        "containerregistry:Task",
        {
            **IN_GROUP,
            "registryName": "registry",
            "taskName": "train",
            "platform": {"os": "Linux", "architecture": "amd64"},
            "step": {"type": "EncodedTask", "encodedTaskContent": "dmVyc2lvbg=="},
        },
    ),
    (
        "containerregistry:TaskRun",
        {
            **IN_GROUP,
            "registryName": "registry",
            "taskRunName": "train-1",
            "runRequest": {
                "type": "EncodedTaskRunRequest",
                "encodedTaskContent": "eA==",
                "platform": {"os": "Linux"},
            },
        },
    ),
    (
        "resources:Deployment",
        {
            **IN_GROUP,
            "deploymentName": "registry-tasks",
            "properties": {
                "mode": "Incremental",
                "template": {
                    "$schema": "https://schema.management.azure.com/schemas/2019-04-01/deploymentTemplate.json#",
                    "contentVersion": "1.0.0.0",
                    "resources": [
                        {
                            "type": "Microsoft.ContainerRegistry/registries",
                            "apiVersion": "2025-11-01",
                            "name": "registry",
                            "location": "swedencentral",
                            "sku": {"name": "Premium"},
                            "properties": {"adminUserEnabled": False, "networkRuleBypassAllowedForTasks": True},
                        }
                    ],
                },
            },
        },
    ),
    (
        "consumption:Budget",
        {
            "scope": GROUP_ID,
            "budgetName": "month",
            "amount": 100,
            "category": "Cost",
            "timeGrain": "Monthly",
            "timePeriod": {"startDate": "2026-11-01T00:00:00Z", "endDate": "2031-11-01T00:00:00Z"},
            "notifications": {
                "half": {
                    "enabled": True,
                    "operator": "GreaterThanOrEqualTo",
                    "threshold": 50,
                    "thresholdType": "Actual",
                    "contactEmails": ["one@example.org"],
                    "contactGroups": [f"{INSIGHTS}/actionGroups/owners"],
                }
            },
        },
    ),
]


@pytest.fixture
def engine(tmp_path: Path) -> Iterator[Engine]:
    server, port = serve.served(AzureProvider(serve.arm_in(tmp_path)))
    made = Engine(port, tmp_path)
    yield made
    made.channel.close()
    server.stop(None).wait()


def test_every_known_type_is_made_and_read_back_without_a_difference(engine: Engine) -> None:
    assert {f"azure-native:{token}" for token, _ in RESOURCES} == set(TYPES)
    drifted = []
    for token, inputs in RESOURCES:
        name = token.rsplit(":", 1)[1].lower()
        resource_id, checked, outputs = engine.create(f"azure-native:{token}", name, **inputs)
        read = engine.read(f"azure-native:{token}", name, resource_id, checked, outputs)
        if read != (checked, outputs):
            drifted.append(token)
        again = engine.diff(f"azure-native:{token}", checked)
        assert again == ([], []), token
    assert drifted == []


def test_a_template_that_states_a_resource_again_changes_what_it_leaves_out(engine: Engine) -> None:
    engine.create("azure-native:resources:ResourceGroup", "rg", **IN_GROUP)
    registry = {**IN_GROUP, "registryName": "registry", "sku": {"name": "Premium"}, "adminUserEnabled": False}
    token = "azure-native:containerregistry:Registry"
    resource_id, inputs, outputs = engine.create(token, "acr", **registry, tags={"owner": "ml"})
    token_and_inputs = next(entry for entry in RESOURCES if entry[0] == "resources:Deployment")
    engine.create("azure-native:resources:Deployment", "tasks", **token_and_inputs[1])
    refreshed, _ = engine.read(token, "acr", resource_id, inputs, outputs)
    assert refreshed == {name: value for name, value in inputs.items() if name != "tags"}
