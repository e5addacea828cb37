"""The ARM resource types that the stand-in knows, as data: paths, names, what cannot change, what depends on what.

Names and lengths: "Naming rules and restrictions for Azure resources" (Microsoft Learn, as of 2026-08). What replaces
a resource: `forceNewMap` of pulumi-azure-native's generator and `x-ms-mutability` of the specifications (as of 3.29);
what ARM itself refuses to change (`create_only`): the reference page of each type. The provider sends those changes,
ARM says no.
"""

from standin.arm_types import ArmType

GROUP = "/subscriptions/{subscriptionId}/resourceGroups/{resourceGroupName}"
UUID = r"[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}"


def _provider(tail: str) -> str:
    return f"{GROUP}/providers/Microsoft.{tail}"


def _networks(length: int) -> str:
    return rf"[A-Za-z0-9]([\w.-]{{0,{length - 2}}}\w)?"


_CLUSTER = _provider("ContainerService/managedClusters/{resourceName}")
_ACCOUNT = _provider("Storage/storageAccounts/{accountName}")
_REGISTRY = _provider("ContainerRegistry/registries/{registryName}")
_FREE_NAME = r"[^:<>+/&%\\?|#*]{0,259}[^:<>+/&%\\?|#*. ]"

_TYPES = [
    ArmType(
        "azure-native:resources:ResourceGroup",
        GROUP,
        "resource.resources.models.ResourceGroup",
        r"[-\w.()]{0,89}[-\w()]",
        "1-90 letters, digits, '-', '_', '.' and parentheses, not ending with '.'",
        force_new=frozenset({"location"}),
        asynchronous=False,
    ),
    ArmType(
        "azure-native:resources:Deployment",
        _provider("Resources/deployments/{deploymentName}"),
        "resource.deployments.models.Deployment",
        r"[-\w.()]{1,64}",
        "1-64 letters, digits, '-', '_', '.' and parentheses",
        write_only=("properties.template", "properties.parameters"),
        location="none",
        asynchronous=True,
    ),
    ArmType(
        "azure-native:network:VirtualNetwork",
        _provider("Network/virtualNetworks/{virtualNetworkName}"),
        "network.models.VirtualNetwork",
        _networks(64),
        "2-64 letters, digits, '_', '.' and '-'",
        force_new=frozenset({"location"}),
        maintain=("subnets", "virtualNetworkPeerings"),
        defaults={"enableDdosProtection": False, "privateEndpointVNetPolicies": "Disabled"},
        exclusive="own",
        asynchronous=True,
    ),
    ArmType(
        "azure-native:network:Subnet",
        _provider("Network/virtualNetworks/{virtualNetworkName}/subnets/{subnetName}"),
        "network.models.Subnet",
        _networks(80),
        "1-80 letters, digits, '_', '.' and '-'",
        defaults={"privateEndpointNetworkPolicies": "Disabled", "privateLinkServiceNetworkPolicies": "Enabled"},
        exclusive="parent",
        asynchronous=True,
    ),
    ArmType(
        "azure-native:network:NetworkSecurityGroup",
        _provider("Network/networkSecurityGroups/{networkSecurityGroupName}"),
        "network.models.NetworkSecurityGroup",
        _networks(80),
        "1-80 letters, digits, '_', '.' and '-'",
        maintain=("securityRules",),
        asynchronous=True,
    ),
    ArmType(
        "azure-native:network:PrivateEndpoint",
        _provider("Network/privateEndpoints/{privateEndpointName}"),
        "network.models.PrivateEndpoint",
        _networks(64),
        "2-64 letters, digits, '_', '.' and '-'",
        force_new=frozenset({"subnet"}),
        create_only=frozenset({"privateLinkServiceConnections"}),
        asynchronous=True,
    ),
    ArmType(
        "azure-native:network:PrivateDnsZoneGroup",
        _provider("Network/privateEndpoints/{privateEndpointName}/privateDnsZoneGroups/{privateDnsZoneGroupName}"),
        "network.models.PrivateDnsZoneGroup",
        _networks(80),
        "1-80 letters, digits, '_', '.' and '-'",
        asynchronous=True,
    ),
    ArmType(
        "azure-native:privatedns:PrivateZone",
        _provider("Network/privateDnsZones/{privateZoneName}"),
        "privatedns.models.PrivateZone",
        r"(?=.{1,63}$|.{1,253}$)[a-z0-9_-]{1,63}(\.[a-z0-9_-]{1,63}){1,33}",
        "2-34 labels of 1-63 lower-case letters, digits, '_' and '-', joined by dots",
        force_new=frozenset({"location"}),
        location="global",
        asynchronous=True,
    ),
    ArmType(
        "azure-native:privatedns:VirtualNetworkLink",
        _provider("Network/privateDnsZones/{privateZoneName}/virtualNetworkLinks/{virtualNetworkLinkName}"),
        "privatedns.models.VirtualNetworkLink",
        _networks(80),
        "1-80 letters, digits, '_', '.' and '-'",
        force_new=frozenset({"location"}),
        create_only=frozenset({"virtualNetwork"}),
        location="global",
        asynchronous=True,
    ),
    ArmType(
        "azure-native:managedidentity:UserAssignedIdentity",
        _provider("ManagedIdentity/userAssignedIdentities/{resourceName}"),
        "msi.v2023_01_31.models.Identity",
        r"[A-Za-z0-9][\w-]{2,127}",
        "3-128 letters, digits, '_' and '-', starting with a letter or digit",
        force_new=frozenset({"location"}),
    ),
    ArmType(
        "azure-native:managedidentity:FederatedIdentityCredential",
        _provider(
            "ManagedIdentity/userAssignedIdentities/{resourceName}"
            "/federatedIdentityCredentials/{federatedIdentityCredentialResourceName}"
        ),
        "msi.v2023_01_31.models.FederatedIdentityCredential",
        r"[A-Za-z0-9][\w-]{2,119}",
        "3-120 letters, digits, '_' and '-', starting with a letter or digit",
        exclusive="parent",
    ),
    ArmType(
        "azure-native:authorization:RoleAssignment",
        "/{scope}/providers/Microsoft.Authorization/roleAssignments/{roleAssignmentName}",
        "authorization.v2022_04_01.models.RoleAssignmentCreateParameters",
        UUID,
        "a GUID",
        force_new=frozenset({"principalId", "scope"}),
        create_only=frozenset({"roleDefinitionId", "principalType"}),
    ),
    ArmType(
        "azure-native:containerservice:ManagedCluster",
        _CLUSTER,
        "containerservice.models.ManagedCluster",
        r"[A-Za-z0-9]([\w-]{0,61}[A-Za-z0-9])?",
        "1-63 letters, digits, '_' and '-', starting and ending with a letter or digit",
        force_new=frozenset(
            {"diskEncryptionSetID", "dnsPrefix", "fqdnSubdomain", "linuxProfile", "location", "nodeResourceGroup"}
            | {"windowsProfile"}
            | {f"networkProfile.{name}" for name in ("serviceCidr", "serviceCidrs", "dnsServiceIP", "networkMode")}
            | {f"networkProfile.{name}" for name in ("networkPlugin", "networkPluginMode", "podCidr")}
            | {f"networkProfile.{name}" for name in ("networkDataplane", "networkPolicy", "outboundType")}
        ),
        create_only=frozenset(
            {"apiServerAccessProfile.enablePrivateCluster", "apiServerAccessProfile.privateDNSZone", "enableRBAC"}
        ),
        defaults={
            "enableRBAC": True,
            "supportPlan": "KubernetesOfficial",
            "nodeResourceGroupProfile": {"restrictionLevel": "Unrestricted"},
        },
        exclusive="own",
        asynchronous=True,
    ),
    ArmType(
        "azure-native:containerservice:AgentPool",
        f"{_CLUSTER}/agentPools/{{agentPoolName}}",
        "containerservice.models.AgentPool",
        r"[a-z][a-z0-9]{0,11}",
        "1-12 lower-case letters and digits, starting with a letter",
        force_new=frozenset({"gpuInstanceProfile", "vmSize", "networkProfile.nodePublicIPTags"}),
        create_only=frozenset(
            {"scaleSetPriority", "scaleSetEvictionPolicy", "spotMaxPrice", "gpuProfile.driver", "osDiskType"}
            | {"osDiskSizeGB", "osType", "maxPods", "vnetSubnetID", "podSubnetID", "availabilityZones", "type"}
            | {"enableUltraSSD", "enableEncryptionAtHost", "nodePublicIPPrefixID", "kubeletDiskType"}
            | {"proximityPlacementGroupID", "capacityReservationGroupID", "hostGroupID"}
        ),
        defaults={
            "enableFIPS": False,
            "kubeletDiskType": "OS",
            "mode": "User",
            "osDiskSizeGB": 128,
            "osSKU": "Ubuntu",
            "osType": "Linux",
            "powerState": {"code": "Running"},
            "scaleDownMode": "Delete",
            "type": "VirtualMachineScaleSets",
            "workloadRuntime": "OCIContainer",
        },
        exclusive="parent",
        asynchronous=True,
    ),
    ArmType(
        "azure-native:containerservice:MaintenanceConfiguration",
        f"{_CLUSTER}/maintenanceConfigurations/{{configName}}",
        "containerservice.models.MaintenanceConfiguration",
        r"default|aksManagedAutoUpgradeSchedule|aksManagedNodeOSUpgradeSchedule",
        "default, aksManagedAutoUpgradeSchedule or aksManagedNodeOSUpgradeSchedule",
    ),
    ArmType(
        "azure-native:storage:StorageAccount",
        _ACCOUNT,
        "storage.models.StorageAccountCreateParameters",
        r"[a-z0-9]{3,24}",
        "3-24 lower-case letters and digits",
        force_new=frozenset({"isHnsEnabled", "location"}),
        create_only=frozenset({"enableNfsV3", "encryption.requireInfrastructureEncryption", "dnsEndpointType"}),
        defaults={"accessTier": "Hot", "enableHttpsTrafficOnly": True, "minimumTlsVersion": "TLS1_2"},
        asynchronous=True,
    ),
    ArmType(
        "azure-native:storage:BlobServiceProperties",
        f"{_ACCOUNT}/blobServices/{{blobServicesName}}",
        "storage.models.BlobServiceProperties",
        "default",
        "default",
        singleton=True,
    ),
    ArmType(
        "azure-native:storage:BlobContainer",
        f"{_ACCOUNT}/blobServices/default/containers/{{containerName}}",
        "storage.models.BlobContainer",
        r"\$web|\$root|(?=.{3,63}$)[a-z0-9]+(-[a-z0-9]+)*",
        "3-63 lower-case letters, digits and single '-'",
        defaults={"defaultEncryptionScope": "$account-encryption-key", "denyEncryptionScopeOverride": False},
    ),
    ArmType(
        "azure-native:storage:ManagementPolicy",
        f"{_ACCOUNT}/managementPolicies/{{managementPolicyName}}",
        "storage.models.ManagementPolicy",
        "default",
        "default",
    ),
    ArmType(
        "azure-native:keyvault:Vault",
        _provider("KeyVault/vaults/{vaultName}"),
        "keyvault.models.VaultCreateOrUpdateParameters",
        r"(?!.*--)[A-Za-z][A-Za-z0-9-]{1,22}[A-Za-z0-9]",
        "3-24 letters, digits and single '-', starting with a letter, ending with a letter or digit",
        create_only=frozenset({"properties.softDeleteRetentionInDays"}),
        maintain=("properties.accessPolicies",),
        defaults={"properties": {"enableSoftDelete": True, "softDeleteRetentionInDays": 90}},
        asynchronous=True,
    ),
    ArmType(
        "azure-native:keyvault:Secret",
        _provider("KeyVault/vaults/{vaultName}/secrets/{secretName}"),
        "keyvault.models.SecretCreateOrUpdateParameters",
        r"[A-Za-z0-9-]{1,127}",
        "1-127 letters, digits and '-'",
        write_only=("properties.value",),
    ),
    ArmType(
        "azure-native:containerregistry:Registry",
        _REGISTRY,
        "containerregistry.v2023_01_01_preview.models.Registry",
        r"[A-Za-z0-9]{5,50}",
        "5-50 letters and digits",
        force_new=frozenset({"location", "encryption"}),
        defaults={"adminUserEnabled": False, "publicNetworkAccess": "Enabled", "zoneRedundancy": "Disabled"},
        asynchronous=True,
    ),
    ArmType(
        "azure-native:containerregistry:Task",
        f"{_REGISTRY}/tasks/{{taskName}}",
        "containerregistry.v2019_06_01_preview.models.Task",
        r"[\w-]{5,50}",
        "5-50 letters, digits, '_' and '-'",
        force_new=frozenset({"location"}),
        asynchronous=True,
    ),
    ArmType(
        "azure-native:containerregistry:TaskRun",
        f"{_REGISTRY}/taskRuns/{{taskRunName}}",
        "containerregistry.v2019_06_01_preview.models.TaskRun",
        r"[\w-]{5,50}",
        "5-50 letters, digits, '_' and '-'",
        asynchronous=True,
    ),
    ArmType(
        "azure-native:operationalinsights:Workspace",
        _provider("OperationalInsights/workspaces/{workspaceName}"),
        "loganalytics.models.Workspace",
        r"[A-Za-z0-9][A-Za-z0-9-]{2,61}[A-Za-z0-9]",
        "4-63 letters, digits and '-', starting and ending with a letter or digit",
        force_new=frozenset({"location"}),
        defaults={"retentionInDays": 30, "sku": {"name": "PerGB2018"}},
        asynchronous=True,
    ),
    ArmType(
        "azure-native:monitor:AzureMonitorWorkspace",
        _provider("Monitor/accounts/{azureMonitorWorkspaceName}"),
        "monitor.v2021_06_03_preview.models.AzureMonitorWorkspaceResource",
        r"(?!-)[A-Za-z0-9-]{3,43}[A-Za-z0-9]",
        "4-44 letters, digits and '-', not starting or ending with '-'",
        force_new=frozenset({"location"}),
        beyond_model=frozenset({"publicNetworkAccess"}),
        defaults={"publicNetworkAccess": "Enabled"},
    ),
    ArmType(
        "azure-native:monitor:DataCollectionEndpoint",
        _provider("Insights/dataCollectionEndpoints/{dataCollectionEndpointName}"),
        "monitor.v2022_06_01.models.DataCollectionEndpointResource",
        r"[A-Za-z0-9][\w.-]{1,42}[A-Za-z0-9]",
        "3-44 letters, digits, '_', '.' and '-', starting and ending with a letter or digit",
        force_new=frozenset({"location"}),
    ),
    ArmType(
        "azure-native:monitor:DataCollectionRule",
        _provider("Insights/dataCollectionRules/{dataCollectionRuleName}"),
        "monitor.v2022_06_01.models.DataCollectionRuleResource",
        r"[A-Za-z0-9][\w.-]{0,62}[A-Za-z0-9]",
        "2-64 letters, digits, '_', '.' and '-', starting and ending with a letter or digit",
        force_new=frozenset({"location"}),
        create_only=frozenset({"kind"}),
    ),
    ArmType(
        "azure-native:monitor:DataCollectionRuleAssociation",
        "/{resourceUri}/providers/Microsoft.Insights/dataCollectionRuleAssociations/{associationName}",
        "monitor.v2022_06_01.models.DataCollectionRuleAssociationProxyOnlyResource",
        _FREE_NAME,
        "1-260 characters without : < > + / & % \\ ? |",
    ),
    ArmType(
        "azure-native:monitor:DiagnosticSetting",
        "/{resourceUri}/providers/Microsoft.Insights/diagnosticSettings/{name}",
        "monitor.v2021_05_01_preview.models.DiagnosticSettingsResource",
        _FREE_NAME,
        "1-260 characters without : < > + / & % \\ ? |",
    ),
    ArmType(
        "azure-native:monitor:ActionGroup",
        _provider("Insights/actionGroups/{actionGroupName}"),
        "monitor.v2023_01_01.models.ActionGroupResource",
        _FREE_NAME,
        "1-260 characters without : < > + / & % \\ ? |, not ending with a space or dot",
        force_new=frozenset({"location"}),
        beyond_model=frozenset({"identity", "incidentReceivers"}),
        defaults={"enabled": True},
        location="any",
    ),
    ArmType(
        "azure-native:alertsmanagement:PrometheusRuleGroup",
        _provider("AlertsManagement/prometheusRuleGroups/{ruleGroupName}"),
        "alertsmanagement.models.PrometheusRuleGroupResource",
        _FREE_NAME,
        "1-260 characters without : < > + / & % \\ ? |",
        force_new=frozenset({"location"}),
        defaults={"enabled": True},
    ),
    ArmType(
        "azure-native:dashboard:Grafana",
        _provider("Dashboard/grafana/{workspaceName}"),
        "dashboard.models.ManagedGrafana",
        r"[A-Za-z][A-Za-z0-9-]{0,21}[A-Za-z0-9]",
        "2-23 letters, digits and '-', starting with a letter, ending with a letter or digit",
        force_new=frozenset({"location"}),
        asynchronous=True,
    ),
    ArmType(
        "azure-native:consumption:Budget",
        "/{scope}/providers/Microsoft.Consumption/budgets/{budgetName}",
        "consumption.models.Budget",
        r"[\w-]{1,63}",
        "1-63 letters, digits, '_' and '-'",
        create_only=frozenset({"timeGrain", "category"}),
    ),
]

TYPES: dict[str, ArmType] = {one.token: one for one in _TYPES}
