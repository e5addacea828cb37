"""Make or buy: a model on one's own machines against an API that bills by the token. Arithmetic, not an opinion."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from decimal import ROUND_CEILING, Decimal
from functools import partial
from typing import Literal

from pydantic import Field, ValidationError, model_validator

from planner.catalog.hardware import sku
from planner.catalog.prices import PriceSheet, Priority, Provenance
from planner.cost.lines import alternatives, figure, tidy
from planner.cost.schedule import MONTH_HOURS
from planner.errors import PlannerError
from planner.model import Amount, Frozen
from planner.plan import Intent, Plan, cluster_usd
from planner.plan.choices import Job
from planner.units import format_usd

MILLION = Decimal(1_000_000)
MONTH_DAYS = MONTH_HOURS / 24  # 30.42
MONTH_SECONDS = MONTH_HOURS * 3600


class Demand(Frozen):
    """What is to be answered. tokens_per_month: in and out; input_share: of them that go in

    api_input_usd, api_output_usd: the API's price of a million tokens
    utilization: mean load / what the machines could do
    """

    tokens_per_month: Amount = Field(ge=1, le=10**18)
    input_share: Amount = Field(default=Decimal("0.75"), ge=0, le=1)
    api_input_usd: Amount = Field(ge=0, le=10**6)
    api_output_usd: Amount = Field(ge=0, le=10**6)
    utilization: Amount = Field(default=Decimal("0.5"), ge=Decimal("0.001"), le=1)

    @model_validator(mode="after")
    def _costs_something(self) -> Demand:
        if not self.api_usd_per_million:
            raise PlannerError("an API that costs nothing cannot be beaten: give the price of what it bills")
        return self

    @property
    def api_usd_per_million(self) -> Decimal:
        """input_share x input price + (1 - input_share) x output price."""
        return self.input_share * self.api_input_usd + (1 - self.input_share) * self.api_output_usd

    @property
    def api_usd_per_month(self) -> Decimal:
        """tokens / 10^6 x price of a million."""
        return self.tokens_per_month / MILLION * self.api_usd_per_million

    def machines(self, tokens_per_second: Decimal) -> int:
        """ceil(tokens a month / (tokens a second of one machine x utilization x 3600 x 730))."""
        one = tokens_per_second * self.utilization * MONTH_SECONDS
        return int((self.tokens_per_month / one).to_integral_value(rounding=ROUND_CEILING))


class SelfHosted(Frozen):
    """One size bought one way, running all month.

    usd_per_month: of one machine, expected; tokens_per_second: what it sustains under load, measured; None: not known
    machines: as many as the demand takes; total_usd_per_month: of them, their disks and the cluster around them
    usd_per_million: at the tokens asked for
    break_even_machines: the fewest that can answer as much as the API would bill for them, None: no number can, or the
    speed is not known and one is counted; break_even_tokens_per_day, .._per_second: what the API bills the same for
    """

    size: str
    priority: Priority | Literal["stated"]
    usd_per_month: Amount
    tokens_per_second: Amount | None
    machines: int | None
    total_usd_per_month: Amount | None
    usd_per_million: Amount | None
    pays: bool | None
    break_even_machines: int | None
    break_even_tokens_per_day: Amount | None
    break_even_tokens_per_second: Amount | None
    arithmetic: str
    provenance: Provenance | None = None


class Comparison(Frozen):
    """An API's bill beside one's own machines, cheapest first. cluster_usd_per_month: what stands around them."""

    schema_version: Literal["tonnage.compare/1"] = "tonnage.compare/1"
    demand: Demand
    api_usd_per_million: Amount
    api_usd_per_month: Amount
    region: str
    cluster_usd_per_month: Amount
    rows: tuple[SelfHosted, ...]
    arithmetic: tuple[str, ...]
    notes: tuple[str, ...]


def demand_of(
    *,
    tokens_per_month: str,
    input_share: str,
    api: str,
    utilization: str,
) -> Demand:
    """The demand behind the command line's texts. PlannerError names the option that is wrong."""
    price_in, price_out = parse_api(api)
    try:
        return Demand(
            tokens_per_month=_number(tokens_per_month),
            input_share=_number(input_share),
            api_input_usd=price_in,
            api_output_usd=price_out,
            utilization=_number(utilization),
        )
    except ValidationError as error:
        first = error.errors()[0]
        flag = str(first["loc"][0]).replace("_", "-")
        raise PlannerError(f"--{flag} cannot be compared: {first['msg'].lower()}") from error


def parse_speeds(texts: Sequence[str]) -> dict[str, Decimal]:
    """`NC24ads_A100_v4=2500` -> tokens a second of one machine of that size; a bare number is for "". PlannerError."""
    speeds: dict[str, Decimal] = {}
    for text in texts:
        name, _, rate = text.rpartition("=")
        value = _number(rate)
        if not Decimal("0.01") <= value <= 10**9:
            raise PlannerError(f"{text[:60]!r} is not a speed: write SIZE=TOKENS_PER_SECOND, from 0.01 on")
        speeds[sku(name).short_name if name.strip() else ""] = value
    return speeds


def parse_usd(text: str) -> Decimal:
    """An amount of USD: `3500`, `$3,500`. Raises PlannerError."""
    value = _number(text.strip().removeprefix("$"))
    if not 0 < value <= 10**9:
        raise PlannerError(f"{text[:60]!r} cannot be compared: write what the server costs a month, in USD")
    return value


def _number(text: str) -> Decimal:
    """`5e9`, `5_000_000_000`, `5B`, `300M`: a number, with the words of money for thousands."""
    plain = text.strip().replace("_", "").replace(",", "")
    scale = {"k": 3, "m": 6, "b": 9, "t": 12}.get(plain[-1:].lower())
    try:
        value = Decimal(plain[:-1] if scale else plain).scaleb(scale or 0)
    except ArithmeticError:
        value = Decimal("NaN")
    if not value.is_finite() or abs(value) > 10**20:
        raise PlannerError(f"{text[:60]!r} is not a number: write it out, or as 5e9 or 300M")
    return tidy(value, 9)


def parse_api(text: str) -> tuple[Decimal, Decimal]:
    """`0.15,0.60`: USD of a million tokens in and out; one figure counts for both. Raises PlannerError."""
    parts = [part.strip() for part in text.split(",")]
    try:
        prices = [Decimal(part) for part in parts]
    except ArithmeticError:
        prices = []
    if len(prices) not in (1, 2) or not all(p.is_finite() and 0 <= p <= 10**6 for p in prices) or not any(prices):
        raise PlannerError(f"{text[:60]!r} is not a token price: write USD of a million in and out, such as 0.15,0.60")
    return prices[0], prices[-1]


def stated_server(demand: Demand, usd_per_month: Decimal, speed: Decimal | None = None) -> Comparison:
    """The comparison for a machine at a stated price, without Azure around it."""
    row = _row("a server", "stated", usd_per_month, lambda _: Decimal(0), demand, speed)
    return _comparison(demand, "", Decimal(0), [row], ())


def compare(demand: Demand, intent: Intent, plan: Plan, sheet: PriceSheet, speeds: Mapping[str, Decimal]) -> Comparison:
    """One's own machines against the API: every size that holds the intent's server, bought every way it allows.

    plan: the cheapest one for that intent, whose region is taken; the cluster around the machines is counted once
    speeds: tokens a second by size; under "" for the only size. Raises PlannerError for a speed that fits no size.
    """
    job = Job(intent, intent.workloads[0])
    allowed = intent.pricing.priorities(spot=job.workload.spot)
    names = {option.size.short_name for option in job.options}
    if "" in speeds and len(names) > 1:
        raise PlannerError(
            f"{len(names)} sizes do not share one speed: write --tokens-per-second SIZE=RATE, or name one --sku"
        )
    strange = sorted(set(speeds) - names - {""})
    if strange:
        raise PlannerError(f"{strange[0]} does not hold {job.spec.name} here, so its speed says nothing: drop it")
    around = cluster_usd(intent, sheet, plan.region)
    rows = []
    for option in job.options:
        speed, disk = speeds.get(option.size.short_name, speeds.get("")), option.os_disk
        for way in alternatives(sheet, option.size.name, plan.region, MONTH_HOURS):
            if way.priority in allowed:
                beside = partial(_beside, around, disk)
                size, usd = option.size.short_name, way.usd_per_month
                rows.append(_row(size, way.priority, usd, beside, demand, speed, way.provenance))
    rows.sort(key=lambda r: (r.total_usd_per_month is None, r.total_usd_per_month or r.usd_per_month, r.size))
    return _comparison(demand, plan.region, around(0, False), rows, ())


def _beside(around: Callable[[int, bool], Decimal], os_disk: bool, machines: int) -> Decimal:
    return around(machines, os_disk)


def _row(
    size: str,
    priority: Priority | Literal["stated"],
    usd: Decimal,
    around: Callable[[int], Decimal],
    demand: Demand,
    speed: Decimal | None,
    provenance: Provenance | None = None,
) -> SelfHosted:
    """One size's row. around: USD a month of the cluster, disks and monitoring with so many machines."""

    def cost(machines: int) -> Decimal:
        return usd * machines + around(machines)

    price = demand.api_usd_per_million
    fewest = 1 if speed is None else _fewest(cost, speed * demand.utilization * MONTH_SECONDS / MILLION * price)
    counted_machines = fewest or 1
    even = cost(counted_machines) / price * MILLION
    per_day, per_second = even / MONTH_DAYS, even / MONTH_SECONDS
    machines = None if speed is None else demand.machines(speed)
    total = None if machines is None else cost(machines)
    many = f"{counted_machines} x " if counted_machines > 1 else ""
    text = (
        f"({many}{format_usd(usd)} + {format_usd(around(counted_machines))}) / ${figure(price)} a million /"
        f" {figure(MONTH_DAYS, 2)} days = {figure(per_day / MILLION, 2)} million tokens a day"
    )
    if fewest is None:
        one = format_usd(cost(2) - cost(1))
        text = f"never: a machine at {one} a month costs more than the API bills for what it answers"
    return SelfHosted(
        size=size,
        priority=priority,
        usd_per_month=tidy(usd, 2),
        tokens_per_second=speed,
        machines=machines,
        total_usd_per_month=None if total is None else tidy(total, 2),
        usd_per_million=None if total is None else tidy(total / demand.tokens_per_month * MILLION, 6),
        pays=None if total is None else total < demand.api_usd_per_month,
        break_even_machines=None if speed is None else fewest,
        break_even_tokens_per_day=None if fewest is None else tidy(per_day, 0),
        break_even_tokens_per_second=None if fewest is None else tidy(per_second, 3),
        arithmetic=text,
        provenance=provenance,
    )


def _fewest(cost: Callable[[int], Decimal], billed: Decimal) -> int | None:
    """The smallest n with cost(n) <= n x billed, what the API bills for what n machines answer; None for never.

    cost is a base and so much a machine, so n = ceil(base / (billed - a machine)).
    """
    one = cost(2) - cost(1)
    base = cost(1) - one
    if billed <= one:
        return None
    n = max(int((base / (billed - one)).to_integral_value(rounding=ROUND_CEILING)), 1)
    while cost(n) > n * billed:  # the free first gigabytes of logs bend the line a little
        n += 1
    return n


def _comparison(
    demand: Demand, region: str, cluster: Decimal, rows: list[SelfHosted], notes: tuple[str, ...]
) -> Comparison:
    price, share = demand.api_usd_per_million, demand.input_share
    mean = demand.tokens_per_month / MONTH_SECONDS
    arithmetic = [
        f"API: {figure(share, 4)} x ${figure(demand.api_input_usd)} + {figure(1 - share, 4)} x"
        f" ${figure(demand.api_output_usd)} = ${figure(price)} a million tokens",
        f"API: {figure(demand.tokens_per_month / MILLION, 3)} million tokens x ${figure(price)} ="
        f" {format_usd(demand.api_usd_per_month)} a month",
        f"load: {figure(demand.tokens_per_month / MILLION, 3)} million tokens / {figure(MONTH_SECONDS)} s ="
        f" {figure(mean, 1)} tokens a second on average",
    ]
    known = {row.size: row for row in rows if row.tokens_per_second is not None}
    for row in known.values():
        arithmetic.append(
            f"{row.size}: {figure(mean, 1)} / ({figure(row.tokens_per_second or mean)} tokens a second x"
            f" {figure(demand.utilization, 4)} utilization), up to a whole number = {row.machines}"
        )
    if not known:
        notes = (
            "the speed of a machine is not known here: measure tokens a second under load and give --tokens-per-second",
            *notes,
        )
    return Comparison(
        demand=demand,
        api_usd_per_million=price,
        api_usd_per_month=demand.api_usd_per_month,
        region=region,
        cluster_usd_per_month=cluster,
        rows=tuple(rows),
        arithmetic=tuple(arithmetic),
        notes=("people who run the machines, and the API's own limits, are not counted", *notes),
    )
