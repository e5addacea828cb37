"""The blocks that a budget page is made of, and how its figures are written."""

from __future__ import annotations

from collections.abc import Iterable
from decimal import Decimal
from typing import Literal

from planner.budget import Budget
from planner.cost.lines import figure
from planner.model import Frozen
from planner.pages.svg import Figure
from planner.units import CENT, money_figure

UNPRICED = "unpriced"

Kind = Literal["line", "group", "subtotal", "total"]


class Column(Frozen):
    """number: set flush right; short: never broken over two lines, such as a date."""

    heading: str
    number: bool = False
    short: bool = False


class Cell(Frozen):
    """text as printed; mark: a word beside it, such as estimate."""

    text: str
    mark: str = ""


class Row(Frozen):
    """exact: low, expected and high are one figure."""

    cells: tuple[Cell, ...]
    kind: Kind = "line"
    exact: bool = False


class Table(Frozen):
    """name: how it is laid out; label: what it is, for those who cannot see it.

    drawn: a chart beside it shows the same, so that only the form without charts prints it
    """

    type: Literal["table"] = "table"
    name: Literal[
        "pairs",
        "lines",
        "changes",
        "what-ifs",
        "ways",
        "steps",
        "assumptions",
        "formulas",
        "sources",
        "sign",
        "choices",
    ]
    label: str
    columns: tuple[Column, ...]
    rows: tuple[Row, ...]
    drawn: bool = False


class Text(Frozen):
    type: Literal["text"] = "text"
    text: str
    tone: Literal["plain", "warning", "advice"] = "plain"


class Subheading(Frozen):
    type: Literal["subheading"] = "subheading"
    text: str


class Bullets(Frozen):
    type: Literal["bullets"] = "bullets"
    entries: tuple[str, ...]


class Terms(Frozen):
    type: Literal["terms"] = "terms"
    entries: tuple[tuple[str, str], ...]


Block = Table | Text | Subheading | Bullets | Terms | Figure


class Section(Frozen):
    anchor: str
    heading: str
    blocks: tuple[Block, ...]


class Page(Frozen):
    """title, subject, facts: the head; opening: before the first heading."""

    title: str
    subject: str
    facts: tuple[str, ...]
    opening: tuple[Block, ...]
    sections: tuple[Section, ...]


class Figures:
    """Amounts as a budget prints them: thousands separated, with the decimals that its rounding asks for."""

    def __init__(self, budget: Budget) -> None:
        places = max(_places(budget.rounding.round_to), _places(budget.rounding.request_to))
        self.unit = Decimal(1).scaleb(-places)

    def amount(self, value: Decimal | None) -> str:
        if value is None:
            return UNPRICED
        text = money_figure(value, self._fine_enough(value))
        return text if text.strip("-0.,") else text.lstrip("-")  # what rounds to nothing has no sign

    def signed(self, value: Decimal | None) -> str:
        """With + or -; an amount that is not known has no difference."""
        if value is None:
            return ""
        return f"+{self.amount(value)}" if value > 0 else self.amount(value)

    def _fine_enough(self, value: Decimal) -> Decimal:
        # an approved amount after conversion, or a line of an earlier budget, may have more decimals than this one's
        return self.unit if value % self.unit == 0 else min(self.unit, CENT)


def _places(unit: Decimal) -> int:
    exponent = unit.normalize().as_tuple().exponent
    return max(0, -exponent) if isinstance(exponent, int) else 2


def one_line(text: str) -> str:
    return " ".join(text.split())


def prose(text: str) -> str:
    """A sentence of another module: commands that it sets in backticks stand in plain quotes."""
    return one_line(text).replace("`", '"')


def row_of(*texts: str, kind: Kind = "line", exact: bool = False) -> Row:
    return Row(cells=tuple(Cell(text=one_line(text)) for text in texts), kind=kind, exact=exact)


def share(value: Decimal) -> str:
    return f"{figure(value * 100, 2)} %"


def count_of(number: int, one: str, many: str) -> str:
    return f"{number} {one if number == 1 else many}"


def sum_of(amounts: Iterable[Decimal | None]) -> Decimal:
    return sum((amount for amount in amounts if amount is not None), Decimal(0))
