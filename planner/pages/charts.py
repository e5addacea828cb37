"""The charts of a budget page as inline SVG, each drawn twice: for a sheet of paper or a desk, and for a phone.

Lengths are CSS pixels at the size a chart is drawn for. Text takes the page's font, whose widths are not known here:
`text_width` is an upper estimate, and nothing is placed closer than that.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from decimal import Decimal
from itertools import groupby
from math import ceil, floor, log2
from typing import NamedTuple

from planner.budget import Budget, BudgetLine, Commitment, MemoryCurve
from planner.catalog.prices import COMMITTED, Priority
from planner.cost.lines import PRIORITY_WORDS
from planner.cost.schedule import MONTH_HOURS
from planner.fit import Step
from planner.pages.svg import (
    FONT,
    NARROW,
    WIDE,
    Box,
    Figure,
    drawing,
    put_circle,
    put_line,
    put_path,
    put_rect,
    put_text,
    shorten,
    spread,
    text_width,
    ticks,
    wrap,
)
from planner.units import format_gib, format_tokens, money_figure, to_gib

MOST_BARS = 10
SMALLEST_SHARE = Decimal("0.01")  # of the total: below that a line goes into "other"
HOURS = float(MONTH_HOURS)

Scale = Callable[[float], float]

LINE_STYLES: dict[Priority, str] = {
    "on-demand": "on-demand",
    "spot": "spot",
    "savings-plan-1y": "plan",
    "savings-plan-3y": "plan three",
    "reserved-1y": "reserved",
    "reserved-3y": "reserved three",
}


class Bar(NamedTuple):
    label: str
    low: Decimal
    amount: Decimal
    high: Decimal


def bars(lines: Sequence[BudgetLine]) -> list[Bar]:
    """What the cost chart shows: lines that cost something, largest first, the small ones as one bar at the end."""
    found = [
        Bar(" ".join(line.label.split()), line.low or line.amount, line.amount, line.high or line.amount)
        for line in lines
        if line.amount is not None and line.amount > 0
    ]
    found.sort(key=lambda bar: -bar.amount)
    floor_amount = SMALLEST_SHARE * sum((bar.amount for bar in found), Decimal(0))
    small = [bar for i, bar in enumerate(found) if i >= MOST_BARS - 1 or bar.amount < floor_amount]
    if len(small) < 2:
        return found
    low, amount, high = (sum(column, Decimal(0)) for column in zip(*[bar[1:] for bar in small], strict=True))
    return [*found[: len(found) - len(small)], Bar(f"Other ({len(small)} small lines)", low, amount, high)]


def cost_chart(budget: Budget) -> Figure | None:
    """Cost by line as horizontal bars, with the range of each as a thin line; None where nothing costs anything."""
    shown = bars(budget.lines)
    if not shown:
        return None
    ranged = any(not bar.low == bar.amount == bar.high for bar in shown)
    caption = f"Cost of a month by line, in {budget.currency}, largest first."
    if ranged:
        caption += " Bars: expected; thin lines: from low to high."
    if budget.unpriced:
        caption += " Unpriced lines are not shown."
    unit = budget.rounding.round_to
    return Figure(
        caption=caption,
        wide=_cost(shown, budget.currency, unit, WIDE, ranged),
        narrow=_cost(shown, budget.currency, unit, NARROW, ranged),
    )


def _cost(shown: Sequence[Bar], currency: str, unit: Decimal, width: float, ranged: bool) -> str:
    beside = width > NARROW
    values = [money_figure(bar.amount, unit) for bar in shown]
    value_width = max(text_width(value, FONT) for value in values) + 10
    left = 0.32 * width if beside else 0.0
    right = width - value_width if beside else width - 4
    scale = ticks(float(max(bar.high for bar in shown)), 6 if beside else 3)

    def x(amount: float) -> float:
        return left + (right - left) * amount / scale[-1]

    marks: list[str] = []
    y = 4.0
    for bar, value in zip(shown, values, strict=True):
        words = wrap(bar.label, left - 14, FONT) if beside else [shorten(bar.label, width - value_width, FONT)]
        text = 16.0 * len(words)
        height = text + 10 if beside else text + 22
        middle = y + height / 2 if beside else y + text + 10
        first = middle - text / 2 + 12 if beside else y + 13
        marks += [put_text(0, first + 16 * i, word) for i, word in enumerate(words)]
        marks.append(put_text(width, middle + 4 if beside else first, value, "figure", "end"))
        marks.append(put_rect(left, middle - 6, max(x(float(bar.amount)) - left, 1), 12, "bar"))
        if ranged and bar.low != bar.high:
            ends = x(float(bar.low)), x(float(bar.high))
            marks.append(put_line(ends[0], middle, ends[1], middle, "range"))
            marks += [put_line(end, middle - 4, end, middle + 4, "range") for end in ends]
        y += height
    grid = [put_line(x(tick), 4, x(tick), y + 2, "grid") for tick in scale]
    for tick in scale:
        anchor = "middle" if beside and tick else "start" if tick == 0 else "end" if tick == scale[-1] else "middle"
        marks.append(put_text(x(tick), y + 17, _amount(tick), "axis", "start" if tick == 0 else anchor))
    marks.append(put_text(right, y + 34, f"{currency} a month", "axis", "end"))
    description = "; ".join(f"{bar.label} {value}" for bar, value in zip(shown, values, strict=True))
    return drawing("cost", width, y + 40, "Cost of a month by line", f"In {currency}: {description}.", [*grid, *marks])


def _amount(value: float) -> str:
    return f"{value:,.0f}" if value >= 10 or value == int(value) else f"{value:g}"


# --------------------------------------------------------------------------------------------------- memory by context


def memory_chart(curve: MemoryCurve, name: str) -> Figure | None:
    """GPU memory by context, a mark where the smallest machine changes and a row for each machine; None without points.

    The curve is broken where the work is split over another number of GPUs, which changes what one of them holds.
    """
    if not curve.points:
        return None
    label = " ".join(curve.label.split())
    caption = (
        "Memory that one GPU needs by context. Each numbered row is a machine and the contexts for which it is the"
        " smallest that holds the work."
    )
    return Figure(caption=caption, wide=_memory(curve, label, name, WIDE), narrow=_memory(curve, label, name, NARROW))


def _memory(curve: MemoryCurve, label: str, name: str, width: float) -> str:
    contexts = [point.context for point in curve.points]
    lowest, highest = float(min(contexts)), float(max(contexts))
    if lowest == highest:  # one point alone still gets an axis
        lowest, highest = lowest / 2, highest * 2
    steps = [step for step in curve.steps if step.to_tokens >= lowest and step.from_tokens <= highest]
    largest = max(to_gib(max(point.needed_bytes, point.usable_bytes)) for point in curve.points)
    scale = ticks(largest, 5)
    wide = width > NARROW
    legend = 1 if wide else 2
    top = 18.0 + 18 * legend + 36 * bool(steps)
    box = Box(38, top, width - 8, top + (230 if wide else 190))

    def x(tokens: float) -> float:
        share = (log2(min(max(tokens, lowest), highest)) - log2(lowest)) / (log2(highest) - log2(lowest))
        return box.left + (box.right - box.left) * share

    def y(gib: float) -> float:
        return box.bottom - (box.bottom - box.top) * gib / scale[-1]

    body = [put_text(0, 12, "GiB on one GPU", "axis")]
    body += _memory_legend(width, wide)
    body += [put_line(box.left, y(tick), box.right, y(tick), "grid") for tick in scale]
    body += [put_text(box.left - 6, y(tick) + 4, f"{tick:g}", "axis", "end") for tick in scale]
    body += _context_axis(lowest, highest, box, x)
    body += _boundaries(steps, box, x)
    for step in steps:
        usable = next((p.usable_bytes for p in curve.points if step.from_tokens <= p.context <= step.to_tokens), None)
        if usable is not None:
            level = y(to_gib(usable))
            body.append(put_line(x(step.from_tokens), level, x(step.to_tokens), level, "offered"))
    for _, run in groupby(curve.points, key=lambda point: point.place.partition(", ")[2]):
        spots = [(x(point.context), y(to_gib(point.needed_bytes))) for point in run]
        body.append(put_path(spots, "needed"))
        body += [put_circle(*spot, 3, "point") for spot in spots]
    rows, bottom = _machine_rows(steps, box, x, width)
    ends = (curve.points[0], curve.points[-1])
    needs = " and ".join(f"{format_gib(p.needed_bytes)} at {p.context:,} tokens on {p.place}" for p in ends)
    changes = "; ".join(f"{s.place} from {s.from_tokens:,} to {s.to_tokens:,} tokens" for s in curve.steps)
    description = f"{label}: one GPU needs {needs}. Smallest machine: {changes}."
    return drawing(name, width, bottom, f"GPU memory by context: {label}", description, [*body, *rows])


def _memory_legend(width: float, wide: bool) -> list[str]:
    entries = (("needed", "needed"), ("offered", "what one GPU of the machine offers"))
    body: list[str] = []
    left = 0.0
    for i, (style, words) in enumerate(entries):
        y = 30.0 if wide else 30.0 + 18 * i
        body += [put_line(left, y - 4, left + 26, y - 4, style), put_text(left + 32, y, words, "axis")]
        left += 32 + text_width(words) + 24 if wide else 0
    return body


def _context_axis(lowest: float, highest: float, box: Box, x: Scale) -> list[str]:
    """Powers of two, as many as there is room for, and the axis's name."""
    powers = [2.0**i for i in range(ceil(log2(lowest)), floor(log2(highest)) + 1)]
    room = (box.right - box.left) / max(len(powers), 1)
    every = ceil(44 / room)
    body = [put_line(box.left, box.bottom, box.right, box.bottom, "base")]
    for i, tokens in enumerate(powers):
        body.append(put_line(x(tokens), box.bottom, x(tokens), box.bottom + 4, "base"))
        if i % every == 0:
            label = format_tokens(int(tokens)) if tokens >= 1 else f"{tokens:g}"
            half = text_width(label) / 2
            centre = min(max(x(tokens), half), box.right + 8 - half)
            body.append(put_text(centre, box.bottom + 20, label, "axis", "middle"))
    body.append(put_text(box.right, box.bottom + 36, "context, tokens (1k = 1,024), each step doubles", "axis", "end"))
    return body


def _boundaries(steps: Sequence[Step], box: Box, x: Scale) -> list[str]:
    """A dashed line where the machine changes, and the number of each machine above the contexts that are its own."""
    body: list[str] = []
    for step in steps[1:]:
        body.append(put_line(x(step.from_tokens), box.top - 8, x(step.from_tokens), box.bottom, "boundary"))
    middles = [(x(step.from_tokens) + x(step.to_tokens)) / 2 for step in steps]
    places = spread(middles, [20.0] * len(steps), box.left - 10, box.right + 8)
    for number, (middle, place) in enumerate(zip(middles, places, strict=True), start=1):
        if abs(middle - place) > 1:
            body.append(put_line(place, box.top - 14, middle, box.top - 4, "leader"))
        body += _number(place, box.top - 22, number)
    return body


def _number(x: float, y: float, number: int) -> list[str]:
    return [put_circle(x, y, 8.5, "tag"), put_text(x, y + 4, str(number), "tag-text", "middle")]


def _machine_rows(steps: Sequence[Step], box: Box, x: Scale, width: float) -> tuple[list[str], float]:
    """One row a machine beneath the axis: number, name, contexts, and a bar in line with the plot above."""
    y = box.bottom + 58
    body: list[str] = []
    for number, step in enumerate(steps, start=1):
        tokens = f": {step.from_tokens:,} to {step.to_tokens:,}{' tokens' if width > NARROW else ''}"
        words = shorten(" ".join(step.place.split()), width - box.left - text_width(tokens, FONT), FONT) + tokens
        body += _number(box.left - 14, y + 4, number)
        body.append(put_text(box.left, y + 4, words))
        start, end = x(step.from_tokens), x(step.to_tokens)
        body.append(put_rect(box.left, y + 11, box.right - box.left, 4, "track"))
        body.append(put_rect(start, y + 11, max(end - start, 2), 4, "bar"))
        y += 32
    return body, (y - 8 if steps else box.bottom + 44)


# --------------------------------------------------------------------------------------------------------- break-even


class _Cost(NamedTuple):
    """One way to buy a machine: what it costs for no hours and for all hours of a month."""

    priority: Priority
    words: str
    start: float
    end: float


class _Crossing(NamedTuple):
    hours: float
    amount: float
    against_spot: bool


def break_even_chart(commitment: Commitment, budget: Budget, name: str) -> Figure | None:
    """Monthly cost by hours of use, for every way to buy a machine, with the hours at which a commitment pays.

    On demand and spot rise with the hours, spot by its price and the cost of its evictions; a commitment costs 730
    hours whatever is used. None where there is only one way.
    """
    if len(commitment.ways) < 2:
        return None
    rate = budget.per_usd or Decimal(1)
    used = min(commitment.hours_per_month, MONTH_HOURS)
    costs, crossings = [], []
    for way in commitment.ways:
        month = float(way.usd_per_hour * MONTH_HOURS * rate)
        words = PRIORITY_WORDS[way.priority]
        if way.priority in COMMITTED:
            costs.append(_Cost(way.priority, words, month, month))
            for hours, spot in ((way.break_even_hours, False), (way.break_even_hours_against_spot, True)):
                if hours is not None:
                    crossings.append(_Crossing(float(hours), month, spot))
        elif used:
            costs.append(_Cost(way.priority, words, 0.0, float(way.usd_per_month * rate / used * MONTH_HOURS)))
        else:
            costs.append(_Cost(way.priority, words, 0.0, month))
    crossings.sort()
    machine = " ".join(commitment.machine.split())
    caption = f"{machine}: what a month costs by hours of use, in {budget.currency}."
    if crossings:
        caption += " The figures at the top are the hours from which a commitment costs less."
    chart = _BreakEven(machine, budget.currency, costs, crossings, float(used), name)
    return Figure(caption=caption, wide=chart.draw(WIDE), narrow=chart.draw(NARROW))


class _BreakEven(NamedTuple):
    machine: str
    currency: str
    costs: list[_Cost]
    crossings: list[_Crossing]
    used: float
    name: str

    def draw(self, width: float) -> str:
        wide = width > NARROW
        scale = ticks(max(max(cost.start, cost.end) for cost in self.costs), 5)
        left = max(text_width(_amount(tick)) for tick in scale) + 8
        names = max(text_width(cost.words) for cost in self.costs) if wide else 0
        top = 28.0 + 18 * bool(self.crossings)
        box = Box(left, top, width - names - 26 if wide else width - 8, top + (250 if wide else 210))

        def x(hours: float) -> float:
            return box.left + (box.right - box.left) * hours / HOURS

        def y(amount: float) -> float:
            return box.bottom - (box.bottom - box.top) * amount / scale[-1]

        body = [put_text(0, 12, f"{self.currency} a month", "axis")]
        body += [put_line(box.left, y(tick), box.right, y(tick), "grid") for tick in scale]
        body += [put_text(box.left - 6, y(tick) + 4, _amount(tick), "axis", "end") for tick in scale]
        body += self._hours_axis(box, x, wide)
        body += [
            put_path([(x(0), y(cost.start)), (x(HOURS), y(cost.end))], LINE_STYLES[cost.priority])
            for cost in self.costs
        ]
        body += self._crossing_marks(box, x, y)
        bottom = box.bottom + 72
        if wide:
            body += self._names(box, y)
        else:
            for cost in self.costs:
                body += [
                    put_line(0, bottom, 28, bottom, LINE_STYLES[cost.priority]),
                    put_text(36, bottom + 4, cost.words),
                ]
                bottom += 19
        if self.crossings:
            bottom += 0 if wide else 4
            key, bottom = self._key(bottom, width)
            body += key
        title = f"Cost by hours of use: {self.machine}"
        return drawing(self.name, width, bottom - 6, title, self._description(), body)

    def _hours_axis(self, box: Box, x: Scale, wide: bool) -> list[str]:
        body = [put_line(box.left, box.bottom, box.right, box.bottom, "base")]
        for hours in (0, 100, 200, 300, 400, 500, 600, 730) if wide else (0, 200, 400, 600, 730):
            body.append(put_line(x(hours), box.bottom, x(hours), box.bottom + 4, "base"))
            anchor = "start" if hours == 0 else "end" if hours == 730 else "middle"
            body.append(put_text(x(hours), box.bottom + 20, str(hours), "axis", anchor))
        body.append(put_line(x(self.used), box.top, x(self.used), box.bottom + 6, "used"))
        words = f"used: {self.used:,.0f} hours"
        half = text_width(words, FONT + 1) / 2  # it is bold
        centre = min(max(x(self.used), half), box.right - half)
        # under the tick labels, in a row of its own, and the axis's name in the next
        body.append(put_text(centre, box.bottom + 36, words, "used-text", "middle"))
        body.append(put_text(box.right, box.bottom + 52, "hours of use in a month (730: all)", "axis", "end"))
        return body

    def _crossing_marks(self, box: Box, x: Scale, y: Scale) -> list[str]:
        body: list[str] = []
        hours = sorted({round(crossing.hours) for crossing in self.crossings})
        labels = [f"{value:,}" for value in hours]
        places = spread([x(h) for h in hours], [text_width(w) + 10 for w in labels], box.left, box.right + 8)
        for value, words, place in zip(hours, labels, places, strict=True):
            lowest = min(c.amount for c in self.crossings if round(c.hours) == value)
            body.append(put_path([(x(value), y(lowest)), (x(value), box.top - 2), (place, box.top - 12)], "leader"))
            body.append(put_text(place, box.top - 15, words, "figure", "middle"))
        for crossing in self.crossings:
            style = "ring" if crossing.against_spot else "point"
            body.append(put_circle(x(crossing.hours), y(crossing.amount), 4, style))
        return body

    def _names(self, box: Box, y: Scale) -> list[str]:
        """Each line's name beside its end, pushed apart where lines end near each other."""
        body: list[str] = []
        ordered = sorted(self.costs, key=lambda cost: y(cost.end))
        ends = [y(cost.end) for cost in ordered]
        for cost, end, place in zip(
            ordered, ends, spread(ends, [16.0] * len(ends), box.top - 8, box.bottom + 8), strict=True
        ):
            body.append(put_path([(box.right + 1, end), (box.right + 16, place)], "leader"))
            body.append(put_text(box.right + 20, place + 4, cost.words))
        return body

    def _key(self, y: float, width: float) -> tuple[list[str], float]:
        """What the marks at the crossings mean, and where the chart goes on."""
        body: list[str] = []
        left = 6.0
        for style, words, against_spot in (
            ("point", "a commitment meets on demand", False),
            ("ring", "a commitment meets spot", True),
        ):
            if all(crossing.against_spot != against_spot for crossing in self.crossings):
                continue
            if left > 6 and left + 12 + text_width(words) > width:
                left, y = 6.0, y + 18
            body += [put_circle(left, y - 4, 4, style), put_text(left + 12, y, words, "axis")]
            left += 12 + text_width(words) + 24
        return body, y + 18

    def _description(self) -> str:
        whole = "; ".join(
            f"{cost.words} {'flat' if cost.priority in COMMITTED else 'up to'} {cost.end:,.0f}" for cost in self.costs
        )
        meets = "; ".join(
            f"a commitment costs less than {'spot' if c.against_spot else 'on demand'} from {c.hours:,.0f} hours"
            for c in self.crossings
        )
        return f"In {self.currency} a month: {whole}. {meets or 'No commitment ever costs less'}."
