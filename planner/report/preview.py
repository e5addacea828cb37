"""A preview of the infrastructure: what it holds, as JSON and in the terminal."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Sequence
from decimal import Decimal
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from pydantic import Field

from planner.model import Amount, Frozen
from planner.report import WIDE, _escape, _table, console, put
from planner.units import format_usd, money_figure

if TYPE_CHECKING:
    from rich.console import Console

ELSEWHERE = "planned, not created here"
AMOUNT = "USD a month"
NO_DIFF = "This is a plan of creates, not a diff: nothing was compared with Azure."


class ShownResource(Frozen):
    """A resource with its share of the month's bill.

    parent: urn, or empty; usd_per_month: None where there is no price, 0 for what costs nothing by itself
    lines: of the bill that it carries; unpriced: those without a price, left out of the amount; why: nothing is counted
    inputs: secrets and what is known only after an apply as placeholders
    """

    type: str
    name: str
    urn: str
    parent: str
    protect: bool
    retain_on_delete: bool
    usd_per_month: Amount | None
    lines: tuple[str, ...]
    unpriced: tuple[str, ...]
    why: str
    dependencies: tuple[str, ...]
    inputs: dict[str, Any]


class ShownFinding(Frozen):
    """A policy that is broken. answers: ids of public rules; excused: the intent's reason, or empty."""

    rule: str
    severity: str
    resource: str
    urn: str
    sentence: str
    answers: tuple[str, ...]
    excused: str


class ShownPreview(Frozen):
    """What `planner preview` prints. Money is USD a month, at the prices of the day of the plan.

    elsewhere: lines of the bill that no resource carries; unpriced: what the amount leaves out
    quota: vCPUs to have, by the name Azure gives the quota; quota_for: what each is for; outputs: of the stack
    unset: secrets to set before `pulumi up`, each with the command that sets it
    """

    schema_version: Literal["tonnage.preview/1"] = "tonnage.preview/1"
    is_diff: Literal[False] = False
    project: str
    stack: str
    region: str
    usd_per_month: Amount
    approved_usd_per_month: Amount | None
    prices: str
    resources: tuple[ShownResource, ...]
    elsewhere: dict[str, Amount | None] = Field(default_factory=dict)
    unpriced: tuple[str, ...]
    findings: tuple[ShownFinding, ...]
    quota: dict[str, int]
    quota_for: dict[str, str] = Field(default_factory=dict)
    outputs: dict[str, Any]
    notes: tuple[str, ...]
    unset: dict[str, str] = Field(default_factory=dict)

    @property
    def standing(self) -> tuple[ShownFinding, ...]:
        """Findings without a reason."""
        return tuple(finding for finding in self.findings if not finding.excused)


class Branch(NamedTuple):
    """A row of the tree: one resource, or Kubernetes objects of one kind.

    guide, below: what stands left of the first line and of those after it
    """

    guide: str
    below: str
    rows: tuple[ShownResource, ...]


def emit_preview(made: ShownPreview, *, as_json: bool) -> None:
    """The preview on stdout."""
    if as_json:
        put(made.model_dump_json(indent=2) + "\n")
    else:
        print_preview(console(), made)


def print_preview(terminal: Console, made: ShownPreview) -> None:
    """The amount, the tree with its costs, policy, quota, notes, and the next step."""
    terminal.print(f"[bold]{_escape(headline(made))}[/bold]")
    terminal.print(NO_DIFF)
    terminal.print()
    terminal.print(_tree(made, terminal.width))
    for sentence in remarks(made):
        terminal.print(_escape(sentence))
    terminal.print(f"{policy_title(made)}.")
    if made.standing:
        table = _table("", [("", "name"), ("rule", "name"), ("resource", "left"), ("what", "left")])
        for finding in gravest(made.standing):
            cells = (finding.severity, finding.rule, finding.resource, finding.sentence)
            table.add_row(*map(_escape, cells), style="bold" if finding.severity == "high" else None)
        terminal.print(table)
    groups = excused(made)
    if groups:
        wide = terminal.width >= WIDE
        table = _table("Excused", [("rule", "left"), *([("resource", "left")] if wide else []), ("because", "left")])
        for reason, found in groups.items():
            rules, resources = (", ".join(dict.fromkeys(names)) for names in zip(*found, strict=True))
            table.add_row(_escape(rules), *([_escape(resources)] if wide else []), _escape(reason))
        terminal.print(table)
    if made.quota:
        table = _table("Quota to have before you deploy", [("vCPUs", "right"), ("quota", "name"), ("for", "left")])
        for name, vcpus in made.quota.items():
            table.add_row(f"{vcpus:,}", _escape(name), _escape(made.quota_for.get(name, "")))
        terminal.print(table)
        terminal.print(f"See and ask: portal, Quotas, Compute, {made.region}. What you have:")
        terminal.print(f"  `az vm list-usage --location {made.region} -o table`", soft_wrap=True)
    for note in made.notes:
        terminal.print(f"Note: {_escape(note.rstrip('.'))}.")
    for key, command in made.unset.items():
        terminal.print(f"Note: the secret {_escape(key)} is not set yet:")
        terminal.print(f"  `{_escape(command)}`", soft_wrap=True)
    terminal.print(f"Prices: {made.prices}.")
    for number, step in enumerate(_next(made)):
        terminal.print(f"{'' if number else 'Next:':5} {_escape(step)}", soft_wrap=True)


# ------------------------------------------------------------------------------------------------- what both say


def headline(made: ShownPreview) -> str:
    """Stack, region, how much is made and what it costs, beside what is approved."""
    at_least = "at least " if made.unpriced else ""
    approved = made.approved_usd_per_month
    of = f" of {format_usd(approved)} approved" if approved is not None else ""
    usd = format_usd(made.usd_per_month)
    return f"{made.stack} in {made.region}: {count(made.resources, 'resource')}, {at_least}{usd} a month{of}"


def count(things: Sequence[object], noun: str) -> str:
    """`1 finding`, `2 findings`."""
    return f"{len(things)} {noun}" if len(things) == 1 else f"{len(things)} {noun}s"


def policy_title(made: ShownPreview) -> str:
    """How many findings and notes stand, and how many are excused."""
    if not made.findings:
        return "Policy: nothing was found"
    notes = [finding for finding in made.standing if finding.severity == "note"]
    reasons = len(made.findings) - len(made.standing)
    said = f"Policy: {count(range(len(made.standing) - len(notes)), 'finding')}"
    said += f", {count(notes, 'note')}" if notes else ""
    return said + (f", {reasons} excused with a reason" if reasons else "")


def gravest(findings: Sequence[ShownFinding]) -> list[ShownFinding]:
    """Those without a reason first, the gravest first."""
    grave = ("high", "medium", "low", "note")
    return sorted(findings, key=lambda f: (bool(f.excused), grave.index(f.severity), f.rule, f.resource))


def excused(made: ShownPreview) -> dict[str, list[tuple[str, str]]]:
    """Rule and resource of findings that are excused, by the reason."""
    found: dict[str, list[tuple[str, str]]] = {}
    for finding in made.findings:
        if finding.excused:
            found.setdefault(finding.excused, []).append((finding.rule, finding.resource))
    return found


def remarks(made: ShownPreview) -> Iterator[str]:
    """What the figures leave out, a sentence each."""
    if made.unpriced:
        yield f"Unpriced: {', '.join(made.unpriced)}. The total is a lower bound."
    for row in made.resources:
        if row.type.endswith(":AgentPool") and row.why:
            yield f"{row.name}: {row.why}."


def _next(made: ShownPreview) -> list[str]:
    """What to do, a step each."""
    if any(finding.severity == "high" for finding in made.standing):
        return ["change what the findings name, or give a reason in the intent (exceptions), then preview again"]
    return [*made.unset.values(), f"pulumi up --stack {made.stack}"]


def cost(row: ShownResource) -> str:
    """`640.88`, `640.88 + ?` with lines that have no price, `unpriced`, `-` for what costs nothing by itself."""
    if row.usd_per_month is None:
        return "unpriced"
    if not row.lines:
        return "-"
    return money_figure(row.usd_per_month) + (" + ?" if row.unpriced else "")


def amount(usd: Decimal | None) -> str:
    """`76.80`, or `unpriced`."""
    return "unpriced" if usd is None else money_figure(usd)


def total(made: ShownPreview) -> str:
    """`640.88`, `640.88 + ?` with lines that have no price."""
    return money_figure(made.usd_per_month) + (" + ?" if made.unpriced else "")


def short(type_: str) -> str:
    """`AgentPool` of azure-native:containerservice:AgentPool."""
    return type_.rpartition(":")[2]


# ------------------------------------------------------------------------------------------------------ the tree


def _tree(made: ShownPreview, width: int) -> object:
    """Names are broken here and not by the table, so that the lines of the tree go on beside them."""
    table = _table("Resources", [("resource", "left"), ("type", "left"), (AMOUNT, "right")])
    wide = width >= WIDE
    found = list(branches(made))
    types = [branch.rows[0].type if wide else short(branch.rows[0].type) for branch in found]
    amounts = [AMOUNT, total(made), *(cost(branch.rows[0]) for branch in found), *map(amount, made.elsewhere.values())]
    others = max(map(len, [*types, ELSEWHERE])) + max(map(len, amounts))
    room = width - others - 6  # and the space between
    for branch, type_ in zip(found, types, strict=True):
        lines = textwrap.wrap(label(branch), max(room - len(branch.guide), 12), break_on_hyphens=False)
        text = branch.guide + f"\n{branch.below}".join(line.lstrip(", ") for line in lines)
        table.add_row(_escape(text), _escape(type_), cost(branch.rows[0]))
    for key, usd in made.elsewhere.items():
        table.add_row(_escape(key), ELSEWHERE, amount(usd))
    table.add_row("[bold]total[/bold]", "", f"[bold]{total(made)}[/bold]")
    return table


def branches(made: ShownPreview) -> Iterator[Branch]:
    """The tree, parents before children, in the order of the program."""
    known = {row.urn for row in made.resources}
    below: dict[str, list[ShownResource]] = {}
    for row in made.resources:
        below.setdefault(row.parent if row.parent in known else "", []).append(row)

    def walk(parent: str, guide: str) -> Iterator[Branch]:
        groups = _grouped(below.get(parent, []))
        for number, rows in enumerate(groups):
            last = number == len(groups) - 1
            corner, stem = ("", "") if parent == "" else ("└─ ", "   ") if last else ("├─ ", "│  ")
            yield Branch(guide + corner, guide + stem, rows)
            yield from walk(rows[0].urn, guide + stem)

    yield from walk("", "")


def _grouped(rows: Sequence[ShownResource]) -> list[tuple[ShownResource, ...]]:
    """Siblings, with the Kubernetes objects of one kind together that cost the same: nothing, or what is not known."""
    groups: dict[object, list[ShownResource]] = {}
    for row in rows:
        alike = row.type.startswith("kubernetes:") and not row.lines
        key = (row.type, row.usd_per_month, row.protect, row.retain_on_delete) if alike else row.urn
        groups.setdefault(key, []).append(row)
    return [tuple(group) for group in groups.values()]


def label(branch: Branch) -> str:
    """What a row of the tree is called, and whether it is kept."""
    first = branch.rows[0]
    # Kubernetes objects are called by their kind first, which the type says already
    kind = f"{short(first.type).lower()}-" if first.type.startswith("kubernetes:") else ""
    names = ", ".join(row.name.removeprefix(kind) for row in branch.rows)
    marks = [word for word, there in (("protected", first.protect), ("retained", first.retain_on_delete)) if there]
    return f"{names} ({', '.join(marks)})" if marks else names
