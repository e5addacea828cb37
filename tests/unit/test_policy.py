"""Each rule of the policy: a stack that does everything right, and for each rule a change that breaks it."""

from __future__ import annotations

import contextlib
import copy
import json
import os
import re
import subprocess
import sys
import typing
from collections.abc import Callable, Iterator
from decimal import Decimal
from typing import Any, NamedTuple

import grpc
import pulumi_azure_native
import pytest
from google.protobuf import empty_pb2
from locks import ROOT, planned, served
from pulumi._types import input_type_types, is_input_type
from pulumi.runtime.proto import analyzer_pb2, analyzer_pb2_grpc

from infra.policy import RULES, SECRET, UNKNOWN, Context, Finding, Recorded, check, policy_table
from infra.policy.excuses import EXCUSES, NOT_ASKED
from infra.policy.network import TAGLESS
from planner.errors import PlannerError
from planner.plan import Intent
from planner.plan.lock import Lock, LockedPool
from planner.plan.lock import _digest as digest_of

STACK = "prod-test"
POOL = LockedPool(
    name="t4spot",
    sku="Standard_NC4as_T4_v3",
    gpu="t4",
    gpus_per_node=1,
    priority="spot",
    min_nodes=1,
    max_nodes=2,
    workloads=("serve",),
    usd_per_month=Decimal(100),
    vcpus_per_node=4,
    ram_gib_per_node=28,
    quota_family="Standard NCASv3_T4 Family",
    os_disk_type="Ephemeral",
    os_disk_gib=128,
    driver="Install",
    max_surge=0,
    supports_bf16=False,
)
OTHER = POOL.model_copy(update={"name": "a10", "priority": "on-demand", "workloads": ("chat",)})
TAGS = {
    "project": "tonnage",
    "stack": STACK,
    "environment": "prod",
    "managed-by": "pulumi",
    "owner": "ml",
}


def context(posture: str = "prod", exceptions: dict[str, str] | None = None, **lock_fields: Any) -> Context:
    """A plan of one spot pool for one server that always runs, at 900 of 1,000 USD a month."""
    intent, lock = _plan(posture)
    fields = {
        "pools": (POOL,),
        "workloads": (lock.workloads[0].model_copy(update={"name": "serve", "pool": "t4spot", "schedule": "always"}),),
        "usd": Decimal(900),
        "approved_usd_per_month": Decimal(1000),
        # two machines of 4 vCPUs, all spot
        "quota": {"Total Regional Spot vCPUs": 8},
    }
    return Context(
        lock.model_copy(update=fields | lock_fields),
        intent.model_copy(update={"exceptions": exceptions or {}}),
        STACK,
    )


PLANS: dict[str, tuple[Intent, Lock]] = {}


def _plan(posture: str) -> tuple[Intent, Lock]:
    if posture not in PLANS:
        PLANS[posture] = planned(served(posture=posture, tags={"owner": "ml"}))
    return PLANS[posture]


def azure(
    kind: str, name: str, *after: str, protect: bool = False, ignore: tuple[str, ...] = (), **inputs: Any
) -> Recorded:
    return Recorded(
        f"azure-native:{kind}",
        name,
        urn(name),
        "",
        inputs,
        tuple(urn(one) for one in after),
        protect=protect,
        ignore_changes=ignore,
    )


def urn(name: str) -> str:
    return f"urn:pulumi:{STACK}::tonnage::any::{name}"


def kube(kind: str, name: str, namespace: str | None = "tonnage", logical: str = "", **fields: Any) -> Recorded:
    metadata = {"name": name, **({"namespace": namespace} if namespace else {}), **fields.pop("metadata", {})}
    logical = logical or f"{kind.rpartition(':')[2].lower()}-{name}"
    return Recorded(f"kubernetes:{kind}", logical, urn(logical), "", {"metadata": metadata, **fields})


def endpoint(group: str, target: str) -> Recorded:
    connection = {"name": group, "groupIds": [group], "privateLinkServiceId": UNKNOWN}
    name = f"{group}-endpoint"
    return azure("network:PrivateEndpoint", name, target, privateLinkServiceConnections=[connection], tags=TAGS)


def logs(name: str, target: str, *categories: str) -> Recorded:
    listed = [{"category": one, "enabled": True} for one in categories]
    return azure("monitor:DiagnosticSetting", name, target, resourceUri=UNKNOWN, logs=listed)


def alert(kind: str, percent: int) -> dict[str, Any]:
    return {
        "enabled": True,
        "operator": "GreaterThanOrEqualTo",
        "threshold": percent,
        "thresholdType": kind,
        "contactEmails": [],
        "contactRoles": ["Owner"],
    }


TOLERATIONS = [
    {"key": "sku", "operator": "Equal", "value": "gpu", "effect": "NoSchedule"},
    {"key": "kubernetes.azure.com/scalesetpriority", "operator": "Exists"},
]


def pod(image: str, *, gpus: int = 0, **spec: Any) -> dict[str, Any]:
    resources = {"requests": {"cpu": "1", "memory": "2Gi"}, "limits": {"memory": "2Gi"}}
    if gpus:
        resources["limits"]["nvidia.com/gpu"] = str(gpus)
    return {
        "automountServiceAccountToken": False,
        "securityContext": {"runAsNonRoot": True, "runAsUser": 1000, "seccompProfile": {"type": "RuntimeDefault"}},
        "containers": [
            {
                "name": "main",
                "image": image,
                "resources": resources,
                "securityContext": {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}},
            }
        ],
        "tolerations": copy.deepcopy(TOLERATIONS),
        **spec,
    }


def stopping(spec: dict[str, Any]) -> dict[str, Any]:
    """A server's pod, which takes requests for 15 s more, 91 s for the longest answer, and some to let go."""
    spec["containers"][0] |= {
        "args": ["--shutdown-timeout=91"],
        "lifecycle": {"preStop": {"sleep": {"seconds": 15}}},
    }
    return spec | {"terminationGracePeriodSeconds": 116}


def images() -> dict[str, str]:
    return _plan("prod")[1].platform.images


def on(pools: list[str]) -> dict[str, Any]:
    term = {"matchExpressions": [{"key": "kubernetes.azure.com/agentpool", "operator": "In", "values": pools}]}
    required = {"nodeSelectorTerms": [term]}
    return {"nodeAffinity": {"requiredDuringSchedulingIgnoredDuringExecution": required}}


LABELS = {"app.kubernetes.io/instance": "serve", "azure.workload.identity/use": "true"}


def good() -> dict[str, Recorded]:
    """A stack that does all that the rules ask, also what the product itself is excused from. By logical name."""
    kubernetes_version = _plan("prod")[1].platform.kubernetes_version
    made = [
        azure("resources:ResourceGroup", "group", tags=TAGS),
        azure("network:VirtualNetwork", "network", tags=TAGS),
        azure(
            "network:NetworkSecurityGroup",
            "guard",
            tags=TAGS,
            securityRules=[
                {
                    "name": "inside",
                    "direction": "Inbound",
                    "access": "Allow",
                    "sourceAddressPrefix": "VirtualNetwork",
                    "destinationPortRange": "*",
                },
                {"name": "outside", "direction": "Inbound", "access": "Deny", "sourceAddressPrefix": "*"},
            ],
        ),
        azure("network:Subnet", "nodes", networkSecurityGroup={"id": UNKNOWN}),
        azure(
            "storage:StorageAccount",
            "account",
            protect=True,
            tags=TAGS,
            allowBlobPublicAccess=False,
            allowSharedKeyAccess=False,
            enableHttpsTrafficOnly=True,
            minimumTlsVersion="TLS1_2",
            networkRuleSet={"defaultAction": "Deny", "bypass": "AzureServices", "virtualNetworkRules": []},
            publicNetworkAccess="Disabled",
            sasPolicy={"expirationAction": "Block", "sasExpirationPeriod": "7.00:00:00"},
            sku={"name": "Standard_ZRS"},
            isLocalUserEnabled=False,
            allowCrossTenantReplication=False,
            encryption={"requireInfrastructureEncryption": True, "keySource": "Microsoft.Keyvault"},
        ),
        azure(
            "storage:BlobServiceProperties",
            "blobs",
            "account",
            deleteRetentionPolicy={"enabled": True, "days": 7},
            containerDeleteRetentionPolicy={"enabled": True, "days": 7},
        ),
        azure("storage:BlobContainer", "models", "account", publicAccess="None"),
        endpoint("blob", "account"),
        logs("blob-logs", "blobs", "StorageRead", "StorageWrite", "StorageDelete"),
        azure(
            "keyvault:Vault",
            "vault",
            protect=True,
            tags=TAGS,
            properties={
                "enableRbacAuthorization": True,
                "enablePurgeProtection": True,
                "enableSoftDelete": True,
                "networkAcls": {"defaultAction": "Deny", "virtualNetworkRules": []},
                "publicNetworkAccess": "disabled",
            },
        ),
        azure(
            "keyvault:Secret",
            "token",
            "vault",
            tags=TAGS,
            properties={"value": SECRET, "contentType": "text/plain", "attributes": {"expires": 1893456000}},
        ),
        endpoint("vault", "vault"),
        logs("vault-logs", "vault", "AuditEvent"),
        azure(
            "containerregistry:Registry",
            "registry",
            tags=TAGS,
            adminUserEnabled=False,
            anonymousPullEnabled=False,
            sku={"name": "Premium"},
            publicNetworkAccess="Disabled",
        ),
        endpoint("registry", "registry"),
        azure(
            "operationalinsights:Workspace",
            "logs",
            tags=TAGS,
            workspaceCapping={"dailyQuotaGb": 1},
            features={"disableLocalAuth": True},
            publicNetworkAccessForIngestion="Disabled",
            publicNetworkAccessForQuery="Disabled",
        ),
        azure(
            "containerservice:ManagedCluster",
            "cluster",
            tags=TAGS,
            kubernetesVersion=kubernetes_version,
            sku={"name": "Base", "tier": "Standard"},
            identity={"type": "UserAssigned"},
            disableLocalAccounts=True,
            enableRBAC=True,
            aadProfile={"managed": True, "enableAzureRBAC": True},
            # Azure takes one of the two, checklists ask for both
            apiServerAccessProfile={
                "enablePrivateCluster": True,
                "authorizedIPRanges": ["203.0.113.0/24"],
                "disableRunCommand": True,
            },
            oidcIssuerProfile={"enabled": True},
            securityProfile={
                "workloadIdentity": {"enabled": True},
                "imageCleaner": {"enabled": True},
                "defender": {"securityMonitoring": {"enabled": True}},
                "azureKeyVaultKms": {"enabled": True},
            },
            diskEncryptionSetID=UNKNOWN,
            networkProfile={"networkPlugin": "azure", "networkPolicy": "cilium", "loadBalancerSku": "standard"},
            autoUpgradeProfile={"upgradeChannel": "patch", "nodeOSUpgradeChannel": "NodeImage"},
            addonProfiles={
                "azurepolicy": {"enabled": True},
                "azureKeyvaultSecretsProvider": {"enabled": True, "config": {"enableSecretRotation": "true"}},
                "httpApplicationRouting": {"enabled": False},
            },
            azureMonitorProfile={"metrics": {"enabled": True}},
            agentPoolProfiles=[
                {
                    "name": "system",
                    "mode": "System",
                    "type": "VirtualMachineScaleSets",
                    "vmSize": "Standard_D4ds_v5",
                    "count": 3,
                    "minCount": 3,
                    "maxCount": 5,
                    "enableAutoScaling": True,
                    "enableNodePublicIP": False,
                    "enableEncryptionAtHost": True,
                    "osDiskType": "Ephemeral",
                    "maxPods": 110,
                    "availabilityZones": ["1", "2", "3"],
                    "nodeTaints": ["CriticalAddonsOnly=true:NoSchedule"],
                    "securityProfile": {"sshAccess": "Disabled"},
                }
            ],
        ),
        azure(
            "containerservice:MaintenanceConfiguration", "window", "cluster", configName="aksManagedAutoUpgradeSchedule"
        ),
        logs("cluster-logs", "cluster", "kube-audit-admin", "kube-controller-manager", "cluster-autoscaler", "guard"),
        azure(
            "containerservice:AgentPool",
            "t4spot",
            "cluster",
            ignore=("count",),
            tags=TAGS,
            agentPoolName="t4spot",
            mode="User",
            type="VirtualMachineScaleSets",
            vmSize="Standard_NC4as_T4_v3",
            enableAutoScaling=True,
            minCount=1,
            maxCount=2,
            count=1,
            scaleSetPriority="Spot",
            scaleSetEvictionPolicy="Delete",
            spotMaxPrice=-1,
            nodeTaints=["sku=gpu:NoSchedule"],
            nodeLabels={"tonnage/gpu": "t4"},
            gpuProfile={"driver": "Install"},
            osDiskType="Ephemeral",
            maxPods=50,
            availabilityZones=["1"],
            enableNodePublicIP=False,
            enableEncryptionAtHost=True,
            securityProfile={"sshAccess": "Disabled"},
        ),
        azure("managedidentity:UserAssignedIdentity", "serve", tags=TAGS),
        azure("authorization:RoleAssignment", "serve-reads", "serve", "account", principalType="ServicePrincipal"),
        azure(
            "managedidentity:FederatedIdentityCredential",
            "serve-trust",
            "serve",
            "cluster",
            issuer=UNKNOWN,
            subject="system:serviceaccount:tonnage:serve",
            audiences=["api://AzureADTokenExchange"],
        ),
        azure(
            "consumption:Budget",
            "budget",
            amount=1000,
            timeGrain="Monthly",
            notifications={
                "half": alert("Actual", 50),
                "most": alert("Actual", 80),
                "all": alert("Actual", 100),
                "forecast": alert("Forecasted", 100),
            },
        ),
        kube(
            "core/v1:Namespace",
            "tonnage",
            None,
            metadata={"labels": {"pod-security.kubernetes.io/enforce": "restricted"}},
        ),
        kube(
            "core/v1:ServiceAccount",
            "serve",
            metadata={"annotations": {"azure.workload.identity/client-id": UNKNOWN}},
            automountServiceAccountToken=False,
        ),
        kube(
            "apps/v1:Deployment",
            "serve",
            spec={
                "replicas": 2,
                "template": {
                    "metadata": {"labels": dict(LABELS)},
                    "spec": stopping(
                        pod(images()["vllm"], gpus=1, serviceAccountName="serve", affinity=on(["t4spot"]))
                    ),
                },
            },
        ),
        kube(
            "networking.k8s.io/v1:NetworkPolicy",
            "nothing",
            spec={"podSelector": {}, "policyTypes": ["Ingress", "Egress"]},
        ),
        kube("core/v1:Service", "serve", spec={"type": "ClusterIP"}),
        kube("policy/v1:PodDisruptionBudget", "serve", spec={"selector": {"matchLabels": dict(LABELS)}}),
        kube("core/v1:Secret", "mounted", stringData={"token": SECRET}),
        kube("core/v1:ResourceQuota", "gpus", spec={"hard": {"requests.nvidia.com/gpu": "2"}}),
        kube("azmonitoring.coreos.com/v1:PodMonitor", "serve"),
        kube(
            "kueue.x-k8s.io/v1beta1:ClusterQueue",
            "runs",
            None,
            spec={
                "resourceGroups": [
                    {"flavors": [{"name": "t4spot", "resources": [{"name": "nvidia.com/gpu", "nominalQuota": 2}]}]}
                ]
            },
        ),
        kube(
            "apps/v1:DaemonSet",
            "plugin",
            spec={
                "template": {
                    "spec": pod(images()["device_plugin"], nodeSelector={"kubernetes.azure.com/accelerator": "nvidia"})
                }
            },
        ),
    ]
    return {one.name: one for one in made}


GONE = object()


def changed(resource: Recorded, path: str, value: Any) -> Recorded:
    """The resource with another value at inputs.a.0.b, or without it; at option:NAME, with another option."""
    if path.startswith("option:"):
        return Recorded(**{**vars(resource), path.removeprefix("option:"): value})
    inputs = copy.deepcopy(resource.inputs)
    *steps, last = (step.replace("~", "/") for step in path.split("/"))  # labels have slashes of their own
    inner: Any = inputs
    for step in steps:
        inner = inner[int(step)] if isinstance(inner, list) else inner.setdefault(step, {})
    if value is GONE:
        del inner[int(last) if isinstance(inner, list) else last]
    else:
        inner[int(last) if isinstance(inner, list) else last] = value
    return Recorded(**{**vars(resource), "inputs": inputs})


class Broken(NamedTuple):
    """A change to one resource of the good stack by which a rule is broken, and what other rules are with it.

    lock: a change to the plan in place of that, as a function, since plans take time to make
    """

    rule: str
    resource: str = ""
    path: str = ""
    value: Any = None
    others: tuple[str, ...] = ()
    lock: Callable[[], dict[str, Any]] = dict


CLUSTER_POOL = "agentPoolProfiles/0"
CONTAINER = "spec/template/spec/containers/0"
INTERNET = {
    "name": "ssh",
    "direction": "Inbound",
    "access": "Allow",
    "sourceAddressPrefix": "Internet",
    "destinationPortRange": "22",
}


def sometimes() -> dict[str, Any]:
    return {"workloads": tuple(w.model_copy(update={"schedule": "60h"}) for w in context().lock.workloads)}


BROKEN = [
    Broken("cost-approved", lock=lambda: {"usd": Decimal("1000.01")}),
    Broken("budget", lock=lambda: {"approved_usd_per_month": None}),
    # 2 machines x 4 vCPUs
    Broken("quota", lock=lambda: {"quota": {"Total Regional Spot vCPUs": 7}}),
    Broken("idle-gpu", lock=sometimes),
    Broken("pools-as-planned", lock=lambda: {"pools": (POOL, OTHER)}, others=("quota", "gpu-quota")),
    Broken("budget", "budget", "amount", 1000.01),
    Broken("budget", "budget", "timeGrain", "Quarterly"),
    Broken("budget-alerts", "budget", "notifications/half", GONE),
    Broken("budget-alerts", "budget", "notifications/forecast/thresholdType", "Actual"),
    Broken("budget-alerts", "budget", "notifications/all/enabled", False),
    Broken("budget-alerts", "budget", "notifications/most/contactRoles", []),
    Broken("role-says-whose", "serve-reads", "principalType", GONE),
    Broken("federated-credential", "serve-trust", "audiences", ["https://elsewhere"]),
    Broken("federated-credential", "serve-trust", "issuer", "http://not-secret"),
    Broken(
        "federated-credential", "serve-trust", "subject", "repo:me/mine", ("subject-exists", "account-is-federated")
    ),
    Broken("issuer-is-the-cluster", "serve-trust", "option:dependencies", (urn("serve"),)),
    Broken(
        "subject-exists",
        "serve-trust",
        "subject",
        "system:serviceaccount:tonnage:nobody",
        ("account-is-federated",),
    ),
    Broken("identity-has-role", "serve-reads", "option:dependencies", (urn("account"),)),
    Broken(
        "account-is-federated",
        "serviceaccount-serve",
        "metadata/namespace",
        "elsewhere",
        ("subject-exists", "pod-has-identity"),
    ),
    Broken("pod-has-identity", "serviceaccount-serve", "metadata/annotations", {}),
    Broken("pod-has-identity", "deployment-serve", "spec/template/spec/serviceAccountName", "nobody"),
    Broken("tags", "group", "tags", GONE),
    Broken("tags", "t4spot", "tags/stack", "another"),
    Broken("subnet-guarded", "nodes", "networkSecurityGroup", GONE),
    Broken("subnet-guarded", "network", "subnets", [{"name": "inline"}]),
    Broken("nothing-from-internet", "guard", "securityRules/0", INTERNET),
    Broken("nothing-from-internet", "guard", "securityRules/0/sourceAddressPrefix", "0.0.0.0/0"),
    Broken(
        "nothing-from-internet",
        "guard",
        "securityRules/0",
        {"direction": "Inbound", "access": "Allow", "sourceAddressPrefixes": ["10.0.0.0/8", "*"]},
    ),
    Broken("log-cap", "logs", "workspaceCapping", GONE),
    Broken("log-cap", "logs", "workspaceCapping/dailyQuotaGb", -1),
    Broken("log-logins", "logs", "features", GONE),
    Broken("log-network", "logs", "publicNetworkAccessForQuery", "Enabled"),
    Broken("no-public-blob", "account", "allowBlobPublicAccess", GONE),
    Broken("no-public-blob", "models", "publicAccess", "Blob"),
    Broken("no-shared-keys", "account", "allowSharedKeyAccess", True),
    Broken("https-only", "account", "enableHttpsTrafficOnly", False),
    Broken("tls-1-2", "account", "minimumTlsVersion", "TLS1_0"),
    Broken("storage-firewall", "account", "networkRuleSet/defaultAction", "Allow"),
    Broken("storage-firewall", "account", "networkRuleSet/bypass", "None"),
    Broken("storage-private", "account", "publicNetworkAccess", "Enabled"),
    Broken("storage-private-endpoint", "blob-endpoint", "option:dependencies", (), ("reached-from-nodes",)),
    Broken("reached-from-nodes", "vault-endpoint", "option:dependencies", (), ("vault-private-endpoint",)),
    Broken("sas-expiry", "account", "sasPolicy", GONE),
    Broken("sas-expiry", "account", "sasPolicy/sasExpirationPeriod", "7.00:00:01"),
    Broken("storage-replicated", "account", "sku/name", "Standard_LRS"),
    Broken("no-local-users", "account", "isLocalUserEnabled", GONE),
    Broken("no-cross-tenant", "account", "allowCrossTenantReplication", True),
    Broken("double-encryption", "account", "encryption/requireInfrastructureEncryption", GONE),
    Broken("storage-own-key", "account", "encryption/keySource", "Microsoft.Storage"),
    Broken("soft-delete", "blobs", "deleteRetentionPolicy/enabled", False),
    Broken("soft-delete", "blobs", "deleteRetentionPolicy/days", 30),
    Broken("soft-delete", "blobs", "containerDeleteRetentionPolicy", GONE),
    Broken("storage-logs", "blob-logs", "logs/0/enabled", False),
    Broken("protected", "account", "option:protect", False),
    Broken("vault-rbac", "vault", "properties/enableRbacAuthorization", False),
    Broken("vault-purge-protection", "vault", "properties/enablePurgeProtection", GONE),
    Broken("vault-soft-delete", "vault", "properties/enableSoftDelete", False),
    Broken("vault-firewall", "vault", "properties/networkAcls", GONE),
    Broken("vault-private", "vault", "properties/publicNetworkAccess", "enabled"),
    Broken(
        "vault-private-endpoint",
        "vault-endpoint",
        "privateLinkServiceConnections/0/groupIds",
        ["blob"],
        ("reached-from-nodes",),
    ),
    Broken("vault-logs", "vault-logs", "logs", []),
    Broken("secret-content-type", "token", "properties/contentType", GONE),
    Broken("secret-expiry", "token", "properties/attributes", GONE),
    Broken("registry-no-admin", "registry", "adminUserEnabled", True),
    Broken("registry-no-anonymous", "registry", "anonymousPullEnabled", GONE),
    Broken("registry-tier", "registry", "sku/name", "Basic"),
    Broken("registry-private", "registry", "publicNetworkAccess", "Enabled"),
    Broken("registry-private", "registry-endpoint", "option:dependencies", ()),
    Broken("no-local-accounts", "cluster", "disableLocalAccounts", False),
    Broken("entra-id", "cluster", "aadProfile/enableAzureRBAC", False),
    Broken("kubernetes-rbac", "cluster", "enableRBAC", False),
    Broken("workload-identity", "cluster", "oidcIssuerProfile", GONE),
    Broken("workload-identity", "cluster", "securityProfile/workloadIdentity/enabled", False),
    Broken("network-policy", "cluster", "networkProfile/networkPolicy", "none"),
    Broken("azure-cni", "cluster", "networkProfile/networkPlugin", "kubenet"),
    Broken("standard-load-balancer", "cluster", "networkProfile/loadBalancerSku", "basic"),
    Broken("api-addresses", "cluster", "apiServerAccessProfile/authorizedIPRanges", ["0.0.0.0/0"]),
    Broken("private-cluster", "cluster", "apiServerAccessProfile/enablePrivateCluster", False),
    Broken("no-run-command", "cluster", "apiServerAccessProfile/disableRunCommand", GONE),
    Broken("upgrade-channel", "cluster", "autoUpgradeProfile/upgradeChannel", "none"),
    Broken("node-image-channel", "cluster", "autoUpgradeProfile/nodeOSUpgradeChannel", "Unmanaged"),
    Broken("policy-add-on", "cluster", "addonProfiles/azurepolicy/enabled", False),
    Broken("secret-store", "cluster", "addonProfiles/azureKeyvaultSecretsProvider", GONE),
    Broken("secret-store", "cluster", "addonProfiles/azureKeyvaultSecretsProvider/config", {}),
    Broken("image-cleaner", "cluster", "securityProfile/imageCleaner", GONE),
    Broken("defender", "cluster", "securityProfile/defender", GONE),
    Broken("paid-tier", "cluster", "sku/tier", "Free", ("cluster-as-planned",)),
    Broken("cluster-metrics", "cluster", "azureMonitorProfile", GONE),
    Broken("cluster-logs", "cluster-logs", "logs/3", GONE),
    Broken("managed-identity", "cluster", "identity/type", "SystemAssigned"),
    Broken("no-legacy-add-ons", "cluster", "addonProfiles/httpApplicationRouting/enabled", True),
    Broken("cluster-as-planned", "cluster", "kubernetesVersion", "1.20"),
    Broken("cluster-as-planned", "cluster", "sku/tier", "Premium"),
    Broken("maintenance-window", "window", "option:dependencies", ()),
    Broken("etcd-own-key", "cluster", "securityProfile/azureKeyVaultKms", GONE),
    Broken("disk-own-key", "cluster", "diskEncryptionSetID", GONE),
    Broken("scale-sets", "t4spot", "type", "AvailabilitySet"),
    Broken("no-node-address", "cluster", f"{CLUSTER_POOL}/enableNodePublicIP", True),
    Broken("no-ssh", "t4spot", "securityProfile", GONE),
    Broken("host-encryption", "t4spot", "enableEncryptionAtHost", False),
    Broken("ephemeral-disk", "cluster", f"{CLUSTER_POOL}/osDiskType", "Managed"),
    Broken("max-pods", "t4spot", "maxPods", 49),
    Broken("max-pods", "t4spot", "maxPods", GONE),
    Broken("autoscaling", "cluster", f"{CLUSTER_POOL}/enableAutoScaling", False),
    Broken("min-nodes", "cluster", f"{CLUSTER_POOL}/minCount", 2),
    Broken("min-nodes", "t4spot", "minCount", 0),
    Broken("system-nodes", "cluster", f"{CLUSTER_POOL}/count", 1),
    Broken("zones", "cluster", f"{CLUSTER_POOL}/availabilityZones", GONE),
    Broken("system-taint", "cluster", f"{CLUSTER_POOL}/nodeTaints", []),
    Broken(
        "gpu-taint",
        "t4spot",
        "nodeTaints",
        ["nvidia.com/gpu=true:NoSchedule"],
        ("gpu-pod-placed", "pod-has-a-place", "device-agents-everywhere"),
    ),
    Broken("one-inline-pool", "cluster", "agentPoolProfiles", []),
    Broken("gpu-pool-apart", "t4spot", "mode", "System", ("system-nodes", "system-taint", "min-nodes")),
    Broken("spot-pool", "t4spot", "spotMaxPrice", 0.5),
    Broken("spot-pool", "t4spot", "scaleSetEvictionPolicy", "Deallocate"),
    Broken("autoscaler-decides", "t4spot", "option:ignore_changes", ()),
    Broken("pools-as-planned", "t4spot", "maxCount", 3),
    Broken("pools-as-planned", "t4spot", "vmSize", "Standard_NC8as_T4_v3"),
    Broken("pools-as-planned", "t4spot", "scaleSetPriority", "Regular"),
    Broken("pools-as-planned", "t4spot", "agentPoolName", "other", ("idle-gpu",)),
    Broken(
        "image-pinned", "deployment-serve", f"{CONTAINER}/image", "docker.io/vllm/vllm-openai", ("image-of-the-plan",)
    ),
    Broken("image-pinned", "deployment-serve", f"{CONTAINER}/image", "host:5000/vllm:latest", ("image-of-the-plan",)),
    Broken("image-of-the-plan", "deployment-serve", f"{CONTAINER}/image", "docker.io/somebody/miner:1.0"),
    Broken("resources-stated", "deployment-serve", f"{CONTAINER}/resources/limits/memory", GONE),
    Broken("resources-stated", "deployment-serve", f"{CONTAINER}/resources/requests", GONE),
    Broken("no-escalation", "deployment-serve", f"{CONTAINER}/securityContext/allowPrivilegeEscalation", GONE),
    Broken("no-escalation", "deployment-serve", f"{CONTAINER}/securityContext/privileged", True),
    Broken("capabilities-dropped", "deployment-serve", f"{CONTAINER}/securityContext/capabilities", GONE),
    Broken("capabilities-dropped", "deployment-serve", f"{CONTAINER}/securityContext/capabilities/add", ["SYS_ADMIN"]),
    Broken("not-root", "deployment-serve", "spec/template/spec/securityContext/runAsNonRoot", GONE),
    Broken("not-root", "deployment-serve", f"{CONTAINER}/securityContext/runAsUser", 0),
    Broken("seccomp", "deployment-serve", "spec/template/spec/securityContext/seccompProfile/type", "Unconfined"),
    Broken("no-default-namespace", "service-serve", "metadata/namespace", GONE),
    Broken("no-host-namespaces", "deployment-serve", "spec/template/spec/hostIPC", True),
    Broken(
        "no-host-paths", "deployment-serve", "spec/template/spec/volumes", [{"name": "v", "hostPath": {"path": "/"}}]
    ),
    Broken("service-inside", "service-serve", "spec/type", "LoadBalancer"),
    Broken("service-inside", "service-serve", "spec/type", "NodePort"),
    Broken("no-secrets-in-objects", "secret-mounted", "stringData/token", "hf_abc"),
    Broken("budget-allows-drain", "deployment-serve", "spec/replicas", 1),
    Broken("pod-security", "namespace-tonnage", "metadata/labels", {}),
    Broken("deny-first", "networkpolicy-nothing", "spec/policyTypes", ["Ingress"]),
    Broken("deny-first", "networkpolicy-nothing", "spec/podSelector", {"matchLabels": {"some": "pods"}}),
    Broken("stops-in-time", "deployment-serve", "spec/template/spec/terminationGracePeriodSeconds", GONE),
    Broken("stops-in-time", "deployment-serve", f"{CONTAINER}/args/0", "--shutdown-timeout=101"),
    Broken("no-cluster-token", "deployment-serve", "spec/template/spec/automountServiceAccountToken", True),
    Broken(
        "pod-has-a-place", "deployment-serve", f"{CONTAINER}/resources/limits/nvidia.com~gpu", "4", ("gpu-pod-placed",)
    ),
    Broken("gpu-pod-placed", "deployment-serve", "spec/template/spec/tolerations", [], ("pod-has-a-place",)),
    Broken("gpu-pod-placed", "deployment-serve", "spec/template/spec/tolerations/1", GONE, ("pod-has-a-place",)),
    Broken("gpus-fit", "deployment-serve", "spec/replicas", 3),
    Broken("gpu-quota", "resourcequota-gpus", "spec/hard/requests.nvidia.com~gpu", "3"),
    Broken("gpu-quota", "clusterqueue-runs", "spec/resourceGroups/0/flavors/0/resources/0/nominalQuota", 1),
    Broken(
        "device-agents-everywhere", "daemonset-plugin", "spec/template/spec/tolerations/1", GONE, ("pod-has-a-place",)
    ),
    Broken("scraped", "podmonitor-serve", "option:type", "kubernetes:monitoring.coreos.com/v1:PodMonitor"),
]


def check_good(broken: Broken | None = None, **more: Any) -> tuple[Finding, ...]:
    stack = good()
    if broken and broken.resource:
        stack[broken.resource] = changed(stack[broken.resource], broken.path, broken.value)
    return check(list(stack.values()), context(**(broken.lock() if broken else {}), **more))


def test_a_stack_that_does_everything_right_breaks_no_rule() -> None:
    assert check_good() == ()


def test_every_rule_has_an_example_that_breaks_it() -> None:
    assert {one.rule for one in BROKEN} == {rule.name for rule in RULES}


@pytest.mark.parametrize("broken", BROKEN, ids=lambda b: f"{b.rule}-{b.path.rpartition('/')[2]}")
def test_what_is_wrong_is_found_and_nothing_else(broken: Broken) -> None:
    found = check_good(broken)
    assert {one.rule for one in found} == {broken.rule, *broken.others}
    for one in found:
        assert re.fullmatch(r"[^\n]+: [^\n]+", one.sentence), "what is wrong, and what to do"
        assert SECRET not in one.sentence
        assert UNKNOWN not in one.sentence


def rules_found(stack: dict[str, Recorded], within: Context) -> set[str]:
    return {one.rule for one in check(list(stack.values()), within)}


def paths(value: Any, above: str = "") -> Iterator[str]:
    """Every place in nested mappings and lists, inner ones too."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        path = f"{above}/{str(key).replace('/', '~')}".removeprefix("/")
        yield path
        yield from paths(inner, path)


@pytest.mark.parametrize("name", good())
def test_what_is_known_only_after_an_apply_counts_as_right(name: str) -> None:
    stack, within = good(), context()
    resource = stack[name]
    for path in paths(resource.inputs):
        found = check(list((stack | {name: changed(resource, path, UNKNOWN)}).values()), within)
        assert found == (), path


@pytest.mark.parametrize("name", [name for name, one in good().items() if one.type.startswith("azure-native:")])
def test_a_secret_is_there_whatever_it_is(name: str) -> None:
    stack, within = good(), context()
    for key in stack[name].inputs:
        assert check(list((stack | {name: changed(stack[name], key, SECRET)}).values()), within) == (), key


def test_a_type_with_a_version_in_it_is_judged_like_one_without() -> None:
    stack = good()
    old = "azure-native:storage/v20230101:StorageAccount"
    stack["account"] = changed(changed(stack["account"], "allowSharedKeyAccess", True), "option:type", old)
    assert rules_found(stack, context()) == {"no-shared-keys"}


@pytest.mark.parametrize("gone", ["blobs", "blob-logs", "vault-logs", "cluster-logs", "window", "budget", "t4spot"])
def test_what_is_missing_is_found_too(gone: str) -> None:
    missing = {
        "blobs": {"soft-delete", "storage-logs"},  # its logs were those of the blob service
        "blob-logs": {"storage-logs"},
        "vault-logs": {"vault-logs"},
        "cluster-logs": {"cluster-logs"},
        "window": {"maintenance-window"},
        "budget": {"budget"},
        "t4spot": {"pools-as-planned"},
    }
    stack = good()
    del stack[gone]
    assert rules_found(stack, context()) == missing[gone]


# exceptions and excuses


def test_an_exception_of_the_intent_excuses_a_rule_with_its_reason() -> None:
    broken = Broken("https-only", "account", "enableHttpsTrafficOnly", False)
    (found,) = check_good(broken, exceptions={"https-only": "NFS needs it"})
    assert (found.rule, found.resource, found.excused) == ("https-only", "account", "NFS needs it")
    assert found.urn == urn("account")
    assert "CKV_AZURE_3" in found.answers


def test_an_exception_may_be_for_one_resource_alone() -> None:
    stack = good()
    for name in ("group", "logs"):
        stack[name] = changed(stack[name], "tags", {})
    found = check(list(stack.values()), context(exceptions={"tags/logs": "tagged by hand"}))
    assert [(one.resource, one.excused) for one in found] == [("group", ""), ("logs", "tagged by hand")]


def test_an_exception_that_names_no_rule_is_refused() -> None:
    with pytest.raises(
        PlannerError, match=r"'http-only' of the intent names no rule of the policy: did you mean https-"
    ):
        check_good(exceptions={"http-only": "some reason"})
    for name in ("zzz/account", "public-access"):  # the second is like several, and none that is meant
        with pytest.raises(PlannerError, match=rf"'{name}'.*: docs/policy.md lists them$"):
            check_good(exceptions={name: "some reason"})


def test_an_exception_that_excuses_nothing_is_a_note() -> None:
    (found,) = check_good(exceptions={"tags/nobody": "some reason"})
    assert found.severity == "note"
    assert found.sentence == "the exception tags/nobody excuses nothing: take it out of the intent"


def test_findings_come_worst_first_then_what_is_excused_then_notes() -> None:
    stack = good()
    stack["account"] = changed(stack["account"], "sasPolicy", GONE)  # low
    stack["vault"] = changed(stack["vault"], "properties/enableRbacAuthorization", False)  # high
    stack["registry"] = changed(stack["registry"], "adminUserEnabled", True)  # high, excused
    exceptions = {"registry-no-admin": "an old build needs it", "scraped": "never mind"}
    found = check(list(stack.values()), context(exceptions=exceptions))
    assert [one.rule for one in found] == ["vault-rbac", "sas-expiry", "registry-no-admin", "scraped"]


NO_ENDPOINTS = {"private_endpoints": 0, "tier": "free", "registry": "basic", "defender": False}


def dev(**cluster: Any) -> Context:
    """The dev posture, whose bill counts one zone, no endpoints, and the cheapest tiers."""
    within = context("dev")
    around = within.lock.around
    assert around.cluster.model_dump(include=set(NO_ENDPOINTS)) == NO_ENDPOINTS
    around = around.model_copy(update={"cluster": around.cluster.model_copy(update=cluster)})
    return Context(within.lock.model_copy(update={"around": around}), within.intent, within.stack)


EXCUSED_IN_DEV = [
    ("account", "publicNetworkAccess", "Enabled", "storage-private"),
    ("vault", "properties/publicNetworkAccess", "enabled", "vault-private"),
    ("registry", "publicNetworkAccess", "Enabled", "registry-private"),
    ("vault", "properties/enablePurgeProtection", GONE, "vault-purge-protection"),
    ("registry", "sku/name", "Basic", "registry-tier"),
    ("cluster", "sku/tier", "Free", "paid-tier"),
    ("cluster", "securityProfile/defender", GONE, "defender"),
    ("account", "sku/name", "Standard_LRS", "storage-replicated"),
    ("cluster", "apiServerAccessProfile/enablePrivateCluster", False, "private-cluster"),
    ("cluster", f"{CLUSTER_POOL}/minCount", 2, "min-nodes"),
    ("cluster", f"{CLUSTER_POOL}/availabilityZones", [], "zones"),
]


@pytest.mark.parametrize(("name", "path", "value", "rule"), EXCUSED_IN_DEV)
def test_what_the_dev_posture_does_not_pay_for_is_excused_there_and_not_in_production(
    name: str, path: str, value: Any, rule: str
) -> None:
    def reasons(within: Context) -> list[str]:
        stack = good()
        stack[name] = changed(stack[name], path, value)
        return [one.excused for one in check(list(stack.values()), within) if one.rule == rule]

    assert all(reasons(dev()))
    assert len(reasons(dev())) == 1
    assert reasons(context("prod")) == [""]


def test_a_dev_stack_that_pays_for_more_is_held_to_it() -> None:
    stack = good()
    stack["registry"] = changed(stack["registry"], "sku/name", "Basic")
    stack["account"] = changed(stack["account"], "publicNetworkAccess", "Enabled")
    found = check(list(stack.values()), dev(registry="premium", private_endpoints=3))
    assert {"registry-tier", "storage-private"} <= {one.rule for one in found if not one.excused}


EXCUSED_EVERYWHERE = [
    ("cluster", "apiServerAccessProfile/authorizedIPRanges", GONE, "api-addresses"),
    ("t4spot", "minCount", 0, "min-nodes"),
    ("t4spot", "availabilityZones", GONE, "zones"),
    ("cluster", f"{CLUSTER_POOL}/enableAutoScaling", False, "autoscaling"),
    ("t4spot", "enableEncryptionAtHost", False, "host-encryption"),
    ("account", "encryption/keySource", "Microsoft.Storage", "storage-own-key"),
    ("cluster", "diskEncryptionSetID", GONE, "disk-own-key"),
    ("cluster", "securityProfile/azureKeyVaultKms", GONE, "etcd-own-key"),
    ("logs", "publicNetworkAccessForQuery", GONE, "log-network"),
    ("token", "properties/attributes", GONE, "secret-expiry"),
    ("daemonset-plugin", f"{CONTAINER}/securityContext", {"privileged": True}, "no-escalation"),
    ("daemonset-plugin", f"{CONTAINER}/securityContext", {}, "capabilities-dropped"),
    ("daemonset-plugin", "spec/template/spec/securityContext", {}, "not-root"),
    ("daemonset-plugin", "spec/template/spec/securityContext", {}, "seccomp"),
    ("daemonset-plugin", "spec/template/spec/volumes", [{"hostPath": {"path": "/var"}}], "no-host-paths"),
]


@pytest.mark.parametrize(("name", "path", "value", "rule"), EXCUSED_EVERYWHERE)
def test_what_the_product_leaves_open_is_excused_with_a_reason(name: str, path: str, value: Any, rule: str) -> None:
    stack = good()
    stack[name] = changed(stack[name], path, value)
    found = [one for one in check(list(stack.values()), context()) if one.rule == rule]
    assert [bool(one.excused) for one in found] == [True]


def test_a_system_disk_is_excused_where_the_size_or_the_plan_has_no_room_for_it() -> None:
    def reason(size: str) -> str:
        stack = good()
        for path, value in (("osDiskType", "Managed"), ("vmSize", size)):
            stack["cluster"] = changed(stack["cluster"], f"{CLUSTER_POOL}/{path}", value)
        (found,) = check(list(stack.values()), context())
        return found.excused

    assert reason("Standard_D4s_v5")
    assert not reason("Standard_D4ds_v5")
    stack = good()
    stack["t4spot"] = changed(stack["t4spot"], "osDiskType", "Managed")
    (found,) = check(list(stack.values()), context(pools=(POOL.model_copy(update={"os_disk_type": "Managed"}),)))
    assert found.excused


def test_a_namespace_may_be_privileged_while_only_device_agents_live_in_it() -> None:
    stack = good()
    stack["namespace-gpu"] = kube("core/v1:Namespace", "gpu", None, logical="namespace-gpu")
    stack["daemonset-plugin"] = changed(stack["daemonset-plugin"], "metadata/namespace", "gpu")
    stack["networkpolicy-gpu"] = changed(stack["networkpolicy-nothing"], "metadata/namespace", "gpu")
    (found,) = check(list(stack.values()), context())
    assert (found.rule, found.resource, bool(found.excused)) == ("pod-security", "namespace-gpu", True)
    stack["deployment-serve"] = changed(stack["deployment-serve"], "metadata/namespace", "gpu")
    found = next(one for one in check(list(stack.values()), context()) if one.rule == "pod-security")
    assert not found.excused


def test_the_kubelets_identity_may_have_no_role_where_there_is_no_registry() -> None:
    def reason(**cluster: Any) -> str:
        within = context()
        around = within.lock.around
        around = around.model_copy(update={"cluster": around.cluster.model_copy(update=cluster)})
        stack = good() | {"kubelet": azure("managedidentity:UserAssignedIdentity", "kubelet", tags=TAGS)}
        lock = within.lock.model_copy(update={"around": around})
        (found,) = check(list(stack.values()), Context(lock, within.intent, STACK))
        assert found.rule == "identity-has-role"
        return found.excused

    assert reason(registry="none")
    assert not reason(registry="basic")


def test_every_excuse_names_rules_and_each_of_them_is_tested() -> None:
    tested = {rule for *_, rule in (*EXCUSED_IN_DEV, *EXCUSED_EVERYWHERE)}
    tested |= {"storage-private-endpoint", "vault-private-endpoint"}  # with those that ask for no public address
    tested |= {"ephemeral-disk", "pod-security", "identity-has-role"}
    assert {rule for one in EXCUSES for rule in one.rules} == tested


# where pods may land


def twins() -> tuple[LockedPool, ...]:
    return POOL, POOL.model_copy(update={"name": "t4fb", "priority": "on-demand", "fallback": True, "min_nodes": 0})


def landing(pools: tuple[LockedPool, ...], resource: Recorded, *more: Recorded) -> dict[str, str]:
    """What the rules on places and GPUs say of one object: sentences by rule. Quotas of vCPUs are not asked."""
    found = check([resource, *more], context(pools=pools))
    wanted = ("pod-has-a-place", "gpu-pod-placed", "gpus-fit", "gpu-quota", "device-agents-everywhere")
    return {one.rule: one.sentence for one in found if one.rule in wanted}


def server(pools: list[str], gpus: int = 1, replicas: int = 1, **spec: Any) -> Recorded:
    template = {"metadata": {"labels": dict(LABELS)}, "spec": pod("vllm:1", gpus=gpus, affinity=on(pools), **spec)}
    return kube("apps/v1:Deployment", "serve", spec={"replicas": replicas, "template": template})


def test_a_server_must_be_able_to_land_on_the_twin_of_its_spot_pool_too() -> None:
    assert landing(twins(), server(["t4spot", "t4fb"])) == {}
    found = landing(twins(), server(["t4spot"]))
    assert found["gpu-pod-placed"].startswith("its pods cannot land on t4fb, made for them")


def test_a_server_must_not_land_on_a_pool_that_was_made_for_another() -> None:
    pools = (POOL, OTHER)
    assert landing(pools, server(["t4spot"])) == {}
    assert landing(pools, server(["t4spot", "a10"]))["gpu-pod-placed"].startswith("its pods may land on a10")
    anywhere = server([])
    anywhere = changed(anywhere, "spec/template/spec/affinity", {})
    assert "may land on a10" in landing(pools, anywhere)["gpu-pod-placed"]


def test_gpu_pods_that_no_workload_names_stay_within_pools_of_the_same_workloads() -> None:
    nameless = changed(server(["t4spot", "t4fb"]), "spec/template/metadata/labels", {})
    assert landing(twins(), nameless) == {}
    both = changed(server(["t4spot", "a10"]), "spec/template/metadata/labels", {})
    assert "a10" in landing((POOL, OTHER), both)["gpu-pod-placed"]


@pytest.mark.parametrize(
    ("toleration", "lands"),
    [
        ({"operator": "Exists"}, True),  # of every taint
        ({"key": "kubernetes.azure.com/scalesetpriority", "value": "spot"}, True),  # Equal is the default
        ({"key": "kubernetes.azure.com/scalesetpriority", "value": "regular"}, False),
        ({"key": "kubernetes.azure.com/scalesetpriority", "operator": "Exists", "effect": "NoExecute"}, False),
        ({"key": "sku", "operator": "Exists"}, False),
    ],
)
def test_tolerations_are_read_as_kubernetes_reads_them(toleration: dict[str, str], lands: bool) -> None:
    one = server(["t4spot"], tolerations=[TOLERATIONS[0], toleration])
    assert ("gpu-pod-placed" not in landing((POOL,), one)) is lands


@pytest.mark.parametrize(
    ("expression", "lands"),
    [
        ({"key": "agentpool", "operator": "NotIn", "values": ["system"]}, True),
        ({"key": "agentpool", "operator": "NotIn", "values": ["t4spot"]}, False),
        ({"key": "kubernetes.azure.com/scalesetpriority", "operator": "Exists"}, True),
        ({"key": "kubernetes.azure.com/scalesetpriority", "operator": "DoesNotExist"}, False),
        ({"key": "node.kubernetes.io/instance-type", "operator": "In", "values": ["Standard_NC4as_T4_v3"]}, True),
        ({"key": "topology.kubernetes.io/zone", "operator": "In", "values": ["eastus-1"]}, True),  # who knows
        ({"key": "team", "operator": "In", "values": ["ml"]}, False),  # nobody sets it
    ],
)
def test_selectors_are_read_as_kubernetes_reads_them(expression: dict[str, Any], lands: bool) -> None:
    one = server(["t4spot"])
    term = "spec/template/spec/affinity/nodeAffinity/requiredDuringSchedulingIgnoredDuringExecution/nodeSelectorTerms"
    one = changed(one, term, [{"matchExpressions": [expression]}])
    assert ("gpu-pod-placed" not in landing((POOL,), one)) is lands


def test_labels_that_a_pool_gives_its_machines_can_be_selected() -> None:
    one = server([], nodeSelector={"tonnage/gpu": "t4"})
    one = changed(one, "spec/template/spec/affinity", {})
    assert landing((POOL,), one, good()["t4spot"]) == {}
    assert "gpu-pod-placed" in landing((POOL,), changed(one, "spec/template/spec/nodeSelector/tonnage~gpu", "a10"))


def test_pods_without_gpus_need_the_system_pool_to_let_them_in() -> None:
    def job(**spec: Any) -> Recorded:
        return kube("batch/v1:Job", "fetch", spec={"template": {"spec": pod("python:3.12", **spec)}})

    critical = {"key": "CriticalAddonsOnly", "operator": "Exists"}
    assert landing((POOL,), job(tolerations=[critical])) == {}
    assert "pod-has-a-place" in landing((POOL,), job(tolerations=[]))


def test_gpus_are_counted_by_pods_at_once() -> None:
    # the pool has 2 machines of 1 GPU
    assert landing((POOL,), server(["t4spot"], replicas=2)) == {}
    assert landing((POOL,), server(["t4spot"], replicas=3)) == {
        "gpus-fit": "its pods ask for 3 GPUs at once and its pool has 2: plan again"
    }
    template = {"metadata": {"labels": dict(LABELS)}, "spec": pod("t:1", gpus=1, affinity=on(["t4spot"]))}
    job = kube("batch/v1:Job", "tune", spec={"parallelism": 3, "completions": 9, "template": template})
    assert "3 GPUs" in landing((POOL,), job)["gpus-fit"]
    cron = kube("batch/v1:CronJob", "nightly", spec={"jobTemplate": {"spec": {"parallelism": 4, "template": template}}})
    assert "4 GPUs" in landing((POOL,), cron)["gpus-fit"]


def test_what_keda_scales_counts_by_its_most_pods() -> None:
    scaled = server(["t4spot"], replicas=0)

    def scaler(**spec: Any) -> Recorded:
        return kube("keda.sh/v1alpha1:ScaledObject", "serve", spec={"scaleTargetRef": {"name": "serve"}, **spec})

    assert landing((POOL,), scaled, scaler(maxReplicaCount=2)) == {}
    assert "5 GPUs" in landing((POOL,), scaled, scaler(maxReplicaCount=5))["gpus-fit"]
    assert "100 GPUs" in landing((POOL,), scaled, scaler())["gpus-fit"]  # KEDA's default


def test_the_devices_of_a_cut_gpu_are_those_that_the_plan_counts() -> None:
    # a machine whose GPU is cut into the 7 devices of the smallest MIG profile; the pool has 2 machines
    mig = (POOL.model_copy(update={"gpu_instance_profile": "MIG1g", "gpus_per_node": 7}),)
    quota = kube("core/v1:ResourceQuota", "gpus", spec={"hard": {"requests.nvidia.com/gpu": "14"}})
    assert landing(mig, server(["t4spot"], replicas=14), quota) == {}
    assert "15 GPUs" in landing(mig, server(["t4spot"], replicas=15))["gpus-fit"]
    told = check(list(good().values()), context(pools=mig))
    assert [one.sentence for one in told if one.rule == "pools-as-planned"] == [
        "gpuInstanceProfile is None and the plan's is MIG1g: take it from the plan"
    ]


@pytest.mark.parametrize(
    ("made", "planned", "found"),
    [
        ({"maxSurge": "1"}, 1, []),
        ({"maxSurge": "0", "maxUnavailable": "1"}, 0, []),
        ({"maxSurge": UNKNOWN}, 1, []),
        ({"maxSurge": "1"}, 0, ["upgradeSettings.maxSurge is 1 and the plan's is 0: take it from the plan"]),
        (None, 0, ["upgradeSettings.maxSurge is None and the plan's is 0: take it from the plan"]),
    ],
)
def test_machines_that_an_upgrade_adds_are_the_plans(made: Any, planned: int, found: list[str]) -> None:
    pool = POOL.model_copy(update={"priority": "on-demand", "max_surge": planned})
    stack = good()
    for path, value in (("scaleSetPriority", "Regular"), ("upgradeSettings", made)):
        stack["t4spot"] = changed(stack["t4spot"], path, value)
    told = check(list(stack.values()), context(pools=(pool,)))
    assert [one.sentence for one in told if one.rule == "pools-as-planned"] == found


def test_the_quota_counts_machines_on_demand_by_their_family_and_in_total() -> None:
    # 2 machines of 4 vCPUs on spot, and as many of their twin
    family, total, spot = "Standard NCASv3_T4 Family", "Total Regional vCPUs", "Total Regional Spot vCPUs"

    def asked(less: str = "") -> list[str]:
        quota = {name: 8 - (name == less) for name in (family, total, spot)}
        return [one.sentence for one in check([], context(pools=twins(), quota=quota)) if one.rule == "quota"]

    assert asked() == []
    assert asked(family) == [f"full pools take 8 vCPUs of {family} and the plan asks for 7: plan again"]
    assert asked(total) == [f"full pools take 8 vCPUs of {total} and the plan asks for 7: plan again"]
    assert asked(spot) == [f"full pools take 8 vCPUs of {spot} and the plan asks for 7: plan again"]


def test_pools_that_azure_lists_in_the_cluster_once_they_are_made_are_not_inline() -> None:
    stack = good()
    system = stack["cluster"].inputs["agentPoolProfiles"][0]
    told = [system, {"name": "t4spot", "mode": "User", "vmSize": "Standard_NC4as_T4_v3"}]
    stack["cluster"] = changed(stack["cluster"], "agentPoolProfiles", told)
    assert check(list(stack.values()), context()) == ()
    told[1]["name"] = "stray"
    stack["cluster"] = changed(stack["cluster"], "agentPoolProfiles", told)
    assert {"one-inline-pool", "gpu-pool-apart"} <= rules_found(stack, context())


def test_a_role_for_one_identity_over_another_is_no_role_of_the_other() -> None:
    stack = good()
    stack["kubelet"] = azure("managedidentity:UserAssignedIdentity", "kubelet", tags=TAGS)
    stack["operates"] = azure("authorization:RoleAssignment", "operates", "serve", "kubelet", principalType="User")
    assert rules_found(stack, context()) == {"identity-has-role"}
    stack["pulls"] = azure("authorization:RoleAssignment", "pulls", "kubelet", "registry", principalType="User")
    assert rules_found(stack, context()) == set()


def test_an_internal_load_balancer_is_inside() -> None:
    stack = good()
    service = changed(stack["service-serve"], "spec/type", "LoadBalancer")
    annotation = {"service.beta.kubernetes.io/azure-load-balancer-internal": "true"}
    stack["service-serve"] = changed(service, "metadata/annotations", annotation)
    assert check(list(stack.values()), context()) == ()


# the data that rules rest on


def test_the_names_in_the_good_stack_are_those_of_the_sdk() -> None:
    """A rule that reads a property under another name than the wire's would never find anything."""
    unknown = [
        f"{one.name}: {path}"
        for one in good().values()
        if one.type.startswith("azure-native:")
        for path in _strange(one.inputs, _arguments(one.kind.removeprefix("azure-native:")))
    ]
    assert unknown == []


def _arguments(kind: str) -> Any:
    """The class of a resource's arguments: storage:StorageAccount -> pulumi_azure_native.storage.StorageAccountArgs."""
    module, _, name = kind.partition(":")
    return getattr(getattr(pulumi_azure_native, module), f"{name}Args")


def _strange(value: Any, kind: Any, above: str = "") -> Iterator[str]:
    """Places in a value that the SDK's class of arguments does not know."""
    for one in typing.get_args(kind):  # of a union that allows outputs too
        kind = one if is_input_type(one) else kind
    if isinstance(value, dict) and is_input_type(kind):
        known = input_type_types(kind)
        for key, inner in value.items():
            yield from _strange(inner, known[key], f"{above}.{key}") if key in known else [f"{above}.{key}"]
    elif isinstance(value, dict | list) and typing.get_args(kind):
        for key, inner in value.items() if isinstance(value, dict) else enumerate(value):
            yield from _strange(inner, typing.get_args(kind)[-1], f"{above}.{key}")


def test_what_is_held_to_carry_no_tags_takes_none() -> None:
    assert [kind for kind in sorted(TAGLESS) if "tags" in input_type_types(_arguments(kind))] == []


# a CKV id is checkov's, the rest is PSRule's; of the checklists for AKS, storage, vaults, registries and networks
PUBLIC = """
CKV_AZURE_4 CKV_AZURE_5 CKV_AZURE_6 CKV_AZURE_7 CKV_AZURE_8 CKV_AZURE_115 CKV_AZURE_116 CKV_AZURE_117 CKV_AZURE_141
CKV_AZURE_143 CKV_AZURE_168 CKV_AZURE_169 CKV_AZURE_170 CKV_AZURE_171 CKV_AZURE_172 CKV_AZURE_226 CKV_AZURE_227
CKV_AZURE_232 CKV2_AZURE_29 CKV_AZURE_3 CKV_AZURE_44 CKV_AZURE_59 CKV_AZURE_35 CKV_AZURE_36 CKV2_AZURE_33
CKV_AZURE_190 CKV2_AZURE_47 CKV_AZURE_34 CKV2_AZURE_40 CKV2_AZURE_41 CKV_AZURE_206 CKV_AZURE_244 CKV2_AZURE_38
CKV2_AZURE_21 CKV_AZURE_33 CKV2_AZURE_1 CKV_AZURE_43 CKV_AZURE_42 CKV_AZURE_110 CKV_AZURE_111 CKV_AZURE_109
CKV_AZURE_189 CKV2_AZURE_32 CKV_AZURE_40 CKV_AZURE_41 CKV_AZURE_114 CKV_AZURE_112 CKV_AZURE_137 CKV_AZURE_138
CKV_AZURE_139 CKV_AZURE_163 CKV_AZURE_164 CKV_AZURE_165 CKV_AZURE_166 CKV_AZURE_167 CKV_AZURE_233 CKV_AZURE_237
CKV_AZURE_9 CKV_AZURE_10 CKV_AZURE_77 CKV_AZURE_160 CKV_AZURE_182 CKV_AZURE_84 CKV_AZURE_87
Azure.AKS.ContainerInsights Azure.AKS.AuditLogs Azure.AKS.PlatformLogs Azure.AKS.UseRBAC Azure.AKS.AuthorizedIPs
Azure.AKS.NetworkPolicy Azure.AKS.AzurePolicyAddOn Azure.AKS.LocalAccounts Azure.AKS.ManagedAAD Azure.AKS.AzureRBAC
Azure.AKS.NodeMinPods Azure.AKS.PoolScaleSet Azure.AKS.UptimeSLA Azure.AKS.AutoUpgrade Azure.AKS.SecretStore
Azure.AKS.SecretStoreRotation Azure.AKS.EphemeralOSDisk Azure.AKS.CNISubnetSize Azure.AKS.ManagedIdentity
Azure.AKS.DefenderProfile Azure.Defender.Containers Azure.AKS.AutoScaling Azure.AKS.MinNodeCount
Azure.AKS.AvailabilityZone Azure.AKS.Version Azure.AKS.PoolVersion Azure.AKS.HttpAppRouting Azure.AKS.StandardLB
Azure.Storage.SecureTransfer Azure.Storage.MinTLS Azure.Storage.Firewall Azure.Storage.BlobPublicAccess
Azure.Storage.BlobAccessType Azure.Storage.UseReplication Azure.Storage.SoftDelete Azure.Storage.ContainerSoftDelete
Azure.Storage.DefenderCloud Azure.KeyVault.PurgeProtect Azure.KeyVault.SoftDelete Azure.KeyVault.Firewall
Azure.KeyVault.RBAC Azure.KeyVault.Logs Azure.KeyVault.AutoRotationPolicy Azure.ACR.AdminUser
Azure.ACR.AnonymousAccess Azure.ACR.Firewall Azure.ACR.MinSku Azure.NSG.AnyInboundSource Azure.NSG.LateralTraversal
Azure.NSG.AKSRules Azure.VNET.UseNSGs Azure.LB.StandardSKU Azure.PublicIP.StandardSKU
Azure.PublicIP.AvailabilityZone Azure.PublicIP.IsAttached Azure.Defender.KeyVault Azure.Defender.Storage
Azure.Resource.UseTags
"""


def test_every_public_rule_is_answered_or_said_not_to_be_asked() -> None:
    answered = {one for rule in RULES for one in rule.answers}
    not_asked = {one.strip() for ids in NOT_ASKED for one in ids.split(",")}
    assert [one for one in PUBLIC.split() if (one in answered) == (one in not_asked)] == []


def test_the_page_of_the_policy_names_every_rule_and_every_excuse() -> None:
    page = policy_table()
    assert all(f"| `{rule.name}` | {rule.what} | {rule.severity} |" in page for rule in RULES)
    assert all(one.reason in page for one in EXCUSES)
    assert {len(line.split(" | ")) for line in page.splitlines() if line.startswith("| `") and "|  |" not in line} <= {
        2,
        4,
    }


# the pack, spoken to as the Pulumi engine speaks to it


class Pack:
    """The pack as a process of its own, and what it answers."""

    def __init__(self, channel: grpc.Channel) -> None:
        self.analyzer = analyzer_pb2_grpc.AnalyzerStub(channel)

    def findings(self, resources: list[Recorded], stack: str = STACK) -> dict[str, tuple[str, str, str]]:
        """What it says of a stack: level, resource and message by policy."""
        request = analyzer_pb2.AnalyzeStackRequest()
        for one in resources:
            sent = request.resources.add(type=one.type, name=one.name, urn=one.urn.replace(STACK, stack))
            sent.dependencies.extend(urn.replace(STACK, stack) for urn in one.dependencies)
            sent.properties.update(one.inputs)
            sent.options.protect = one.protect
            sent.options.ignoreChanges.extend(one.ignore_changes)
        answer = self.analyzer.AnalyzeStack(request, timeout=60)
        return {
            one.policyName: (
                analyzer_pb2.EnforcementLevel.Name(one.enforcementLevel),
                one.urn.rpartition("::")[2],
                one.message.partition("\n")[2],
            )
            for one in answer.diagnostics
        }


@contextlib.contextmanager
def packed(config: dict[str, Any] | None) -> Iterator[Pack]:
    """The pack, started as Pulumi's language host starts it. config: what it is handed of the stack's."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PULUMI_")}
    if config is not None:
        environment["PULUMI_CONFIG"] = json.dumps({key: json.dumps(value) for key, value in config.items()})
    folder = str(ROOT / "infra" / "policy_pack")
    command = [sys.executable, "-u", "-m", "pulumi.policy", "127.0.0.1:1", folder]
    with subprocess.Popen(command, stdout=subprocess.PIPE, cwd=folder, env=environment) as process:
        try:
            assert process.stdout
            port = process.stdout.readline().decode().strip()
            assert port.isdigit(), "the pack ended before it told its port"
            with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
                yield Pack(channel)
        finally:
            process.terminate()


@pytest.fixture(scope="module")
def pack() -> Iterator[Pack]:
    within = context(exceptions={"registry-no-admin": "an old build needs it", "tags/nobody": "never mind"})
    intent = json.loads(within.intent.model_dump_json(exclude_defaults=True))
    with packed({"tonnage:intent": intent, "tonnage:plan": relocked(within.lock)}) as found:
        yield found


def relocked(lock: Lock) -> dict[str, Any]:
    """A plan that a test has changed, with the digest that it has then."""
    return lock.model_copy(update={"digest": digest_of(lock.plain())}).plain()


def test_the_pack_has_a_policy_for_each_rule_and_only_the_severe_stop_an_update(pack: Pack) -> None:
    info = pack.analyzer.GetAnalyzerInfo(empty_pb2.Empty(), timeout=60)
    levels = {one.name: analyzer_pb2.EnforcementLevel.Name(one.enforcementLevel) for one in info.policies}
    wanted = {rule.name: "MANDATORY" if rule.severity == "high" else "ADVISORY" for rule in RULES}
    assert levels == {"plan-readable": "MANDATORY", **wanted, "excused": "ADVISORY"}


def test_the_pack_finds_what_the_rules_find(pack: Pack) -> None:
    stack = good()
    stack["account"] = changed(stack["account"], "allowSharedKeyAccess", True)
    stack["account"] = changed(stack["account"], "sasPolicy", GONE)
    stack["registry"] = changed(stack["registry"], "adminUserEnabled", True)
    assert pack.findings(list(stack.values())) == {
        "no-shared-keys": (
            "MANDATORY",
            "account",
            "the account's keys open everything in it: set allow_shared_key_access to False",
        ),
        "sas-expiry": (
            "ADVISORY",
            "account",
            "signed links may live as long as who makes them likes: set sas_policy to seven days at most",
        ),
        # two reports under this name; the last is what the test keeps
        "excused": ("ADVISORY", "", "the exception tags/nobody excuses nothing: take it out of the intent"),
    }


def test_the_pack_takes_pulumis_signs_for_unknowns_of_every_type(pack: Pack) -> None:
    """sdk/go/common/resource/plugin/rpc.go: a sign of its own for booleans, numbers, lists and objects."""
    stack = good()
    for path, sign in (
        ("allowSharedKeyAccess", "1c4a061d-8072-4f0a-a4cb-0ff528b18fe7"),
        ("sku", "dd056dcd-154b-4c76-9bd3-c8f88648b5ff"),
        ("tags", "dd056dcd-154b-4c76-9bd3-c8f88648b5ff"),
    ):
        stack["account"] = changed(stack["account"], path, sign)
    stack["cluster"] = changed(
        stack["cluster"], "apiServerAccessProfile/authorizedIPRanges", "6a19a0b0-7e62-4c92-b797-7f8e31da9cc2"
    )
    stack["t4spot"] = changed(stack["t4spot"], "maxPods", "3eeb2bf0-c639-47a8-9e75-3b44932eb421")
    assert set(pack.findings(list(stack.values()))) == {"excused"}


def test_the_pack_judges_what_was_asked_for_where_the_state_tells_it(pack: Pack) -> None:
    stack = good()
    asked = copy.deepcopy(stack["account"].inputs)
    told = changed(stack["account"], "encryption", {"keySource": "Microsoft.Storage"})
    stack["account"] = changed(told, "__inputs", {"4dabf18193072939515e22adb298388d": SECRET_SIGN, "value": asked})
    assert set(pack.findings(list(stack.values()))) == {"excused"}


SECRET_SIGN = "1b47061264138c4ac30d75fd1eb44270"


def test_no_finding_of_the_pack_tells_a_secret(pack: Pack) -> None:
    canary = "canary-8d1f"
    stack = good()
    hidden = {"4dabf18193072939515e22adb298388d": SECRET_SIGN, "value": canary}
    stack["secret-mounted"] = changed(stack["secret-mounted"], "stringData/token", hidden)
    found = pack.findings(list(stack.values()))
    assert set(found) == {"no-secrets-in-objects", "excused"}
    assert canary not in str(found)


def test_without_config_the_pack_reads_the_stacks_own_file() -> None:
    stack = [changed(good()["account"], "allowSharedKeyAccess", True)]
    with packed(None) as found:
        told = found.findings(stack, stack="dev-32k")
        assert told["no-shared-keys"][:2] == ("MANDATORY", "account")
        assert "tags" in told  # those of another stack
        assert "plan-readable" not in told
        level, _, sentence = found.findings(stack, stack="nowhere")["plan-readable"]
        assert level == "MANDATORY"
        assert sentence.startswith("there is no stack file stacks/Pulumi.nowhere.yaml: choose one of")
