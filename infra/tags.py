"""The tags of every resource: by them money and resources are told apart. Nothing that changes with each plan."""

from __future__ import annotations

from collections.abc import Mapping

from infra.names import PROJECT
from planner.errors import PlannerError

OURS = ("project", "stack", "environment", "managed-by")


def tags(stack: str, posture: str, own: Mapping[str, str]) -> dict[str, str]:
    """The tags of a stack's resources, its own (cost centre, owner) last. PlannerError for one that is ours."""
    taken = [name for name in own if name.lower() in OURS]
    if taken:
        raise PlannerError(f"the tag {taken[0]} is set by Tonnage: give yours another name")
    return {"project": PROJECT, "stack": stack, "environment": posture, "managed-by": "pulumi", **own}
