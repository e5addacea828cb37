"""`planner scale` in the terminal: the choices, what follows, and why nothing cheaper does."""

from __future__ import annotations

from collections.abc import Sequence
from decimal import Decimal
from typing import TYPE_CHECKING, Literal

from planner.catalog.prices import Priority
from planner.cost.lines import PRIORITY_WORDS
from planner.report import WIDE, _escape, _table, console, put
from planner.scale.answer import METRIC_WORDS, Choice, Metric, Performance, Rejected, ScaleAnswer
from planner.scale.replica import milliseconds, rate_figure
from planner.scale.words import headline, how, limited_metrics, limits, sentences, shown_metrics, stored_as, watched
from planner.size import Span
from planner.units import format_usd, money_figure

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

WHOLE = Decimal(1)
NEAREST = 8  # sizes that are told where nothing keeps the limits
WAYS: tuple[tuple[Priority, str], ...] = (
    ("spot", "spot"), ("reserved-1y", "1 year\nreserved"), ("reserved-3y", "3 years\nreserved"),
)  # fmt: skip


def emit_scale(answer: ScaleAnswer, *, as_json: bool, explain: bool) -> None:
    """The answer on stdout."""
    if as_json:
        put(answer.model_dump_json(indent=2) + "\n")
    else:
        print_scale(console(), answer, explain=explain)


def print_scale(console: Console, answer: ScaleAnswer, *, explain: bool = False) -> None:
    """A table of choices, why not cheaper, the day, the next step."""
    console.print(f"[bold]{_escape(answer.model)}[/bold]: {headline(answer)}", highlight=False)
    console.print(f"Limits: {limits(answer)}.", highlight=False)
    console.print()
    if answer.choices:
        console.print(_choices(answer, console))
        _ways(console, answer)
    for line in sentences(answer):
        console.print(_escape(line), highlight=False)
    rows = answer.rejected if explain else answer.cheaper if answer.choices else _near(answer)
    _rejected(console, answer, rows, explain=explain)
    if explain:
        for choice in answer.choices:
            _explain(console, answer, choice)
        if answer.features:
            _features(console, answer)
        _formulas(console, answer)
    for note in answer.notes:
        console.print(f"Note: {_escape(note)}.", highlight=False)
    if answer.price_source:
        console.print(f"Prices: {_escape(answer.price_source)}.", highlight=False)
    if answer.choices:
        arguments = " ".join(answer.choices[0].arguments)
        if arguments and explain:
            console.print(f"Next: vllm serve MODEL {_escape(arguments)}", highlight=False)
        else:
            console.print("Next: --explain shows every size and formula; -o page.html draws them", highlight=False)


Ends = Literal["range", "both", "high"]


def _choices(answer: ScaleAnswer, console: Console) -> Table:
    """The table in the fullest form that the terminal holds: below 120 columns less of each latency, then no $/M."""
    forms: tuple[tuple[Ends, bool], ...] = (("both", True), ("high", True), ("high", False))
    if console.width >= WIDE:
        forms = (("range", True), *forms)
    for ends, dollars in forms:
        table = _choice_table(answer, ends, dollars=dollars)
        if table.__rich_measure__(console, console.options.update(width=1000)).maximum <= console.width:
            break
    return table


def _choice_table(answer: ScaleAnswer, ends: Ends, *, dollars: bool) -> Table:
    wide = ends == "range"
    metrics = shown_metrics(answer) if wide else limited_metrics(answer)
    regions = wide and len({choice.region for choice in answer.choices}) > 1
    ways = [(p, word) for p, word in WAYS if wide and any(choice.bought(p) for choice in answer.choices)]
    table = _table(
        f"Choices, cheapest {PRIORITY_WORDS[answer.priority]} first",
        [
            ("size", "name"),
            ("weights", "name"),
            ("machines x\nreplicas", "name"),
            *([("requests/s\na replica", "right")] if wide else []),
            *(
                (METRIC_WORDS[m].replace(" ", "\n") + ("\nhigh" if ends == "high" else ", ms"), "right")
                for m in metrics
            ),
            *([("load", "right")] if wide else []),
            *([("$/M\nout", "right")] if dollars else []),
            *([("$/M\nall", "right")] if wide else []),
            ("$ a\nmonth", "right"),
            *((word, "right") for _, word in ways),
            *([("region", "name")] if regions else []),
        ],
    )
    for choice in answer.choices:
        way = choice.bought(answer.priority)
        assert way is not None
        seen = choice.performance
        table.add_row(
            choice.sku.removeprefix("Standard_"),
            _escape(stored_as(choice.weights, choice.kv_cache_dtype)) + (" *" if choice.extrapolated else ""),
            f"{choice.machines:,}x{choice.replicas_per_machine} TP{choice.tensor_parallel_size}",
            *([f"{rate_figure(seen.rate_per_s)} of {rate_figure(choice.largest_per_s)}"] if wide else []),
            *(_latency(seen, m, ends) for m in metrics),
            *([f"{seen.utilization:.0%}"] if wide else []),
            *([money_figure(way.usd_per_million_output)] if dollars else []),
            *([money_figure(way.usd_per_million_total)] if wide else []),
            money_figure(way.usd_per_month, WHOLE),
            *(_month(choice, priority) for priority, _ in ways),
            *([choice.region] if regions else []),
        )
    return table


def _latency(seen: Performance, metric: Metric, ends: Ends) -> str:
    """Milliseconds: expected with low and high end, expected with the high end, or the high end alone."""
    span = seen.of(metric)
    if span is None:
        return "-"
    figures = 3 if ends == "range" else 2
    low, expected, high = (
        milliseconds(value, figures).removesuffix(" ms") for value in (span.low, span.expected, span.high)
    )
    if low == high or ends == "high":
        return high
    return f"{expected} ({low} to {high})" if ends == "range" else f"{expected} ({high})"


def _month(choice: Choice, priority: Priority) -> str:
    way = choice.bought(priority)
    return "-" if way is None else money_figure(way.usd_per_month, WHOLE)


def _ways(console: Console, answer: ScaleAnswer) -> None:
    """What the first choice costs bought in each way, on a terminal that has no columns for it."""
    if any(choice.extrapolated for choice in answer.choices):
        console.print(
            "* no run on such a card with such weights is behind the figures: the range is wide", highlight=False
        )
    first = answer.choices[0]
    ways = [f"{format_usd(w.usd_per_month, WHOLE)} {PRIORITY_WORDS[w.priority]}" for w in first.money]
    console.print(
        f"{first.sku.removeprefix('Standard_')} in {first.region}, a month: {', '.join(ways)}.", highlight=False
    )


def _rejected(console: Console, answer: ScaleAnswer, rows: Sequence[Rejected], *, explain: bool) -> None:
    from rich.padding import Padding

    if not rows:
        return
    if answer.choices:
        title = "What does not do:" if explain else "Why nothing cheaper does:"
    else:
        title = "Nothing keeps the limits:"
    console.print(title, highlight=False)
    grouped: dict[str, list[Rejected]] = {}
    for row in rows:
        grouped.setdefault(row.reason.removeprefix(row.sku.removeprefix("Standard_")), []).append(row)
    for same in grouped.values():
        names = list(dict.fromkeys(row.sku.removeprefix("Standard_") for row in same))
        others = f"; so does {' and '.join(filter(None, (', '.join(names[1:-1]), names[-1])))}" if names[1:] else ""
        if len(names) > 2:
            others = others.replace("so does", "so do")
        console.print(Padding(_escape(same[0].reason + others), (0, 0, 0, 2)), highlight=False)


def _near(answer: ScaleAnswer) -> list[Rejected]:
    """Of each size what comes nearest to the limits, the nearest sizes first; else why nothing runs at all."""
    missed = sorted((r for r in answer.rejected if r.excess is not None), key=lambda r: r.excess or 0)
    by_size: dict[str, Rejected] = {}
    for row in missed or answer.rejected:
        by_size.setdefault(row.sku, row)
    return list(by_size.values())[:NEAREST]


def _explain(console: Console, answer: ScaleAnswer, choice: Choice) -> None:
    seen = choice.performance
    name = choice.sku.removeprefix("Standard_")
    weights = stored_as(choice.weights, choice.kv_cache_dtype)
    console.print(f"\n[bold]{name}, {_escape(weights)}, {how(choice)}[/bold]", highlight=False)
    each, most = rate_figure(seen.rate_per_s), rate_figure(choice.largest_per_s)
    lines = [
        f"replicas: {rate_figure(answer.rate_per_s)} / {most} requests a second within the limits, up to whole machines"
        f" of {choice.replicas_per_machine} = {choice.replicas}",
        f"each: {each} requests a second ({seen.utilization:.0%} of the {rate_figure(choice.saturation_per_s)} at"
        f" saturation), {seen.in_flight:,.1f} in flight, {seen.output_tokens_per_s:,.0f} output tokens a second"
        f" ({seen.method})",
    ]
    lines += [f"{METRIC_WORDS[m]}: {_range(span)}" for m in ("ttft", "tpot", "e2e") if (span := seen.of(m)) is not None]
    for way in choice.money:
        lines.append(
            f"{PRIORITY_WORDS[way.priority]}: {format_usd(way.usd_per_hour, Decimal('0.0001'))} an hour,"
            f" {format_usd(way.usd_per_month)} a month, ${way.usd_per_million_output} a million output tokens,"
            f" ${way.usd_per_million_total} of all"
        )
    lines += watched(choice)
    if choice.arguments:
        lines.append(f"vllm serve MODEL {' '.join(choice.arguments)}")
    for line in lines:
        console.print(f"  {_escape(line)}", highlight=False)


def _features(console: Console, answer: ScaleAnswer) -> None:
    """What each feature does to a lone request and to the rate at saturation, as times faster."""
    name = answer.choices[0].sku.removeprefix("Standard_")
    columns = [("", "left"), ("as", "left"), ("alone", "right"), ("saturated", "right")]
    table = _table(f"What it would buy on {name}, times faster", columns)
    for feature in answer.features:
        table.add_row(feature.name, _escape(feature.setting), f"{feature.alone:.2f}", f"{feature.saturated:.2f}")
    console.print()
    console.print(table)
    for note in dict.fromkeys(feature.note for feature in answer.features):
        console.print(f"  {_escape(note)}", highlight=False)


def _range(span: Span) -> str:
    if span.low == span.high:
        return milliseconds(span.expected)
    return f"{milliseconds(span.expected)} ({milliseconds(span.low)} to {milliseconds(span.high)})"


def _formulas(console: Console, answer: ScaleAnswer) -> None:
    at = "the high end of its range" if answer.at == "high" else "its expected value"
    console.print(
        "\nReplicas = requests a second / largest rate of one replica at which every p95 keeps its limit by"
        f" {at}. Machines are whole, and a month has 730 hours."
        "\n$/M out = machines x $ an hour / (requests a second x output tokens x 3600) x 10^6.",
        highlight=False,
    )
