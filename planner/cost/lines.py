"""One line of a bill, and how it follows from a price: quantity x unit price, with the source beside it."""

from __future__ import annotations

from decimal import Decimal
from typing import Literal

from planner.catalog.prices import COMMITTED, EVERYWHERE, Meter, PriceSheet, Priority, Provenance
from planner.cost.schedule import MONTH_HOURS
from planner.cost.spot import Overhead, Range
from planner.model import Amount, Frozen
from planner.units import round_money

Group = Literal["compute", "people", "platform", "storage", "network", "monitoring", "security"]
ONE: Range = (Decimal(1), Decimal(1), Decimal(1))

PRIORITY_WORDS: dict[Priority, str] = {
    "on-demand": "on demand",
    "spot": "spot",
    "savings-plan-1y": "savings plan, 1 year",
    "savings-plan-3y": "savings plan, 3 years",
    "reserved-1y": "reserved, 1 year",
    "reserved-3y": "reserved, 3 years",
}


class Line(Frozen):
    """A line of a month's bill, in USD, exact. None: the sheet has no price, which is not 0.

    key: stable name, by which two budgets are compared; label, basis: in plain words
    quantity, unit, unit_usd: of the expected figure; low_usd, usd, high_usd: of a month
    formula: how usd follows; provenance: of the price; sku, region, priority: of a VM; service: Azure's name for it
    idle_usd: the part of usd that is paid for hours in which nothing runs
    """

    key: str
    group: Group
    label: str
    basis: str
    quantity: Amount
    unit: str
    unit_usd: Amount | None = None
    low_usd: Amount | None = None
    usd: Amount | None = None
    high_usd: Amount | None = None
    formula: str
    provenance: Provenance | None = None
    service: str = ""
    sku: str = ""
    region: str = ""
    priority: Priority | None = None
    idle_usd: Amount = Decimal(0)
    note: str = ""

    @property
    def priced(self) -> bool:
        return self.usd is not None

    def to_cents(self) -> Line:
        """The line as it is printed: amounts to cents, quantity and unit price to what a reader can follow."""
        cents = {
            name: None if (value := getattr(self, name)) is None else round_money(value)
            for name in ("low_usd", "usd", "high_usd", "idle_usd")
        }
        unit = None if self.unit_usd is None else tidy(self.unit_usd, 10)
        return self.model_copy(update=cents | {"quantity": tidy(self.quantity, 6), "unit_usd": unit})


def total(lines: tuple[Line, ...], field: Literal["low_usd", "usd", "high_usd"] = "usd") -> Decimal:
    """The sum of the priced lines, USD a month."""
    return sum((value for line in lines if (value := getattr(line, field)) is not None), Decimal(0))


def tidy(value: Decimal, places: int) -> Decimal:
    """A number without digits that mean nothing: at most so many decimals, no zeros at its end, no exponent."""
    text = f"{value:.{places}f}"
    return Decimal(text.rstrip("0").rstrip(".") if "." in text else text)


def figure(value: Decimal, places: int = 6) -> str:
    """A number for a formula: without zeros at its end and thousands separated, at most `places` decimals."""
    rounded = value.quantize(Decimal(1).scaleb(-places)) if value != value.to_integral_value() else value
    text = f"{rounded:,f}"
    return text.rstrip("0").rstrip(".") if "." in text else text


def counted(units: Decimal, unit: str) -> str:
    """`730 hours`, `1 hour`, `5 x 10,000 operations`, `250 GB`, `15.3 GB-months`."""
    number = figure(units)
    if unit[:1].isdigit():
        return f"{number} x {unit}"
    return f"{number} {unit}" if units == 1 or unit == "GB" else f"{number} {unit}s"


def group_of(key: str) -> Group:
    """The group of a line, by the first word of its key: `gpu/serve` is compute, `storage/weights` is storage."""
    groups: dict[str, Group] = {
        "gpu": "compute",
        "people": "people",
        "platform": "platform",
        "storage": "storage",
        "network": "network",
        "monitoring": "monitoring",
        "security": "security",
    }
    return groups[key.partition("/")[0]]


def vm_line(
    sheet: PriceSheet,
    *,
    key: str,
    label: str,
    sku: str,
    region: str,
    priority: Priority,
    count: int,
    hours: Decimal,
    overhead: Overhead | None = None,
    idle_hours: Decimal = Decimal(0),
) -> Line:
    """VMs of one size for a month.

    On demand and spot: count x (hours x overhead + idle_hours) x hourly price, at most 730 hours. Committed: count x
    730 h x hourly price, used or not. hours, idle_hours: of one machine in the month; overhead: of evictions, on spot.
    """
    short = sku.removeprefix("Standard_")
    offer = sheet.offer(sku, region, priority)
    many = f"{count} x " if count != 1 else ""
    committed = priority in COMMITTED
    factor = overhead.factor if overhead and priority == "spot" else ONE
    billed = [MONTH_HOURS if committed else min(hours * share + idle_hours, MONTH_HOURS) for share in factor]
    quantity = billed[1] * count
    common = {
        "key": key,
        "group": group_of(key),
        "label": label,
        "quantity": quantity,
        "unit": "hour",
        "service": "Virtual Machines",
        "sku": sku,
        "region": region,
        "priority": priority,
    }
    if offer is None:
        why = sheet.unpriced.get(sku) or f"not priced in {region}: {PRIORITY_WORDS[priority]}"
        return Line(
            **common,
            basis=f"{many}{short}, {figure(billed[1], 1)} hours {PRIORITY_WORDS[priority]}",
            formula="unpriced",
            note=why,
        )
    rate = offer.usd_per_hour
    low, usd, high = (rate * count * amount for amount in billed)
    used = min(hours * factor[1], MONTH_HOURS)
    if overhead and priority == "spot":
        used -= hours * overhead.away[1]
    idle = rate * count * max(billed[1] - used, Decimal(0))
    words = f"{figure(billed[1], 1)} hours"
    if committed:
        words = f"all month ({figure(hours, 1)} hours used)" if hours < MONTH_HOURS else "all month"
    formula = f"{count} x {figure(billed[1])} h x {figure(rate)} USD/h"
    if not committed and (factor != ONE or idle_hours):
        formula += f" ({figure(hours)} h of work"
        formula += f" x {figure(factor[1])} for evictions" if factor != ONE else ""
        formula += f" + {figure(idle_hours)} h until it is given back)" if idle_hours else ")"
    return Line(
        **common,
        basis=f"{many}{short}, {words} {PRIORITY_WORDS[priority]}",
        unit_usd=rate,
        low_usd=low,
        usd=usd,
        high_usd=high,
        formula=formula,
        provenance=offer.provenance,
        idle_usd=idle,
        note=offer.provenance.note,
    )


def meter_line(
    sheet: PriceSheet,
    *,
    key: str,
    label: str,
    basis: str,
    meter: str,
    region: str,
    units: Decimal | Range,
    service: str,
    times: Decimal = Decimal(1),
    why: str = "",
) -> Line:
    """A service for a month: `times` accounts or machines, each of `units` (low, expected, high), by the meter's tiers.

    why: how the units follow, for the formula.
    """
    spread = units if isinstance(units, tuple) else (units, units, units)
    found = sheet.meter(meter, region)
    common = {
        "key": key,
        "group": group_of(key),
        "label": label,
        "basis": basis,
        "service": service,
        "region": region,
    }
    quantity = spread[1] * times
    if found is None:
        return Line(
            **common,
            quantity=quantity,
            unit=meter,
            formula="unpriced",
            note=f"the price sheet has no {meter}",
        )
    low, usd, high = (times * found.cost(amount) for amount in spread)
    return Line(
        **common,
        quantity=quantity,
        unit=found.unit,
        unit_usd=usd / quantity if quantity else found.tiers[-1].usd,
        low_usd=low,
        usd=usd,
        high_usd=high,
        formula=_meter_formula(found, spread[1], times) + (f"; {why}" if why else ""),
        provenance=found.provenance,
        note=_meter_note(found, region),
    )


def _meter_formula(meter: Meter, units: Decimal, times: Decimal) -> str:
    head = f"{figure(times)} x " if times != 1 else ""
    text = head + counted(units, meter.unit)
    free = meter.free_units
    if free:
        text += f", first {figure(free)} free,"
    paid = [tier.usd for tier in meter.tiers if tier.usd]
    bounds = [tier.from_units for tier in meter.tiers]
    reached = [usd for start, usd in zip(bounds, (t.usd for t in meter.tiers), strict=True) if usd and units > start]
    return text + " x " + ", then ".join(f"{figure(usd)}" for usd in (reached or paid[:1])) + " USD"


def _meter_note(meter: Meter, region: str) -> str:
    if meter.region == EVERYWHERE and meter.provenance.estimate:
        return f"no figure for {region}: {meter.provenance.note or 'another region stands in'}"
    return meter.provenance.note


class Alternative(Frozen):
    """One way to buy the same machine for the hours of a month.

    usd_per_month: what those hours cost that way (expected); break_even_hours: of a month, from which on a commitment
    costs less than on demand, and than spot; None where there is no such price or it never does
    """

    priority: Priority
    usd_per_hour: Amount
    low_usd_per_month: Amount
    usd_per_month: Amount
    high_usd_per_month: Amount
    break_even_hours: Amount | None
    break_even_hours_against_spot: Amount | None
    provenance: Provenance


def alternatives(
    sheet: PriceSheet,
    sku: str,
    region: str,
    hours: Decimal,
    overhead: Overhead | None = None,
    idle_hours: Decimal = Decimal(0),
) -> tuple[Alternative, ...]:
    """Every priced way to run one machine for those hours of work a month, side by side.

    Break-even of a commitment: 730 h x its hourly price / the hourly price on demand (of spot: x its overhead).
    """
    found = []
    on_demand = sheet.rate(sku, region, "on-demand")
    spot = sheet.rate(sku, region, "spot")
    if spot is not None and overhead is not None:
        spot *= overhead.factor[1]
    for offer in (o for o in sheet.offers(sku) if o.region == region):
        line = vm_line(
            sheet,
            key="gpu/",
            label="",
            sku=sku,
            region=region,
            priority=offer.priority,
            count=1,
            hours=hours,
            overhead=overhead,
            idle_hours=idle_hours,
        )
        assert line.low_usd is not None
        assert line.usd is not None
        assert line.high_usd is not None
        monthly = offer.usd_per_hour * MONTH_HOURS
        committed = offer.priority in COMMITTED
        found.append(
            Alternative(
                priority=offer.priority,
                usd_per_hour=tidy(offer.usd_per_hour, 10),
                low_usd_per_month=tidy(line.low_usd, 6),
                usd_per_month=tidy(line.usd, 6),
                high_usd_per_month=tidy(line.high_usd, 6),
                break_even_hours=_break_even(monthly, on_demand) if committed else None,
                break_even_hours_against_spot=_break_even(monthly, spot) if committed else None,
                provenance=offer.provenance,
            )
        )
    return tuple(found)


def _break_even(monthly: Decimal, per_hour: Decimal | None) -> Decimal | None:
    """Hours after which paying by the hour has cost a whole month's commitment; None when a month is too short."""
    if per_hour is None or monthly > per_hour * MONTH_HOURS:
        return None
    return tidy(monthly / per_hour, 6)
