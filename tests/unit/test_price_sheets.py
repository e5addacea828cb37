"""The two price sheets that come with Tonnage: the integrity of their figures, and what a malformed sheet is told."""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Iterator
from datetime import date
from decimal import Decimal
from importlib.resources import files
from itertools import pairwise
from typing import Any

import pytest

from planner.catalog import read_facts
from planner.catalog.assumptions import assumptions
from planner.catalog.hardware import VmSku, skus
from planner.catalog.prices import (
    BUNDLED,
    COMMITTED,
    DEFAULT,
    EVERYWHERE,
    PriceSheet,
    Priority,
    SheetFile,
    load_sheet,
    parse_sheet,
    sheet_text,
)
from planner.errors import PlannerError

NEWEST = date(2026, 11, 30)
REFERENCE = "2026-01-reference"

# Azure sells these at the on-demand price although the API has a spot meter for them.
SPOT_AT_THE_ON_DEMAND_PRICE = {
    ("Standard_ND96isr_H200_v5", region)
    for region in ("francecentral", "northeurope", "polandcentral", "swedencentral")
}
# Sizes whose on-demand price grows with their vCPUs, hence with their GPUs or their share of one.
LINEAR = [
    ("NC24ads_A100_v4", "NC48ads_A100_v4", "NC96ads_A100_v4"),
    ("NC40ads_H100_v5", "NC80adis_H100_v5"),
    ("NC8ads_A10_v4", "NC16ads_A10_v4", "NC32ads_A10_v4"),
    ("NC6s_v3", "NC12s_v3", "NC24s_v3"),
    ("NV6ads_A10_v5", "NV12ads_A10_v5"),
    ("NV18ads_A10_v5", "NV36ads_A10_v5"),
    ("NV4ads_V710_v5", "NV8ads_V710_v5", "NV12ads_V710_v5", "NV24ads_V710_v5"),
    ("NV4as_v4", "NV8as_v4", "NV16as_v4", "NV32as_v4"),
    ("NV12s_v3", "NV24s_v3", "NV48s_v3"),
    ("NC128ds_xl_RTXPRO6000BSE_v6", "NC256ds_xl_RTXPRO6000BSE_v6"),
    ("NC128lds_xl_RTXPRO6000BSE_v6", "NC256lds_xl_RTXPRO6000BSE_v6"),
    ("NC132ds_xl_RTXPRO6000BSE_v6", "NC264ds_xl_RTXPRO6000BSE_v6"),
    ("NC132lds_xl_RTXPRO6000BSE_v6", "NC264lds_xl_RTXPRO6000BSE_v6"),
    ("NC144lds_xl_RTXPRO6000BSE_v6", "NC288lds_xl_RTXPRO6000BSE_v6"),
]
# Sizes of a family that follow another rule, as multiples of a size of theirs: (size, of, low, high), and why.
MULTIPLES = [
    ("NC24rs_v3", "NC24s_v3", "1.10", "1.10"),  # InfiniBand costs a tenth more
    ("NV36adms_A10_v5", "NV36ads_A10_v5", "1.41", "1.42"),  # twice the memory
    ("NV72ads_A10_v5", "NV36ads_A10_v5", "2.03", "2.04"),  # two whole cards, and more memory a card
    ("NV28adms_V710_v5", "NV24ads_V710_v5", "1.20", "1.20"),  # the whole card, with memory
    ("NC320ds_xl_RTXPRO6000BSE_v6", "NC256ds_xl_RTXPRO6000BSE_v6", "1.30", "1.30"),  # the same two cards, more CPU
    ("NC320lds_xl_RTXPRO6000BSE_v6", "NC256lds_xl_RTXPRO6000BSE_v6", "1.30", "1.30"),
    ("NC324ds_xl_RTXPRO6000BSE_v6", "NC264ds_xl_RTXPRO6000BSE_v6", "1.30", "1.30"),
    ("NC324lds_xl_RTXPRO6000BSE_v6", "NC264lds_xl_RTXPRO6000BSE_v6", "1.30", "1.30"),
    # shares of a card: half a card costs more than half
    ("NC64ds_xl_RTXPRO6000BSE_v6", "NC32ds_xl_RTXPRO6000BSE_v6", "1.96", "1.97"),
    ("NC64lds_xl_RTXPRO6000BSE_v6", "NC32lds_xl_RTXPRO6000BSE_v6", "1.96", "1.97"),
    ("NC72ds_xl_RTXPRO6000BSE_v6", "NC36ds_xl_RTXPRO6000BSE_v6", "1.96", "1.97"),
    ("NC72lds_xl_RTXPRO6000BSE_v6", "NC36lds_xl_RTXPRO6000BSE_v6", "1.96", "1.97"),
    ("NC32lds_xl_RTXPRO6000BSE_v6", "NC16lds_xl_RTXPRO6000BSE_v6", "1.09", "1.11"),
    ("NC36lds_xl_RTXPRO6000BSE_v6", "NC24lds_xl_RTXPRO6000BSE_v6", "1.09", "1.11"),
    ("NC16lds_xl_RTXPRO6000BSE_v6", "NC8lds_xl_RTXPRO6000BSE_v6", "2.05", "2.06"),
    # more memory (ds) costs 16 % more than less (lds)
    ("NC128ds_xl_RTXPRO6000BSE_v6", "NC128lds_xl_RTXPRO6000BSE_v6", "1.16", "1.16"),
    ("NC132ds_xl_RTXPRO6000BSE_v6", "NC132lds_xl_RTXPRO6000BSE_v6", "1.16", "1.16"),
    # listed at the price of the size with less memory in June; from August three regions have their own
    ("NC144ds_xl_RTXPRO6000BSE_v6", "NC144lds_xl_RTXPRO6000BSE_v6", "1.00", "1.16"),
    ("NC288ds_xl_RTXPRO6000BSE_v6", "NC288lds_xl_RTXPRO6000BSE_v6", "1.00", "1.00"),
    # T4: the card and its CPU are priced apart, see the test of that rule; four of them come cheaper
    ("NC8as_T4_v3", "NC4as_T4_v3", "1.40", "1.45"),
    ("NC16as_T4_v3", "NC8as_T4_v3", "1.58", "1.62"),
    ("NC64as_T4_v3", "NC16as_T4_v3", "3.60", "3.63"),
]
# In October this size had come down to the price it has in eastus, its siblings there were last read in June.
PRICES_OF_DIFFERENT_DAYS = {("NC128ds_xl_RTXPRO6000BSE_v6", "centralus")}
# Spot shares that differ inside a family and region: one of two spot meters is known for the first, and fractions
# of an RTX PRO have a share of their own in northeurope.
SHARES_THAT_DIFFER = {("NC96ads_A100_v4", "swedencentral")} | {
    (f"NC{size}_xl_RTXPRO6000BSE_v6", "northeurope") for size in ("16lds", "32ds", "32lds", "64ds", "64lds")
}
# AMD's price per vCPU is below that of the same size with Intel everywhere.
INTEL_TWIN = {"Dasv5": "Dsv5", "Dadsv5": "Ddsv5", "Eadsv5": "Edsv5"}

TEN_THOUSAND = "10,000 operations"
TEN_MILLION = "10,000,000 samples"
# The names that sheets, the cost model and the live reader share, and what one unit of each is.
METERS = {
    **dict.fromkeys(("aks-standard", "aks-premium", "aks-automatic"), "hour"),
    "aks-automatic-general-vcpu": "vCPU-hour",
    **{f"blob-{tier}-{kind}": "GB-month" for tier in ("hot", "cool", "cold", "premium") for kind in ("lrs", "zrs")},
    "blob-archive-lrs": "GB-month",
    **{
        f"blob-{tier}-lrs-{kind}": TEN_THOUSAND
        for tier in ("hot", "cool", "cold", "archive", "premium")
        for kind in ("writes", "reads")
    },
    "blob-hot-zrs-writes": TEN_THOUSAND,
    "blob-hot-zrs-reads": TEN_THOUSAND,
    **{f"blob-{tier}-retrieval": "GB" for tier in ("cool", "cold", "archive")},
    **{f"disk-premium-{size}": "disk-month" for size in ("p10", "p15", "p20", "p30", "p40")},
    **{f"disk-standard-{size}": "disk-month" for size in ("e10", "e15", "e20", "e30")},
    **dict.fromkeys(("egress-internet", "egress-inter-region", "vnet-peering"), "GB"),
    **dict.fromkeys(("public-ip", "load-balancer", "load-balancer-rule", "nat-gateway", "private-endpoint"), "hour"),
    **dict.fromkeys(("load-balancer-data", "nat-gateway-data", "private-endpoint-data"), "GB"),
    "private-dns-zone": "zone-month",
    **dict.fromkeys(("log-analytics", "log-basic", "log-auxiliary"), "GB"),
    **dict.fromkeys(("log-retention", "log-archive", "acr-storage"), "GB-month"),
    **dict.fromkeys(("prometheus-samples", "prometheus-queries"), TEN_MILLION),
    "metric-alerts": "series-month",
    "grafana-node": "hour",
    "grafana-user": "user-month",
    **dict.fromkeys(("key-vault-operations", "key-vault-advanced-operations"), TEN_THOUSAND),
    **dict.fromkeys(("acr-basic", "acr-standard", "acr-premium"), "day"),
    "acr-build": "vCPU-second",
}
FLAT = {
    "flat-load-balancer": "month",
    "flat-operations-development": "month",
    "flat-operations-production": "month",
    "flat-operations-enterprise": "month",
}

YEARS: tuple[tuple[Priority, Priority], ...] = (
    ("savings-plan-1y", "savings-plan-3y"),
    ("reserved-1y", "reserved-3y"),
)

each_sheet = pytest.mark.parametrize("name", BUNDLED)


def _bytes(name: str) -> bytes:
    return (files("planner.catalog.prices") / f"{name}.json").read_bytes()


def _content(name: str) -> SheetFile:
    return SheetFile.model_validate_json(_bytes(name))


def _usd(sku: str, region: str, priority: Priority = "on-demand", sheet: str = DEFAULT) -> Decimal | None:
    offer = load_sheet(sheet).offer(f"Standard_{sku}", region, priority)
    return None if offer is None else offer.usd


def _cpu_family(sku: str) -> tuple[str, int] | None:
    """Name of the CPU family and vCPUs of a size, None where no family's pattern fits."""
    found = [
        (family["name"], int(match["vcpu"]))
        for family in read_facts("cpu.json")["families"]
        if (match := re.fullmatch(family["pattern"], sku))
    ]
    assert len(found) <= 1, f"{sku} fits more than one family"
    return found[0] if found else None


def _cpu_rates(sheet: PriceSheet) -> dict[tuple[str, str], list[Decimal]]:
    """(family, region) -> the on-demand USD per vCPU and hour of its sizes."""
    rates = defaultdict(list)
    for sku in sheet.skus():
        if family := _cpu_family(sku):
            for region in sheet.regions:
                if (usd := sheet.rate(sku, region, "on-demand")) is not None:
                    rates[family[0], region].append(usd / family[1])
    return rates


def _pairs(size: str, other: str) -> Iterator[tuple[str, Decimal, Decimal]]:
    """(region, on-demand of the first, of the second) wherever both have one, but for prices of different days."""
    for region in load_sheet(DEFAULT).regions:
        first, second = _usd(size, region), _usd(other, region)
        if first and second and not {(size, region), (other, region)} & PRICES_OF_DIFFERENT_DAYS:
            yield region, first, second


# ------------------------------------------------------------------------------------------------------- both sheets


@each_sheet
def test_a_bundled_sheet_loads_under_its_own_name(name: str) -> None:
    sheet = load_sheet(name)
    assert sheet.name == name
    assert sheet.path is None
    assert sheet.description.endswith(".")
    assert sheet.skus()
    assert sheet.meters()


@each_sheet
def test_a_bundled_file_is_what_sheet_text_writes_byte_for_byte(name: str) -> None:
    assert sheet_text(_content(name)).encode() == _bytes(name)


@each_sheet
def test_a_price_is_written_without_needless_zeros(name: str) -> None:
    content = _content(name)
    texts = [offer[3] for offer in content.offers] + [
        t for meter in content.meters for tier in meter.tiers for t in tier
    ]
    assert [text for text in texts if text != "0" and format(Decimal(text).normalize(), "f") != text] == []


@each_sheet
def test_every_price_is_above_zero(name: str) -> None:
    sheet = load_sheet(name)
    assert all(offer.usd > 0 for sku in sheet.skus() for offer in sheet.offers(sku))
    assert all(tier.usd > 0 for meter in sheet.meters() for tier in meter.tiers[1:] or meter.tiers)


@each_sheet
def test_spot_costs_between_a_twentieth_of_on_demand_and_on_demand(name: str) -> None:
    sheet = load_sheet(name)
    for sku in sheet.skus():
        for region in sheet.regions:
            on_demand, spot = sheet.rate(sku, region, "on-demand"), sheet.rate(sku, region, "spot")
            if on_demand is None or spot is None:
                continue
            assert on_demand / 20 <= spot <= on_demand, (sku, region)
            assert (spot == on_demand) == ((sku, region) in SPOT_AT_THE_ON_DEMAND_PRICE), (sku, region)


@each_sheet
def test_a_commitment_costs_less_by_the_hour_than_on_demand_and_three_years_less_than_one(name: str) -> None:
    sheet = load_sheet(name)
    for sku in sheet.skus():
        for region in sheet.regions:
            on_demand = sheet.rate(sku, region, "on-demand")
            rates = {priority: sheet.rate(sku, region, priority) for priority in COMMITTED}
            for priority, rate in rates.items():
                # less than a fifth would be a term total read as something else, or the reverse
                assert rate is None or (on_demand is not None and on_demand / 5 < rate < on_demand), (
                    sku,
                    region,
                    priority,
                )
            for one, three in YEARS:
                longer, shorter = rates[three], rates[one]
                assert longer is None or (shorter is not None and longer < shorter), (sku, region, three)


@each_sheet
def test_on_demand_is_known_wherever_another_price_is(name: str) -> None:
    sheet = load_sheet(name)
    without = {
        (sku, offer.region)
        for sku in sheet.skus()
        for offer in sheet.offers(sku)
        if sheet.rate(sku, offer.region, "on-demand") is None
    }
    assert without == set()


@each_sheet
def test_every_source_says_where_and_when_and_is_used(name: str) -> None:
    content = _content(name)
    used = {offer[4] for offer in content.offers} | {meter.source for meter in content.meters}
    used |= {source for _, source in content.exchange_rates.values()}
    assert used == set(content.sources)
    for key, provenance in content.sources.items():
        assert provenance.source, key
        assert date(2024, 1, 1) <= provenance.as_of <= NEWEST, key
        assert provenance.note or not provenance.estimate, f"{key} is an estimate and does not say by which rule"
        assert (provenance.source + provenance.note).isascii(), key


@each_sheet
def test_a_region_is_one_plain_lower_case_word(name: str) -> None:
    sheet = load_sheet(name)
    regions = {*sheet.regions, *(meter.region for meter in sheet.meters())} - {EVERYWHERE}
    assert [region for region in regions if not re.fullmatch(r"[a-z]+[0-9]?", region)] == []
    assert regions <= set(sheet.regions)


@each_sheet
def test_every_size_of_the_catalog_is_priced_or_said_to_have_no_price(name: str) -> None:
    sheet = load_sheet(name)
    known = {size.name for size in skus()}
    assert known <= set(sheet.skus()) | set(sheet.unpriced)
    assert not set(sheet.skus()) & set(sheet.unpriced)
    assert set(sheet.unpriced) <= known
    assert all(sheet.unpriced.values())


@each_sheet
def test_a_size_with_a_price_is_in_the_catalog_under_its_own_name_or_belongs_to_one_cpu_family(name: str) -> None:
    known = {size.name for size in skus()}
    aliases = {alias for size in skus() for alias in size.aliases}
    for sku in load_sheet(name).skus():
        assert sku not in aliases, sku
        # GPU sizes that the catalog leaves out have prices all the same
        assert (_cpu_family(sku) is not None) == (sku not in known and not sku.startswith("Standard_N")), sku


@each_sheet
def test_a_meter_has_a_name_and_a_unit_of_the_shared_vocabulary(name: str) -> None:
    vocabulary = METERS if name == DEFAULT else METERS | FLAT
    for meter in load_sheet(name).meters():
        assert vocabulary.get(meter.name) == meter.unit, meter.name


# ------------------------------------------------------------------------------------------ the default sheet's offers


def test_the_default_sheet_prices_a_size_where_the_catalog_says_it_is_priced() -> None:
    sheet = load_sheet(DEFAULT)
    for size in skus():
        priced = {region for region in sheet.regions if sheet.rate(size.name, region, "on-demand") is not None}
        assert priced == set(size.regions), size.name


def test_only_two_gb300_sizes_have_no_price_anywhere() -> None:
    assert set(load_sheet(DEFAULT).unpriced) == {"Standard_ND128isr_GB300_v6", "Standard_ND128isrG5_GB300_v6"}


@pytest.mark.parametrize("group", LINEAR, ids=lambda group: group[0])
def test_on_demand_grows_with_the_vcpus_of_a_family(group: tuple[str, ...]) -> None:
    first, *others = group
    for other in others:
        # the digits of `NC24ads_A100_v4` are its vCPUs
        ratio = Decimal(re.findall(r"\d+", other)[0]) / Decimal(re.findall(r"\d+", first)[0])
        regions = 0
        for region, small, large in _pairs(first, other):
            regions += 1
            # each is rounded to a tenth of a cent, which counts most on the smallest: 0.2 % and a tenth of a cent
            assert abs(large - ratio * small) <= Decimal("0.002") * large + Decimal("0.001"), (other, region)
        assert regions


@pytest.mark.parametrize(("size", "of", "low", "high"), MULTIPLES, ids=lambda value: str(value).split("_")[0])
def test_a_size_that_does_not_grow_with_its_vcpus_keeps_its_own_ratio(size: str, of: str, low: str, high: str) -> None:
    ratios = [(first / second, region) for region, first, second in _pairs(size, of)]
    assert ratios
    assert [r for r in ratios if not Decimal(low) - Decimal("0.003") <= r[0] <= Decimal(high) + Decimal("0.003")] == []


def test_every_size_of_a_family_with_several_follows_a_listed_rule() -> None:
    by_family: dict[str, list[VmSku]] = defaultdict(list)
    for size in skus():
        by_family[size.quota_family].append(size)
    ruled = {name for group in LINEAR for name in group} | {name for size, of, *_ in MULTIPLES for name in (size, of)}
    unpriced = load_sheet(DEFAULT).unpriced
    several = {s.short_name for f in by_family.values() if len(f) > 1 for s in f if s.name not in unpriced}
    assert several == ruled


def test_each_t4_size_adds_its_vcpus_to_the_price_of_one_card() -> None:
    # eastus: 0.526, 0.752, 1.204: 4 vCPUs more cost 0.226, 8 more cost 2 x 0.226 = 0.452, so the card alone is 0.30
    assert [_usd(f"NC{n}as_T4_v3", "eastus") for n in (4, 8, 16)] == [
        Decimal("0.526"),
        Decimal("0.752"),
        Decimal("1.204"),
    ]
    for region in load_sheet(DEFAULT).regions:
        four, eight, sixteen = (_usd(f"NC{n}as_T4_v3", region) for n in (4, 8, 16))
        if four and eight and sixteen:
            assert abs((sixteen - eight) - 2 * (eight - four)) <= Decimal("0.004"), (
                region
            )  # each size is rounded on its own


def test_the_share_that_spot_costs_is_the_same_inside_a_family_and_region() -> None:
    sheet = load_sheet(DEFAULT)
    shares: dict[tuple[str, str | None, str], list[tuple[Decimal, str]]] = defaultdict(list)
    for size in skus():
        for region in sheet.regions:
            on_demand, spot = sheet.rate(size.name, region, "on-demand"), sheet.rate(size.name, region, "spot")
            if on_demand and spot and (size.short_name, region) not in SHARES_THAT_DIFFER:
                shares[size.quota_family, size.gpu, region].append((spot / on_demand, size.short_name))
    for key, found in shares.items():
        assert max(found)[0] - min(found)[0] < Decimal("0.0001"), (key, min(found), max(found))


def test_a_spot_estimate_is_only_made_for_a_size_that_can_be_spot_beside_one_with_a_real_price() -> None:
    sheet = load_sheet(DEFAULT)
    by_name = {size.name: size for size in skus()}
    real: dict[tuple[str, str | None, str], int] = defaultdict(int)
    estimated = []
    for sku in sheet.skus():
        for offer in sheet.offers(sku):
            if offer.priority != "spot" or sku not in by_name:
                continue
            key = (by_name[sku].quota_family, by_name[sku].gpu, offer.region)
            if offer.provenance.estimate:
                estimated.append((by_name[sku], key))
            else:
                real[key] += 1
    assert {key[2] for _, key in estimated} == {"centralus", "eastus", "switzerlandnorth"}
    assert all(size.spot_supported and real[key] for size, key in estimated)


@pytest.mark.parametrize(
    ("sku", "expected"),
    [
        ("NC48ads_A100_v4", "1.35754"),  # 7.346 x 0.67877 / 3.673
        ("NC96ads_A100_v4", "2.71508"),  # 14.692 x 0.67877 / 3.673
        ("NC8as_T4_v3", "0.213268"),  # 0.752 x 0.149174 / 0.526 = 0.2132678
        ("NC256ds_xl_RTXPRO6000BSE_v6", "2.358048"),  # 12.76 x 1.179024 / 6.38
    ],
)
def test_a_missing_spot_price_in_eastus_is_estimated_from_its_family_and_marked(sku: str, expected: str) -> None:
    offer = load_sheet(DEFAULT).offer(f"Standard_{sku}", "eastus", "spot")
    assert offer is not None
    assert offer.usd == Decimal(expected)
    assert offer.provenance.estimate
    assert "share" in offer.provenance.note


def test_no_spot_price_is_invented_where_no_size_of_the_family_has_one() -> None:
    for sku, region in [("NC40ads_H100_v5", "eastus"), ("NC24ads_A100_v4", "westus3"), ("NV36ads_A10_v5", "eastus")]:
        assert _usd(sku, region) is not None
        assert _usd(sku, region, "spot") is None


@pytest.mark.parametrize(
    ("sku", "region", "on_demand", "spot"),
    [
        ("NC24ads_A100_v4", "eastus", "3.673", "0.67877"),
        ("NC8as_T4_v3", "swedencentral", "0.796", "0.23084"),
        ("ND96isr_H100_v5", "eastus", "98.32", "18.169536"),
        ("ND96asr_v4", "westeurope", "35.357", "7.77854"),  # read under its other ARM name
        # two spot meters at once, 2.7975 and 2.2376, and 7.3229 and 5.858: the selection rule takes the first
        ("NC40ads_H100_v5", "spaincentral", "9.074", "2.7975"),
        ("NC96ads_A100_v4", "swedencentral", "19.1", "7.3229"),
        ("D4s_v5", "eastus2", "0.192", "0.061171"),
    ],
)
def test_a_price_read_by_hand_is_in_the_default_sheet(sku: str, region: str, on_demand: str, spot: str) -> None:
    assert _usd(sku, region) == Decimal(on_demand)
    assert _usd(sku, region, "spot") == Decimal(spot)
    offer = load_sheet(DEFAULT).offer(f"Standard_{sku}", region, "spot")
    assert offer is not None
    assert not offer.provenance.estimate


def test_the_newest_of_several_readings_counts() -> None:
    # 7.15 on 2026-06-18, 8.294 on 2026-08-22; 7.853 on 2026-06-18, 6.38 on 2026-10-29
    assert _usd("NC144ds_xl_RTXPRO6000BSE_v6", "swedencentral") == Decimal("8.294")
    assert _usd("NC128ds_xl_RTXPRO6000BSE_v6", "centralus") == Decimal("6.38")


@pytest.mark.parametrize(
    ("sku", "region", "priority", "total", "per_hour"),
    [
        ("D4s_v5", "eastus2", "reserved-1y", "1038", "0.1185"),  # / 8760 h = 0.11849
        ("D4s_v5", "eastus2", "reserved-3y", "1993", "0.0758"),  # / 26280 h = 0.07584
        ("D4s_v5", "centralus", "reserved-1y", "992", "0.1132"),  # / 8760 h = 0.11324
        ("NC48ads_A100_v4", "eastus", "reserved-1y", "42066", "4.8021"),  # / 8760 h = 4.80205
        ("NC24ads_A100_v4", "eastus", "reserved-1y", "21033", "2.4010"),  # half of 42,066; / 8760 h = 2.40103
        ("NC96ads_A100_v4", "eastus", "reserved-1y", "84132", "9.6041"),  # twice 42,066; / 8760 h = 9.60411
    ],
)
def test_a_reservation_is_the_price_of_the_whole_term(
    sku: str, region: str, priority: Priority, total: str, per_hour: str
) -> None:
    offer = load_sheet(DEFAULT).offer(f"Standard_{sku}", region, priority)
    assert offer is not None
    assert offer.usd == Decimal(total)
    assert round(offer.usd_per_hour, 4) == Decimal(per_hour)
    assert offer.provenance.estimate == sku.startswith("NC")  # GPU reservations are known from test data only


# ------------------------------------------------------------------------------------ Windows rates are not Linux rates


def test_a_windows_rate_that_a_source_took_for_linux_is_not_in_the_sheet() -> None:
    assert _usd("NCC40ads_H100_v5", "westeurope") == Decimal("8.9")  # Windows: 10.74
    assert _usd("D16ads_v5", "swedencentral") == Decimal("0.88")  # Cloud Services: 1.616
    assert _usd("NC24ads_A100_v4", "eastus") != Decimal("4.777")
    assert _usd("NC48ads_A100_v4", "eastus") != Decimal("9.554")
    assert _usd("NC80adis_H100_v5", "eastus") != Decimal("17.64")
    assert _usd("ND96isr_H100_v5", "eastus") != Decimal("102.736")


def test_the_sizes_of_a_cpu_family_cost_the_same_per_vcpu_in_a_region() -> None:
    for key, rates in _cpu_rates(load_sheet(DEFAULT)).items():
        assert max(rates) / min(rates) <= Decimal("1.02"), key  # 2 vCPUs are priced to a tenth of a cent


def test_an_amd_size_is_never_dearer_per_vcpu_than_its_intel_twin() -> None:
    # with Windows, 0.046 a vCPU and hour, it would be 1.3 to 1.8 times as dear
    rates = _cpu_rates(load_sheet(DEFAULT))
    compared = [key for key in rates if key[0] in INTEL_TWIN]
    assert compared
    for family, region in compared:
        assert max(rates[family, region]) <= min(rates[INTEL_TWIN[family], region]), (family, region)


def test_no_cpu_family_costs_as_much_per_vcpu_as_it_would_with_windows() -> None:
    # Dsv5 in eastus is 0.048 a vCPU, Windows adds 0.046 and would double it; the dearest Linux families are Edsv5
    # (1.5 times, for twice the memory) and Falsv6 in israelcentral (1.545 times)
    rates = _cpu_rates(load_sheet(DEFAULT))
    for (family, region), found in rates.items():
        assert max(found) <= Decimal("1.56") * min(rates["Dsv5", region]), (family, region)


# ----------------------------------------------------------------------------------------------------------- CPU sizes


def test_a_cpu_family_is_sourced_dated_and_used() -> None:
    families = read_facts("cpu.json")["families"]
    priced = {found[0] for sku in load_sheet(DEFAULT).skus() if (found := _cpu_family(sku))}
    assert {family["name"] for family in families} == priced
    for family in families:
        assert family["source"]
        assert date(2026, 1, 1) <= date.fromisoformat(family["as_of"]) <= NEWEST
        assert family["quota_family"] is None or re.fullmatch(
            r"[Ss]tandard[A-Za-z]+v[0-9]Family", family["quota_family"]
        )
        # D 4 GiB, E 8 GiB and F 2 GiB a vCPU
        assert family["ram_gib_per_vcpu"] == {"D": 4, "E": 8, "F": 2}[family["name"][0]]


@pytest.mark.parametrize(
    ("sku", "family", "vcpu"),
    [
        ("Standard_D4s_v5", "Dsv5", 4),
        ("Standard_D16ads_v5", "Dadsv5", 16),
        ("Standard_D8pds_v6", "Dpdsv6", 8),
        ("Standard_E32s_v5", "Esv5", 32),
        ("Standard_F8als_v6", "Falsv6", 8),
    ],
)
def test_a_cpu_size_is_recognised_by_its_name(sku: str, family: str, vcpu: int) -> None:
    assert _cpu_family(sku) == (family, vcpu)


@pytest.mark.parametrize("sku", ["Standard_E16-4s_v5", "Standard_D4s_v4", "Standard_NC24ads_A100_v4"])
def test_a_size_of_another_family_is_not_taken_for_one_of_these(sku: str) -> None:
    assert _cpu_family(sku) is None


# -------------------------------------------------------------------------------------------------------------- meters


def test_every_meter_of_the_vocabulary_has_a_price_in_every_region() -> None:
    sheet = load_sheet(DEFAULT)
    assert {meter.name for meter in sheet.meters() if meter.region == EVERYWHERE} == set(METERS)


def test_a_price_for_everywhere_is_an_estimate_unless_it_is_known_to_be_the_same_everywhere() -> None:
    same = {"aks-standard", "aks-premium", "aks-automatic", "load-balancer"}
    for meter in load_sheet(DEFAULT).meters():
        if meter.region == EVERYWHERE:
            assert meter.provenance.estimate == (meter.name not in same), meter.name


@pytest.mark.parametrize(
    ("name", "region", "units", "usd"),
    [
        ("egress-internet", "eastus2", "50", "0"),  # the first 100 GB are free
        ("egress-internet", "eastus2", "1000", "78.30"),  # 900 x 0.087
        ("egress-internet", "westeurope", "12000", "1028.64"),  # 10,235 x 0.087 = 890.445; 1,665 x 0.083 = 138.195
        ("log-analytics", "eastus2", "5", "0"),
        ("log-analytics", "eastus2", "6", "2.76"),  # 5 GB are free
        ("metric-alerts", "eastus", "12", "0.20"),  # ten series are free
        ("blob-hot-lrs", "eastus2", "60000", "1097.5232"),  # 51,200 x 0.0184 = 942.08; 8,800 x 0.017664 = 155.4432
        ("blob-archive-lrs", "westeurope", "1000", "1.8"),
        ("load-balancer", "swedencentral", "730", "18.25"),
        ("aks-standard", "japaneast", "730", "73"),
        ("disk-premium-p10", "eastus2", "1", "17.92"),
        ("disk-premium-p10", "eastus", "1", "19.71"),
        ("acr-standard", "westus3", "30", "20.01"),
    ],
)
def test_a_month_of_a_service_costs_what_the_price_list_says(name: str, region: str, units: str, usd: str) -> None:
    meter = load_sheet(DEFAULT).meter(name, region)
    assert meter is not None
    assert meter.cost(Decimal(units)) == Decimal(usd)


def test_tiers_of_egress_begin_where_the_one_before_ends() -> None:
    meter = load_sheet(DEFAULT).meter("egress-internet", "eastus")
    assert meter is not None
    # bounds in GB: 100 free, then 10,235, 40 x 1,024 = 40,960 and 100 x 1,024 = 102,400 more
    starts = [tier.from_units for tier in meter.tiers]
    assert [after - before for before, after in pairwise(starts)] == [100, 10235, 40960, 102400]
    assert meter.free_units == 100


def test_egress_outside_north_america_and_europe_is_marked_as_an_estimate() -> None:
    sheet = load_sheet(DEFAULT)
    for region, estimate in [("eastus", False), ("swedencentral", False), ("japaneast", True), ("brazilsouth", True)]:
        meter = sheet.meter("egress-internet", region)
        assert meter is not None
        assert meter.provenance.estimate == estimate


def test_an_euro_is_the_rate_that_two_prices_imply() -> None:
    rate = load_sheet(DEFAULT).exchange_rate("eur")
    assert rate is not None
    # 2.3699 EUR for 2.76 USD and 0.1374 EUR for 0.16 USD: 0.85866 and 0.85875
    assert abs(rate.per_usd - Decimal("2.3699") / Decimal("2.76")) < Decimal("0.0001")
    assert abs(rate.per_usd - Decimal("0.1374") / Decimal("0.16")) < Decimal("0.0001")
    assert rate.provenance.estimate


# ------------------------------------------------------------------------------------------------- the reference sheet


@pytest.mark.parametrize(
    ("sku", "on_demand", "spot"),
    [
        ("NC8as_T4_v3", "0.75", "0.23"),
        ("NC16as_T4_v3", "1.20", "0.36"),
        ("NC24ads_A100_v4", "3.67", "1.15"),
        ("ND96amsr_A100_v4", "32.77", "8.52"),
        ("NC40ads_H100_v5", "6.98", "2.10"),
        ("D4s_v3", "0.175", None),
    ],
)
def test_the_reference_sheet_has_the_budget_prices_of_january(sku: str, on_demand: str, spot: str | None) -> None:
    assert _usd(sku, "eastus", "on-demand", REFERENCE) == Decimal(on_demand)
    assert _usd(sku, "eastus", "spot", REFERENCE) == (None if spot is None else Decimal(spot))


def test_the_reference_sheet_has_nothing_but_those_prices_and_one_reservation() -> None:
    sheet = load_sheet(REFERENCE)
    assert sheet.regions == ("eastus",)
    assert sheet.as_of == date(2026, 1, 1)
    assert sum(len(sheet.offers(sku)) for sku in sheet.skus()) == 12  # six on demand, five spot, one reservation
    reserved = sheet.offer("Standard_NC24ads_A100_v4", "eastus", "reserved-1y")
    assert reserved is not None
    assert reserved.usd == 12 * 1850  # about 1,850 a month
    assert reserved.provenance.estimate


@pytest.mark.parametrize(
    ("name", "units", "usd"),
    [
        ("blob-hot-lrs", "100", "1.8"),
        ("blob-cool-lrs", "100", "1"),
        ("blob-archive-lrs", "1000", "1"),
        ("egress-internet", "50", "4.35"),  # from the first GB
        ("flat-load-balancer", "1", "20"),
        ("flat-operations-development", "1", "10"),
        ("flat-operations-production", "1", "15"),
        ("flat-operations-enterprise", "1", "30"),
    ],
)
def test_the_reference_sheet_has_flat_service_prices_for_every_region(name: str, units: str, usd: str) -> None:
    meter = load_sheet(REFERENCE).meter(name, "westeurope")
    assert meter is not None
    assert meter.region == EVERYWHERE
    assert meter.cost(Decimal(units)) == Decimal(usd)


# ---------------------------------------------------------------------------------------------------- malformed sheets


def _sheet(**changes: Any) -> bytes:
    """A small sheet that is in order, but for the changes."""
    record = {
        "schema_version": "tonnage.prices/1",
        "name": "small",
        "currency": "USD",
        "sources": {"list": {"source": "a price list", "as_of": "2026-11-01"}},
        "offers": [["Standard_NC4as_T4_v3", "eastus", "on-demand", "0.526", "list"]],
        "meters": [{"name": "aks-standard", "region": "*", "unit": "hour", "tiers": [["0", "0.1"]], "source": "list"}],
    }
    return json.dumps(record | changes).encode()


def _meters(*tiers: list[str], source: str = "list") -> list[dict[str, Any]]:
    return [{"name": "egress-internet", "region": "*", "unit": "GB", "tiers": list(tiers), "source": source}]


def _priced(usd: str, source: str = "list") -> list[list[str]]:
    return [["Standard_NC4as_T4_v3", "eastus", "on-demand", usd, source]]


def test_the_small_sheet_that_the_next_test_breaks_is_in_order() -> None:
    sheet = parse_sheet(_sheet(), "small.json")
    assert sheet.rate("Standard_NC4as_T4_v3", "eastus", "on-demand") == Decimal("0.526")
    assert sheet.meter("aks-standard", "eastus") is not None


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        pytest.param(b"prices", "Invalid JSON", id="not JSON"),
        pytest.param(b"[]", "the file: ", id="not an object"),
        pytest.param(_sheet(schema_version="tonnage.prices/2"), "schema_version: ", id="another schema"),
        pytest.param(_sheet(currency="EUR"), "currency: ", id="another currency"),
        pytest.param(
            _sheet(offers=_priced("0.526", "memory")), "'memory' is not among its sources", id="unknown source"
        ),
        pytest.param(_sheet(offers=_priced("0")), "not above 0", id="a price of zero"),
        pytest.param(_sheet(offers=_priced("-0.526")), "not above 0", id="a negative price"),
        pytest.param(_sheet(offers=_priced("NaN")), "not above 0", id="a price that is NaN"),
        pytest.param(_sheet(offers=_priced("Infinity")), "not above 0", id="a price that is infinite"),
        pytest.param(_sheet(offers=_priced("cheap")), "not a number", id="a price that is a word"),
        pytest.param(_sheet(offers=_priced("0.526") + _priced("0.5")), "two prices", id="two prices of a size"),
        pytest.param(_sheet(meters=_meters(["0", "1"]) * 2), "two prices", id="two prices of a service"),
        pytest.param(
            _sheet(meters=_meters(["0", "1"], source="memory")), "not among its sources", id="a meter's source"
        ),
        pytest.param(_sheet(meters=_meters(["0", "2"], ["9", "1"], ["5", "1"])), "do not rise", id="tiers that fall"),
        pytest.param(_sheet(meters=_meters(["0", "2"], ["0", "1"])), "do not rise", id="two tiers from the same"),
        pytest.param(_sheet(meters=_meters(["5", "2"])), "do not rise from 0", id="tiers that begin late"),
        pytest.param(_sheet(meters=_meters()), "at least 1 item", id="no tiers"),
        pytest.param(_sheet(meters=_meters(["0", "0"])), "not above 0", id="a service for nothing"),
        pytest.param(_sheet(meters=_meters(["0", "0"], ["5", "0"])), "not above 0", id="a second free tier"),
        pytest.param(_sheet(meters=_meters(["0", "-1"])), "is not an amount", id="a negative tier"),
        pytest.param(_sheet(exchange_rates={"EUR": ["0", "list"]}), "not above 0", id="an exchange rate of zero"),
        pytest.param(_sheet(extra=1), "extra", id="a field that no sheet has"),
    ],
)
def test_a_malformed_sheet_is_refused_in_one_sentence_that_names_the_fault(data: bytes, reason: str) -> None:
    with pytest.raises(PlannerError) as refusal:
        parse_sheet(data, "small.json")
    message = str(refusal.value)
    assert message.startswith("small.json is not a price sheet (")
    assert reason in message
    assert "\n" not in message
    assert "planner prices refresh" in message


def test_every_assumption_is_a_range_with_an_owner_and_a_source() -> None:
    for entry in assumptions().values():
        assert 0 <= entry.low <= entry.expected <= entry.high, entry.name
        assert entry.owner in {"platform engineer", "machine-learning engineer", "finance"}
        assert entry.source
        assert entry.text.endswith(".")
