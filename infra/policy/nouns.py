"""What policy speaks of: a recorded resource, the context it is judged in, a rule, a finding, an excuse."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from planner.plan.intent import Intent
from planner.plan.lock import Lock

# Pulumi's wire format: what stands for a value that is known only after an apply (sdk/python, runtime/rpc.py)
UNKNOWN = "04da6b54-80e4-46f7-96ec-b56ff0331ba9"
# what whoever records puts in place of a secret
SECRET = "[secret]"

Severity = Literal["high", "medium", "low", "note"]
Area = Literal["plan", "identity", "storage", "vault", "registry", "cluster", "pools", "network", "monitor", "objects"]


@dataclass(frozen=True)
class Recorded:
    """A resource as it was asked for.

    type: Pulumi's token, such as azure-native:storage:StorageAccount; parent: the urn of its parent, or empty
    inputs: under the names of Pulumi's wire (camelCase), UNKNOWN for what is not known yet, secrets as SECRET
    dependencies: urns; timeouts: as given, such as {"create": "45m"}
    """

    type: str
    name: str
    urn: str
    parent: str = ""
    inputs: dict[str, Any] = field(default_factory=dict)
    dependencies: tuple[str, ...] = ()
    protect: bool = False
    retain_on_delete: bool = False
    ignore_changes: tuple[str, ...] = ()
    delete_before_replace: bool = False
    timeouts: dict[str, str] = field(default_factory=dict)

    @property
    def kind(self) -> str:
        """The type without the version that some tokens carry: azure-native:storage/v20230101:X -> ...:storage:X."""
        return re.sub(r"^(azure-native:[^:/]+)/[^:]+:", r"\1:", self.type)


@dataclass(frozen=True)
class Context:
    """What resources are judged against: the plan, the intent that it answers, and the stack's name."""

    lock: Lock
    intent: Intent
    stack: str

    @property
    def prod(self) -> bool:
        return self.lock.around.posture == "prod"


@dataclass(frozen=True)
class Finding:
    """A rule that is broken. resource: its name, empty where the stack as a whole is meant; urn: likewise.

    answers: ids of the public rules that ask the same; excused: the reason why it may be so, or empty
    """

    rule: str
    resource: str
    urn: str
    sentence: str
    severity: Severity
    answers: tuple[str, ...] = ()
    excused: str = ""


Fault = tuple[Recorded | None, str]
OfOne = Callable[[Recorded, Context], str | None]
OfAll = Callable[[Sequence[Recorded], Context], list[Fault]]


@dataclass(frozen=True)
class Rule:
    """A rule: what it asks in one line, the public rules that ask the same, and the function that finds faults.

    A fault is a resource (None: the stack as a whole) and a sentence that says what is wrong and what to do.
    """

    name: str
    what: str
    severity: Severity
    area: Area
    answers: tuple[str, ...]
    faults: OfAll


class Book:
    """The rules of one area, in the order in which they are written down."""

    def __init__(self, area: Area) -> None:
        self.area = area
        self.rules: list[Rule] = []

    def over(self, name: str, what: str, severity: Severity, *answers: str) -> Callable[[OfAll], OfAll]:
        """A rule over all resources of a stack: it returns its faults."""

        def add(function: OfAll) -> OfAll:
            self.rules.append(Rule(name, what, severity, self.area, answers, function))
            return function

        return add

    def each(
        self, kinds: str | tuple[str, ...], name: str, what: str, severity: Severity, *answers: str
    ) -> Callable[[OfOne], OfOne]:
        """A rule over each resource of some kinds, as storage:StorageAccount: it returns a sentence, or None."""

        def add(function: OfOne) -> OfOne:
            def faults(resources: Sequence[Recorded], context: Context) -> list[Fault]:
                judged = ((one, function(one, context)) for one in of_kind(resources, kinds))
                return [(one, sentence) for one, sentence in judged if sentence]

            self.rules.append(Rule(name, what, severity, self.area, answers, faults))
            return function

        return add

    def wants(
        self,
        kinds: str | tuple[str, ...],
        path: str,
        allowed: Sequence[object],
        name: str,
        what: str,
        severity: Severity,
        *answers: str,
        otherwise: str,
    ) -> None:
        """A rule that a property has one of the allowed values; otherwise: the sentence where it has not."""
        self.each(kinds, name, what, severity, *answers)(
            lambda one, _: None if says(at(one.inputs, path), *allowed) else otherwise
        )


def of_kind(resources: Sequence[Recorded], kinds: str | tuple[str, ...]) -> Iterator[Recorded]:
    """Those of Azure's resources that are of one of these kinds, written as storage:StorageAccount."""
    wanted = {f"azure-native:{kind}" for kind in ((kinds,) if isinstance(kinds, str) else kinds)}
    return (one for one in resources if one.kind in wanted)


def at(value: Any, path: str) -> Any:
    """What stands at a.b.c. None where it is missing, UNKNOWN where it or something above it is not known yet."""
    for key in path.split("."):
        value = entry(value, key)
    return value


def entry(value: Any, key: str) -> Any:
    """What a mapping has under a key, which may have dots: None where it is missing, UNKNOWN as in `at`."""
    if value == UNKNOWN:
        return UNKNOWN
    return value.get(key) if isinstance(value, Mapping) else None


def says(value: object, *allowed: object) -> bool:
    """Whether a value is among the allowed ones, or not known yet. ARM's words have no case."""
    if value == UNKNOWN:
        return True
    if isinstance(value, str):
        return any(isinstance(one, str) and one.lower() == value.lower() for one in allowed)
    # 1 == True, but a number is no answer to a question of yes or no
    return any(one == value and isinstance(one, bool) == isinstance(value, bool) for one in allowed)


def listed(value: object) -> list[Any]:
    """The items of a list; none where there is no list. What is not known yet is a list of one unknown."""
    return [UNKNOWN] if value == UNKNOWN else list(value) if isinstance(value, list | tuple) else []


def holds(value: object, item: object) -> bool:
    """Whether a list has an item, or may have it once it is known."""
    return any(says(one, item) for one in listed(value))


def behind(resource: Recorded, resources: Sequence[Recorded]) -> list[Recorded]:
    """What a resource was made from: the resources whose outputs it takes."""
    return [one for one in resources if one.urn in resource.dependencies]
