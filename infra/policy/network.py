"""Rules for the network, for what is monitored, and for tags."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from infra.policy.nouns import UNKNOWN, Book, Context, Fault, Recorded, at, entry, listed, of_kind, says
from infra.tags import tags

# what Azure takes no tags on, of what a stack may hold (pulumi-azure-native 3.29)
TAGLESS = frozenset(
    {
        "authorization:ManagementLockByScope",
        "authorization:RoleAssignment",
        "authorization:RoleDefinition",
        "consumption:Budget",
        "containerregistry:ScopeMap",
        "containerregistry:TaskRun",
        "containerregistry:Token",
        "containerservice:MaintenanceConfiguration",
        "containerservice:DeploymentSafeguard",
        "keyvault:AccessPolicy",
        "kubernetesconfiguration:Extension",
        "managedidentity:FederatedIdentityCredential",
        "monitor:DataCollectionRuleAssociation",
        "monitor:DiagnosticSetting",
        "network:PrivateDnsZoneGroup",
        "network:SecurityRule",
        "network:Subnet",
        "operationalinsights:Table",
        "privatedns:PrivateRecordSet",
        "storage:BlobContainer",
        "storage:BlobServiceProperties",
        "storage:ManagementPolicy",
    }
)
ANYBODY = ("*", "any", "internet", "0.0.0.0/0", "::/0", "0.0.0.0")
SUBNET, SECURITY_GROUP, WORKSPACE = "network:Subnet", "network:NetworkSecurityGroup", "operationalinsights:Workspace"

network, monitor = Book("network"), Book("monitor")


@network.over(
    "tags", "every resource says whose it is and what stack it belongs to", "medium", "Azure.Resource.UseTags"
)
def tagged(resources: Sequence[Recorded], context: Context) -> list[Fault]:
    wanted = tags(context.stack, context.lock.around.posture, context.intent.tags)
    found: list[Fault] = []
    for one in resources:
        provider, _, kind = one.kind.partition(":")
        if provider != "azure-native" or kind in TAGLESS or ":" not in kind:
            continue
        missing = [name for name, value in wanted.items() if not says(entry(one.inputs.get("tags"), name), value)]
        if missing:
            found.append((one, f"it lacks the tags {', '.join(missing)} of its stack: set tags"))
    return found


def _without_group(subnet: Mapping[str, Any]) -> bool:
    group = at(subnet, "networkSecurityGroup")
    return group != UNKNOWN and not at(group, "id")


@network.over(
    "subnet-guarded", "every subnet has a security group", "medium", "Azure.VNET.UseNSGs", "Azure.NSG.AKSRules"
)
def subnet_guarded(resources: Sequence[Recorded], _: Context) -> list[Fault]:
    found: list[Fault] = [
        (one, "nothing says who may enter the subnet: give it a network security group")
        for one in of_kind(resources, SUBNET)
        if _without_group(one.inputs)
    ]
    for one in of_kind(resources, "network:VirtualNetwork"):
        bare = [s for s in listed(at(one.inputs, "subnets")) if isinstance(s, dict) and _without_group(s)]
        found += [(one, f"its subnet {s.get('name', '')} has no network security group: give it one") for s in bare]
    return found


@network.over(
    "nothing-from-internet",
    "no rule lets the Internet in, to SSH and RDP least of all",
    "high",
    "CKV_AZURE_9",
    "CKV_AZURE_10",
    "CKV_AZURE_77",
    "CKV_AZURE_160",
    "Azure.NSG.AnyInboundSource",
    "Azure.NSG.LateralTraversal",
)
def nothing_from_internet(resources: Sequence[Recorded], _: Context) -> list[Fault]:
    found: list[Fault] = []
    for one in of_kind(resources, (SECURITY_GROUP, "network:SecurityRule")):
        own = [one.inputs] if one.kind.endswith("SecurityRule") else listed(at(one.inputs, "securityRules"))
        for rule in own:
            if rule != UNKNOWN and _lets_in(rule):
                ports = [at(rule, "destinationPortRange"), *listed(at(rule, "destinationPortRanges"))]
                shown = ", ".join(str(port) for port in ports if port)
                found.append((one, f"everybody may reach the ports {shown}: name the source, or deny it"))
    return found


def _lets_in(rule: Mapping[str, Any]) -> bool:
    """Whether a rule is known to let anybody in."""
    inbound = str(at(rule, "direction")).lower() == "inbound" and str(at(rule, "access")).lower() == "allow"
    sources = [at(rule, "sourceAddressPrefix"), *listed(at(rule, "sourceAddressPrefixes"))]
    return inbound and any(str(source).lower() in ANYBODY for source in sources)


@monitor.each(WORKSPACE, "log-cap", "logs cannot cost more in a day than was thought of", "medium")
def log_cap(resource: Recorded, _: Context) -> str | None:
    cap = at(resource.inputs, "workspaceCapping.dailyQuotaGb")
    if cap == UNKNOWN or (isinstance(cap, int | float) and cap > 0):
        return None
    return "a chatty pod can cost any amount: set workspace_capping's daily_quota_gb"


monitor.wants(
    WORKSPACE,
    "features.disableLocalAuth",
    [True],
    "log-logins",
    "logs are written and read by identities alone",
    "medium",
    "e15effd4",
    otherwise="whoever has the workspace's key may write logs: set disable_local_auth to True",
)


@monitor.each(WORKSPACE, "log-network", "logs have no public address", "low", "6c53d030")
def log_network(resource: Recorded, _: Context) -> str | None:
    for path in ("publicNetworkAccessForIngestion", "publicNetworkAccessForQuery"):
        if not says(at(resource.inputs, path), "Disabled"):
            return f"logs can be reached from everywhere by who may log in: set {path} to Disabled"
    return None


RULES = (*network.rules, *monitor.rules)
