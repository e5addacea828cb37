"""Rules for Blob storage: who may read it, how it is reached, what is kept of what was deleted."""

from __future__ import annotations

import re
from collections.abc import Sequence

from infra.policy.links import unlogged, without_endpoint
from infra.policy.nouns import UNKNOWN, Book, Context, Fault, Recorded, at, behind, listed, of_kind, says

ACCOUNT, CONTAINER, VAULT = "storage:StorageAccount", "storage:BlobContainer", "keyvault:Vault"

storage = Book("storage")


@storage.each(
    (ACCOUNT, CONTAINER),
    "no-public-blob",
    "no blob can be read without a login",
    "high",
    "CKV_AZURE_190",
    "CKV2_AZURE_47",
    "CKV_AZURE_34",
    "Azure.Storage.BlobPublicAccess",
    "Azure.Storage.BlobAccessType",
    "4fa4b6c0-31ca-4c0d-b10d-24b96f62a751",
)
def no_public_blob(resource: Recorded, _: Context) -> str | None:
    if resource.kind.endswith("BlobContainer"):
        if says(at(resource.inputs, "publicAccess"), "None"):
            return None
        return "the container does not say that it is closed: set public_access to None"
    if says(at(resource.inputs, "allowBlobPublicAccess"), False):
        return None
    return "the account lets containers be opened to everybody: set allow_blob_public_access to False"


storage.wants(
    ACCOUNT,
    "allowSharedKeyAccess",
    [False],
    "no-shared-keys",
    "storage has no account keys: who reads is an identity",
    "high",
    "CKV2_AZURE_40",
    "8c6a50c6-9ffd-4ae7-986f-5fa6111f9a54",
    otherwise="the account's keys open everything in it: set allow_shared_key_access to False",
)
storage.wants(
    ACCOUNT,
    "enableHttpsTrafficOnly",
    [True],
    "https-only",
    "storage answers over HTTPS alone",
    "high",
    "CKV_AZURE_3",
    "Azure.Storage.SecureTransfer",
    "404c3081-a854-4457-ae30-26a93ef643f9",
    otherwise="the account may be read in plain text: set enable_https_traffic_only to True",
)
storage.wants(
    ACCOUNT,
    "minimumTlsVersion",
    ["TLS1_2", "TLS1_3"],
    "tls-1-2",
    "storage takes TLS 1.2 at least",
    "high",
    "CKV_AZURE_44",
    "Azure.Storage.MinTLS",
    "fe83a0eb-a853-422d-aac2-1bffd182c5d0",
    otherwise="the account takes versions of TLS that are broken: set minimum_tls_version to TLS1_2",
)


@storage.each(
    ACCOUNT,
    "storage-firewall",
    "storage denies what no rule lets in, Azure's own services aside",
    "high",
    "CKV_AZURE_35",
    "CKV_AZURE_36",
    "Azure.Storage.Firewall",
    "34c877ad-507e-4c82-993e-3452a6e0ad3c",
    "c9d007d0-c057-4772-b18c-01e546713bcd",
)
def storage_firewall(resource: Recorded, _: Context) -> str | None:
    if not says(at(resource.inputs, "networkRuleSet.defaultAction"), "Deny"):
        return "the account's firewall lets everybody in: set the network rule set's default_action to Deny"
    bypass = at(resource.inputs, "networkRuleSet.bypass")
    if bypass != UNKNOWN and "AzureServices" not in str(bypass):
        return "the account's firewall shuts out Azure's own services, logging too: set bypass to AzureServices"
    return None


storage.wants(
    ACCOUNT,
    "publicNetworkAccess",
    ["Disabled"],
    "storage-private",
    "storage has no public address",
    "medium",
    "CKV_AZURE_59",
    "b2982f36-99f2-4db5-8eff-283140c09693",
    otherwise="the account has a public address: set public_network_access to Disabled and make a private endpoint",
)


@storage.over(
    "storage-private-endpoint",
    "storage is reached through a private endpoint",
    "medium",
    "CKV2_AZURE_33",
    "6edd7eda-6dd8-40f7-810d-67160c639cd9",
)
def storage_private_endpoint(resources: Sequence[Recorded], _: Context) -> list[Fault]:
    return without_endpoint(resources, ACCOUNT, "blob")


@storage.over(
    "reached-from-nodes",
    "storage and vault let the nodes' network in: by a private endpoint, else by a rule for its subnet",
    "medium",
    "2a1a9cdf-e04d-429a-8416-3bfb72a1b26f",
)
def reached_from_nodes(resources: Sequence[Recorded], _: Context) -> list[Fault]:
    found: list[Fault] = []
    for kind, group, path in (
        (ACCOUNT, "blob", "networkRuleSet.virtualNetworkRules"),
        (VAULT, "vault", "properties.networkAcls.virtualNetworkRules"),
    ):
        found += [
            (one, "nothing in the network can reach it: make a private endpoint, or a virtual network rule")
            for one, _ in without_endpoint(resources, kind, group)
            if one and not listed(at(one.inputs, path))
        ]
    return found


@storage.each(
    ACCOUNT,
    "sas-expiry",
    "signed links to blobs end within a week",
    "low",
    "CKV2_AZURE_41",
    "bc1b984e-ddae-40cc-801a-050a030e4fbe",
    "7aa1c9d5-3d7e-4579-8117-d85e99211757",
)
def sas_expiry(resource: Recorded, _: Context) -> str | None:
    period = at(resource.inputs, "sasPolicy.sasExpirationPeriod")
    found = re.fullmatch(r"(\d{1,4})\.(\d\d):(\d\d):(\d\d)", str(period))
    days, hours, minutes, seconds = map(int, found.groups()) if found else (8, 0, 0, 0)
    if period == UNKNOWN or ((days * 24 + hours) * 60 + minutes) * 60 + seconds <= 7 * 24 * 3600:
        return None
    return "signed links may live as long as who makes them likes: set sas_policy to seven days at most"


storage.wants(
    ACCOUNT,
    "sku.name",
    [f"Standard_{kind}" for kind in ("ZRS", "GRS", "GZRS", "RAGRS", "RAGZRS")] + ["Premium_ZRS"],
    "storage-replicated",
    "storage outlives the loss of a zone",
    "medium",
    "CKV_AZURE_206",
    "Azure.Storage.UseReplication",
    "bf045164-79ba-4215-8f95-f8048dc1780b",
    otherwise="all copies lie in one building: take Standard_ZRS (redundancy: zrs in the intent)",
)
storage.wants(
    ACCOUNT,
    "isLocalUserEnabled",
    [False],
    "no-local-users",
    "storage has no users of its own (SFTP)",
    "medium",
    "CKV_AZURE_244",
    otherwise="the account may have users beside Entra ID: set is_local_user_enabled to False",
)
storage.wants(
    ACCOUNT,
    "allowCrossTenantReplication",
    [False],
    "no-cross-tenant",
    "storage is not copied to other tenants",
    "medium",
    "92a89a79-6c52-4a7e-a03f-61306fc49312",
    otherwise="blobs may be copied to another tenant: set allow_cross_tenant_replication to False",
)
storage.wants(
    ACCOUNT,
    "encryption.requireInfrastructureEncryption",
    [True],
    "double-encryption",
    "storage is encrypted twice",
    "low",
    "4733ea7b-a883-42fe-8cac-97454c2a9e4a",
    otherwise="the account is encrypted once, and that can be set only when it is made: set"
    " require_infrastructure_encryption to True",
)
storage.wants(
    ACCOUNT,
    "encryption.keySource",
    ["Microsoft.Keyvault"],
    "storage-own-key",
    "storage is encrypted with a key of one's own",
    "low",
    "CKV2_AZURE_1",
    "6fac406b-40ca-413b-bf8e-0bf964659c25",
    otherwise="Microsoft keeps the key: give the account one of yours in the vault",
)


@storage.over(
    "soft-delete",
    "deleted blobs and containers can be had back for as long as the plan's bill says",
    "medium",
    "CKV2_AZURE_38",
    "Azure.Storage.SoftDelete",
    "Azure.Storage.ContainerSoftDelete",
)
def soft_delete(resources: Sequence[Recorded], context: Context) -> list[Fault]:
    found: list[Fault] = []
    days = context.lock.around.storage.soft_delete_days
    services = list(of_kind(resources, "storage:BlobServiceProperties"))
    for one in services:
        for path, what in (("deleteRetentionPolicy", "blobs"), ("containerDeleteRetentionPolicy", "containers")):
            if not says(at(one.inputs, f"{path}.enabled"), True):
                found.append((one, f"deleted {what} are gone at once: enable their retention policy"))
            elif path == "deleteRetentionPolicy" and not says(at(one.inputs, f"{path}.days"), days):
                found.append((one, f"the bill counts {days} days of deleted blobs: keep them as long"))
    covered = {other.urn for one in services for other in behind(one, resources)}
    return found + [
        (one, "the account says nothing of deleted blobs: give it BlobServiceProperties")
        for one in of_kind(resources, ACCOUNT)
        if one.urn not in covered
    ]


@storage.over(
    "storage-logs", "who reads, writes and deletes blobs is logged", "medium", "CKV2_AZURE_21", "CKV_AZURE_33"
)
def storage_logs(resources: Sequence[Recorded], _: Context) -> list[Fault]:
    wanted = ("StorageRead", "StorageWrite", "StorageDelete")
    return unlogged(resources, ACCOUNT, wanted, ("allLogs", "audit"), "storage:BlobServiceProperties")


@storage.each(
    (ACCOUNT, VAULT),
    "protected",
    "in production, `pulumi destroy` stops before storage and vault",
    "medium",
)
def protected(resource: Recorded, context: Context) -> str | None:
    if resource.protect or not context.prod:
        return None
    return "one command takes it along with all data in it: set the resource option protect"


RULES = tuple(storage.rules)
