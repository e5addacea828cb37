"""The key vault of a stack: its secrets, and which identities may read them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import pulumi
from pulumi_azure_native import keyvault

from infra.names import Names
from infra.network import Endpoints, is_private, private_endpoint
from infra.roles import role_assignment
from planner.plan.lock import Around


@dataclass(frozen=True)
class VaultArgs:
    """around: of the plan; endpoints: where private endpoints go; secrets: values by name, encrypted in the stack file.

    readers: principal ids by the logical name of their role assignment; protect: `pulumi destroy` stops before it
    """

    location: str
    resource_group_name: pulumi.Input[str]
    tags: Mapping[str, str]
    names: Names
    around: Around
    tenant_id: pulumi.Input[str]
    subscription_id: pulumi.Input[str]
    nodes_subnet_id: pulumi.Input[str]
    endpoints: Endpoints | None
    secrets: Mapping[str, pulumi.Input[str]]
    readers: Mapping[str, pulumi.Input[str]]
    protect: bool


class Vault(pulumi.ComponentResource):
    """The vault with its secrets.

    vault_id, vault_name, vault_uri: of the vault; secrets: the names of those that it holds
    ready: what a reader of secrets must wait for
    """

    vault_id: pulumi.Output[str]
    vault_name: pulumi.Output[str]
    vault_uri: pulumi.Output[str]
    secrets: tuple[str, ...]
    ready: list[pulumi.Resource]

    def __init__(self, name: str, args: VaultArgs, opts: pulumi.ResourceOptions | None = None) -> None:
        super().__init__("tonnage:infra:Vault", name, {}, opts)
        private = is_private("vault", args.endpoints)
        prod = args.around.posture == "prod"
        vault = keyvault.Vault(
            args.names.unique,
            location=args.location,
            resource_group_name=args.resource_group_name,
            tags=args.tags,
            properties=keyvault.VaultPropertiesArgs(
                tenant_id=args.tenant_id,
                sku=keyvault.SkuArgs(family=keyvault.SkuFamily.A, name=keyvault.SkuName.STANDARD),
                enable_rbac_authorization=True,
                enable_soft_delete=True,
                soft_delete_retention_in_days=90 if prod else 7,
                # unset rather than False: Azure refuses False once it was True, and an unprotected vault needs neither
                enable_purge_protection=True if prod else None,
                enabled_for_deployment=False,
                enabled_for_disk_encryption=False,
                enabled_for_template_deployment=False,
                public_network_access="disabled" if private else "enabled",
                network_acls=_firewall(None if private else args.nodes_subnet_id),
            ),
            opts=pulumi.ResourceOptions(parent=self, protect=args.protect),
        )
        self.vault_id, self.vault_name = vault.id, vault.name
        self.vault_uri = pulumi.Output.format("https://{0}.vault.azure.net/", vault.name)
        self.secrets = tuple(args.secrets)
        self.ready = [self._secret(secret, value, args) for secret, value in args.secrets.items()]
        self.ready += [
            role_assignment(
                reader,
                stack=args.names.stack,
                role="Key Vault Secrets User",
                scope=vault.id,
                principal_id=principal_id,
                subscription_id=args.subscription_id,
                parent=self,
            )
            for reader, principal_id in args.readers.items()
        ]
        self.ready += private_endpoint("vault", vault.id, args, self)
        self.register_outputs({"vault_name": self.vault_name, "vault_uri": self.vault_uri})

    def _secret(self, name: str, value: pulumi.Input[str], args: VaultArgs) -> keyvault.Secret:
        """Written through Azure Resource Manager, which needs no way through the vault's firewall.

        Deleting is only possible through the firewall: Pulumi leaves that to the deletion of the vault.
        """
        return keyvault.Secret(
            name,
            secret_name=name,
            vault_name=self.vault_name,
            resource_group_name=args.resource_group_name,
            tags=args.tags,
            properties=keyvault.SecretPropertiesArgs(
                value=pulumi.Output.secret(value),
                content_type="text/plain",
                attributes=keyvault.SecretAttributesArgs(enabled=True),
            ),
            opts=pulumi.ResourceOptions(parent=self, protect=args.protect, retain_on_delete=True),
        )


def _firewall(nodes_subnet_id: pulumi.Input[str] | None) -> keyvault.NetworkRuleSetArgs:
    """Closed but to Azure's own services, and to the nodes where there is no private endpoint."""
    nodes = [] if nodes_subnet_id is None else [nodes_subnet_id]
    return keyvault.NetworkRuleSetArgs(
        default_action=keyvault.NetworkRuleAction.DENY,
        bypass=keyvault.NetworkRuleBypassOptions.AZURE_SERVICES,
        ip_rules=[],
        virtual_network_rules=[keyvault.VirtualNetworkRuleArgs(id=subnet_id) for subnet_id in nodes],
    )
