"""Make or buy: the arithmetic, against sums done by hand."""

from __future__ import annotations

from decimal import Decimal
from typing import Any

import pytest

from planner.catalog.prices import load_sheet
from planner.compare import Comparison, Demand, compare, demand_of, parse_api, parse_speeds, parse_usd, stated_server
from planner.errors import PlannerError
from planner.plan import make_plan, parse_intent

D = Decimal
SHEET = load_sheet("2026-11")


def demand(tokens: str = "5e9", api: str = "10", share: str = "0.75", utilization: str = "0.5") -> Demand:
    return demand_of(tokens_per_month=tokens, input_share=share, api=api, utilization=utilization)


def compared(speeds: dict[str, Decimal] | None = None, wanted: Demand | None = None, **fields: Any) -> Comparison:
    intent = parse_intent(
        {
            "model": "qwen3-8b",
            "workloads": [{"kind": "serve", "context": 8192, "settings": {"quantization": "awq"}}],
            "pricing": {"spot": False},
            **fields,
        },
        "test",
    )
    return compare(wanted or demand(), intent, make_plan(intent, SHEET), SHEET, speeds or {})


def test_five_billion_tokens_at_ten_dollars_a_million_are_fifty_thousand() -> None:
    assert demand().api_usd_per_month == 50_000


def test_input_and_output_are_weighed_by_their_share() -> None:
    # 0.75 x 0.15 + 0.25 x 0.60 = 0.2625 a million
    assert demand(api="0.15,0.60").api_usd_per_million == D("0.2625")


def test_small_cards_serve_them_for_a_few_thousand() -> None:
    # T4 at 300 tokens a second and 60 % load: 5e9 / (180 x 2,628,000) = 10.57, so 11 machines x 0.526 x 730 = 4,223.78
    made = compared({"NC4as_T4_v3": D(300)}, demand(utilization="0.6"))
    row = made.rows[0]
    assert (row.size, row.machines) == ("NC4as_T4_v3", 11)
    # and the cluster around them with the metrics and logs of 11 machines more: 8,030 h / 24 x 0.15 GB of logs x 2.76
    # = 138.52, and 8,030 h x 1,900 series x 120 / 10^7 x 0.16 = 29.29
    assert row.total_usd_per_month is not None
    beside = row.total_usd_per_month - D("4223.780") - made.cluster_usd_per_month
    assert float(beside) == pytest.approx(138.52 + 29.29, abs=0.1)
    assert 4_000 < row.total_usd_per_month < 5_000 < made.api_usd_per_month
    assert row.pays
    assert row.usd_per_million is not None
    assert float(row.usd_per_million) == pytest.approx(float(row.total_usd_per_month) / 5000, rel=1e-4)


def test_a_server_at_3500_breaks_even_with_five_dollars_a_million_near_23_million_tokens_a_day() -> None:
    made = stated_server(demand(tokens="700M", api="5"), parse_usd("$3,500"))
    # 3,500 / 5 = 700 million tokens a month / 30.42 days = 23.01 million a day
    assert round(made.rows[0].break_even_tokens_per_day / 10**6, 2) == D("23.01")
    assert "($3,500.00 + $0.00) / $5 a million / 30.42 days = 23.01 million tokens a day" in made.rows[0].arithmetic
    # 700 million / 2,628,000 s = 266.4 a second
    assert round(made.rows[0].break_even_tokens_per_second, 1) == D("266.4")


def test_the_break_even_counts_the_cluster_once() -> None:
    made = compared()
    row = next(row for row in made.rows if row.size == "NC24ads_A100_v4")
    # (3.673 x 730 + its disk 19.71 + 730 h of logs 12.59 and metrics 2.66 + cluster) / 10 a million / (730 / 24 days)
    own = D("3.673") * 730 + D("19.71") + D("12.59") + D("2.66")
    expected = (own + made.cluster_usd_per_month) / 10 * 10**6 / (D(730) / 24)
    assert float(row.break_even_tokens_per_day) == pytest.approx(float(expected), rel=1e-4)
    assert row.machines is None
    assert row.total_usd_per_month is None


def test_a_machine_that_earns_less_than_it_costs_never_pays() -> None:
    made = compared({"NC24ads_A100_v4": D(1)})
    row = next(row for row in made.rows if row.size == "NC24ads_A100_v4")
    assert row.break_even_machines is None
    assert row.break_even_tokens_per_day is None
    assert row.arithmetic.startswith("never: ")
    assert not row.pays


def test_a_price_of_a_fraction_of_a_cent_is_printed_as_it_is() -> None:
    made = stated_server(demand(tokens="5e9", api="0.15,0.60"), parse_usd("3500"))
    # 0.75 x 0.15 + 0.25 x 0.60 = 0.2625; 5,000 x 0.2625 = 1,312.50
    assert made.arithmetic[0] == "API: 0.75 x $0.15 + 0.25 x $0.6 = $0.2625 a million tokens"
    assert made.arithmetic[1] == "API: 5,000 million tokens x $0.2625 = $1,312.50 a month"


def test_the_break_even_is_where_the_machines_can_answer_what_the_api_bills() -> None:
    # T4 at 400 tokens a second, fully loaded, answers 400 x 2.628 = 1,051 million, 315.36 at 0.30, a month and costs
    # 383.98 on demand, so never; on spot 108.90 and 15.25 of logs and metrics: with the cluster's 364.37 two are enough
    wanted = demand(tokens="10e9", api="0.30", utilization="1")
    made = compared({"": D(400)}, wanted, skus=["NC4as_T4_v3"], pricing={"spot": True})
    rows = {row.priority: row for row in made.rows}
    assert rows["on-demand"].break_even_machines is None
    assert rows["spot"].break_even_machines == 2
    assert rows["spot"].pays


def test_without_a_speed_the_comparison_says_what_is_missing() -> None:
    assert any("--tokens-per-second" in note for note in compared().notes)
    assert not any("--tokens-per-second" in note for note in compared({"NC24ads_A100_v4": D(2500)}).notes)


def test_every_way_that_is_allowed_has_a_row() -> None:
    made = compared(skus=["NC24ads_A100_v4"], pricing={"spot": True, "commitments": ["reserved-1y"]})
    assert {row.priority for row in made.rows} == {"on-demand", "spot", "reserved-1y"}


def test_several_sizes_do_not_share_one_speed() -> None:
    with pytest.raises(PlannerError, match="do not share one speed"):
        compared({"": D(100)})
    assert compared({"": D(100)}, skus=["NC24ads_A100_v4"]).rows[0].machines is not None


def test_a_speed_of_a_size_that_does_not_hold_the_model_is_refused() -> None:
    with pytest.raises(PlannerError, match="NV6ads_A10_v5 does not hold"):
        compared({"NV6ads_A10_v5": D(100)})


@pytest.mark.parametrize(
    ("text", "value"), [("0.15,0.60", ("0.15", "0.60")), ("5", ("5", "5")), (" 1 , 2 ", ("1", "2"))]
)
def test_a_token_price_is_one_or_two_figures(text: str, value: tuple[str, str]) -> None:
    assert parse_api(text) == (D(value[0]), D(value[1]))


@pytest.mark.parametrize("text", ["", "cheap", "1,2,3", "-1", "0", "0,0", "nan", "inf,1"])
def test_what_is_not_a_token_price_is_refused(text: str) -> None:
    with pytest.raises(PlannerError, match="is not a token price"):
        parse_api(text)


@pytest.mark.parametrize(
    ("text", "value"), [("5e9", 5_000_000_000), ("300M", 300_000_000), ("5_000", 5000), ("2B", 2 * 10**9)]
)
def test_tokens_are_written_as_people_do(text: str, value: int) -> None:
    assert demand(tokens=text).tokens_per_month == value


@pytest.mark.parametrize(
    ("fields", "flag"),
    [
        ({"tokens": "0"}, "--tokens-per-month"),
        ({"share": "1.5"}, "--input-share"),
        ({"utilization": "0"}, "--utilization"),
    ],
)
def test_a_demand_that_cannot_be_is_refused_by_its_option(fields: dict[str, str], flag: str) -> None:
    with pytest.raises(PlannerError, match=flag):
        demand(**fields)


def test_an_api_that_costs_nothing_is_refused() -> None:
    with pytest.raises(PlannerError, match="costs nothing"):
        demand(api="0,1", share="1")


@pytest.mark.parametrize("text", ["1e30", "-5", "nan", "1e-5000", "1e999999999"])
def test_a_number_beyond_all_sense_is_refused(text: str) -> None:
    with pytest.raises(PlannerError):
        demand(tokens=text)
    with pytest.raises(PlannerError):
        parse_usd(text)


@pytest.mark.parametrize("text", ["NC24ads_A100_v4=0", "NC24ads_A100_v4=fast", "NC999=100"])
def test_a_speed_that_is_none_is_refused(text: str) -> None:
    with pytest.raises(PlannerError):
        parse_speeds([text])
