"""Schedules, spot's expected cost, and lines of a bill, each against arithmetic done by hand."""

from __future__ import annotations

from decimal import Decimal
from math import exp, inf, sqrt

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from planner.catalog.prices import PriceSheet, load_sheet, parse_sheet
from planner.cost.cluster import Cluster, Developers, GpuLoad, Kept, Storage, cluster_lines
from planner.cost.lines import Line, alternatives, figure, meter_line, total, vm_line
from planner.cost.schedule import parse_schedule
from planner.cost.spot import (
    SpotRisk,
    checkpoint_interval_hours,
    hours_between_evictions,
    run_factor,
    serving_overhead,
    training_overhead,
)
from planner.errors import PlannerError
from planner.units import format_usd, money_figure, round_money

D = Decimal


def sheet_of(*offers: tuple[str, str, str, str], meters: str = "") -> PriceSheet:
    """A sheet with those offers (size, region, priority, USD) and nothing else."""
    rows = ",".join(f'["{a}","{b}","{c}","{d}","s"]' for a, b, c, d in offers)
    text = (
        '{"schema_version": "tonnage.prices/1", "name": "test", "currency": "USD",'
        ' "sources": {"s": {"source": "made up", "as_of": "2026-11-01"}},'
        f' "offers": [{rows}], "meters": [{meters}]}}'
    )
    return parse_sheet(text.encode(), "test")


# ------------------------------------------------------------------------------------------------------- schedules


@pytest.mark.parametrize(
    ("text", "hours"),
    [
        ("always", "730"),
        ("24x7", "730"),
        ("80h", "80"),
        ("80", "80"),
        ("62.5 hours", "62.5"),
        ("0h", "0"),
        # 5 days x 10 h = 50 h of the week's 168; 50 x 730 / 168 = 217.2619
        ("mon-fri 08:00-18:00", "217.2619"),
        # all seven days, whole days: 168 h a week
        ("mon-sun 00:00-24:00", "730"),
        # past midnight: Friday 22:00 to Saturday 02:00 is 4 h; 4 x 730 / 168 = 17.3810
        ("fri 22:00-02:00", "17.3810"),
        # windows that overlap count once: 08-18 and 16-20 is 12 h; 12 x 730 / 168 = 52.1429
        ("mon 08:00-18:00; mon 16:00-20:00", "52.1429"),
        # a range may wrap round the week: Saturday to Monday is three days of one hour
        ("sat-mon 10:00-11:00", "13.0357"),
    ],
)
def test_a_schedule_is_hours_of_a_month(text: str, hours: str) -> None:
    assert round(parse_schedule(text).hours_per_month(), 4) == D(hours)


def test_sunday_night_wraps_into_monday() -> None:
    # Sunday 23:00 to 01:00 and Monday 00:00 to 01:00 overlap in one hour: 2 h of the week in all
    assert parse_schedule("sun 23:00-01:00; mon 00:00-01:00").week_minutes == 120


@pytest.mark.parametrize(
    ("text", "starts_a_week"),
    [
        ("always", 0),
        ("0h", 0),
        ("80h", 5),
        ("mon-fri 08:00-18:00", 5),
        ("mon 08:00-12:00; mon 12:00-18:00", 1),  # one runs into the other
        ("mon-fri 00:00-24:00", 1),
        ("mon-sun 00:00-24:00", 0),  # never off
        ("sun 23:00-01:00; mon 00:00-02:00", 1),
    ],
)
def test_a_schedule_starts_where_no_other_window_runs_into_it(text: str, starts_a_week: int) -> None:
    assert parse_schedule(text).starts_per_month == D(730) / 168 * starts_a_week


@pytest.mark.parametrize(
    "text", ["", "often", "80 days", "-5h", "mon 8-18", "xyz 08:00-18:00", "mon 25:00-26:00", "mon 08:70-09:00", "731h"]
)
def test_what_is_not_a_schedule_is_refused_in_one_sentence(text: str) -> None:
    with pytest.raises(PlannerError) as refusal:
        parse_schedule(text)
    assert "\n" not in str(refusal.value)


# ------------------------------------------------------------------------------------------------------------ spot


def test_hours_between_evictions_follow_from_the_chance_in_an_hour() -> None:
    # -1 / ln(1 - 0.05) = 19.4957
    assert hours_between_evictions(0.05) == pytest.approx(19.4957, abs=1e-4)
    assert hours_between_evictions(0) == inf


@pytest.mark.parametrize("chance", [-0.1, 1, 2])
def test_a_chance_that_is_no_share_is_refused(chance: float) -> None:
    with pytest.raises(PlannerError, match="not a share"):
        hours_between_evictions(chance)


def test_dalys_interval_by_hand() -> None:
    # d = 0.01 h, M = 20 h: sqrt(2 d M) = sqrt(0.4) = 0.632456; d / 2M = 0.00025, its root 0.0158114
    # 0.632456 x (1 + 0.0052705 + 0.0000278) - 0.01 = 0.625806
    assert checkpoint_interval_hours(0.01, 20) == pytest.approx(0.625806, abs=1e-5)
    # Young's sqrt(2 d M) is close to it for rare evictions
    assert checkpoint_interval_hours(0.001, 1000) == pytest.approx(sqrt(2), rel=0.01)


def test_checkpoints_longer_than_the_time_between_evictions_leave_one_interval_of_that_time() -> None:
    assert checkpoint_interval_hours(50, 20) == 20


def test_without_evictions_no_checkpoint_is_needed() -> None:
    assert checkpoint_interval_hours(0.01, inf) == inf
    assert run_factor(inf, 0.01, 0.1, inf) == 1


def test_the_factor_on_hours_by_hand() -> None:
    # t = 1, d = 0.1, R = 0.2, M = 10: 10 e^0.02 (e^0.11 - 1) = 10 x 1.0202013 x 0.1162781 = 1.186271
    assert run_factor(1, 0.1, 0.2, 10) == pytest.approx(1.186271, abs=1e-6)
    assert run_factor(1, 0.1, 0.2, 10) == pytest.approx(10 * exp(0.02) * (exp(0.11) - 1))


def test_the_factor_agrees_with_a_simulation_of_evictions() -> None:
    # runs of 200 segments; evictions as a Poisson process of mean 5 h; work since the last checkpoint is done again
    t, d, restart, mean = 0.8, 0.05, 0.3, 5.0
    rng = np.random.default_rng(7)
    segments, wall = 40_000, 0.0
    for _ in range(segments):
        # Daly: each attempt costs the restart first once it follows an eviction, and may be evicted while restarting
        need = t + d
        left = rng.exponential(mean)
        while left < need:
            wall += left
            need = t + d + restart
            left = rng.exponential(mean)
        wall += need
    # the closed form counts every segment's restart as if it were exposed the same way: within 2 %
    assert wall / (segments * t) == pytest.approx(run_factor(t, d, restart, mean), rel=0.02)


@given(
    chance=st.floats(0.001, 0.5),
    checkpoint=st.floats(0.0005, 0.5),
    restart=st.floats(0, 1),
    other=st.floats(0.05, 20),
)
def test_no_other_interval_is_much_cheaper_than_the_chosen_one(
    chance: float, checkpoint: float, restart: float, other: float
) -> None:
    mean = hours_between_evictions(chance)
    best = checkpoint_interval_hours(checkpoint, mean)
    if checkpoint >= mean / 2:  # outside the range for which Daly derived it
        return
    cost = run_factor(best, checkpoint, restart, mean)
    assert cost <= run_factor(best * other, checkpoint, restart, mean) * 1.005
    assert cost >= 1


def test_a_run_that_would_never_end_is_refused() -> None:
    with pytest.raises(PlannerError, match="avoid spot"):
        run_factor(1000, 1, 1, 1)


RISK = SpotRisk(evictions_per_hour=(D(0), D("0.05"), D("0.2")), restart_hours=(D(0), D("0.25"), D("0.5")))


def test_training_overhead_rises_from_low_to_high() -> None:
    overhead = training_overhead(RISK, (0.01, 0.01, 0.01))
    low, expected, high = overhead.factor
    assert 1 <= low < expected < high
    # Young's interval: sqrt(2 x 0.01 x 19.4957) = 0.6244; Daly's is a little off it
    assert float(overhead.interval_hours or 0) == pytest.approx(0.6244, rel=0.02)


def test_a_slower_checkpoint_shows_in_the_high_figure() -> None:
    same = training_overhead(RISK, (0.01, 0.01, 0.01)).factor
    slower = training_overhead(RISK, (0.01, 0.01, 0.05)).factor
    assert slower[:2] == same[:2]
    assert slower[2] > same[2]


def test_evictions_that_are_only_feared_still_have_an_interval() -> None:
    risk = SpotRisk(evictions_per_hour=(D(0), D(0), D("0.05")), restart_hours=(D(0), D(0), D("0.25")))
    overhead = training_overhead(risk, (0.01, 0.01, 0.01))
    assert overhead.interval_hours is not None
    assert overhead.factor[2] > overhead.factor[1] > 1


def test_a_server_is_away_while_it_restarts_and_its_bill_stays_the_same() -> None:
    # 0.25 / (19.4957 + 0.25) = 0.012661; without evictions never
    overhead = serving_overhead(RISK)
    assert overhead.away[:2] == (D(0), D("0.012661"))
    assert overhead.factor == (1, 1, 1)
    spot = vm_line(SHEET, **VM, priority="spot", count=1, hours=D(100), overhead=overhead)  # type: ignore[arg-type]
    assert spot.low_usd == spot.usd == spot.high_usd == D("67.877")
    # of 100 hours 1.2661 are paid while nothing answers
    assert spot.idle_usd == D("0.67877") * D("1.2661")


# ----------------------------------------------------------------------------------------------------------- lines

SHEET = sheet_of(
    ("Standard_NC24ads_A100_v4", "eastus", "on-demand", "3.673"),
    ("Standard_NC24ads_A100_v4", "eastus", "spot", "0.67877"),
    ("Standard_NC24ads_A100_v4", "eastus", "reserved-1y", "21033"),
    ("Standard_NC24ads_A100_v4", "eastus", "savings-plan-1y", "3.0574"),
)
VM = {"key": "gpu/x", "label": "x", "sku": "Standard_NC24ads_A100_v4", "region": "eastus"}


def line_of(priority: str, count: int = 1, hours: str = "100") -> Line:
    return vm_line(SHEET, **VM, priority=priority, count=count, hours=D(hours))  # type: ignore[arg-type]


def test_hours_are_paid_by_the_hour() -> None:
    # 2 x 100 h x 3.673 = 734.60
    assert line_of("on-demand", count=2).usd == D("734.600")


def test_a_reservation_is_paid_all_month_whether_used_or_not() -> None:
    # the term's total / 12: 21,033 / 12 = 1,752.75; of its 730 hours 630 are idle: 1,752.75 x 630 / 730 = 1,512.65
    line = line_of("reserved-1y")
    assert round(line.usd or D(0), 6) == D("1752.75")
    assert round(line.idle_usd, 2) == D("1512.65")


def test_a_savings_plan_is_paid_all_month_too() -> None:
    assert line_of("savings-plan-1y").usd == D("3.0574") * 730


def test_a_price_that_is_missing_is_not_zero() -> None:
    line = line_of("reserved-3y")
    assert (line.usd, line.low_usd, line.high_usd, line.unit_usd) == (None, None, None, None)
    assert line.note == "not priced in eastus: reserved, 3 years"
    assert total((line, line_of("on-demand"))) == D("367.300")


def test_evictions_stretch_spot_alone() -> None:
    overhead = training_overhead(RISK, (0.01, 0.01, 0.01))
    spot = vm_line(SHEET, **VM, priority="spot", count=1, hours=D(100), overhead=overhead)  # type: ignore[arg-type]
    on_demand = vm_line(SHEET, **VM, priority="on-demand", count=1, hours=D(100), overhead=overhead)  # type: ignore[arg-type]
    assert spot.usd == D("0.67877") * 100 * overhead.factor[1]
    assert spot.low_usd is not None
    assert spot.high_usd is not None
    assert spot.low_usd < (spot.usd or 0) < spot.high_usd
    assert on_demand.low_usd == on_demand.usd == on_demand.high_usd == D("367.300")


def test_break_even_hours_by_hand() -> None:
    ways = {way.priority: way for way in alternatives(SHEET, "Standard_NC24ads_A100_v4", "eastus", D(100))}
    # 1,752.75 a month / 3.673 an hour = 477.2 hours; on spot 730 x 0.67877 = 495.50 never reaches 1,752.75
    assert round(ways["reserved-1y"].break_even_hours or 0, 1) == D("477.2")
    assert ways["reserved-1y"].break_even_hours_against_spot is None
    # 3.0574 x 730 / 3.673 = 607.7
    assert round(ways["savings-plan-1y"].break_even_hours or 0, 1) == D("607.7")
    assert ways["spot"].usd_per_month == D("67.877")
    assert ways["on-demand"].break_even_hours is None


TIERED = """{"name": "egress", "region": "*", "unit": "GB", "tiers": [["0","0"],["100","0.087"],["10335","0.083"]],
 "source": "s"}"""


@pytest.mark.parametrize(
    ("gigabytes", "usd"),
    [
        ("50", "0"),
        ("100", "0"),
        ("1000", "78.300"),  # 900 x 0.087
        ("11335", "973.445"),  # 10,235 x 0.087 + 1,000 x 0.083
    ],
)
def test_tiers_are_paid_each_at_its_own_price(gigabytes: str, usd: str) -> None:
    line = meter_line(
        sheet_of(meters=TIERED),
        key="network/egress",
        label="x",
        basis="",
        meter="egress",
        region="eastus",
        units=D(gigabytes),
        service="Bandwidth",
    )
    assert line.usd == D(usd)


def test_a_service_without_a_price_is_unpriced() -> None:
    line = meter_line(
        SHEET,
        key="network/nat",
        label="x",
        basis="",
        meter="nat-gateway",
        region="eastus",
        units=D(1),
        service="NAT Gateway",
    )
    assert line.usd is None
    assert "nat-gateway" in line.note


# --------------------------------------------------------------------------------------------------------- cluster


def cluster(posture: str, **changes: object) -> dict[str, Line]:
    fields: dict[str, object] = {
        "cluster": Cluster(),
        "storage": Storage(),
        "developers": Developers(),
        "kept": Kept(),
        "load": GpuLoad(),
    }
    lines = cluster_lines(load_sheet("2026-11"), "eastus2", posture=posture, **(fields | changes))  # type: ignore[arg-type]
    return {line.key: line for line in lines}


def test_system_nodes_run_all_month() -> None:
    # eastus2: 2 x 730 h x 0.192 = 280.32 in development, three nodes in production
    assert cluster("dev")["platform/system-nodes"].usd == D("280.320")
    assert cluster("prod")["platform/system-nodes"].usd == D("420.480")


def test_soft_deleted_checkpoints_are_billed_while_they_linger() -> None:
    # 100 checkpoints of 1 GB a month, 2 kept: 98 deleted x 7 days / 30.4167 = 22.5534 GB at 0.0184 = 0.41498
    kept = Kept(checkpoint_bytes=1 << 30, checkpoints_written=D(100))
    lines = cluster("dev", kept=kept)
    assert round(lines["storage/soft-deleted"].quantity, 4) == D("22.5534")
    assert round(lines["storage/soft-deleted"].usd or 0, 5) == D("0.41498")
    # the two that are kept: 2 GB x 0.0184
    assert lines["storage/checkpoints"].usd == D("0.0368")


def test_what_is_kept_longer_than_a_month_piles_up() -> None:
    # 98 a month x 365 days / 30.4167 = 1,176 of them at a time
    kept = Kept(checkpoint_bytes=1 << 30, checkpoints_written=D(100))
    lines = cluster("dev", kept=kept, storage=Storage(soft_delete_days=365))
    assert round(lines["storage/soft-deleted"].quantity, 4) == 1176


def test_each_kind_of_data_lies_in_the_tier_that_is_asked_for() -> None:
    # 10 GB of data cool at 0.01 in eastus2
    lines = cluster("dev", storage=Storage(datasets_tier="cool"))
    assert lines["storage/datasets"].usd == D("0.1")


def test_no_soft_delete_means_no_line() -> None:
    kept = Kept(checkpoint_bytes=1 << 30, checkpoints_written=D(100))
    assert "storage/soft-deleted" not in cluster("dev", kept=kept, storage=Storage(soft_delete_days=0))


def test_metrics_follow_from_series_and_scrape_interval() -> None:
    # 2 system nodes x 730 h x 1,500 series x 120 scrapes an hour = 262.8 million samples = 26.28 x 0.16 USD = 4.2048
    line = cluster("dev")["monitoring/metrics"]
    assert line.quantity == D("26.28")
    assert line.usd == D("4.2048")
    # four times as often, four times the cost
    fast = cluster("dev", cluster=Cluster(scrape_interval_seconds=15))["monitoring/metrics"]
    assert fast.usd == D("8.4096")


def test_the_first_five_gigabytes_of_logs_are_free() -> None:
    # 2 nodes x 730 h / 24 x 0.15 GB = 9.125 GB; (9.125 - 5) x 2.76 = 11.385
    assert cluster("dev")["monitoring/logs"].usd == D("11.385")
    assert cluster("dev", cluster=Cluster(log_gb_per_month=D(4)))["monitoring/logs"].usd == 0


def test_production_adds_private_endpoints_and_what_nobody_priced() -> None:
    lines = cluster("prod")
    # 3 endpoints x 730 h x 0.01 = 21.90
    assert lines["network/private-endpoints"].usd == D("21.90")
    assert lines["security/defender"].usd is None
    assert "network/private-endpoints" not in cluster("dev")


def test_every_priced_line_says_where_its_price_comes_from() -> None:
    for posture in ("dev", "prod"):
        for line in cluster(posture, developers=Developers(count=2)).values():
            assert line.formula
            if line.priced:
                assert line.provenance is not None
                assert line.provenance.source


# ----------------------------------------------------------------------------------------------------------- money


def test_money_rounds_half_up_as_accountants_do() -> None:
    assert round_money(D("4.5"), D(1)) == 5
    assert round_money(D("356.4"), D(10)) == 360
    assert round_money(D("4.35"), D(1), up=True) == 5
    assert round_money(D("-4.5"), D(1)) == -5


def test_money_is_written_with_thousands_and_the_decimals_of_its_unit() -> None:
    assert format_usd(D("1025")) == "$1,025.00"
    assert format_usd(D("-3.2")) == "-$3.20"
    assert money_figure(D("1024.6"), D(1)) == "1,025"
    assert money_figure(D("1230"), D(10)) == "1,230"
    assert figure(D("0.6787700")) == "0.67877"
    assert figure(D("1200")) == "1,200"
