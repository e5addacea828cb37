"""What pulumi-azure-native's Python SDK says of a resource's inputs: names, types, required ones, enum values.

The SDK's generated `*Args` classes are the schema: each argument of `__init__` has an annotation, and the property of
the same name carries the name on the wire (`pulumi.getter(name=...)`).
"""

import enum
import functools
import importlib
import inspect
import sys
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pulumi

from standin.wire import UNKNOWN, is_secret


@dataclass(frozen=True)
class Field:
    """One input: its name on the wire, whether it must be there, and the Python types that its value may have."""

    name: str
    required: bool
    kinds: tuple[Any, ...]


def args_class(token: str) -> type:
    """The Args class of a resource token such as `azure-native:network:Subnet`."""
    resource, type_name = resource_class(token), token.rsplit(":", 1)[1]
    # Where a nested type has the name of the resource, the class of its inputs is called InitArgs.
    names = vars(sys.modules[resource.__module__])
    found = names.get(f"{type_name}InitArgs") or names[f"{type_name}Args"]
    assert isinstance(found, type)
    return found


@functools.cache
def fields(cls: type) -> dict[str, Field]:
    """The inputs that the Args class takes, by their names on the wire."""
    found = {}
    namespace = vars(sys.modules[cls.__module__])
    for name, parameter in inspect.signature(cls.__init__).parameters.items():  # type: ignore[misc]
        if name == "__self__":
            continue
        wire_name = getattr(inspect.getattr_static(cls, name).fget, "_pulumi_name", name)
        kinds = tuple(_kinds(parameter.annotation, namespace))
        found[wire_name] = Field(wire_name, parameter.default is inspect.Parameter.empty, kinds)
    return found


def project(cls: type, value: dict[str, Any]) -> dict[str, Any]:
    """Outputs in the shape of inputs: only what the Args class takes, at every depth."""
    known = fields(cls)
    return {
        name: _project(known[name].kinds, part) for name, part in value.items() if name in known and part is not None
    }


def _project(kinds: tuple[Any, ...], value: Any) -> Any:
    items = [typing.get_args(kind)[0] for kind in kinds if typing.get_origin(kind) is Sequence]
    if items and isinstance(value, dict):
        return list(value)  # a set of ids is an object in outputs and a list in inputs
    if items and isinstance(value, list):
        return [_project(tuple(_kinds(items[0], {})), part) for part in value]
    classes = [kind for kind in kinds if isinstance(kind, type) and kind.__name__.endswith("Args")]
    maps = [typing.get_args(kind)[1] for kind in kinds if typing.get_origin(kind) is Mapping]
    if isinstance(value, dict) and classes:
        return project(classes[0], value)
    if isinstance(value, dict) and maps:
        return {key: _project(tuple(_kinds(maps[0], {})), part) for key, part in value.items()}
    return value


@functools.cache
def output_names(cls: type) -> dict[str, tuple[str, type] | None]:
    """The outputs of a resource class or nested output class by their names on the wire.

    Of nested ones the shape ("object", "list" or "map") and the class of the parts.
    """
    found: dict[str, tuple[str, type] | None] = {}
    namespace = {**vars(sys.modules[cls.__module__]), **vars(pulumi)}
    for name, member in vars(cls).items():
        if not isinstance(member, property):
            continue
        annotation = typing.get_type_hints(member.fget, localns=namespace).get("return")
        found[getattr(member.fget, "_pulumi_name", name)] = _nested(annotation)
    return found


def resource_class(token: str) -> type:
    """The SDK's class of a resource token."""
    _, module_name, type_name = token.split(":")
    found = getattr(importlib.import_module(f"pulumi_azure_native.{module_name}"), type_name)
    assert isinstance(found, type)
    return found


def previewed(cls: type, value: dict[str, Any]) -> dict[str, Any]:
    """What is known of the outputs before the resource is made: the inputs, everything else UNKNOWN, at every depth."""
    return {name: _previewed(nested, value.get(name)) for name, nested in output_names(cls).items()}


def _previewed(nested: tuple[str, type] | None, value: Any) -> Any:
    if value is None:
        return UNKNOWN
    if nested is None or value == UNKNOWN:
        return value
    shape, cls = nested
    if shape == "list" and isinstance(value, list):
        return [_previewed(("object", cls), part) for part in value]
    if shape == "map" and isinstance(value, dict):
        return {key: _previewed(("object", cls), part) for key, part in value.items()}
    if shape == "object" and isinstance(value, dict):
        return value if is_secret(value) else previewed(cls, value)
    return UNKNOWN  # an input of another shape than the output, such as a list of identities


def _nested(annotation: Any, shape: str = "object") -> tuple[str, type] | None:
    """The output class in an annotation such as Output[Optional[Mapping[str, X]]]; None for plain values."""
    if isinstance(annotation, type) and annotation.__module__.endswith(".outputs"):
        return shape, annotation
    origin = typing.get_origin(annotation)
    if origin is Sequence or origin is Mapping:
        shape = "list" if origin is Sequence else "map"
    elif origin not in (pulumi.Output, typing.Union, types.UnionType):
        return None
    return next((found for part in typing.get_args(annotation) if (found := _nested(part, shape)) is not None), None)


def problems(cls: type, value: dict[str, Any], where: str = "") -> list[tuple[str, str]]:
    """What is wrong with the inputs, as (property, reason): unknown names, missing ones, wrong types, values of no
    enum.
    """
    known = fields(cls)
    prefix = f"{where}." if where else ""
    found = [
        (f"{prefix}{name}", f"missing required property '{prefix}{name}'")
        for name, field in known.items()
        if field.required and value.get(name) is None
    ]
    for name, part in value.items():
        if name not in known:
            found.append(
                (f"{prefix}{name}", f"'{prefix}{name}' is not a property of {cls.__name__.removesuffix('Args')}")
            )
        elif part is not None:
            found += _value_problems(known[name].kinds, part, f"{prefix}{name}")
    return found


def _value_problems(kinds: tuple[Any, ...], value: Any, where: str) -> list[tuple[str, str]]:
    if value == UNKNOWN or Any in kinds:
        return []
    if isinstance(value, dict):
        return _object_problems(kinds, value, where)
    if isinstance(value, list):
        items = [typing.get_args(kind)[0] for kind in kinds if typing.get_origin(kind) is Sequence]
        if not items:
            return [(where, f"'{where}' should be {_words(kinds)} but got an array")]
        return [
            problem
            for index, part in enumerate(value)
            if part is not None
            for problem in _value_problems(tuple(_kinds(items[0], {})), part, f"{where}[{index}]")
        ]
    enums = [kind for kind in kinds if isinstance(kind, type) and issubclass(kind, enum.Enum)]
    for kind in enums:
        if kind.__name__.startswith("Known"):  # ARM names some values and takes others
            continue
        allowed = [member.value for member in kind]
        if value not in allowed:
            return [(where, f"'{where}' is {value!r}, which is none of {', '.join(map(repr, allowed))}")]
    if enums or type(value) in kinds or (isinstance(value, int) and float in kinds and not isinstance(value, bool)):
        return []
    return [(where, f"'{where}' should be {_words(kinds)} but got {value!r}")]


def _object_problems(kinds: tuple[Any, ...], value: dict[str, Any], where: str) -> list[tuple[str, str]]:
    classes = [kind for kind in kinds if isinstance(kind, type) and kind.__name__.endswith("Args")]
    if classes:
        return min((problems(cls, value, where) for cls in classes), key=len)
    maps = [typing.get_args(kind)[1] for kind in kinds if typing.get_origin(kind) is Mapping]
    if not maps:
        return [(where, f"'{where}' should be {_words(kinds)} but got an object")]
    return [
        problem
        for key, part in value.items()
        if part is not None
        for problem in _value_problems(tuple(_kinds(maps[0], {})), part, f"{where}.{key}")
    ]


def _kinds(annotation: Any, namespace: dict[str, Any]) -> list[Any]:
    """The alternatives of an annotation without Output, Awaitable and None; names are looked up in the namespace."""
    if isinstance(annotation, typing.ForwardRef):
        annotation = annotation.__forward_arg__
    if isinstance(annotation, str):
        if annotation.startswith("Output["):  # pulumi.Input's own forward reference
            return []
        # The namespace is that of a generated module of the SDK, and so is the text.
        return _kinds(eval(annotation, namespace), namespace)
    origin = typing.get_origin(annotation)
    if origin in (typing.Union, types.UnionType):
        return [kind for part in typing.get_args(annotation) for kind in _kinds(part, namespace)]
    if annotation is type(None) or origin in (pulumi.Output, typing.get_origin(typing.Awaitable[Any])):
        return []
    if origin is Sequence:
        return [Sequence[_resolved(typing.get_args(annotation)[0], namespace)]]
    if origin is Mapping:
        return [Mapping[str, _resolved(typing.get_args(annotation)[1], namespace)]]
    return [annotation]


def _resolved(annotation: Any, namespace: dict[str, Any]) -> Any:
    kinds = _kinds(annotation, namespace)
    return typing.Union[tuple(kinds)] if kinds else Any  # noqa: UP007


def _words(kinds: tuple[Any, ...]) -> str:
    return " or ".join(sorted(getattr(kind, "__name__", str(kind)).removesuffix("Args") for kind in kinds))
