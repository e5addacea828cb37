"""Plans, prices and comparisons in the terminal: a table first, the reason second, the next step last."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from decimal import Decimal
from pathlib import Path
from typing import TYPE_CHECKING

from planner.catalog.prices import PRIORITIES, Offer, PriceSheet
from planner.compare import Comparison
from planner.cost.lines import PRIORITY_WORDS, Alternative, figure
from planner.plan import Considered, Plan
from planner.plan.beside import Beside
from planner.report import WIDE, _escape, _table, console, put
from planner.units import format_gib, format_tokens, format_usd, money_figure

if TYPE_CHECKING:
    from rich.console import Console

    from planner.catalog.prices.retail import Refreshed

SHOWN = 5


def emit_plan(plan: Plan, *, stack: str | None = None, as_json: bool, explain: bool) -> None:
    """The plan on stdout. stack: whose it is."""
    if as_json:
        put(plan.model_dump_json(indent=2) + "\n")
    else:
        print_plan(console(), plan, stack=stack, explain=explain)


def print_plan(console: Console, plan: Plan, *, stack: str | None = None, explain: bool = False) -> None:
    """Pools, the month's bill, what lost and why, quota; --explain: every formula and every size."""
    spread = f"{format_usd(plan.low_usd)} to {format_usd(plan.high_usd)}"
    at_least = "at least " if plan.unpriced else ""
    console.print(
        f"[bold]{plan.region}: {at_least}{format_usd(plan.usd)} a month[/bold] ({spread}), GPU machines"
        f" {format_usd(plan.gpu_usd)}",
        highlight=False,
    )
    console.print()
    console.print(_pools(plan, console.width))
    console.print(_bill(plan, console.width, explain=explain))
    for placed in plan.workloads:
        rows = [row for row in plan.considered if row.workload == placed.name]
        console.print(_considered(placed.name, rows if explain else rows[: SHOWN + 1]))
        _say_rest(console, rows, explain=explain)
    if len(plan.regions) > 1:
        console.print(_regions(plan, explain=explain))
    table = _table("Quota to have before you deploy", [("vCPUs", "right"), ("quota", "left"), ("for", "left")])
    for ask in plan.quota:
        table.add_row(str(ask.vcpus), ask.name, ask.reason)
    console.print(table)
    if explain:
        _sources(console, plan)
        _alternatives(console, plan)
    for line in plan.lines:
        if not line.priced:
            console.print(
                f"Unpriced: {_escape(line.label)} ({line.note}): the total is a lower bound.", highlight=False
            )
    for note in plan.notes:
        console.print(f"Note: {_escape(note)}.", highlight=False)
    prices = plan.prices
    console.print(
        f"Prices: sheet {prices.sheet} ({prices.digest}), figures of {prices.oldest} to {prices.newest},"
        f" {prices.estimates} of {len(plan.lines)} estimated.",
        highlight=False,
    )
    following = (
        f"planner budget --stack {stack} -o budget.html" if stack else "write it as the intent of a stack (stacks/)"
    )
    console.print(f"Next: {following}{'' if explain else '; --explain shows every formula'}", highlight=False)


def _pools(plan: Plan, width: int) -> object:
    table = _table(
        "Pools",
        [
            ("pool", "name"),
            ("size", "name"),
            ("bought", "left"),
            ("nodes", "right"),
            ("for", "left"),
            *([("GPU memory", "right")] if width >= WIDE else []),
            ("USD a month", "right"),
        ],
    )
    placed = {w.name: w for w in plan.workloads}
    for pool in plan.pools:
        most = max((placed[name] for name in pool.workloads), key=lambda w: w.needed_bytes)
        need = f"{format_gib(most.needed_bytes)} of {format_gib(most.usable_bytes)}"
        table.add_row(
            pool.name,
            pool.sku.removeprefix("Standard_"),
            PRIORITY_WORDS[pool.priority] + (" (fallback)" if pool.fallback else ""),
            f"{pool.min_nodes}-{pool.max_nodes}",
            ", ".join(pool.workloads),
            *([need] if width >= WIDE else []),
            money_figure(pool.usd_per_month),
        )
    return table


def _bill(plan: Plan, width: int, *, explain: bool) -> object:
    """Lines above a dollar, the small ones together; all of them with --explain."""
    table = _table("A month", [("line", "left"), ("how much", "left"), ("USD", "right")])
    small = [line for line in plan.lines if line.usd is not None and line.usd < 1 and not explain]
    for line in plan.lines:
        if line in small:
            continue
        rate = f" at {figure(line.unit_usd)}" if line.sku and line.unit_usd is not None else ""
        basis = line.formula if explain else line.basis + rate
        mark = " *" if line.provenance and line.provenance.estimate else ""
        table.add_row(line.label, _escape(basis), "unpriced" if line.usd is None else money_figure(line.usd) + mark)
    if small:
        names = f"{len(small)} lines below a dollar"
        table.add_row(names, "", money_figure(sum((line.usd for line in small if line.usd), Decimal(0))))
    table.add_row(
        "[bold]total[/bold]", "* an estimated price" if width else "", f"[bold]{money_figure(plan.usd)}[/bold]"
    )
    return table


def _considered(workload: str, rows: Sequence[Considered]) -> object:
    table = _table(
        f"Sizes for {workload}, with their disks",
        [("size", "name"), ("GPUs", "right"), ("cheapest way", "left"), ("USD a month", "right"), ("", "left")],
    )
    for row in rows:
        table.add_row(
            row.sku,
            str(row.gpus or "-"),
            PRIORITY_WORDS[row.priority] if row.priority else "-",
            "-" if row.usd_per_month is None else money_figure(row.usd_per_month),
            _escape(row.reason),
            style="bold" if row.verdict == "chosen" else None,
        )
    return table


def _say_rest(console: Console, rows: Sequence[Considered], *, explain: bool) -> None:
    """How many sizes the short table leaves out, by why they lost."""
    rest = [] if explain else rows[SHOWN + 1 :]
    if not rest:
        return
    counts: dict[str, int] = {}
    for row in rest:
        counts[row.verdict] = counts.get(row.verdict, 0) + 1
    words = {"does not fit": "do not fit", "cannot run": "cannot run it", "excluded": "left out"}
    text = ", ".join(f"{n} {words.get(verdict, verdict)}" for verdict, n in counts.items())
    console.print(f"and {len(rest)} more: {text}", highlight=False)
    console.print()


def _regions(plan: Plan, *, explain: bool) -> object:
    rows = sorted(plan.regions, key=lambda r: (r.usd_per_month is None, r.usd_per_month or 0, r.region))
    table = _table("Regions", [("region", "name"), ("USD a month", "right"), ("", "left")])
    for row in rows if explain else rows[: SHOWN + 1]:
        cost = "-" if row.usd_per_month is None else money_figure(row.usd_per_month)
        table.add_row(row.region, cost, _escape(row.reason), style="bold" if row.region == plan.region else None)
    if len(rows) > SHOWN + 1 and not explain:
        table.add_row(f"and {len(rows) - SHOWN - 1} more", "", "")
    return table


def _sources(console: Console, plan: Plan) -> None:
    """Where the price behind each line comes from, and the day it was read."""
    table = _table("Where each price comes from", [("line", "left"), ("as of", "name"), ("source", "left")])
    for line in plan.lines:
        if line.provenance is not None:
            note = f"; estimate: {line.note or line.provenance.note}" if line.provenance.estimate else ""
            table.add_row(line.label, str(line.provenance.as_of), _escape(line.provenance.source + note))
    console.print(table)


def _alternatives(console: Console, plan: Plan) -> None:
    for pool in plan.alternatives:
        title = f"{pool.sku.removeprefix('Standard_')} for {figure(pool.hours_per_month, 1)} hours a month, every way"
        console.print(alternatives_table(title, pool.ways))


def alternatives_table(title: str, ways: Iterable[Alternative]) -> object:
    """One machine bought in every way: by the hour, by the month, and from how many hours a commitment pays."""
    table = _table(
        title,
        [
            ("bought", "left"),
            ("USD an hour", "right"),
            ("USD a month", "right"),
            ("pays from, hours", "right"),
            ("against spot", "right"),
            ("as of", "left"),
        ],
    )
    for way in ways:
        table.add_row(
            PRIORITY_WORDS[way.priority] + (" *" if way.provenance.estimate else ""),
            figure(way.usd_per_hour, 4),
            money_figure(way.usd_per_month),
            "-" if way.break_even_hours is None else figure(way.break_even_hours, 0),
            "-" if way.break_even_hours_against_spot is None else figure(way.break_even_hours_against_spot, 0),
            str(way.provenance.as_of),
        )
    return table


def emit_beside(rows: Sequence[Beside], *, as_json: bool) -> None:
    """Plans by context beside the reference choices, and why they differ."""
    if as_json:
        put(json.dumps([row.model_dump(mode="json") for row in rows], indent=2) + "\n")
        return
    table = _table(
        "Cheapest GPU machines by context, beside the reference, USD a month",
        [
            ("context", "right"),
            ("plan", "left"),
            ("USD", "right"),
            ("reference", "name"),
            ("USD", "right"),
            ("difference", "right"),
        ],
    )
    for row in rows:
        table.add_row(
            format_tokens(row.context),
            row.plan,
            "-" if row.usd_per_month is None else money_figure(row.usd_per_month),
            row.reference,
            "-" if row.reference_usd_per_month is None else money_figure(row.reference_usd_per_month),
            "-" if row.difference_usd is None else f"{row.difference_usd:+,.2f}",
        )
    terminal = console()
    terminal.print(table)
    for row in rows:
        terminal.print(f"{format_tokens(row.context)}: {_escape(row.why)}", highlight=False)


def emit_prices(sheet: PriceSheet, rows: Sequence[Sequence[Offer]], *, title: str, as_json: bool) -> None:
    """Offers: one row a size and region, one column a way to buy."""
    if as_json:
        payload = {
            "sheet": sheet.name,
            "digest": sheet.digest,
            "offers": [
                offer.model_dump(mode="json") | {"usd_per_hour": str(offer.usd_per_hour)}
                for row in rows
                for offer in row
            ],
        }
        put(json.dumps(payload, indent=2) + "\n")
        return
    terminal = console()
    found = [p for p in PRIORITIES if any(o.priority == p for row in rows for o in row)]
    heading = "region" if len({row[0].sku for row in rows}) == 1 else "size"
    wide = terminal.width >= WIDE
    table = _table(
        title,
        [(heading, "name"), *((_SHORT.get(p, p), "right") for p in found), *([("as of", "name")] if wide else [])],
    )
    for row in rows:
        by = {offer.priority: offer for offer in row}
        days = sorted({offer.provenance.as_of for offer in row})
        dated = str(days[0]) if len(days) == 1 else f"{days[0]} to {days[-1]}"
        name = row[0].region if heading == "region" else row[0].sku.removeprefix("Standard_")
        table.add_row(name, *(_rate(by.get(p)) for p in found), *([dated] if wide else []))
    terminal.print(table)
    every = [offer.provenance for row in rows for offer in row]
    if any(p.estimate for p in every):
        terminal.print("* an estimate, by the rule in its source's note (--json)", highlight=False)
    terminal.print(
        f"USD an hour, Linux, list prices of {min(p.as_of for p in every)} to {max(p.as_of for p in every)}. Sheet"
        f" {sheet.name} ({sheet.digest}).",
        highlight=False,
    )


_SHORT = {
    "savings-plan-1y": "plan 1y",
    "savings-plan-3y": "plan 3y",
    "reserved-1y": "res. 1y",
    "reserved-3y": "res. 3y",
}


def _money(usd: Decimal | None) -> str:
    return "-" if usd is None else money_figure(usd)


def _rate(offer: Offer | None) -> str:
    if offer is None:
        return "-"
    return figure(offer.usd_per_hour, 4) + (" *" if offer.provenance.estimate else "")


@contextmanager
def progress(title: str) -> Iterator[Callable[[int, int, str], None]]:
    """A progress bar on stderr: what it yields takes how many are done, of how many, and what comes now."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[what]}"))
    terminal = Console(file=sys.stderr)
    with Progress(*columns, console=terminal, transient=True, disable=not terminal.is_terminal) as bar:
        task = bar.add_task(title, total=None, what="")

        def advance(done: int, total: int, what: str) -> None:
            bar.update(task, completed=done, total=total, what=what)

        yield advance


def emit_refresh(path: Path, done: Refreshed) -> None:
    """What a refresh wrote and what changed, the largest changes first."""
    terminal = console()
    table = _table(
        f"{len(done.changes)} prices changed",
        [("what", "name"), ("region", "name"), ("", "left"), ("before", "right"), ("now", "right"), ("%", "right")],
    )
    for change in done.changes[:20]:
        table.add_row(
            change.what.removeprefix("Standard_"),
            change.region,
            f"{change.priority}, whole term" if change.priority.startswith("reserved") else change.priority,
            "-" if change.old_usd is None else figure(change.old_usd),
            "-" if change.new_usd is None else figure(change.new_usd),
            "-" if change.change_pct is None else f"{change.change_pct:+.1f}",
        )
    if done.changes:
        terminal.print(table)
    if len(done.changes) > 20:
        terminal.print(f"and {len(done.changes) - 20} more", highlight=False)
    for warning in done.warnings:
        terminal.print(f"Note: {_escape(warning)}", highlight=False)
    terminal.print(
        f"{done.requests} requests; {done.carried} prices that the API did not list stay with their own date.",
        highlight=False,
    )
    terminal.print(f"Wrote {_escape(str(path))}: it is used from now on (--prices names another).", highlight=False)


def emit_comparison(made: Comparison, *, as_json: bool) -> None:
    """Make or buy: the API's bill, each size's, the break-even, and the arithmetic."""
    if as_json:
        put(made.model_dump_json(indent=2) + "\n")
        return
    terminal = console()
    demand = made.demand
    millions = figure(demand.tokens_per_month / 10**6, 3)
    terminal.print(
        f"[bold]API: {format_usd(made.api_usd_per_month)} a month[/bold] for {millions}"
        f" million tokens at ${figure(made.api_usd_per_million)} a million",
        highlight=False,
    )
    known, wide = any(row.tokens_per_second for row in made.rows), terminal.width >= WIDE
    around = f"with {format_usd(made.cluster_usd_per_month)} a month around them"
    where = f" in {made.region}, {around}" if made.region else ""
    table = _table(
        f"Your own machines{where}",
        [
            ("size", "name"),
            ("bought", "name"),
            ("a month", "right"),
            *([("number", "right"), ("all", "right"), ("a million", "right")] if known else []),
            ("even at", "right"),
            *([("tokens a second", "right")] if wide else []),
            *([("machines at even", "right")] if known and wide else []),
        ],
    )
    for row in made.rows:
        even, rate = row.break_even_tokens_per_day, row.break_even_tokens_per_second
        table.add_row(
            row.size,
            _SHORT.get(row.priority, row.priority),
            money_figure(row.usd_per_month),
            *(
                (str(row.machines or "-"), *map(_money, (row.total_usd_per_month, row.usd_per_million)))
                if known
                else ()
            ),
            "never" if even is None else figure(even / 10**6, 2) + ("" if row.tokens_per_second or not known else " *"),
            *(["-" if rate is None else figure(rate, 1)] if wide else []),
            *(["-" if row.break_even_machines is None else str(row.break_even_machines)] if known and wide else []),
        )
    terminal.print(table)
    many = "the machines that can answer them (* one machine: its speed is not known)" if known else "one machine"
    terminal.print(f"USD; even at: millions of tokens a day for which the API bills as much as {many}", highlight=False)
    for line in (*made.arithmetic, f"even: {made.rows[0].arithmetic}"):
        terminal.print(_escape(line), highlight=False)
    for note in made.notes:
        terminal.print(f"Note: {_escape(note)}.", highlight=False)
