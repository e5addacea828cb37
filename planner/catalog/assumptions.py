"""What nobody can look up and a plan must still suppose: each with a range, an owner and a source."""

from __future__ import annotations

from datetime import date
from decimal import Decimal
from functools import cache

from planner.catalog import read_facts
from planner.model import Frozen


class Assumption(Frozen):
    """A figure that is supposed: low, expected and high in `unit`; owner: the role that answers for it."""

    name: str
    low: Decimal
    expected: Decimal
    high: Decimal
    unit: str
    text: str
    owner: str
    source: str
    as_of: date
    estimate: bool


@cache
def assumptions() -> dict[str, Assumption]:
    """All of them, by name."""
    return {record["name"]: Assumption(**record) for record in read_facts("assumptions.json")["assumptions"]}


def assumption(name: str) -> Assumption:
    """The assumption of that name; KeyError for one that assumptions.json lacks (a programming error)."""
    return assumptions()[name]
