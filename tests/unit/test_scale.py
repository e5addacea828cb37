"""Machines for a load: replicas, dollars and the band by hand on measured replicas; what must always hold on others."""

from __future__ import annotations

import json
from decimal import Decimal
from functools import cache
from importlib.resources import files
from math import ceil, cos, pi
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from loads import OPTIONS, SHEET, planned, table

from planner.catalog.prices import PriceSheet, parse_sheet
from planner.errors import PlannerError
from planner.scale import ScaleAnswer, read_measured, wanted_from_options
from planner.scale.answer import Choice, Performance
from planner.scale.asked import busiest, parse_seconds
from planner.scale.day import band, read_day, wave
from planner.scale.measured import MeasuredCurve
from planner.scale.replica import Modelled
from planner.size import Span

D = Decimal
A100, A100_PAIR, H100, T4 = "NC24ads_A100_v4", "NC48ads_A100_v4", "NC40ads_H100_v5", "NC4as_T4_v3"


def refusal(**options: Any) -> str:
    with pytest.raises(PlannerError) as refused:
        planned(**options)
    message = str(refused.value)
    assert refused.value.exit_code == 2
    assert "\n" not in message
    return message


# Two loads of one A100: 2 requests a second at 100 and 20 ms, 10 at 300 and 40 ms, 200 tokens out each.
TWO_LOADS = """sku,tp,rate,ttft_ms,tpot_ms,output_tok_s
NC24ads_A100_v4,1,2,100,20,400
NC24ads_A100_v4,1,10,300,40,2000
"""


def measured(folder: Path, text: str = TWO_LOADS, tokens: float = 200) -> tuple[MeasuredCurve, ...]:
    return read_measured(table(folder, text), tokens)


def usd(choice: Choice, priority: str = "on-demand") -> Decimal:
    return next(way.usd_per_month for way in choice.money if way.priority == priority)


# -------------------------------------------------------------------------------------------------------- by hand


def test_replicas_are_the_load_over_what_one_may_take(tmp_path: Path) -> None:
    # TTFT 250 ms is reached at 2 + 8 x 150 / 200 = 8 requests a second, TPOT 36 ms at 2 + 8 x 16 / 20 = 8.4: so 8,
    # and 20 / 8 = 2.5, so 3, which get 6.67 each: 100 + 200 x 4.667 / 8 = 216.7 ms and 20 + 20 x 4.667 / 8 = 31.7 ms
    made = planned(runs=measured(tmp_path), rps=20, ttft_p95="250ms", tpot_p95="36ms")
    (choice,) = made.choices
    assert (choice.machines, choice.replicas, choice.tensor_parallel_size) == (3, 3, 1)
    assert choice.largest_per_s == pytest.approx(8)
    seen = choice.performance
    assert seen.method == "measured"
    assert seen.rate_per_s == pytest.approx(20 / 3)
    assert seen.ttft_p95_s is not None
    assert seen.ttft_p95_s.expected == pytest.approx(0.2167, abs=1e-4)
    assert seen.tpot_p95_s is not None
    assert seen.tpot_p95_s.expected == pytest.approx(0.03167, abs=1e-5)
    assert seen.e2e_p95_s.expected == pytest.approx(0.2167 + 199 * 0.031667, abs=1e-3)
    # Little's law: 6.667 requests a second that take 6.518 s each
    assert seen.in_flight == pytest.approx(43.46, abs=0.02)


def test_dollars_follow_from_machines_and_tokens(tmp_path: Path) -> None:
    # an A100 machine in eastus is 3.673 USD an hour and its disk 19.71 a month, 0.027 an hour: 3 x 3.70 = 11.10 an
    # hour, 8,103 a month; 20 x 200 x 3600 = 14.4 million tokens out an hour and 50.4 million in all
    made = planned(runs=measured(tmp_path), rps=20, ttft_p95="250ms", tpot_p95="36ms")
    way = made.choices[0].bought("on-demand")
    assert way is not None
    assert way.usd_per_hour == D("11.1")
    assert way.usd_per_month == D("8103.00")
    assert way.usd_per_million_output == D("0.7708")
    assert way.usd_per_million_total == D("0.2202")
    # spot: 3 x (0.67877 + 0.027) x 730; reserved for a year: 3 x (21033 / 8760 + 0.027) x 730
    assert usd(made.choices[0], "spot") == D("1545.64")
    assert usd(made.choices[0], "reserved-1y") == D("5317.38")
    assert {way.priority for way in made.choices[0].money} == {
        "on-demand", "spot", "savings-plan-1y", "savings-plan-3y", "reserved-1y",
    }  # fmt: skip


def test_a_machine_with_two_gpus_holds_two_replicas(tmp_path: Path) -> None:
    # 3 replicas need 2 machines of 2, which then run 4: 5 requests a second each
    text = TWO_LOADS.replace("NC24ads_A100_v4", "NC48ads_A100_v4")
    made = planned(runs=measured(tmp_path, text), rps=20, ttft_p95="250ms", tpot_p95="36ms")
    (choice,) = made.choices
    assert (choice.machines, choice.replicas_per_machine, choice.replicas) == (2, 2, 4)
    assert choice.performance.rate_per_s == pytest.approx(5)
    assert usd(choice) == D("10725.16")  # 2 x 7.346 x 730


def test_a_card_that_was_measured_counts_on_every_size_that_has_it(tmp_path: Path) -> None:
    text = TWO_LOADS.replace("sku", "gpu", 1).replace("NC24ads_A100_v4", "a100-80-pcie")
    made = planned(runs=measured(tmp_path, text), rps=20, ttft_p95="250ms", tpot_p95="36ms")
    # 1 x NC96 and 2 x NC48 cost the same: 14.692 x 730; three single ones cost least
    assert [(c.sku.removeprefix("Standard_"), c.machines) for c in made.choices] == [
        (A100, 3), ("NC96ads_A100_v4", 1), (A100_PAIR, 2),
    ]  # fmt: skip


def test_what_a_machine_less_would_mean_is_said(tmp_path: Path) -> None:
    made = planned(runs=measured(tmp_path), rps=20, ttft_p95="250ms", tpot_p95="36ms")
    assert made.choices[0].one_less == (
        "with 2 machines each replica would get 10 requests a second, and the limits are kept up to 8"
    )
    alone = planned(runs=measured(tmp_path), rps=5, ttft_p95="250ms", tpot_p95="36ms")
    assert alone.choices[0].one_less == ""


def test_a_spare_machine_is_paid_and_does_not_help(tmp_path: Path) -> None:
    plain = planned(runs=measured(tmp_path), rps=20, ttft_p95="250ms", tpot_p95="36ms").choices[0]
    spare = planned(runs=measured(tmp_path), rps=20, ttft_p95="250ms", tpot_p95="36ms", spare=1).choices[0]
    assert (spare.machines, spare.replicas) == (plain.machines + 1, plain.replicas)
    assert usd(spare) == D("10804.00")  # 4 x 3.70 x 730
    assert spare.performance == plain.performance


def test_a_run_at_a_concurrency_has_the_rate_of_its_tokens(tmp_path: Path) -> None:
    # 1,000 tokens a second of 200 each are 5 requests a second
    text = "gpu,tp,concurrency,ttft_ms,tpot_ms,output_tok_s\nA100-80GB-PCIe,1,20,200,30,1000\n"
    (curve,) = measured(tmp_path, text)
    assert curve.runs[0].rate_per_s == 5
    assert curve.at(5).ttft_s == pytest.approx(0.2)


def test_nothing_is_said_outside_of_what_was_measured(tmp_path: Path) -> None:
    (curve,) = measured(tmp_path)
    for rate in (1.9, 10.1):
        with pytest.raises(PlannerError, match="was measured from 2 to 10 requests a second, and"):
            curve.at(rate)
    made = planned(runs=(curve,), rps=1)
    assert made.choices == ()
    assert "1 is outside of that: add a run there" in made.rejected[-1].reason
    # limits that are kept at every load are not taken to hold beyond the last one
    kept = planned(runs=(curve,), rps=20, ttft_p95="10s", tpot_p95="10s")
    assert kept.choices[0].largest_per_s == 10


def test_limits_that_the_lowest_load_misses_are_missed(tmp_path: Path) -> None:
    made = planned(runs=measured(tmp_path), rps=20, ttft_p95="90ms", tpot_p95="36ms")
    assert made.choices == ()
    assert made.nearest is not None
    assert made.nearest.reason == f"{A100} (as measured) misses TTFT p95: 100 ms even alone, 90 ms wanted"


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("sku,tp\n", "has no column ttft_ms and no tpot_ms and no output_tok_s"),
        ("rate,ttft_ms,tpot_ms,output_tok_s\n1,1,1,1\n", "says not where or at what load"),
        ("sku,ttft_ms,tpot_ms,output_tok_s\nNC4as_T4_v3,1,1,1\n", "says not where or at what load"),
        ("sku,rate,ttft_ms,tpot_ms,output_tok_s\n", "has no rows"),
        ("sku,rate,ttft_ms,tpot_ms,output_tok_s\nNC4as_T5_v3,1,1,1,200\n", "is not an Azure GPU size"),
        ("sku,rate,ttft_ms,tpot_ms,output_tok_s\nNC4as_T4_v3,1,x,1,200\n", "line 2: ttft_ms is 'x', not a number"),
        ("sku,rate,ttft_ms,tpot_ms,output_tok_s\nNC4as_T4_v3,0,1,1,200\n", "nothing was answered in that run"),
        ("sku,rate,ttft_ms,tpot_ms,output_tok_s\nNC4as_T4_v3,5,1,1,200\n", "leave out overloaded runs"),
        ("sku,gpu,rate,ttft_ms,tpot_ms,output_tok_s\nNC4as_T4_v3,a10,1,1,1,200\n", "NC4as_T4_v3 has no NVIDIA A10"),
        ("gpu,rate,ttft_ms,tpot_ms,output_tok_s\n,1,1,1,200\n", "neither sku nor gpu is filled in"),
        ("gpu,tp,rate,ttft_ms,tpot_ms,output_tok_s\nt4,0,1,1,1,200\n", "tp is 0"),
        (TWO_LOADS + "NC24ads_A100_v4,1,2,100,20,400\n", "two runs of NC24ads_A100_v4, TP 1, as measured at 2"),
    ],
)
def test_a_file_of_runs_is_refused_in_a_sentence(tmp_path: Path, text: str, reason: str) -> None:
    with pytest.raises(PlannerError) as refused:
        measured(tmp_path, text)
    assert reason in str(refused.value)
    assert "\n" not in str(refused.value)


def test_a_file_that_measured_no_size_that_may_be_taken_is_refused(tmp_path: Path) -> None:
    assert "no size that may be taken was measured" in refusal(runs=measured(tmp_path), rps=5, sku=[T4])
    assert "drop one of them" in refusal(runs=measured(tmp_path), rps=5, simulate=True)


# --------------------------------------------------------------------------------------------------------- the day


def test_the_band_adds_starts_and_waits_to_the_hours_of_each_machine() -> None:
    # replicas of 10 requests a second, 2 a machine, 70 at the peak: 35 / 20 = 2 machines for 12 hours, 70 / 20 = 4 for
    # 12. A day has 12 x 2 + 12 x 4 = 72 machine hours, 2 starts of 10 minutes and 2 waits of 10: 72.667 (the catalog
    # has 0.1667 h), and a month 30.41667 days
    made = band(
        day=(0.5,) * 12 + (1.0,) * 12,
        rate_per_s=70,
        largest_per_s=10,
        replicas_per_machine=2,
        spare=0,
        in_flight=33.7,
        usd_per_hour=D(2),
        output_tokens=100,
    )
    assert (made.minimum_machines, made.maximum_machines) == (2, 4)
    assert (made.minimum_replicas, made.maximum_replicas) == (4, 8)
    assert made.machines == (2,) * 12 + (4,) * 12
    assert made.in_flight_target == 33
    assert made.peak_to_mean == pytest.approx(1 / 0.75)
    assert made.machine_hours == D("2210.3")  # 72.6668 x 30.41667
    assert made.machine_hours_always == 2920  # 4 x 730
    assert made.usd_per_month == D("4420.56")
    assert made.usd_per_month_always == 5840
    # 70 x 0.75 x 100 tokens x 3600 x 730 = 13,797 million: 4,420.56 / 13,797 = 0.3204
    assert made.usd_per_million_output == D("0.3204")


def test_a_band_keeps_a_machine_at_night_and_its_spares_always() -> None:
    made = band(
        day=(0.0,) * 23 + (1.0,), rate_per_s=5, largest_per_s=10, replicas_per_machine=1, spare=2, in_flight=0.2,
        usd_per_hour=None, output_tokens=1,
    )  # fmt: skip
    assert (made.minimum_machines, made.maximum_machines) == (3, 3)
    assert (made.minimum_replicas, made.maximum_replicas) == (1, 1)
    assert made.in_flight_target == 1
    assert made.machine_hours == made.machine_hours_always == 2190
    assert made.usd_per_month is None


def test_a_day_with_about_twice_the_mean_at_its_peak_is_a_cosine() -> None:
    # the mean of (1 + cos) / 2 over whole hours is exactly 1/2, its largest value (1 + cos(pi / 24)) / 2: so k is 1
    top = (1 + cos(pi / 24)) / 2
    cosine = [(1 + cos(2 * pi * (hour - 14.5) / 24)) / 2 / top for hour in range(24)]
    assert wave(2 * top) == pytest.approx(cosine, abs=1e-9)


def test_a_flat_day_is_flat() -> None:
    assert wave(1) == pytest.approx([1.0] * 24)


@given(st.floats(1, 11))
def test_a_day_has_the_peak_and_the_mean_that_were_asked_for(ratio: float) -> None:
    day = wave(ratio)
    assert max(day) == 1
    assert sum(day) / 24 == pytest.approx(1 / ratio, rel=1e-6)


@pytest.mark.parametrize("ratio", [0.99, 11.5, -1, float("nan"), float("inf")])
def test_a_day_that_cannot_be_is_refused(ratio: float) -> None:
    with pytest.raises(PlannerError, match=r"write 1 \(flat\) to 11, or give the hours with --daily"):
        wave(ratio)


def test_a_day_may_come_from_a_file_and_bring_the_load(tmp_path: Path) -> None:
    rows = "".join(f"{hour},{18 if hour < 12 else 9}\n" for hour in range(24))
    path = table(tmp_path, "hour,requests_per_s\n" + rows, "day.csv")
    assert read_day(path) == (18.0,) * 12 + (9.0,) * 12
    wanted = wanted_from_options(OPTIONS | {"daily": path})
    assert wanted.rate_per_s == 18
    assert wanted.day == (1.0,) * 12 + (0.5,) * 12
    # a stated load takes the file's shape alone
    assert wanted_from_options(OPTIONS | {"daily": path, "rps": 40.0}).rate_per_s == 40


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("hour,rps\n0,1\n", "has no column requests_per_s"),
        ("hour,requests_per_s\n" + "".join(f"{h},1\n" for h in range(23)), "lacks the hours 23"),
        ("hour,requests_per_s\n0,1\n0,1\n", "hour 0 stands there twice"),
        ("hour,requests_per_s\n24,1\n", "24 is not an hour of the day"),
        ("hour,requests_per_s\n1,-1\n", "requests_per_s is '-1', not a number from 0 on"),
        ("hour,requests_per_s\n" + "".join(f"{h},0\n" for h in range(24)), "has a rate of 0 in every hour"),
    ],
)
def test_a_day_that_is_none_is_refused(tmp_path: Path, text: str, reason: str) -> None:
    with pytest.raises(PlannerError) as refused:
        read_day(table(tmp_path, text))
    assert reason in str(refused.value)


def test_a_file_that_is_not_there_is_named() -> None:
    with pytest.raises(PlannerError, match=r"/nowhere/day.csv cannot be read \(No such file or directory\)"):
        read_day("/nowhere/day.csv")


# ------------------------------------------------------------------------------------------------- what always holds


@cache
def modelled(rps: float, ttft: int = 800, tpot: int = 50, sheet: str = "", **options: Any) -> ScaleAnswer:
    at = {"rps": rps, "ttft_p95": f"{ttft}ms", "tpot_p95": f"{tpot}ms", "sku": [A100, H100], "quantization": "auto"}
    return planned(dearer() if sheet else SHEET, **(at | options))


@cache
def dearer() -> PriceSheet:
    """The sheet with every machine at three times its price."""
    content = json.loads((files("planner.catalog.prices") / "2026-11.json").read_text(encoding="utf-8"))
    content["offers"] = [[*offer[:3], str(D(offer[3]) * 3), offer[4]] for offer in content["offers"]]
    return parse_sheet(json.dumps(content).encode(), "dearer.json")


def machines(made: ScaleAnswer) -> dict[str, int]:
    return {choice.sku: choice.machines for choice in made.choices}


@settings(max_examples=10, deadline=None)
@given(st.sampled_from([0.5, 3, 11, 40, 170]), st.sampled_from([0.5, 3, 11, 40, 170]))
def test_more_load_never_takes_fewer_machines(one: float, other: float) -> None:
    low, high = machines(modelled(min(one, other))), machines(modelled(max(one, other)))
    assert low.keys() == high.keys()
    assert all(low[size] <= high[size] for size in low)


@settings(max_examples=10, deadline=None)
@given(st.sampled_from([25, 50, 100]), st.sampled_from([25, 50, 100]), st.sampled_from([300, 3000]))
def test_a_looser_limit_is_never_dearer(one: int, other: int, ttft: int) -> None:
    tight, loose = modelled(40, ttft, min(one, other)), modelled(40, max(800, ttft), max(one, other))
    cost = {choice.sku: usd(choice) for choice in loose.choices}
    assert cost.keys() >= {choice.sku for choice in tight.choices}
    assert all(cost[choice.sku] <= usd(choice) for choice in tight.choices)


def test_dearer_machines_are_as_many() -> None:
    assert machines(modelled(40)) == machines(modelled(40, sheet="dearer"))
    assert usd(modelled(40, sheet="dearer").choices[0]) > usd(modelled(40).choices[0])


def test_every_choice_keeps_the_limits_by_the_high_end_of_its_range() -> None:
    made = planned(rps=40)
    assert len(made.choices) > 2
    for choice in made.choices:
        seen = choice.performance
        assert seen.ttft_p95_s is not None
        assert seen.tpot_p95_s is not None
        assert seen.ttft_p95_s.expected < seen.ttft_p95_s.high <= 0.8
        assert seen.tpot_p95_s.expected < seen.tpot_p95_s.high <= 0.05
        assert choice.replicas == choice.machines * choice.replicas_per_machine
        assert choice.replicas >= ceil(40 / choice.largest_per_s - 1e-9)
        assert choice.performance.rate_per_s <= choice.largest_per_s <= choice.saturation_per_s


def test_the_expected_latency_allows_more_than_the_high_end() -> None:
    careful, bold = modelled(40), modelled(40, at_expected=True)
    assert (careful.at, bold.at) == ("high", "expected")
    largest = {choice.sku: choice.largest_per_s for choice in careful.choices}
    assert all(choice.largest_per_s > largest[choice.sku] for choice in bold.choices)


def test_choices_are_ordered_by_the_way_to_buy() -> None:
    for priority in ("on-demand", "spot"):
        made = planned(rps=40, priority=priority)
        costs = [usd(choice, priority) for choice in made.choices]
        assert costs == sorted(costs)
    assert any("a spot machine is away 0.8% of the time" in note for note in made.notes)


def test_the_search_finds_what_trying_everything_finds() -> None:
    quick, whole = planned(rps=40), planned(rps=40, explain=True)
    assert len(whole.choices) > len(quick.choices)
    # of a size, the model as little altered as that costs no more
    order = ["16-bit", "fp8", "awq"]
    kept = [
        c
        for c in whole.choices
        if not any(
            o.sku == c.sku
            and (order.index(o.weights), o.kv_cache_dtype) < (order.index(c.weights), c.kv_cache_dtype)
            and usd(o) <= usd(c)
            for o in whole.choices
        )
    ]
    assert quick.choices == tuple(kept[: len(quick.choices)])


def test_charts_change_no_choice() -> None:
    sizes = [T4, A100, A100_PAIR, H100]
    plain, drawn = planned(rps=40, sku=sizes), planned(rps=40, sku=sizes, drawn=True)
    assert [(c.sku, c.weights, c.machines) for c in plain.choices] == [
        (c.sku, c.weights, c.machines) for c in drawn.choices
    ]
    assert all(len(choice.sweep) > 3 for choice in drawn.choices)
    front = [m for m in drawn.machines if m.pareto]
    assert front
    for machine in drawn.machines:
        beaten = any(
            other.usd_per_hour <= machine.usd_per_hour and other.requests_per_s >= machine.requests_per_s
            for other in drawn.machines
            if other is not machine
        )
        assert machine.pareto or beaten


def test_alternatives_are_tried_where_the_card_has_them_and_named() -> None:
    found = {
        (c.sku.removeprefix("Standard_"), c.weights, c.kv_cache_dtype) for c in planned(rps=9, explain=True).choices
    }
    assert {(H100, "16-bit", "auto"), (H100, "fp8", "auto"), (H100, "fp8", "fp8"), (H100, "awq", "auto")} <= found
    assert {(A100, "16-bit", "auto"), (A100, "awq", "auto")} <= found
    assert not any(size.endswith("A100_v4") and weights == "fp8" for size, weights, _ in found)
    asked = planned(rps=9, quantization="awq", kv_cache_dtype="auto")
    assert {choice.weights for choice in asked.choices} == {"awq"}


def test_a_quantised_checkpoint_is_served_as_it_is() -> None:
    made = planned(model="Qwen/Qwen3-8B-AWQ", rps=9)
    assert {choice.weights for choice in made.choices} == {"awq"}


def test_what_cheaper_machines_fail_on_is_said() -> None:
    made = planned(rps=9, tpot_p95="20ms")
    first = usd(made.choices[0])
    told = {row.sku.removeprefix("Standard_"): row for row in made.cheaper}
    assert T4 in told
    assert told[T4].reason.startswith(f"{T4} (")
    assert "misses TPOT p95: " in told[T4].reason
    assert told[T4].reason.endswith("20 ms wanted")
    assert all(row.usd_per_month is not None and row.usd_per_month < first for row in made.cheaper)
    assert not {row.sku for row in made.cheaper} & {choice.sku for choice in made.choices}


def test_what_comes_nearest_would_do_with_the_limits_that_are_named() -> None:
    made = planned(rps=9, ttft_p95="5ms", tpot_p95="1ms")
    assert made.choices == ()
    assert made.nearest is not None
    flags = made.nearest_flags.split()
    assert flags[::2] == ["--ttft-p95", "--tpot-p95"]
    again = planned(rps=0.001, ttft_p95=flags[1], tpot_p95=flags[3], sku=[made.nearest.sku])
    assert again.choices


def test_classification_is_one_token_and_its_whole_latency() -> None:
    made = planned(
        model="phi-3.5-mini",
        qps=50.0,
        output_tokens=None,
        input_tokens=None,
        ttft_p95=None,
        tpot_p95=None,
        latency="1s",
    )
    assert (made.output_tokens, made.input_tokens) == (1, 256)
    assert made.notes[0].startswith("prompts of 256 tokens are supposed")
    seen = made.choices[0].performance
    assert seen.tpot_p95_s is None
    assert seen.e2e_p95_s.high <= 1


def test_a_simulation_is_the_same_for_the_same_seed() -> None:
    options = {"rps": 6.0, "sku": [A100], "quantization": "auto", "simulate": True}
    one, other = planned(**options, seed=7), planned(**options, seed=7)
    assert one == other
    assert one.choices[0].performance.method == "simulation"
    assert planned(**options, seed=8).choices[0].performance != one.choices[0].performance


def test_a_trace_is_planned_for_its_busiest_minute(tmp_path: Path) -> None:
    # a request every 2 s for 10 minutes, and every half second in the minute from 300 s on: 120 in that minute
    moments = [2.0 * i for i in range(150)] + [300 + 0.5 * i for i in range(120)] + [360 + 2.0 * i for i in range(120)]
    assert busiest(tuple(moments)) == 2
    assert busiest((0.0, 1.0, 2.0, 10.0)) == 0.3  # 3 gaps in 10 s
    rows = "".join(f"{moment},{400 + 10 * (i % 7)},{50 + i % 3}\n" for i, moment in enumerate(moments))
    path = table(tmp_path, "arrival_seconds,prompt_tokens,output_tokens\n" + rows)
    at = {"trace": path, "input_tokens": None, "output_tokens": None, "sku": [A100], "quantization": "auto"}
    made = planned(**at)
    assert made.rate_per_s == 2
    assert made.input_tokens == pytest.approx(sum(400 + 10 * (i % 7) for i in range(390)) / 390)
    assert planned(**at, simulate=True).choices[0].performance.method == "simulation"


# ---------------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("text", "seconds"), [("800ms", 0.8), ("0.8s", 0.8), ("50 ms", 0.05), (".5S", 0.5), ("12s", 12)]
)
def test_a_latency_has_its_unit(text: str, seconds: float) -> None:
    assert parse_seconds(text, "--latency") == pytest.approx(seconds)


@pytest.mark.parametrize("text", ["800", "", "ms", "-5ms", "0ms", "1e3ms", "2h", "99999s", "nan s", "８００ms"])
def test_a_latency_without_one_is_refused(text: str) -> None:
    with pytest.raises(PlannerError, match=r"write it with its unit, such as 800ms or 0\.8s"):
        parse_seconds(text, "--latency")


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"rps": 0.0}, "--rps 0 cannot be planned: write requests a second above 0 and up to 1,000,000"),
        ({"rps": -1.0}, "--rps -1 cannot be planned"),
        ({"rps": float("nan")}, "--rps nan cannot be planned"),
        ({"rps": 1e7}, "--rps 1e+07 cannot be planned"),
        ({"qps": 0.0, "output_tokens": None, "tpot_p95": None}, "--qps 0 cannot be planned"),
        ({"rps": 5.0, "qps": 5.0}, "give one of them"),
        ({}, "no load was given"),
        ({"rps": 5.0, "input_tokens": None}, "add --input 500"),
        ({"rps": 5.0, "output_tokens": None}, "add --output 200"),
        ({"rps": 5.0, "output_tokens": "0"}, "--output 0 asks for nothing"),
        ({"rps": 5.0, "input_tokens": "many"}, "'many' is not a token count"),
        ({"rps": 5.0, "ttft_p95": None, "tpot_p95": None}, "without a limit any machine would do"),
        ({"rps": 5.0, "ttft_p95": "800"}, "--ttft-p95 '800' is not a latency"),
        ({"rps": 5.0, "input_tokens": "60000"}, "60,200 tokens is beyond the context of qwen3-8b (40,960)"),
        ({"rps": 5.0, "ctx": "512"}, "700 tokens is longer than the context of 512: write --ctx 700 or more"),
        ({"rps": 5.0, "ctx": "1m"}, "context"),
        ({"rps": 5.0, "region": "nowhere"}, "'nowhere' is not a region in the price sheet"),
        ({"rps": 5.0, "region": " , "}, "--region is empty"),
        ({"rps": 5.0, "sku": ["NC4as_T4"]}, "is not an Azure GPU size"),
        ({"rps": 5.0, "sku": [T4], "tp": 2}, "NC4as_T4_v3 has 1 GPU, not 2 for a replica: lower --tp"),
        ({"rps": 5.0, "tp": 3}, "32 attention heads, which 3 GPUs cannot share"),
        ({"rps": 5.0, "quantization": "zip"}, "quantization 'zip' is not known"),
        ({"rps": 5.0, "priority": "gift"}, "--priority 'gift' is no way to buy"),
        ({"rps": 5.0, "priority": "on-demand", "spot": True}, "contradict each other"),
        ({"rps": 5.0, "priority": "reserved-3y", "sku": [T4], "region": "japaneast"}, "has no price reserved-3y"),
        ({"rps": 5.0, "peak_to_mean": 2.0, "daily": "day.csv"}, "drop one of them"),
        ({"rps": 5.0, "prefix_hit_rate": 1.0}, "a prefix hit rate of 1 is not a share"),
        ({"rps": 5.0, "spread": 3.0}, "a spread of 3"),
        ({"rps": 5.0, "trace": "trace.csv"}, "--trace says already what --rps says"),
        ({"rps": 5.0, "max_num_seqs": 0}, "--max-num-seqs is wrong"),
        ({"rps": 5.0, "spare": 5000}, "5,000 spare machines"),
        ({"qps": 5.0, "latency": "1s"}, "--qps is for one output token"),
        ({"qps": 5.0, "output_tokens": "1", "latency": "1s"}, "drop --tpot-p95"),
        ({"rps": 5.0, "model": "no-such-model"}, "no-such-model"),
    ],
)
def test_what_cannot_be_is_refused_in_a_sentence(options: dict[str, Any], reason: str) -> None:
    assert reason in refusal(**options)


def test_a_load_that_simulation_does_not_confirm_gets_machines_or_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    options = {"rps": 20.0, "sku": [A100], "quantization": "auto"}
    plain = planned(**options).choices[0]
    asked: list[int] = []

    def slower(until: int) -> None:
        def simulated(self: Modelled, rate_per_s: float, replicas: int, *, requests: int, seed: int) -> Performance:
            asked.append(replicas)
            late = Span(low=9, expected=9, high=9)
            seen = self.at(rate_per_s)
            return seen if replicas >= until else seen.model_copy(update={"ttft_p95_s": late})

        monkeypatch.setattr(Modelled, "simulated", simulated)

    slower(until=plain.machines + 2)  # one in eight more, so one by one
    made = planned(**options, simulate=True)
    assert made.choices[0].machines == plain.machines + 2
    assert asked == [plain.machines, plain.machines + 1, plain.machines + 2]
    assert made.choices[0].largest_per_s == pytest.approx(20 / (plain.machines + 2))
    slower(until=10**6)
    made = planned(**options, simulate=True)
    assert made.choices == ()
    assert made.rejected[-1].reason.startswith(f"{A100} (16-bit) misses the limits in simulation with ")
