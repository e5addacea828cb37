"""Rules for the vault and the registry: who may read them, and how they are reached."""

from __future__ import annotations

from collections.abc import Sequence

from infra.policy.links import unlogged, without_endpoint
from infra.policy.nouns import Book, Context, Fault, Recorded, at, of_kind, says

VAULT, SECRET_OF_VAULT, REGISTRY = "keyvault:Vault", "keyvault:Secret", "containerregistry:Registry"

vault, registry = Book("vault"), Book("registry")

vault.wants(
    VAULT,
    "properties.enableRbacAuthorization",
    [True],
    "vault-rbac",
    "who may read secrets is said by Azure roles",
    "high",
    "Azure.KeyVault.RBAC",
    "12d4fa5e-1f9f-4c21-97a9-b99b3c6611b5",
    otherwise="the vault keeps a list of readers of its own: set enable_rbac_authorization to True",
)
vault.wants(
    VAULT,
    "properties.enablePurgeProtection",
    [True],
    "vault-purge-protection",
    "a deleted vault cannot be destroyed before its time",
    "high",
    "CKV_AZURE_42",
    "CKV_AZURE_110",
    "Azure.KeyVault.PurgeProtect",
    "0b60c0b2-2dc2-4e1c-b5c9-abbed971de53",
    otherwise="who may delete the vault may destroy it: set enable_purge_protection to True",
)
vault.wants(
    VAULT,
    "properties.enableSoftDelete",
    [True],
    "vault-soft-delete",
    "a deleted vault can be had back",
    "high",
    "CKV_AZURE_111",
    "Azure.KeyVault.SoftDelete",
    "1e66c121-a66a-4b1f-9b83-0fd99bf0fc2d",
    otherwise="a deleted vault is gone at once: set enable_soft_delete to True",
)
vault.wants(
    VAULT,
    "properties.networkAcls.defaultAction",
    ["Deny"],
    "vault-firewall",
    "the vault denies what no rule lets in",
    "high",
    "CKV_AZURE_109",
    "Azure.KeyVault.Firewall",
    "55615ac9-af46-4a59-874e-391cc3dfb490",
    otherwise="the vault's firewall lets everybody in: set the network ACLs' default_action to Deny",
)
vault.wants(
    VAULT,
    "properties.publicNetworkAccess",
    ["Disabled"],
    "vault-private",
    "the vault has no public address",
    "medium",
    "CKV_AZURE_189",
    "405c5871-3e91-4644-8a63-58e19d68ff5b",
    otherwise="the vault has a public address: set public_network_access to disabled and make a private endpoint",
)


@vault.over(
    "vault-private-endpoint",
    "the vault is reached through a private endpoint",
    "medium",
    "CKV2_AZURE_32",
    "a6abeaec-4d90-4a02-805f-6b26c4d3fbe9",
)
def vault_private_endpoint(resources: Sequence[Recorded], _: Context) -> list[Fault]:
    return without_endpoint(resources, VAULT, "vault")


@vault.over(
    "vault-logs", "who reads secrets is logged", "medium", "Azure.KeyVault.Logs", "cf820ca0-f99e-4f3e-84fb-66e913812d21"
)
def vault_logs(resources: Sequence[Recorded], _: Context) -> list[Fault]:
    return unlogged(resources, VAULT, ("AuditEvent",), ("audit", "allLogs"))


@vault.each(
    SECRET_OF_VAULT,
    "secret-content-type",
    "every secret says what it is",
    "low",
    "CKV_AZURE_114",
    "75262d3e-ba4a-4f43-85f8-9f72c090e5e3",
)
def secret_content_type(resource: Recorded, _: Context) -> str | None:
    return None if at(resource.inputs, "properties.contentType") else "nobody can tell what it is: set content_type"


@vault.each(
    SECRET_OF_VAULT,
    "secret-expiry",
    "every secret has a day on which it ends",
    "low",
    "CKV_AZURE_41",
    "98728c90-32c7-4049-8429-847dc0f4fe37",
)
def secret_expiry(resource: Recorded, _: Context) -> str | None:
    if at(resource.inputs, "properties.attributes.expires"):
        return None
    return "it is good for ever: set its attribute expires"


registry.wants(
    REGISTRY,
    "adminUserEnabled",
    [False],
    "registry-no-admin",
    "the registry has no password of its own",
    "high",
    "CKV_AZURE_137",
    "Azure.ACR.AdminUser",
    "dc921057-6b28-4fbe-9b83-f7bec05db6c2",
    otherwise="one password may push every image: set admin_user_enabled to False",
)
registry.wants(
    REGISTRY,
    "anonymousPullEnabled",
    [False],
    "registry-no-anonymous",
    "images cannot be pulled without a login",
    "high",
    "CKV_AZURE_138",
    "Azure.ACR.AnonymousAccess",
    "9f2dea28-e834-476c-99c5-3507b4728395",
    otherwise="everybody may pull its images: set anonymous_pull_enabled to False",
)
registry.wants(
    REGISTRY,
    "sku.name",
    ["Standard", "Premium"],
    "registry-tier",
    "the registry has the limits that production needs",
    "medium",
    "Azure.ACR.MinSku",
    otherwise="the Basic tier is for trying out: take standard or premium (cluster.registry in the intent)",
)


@registry.over(
    "registry-private",
    "the registry has no public address, and a private endpoint",
    "medium",
    "CKV_AZURE_139",
    "Azure.ACR.Firewall",
    "0fdf0491-d080-4575-b627-ad0e843cba0f",
    "e8eef0a8-67cf-4eb4-9386-14b0e78733d4",
    "bd560fc0-3c69-498a-ae9f-aa8eb7de0e13",
)
def registry_private(resources: Sequence[Recorded], _: Context) -> list[Fault]:
    return [
        (one, "the registry has a public address: set public_network_access to Disabled")
        for one in of_kind(resources, REGISTRY)
        if not says(at(one.inputs, "publicNetworkAccess"), "Disabled")
    ] or without_endpoint(resources, REGISTRY, "registry")


RULES = (*vault.rules, *registry.rules)
