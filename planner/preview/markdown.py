"""A preview as a comment on a pull request: what costs money at once, the rest behind a click."""

from __future__ import annotations

import re
from collections.abc import Sequence
from html import escape

from planner.pages import markdown_text
from planner.report.preview import (
    ELSEWHERE,
    NO_DIFF,
    ShownPreview,
    amount,
    branches,
    cost,
    excused,
    gravest,
    headline,
    label,
    policy_title,
    remarks,
    short,
    total,
)

QUOTA_PAGE = "https://portal.azure.com/#view/Microsoft_Azure_Capacity/QuotaMenuBlade/~/myQuotas"
COMMENT_MAX = 65_000  # GitHub takes 65,536 characters in a comment


def preview_markdown(made: ShownPreview) -> str:
    """A comment on a pull request: what costs money at once, the rest behind a click.

    The first line is a mark by which a workflow finds the comment again. Longer than GitHub takes: without the tree.
    """
    whole = _markdown(made, tree=True)
    return whole if len(whole) <= COMMENT_MAX else _markdown(made, tree=False)


def _markdown(made: ShownPreview, *, tree: bool) -> str:
    dear = [row for row in made.resources if row.lines or row.usd_per_month is None]
    out = [
        f"<!-- tonnage-preview {made.stack} -->",
        f"### Tonnage preview of `{made.stack}`",
        "",
        f"**{markdown_text(headline(made))}**",
        "",
        NO_DIFF,
        "",
        *_findings(made),
        *_rows(("resource", "type", "USD a month"), [(row.name, short(row.type), cost(row)) for row in dear]),
    ]
    out += [f"| {markdown_text(key)} | {ELSEWHERE} | {amount(usd)} |" for key, usd in made.elsewhere.items()]
    out += [f"| **total** |  | **{total(made)}** |", ""]
    out += [f"{markdown_text(sentence)}  " for sentence in remarks(made)]
    if tree:
        lines = [f"{branch.guide}{label(branch)}  {short(branch.rows[0].type)}" for branch in branches(made)]
        fence = "`" * (3 + max((len(run) for line in lines for run in re.findall("`+", line)), default=0))
        body = [fence + "text", *lines, fence]
    else:
        body = [f"{len(made.resources)} resources are more than a comment can hold: `planner preview` prints them."]
    out += ["", *_details(f"All {len(made.resources)} resources", body)]
    needs = [(name, made.quota_for.get(name, ""), f"{vcpus:,}") for name, vcpus in made.quota.items()]
    quota = _rows(("quota", "for", "vCPUs"), needs)
    asks = f"See and ask: [Quotas in the portal]({QUOTA_PAGE}), Compute, {made.region}."
    out += _details("Quota to have before this is deployed", [*quota, "", asks]) if made.quota else []
    notes = [f"- {markdown_text(note)}" for note in made.notes]
    notes += [f"- the secret `{_code(key)}` is not set yet: `{_code(how)}`" for key, how in made.unset.items()]
    if notes:
        out += _details(f"Notes ({len(notes)})", notes)
    return "\n".join([*out, f"Prices: {markdown_text(made.prices)}.", ""])


def _findings(made: ShownPreview) -> list[str]:
    out = [f"**{markdown_text(policy_title(made))}**", ""]
    for finding in gravest(made.standing):
        where = f" (`{_code(finding.resource)}`)" if finding.resource else ""
        out.append(f"- **{finding.severity}** `{_code(finding.rule)}`{where}: {markdown_text(finding.sentence)}")
    out += [""] if made.standing else []
    groups = excused(made)
    if groups:
        lines = []
        for reason, found in groups.items():
            names = ", ".join(f"`{_code('/'.join(filter(None, pair)))}`" for pair in found)
            lines.append(f"- {names}: {markdown_text(reason)}")
        out += _details("Excused, with the reasons", lines)
    return out


def _code(text: str) -> str:
    """Text between backticks, which has no escapes."""
    return text.replace("`", "'").replace("|", "/")


def _rows(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """A table, the last column of which holds figures."""
    rule = ["---"] * (len(heads) - 1) + ["--:"]
    lines = [f"| {' | '.join(heads)} |", f"| {' | '.join(rule)} |"]
    return lines + [f"| {' | '.join(markdown_text(cell) for cell in row)} |" for row in rows]


def _details(title: str, body: Sequence[str]) -> list[str]:
    return [f"<details><summary>{escape(title, quote=False)}</summary>", "", *body, "", "</details>", ""]
