"""What the budget page says, section by section, every figure written out: the templates only lay it out."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from datetime import date
from decimal import Decimal

from planner.budget import Budget, BudgetLine, Commitment, MemoryCurve, Variance
from planner.catalog.prices import COMMITTED
from planner.cost.lines import PRIORITY_WORDS, Alternative, Group, figure
from planner.pages.blocks import (
    UNPRICED,
    Block,
    Bullets,
    Cell,
    Column,
    Figures,
    Page,
    Row,
    Section,
    Subheading,
    Table,
    Terms,
    Text,
    count_of,
    one_line,
    prose,
    row_of,
    share,
    sum_of,
)
from planner.pages.charts import break_even_chart, cost_chart, memory_chart
from planner.pages.glossary import glossary, words_of
from planner.units import money_figure, round_money

HOUR_PRICE = Decimal("0.0001")  # an hour of a machine is quoted to a hundredth of a cent

GROUP_WORDS: dict[Group, str] = {
    "compute": "GPU machines",
    "people": "People's machines",
    "platform": "Cluster",
    "storage": "Storage",
    "network": "Network",
    "monitoring": "Monitoring",
    "security": "Security",
}


def page_of(budget: Budget) -> Page:
    """The whole page of a budget."""
    say = Figures(budget)
    sections = [
        Section(anchor="lines", heading="Cost of a month, line by line", blocks=_lines(budget, say)),
        *_changes(budget.variance, say),
        *_what_ifs(budget, say),
        *_commitments(budget, say),
        *_memory(budget.memory),
        *_assumptions(budget),
        Section(anchor="prices", heading="Prices, dates and rounding", blocks=_prices(budget)),
        *_notes(budget),
        Section(anchor="signatures", heading="Signatures", blocks=(_signatures(budget, say),)),
        Section(anchor="appendix", heading="Appendix: how each amount is worked out", blocks=_appendix(budget)),
    ]
    opening = _opening(budget, say)
    terms = glossary(words_of(budget.title, budget.subject, opening, sections))
    if terms:
        sections.append(Section(anchor="words", heading="Words used here", blocks=(Terms(entries=terms),)))
    facts = (
        f"Prepared {budget.generated}",
        f"Azure region {budget.region}",
        f"Amounts in {budget.currency} for one month unless a row says otherwise",
    )
    return Page(
        title=one_line(budget.title),
        subject=one_line(budget.subject),
        facts=facts,
        opening=opening,
        sections=tuple(sections),
    )


# ------------------------------------------------------------------------------------------------------ what is asked


def _opening(budget: Budget, say: Figures) -> tuple[Block, ...]:
    lower = ", lower bound" if budget.unpriced else ""
    rows = [
        row_of(f"Expected cost of a month{lower}", say.amount(budget.total)),
        row_of(
            f"Buffer of {share(budget.buffer)}, made up so that the request is a multiple of"
            f" {figure(budget.rounding.request_to)}",
            say.amount(budget.buffer_amount),
        ),
        row_of("Requested a month", say.amount(budget.requested), kind="total"),
        row_of("Requested a quarter (3 months)", say.amount(budget.requested_per_quarter)),
        row_of("Requested a year (12 months)", say.amount(budget.requested_per_year)),
    ]
    if budget.approved is not None:
        rows.append(row_of("Approved a month", say.amount(budget.approved)))
    table = Table(
        name="pairs",
        label="What is requested",
        columns=(Column(heading="What is requested"), Column(heading=f"Amount ({budget.currency})", number=True)),
        rows=tuple(rows),
    )
    return (table, *_statements(budget, say))


def _statements(budget: Budget, say: Figures) -> list[Text]:
    found = []
    approved = _approval(budget, say)
    if approved is not None:
        found.append(approved)
    if budget.unpriced:
        names = ", ".join(line.label for line in budget.lines if line.amount is None)
        found.append(
            Text(
                tone="warning",
                text=f"{count_of(len(budget.unpriced), 'line has', 'lines have')} no price and"
                f" {'is' if len(budget.unpriced) == 1 else 'are'} printed as unpriced: {one_line(names)}. No total"
                " contains such a line, so the totals are lower bounds: the month costs at least that much.",
            )
        )
    if _has_range(budget.lines):
        found.append(
            Text(
                text=f"Expected range of a month: {say.amount(budget.total_low)} to {say.amount(budget.total_high)}"
                f" {budget.currency}, with everything uncertain at its lowest and at its highest."
            )
        )
    idle = sum_of(line.idle for line in budget.lines)
    if idle:
        found.append(
            Text(
                text=f"Of the expected cost, {say.amount(idle)} {budget.currency} pays for hours in which a machine is"
                " on and nothing runs."
            )
        )
    return found


def _approval(budget: Budget, say: Figures) -> Text | None:
    if budget.approved is None:
        return None
    approved = f"{say.amount(budget.approved)} {budget.currency} a month"
    if budget.over_approved:
        above = say.amount(budget.total - budget.approved)
        return Text(
            tone="warning",
            text=f"The expected cost is above the approved {approved}, by {above} {budget.currency}: it needs a new"
            " approval.",
        )
    if budget.requested > budget.approved:
        above = say.amount(budget.requested - budget.approved)
        return Text(
            tone="warning",
            text=f"The expected cost is within the approved {approved}; with its buffer the request is above it, by"
            f" {above} {budget.currency}.",
        )
    return Text(text=f"The request is within the approved {approved}.")


# -------------------------------------------------------------------------------------------------------------- lines


def _has_range(lines: Iterable[BudgetLine]) -> bool:
    return any(line.amount is not None and not line.low == line.amount == line.high for line in lines)


def _lines(budget: Budget, say: Figures) -> tuple[Block, ...]:
    ranged = _has_range(budget.lines)
    columns = [
        Column(heading="Item"),
        Column(heading="How it is counted"),
        Column(heading=f"Expected ({budget.currency})", number=True),
        *([Column(heading="Low", number=True), Column(heading="High", number=True)] if ranged else []),
    ]
    rows: list[Row] = []
    for group in dict.fromkeys(line.group for line in budget.lines):
        lines = [line for line in budget.lines if line.group == group]
        rows.append(row_of(GROUP_WORDS[group], *[""] * (len(columns) - 1), kind="group"))
        rows += [_line_row(line, say, ranged) for line in lines]
        rows.append(_subtotal(GROUP_WORDS[group], lines, say, ranged))
    head = "Total of a month, lower bound" if budget.unpriced else "Total of a month"
    totals = [budget.total, *([budget.total_low, budget.total_high] if ranged else [])]
    rows.append(row_of(head, "", *map(say.amount, totals), kind="total"))
    table = Table(name="lines", label="Cost of a month by line", columns=tuple(columns), rows=tuple(rows))
    blocks: list[Block] = [table]
    if any(line.estimate for line in budget.lines):
        blocks.append(
            Text(
                text="Lines marked estimate rest on a price that was not read for this machine or service in this"
                " region: it stands in from another region, follows from a related price, or is old. The appendix says"
                " which. Confirm these before you rely on them."
            )
        )
    chart = cost_chart(budget)
    return (*blocks, chart) if chart else tuple(blocks)


def _line_row(line: BudgetLine, say: Figures, ranged: bool) -> Row:
    figures = [line.amount, *([line.low, line.high] if ranged else [])]
    return Row(
        cells=(
            Cell(text=one_line(line.label), mark="estimate" if line.estimate else ""),
            Cell(text=one_line(line.basis) + _rate(line)),
            *(Cell(text=say.amount(value)) for value in figures),
        ),
        exact=line.low == line.amount == line.high,
    )


def _rate(line: BudgetLine) -> str:
    """The hourly price of a machine, to be read after how it is counted."""
    return f" at {figure(line.unit_price)} an hour" if line.sku and line.unit_price is not None else ""


def _subtotal(name: str, lines: Sequence[BudgetLine], say: Figures, ranged: bool) -> Row:
    priced = [line for line in lines if line.amount is not None]
    label = f"Subtotal, {name}" + (" (without unpriced lines)" if 0 < len(priced) < len(lines) else "")
    sums = [sum_of(line.amount for line in priced)]
    if ranged:
        sums += [sum_of(line.low for line in priced), sum_of(line.high for line in priced)]
    figures = (say.amount(value) if priced else UNPRICED for value in sums)
    return row_of(label, "", *figures, kind="subtotal", exact=len(set(sums)) == 1)


# ---------------------------------------------------------------------------------------------- changes and what-ifs


def _changes(variance: Variance | None, say: Figures) -> list[Section]:
    if variance is None:
        return []
    rows = []
    for change in variance.changes:
        before = say.amount(change.before) if change.before is not None else _absent(change.note, "new")
        after = say.amount(change.after) if change.after is not None else _absent(change.note, "no longer there")
        rows.append(row_of(change.label, before, after, say.signed(change.difference), change.note))
    difference = variance.after_total - variance.before_total
    totals = map(say.amount, (variance.before_total, variance.after_total))
    rows.append(row_of("Total of a month", *totals, say.signed(difference), "", kind="total"))
    table = Table(
        name="changes",
        label="Change against the earlier budget",
        columns=(
            Column(heading="Item"),
            Column(heading="Before", number=True),
            Column(heading="After", number=True),
            Column(heading="Difference", number=True),
            Column(heading="Why"),
        ),
        rows=tuple(rows),
    )
    lead = Text(text=f"Compared with: {one_line(variance.against)}.")
    return [Section(anchor="variance", heading="Change against the earlier budget", blocks=(lead, table))]


def _absent(note: str, not_there: str) -> str:
    """A missing amount: the line did not exist on that side, or it did without a price."""
    return "" if note == not_there else UNPRICED


def _what_ifs(budget: Budget, say: Figures) -> list[Section]:
    if not budget.what_ifs:
        return []
    rows = tuple(
        row_of(what.change, "not known" if what.total is None else say.amount(what.total), say.signed(what.difference),
             prose(what.note))
        for what in budget.what_ifs
    )  # fmt: skip
    table = Table(
        name="what-ifs",
        label="What would change the cost",
        columns=(
            Column(heading="Change"),
            Column(heading=f"Month ({budget.currency})", number=True),
            Column(heading="Difference", number=True),
            Column(heading="Note"),
        ),
        rows=rows,
    )
    lead = Text(text="The expected cost of a month if one thing were otherwise, everything else being equal.")
    return [Section(anchor="what-if", heading="What would change the cost", blocks=(lead, table))]


# -------------------------------------------------------------------------------------------------------- commitments


def _commitments(budget: Budget, say: Figures) -> list[Section]:
    found = [commitment for commitment in budget.commitments if commitment.ways]
    if not budget.commitments:
        return []
    blocks: list[Block] = []
    for number, commitment in enumerate(budget.commitments, start=1):
        if len(budget.commitments) > 1:
            blocks.append(Subheading(text=one_line(commitment.machine)))
        blocks.append(Text(tone="advice", text=prose(commitment.advice)))
        if commitment in found:
            blocks.append(_ways(commitment, budget, say))
            chart = break_even_chart(commitment, budget, f"break-even-{number}")
            blocks += [chart] if chart else []
    return [Section(anchor="commitment", heading="Whether to commit for a year or more", blocks=tuple(blocks))]


def _ways(commitment: Commitment, budget: Budget, say: Figures) -> Table:
    rate = budget.per_usd or Decimal(1)
    known = {way.priority for way in commitment.ways}
    hours = figure(commitment.hours_per_month, 0)
    rows = []
    for way in commitment.ways:
        cells = [
            Cell(text=PRIORITY_WORDS[way.priority], mark="estimate" if way.provenance.estimate else ""),
            Cell(text=money_figure(way.usd_per_hour * rate, HOUR_PRICE)),
            Cell(text=say.amount(round_money(way.usd_per_month * rate, budget.rounding.round_to))),
            Cell(text=_pays_from(way, way.break_even_hours, "on-demand" in known)),
            Cell(text=_pays_from(way, way.break_even_hours_against_spot, "spot" in known)),
        ]
        rows.append(Row(cells=tuple(cells)))
    return Table(
        name="ways",
        label=f"Ways to buy {commitment.machine}",
        columns=(
            Column(heading=f"{one_line(commitment.machine)}, bought"),
            Column(heading=f"An hour ({budget.currency})", number=True),
            Column(heading=f"A month with {hours} hours of use", number=True),
            Column(heading="Cheaper than on demand from", number=True),
            Column(heading="Cheaper than spot from", number=True),
        ),
        rows=tuple(rows),
    )


def _pays_from(way: Alternative, hours: Decimal | None, other_is_known: bool) -> str:
    if way.priority not in COMMITTED:
        return ""
    if not other_is_known:
        return "no price"
    return "never" if hours is None else f"{figure(hours, 0)} hours"


# -------------------------------------------------------------------------------------------------- memory, assumptions


def _memory(curves: Sequence[MemoryCurve]) -> list[Section]:
    blocks: list[Block] = []
    for number, curve in enumerate(curves, start=1):
        if not curve.steps and not curve.points:
            continue
        blocks.append(Subheading(text=one_line(curve.label)))
        chart = memory_chart(curve, f"memory-{number}")
        if curve.steps:
            blocks.append(_steps(curve, drawn=chart is not None))
        blocks += [chart] if chart else []
    if not blocks:
        return []
    lead = Text(
        text="A longer context needs more GPU memory, and from certain lengths on a larger machine. These are the"
        " lengths at which the smallest Azure machine that holds the work changes. Smallest is by memory: the"
        " machine that is bought is the cheapest one that holds the work, which may be a larger one at a lower price."
    )
    return [Section(anchor="memory", heading="Text length and the machine it needs", blocks=(lead, *blocks))]


def _steps(curve: MemoryCurve, *, drawn: bool) -> Table:
    return Table(
        name="steps",
        label=f"Smallest Azure machine by context, {curve.label}",
        columns=(
            Column(heading="Smallest Azure machine"),
            Column(heading="From (tokens)", number=True),
            Column(heading="To (tokens)", number=True),
        ),
        rows=tuple(row_of(step.place, f"{step.from_tokens:,}", f"{step.to_tokens:,}") for step in curve.steps),
        drawn=drawn,
    )


def _assumptions(budget: Budget) -> list[Section]:
    if not budget.assumptions:
        return []
    table = Table(
        name="assumptions",
        label="Assumptions",
        columns=(
            Column(heading="What is assumed"),
            Column(heading="Figure"),
            Column(heading="Who answers for it"),
            Column(heading="Where it comes from"),
        ),
        rows=tuple(row_of(entry.text, entry.value, entry.owner, entry.source) for entry in budget.assumptions),
    )
    lead = Text(text="Figures that nobody can look up. Each has an owner, who is asked when it turns out otherwise.")
    return [Section(anchor="assumptions", heading="Assumptions and who answers for them", blocks=(lead, table))]


# ----------------------------------------------------------------------------------------------- prices and the rest


def _prices(budget: Budget) -> tuple[Block, ...]:
    prices = budget.prices
    rows = [
        row_of("Price sheet", prices.sheet),
        row_of("Digest of the price sheet", prices.digest),
        row_of("Oldest price used", str(prices.oldest)),
        row_of("Newest price used", str(prices.newest)),
        row_of("Age of the oldest machine price", count_of(budget.price_age_days, "day", "days")),
        row_of("Prices that are estimates", f"{prices.estimates} of {count_of(len(budget.lines), 'line', 'lines')}"),
    ]
    if budget.per_usd is not None:
        rows.append(row_of("Exchange rate", f"1 USD = {budget.per_usd:f} {budget.currency}"))
    rows.append(row_of("Digest of everything that went in", budget.inputs_digest))
    table = Table(
        name="pairs",
        label="Prices and their dates",
        columns=(Column(heading="Prices and their dates"), Column(heading="Value", short=True)),
        rows=tuple(rows),
    )
    blocks: list[Block] = [table, Text(text=_rounding(budget))]
    if budget.per_usd is not None:
        blocks.append(
            Text(
                text=f"Azure's prices are listed in USD. Amounts are converted to {budget.currency}; where a"
                " description, a formula or an advice says $ or USD, it means the price before conversion."
            )
        )
    blocks.append(
        Text(text="Two budgets with the same digest of everything that went in are the same budget, prices included.")
    )
    return tuple(blocks)


def _rounding(budget: Budget) -> str:
    rounding, currency = budget.rounding, budget.currency
    up = [one_line(line.label) for line in budget.lines if _was_rounded_up(line, rounding.round_to)]
    exception = f" ({', '.join(up)}: to the next)" if up else ""
    way = "the next" if rounding.request_up else "the nearest"
    return (
        f"Each line is rounded to the nearest {figure(rounding.round_to)} {currency}{exception}, and the totals are"
        f" the sums of the rounded lines. The request is the total and the buffer, rounded to {way} multiple of"
        f" {figure(rounding.request_to)} {currency}. A month has 730 hours, a year's 8,760 divided by 12."
    )


def _was_rounded_up(line: BudgetLine, unit: Decimal) -> bool:
    if line.amount is None or line.unit_price is None:
        return False
    exact = round(line.quantity * line.unit_price, 9)
    return line.amount == round_money(exact, unit, up=True) != round_money(exact, unit)


def _notes(budget: Budget) -> list[Section]:
    notes = tuple(_sentence(note) for note in budget.notes)
    return [Section(anchor="notes", heading="Notes", blocks=(Bullets(entries=notes),))] if notes else []


def _sentence(text: str) -> str:
    plain = prose(text)
    return plain[:1].upper() + plain[1:] + ("" if plain.endswith((".", "!", "?")) else ".")


def _signatures(budget: Budget, say: Figures) -> Table:
    return Table(
        name="sign",
        label="Signatures",
        columns=(
            Column(heading="Who"),
            Column(heading="Name"),
            Column(heading="Role"),
            Column(heading="Date"),
            Column(heading=f"Amount a month ({budget.currency})", number=True),
            Column(heading="Signature"),
        ),
        rows=(
            row_of("Requested by", "", "", "", say.amount(budget.requested), ""),
            row_of("Approved by finance", "", "", "", "", ""),
        ),
    )


def _appendix(budget: Budget) -> tuple[Block, ...]:
    sources = {key: number for number, key in enumerate(dict.fromkeys(map(_source, budget.lines)), start=1)}
    rows = tuple(
        Row(
            cells=(
                Cell(text=one_line(line.label), mark="estimate" if line.estimate else ""),
                Cell(text=one_line(line.formula)),
                Cell(text=str(sources[_source(line)])),
            )
        )
        for line in budget.lines
    )
    lines = Table(
        name="formulas",
        label="How each amount is worked out",
        columns=(Column(heading="Item"), Column(heading="Formula"), Column(heading="Source", number=True)),
        rows=rows,
    )
    found = tuple(
        row_of(str(number), source or "none", str(day) if day else "", prose(note))
        for (source, day, note), number in sources.items()
    )
    table = Table(
        name="sources",
        label="Sources of the prices",
        columns=(
            Column(heading="Source", short=True),
            Column(heading="Where the price comes from"),
            Column(heading="As of", short=True),
            Column(heading="Note"),
        ),
        rows=found,
    )
    lead = Text(text="Formulas are in USD, the currency of Azure's list prices, before rounding.")
    return (lead, lines, Subheading(text="Sources of the prices"), table)


def _source(line: BudgetLine) -> tuple[str, date | None, str]:
    return one_line(line.source), line.as_of, one_line(line.note)
