"""ARM templates in a deployment, as far as a program states existing resources again through one.

A template's resource is a whole PUT of a newer API version: what it leaves out falls back to ARM's defaults, what the
provider's API version does not know is not shown by it.
"""

from dataclasses import dataclass
from typing import Any

from standin import arm_body, sdk_schema
from standin.arm_table import TYPES
from standin.arm_types import ArmType
from standin.faults import ArmError


@dataclass(frozen=True)
class Stated:
    """One resource of a template: its type, id, and the inputs of the SDK that it amounts to."""

    kind: ArmType
    resource_id: str
    inputs: dict[str, Any]


def refusal(why: str) -> ArmError:
    """ARM's refusal of a template."""
    return ArmError(400, "InvalidTemplate", f"Deployment template validation failed: '{why}'")


def stated(deployment: dict[str, Any], deployment_id: str) -> list[Stated]:
    """The template's resources. Raises ArmError for what is no template, and for what the stand-in does not read."""
    template = deployment["properties"].get("template")
    if not isinstance(template, dict) or "$schema" not in template or "contentVersion" not in template:
        raise refusal("a template needs $schema, contentVersion and resources.")
    found = []
    for entry in template.get("resources") or []:
        missing = [key for key in ("type", "apiVersion", "name") if not entry.get(key)]
        if missing:
            raise refusal(f"a resource of the template has no {missing[0]}.")
        kind = next((one for one in TYPES.values() if one.arm_type.lower() == entry["type"].lower()), None)
        if kind is None or "/" in entry["name"] or _has_expression(entry):
            raise refusal(f"the stand-in reads no {entry['type']} named {entry['name']} from a template.")
        group_id = "/".join(deployment_id.split("/")[:5])
        found.append(Stated(kind, f"{group_id}/providers/{kind.arm_type}/{entry['name']}", _inputs(kind, entry)))
    return found


def _has_expression(value: Any) -> bool:
    if isinstance(value, dict):
        return any(_has_expression(part) for part in value.values())
    if isinstance(value, list):
        return any(_has_expression(part) for part in value)
    return isinstance(value, str) and value.startswith("[")


def _inputs(kind: ArmType, entry: dict[str, Any]) -> dict[str, Any]:
    """The body in the SDK's flat shape; what the SDK's API version does not know is left out."""
    known = sdk_schema.fields(kind.args)
    outer = {key: part for key, part in entry.items() if key not in ("type", "apiVersion", "name", "dependsOn")}
    inner = outer.pop("properties", {}) if "properties" not in known else {}
    body = {**outer, **inner}
    places = arm_body.places(kind.model_class)
    renamed = {name: keys[-1] for name, (_, keys, _) in places.items() if name in known}
    return {name: body[key] for name, key in renamed.items() if key in body}
