"""How resources hang together: which private endpoint leads to what, and which diagnostic setting logs what."""

from __future__ import annotations

from collections.abc import Sequence

from infra.policy.nouns import UNKNOWN, Fault, Recorded, at, behind, holds, listed, of_kind, says

ENDPOINT, LOGS = "network:PrivateEndpoint", "monitor:DiagnosticSetting"


def without_endpoint(resources: Sequence[Recorded], kind: str, group: str) -> list[Fault]:
    """Which resources of a kind no private endpoint of that group leads to."""
    reached = {one.urn for endpoint in _endpoints(resources, group) for one in behind(endpoint, resources)}
    return [
        (one, f"no private endpoint of the group {group} leads to it: make one in the network of the nodes")
        for one in of_kind(resources, kind)
        if one.urn not in reached
    ]


def _endpoints(resources: Sequence[Recorded], group: str) -> list[Recorded]:
    return [
        one
        for one in of_kind(resources, ENDPOINT)
        if any(
            connection == UNKNOWN or holds(at(connection, "groupIds"), group)
            for connection in listed(at(one.inputs, "privateLinkServiceConnections"))
        )
    ]


def unlogged(
    resources: Sequence[Recorded], kind: str, categories: Sequence[str], groups: Sequence[str], through: str = ""
) -> list[Fault]:
    """Which resources of a kind have no diagnostic setting, or one that leaves out a category.

    through: a kind that stands between, such as an account's blob service
    """
    found: list[Fault] = []
    for one in of_kind(resources, kind):
        urns = {one.urn, *(t.urn for t in of_kind(resources, through) if through and one.urn in t.dependencies)}
        settings = [s for s in of_kind(resources, LOGS) if urns & set(s.dependencies)]
        logs = [log for s in settings for log in listed(at(s.inputs, "logs"))]
        on = [log for log in logs if log == UNKNOWN or says(at(log, "enabled"), True)]
        if any(log == UNKNOWN or any(says(at(log, "categoryGroup"), g) for g in groups) for log in on):
            continue
        missing = [c for c in categories if not any(says(at(log, "category"), c) for log in on)]
        if missing:
            found.append((one, f"nothing keeps its logs {', '.join(missing)}: add them to a diagnostic setting"))
    return found
