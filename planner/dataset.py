"""`planner data check`: what is wrong with a file of conversations, how long they are, and what truncation costs."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Literal

from planner.errors import BAD_INPUT
from planner.report import _escape, _table, console, put
from planner.units import parse_tokens
from workloads.finetune.chat import load_chat
from workloads.finetune.check import Report, report_on

if TYPE_CHECKING:
    from rich.console import Console

SHOWN_PAIRS = 5
BAR = 40


def check_data(
    path: str,
    *,
    model: str | None,
    max_length: str | None,
    task: Literal["sft", "dpo"],
    loss_on: Literal["completion", "assistant", "all"],
    against: str | None,
) -> Report:
    """The check of a file. PlannerError for a file or a model that cannot be read."""
    return report_on(
        Path(path),
        task=task,
        chat=load_chat(model) if model else None,
        max_length=parse_tokens(max_length) if max_length else None,
        loss_on=loss_on,
        against=Path(against) if against else None,
    )


def exit_code(report: Report) -> int:
    """0 for data that can be trained on, 2 for faults and for lines that stand in the evaluation file too."""
    return 0 if report.sound and not report.leaked else BAD_INPUT


def emit_report(report: Report, *, as_json: bool) -> None:
    """The report on stdout."""
    if as_json:
        put(report.model_dump_json(indent=2) + "\n")
    else:
        print_report(console(), report)


def print_report(out: Console, report: Report) -> None:
    """Counts, the histogram with its costs, then faults, and the next step last."""
    turns = ", ".join(f"{count:,} of the {role}" for role, count in report.turns.items())
    out.print(
        f"[bold]{_escape(report.file)}: {report.conversations:,} conversations[/bold]"
        f", {report.characters:,} characters{f' ({turns})' if turns else ''}"
    )
    if report.lengths is not None:
        _print_lengths(out, report)
    for title, pairs, words in (
        ("Duplicates", report.duplicates, "line {} is the same as line {}"),
        ("Contradictions", report.contradictions, "line {} asks what line {} asks and answers otherwise"),
        ("Leaked", report.leaked, "line {} is line {} of the evaluation file"),
    ):
        if pairs:
            told = "; ".join(words.format(*pair) for pair in pairs[:SHOWN_PAIRS])
            more = f"; and {len(pairs) - SHOWN_PAIRS:,} more" if len(pairs) > SHOWN_PAIRS else ""
            out.print(f"{title}: {told}{more}.")
    for fault in report.faults:
        out.print(f"[red]Fault[/red]: {_escape(fault)}")
    if report.fault_count > len(report.faults):
        out.print(f"and {report.fault_count - len(report.faults):,} faults more.")
    out.print(f"Next: {_next(report)}")


def _print_lengths(out: Console, report: Report) -> None:
    lengths, cost = report.lengths, report.truncation
    assert lengths is not None
    most = max(one.conversations for one in lengths.histogram)
    table = _table("Tokens of a conversation", [("up to", "right"), ("conversations", "right"), ("", "left")])
    for one in lengths.histogram:
        bar = "█" * -(-one.conversations * min(BAR, out.width - 30) // most)
        cut = " beyond" if cost and one.up_to_tokens > cost.max_length else ""
        table.add_row(f"{one.up_to_tokens:,}", f"{one.conversations:,}", f"{bar}{cut}")
    out.print(table)
    out.print(
        f"{lengths.tokens:,} tokens, {lengths.learned_tokens:,} of them learned; shortest {lengths.shortest:,}, median"
        f" {lengths.median:,}, 95 % {lengths.p95:,}, 99 % {lengths.p99:,}, longest {lengths.longest:,}."
    )
    if cost is None:
        return
    share, learned = cost.lost_tokens / lengths.tokens, cost.lost_learned_tokens / max(1, lengths.learned_tokens)
    out.print(
        f"Truncation at {cost.max_length:,}: {cost.truncated:,} conversations cut, {cost.lost_tokens:,} tokens lost"
        f" ({share:.1%}), {learned:.1%} of what would be learned; {cost.unlearnable:,} lose their whole answer."
        f" {cost.fits_99:,} would keep 99 % whole, {cost.fits_all:,} all."
    )
    out.print(
        f"Unpacked, {cost.padded_share:.1%} of the positions at {cost.max_length:,} stay empty; packed, the data fill"
        f" {cost.packed_sequences:,} sequences instead of {report.conversations:,}."
    )


def _next(report: Report) -> str:
    if not report.sound:
        return "correct the lines above, then check again."
    if report.leaked:
        return "take the leaked lines out of one of the files: an evaluation on them says nothing."
    if report.lengths is None:
        return "--tokenizer MODEL counts tokens, and --max-length what truncation costs."
    if report.truncation is None:
        return "--max-length TOKENS says what truncation costs."
    return "upload it to the container `datasets`, and start the run."
