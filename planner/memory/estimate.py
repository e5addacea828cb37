"""What a memory estimate is made of: components in bytes, each with the formula, inputs and source behind it."""

from __future__ import annotations

from typing import Self

from pydantic import Field, model_validator

from planner.errors import PlannerError
from planner.model import Frozen


class Component(Frozen):
    """One line of the budget of a GPU.

    name: the line's word in tables and in --explain, e.g. `weights`
    low_bytes, expected_bytes, high_bytes: the range; equal where the figure is exact
    formula: how expected_bytes follows from inputs, in words a reader can check
    inputs: the numbers the formula used, by the name it uses
    source: where the formula or its constants come from
    """

    name: str
    low_bytes: int = Field(ge=0)
    expected_bytes: int = Field(ge=0)
    high_bytes: int = Field(ge=0)
    formula: str
    inputs: dict[str, int | float | str] = Field(default_factory=dict)
    source: str

    @model_validator(mode="after")
    def _range_is_ordered(self) -> Self:
        if not self.low_bytes <= self.expected_bytes <= self.high_bytes:
            raise ValueError(f"{self.name}: low {self.low_bytes} <= expected {self.expected_bytes} <= high is violated")
        return self


class MemoryEstimate(Frozen):
    """The bytes of one GPU, by component; the totals are exact sums of the components.

    peak_instant: when the sum is reached, in words
    not_modelled: what the estimate leaves out, said aloud
    """

    components: tuple[Component, ...]
    peak_instant: str
    not_modelled: tuple[str, ...] = ()

    @property
    def low_bytes(self) -> int:
        return sum(component.low_bytes for component in self.components)

    @property
    def expected_bytes(self) -> int:
        return sum(component.expected_bytes for component in self.components)

    @property
    def high_bytes(self) -> int:
        return sum(component.high_bytes for component in self.components)

    def component(self, name: str) -> Component:
        """The component of that name; PlannerError when the estimate has none."""
        for component in self.components:
            if component.name == name:
                return component
        names = ", ".join(component.name for component in self.components)
        raise PlannerError(f"this estimate has no component {name!r}: ask for one of {names}")


def exact(
    name: str, size_bytes: int, formula: str, source: str, inputs: dict[str, int | float | str] | None = None
) -> Component:
    """A component whose low, expected and high are the same."""
    return Component(
        name=name,
        low_bytes=size_bytes,
        expected_bytes=size_bytes,
        high_bytes=size_bytes,
        formula=formula,
        inputs=inputs or {},
        source=source,
    )
