"""Reads the fields of a config.json and refuses, by field name, whatever cannot be the shape of a transformer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Final

from planner.errors import PlannerError


class _Required:
    """Marks a field without a default."""


REQUIRED: Final = _Required()

# Sanity bounds, an order of magnitude above any published model: past them a config.json is broken, not large.
MAX_WIDTH: Final = 1 << 20
MAX_LAYERS: Final = 10_000
MAX_VOCAB: Final = 1 << 25
MAX_EXPERTS: Final = 1 << 14
MAX_HEADS: Final = 1 << 14
MAX_CONTEXT: Final = 1 << 32


class Fields:
    """The fields of one JSON object of a config, with the name of the model for error messages.

    Fields are read by name; further names are older spellings, tried in order. `defaults` holds what the
    architecture's own configuration class assumes for a field that config.json leaves out.
    """

    def __init__(
        self, values: Mapping[str, object], owner: str, path: str = "", defaults: Mapping[str, object] | None = None
    ) -> None:
        self._values = values
        self._defaults = defaults or {}
        self.owner = owner
        self.path = path

    def refuse(self, field: str, problem: str) -> PlannerError:
        """The error for a field: `<model>'s config.json: <field> <problem>`."""
        return PlannerError(f"{self.owner}'s config.json cannot be used: {self.path}{field} {problem}")

    def with_defaults(self, defaults: Mapping[str, object]) -> Fields:
        return Fields(self._values, self.owner, self.path, defaults)

    def override(self, values: Mapping[str, object]) -> Fields:
        return Fields({**self._values, **values}, self.owner, self.path, self._defaults)

    def get(self, field: str, *older: str) -> object:
        """The value under the first name that is there and not null, else the architecture's default, else None."""
        for name in (field, *older):
            value = self._values.get(name)
            if value is not None:
                return value
        return self._defaults.get(field)

    def names(self) -> tuple[str, ...]:
        return tuple(self._values)

    def has(self, field: str) -> bool:
        """Whether config.json itself names the field, null counting as named."""
        return field in self._values

    def integer(
        self, field: str, *older: str, low: int = 1, high: int = MAX_WIDTH, default: int | _Required = REQUIRED
    ) -> int:
        """A whole number between `low` and `high`."""
        value = self.get(field, *older)
        if value is None:
            if isinstance(default, _Required):
                raise self.refuse(field, "is missing")
            return default
        if isinstance(value, bool) or not isinstance(value, int):
            raise self.refuse(field, f"must be a whole number, not {_shown(value)}")
        if not low <= value <= high:
            raise self.refuse(field, f"must be between {low} and {high}, not {_shown(value)}")
        return value

    def optional_integer(self, field: str, *older: str, low: int = 1, high: int = MAX_WIDTH) -> int | None:
        if self.get(field, *older) is None:
            return None
        return self.integer(field, *older, low=low, high=high)

    def flag(self, field: str, default: bool) -> bool:
        value = self.get(field)
        if value is None:
            return default
        if not isinstance(value, bool):
            raise self.refuse(field, f"must be true or false, not {_shown(value)}")
        return value

    def number(self, field: str, default: float) -> float:
        """A finite positive number."""
        value = self.get(field)
        if value is None:
            return default
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < MAX_CONTEXT:
            raise self.refuse(field, f"must be a number above zero and below {MAX_CONTEXT}, not {_shown(value)}")
        return float(value)

    def text(self, field: str, *older: str, default: str | _Required = REQUIRED) -> str:
        value = self.get(field, *older)
        if value is None:
            if isinstance(default, _Required):
                raise self.refuse(field, "is missing")
            return default
        if not isinstance(value, str):
            raise self.refuse(field, f"must be text, not {_shown(value)}")
        return value

    def texts(self, field: str, *older: str) -> tuple[str, ...]:
        """A list of strings; empty when left out."""
        value = self.get(field, *older)
        if value is None:
            return ()
        if not isinstance(value, list | tuple) or not all(isinstance(item, str) for item in value):
            raise self.refuse(field, f"must be a list of names, not {_shown(value)}")
        return tuple(value)

    def integers(self, field: str, low: int, high: int) -> tuple[int, ...]:
        """A list of whole numbers between `low` and `high`; empty when left out."""
        value = self.get(field)
        if value is None:
            return ()
        if not isinstance(value, list | tuple):
            raise self.refuse(field, f"must be a list of whole numbers, not {_shown(value)}")
        for item in value:
            if isinstance(item, bool) or not isinstance(item, int) or not low <= item <= high:
                raise self.refuse(field, f"must hold whole numbers between {low} and {high}, not {_shown(item)}")
        return tuple(value)

    def size(self, field: str, default: int | _Required = REQUIRED) -> int:
        """A side length that some configs write as a pair of equal numbers, e.g. image_size or patch_size."""
        value = self.get(field)
        if isinstance(value, Sequence) and not isinstance(value, str):
            pair = self.integers(field, 1, MAX_WIDTH)
            if len(pair) != 2 or pair[0] != pair[1]:
                raise self.refuse(field, f"must be one number or two equal ones, not {_shown(value)}")
            return pair[0]
        return self.integer(field, default=default)

    def section(self, field: str, *, optional: bool = False) -> Fields:
        """A nested JSON object; an empty one when it is left out and `optional`."""
        value = self._values.get(field)
        if value is None and optional:
            value = {}
        if value is None:
            raise self.refuse(field, "is missing")
        if not isinstance(value, Mapping):
            raise self.refuse(field, f"must be an object, not {_shown(value)}")
        return Fields(value, self.owner, f"{self.path}{field}.")

    def layer_types(self, layers: int, known: tuple[str, ...]) -> tuple[str, ...]:
        """`layer_types`, one known word for each layer; empty when left out."""
        kinds = self.texts("layer_types")
        if kinds and len(kinds) != layers:
            raise self.refuse("layer_types", f"names {len(kinds)} layers, but num_hidden_layers is {layers}")
        for kind in kinds:
            if kind not in known:
                raise self.refuse("layer_types", f"holds {_shown(kind)}, which this architecture does not have")
        return kinds


def _shown(value: object) -> str:
    """A value short enough for a sentence; numbers too long for Python to print are described instead."""
    if isinstance(value, int) and not isinstance(value, bool) and abs(value) >= 1 << 64:
        return "a number of more than 19 digits"
    if isinstance(value, Mapping):
        return "an object"
    if isinstance(value, list | tuple):
        return f"a list of {len(value)}"
    text = repr(value)
    return text if len(text) <= 40 else f"{text[:37]}..."
