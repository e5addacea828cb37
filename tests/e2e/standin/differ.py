"""How pulumi-azure-native compares: new inputs with old ones for a diff, new outputs with old ones to read inputs
back.
"""

import copy
from dataclasses import dataclass
from typing import Any

from standin import sdk_schema, wire
from standin.arm_types import ArmType


@dataclass(frozen=True)
class Change:
    """ADD, UPDATE or DELETE of one property, and whether the resource must be made anew for it."""

    kind: str
    replaces: bool


def detailed(
    old: dict[str, Any], new: dict[str, Any], forced: frozenset[str], old_outputs: dict[str, Any]
) -> dict[str, Change]:
    """The changes from old to new inputs by property path, such as `networkProfile.podCidr` or `nodeTaints[1]`."""
    found: dict[str, Change] = {}
    _objects(_visible(old), _visible(new), "", "", forced, found)
    if str(old.get("location")).replace(" ", "").lower() == str(new.get("location")).replace(" ", "").lower():
        found.pop("location", None)
    for path, change in found.items():
        if change.kind == "ADD" and change.replaces and old_outputs.get(path) == new.get(path):
            found[path] = Change("ADD", False)  # written down now, but no other than it is
    return found


def _visible(inputs: dict[str, Any]) -> dict[str, Any]:
    return {name: part for name, part in inputs.items() if not name.startswith("__") and part is not None}


def _objects(
    old: dict[str, Any], new: dict[str, Any], path: str, rule: str, forced: frozenset[str], found: dict[str, Change]
) -> None:
    for name in sorted({*old, *new}):
        here, its_rule = f"{path}{name}", f"{rule}{name}"
        if name not in new:
            found[here] = Change("DELETE", its_rule in forced)
        elif name not in old:
            found[here] = Change("ADD", its_rule in forced)
        else:
            _values(old[name], new[name], here, its_rule, forced, found)


def _values(old: Any, new: Any, path: str, rule: str, forced: frozenset[str], found: dict[str, Change]) -> None:
    if isinstance(old, dict) and isinstance(new, dict):
        below: dict[str, Change] = {}
        _objects(old, new, f"{path}.", f"{rule}.", forced, below)
        for key, change in below.items():
            found[key] = Change(change.kind, change.replaces or (change.kind == "UPDATE" and rule in forced))
    elif isinstance(old, list) and isinstance(new, list):
        for index in range(max(len(old), len(new))):
            here = f"{path}[{index}]"
            if index >= len(old):
                found[here] = Change("ADD", rule in forced)
            elif index >= len(new):
                found[here] = Change("DELETE", rule in forced)
            else:
                _values(old[index], new[index], here, rule if rule in forced else f"{rule}[]", forced, found)
    elif old != new or wire.has_unknown(new):
        found[path] = Change("UPDATE", rule in forced)


def read_back(
    kind: ArmType, inputs: dict[str, Any], old_outputs: dict[str, Any], outputs: dict[str, Any]
) -> dict[str, Any]:
    """The inputs as a refresh leaves them: those of the state, with what has changed in the outputs since.

    Outputs hold much that no program gave, so only a difference between old and new outputs counts. What the program
    leaves to resources of their own (the subnets of a network) is left out. The pools of a cluster are not: ARM shows
    every pool in agentPoolProfiles, and after a refresh so do the inputs (pulumi-azure-native #2719).
    """
    now = copy.deepcopy(outputs)
    for path in kind.maintain:
        if not _has(inputs, path.split(".")):
            _drop(now, path.split("."))
    before = sdk_schema.project(kind.args, old_outputs)
    return _apply(inputs, before, sdk_schema.project(kind.args, now))


def _apply(values: dict[str, Any], old: dict[str, Any], new: dict[str, Any]) -> dict[str, Any]:
    result = {name: part for name, part in values.items() if not (name in old and name not in new)}
    for name, part in new.items():
        if name not in old:
            result[name] = part
        elif wire.reveal(old[name]) != wire.reveal(part):
            result[name] = _applied(values[name], old[name], part) if name in values else part
    return result


def _applied(value: Any, old: Any, new: Any) -> Any:
    if all(isinstance(one, dict) and not wire.is_secret(one) for one in (value, old, new)):
        return _apply(value, old, new)
    if all(isinstance(one, list) for one in (value, old, new)):
        return [
            part if index >= len(value) or index >= len(old) else _applied_part(value[index], old[index], part)
            for index, part in enumerate(new)
        ]
    return new


def _applied_part(value: Any, old: Any, new: Any) -> Any:
    return value if wire.reveal(old) == wire.reveal(new) else _applied(value, old, new)


def _has(value: Any, path: list[str]) -> bool:
    for key in path:
        if not isinstance(value, dict) or key not in value:
            return False
        value = value[key]
    return True


def _drop(value: Any, path: list[str]) -> None:
    for key in path[:-1]:
        value = value.get(key, {})
    value.pop(path[-1], None)
