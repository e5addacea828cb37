"""The budget: what finance signs. Lines rounded as printed, totals that are their sums, and everything it rests on."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from datetime import date
from decimal import Decimal
from typing import Literal

from pydantic import Field, ValidationError

from planner.catalog.assumptions import Assumption, assumptions
from planner.catalog.prices import COMMITTED, ExchangeRate, PriceSheet, Priority
from planner.cost.lines import PRIORITY_WORDS, Alternative, Group, Line, counted, figure, tidy
from planner.errors import PlannerError
from planner.fit import Step
from planner.model import Amount, Frozen
from planner.plan import PricesUsed, prices_used
from planner.units import CENT, money_figure, round_money

SCHEMA = "tonnage.budget/1"
QUARTER_MONTHS, YEAR_MONTHS = 3, 12
LUMP_SUM = "a lump sum"


class BudgetLine(Frozen):
    """A line as printed. Amounts are of a month, in the budget's currency, rounded; None: unpriced.

    unit_price: unrounded, of the expected figure; formula, source, as_of, estimate: behind the price
    """

    key: str
    group: Group
    label: str
    basis: str
    quantity: Amount
    unit: str
    unit_price: Amount | None
    low: Amount | None
    amount: Amount | None
    high: Amount | None
    idle: Amount
    formula: str
    source: str
    as_of: date | None
    estimate: bool
    note: str
    service: str
    sku: str
    region: str
    priority: Priority | None


class Supposed(Frozen):
    """An assumption that the budget rests on, and the role or person that answers for it."""

    text: str
    value: str
    owner: str
    source: str


class WhatIf(Frozen):
    """The month's total if something were otherwise; None: it cannot be said, and why."""

    change: str
    total: Amount | None
    difference: Amount | None
    note: str


class Commitment(Frozen):
    """One machine bought every way, and what that says about signing for a year. Rates and monthly costs unrounded."""

    machine: str
    sku: str
    hours_per_month: Amount
    ways: tuple[Alternative, ...]
    advice: str


class Change(Frozen):
    """A line here and in an earlier budget. note: why they differ."""

    key: str
    label: str
    before: Amount | None
    after: Amount | None
    difference: Amount | None
    note: str


class Variance(Frozen):
    """Against an earlier budget: what it was, line by line, and both totals."""

    against: str
    before_total: Amount
    after_total: Amount
    changes: tuple[Change, ...]


class MemoryPoint(Frozen):
    """Bytes that one GPU needs at a context, on the smallest Azure size that holds it (`place`)."""

    context: int
    needed_bytes: int
    usable_bytes: int
    place: str


class MemoryCurve(Frozen):
    """GPU memory by context for one task, and the contexts at which the smallest size changes."""

    task: Literal["serve", "finetune"]
    label: str
    points: tuple[MemoryPoint, ...]
    steps: tuple[Step, ...]


class Rounding(Frozen):
    """How amounts are rounded: each line to round_to; the request to the nearest (or the next) request_to."""

    round_to: Amount
    request_to: Amount
    request_up: bool


class Budget(Frozen):
    """A budget, as its JSON twin holds it.

    subject: in one plain sentence; unpriced: keys of lines without a price, which make the totals lower bounds
    per_usd: the exchange rate used, None in USD; buffer_amount: requested - total; inputs_digest: of everything that
    went in, so that equal digests mean equal budgets
    """

    schema_version: Literal["tonnage.budget/1"] = "tonnage.budget/1"
    name: str
    title: str
    subject: str
    region: str
    generated: date
    currency: str
    per_usd: Amount | None
    lines: tuple[BudgetLine, ...]
    unpriced: tuple[str, ...]
    total_low: Amount
    total: Amount
    total_high: Amount
    buffer: Amount
    buffer_amount: Amount
    requested: Amount
    requested_per_quarter: Amount
    requested_per_year: Amount
    approved: Amount | None
    rounding: Rounding
    prices: PricesUsed
    price_age_days: int
    inputs_digest: str
    assumptions: tuple[Supposed, ...]
    what_ifs: tuple[WhatIf, ...]
    commitments: tuple[Commitment, ...]
    variance: Variance | None = None
    memory: tuple[MemoryCurve, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def over_approved(self) -> bool:
        """The month costs more than was approved."""
        return self.approved is not None and self.total > self.approved


class Money(Frozen):
    """How an amount in USD becomes one that is printed: times the exchange rate, then rounded."""

    currency: str = "USD"
    rate: ExchangeRate | None = None
    rounding: Rounding = Rounding(round_to=CENT, request_to=Decimal(10), request_up=False)

    def convert(self, usd: Decimal) -> Decimal:
        return usd if self.rate is None else usd * self.rate.per_usd

    def printed(self, usd: Decimal, *, up: bool = False) -> Decimal:
        return round_money(self.convert(usd), self.rounding.round_to, up=up)


class WhatIfDraft(Frozen):
    """All lines of the month if something were otherwise; None: it cannot be said, and note says why."""

    change: str
    lines: tuple[Line, ...] | None
    note: str


class Draft(Frozen):
    """What a budget is made of before it is rounded: see Budget for the words."""

    name: str
    title: str
    subject: str
    region: str
    lines: tuple[Line, ...]
    round_up: frozenset[str] = frozenset()
    buffer: Amount
    approved: Amount | None = None
    assumptions: tuple[Supposed, ...] = ()
    what_ifs: tuple[WhatIfDraft, ...] = ()
    commitments: tuple[Commitment, ...] = ()
    memory: tuple[MemoryCurve, ...] = ()
    notes: tuple[str, ...] = ()
    inputs: dict[str, str] = Field(default_factory=dict)


def finish(draft: Draft, sheet: PriceSheet, money: Money, day: date, against: Budget | None = None) -> Budget:
    """The budget of a draft: lines rounded first, totals their sums, then buffer and request.

    requested = round(total x (1 + buffer)) to request_to, never below the total; a quarter is 3 of them, a year 12.
    Raises PlannerError for an earlier budget in another currency.
    """
    lines = tuple(_rounded(line, money, up=line.key in draft.round_up) for line in draft.lines)
    total = _sum(line.amount for line in lines)
    wanted = total * (1 + draft.buffer)
    requested = round_money(wanted, money.rounding.request_to, up=money.rounding.request_up)
    if requested < total:
        requested = round_money(total, money.rounding.request_to, up=True)
    used = [line.provenance for line in draft.lines if line.provenance is not None]
    prices = prices_used(sheet, used)
    budget = Budget(
        name=draft.name,
        title=draft.title,
        subject=draft.subject,
        region=draft.region,
        generated=day,
        currency=money.currency,
        per_usd=money.rate.per_usd if money.rate else None,
        lines=lines,
        unpriced=tuple(line.key for line in lines if line.amount is None),
        total_low=_sum(line.low for line in lines),
        total=total,
        total_high=_sum(line.high for line in lines),
        buffer=draft.buffer,
        buffer_amount=requested - total,
        requested=requested,
        requested_per_quarter=requested * QUARTER_MONTHS,
        requested_per_year=requested * YEAR_MONTHS,
        approved=None if draft.approved is None else round_money(money.convert(draft.approved)),
        rounding=money.rounding,
        prices=prices,
        price_age_days=machine_price_age(draft.lines, day),
        inputs_digest=_digest(draft, sheet, money),
        assumptions=draft.assumptions,
        what_ifs=tuple(_what_if(row, total, money, draft.round_up) for row in draft.what_ifs),
        commitments=draft.commitments,
        memory=draft.memory,
        notes=draft.notes,
    )
    return budget.model_copy(update={"variance": variance(against, budget)}) if against else budget


def machine_price_age(lines: Iterable[Line | BudgetLine], day: date) -> int:
    """Days since the oldest machine price among the lines was read; services move too little to count."""
    days = [_read_on(line) for line in lines if line.sku]
    return max((max((day - d).days, 0) for d in days if d is not None), default=0)


def _read_on(line: Line | BudgetLine) -> date | None:
    if isinstance(line, BudgetLine):
        return line.as_of
    return line.provenance.as_of if line.provenance else None


def _sum(amounts: Iterable[Decimal | None]) -> Decimal:
    return sum((amount for amount in amounts if amount is not None), Decimal(0))


def _rounded(line: Line, money: Money, *, up: bool) -> BudgetLine:
    low, usd, high = (None if v is None else money.printed(v, up=up) for v in (line.low_usd, line.usd, line.high_usd))
    price = line.provenance
    return BudgetLine(
        key=line.key,
        group=line.group,
        label=line.label,
        basis=line.basis,
        quantity=tidy(line.quantity, 6),
        unit=line.unit,
        unit_price=None if line.unit_usd is None else tidy(money.convert(line.unit_usd), 10),
        low=low,
        amount=usd,
        high=high,
        idle=money.printed(line.idle_usd),
        formula=line.formula,
        source=price.source if price else "",
        as_of=price.as_of if price else None,
        estimate=price.estimate if price else False,
        note=line.note,
        service=line.service,
        sku=line.sku,
        region=line.region,
        priority=line.priority,
    )


def _what_if(row: WhatIfDraft, total: Decimal, money: Money, round_up: frozenset[str]) -> WhatIf:
    missing = [line for line in row.lines or () if not line.priced and line.group == "compute"]
    if row.lines is None or missing:
        note = f"{missing[0].label}: {missing[0].note}" if missing else row.note
        return WhatIf(change=row.change, total=None, difference=None, note=note)
    amount = _sum(_rounded(line, money, up=line.key in round_up).amount for line in row.lines)
    return WhatIf(change=row.change, total=amount, difference=amount - total, note=row.note)


def _digest(draft: Draft, sheet: PriceSheet, money: Money) -> str:
    """The first 16 hex digits of a SHA-256 over what the budget rests on: the question, every line before rounding with
    its formula and source, what-ifs, assumptions, the price sheet's bytes, currency and rounding."""
    content = {
        "draft": draft.model_dump(mode="json", exclude={"memory", "commitments"}),
        "sheet": sheet.digest,
        "money": money.model_dump(mode="json"),
    }
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]


def supposed(names: Sequence[str], owners: dict[str, str], more: Sequence[Supposed] = ()) -> tuple[Supposed, ...]:
    """Assumptions of the catalog as a budget prints them; owners: a person in place of a role."""
    rows = [_supposed(assumptions()[name], owners) for name in names]
    return (*(s.model_copy(update={"owner": owners.get(s.owner, s.owner)}) for s in more), *rows)


def _supposed(entry: Assumption, owners: dict[str, str]) -> Supposed:
    value = figure(entry.expected)
    if entry.low != entry.high:
        value = f"{figure(entry.low)} to {figure(entry.high)}, expected {value}"
    return Supposed(
        text=entry.text,
        value=f"{value} ({entry.unit})",
        owner=owners.get(entry.owner, entry.owner),
        source=entry.source,
    )


def advice(ways: Sequence[Alternative], hours: Decimal, bought: Priority) -> str:
    """Whether to sign for this machine, in one or two plain sentences: hours used against break-even hours.

    bought: how the budget buys it now; spot counts only where it is bought, for else it is not to be had or not wanted
    """
    by = {way.priority: way for way in ways if bought == "spot" or way.priority != "spot"}
    on_demand, spot = by.get("on-demand"), by.get("spot")
    if bought in COMMITTED:
        return f"The budget already commits: {PRIORITY_WORDS[bought]}. {_what_it_saves(by.get(bought), on_demand)}"
    year = [way for way in by.values() if way.priority in ("reserved-1y", "savings-plan-1y")]
    if not year:
        return "No one-year price is known for this machine here: ask Azure for a quote before you commit."
    best = min(year, key=lambda way: way.usd_per_month)
    kind = "reservation" if best.priority == "reserved-1y" else "savings plan"
    used = f"It is used {hours:.0f} hours a month"
    doubt = " The figure is an estimate: get a quote first." if best.provenance.estimate else ""
    if best.break_even_hours is None:
        return f"{used}; a one-year {kind} never pays: do not commit.{doubt}"
    against_spot = best.break_even_hours_against_spot
    if spot is not None and spot.usd_per_month < best.usd_per_month:
        tail = (
            "and never below spot"
            if against_spot is None
            else f"and only from {against_spot:.0f} hours cheaper than spot"
        )
        return (
            f"{used}; a one-year {kind} is cheaper than paying on demand from {best.break_even_hours:.0f} hours,"
            f" {tail}: stay on spot as long as its interruptions can be borne.{doubt}"
        )
    if hours < best.break_even_hours:
        return f"{used}; a one-year {kind} pays from {best.break_even_hours:.0f} hours: do not commit.{doubt}"
    saved = f"{money_figure(on_demand.usd_per_month - best.usd_per_month)} USD a month" if on_demand else "money"
    return (
        f"{used}; a one-year {kind} pays from {best.break_even_hours:.0f} hours and saves {saved} against on demand:"
        f" commit if the machine will stay for the year.{doubt}"
    )


def _what_it_saves(mine: Alternative | None, on_demand: Alternative | None) -> str:
    """What a commitment saves against paying on demand, and whether its price is certain."""
    if mine is None or on_demand is None:
        return "What it saves cannot be said without a price on demand."
    saved = money_figure(on_demand.usd_per_month - mine.usd_per_month)
    doubt = " The price is an estimate: get a quote before you sign." if mine.provenance.estimate else ""
    return f"That saves {saved} USD a month against paying on demand for the same hours.{doubt}"


def variance(before: Budget, after: Budget) -> Variance:
    """Line by line against an earlier budget, by key, with the reason read from the two lines.

    Raises PlannerError where the two are in different currencies.
    """
    if before.currency != after.currency:
        raise PlannerError(
            f"the earlier budget is in {before.currency} and this one in {after.currency}: make both in one --currency"
        )
    old, new = {line.key: line for line in before.lines}, {line.key: line for line in after.lines}
    changes = []
    for key in dict.fromkeys([*old, *new]):
        was, now = old.get(key), new.get(key)
        line = now or was
        assert line is not None
        difference = None
        if (was is None or was.amount is not None) and (now is None or now.amount is not None):
            difference = (now.amount if now and now.amount else Decimal(0)) - (
                was.amount if was and was.amount else Decimal(0)
            )
        changes.append(
            Change(
                key=key,
                label=line.label,
                before=was.amount if was else None,
                after=now.amount if now else None,
                difference=difference,
                note=_why(was, now),
            )
        )
    return Variance(
        against=f"{before.name} with the prices {before.prices.sheet}, made on {before.generated}",
        before_total=before.total,
        after_total=after.total,
        changes=tuple(changes),
    )


def _why(was: BudgetLine | None, now: BudgetLine | None) -> str:
    if was is None:
        return "new"
    if now is None:
        return "no longer there"
    if was.amount is None or now.amount is None:
        if was.amount is None and now.amount is None:
            return "unpriced in both"
        return f"unpriced {'before' if was.amount is None else 'now'}"
    reasons = []
    if was.region != now.region:
        reasons.append(f"another region: {was.region}, now {now.region}")
    if (was.sku, was.priority) != (now.sku, now.priority):
        reasons.append(f"another machine or way to buy: {was.basis}, now {now.basis}")
    elif was.unit != now.unit or was.basis == LUMP_SUM != now.basis:
        reasons.append(f"counted differently: {was.basis}, now {now.basis}")
    elif was.unit_price != now.unit_price and " free," in now.formula + was.formula:
        reasons.append(f"counted differently: {was.formula}, now {now.formula}")
    else:
        if was.quantity != now.quantity:
            reasons.append(f"quantity from {figure(was.quantity)} to {counted(now.quantity, now.unit)}")
        if was.unit_price != now.unit_price and was.unit_price is not None and now.unit_price is not None:
            mark = ", an estimate" if now.estimate else ""
            dated = f" (as of {now.as_of}{mark})" if now.as_of else ""
            reasons.append(f"price from {figure(was.unit_price)} to {figure(now.unit_price)} per {now.unit}{dated}")
    if not reasons:
        return "the same" if was.amount == now.amount else "rounded differently"
    return "; ".join(reasons)


def read_budget(text: str, what: str) -> Budget:
    """An earlier budget from its JSON twin. PlannerError for anything else."""
    try:
        return Budget.model_validate_json(text)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "the file"
        raise PlannerError(
            f"{what} is not a budget of `planner budget --format json` ({where}: {first['msg'].lower()}):"
            " write one with -o FILE.json first"
        ) from error
