"""Blob storage of a stack: weights, datasets, checkpoints and adapters, and who may read or write which."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from ipaddress import IPv4Network

import pulumi
from pulumi_azure_native import authorization, storage

from infra.names import Names
from infra.network import Endpoints, is_private, private_endpoint
from infra.roles import role_assignment
from planner.plan.lock import Around

CONTAINERS = ("models", "datasets", "checkpoints", "adapters")
# A run that wrote nothing for so long has ended or was given up: what it produced is among the adapters or models. The
# program itself deletes all but the newest checkpoints, as the bill counts them; this takes what it left behind.
CHECKPOINT_DAYS = 30


@dataclass(frozen=True)
class Grant:
    """Somebody's right to blobs: of one container, or of the whole account where that is None.

    principal_type, once: as of role_assignment
    """

    name: str
    principal_id: pulumi.Input[str]
    container: str | None
    role: str
    principal_type: pulumi.Input[authorization.PrincipalType] = authorization.PrincipalType.SERVICE_PRINCIPAL
    once: bool = False


@dataclass(frozen=True)
class StorageArgs:
    """around: of the plan; endpoints: where private endpoints go; grants: who may read or write.

    allowed_networks: of people who upload data, where the account has no private endpoint
    protect: `pulumi destroy` stops before the account, and what Pulumi forgets stays in Azure
    """

    location: str
    resource_group_name: pulumi.Input[str]
    tags: Mapping[str, str]
    names: Names
    around: Around
    subscription_id: pulumi.Input[str]
    nodes_subnet_id: pulumi.Input[str]
    endpoints: Endpoints | None
    grants: Sequence[Grant]
    protect: bool
    allowed_networks: Sequence[IPv4Network] = ()


class Storage(pulumi.ComponentResource):
    """The storage account and its containers.

    account_id, account_name, blob_endpoint: of the account; blob_service_id: of its blob service
    containers: the names by what they hold
    ready: what a reader of blobs must wait for
    """

    account_id: pulumi.Output[str]
    account_name: pulumi.Output[str]
    blob_endpoint: pulumi.Output[str]
    blob_service_id: pulumi.Output[str]
    containers: dict[str, pulumi.Output[str]]
    ready: list[pulumi.Resource]

    def __init__(self, name: str, args: StorageArgs, opts: pulumi.ResourceOptions | None = None) -> None:
        super().__init__("tonnage:infra:Storage", name, {}, opts)
        keep = pulumi.ResourceOptions(parent=self, protect=args.protect, retain_on_delete=args.protect)
        private = is_private("blob", args.endpoints)
        account = storage.StorageAccount(
            args.names.unique,
            location=args.location,
            resource_group_name=args.resource_group_name,
            tags=args.tags,
            kind=storage.Kind.STORAGE_V2,
            sku=storage.SkuArgs(name=f"Standard_{str(args.around.storage.redundancy).upper()}"),
            access_tier=storage.AccessTier.HOT,
            minimum_tls_version=storage.MinimumTlsVersion.TLS1_2,
            enable_https_traffic_only=True,
            allow_blob_public_access=False,
            allow_shared_key_access=False,
            allow_cross_tenant_replication=False,
            default_to_o_auth_authentication=True,
            is_local_user_enabled=False,
            is_sftp_enabled=False,
            encryption=storage.EncryptionArgs(
                key_source=storage.KeySource.MICROSOFT_STORAGE,
                require_infrastructure_encryption=True,
                services=storage.EncryptionServicesArgs(
                    blob=storage.EncryptionServiceArgs(enabled=True, key_type=storage.KeyType.ACCOUNT),
                    file=storage.EncryptionServiceArgs(enabled=True, key_type=storage.KeyType.ACCOUNT),
                ),
            ),
            sas_policy=storage.SasPolicyArgs(
                expiration_action=storage.ExpirationAction.BLOCK, sas_expiration_period="1.00:00:00"
            ),
            public_network_access=storage.PublicNetworkAccess.DISABLED
            if private
            else storage.PublicNetworkAccess.ENABLED,
            network_rule_set=_firewall(None, ()) if private else _firewall(args.nodes_subnet_id, args.allowed_networks),
            opts=keep,
        )
        self.account_id, self.account_name = account.id, account.name
        self.blob_endpoint = pulumi.Output.format("https://{0}.blob.core.windows.net", account.name)
        self.blob_service_id = self._service(args).id
        made = {kind: self._container(kind, args, keep) for kind in CONTAINERS}
        self.containers = {kind: container.name for kind, container in made.items()}
        self.ready = [*made.values(), *(self._grant(grant, args, made) for grant in args.grants)]
        self.ready += private_endpoint("blob", account.id, args, self)
        self.register_outputs({"account_name": self.account_name, "blob_endpoint": self.blob_endpoint})

    def _service(self, args: StorageArgs) -> storage.BlobServiceProperties:
        """The blob service: soft delete for as long as the bill counts it, and rules by which blobs move and end."""
        days = args.around.storage.soft_delete_days
        kept = storage.DeleteRetentionPolicyArgs(enabled=days > 0, days=days or None)
        service = storage.BlobServiceProperties(
            "blobs",
            blob_services_name="default",
            account_name=self.account_name,
            resource_group_name=args.resource_group_name,
            delete_retention_policy=kept,
            container_delete_retention_policy=kept,
            # each version of a checkpoint or of weights is billed whole, and tens of GB; soft delete undoes mistakes
            is_versioning_enabled=False,
            opts=pulumi.ResourceOptions(parent=self),
        )
        storage.ManagementPolicy(
            "lifecycle",
            management_policy_name="default",
            account_name=self.account_name,
            resource_group_name=args.resource_group_name,
            policy=storage.ManagementPolicySchemaArgs(rules=_rules(args.around)),
            opts=pulumi.ResourceOptions(parent=self),
        )
        return service

    def _container(self, kind: str, args: StorageArgs, keep: pulumi.ResourceOptions) -> storage.BlobContainer:
        return storage.BlobContainer(
            kind,
            container_name=kind,
            account_name=self.account_name,
            resource_group_name=args.resource_group_name,
            public_access=storage.PublicAccess.NONE,
            opts=keep,
        )

    def _grant(self, grant: Grant, args: StorageArgs, made: Mapping[str, storage.BlobContainer]) -> pulumi.Resource:
        return role_assignment(
            grant.name,
            stack=args.names.stack,
            role=grant.role,
            scope=self.account_id if grant.container is None else made[grant.container].id,
            principal_id=grant.principal_id,
            subscription_id=args.subscription_id,
            principal_type=grant.principal_type,
            once=grant.once,
            parent=self,
        )


def _firewall(nodes_subnet_id: pulumi.Input[str] | None, allowed: Sequence[IPv4Network]) -> storage.NetworkRuleSetArgs:
    """Closed but to Azure's own services; where there is no private endpoint, open to the nodes and to people there."""
    nodes = [] if nodes_subnet_id is None else [nodes_subnet_id]
    return storage.NetworkRuleSetArgs(
        default_action=storage.DefaultAction.DENY,
        bypass=storage.Bypass.AZURE_SERVICES,
        virtual_network_rules=[
            storage.VirtualNetworkRuleArgs(virtual_network_resource_id=subnet_id, action=storage.Action.ALLOW)
            for subnet_id in nodes
        ],
        # Azure takes single addresses without a mask, and none of two
        ip_rules=[
            storage.IPRuleArgs(i_p_address_or_range=str(part.network_address if part.prefixlen == 32 else part))
            for network in allowed
            for part in (network.subnets(new_prefix=32) if network.prefixlen == 31 else [network])
        ],
    )


def _rules(around: Around) -> list[storage.ManagementPolicyRuleArgs]:
    """A move for each container whose tier is not hot, as soon as Azure gets to it; an end for stale checkpoints."""
    tiers = {
        "models": around.storage.weights_tier,
        "datasets": around.storage.datasets_tier,
        "checkpoints": around.storage.checkpoints_tier,
        "adapters": around.storage.adapters_tier,
    }
    at_once = storage.DateAfterModificationArgs(days_after_modification_greater_than=0)
    rules = [
        _rule(
            f"{container}To{tier.capitalize()}",
            container,
            storage.ManagementPolicyBaseBlobArgs(
                tier_to_cool=at_once if tier == "cool" else None,
                tier_to_cold=at_once if tier == "cold" else None,
                tier_to_archive=at_once if tier == "archive" else None,
            ),
        )
        for container, tier in tiers.items()
        if tier != "hot"
    ]
    stale = storage.DateAfterModificationArgs(days_after_modification_greater_than=CHECKPOINT_DAYS)
    return [*rules, _rule("checkpointsEnd", "checkpoints", storage.ManagementPolicyBaseBlobArgs(delete=stale))]


def _rule(name: str, container: str, actions: storage.ManagementPolicyBaseBlobArgs) -> storage.ManagementPolicyRuleArgs:
    return storage.ManagementPolicyRuleArgs(
        name=name,
        type=storage.RuleType.LIFECYCLE,
        enabled=True,
        definition=storage.ManagementPolicyDefinitionArgs(
            filters=storage.ManagementPolicyFilterArgs(blob_types=["blockBlob"], prefix_match=[f"{container}/"]),
            actions=storage.ManagementPolicyActionArgs(base_blob=actions),
        ),
    )
