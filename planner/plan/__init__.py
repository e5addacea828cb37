"""The plan: the cheapest set of pools that holds the workloads, what it costs, and why every other choice lost.

The plan is the narrow waist: what stands right of it (stack files, infrastructure, workloads) knows nothing else.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from decimal import Decimal
from functools import cache
from typing import NamedTuple

from planner.catalog.prices import COMMITTED, PriceSheet, Priority, Provenance
from planner.cost.cluster import GpuLoad, Kept, cluster_lines
from planner.cost.lines import Line, alternatives, figure, tidy, total, vm_line
from planner.cost.schedule import MONTH_HOURS
from planner.cost.spot import Overhead
from planner.errors import DoesNotFit
from planner.fit import Misfit
from planner.memory.serving import ServingMemory, ServingSettings
from planner.memory.training import TrainingMemory
from planner.memory.weights import weight_bytes, weight_scheme
from planner.plan.choices import (
    Choice,
    Job,
    Placement,
    checkpoint_bytes,
    choices,
    exceeded,
    jobs_of,
    limits,
    no_placement,
    other_vcpus,
    pool_nodes,
    wanted_vcpus,
)
from planner.plan.intent import ANY_REGION, FinetuneWorkload, Intent, ServeWorkload, intents_from_options, parse_intent
from planner.plan.result import (
    SPOT_QUOTA,
    TOTAL_QUOTA,
    Considered,
    Placed,
    Plan,
    Pool,
    PoolAlternatives,
    PricesUsed,
    QuotaAsk,
    RegionConsidered,
    Verdict,
)
from planner.plan.search import Search
from planner.units import format_gib, format_usd, round_money

__all__ = [
    "Considered",
    "Intent",
    "Plan",
    "PoolAlternatives",
    "PricesUsed",
    "cluster_bill",
    "cluster_usd",
    "intents_from_options",
    "make_plan",
    "over_budget",
    "parse_intent",
    "prices_used",
]


def make_plan(intent: Intent, sheet: PriceSheet) -> Plan:
    """The cheapest set of pools that holds the workloads, over all regions, sizes and ways to buy that are allowed.

    Minimises the month's expected cost: machines, their disks, and what the region adds (system nodes, storage ...).
    Raises DoesNotFit when nothing holds a workload or no region a plan, PlannerError for an unknown region.
    """
    jobs = jobs_of(intent)
    regions = sheet.regions if ANY_REGION in intent.regions else tuple(dict.fromkeys(map(sheet.region, intent.regions)))
    quota = {name if name == "*" else sheet.region(name): limit for name, limit in intent.quota.items()}
    digest, intent = intent.digest, intent.model_copy(update={"quota": quota})
    kept = kept_in_blob(jobs)
    preferred = frozenset(intent.prefer_families)
    notes: list[str] = []
    best = None
    if preferred:
        best, seen = _cheapest_region(intent, jobs, kept, sheet, regions, preferred)
        if best is None:
            notes.append("no plan stays within the preferred families, so all were searched")
    if best is None:
        best, seen = _cheapest_region(intent, jobs, kept, sheet, regions, frozenset())
    if best is None:
        reasons = "; ".join(dict.fromkeys(f"{s.region}: {s.reason}" for s in seen[:3]))
        more = f" (and {len(seen) - 3} more regions)" if len(seen) > 3 else ""
        raise DoesNotFit(f"no plan fits the intent: {reasons}{more}; allow other regions, sizes or more quota")
    return _plan(digest, intent, jobs, kept, sheet, best, seen, notes)


class _Found(NamedTuple):
    """The cheapest placement of a region. families: it was searched within these alone, all when empty."""

    region: str
    placement: Placement
    usd: Decimal
    families: frozenset[str]


def _cheapest_region(
    intent: Intent,
    jobs: Sequence[Job],
    kept: Kept,
    sheet: PriceSheet,
    regions: Sequence[str],
    families: frozenset[str],
) -> tuple[_Found | None, list[RegionConsidered]]:
    """The region with the cheapest plan (ties by name), and what every other came to."""
    found: list[tuple[_Found, frozenset[str]]] = []
    seen = []
    load = GpuLoad(pod_hours=_pod_hours(jobs))
    for region in regions:
        if sheet.rate(intent.cluster.system_sku, region, "on-demand") is None:
            short = intent.cluster.system_sku.removeprefix("Standard_")
            seen.append(
                RegionConsidered(region=region, usd_per_month=None, reason=f"no price for the system nodes ({short})")
            )
            continue
        tables = tuple(choices(job, i, sheet, region, shared=intent.take_turns) for i, job in enumerate(jobs))
        if families:
            tables = tuple(tuple(c for c in t if c.option.size.quota_family in families) for t in tables)
        limit = limits(intent.quota, region, other_vcpus(intent))
        search = Search(tables, limit, turns=intent.take_turns, fallback=intent.pricing.fallback_on_demand)
        placement = search.run()
        if placement is None:
            reason = no_placement(jobs, tables)
            seen.append(RegionConsidered(region=region, usd_per_month=None, reason=reason))
            continue
        around = _cluster(intent, sheet, region, kept, load)
        usd = total(around) + placement.usd
        seen.append(RegionConsidered(region=region, usd_per_month=usd, reason=""))
        missing = frozenset(line.label for line in around if not line.priced)
        found.append((_Found(region, placement, usd, families), missing))
    if not found:
        return None, seen
    # what no region prices leaves them comparable; what only some price would make the others look cheap
    common = frozenset.intersection(*(missing for _, missing in found))
    fewest = min(len(missing - common) for _, missing in found)
    reasons = {
        one.region: f"no price there for {', '.join(sorted(missing - common)).lower()}"
        for one, missing in found
        if len(missing - common) > fewest
    }
    best = min((one for one, missing in found if one.region not in reasons), key=lambda one: one.usd)
    seen = [
        row.model_copy(update={"usd_per_month": None, "reason": reasons[row.region]}) if row.region in reasons else row
        for row in seen
    ]
    return best, seen


def _cluster(intent: Intent, sheet: PriceSheet, region: str, kept: Kept, load: GpuLoad) -> tuple[Line, ...]:
    return cluster_lines(
        sheet,
        region,
        posture=intent.posture,
        cluster=intent.cluster,
        storage=intent.storage,
        developers=intent.developers,
        kept=kept,
        load=load,
        internal_address=any(isinstance(w, ServeWorkload) and w.expose == "internal" for w in intent.workloads),
    )


def cluster_usd(intent: Intent, sheet: PriceSheet, region: str) -> Callable[[int, bool], Decimal]:
    """USD a month of all but the GPU machines, by how many of them run all month, and whether each needs a disk."""
    kept = kept_in_blob(jobs_of(intent))

    @cache
    def around(machines: int, os_disk: bool) -> Decimal:
        hours = MONTH_HOURS * machines
        load = GpuLoad(pod_hours=hours, os_disk_hours=hours if os_disk else Decimal(0))
        return total(_cluster(intent, sheet, region, kept, load))

    return around


def cluster_bill(intent: Intent, sheet: PriceSheet, region: str, os_disk_hours: Decimal) -> tuple[Line, ...]:
    """All lines but the GPU machines, where those need system disks for so many hours a month."""
    jobs = jobs_of(intent)
    load = GpuLoad(pod_hours=_pod_hours(jobs), os_disk_hours=os_disk_hours)
    return tuple(line.to_cents() for line in _cluster(intent, sheet, region, kept_in_blob(jobs), load))


def _pod_hours(jobs: Sequence[Job]) -> Decimal:
    return sum((job.hours * job.workload.replicas for job in jobs), Decimal(0))


def kept_in_blob(jobs: Sequence[Job]) -> Kept:
    """What the workloads leave in storage: each model once a format, one adapter, and a run's checkpoints.

    Written a month: hours of work / the checkpoint interval, which spot sets; without spot the same interval is kept.
    """
    stored: dict[tuple[str, str], int] = {}
    adapter = checkpoint = 0
    written = Decimal(0)
    for job in jobs:
        spec, option = job.spec, job.options[0]
        served_as = job.settings.quantization if isinstance(job.settings, ServingSettings) else None
        scheme = weight_scheme(spec, served_as)
        stored[spec.name, scheme.name] = weight_bytes(spec, scheme)
        memory = option.fit.memory
        if isinstance(memory, TrainingMemory):
            parts = {part.name: part.expected_bytes for part in memory.estimate.components}
            adapter = max(adapter, parts.get("adapters", 0))
            checkpoint = max(checkpoint, checkpoint_bytes(option.fit))
            if option.overhead.interval_hours:
                written += job.hours * job.workload.replicas / option.overhead.interval_hours
    return Kept(
        weights_bytes=sum(stored.values()),
        adapter_bytes=adapter,
        checkpoint_bytes=checkpoint,
        checkpoints_written=written,
    )


def _plan(
    digest: str,
    intent: Intent,
    jobs: Sequence[Job],
    kept: Kept,
    sheet: PriceSheet,
    found: _Found,
    seen: Sequence[RegionConsidered],
    notes: Sequence[str],
) -> Plan:
    chosen = found.placement.choices
    names = _pool_names(chosen)
    compute = _compute_lines(intent, jobs, sheet, found.region, chosen)
    load = GpuLoad(pod_hours=_pod_hours(jobs), os_disk_hours=_disk_hours(intent, jobs, chosen))
    cluster = _cluster(intent, sheet, found.region, kept, load)
    # to cents, as they are printed: the totals are the sums of what people read
    compute = tuple(line.to_cents() for line in compute)
    lines = (*compute, *(line.to_cents() for line in cluster))
    used = [line.provenance for line in lines if line.provenance is not None]
    unpriced = tuple(line.key for line in lines if not line.priced)
    return Plan(
        intent_digest=digest,
        region=found.region,
        pools=_pools(intent, jobs, chosen, names, compute),
        workloads=tuple(_placed(jobs[c.job], c, names) for c in chosen),
        lines=lines,
        low_usd=total(lines, "low_usd"),
        usd=total(lines),
        high_usd=total(lines, "high_usd"),
        gpu_usd=total(compute),
        unpriced=unpriced,
        prices=prices_used(sheet, used),
        quota=_quota(intent, found.region, chosen),
        alternatives=_alternatives(intent, jobs, sheet, found.region, chosen, names),
        considered=tuple(row for i, job in enumerate(jobs) for row in _considered(intent, job, i, sheet, found)),
        regions=tuple(_against_best(row, found) for row in seen),
        notes=(*notes, *_notes(intent, jobs, chosen)),
    )


def _disk_hours(intent: Intent, jobs: Sequence[Job], chosen: Sequence[Choice]) -> Decimal:
    """Hours a month of machines that need a system disk of their own; those of a commitment stay all month."""
    pools = pool_nodes(chosen, turns=intent.take_turns)
    hours = Decimal(0)
    for choice in chosen:
        if choice.option.os_disk and choice.priority not in COMMITTED:
            hours += jobs[choice.job].billed_hours(choice.priority, choice.option.overhead) * choice.option.nodes
    kept = {c.pool for c in chosen if c.option.os_disk and c.priority in COMMITTED}
    return hours + sum((MONTH_HOURS * pools[pool] for pool in kept), Decimal(0))


def _pool_names(chosen: Sequence[Choice]) -> dict[tuple[str, Priority], str]:
    """A name a pool: the card and how it is bought, at most 12 lower-case letters and digits, as AKS takes them."""
    short = {"on-demand": "od", "spot": "spot"}
    names: dict[tuple[str, Priority], str] = {}
    for choice in chosen:
        if choice.pool in names:
            continue
        gpu = (choice.option.size.gpu or "cpu").split("-")[0]
        base = f"{gpu[:6]}{short.get(choice.priority, 'res')}"
        taken = set(names.values())
        names[choice.pool] = next(n for n in (base, *(f"{base}{i}" for i in range(2, 99))) if n not in taken)
    return names


def _compute_lines(
    intent: Intent,
    jobs: Sequence[Job],
    sheet: PriceSheet,
    region: str,
    chosen: Sequence[Choice],
) -> tuple[Line, ...]:
    """A line a workload; a commitment that workloads taking turns share is one line."""
    lines: list[Line] = []
    shared = pool_nodes(chosen, turns=intent.take_turns)
    done: set[tuple[str, Priority]] = set()
    for choice in chosen:
        members = [c for c in chosen if c.pool == choice.pool]
        together = intent.take_turns and choice.priority in COMMITTED
        if together and choice.pool in done:
            continue
        done.add(choice.pool)
        sharing = [jobs[c.job] for c in (members if together else [choice])]
        lines.append(
            vm_line(
                sheet,
                key="gpu/" + "+".join(job.workload.name for job in sharing),
                label=" and ".join(map(_work_words, sharing)),
                sku=choice.option.size.name,
                region=region,
                priority=choice.priority,
                count=shared[choice.pool] if together else choice.option.nodes,
                hours=min(sum((job.hours for job in sharing), Decimal(0)), MONTH_HOURS),
                overhead=choice.option.overhead,
                idle_hours=jobs[choice.job].idle_hours,
            )
        )
    return tuple(lines)


def _work_words(job: Job) -> str:
    workload = job.workload
    verb = "Fine-tuning" if isinstance(workload, FinetuneWorkload) else "Serving"
    words = f"{verb} {job.spec.name} at {workload.context:,} tokens"
    return words if workload.name in ("serve", "finetune") else f"{words} ({workload.name})"


def _pools(
    intent: Intent,
    jobs: Sequence[Job],
    chosen: Sequence[Choice],
    names: dict[tuple[str, Priority], str],
    compute: Sequence[Line],
) -> tuple[Pool, ...]:
    pools = []
    for pool, nodes in pool_nodes(chosen, turns=intent.take_turns).items():
        members = [choice for choice in chosen if choice.pool == pool]
        people = {jobs[c.job].workload.name for c in members}
        size = members[0].option.size
        always = sum(c.option.nodes for c in members if jobs[c.job].schedule.always)
        usd = sum(
            (line.usd for line in compute if line.usd and people & set(line.key.removeprefix("gpu/").split("+"))),
            Decimal(0),
        )
        plain = Pool(
            name=names[pool],
            sku=size.name,
            gpu=size.gpu or "",
            gpus_per_node=size.gpu_count or 0,
            priority=pool[1],
            min_nodes=nodes if pool[1] in COMMITTED else min(always, nodes),
            max_nodes=nodes,
            workloads=tuple(jobs[c.job].workload.name for c in members),
            usd_per_month=usd,
        )
        pools.append(plain)
        if pool[1] == "spot" and intent.pricing.fallback_on_demand:
            # `...spot2` -> `...fb2`: as different from each other as the pools they stand in for
            name = plain.name.replace("spot", "fb")
            twin = {"name": name, "priority": "on-demand", "min_nodes": 0, "fallback": True}
            pools.append(plain.model_copy(update=twin | {"usd_per_month": Decimal(0)}))
    return tuple(pools)


def _placed(job: Job, choice: Choice, names: dict[tuple[str, Priority], str]) -> Placed:
    fit, memory = choice.option.fit, choice.option.fit.memory
    spot = choice.priority == "spot"
    settings: dict[str, str] = {}
    if isinstance(memory, TrainingMemory):
        settings = {k: str(v) for k, v in memory.settings.model_dump(exclude_none=True).items()}
    overhead = choice.option.overhead
    return Placed(
        name=job.workload.name,
        task=job.workload.kind,
        model=job.spec.name,
        hub_id=job.spec.hub_id,
        context=job.workload.context,
        pool=names[choice.pool],
        replicas=job.workload.replicas,
        gpus=fit.place.gpus if choice.option.size.gpu else 0,
        schedule=job.schedule.text,
        hours_per_month=job.hours,
        arguments=memory.arguments if isinstance(memory, ServingMemory) else (),
        settings=settings,
        checkpoint_interval_hours=overhead.interval_hours,
        checkpoint_bytes=checkpoint_bytes(fit),
        spot_factor=overhead.factor[1] if spot else Decimal(1),
        away_hours_per_month=overhead.away[1] * job.hours if spot else Decimal(0),
        needed_bytes=fit.needed_bytes,
        usable_bytes=fit.usable_bytes,
        memory=memory.estimate,
    )


def prices_used(sheet: PriceSheet, used: Sequence[Provenance]) -> PricesUsed:
    """The sheet, and the oldest and newest day among the figures used."""
    days = [p.as_of for p in used] or [sheet.as_of]
    return PricesUsed(
        sheet=sheet.name,
        digest=sheet.digest,
        oldest=min(days),
        newest=max(days),
        estimates=sum(p.estimate for p in used),
    )


def _quota(intent: Intent, region: str, chosen: Sequence[Choice]) -> tuple[QuotaAsk, ...]:
    """What to ask Azure for: each GPU family, the system nodes' family, spot in total, and the region's total."""
    family, spot = wanted_vcpus(chosen, turns=intent.take_turns, fallback=intent.pricing.fallback_on_demand)
    wanted = [(name, vcpus, "GPU machines that are not spot, all pools full") for name, vcpus in sorted(family.items())]
    wanted += [
        (name, vcpus, "system nodes and one more while they are upgraded; developers' machines")
        for name, vcpus in other_vcpus(intent).items()
    ]
    total_vcpus = sum(vcpus for _, vcpus, _ in wanted)
    if spot:
        wanted.append((SPOT_QUOTA, spot, "spot machines of all families"))
    wanted.append((TOTAL_QUOTA, total_vcpus, f"everything in {region} but spot"))
    names = dict.fromkeys(name for name, _, _ in wanted)
    return tuple(
        QuotaAsk(
            name=name,
            vcpus=sum(vcpus for other, vcpus, _ in wanted if other == name),
            reason="; ".join(reason for other, _, reason in wanted if other == name),
        )
        for name in names
    )


def _alternatives(
    intent: Intent,
    jobs: Sequence[Job],
    sheet: PriceSheet,
    region: str,
    chosen: Sequence[Choice],
    names: dict[tuple[str, Priority], str],
) -> tuple[PoolAlternatives, ...]:
    found = []
    for pool in dict.fromkeys(choice.pool for choice in chosen):
        members = [choice for choice in chosen if choice.pool == pool]
        # machines that are shared work for all in turn; others for their own workload alone
        if not intent.take_turns:
            members = [max(members, key=lambda c: jobs[c.job].hours)]
        hours = sum((jobs[c.job].hours for c in members), Decimal(0))
        idle = sum((jobs[c.job].idle_hours for c in members), Decimal(0))
        overhead = _overhead_of([(jobs[c.job].hours, c.option.overhead) for c in members])
        found.append(
            PoolAlternatives(
                pool=names[pool],
                sku=pool[0],
                hours_per_month=hours,
                ways=alternatives(sheet, pool[0], region, hours, overhead, idle),
            )
        )
    return tuple(found)


def _overhead_of(parts: Sequence[tuple[Decimal, Overhead]]) -> Overhead:
    """The overhead of several workloads on one machine: of each by its hours."""
    hours = sum((share for share, _ in parts), Decimal(0))
    if not hours:
        return parts[0][1]
    low, expected, high = (
        tidy(sum((share * part.factor[i] for share, part in parts), Decimal(0)) / hours, 6) for i in range(3)
    )
    return Overhead(factor=(low, expected, high))


def _considered(intent: Intent, job: Job, index: int, sheet: PriceSheet, found: _Found) -> list[Considered]:
    """Every size for one workload in the chosen region, cheapest first, then those that cannot be and why."""
    chosen = next(c for c in found.placement.choices if c.job == index)
    others = [c for c in found.placement.choices if c.job != index]
    cheapest: dict[str, Choice] = {}
    for choice in choices(job, index, sheet, found.region, shared=False):
        cheapest.setdefault(choice.option.size.name, choice)
    # taking turns, the search counts a commitment by the pool
    own = chosen.usd + (chosen.committed_usd if intent.take_turns else Decimal(0))
    limit = limits(intent.quota, found.region, other_vcpus(intent))
    rows = []
    for size, outcome in job.outcomes:
        name = size.short_name
        if isinstance(outcome, str):
            rows.append(_row(job, name, 0, None, "excluded", None, outcome))
            continue
        gpus = outcome.place.gpus if size.gpu else 0
        if isinstance(outcome, Misfit):
            verdict: Verdict = "cannot run" if outcome.reason else "does not fit"
            reason = outcome.reason or (
                f"needs {format_gib(outcome.needed_bytes)} of {format_gib(outcome.usable_bytes)} a GPU;"
                f" the largest part is {outcome.component}"
            )
            rows.append(_row(job, name, gpus, None, verdict, None, reason))
            continue
        best = chosen if size.name == chosen.option.size.name else cheapest.get(size.name)
        if best is None:
            rows.append(_row(job, name, gpus, None, "unpriced", None, f"no price in {found.region}"))
            continue
        usd = own if best is chosen else best.usd
        if best is chosen:
            why = "the cheapest within the preferred families" if found.families else "the cheapest set of pools has it"
            rows.append(_row(job, name, gpus, best.priority, "chosen", usd, why))
            continue
        broken = exceeded([*others, best], limit, turns=intent.take_turns, fallback=intent.pricing.fallback_on_demand)
        if broken:
            rows.append(_row(job, name, gpus, best.priority, "quota", usd, broken))
        elif found.families and size.quota_family not in found.families:
            rows.append(_row(job, name, gpus, best.priority, "excluded", usd, "not of a preferred family"))
        else:
            more = f"{format_usd(usd - own)} a month more" if usd > own else "no cheaper, and shares no machine"
            rows.append(_row(job, name, gpus, best.priority, "dearer", usd, more))
    order = {"chosen": 0, "dearer": 1, "quota": 1, "excluded": 2, "unpriced": 3, "does not fit": 4, "cannot run": 5}
    rows.sort(
        key=lambda r: (order[r.verdict] if r.usd_per_month is None else min(order[r.verdict], 1), r.usd_per_month or 0)
    )
    return rows


def _row(
    job: Job, name: str, gpus: int, priority: Priority | None, verdict: Verdict, usd: Decimal | None, reason: str
) -> Considered:
    return Considered(
        workload=job.workload.name,
        sku=name,
        gpus=gpus,
        priority=priority,
        verdict=verdict,
        usd_per_month=None if usd is None else round_money(usd),
        reason=reason,
    )


def _against_best(row: RegionConsidered, found: _Found) -> RegionConsidered:
    if row.usd_per_month is None:
        return row
    if row.region == found.region:
        return row.model_copy(update={"reason": "the cheapest plan"})
    return row.model_copy(update={"reason": f"{format_usd(row.usd_per_month - found.usd)} a month more"})


def _notes(intent: Intent, jobs: Sequence[Job], chosen: Sequence[Choice]) -> list[str]:
    notes = [
        "hours are taken as asked on every size: a faster card may need fewer, which the plan does not count yet",
    ]
    for choice in chosen:
        job, (low, expected, high) = jobs[choice.job], choice.option.overhead.away
        if choice.priority == "spot" and expected:
            notes.append(
                f"{job.workload.name} on spot is away for about {figure(expected * job.hours, 1)} of its"
                f" {figure(job.hours, 1)} hours a month ({figure(low * job.hours, 1)} to {figure(high * job.hours, 1)})"
                f"{_spread_advice(intent, job, choice)}"
            )
    if intent.pricing.fallback_on_demand:
        for size in dict.fromkeys(c.option.size for c in chosen if c.priority == "spot"):
            notes.append(
                f"while Azure has no spot machine, {size.short_name} stands in on demand at its higher price, and the"
                " total counts none of that"
            )
    if any(c.priority == "spot" for c in chosen) and intent.pricing.evictions_per_hour is None:
        notes.append("no eviction rate was given: read yours in Azure Resource Graph (SpotResources)")
    return notes


def _spread_advice(intent: Intent, job: Job, choice: Choice) -> str:
    if job.workload.replicas == 1:
        return "" if intent.pricing.fallback_on_demand else ": run a second replica where that matters"
    if choice.option.nodes == 1:
        return f": all {job.workload.replicas} replicas share one machine, and one eviction takes them all"
    return ""


def over_budget(plan: Plan, intent: Intent) -> str:
    """One sentence when the plan costs more than the intent's approved budget; empty when it does not."""
    approved = intent.approved_usd_per_month
    if approved is None or plan.usd <= approved:
        return ""
    return (
        f"the plan costs {format_usd(plan.usd)} a month and {format_usd(approved)} is approved: raise the approval or"
        " change the intent"
    )
