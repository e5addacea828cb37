"""The approved amount as an Azure Budget: people hear at half of it, before it is reached, and when it is gone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import date
from decimal import Decimal

import pulumi
from pulumi_azure_native import consumption

from infra.names import Names
from planner.errors import PlannerError

ACTUAL_PERCENT = (50, 80, 100)
FORECAST_PERCENT = (100,)


@dataclass(frozen=True)
class BudgetArgs:
    """amount_usd_per_month: what is approved; start: the first day of a month, which Azure wants in the present one

    resource_groups: whose cost counts
    emails, action_group_id: who hears; without emails the owners of the subscription
    """

    names: Names
    subscription_id: pulumi.Input[str]
    amount_usd_per_month: Decimal
    start: date
    resource_groups: Sequence[pulumi.Input[str]]
    emails: Sequence[str] = ()
    action_group_id: pulumi.Input[str] | None = None


class Budget(pulumi.ComponentResource):
    """A monthly budget on the cost of a stack's resource groups. It warns; it stops nothing. budget_id: its id.

    Azure reads the amount in the currency in which the subscription is billed.
    PlannerError for an amount that is not above zero, a start that is not the first of a month, and no resource group.
    """

    budget_id: pulumi.Output[str]

    def __init__(self, name: str, args: BudgetArgs, opts: pulumi.ResourceOptions | None = None) -> None:
        if args.amount_usd_per_month <= 0:
            raise PlannerError(
                f"a budget of {args.amount_usd_per_month} USD a month warns of everything: state approved_usd_per_month"
                " above 0 in the intent"
            )
        if args.start.day != 1:
            raise PlannerError(
                f"an Azure Budget starts on the first day of a month, not on {args.start}: give that day"
            )
        if not args.resource_groups:
            raise PlannerError("a budget without resource groups would count the whole subscription: name the stack's")
        super().__init__("tonnage:infra:Budget", name, {}, opts)
        budget = consumption.Budget(
            "month",
            budget_name=args.names.of("budget", "month"),
            scope=pulumi.Output.concat("/subscriptions/", args.subscription_id),
            category=consumption.CategoryType.COST,
            amount=float(args.amount_usd_per_month),
            time_grain=consumption.TimeGrainType.MONTHLY,
            time_period=consumption.BudgetTimePeriodArgs(start_date=f"{args.start.isoformat()}T00:00:00Z"),
            filter=consumption.BudgetFilterArgs(
                dimensions=consumption.BudgetComparisonExpressionArgs(
                    name="ResourceGroupName",
                    operator=consumption.BudgetOperatorType.IN_,
                    values=list(args.resource_groups),
                )
            ),
            notifications={
                f"{kind}_{percent}_percent": _notification(threshold_type, percent, args)
                for kind, threshold_type, percents in (
                    ("actual", consumption.ThresholdType.ACTUAL, ACTUAL_PERCENT),
                    ("forecast", consumption.ThresholdType.FORECASTED, FORECAST_PERCENT),
                )
                for percent in percents
            },
            # the start stays that of the first deployment: Azure refuses to move it into the past, and a month that has
            # passed since is no reason for an update
            opts=pulumi.ResourceOptions(parent=self, ignore_changes=["timePeriod"]),
        )
        self.budget_id = budget.id
        self.register_outputs({"budget_id": budget.id})


def _notification(
    threshold_type: consumption.ThresholdType, percent: int, args: BudgetArgs
) -> consumption.NotificationArgs:
    emails = list(dict.fromkeys(args.emails))
    return consumption.NotificationArgs(
        enabled=True,
        operator=consumption.OperatorType.GREATER_THAN_OR_EQUAL_TO,
        threshold=float(percent),
        threshold_type=threshold_type,
        contact_emails=emails,
        contact_roles=None if emails else ["Owner"],
        contact_groups=None if args.action_group_id is None else [args.action_group_id],
    )
