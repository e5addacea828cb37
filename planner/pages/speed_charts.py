"""The charts of `planner scale` as inline SVG, each drawn for a desk and for a phone; no two of their labels touch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import ceil, floor, log10
from typing import NamedTuple

from planner.cost.lines import PRIORITY_WORDS
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
    put_text,
    shorten,
    text_width,
    ticks,
)
from planner.scale.answer import Choice, Machine, Point, ScaleAnswer
from planner.scale.replica import milliseconds, rate_figure
from planner.scale.words import stored_as
from planner.units import money_figure

CURVES = 5  # as many styles as speed.css.j2 has: c1 .. c5
CONCURRENCIES = (1, 4, 16, 64, 256)  # which points of a curve are labelled
ROW = 20.0

Scale = Callable[[float], float]


# ----------------------------------------------------------------------------------------------- throughput and latency


def latency_chart(answer: ScaleAnswer) -> Figure | None:
    """Throughput of one replica against latency, a curve a choice, labelled by how many requests run at once."""
    kinds: dict[tuple[Point, ...], list[Choice]] = {}  # sizes that differ in the number of GPUs share a curve
    for choice in answer.choices:
        if len(choice.sweep) > 1:
            kinds.setdefault(choice.sweep, []).append(choice)
    drawn = list(kinds.values())[:CURVES]
    if not drawn:
        return None
    one = answer.output_tokens == 1
    what = "requests a second" if one else "output tokens a second"
    against = "mean latency" if one else "mean time per later token"
    caption = (
        f"Throughput of one replica against {against}. Figures at the points: requests at once. Up is more for the"
        f" money, left is faster; each curve is one of the cheapest choices, in {what}."
    )
    return Figure(
        caption=caption,
        wide=_latency_drawing(answer, drawn, WIDE),
        narrow=_latency_drawing(answer, drawn, NARROW),
    )


def _latency_drawing(answer: ScaleAnswer, kinds: Sequence[Sequence[Choice]], width: float) -> str:
    drawn = [choices[0] for choices in kinds]
    one = answer.output_tokens == 1
    limit = answer.slo.e2e_p95_s if one else answer.slo.tpot_p95_s

    def across(point: Point) -> float:
        return 1000 * (point.e2e_s if one else point.tpot_s)

    def up(point: Point) -> float:
        return point.requests_per_s if one else point.output_tokens_per_s

    farthest = max(across(point) for choice in drawn for point in choice.sweep)
    right = farthest if limit is None else min(farthest, 1500 * limit)
    scale_x = ticks(right, 8 if width > NARROW else 4)
    curves = [[p for p in choice.sweep if across(p) <= scale_x[-1]] for choice in drawn]
    scale_y = ticks(max((up(p) for curve in curves for p in curve), default=1.0), 5)
    left = max(text_width(f"{tick:,g}") for tick in scale_y) + 10
    box = Box(left, 40, width - 14, 40 + (270 if width > NARROW else 220))

    def x(value: float) -> float:
        return box.left + (box.right - box.left) * value / scale_x[-1]

    def y(value: float) -> float:
        return box.bottom - (box.bottom - box.top) * value / scale_y[-1]

    name = "requests a second" if one else "output tokens a second"
    body = [put_text(0, 12, f"{name}, one replica", "axis"), *_grid(box, scale_x, scale_y, x, y)]
    axis = "latency to the last token, ms" if one else "time per later token, ms"
    body.append(put_text(box.right, box.bottom + 36, f"{axis} (mean)", "axis", "end"))
    taken: list[Box] = []
    if limit is not None and 1000 * limit <= scale_x[-1]:
        words = f"limit (p95) {milliseconds(limit)}"
        edge = x(1000 * limit)
        body.append(put_line(edge, box.top, edge, box.bottom, "boundary"))
        half = text_width(words) / 2
        middle = min(max(edge, box.left + half), box.right - half)
        body.append(put_text(middle, box.top - 4, words, "axis", "middle"))
    labels: list[str] = []
    for number, curve in enumerate(curves, start=1):
        spots = [(x(across(p)), y(up(p))) for p in curve]
        if len(spots) > 1:
            body.append(put_path(spots, f"c{number}"))
        for spot in spots:
            taken.append(Box(spot[0] - 4, spot[1] - 4, spot[0] + 4, spot[1] + 4))
    for curve in curves:
        body += [put_circle(x(across(p)), y(up(p)), 3, "point") for p in curve]
        labels += _concurrency_labels(curve, [(x(across(p)), y(up(p))) for p in curve], taken, box)
    bottom = box.bottom + 58
    for number, choices in enumerate(kinds, start=1):
        first = choices[0]
        words = f"{stored_as(first.weights, first.kv_cache_dtype)}, TP {first.tensor_parallel_size} on"
        words += f" {', '.join(choice.sku.removeprefix('Standard_') for choice in choices)}"
        body += [
            put_line(0, bottom - 4, 34, bottom - 4, f"c{number}"),
            put_text(42, bottom, shorten(words, width - 44, FONT)),
        ]
        bottom += ROW
    told = "; ".join(
        f"{choice.sku.removeprefix('Standard_')} from {across(curve[0]):,.3g} ms at {up(curve[0]):,.0f} to"
        f" {across(curve[-1]):,.3g} ms at {up(curve[-1]):,.0f}"
        for choice, curve in zip(drawn, curves, strict=True)
        if curve
    )
    return drawing("latency", width, bottom - 8, "Throughput against latency", f"{told}.", [*body, *labels])


def _concurrency_labels(
    curve: Sequence[Point], spots: Sequence[tuple[float, float]], taken: list[Box], box: Box
) -> list[str]:
    """The concurrency beside the points nearest to round ones, where there is room."""
    chosen: dict[int, None] = {}
    for wanted in CONCURRENCIES:
        near = min(range(len(curve)), key=lambda i: abs(log10(max(curve[i].concurrency, 0.01) / wanted)))
        if abs(log10(max(curve[near].concurrency, 0.01) / wanted)) < 0.25:
            chosen[near] = None
    body = []
    for i in chosen:
        number = curve[i].concurrency
        words = f"{number:,.0f}" if number >= 9.5 else f"{number:.2g}"
        place = _room(spots[i], text_width(words), 12, taken, box)
        if place is not None:
            body.append(put_text(place[0], place[1], words, "axis", "middle"))
    return body


def _room(
    spot: tuple[float, float], width: float, height: float, taken: list[Box], box: Box
) -> tuple[float, float] | None:
    """The middle of a text's base line near a spot that touches nothing; what it covers is then taken."""
    x, y = spot
    for dx, dy in (
        (-width / 2 - 7, -5), (width / 2 + 8, 14), (0, -9), (0, 19), (-width / 2 - 9, 4), (width / 2 + 9, 4),
    ):  # fmt: skip
        middle, base = x + dx, y + dy
        wanted = Box(middle - width / 2 - 1, base - height + 1, middle + width / 2 + 1, base + 2)
        inside = wanted.left >= box.left and wanted.right <= box.right and wanted.top >= box.top
        if inside and wanted.bottom <= box.bottom and not any(_touch(wanted, other) for other in taken):
            taken.append(wanted)
            return middle, base
    return None


def _touch(a: Box, b: Box) -> bool:
    return a.left < b.right and b.left < a.right and a.top < b.bottom and b.top < a.bottom


def _grid(box: Box, across: Sequence[float], up: Sequence[float], x: Scale, y: Scale) -> list[str]:
    body = [put_line(box.left, y(tick), box.right, y(tick), "grid") for tick in up]
    body += [put_text(box.left - 6, y(tick) + 4, f"{tick:,g}", "axis", "end") for tick in up]
    body.append(put_line(box.left, box.bottom, box.right, box.bottom, "base"))
    for tick in across:
        words = f"{tick:,g}"
        half = text_width(words) / 2
        middle = min(x(tick), box.right + 14 - half)
        body.append(put_line(x(tick), box.bottom, x(tick), box.bottom + 4, "base"))
        body.append(put_text(middle, box.bottom + 20, words, "axis", "middle"))
    return body


# ---------------------------------------------------------------------------------------------------- cost, throughput


class _Axis(NamedTuple):
    """A logarithmic axis between round figures."""

    low: float
    high: float
    marks: tuple[float, ...]

    def share(self, value: float) -> float:
        return (log10(value) - log10(self.low)) / (log10(self.high) - log10(self.low))


def _axis(values: Sequence[float]) -> _Axis:
    """1, 2 and 5 times powers of ten around the values."""
    first, last = floor(log10(min(values))), ceil(log10(max(values)))
    steps = [m * 10.0**power for power in range(first, last + 1) for m in (1, 2, 5)]
    below = [step for step in steps if step <= min(values)]
    above = [step for step in steps if step >= max(values)]
    low, high = below[-1], above[0]
    if low == high:
        high = low * 10
    return _Axis(low, high, tuple(step for step in steps if low <= step <= high))


def cost_chart(answer: ScaleAnswer) -> Figure | None:
    """What one machine costs an hour against the requests it answers within the limits, the Pareto front marked."""
    if not answer.machines:
        return None
    caption = (
        f"Cost of one machine, {PRIORITY_WORDS[answer.priority]}, against the requests a second that it answers within"
        " the limits. On the line lie the machines that no other beats in both; grey points are beaten. Both axes are"
        " logarithmic."
    )
    return Figure(caption=caption, wide=_cost_drawing(answer, WIDE), narrow=_cost_drawing(answer, NARROW))


def _cost_drawing(answer: ScaleAnswer, width: float) -> str:
    machines = answer.machines
    across = _axis([m.requests_per_s for m in machines])
    up = _axis([float(m.usd_per_hour) for m in machines])
    left = max(text_width(f"{tick:,g}") for tick in up.marks) + 10
    box = Box(left, 26, width - 14, 26 + (270 if width > NARROW else 220))

    def x(value: float) -> float:
        return box.left + (box.right - box.left) * across.share(value)

    def y(value: float) -> float:
        return box.bottom - (box.bottom - box.top) * up.share(value)

    body = [put_text(0, 12, "USD an hour, one machine", "axis")]
    body += _grid(box, _thinned(across, box.right - box.left), up.marks, x, y)
    body.append(put_text(box.right, box.bottom + 36, "requests a second, one machine", "axis", "end"))
    front = sorted((m for m in machines if m.pareto), key=lambda m: m.requests_per_s)
    spots = [(x(m.requests_per_s), y(float(m.usd_per_hour))) for m in front]
    body += [put_circle(x(m.requests_per_s), y(float(m.usd_per_hour)), 3.5, "dot") for m in machines if not m.pareto]
    if len(spots) > 1:
        body.append(put_path(spots, "front"))
    body += [put_circle(*spot, 4, "point") for spot in spots]
    points = [*spots, *((x(m.requests_per_s), y(float(m.usd_per_hour))) for m in machines if not m.pareto)]
    taken = [Box(px - 5, py - 5, px + 5, py + 5) for px, py in points]
    for number, spot in enumerate(spots, start=1):
        body += _tag(spot, number, taken)
    bottom = box.bottom + 60
    for number, machine in enumerate(front, start=1):
        body += _mark(10, bottom - 4, number)
        body.append(put_text(26, bottom, shorten(_told(machine, width > NARROW), width - 28, FONT)))
        bottom += ROW + 2
    told = "; ".join(_told(machine, True) for machine in front)
    return drawing("cost-throughput", width, bottom - 8, "Cost against throughput", f"Pareto front: {told}.", body)


def _told(machine: Machine, whole: bool) -> str:
    words = f"{machine.sku.removeprefix('Standard_')}, {stored_as(machine.weights, machine.kv_cache_dtype)}"
    rate = rate_figure(machine.requests_per_s)
    usd = money_figure(machine.usd_per_hour)
    if not whole:
        return f"{words}: {rate}/s, ${usd}/h"
    return f"{words}, TP {machine.tensor_parallel_size}: {rate} requests a second, ${usd} an hour"


def _thinned(axis: _Axis, room: float) -> tuple[float, ...]:
    """The marks whose labels fit side by side, ends first."""
    widest = max(text_width(f"{mark:,g}") for mark in axis.marks) + 10
    shown: list[float] = []
    for mark in axis.marks:
        if all(abs(axis.share(mark) - axis.share(other)) * room >= widest for other in shown):
            shown.append(mark)
    return tuple(shown)


def _mark(x: float, y: float, number: int) -> list[str]:
    return [put_circle(x, y, 8.5, "tag"), put_text(x, y + 4, str(number), "tag-text", "middle")]


def _tag(spot: tuple[float, float], number: int, taken: list[Box]) -> list[str]:
    """A number near a point, as near as other numbers and points leave room."""
    x, y = spot
    for radius in (22.0, 28.0, 36.0, 46.0, 58.0):
        for dx, dy in ((0.7, 0.7), (-0.7, -0.7), (1, 0), (0, -1), (0, 1), (-1, 0), (0.7, -0.7), (-0.7, 0.7)):
            cx, cy = x + radius * dx, y + radius * dy
            wanted = Box(cx - 10, cy - 10, cx + 10, cy + 10)
            if not any(_touch(wanted, other) for other in taken):
                taken.append(wanted)
                return [put_line(x, y, cx, cy, "leader"), *_mark(cx, cy, number)]
    return []
