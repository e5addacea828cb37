"""`planner prices refresh`, below the command line: a newer price sheet from the public Azure Retail Prices API.

A price is taken only where the API is unambiguous: `select_vm` says which rows of a size are its Linux prices,
meters.json which row is which service. All that the API does not answer for stays as it stood, with its own date.
"""

from __future__ import annotations

import re
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from datetime import date
from decimal import Context, Decimal
from pathlib import Path
from typing import TYPE_CHECKING

from planner.catalog.prices import (
    EVERYWHERE,
    PRIORITIES,
    SCHEMA,
    MeterRow,
    PriceSheet,
    Provenance,
    SheetFile,
    cache_folder,
    parse_sheet,
    sheet_text,
)
from planner.catalog.prices.api import KEPT, Api, Timeouts, origin, own_client
from planner.catalog.prices.rows import (
    VM_SERVICE,
    Item,
    MeterQuery,
    OfferKey,
    Tiers,
    meter_queries,
    select_meter,
    select_vm,
)
from planner.errors import PlannerError
from planner.files import write_atomically
from planner.model import Amount, Frozen

if TYPE_CHECKING:
    import httpx

ENDPOINT = "https://prices.azure.com"
SOURCE = "Azure Retail Prices API, https://prices.azure.com/api/retail/prices"


class PriceChange(Frozen):
    """A price that differs between two sheets, None where one has none; usd as listed: a reservation's whole term.

    what: size, or meter and its tier; priority: of an offer, or a meter's unit
    """

    what: str
    region: str
    priority: str
    old_usd: Amount | None
    new_usd: Amount | None

    @property
    def change_pct(self) -> Decimal | None:
        """Per cent of the old price, None where there is nothing to compare with."""
        return (self.new_usd - self.old_usd) / self.old_usd * 100 if self.old_usd and self.new_usd is not None else None


class Refreshed(Frozen):
    """A new sheet, not yet saved; carried: prices kept from the sheet before because the API did not list them now."""

    content: SheetFile
    changes: tuple[PriceChange, ...]
    carried: int
    warnings: tuple[str, ...]
    requests: int


def fetch(
    base: PriceSheet,
    *,
    skus: Sequence[str],
    day: date,
    currency: str = "USD",
    endpoint: str = ENDPOINT,
    regions: Sequence[str] = (),
    progress: Callable[[int, int, str], None] = lambda done, total, label: None,
    client: httpx.Client | None = None,
    timeouts: Timeouts | None = None,
    sleep: Callable[[float], None] = time.sleep,
) -> Refreshed:
    """The prices of those sizes and of all services as the API lists them now, laid over `base`. Writes nothing.

    skus: ARM names, in exact case; regions: those of base when empty; currency: its rate to USD is asked for as well
    progress: called with the queries done, all queries and what comes next. Raises PlannerError when a request finally
    fails, when the API knows none of the sizes, and for a currency that it does not know.
    """
    if not re.fullmatch(r"[A-Za-z]{3}", currency):
        raise PlannerError(f"{currency[:20]!r} is not a currency: give its three letters, for example EUR")
    if not skus:
        raise PlannerError("no size was named, so there is no price to ask for: name at least one")
    if origin(endpoint) is None:
        raise PlannerError(f"{endpoint[:80]!r} is not the address of a price list: give one that starts with https://")
    currency, skus = currency.upper(), list(dict.fromkeys(skus))
    wanted = {re.sub("[ -]", "", region).lower() for region in regions} or set(base.regions)
    groups: dict[tuple[str, str, str | None], list[MeterQuery]] = defaultdict(list)
    for query in meter_queries():
        groups[query.service, query.product, query.sku].append(query)
    abroad_first = int(currency != "USD")
    total = abroad_first + len(skus) + len(groups)
    prices: dict[OfferKey, Decimal] = {}
    abroad: dict[OfferKey, Decimal] = {}
    tables: dict[tuple[str, str], tuple[str, Tiers]] = {}
    elsewhere: set[str] = set()
    warnings: list[str] = []
    with nullcontext(client) if client else own_client() as http:
        api = Api(http, endpoint, timeouts or Timeouts(), sleep)
        if abroad_first:  # so that a currency that Azure does not know is found out at once
            progress(0, total, f"exchange rate of {currency}")
            abroad = _on_demand_abroad(api, base, skus, currency, day)
        for done, sku in enumerate(skus, start=abroad_first):
            progress(done, total, sku)
            items = _vm_items(api, sku)
            elsewhere |= {item.arm_region_name for item in items} - wanted - {"", "Global"}
            selected = select_vm((item for item in items if item.arm_region_name in wanted), day)
            prices |= selected.offers
            warnings += selected.warnings
        if not prices:
            raise PlannerError(f"the price list has no price of any of the {len(skus)} sizes asked for; {KEPT}")
        units = {meter.name: meter.unit for meter in base.meters()}
        for done, ((service, product, kind), queries) in enumerate(groups.items(), start=abroad_first + len(skus)):
            progress(done, total, f"{product} {kind or ''}".rstrip())
            equal = {"serviceName": service, "productName": product, "priceType": "Consumption"}
            equal |= {"skuName": kind} if kind else {}
            items = api.items(product, equal, primary=False)
            for query in queries:
                found, refused = select_meter(query, items, day, wanted)
                warnings += refused
                if units.get(query.name, query.unit) != query.unit:
                    warnings.append(f"{query.name} is by {units[query.name]} in {base.name}, so nothing was taken")
                else:
                    tables |= {(query.name, region): (query.unit, table) for region, table in found.items()}
    unknown = wanted - {region for _, region, _ in prices} if regions else set()
    if unknown:
        warnings.append(f"the price list has none of these sizes in {', '.join(sorted(unknown))}")
    if elsewhere and not regions:
        names = ", ".join(sorted(elsewhere))
        warnings.append(f"regions that {base.name} has no prices of were left out: {names}")
    rate = {currency: _rate(prices, abroad, currency)} if abroad_first else {}
    content, carried = _laid_over(base, prices, tables, rate, day)
    new = parse_sheet(sheet_text(content).encode(), f"the price list of {day}")
    return Refreshed(
        content=content,
        changes=changes(base, new),
        carried=carried,
        warnings=tuple(warnings),
        requests=api.requests,
    )


def _vm_items(api: Api, sku: str, currency: str = "USD") -> list[Item]:
    equal = {"serviceName": VM_SERVICE, "armSkuName": sku}
    return [item for item in api.items(sku, equal, currency, primary=True) if item.arm_sku_name == sku]


def _on_demand_abroad(
    api: Api, base: PriceSheet, skus: Sequence[str], currency: str, day: date
) -> dict[OfferKey, Decimal]:
    """On-demand prices in another currency, of the size that costs most: Azure rounds what it converts."""

    def price(sku: str) -> Decimal:
        return max((offer.usd for offer in base.offers(sku) if offer.priority == "on-demand"), default=Decimal(0))

    for sku in sorted(skus, key=price, reverse=True)[:3]:
        offers = select_vm(_vm_items(api, sku, currency), day, currency).offers
        found = {key: usd for key, usd in offers.items() if key[2] == "on-demand"}
        if found:
            return found
    raise PlannerError(f"the price list has no size in {currency} that its rate could be read from; {KEPT}")


def _rate(prices: Mapping[OfferKey, Decimal], abroad: Mapping[OfferKey, Decimal], currency: str) -> Decimal:
    """One USD in the other currency, to 6 significant digits, from the highest price listed in both."""
    both = [(prices[key], key) for key in abroad if key in prices]
    if not both:
        raise PlannerError(f"the price list has no size in both USD and {currency}: try again later; {KEPT}")
    usd, key = max(both)
    return Context(prec=6).divide(abroad[key], usd)


def _laid_over(
    base: PriceSheet,
    prices: Mapping[OfferKey, Decimal],
    tables: Mapping[tuple[str, str], tuple[str, Tiers]],
    rates: Mapping[str, Decimal],
    day: date,
) -> tuple[SheetFile, int]:
    """The new sheet, and how many of its prices are those of base."""
    now = Provenance(source=SOURCE, as_of=day)
    known = {provenance: name for name, provenance in base.sources.items()}
    sources = {f"retail-{day}": now}

    def source(provenance: Provenance) -> str:
        name = known.get(provenance, "") if provenance != now else f"retail-{day}"
        while sources.setdefault(name, provenance) != provenance:
            name += "-before"
        return name

    offers = {key: (usd, now) for key, usd in prices.items()}
    for offer in (offer for sku in base.skus() for offer in base.offers(sku)):
        offers.setdefault((offer.sku, offer.region, offer.priority), (offer.usd, offer.provenance))
    for sku, region, _ in [key for key in offers if key[2] == "spot" and key not in prices]:
        listed_now = offers.get((sku, region, "on-demand"))
        # an old spot price above today's on demand says nothing any more
        if listed_now is not None and offers[sku, region, "spot"][0] > listed_now[0]:
            del offers[sku, region, "spot"]
    meters = {key: (*table, now) for key, table in tables.items()}
    listed: dict[str, set[str]] = defaultdict(set)
    for name, region in tables:
        listed[name].add(region)
    for meter in base.meters():
        # One price for everywhere replaces those of regions; an estimate for everywhere goes once no region needs it.
        replaced = EVERYWHERE in listed[meter.name] or (
            meter.region == EVERYWHERE and meter.provenance.estimate and listed[meter.name] >= set(base.regions)
        )
        if not replaced:
            tiers = tuple((tier.from_units, tier.usd) for tier in meter.tiers)
            meters.setdefault((meter.name, meter.region), (meter.unit, tiers, meter.provenance))
    exchange = {name: (rate.per_usd, rate.provenance) for name, rate in base.exchange_rates.items()}
    exchange |= {name: (rate, now) for name, rate in rates.items()}
    carried = len(offers) - len(prices) + len(meters) - len(tables)
    priced = {sku for sku, _, _ in offers}
    content = SheetFile(
        schema_version=SCHEMA,
        name=day.isoformat(),
        currency="USD",
        description=f"{SOURCE}, read on {day}; {carried} figures carried from {base.name}",
        exchange_rates={name: (_text(rate), source(p)) for name, (rate, p) in sorted(exchange.items())},
        offers=tuple(
            (*key, _text(usd), source(p))
            for key, (usd, p) in sorted(offers.items(), key=lambda row: (*row[0][:2], PRIORITIES.index(row[0][2])))
        ),
        meters=tuple(
            MeterRow(
                name=name,
                region=region,
                unit=unit,
                tiers=tuple((_text(start), _text(usd)) for start, usd in tiers),
                source=source(p),
            )
            for (name, region), (unit, tiers, p) in sorted(meters.items())
        ),
        unpriced={sku: why for sku, why in base.unpriced.items() if sku not in priced},
        sources=sources,
    )
    return content, carried


def _text(value: Decimal) -> str:
    return format(value.normalize(), "f")


def changes(old: PriceSheet, new: PriceSheet) -> tuple[PriceChange, ...]:
    """Prices that differ between two sheets, the largest change in per cent first, what only one of them has last."""

    def listed(sheet: PriceSheet) -> dict[tuple[str, str, str], Decimal]:
        found = {(o.sku, o.region, str(o.priority)): o.usd for sku in sheet.skus() for o in sheet.offers(sku)}
        for meter in sheet.meters():
            for tier in meter.tiers:
                above = f" above {_text(tier.from_units)}" if tier.from_units else ""
                found[meter.name + above, meter.region, meter.unit] = tier.usd
        return found

    before, after = listed(old), listed(new)
    found = [
        PriceChange(what=key[0], region=key[1], priority=key[2], old_usd=before.get(key), new_usd=after.get(key))
        for key in sorted(before.keys() | after.keys())
        if before.get(key) != after.get(key)
    ]
    return tuple(sorted(found, key=lambda c: -abs(c.change_pct) if c.change_pct is not None else Decimal(1)))


def save(content: SheetFile, folder: Path | None = None) -> Path:
    """Write a sheet as NAME.json to the cache (or folder), whole or not at all, and return where it lies.

    Raises PlannerError for a sheet that would not be read back, and where the folder cannot be written.
    """
    path = (folder or cache_folder()) / f"{content.name}.json"
    text = sheet_text(content)
    parse_sheet(text.encode(), str(path))
    try:
        write_atomically(path, text)
    except OSError as error:
        reason = error.strerror or type(error).__name__
        raise PlannerError(f"{path} cannot be written ({reason}): free space, or set TONNAGE_CACHE") from error
    return path
