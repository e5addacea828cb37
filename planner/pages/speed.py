"""The page of `planner scale` as HTML and Markdown, its charts as one picture, and the file that -o names."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Sequence
from decimal import Decimal
from pathlib import Path

from planner.cost.lines import PRIORITY_WORDS
from planner.errors import PlannerError
from planner.files import write_atomically
from planner.pages import _environment
from planner.pages.blocks import Block, Bullets, Cell, Column, Page, Row, Section, Table, Text, one_line
from planner.pages.speed_charts import cost_chart, latency_chart
from planner.pages.svg import WIDE, put_text
from planner.scale.answer import METRIC_WORDS, Choice, Metric, Performance, ScaleAnswer
from planner.scale.replica import milliseconds, rate_figure
from planner.scale.words import headline, limits, sentences, shown_metrics, stored_as
from planner.units import money_figure

WHOLE = Decimal(1)

# what a picture that stands alone needs of the page's sheet
STYLE = """
text{font:13px system-ui,"Segoe UI",Roboto,"Helvetica Neue",Arial,"DejaVu Sans",sans-serif;fill:#1c242c}
.axis{font-size:12px;fill:#56616c}.heading{font-size:15px;font-weight:600}
.grid{stroke:#e4e8ea}.base{stroke:#56616c}path{fill:none}.point{fill:#1c242c;stroke:#fff}.leader{stroke:#9aa4ad}
.tag{fill:#1c242c}.tag-text{font-size:11px;font-weight:600;fill:#fff}.boundary{stroke:#56616c;stroke-dasharray:4 3}
"""


def write_scale(answer: ScaleAnswer, output: str) -> None:
    """The answer as .html, .svg, .md or .json. PlannerError for another ending, or a place that cannot be written."""
    writers: dict[str, Callable[[ScaleAnswer], str]] = {
        "html": scale_html,
        "svg": scale_svg,
        "md": scale_markdown,
        "json": lambda made: made.model_dump_json(indent=2) + "\n",
    }
    ending = Path(output).suffix.lower().lstrip(".")
    ending = {"markdown": "md", "htm": "html"}.get(ending, ending)
    if ending not in writers:
        raise PlannerError(f"the name {output} does not say a format: end it in .html, .svg, .md or .json")
    try:
        write_atomically(Path(output), writers[ending](answer))
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or "not a path"
        raise PlannerError(f"{output!r} cannot be written ({reason}): choose another place with -o") from error
    print(f"wrote {output}: {len(answer.choices)} choices", file=sys.stderr)


def scale_html(answer: ScaleAnswer) -> str:
    """The page as one HTML file that loads nothing."""
    return _environment(html=True).get_template("scale.html.j2").render(page=page_of(answer))


def scale_markdown(answer: ScaleAnswer) -> str:
    """The page as Markdown, without its charts."""
    return _environment(html=False).get_template("budget.md.j2").render(page=page_of(answer, charts=False))


def scale_svg(answer: ScaleAnswer) -> str:
    """Both charts as one picture on white."""
    figures = [figure for figure in (latency_chart(answer), cost_chart(answer)) if figure is not None]
    body: list[str] = []
    y = 24.0
    for figure in figures:
        size = re.search(r'viewBox="0 0 ([0-9.]+) ([0-9.]+)"', figure.wide)
        assert size is not None
        body.append(put_text(24, y + 12, figure.caption.partition(".")[0], "heading"))
        place = f'<svg x="24" y="{y + 30:g}" width="{size[1]}" height="{size[2]}" class="chart'
        body.append(figure.wide.replace('<svg class="chart', place, 1))
        y += 30 + float(size[2]) + 36
    if not figures:
        body.append(put_text(24, y + 12, "Nothing keeps the limits, so that there is nothing to draw.", "heading"))
        y += 36
    width = WIDE + 48
    style = STYLE + _environment(html=False).get_template("speed.css.j2").render()
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{y:g}" viewBox="0 0 {width} {y:g}">'
        f'<style>{style}</style><rect width="100%" height="100%" fill="#fff"/>{"".join(body)}</svg>\n'
    )


# --------------------------------------------------------------------------------------------------------------- page


def page_of(answer: ScaleAnswer, *, charts: bool = True) -> Page:
    """What the page says, section by section."""
    sections = []
    drawn: list[Block] = [chart for chart in (latency_chart(answer), cost_chart(answer)) if chart is not None]
    if drawn and charts:
        sections.append(Section(anchor="charts", heading="Throughput, latency and cost", blocks=tuple(drawn)))
    rows = answer.cheaper if answer.choices else answer.rejected
    reasons = tuple(dict.fromkeys(one_line(f"{row.reason}.") for row in rows))
    if reasons:
        heading = "Why nothing cheaper does" if answer.choices else "Why nothing does"
        sections.append(Section(anchor="cheaper", heading=heading, blocks=(Bullets(entries=reasons),)))
    if answer.choices:
        sections.append(Section(anchor="day", heading="Over the day", blocks=(_hours(answer.choices[0]),)))
    told = [f"{one_line(note)}." for note in answer.notes] + (
        [f"Prices: {answer.price_source}."] * bool(answer.choices)
    )
    if told:
        sections.append(Section(anchor="notes", heading="Notes", blocks=(Bullets(entries=tuple(told)),)))
    return Page(
        title=f"Serving {answer.model}",
        subject=f"{headline(answer)}: {limits(answer)}",
        facts=(f"Azure regions: {', '.join(answer.regions)}", "List prices in USD, a month of 730 hours"),
        opening=_opening(answer),
        sections=tuple(sections),
    )


def _opening(answer: ScaleAnswer) -> tuple[Block, ...]:
    lines = tuple(Text(text=one_line(line)) for line in sentences(answer))
    if not answer.choices:
        return (Text(tone="warning", text="no machine that may be taken keeps these limits."), *lines)
    metrics = shown_metrics(answer)
    columns = [
        Column(heading="Size"),
        Column(heading="Weights"),
        Column(heading="Machines", short=True),
        Column(heading="Requests/s each", number=True),
        *(Column(heading=f"{METRIC_WORDS[m]}, ms (high end)", number=True) for m in metrics),
        Column(heading="USD per million out", number=True),
        Column(heading=f"USD a month {PRIORITY_WORDS[answer.priority]}", number=True),
        *([Column(heading="Region", short=True)] if _several_regions(answer) else []),
    ]
    rows = [_row(choice, answer, metrics) for choice in answer.choices]
    table = Table(name="choices", label="Choices, cheapest first", columns=tuple(columns), rows=tuple(rows))
    return (table, *lines)


def _row(choice: Choice, answer: ScaleAnswer, metrics: Sequence[Metric]) -> Row:
    way = choice.bought(answer.priority)
    assert way is not None
    seen = choice.performance
    texts = [
        choice.sku.removeprefix("Standard_"),
        stored_as(choice.weights, choice.kv_cache_dtype),
        f"{choice.machines:,} x {choice.replicas_per_machine}, TP {choice.tensor_parallel_size}",
        f"{rate_figure(seen.rate_per_s)} of {rate_figure(choice.largest_per_s)}",
        *(_latency(seen, metric) for metric in metrics),
        money_figure(way.usd_per_million_output),
        money_figure(way.usd_per_month, WHOLE),
        *([choice.region] if _several_regions(answer) else []),
    ]
    cells = [Cell(text=one_line(text)) for text in texts]
    if choice.extrapolated:
        cells[1] = Cell(text=cells[1].text, mark="estimate")
    return Row(cells=tuple(cells))


def _several_regions(answer: ScaleAnswer) -> bool:
    return len({choice.region for choice in answer.choices}) > 1


def _latency(seen: Performance, metric: Metric) -> str:
    span = seen.of(metric)
    if span is None:
        return ""
    expected, high = (milliseconds(value).removesuffix(" ms") for value in (span.expected, span.high))
    return expected if expected == high else f"{expected} ({high})"


def _hours(choice: Choice) -> Table:
    """Machines by hour, equal hours together."""
    runs: list[tuple[int, int, int]] = []
    for hour, machines in enumerate(choice.band.machines):
        if runs and runs[-1][2] == machines:
            runs[-1] = (runs[-1][0], hour + 1, machines)
        else:
            runs.append((hour, hour + 1, machines))
    rows = [
        Row(cells=(Cell(text=f"{first:02}:00 to {last:02}:00"), Cell(text=f"{machines:,}")))
        for first, last, machines in runs
    ]
    columns = (Column(heading="Hours"), Column(heading="Machines", number=True))
    return Table(name="pairs", label="Machines by hour", columns=columns, rows=tuple(rows))
