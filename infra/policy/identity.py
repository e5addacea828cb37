"""Rules for identities: every link from a pod to an Azure role is there, and none is loose."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from infra.policy.kube import metadata, named, pods, workload_kind
from infra.policy.nouns import UNKNOWN, Book, Context, Fault, Recorded, at, entry, listed, of_kind

IDENTITY = "managedidentity:UserAssignedIdentity"
CREDENTIAL, ROLE = "managedidentity:FederatedIdentityCredential", "authorization:RoleAssignment"
CLUSTER = "containerservice:ManagedCluster"
AUDIENCE = "api://AzureADTokenExchange"
USES, CLIENT = "azure.workload.identity/use", "azure.workload.identity/client-id"
ADD_ONS = "kube-system"  # service accounts there are made by AKS, not by the program

identity = Book("identity")


@identity.over("identity-has-role", "every identity may do something: it has a role", "high")
def identity_has_role(resources: Sequence[Recorded], _: Context) -> list[Fault]:
    """By what assignments were made from; one that was made from two identities says not which of them it is for."""
    identities = {one.urn: one for one in of_kind(resources, IDENTITY)}
    named_by = [identities.keys() & set(one.dependencies) for one in of_kind(resources, ROLE)]
    with_role = {urn for urns in named_by if len(urns) == 1 for urn in urns}
    return [
        (one, "it may do nothing: give it a role assignment, or take it out")
        for urn, one in identities.items()
        if urn not in with_role
    ]


identity.wants(
    ROLE,
    "principalType",
    ["ServicePrincipal", "User", "Group"],
    "role-says-whose",
    "a role assignment says what kind of principal it is for",
    "low",
    otherwise="an identity that is new may not be found yet and the role is refused: set principal_type",
)


@identity.each(
    CREDENTIAL, "federated-credential", "a federated credential trusts one service account, and no more", "high"
)
def federated_credential(resource: Recorded, _: Context) -> str | None:
    audiences = listed(at(resource.inputs, "audiences"))
    if UNKNOWN not in audiences and audiences != [AUDIENCE]:
        return f"its audiences are not what Entra ID asks for: set them to {AUDIENCE}"
    subject = at(resource.inputs, "subject")
    if subject != UNKNOWN and not re.fullmatch(r"system:serviceaccount:[a-z0-9-]+:[a-z0-9.-]+", str(subject)):
        return "its subject is no service account: write system:serviceaccount:NAMESPACE:NAME"
    issuer = at(resource.inputs, "issuer")
    if issuer != UNKNOWN and not str(issuer).startswith("https://"):
        return "it names no issuer: take the cluster's OIDC issuer"
    return None


@identity.over("issuer-is-the-cluster", "federated credentials trust the stack's own cluster", "high")
def issuer_is_the_cluster(resources: Sequence[Recorded], _: Context) -> list[Fault]:
    """By what it was made from: the issuer itself is known only after an apply."""
    clusters = {one.urn for one in of_kind(resources, CLUSTER)}
    return [
        (one, "its issuer is not the stack's cluster: take the cluster's OIDC issuer")
        for one in of_kind(resources, CREDENTIAL)
        if clusters and not clusters & set(one.dependencies)
    ]


def _accounts(resources: Sequence[Recorded]) -> dict[str, Recorded]:
    """The service accounts of the program by the subject that a token of theirs has."""
    return {_subject(one): one for one in resources if workload_kind(one) == "ServiceAccount"}


def _subject(account: Recorded) -> str:
    return f"system:serviceaccount:{at(metadata(account), 'namespace') or 'default'}:{named(account)}"


def _identity_of(account: Recorded | None) -> Any:
    """The identity that a service account stands for, or None."""
    return entry(at(metadata(account), "annotations"), CLIENT) if account else None


@identity.over("subject-exists", "the service account that a federated credential trusts is there", "high")
def subject_exists(resources: Sequence[Recorded], _: Context) -> list[Fault]:
    accounts = _accounts(resources)
    return [
        (one, f"nothing makes {subject}: make that service account, or take the credential out")
        for one in of_kind(resources, CREDENTIAL)
        if (subject := str(at(one.inputs, "subject"))) not in accounts
        and UNKNOWN not in f"{subject} {' '.join(accounts)}"
        and not subject.startswith(f"system:serviceaccount:{ADD_ONS}:")
    ]


@identity.over("account-is-federated", "a service account that stands for an identity is trusted by it", "high")
def account_is_federated(resources: Sequence[Recorded], _: Context) -> list[Fault]:
    subjects = [str(at(one.inputs, "subject")) for one in of_kind(resources, CREDENTIAL)]
    return [
        (one, f"no identity trusts {subject}: make a federated credential for it")
        for subject, one in _accounts(resources).items()
        if entry(at(metadata(one), "annotations"), CLIENT) is not None
        and subject not in subjects
        and UNKNOWN not in f"{subject} {' '.join(subjects)}"
    ]


@identity.over("pod-has-identity", "a pod that asks for an identity runs as a service account that has one", "high")
def pod_has_identity(resources: Sequence[Recorded], _: Context) -> list[Fault]:
    accounts = _accounts(resources)
    found: list[Fault] = []
    for one in pods(resources):
        subject = f"system:serviceaccount:{one.namespace}:{at(one.spec, 'serviceAccountName') or 'default'}"
        asks = entry(at(one.template, "metadata.labels"), USES)
        has = _identity_of(accounts.get(subject))
        if UNKNOWN in f"{asks} {subject} {' '.join(accounts)}":
            continue
        if asks == "true" and has is None:
            found.append((one.resource, f"{subject} stands for no identity: annotate it with {CLIENT}"))
        elif asks != "true" and has is not None and not _unknown_annotations(accounts[subject]):
            found.append((one.resource, f"its pods do not get the token of {subject}: label them {USES}"))
    return found


def _unknown_annotations(account: Recorded) -> bool:
    """Whether it may be that it stands for no identity after all."""
    return bool(at(metadata(account), "annotations") == UNKNOWN)


RULES = tuple(identity.rules)
