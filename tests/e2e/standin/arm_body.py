"""The request body that the provider would send, checked by the azure-mgmt models of the same API.

A model tells each property's place in the body (`properties.vmSize`), its type and its limits; the SDK's inputs are
flat, as the specification's `x-ms-client-flatten` has it, and so are those of nested models.
"""

import copy
import importlib
import re
from typing import Any

from azure.core.exceptions import DeserializationError

from standin.wire import UNKNOWN, has_unknown

_PLAIN = {
    "str": str,
    "int": int,
    "long": int,
    "bool": bool,
    "float": (int, float),
    "iso-8601": str,
    "date": str,
    "time": str,
    "duration": str,
}


def body(model: Any, inputs: dict[str, Any], beyond: frozenset[str] = frozenset()) -> tuple[dict[str, Any], list[str]]:
    """The request body of the inputs, and what the model says is wrong with it.

    Inputs named in beyond are newer than the model and are left out of it.
    """
    problems: list[str] = []
    made = _object(model, {name: part for name, part in inputs.items() if name not in beyond}, "", problems)
    if not problems and not has_unknown(made):
        try:
            model.deserialize(copy.deepcopy(made))  # it takes discriminators out of what it reads
        except DeserializationError as error:
            problems.append(str(error))
    return made, problems


def _object(model: Any, value: dict[str, Any], where: str, problems: list[str]) -> dict[str, Any]:
    model = _subtype(model, value)
    known = places(model)
    made: dict[str, Any] = {}
    for name, part in value.items():
        path = f"{where}.{name}" if where else name
        if name not in known:
            problems.append(f"{model.__name__} has no property '{path}'")
            continue
        attribute, keys, kind = known[name]
        limits = model._validation.get(attribute, {})
        if limits.get("readonly"):
            problems.append(f"'{path}' is read-only in {model.__name__}")
        if part is None:
            continue
        problems += _limit_problems(limits, part, path)
        holder = made
        for key in keys[:-1]:
            holder = holder.setdefault(key, {})
        holder[keys[-1]] = _value(model, kind, part, path, problems)
    for attribute, limits in model._validation.items():
        missing = not any(known[name][0] == attribute for name in value if name in known)
        constant = limits.get("constant") or attribute in getattr(model, "_subtype_map", {})
        if limits.get("required") and missing and not constant and not limits.get("readonly"):
            problems.append(f"{model.__name__} needs '{_camel(attribute)}' in {where or 'its body'}")
    return made


def _value(model: Any, kind: str, value: Any, where: str, problems: list[str]) -> Any:
    if value == UNKNOWN or kind == "object":
        return value
    if kind.startswith("["):
        if not isinstance(value, list):
            problems.append(f"'{where}' should be a list but is {value!r}")
            return value
        return [_value(model, kind[1:-1], part, f"{where}[{index}]", problems) for index, part in enumerate(value)]
    if kind.startswith("{"):
        if isinstance(value, list) and all(isinstance(part, str) for part in value):
            # The provider's own shape for a set of ids, such as identity.userAssignedIdentities.
            value = {part: {} for part in value}
        if not isinstance(value, dict):
            problems.append(f"'{where}' should be an object but is {value!r}")
            return value
        return {key: _value(model, kind[1:-1], part, f"{where}.{key}", problems) for key, part in value.items()}
    if kind in _PLAIN:
        if not isinstance(value, _PLAIN[kind]) or (isinstance(value, bool) and kind != "bool"):
            problems.append(f"'{where}' should be of type {kind} but is {value!r}")
        return value
    nested = getattr(importlib.import_module(model.__module__.rpartition(".")[0]), kind)
    if not hasattr(nested, "_attribute_map"):
        return value  # an enum: its values are the SDK's business
    if not isinstance(value, dict):
        problems.append(f"'{where}' should be a {kind} but is {value!r}")
        return value
    return _object(nested, value, where, problems)


def _limit_problems(limits: dict[str, Any], value: Any, where: str) -> list[str]:
    if value == UNKNOWN:
        return []
    size = len(value) if isinstance(value, str | list) else None
    found = []
    if isinstance(value, str) and "pattern" in limits and not re.search(limits["pattern"], value):
        found.append(f"'{where}' does not match expression '{limits['pattern']}'")
    if size is not None and size > limits.get("max_length", limits.get("max_items", size)):
        found.append(f"'{where}' is too long ({size})")
    if size is not None and size < limits.get("min_length", limits.get("min_items", size)):
        found.append(f"'{where}' is too short ({size})")
    if isinstance(value, int | float) and not limits.get("minimum", value) <= value <= limits.get("maximum", value):
        found.append(f"'{where}' is {value}, outside {limits.get('minimum')} to {limits.get('maximum')}")
    return found


def places(model: Any) -> dict[str, tuple[str, list[str], str]]:
    """Where a model's properties lie: SDK name -> (attribute of the model, keys in the body, type)."""
    found = {}
    for attribute, entry in model._attribute_map.items():
        keys = [key.replace("\\.", ".") for key in re.split(r"(?<!\\)\.", entry["key"])]
        found[_camel(attribute)] = (attribute, keys, entry["type"])
        found[keys[-1]] = (attribute, keys, entry["type"])
    return found


def _camel(attribute: str) -> str:
    head, *rest = attribute.split("_")
    return head + "".join(part.capitalize() for part in rest)


def _subtype(model: Any, value: dict[str, Any]) -> Any:
    """The subclass that the discriminator of the value names, if the model has one."""
    for attribute, subclasses in vars(model).get("_subtype_map", {}).items():
        name = subclasses.get(value.get(model._attribute_map[attribute]["key"]))
        if name is not None:
            return _subtype(getattr(importlib.import_module(model.__module__.rpartition(".")[0]), name), value)
    return model
