"""The search for machines: sizes by price, ways to store the model, tensor parallelism, what each replica can do."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from decimal import Decimal
from heapq import heappop, heappush
from math import ceil, inf
from typing import NamedTuple

from planner.catalog.hardware import VmSku, gpu_of, tensor_parallel_options
from planner.catalog.prices import PriceSheet
from planner.cost.schedule import MONTH_HOURS
from planner.errors import PlannerError
from planner.fit import Misfit, Place, candidates, check_card, try_place, with_gpus
from planner.memory.serving import ServingMemory, ServingSettings
from planner.memory.weights import weight_scheme
from planner.performance.server import Link, link_of, server
from planner.plan.choices import excluded, machine_rate
from planner.plan.intent import ANY_REGION
from planner.scale.answer import Rejected, Variant, Wanted
from planner.scale.measured import MeasuredCurve
from planner.scale.replica import Measured, Modelled, Replica, excess, missed
from planner.scale.words import stored_as
from planner.units import format_gib, format_usd, round_money

SHOWN = 8
SIXTEEN, FP8, INT4 = Variant(None, "auto"), Variant("fp8", "auto"), Variant("awq", "auto")
TRIED = (SIXTEEN, FP8, Variant("fp8", "fp8"), INT4)
MOST_MACHINES = 100_000


class Candidate(NamedTuple):
    """A size in the region where it is cheapest. usd_per_hour: bought as asked for, with the system disk."""

    size: VmSku
    region: str
    usd_per_hour: Decimal

    @property
    def usd_per_month(self) -> Decimal:
        return self.usd_per_hour * MONTH_HOURS


class Found(NamedTuple):
    """A replica that keeps the SLO on a size, before it is simulated and priced in every way."""

    place: Candidate
    replica: Replica
    tp: int
    weights: str
    kv_cache_dtype: str
    per_machine: int
    needed: int  # machines, without spares
    number: int  # in the order in which ways to store the model on a size are tried, the least altered first

    def usd_per_month(self, spare: int) -> Decimal:
        return (self.needed + spare) * self.place.usd_per_month

    def does_for(self, place: Candidate, number: int, usd: Decimal, spare: int) -> bool:
        """Whether it is the same size, the model less altered, for no more than that: then nobody wants the other."""
        return self.place is place and self.number < number and self.usd_per_month(spare) <= usd


# ------------------------------------------------------------------------------------------------------------- places


def places_of(
    wanted: Wanted, sheet: PriceSheet, regions: Sequence[str], measured: Sequence[MeasuredCurve]
) -> tuple[list[Candidate], list[Rejected]]:
    """The sizes to try, cheapest machine first, and those that have no price."""
    places, rejected = [], []
    sizes = candidates(retired=bool(wanted.sizes))
    if measured:
        sizes = tuple(size for size in sizes if any(curve.covers(size) for curve in measured))
        if not sizes or (wanted.sizes and not {size.name for size in sizes} & set(wanted.sizes)):
            raise PlannerError("no size that may be taken was measured: add a run on it, or drop --sku")
    for size in sizes:
        if excluded(size, wanted.sizes):
            continue
        if wanted.tp and not measured and wanted.tp not in tensor_parallel_options(size):
            if wanted.sizes:
                gpus = f"{size.gpu_count} GPU{'s' if size.gpu_count != 1 else ''}"
                raise PlannerError(
                    f"{size.short_name} has {gpus}, not {wanted.tp} for a replica: lower --tp, or take a larger size"
                )
            continue
        rates = [
            (rate, region)
            for region in regions
            if (rate := machine_rate(size, wanted.priority, sheet, region)) is not None
            and (wanted.priority != "spot" or size.spot_supported)
        ]
        if rates:
            rate, region = min(rates)
            places.append(Candidate(size, region, rate))
        else:
            where = "any region" if ANY_REGION in wanted.regions else ", ".join(regions)
            rejected.append(_rejected(size, 1, "", "", f"{size.short_name} has no price {wanted.priority} in {where}"))
    if not places:
        reason = rejected[0].reason if rejected else "no size is left"
        raise PlannerError(f"{reason}: name another --region, or any, or another way to buy (--priority)")
    places.sort(key=lambda p: (p.usd_per_hour, p.size.name))
    return places, rejected


def _rejected(size: VmSku, tp: int, weights: str, kv_cache_dtype: str, reason: str) -> Rejected:
    return Rejected(
        sku=size.name,
        gpu=gpu_of(size).label,
        tensor_parallel_size=tp,
        weights=weights,
        kv_cache_dtype=kv_cache_dtype,
        reason=reason,
    )


# ----------------------------------------------------------------------------------------------------------- replicas


Entry = tuple[int, str, str, Replica | str]  # tp, weights, KV type, and the replica or why there is none


def search(
    wanted: Wanted, places: Sequence[Candidate], measured: Sequence[MeasuredCurve]
) -> tuple[list[Found], list[Rejected]]:
    """What keeps the SLO and what does not, by rising lower bounds of its cost.

    The first bound is one machine, the second as many as the load takes at saturation; only then is the SLO looked at.
    """
    known: dict[tuple[object, ...], Replica | str] = {}
    spare, everything = wanted.spare, wanted.everything or wanted.drawn
    queue: list[tuple[Decimal, int, int, Candidate, list[Entry]]] = []
    for place in places:
        for entries in _on_size(wanted, place, known, measured):
            heappush(queue, (place.usd_per_month * (1 + spare), len(queue), 0, place, entries))
    found: list[Found] = []
    failed: list[Rejected] = []
    while queue:
        least, number, stage, place, entries = heappop(queue)
        dearest = sorted(entry.usd_per_month(spare) for entry in found)[SHOWN - 1 : SHOWN]
        if dearest and not everything and least > dearest[0]:
            if stage:
                failed.append(_dear(place, entries, least))
            continue
        if not everything and any(f.does_for(place, number, least, spare) for f in found):
            continue
        running = [entry for entry in entries if not isinstance(entry[3], str)]
        if stage == 0 and running:
            machines = min(_at_saturation(wanted, place, entry) for entry in running)
            heappush(queue, (place.usd_per_month * (machines + spare), number, 1, place, entries))
            continue
        best = _best(wanted, place, entries, number)
        if isinstance(best, Found):
            if not everything:
                found = undominated([*found, best], spare)
            else:
                found.append(best)
        else:
            failed.append(best)
    return found, failed


def undominated(found: Sequence[Found], spare: int) -> list[Found]:
    """Without those that alter the model more than another on the same size and cost no less."""
    return [f for f in found if not any(g.does_for(f.place, f.number, f.usd_per_month(spare), spare) for g in found)]


def _dear(place: Candidate, entries: Sequence[Entry], usd: Decimal) -> Rejected:
    """A size that could do, and of which so many machines are needed that the SLO was not looked at."""
    tp, weights, kv_cache_dtype, _ = next(entry for entry in entries if not isinstance(entry[3], str))
    machines = round(usd / place.usd_per_month)
    reason = f"takes {machines} machines or more, {format_usd(usd, Decimal(1))} a month"
    told = _rejected(place.size, tp, weights, kv_cache_dtype, _said(place.size, weights, kv_cache_dtype, reason))
    return told.model_copy(update={"usd_per_month": round_money(place.usd_per_month), "could": True})


def _at_saturation(wanted: Wanted, place: Candidate, entry: Entry) -> int:
    """Machines that the load takes when every replica does all it can."""
    tp, _, _, replica = entry
    assert not isinstance(replica, str)
    return _machines(wanted.rate_per_s, replica.saturation_per_s, (place.size.gpu_count or 0) // tp)


def _on_size(
    wanted: Wanted, place: Candidate, known: dict[tuple[object, ...], Replica | str], measured: Sequence[MeasuredCurve]
) -> Iterator[list[Entry]]:
    """For each way to store the model, its replicas on a size by tensor parallelism."""
    size = place.size
    if measured:
        for weights in dict.fromkeys(curve.weights for curve in measured if curve.covers(size)):
            yield [
                (curve.tp, weights, "", Measured(curve, wanted.traffic, wanted.slo))
                for curve in measured
                if curve.covers(size) and curve.weights == weights
            ]
        return
    card = gpu_of(size)
    options = (wanted.tp,) if wanted.tp else tensor_parallel_options(size)
    for variant in _variants(wanted, size):
        settings = wanted.settings.model_copy(
            update={"quantization": variant.quantization, "kv_cache_dtype": variant.kv_cache_dtype}
        )
        weights = weight_scheme(wanted.spec, variant.quantization).name
        entries: list[Entry] = []
        unlinked: list[Entry] = []
        for tp in options:
            try:
                link = link_of(size, tp)
            except PlannerError as error:
                unlinked.append((tp, weights, variant.kv_cache_dtype, str(error)))
                continue
            key = (card.name, tp, link, variant)
            if key not in known:
                known[key] = _replica(wanted, settings, size, tp, link)
            entries.append((tp, weights, variant.kv_cache_dtype, known[key]))
        yield entries or unlinked  # what fewer GPUs fail on says more than a link that nobody published


def _variants(wanted: Wanted, size: VmSku) -> Iterator[Variant]:
    """What was asked for; else as stored, and of a 16-bit model fp8 and int4 where the card multiplies or unpacks them.

    fp8 needs a card that multiplies it; int4 one with the Marlin kernels.
    """
    if wanted.variants is not None:
        yield from wanted.variants
        return
    card = gpu_of(size)
    for variant in TRIED:
        if variant.quantization and wanted.spec.quantization is not None:
            continue
        if variant.quantization == "fp8" and card.supports_fp8 != "native":
            continue
        if variant.quantization:
            try:
                check_card(wanted.spec, wanted.settings.model_copy(update={"quantization": variant.quantization}), card)
            except PlannerError:  # it is an alternative that nobody asked for
                continue
        yield variant


def _replica(wanted: Wanted, settings: ServingSettings, size: VmSku, tp: int, link: Link | None) -> Replica | str:
    """A replica that fits, or why it cannot be."""
    settings = with_gpus(settings, tp)  # type: ignore[assignment]
    card = gpu_of(size)
    place = Place(gpu=card, sku=None, gpus=tp, available=tp)
    outcome = try_place(wanted.spec, settings, place, search_context=False)
    if isinstance(outcome, Misfit):
        return outcome.reason or _too_small(outcome)
    try:
        return Modelled(server(wanted.spec, settings, card, link), wanted.traffic, wanted.slo, wanted.at_high)
    except PlannerError as error:
        return str(error)


def _too_small(outcome: Misfit) -> str:
    """What the model needs of a GPU and what there is, in short."""
    memory = outcome.memory
    assert isinstance(memory, ServingMemory)
    if memory.kv_bytes <= 0:
        taken = format_gib(memory.budget_bytes - memory.kv_bytes)
        return (
            f"has too little memory: weights and activations take {taken} and vLLM may use"
            f" {format_gib(memory.budget_bytes)}"
        )
    wanted = memory.estimate.component("KV cache").expected_bytes
    return f"has too little memory: {format_gib(memory.kv_bytes)} are left for a KV cache of {format_gib(wanted)}"


def _best(wanted: Wanted, place: Candidate, entries: Sequence[Entry], number: int) -> Found | Rejected:
    """Of the tensor-parallel sizes the one with the fewest machines, then the fewest GPUs; else what comes nearest."""
    size = place.size
    gpus = size.gpu_count or 0
    found: list[Found] = []
    failed: list[Rejected] = []
    for entry in entries:
        tp, weights, kv_cache_dtype, replica = entry
        if isinstance(replica, str):
            failed.append(_rejected(size, tp, weights, kv_cache_dtype, _said(size, weights, kv_cache_dtype, replica)))
            continue
        if found and _at_saturation(wanted, place, entry) >= min(f.needed for f in found):
            continue  # it cannot do with fewer machines
        largest = replica.largest_per_s
        per_machine = gpus // tp
        alone = replica.alone
        if largest <= 0:
            at_high = wanted.at_high and isinstance(replica, Modelled)
            reason = missed(alone, wanted.slo, at_high=at_high)
            over, _ = excess(alone, wanted.slo, at_high=at_high)
            miss = _rejected(size, tp, weights, kv_cache_dtype, _said(size, weights, kv_cache_dtype, reason, tp=tp))
            failed.append(miss.model_copy(update={"alone": alone, "excess": over}))
            continue
        machines = _machines(wanted.rate_per_s, largest, per_machine)
        if machines > MOST_MACHINES:
            reason = f"would take {machines:,} machines"
            failed.append(_rejected(size, tp, weights, kv_cache_dtype, _said(size, weights, kv_cache_dtype, reason)))
            continue
        share = wanted.rate_per_s / (machines * per_machine)
        try:
            replica.at(share)
        except PlannerError as error:  # below what was measured
            failed.append(_rejected(size, tp, weights, kv_cache_dtype, str(error)))
            continue
        found.append(Found(place, replica, tp, weights, kv_cache_dtype, per_machine, machines, number))
    if found:
        return min(found, key=lambda f: (f.needed, f.tp))
    worst = min(failed, key=lambda r: (r.excess is None, r.excess or inf, -r.tensor_parallel_size))
    return worst.model_copy(update={"usd_per_month": round_money(place.usd_per_month)})


def _machines(rate_per_s: float, largest_per_s: float, per_machine: int) -> int:
    """ceil(ceil(rate / largest) / replicas a machine), forgiving what a float lost."""
    replicas = max(1, ceil(rate_per_s / largest_per_s - 1e-9))
    return -(-replicas // per_machine)


def _said(size: VmSku, weights: str, kv_cache_dtype: str, reason: str, tp: int = 1) -> str:
    """`NC4as_T4_v3 (awq) misses TTFT p95: ...`."""
    if reason.split(" ", 1)[0] not in ("misses", "has", "takes", "would"):
        return reason if size.short_name in reason else f"{size.short_name}: {reason}"
    how = stored_as(weights, kv_cache_dtype) + (f", TP {tp}" if tp > 1 else "")
    return f"{size.short_name} ({how}) {reason}"
