"""The budget page: what Markdown, HTML, JSON and CSV say of one budget, and that they say it safely."""

from __future__ import annotations

import csv
import io
import re
from datetime import date
from decimal import Decimal
from html.parser import HTMLParser
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from planner.budget import (
    Budget,
    BudgetLine,
    Change,
    Commitment,
    MemoryCurve,
    MemoryPoint,
    Rounding,
    Supposed,
    Variance,
    WhatIf,
    read_budget,
)
from planner.catalog.prices import Priority, Provenance
from planner.cost.lines import Alternative, Group
from planner.fit import Step
from planner.pages import budget_csv, budget_html, budget_json, budget_markdown, focus_unit, markdown_text
from planner.pages.charts import bars
from planner.pages.glossary import glossary
from planner.pages.svg import spread, text_width, ticks, wrap
from planner.plan import PricesUsed
from planner.units import GIB

HOSTILE = 'Chat | <script>alert("x")</script> & `more`'
DAY = date(2026, 11, 22)
READ = Provenance(source="price list", as_of=date(2026, 9, 1))
CENTS = Rounding(round_to=Decimal("0.01"), request_to=Decimal(10), request_up=False)


def line(
    key: str,
    amount: str | None,
    *,
    low: str | None = None,
    high: str | None = None,
    group: Group = "compute",
    label: str = "",
    quantity: str = "1",
    unit: str = "hour",
    unit_price: str | None = None,
    service: str = "Virtual Machines",
    sku: str = "",
    priority: Priority | None = None,
    **more: Any,
) -> BudgetLine:
    """A line whose unit price is its amount unless given."""
    number = None if amount is None else Decimal(amount)
    price = amount if unit_price is None else unit_price
    return BudgetLine(
        key=key,
        group=group,
        label=label or key,
        basis=more.pop("basis", ""),
        quantity=Decimal(quantity),
        unit=unit,
        unit_price=None if price is None else Decimal(price),
        low=number if low is None else Decimal(low),
        amount=number,
        high=number if high is None else Decimal(high),
        idle=Decimal(more.pop("idle", "0")),
        formula=more.pop("formula", ""),
        source=more.pop("source", "price list"),
        as_of=more.pop("as_of", date(2026, 9, 1)),
        estimate=more.pop("estimate", False),
        note=more.pop("note", ""),
        service=service,
        sku=sku,
        region="westeurope",
        priority=priority,
        **more,
    )


def budget_of(lines: list[BudgetLine], **more: Any) -> Budget:
    """A budget of those lines with a buffer of 20 %, its request rounded by hand in `more` or equal to the total."""
    total = sum((entry.amount for entry in lines if entry.amount is not None), Decimal(0))
    requested = more.pop("requested", total)
    content = {
        "name": "assistant",
        "title": "Budget: assistant",
        "subject": "Serve a model; Azure region westeurope.",
        "region": "westeurope",
        "generated": DAY,
        "currency": "USD",
        "per_usd": None,
        "lines": tuple(lines),
        "unpriced": tuple(entry.key for entry in lines if entry.amount is None),
        "total_low": sum((entry.low for entry in lines if entry.low is not None), Decimal(0)),
        "total": total,
        "total_high": sum((entry.high for entry in lines if entry.high is not None), Decimal(0)),
        "buffer": Decimal("0.20"),
        "buffer_amount": requested - total,
        "requested": requested,
        "requested_per_quarter": requested * 3,
        "requested_per_year": requested * 12,
        "approved": None,
        "rounding": CENTS,
        "prices": PricesUsed(
            sheet="2026-11", digest="461ec4a199ba", oldest=date(2024, 7, 1), newest=date(2026, 9, 1), estimates=1
        ),
        "price_age_days": 82,
        "inputs_digest": "8d80b166fc471d9d",
        "assumptions": (),
        "what_ifs": (),
        "commitments": (),
    }
    return Budget(**(content | more))


def way(
    priority: Priority, hourly: str, month: str, against: str | None = None, spot: str | None = None
) -> Alternative:
    return Alternative(
        priority=priority,
        usd_per_hour=Decimal(hourly),
        low_usd_per_month=Decimal(month),
        usd_per_month=Decimal(month),
        high_usd_per_month=Decimal(month),
        break_even_hours=None if against is None else Decimal(against),
        break_even_hours_against_spot=None if spot is None else Decimal(spot),
        provenance=READ,
    )


def commitment() -> Commitment:
    """200 hours of a machine at 4 on demand, 1.60 on spot, 2 and 1 reserved: 2 x 730 = 1,460 pays from 365 hours."""
    return Commitment(
        machine="NC24ads_A100_v4",
        sku="Standard_NC24ads_A100_v4",
        hours_per_month=Decimal(200),
        ways=(
            way("on-demand", "4", "800"),
            way("spot", "1.6", "320"),
            way("savings-plan-1y", "3", "2190", "547.5"),
            way("reserved-1y", "2", "1460", "365"),
            way("reserved-3y", "1", "730", "182.5", "456.25"),
        ),
        advice="It is used 200 hours a month: do not commit.",
    )


def curve(boundaries: list[int], longest: int = 40960, label: str = "Serving qwen3-8b") -> MemoryCurve:
    """A curve from 1,024 tokens on, the smallest machine changing after each of the boundaries."""
    edges = [0, *boundaries, longest]
    steps = tuple(
        Step(place=f"NC{24 * (i + 1)}ads_A100_v4", from_tokens=a + 1, to_tokens=b)
        for i, (a, b) in enumerate(pairwise(edges))
    )
    contexts = [2**i for i in range(10, 21) if 2**i < longest] + [longest]
    points = tuple(
        MemoryPoint(
            context=tokens,
            needed_bytes=16 * GIB + tokens * 400_000,
            usable_bytes=79 * GIB,
            place=next(step.place for step in steps if tokens <= step.to_tokens),
        )
        for tokens in contexts
    )
    return MemoryCurve(task="serve", label=label, points=points, steps=steps)


def sample(**more: Any) -> Budget:
    """Spot 1,234.50, reserved 500.00, disks 20.10, egress 0, Defender unpriced: 1,754.60 in all; 20 % more is 2,105.52.

    Low: 1,200.00 + 500.00 + 20.10 = 1,720.10. High: 1,300.25 + 500.00 + 40.40 = 1,840.65.
    """
    lines = [
        line(
            "gpu/serve",
            "1234.50",
            low="1200.00",
            high="1300.25",
            label=HOSTILE,
            basis="NC24ads_A100_v4, 700 hours\nspot",
            quantity="700",
            unit_price="1.763571428571428571428571429",
            sku="Standard_NC24ads_A100_v4",
            priority="spot",
            idle="12.30",
        ),
        line(
            "gpu/batch",
            "500.00",
            label="Night batch",
            quantity="250",
            unit_price="2",
            sku="Standard_NC24ads_A100_v4",
            priority="reserved-1y",
        ),
        line(
            "storage/disks",
            "20.10",
            high="40.40",
            group="storage",
            label="Disks",
            unit="GB-month",
            quantity="201",
            unit_price="0.1",
            service="Storage",
            estimate=True,
            note="Figure of eastus2; other regions differ.",
        ),
        line("network/egress", "0.00", group="network", label="Egress", unit="GB", service="Bandwidth"),
        line(
            "security/defender",
            None,
            group="security",
            label="Defender",
            unit="defender-containers-vcpu",
            service="Microsoft Defender for Cloud",
            source="",
            as_of=None,
            note="the price sheet has no defender-containers-vcpu",
        ),
    ]
    content: dict[str, Any] = {
        "requested": Decimal(2110),
        "assumptions": (
            Supposed(text="Hours a month.", value="700 hours", owner="Ada", source="intent"),
            Supposed(text="Data kept.", value="201 GB", owner="platform engineer", source="intent"),
        ),
        "what_ifs": (
            WhatIf(change="No spot", total=Decimal("3000.00"), difference=Decimal("1245.40"), note="same hours"),
            WhatIf(change="Fewer hours", total=Decimal("1000.00"), difference=Decimal("-754.60"), note=""),
            WhatIf(change="Longer texts", total=None, difference=None, note="ends at 40,960: see `planner size`"),
        ),
        "commitments": (commitment(),),
        "variance": Variance(
            against="Budget: assistant, prices 2026-01, 2026-10-01",
            before_total=Decimal("1800.00"),
            after_total=Decimal("1754.60"),
            changes=(
                Change(
                    key="a",
                    label="Serving",
                    before=Decimal("1300.00"),
                    after=Decimal("1234.50"),
                    difference=Decimal("-65.50"),
                    note="price",
                ),
                Change(
                    key="b",
                    label="Batch",
                    before=None,
                    after=Decimal("500.00"),
                    difference=Decimal("500.00"),
                    note="new",
                ),
                Change(key="c", label="Defender", before=Decimal(5), after=None, difference=None, note="unpriced now"),
            ),
        ),
        "memory": (curve([26848]), curve([1839, 9319, 28267, 29314], label="Fine-tuning qwen3-8b")),
        "notes": ("hours are taken as asked",),
    }
    return budget_of(lines, **(content | more))


# ------------------------------------------------------------------------------------------------------------- Markdown


def tables(markdown: str) -> list[list[list[str]]]:
    """Every table of a Markdown text: rows of cells, the ruler left out; an escaped pipe stays in its cell."""
    found: list[list[list[str]]] = []
    last = False
    for text in markdown.splitlines():
        if text.startswith("|"):
            if not last:
                found.append([])
            found[-1].append([cell.strip() for cell in re.split(r"(?<!\\)\|", text)[1:-1]])
        last = text.startswith("|")
    return found


def table(markdown: str, heading: str) -> list[list[str]]:
    return next(found for found in tables(markdown) if found[0][0] == heading)


def cells_of(markdown: str, start: str) -> list[str]:
    """The cells of the first row whose first cell starts so."""
    return next(row for found in tables(markdown) for row in found if row[0].strip("*").startswith(start))


def test_the_first_block_says_what_is_requested() -> None:
    rows = {row[0].strip("*"): row[1].strip("*") for row in table(budget_markdown(sample()), "What is requested")}
    # 1,754.60 x 1.20 = 2,105.52, to the nearest 10: 2,110; the buffer is the rest; x 3 and x 12
    assert rows["Expected cost of a month, lower bound"] == "1,754.60"
    assert next(value for name, value in rows.items() if name.startswith("Buffer of 20 %")) == "355.40"
    assert rows["Requested a month"] == "2,110.00"
    assert rows["Requested a quarter (3 months)"] == "6,330.00"
    assert rows["Requested a year (12 months)"] == "25,320.00"


def test_an_unpriced_line_is_printed_as_unpriced_and_makes_the_totals_lower_bounds() -> None:
    text = budget_markdown(sample())
    assert cells_of(text, "Defender")[2:] == ["unpriced", "unpriced", "unpriced"]
    assert cells_of(text, "Subtotal, Security")[2].strip("*") == "unpriced"
    assert "1 line has no price and is printed as unpriced: Defender." in text
    assert "lower bounds" in text
    assert cells_of(text, "Total of a month, lower bound")[2:] == ["**1,754.60**", "**1,720.10**", "**1,840.65**"]


def test_a_budget_without_unpriced_lines_speaks_of_no_lower_bound() -> None:
    assert "lower bound" not in budget_markdown(budget_of([line("a", "1.00")]))


def test_a_group_with_some_unpriced_lines_says_that_its_subtotal_leaves_them_out() -> None:
    text = budget_markdown(budget_of([line("a", "1.00"), line("b", None)]))
    assert cells_of(text, "Subtotal")[0].strip("*") == "Subtotal, GPU machines (without unpriced lines)"
    assert cells_of(text, "Subtotal")[2].strip("*") == "1.00"


def test_lines_stand_in_groups_in_plain_words_with_their_subtotals() -> None:
    rows = table(budget_markdown(sample()), "Item")
    groups = [row[0].strip("*") for row in rows if row[0].startswith("**") and not any(row[1:])]
    assert groups == ["GPU machines", "Storage", "Network", "Security"]
    # 1,234.50 + 500.00
    assert cells_of(budget_markdown(sample()), "Subtotal, GPU machines")[2].strip("*") == "1,734.50"


def test_columns_of_figures_are_set_flush_right_and_no_others() -> None:
    right = {
        name
        for found in tables(budget_markdown(sample()))
        for name, rule in zip(found[0], found[1], strict=True)
        if rule == "---:"
    }
    ways = {"An hour (USD)", "A month with 200 hours of use", "Cheaper than on demand from", "Cheaper than spot from"}
    assert right - ways == {
        *("Amount (USD)", "Expected (USD)", "Low", "High", "Month (USD)", "Before", "After", "Difference"),
        *("From (tokens)", "To (tokens)", "Amount a month (USD)", "Source"),
    }
    assert right > ways


def test_the_currency_stands_in_the_heading_and_not_beside_each_amount() -> None:
    rows = table(budget_markdown(sample()), "Item")
    assert rows[0][2] == "Expected (USD)"
    assert not any("USD" in cell or "$" in cell for row in rows[2:] for cell in row[2:])


def test_hostile_text_stays_in_its_cell_and_is_no_html() -> None:
    text = budget_markdown(sample())
    for found in tables(text):
        assert len({len(row) for row in found}) == 1
    assert "<script" not in text
    assert r"Chat \| &lt;script>alert" in text
    assert cells_of(text, "Chat")[1] == "NC24ads_A100_v4, 700 hours spot at 1.763571 an hour"


@pytest.mark.parametrize(
    ("written", "printed"),
    [
        ("a | b", r"a \| b"),
        ("two\r\nlines", "two lines"),
        ("R&D", "R&D"),
        ("&lt;b&gt;", "&amp;lt;b&amp;gt;"),
        ("NC24ads_A100_v4", "NC24ads_A100_v4"),
        ("_so_", r"\_so\_"),
        ("# not a heading", r"\# not a heading"),
        ("- not a list", r"\- not a list"),
        ("-57.00", "-57.00"),
        ("1. not a list", r"1\. not a list"),
        ("1.5 GB", "1.5 GB"),
        ("[x](y)", r"\[x\](y)"),
        ("a \\ b", r"a \\ b"),
        ("---", r"\---"),
    ],
)
def test_text_in_markdown_is_shown_as_written(written: str, printed: str) -> None:
    assert markdown_text(written) == printed


def test_estimates_are_marked_and_explained() -> None:
    text = budget_markdown(sample())
    assert cells_of(text, "Disks")[0] == "Disks *(estimate)*"
    assert "Lines marked estimate rest on a price" in text
    assert "estimate rest" not in budget_markdown(budget_of([line("a", "1.00")]))


def test_the_range_is_told_and_left_out_where_nothing_is_uncertain() -> None:
    assert "1,720.10 to 1,840.65 USD" in budget_markdown(sample())
    plain = budget_markdown(budget_of([line("a", "1.00")]))
    assert "range" not in plain
    assert table(plain, "Item")[0] == ["Item", "How it is counted", "Expected (USD)"]


def test_idle_hours_are_named() -> None:
    assert "12.30 USD pays for hours in which a machine is on and nothing runs" in budget_markdown(sample())


@pytest.mark.parametrize(
    ("approved", "sentence"),
    [
        # 1,754.60 - 1,700.00 = 54.60; 2,110.00 - 2,000.00 = 110.00
        ("1700", "above the approved 1,700.00 USD a month, by 54.60 USD: it needs a new approval"),
        ("2000", "within the approved 2,000.00 USD a month; with its buffer the request is above it, by 110.00 USD"),
        ("2110", "The request is within the approved 2,110.00 USD a month"),
    ],
)
def test_the_page_says_how_the_cost_stands_to_what_was_approved(approved: str, sentence: str) -> None:
    assert sentence in budget_markdown(sample(approved=Decimal(approved)))


def test_what_ifs_show_their_difference_with_its_sign_and_no_figure_where_there_is_none() -> None:
    text = budget_markdown(sample())
    assert cells_of(text, "No spot")[1:3] == ["3,000.00", "+1,245.40"]
    assert cells_of(text, "Fewer hours")[1:3] == ["1,000.00", "-754.60"]
    assert cells_of(text, "Longer texts")[1:] == ["not known", "", 'ends at 40,960: see "planner size"']


def test_changes_against_an_earlier_budget_name_what_is_new_and_what_lost_its_price() -> None:
    text = budget_markdown(sample())
    assert cells_of(text, "Serving")[1:] == ["1,300.00", "1,234.50", "-65.50", "price"]
    assert cells_of(text, "Batch")[1:] == ["", "500.00", "+500.00", "new"]
    assert "| Defender | 5.00 | unpriced |  | unpriced now |" in text
    # 1,754.60 - 1,800.00
    changes = next(found for found in tables(text) if found[0][1] == "Before")
    assert changes[-1] == ["**Total of a month**", "**1,800.00**", "**1,754.60**", "**-45.40**", ""]
    assert "Change against" not in budget_markdown(sample(variance=None))


def test_ways_to_buy_are_compared_at_the_hours_used() -> None:
    text = budget_markdown(sample())
    assert cells_of(text, "on demand")[1:] == ["4.0000", "800.00", "", ""]
    assert cells_of(text, "reserved, 1 year")[1:] == ["2.0000", "1,460.00", "365 hours", "never"]
    # 1 x 730 / 1.60 = 456.25 hours
    assert cells_of(text, "reserved, 3 years")[1:] == ["1.0000", "730.00", "182 hours", "456 hours"]


def test_a_break_even_against_a_price_that_is_not_known_is_not_called_never() -> None:
    alone = commitment().model_copy(update={"ways": (way("on-demand", "4", "800"), way("reserved-1y", "2", "1460"))})
    text = budget_markdown(sample(commitments=(alone,)))
    assert cells_of(text, "reserved, 1 year")[3:] == ["never", "no price"]


def test_each_assumption_has_its_owner() -> None:
    assert cells_of(budget_markdown(sample()), "Hours a month")[1:] == ["700 hours", "Ada", "intent"]


def test_price_dates_and_digests_are_printed() -> None:
    rows = {row[0]: row[1] for row in table(budget_markdown(sample()), "Prices and their dates")}
    assert rows == {
        "Prices and their dates": "Value",
        "---": "---",
        "Price sheet": "2026-11",
        "Digest of the price sheet": "461ec4a199ba",
        "Oldest price used": "2024-07-01",
        "Newest price used": "2026-09-01",
        "Age of the oldest machine price": "82 days",
        "Prices that are estimates": "1 of 5 lines",
        "Digest of everything that went in": "8d80b166fc471d9d",
    }


def test_whole_units_are_printed_without_decimals_and_a_line_that_went_up_is_named() -> None:
    whole = Rounding(round_to=Decimal(1), request_to=Decimal(10), request_up=True)
    # 50 x 0.087 = 4.35: the nearest is 4, the line says 5
    lines = [line("a", "1234"), line("b", "5", label="Egress", quantity="50", unit_price="0.087", unit="GB")]
    text = budget_markdown(budget_of(lines, rounding=whole, requested=Decimal(1500)))
    assert cells_of(text, "Total of a month")[2] == "**1,239**"
    assert cells_of(text, "Requested a month")[1] == "**1,500**"
    assert "rounded to the nearest 1 USD (Egress: to the next)" in text
    assert "rounded to the next multiple of 10 USD" in text


def test_amounts_are_printed_as_they_are_when_lines_are_rounded_more_coarsely_than_the_request() -> None:
    coarse = Rounding(round_to=Decimal(5), request_to=Decimal(1), request_up=False)
    text = budget_markdown(budget_of([line("a", "1025")], rounding=coarse, requested=Decimal(1233)))
    assert cells_of(text, "Requested a month")[1] == "**1,233**"


def test_another_currency_is_named_and_explained() -> None:
    text = budget_markdown(sample(currency="EUR", per_usd=Decimal("0.5"), approved=Decimal("1700.125")))
    assert "Expected (EUR)" in text
    assert "1 USD = 0.5 EUR" in text
    assert "it means the price before conversion" in text
    assert cells_of(text, "Approved a month")[1] == "1,700.13"
    # the ways to buy are in USD: 4 x 0.5, 800 x 0.5
    assert cells_of(text, "on demand")[1:3] == ["2.0000", "400.00"]


def test_a_difference_too_small_to_print_has_no_sign() -> None:
    changes = (Change(key="a", label="Logs", before=None, after=None, difference=Decimal("-0.004"), note=""),)
    against = Variance(against="x", before_total=Decimal(1), after_total=Decimal(1), changes=changes)
    assert cells_of(budget_markdown(sample(variance=against)), "Logs")[3] == "0.00"


def test_both_sides_can_sign() -> None:
    rows = table(budget_markdown(sample()), "Who")
    assert rows[0] == ["Who", "Name", "Role", "Date", "Amount a month (USD)", "Signature"]
    assert [row[0] for row in rows[2:]] == ["Requested by", "Approved by finance"]
    assert [row[4] for row in rows[2:]] == ["2,110.00", ""]


def test_the_glossary_explains_only_words_that_are_used() -> None:
    assert [word for word, _ in glossary("Spot machines, 2 GPUs, and a token")] == ["GPU", "spot", "token"]
    assert glossary("spotless") == ()
    assert "**spot**" in budget_markdown(sample())
    assert "**replica**" not in budget_markdown(sample())


def test_the_machines_by_context_are_listed() -> None:
    text = budget_markdown(sample())
    assert "| NC24ads_A100_v4 | 1 | 26,848 |" in text
    assert "| NC48ads_A100_v4 | 26,849 | 40,960 |" in text


def test_every_line_has_its_formula_and_its_source() -> None:
    text = budget_markdown(sample())
    found = next(
        found for found in tables(text) if found[0] == ["Source", "Where the price comes from", "As of", "Note"]
    )
    assert found[2] == ["1", "price list", "2026-09-01", ""]
    assert found[4] == ["3", "none", "", "the price sheet has no defender-containers-vcpu"]


@settings(max_examples=40, deadline=None)
@given(
    st.lists(
        st.one_of(st.none(), st.decimals(min_value=0, max_value=10**7, places=2)),
        min_size=1,
        max_size=12,
    )
)
def test_the_printed_lines_add_up_to_the_printed_total(amounts: list[Decimal | None]) -> None:
    groups: tuple[Group, ...] = ("compute", "storage", "network")
    lines = [
        line(f"line-{i}", None if amount is None else str(amount), group=groups[i % 3])
        for i, amount in enumerate(amounts)
    ]
    rows = table(budget_markdown(budget_of(lines)), "Item")[2:]
    printed = [row[2].replace(",", "") for row in rows if row[0].startswith("line-")]
    assert len(printed) == len(amounts)
    total = rows[-1][2].strip("*").replace(",", "")
    assert sum((Decimal(cell) for cell in printed if cell != "unpriced"), Decimal(0)) == Decimal(total)
    subtotals = [row[2].strip("*").replace(",", "") for row in rows if row[0].startswith("**Subtotal")]
    assert sum((Decimal(cell) for cell in subtotals if cell != "unpriced"), Decimal(0)) == Decimal(total)


# ----------------------------------------------------------------------------------------------------------------- HTML


class Reader(HTMLParser):
    """Elements with their attributes, and the text of each element that is asked for."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.parents: list[str] = []
        self.texts: dict[str, list[str]] = {}
        self.inside: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        self.parents.append(self.inside[-1] if self.inside else "")
        if tag not in ("meta", "rect", "line", "circle", "path"):
            self.inside.append(tag)
            self.texts.setdefault(tag, []).append("")

    def handle_endtag(self, tag: str) -> None:
        if self.inside and self.inside[-1] == tag:
            self.inside.pop()

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        self.parents.append(self.inside[-1] if self.inside else "")

    def handle_data(self, data: str) -> None:
        if self.inside:
            self.texts[self.inside[-1]][-1] += data

    def count(self, tag: str) -> int:
        return sum(name == tag for name, _ in self.elements)


def test_the_page_is_one_document_with_a_language_a_title_and_a_viewport() -> None:
    page = budget_html(sample())
    reader = Reader(page)
    assert page.startswith("<!DOCTYPE html>")
    assert reader.count("h1") == 1
    assert reader.count("main") == 1
    assert dict(reader.elements)["html"] == {"lang": "en"}
    metas = [attrs for tag, attrs in reader.elements if tag == "meta"]
    assert {"charset": "utf-8"} in metas
    assert {"name": "viewport", "content": "width=device-width, initial-scale=1"} in metas
    assert reader.inside == []  # every element is closed


def test_the_page_loads_nothing_and_runs_nothing() -> None:
    page = budget_html(sample())
    reader = Reader(page)
    for tag, attrs in reader.elements:
        assert tag not in ("script", "link", "img", "iframe", "object", "embed", "base", "form", "a")
        assert not {"src", "href", "xlink:href", "srcset", "action", "style"} & set(attrs)
        assert not any(name.startswith("on") for name in attrs)
    assert "url(" not in page
    assert "@import" not in page
    policy = next(attrs["content"] for tag, attrs in reader.elements if "http-equiv" in attrs)
    assert policy == "default-src 'none'; style-src 'unsafe-inline'"


def test_hostile_text_is_shown_on_the_page_as_text() -> None:
    page = budget_html(sample())
    assert "<script" not in page
    shown = " ".join(Reader(page).texts["th"])
    assert 'Chat | <script>alert("x")</script> & `more`' in shown


def test_the_page_says_what_the_markdown_says() -> None:
    budget = sample()
    texts = Reader(budget_html(budget)).texts
    shown = {text.strip() for tag in ("td", "th") for text in texts[tag]}
    for found in tables(budget_markdown(budget)):
        if found[0][0] == "Smallest Azure machine":  # drawn instead
            continue
        for row in found[2:]:
            for cell in row[1:]:
                assert cell.strip("*").replace("\\", "") in shown


def test_every_chart_has_a_title_a_description_and_names_of_its_own() -> None:
    reader = Reader(budget_html(sample()))
    charts = [attrs for tag, attrs in reader.elements if tag == "svg"]
    assert len(charts) == 2 * 4  # cost, break-even, and two of memory: each for a desk and for a phone
    ids = [attrs["id"] for _, attrs in reader.elements if "id" in attrs]
    assert len(ids) == len(set(ids))
    for chart in charts:
        assert chart["role"] == "img"
        names = (chart["aria-labelledby"] or "").split()
        assert len(names) == 2
        assert set(names) <= set(ids)
    assert all(text.strip() for tag in ("title", "desc") for text in reader.texts[tag])


def test_there_are_no_charts_where_there_is_nothing_to_draw() -> None:
    assert "<svg" not in budget_html(budget_of([line("a", None)]))
    single = commitment().model_copy(update={"ways": (way("on-demand", "4", "800"),)})
    page = budget_html(budget_of([line("a", "0.00")], commitments=(single,)))
    assert "<svg" not in page
    assert "What would change" not in page


def test_headings_go_down_one_level_at_a_time() -> None:
    levels = [int(tag[1]) for tag, _ in Reader(budget_html(sample())).elements if re.fullmatch("h[1-6]", tag)]
    assert levels[0] == 1
    assert all(after <= before + 1 for before, after in pairwise(levels))


# --------------------------------------------------------------------------------------------------------------- charts


def test_the_cost_chart_shows_the_largest_first_and_folds_the_small_ones() -> None:
    # 1 % of 1,010.50 is 10.105: the two below become one bar
    lines = [line("small", "5.00"), line("large", "600.00"), line("middle", "400.00"), line("tiny", "5.50")]
    assert [(bar.label, bar.amount) for bar in bars([*lines, line("none", None), line("zero", "0.00")])] == [
        ("large", Decimal("600.00")),
        ("middle", Decimal("400.00")),
        ("Other (2 small lines)", Decimal("10.50")),
    ]


def test_one_small_line_alone_is_not_hidden_under_another_name() -> None:
    assert [bar.label for bar in bars([line("large", "600.00"), line("small", "1.00")])] == ["large", "small"]


def test_the_cost_chart_has_no_more_bars_than_can_be_read() -> None:
    shown = bars([line(f"line-{i}", "10.00") for i in range(30)])
    assert len(shown) == 10
    assert sum((bar.amount for bar in shown), Decimal(0)) == 300


@given(
    st.lists(st.floats(min_value=0, max_value=300), min_size=1, max_size=8).map(sorted),
    st.floats(min_value=5, max_value=37),
)
def test_labels_on_a_line_keep_their_order_and_do_not_touch(wanted: list[float], width: float) -> None:
    places = spread(wanted, [width] * len(wanted), 0, 300)
    assert all(b - a >= width - 1e-6 for a, b in pairwise(places))
    assert places[0] >= width / 2 - 1e-6
    assert places[-1] <= 300 - width / 2 + 1e-6


def test_labels_stay_where_they_are_wanted_when_there_is_room() -> None:
    assert spread([50, 150, 250], [20, 20, 20], 0, 300) == [50, 150, 250]


@pytest.mark.parametrize(
    ("largest", "expected"),
    [
        (81, [0, 20, 40, 60, 80, 100]),
        (1842, [0, 500, 1000, 1500, 2000]),
        (0.35, [0, 0.1, 0.2, 0.30000000000000004, 0.4]),
        (100, [0, 20, 40, 60, 80, 100]),
    ],
)
def test_axes_have_round_figures(largest: float, expected: list[float]) -> None:
    assert ticks(largest) == pytest.approx(expected)


def test_long_names_are_broken_and_then_cut() -> None:
    lines = wrap("Serving a model with a very long name at 32,768 tokens on several machines", 120)
    assert len(lines) == 2
    assert lines[1].endswith("...")
    assert all(text_width(words) <= 120 for words in lines)


# ----------------------------------------------------------------------------------------------------------- JSON, CSV

# The columns of feature level Mandatory in FOCUS 1.2 (https://focus.finops.org/focus-specification/v1-2/)
MANDATORY = {
    "BilledCost", "BillingAccountId", "BillingAccountName", "BillingCurrency", "BillingPeriodEnd", "BillingPeriodStart",
    "ChargeCategory", "ChargeClass", "ChargeDescription", "ChargePeriodEnd", "ChargePeriodStart", "ContractedCost",
    "EffectiveCost", "InvoiceIssuerName", "ListCost", "PricingQuantity", "PricingUnit", "ProviderName", "PublisherName",
    "ServiceCategory", "ServiceName",
}  # fmt: skip


def rows_of(budget: Budget) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(budget_csv(budget))))


def test_json_reads_back_as_the_same_budget() -> None:
    budget = sample()
    assert budget_json(budget).endswith("}\n")
    assert read_budget(budget_json(budget), "x") == budget


def test_the_csv_has_the_columns_of_focus_once_and_marks_its_own() -> None:
    columns = budget_csv(sample()).splitlines()[0].split(",")
    assert len(columns) == len(set(columns))
    assert set(columns) >= MANDATORY
    assert all(re.fullmatch(r"(x_)?[A-Z][A-Za-z]+", column) for column in columns)


def test_billed_costs_add_up_to_the_total_and_an_unpriced_line_has_none() -> None:
    budget = sample()
    rows = rows_of(budget)
    assert [row["x_Key"] for row in rows] == [entry.key for entry in budget.lines]
    assert sum((Decimal(row["BilledCost"]) for row in rows if row["BilledCost"]), Decimal(0)) == budget.total
    unpriced = rows[-1]
    costs = ("BilledCost", "EffectiveCost", "ListCost", "ContractedCost", "ListUnitPrice", "x_LowCost", "x_HighCost")
    assert [unpriced[column] for column in costs] == [""] * 7
    assert unpriced["x_Unpriced"] == "true"
    assert unpriced["PricingUnit"] == ""
    assert {row["x_Unpriced"] for row in rows[:-1]} == {"false"}
    assert rows[3]["BilledCost"] == "0"


def test_list_cost_is_list_price_times_quantity() -> None:
    rows = rows_of(sample())
    for row in rows[:-1]:
        assert Decimal(row["ListCost"]) == Decimal(row["ListUnitPrice"]) * Decimal(row["PricingQuantity"])
        assert row["ContractedCost"] == row["ListCost"]
    # 1,234.50 / 700 to ten decimals
    assert rows[0]["ListUnitPrice"] == "1.7635714286"
    # a commitment's list price is the one on demand: 4 x 250 hours, of which 500 are billed
    assert (rows[1]["ListUnitPrice"], rows[1]["ListCost"], rows[1]["BilledCost"]) == ("4", "1000", "500")


def test_a_commitment_without_a_price_on_demand_is_listed_at_its_cost() -> None:
    row = rows_of(sample(commitments=()))[1]
    assert (row["ListUnitPrice"], row["ListCost"]) == ("", "500")


def test_the_way_to_buy_decides_pricing_category_and_frequency() -> None:
    rows = rows_of(sample())
    assert [row["PricingCategory"] for row in rows] == ["Dynamic", "Committed", "Standard", "Standard", "Standard"]
    assert [row["ChargeFrequency"] for row in rows[:3]] == ["Usage-Based", "Recurring", "Usage-Based"]
    assert rows[1]["ConsumedQuantity"] == ""
    assert {row["ChargeCategory"] for row in rows} == {"Usage"}
    assert {row["ChargeClass"] for row in rows} == {""}


@pytest.mark.parametrize(
    ("day", "start", "end"),
    [
        (date(2026, 11, 22), "2026-12-01T00:00:00Z", "2027-01-01T00:00:00Z"),
        (date(2026, 12, 31), "2027-01-01T00:00:00Z", "2027-02-01T00:00:00Z"),
        (date(2026, 1, 1), "2026-02-01T00:00:00Z", "2026-03-01T00:00:00Z"),
    ],
)
def test_the_period_is_the_calendar_month_after_the_budget(day: date, start: str, end: str) -> None:
    for row in rows_of(sample(generated=day)):
        assert (row["BillingPeriodStart"], row["BillingPeriodEnd"]) == (start, end)
        assert (row["ChargePeriodStart"], row["ChargePeriodEnd"]) == (start, end)


@pytest.mark.parametrize(
    ("unit", "expected"),
    [
        ("hour", "Hours"),
        ("GB-month", "GB-Months"),
        ("GB", "GB"),
        ("10,000 operations", "10000 Operations"),
        ("10,000,000 samples", "10000000 Samples"),
        ("vCPU-second", "vCPU-Seconds"),
        ("disk-month", "Disk-Months"),
        ("month", "Months"),
    ],
)
def test_units_are_written_as_focus_writes_them(unit: str, expected: str) -> None:
    assert focus_unit(unit) == expected


def test_services_have_the_categories_of_focus() -> None:
    assert [row["ServiceCategory"] for row in rows_of(sample())] == [
        "Compute",
        "Compute",
        "Storage",
        "Networking",
        "Security",
    ]


def test_numbers_have_no_exponent_and_no_separators() -> None:
    row = rows_of(budget_of([line("a", "1E+6", quantity="1E+3", unit_price="1E+3")]))[0]
    assert (row["BilledCost"], row["PricingQuantity"], row["ListCost"]) == ("1000000", "1000", "1000000")


def test_text_that_a_spreadsheet_would_compute_is_kept_as_text() -> None:
    row = rows_of(budget_of([line("a", "1.00", label='=HYPERLINK("http://x")')]))[0]
    assert row["ChargeDescription"].startswith("'=")
