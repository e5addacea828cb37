"""Published budgets that can be reproduced: what each counts, and how it rounds."""

from __future__ import annotations

from datetime import date
from decimal import Decimal
from functools import cache

from planner.catalog import read_facts
from planner.catalog.prices import Priority
from planner.errors import PlannerError
from planner.model import Frozen


class Item(Frozen):
    """One line of a scenario: machines (sku, priority, count, hours) or a service (meter or flat, units).

    flat: a meter that some sheets price as a lump; where a sheet has no such meter, its parts are added up, each a
    meter, units of it, and both in words
    round_up: this line goes up to the next unit of the scenario's rounding instead of the nearest
    """

    key: str
    label: str
    sku: str = ""
    priority: Priority = "on-demand"
    count: int = 1
    hours: Decimal = Decimal(0)
    meter: str = ""
    flat: str = ""
    parts: tuple[tuple[str, Decimal, str], ...] = ()
    units: Decimal = Decimal(1)
    service: str = "Virtual Machines"
    round_up: bool = False


class Scenario(Frozen):
    """A budget as published. round_to: of each line; buffer: share of the total that the request adds

    request_to, request_up: the request goes to the nearest (or the next) multiple; context: tokens the scenario is for
    """

    name: str
    title: str
    region: str
    model: str
    context: int
    quantization: str | None = None
    round_to: Decimal
    buffer: Decimal
    request_to: Decimal
    request_up: bool
    items: tuple[Item, ...]


class ReferenceChoice(Frozen):
    """The size that the reference takes for contexts up to to_context tokens."""

    to_context: int
    sku: str


class Reference(Frozen):
    """Where the scenarios come from, and the price sheet that reproduces them."""

    sheet: str
    source: str
    as_of: date
    choices: tuple[ReferenceChoice, ...]


@cache
def scenarios() -> dict[str, Scenario]:
    return {record["name"]: Scenario.model_validate(record) for record in read_facts("scenarios.json")["scenarios"]}


@cache
def reference() -> Reference:
    return Reference.model_validate(read_facts("scenarios.json")["reference"])


def scenario(name: str) -> Scenario:
    """The scenario of that name; PlannerError names them all."""
    found = scenarios().get(name.strip())
    if found is None:
        raise PlannerError(f"{name!r} is not a scenario: choose one of {', '.join(scenarios())}")
    return found
