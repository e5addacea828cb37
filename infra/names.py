"""What things are called. Pure functions: a name that Azure would refuse is refused here, before anything is made."""

from __future__ import annotations

from dataclasses import dataclass

from planner.errors import PlannerError
from planner.stack import check_stack_name

PROJECT = "tonnage"

# the longest name by kind, of what is named after the stack: Azure's naming rules for resources, and of AKS
LIMITS = {
    "resource group": 90,
    "node resource group": 80,
    "cluster": 63,
    "DNS prefix": 54,
    "network": 64,
    "identity": 128,
    "federated credential": 120,
    "Log Analytics workspace": 63,
    "Azure Monitor workspace": 63,
    "data collection endpoint": 44,
    "data collection rule": 64,
    "rule group": 260,
    "action group": 260,
    "dashboard": 23,
    "budget": 63,
    "private endpoint": 80,
}


@dataclass(frozen=True)
class Names:
    """The names of one stack's resources.

    Those of storage account, key vault and registry must be unique in the world and may stay taken for months after a
    deletion: Pulumi adds eight random digits to `unique`, which is 2 to 14 lower-case letters and digits.
    """

    stack: str
    group: str
    node_group: str
    cluster: str
    dns_prefix: str
    unique: str

    def of(self, kind: str, ending: str) -> str:
        """`tonnage-dev-32k-ENDING`. PlannerError when that is too long for the kind."""
        return limited(kind, f"{PROJECT}-{self.stack}-{ending}")


def names(stack: str) -> Names:
    """The names of a stack. PlannerError when its own name cannot be part of Azure's, or makes one too long."""
    check_stack_name(stack)
    base = f"{PROJECT}-{stack}"
    return Names(
        stack=stack,
        group=limited("resource group", base),
        node_group=limited("node resource group", f"{base}-nodes"),
        cluster=limited("cluster", base),
        dns_prefix=limited("DNS prefix", base),
        unique=f"tn{stack.replace('-', '')}"[:14],
    )


def limited(kind: str, name: str) -> str:
    """The name itself. PlannerError when it is longer than Azure takes for that kind of resource."""
    most = LIMITS[kind]
    if len(name) > most:
        raise PlannerError(
            f"the {kind} would be called {name}, {len(name)} characters where Azure takes {most}: give the stack a name"
            f" shorter by {len(name) - most}"
        )
    return name
