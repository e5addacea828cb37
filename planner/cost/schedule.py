"""When something runs: hours a month, or windows of the week. The same object later drives scaling to zero."""

from __future__ import annotations

import re
from decimal import Decimal

from planner.errors import PlannerError
from planner.model import Frozen

MONTH_HOURS = Decimal(730)  # 8760 hours of a year / 12, as Azure's calculator and invoices average it
DAYS = ("mon", "tue", "wed", "thu", "fri", "sat", "sun")
_DAY_MINUTES = 24 * 60
_WEEK_MINUTES = 7 * _DAY_MINUTES
_WINDOW = re.compile(r"([a-z]{3})(?:-([a-z]{3}))?\s+([0-9]{1,2}):([0-9]{2})\s*-\s*([0-9]{1,2}):([0-9]{2})")


class Window(Frozen):
    """Minutes of the week, from Monday 00:00: start .. end, end after start; the week wraps."""

    start_minute: int
    end_minute: int


class Schedule(Frozen):
    """When something runs. text: as a person wrote it; hours: of a month, where it says so; windows: of the week."""

    text: str
    hours: Decimal | None = None
    windows: tuple[Window, ...] = ()

    @property
    def always(self) -> bool:
        return self.hours is None and not self.windows

    def _minutes(self) -> bytearray:
        """A byte a minute of the week: 1 inside at least one window."""
        on = bytearray(_WEEK_MINUTES)
        for window in self.windows:
            for minute in range(window.start_minute, window.end_minute):
                on[minute % _WEEK_MINUTES] = 1
        return on

    @property
    def week_minutes(self) -> int:
        """Minutes of the week inside at least one window."""
        return sum(self._minutes())

    @property
    def starts_per_month(self) -> Decimal:
        """How often a month it switches on: when a window begins that no other runs into, and once a working day (21.7)
        for plain hours; 0 for always and never."""
        if self.always or self.hours == 0:
            return Decimal(0)
        on = self._minutes()
        begins = sum(on[i] and not on[i - 1] for i in range(_WEEK_MINUTES)) if self.windows else 5
        return MONTH_HOURS / 168 * begins

    def hours_per_month(self) -> Decimal:
        """Hours of a month of 730: as stated, or minutes of the week / 60 x 730 / 168."""
        if self.hours is not None:
            return self.hours
        if not self.windows:
            return MONTH_HOURS
        return Decimal(self.week_minutes) * MONTH_HOURS / (60 * 168)


def parse_schedule(text: str) -> Schedule:
    """`always`, hours a month such as `80h`, or windows such as `mon-fri 08:00-18:00; sat 10:00-12:00`.

    A window that ends before it starts runs past midnight. Raises PlannerError for anything else.
    """
    plain = " ".join(text.strip().lower().split())
    if plain in ("always", "24x7", "24/7"):
        return Schedule(text="always")
    hours = re.fullmatch(r"([0-9]{1,5}(?:\.[0-9]{1,3})?) ?(?:h|hours)?", plain)
    if hours is not None:
        value = Decimal(hours[1])
        if value > MONTH_HOURS:
            raise PlannerError(f"{text[:60]!r} is more than the 730 hours that a month has on average: write always")
        return Schedule(text=f"{value:f}h", hours=value)
    windows: list[Window] = []
    for part in filter(None, (piece.strip() for piece in plain.split(";"))):
        match = _WINDOW.fullmatch(part)
        if match is None or match[1] not in DAYS or (match[2] or match[1]) not in DAYS:
            raise PlannerError(
                f"{text[:60]!r} is not a schedule: write always, hours a month such as 80h, or windows such as"
                " 'mon-fri 08:00-18:00'"
            )
        start, end = (int(match[3]) * 60 + int(match[4]), int(match[5]) * 60 + int(match[6]))
        if int(match[4]) > 59 or int(match[6]) > 59 or start >= _DAY_MINUTES or end > _DAY_MINUTES or start == end:
            raise PlannerError(f"{part!r} is not a window of a day: write times from 00:00 to 24:00, start before end")
        first, last = DAYS.index(match[1]), DAYS.index(match[2] or match[1])
        for step in range((last - first) % 7 + 1):
            base = (first + step) % 7 * _DAY_MINUTES
            windows.append(
                Window(start_minute=base + start, end_minute=base + end + (_DAY_MINUTES if end < start else 0))
            )
    if not windows:
        raise PlannerError("an empty schedule says nothing: write always, or hours a month such as 80h")
    return Schedule(text=plain, windows=tuple(windows))
