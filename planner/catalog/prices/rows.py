"""Rows of the Azure Retail Prices API, and which of them are the price of a Linux VM or of a service."""

from __future__ import annotations

import json
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from datetime import date
from decimal import Decimal
from functools import cache
from importlib.resources import files
from typing import Annotated, NamedTuple

from pydantic import BeforeValidator, ConfigDict
from pydantic.alias_generators import to_camel

from planner.catalog.prices import EVERYWHERE, TERM_HOURS, Priority
from planner.model import Frozen

VM_SERVICE = "Virtual Machines"
SAVINGS_PLANS: Mapping[str, Priority] = {"1 Year": "savings-plan-1y", "3 Years": "savings-plan-3y"}
RESERVATIONS: Mapping[str, Priority] = {"1 Year": "reserved-1y", "3 Years": "reserved-3y"}
LOWEST_SHARE = Decimal("0.05")  # of the on-demand price: what costs less is another kind of row
_NOT_PLAIN_LINUX = re.compile(r"\bWin(dows)?\b|Cloud ?Services|Dedicated Host", re.IGNORECASE)

OfferKey = tuple[str, str, Priority]
Tiers = tuple[tuple[Decimal, Decimal], ...]


def number(value: object) -> object:
    if isinstance(value, int | Decimal) and 0 <= value < 10**12:
        return value
    raise ValueError(f"{str(value)[:40]!r} is not a price or an amount")


_Number = Annotated[Decimal, BeforeValidator(number)]
_Text = Annotated[str, BeforeValidator(lambda value: "" if value is None else value)]
_Day = Annotated[date, BeforeValidator(lambda value: value[:10] if isinstance(value, str) else value)]


class _FromApi(Frozen):
    model_config = ConfigDict(extra="ignore", alias_generator=to_camel)


class Plan(_FromApi):
    """A savings plan of an on-demand row, by the hour."""

    retail_price: _Number
    term: _Text = ""


class Item(_FromApi):
    """One row of the price list; times of day are dropped, a price holds on its first and its last day."""

    currency_code: str
    tier_minimum_units: _Number = Decimal(0)
    reservation_term: _Text = ""
    retail_price: _Number
    arm_region_name: _Text
    effective_start_date: _Day
    effective_end_date: _Day | None = None
    meter_id: _Text = ""
    meter_name: _Text
    product_name: _Text
    sku_name: _Text
    service_name: _Text
    unit_of_measure: _Text
    type: str
    is_primary_meter_region: bool = True
    arm_sku_name: _Text = ""
    savings_plan: Annotated[tuple[Plan, ...], BeforeValidator(lambda value: value or ())] = ()

    def named(self, words: str) -> bool:
        return words in self.sku_name or words in self.meter_name

    def holds_on(self, day: date) -> bool:
        return self.effective_start_date <= day and (self.effective_end_date is None or day <= self.effective_end_date)


class Page(_FromApi):
    billing_currency: str
    items: tuple[Item, ...]
    next_page_link: str | None = None
    model_config = ConfigDict(alias_generator=lambda name: name.title().replace("_", ""))


class MeterQuery(Frozen):
    """How a service meter is found in the API: see `about` in meters.json."""

    name: str
    unit: str
    service: str
    product: str
    sku: str | None
    meters: tuple[str, ...]
    arm_region: str | None
    units: dict[str, Decimal]
    source: str
    as_of: date
    note: str = ""


@cache
def meter_queries() -> tuple[MeterQuery, ...]:
    """The meters of meters.json."""
    text = (files("planner.catalog.prices") / "meters.json").read_text(encoding="utf-8")
    return tuple(MeterQuery.model_validate(record) for record in json.loads(text)["meters"])


class Selected(NamedTuple):
    """Prices as the API lists them, a sentence for each that was not taken, and what was left out on the way."""

    offers: dict[OfferKey, Decimal]
    warnings: tuple[str, ...]
    notes: tuple[str, ...]


def select_vm(items: Iterable[Item], day: date, currency: str = "USD") -> Selected:
    """Which rows of VM sizes are their prices on a day: size, region, priority -> price (a reservation's: whole term).

    Exactly one on-demand price, else nothing is taken of that size in that region; of several spot prices the newest,
    then the highest; anything else must cost 5 to 100 % of on-demand an hour. The order of the rows does not matter.
    """
    left_out: Counter[str] = Counter()
    kept: dict[tuple[str, str], list[Item]] = defaultdict(list)
    for item in items:
        reason = _left_out(item, day, currency)
        left_out[reason] += 1
        if not reason:
            kept[item.arm_sku_name, item.arm_region_name].append(item)
    offers: dict[OfferKey, Decimal] = {}
    warnings: list[str] = []
    notes = [f"{reason}: {count} left out" for reason, count in sorted(left_out.items()) if reason]
    for (sku, region), rows in sorted(kept.items()):
        where = f"{sku} in {region}"
        listed = _by_priority(_without_ending_twins(rows), where, notes)
        on_demand = listed.pop("on-demand", set())
        if len(on_demand) != 1:
            count = f"{len(on_demand)} on-demand prices ({_several(on_demand)})" if on_demand else "no on-demand price"
            warnings.append(f"{where} has {count} in the price list, so nothing was taken")
            continue
        od = offers[sku, region, "on-demand"] = min(on_demand)
        for priority, prices in listed.items():
            hourly = min(prices) / TERM_HOURS.get(priority, 1)
            if len(prices) > 1:
                warnings.append(f"{where} has {len(prices)} prices {priority} ({_several(prices)}), so none was taken")
            elif not od * LOWEST_SHARE <= hourly <= od:
                warnings.append(f"{where} would cost {hourly:.6g} an hour {priority}, {od:f} on demand, so not taken")
            else:
                offers[sku, region, priority] = min(prices)
    return Selected(offers, tuple(warnings), tuple(notes))


def _left_out(item: Item, day: date, currency: str) -> str:
    """Why a row is no price of a Linux VM; empty when it is one."""
    reasons = {
        "another service": item.service_name != VM_SERVICE or not item.arm_sku_name,
        "another currency": item.currency_code != currency,
        "no region": item.arm_region_name.lower() in ("", "global"),
        "another unit": item.unit_of_measure != "1 Hour",
        "Windows, Cloud Services or Dedicated Host": bool(_NOT_PLAIN_LINUX.search(item.product_name)),
        "another price type": item.type not in ("Consumption", "Reservation"),
        "Low Priority": item.named("Low Priority"),
        "not in force that day": not item.holds_on(day),
        "price 0": not item.retail_price,
    }
    return next((reason for reason, holds in reasons.items() if holds), "")


def _without_ending_twins(rows: Sequence[Item]) -> list[Item]:
    """Where one meter is listed with an end date and without, the row without: the other is about to go."""
    twin = {"retail_price", "effective_start_date", "effective_end_date", "savings_plan"}
    keys = [row.model_dump_json(exclude=twin) for row in rows]
    lasting = {key for key, row in zip(keys, rows, strict=True) if row.effective_end_date is None}
    return [row for key, row in zip(keys, rows, strict=True) if row.effective_end_date is None or key not in lasting]


def _by_priority(rows: Sequence[Item], where: str, notes: list[str]) -> dict[Priority, set[Decimal]]:
    """The distinct prices of one size in one region; of spot only the one that counts."""
    listed: dict[Priority, set[Decimal]] = defaultdict(set)
    spot: set[tuple[date, Decimal]] = set()
    for row in rows:
        if row.type == "Reservation":
            if row.reservation_term in RESERVATIONS:
                listed[RESERVATIONS[row.reservation_term]].add(row.retail_price)
        elif row.named(" Spot"):
            spot.add((row.effective_start_date, row.retail_price))
        else:
            listed["on-demand"].add(row.retail_price)
            for plan in row.savings_plan:
                if plan.term in SAVINGS_PLANS and plan.retail_price:
                    listed[SAVINGS_PLANS[plan.term]].add(plan.retail_price)
    if spot:
        listed["spot"] = {max(spot)[1]}
    if len(spot) > 1:
        every = ", ".join(f"{usd:f} since {start}" for start, usd in sorted(spot))
        notes.append(f"{where} has {len(spot)} spot prices ({every}): the newest, then the highest, was taken")
    return listed


def _several(prices: Iterable[Decimal]) -> str:
    return ", ".join(f"{price:f}" for price in sorted(prices))


def select_meter(
    query: MeterQuery, items: Iterable[Item], day: date, regions: set[str]
) -> tuple[dict[str, Tiers], list[str]]:
    """A service's tiers (from units, USD a unit) by region, and a sentence for each whose rows are no clear table.

    A free first tier is kept. A meter that belongs to the region goes before the same name of another region's meter.
    """
    by_region: dict[str, list[Item]] = defaultdict(list)
    for item in items:
        place = item.arm_region_name if query.arm_region is None else EVERYWHERE
        if (
            (item.service_name, item.product_name, item.type) == (query.service, query.product, "Consumption")
            and query.sku in (None, item.sku_name)
            and item.meter_name in query.meters
            and query.arm_region in (None, item.arm_region_name)
            and place in regions | {EVERYWHERE}
            and item.currency_code == "USD"
            and item.holds_on(day)
        ):
            by_region[place].append(item)
    tables: dict[str, Tiers] = {}
    warnings: list[str] = []
    for region, rows in sorted(by_region.items()):
        rows = [row for row in rows if row.is_primary_meter_region] or rows
        other_units = {row.unit_of_measure for row in rows} - set(query.units)
        tiers: dict[Decimal, set[Decimal]] = defaultdict(set)
        for row in _without_ending_twins(rows):
            units = query.units.get(row.unit_of_measure, Decimal(1))
            tiers[row.tier_minimum_units * units].add(row.retail_price / units)
        table = tuple((start, min(prices)) for start, prices in sorted(tiers.items()))
        if other_units:
            reason = f"is priced by {min(other_units)[:40]!r} instead of {' or '.join(query.units)}"
        elif any(len(prices) > 1 for prices in tiers.values()):
            reason = f"has several prices ({_several(usd for prices in tiers.values() for usd in prices)})"
        elif table[0][0] or not all(usd for _, usd in table[1:] or table):
            reason = "has tiers that do not start at 0 or that cost nothing"
        else:
            tables[region] = table
            continue
        warnings.append(f"{query.name} in {region} {reason} in the price list, so nothing was taken")
    return tables, warnings
