"""The price book: dated sheets of Azure list prices, each figure with where it comes from and when it was read.

A sheet is one JSON file (schema tonnage.prices/1). Two come with Tonnage; `planner prices refresh` writes newer ones to
the user's cache. Prices are Decimal in USD; what is not in a sheet has no price, which is never the same as 0.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import os
import re
from collections.abc import Mapping
from datetime import UTC, date, datetime
from decimal import Decimal, InvalidOperation
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Literal, NamedTuple, get_args

from pydantic import Field, ValidationError

from planner.errors import PlannerError
from planner.model import Amount, Frozen

SCHEMA = "tonnage.prices/1"
BUNDLED = ("2026-11", "2026-01-reference")
DEFAULT = BUNDLED[0]
EVERYWHERE = "*"
MOST_USD = 10**9  # no single price reaches this; what does is no price

Priority = Literal["on-demand", "spot", "savings-plan-1y", "savings-plan-3y", "reserved-1y", "reserved-3y"]
PRIORITIES: tuple[Priority, ...] = get_args(Priority)
COMMITTED: tuple[Priority, ...] = PRIORITIES[2:]
# Hours of a term: Azure bills 365 days a year, leap years or not (a reservation's total / 8760 is its hourly rate).
TERM_HOURS: Mapping[Priority, int] = {"reserved-1y": 8760, "reserved-3y": 3 * 8760}


class Provenance(Frozen):
    """Where a figure comes from: source, the day it was read or became valid, whether it is an estimate, and a note."""

    source: str
    as_of: date
    estimate: bool = False
    note: str = ""


class Offer(Frozen):
    """What an hour of a VM size costs in a region, bought in one way.

    usd: as Azure lists it: an hour, but the whole term of a reservation; usd_per_hour: the same for an hour
    """

    sku: str
    region: str
    priority: Priority
    usd: Amount
    provenance: Provenance

    @property
    def usd_per_hour(self) -> Decimal:
        hours = TERM_HOURS.get(self.priority)
        return self.usd / hours if hours else self.usd


class Tier(Frozen):
    """Units above from_units (a month) cost usd each; the first tier may be free."""

    from_units: Amount
    usd: Amount


class Meter(Frozen):
    """What a service costs: tiers of a price by `unit`. region `*`: everywhere, or an estimate that says so."""

    name: str
    region: str
    unit: str
    tiers: tuple[Tier, ...]
    provenance: Provenance

    def cost(self, units: Decimal) -> Decimal:
        """USD for so many units in a month: each tier's units at its own price."""
        total = Decimal(0)
        bounds = [*(tier.from_units for tier in self.tiers[1:]), None]
        for tier, upper in zip(self.tiers, bounds, strict=True):
            inside = (units if upper is None else min(units, upper)) - tier.from_units
            if inside > 0:
                total += inside * tier.usd
        return total

    @property
    def free_units(self) -> Decimal:
        """How many units a month cost nothing."""
        if self.tiers[0].usd or len(self.tiers) == 1:
            return Decimal(0)
        return self.tiers[1].from_units


class ExchangeRate(Frozen):
    """One USD in another currency."""

    per_usd: Amount
    provenance: Provenance


class MeterRow(Frozen):
    """A meter as a sheet holds it: tiers of [from units, USD], texts as all figures are; source: an id of sources."""

    name: str
    region: str
    unit: str
    tiers: tuple[tuple[str, str], ...] = Field(min_length=1)
    source: str


class SheetFile(Frozen):
    """The JSON of a sheet.

    sources: id -> provenance; offers: [sku, region, priority, usd, source id], for reservations the whole term's price
    meters: services; unpriced: size -> why the sheet has no price for it; exchange_rates: currency -> [rate, source id]
    """

    schema_version: Literal["tonnage.prices/1"]
    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")
    currency: Literal["USD"]
    description: str = ""
    sources: dict[str, Provenance] = Field(min_length=1)
    exchange_rates: dict[str, tuple[str, str]] = Field(default_factory=dict)
    offers: tuple[tuple[str, str, Priority, str, str], ...]
    meters: tuple[MeterRow, ...] = ()
    unpriced: dict[str, str] = Field(default_factory=dict)


class _Listed(NamedTuple):
    usd: Decimal
    source: str


class PriceSheet:
    """A price sheet, indexed.

    name; digest: the first 12 hex digits of the file's SHA-256; as_of: the newest day of its sources; path: None when
    it came with Tonnage; regions: those with at least one offer; unpriced: sizes without any price, and why
    """

    def __init__(self, content: SheetFile, digest: str, path: Path | None = None) -> None:
        self.name = content.name
        self.description = content.description
        self.digest = digest
        self.path = path
        self.currency = content.currency
        self.sources = content.sources
        self.unpriced = content.unpriced
        self._by_sku: dict[str, dict[str, dict[Priority, _Listed]]] = {}
        for sku, region, priority, usd, source in content.offers:
            if not region.isalnum() or not region.islower():
                raise ValueError(f"{region!r} is not a region as Azure writes it")
            listed = _Listed(_positive(usd, f"{sku!r} in {region}"), _known(source, self.sources))
            by_priority = self._by_sku.setdefault(sku, {}).setdefault(region, {})
            if priority in by_priority:
                raise ValueError(f"{sku!r} in {region} has two prices {priority}")
            by_priority[priority] = listed
        self.regions = tuple(sorted({region for by_region in self._by_sku.values() for region in by_region}))
        for sku, by_region in self._by_sku.items():
            for region, found in by_region.items():
                if "spot" in found and "on-demand" in found and found["spot"].usd > found["on-demand"].usd:
                    raise ValueError(f"spot costs more than on demand for {sku!r} in {region}")
        self._meters: dict[tuple[str, str], Meter] = {}
        for record in content.meters:
            meter = _meter(record, self.sources)
            if (meter.name, meter.region) in self._meters:
                raise ValueError(f"{meter.name!r} in {meter.region} has two prices")
            self._meters[meter.name, meter.region] = meter
        self.exchange_rates = {
            currency: ExchangeRate(
                per_usd=_positive(rate, currency), provenance=self.sources[_known(source, self.sources)]
            )
            for currency, (rate, source) in content.exchange_rates.items()
        }
        self.as_of = max(p.as_of for p in self.sources.values())

    def offer(self, sku: str, region: str, priority: Priority) -> Offer | None:
        """The price of a size in a region, None where the sheet has none."""
        listed = self._by_sku.get(sku, {}).get(region, {}).get(priority)
        if listed is None:
            return None
        return Offer(sku=sku, region=region, priority=priority, usd=listed.usd, provenance=self.sources[listed.source])

    def offers(self, sku: str) -> tuple[Offer, ...]:
        """All prices of a size, by region and priority."""
        found = []
        for region, by_priority in sorted(self._by_sku.get(sku, {}).items()):
            found += [o for p in PRIORITIES if p in by_priority and (o := self.offer(sku, region, p)) is not None]
        return tuple(found)

    def rate(self, sku: str, region: str, priority: Priority) -> Decimal | None:
        """USD of an hour, or None: what `offer` says, without its provenance."""
        listed = self._by_sku.get(sku, {}).get(region, {}).get(priority)
        if listed is None:
            return None
        hours = TERM_HOURS.get(priority)
        return listed.usd / hours if hours else listed.usd

    def skus(self) -> tuple[str, ...]:
        """The sizes with a price somewhere."""
        return tuple(sorted(self._by_sku))

    def meter(self, name: str, region: str) -> Meter | None:
        """The price of a service in a region, else the one that holds everywhere, else None."""
        return self._meters.get((name, region)) or self._meters.get((name, EVERYWHERE))

    def meters(self) -> tuple[Meter, ...]:
        return tuple(self._meters[key] for key in sorted(self._meters))

    def region(self, name: str) -> str:
        """The region as Azure writes it: `West Europe` -> westeurope. Raises PlannerError for one without prices."""
        plain = name.replace(" ", "").replace("-", "").lower()
        if plain in self.regions:
            return plain
        near = difflib.get_close_matches(plain, self.regions, n=3, cutoff=0.6)
        hint = f"did you mean {' or '.join(near)}?" if near else f"it has {', '.join(self.regions)}"
        raise PlannerError(f"{name!r} is not a region in the price sheet {self.name}: {hint}")

    def exchange_rate(self, currency: str) -> ExchangeRate | None:
        """One USD in that currency, None for USD itself. Raises PlannerError for one that the sheet does not have."""
        wanted = currency.strip().upper()
        if wanted == self.currency:
            return None
        if wanted not in self.exchange_rates:
            known = ", ".join([self.currency, *sorted(self.exchange_rates)])
            raise PlannerError(
                f"{currency[:20]!r} has no exchange rate in the price sheet {self.name}: use {known}, or read another"
                " with `planner prices refresh --currency`"
            )
        return self.exchange_rates[wanted]


def _positive(text: str, what: str) -> Decimal:
    if not text.isascii():
        raise ValueError(f"{text!r}, the price of {what}, is not a number")
    try:
        value = Decimal(text)
    except InvalidOperation:
        raise ValueError(f"{text!r}, the price of {what}, is not a number") from None
    if not value.is_finite() or not 0 < value < MOST_USD:
        raise ValueError(f"{text}, the price of {what}, is not above 0")
    return value


def _known(source: str, sources: Mapping[str, Provenance]) -> str:
    if source not in sources:
        raise ValueError(f"{source!r} is not among its sources")
    return source


def _meter(row: MeterRow, sources: Mapping[str, Provenance]) -> Meter:
    figures = [[_amount(text, row.name) for text in tier] for tier in row.tiers]
    starts = [start for start, _ in figures]
    if starts[0] or starts != sorted(set(starts)):
        raise ValueError(f"the tiers of {row.name!r} do not rise from 0")
    if not all(usd for _, usd in figures[1:] or figures):
        raise ValueError(f"{row.name!r} has a price that is not above 0")
    return Meter(
        name=row.name,
        region=row.region,
        unit=row.unit,
        tiers=tuple(Tier(from_units=start, usd=usd) for start, usd in figures),
        provenance=sources[_known(row.source, sources)],
    )


def _amount(text: str, what: str) -> Decimal:
    try:
        value = Decimal(text)
    except InvalidOperation:
        raise ValueError(f"{text!r}, a tier of {what!r}, is not a number") from None
    if not value.is_finite() or not 0 <= value < MOST_USD:
        raise ValueError(f"{text}, a tier of {what!r}, is not an amount")
    return value


# ------------------------------------------------------------------------------------------------------ where they lie


def cache_folder() -> Path:
    """Where refreshed sheets lie: $TONNAGE_CACHE, else $XDG_CACHE_HOME/tonnage/prices, else ~/.cache/tonnage/prices."""
    own = os.environ.get("TONNAGE_CACHE")
    if own:
        return Path(own) / "prices"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "tonnage" / "prices"


def cached_sheets() -> tuple[Path, ...]:
    """The refreshed sheets in the cache, oldest first; files that a refresh left unfinished are not among them."""
    try:
        return tuple(sorted(path for path in cache_folder().glob("????-??-??.json") if path.is_file()))
    except OSError:  # a folder that cannot be is one without sheets
        return ()


def load_sheet(name: str | None = None) -> PriceSheet:
    """A price sheet: a bundled name, a refreshed one's name, a file, or (None) the newer of the last refreshed and the
    bundled one.

    Raises PlannerError in one sentence for a sheet that is not there, cannot be read or is malformed.
    """
    bundled = _bundled(DEFAULT)
    if name is None:
        cached = [_read(path) for path in cached_sheets()[-1:]]
        return max([bundled, *cached], key=lambda sheet: sheet.as_of)
    name = name.strip()
    if name in BUNDLED:
        return _bundled(name)
    path = next((path for path in cached_sheets() if path.stem == name), Path(name))
    try:
        found = path.expanduser().is_file()
    except (OSError, RuntimeError, ValueError):  # too long, no such home, a byte that no path has
        found = False
    if not found:
        known = ", ".join([*BUNDLED, *(p.stem for p in cached_sheets())])
        raise PlannerError(f"{name[:100]!r} is not a price sheet: name a file or one of {known}")
    return _read(path.expanduser())


@cache
def _bundled(name: str) -> PriceSheet:
    return parse_sheet((files("planner.catalog.prices") / f"{name}.json").read_bytes(), name)


def _read(path: Path) -> PriceSheet:
    try:
        data = path.read_bytes()
    except OSError as error:
        raise PlannerError(
            f"the price sheet {path} cannot be read ({error.strerror}): name another, for example --prices {DEFAULT}"
        ) from error
    return parse_sheet(data, str(path), path)


def parse_sheet(data: bytes, what: str, path: Path | None = None) -> PriceSheet:
    """The sheet in a file's bytes. Raises PlannerError naming what is malformed first."""
    try:
        content = SheetFile.model_validate_json(data)
        return PriceSheet(content, hashlib.sha256(data).hexdigest()[:12], path)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "the file"
        reason = f"{where}: {first['msg']}"
    except ValueError as error:
        reason = str(error)
    raise PlannerError(
        f"{what} is not a price sheet ({reason}): delete it and run `planner prices refresh`, or use --prices {DEFAULT}"
    )


def sheet_text(content: SheetFile) -> str:
    """The JSON of a sheet with one offer and one meter a line, so that two of them can be compared."""
    head = content.model_dump(mode="json", exclude={"offers", "meters"})
    lines = [f"  {json.dumps(key)}: {json.dumps(value, ensure_ascii=False)}" for key, value in head.items()]
    meters = [row.model_dump() for row in content.meters]
    for key, rows in (("offers", content.offers), ("meters", meters)):
        body = ",\n".join(f"    {json.dumps(row, ensure_ascii=False)}" for row in rows)
        lines.append(f'  "{key}": [\n{body}\n  ]' if rows else f'  "{key}": []')
    return "{\n" + ",\n".join(lines) + "\n}\n"


# ------------------------------------------------------------------------------------------------------------- age


def today() -> date:
    """The day it is in UTC; SOURCE_DATE_EPOCH replaces it, for output that can be reproduced."""
    epoch = os.environ.get("SOURCE_DATE_EPOCH", "")
    if not epoch:
        return datetime.now(UTC).date()
    if not re.fullmatch("[0-9]{1,11}", epoch):
        raise PlannerError(f"SOURCE_DATE_EPOCH is {epoch[:40]!r}: write seconds since 1970, or leave it unset")
    return datetime.fromtimestamp(int(epoch), UTC).date()
