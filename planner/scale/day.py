"""A day's traffic and the autoscaling band: how many machines each hour needs, and what not keeping them all saves.

machine hours a day = sum of machines(h) + rises x hours of a start + falls x hours until a machine is given back
"""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from decimal import Decimal
from math import ceil, cos, isfinite, pi
from pathlib import Path

from planner.catalog.assumptions import assumption
from planner.cost.schedule import MONTH_HOURS
from planner.errors import PlannerError
from planner.model import Amount, Frozen
from planner.units import round_money

HOURS = 24
BUSIEST = 14.5  # between the two hours at which an assumed day has its peak; only its shape matters
LARGEST_RATIO = 11  # of a day's peak to its mean: as the wave narrows, those two hours are all that is left
LARGEST_DAY = 1 << 20  # bytes of a file with 24 rows


class Band(Frozen):
    """Between how many machines a pool scales over a day.

    machines: by hour of the day, spares included; in_flight_target: requests that run or wait in a replica when the
    next one is due; machine_hours: a month, with starts and the wait before a machine is given back; always: all of
    them all the time; usd_per_million_output: tokens of the whole day
    """

    minimum_machines: int
    maximum_machines: int
    minimum_replicas: int
    maximum_replicas: int
    machines: tuple[int, ...]
    peak_to_mean: float
    in_flight_target: int
    machine_hours: Amount
    machine_hours_always: Amount
    usd_per_month: Amount | None
    usd_per_month_always: Amount | None
    usd_per_million_output: Amount | None


def wave(peak_to_mean: float) -> tuple[float, ...]:
    """A day as shares of its busiest hours: ((1 + cos(2 pi (h - 14.5) / 24)) / 2)^k over its largest value.

    k is such that the mean is 1 / peak_to_mean. Raises PlannerError outside 1 .. 11.
    """
    if not isfinite(peak_to_mean) or not 1 <= peak_to_mean <= LARGEST_RATIO:
        raise PlannerError(
            f"a day whose busiest hour has {peak_to_mean:g} times its mean is no wave: write 1 (flat) to"
            f" {LARGEST_RATIO}, or give the hours with --daily"
        )
    bases = [(1 + cos(2 * pi * (hour - BUSIEST) / HOURS)) / 2 for hour in range(HOURS)]
    top = max(bases)

    def shares(k: float) -> list[float]:
        return [(base / top) ** k for base in bases]

    low, high = 0.0, 1.0
    while sum(shares(high)) / HOURS > 1 / peak_to_mean:
        high *= 2
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if sum(shares(middle)) / HOURS > 1 / peak_to_mean else (low, middle)
    return tuple(shares(high))


def read_day(path: str) -> tuple[float, ...]:
    """Requests a second of each hour from a CSV `hour,requests_per_s` with 24 rows, 0 to 23 in any order.

    Raises PlannerError in one sentence for a file that is none.
    """
    rows = read_csv(path, ("hour", "requests_per_s"), "one row for each hour, such as 13,18.5")
    rates: dict[int, float] = {}
    for number, row in enumerate(rows, start=2):
        hour, rate = number_in(row, "hour", path, number), number_in(row, "requests_per_s", path, number)
        if hour != int(hour) or not 0 <= hour < HOURS:
            raise PlannerError(f"{path}, line {number}: {hour:g} is not an hour of the day: write 0 to 23")
        if int(hour) in rates:
            raise PlannerError(f"{path}, line {number}: hour {hour:g} stands there twice: keep one row for each")
        rates[int(hour)] = rate
    missing = [str(hour) for hour in range(HOURS) if hour not in rates]
    if missing:
        raise PlannerError(f"{path} lacks the hours {', '.join(missing)}: give one row for each of 0 to 23")
    if not max(rates.values()):
        raise PlannerError(f"{path} has a rate of 0 in every hour: give at least one request a second somewhere")
    return tuple(rates[hour] for hour in range(HOURS))


def read_csv(path: str, required: Sequence[str], example: str) -> list[dict[str, str]]:
    """The rows of a CSV with at least these columns, names and cells stripped. PlannerError for any other file."""
    try:
        raw = Path(path).expanduser().read_bytes()
        text = raw.decode("utf-8-sig")
    except (OSError, ValueError, RuntimeError) as error:
        reason = (error.strerror if isinstance(error, OSError) else None) or "not text"
        raise PlannerError(f"{path} cannot be read ({reason}): give a CSV file with {example}") from error
    if len(raw) > LARGEST_DAY:
        raise PlannerError(f"{path} has {len(raw):,} bytes, which no such table needs: give {example}")
    reader = csv.DictReader(io.StringIO(text))
    names = [(name or "").strip() for name in reader.fieldnames or ()]
    lacking = [name for name in required if name not in names]
    if lacking:
        raise PlannerError(f"{path} has no column {' and no '.join(lacking)}: give {example}")
    reader.fieldnames = names
    rows = [{k: (v or "").strip() for k, v in row.items() if k and not isinstance(v, list)} for row in reader]
    if not rows:
        raise PlannerError(f"{path} has no rows: give {example}")
    return rows


def number_in(row: dict[str, str], column: str, path: str, line: int) -> float:
    """A cell as a number from 0 on; PlannerError names the line."""
    text = row.get(column, "")
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not isfinite(value) or value < 0:
        raise PlannerError(f"{path}, line {line}: {column} is {text[:40]!r}, not a number from 0 on: write one")
    return value


def band(
    *,
    day: Sequence[float],
    rate_per_s: float,
    largest_per_s: float,
    replicas_per_machine: int,
    spare: int,
    in_flight: float,
    usd_per_hour: Decimal | None,
    output_tokens: float,
) -> Band:
    """The band of a pool whose replicas each take `largest_per_s` requests a second.

    machines(h) = ceil(share(h) x rate / (largest x replicas a machine)), at least 1, + spare; in_flight: requests in
    a replica at the largest rate, down to a whole number as the target of the autoscaler
    """
    each = largest_per_s * replicas_per_machine
    machines = [max(1, ceil(share * rate_per_s / each - 1e-9)) + spare for share in day]
    pairs = list(zip(machines, [*machines[1:], machines[0]], strict=True))
    rises = sum(max(after - before, 0) for before, after in pairs)
    falls = sum(max(before - after, 0) for before, after in pairs)
    extra = rises * assumption("restart_hours").expected + falls * assumption("scale_down_hours").expected
    days = MONTH_HOURS / HOURS
    always = max(machines) * MONTH_HOURS
    hours = min((sum(machines) + extra) * days, always)
    mean = sum(day) / len(day)
    tokens = Decimal(f"{rate_per_s * mean * output_tokens * 3600:.9f}") * MONTH_HOURS
    usd = None if usd_per_hour is None else hours * usd_per_hour
    return Band(
        minimum_machines=min(machines),
        maximum_machines=max(machines),
        minimum_replicas=(min(machines) - spare) * replicas_per_machine,
        maximum_replicas=(max(machines) - spare) * replicas_per_machine,
        machines=tuple(machines),
        peak_to_mean=max(day) / mean,
        in_flight_target=max(1, int(in_flight)),
        machine_hours=round(hours, 1),
        machine_hours_always=round(always, 1),
        usd_per_month=None if usd is None else round_money(usd),
        usd_per_month_always=None if usd_per_hour is None else round_money(always * usd_per_hour),
        usd_per_million_output=None if usd is None else round(usd / tokens * 1_000_000, 4),
    )
