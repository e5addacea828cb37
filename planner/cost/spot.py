"""What spot really costs: evictions, the work lost since the last checkpoint, and the restart, as a factor on hours.

Evictions are taken as memoryless: with the chance p of one in an hour, M = -1 / ln(1 - p) hours pass between two.
"""

from __future__ import annotations

from decimal import Decimal
from math import exp, expm1, inf, log1p, sqrt

from planner.errors import PlannerError
from planner.model import Frozen

Range = tuple[Decimal, Decimal, Decimal]


class SpotRisk(Frozen):
    """Low, expected, high: the chance of an eviction in an hour, and the billed hours until work goes on after."""

    evictions_per_hour: Range
    restart_hours: Range


class Overhead(Frozen):
    """What evictions add. factor: billed hours for an hour of work (>= 1); away: share of the hours without an answer.

    Both low, expected, high. interval_hours: between checkpoints, if any
    """

    factor: Range = (Decimal(1), Decimal(1), Decimal(1))
    away: Range = (Decimal(0), Decimal(0), Decimal(0))
    interval_hours: Decimal | None = None


def hours_between_evictions(chance_per_hour: float) -> float:
    """M = -1 / ln(1 - p), in hours; infinite for p = 0. PlannerError outside 0 <= p < 1."""
    if not 0 <= chance_per_hour < 1:
        raise PlannerError(f"an eviction chance of {chance_per_hour:g} an hour is not a share: write 0.05 for 5 %")
    return inf if chance_per_hour == 0 else -1 / log1p(-chance_per_hour)


def checkpoint_interval_hours(checkpoint_hours: float, between_evictions_hours: float) -> float:
    """The work between two checkpoints that costs least time, in hours; infinite where nothing is ever evicted.

    Young: sqrt(2 d M). Daly's higher order: sqrt(2 d M) (1 + sqrt(d / 2M) / 3 + (d / 2M) / 9) - d for d < 2M, else M.
    d: hours that writing a checkpoint takes; M: mean hours between evictions.
    Source: J. T. Daly, A higher order estimate of the optimum checkpoint interval, FGCS 22 (2006), equation 37.
    """
    d, m = checkpoint_hours, between_evictions_hours
    if m == inf:
        return inf
    if d <= 0:
        raise PlannerError("a checkpoint takes some time: write its seconds")
    if d >= 2 * m:
        return m
    ratio = d / (2 * m)
    return sqrt(2 * d * m) * (1 + sqrt(ratio) / 3 + ratio / 9) - d


def run_factor(
    interval_hours: float, checkpoint_hours: float, restart_hours: float, between_evictions_hours: float
) -> float:
    """Expected billed hours for one hour of training work.

    M e^(R/M) (e^((t + d)/M) - 1) / t, which for rare evictions is 1 + d/t + ((t + d)/2 + R)/M: checkpoints, the work
    lost since the last one, and the restart R. t: work between checkpoints. Source: Daly 2006, equation 20.
    """
    t, d, r, m = interval_hours, checkpoint_hours, restart_hours, between_evictions_hours
    if m == inf:
        return 1.0 if t == inf else 1 + d / t
    if (t + d + r) / m > 500:  # no run of that length ever ends
        raise PlannerError("at this eviction rate no interval between checkpoints would ever be finished: avoid spot")
    return m * exp(r / m) * expm1((t + d) / m) / t


def training_overhead(risk: SpotRisk, checkpoint_hours: tuple[float, float, float]) -> Overhead:
    """A training run's overhead on spot, its interval chosen for the expected rate and kept for the others.

    checkpoint_hours: to write one, at best, as expected, at worst. Where nothing is expected to be evicted, the
    interval is chosen for the high rate.
    """
    between = [hours_between_evictions(float(p)) for p in risk.evictions_per_hour]
    rate = between[1] if between[1] != inf else between[2]
    interval = checkpoint_interval_hours(checkpoint_hours[1], rate)
    factors = [
        run_factor(interval, checkpoint, float(restart), m)
        for checkpoint, restart, m in zip(checkpoint_hours, risk.restart_hours, between, strict=True)
    ]
    return Overhead(factor=_range(factors), interval_hours=None if interval == inf else Decimal(f"{interval:.3f}"))


def serving_overhead(risk: SpotRisk) -> Overhead:
    """A server's overhead on spot: its hours are those of its schedule, and R / (M + R) of them are restarts.

    The machine taken back is no longer billed and the next one is from its start, so the bill stays what it is.
    """
    away = [
        float(restart) / (hours_between_evictions(float(p)) + float(restart))
        for restart, p in zip(risk.restart_hours, risk.evictions_per_hour, strict=True)
    ]
    return Overhead(away=_range(away))


def _range(values: list[float]) -> Range:
    low, expected, high = (Decimal(f"{value:.6f}") for value in values)
    return low, expected, high
