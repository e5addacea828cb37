"""Who may do what: role assignments to managed identities, by the built-in roles of Azure."""

from __future__ import annotations

from uuid import NAMESPACE_URL, uuid5

import pulumi
from pulumi_azure_native import authorization

# the same in every tenant: Azure built-in roles, learn.microsoft.com/azure/role-based-access-control/built-in-roles
ROLES = {
    "Azure Kubernetes Service RBAC Cluster Admin": "b1ff04bb-8a4e-4dc4-8eb5-8693973ce19b",
    "AcrPull": "7f951dda-4ed3-4680-a7ca-43fe172d538d",
    "AcrPush": "8311e382-0749-4cb8-b61a-304f252e45ec",
    "Grafana Admin": "22926164-76b3-42b3-bc55-97df8dab3e41",
    "Key Vault Secrets User": "4633458b-17de-408a-b874-0445c86b69e6",
    "Managed Identity Operator": "f1a07417-d97a-45cb-824c-7a7467783830",
    "Monitoring Data Reader": "b0d8363b-8ddd-447d-831f-62ca05bff136",
    "Network Contributor": "4d97b98b-1d4f-4787-a291-c67834d212e7",
    "Storage Blob Data Contributor": "ba92f5b4-2d11-453d-a403-e96b0029c9fe",
    "Storage Blob Data Reader": "2a2b9908-6ea1-4ae2-8e65-a410df84e7d1",
}


AZURE_CLI = "04b07795-8ddb-461a-bbee-02f9e1bf7b46"  # the client id under which a person's `az login` acts


def deployer_type(client_id: str) -> authorization.PrincipalType:
    """Whether a person or a program runs `pulumi up`, by the client id of its login: Azure asks for it at each role."""
    kinds = authorization.PrincipalType
    return kinds.USER if client_id.lower() == AZURE_CLI else kinds.SERVICE_PRINCIPAL


def role_assignment(
    name: str,
    *,
    stack: str,
    role: str,
    scope: pulumi.Input[str],
    principal_id: pulumi.Input[str],
    subscription_id: pulumi.Input[str],
    parent: pulumi.Resource,
    principal_type: pulumi.Input[authorization.PrincipalType] = authorization.PrincipalType.SERVICE_PRINCIPAL,
    once: bool = False,
) -> authorization.RoleAssignment:
    """Gives a principal, a managed identity unless principal_type says otherwise, a role on a scope.

    once: it stays with the principal that it was made for, whoever runs the program later. KeyError for a role that
    ROLES does not name.
    """
    role_id = ROLES[role]
    subscription = pulumi.Output.from_input(subscription_id)
    return authorization.RoleAssignment(
        name,
        # a tenant holds each name once: the subscription keeps stacks of the same name apart
        role_assignment_name=subscription.apply(lambda own: str(uuid5(NAMESPACE_URL, f"{own}/{stack}/{name}"))),
        scope=scope,
        role_definition_id=pulumi.Output.format(
            "/subscriptions/{0}/providers/Microsoft.Authorization/roleDefinitions/{1}", subscription, role_id
        ),
        principal_id=principal_id,
        # stated, so that Azure does not look for an identity that was made a moment ago and is not everywhere yet
        principal_type=principal_type,
        # Azure refuses to write another principal or scope under the name of an assignment that still exists
        opts=pulumi.ResourceOptions(
            parent=parent,
            delete_before_replace=True,
            replace_on_changes=["roleDefinitionId"],
            ignore_changes=["principalId", "principalType"] if once else None,
        ),
    )
