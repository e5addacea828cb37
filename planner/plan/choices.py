"""What each workload could run on and what that costs, and the quotas that bound them all."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from decimal import Decimal
from functools import cached_property
from typing import NamedTuple

from planner import run
from planner.catalog.assumptions import assumption
from planner.catalog.hardware import VmSku, cpu_size, gpu_of, sku
from planner.catalog.mig import card_of, cut
from planner.catalog.prices import COMMITTED, PriceSheet, Priority
from planner.cost.cluster import OS_DISK_GIB
from planner.cost.schedule import MONTH_HOURS, Schedule
from planner.cost.spot import Overhead, SpotRisk, serving_overhead, training_overhead
from planner.errors import DoesNotFit, PlannerError
from planner.fit import (
    Fit,
    Misfit,
    Place,
    Settings,
    candidates,
    default_headroom,
    fit_size,
    gpu_options,
    gpus_of,
    try_place,
)
from planner.memory.serving import ServingSettings
from planner.memory.training import FinetuneSettings, TrainingMemory
from planner.model import ModelSpec
from planner.plan.cpu import cpu_outcomes
from planner.plan.intent import (
    FinetuneWorkload,
    Intent,
    Quota,
    ServeWorkload,
    model_of,
    schedule_of,
    settings_of,
    stated_gpus,
)
from planner.plan.serving import check_adapters
from planner.units import format_gib

OUTSIDE_EVERY_VM = "one machine has not that many GPUs, or shares one"


class Option(NamedTuple):
    """A workload on a size: gpus of each machine that a replica takes, and how many machines the replicas fill."""

    size: VmSku
    fit: Fit
    nodes: int
    overhead: Overhead
    os_disk: bool


class Job:
    """A workload with everything worked out that does not depend on region or price."""

    def __init__(self, intent: Intent, workload: ServeWorkload | FinetuneWorkload) -> None:
        self.intent, self.workload = intent, workload
        self.spec: ModelSpec = model_of(intent, workload)
        self.settings: Settings = settings_of(workload)
        self.schedule: Schedule = schedule_of(workload)
        if isinstance(workload, ServeWorkload):
            check_adapters(workload.name, self.spec, workload.adapters)
        self.hours: Decimal = self.schedule.hours_per_month()
        # a machine that is no longer needed stays a while, each time
        kept = self.schedule.starts_per_month * assumption("scale_down_hours").expected
        self.idle_hours: Decimal = max(min(kept, MONTH_HOURS - self.hours), Decimal(0))
        self.headroom = default_headroom(workload.kind) if intent.headroom is None else intent.headroom
        self.machines = workload.machines
        self.on_cpu = isinstance(workload, ServeWorkload) and workload.device == "cpu"
        wanted = gpus_of(self.settings) * self.machines
        if intent.gpu_instance_profile and wanted > 1:
            raise PlannerError(
                f"{workload.name} asks for {wanted} GPUs, and MIG devices cannot be joined: leave out"
                " gpu_instance_profile, or take one device (tensor_parallel_size, pipeline_parallel_size and n_gpus 1)"
            )

    @cached_property
    def outcomes(self) -> tuple[tuple[VmSku, Fit | Misfit | str], ...]:
        """Every size a plan may choose, smallest first, with how the workload fares there (or why it cannot be)."""
        if isinstance(self.settings, ServingSettings) and self.on_cpu:
            return cpu_outcomes(self.spec, self.settings, self.intent.skus, self.headroom)
        found: list[tuple[VmSku, Fit | Misfit | str]] = []
        gpus, profile = stated_gpus(self.workload), self.intent.gpu_instance_profile
        for size in candidates(retired=bool(self.intent.skus)):
            reason = excluded(size, self.intent.skus)
            if reason:
                found.append((size, reason))
                continue
            if profile:
                part = cut(size, profile)
                if part is None:
                    found.append((size, f"its GPUs cannot be cut into {profile}"))
                    continue
                size = part
            if self.machines > 1:
                found.append((size, fit_over(self.spec, self.settings, size, self.machines, self.headroom)))
                continue
            if not gpu_options(self.settings, size, gpus):
                found.append((size, OUTSIDE_EVERY_VM))
                continue
            found.append((size, fit_on(self.spec, self.settings, size, self.headroom, gpus)))
        return tuple(found)

    @cached_property
    def options(self) -> tuple[Option, ...]:
        """The sizes on which it fits."""
        found = []
        for size, outcome in self.outcomes:
            if isinstance(outcome, Fit):
                pods = outcome.place.available // outcome.place.gpus
                nodes = -(-self.workload.replicas // pods) * self.machines
                found.append(Option(size, outcome, nodes, self.overhead(outcome), needs_disk(size)))
        return tuple(found)

    def overhead(self, fit: Fit) -> Overhead:
        """What evictions add to its hours on spot."""
        risk = spot_risk(self.intent)
        if not isinstance(fit.memory, TrainingMemory):
            return serving_overhead(risk)
        return training_overhead(risk, run.checkpoint_hours(run.checkpoint_bytes(fit.memory)))

    def billed_hours(self, priority: Priority, overhead: Overhead) -> Decimal:
        """Hours a month that one machine is there: work, evictions, and until it is given back; at most the month."""
        if priority in COMMITTED:
            return MONTH_HOURS
        factor = overhead.factor[1] if priority == "spot" else Decimal(1)
        return min(self.hours * factor + self.idle_hours, MONTH_HOURS)

    def refusal(self) -> str:
        """Why no size is left, in one sentence."""
        if self.intent.skus:
            named = [(size, outcome) for size, outcome in self.outcomes if size.name in self.intent.skus]
            told = [f"{size.short_name}: {outcome}" for size, outcome in named if isinstance(outcome, str)]
            known = {size.name for size, _ in named}
            others = [sku(name) for name in self.intent.skus if name not in known]
            told += [f"{size.short_name}: {size.unplannable_reason or size.status}" for size in others]
            if len(told) == len(named) + len(others):
                return f"{self.workload.name} has no size to run on ({'; '.join(told)}): name another in skus"
        misfits = [o for _, o in self.outcomes if isinstance(o, Misfit)]
        reasons = sorted((o.reason for o in misfits if o.reason), key=lambda reason: "AMD" in reason)
        fits_not = [o for o in misfits if not o.reason]
        where = f"{self.workload.name} ({self.spec.name} at {self.workload.context:,} tokens)"
        if fits_not:
            least = min(fits_not, key=lambda o: o.missing_bytes)
            return (
                f"{where} fits on no size that is allowed: on {least.place.label} it needs"
                f" {format_gib(least.needed_bytes)} a GPU, most of it {least.component}, and there are"
                f" {format_gib(least.usable_bytes)} (`planner size` says what would fit)"
            )
        return f"{where}: {reasons[0]}" if reasons else f"{where} has no size to run on: loosen skus"


def fit_on(spec: ModelSpec, settings: Settings, size: VmSku, headroom: float, gpus: int | None = None) -> Fit | Misfit:
    """The workload on a size; fine-tuning asks for the memory-efficient attention kernel where that decides."""
    outcome = fit_size(spec, settings, size, headroom=headroom, gpus=gpus, search_context=False)
    if isinstance(outcome, Fit) or outcome.reason or not isinstance(settings, FinetuneSettings):
        return outcome
    if settings.attention is not None or gpu_of(size).supports_flash_attention_2 is not False:
        return outcome
    efficient = settings.model_copy(update={"attention": "efficient"})
    other = fit_size(spec, efficient, size, headroom=headroom, gpus=gpus, search_context=False)
    return other if isinstance(other, Fit) else outcome


def fit_over(spec: ModelSpec, settings: Settings, size: VmSku, machines: int, headroom: float) -> Fit | Misfit | str:
    """Over several machines: a server with a pipeline stage a machine, tensor parallel within; training on all GPUs."""
    count = size.gpu_count or 0
    if not count or size.gpu_fraction != "1":
        return "its machines share GPUs with others"
    if isinstance(settings, ServingSettings):
        wide = {"tensor_parallel_size": count, "pipeline_parallel_size": machines}
    else:
        wide = {"n_gpus": count * machines}
    spread = settings.model_copy(update=wide)
    place = Place(gpu=card_of(size), sku=size, gpus=count * machines, available=count * machines)
    return try_place(spec, spread, place, headroom=headroom, search_context=False)


def excluded(size: VmSku, wanted: tuple[str, ...]) -> str:
    """Why a size is left out whatever it could hold, in words; empty when it is not. A size that is named is taken."""
    if wanted:
        return "" if size.name in wanted else "not among the sizes asked for"
    if size.status != "available":
        return f"{size.status}: name it in skus to take it"
    if size.aks_supported != "yes":
        return "no AKS page says that it is supported: name it in skus to take it"
    return ""


def spot_risk(intent: Intent) -> SpotRisk:
    """The intent's eviction rates, or the catalog's; the hours of a restart are the catalog's."""
    risk, stated = run.assumed_risk(), intent.pricing.evictions_per_hour
    return risk if not stated else risk.model_copy(update={"evictions_per_hour": stated})


def checkpoint_bytes(fit: Fit) -> int:
    """Bytes of one training checkpoint; of a server none."""
    return run.checkpoint_bytes(fit.memory) if isinstance(fit.memory, TrainingMemory) else 0


def needs_disk(size: VmSku) -> bool:
    """AKS puts the system disk on the machine's own temporary disk only where that is large enough."""
    return (size.temp_disk_gib or 0) < OS_DISK_GIB


class Choice(NamedTuple):
    """An option bought in one way.

    usd: a month, expected, without what other workloads share; rate: of one machine and hour, with its disk
    work_hours: a month on one machine, with evictions
    """

    job: int
    option: Option
    priority: Priority
    usd: Decimal
    vcpus: int
    rate: Decimal
    work_hours: Decimal

    @property
    def pool(self) -> tuple[str, Priority]:
        return self.option.size.name, self.priority

    @property
    def committed_usd(self) -> Decimal:
        """USD a month of a commitment's machines, used or not; 0 where nothing is committed."""
        return self.rate * MONTH_HOURS * self.option.nodes if self.priority in COMMITTED else Decimal(0)


class Placement(NamedTuple):
    """Where everything runs: a choice a job, and USD a month for the machines."""

    choices: tuple[Choice, ...]
    usd: Decimal


class Limits(NamedTuple):
    """The quota of a region: vCPUs by family in lower case, of spot machines, of all others; None: not limited.

    others: vCPUs by family that system nodes and developers' machines take of it
    """

    family: dict[str, int]
    spot: int | None
    total: int | None
    others: dict[str, int]


def limits(quota: Mapping[str, Quota], region: str, others: dict[str, int]) -> Limits:
    """The quota of a region, where none is stated that of `*`."""
    found = quota.get(region, quota.get("*", Quota()))
    return Limits(
        {name.lower(): n for name, n in found.family_vcpus.items()}, found.spot_vcpus, found.total_vcpus, others
    )


def other_vcpus(intent: Intent) -> dict[str, int]:
    """vCPUs by quota family of the system nodes, with one more while they are upgraded, and developers' machines."""
    cluster = intent.cluster.resolved(intent.posture)
    wanted: dict[str, int] = {}
    for name, count in (
        (cluster.system_sku, (cluster.system_nodes or 0) + 1),
        (intent.developers.sku, intent.developers.count),
    ):
        size = cpu_size(name)
        if count:
            wanted[size.quota_family] = wanted.get(size.quota_family, 0) + size.vcpus * count
    return wanted


def choices(job: Job, index: int, sheet: PriceSheet, region: str, *, shared: bool) -> tuple[Choice, ...]:
    """Every way to run a job in a region that has a price, cheapest first; ties go to fewer machines, then by name.

    usd = machines x (hours x overhead + idle hours) x (hourly price + disk), or machines x 730 h x both for
    commitments, whose machines stay. shared: jobs take turns, and commitments are counted by the pool, not here.
    """
    found = []
    for option in job.options:
        size = option.size
        for priority in job.intent.pricing.priorities(spot=job.workload.spot):
            if priority == "spot" and not size.spot_supported:
                continue
            rate = machine_rate(size, priority, sheet, region)
            if rate is None:
                continue
            hours = job.billed_hours(priority, option.overhead)
            paid_by_pool = shared and priority in COMMITTED
            usd = Decimal(0) if paid_by_pool else option.nodes * hours * rate
            factor = option.overhead.factor[1] if priority == "spot" else Decimal(1)
            vcpus = option.nodes * (size.vcpu or 0)
            found.append(Choice(index, option, priority, usd, vcpus, rate, job.hours * factor))
    # work of no hours costs nothing anywhere: then the cheaper and smaller machine goes first
    found.sort(key=lambda c: (c.usd, c.option.nodes, c.rate, c.vcpus, c.option.size.name, c.priority))
    return tuple(found)


def machine_rate(size: VmSku, priority: Priority, sheet: PriceSheet, region: str) -> Decimal | None:
    """USD of an hour of a machine with its system disk, where it needs one; None without a price."""
    rate = sheet.rate(size.name, region, priority)
    disk = sheet.meter("disk-premium-p10", region) if needs_disk(size) else None
    return rate if rate is None or disk is None else rate + disk.tiers[-1].usd / MONTH_HOURS


def pool_nodes(chosen: Sequence[Choice], *, turns: bool) -> dict[tuple[str, Priority], int]:
    """Machines of each pool: the most that one job needs when they take turns, else all together."""
    nodes: dict[tuple[str, Priority], int] = {}
    for choice in chosen:
        before = nodes.get(choice.pool, 0)
        nodes[choice.pool] = max(before, choice.option.nodes) if turns else before + choice.option.nodes
    return nodes


def wanted_vcpus(chosen: Sequence[Choice], *, turns: bool, fallback: bool) -> tuple[dict[str, int], int]:
    """vCPUs by quota family (machines that are not spot, and the twins of spot pools) and of spot machines."""
    sizes = {choice.option.size.name: choice.option.size for choice in chosen}
    family: dict[str, int] = {}
    spot = 0
    for (name, priority), nodes in pool_nodes(chosen, turns=turns).items():
        vcpus = nodes * (sizes[name].vcpu or 0)
        if priority == "spot":
            spot += vcpus
        if priority != "spot" or fallback:
            key = sizes[name].quota_family
            family[key] = family.get(key, 0) + vcpus
    return family, spot


def exceeded(chosen: Sequence[Choice], limit: Limits, *, turns: bool, fallback: bool) -> str:
    """Which quota these pools break, in words; empty when none."""
    family, spot = wanted_vcpus(chosen, turns=turns, fallback=fallback)
    for name, vcpus in limit.others.items():
        family[name] = family.get(name, 0) + vcpus
    for name, vcpus in family.items():
        granted = limit.family.get(name.lower())
        if granted is not None and vcpus > granted:
            return f"needs {vcpus} vCPUs of {name}, and the quota is {granted}"
    if limit.spot is not None and spot > limit.spot:
        return f"needs {spot} spot vCPUs, and the quota is {limit.spot}"
    total = sum(family.values())
    if limit.total is not None and total > limit.total:
        return f"needs {total} vCPUs of the region with the system nodes, and the quota is {limit.total}"
    return ""


def no_placement(jobs: Sequence[Job], tables: Sequence[Sequence[Choice]]) -> str:
    """Why a region holds no placement, in words."""
    for job, table in zip(jobs, tables, strict=True):
        if not table:
            names = sorted({option.size.short_name for option in job.options})
            few = ", ".join(names[:3]) + (" ..." if len(names) > 3 else "")
            return f"no price there for a size that holds {job.workload.name} ({few})"
    return "the quota holds no set of pools that fits"


def jobs_of(intent: Intent) -> tuple[Job, ...]:
    """The intent's workloads, each with at least one size to run on. DoesNotFit when one has none.

    PlannerError for workloads that take turns and together want more hours than a month has.
    """
    jobs = tuple(Job(intent, workload) for workload in intent.workloads)
    wanted = sum((job.hours for job in jobs), Decimal(0))
    if intent.take_turns and len(jobs) > 1 and wanted > MONTH_HOURS:
        raise PlannerError(
            f"workloads that take turns want {wanted:.0f} hours of a month's 730: shorten a schedule, or let them run"
            " at the same time (take_turns: false)"
        )
    for job in jobs:
        if not job.options:
            raise DoesNotFit(job.refusal())
    waiting = sum((job.idle_hours for job in jobs), Decimal(0))
    if intent.take_turns and wanted + waiting > MONTH_HOURS and waiting:
        # the next workload begins before the machine would have been given back
        share = max(MONTH_HOURS - wanted, Decimal(0)) / waiting
        for job in jobs:
            job.idle_hours *= share
    return jobs
