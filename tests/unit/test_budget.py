"""Budgets: the published scenarios to the dollar, rounding, variance, and what the page rests on."""

from __future__ import annotations

from datetime import date
from decimal import Decimal
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from planner.budget import Budget, Draft, Money, Rounding, advice, finish, read_budget, supposed
from planner.budget.of_plan import draft_of_plan
from planner.catalog.prices import Provenance, load_sheet
from planner.catalog.scenarios import scenario, scenarios
from planner.cost.lines import Line, alternatives
from planner.errors import PlannerError
from planner.money import scenario_budget
from planner.plan import make_plan, parse_intent

D = Decimal
TODAY = date(2026, 11, 22)
SHEET = load_sheet("2026-11")
REFERENCE = load_sheet("2026-01-reference")
A100 = "StandardNCADSA100v4Family"


def published(name: str) -> Budget:
    return scenario_budget(name, REFERENCE, Money(), TODAY)


def today(name: str) -> Budget:
    return scenario_budget(name, SHEET, Money(), TODAY)


# ------------------------------------------------------------------------------------- the reference, to the dollar


@pytest.mark.parametrize(
    ("name", "lines", "total", "asked"),
    [
        # QLoRA 80 h x 0.23 = 18.4; tests 60 h = 13.8; 2 x 200 h x 0.175 = 70; 220 GB x 0.018 = 3.96; 50 GB x 0.087 up
        ("dev-2k", [18, 14, 70, 4, 5, 10], 121, 150),
        # 120 h x 1.15 = 138; 60 h = 69; 250 GB = 4.5, halves go up
        ("dev-32k", [138, 69, 70, 5, 5, 10], 297, 360),
        # 720 h x 0.23 = 165.6; 1,000 GB x 0.087
        ("prod-budget", [166, 70, 5, 87, 20, 15], 363, 400),
        ("prod-standard", [828, 70, 5, 87, 20, 15], 1025, 1200),
        # 22,200 a year / 12 = 1,850
        ("prod-enterprise", [1850, 4, 87, 20, 30], 1991, 2000),
    ],
)
def test_the_reference_prices_reproduce_each_published_budget(
    name: str, lines: list[int], total: int, asked: int
) -> None:
    budget = published(name)
    assert [line.amount for line in budget.lines] == lines
    assert budget.total == total
    assert budget.requested == asked
    assert budget.requested_per_quarter == 3 * asked
    assert budget.requested_per_year == 12 * asked
    assert not budget.unpriced


def test_the_rounding_rule_is_stated_in_the_budget() -> None:
    assert published("dev-2k").rounding == Rounding(round_to=D(1), request_to=D(10), request_up=False)
    # 121 x 1.25 = 151.25 -> 150; 297 x 1.20 = 356.4 -> 360
    assert published("dev-2k").buffer == D("0.25")
    assert published("dev-32k").buffer_amount == 360 - 297


def test_todays_prices_show_a_reason_for_every_difference() -> None:
    for name in scenarios():
        variance = today(name).variance
        assert variance is not None
        assert variance.before_total == published(name).total
        for change in variance.changes:
            assert change.note
            if change.difference:
                assert change.note.startswith(("price ", "quantity ", "counted differently", "another machine"))


def test_todays_dev_32k_by_hand() -> None:
    # 120 h x 0.67877 = 81.45; 60 h = 40.73; 400 h x 0.192 = 76.8; 250 x 0.0184 = 4.6; 50 GB are free
    budget = today("dev-32k")
    assert [line.amount for line in budget.lines][:5] == [81, 41, 77, 5, 0]
    assert budget.variance is not None
    notes = {change.key: change.note for change in budget.variance.changes}
    assert notes["network/egress"] == "counted differently: 50 GB x 0.087 USD, now 50 GB, first 100 free, x 0.087 USD"
    assert notes["monitoring/operations"].startswith("counted differently: a lump sum, now 5 GB of logs; ")
    assert notes["gpu/finetune"] == "price from 1.15 to 0.67877 per hour (as of 2026-07-01)"


def test_an_estimated_price_is_marked_down_to_the_line() -> None:
    lines = {line.key: line for line in today("dev-2k").lines}
    assert lines["gpu/finetune"].estimate
    assert today("dev-2k").prices.estimates >= 1


def test_a_scenario_says_what_it_leaves_out() -> None:
    assert "system nodes" in published("dev-2k").notes[0]


def test_what_if_rows_of_a_scenario_by_hand() -> None:
    rows = {row.change: row for row in published("dev-32k").what_ifs}
    # on demand: 180 h x 3.67: 440.4 -> 440 and 220.2 -> 220, 660 in place of 207
    assert rows["No spot: every GPU machine on demand"].total == 297 - 207 + 660
    # two machines each: 276 + 138
    assert rows["A second replica of every GPU machine"].difference == 207
    # one reservation in place of 207
    assert rows["The same GPU machine, reserved for a year"].total == 297 - 207 + 1850
    # the model ends at 40,960 tokens, and the same A100 holds that
    longer = rows["Contexts twice as long, or the model's longest (40,960 tokens)"]
    assert (longer.difference, longer.note) == (0, "NC24ads_A100_v4 holds it")


def test_an_unknown_scenario_is_refused_with_the_names() -> None:
    with pytest.raises(PlannerError, match="choose one of dev-2k, dev-32k"):
        scenario("dev-3k")


def test_the_figures_rest_on_the_price_sheet_and_nothing_else() -> None:
    assert published("dev-2k").inputs_digest == published("dev-2k").inputs_digest
    assert published("dev-2k").inputs_digest != today("dev-2k").inputs_digest
    assert published("dev-2k").inputs_digest != published("dev-32k").inputs_digest


# --------------------------------------------------------------------------------------------- rounding, by property

amount = st.decimals(min_value=0, max_value=10**7, places=9)
units = st.sampled_from(["0.01", "0.1", "1", "10"])


def line_at(key: int, usd: Decimal | None) -> Line:
    return Line(
        key=f"storage/{key}",
        group="storage",
        label=f"line {key}",
        basis="",
        quantity=D(1),
        unit="month",
        unit_usd=usd,
        low_usd=None if usd is None else usd / 2,
        usd=usd,
        high_usd=None if usd is None else usd * 2,
        formula="",
        provenance=Provenance(source="made up", as_of=date(2026, 11, 1)),
    )


@settings(max_examples=200)
@given(
    amounts=st.lists(st.one_of(st.none(), amount), min_size=1, max_size=12),
    unit=units,
    request_to=st.sampled_from(["1", "10", "50", "100"]),
    up=st.booleans(),
    buffer=st.sampled_from(["0", "0.1", "0.25"]),
)
def test_totals_are_the_sums_of_the_printed_lines(
    amounts: list[Decimal | None], unit: str, request_to: str, up: bool, buffer: str
) -> None:
    draft = Draft(
        name="x",
        title="x",
        subject="x",
        region="eastus",
        lines=tuple(line_at(i, usd) for i, usd in enumerate(amounts)),
        buffer=D(buffer),
    )
    rounding = Rounding(round_to=D(unit), request_to=D(request_to), request_up=up)
    budget = finish(draft, SHEET, Money(rounding=rounding), TODAY)
    printed = [line.amount for line in budget.lines]
    assert budget.total == sum((a for a in printed if a is not None), D(0))
    assert budget.total_low <= budget.total <= budget.total_high
    assert len(budget.unpriced) == printed.count(None) == amounts.count(None)
    for value in printed:
        assert value is None or value % D(unit) == 0
    assert budget.requested % D(request_to) == 0
    assert budget.requested >= budget.total
    assert abs(budget.requested - budget.total * (1 + D(buffer))) <= D(request_to)
    # the JSON twin says the same, digit by digit
    assert read_budget(budget.model_dump_json(), "twin") == budget


def test_another_currency_is_converted_before_rounding() -> None:
    draft = Draft(name="x", title="x", subject="x", region="eastus", lines=(line_at(1, D(100)),), buffer=D(0))
    rate = SHEET.exchange_rate("EUR")
    budget = finish(draft, SHEET, Money(currency="EUR", rate=rate), TODAY)
    # 100 USD x 0.8587
    assert budget.total == D("85.87")
    assert budget.currency == "EUR"


def test_a_currency_without_a_rate_is_refused() -> None:
    with pytest.raises(PlannerError, match="no exchange rate in the price sheet 2026-11: use USD, EUR"):
        SHEET.exchange_rate("XXX")


# -------------------------------------------------------------------------------------------------- a plan's budget


def plan_budget(**fields: Any) -> Budget:
    base = {
        "model": "qwen3-8b",
        "workloads": [
            {"kind": "finetune", "context": 8192, "schedule": "80h"},
            {"kind": "serve", "context": 8192, "schedule": "60h"},
        ],
    }
    intent = parse_intent(base | fields, "test")
    plan = make_plan(intent, SHEET)
    return finish(draft_of_plan("dev", intent, plan, SHEET), SHEET, Money(), TODAY)


def test_a_plans_budget_has_the_plans_lines() -> None:
    budget = plan_budget()
    keys = [line.key for line in budget.lines]
    assert keys[:2] == ["gpu/finetune", "gpu/serve"]
    assert "platform/system-nodes" in keys
    assert len(keys) == len(set(keys))


def test_every_assumption_has_an_owner_and_a_person_may_take_a_role() -> None:
    budget = plan_budget(owners={"platform engineer": "Ada Lovelace"})
    assert all(row.owner and row.source and row.value for row in budget.assumptions)
    assert "Ada Lovelace" in {row.owner for row in budget.assumptions}
    assert "platform engineer" not in {row.owner for row in budget.assumptions}


def test_what_ifs_are_planned_anew() -> None:
    rows = {row.change: row for row in plan_budget().what_ifs}
    assert list(rows) == [
        "No spot: every GPU machine on demand",
        "Contexts twice as long, or the model's longest (16,384 tokens)",
        "A second replica of each server",
        "Servers left running around the clock",
        "The same GPU machines, reserved for a year",
    ]
    dearer = rows["No spot: every GPU machine on demand"].difference
    assert dearer is not None
    assert dearer > 0


def test_a_model_at_its_longest_context_has_no_longer_one() -> None:
    rows = plan_budget(workloads=[{"kind": "serve", "context": 40960, "schedule": "60h"}]).what_ifs
    assert not any(row.change.startswith("Contexts") for row in rows)


def test_a_what_if_that_cannot_be_planned_says_why() -> None:
    workloads = [{"kind": "serve", "context": 8192, "schedule": "60h"}]
    budget = plan_budget(workloads=workloads, skus=["NC24ads_A100_v4"], quota={"*": {"family_vcpus": {A100: 0}}})
    without_spot = next(row for row in budget.what_ifs if row.change.startswith("No spot"))
    assert without_spot.total is None
    assert "no plan fits the intent" in without_spot.note


def test_the_reserved_what_if_counts_the_disks_of_machines_that_stay() -> None:
    budget = plan_budget(skus=["NC24ads_A100_v4"], take_turns=True)
    row = next(row for row in budget.what_ifs if row.change.startswith("The same GPU machines"))
    lines = {line.key: line.amount or D(0) for line in budget.lines}
    # one machine: 1,752.75 in place of the two spot lines; its disk all month: 3 x 19.71 = 59.13 in all
    spot = lines["gpu/finetune"] + lines["gpu/serve"]
    assert row.total == budget.total - spot + D("1752.75") - lines["platform/os-disks"] + D("59.13")


def test_the_ways_to_buy_cost_what_the_lines_cost() -> None:
    budget = plan_budget(skus=["NC24ads_A100_v4"], take_turns=True)
    spot = next(way for way in budget.commitments[0].ways if way.priority == "spot")
    lines = sum(line.amount for line in budget.lines if line.group == "compute" and line.amount)
    assert abs(spot.usd_per_month - lines) <= D("0.02")


def test_around_the_clock_nobody_takes_turns() -> None:
    budget = plan_budget(take_turns=True)
    row = next(row for row in budget.what_ifs if row.change == "Servers left running around the clock")
    assert row.total is not None
    assert row.total > budget.total


def test_the_request_is_never_below_the_cost() -> None:
    # 4.00 without a buffer would go down to 0 at the nearest 10
    draft = Draft(name="x", title="x", subject="x", region="eastus", lines=(line_at(1, D(4)),), buffer=D(0))
    budget = finish(draft, SHEET, Money(), TODAY)
    assert (budget.total, budget.requested, budget.buffer_amount) == (4, 10, 6)


def test_budgets_in_two_currencies_are_not_compared() -> None:
    rate = SHEET.exchange_rate("EUR")
    draft = Draft(name="x", title="x", subject="x", region="eastus", lines=(line_at(1, D(100)),), buffer=D(0))
    euros = finish(draft, SHEET, Money(currency="EUR", rate=rate), TODAY)
    with pytest.raises(PlannerError, match="is in EUR and this one in USD"):
        finish(draft, SHEET, Money(), TODAY, euros)


def test_another_region_is_the_reason_where_it_is() -> None:
    budget = scenario_budget("dev-2k", SHEET, Money(), TODAY, "westeurope")
    assert budget.variance is not None
    notes = {change.key: change.note for change in budget.variance.changes}
    assert notes["storage/blob"].startswith("another region: eastus, now westeurope; price from 0.018")


def test_an_unpriced_line_makes_the_total_a_lower_bound_and_never_zero() -> None:
    budget = plan_budget(posture="prod")
    assert budget.unpriced == ("security/defender",)
    line = next(line for line in budget.lines if line.key == "security/defender")
    assert line.amount is None


def test_above_what_was_approved_is_seen() -> None:
    assert plan_budget(approved_usd_per_month=1).over_approved
    assert not plan_budget(approved_usd_per_month=100_000).over_approved


def test_the_memory_curve_rises_and_its_steps_follow_each_other() -> None:
    for curve in plan_budget().memory:
        contexts = [point.context for point in curve.points]
        assert contexts == sorted(contexts)
        assert contexts[-1] == 40960
        for before, after in zip(curve.steps, curve.steps[1:], strict=False):
            assert after.from_tokens == before.to_tokens + 1


def test_commitment_advice_by_hand() -> None:
    def ways(hours: int) -> Any:
        return alternatives(SHEET, "Standard_NC24ads_A100_v4", "eastus", D(hours))

    # spot for 730 h is 495.5 and a reservation 1,752.75: never
    assert "never below spot" in advice(ways(730), D(730), "spot")
    # spot is no way where it is not allowed
    assert "spot" not in advice(ways(730), D(730), "on-demand")
    # 730 x 3.673 - 1,752.75 = 928.54
    committed = advice(ways(730), D(730), "reserved-1y")
    assert committed.startswith("The budget already commits: reserved, 1 year. That saves 928.54 USD a month")
    without_spot = tuple(way for way in ways(730) if way.priority != "spot")
    # 730 x 3.673 = 2,681.29; - 1,752.75 = 928.54
    assert "saves 928.54 USD a month" in advice(without_spot, D(730), "on-demand")
    few = tuple(way for way in ways(100) if way.priority != "spot")
    assert "pays from 477 hours: do not commit" in advice(few, D(100), "on-demand")
    assert "get a quote first" in advice(few, D(100), "on-demand")
    assert "No one-year price" in advice((), D(100), "on-demand")


# --------------------------------------------------------------------------------------------------------- variance


def test_variance_tells_a_price_from_a_quantity_from_a_new_line() -> None:
    before = plan_budget()
    other = plan_budget(
        workloads=[
            {"kind": "finetune", "context": 8192, "schedule": "160h"},
            {"kind": "serve", "context": 8192, "schedule": "60h"},
        ],
        developers={"count": 1},
    )
    intent = parse_intent(
        {"model": "qwen3-8b", "workloads": [{"kind": "serve", "context": 8192, "schedule": "60h"}]}, "test"
    )
    after = finish(draft_of_plan("dev", intent, make_plan(intent, SHEET), SHEET), SHEET, Money(), TODAY, before)
    assert after.variance is not None
    notes = {change.key: change.note for change in after.variance.changes}
    assert notes["gpu/finetune"] == "no longer there"
    assert notes["gpu/serve"] == "the same"
    differences = [change.difference for change in after.variance.changes]
    assert sum((d for d in differences if d is not None), D(0)) == after.total - before.total
    assert {line.key for line in other.lines} - {line.key for line in before.lines} == {
        "people/developer-machines",
        "people/developer-disks",
    }


@pytest.mark.parametrize("text", ["", "nonsense", "{}", '{"schema_version": "tonnage.size/1"}', "[1]"])
def test_what_is_not_a_budget_is_refused_in_one_sentence(text: str) -> None:
    with pytest.raises(PlannerError, match="is not a budget") as refusal:
        read_budget(text, "old.json")
    assert "\n" not in str(refusal.value)


def test_assumptions_of_the_catalog_are_printed_with_their_range() -> None:
    row = supposed(("evictions_per_hour",), {})[0]
    assert row.value == "0.025 to 0.2, expected 0.05 (evictions an hour)"
    assert row.owner == "platform engineer"
