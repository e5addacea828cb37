"""Plans at several contexts beside the sizes that published budgets take, with the money between them and why."""

from __future__ import annotations

from collections.abc import Sequence

from planner.catalog.hardware import sku
from planner.catalog.prices import PriceSheet
from planner.catalog.scenarios import ReferenceChoice, reference
from planner.errors import PlannerError
from planner.model import Amount, Frozen
from planner.plan import Intent, Plan, make_plan
from planner.units import format_usd


class Beside(Frozen):
    """A plan's GPU machines at a context and the reference's; USD a month, None: it cannot be had, and why says so."""

    context: int
    plan: str
    usd_per_month: Amount | None
    reference: str
    reference_usd_per_month: Amount | None
    difference_usd: Amount | None
    why: str


def beside_reference(intents: Sequence[Intent], sheet: PriceSheet) -> tuple[tuple[Beside, Plan | None], ...]:
    """One row an intent (with one context): the cheapest GPU machines, and the same workloads on the reference's.

    Each with the plan behind it, None where nothing holds the workloads.
    """
    return tuple(_row(intent, sheet) for intent in intents)


def _row(intent: Intent, sheet: PriceSheet) -> tuple[Beside, Plan | None]:
    context = max(workload.context for workload in intent.workloads)
    choice = next((c for c in reference().choices if context <= c.to_context), None)
    ours, refusal = _try(intent, sheet)
    theirs, their_refusal = None, ""
    if choice is not None:
        theirs, their_refusal = _try(intent.model_copy(update={"skus": (choice.sku,)}), sheet)
    difference = ours.gpu_usd - theirs.gpu_usd if ours and theirs else None
    row = Beside(
        context=context,
        plan=_machines(ours) if ours else "none",
        usd_per_month=ours.gpu_usd if ours else None,
        reference=sku(choice.sku).short_name if choice else "none",
        reference_usd_per_month=theirs.gpu_usd if theirs else None,
        difference_usd=difference,
        why=_why(ours, theirs, their_refusal, choice) if ours else refusal,
    )
    return row, ours


def _try(intent: Intent, sheet: PriceSheet) -> tuple[Plan | None, str]:
    try:
        return make_plan(intent, sheet), ""
    except PlannerError as error:
        return None, str(error)


def _machines(plan: Plan) -> str:
    """`NC4as_T4_v3 spot (finetune), NC24ads_A100_v4 spot (serve)`."""
    pools = [pool for pool in plan.pools if not pool.fallback]
    if len(pools) == 1:
        return f"{pools[0].sku.removeprefix('Standard_')} {pools[0].priority}"
    return ", ".join(f"{p.sku.removeprefix('Standard_')} {p.priority} ({', '.join(p.workloads)})" for p in pools)


def _why(ours: Plan, theirs: Plan | None, refusal: str, choice: ReferenceChoice | None) -> str:
    if choice is None:
        return "the reference names no size for this context"
    if theirs is None:
        return f"{sku(choice.sku).short_name} does not hold it: {refusal}"
    saved = theirs.gpu_usd - ours.gpu_usd
    if saved == 0:
        return "the same machines"
    theirs_on_spot = any(pool.priority == "spot" for pool in theirs.pools)
    ours_on_spot = any(pool.priority == "spot" for pool in ours.pools)
    if {pool.gpu for pool in ours.pools} == {sku(choice.sku).gpu}:
        return f"saves {format_usd(saved)}: the same card in a smaller machine"
    dear = ", which has no spot price here" if ours_on_spot and not theirs_on_spot else ""
    return f"saves {format_usd(saved)}: cheaper machines hold it than {sku(choice.sku).short_name}{dear}"
