"""Rules for money and quota: what was approved, what is planned, who hears of it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from decimal import Decimal, InvalidOperation

from infra.policy.nouns import UNKNOWN, Book, Context, Fault, Recorded, at, listed, of_kind, says
from planner.plan.result import SPOT_QUOTA, TOTAL_QUOTA
from planner.units import format_usd

BUDGET = "consumption:Budget"
ALERTS = (("Actual", 50), ("Actual", 80), ("Actual", 100), ("Forecasted", 100))

plan = Book("plan")


@plan.over("budget", "an Azure Budget holds the amount that was approved", "high", "Well-Architected cost pillar")
def budget(resources: Sequence[Recorded], context: Context) -> list[Fault]:
    approved = context.lock.approved_usd_per_month
    if approved is None:
        return [(None, "nothing is approved: write approved_usd_per_month into the intent, then plan again")]
    budgets = list(of_kind(resources, BUDGET))
    if not budgets:
        return [(None, f"nobody would hear when it costs more than {format_usd(approved)}: make a Budget")]
    found: list[Fault] = []
    for one in budgets:
        amount = at(one.inputs, "amount")
        if amount != UNKNOWN and _decimal(amount) != approved:
            found.append((one, f"its amount is {amount} and {format_usd(approved)} is approved: take it from the plan"))
        if not says(at(one.inputs, "timeGrain"), "Monthly"):
            found.append((one, "what is approved is for a month: set time_grain to Monthly"))
    return found


def _decimal(value: object) -> Decimal | None:
    try:
        return Decimal(str(value))
    except InvalidOperation:
        return None


@plan.each(
    BUDGET,
    "budget-alerts",
    "somebody hears at 50, 80 and 100 % of the budget, and when the forecast passes it",
    "high",
    "Well-Architected cost pillar",
)
def budget_alerts(resource: Recorded, _: Context) -> str | None:
    notifications = at(resource.inputs, "notifications")
    if notifications == UNKNOWN:
        return None
    given = list(notifications.values()) if isinstance(notifications, dict) else []
    for kind, percent in ALERTS:
        of_it = [
            n
            for n in given
            if says(at(n, "enabled"), True)
            and says(at(n, "threshold"), percent)
            and says(at(n, "thresholdType") or "Actual", kind)
        ]
        if not of_it:
            return f"nobody hears at {percent} % {'spent' if kind == 'Actual' else 'forecast'}: add a notification"
        if not any(listed(at(n, who)) for n in of_it for who in ("contactEmails", "contactRoles", "contactGroups")):
            return f"the notification at {percent} % reaches nobody: name alert_emails in the intent, or a role"
    return None


@plan.over("cost-approved", "the plan costs no more than was approved", "high", "Well-Architected cost pillar")
def cost_approved(_: Sequence[Recorded], context: Context) -> list[Fault]:
    approved, usd = context.lock.approved_usd_per_month, context.lock.usd
    if approved is None or usd <= approved:  # the rule on the budget says when nothing is approved
        return []
    return [
        (
            None,
            f"a month costs {format_usd(usd)} and {format_usd(approved)} is approved: raise the approval or change the"
            " intent",
        )
    ]


@plan.over("quota", "the quota to ask Azure for covers all pools when they are full", "medium")
def quota(_: Sequence[Recorded], context: Context) -> list[Fault]:
    """vCPUs = most machines x vCPUs of one, by quota; spot machines count in one quota for all sizes."""
    wanted: Counter[str] = Counter()
    for pool in context.lock.pools:
        name = SPOT_QUOTA if pool.priority == "spot" else pool.quota_family
        wanted[name] += pool.max_nodes * pool.vcpus_per_node
    on_demand = sum(vcpus for name, vcpus in wanted.items() if name != SPOT_QUOTA)
    if on_demand:
        wanted[TOTAL_QUOTA] += on_demand
    return [
        (None, f"full pools take {vcpus} vCPUs of {name} and the plan asks for {asked}: plan again")
        for name, vcpus in wanted.items()
        if (asked := context.lock.quota.get(name, 0)) < vcpus
    ]


RULES = tuple(plan.rules)
