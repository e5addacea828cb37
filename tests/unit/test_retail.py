"""The refresh of the price sheet: which rows of the price list count, and every way in which asking can fail."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from datetime import UTC, date, datetime, timedelta
from decimal import Decimal
from email.utils import format_datetime
from pathlib import Path
from typing import Any

import httpx
import pytest
import retail_server as api
from hypothesis import given, settings
from hypothesis import strategies as st
from retail_server import A100, GOOD, H200, POISON, SERVICES, SIZES, RetailServer, Row, row, service, spot

from planner.catalog.prices import PriceSheet, SheetFile, cached_sheets, load_sheet, parse_sheet, sheet_text
from planner.catalog.prices import api as requests
from planner.catalog.prices.api import Timeouts, origin
from planner.catalog.prices.retail import Refreshed, changes, fetch, save
from planner.catalog.prices.rows import Item, MeterQuery, meter_queries, select_meter, select_vm
from planner.errors import PlannerError

DAY = date(2026, 11, 22)
FRESH = f"retail-{DAY}"
MISSING = "Standard_ND40rs_v2"
HASTY = Timeouts(connect_s=0.2, read_s=0.2, whole_s=0.2)

BASE: dict[str, Any] = {
    "schema_version": "tonnage.prices/1",
    "name": "2026-06",
    "currency": "USD",
    "description": "",
    "sources": {
        "map": {"source": "a price map", "as_of": "2026-06-18"},
        "guess": {"source": "scaled from another size", "as_of": "2026-05-01", "estimate": True},
        "unused": {"source": "nothing refers to it", "as_of": "2026-01-01"},
    },
    "exchange_rates": {"SEK": ["9.5", "map"], "EUR": ["0.91", "map"]},
    "offers": [
        [A100, "eastus", "on-demand", "3.5", "map"],
        [A100, "eastus", "spot", "0.678775", "guess"],
        [A100, "eastus", "reserved-1y", "42066", "guess"],
        [A100, "westeurope", "on-demand", "4.775", "map"],
        [A100, "westeurope", "spot", "1.1", "map"],
        [A100, "northeurope", "on-demand", "4.4", "map"],
        [H200, "eastus", "on-demand", "84.8", "map"],
        [MISSING, "eastus", "on-demand", "22.032", "map"],
    ],
    "meters": [
        {"name": "aks-standard", "region": "*", "unit": "hour", "tiers": [["0", "0.1"]], "source": "map"},
        {"name": "load-balancer", "region": "*", "unit": "hour", "tiers": [["0", "0.025"]], "source": "guess"},
        {"name": "load-balancer", "region": "westeurope", "unit": "hour", "tiers": [["0", "0.03"]], "source": "map"},
        {"name": "log-analytics", "region": "*", "unit": "GB", "tiers": [["0", "0"], ["5", "2.3"]], "source": "guess"},
        {"name": "nat-gateway", "region": "*", "unit": "hour", "tiers": [["0", "0.045"]], "source": "map"},
        {"name": "flat-operations", "region": "*", "unit": "month", "tiers": [["0", "1500"]], "source": "map"},
    ],
    "unpriced": {"Standard_GB200": "not listed", H200: "was not listed"},
}


def sheet(**other: Any) -> PriceSheet:
    return parse_sheet(json.dumps(BASE | other).encode(), "the sheet of the tests")


@pytest.fixture(autouse=True)
def _no_proxy_and_an_own_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("TONNAGE_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def server() -> Iterator[RetailServer]:
    with RetailServer([*SIZES, *SERVICES]) as running:
        yield running


def refresh(server: RetailServer | str, **options: Any) -> Refreshed:
    endpoint = server if isinstance(server, str) else server.url
    asked = {"skus": (A100, H200, MISSING), "day": DAY, "endpoint": endpoint, "sleep": _never}
    return fetch(**{"base": sheet()} | asked | options)


def _never(seconds: float) -> None:
    raise AssertionError(f"waited {seconds} s")


def refusal(server: RetailServer | str, **options: Any) -> str:
    """The sentence that a refresh is refused with; nothing was written."""
    with pytest.raises(PlannerError) as caught:
        refresh(server, **options)
    text = str(caught.value)
    assert "\n" not in text
    assert "Traceback" not in text
    assert len(text) < 350
    assert cached_sheets() == ()
    return text


def new_sheet(refreshed: Refreshed) -> PriceSheet:
    return parse_sheet(sheet_text(refreshed.content).encode(), "the new sheet")


def parsed(rows: list[Row]) -> list[Item]:
    """Rows as they are after their way through JSON."""
    return [Item.model_validate(r) for r in json.loads(json.dumps(rows), parse_float=Decimal)]


def chosen(rows: list[Row], **options: Any) -> dict[tuple[str, str], str]:
    """(region, priority) -> price of the A100 size."""
    offers = select_vm(parsed(rows), DAY, **options).offers
    return {(region, priority): f"{usd:f}" for (sku, region, priority), usd in offers.items() if sku == A100}


# ------------------------------------------------------------------------------------------ which rows of a size count

# As they stand in GOOD: the hour on demand, spot since July, plans by the hour, reservations for the whole term.
RIGHT = {
    ("eastus", "on-demand"): "3.673",
    ("eastus", "spot"): "0.678775",
    ("eastus", "savings-plan-1y"): "3.0574",
    ("eastus", "savings-plan-3y"): "2.2659",
    ("eastus", "reserved-1y"): "21033.0",
    ("eastus", "reserved-3y"): "37000.0",
}


def test_of_all_rows_of_a_size_only_its_own_linux_prices_are_taken() -> None:
    assert chosen([*POISON, *GOOD]) == RIGHT


@pytest.mark.parametrize(
    "bad", POISON, ids=lambda r: f"{r['productName'][-18:]}-{r['meterName'][-12:]}-{r['retailPrice']}"
)
def test_each_row_that_is_no_price_of_the_size_is_left_out_by_itself(bad: Row) -> None:
    assert chosen([*GOOD, bad]) == RIGHT


@given(st.permutations([*GOOD, *POISON]))
@settings(max_examples=60, deadline=None)
def test_the_order_of_the_rows_does_not_matter(rows: list[Row]) -> None:
    assert chosen(rows) == RIGHT


# An older spot price and a row about to end do count where nothing newer is listed.
NEVER = [r for r in POISON if r["retailPrice"] not in (0.699, 3.9)]


@given(st.data())
@settings(max_examples=60, deadline=None)
def test_no_windows_low_priority_or_dev_test_row_is_taken_whichever_rows_there_are(data: st.DataObject) -> None:
    rows = data.draw(st.permutations([*GOOD, *NEVER]))
    some = rows[: data.draw(st.integers(0, len(rows)))]
    assert set(chosen(some).items()) <= set(RIGHT.items())


def test_what_was_left_out_is_in_the_audit_trail_with_its_reason() -> None:
    notes = select_vm(parsed([*GOOD, *POISON]), DAY).notes
    # five on demand, one low priority and one spot
    assert "Windows, Cloud Services or Dedicated Host: 7 left out" in notes
    assert "Low Priority: 1 left out" in notes
    assert "no region: 2 left out" in notes
    assert any("0.699 since 2026-05-01, 0.678775 since 2026-07-01" in note for note in notes)


def test_two_on_demand_prices_are_an_error_and_nothing_of_that_region_is_taken() -> None:
    selected = select_vm(parsed([*GOOD, row(3.7, meterId="b"), row(4.775, "westeurope")]), DAY)
    assert list(selected.offers) == [(A100, "westeurope", "on-demand")]
    assert selected.warnings == (
        f"{A100} in eastus has 2 on-demand prices (3.673, 3.7) in the price list, so nothing was taken",
    )


def test_the_same_on_demand_price_twice_is_one_price() -> None:
    assert chosen([*GOOD, row(3.673, meterId="b")]) == RIGHT


def test_a_region_with_spot_rows_alone_gives_nothing() -> None:
    selected = select_vm(parsed([spot(0.7)]), DAY)
    assert not selected.offers
    assert "no on-demand price" in selected.warnings[0]


# 5 % of 3.673 is 0.18365.
@pytest.mark.parametrize(
    ("usd", "taken"), [(3.673, True), (3.6731, False), (9.0, False), (0.18365, True), (0.1836, False)]
)
def test_spot_is_taken_between_5_and_100_per_cent_of_on_demand(usd: float, taken: bool) -> None:
    selected = select_vm(parsed([row(3.673), spot(usd)]), DAY)
    assert ((A100, "eastus", "spot") in selected.offers) == taken
    assert (A100, "eastus", "on-demand") in selected.offers
    assert bool(selected.warnings) != taken


def test_of_two_spot_prices_the_newest_counts_and_of_the_same_day_the_highest() -> None:
    assert chosen([row(9.0), spot(2.7975, "2026-09-01"), spot(2.2376, "2026-10-01")])["eastus", "spot"] == "2.2376"
    assert chosen([row(9.0), spot(2.2376, "2026-09-01"), spot(2.7975, "2026-09-01")])["eastus", "spot"] == "2.7975"


def test_a_reservation_that_would_be_an_hour_s_price_is_refused() -> None:
    # 2.4 over 8760 hours is 0.00027 an hour: somebody turned the total into an hourly price
    selected = select_vm(parsed([row(3.673), api.reservation(2.4, "1 Year")]), DAY)
    assert list(selected.offers) == [(A100, "eastus", "on-demand")]
    assert "reserved-1y" in selected.warnings[0]


def test_two_totals_of_one_term_are_refused() -> None:
    selected = select_vm(parsed([*GOOD, api.reservation(22000.0, "1 Year", meterId="b")]), DAY)
    assert (A100, "eastus", "reserved-1y") not in selected.offers
    assert (A100, "eastus", "reserved-3y") in selected.offers
    assert "2 prices reserved-1y (21033, 22000)" in selected.warnings[0].replace(".0", "")


@pytest.mark.parametrize(
    ("start", "end", "taken"),
    [
        ("2026-11-22", None, True),
        ("2026-11-23", None, False),
        ("2020-01-01", "2026-11-22", True),  # until the end of that day
        ("2020-01-01", "2026-11-21", False),
    ],
)
def test_a_row_counts_from_its_first_day_to_its_last(start: str, end: str | None, taken: bool) -> None:
    dates = {"effectiveStartDate": f"{start}T00:00:00Z"} | ({"effectiveEndDate": f"{end}T23:59:00Z"} if end else {})
    assert bool(chosen([row(3.673, **dates)])) == taken


def test_a_size_without_savings_plan_and_with_empty_fields_is_read() -> None:
    empty = {"savingsPlan": None, "reservationTerm": None, "meterId": None}
    assert chosen([row(3.673, **empty)]) == {("eastus", "on-demand"): "3.673"}


def test_each_region_and_each_size_is_chosen_for_itself() -> None:
    offers = select_vm(parsed(SIZES), DAY).offers
    assert offers[H200, "eastus", "spot"] == offers[H200, "eastus", "on-demand"] == Decimal("84.8")
    assert (H200, "eastus", "savings-plan-1y") not in offers
    assert offers[A100, "attdetroit1", "on-demand"] == Decimal("4.2")
    assert (A100, "northeurope", "on-demand") not in offers


# ---------------------------------------------------------------------------------------------- which row is a service


def meter(name: str) -> MeterQuery:
    return next(query for query in meter_queries() if query.name == name)


def tables(name: str, rows: list[Row]) -> tuple[dict[str, list[tuple[str, str]]], list[str]]:
    found, warnings = select_meter(meter(name), parsed(rows), DAY, {"eastus", "swedencentral"})
    return {region: [(f"{a:f}", f"{b:f}") for a, b in tiers] for region, tiers in found.items()}, warnings


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("aks-standard", {"eastus": [("0.0", "0.1")], "swedencentral": [("0.0", "0.1")]}),
        ("aks-premium", {"eastus": [("0.0", "0.6")]}),
        ("load-balancer", {"*": [("0.0", "0.025")]}),
        ("load-balancer-rule", {"*": [("0.0", "0.01")]}),
        ("log-analytics", {"eastus": [("0.0", "0.0"), ("5.0", "2.76")]}),
        ("blob-hot-lrs", {"eastus": [("0.0", "0.0184"), ("51200.0", "0.017664"), ("512000.0", "0.016928")]}),
        ("disk-premium-p10", {"eastus": [("0.0", "19.71")]}),
        ("prometheus-samples", {"eastus": [("0.0", "0.16")]}),
        ("acr-standard", {"eastus": [("0.0", "0.6666")]}),
        ("acr-storage", {"eastus": [("0.0", "0.1")]}),
        ("private-dns-zone", {"*": [("0.0", "0.5"), ("25.0", "0.1")]}),
        ("private-endpoint-data", {"*": [("0.0", "0.01")]}),
        ("nat-gateway", {}),
    ],
)
def test_a_service_is_found_by_its_exact_names_with_all_its_tiers(name: str, expected: object) -> None:
    assert tables(name, SERVICES) == (expected, [])


def test_a_meter_of_the_region_goes_before_another_region_s_of_the_same_name() -> None:
    names = api.AKS + "Standard Uptime SLA"
    rows = [service(0.2, names, isPrimaryMeterRegion=False), service(0.1, names)]
    assert tables("aks-standard", rows) == ({"eastus": [("0.0", "0.1")]}, [])


@pytest.mark.parametrize(
    ("rows", "reason"),
    [
        ([service(0.1, api.AKS + "Standard Uptime SLA", unit="1 Month")], "is priced by '1 Month' instead of 1 Hour"),
        ([service(p, api.AKS + "Standard Uptime SLA") for p in (0.1, 0.12)], r"has several prices \(0.1, 0.12\)"),
        ([service(0.0, api.AKS + "Standard Uptime SLA")], "cost nothing"),
        ([service(0.1, api.AKS + "Standard Uptime SLA", tierMinimumUnits=5.0)], "do not start at 0"),
    ],
)
def test_a_service_without_a_clear_price_is_left_out_with_a_sentence(rows: list[Row], reason: str) -> None:
    found, warnings = tables("aks-standard", rows)
    assert not found
    assert len(warnings) == 1
    assert re.search(reason, warnings[0])


def test_a_price_by_a_larger_unit_is_turned_into_the_meter_s_own() -> None:
    query = meter("aks-standard").model_copy(update={"units": {"100 Hours": Decimal(100)}})
    names = api.AKS + "Standard Uptime SLA"
    rows = [service(0.0, names, unit="100 Hours"), service(12.0, names, unit="100 Hours", tierMinimumUnits=3.0)]
    found, _ = select_meter(query, parsed(rows), DAY, {"eastus"})
    # the first 3 x 100 hours free, then 12 / 100 an hour
    assert found == {"eastus": ((Decimal(0), Decimal(0)), (Decimal(300), Decimal("0.12")))}


# The vocabulary that sheets, the cost model and this reader share, with the units that a price is for.
OPERATIONS = ("blob-{}-lrs-writes", "blob-{}-lrs-reads")
UNITS = {
    **dict.fromkeys(["aks-standard", "aks-premium", "aks-automatic", "public-ip", "grafana-node"], "hour"),
    **dict.fromkeys(["load-balancer", "load-balancer-rule", "nat-gateway", "private-endpoint"], "hour"),
    "aks-automatic-general-vcpu": "vCPU-hour",
    **{f"blob-{tier}-{copies}": "GB-month" for tier in ("hot", "cool", "cold", "premium") for copies in ("lrs", "zrs")},
    **dict.fromkeys(["blob-archive-lrs", "log-retention", "log-archive", "acr-storage"], "GB-month"),
    **{
        op.format(tier): "10,000 operations"
        for op in OPERATIONS
        for tier in ("hot", "cool", "cold", "archive", "premium")
    },
    **{f"blob-{tier}-retrieval": "GB" for tier in ("cool", "cold", "archive")},
    **{f"disk-premium-p{n}": "disk-month" for n in (10, 15, 20, 30, 40)},
    **{f"disk-standard-e{n}": "disk-month" for n in (10, 15, 20, 30)},
    **dict.fromkeys(["egress-internet", "egress-inter-region", "vnet-peering", "load-balancer-data"], "GB"),
    **dict.fromkeys(["nat-gateway-data", "private-endpoint-data", "log-analytics", "log-basic", "log-auxiliary"], "GB"),
    "private-dns-zone": "zone-month",
    **dict.fromkeys(["prometheus-samples", "prometheus-queries"], "10,000,000 samples"),
    "metric-alerts": "series-month",
    "grafana-user": "user-month",
    **dict.fromkeys(["key-vault-operations", "key-vault-advanced-operations"], "10,000 operations"),
    **dict.fromkeys(["acr-basic", "acr-standard", "acr-premium"], "day"),
    "acr-build": "vCPU-second",
}


def test_the_meters_are_the_shared_vocabulary_each_once_in_its_unit() -> None:
    assert Counter(query.name for query in meter_queries()).most_common(1)[0][1] == 1
    assert {query.name: query.unit for query in meter_queries()} == UNITS


@pytest.mark.parametrize("query", meter_queries(), ids=lambda query: query.name)
def test_a_meter_says_where_its_names_come_from_and_how_its_unit_is_written(query: MeterQuery) -> None:
    assert query.source
    assert date(2024, 1, 1) < query.as_of <= DAY
    assert query.meters
    assert query.units
    assert all(size > 0 for size in query.units.values())
    assert query.arm_region in (None, "Global", "")


# ------------------------------------------------------------------------------------------------------- the new sheet


def test_fresh_prices_lie_over_the_base_sheet_and_the_rest_keeps_its_own_date(server: RetailServer) -> None:
    refreshed = refresh(server)
    listed = {(sku, region, priority): (usd, source) for sku, region, priority, usd, source in refreshed.content.offers}
    assert listed == {
        **{(A100, region, priority): (usd.removesuffix(".0"), FRESH) for (region, priority), usd in RIGHT.items()},
        (A100, "westeurope", "on-demand"): ("4.775", FRESH),  # the same price, now with today's date
        (A100, "westeurope", "spot"): ("1.1", "map"),
        (A100, "westeurope", "savings-plan-1y"): ("3.9747", FRESH),
        (A100, "westeurope", "savings-plan-3y"): ("2.9", FRESH),
        (A100, "northeurope", "on-demand"): ("4.4", "map"),
        (H200, "eastus", "on-demand"): ("84.8", FRESH),
        (H200, "eastus", "spot"): ("84.8", FRESH),
        (MISSING, "eastus", "on-demand"): ("22.032", "map"),
    }
    sources = refreshed.content.sources
    assert sources[FRESH].source == "Azure Retail Prices API, https://prices.azure.com/api/retail/prices"
    assert sources[FRESH].as_of == DAY
    assert sources["map"].as_of == date(2026, 6, 18)
    assert "unused" not in sources
    assert refreshed.content.name == "2026-11-22"
    assert refreshed.content.unpriced == {"Standard_GB200": "not listed"}  # H200 has a price now


def test_a_reservation_s_total_is_stored_as_the_total(server: RetailServer) -> None:
    offer = new_sheet(refresh(server)).offer(A100, "eastus", "reserved-1y")
    assert offer is not None
    assert offer.usd == 21033
    assert f"{offer.usd_per_hour:.4f}" == "2.4010"  # 21033 / 8760


def test_services_are_refreshed_and_what_has_no_answer_is_carried(server: RetailServer) -> None:
    refreshed = refresh(server)
    new = new_sheet(refreshed)
    found = {(m.name, m.region): m.source for m in refreshed.content.meters}
    assert found["aks-standard", "eastus"] == FRESH
    assert found["aks-standard", "*"] == "map"  # still the price of regions that were not listed
    assert found["nat-gateway", "*"] == found["flat-operations", "*"] == "map"
    logs = new.meter("log-analytics", "eastus")
    assert logs is not None
    assert logs.free_units == 5
    assert logs.cost(Decimal(7)) == Decimal("5.52")  # (7 - 5) x 2.76
    egress = new.meter("blob-hot-lrs", "eastus")
    assert egress is not None
    # 51,200 x 0.0184 + 1,000 x 0.017664 = 942.08 + 17.664
    assert egress.cost(Decimal(52200)) == Decimal("959.744")


def test_a_price_for_everywhere_replaces_regions_and_estimates(server: RetailServer) -> None:
    found = {(m.name, m.region): m.source for m in refresh(server).content.meters}
    assert found["load-balancer", "*"] == FRESH
    assert ("load-balancer", "westeurope") not in found


def test_an_estimate_for_everywhere_goes_once_every_region_has_its_own_price(server: RetailServer) -> None:
    found = {(m.name, m.region) for m in refresh(server).content.meters}
    assert ("log-analytics", "*") in found  # westeurope and northeurope still need it
    names = api.LOGS + "Analytics Logs Data Ingestion"
    server.rows += [service(2.99, names, region, "1 GB") for region in ("westeurope", "northeurope")]
    names = api.AKS + "Standard Uptime SLA"
    server.rows += [service(0.1, names, region) for region in ("westeurope", "northeurope")]
    found = {(m.name, m.region) for m in refresh(server).content.meters}
    assert ("log-analytics", "*") not in found
    assert ("log-analytics", "westeurope") in found
    assert ("aks-standard", "*") in found  # not an estimate: what was read stays


def test_carried_prices_are_counted(server: RetailServer) -> None:
    # offers: westeurope spot, northeurope, the missing size; meters: aks-standard *, log-analytics *, nat-gateway, flat
    assert refresh(server).carried == 3 + 4


def test_an_ambiguous_price_keeps_the_base_sheet_s_with_a_warning(server: RetailServer) -> None:
    warnings = refresh(server).warnings
    assert any(w.startswith(f"{A100} in northeurope has 2 on-demand prices (5.1, 5.2)") for w in warnings)


def test_an_edge_zone_is_left_out_with_a_warning_and_taken_when_it_is_named(server: RetailServer) -> None:
    refreshed = refresh(server)
    assert "attdetroit1" not in new_sheet(refreshed).regions
    assert any(w.endswith("were left out: attdetroit1") for w in refreshed.warnings)
    refreshed = refresh(server, regions=("attdetroit1",))
    assert new_sheet(refreshed).rate(A100, "attdetroit1", "on-demand") == Decimal("4.2")


def test_an_old_spot_price_above_todays_on_demand_goes() -> None:
    dear = dict(BASE, offers=[[A100, "eastus", "on-demand", "9", "map"], [A100, "eastus", "spot", "8", "map"]])
    base = parse_sheet(json.dumps(dear).encode(), "base")
    with RetailServer([row(3.673)]) as server:
        new = new_sheet(refresh(server, base=base))
    assert new.rate(A100, "eastus", "on-demand") == Decimal("3.673")
    assert new.rate(A100, "eastus", "spot") is None


def test_only_the_regions_that_are_named_are_refreshed(server: RetailServer) -> None:
    refreshed = refresh(server, regions=("West Europe", "mars-north"))
    new = new_sheet(refreshed)
    assert "the price list has none of these sizes in marsnorth" in refreshed.warnings
    assert new.rate(A100, "westeurope", "savings-plan-1y") == Decimal("3.9747")
    assert new.rate(A100, "eastus", "on-demand") == Decimal("3.5")
    assert new.meter("aks-standard", "eastus") == sheet().meter("aks-standard", "*")


def test_a_meter_that_the_base_sheet_has_by_another_unit_is_carried_with_a_warning(server: RetailServer) -> None:
    monthly = {"name": "aks-premium", "region": "*", "unit": "month", "tiers": [["0", "438"]], "source": "map"}
    refreshed = refresh(server, base=sheet(meters=[monthly]))
    premium = new_sheet(refreshed).meter("aks-premium", "eastus")
    assert premium is not None
    assert premium.unit == "month"
    assert "aks-premium is by month in 2026-06, so nothing was taken" in refreshed.warnings


def test_a_source_of_the_base_sheet_with_today_s_name_keeps_its_figures_apart(server: RetailServer) -> None:
    sources = BASE["sources"] | {FRESH: {"source": "an earlier reading", "as_of": "2026-11-22"}}
    offers = [[*offer[:4], FRESH] for offer in BASE["offers"]]
    content = refresh(server, base=sheet(sources=sources, offers=offers)).content
    kept = {source for sku, *_, source in content.offers if sku == MISSING}
    assert kept == {f"{FRESH}-before"}
    assert content.sources[f"{FRESH}-before"].source == "an earlier reading"
    assert content.sources[FRESH].source.startswith("Azure Retail Prices API")


def test_a_second_refresh_of_the_day_changes_nothing(server: RetailServer) -> None:
    first = refresh(server)
    second = refresh(server, base=new_sheet(first))
    assert second.changes == ()
    same = {"offers", "meters", "sources", "exchange_rates"}
    assert second.content.model_dump(include=same) == first.content.model_dump(include=same)


def test_a_price_keeps_every_digit_that_was_sent(server: RetailServer) -> None:
    exact = "3.67300000000000000000123"  # more digits than a float holds
    server.faults = [api.body(json.dumps(api.page(row(12345.5))).replace("12345.5", exact))]
    assert new_sheet(refresh(server)).rate(A100, "eastus", "on-demand") == Decimal(exact)


def test_changes_are_reported_with_the_largest_first(server: RetailServer) -> None:
    found = refresh(server).changes
    moved = [(c.what, c.priority, c.old_usd, c.new_usd) for c in found if c.change_pct is not None]
    assert moved == [
        (A100, "reserved-1y", Decimal(42066), Decimal(21033)),  # - 50 %
        (A100, "on-demand", Decimal("3.5"), Decimal("3.673")),  # + 4.9 %
    ]
    assert found[0].change_pct == -50
    assert found[1].change_pct is not None
    assert f"{found[1].change_pct:.2f}" == "4.94"  # 0.173 / 3.5
    gone = [c for c in found if c.new_usd is None]
    assert [(c.what, c.region) for c in gone] == [("load-balancer", "westeurope")]
    assert all(c.change_pct is None for c in found[2:])


def test_a_tier_is_compared_with_the_tier_that_starts_where_it_starts() -> None:
    dearer = [dict(m, tiers=[["0", "0"], ["5", "2.76"]]) for m in BASE["meters"] if m["name"] == "log-analytics"]
    cheaper = [m for m in BASE["meters"] if m["name"] == "log-analytics"]
    (change,) = changes(sheet(meters=cheaper), sheet(meters=dearer))
    assert (change.what, change.priority, change.change_pct) == ("log-analytics above 5", "GB", 20)  # 2.3 -> 2.76


def test_progress_is_told_before_each_query(server: RetailServer) -> None:
    told: list[tuple[int, int, str]] = []
    refreshed = refresh(server, progress=lambda *step: told.append(step))
    groups = len({(q.service, q.product, q.sku) for q in meter_queries()})
    total = 3 + groups
    assert [done for done, _, _ in told] == list(range(total))
    assert {all_of_them for _, all_of_them, _ in told} == {total}
    assert [label for _, _, label in told[:4]] == [A100, H200, MISSING, "Azure Kubernetes Service Standard"]
    assert refreshed.requests == len(server.requests) == total


# ------------------------------------------------------------------------------------------------------- what is asked


def test_a_size_is_asked_for_in_all_regions_at_once_and_by_its_exact_name(server: RetailServer) -> None:
    refresh(server)
    first = server.requests[0]
    assert first.path == "/api/retail/prices"
    assert first.query == {
        "api-version": "2023-01-01-preview",
        "currencyCode": "'USD'",
        "meterRegion": "'primary'",
        "$filter": f"serviceName eq 'Virtual Machines' and armSkuName eq '{A100}'",
    }


def test_a_service_is_asked_for_without_the_filter_that_hides_regions_with_a_shared_meter(server: RetailServer) -> None:
    refresh(server)
    services = [request for request in server.requests if "Virtual Machines" not in request.filter]
    assert not any("meterRegion" in request.query for request in services)
    assert (
        "serviceName eq 'Storage' and productName eq 'Premium SSD Managed Disks' and priceType eq 'Consumption'"
        " and skuName eq 'P10 LRS'"
    ) in [request.filter for request in services]


def test_a_quote_in_a_name_stays_inside_the_filter(server: RetailServer) -> None:
    refresh(server, skus=(A100, "x' or serviceName eq 'y"))
    assert server.requests[1].filter.endswith("armSkuName eq 'x'' or serviceName eq ''y'")


def test_rows_of_a_size_that_was_not_asked_for_are_not_taken(server: RetailServer) -> None:
    server.faults = [api.body(api.page(row(3.673), row(84.9, sku=H200), row(0.192, sku="Standard_D4s_v5")))]
    new = new_sheet(refresh(server, skus=(A100,)))
    assert new.rate(H200, "eastus", "on-demand") == Decimal("84.8")
    assert new.skus() == sheet().skus()


def test_a_size_is_asked_for_once_however_often_it_is_named(server: RetailServer) -> None:
    refresh(server, skus=(A100, A100))
    assert sum(A100 in request.filter for request in server.requests) == 1


def test_pages_are_followed_to_the_last(server: RetailServer) -> None:
    server.page_size = 14
    whole = refresh(server, skus=(A100,)).content
    pages = [request.query.get("$skip") for request in server.requests if A100 in request.filter]
    assert pages == [None, "14", "28"]  # of 30 rows
    server.page_size = 1000
    assert refresh(server, skus=(A100,)).content == whole


def test_the_default_port_of_a_scheme_is_the_same_address() -> None:
    # as the API writes its next pages
    assert origin("https://prices.azure.com:443/api") == origin("https://prices.azure.com")
    assert origin("http://prices.azure.com:443/api") != origin("https://prices.azure.com")


@pytest.mark.parametrize(
    "link",
    [
        "https://prices.example.com/api/retail/prices?$skip=1000",
        "//prices.example.com/api",
        "/api/retail/prices?$skip=1000",
        "https://127.0.0.1/api/retail/prices",
        "http://[127.0.0.1/",
        "http://127.0.0.1:99999/",
        "http://user@127.0.0.1:{port}/api",
        "file:///etc/passwd",
        "http://127.0.0.1.example.com:{port}/api",
        "\nhttp://elsewhere",
    ],
)
def test_a_next_page_at_another_address_is_refused(server: RetailServer, link: str) -> None:
    port = server.url.rpartition(":")[2]
    server.faults = [api.onward(lambda handler: link.replace("{port}", port))]
    assert "names a next page at another address, which is not followed" in refusal(server)
    assert len(server.requests) == 1


def test_pages_in_a_circle_are_refused(server: RetailServer) -> None:
    server.always = api.onward(lambda handler: f"{server.url}/api/retail/prices?again")
    assert "does not end: a page came twice" in refusal(server)
    assert len(server.requests) == 2


def test_pages_without_end_are_refused(server: RetailServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(requests, "MAX_PAGES", 5)
    server.always = api.onward(lambda handler: f"{server.url}/api/retail/prices?$skip={len(server.requests)}")
    assert "over 5" in refusal(server)
    assert len(server.requests) == 5


# ----------------------------------------------------------------------------------------------- patience and refusals


def waits(server: RetailServer) -> list[float]:
    asked: list[float] = []
    refresh(server, sleep=asked.append)
    return asked


def test_too_many_requests_are_repeated_after_the_time_that_the_api_names(server: RetailServer) -> None:
    server.faults = [api.status(429, Retry_After="7"), None, api.status(503, Retry_After="3")]
    assert waits(server) == [7, 3]


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        ("86400", 60),
        (format_datetime(datetime.now(UTC) + timedelta(days=365), usegmt=True), 60),
        (format_datetime(datetime.now(UTC) - timedelta(days=365), usegmt=True), 0),
        ("soon", 1),
        ("-5", 1),
        ("", 1),
        ("Mon, 99 Foo 2026 00:00:00 GMT", 1),
    ],
    ids=["a day", "next year", "last year", "a word", "negative", "empty", "no date"],
)
def test_the_wait_that_the_api_names_is_seconds_or_a_date_and_at_most_a_minute(
    server: RetailServer, said: str, expected: int
) -> None:
    server.faults = [api.status(429, Retry_After=said)]
    assert waits(server) == [expected]


def test_without_a_time_the_waits_double(server: RetailServer) -> None:
    server.faults = [api.status(503)] * 4
    assert waits(server) == [1, 2, 4, 8]


@pytest.mark.parametrize("code", [429, 503])
def test_after_four_retries_the_refresh_is_refused(server: RetailServer, code: int) -> None:
    server.always = api.status(code)
    asked: list[float] = []
    assert f"still answers {code} after 4 retries" in refusal(server, sleep=asked.append)
    assert asked == [1, 2, 4, 8]
    assert len(server.requests) == 5


@pytest.mark.parametrize("code", [400, 401, 403, 404, 410, 500, 502, 504])
def test_any_other_refusal_is_final(server: RetailServer, code: int) -> None:
    server.always = api.status(code)
    assert f"({A100}) refuses with status {code}" in refusal(server)
    assert len(server.requests) == 1


@pytest.mark.parametrize("code", [301, 302, 307, 308])
def test_a_redirect_is_not_followed(server: RetailServer, code: int) -> None:
    server.faults = [api.status(code, Location=f"{server.url}/api/retail/prices")]
    assert f"answers with a redirect ({code}), which is not followed" in refusal(server)
    assert len(server.requests) == 1


def test_a_client_that_would_follow_redirects_does_not(server: RetailServer) -> None:
    server.faults = [api.status(302, Location=f"{server.url}/api/retail/prices")]
    with httpx.Client(follow_redirects=True) as client:
        refusal(server, client=client)
        assert not client.is_closed


@pytest.mark.parametrize(
    ("fault", "says"),
    [
        (api.hang, "does not answer in time"),
        (api.trickle, "is not done after 0.2 s"),
        (api.trickling_header, "is not done after 0.2 s"),
        (api.cut_short, "cannot be read (RemoteProtocolError)"),
        (api.body(b""), "no JSON that can be read"),
        (api.body(b"<html>gateway</html>"), "no JSON that can be read"),
        (api.body(b"\xff\xfe\x00"), "no JSON that can be read"),
        (api.body("[" * 100_000), "no JSON that can be read"),
        (api.body("9" * 5000), "no JSON that can be read"),
        (api.body(json.dumps(api.page(row(5.0))).replace("5.0", "1e9999999999999999999")), "no JSON that can be read"),
        (api.body("[]"), "its top level"),
        (api.body("{}"), "BillingCurrency: Field required"),
        (api.body({"BillingCurrency": "USD"}), "Items: Field required"),
        (api.body(api.page() | {"Items": {}}), "Items"),
        (api.body(api.page(NextPageLink=7)), "NextPageLink"),
        (api.body({"BillingCurrency": "USD", "Items": ["text"]}), "Items.0"),
        (api.body({"BillingCurrency": "USD", "Items": [{"retailPrice": 1}]}), "Items.0.currencyCode"),
        (api.body(api.page(row(1) | {"retailPrice": "3.673"})), "Items.0.retailPrice"),
        (api.body(api.page(row(1) | {"retailPrice": None})), "Items.0.retailPrice"),
        (api.body(api.page(row(1) | {"retailPrice": True})), "Items.0.retailPrice"),
        (api.body(api.page(row(-3.673))), "Items.0.retailPrice"),
        (api.body(api.page(row(1e300))), "Items.0.retailPrice"),
        (api.body(api.page(row(1, savingsPlan=[{"retailPrice": "x"}]))), "Items.0.savingsPlan.0.retailPrice"),
        (api.body(api.page(row(1, effectiveStartDate="yesterday"))), "Items.0.effectiveStartDate"),
        (api.body(json.dumps(api.page(row(5.0))).replace("5.0", "NaN")), "no JSON that can be read"),
        (api.body(api.page(BillingCurrency="EUR")), "answers in 'EUR' where USD was asked for"),
    ],
)
def test_an_answer_that_is_no_price_list_is_refused_in_one_sentence(
    server: RetailServer, fault: api.Fault, says: str
) -> None:
    server.faults = [None, fault]
    text = refusal(server, timeouts=HASTY if fault in (api.hang, api.trickle, api.trickling_header) else None)
    assert says in text
    assert f"/api/retail/prices ({H200})" in text
    assert text.endswith("the price sheet in use stays as it is")


def test_an_answer_without_end_is_refused(server: RetailServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(requests, "MAX_BYTES", 1_000_000)
    server.faults = [api.endless]
    assert "sends more than 1,000,000 bytes on one page" in refusal(server)


def test_an_address_where_nothing_answers_is_refused(server: RetailServer) -> None:
    with RetailServer() as gone:
        pass
    assert "cannot be read (ConnectError): check the network and proxy" in refusal(gone.url)


def test_one_request_that_fails_at_the_end_refuses_the_whole_refresh(server: RetailServer) -> None:
    groups = len({(q.service, q.product, q.sku) for q in meter_queries()})
    server.faults = [None] * (3 + groups - 1) + [api.status(500)]
    assert "refuses with status 500" in refusal(server)


def test_a_price_list_that_knows_none_of_the_sizes_is_refused_and_no_service_is_asked_for(server: RetailServer) -> None:
    server.rows = SERVICES
    assert "no price of any of the 3 sizes" in refusal(server)
    assert len(server.requests) == 3


@pytest.mark.parametrize("endpoint", ["prices.azure.com", "ftp://prices.azure.com", "https://", "https://a:b:c", ""])
def test_what_is_no_address_is_refused(endpoint: str) -> None:
    assert "is not the address of a price list" in refusal(endpoint)


def test_a_proxy_that_cannot_be_used_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HTTPS_PROXY", "gopher://proxy")
    assert "the proxy in" in refusal("https://127.0.0.1")


def test_no_size_is_refused(server: RetailServer) -> None:
    assert "no size was named" in refusal(server, skus=())
    assert not server.requests


# ------------------------------------------------------------------------------------------------------------ currency


def test_the_rate_of_a_currency_is_read_from_the_dearest_size(server: RetailServer) -> None:
    server.rates["EUR"] = 0.858712345
    refreshed = refresh(server, currency="eur")
    assert server.requests[0].query["currencyCode"] == "'EUR'"
    assert H200 in server.requests[0].filter
    assert all(request.query["currencyCode"] == "'USD'" for request in server.requests[1:])
    # 84.8 x 0.858712345 = 72.818807 in EUR; / 84.8 = 0.85871234.., to 6 digits 0.858712
    assert refreshed.content.exchange_rates == {"EUR": ("0.858712", FRESH), "SEK": ("9.5", "map")}
    assert refreshed.content.currency == "USD"
    assert new_sheet(refreshed).rate(A100, "eastus", "on-demand") == Decimal("3.673")


def test_without_another_currency_the_rates_are_carried(server: RetailServer) -> None:
    refreshed = refresh(server)
    assert refreshed.content.exchange_rates == {"EUR": ("0.91", "map"), "SEK": ("9.5", "map")}


def test_where_the_dearest_size_is_missing_the_next_is_asked_for(server: RetailServer) -> None:
    server.rows = [r for r in server.rows if r["armSkuName"] != H200]
    refreshed = refresh(server, currency="EUR")
    # of MISSING there is nothing either; A100 in westeurope: 4.775 x 0.8587 = 4.10029, / 4.775
    assert refreshed.content.exchange_rates["EUR"] == ("0.8587", FRESH)
    assert [r.filter.rpartition(" ")[2].strip("'") for r in server.requests[:3]] == [H200, MISSING, A100]


def test_a_currency_that_azure_does_not_know_is_refused_at_once(server: RetailServer) -> None:
    assert "refuses with status 400" in refusal(server, currency="XXX")
    assert len(server.requests) == 1


def test_a_currency_that_is_answered_in_usd_is_refused(server: RetailServer) -> None:
    server.faults = [api.body(api.page(row(84.8, sku=H200)))]
    assert "answers in 'USD' where XTS was asked for" in refusal(server, currency="XTS")


def test_a_currency_in_which_no_size_is_listed_is_refused(server: RetailServer) -> None:
    server.always = api.body(api.page(BillingCurrency="EUR"))
    assert "has no size in EUR" in refusal(server, currency="EUR", skus=(A100, H200, MISSING, "Standard_D2s_v5"))
    assert len(server.requests) == 3  # the three dearest


def test_a_rate_needs_the_same_size_in_both_currencies(server: RetailServer) -> None:
    abroad = row(72.8, "brazilsouth", sku=H200, currencyCode="EUR")
    server.faults = [api.body(api.page(abroad, BillingCurrency="EUR"))]
    assert "has no size in both USD and EUR" in refusal(server, currency="EUR")


@pytest.mark.parametrize("currency", ["", "EURO", "E1R", "EU", "'E'", "E\nR"])
def test_a_currency_is_three_letters(server: RetailServer, currency: str) -> None:
    assert "is not a currency: give its three letters" in refusal(server, currency=currency)
    assert not server.requests


# -------------------------------------------------------------------------------------------------------------- saving


def test_a_saved_sheet_is_the_newest_and_is_read_back(server: RetailServer) -> None:
    refreshed = refresh(server)
    path = save(refreshed.content)
    assert path == cached_sheets()[-1]
    assert path.name == "2026-11-22.json"
    loaded = load_sheet()
    assert loaded.path == path
    assert loaded.rate(A100, "eastus", "on-demand") == Decimal("3.673")
    assert load_sheet("2026-11-22").digest == loaded.digest
    assert loaded.as_of == DAY


def test_a_second_sheet_of_the_day_replaces_the_first(server: RetailServer, tmp_path: Path) -> None:
    content = refresh(server).content
    first = save(content, tmp_path)
    again = save(content.model_copy(update={"description": "again"}), tmp_path)
    assert again == first
    assert [path.name for path in tmp_path.glob("*.json")] == ["2026-11-22.json"]
    assert load_sheet(str(again)).description == "again"


@pytest.mark.parametrize("step", ["write_text", "replace"])
def test_a_save_that_fails_halfway_leaves_the_old_sheet(
    server: RetailServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    content = refresh(server).content
    path = save(content, tmp_path / "sheets")
    before = path.read_bytes()
    original: Callable[..., Any] = getattr(Path, step)

    def fail(self: Path, *args: Any, **options: Any) -> None:
        if step == "write_text":
            original(self, args[0][:100], **options)  # the disk is full after 100 characters
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, step, fail)
    with pytest.raises(PlannerError, match="cannot be written \\(No space left on device\\): free space"):
        save(content.model_copy(update={"description": "newer"}), tmp_path / "sheets")
    monkeypatch.undo()
    assert path.read_bytes() == before
    assert [p.name for p in path.parent.iterdir()] == ["2026-11-22.json"]


def test_a_folder_that_cannot_be_written_is_refused(server: RetailServer, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(PlannerError, match="cannot be written"):
        save(refresh(server).content, tmp_path / "file")


def test_a_sheet_that_would_not_be_read_back_is_not_written(tmp_path: Path) -> None:
    content = SheetFile.model_validate(BASE | {"offers": [[A100, "eastus", "spot", "-1", "map"]]})
    with pytest.raises(PlannerError, match="is not a price sheet"):
        save(content, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_what_a_save_that_was_killed_left_behind_is_no_sheet(server: RetailServer) -> None:
    path = save(refresh(server).content)
    for name in (".2026-12-24.json.123.tmp", "2026-12-24.json.tmp"):
        path.with_name(name).write_text("{")
    assert load_sheet().name == "2026-11-22"


def test_the_planner_starts_without_the_http_library() -> None:
    code = "import sys, planner.catalog.prices.retail; print('httpx' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
