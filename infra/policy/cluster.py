"""Rules for the AKS cluster: who may reach it, what guards it, how it is kept up to date."""

from __future__ import annotations

from collections.abc import Sequence

from infra.policy.links import unlogged
from infra.policy.nouns import UNKNOWN, Book, Context, Fault, Recorded, at, listed, of_kind, says

CLUSTER = "containerservice:ManagedCluster"

cluster = Book("cluster")

cluster.wants(
    CLUSTER,
    "disableLocalAccounts",
    [True],
    "no-local-accounts",
    "nobody is let into the cluster but by Entra ID",
    "high",
    "CKV_AZURE_141",
    "Azure.AKS.LocalAccounts",
    "993c2fcd",
    otherwise="a certificate opens the cluster whatever Entra ID says: set disable_local_accounts to True",
)


@cluster.each(
    CLUSTER,
    "entra-id",
    "Entra ID says who one is, and Azure roles what one may do",
    "high",
    "Azure.AKS.ManagedAAD",
    "Azure.AKS.AzureRBAC",
    "450d2877",
)
def entra_id(resource: Recorded, _: Context) -> str | None:
    profile = at(resource.inputs, "aadProfile")
    if says(at(profile, "managed"), True) and says(at(profile, "enableAzureRBAC"), True):
        return None
    return "Azure's roles do not count in it: set aad_profile to managed with enable_azure_rbac"


cluster.wants(
    CLUSTER,
    "enableRBAC",
    [True],
    "kubernetes-rbac",
    "the cluster asks who may do what",
    "high",
    "CKV_AZURE_5",
    "Azure.AKS.UseRBAC",
    otherwise="whoever is in may do everything: set enable_rbac to True",
)


@cluster.each(
    CLUSTER,
    "workload-identity",
    "pods are identities of their own, without passwords",
    "high",
    "2cc2e023",
)
def workload_identity(resource: Recorded, _: Context) -> str | None:
    for path in ("oidcIssuerProfile.enabled", "securityProfile.workloadIdentity.enabled"):
        if not says(at(resource.inputs, path), True):
            return "pods would need passwords: enable oidc_issuer_profile and workload_identity"
    return None


cluster.wants(
    CLUSTER,
    "networkProfile.networkPolicy",
    ["cilium", "azure", "calico"],
    "network-policy",
    "rules between pods are enforced",
    "high",
    "CKV_AZURE_7",
    "Azure.AKS.NetworkPolicy",
    otherwise="every pod may talk to every other: set network_policy to cilium",
)
cluster.wants(
    CLUSTER,
    "networkProfile.networkPlugin",
    ["azure"],
    "azure-cni",
    "pods have addresses by Azure CNI",
    "medium",
    "CKV2_AZURE_29",
    "Azure.AKS.CNISubnetSize",
    "46238e2f",
    otherwise="kubenet comes to its end: set network_plugin to azure, mode overlay",
)
cluster.wants(
    CLUSTER,
    "networkProfile.loadBalancerSku",
    ["standard"],
    "standard-load-balancer",
    "the load balancer is of the Standard tier",
    "medium",
    "Azure.AKS.StandardLB",
    "Azure.LB.StandardSKU",
    otherwise="the Basic load balancer is no longer supported: set load_balancer_sku to standard",
)


@cluster.each(
    CLUSTER,
    "api-addresses",
    "only known addresses may call the cluster's API",
    "high",
    "CKV_AZURE_6",
    "Azure.AKS.AuthorizedIPs",
)
def api_addresses(resource: Recorded, _: Context) -> str | None:
    ranges = listed(at(resource.inputs, "apiServerAccessProfile.authorizedIPRanges"))
    if not ranges:
        return "every address may call the API: name yours in the intent (access.authorized_ip_ranges)"
    if any(str(one).endswith("/0") for one in ranges):
        return "a range of the API's addresses is everybody: narrow access.authorized_ip_ranges in the intent"
    return None


cluster.wants(
    CLUSTER,
    "apiServerAccessProfile.enablePrivateCluster",
    [True],
    "private-cluster",
    "the cluster's API has no public address",
    "medium",
    "CKV_AZURE_115",
    "040732e8",
    otherwise="the API has a public address: set access.private_cluster in the intent",
)
cluster.wants(
    CLUSTER,
    "apiServerAccessProfile.disableRunCommand",
    [True],
    "no-run-command",
    "nobody runs commands in the cluster through Azure's portal",
    "medium",
    "89f2d532",
    otherwise="`az aks command invoke` goes round every address rule: set disable_run_command to True",
)
cluster.wants(
    CLUSTER,
    "autoUpgradeProfile.upgradeChannel",
    ["patch", "stable", "rapid"],
    "upgrade-channel",
    "patches of Kubernetes come by themselves",
    "medium",
    "CKV_AZURE_171",
    "Azure.AKS.AutoUpgrade",
    "5c345cdf",
    otherwise="nobody patches Kubernetes: set upgrade_channel to patch",
)
cluster.wants(
    CLUSTER,
    "autoUpgradeProfile.nodeOSUpgradeChannel",
    ["NodeImage", "SecurityPatch"],
    "node-image-channel",
    "patches of the nodes come by themselves",
    "medium",
    "04408ca5",
    otherwise="nobody patches the nodes: set node_os_upgrade_channel to NodeImage",
)
cluster.wants(
    CLUSTER,
    "addonProfiles.azurepolicy.enabled",
    [True],
    "policy-add-on",
    "Azure Policy reaches into the cluster",
    "medium",
    "CKV_AZURE_116",
    "Azure.AKS.AzurePolicyAddOn",
    "0a15ec92",
    otherwise="Azure Policy ends at the cluster's door: enable the azurepolicy add-on",
)


@cluster.each(
    CLUSTER,
    "secret-store",
    "pods mount secrets from the vault, and new versions arrive",
    "medium",
    "CKV_AZURE_172",
    "Azure.AKS.SecretStore",
    "Azure.AKS.SecretStoreRotation",
)
def secret_store(resource: Recorded, _: Context) -> str | None:
    add_on = at(resource.inputs, "addonProfiles.azureKeyvaultSecretsProvider")
    if not says(at(add_on, "enabled"), True):
        return "secrets cannot be mounted from the vault: enable the azureKeyvaultSecretsProvider add-on"
    if not says(at(add_on, "config.enableSecretRotation"), "true"):
        return 'a new version of a secret never arrives: set enableSecretRotation to "true"'
    return None


cluster.wants(
    CLUSTER,
    "securityProfile.imageCleaner.enabled",
    [True],
    "image-cleaner",
    "images with holes that nobody uses leave the nodes",
    "low",
    "af3c26b2",
    otherwise="old images stay on the nodes: enable the image cleaner",
)
cluster.wants(
    CLUSTER,
    "securityProfile.defender.securityMonitoring.enabled",
    [True],
    "defender",
    "Microsoft Defender watches the cluster",
    "medium",
    "Azure.AKS.DefenderProfile",
    "Azure.Defender.Containers",
    "a1840de2",
    otherwise="nobody watches what runs in it: enable Defender (cluster.defender in the intent)",
)
cluster.wants(
    CLUSTER,
    "sku.tier",
    ["Standard", "Premium"],
    "paid-tier",
    "the control plane has an SLA",
    "medium",
    "CKV_AZURE_170",
    "Azure.AKS.UptimeSLA",
    otherwise="the Free tier has no SLA: set cluster.tier to standard in the intent",
)
cluster.wants(
    CLUSTER,
    "azureMonitorProfile.metrics.enabled",
    [True],
    "cluster-metrics",
    "Azure Monitor collects the cluster's metrics",
    "medium",
    "CKV_AZURE_4",
    "Azure.AKS.ContainerInsights",
    otherwise="no metric is kept: enable azure_monitor_profile's metrics",
)


@cluster.over(
    "cluster-logs",
    "what is changed in the cluster and why machines came and went is logged",
    "medium",
    "CKV_AZURE_4",
    "Azure.AKS.AuditLogs",
    "Azure.AKS.PlatformLogs",
    "245fc9df",
)
def cluster_logs(resources: Sequence[Recorded], _: Context) -> list[Fault]:
    categories = ("kube-audit-admin", "kube-controller-manager", "cluster-autoscaler", "guard")
    return unlogged(resources, CLUSTER, categories, ("allLogs",))


cluster.wants(
    CLUSTER,
    "identity.type",
    ["UserAssigned"],
    "managed-identity",
    "the cluster is an identity without a password, which outlives it",
    "medium",
    "Azure.AKS.ManagedIdentity",
    "da6e2401",
    otherwise="the cluster's identity needs a password or dies with it: give it a user-assigned one",
)


@cluster.each(
    CLUSTER,
    "no-legacy-add-ons",
    "neither the dashboard nor the HTTP router of old is on",
    "high",
    "CKV_AZURE_8",
    "Azure.AKS.HttpAppRouting",
)
def no_legacy_add_ons(resource: Recorded, _: Context) -> str | None:
    for name in ("kubeDashboard", "httpApplicationRouting"):
        profile = at(resource.inputs, f"addonProfiles.{name}")
        if profile not in (None, UNKNOWN) and not says(at(profile, "enabled"), False, None):
            return f"the add-on {name} is on, which nobody maintains: take it out"
    return None


@cluster.each(
    CLUSTER,
    "cluster-as-planned",
    "tier and version of Kubernetes are the plan's",
    "medium",
    "Azure.AKS.Version",
    "Azure.AKS.PoolVersion",
)
def cluster_as_planned(resource: Recorded, context: Context) -> str | None:
    version, wanted = at(resource.inputs, "kubernetesVersion"), context.lock.platform.kubernetes_version
    if version != UNKNOWN and version != wanted and not str(version).startswith(f"{wanted}."):
        return f"Kubernetes {version} is not the plan's {wanted}: take kubernetes_version from the plan"
    tier = str(context.lock.around.cluster.tier)
    if not says(at(resource.inputs, "sku.tier"), tier):
        return f"the bill counts the {tier} tier: take sku.tier from the plan"
    return None


@cluster.over("maintenance-window", "upgrades wait for the window that the intent names", "low")
def maintenance_window(resources: Sequence[Recorded], _: Context) -> list[Fault]:
    windows = {
        urn for one in of_kind(resources, "containerservice:MaintenanceConfiguration") for urn in one.dependencies
    }
    return [
        (one, "upgrades may come at any hour: give it a MaintenanceConfiguration")
        for one in of_kind(resources, CLUSTER)
        if one.urn not in windows
    ]


cluster.wants(
    CLUSTER,
    "securityProfile.azureKeyVaultKms.enabled",
    [True],
    "etcd-own-key",
    "the cluster's state is encrypted with a key of one's own",
    "low",
    "dbbdc317",
    otherwise="Microsoft keeps the key of the cluster's state: set azure_key_vault_kms",
)


@cluster.each(
    CLUSTER,
    "disk-own-key",
    "the nodes' disks are encrypted with a key of one's own",
    "low",
    "CKV_AZURE_117",
    "7d7be79c",
)
def disk_own_key(resource: Recorded, _: Context) -> str | None:
    if at(resource.inputs, "diskEncryptionSetID"):
        return None
    return "Microsoft keeps the key of the nodes' disks: set disk_encryption_set_id"


RULES = tuple(cluster.rules)
