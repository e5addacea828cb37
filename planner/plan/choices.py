"""What each workload could run on, and the cheapest way to put them all somewhere: an exact search."""

from __future__ import annotations

from collections.abc import Sequence
from decimal import Decimal
from functools import cached_property
from typing import NamedTuple

from planner.catalog.assumptions import assumption
from planner.catalog.hardware import VmSku, gpu_of
from planner.catalog.prices import COMMITTED, PriceSheet, Priority
from planner.cost.cluster import OS_DISK_GIB
from planner.cost.schedule import MONTH_HOURS, Schedule
from planner.cost.spot import Overhead, SpotRisk, serving_overhead, training_overhead
from planner.errors import DoesNotFit
from planner.fit import Fit, Misfit, Settings, candidates, fit_size, gpu_options
from planner.memory.training import FinetuneSettings, TrainingMemory
from planner.model import ModelSpec
from planner.plan.intent import FinetuneWorkload, Intent, Quota, ServeWorkload, model_of, schedule_of, settings_of
from planner.units import format_gib

OUTSIDE_EVERY_VM = "no machine has so many GPUs"


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
        self.hours: Decimal = self.schedule.hours_per_month()
        # a machine that is no longer needed stays a while, each time
        kept = self.schedule.starts_per_month * assumption("scale_down_hours").expected
        self.idle_hours: Decimal = max(min(kept, MONTH_HOURS - self.hours), Decimal(0))
        self.headroom: float = (
            intent.headroom if intent.headroom is not None else 0.0 if workload.kind == "serve" else 0.05
        )

    @cached_property
    def outcomes(self) -> tuple[tuple[VmSku, Fit | Misfit | str], ...]:
        """Every size a plan may choose, smallest first, with how the workload fares there (or why it cannot be)."""
        found: list[tuple[VmSku, Fit | Misfit | str]] = []
        for size in candidates(retired=bool(self.intent.skus)):
            excluded = _excluded(size, self.intent.skus)
            if excluded:
                found.append((size, excluded))
                continue
            if not gpu_options(self.settings, size):
                found.append((size, OUTSIDE_EVERY_VM))
                continue
            found.append((size, self._fit(size)))
        return tuple(found)

    def _fit(self, size: VmSku) -> Fit | Misfit:
        """The workload on a size; fine-tuning may ask for the memory-efficient attention kernel where that decides."""
        outcome = fit_size(self.spec, self.settings, size, headroom=self.headroom, search_context=False)
        settings = self.settings
        if isinstance(outcome, Fit) or outcome.reason or not isinstance(settings, FinetuneSettings):
            return outcome
        if settings.attention is not None or gpu_of(size).supports_flash_attention_2 is not False:
            return outcome
        efficient = settings.model_copy(update={"attention": "efficient"})
        other = fit_size(self.spec, efficient, size, headroom=self.headroom, search_context=False)
        return other if isinstance(other, Fit) else outcome

    @cached_property
    def options(self) -> tuple[Option, ...]:
        """The sizes on which it fits."""
        found = []
        for size, outcome in self.outcomes:
            if isinstance(outcome, Fit):
                pods = outcome.place.available // outcome.place.gpus
                nodes = -(-self.workload.replicas // pods)
                found.append(Option(size, outcome, nodes, self.overhead(outcome), _needs_disk(size)))
        return tuple(found)

    def overhead(self, fit: Fit) -> Overhead:
        """What evictions add to its hours on spot."""
        risk = spot_risk(self.intent)
        if not isinstance(fit.memory, TrainingMemory):
            return serving_overhead(risk)
        seconds = checkpoint_bytes(fit) / assumption("checkpoint_write_bytes_per_s").expected
        return training_overhead(risk, float(seconds + assumption("checkpoint_fixed_seconds").expected) / 3600)

    def refusal(self) -> str:
        """Why no size is left, in one sentence."""
        misfits = [o for _, o in self.outcomes if isinstance(o, Misfit)]
        reasons = [o.reason for o in misfits if o.reason and o.place.gpu.is_cuda]
        fits_not = [o for o in misfits if not o.reason]
        where = f"{self.workload.name} ({self.spec.name} at {self.workload.context:,} tokens)"
        if fits_not:
            least = min(fits_not, key=lambda o: o.missing_bytes)
            return (
                f"{where} fits on no size that is allowed: {least.place.label} lacks"
                f" {format_gib(least.missing_bytes)} of {format_gib(least.needed_bytes)} a GPU, most of it"
                f" {least.component} (`planner size` says what would fit)"
            )
        return f"{where}: {reasons[0]}" if reasons else f"{where} has no size to run on: loosen skus"


def _excluded(size: VmSku, wanted: tuple[str, ...]) -> str:
    """Why a size is left out whatever it could hold, in words; empty when it is not. A size that is named is taken."""
    if wanted:
        return "" if size.name in wanted else "not among the sizes asked for"
    if size.status != "available":
        return f"{size.status}: name it in skus to take it"
    if size.aks_supported != "yes":
        return "no AKS page says that it is supported: name it in skus to take it"
    return ""


def spot_risk(intent: Intent) -> SpotRisk:
    """How often spot machines are taken back and what that costs: the intent's own figures, else the catalog's."""
    rate, restart = assumption("evictions_per_hour"), assumption("restart_hours")
    return SpotRisk(
        evictions_per_hour=intent.pricing.evictions_per_hour or (rate.low, rate.expected, rate.high),
        restart_hours=(restart.low, restart.expected, restart.high),
    )


def checkpoint_bytes(fit: Fit) -> int:
    """Bytes of one training checkpoint: what is trained and its optimizer state, over all GPUs that hold a part."""
    if not isinstance(fit.memory, TrainingMemory):
        return 0
    settings = fit.memory.settings
    parts = {part.name: part.expected_bytes for part in fit.memory.estimate.components}
    trained = parts.get("weights", 0) if settings.method == "full" else parts.get("adapters", 0)
    sharded = settings.parallelism in ("zero3", "fsdp", "fsdp2")
    state_sharded = settings.parallelism not in ("none", "ddp")
    n = settings.n_gpus
    return trained * (n if sharded else 1) + parts.get("optimizer state", 0) * (n if state_sharded else 1)


def _needs_disk(size: VmSku) -> bool:
    """AKS puts the system disk on the machine's own temporary disk only where that is large enough."""
    return (size.temp_disk_gib or 0) < OS_DISK_GIB


class Choice(NamedTuple):
    """An option bought in one way. usd: a month, expected, without what other workloads share."""

    job: int
    option: Option
    priority: Priority
    usd: Decimal
    vcpus: int

    @property
    def pool(self) -> tuple[str, Priority]:
        return self.option.size.name, self.priority


class Placement(NamedTuple):
    """Where everything runs: a choice a job, and USD a month for the machines."""

    choices: tuple[Choice, ...]
    usd: Decimal


class Limits(NamedTuple):
    """What the quota of a region leaves for GPU pools."""

    family: dict[str, int]
    spot: int | None
    total: int | None


def limits(intent: Intent, region: str, other_vcpus: int) -> Limits:
    """The quota of a region, less what system nodes and developers' machines take of the total."""
    quota = intent.quota.get(region, intent.quota.get("*", Quota()))
    left = None if quota.total_vcpus is None else quota.total_vcpus - other_vcpus
    return Limits({name.lower(): n for name, n in quota.family_vcpus.items()}, quota.spot_vcpus, left)


def choices(job: Job, index: int, sheet: PriceSheet, region: str, *, shared: bool) -> tuple[Choice, ...]:
    """Every way to run a job in a region that has a price, cheapest first; ties go to fewer machines, then by name.

    usd = machines x (hours x overhead + idle hours) x (hourly price + disk), or machines x 730 h x hourly price for
    commitments, with the disk by the hours used. shared: the committed part is counted by the pool, not here.
    """
    disk = sheet.meter("disk-premium-p10", region)
    disk_rate = Decimal(0) if disk is None else disk.tiers[-1].usd / MONTH_HOURS
    found = []
    for option in job.options:
        size = option.size
        for priority in job.intent.pricing.priorities(spot=job.workload.spot):
            if priority == "spot" and not size.spot_supported:
                continue
            rate = sheet.rate(size.name, region, priority)
            if rate is None:
                continue
            factor = option.overhead.factor[1] if priority == "spot" else Decimal(1)
            used = (job.hours * factor + job.idle_hours) * option.nodes
            usd = used * disk_rate if option.os_disk else Decimal(0)
            if priority not in COMMITTED:
                usd += used * rate
            elif not shared:
                usd += option.nodes * MONTH_HOURS * rate
            found.append(Choice(index, option, priority, usd, option.nodes * (size.vcpu or 0)))
    found.sort(key=lambda c: (c.usd, c.option.nodes, c.option.size.name, c.priority))
    return tuple(found)


class Search:
    """The cheapest placement of all jobs in one region, by depth first and bounds.

    take_turns: jobs in the same pool share its machines, so that a pool needs the most any of them needs, and a
    commitment is paid once. Otherwise they stand side by side and needs add up.
    """

    def __init__(
        self,
        tables: Sequence[Sequence[Choice]],
        intent: Intent,
        sheet: PriceSheet,
        region: str,
        limit: Limits,
    ) -> None:
        self.tables = tables
        self.turns = intent.take_turns
        self.fallback = intent.pricing.fallback_on_demand
        self.sheet, self.region, self.limit = sheet, region, limit
        self.best: Placement | None = None
        # what each job costs at least: a shared commitment is split over no more jobs than there are
        self.least = [min((self._bound(c) for c in table), default=Decimal(0)) for table in tables]

    def _bound(self, choice: Choice) -> Decimal:
        if not self.turns or choice.priority not in COMMITTED:
            return choice.usd
        return choice.usd + self._commitment(choice.pool, choice.option.nodes) / len(self.tables)

    def _commitment(self, pool: tuple[str, Priority], nodes: int) -> Decimal:
        rate = self.sheet.rate(pool[0], self.region, pool[1])
        assert rate is not None
        return rate * MONTH_HOURS * nodes

    def run(self) -> Placement | None:
        """The cheapest placement, None where a job has no choice or the quota allows none."""
        if all(self.tables):
            self._descend([], Decimal(0))
        return self.best

    def _descend(self, chosen: list[Choice], so_far: Decimal) -> None:
        depth = len(chosen)
        if depth == len(self.tables):
            usd = so_far + self.shared_usd(chosen)
            if self.best is None or usd < self.best.usd:
                self.best = Placement(tuple(chosen), usd)
            return
        rest = sum(self.least[depth + 1 :], Decimal(0))
        for choice in self.tables[depth]:
            # choices come by usd: once that alone is too dear, all that follow are, for bounds never lie below it
            if self.best is not None and so_far + choice.usd + rest >= self.best.usd:
                break
            chosen.append(choice)
            if self.allowed(chosen):
                self._descend(chosen, so_far + choice.usd)
            chosen.pop()

    def shared_usd(self, chosen: Sequence[Choice]) -> Decimal:
        """What commitments cost that jobs taking turns share: once a pool, for the most machines any of them needs."""
        if not self.turns:
            return Decimal(0)
        committed = {pool: nodes for pool, nodes in pool_nodes(chosen, turns=True).items() if pool[1] in COMMITTED}
        return sum((self._commitment(pool, nodes) for pool, nodes in committed.items()), Decimal(0))

    def allowed(self, chosen: Sequence[Choice]) -> bool:
        """Whether the quota holds these pools; more pools never need less, so a refusal is final."""
        return not exceeded(chosen, self.limit, turns=self.turns, fallback=self.fallback)


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
    for name, vcpus in family.items():
        granted = limit.family.get(name.lower())
        if granted is not None and vcpus > granted:
            return f"needs {vcpus} vCPUs of {name}, and the quota is {granted}"
    if limit.spot is not None and spot > limit.spot:
        return f"needs {spot} spot vCPUs, and the quota is {limit.spot}"
    total = sum(family.values())
    if limit.total is not None and total > limit.total:
        return f"needs {total} vCPUs of the region, and {max(limit.total, 0)} are left"
    return ""


def no_placement(jobs: Sequence[Job], tables: Sequence[Sequence[Choice]], sheet: PriceSheet, region: str) -> str:
    """Why a region holds no placement, in words."""
    for job, table in zip(jobs, tables, strict=True):
        if not table:
            names = sorted({option.size.short_name for option in job.options})
            few = ", ".join(names[:3]) + (" ..." if len(names) > 3 else "")
            return f"no price there for a size that holds {job.workload.name} ({few})"
    return "the quota holds no set of pools that fits"


def jobs_of(intent: Intent) -> tuple[Job, ...]:
    """The intent's workloads, each with at least one size to run on. PlannerError (exit code 1) when one has none."""
    jobs = tuple(Job(intent, workload) for workload in intent.workloads)
    for job in jobs:
        if not job.options:
            raise DoesNotFit(job.refusal())
    return jobs
