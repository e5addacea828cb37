"""What the budget page says, section by section, every figure written out: the templates only lay it out."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from datetime import date
from decimal import Decimal
from typing import Literal

from planner.budget import Budget, BudgetLine, Commitment, MemoryCurve, Variance
from planner.catalog.prices import COMMITTED
from planner.cost.lines import PRIORITY_WORDS, Alternative, Group, figure
from planner.model import Frozen
from planner.pages.charts import Figure, break_even_chart, cost_chart, memory_chart
from planner.units import CENT, money_figure, round_money

UNPRICED = "unpriced"
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

# word to look for (a regular expression), the word as printed, what it means
GLOSSARY: tuple[tuple[str, str, str], ...] = (
    (r"adapters?", "adapter", "the small file of changes that fine-tuning adds to a model"),
    (r"break-even", "break-even", "the hours of use in a month from which one way to buy costs less than another"),
    (r"buffer", "buffer", "what is requested above the expected cost, for what nobody can foresee"),
    (r"checkpoints?", "checkpoint", "a saved state of a training run, from which it goes on after an interruption"),
    (r"clusters?", "cluster", "the group of machines that runs the work, managed by Azure Kubernetes Service"),
    (r"(?:container )?registry", "container registry", "the store of the programs that the cluster runs"),
    (r"contexts?", "context", "how much text a model handles at once, counted in tokens"),
    (r"control plane", "control plane", "the part of a cluster that Azure runs to steer the machines"),
    (r"digest", "digest", "a short number computed from data: if the data changes, so does the number"),
    (r"evict\w+", "eviction", "Azure takes a spot machine back; the work goes on later, on another machine"),
    (r"fine-tun\w+", "fine-tuning", "further training of an existing model on one's own examples"),
    (r"gb-months?", "GB-month", "one gigabyte kept for one month"),
    (r"gib", "GiB", "a unit of memory: 1,073,741,824 bytes, about a gigabyte"),
    (r"gpus?", "GPU", "the processor that runs a language model, and the dearest part of a machine"),
    (r"inference|serv(?:e|es|ing|ers?)", "inference, serving", "running a finished model so that it answers"),
    (r"list prices?", "list price", "what Azure publishes, before tax and before any discount of a contract"),
    (
        r"n[cdv]\d+\w*|d\d+\w*_v\d",
        "NC..., NV..., ND..., D...",
        "Azure's names for sizes of machines; the first three have GPUs",
    ),
    (r"nodes?", "node", "one machine of a cluster"),
    (r"on[- ]demand", "on demand", "paid by the hour, without a promise on either side"),
    (r"private endpoints?", "private endpoint", "a connection to a service that does not cross the public internet"),
    (r"qlora|lora", "LoRA, QLoRA", "ways to fine-tune with little memory: only a small addition is trained"),
    (r"replicas?", "replica", "one of several equal copies that work at the same time"),
    (r"reserved|reservations?", "reserved, reservation", "a machine paid for one or three years, used or not"),
    (r"savings plans?", "savings plan", "a promise to spend so much an hour for one or three years, used or not"),
    (r"spot", "spot", "spare machines at a low, changing price, which Azure may take back at any time"),
    (r"tokens?", "token", "a piece of text, in English about three quarters of a word"),
    (r"unpriced", "unpriced", "no price is known; the cost is not 0, and the total leaves it out"),
    (r"vcpus?|vcpu-\w+", "vCPU", "one processor of a machine, as Azure counts them"),
    (r"weights", "weights", "the numbers that make up a trained model, stored as files"),
)


Kind = Literal["line", "group", "subtotal", "total"]


class Column(Frozen):
    """number: set flush right; short: never broken over two lines, such as a date."""

    heading: str
    number: bool = False
    short: bool = False


class Cell(Frozen):
    """text as printed; mark: a word beside it, such as estimate."""

    text: str
    mark: str = ""


class Row(Frozen):
    """exact: low, expected and high are one figure."""

    cells: tuple[Cell, ...]
    kind: Kind = "line"
    exact: bool = False


class Table(Frozen):
    """name: how it is laid out; label: what it is, for those who cannot see it.

    drawn: a chart beside it shows the same, so that only the form without charts prints it
    """

    type: Literal["table"] = "table"
    name: Literal[
        "pairs", "lines", "changes", "what-ifs", "ways", "steps", "assumptions", "formulas", "sources", "sign"
    ]
    label: str
    columns: tuple[Column, ...]
    rows: tuple[Row, ...]
    drawn: bool = False


class Text(Frozen):
    type: Literal["text"] = "text"
    text: str
    tone: Literal["plain", "warning", "advice"] = "plain"


class Subheading(Frozen):
    type: Literal["subheading"] = "subheading"
    text: str


class Bullets(Frozen):
    type: Literal["bullets"] = "bullets"
    entries: tuple[str, ...]


class Terms(Frozen):
    type: Literal["terms"] = "terms"
    entries: tuple[tuple[str, str], ...]


Block = Table | Text | Subheading | Bullets | Terms | Figure


class Section(Frozen):
    anchor: str
    heading: str
    blocks: tuple[Block, ...]


class Page(Frozen):
    """title, subject, facts: the head; opening: before the first heading."""

    title: str
    subject: str
    facts: tuple[str, ...]
    opening: tuple[Block, ...]
    sections: tuple[Section, ...]


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
    terms = glossary(_words(budget.title, budget.subject, opening, sections))
    if terms:
        sections.append(Section(anchor="words", heading="Words used here", blocks=(Terms(entries=terms),)))
    facts = (
        f"Prepared {budget.generated}",
        f"Azure region {budget.region}",
        f"Amounts in {budget.currency} for one month unless a row says otherwise",
    )
    return Page(
        title=_one_line(budget.title),
        subject=_one_line(budget.subject),
        facts=facts,
        opening=opening,
        sections=tuple(sections),
    )


class Figures:
    """Amounts as a budget prints them: thousands separated, with the decimals that its rounding asks for."""

    def __init__(self, budget: Budget) -> None:
        places = max(_places(budget.rounding.round_to), _places(budget.rounding.request_to))
        self.unit = Decimal(1).scaleb(-places)

    def amount(self, value: Decimal | None) -> str:
        if value is None:
            return UNPRICED
        text = money_figure(value, self._fine_enough(value))
        return text if text.strip("-0.,") else text.lstrip("-")  # what rounds to nothing has no sign

    def signed(self, value: Decimal | None) -> str:
        """With + or -; an amount that is not known has no difference."""
        if value is None:
            return ""
        return f"+{self.amount(value)}" if value > 0 else self.amount(value)

    def _fine_enough(self, value: Decimal) -> Decimal:
        # an approved amount after conversion, or a line of an earlier budget, may have more decimals than this one's
        return self.unit if value % self.unit == 0 else min(self.unit, CENT)


def _places(unit: Decimal) -> int:
    exponent = unit.normalize().as_tuple().exponent
    return max(0, -exponent) if isinstance(exponent, int) else 2


def _one_line(text: str) -> str:
    return " ".join(text.split())


def _prose(text: str) -> str:
    """A sentence of another module: commands that it sets in backticks stand in plain quotes."""
    return _one_line(text).replace("`", '"')


def _row(*texts: str, kind: Kind = "line", exact: bool = False) -> Row:
    return Row(cells=tuple(Cell(text=_one_line(text)) for text in texts), kind=kind, exact=exact)


def _share(value: Decimal) -> str:
    return f"{figure(value * 100, 2)} %"


def _count(number: int, one: str, many: str) -> str:
    return f"{number} {one if number == 1 else many}"


def _sum(amounts: Iterable[Decimal | None]) -> Decimal:
    return sum((amount for amount in amounts if amount is not None), Decimal(0))


# ------------------------------------------------------------------------------------------------------ what is asked


def _opening(budget: Budget, say: Figures) -> tuple[Block, ...]:
    lower = ", lower bound" if budget.unpriced else ""
    rows = [
        _row(f"Expected cost of a month{lower}", say.amount(budget.total)),
        _row(
            f"Buffer of {_share(budget.buffer)}, made up so that the request is a multiple of"
            f" {figure(budget.rounding.request_to)}",
            say.amount(budget.buffer_amount),
        ),
        _row("Requested a month", say.amount(budget.requested), kind="total"),
        _row("Requested a quarter (3 months)", say.amount(budget.requested_per_quarter)),
        _row("Requested a year (12 months)", say.amount(budget.requested_per_year)),
    ]
    if budget.approved is not None:
        rows.append(_row("Approved a month", say.amount(budget.approved)))
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
                text=f"{_count(len(budget.unpriced), 'line has', 'lines have')} no price and"
                f" {'is' if len(budget.unpriced) == 1 else 'are'} printed as unpriced: {_one_line(names)}. No total"
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
    idle = _sum(line.idle for line in budget.lines)
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
        rows.append(_row(GROUP_WORDS[group], *[""] * (len(columns) - 1), kind="group"))
        rows += [_line_row(line, say, ranged) for line in lines]
        rows.append(_subtotal(GROUP_WORDS[group], lines, say, ranged))
    head = "Total of a month, lower bound" if budget.unpriced else "Total of a month"
    totals = [budget.total, *([budget.total_low, budget.total_high] if ranged else [])]
    rows.append(_row(head, "", *map(say.amount, totals), kind="total"))
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
            Cell(text=_one_line(line.label), mark="estimate" if line.estimate else ""),
            Cell(text=_one_line(line.basis) + _rate(line)),
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
    sums = [_sum(line.amount for line in priced)]
    if ranged:
        sums += [_sum(line.low for line in priced), _sum(line.high for line in priced)]
    figures = (say.amount(value) if priced else UNPRICED for value in sums)
    return _row(label, "", *figures, kind="subtotal", exact=len(set(sums)) == 1)


# ---------------------------------------------------------------------------------------------- changes and what-ifs


def _changes(variance: Variance | None, say: Figures) -> list[Section]:
    if variance is None:
        return []
    rows = []
    for change in variance.changes:
        before = say.amount(change.before) if change.before is not None else _absent(change.note, "new")
        after = say.amount(change.after) if change.after is not None else _absent(change.note, "no longer there")
        rows.append(_row(change.label, before, after, say.signed(change.difference), change.note))
    difference = variance.after_total - variance.before_total
    totals = map(say.amount, (variance.before_total, variance.after_total))
    rows.append(_row("Total of a month", *totals, say.signed(difference), "", kind="total"))
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
    lead = Text(text=f"Compared with: {_one_line(variance.against)}.")
    return [Section(anchor="variance", heading="Change against the earlier budget", blocks=(lead, table))]


def _absent(note: str, not_there: str) -> str:
    """A missing amount: the line did not exist on that side, or it did without a price."""
    return "" if note == not_there else UNPRICED


def _what_ifs(budget: Budget, say: Figures) -> list[Section]:
    if not budget.what_ifs:
        return []
    rows = tuple(
        _row(what.change, "not known" if what.total is None else say.amount(what.total), say.signed(what.difference),
             _prose(what.note))
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
            blocks.append(Subheading(text=_one_line(commitment.machine)))
        blocks.append(Text(tone="advice", text=_prose(commitment.advice)))
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
            Column(heading=f"{_one_line(commitment.machine)}, bought"),
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
        blocks.append(Subheading(text=_one_line(curve.label)))
        chart = memory_chart(curve, f"memory-{number}")
        if curve.steps:
            blocks.append(_steps(curve, drawn=chart is not None))
        blocks += [chart] if chart else []
    if not blocks:
        return []
    lead = Text(
        text="A longer context needs more GPU memory, and from certain lengths on a larger machine. These are the"
        " lengths at which the smallest Azure machine that holds the work changes."
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
        rows=tuple(_row(step.place, f"{step.from_tokens:,}", f"{step.to_tokens:,}") for step in curve.steps),
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
        rows=tuple(_row(entry.text, entry.value, entry.owner, entry.source) for entry in budget.assumptions),
    )
    lead = Text(text="Figures that nobody can look up. Each has an owner, who is asked when it turns out otherwise.")
    return [Section(anchor="assumptions", heading="Assumptions and who answers for them", blocks=(lead, table))]


# ----------------------------------------------------------------------------------------------- prices and the rest


def _prices(budget: Budget) -> tuple[Block, ...]:
    prices = budget.prices
    rows = [
        _row("Price sheet", prices.sheet),
        _row("Digest of the price sheet", prices.digest),
        _row("Oldest price used", str(prices.oldest)),
        _row("Newest price used", str(prices.newest)),
        _row("Age of the oldest machine price", _count(budget.price_age_days, "day", "days")),
        _row("Prices that are estimates", f"{prices.estimates} of {_count(len(budget.lines), 'line', 'lines')}"),
    ]
    if budget.per_usd is not None:
        rows.append(_row("Exchange rate", f"1 USD = {budget.per_usd:f} {budget.currency}"))
    rows.append(_row("Digest of everything that went in", budget.inputs_digest))
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
    up = [_one_line(line.label) for line in budget.lines if _was_rounded_up(line, rounding.round_to)]
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
    plain = _prose(text)
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
            _row("Requested by", "", "", "", say.amount(budget.requested), ""),
            _row("Approved by finance", "", "", "", "", ""),
        ),
    )


def _appendix(budget: Budget) -> tuple[Block, ...]:
    sources = {key: number for number, key in enumerate(dict.fromkeys(map(_source, budget.lines)), start=1)}
    rows = tuple(
        Row(
            cells=(
                Cell(text=_one_line(line.label), mark="estimate" if line.estimate else ""),
                Cell(text=_one_line(line.formula)),
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
        _row(str(number), source or "none", str(day) if day else "", _prose(note))
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
    return _one_line(line.source), line.as_of, _one_line(line.note)


def _words(title: str, subject: str, opening: Sequence[Block], sections: Sequence[Section]) -> str:
    parts = [title, subject, *(section.heading for section in sections)]
    for block in (*opening, *(block for section in sections for block in section.blocks)):
        if isinstance(block, Table):
            parts += [column.heading for column in block.columns]
            parts += [cell.text for row in block.rows for cell in row.cells]
        elif isinstance(block, Text | Subheading):
            parts.append(block.text)
        elif isinstance(block, Bullets):
            parts += block.entries
        elif isinstance(block, Figure):
            parts.append(block.caption)
    return " ".join(parts)


def glossary(text: str) -> tuple[tuple[str, str], ...]:
    """The words of the glossary that occur in a text, and what they mean, in alphabetical order."""
    plain = text.lower()
    found = [(word, meaning) for pattern, word, meaning in GLOSSARY if re.search(rf"(?<!\w)(?:{pattern})(?!\w)", plain)]
    return tuple(sorted(found, key=lambda entry: entry[0].lower()))
