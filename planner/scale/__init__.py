"""`planner scale`: which machines keep a latency at a load, how many, and what they cost, cheapest first.

replicas = ceil(rate / largest rate of one replica within the SLO)
machines = ceil(replicas / replicas a machine) + spare;  USD a month = machines x 730 x USD an hour
USD a million output tokens = machines x USD an hour / (rate x output tokens x 3600) x 10^6
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from decimal import Decimal
from math import ceil, inf

from planner.catalog.hardware import VmSku, gpu_of
from planner.catalog.prices import COMMITTED, PRIORITIES, PriceSheet
from planner.cost.lines import Line, vm_line
from planner.cost.schedule import MONTH_HOURS
from planner.cost.spot import serving_overhead
from planner.errors import PlannerError
from planner.performance.features import Feature, what_it_buys
from planner.performance.server import server
from planner.plan.choices import machine_rate
from planner.plan.intent import ANY_REGION
from planner.run import assumed_risk
from planner.scale.answer import METRIC_FLAGS, Choice, Machine, Money, Performance, Rejected, ScaleAnswer, Wanted
from planner.scale.asked import wanted_from_options
from planner.scale.day import band
from planner.scale.measured import MeasuredCurve, read_measured
from planner.scale.replica import METRICS, Modelled, excess, limit_of, rate_figure
from planner.scale.search import SHOWN, Found, places_of, search, undominated
from planner.scale.words import stored_as
from planner.units import round_money

__all__ = ["ScaleAnswer", "Wanted", "machine_lines", "read_measured", "scale", "wanted_from_options"]

OTHER_FORMATS = ("fp8", "awq")
SIMULATED_STEPS = 6  # how often machines are added where the simulation finds too few


def scale(wanted: Wanted, sheet: PriceSheet, measured: Sequence[MeasuredCurve] = ()) -> ScaleAnswer:
    """Every choice that keeps the SLO, cheapest first, and why cheaper machines do not.

    The search goes by lower bounds of the cost, and ends where they exceed the choices that are shown, unless
    everything is asked for. Raises PlannerError for regions without prices and a file that names no
    size; a load that nothing keeps is an answer without choices.
    """
    if measured and wanted.simulate:
        raise PlannerError("--measured takes the place of the model that --simulate runs: drop one of them")
    regions = sheet.regions if ANY_REGION in wanted.regions else tuple(dict.fromkeys(map(sheet.region, wanted.regions)))
    if not regions:
        raise PlannerError("--region is empty: write a name, such as --region eastus, or any")
    places, rejected = places_of(wanted, sheet, regions, measured)
    found, failed = search(wanted, places, measured)
    rejected += failed
    found.sort(key=lambda f: (f.usd_per_month(wanted.spare), f.needed, f.place.size.name, f.weights, f.kv_cache_dtype))
    kept = found if wanted.everything else undominated(found, wanted.spare)[:SHOWN]
    choices = [_choice(wanted, entry, sheet, drawn=wanted.drawn) for entry in kept]
    if wanted.simulate:
        rejected += [_too_slow(wanted, choice) for choice in choices if not _keeps(wanted, choice.performance)]
        choices = [choice for choice in choices if _keeps(wanted, choice.performance)]
        choices.sort(key=lambda c: (_usd(c, wanted), c.machines, c.sku, c.weights, c.kv_cache_dtype))
    nearest = _nearest(rejected) if not choices else None
    first = kept[0].place if kept else places[0]
    used = sheet.offer(first.size.name, first.region, wanted.priority)
    return ScaleAnswer(
        model=wanted.spec.name,
        rate_per_s=wanted.rate_per_s,
        input_tokens=wanted.traffic.prompt.mean,
        output_tokens=wanted.traffic.output.mean,
        context=wanted.settings.max_model_len,
        slo=wanted.slo,
        at="measured" if measured else "high" if wanted.at_high else "expected",
        priority=wanted.priority,
        regions=regions if ANY_REGION not in wanted.regions else (ANY_REGION,),
        choices=tuple(choices),
        cheaper=_cheaper(rejected, found, choices, wanted),
        rejected=tuple(rejected),
        nearest=nearest,
        nearest_flags=_nearest_flags(nearest, wanted),
        machines=_fleet(found) if wanted.drawn else (),
        day=wanted.day,
        day_source=wanted.day_source,
        price_source=""
        if used is None
        else f"price sheet {sheet.name} ({sheet.digest}), {used.provenance.source} ({used.provenance.as_of})",
        features=_features(wanted, kept[0]) if choices else (),
        notes=(*wanted.notes, *_spot_notes(wanted)),
    )


def _features(wanted: Wanted, found: Found) -> tuple[Feature, ...]:
    """What the engine's features and the other weight formats would buy on the first choice, where all is asked for."""
    replica = found.replica
    if not wanted.everything or not isinstance(replica, Modelled):
        return ()
    running, formats = replica.server, {}
    for name in OTHER_FORMATS if running.spec.quantization is None else ():
        if name == running.settings.quantization:
            continue
        settings = running.settings.model_copy(update={"quantization": name})
        try:
            formats[name] = server(running.spec, settings, running.card, running.link)
        except PlannerError:  # a format that the card or the model cannot have buys nothing
            continue
    return what_it_buys(running, replica.traffic, formats=formats)


def _spot_notes(wanted: Wanted) -> Iterator[str]:
    if wanted.priority == "spot":
        away = serving_overhead(assumed_risk()).away
        yield (
            f"a spot machine is away {away[1]:.1%} of the time ({away[0]:.1%} to {away[2]:.1%}, by the catalog's"
            " eviction rates), for which --spare has others ready"
        )


def machine_lines(answer: ScaleAnswer, sheet: PriceSheet) -> tuple[Line, ...]:
    """The machines of the choices as lines of a bill, by which the age of their prices is checked."""
    return tuple(
        vm_line(
            sheet,
            key="gpu/serve",
            label=choice.sku,
            sku=choice.sku,
            region=choice.region,
            priority=answer.priority,
            count=choice.machines,
            hours=MONTH_HOURS,
        )
        for choice in answer.choices
    )


# ------------------------------------------------------------------------------------------------------------ choices


def _choice(wanted: Wanted, found: Found, sheet: PriceSheet, *, drawn: bool) -> Choice:
    """A choice with its performance, prices and band; --simulate may add machines."""
    replica, size = found.replica, found.place.size
    needed, seen = found.needed, None
    largest = replica.largest_per_s
    if wanted.simulate:
        needed, seen = _simulated(wanted, found)
        largest = min(largest, wanted.rate_per_s / (needed * found.per_machine)) if needed > found.needed else largest
    replicas = needed * found.per_machine
    share = wanted.rate_per_s / replicas
    seen = seen or replica.at(share)
    at_largest = replica.at(largest)
    machines = needed + wanted.spare
    return Choice(
        sku=size.name,
        gpu=gpu_of(size).label,
        gpus_per_machine=size.gpu_count or 0,
        tensor_parallel_size=found.tp,
        weights=found.weights,
        kv_cache_dtype=found.kv_cache_dtype,
        replicas=replicas,
        machines=machines,
        spare=wanted.spare,
        replicas_per_machine=found.per_machine,
        largest_per_s=largest,
        saturation_per_s=replica.saturation_per_s,
        performance=seen,
        region=found.place.region,
        money=tuple(_money(wanted, size, found.place.region, machines, sheet)),
        band=band(
            day=wanted.day,
            rate_per_s=wanted.rate_per_s,
            largest_per_s=largest,
            replicas_per_machine=found.per_machine,
            spare=wanted.spare,
            in_flight=at_largest.in_flight,
            # what is committed is paid whether it runs or not
            usd_per_hour=None if wanted.priority in COMMITTED else found.place.usd_per_hour,
            output_tokens=wanted.traffic.output.mean,
        ),
        extrapolated=replica.extrapolated,
        arguments=replica.arguments,
        sweep=replica.sweep if drawn else (),
        one_less=_one_less(wanted, needed, found.per_machine, largest),
    )


def _fleet(found: Sequence[Found]) -> tuple[Machine, ...]:
    """One machine of each kind at its largest rate; those on the Pareto front answer more than all cheaper ones."""
    machines = [
        Machine(
            sku=f.place.size.name,
            weights=f.weights,
            kv_cache_dtype=f.kv_cache_dtype,
            tensor_parallel_size=f.tp,
            requests_per_s=f.replica.largest_per_s * f.per_machine,
            usd_per_hour=f.place.usd_per_hour,
        )
        for f in found
    ]
    machines.sort(key=lambda m: (m.usd_per_hour, -m.requests_per_s))
    most, marked = 0.0, []
    for machine in machines:
        marked.append(machine.model_copy(update={"pareto": machine.requests_per_s > most}))
        most = max(most, machine.requests_per_s)
    return tuple(marked)


def _simulated(wanted: Wanted, found: Found) -> tuple[int, Performance]:
    """Machines by simulation: as many as the closed form says, and one in eight more while it misses the SLO."""
    needed = found.needed
    for step in range(SIMULATED_STEPS):
        needed += -(-needed // 8) if step else 0
        replicas = needed * found.per_machine
        seen = found.replica.simulated(
            wanted.rate_per_s / replicas, replicas, requests=wanted.requests, seed=wanted.seed
        )
        if _keeps(wanted, seen):
            break
    return needed, seen


def _keeps(wanted: Wanted, seen: Performance) -> bool:
    return excess(seen, wanted.slo, at_high=wanted.at_high)[0] <= 1


def _money(wanted: Wanted, size: VmSku, region: str, machines: int, sheet: PriceSheet) -> Iterator[Money]:
    """Every way to buy so many machines that has a price there.

    Spot costs its price: a machine that is taken back is billed no longer, and the next one from its start.
    """
    per_hour = Decimal(f"{wanted.rate_per_s * 3600:.9f}")
    output, prompt = (Decimal(f"{lengths.mean:.6f}") for lengths in (wanted.traffic.output, wanted.traffic.prompt))
    for priority in PRIORITIES:
        if priority == "spot" and not size.spot_supported:
            continue
        rate = machine_rate(size, priority, sheet, region)
        if rate is None:
            continue
        hourly = machines * rate
        yield Money(
            priority=priority,
            usd_per_hour=round(hourly, 6),
            usd_per_month=round_money(hourly * MONTH_HOURS),
            usd_per_million_output=round(hourly / (per_hour * output) * 1_000_000, 4),
            usd_per_million_total=round(hourly / (per_hour * (output + prompt)) * 1_000_000, 4),
        )


def _too_slow(wanted: Wanted, choice: Choice) -> Rejected:
    """A choice of the closed form that misses the SLO in simulation, with the machines that were added too."""
    name = choice.sku.removeprefix("Standard_")
    how = stored_as(choice.weights, choice.kv_cache_dtype)
    reason = f"{name} ({how}) misses the limits in simulation with {choice.machines} machines too"
    return Rejected(
        sku=choice.sku,
        gpu=choice.gpu,
        tensor_parallel_size=choice.tensor_parallel_size,
        weights=choice.weights,
        kv_cache_dtype=choice.kv_cache_dtype,
        reason=reason,
        usd_per_month=_usd(choice, wanted) / choice.machines,
        alone=choice.performance,
        excess=excess(choice.performance, wanted.slo, at_high=wanted.at_high)[0],
    )


def _one_less(wanted: Wanted, needed: int, per_machine: int, largest: float) -> str:
    if needed == 1:
        return ""
    share = wanted.rate_per_s / ((needed - 1) * per_machine)
    machines = f"{needed - 1} machine{'s' if needed > 2 else ''}"
    return (
        f"with {machines} each replica would get {rate_figure(share)} requests a second, and the limits are kept"
        f" up to {rate_figure(largest)}"
    )


def _usd(choice: Choice, wanted: Wanted) -> Decimal:
    way = choice.bought(wanted.priority)
    assert way is not None
    return way.usd_per_month


# ---------------------------------------------------------------------------------------------------- what does not do


def _cheaper(
    rejected: Sequence[Rejected], found: Sequence[Found], choices: Sequence[Choice], wanted: Wanted
) -> tuple[Rejected, ...]:
    """Sizes of which one machine would cost less than the first choice, dearest first, each by its nearest miss."""
    if not choices:
        return ()
    usd = _usd(choices[0], wanted)
    does = {entry.place.size.name for entry in found} | {entry.sku for entry in rejected if entry.could}
    by_size: dict[str, Rejected] = {}
    for entry in rejected:
        if entry.sku in does or entry.usd_per_month is None or entry.usd_per_month >= usd:
            continue
        before = by_size.get(entry.sku)
        if before is None or (entry.excess or inf) < (before.excess or inf):
            by_size[entry.sku] = entry
    return tuple(sorted(by_size.values(), key=lambda r: (-(r.usd_per_month or 0), r.sku)))


def _nearest(rejected: Sequence[Rejected]) -> Rejected | None:
    """What misses the limits by the smallest factor."""
    near = [entry for entry in rejected if entry.excess is not None]
    return min(near, key=lambda r: (r.excess or inf, r.usd_per_month or 0), default=None)


def _nearest_flags(nearest: Rejected | None, wanted: Wanted) -> str:
    """The limits that the nearest one would keep alone, as options, rounded up to two figures."""
    if nearest is None or nearest.alone is None:
        return ""
    flags = []
    for metric in METRICS:
        limit, span = limit_of(wanted.slo, metric), nearest.alone.of(metric)
        if limit is None or span is None:
            continue
        needed = max(limit, (span.high if wanted.at_high else span.expected) * (1.05 if span.high > limit else 1))
        flags.append(f"{METRIC_FLAGS[metric]} {_as_option(needed)}")
    return " ".join(flags)


def _as_option(seconds: float) -> str:
    ms = seconds * 1000
    step = 1 if ms < 100 else 10
    return f"{ceil(ms / step - 1e-9) * step}ms"
