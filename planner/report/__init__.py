"""What people read: one renderer each for the terminal, CSV and JSON. Nothing here computes a byte."""

from __future__ import annotations

import csv
import io
import json
import os
import re
import shlex
import sys
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from planner.catalog import ModelEntry
from planner.catalog.hardware import Gpu, VmSku, gpu_of
from planner.errors import PlannerError
from planner.fit import PRICED_IN, Remedy, Step
from planner.size import ContextAnswer, SizeAnswer, Span, TracedPeak, TrainingRun
from planner.units import format_gib, format_tokens, format_usd, gib_figure

if TYPE_CHECKING:
    from rich.console import Console, RenderableType
    from rich.table import Table

    from planner.validate import QuantityError, Validation

SERVING_COLUMNS: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("weights", ("weights",)),
    ("KV", ("KV cache",)),
    ("activation", ("activation peak",)),
)
WIDE = 120
TRAINING_COLUMNS: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("weights", ("weights", "gathered weights", "reference model")),
    ("trained", ("adapters", "optimizer state", "gradients", "step temporaries", "communication")),
    ("activations", ("activations",)),
    ("working", ("working",)),
)


def _table(title: str, columns: Iterable[tuple[str, str]]) -> Table:
    """columns: (heading, right for figures, name for what must not be broken, left for text)"""
    from rich import box
    from rich.table import Table

    table = Table(
        title=title, box=box.SIMPLE_HEAD, title_justify="left", title_style="bold", pad_edge=False, padding=(0, 1, 0, 0)
    )
    for name, justify in columns:
        side = "right" if justify == "right" else "left"
        table.add_column(name, justify=side, no_wrap=justify in ("right", "name"), overflow="fold")  # type: ignore[arg-type]
    return table


def print_size(console: Console, answer: SizeAnswer, *, explain: bool = False) -> None:
    """The answer for a terminal: a table first, the reason second, the next step last."""
    console.print(_headline(answer), highlight=False)
    for task in ("serve", "finetune"):
        rows = [a for a in answer.answers if a.task == task]
        if rows:
            console.print()
            console.print(_size_table(task, answer, rows))
            for line in _reasons(task, answer, rows):
                console.print(line, highlight=False, soft_wrap=False)
    for note in dict.fromkeys((*answer.notes, *(n for a in answer.answers for n in a.notes))):
        console.print(f"Note: {_escape(note)}.", highlight=False)
    if explain:
        for row in answer.answers:
            print_explanation(console, row)
            if row.run is not None:
                _print_run(console, row.context, row.run)
    else:
        console.print()
        console.print(_next_step(answer), highlight=False)


def emit_size(answer: SizeAnswer, *, as_json: bool, as_csv: bool, explain: bool) -> None:
    """The answer on stdout, in the form asked for."""
    if as_json:
        put(answer.model_dump_json(indent=2) + "\n")
    elif as_csv:
        put(size_csv(answer))
    else:
        print_size(console(), answer, explain=explain)


NARROWEST = 72  # below that, lines are left to the terminal to wrap: a cropped figure would be a wrong one


def console() -> Console:
    """A terminal as wide as it is, 80 columns where there is none; a reader who has seen enough ends the command."""
    from rich.console import Console

    class Quiet(Console):
        def on_broken_pipe(self) -> None:
            leave_quietly()

    found = Quiet(highlight=False)
    return found if found.width >= NARROWEST else Quiet(highlight=False, width=NARROWEST)


def put(text: str) -> None:
    """Text on stdout as it is. Raises PlannerError where it cannot be written, and ends quietly where nobody reads."""
    try:
        sys.stdout.write(text)
        sys.stdout.flush()
    except BrokenPipeError:
        leave_quietly()
    except OSError as error:
        raise PlannerError(f"the output cannot be written ({error.strerror}): free space or write elsewhere") from error


def leave_quietly() -> None:
    """End with exit code 0 although nobody reads stdout any more; what its buffer holds goes nowhere."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    raise SystemExit(0)


def emit_models(entries: Sequence[ModelEntry], *, as_json: bool) -> None:
    if as_json:
        put(json.dumps([e.model_dump(mode="json", exclude={"config"}) for e in entries], indent=2) + "\n")
    else:
        terminal = console()
        terminal.print(models_table(entries, terminal.width))


def emit_skus(sizes: Sequence[VmSku], cards: Sequence[Gpu], *, as_json: bool) -> None:
    if as_json:
        payload = {
            "sizes": [size.model_dump(mode="json") | {"plannable": size.plannable} for size in sizes],
            "gpus": [card.model_dump(mode="json") for card in cards],
        }
        put(json.dumps(payload, indent=2) + "\n")
        return
    terminal = console()
    terminal.print(skus_table(sizes, terminal.width))
    if cards:
        terminal.print(gpus_table(cards))


def emit_validation(validation: Validation, *, as_json: bool, summary: bool) -> None:
    if as_json:
        put(json.dumps(validation_json(validation), indent=2) + "\n")
    else:
        print_validation(console(), validation, rows=not summary)


def _escape(text: str) -> str:
    """Text of a user's, such as a path, that must not be read as markup."""
    from rich.markup import escape

    return escape(text)


def _headline(answer: SizeAnswer) -> str:
    active = ""
    if answer.active_parameters != answer.parameters:
        active = f" ({answer.active_parameters / 1e9:.1f} B active)"
    kv = ""
    if answer.kv_bytes_per_token is not None:
        kv = f", {answer.kv_bytes_per_token:,} B of KV cache a token"
    return (
        f"[bold]{_escape(answer.model)}[/bold]: {answer.parameters / 1e9:.2f} B parameters{active},"
        f" {answer.layers} layers, context {answer.max_context:,}{kv}"
    )


def _size_table(task: str, answer: SizeAnswer, rows: Sequence[ContextAnswer]) -> Table:
    searched = bool(answer.serving_ladder or answer.finetune_ladder)
    columns = SERVING_COLUMNS if task == "serve" else TRAINING_COLUMNS
    where = "smallest Azure size" if searched else "fits"
    last = "sequences" if task == "serve" else "" if searched else "reaches"
    title = _serving_title(answer, rows[0]) if task == "serve" else "Fine-tuning, GiB on each GPU"
    if not searched:
        place = rows[0].sku.removeprefix("Standard_") if rows[0].sku else rows[0].place
        title = title.replace(", GiB", f" on {place} ({format_gib(rows[0].usable_bytes)} a GPU), GiB", 1)
    table = _table(
        title,
        [
            ("context", "right"),
            *((name, "right") for name, _ in columns),
            ("other", "right"),
            ("total", "right"),
            (where, "left"),
            *([(last, "right")] if last else []),
        ],
    )
    for row in rows:
        cells = _cells(row, columns, searched)
        table.add_row(*(cells if last else cells[:-1]), style=None if row.fits else "red")
    return table


def _serving_title(answer: SizeAnswer, row: ContextAnswer) -> str:
    share = f", {row.gpu_memory_utilization:g} of the GPU" if row.gpu_memory_utilization else ""
    engine = f"vLLM {row.engine_version}, " if row.engine_version else ""
    return f"Serving, GiB on each GPU ({engine}{answer.weight_format} weights{share})"


def _cells(row: ContextAnswer, columns: Sequence[tuple[str, tuple[str, ...]]], searched: bool) -> list[str]:
    tokens = format_tokens(row.context)
    if row.estimate is None:
        return [tokens, *["-"] * (len(columns) + 2), f"{row.place}: cannot run it" if searched else "no", "-"]
    sizes = {part.name: part.expected_bytes for part in row.estimate.components}
    shown = [sum(sizes.get(name, 0) for name in names) for _, names in columns]
    other = row.needed_bytes - sum(shown)
    place = row.place if row.fits else f"none ({row.place})"
    if not searched:
        place = "no" if not row.fits else "yes" if row.gpus == 1 else f"on {row.gpus} GPUs"
    if row.task == "serve":
        last = f"{row.sequences_at_context:,}" if row.fits else "0"
    else:
        last = format_tokens(row.largest_context) if row.largest_context else "-"
    return [tokens, *map(gib_figure, shown), gib_figure(other), gib_figure(row.needed_bytes), place, last]


def _reasons(task: str, answer: SizeAnswer, rows: Sequence[ContextAnswer]) -> list[str]:
    lines: list[str] = []
    steps = answer.serving_ladder if task == "serve" else answer.finetune_ladder
    if steps:
        lines += ladder_lines(steps)
    largest = rows[-1]
    if task == "serve" and largest.kv_per_sequence is not None:
        kv = largest.kv_per_sequence
        if not kv.steady_bytes == kv.reserved_bytes == kv.unified_bytes and kv.unified_bytes > 1.02 * kv.steady_bytes:
            where = f" on each of {largest.gpus} GPUs" if largest.gpus > 1 else ""
            lines.append(
                f"KV of one sequence at {format_tokens(largest.context)}{where}: {format_gib(kv.steady_bytes)} steady,"
                f" {format_gib(kv.reserved_bytes)} as vLLM reserves it, {format_gib(kv.unified_bytes)} with the hybrid"
                " cache manager off (windowed layers forget)"
            )
    if largest.loss_heads:
        lines += _loss_lines(largest)
    for row in rows:
        if row.traced is not None:
            lines.append(_trace_line(row.context, row.traced))
        if row.run is not None:
            lines += run_lines(row.context, row.run)
        if row.link:
            lines.append(f"{row.place}: {row.link}")
        if not row.fits:
            lines.append(f"[red]{_escape(row.reason)}.[/red]" + (" What would fit:" if row.remedies else ""))
            lines += [_remedy_line(remedy) for remedy in row.remedies]
    return list(dict.fromkeys(lines))


def _remedy_line(remedy: Remedy) -> str:
    price = "" if remedy.usd_per_hour is None else f" ({format_usd(remedy.usd_per_hour)} an hour in {PRICED_IN})"
    return f"  {format_gib(remedy.needed_bytes):>9} with {remedy.change}: {remedy.flags}{price}"


def _trace_line(tokens: int, traced: TracedPeak) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in traced.versions.items())
    return (
        f"Traced at {format_tokens(tokens)}: {format_gib(traced.peak_bytes)} ({traced.peak_instant}), planned"
        f" {format_gib(traced.planned_bytes)}, {traced.error_pct:+.2f} % ({versions}, {traced.seconds:.0f} s)"
    )


def run_lines(context: int, run: TrainingRun) -> list[str]:
    """How long a run takes and what it costs, in three lines."""
    epochs = "" if run.epochs == 1 else f" x {run.epochs:g} epochs"
    filled = "" if run.fill.expected == 1 else f", {1 - run.fill.expected:.0%} of it padding or gaps"
    hours = run.hours
    lines = [
        f"A run of {run.samples:,} samples{epochs} at {format_tokens(context)}: [bold]{_duration(hours)}[/bold]"
        f" ({_duration(hours, hours.low)} to {_duration(hours, hours.high)})",
        f"  {run.steps:,} steps, {run.samples_per_s.expected:,.3g} samples/s, {run.tokens_per_s_per_gpu.expected:,.0f}"
        f" tokens/s a GPU, MFU {100 * run.mfu.expected:.0f} %{filled}",
    ]
    ways = ((run.usd_on_demand, "on demand"), (run.usd_spot, "on spot"))
    usd = [f"{format_usd(u.expected)} {w} ({format_usd(u.low)} to {format_usd(u.high)})" for u, w in ways if u]
    if not usd:
        usd = ["no price, for it is a desk or a size that the sheet does not list"]
    lines.append(f"  {', '.join(usd)}{f' in {run.region}' if run.region else ''}")
    if run.usd_spot and run.checkpoint_minutes is not None:
        lines.append(f"  on spot a checkpoint every {run.checkpoint_minutes:.0f} minutes")
    if not run.packing and run.fill.expected < 1:
        lines.append(f"  {run.assumed[0]}: see --packing, or name --max-tokens-per-sample")
    if run.extrapolated:
        lines.append("  the range is wide: no training speed was measured on such a card")
    return lines


def _duration(hours: Span, value: float | None = None) -> str:
    """`41 min`, `9.3 h` or `5.9 days`: every figure of a span in the unit that suits the expected one."""
    shown, usual = hours.expected if value is None else value, hours.expected
    if usual < 1 / 60:
        return f"{shown * 3600:,.2g} s"
    if usual < 2:
        return f"{shown * 60:,.0f} min"
    return f"{shown:,.1f} h" if usual < 96 else f"{shown / 24:,.1f} days"


def _print_run(console: Console, context: int, run: TrainingRun) -> None:
    """Where the time of a step goes, with the formulas, and what the run supposes."""
    from rich.padding import Padding

    seconds = run.step_seconds
    console.print(
        f"\n[bold]Run at {format_tokens(context)}: {seconds.expected:,.3g} s a step[/bold]"
        f" ({seconds.low:,.3g} to {seconds.high:,.3g}), {run.steps:,} steps",
        highlight=False,
    )
    for part in run.parts:
        share = part.seconds / seconds.expected
        console.print(f"\n[bold]{part.name}[/bold]  {part.seconds:,.3g} s ({share:.0%})", highlight=False)
        inputs = ", ".join(f"{key}={_plain(value)}" for key, value in part.inputs.items())
        for label, text in (("formula", part.formula), ("inputs", inputs), ("source", part.source)):
            if text:
                console.print(Padding(f"{label}: {_escape(text)}", (0, 0, 0, 2)), highlight=False)
    console.print(f"\nSupposed: {_escape('; '.join(run.assumed))}.", highlight=False)
    if run.price_source:
        console.print(f"Prices: {_escape(run.price_source)}.", highlight=False)


def _loss_lines(row: ContextAnswer) -> list[str]:
    names = {
        "chunked": "chunked, as TRL does today",
        "liger": "Liger",
        "hf": "plain loss of transformers 5",
        "hf_outputs": "plain loss in Trainers of 2023",
    }
    width = max(len(format_gib(peak.allocated_bytes)) for peak in row.loss_heads)
    lines = [f"What the loss head decides at {format_tokens(row.context)} tokens (torch's peak):"]
    return lines + [f"  {format_gib(peak.allocated_bytes):>{width}}  {names[peak.loss]}" for peak in row.loss_heads]


def ladder_lines(steps: Sequence[Step]) -> list[str]:
    """Which size is the smallest up to which context, one a line."""
    width = max(len(f"{step.to_tokens:,}") for step in steps)
    return ["Smallest Azure size by context:"] + [
        f"  up to {step.to_tokens:>{width},} tokens  {step.place}" for step in steps
    ]


def _next_step(answer: SizeAnswer) -> str:
    served = [a for a in answer.answers if a.task == "serve" and a.fits]
    if served:
        last = served[-1]
        name = _escape(answer.hub_id or answer.model)
        line = " ".join(map(_quoted, last.arguments))
        return f"Next: vllm serve {name} {line}\n      (--explain shows every formula and its source)"
    if any(a.remedies for a in answer.answers):
        return "Next: repeat the command with one of the changes above"
    if not answer.fits:
        return "Next: try a shorter context (--ctx) or a smaller model (planner models)"
    return "Next: --explain shows every formula, its inputs and its source"


def _quoted(argument: str) -> str:
    return _escape(shlex.quote(argument))


def print_explanation(console: Console, row: ContextAnswer) -> None:
    """Formula, inputs and source behind each component of one answer."""
    from rich.padding import Padding

    console.print()
    verb = "Serving" if row.task == "serve" else "Fine-tuning"
    if row.estimate is None:
        console.print(f"{verb} at {format_tokens(row.context)}: {_escape(row.reason)}", highlight=False)
        return
    place = f"{verb} at {format_tokens(row.context)} on {row.place}"
    console.print(f"[bold]{place}: {format_gib(row.needed_bytes)}[/bold], {row.estimate.peak_instant}", highlight=False)
    for part in row.estimate.components:
        spread = ""
        if part.low_bytes != part.high_bytes:
            spread = f" ({gib_figure(part.low_bytes)} to {gib_figure(part.high_bytes)})"
        console.print(f"\n[bold]{part.name}[/bold]  {format_gib(part.expected_bytes)}{spread}", highlight=False)
        inputs = ", ".join(f"{key}={_plain(value)}" for key, value in part.inputs.items())
        for label, text in (("formula", part.formula), ("inputs", inputs), ("source", part.source)):
            if text:
                console.print(Padding(f"{label}: {_escape(text)}", (0, 0, 0, 2)), highlight=False)
    console.print()
    if row.instants:
        ordered = sorted(row.instants.items(), key=lambda item: -item[1])
        console.print("Instants: " + ", ".join(f"{name} {format_gib(size)}" for name, size in ordered), highlight=False)
    if row.estimate.not_modelled:
        console.print("Not modelled: " + "; ".join(row.estimate.not_modelled) + ".", highlight=False)


def _plain(value: float | str) -> str:
    return f"{value:,}" if isinstance(value, int) else f"{value:g}" if isinstance(value, float) else value


def size_csv(answer: SizeAnswer) -> str:
    """One line a component: model, task, context, place, fits, component and its bytes."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(
        ["model", "task", "context", "place", "gpus", "fits", "component", "low_bytes", "expected_bytes", "high_bytes"]
    )
    for row in answer.answers:
        head = [answer.model, row.task, row.context, row.place, row.gpus, str(row.fits).lower()]
        for part in row.estimate.components if row.estimate else ():
            writer.writerow([*head, part.name, part.low_bytes, part.expected_bytes, part.high_bytes])
        if row.estimate:
            estimate = row.estimate
            writer.writerow([*head, "total", estimate.low_bytes, estimate.expected_bytes, estimate.high_bytes])
    return out.getvalue()


def models_table(entries: Sequence[ModelEntry], width: int) -> RenderableType:
    """The catalog's models; with the bytes of 16-bit weights where the terminal is wide enough."""
    wide = width >= WIDE
    table = _table(
        f"{len(entries)} models",
        [
            ("name", "name"),
            ("parameters", "right"),
            ("context", "right"),
            *([("bf16 GiB", "right")] if wide else []),
            ("licence", "name"),
            ("use cases", "left"),
        ],
    )
    for entry in entries:
        table.add_row(
            entry.name,
            f"{entry.parameter_count / 1e9:.2f} B",
            format_tokens(entry.max_context),
            *([gib_figure(2 * entry.parameter_count)] if wide else []),
            entry.license,
            ", ".join(entry.use_cases),
        )
    return table


def skus_table(sizes: Sequence[VmSku], width: int) -> RenderableType:
    """Azure's GPU sizes; with their quota family where the terminal is wide enough."""
    wide = width >= WIDE
    table = _table(
        f"{len(sizes)} Azure GPU sizes",
        [
            ("size", "name"),
            ("GPUs", "name"),
            ("GiB", "right"),
            *([("vCPU", "right"), ("RAM", "right")] if wide else []),
            ("spot", "name"),
            ("AKS", "name"),
            *([("quota family", "name")] if wide else []),
            ("", "left"),
        ],
    )
    for size in sizes:
        card = gpu_of(size) if size.plannable else None
        share = "" if size.gpu_fraction in (None, "1") else f"{size.gpu_fraction} of "
        count = share or ("" if size.gpu_count is None else f"{size.gpu_count} x ")
        status: list[str] = [] if size.status == "available" else [size.status]
        status += [size.unplannable_reason] if not size.plannable else []
        status += [f"retires {size.retirement_date}"] if size.retirement_date and size.status != "retired" else []
        table.add_row(
            size.short_name,
            count + (re.sub(r"-[0-9]+q$", "", card.name) if card else size.gpu_label),
            gib_figure(card.usable_bytes) if card else "-",
            *(["-" if n is None else f"{n:,}" for n in (size.vcpu, size.ram_gib)] if wide else []),
            "yes" if size.spot_supported else "no",
            "yes" if size.aks_supported == "yes" else "?" if size.aks_supported == "unverified" else "no",
            *([size.quota_family] if wide else []),
            "; ".join(status),
        )
    return table


def gpus_table(cards: Sequence[Gpu]) -> RenderableType:
    """The cards of the catalog."""
    table = _table(
        f"{len(cards)} cards",
        [
            ("card", "name"),
            ("GiB", "right"),
            ("GB/s", "right"),
            ("bf16 TFLOPS", "right"),
            ("CC", "right"),
            ("bf16", "left"),
            ("FP8", "left"),
            ("Azure", "left"),
        ],
    )
    for card in cards:
        table.add_row(
            card.name,
            gib_figure(card.usable_bytes),
            f"{card.bandwidth_bytes_per_s / 1e9:,.0f}",
            "-" if card.bf16_tflops is None else f"{card.bf16_tflops:g}",
            card.compute_capability,
            "yes" if card.supports_bf16 else "no",
            card.supports_fp8,
            "yes" if card.cloud else "no",
        )
    return table


def print_validation(console: Console, validation: Validation, *, rows: bool = True) -> None:
    """Errors by row and quantity, refusals with reasons, and the summary."""
    if rows:
        table = _table(
            "Predicted against measured",
            [
                ("row", "left"),
                ("model", "left"),
                ("quantity", "left"),
                ("predicted", "right"),
                ("measured", "right"),
                ("error %", "right"),
            ],
        )
        for row in validation.predictions:
            for name, pair in row.quantities.items():
                table.add_row(
                    row.id,
                    row.model,
                    name,
                    f"{pair.predicted:,.3f}",
                    f"{pair.measured:,.3f}",
                    f"{pair.error_pct:+.2f}",
                )
        console.print(table)
    if validation.refusals:
        table = _table("Refused", [("rows", "right"), ("reason", "left")])
        for reason, count in validation.refusal_reasons.items():
            table.add_row(str(count), reason)
        console.print(table)
    columns = [
        ("quantity", "left"),
        ("rows", "right"),
        ("median %", "right"),
        ("p90 %", "right"),
        ("max %", "right"),
        ("worst row", "left"),
    ]
    for by in dict.fromkeys(error.by for error in validation.grouped):
        table = _table(f"Errors by {by}", [(by, "left"), *columns[:-1]])
        for group in validation.grouped:
            if group.by == by:
                table.add_row(_escape(group.group), *_error_cells(group)[:-1])
        console.print(table)
    table = _table(f"{validation.rows} rows, {validation.predicted} predicted, {validation.refused} refused", columns)
    for error in validation.errors:
        table.add_row(*_error_cells(error))
    console.print(table)
    from planner.validate import within_range

    share = within_range(validation)
    if share is not None:
        console.print(f"{share:.0%} of the measured values lie within the stated range")


def _error_cells(error: QuantityError) -> tuple[str, ...]:
    return (
        error.quantity,
        str(error.rows),
        f"{error.median_abs_pct:.2f}",
        f"{error.p90_abs_pct:.2f}",
        f"{error.max_abs_pct:.2f}",
        error.worst_row,
    )


def _error_json(error: QuantityError) -> dict[str, Any]:
    return {
        "rows": error.rows,
        "median_abs_pct": round(error.median_abs_pct, 3),
        "p90_abs_pct": round(error.p90_abs_pct, 3),
        "max_abs_pct": round(error.max_abs_pct, 3),
        "worst_row": error.worst_row,
    }


def validation_json(validation: Validation) -> dict[str, Any]:
    """The summary, then every row, as `planner validate --json` prints them."""
    from planner.validate import within_range

    share = within_range(validation)
    grouped: dict[str, dict[str, dict[str, Any]]] = {}
    for error in validation.grouped:
        grouped.setdefault(error.by, {}).setdefault(error.group, {})[error.quantity] = _error_json(error)
    found: dict[str, Any] = {
        "schema_version": "tonnage.validation/1",
        "summary": {
            "rows": validation.rows,
            "predicted": validation.predicted,
            "refused": validation.refused,
            "refused_reasons": validation.refusal_reasons,
            "quantities": {error.quantity: _error_json(error) for error in validation.errors},
        },
        "rows": [
            row.model_dump(mode="json", exclude=set() if row.groups else {"groups", "inside"})
            for row in validation.predictions
        ],
        "refusals": [refusal.model_dump(mode="json") for refusal in validation.refusals],
    }
    if grouped:
        found["summary"]["by"] = grouped
    if share is not None:
        found["summary"]["within_range_pct"] = round(100 * share, 1)
    return found
