"""A plan as a budget: its lines, what would change them, and what it rests on."""

from __future__ import annotations

from collections.abc import Callable
from decimal import Decimal

from planner.budget import Commitment, Draft, MemoryCurve, MemoryPoint, Supposed, WhatIfDraft, advice, supposed
from planner.catalog.hardware import machine as size_of
from planner.catalog.prices import PriceSheet
from planner.cost.lines import PRIORITY_WORDS, Line, figure, vm_line
from planner.cost.schedule import MONTH_HOURS
from planner.errors import PlannerError
from planner.fit import Fit, Settings, Task, ladder, smallest, with_context
from planner.model import ModelSpec
from planner.plan import Intent, Plan, PoolAlternatives, cluster_bill, make_plan
from planner.plan.choices import Job, needs_disk
from planner.plan.intent import FinetuneWorkload, ServeWorkload, model_of

ALWAYS_SUPPOSED = (
    "prometheus_series_per_node",
    "prometheus_series_per_gpu_pod",
    "log_gb_per_node_day",
    "blob_operations_per_month",
    "key_vault_operations_per_month",
    "image_build_vcpu_seconds",
)
ON_SPOT = ("evictions_per_hour", "restart_hours", "checkpoint_write_bytes_per_s", "checkpoint_fixed_seconds")
CURVE_FROM = 1024


def draft_of_plan(name: str, intent: Intent, plan: Plan, sheet: PriceSheet) -> Draft:
    """The budget's draft for a plan, with its what-ifs planned anew."""
    jobs = [Job(intent, workload) for workload in intent.workloads]
    on_spot = any(pool.priority == "spot" for pool in plan.pools)
    return Draft(
        name=name,
        title=f"Budget: {name}",
        subject=_subject(intent, plan, jobs),
        region=plan.region,
        lines=plan.lines,
        buffer=intent.buffer,
        approved=intent.approved_usd_per_month,
        assumptions=supposed((*ALWAYS_SUPPOSED, *(ON_SPOT if on_spot else ())), intent.owners, _stated(intent, plan)),
        what_ifs=tuple(_what_ifs(intent, plan, sheet)),
        commitments=tuple(
            Commitment(
                machine=_machine(plan, pool),
                sku=pool.sku,
                hours_per_month=pool.hours_per_month,
                ways=pool.ways,
                advice=advice(
                    pool.ways,
                    pool.hours_per_month,
                    next(p.priority for p in plan.pools if p.name == pool.pool),
                ),
            )
            for pool in plan.alternatives
        ),
        memory=memory_curves(
            [(job.workload.kind, job.spec, job.settings, job.headroom) for job in jobs if not job.on_cpu]
        ),
        notes=plan.notes,
        inputs={"intent": intent.digest, "region": plan.region},
    )


def _machine(plan: Plan, ways: PoolAlternatives) -> str:
    """`NC24ads_A100_v4 for finetune, serve`."""
    work = next(pool.workloads for pool in plan.pools if pool.name == ways.pool)
    return f"{ways.sku.removeprefix('Standard_')} for {', '.join(work)}"


def _subject(intent: Intent, plan: Plan, jobs: list[Job]) -> str:
    parts = []
    for job in jobs:
        verb = "fine-tune" if isinstance(job.workload, FinetuneWorkload) else "serve"
        when = "around the clock" if job.schedule.always else f"{figure(job.hours, 1)} hours a month"
        many = f" with {job.workload.replicas} replicas at once" if job.workload.replicas > 1 else ""
        parts.append(f"{verb} {job.spec.name} at {job.workload.context:,} tokens{many}, {when}")
    text = "; ".join(parts)
    return f"{text[:1].upper()}{text[1:]}; Azure region {plan.region}."


_doing = {"finetune": "fine-tuning", "serve": "serving"}


def _hours(hours: Decimal, schedule: str) -> str:
    """`80 hours`, or `217.3 hours (mon-fri 08:00-18:00)`."""
    text = f"{figure(hours, 1)} hours"
    return text if not schedule or schedule[:1].isdigit() else f"{text} ({schedule})"


def _stated(intent: Intent, plan: Plan) -> tuple[Supposed, ...]:
    """What the intent itself says and somebody must stand for."""
    rows = [
        Supposed(
            text=f"How long {_doing[placed.task]} runs in a month ({placed.name}).",
            value=_hours(placed.hours_per_month, placed.schedule),
            owner="machine-learning engineer",
            source="as stated for this plan",
        )
        for placed in plan.workloads
    ]
    storage, cluster = intent.storage, intent.cluster
    rows.append(
        Supposed(
            text="Training data kept in storage.",
            value=f"{storage.dataset_gb} GB",
            owner="machine-learning engineer",
            source="as stated for this plan",
        )
    )
    rows.append(
        Supposed(
            text="Data that leaves Azure in a month.",
            value=f"{cluster.egress_gb_per_month} GB",
            owner="platform engineer",
            source="as stated for this plan",
        )
    )
    if intent.developers.count:
        each = _hours(intent.developers.hours.hours_per_month(), "")
        rows.append(
            Supposed(
                text="People with a machine of their own.",
                value=f"{intent.developers.count}, each {each} a month",
                owner="platform engineer",
                source="as stated for this plan",
            )
        )
    rows.append(
        Supposed(
            text="Azure's list prices: no discount of a contract, no credit, no tax.",
            value=plan.prices.sheet,
            owner="finance",
            source="price sheet",
        )
    )
    return tuple(rows)


def _what_ifs(intent: Intent, plan: Plan, sheet: PriceSheet) -> list[WhatIfDraft]:
    def replanned(change: str, altered: Intent) -> WhatIfDraft:
        try:
            other = make_plan(altered, sheet)
        except PlannerError as error:
            return WhatIfDraft(change=change, lines=None, note=str(error))
        pools = (
            f"{p.sku.removeprefix('Standard_')} {PRIORITY_WORDS[p.priority]}" for p in other.pools if not p.fallback
        )
        together = any("share one machine" in note for note in other.notes)
        note = f"then {', '.join(pools)} in {other.region}{', all replicas on one machine' if together else ''}"
        return WhatIfDraft(change=change, lines=other.lines, note=note)

    rows = []
    if any(pool.priority == "spot" for pool in plan.pools):
        pricing = intent.pricing.model_copy(update={"spot": False, "commitments": ()})
        without = intent.model_copy(update={"pricing": pricing})
        rows.append(replanned("No spot: every GPU machine on demand", without))
    longer = _each(intent, lambda workload: _longer(intent, workload))
    if longer != intent:
        contexts = ", ".join(dict.fromkeys(f"{w.context:,}" for w in longer.workloads))
        rows.append(replanned(f"Contexts twice as long, or the model's longest ({contexts} tokens)", longer))
    served = [w for w in intent.workloads if isinstance(w, ServeWorkload)]
    if served:
        rows.append(replanned("A second replica of each server", _each(intent, _replica)))
    if any(w.schedule != "always" for w in served):
        # a server that never stops leaves others no turn
        apart = _each(intent, _always).model_copy(update={"take_turns": False})
        rows.append(replanned("Servers left running around the clock", apart))
    if any(pool.priority != "reserved-1y" for pool in plan.pools if not pool.fallback):
        rows.append(_reserved(intent, plan, sheet))
    return rows


Workload = ServeWorkload | FinetuneWorkload


def _each(intent: Intent, change: Callable[[Workload], Workload]) -> Intent:
    return intent.model_copy(update={"workloads": tuple(change(w) for w in intent.workloads)})


def _longer(intent: Intent, workload: Workload) -> Workload:
    """Twice the context, but no longer than the model's own."""
    limit = model_of(intent, workload).max_context
    return workload.model_copy(update={"context": min(workload.context * 2, limit)})


def _replica(workload: Workload) -> Workload:
    served = isinstance(workload, ServeWorkload)
    return workload.model_copy(update={"replicas": workload.replicas + 1}) if served else workload


def _always(workload: Workload) -> Workload:
    return workload.model_copy(update={"schedule": "always"}) if isinstance(workload, ServeWorkload) else workload


def _reserved(intent: Intent, plan: Plan, sheet: PriceSheet) -> WhatIfDraft:
    """The same machines, each reserved for a year: 730 hours a month, used or not."""
    machines = tuple(
        vm_line(
            sheet,
            key=f"gpu/{pool.name}",
            label=f"{pool.sku.removeprefix('Standard_')}, reserved",
            sku=pool.sku,
            region=plan.region,
            priority="reserved-1y",
            count=pool.max_nodes,
            hours=MONTH_HOURS,
        ).to_cents()
        for pool in plan.pools
        if not pool.fallback
    )
    pools = [pool for pool in plan.pools if not pool.fallback]
    disks = sum(pool.max_nodes for pool in pools if needs_disk(size_of(pool.sku)))
    return WhatIfDraft(
        change="The same GPU machines, reserved for a year",
        lines=(*machines, *cluster_bill(intent, sheet, plan.region, MONTH_HOURS * disks)),
        note=reservation_note(machines),
    )


def reservation_note(machines: tuple[Line, ...]) -> str:
    doubtful = [line.sku.removeprefix("Standard_") for line in machines if line.provenance and line.provenance.estimate]
    billed = "billed all month, used or not"
    return f"{billed}; the price of {', '.join(doubtful)} is an estimate" if doubtful else billed


def memory_curves(jobs: list[tuple[Task, ModelSpec, Settings, float]]) -> tuple[MemoryCurve, ...]:
    """GPU memory by context, at powers of two up to the model's own, each on the smallest size that holds it."""
    curves = []
    for task, spec, settings, headroom in jobs:
        points = []
        for tokens in _contexts(spec.max_context):
            fit = smallest(spec, with_context(settings, tokens), headroom=headroom)
            if isinstance(fit, Fit):
                points.append(
                    MemoryPoint(
                        context=tokens,
                        needed_bytes=fit.needed_bytes,
                        usable_bytes=fit.usable_bytes,
                        place=fit.place.label,
                    )
                )
        verb = "Fine-tuning" if task == "finetune" else "Serving"
        curves.append(
            MemoryCurve(
                task=task,
                label=f"{verb} {spec.name}",
                points=tuple(points),
                steps=ladder(spec, settings, headroom=headroom),
            )
        )
    return tuple(curves)


def _contexts(limit: int) -> list[int]:
    contexts = []
    tokens = min(CURVE_FROM, limit)
    while tokens < limit:
        contexts.append(tokens)
        tokens *= 2
    return [*contexts, limit]
