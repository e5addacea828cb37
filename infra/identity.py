"""Who the cluster and its workloads are to Azure: user-assigned identities, their roles, and who may speak for them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import pulumi
from pulumi_azure_native import managedidentity

from infra.names import Names, limited
from infra.roles import role_assignment

AUDIENCE = "api://AzureADTokenExchange"  # what Entra ID asks of a token that Kubernetes signed


@dataclass(frozen=True)
class IdentitiesArgs:
    """network_scope: what the control plane may change of the network; workloads: kinds, one identity each."""

    location: str
    resource_group_name: pulumi.Input[str]
    tags: Mapping[str, str]
    names: Names
    subscription_id: pulumi.Input[str]
    network_scope: pulumi.Input[str]
    workloads: Sequence[str]


class Identities(pulumi.ComponentResource):
    """The identities of the control plane, of the kubelets, and of each kind of workload.

    control_plane, kubelet, workloads (by kind): the identities; roles: what the cluster must wait for
    """

    control_plane: managedidentity.UserAssignedIdentity
    kubelet: managedidentity.UserAssignedIdentity
    workloads: dict[str, managedidentity.UserAssignedIdentity]
    roles: list[pulumi.Resource]

    def __init__(self, name: str, args: IdentitiesArgs, opts: pulumi.ResourceOptions | None = None) -> None:
        super().__init__("tonnage:infra:Identities", name, {}, opts)

        def identity(kind: str) -> managedidentity.UserAssignedIdentity:
            return managedidentity.UserAssignedIdentity(
                kind,
                resource_name_=args.names.of("identity", kind),
                location=args.location,
                resource_group_name=args.resource_group_name,
                tags=args.tags,
                opts=pulumi.ResourceOptions(parent=self),
            )

        self.control_plane = identity("control-plane")
        self.kubelet = identity("kubelet")
        self.workloads = {kind: identity(kind) for kind in args.workloads}
        self.roles = [
            role_assignment(
                "control-plane-joins-network",
                stack=args.names.stack,
                role="Network Contributor",
                scope=args.network_scope,
                principal_id=self.control_plane.principal_id,
                subscription_id=args.subscription_id,
                parent=self,
            ),
            role_assignment(
                "control-plane-assigns-kubelet",
                stack=args.names.stack,
                role="Managed Identity Operator",
                scope=self.kubelet.id,
                principal_id=self.control_plane.principal_id,
                subscription_id=args.subscription_id,
                parent=self,
            ),
        ]
        self.register_outputs({kind: identity.client_id for kind, identity in self.workloads.items()})


@dataclass(frozen=True)
class FederationArgs:
    """accounts: (workload, its kind) that get a service account each; issuer: the cluster's OIDC issuer."""

    resource_group_name: pulumi.Input[str]
    issuer: pulumi.Input[str]
    namespace: str
    accounts: Sequence[tuple[str, str]]
    identities: Mapping[str, managedidentity.UserAssignedIdentity]


class Federation(pulumi.ComponentResource):
    """Which service account of the cluster may speak for which identity.

    One after another: Azure refuses two federated credentials of one identity that are written at the same time.
    """

    credentials: list[managedidentity.FederatedIdentityCredential]

    def __init__(self, name: str, args: FederationArgs, opts: pulumi.ResourceOptions | None = None) -> None:
        super().__init__("tonnage:infra:Federation", name, {}, opts)
        self.credentials = []
        for workload, kind in args.accounts:
            self.credentials.append(
                managedidentity.FederatedIdentityCredential(
                    workload,
                    federated_identity_credential_resource_name=limited(
                        "federated credential", f"{args.namespace}-{workload}"
                    ),
                    resource_group_name=args.resource_group_name,
                    resource_name_=args.identities[kind].name,
                    issuer=args.issuer,
                    subject=f"system:serviceaccount:{args.namespace}:{workload}",
                    audiences=[AUDIENCE],
                    opts=pulumi.ResourceOptions(parent=self, depends_on=self.credentials[-1:]),
                )
            )
        self.register_outputs({})
