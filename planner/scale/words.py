"""The sentences of an answer, which the terminal and the page share."""

from __future__ import annotations

from decimal import Decimal

from planner.scale.answer import METRIC_WORDS, Choice, Metric, Rejected, ScaleAnswer
from planner.scale.replica import METRICS, excess, limit_of, milliseconds, rate_figure
from planner.units import format_tokens, format_usd

WHOLE = Decimal(1)


def stored_as(weights: str, kv_cache_dtype: str) -> str:
    """`fp8`, `fp8, fp8 KV`: how a choice stores weights and KV cache."""
    return weights if kv_cache_dtype in ("", "auto") else f"{weights}, {kv_cache_dtype} KV"


def how(choice: Choice) -> str:
    """`3 machines, 2 x TP 1 each`; with the spare ones named."""
    word = "machine" if choice.machines == 1 else "machines"
    spare = f" ({choice.spare} spare)" if choice.spare else ""
    each = f"{choice.replicas_per_machine} x " if choice.replicas_per_machine > 1 else ""
    return f"{choice.machines} {word}{spare}, {each}TP {choice.tensor_parallel_size}"


def headline(answer: ScaleAnswer) -> str:
    """`20 requests a second, 500 tokens in and 200 out, context 1k`."""
    out = "1 token" if answer.output_tokens == 1 else f"{answer.output_tokens:,.0f}"
    return (
        f"{rate_figure(answer.rate_per_s)} requests a second, {answer.input_tokens:,.0f} tokens in and {out} out,"
        f" context {format_tokens(answer.context)}"
    )


def limits(answer: ScaleAnswer) -> str:
    """`TTFT p95 800 ms, TPOT p95 50.0 ms, kept by the high end of the range`."""
    told = [
        f"{METRIC_WORDS[metric]} {milliseconds(limit)}"
        for metric in METRICS
        if (limit := limit_of(answer.slo, metric)) is not None
    ]
    if answer.at == "measured":
        return f"{', '.join(told)}, by your measurements"
    by = "the high end of each range" if answer.at == "high" else "the expected values"
    return f"{', '.join(told)}, kept by {by}"


def shown_metrics(answer: ScaleAnswer) -> list[Metric]:
    """TTFT and TPOT of an answer of several tokens, and the whole latency where that is limited."""
    found: list[Metric] = ["ttft", "tpot"] if answer.output_tokens > 1 else []
    return found if answer.slo.e2e_p95_s is None and found else [*found, "e2e"]


def limited_metrics(answer: ScaleAnswer) -> list[Metric]:
    """Those that have a limit."""
    return [metric for metric in METRICS if limit_of(answer.slo, metric) is not None]


def sentences(answer: ScaleAnswer) -> list[str]:
    """What follows from the first choice: spares, one machine less, the day; or what comes nearest."""
    if not answer.choices:
        return _nothing(answer)
    first = answer.choices[0]
    name = first.sku.removeprefix("Standard_")
    lines = []
    if first.one_less:
        lines.append(f"{name}: {first.one_less}.")
    way = first.bought(answer.priority)
    assert way is not None
    if first.spare:
        lines.append(f"N+{first.spare}: the limits hold with {first.spare} of {first.machines} machines away.")
    else:
        one = format_usd(way.usd_per_month / first.machines, WHOLE)
        lines.append(
            f"N+0: nothing is spare when a machine fails or is upgraded; N+1 (--spare 1) costs {one} more a month."
        )
    lines += watched(first)
    if first.band.maximum_machines > 1:
        lines.append(f"The day: {answer.day_source}.")
    hopeful = [row for row in answer.cheaper if answer.at == "high" and _kept_as_expected(row, answer)]
    if hopeful:
        name = hopeful[0].sku.removeprefix("Standard_")
        lines.append(f"Only the high end of its range speaks against {name}: --at-expected takes it in.")
    return lines


def _kept_as_expected(row: Rejected, answer: ScaleAnswer) -> bool:
    """Whether only the high end of its range speaks against it."""
    return row.alone is not None and excess(row.alone, answer.slo, at_high=False)[0] <= 1


def watched(choice: Choice) -> list[str]:
    """The autoscaling band and its target."""
    band = choice.band
    if band.minimum_machines == band.maximum_machines:
        text = f"Autoscaling: {band.maximum_machines} machine{'s' if band.maximum_machines > 1 else ''} all day"
    else:
        text = (
            f"Autoscaling: {band.minimum_machines} to {band.maximum_machines} machines over the day"
            f" ({band.minimum_replicas} to {band.maximum_replicas} replicas), {band.machine_hours:,} machine hours a"
            f" month in place of {band.machine_hours_always:,}"
        )
        if band.usd_per_month is not None and band.usd_per_month_always is not None:
            text += f", {format_usd(band.usd_per_month, WHOLE)} in place of"
            text += f" {format_usd(band.usd_per_month_always, WHOLE)}"
            text += f" (${band.usd_per_million_output} a million output tokens of that day)"
        else:
            text += "; a commitment is paid for all of them, used or not"
    requests = f"{band.in_flight_target} request{'s' if band.in_flight_target > 1 else ''}"
    return [
        f"{text}.",
        f"HPA or KEDA target: {requests} in a replica (vllm:num_requests_running + vllm:num_requests_waiting).",
    ]


def _nothing(answer: ScaleAnswer) -> list[str]:
    nearest = answer.nearest
    if nearest is None:
        return ["No size comes near: each has another reason, told below."]
    line = f"Nearest: {nearest.reason}."
    if answer.nearest_flags:
        line += f" It would do with {answer.nearest_flags}."
    return [line]
