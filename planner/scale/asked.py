"""The options of `planner scale` as one thing that is wanted, or a sentence that says which of them cannot be."""

from __future__ import annotations

import re
from bisect import bisect_left
from collections.abc import Mapping
from math import ceil, exp, isfinite
from typing import Any

from pydantic import ValidationError

from planner.catalog import load_model
from planner.catalog.assumptions import assumption
from planner.catalog.hardware import sku
from planner.catalog.prices import PRIORITIES, Priority
from planner.errors import PlannerError
from planner.memory.serving import ServingSettings
from planner.memory.weights import check_parallel, weight_scheme
from planner.model import ModelSpec
from planner.performance.traffic import Lengths, Slo, Traffic, read_traffic
from planner.plan.intent import region_names
from planner.scale.answer import Variant, Wanted
from planner.scale.day import HOURS, read_day, wave
from planner.size import check_contexts, rope_factor
from planner.units import parse_tokens

LARGEST_RATE = 1e6  # requests a second
LARGEST_SLO_S = 3600.0
CONTEXT_STEP = 1024  # an unstated context is rounded up to whole multiples
NINETY_NINE = 2.326  # standard normal quantile of 0.99: the longest of lengths that spread
WINDOW_S = 60.0  # of a trace, over which its busiest time is counted
_SECONDS = re.compile(r"([0-9]+(?:\.[0-9]+)?|\.[0-9]+) ?(ms|s)")


def parse_seconds(text: str, option: str) -> float:
    """`800ms`, `0.8s` -> seconds. Raises PlannerError for anything else, a number without a unit too."""
    match = _SECONDS.fullmatch(text.strip().lower())
    value = float(match[1]) * (0.001 if match[2] == "ms" else 1) if match else 0.0
    if not 0 < value <= LARGEST_SLO_S:
        raise PlannerError(f"{option} {text[:40]!r} is not a latency: write it with its unit, such as 800ms or 0.8s")
    return value


def wanted_from_options(options: Mapping[str, Any]) -> Wanted:
    """What the command line asks for. Raises PlannerError with the option that is wrong and what is possible."""
    spec = load_model(options["model"])
    rope = rope_factor(options["rope_scaling"])
    traffic, notes = _traffic(options)
    day, day_source, peak = _day(options, traffic)
    rate = _rate(options, traffic, peak)
    traffic = traffic.model_copy(update={"rate_per_s": rate, "prefix_hit_rate": _hit_rate(options)})
    context = _context(spec, options, traffic, rope)
    if rope:
        spec = spec.model_copy(update={"max_context": int(spec.max_context * rope)})
    settings = _settings(options, context)
    tp = options["tp"]
    check_parallel(spec, tp or 1, 1)
    weight_scheme(spec, options["quantization"])  # refuses what the checkpoint cannot be
    if options["spare"] > 1000:
        raise PlannerError(f"{options['spare']:,} spare machines are no reserve: write 1 for N+1")
    return Wanted(
        spec=spec,
        traffic=traffic,
        slo=_slo(options, traffic),
        settings=settings,
        variants=_variants(spec, options),
        sizes=_sizes(options["sku"]),
        tp=tp,
        regions=tuple(region_names(options["region"])),
        priority=_priority(options),
        at_high=not options["at_expected"],
        spare=options["spare"],
        day=day,
        day_source=day_source,
        simulate=options["simulate"],
        seed=options["seed"],
        everything=options["explain"],
        drawn=options["drawn"],
        notes=notes,
    )


def _traffic(options: Mapping[str, Any]) -> tuple[Traffic, tuple[str, ...]]:
    """Lengths and arrivals, without a rate; notes on what was supposed."""
    classify = options["qps"] is not None
    if options["rps"] is not None and classify:
        raise PlannerError(
            "--rps is for answers of many tokens and --qps for one token (classification): give one of them"
        )
    if options["trace"] is not None:
        given = [
            n for n in ("rps", "qps", "input_tokens", "output_tokens", "spread", "daily") if options[n] is not None
        ]
        if given:
            flag = given[0].removesuffix("_tokens")
            raise PlannerError(f"--trace says already what --{flag} says: drop one of them")
        traffic = read_traffic(options["trace"])
        return traffic, (
            f"the trace is planned for its busiest {WINDOW_S:.0f} seconds, and each replica takes its turn",
        )
    notes = []
    if classify:
        if options["output_tokens"] is not None and _length(options, "output_tokens") != 1:
            raise PlannerError("--qps is for one output token (classification): drop --output, or write --rps")
        if options["input_tokens"] is None:
            length = int(assumption("classification_input_tokens").expected)
            notes.append(f"prompts of {length} tokens are supposed: state yours with --input")
            mean_in = length
        else:
            mean_in = _length(options, "input_tokens")
        mean_out = 1
    else:
        for name, example in (("input_tokens", "--input 500"), ("output_tokens", "--output 200")):
            if options[name] is None:
                raise PlannerError(f"how long requests are decides everything: add {example} (tokens), or --trace")
        mean_in, mean_out = _length(options, "input_tokens"), _length(options, "output_tokens")
    sigma = options["spread"] or 0.0
    if not isfinite(sigma) or not 0 <= sigma <= 2:
        raise PlannerError(f"a spread of {sigma:g} is not one that requests have: write 0 (all equal) to 2")
    spread_out = 0.0 if mean_out == 1 else sigma
    return Traffic(prompt=_lengths(mean_in, sigma), output=_lengths(mean_out, spread_out)), tuple(notes)


def _length(options: Mapping[str, Any], name: str) -> int:
    tokens = parse_tokens(options[name])
    if tokens < 1:
        raise PlannerError(f"--{name.removesuffix('_tokens')} 0 asks for nothing: write at least 1 token")
    return tokens


def _lengths(mean: int, sigma: float) -> Lengths:
    longest = ceil(mean * exp(NINETY_NINE * sigma - sigma**2 / 2)) if sigma else None
    return Lengths(mean=mean, sigma=sigma, longest=longest)


def _rate(options: Mapping[str, Any], traffic: Traffic, peak: float | None) -> float:
    """Requests a second at the busiest time: stated, of a daily file, or of a trace's busiest minute."""
    if traffic.arrivals:
        return busiest(traffic.arrivals)
    flag = "--qps" if options["qps"] is not None else "--rps"
    rate = options["qps"] if options["qps"] is not None else options["rps"]
    if rate is None:
        rate = peak
    if rate is None:
        raise PlannerError("no load was given: write --rps 20 (requests a second), --qps 500, --daily or --trace")
    if not isfinite(rate) or not 0 < rate <= LARGEST_RATE:
        raise PlannerError(
            f"{flag} {rate:g} cannot be planned: write requests a second above 0 and up to {LARGEST_RATE:,.0f}"
        )
    return float(rate)


def busiest(arrivals: tuple[float, ...]) -> float:
    """Requests a second in the busiest minute of a trace; over all of it where it is shorter than two."""
    length = arrivals[-1] - arrivals[0]
    if length < 2 * WINDOW_S:
        return (len(arrivals) - 1) / length
    most = max(bisect_left(arrivals, start + WINDOW_S) - i for i, start in enumerate(arrivals))
    return most / WINDOW_S


def _day(options: Mapping[str, Any], traffic: Traffic) -> tuple[tuple[float, ...], str, float | None]:
    """A day as shares of its busiest hour, where it comes from, and the busiest rate that a file states."""
    if options["daily"] is not None:
        if options["peak_to_mean"] is not None:
            raise PlannerError("--daily says already what --peak-to-mean says: drop one of them")
        rates = read_day(options["daily"])
        peak = max(rates)
        return tuple(rate / peak for rate in rates), f"{options['daily']}, {HOURS} hours", peak
    if options["peak_to_mean"] is not None:
        ratio = options["peak_to_mean"]
        return wave(ratio), f"one wave a day, its peak {ratio:g} times the mean, as asked", None
    known = assumption("peak_to_mean_rate")
    source = (
        f"supposed: one wave a day, its peak {known.expected:g} times the mean (owner: {known.owner}); state yours with"
        " --peak-to-mean or --daily"
    )
    return wave(float(known.expected)), source, None


def _hit_rate(options: Mapping[str, Any]) -> float:
    share = options["prefix_hit_rate"]
    if not isfinite(share) or not 0 <= share < 1:
        raise PlannerError(f"a prefix hit rate of {share:g} is not a share: write 0.5 where half of a prompt is cached")
    return float(share)


def _context(spec: ModelSpec, options: Mapping[str, Any], traffic: Traffic, rope: float | None) -> int:
    """max_model_len: stated, or what the longest request needs, rounded up. PlannerError where that is too long."""
    longest = traffic.prompt.least_longest + traffic.output.least_longest
    limit = int(spec.max_context * (rope or 1))
    if options["ctx"] is None:
        if longest > limit:
            raise PlannerError(
                f"a request of {longest:,} tokens is beyond the context of {spec.name} ({limit:,}): lower --input or"
                " --output, or state --rope-scaling"
            )
        return min(-(-longest // CONTEXT_STEP) * CONTEXT_STEP, limit)
    context = parse_tokens(options["ctx"])
    check_contexts(spec, (context,), rope)
    if longest > context:
        raise PlannerError(
            f"a request of {longest:,} tokens is longer than the context of {context:,}: write --ctx {longest} or more,"
            " or lower --input or --output"
        )
    return context


def _settings(options: Mapping[str, Any], context: int) -> ServingSettings:
    try:
        return ServingSettings(
            max_model_len=context,
            max_num_seqs=options["max_num_seqs"],
            max_num_batched_tokens=options["max_num_batched_tokens"],
            gpu_memory_utilization=options["gpu_memory_utilization"],
            engine_version=options["engine_version"],
        )
    except ValidationError as error:
        first = error.errors()[0]
        flag = str(first["loc"][0]).replace("_", "-")
        raise PlannerError(f"--{flag} is wrong: {first['msg'].lower()}") from error


def _variants(spec: ModelSpec, options: Mapping[str, Any]) -> tuple[Variant, ...] | None:
    """The one that was asked for; None to try several."""
    quantization, dtype = options["quantization"], options["kv_cache_dtype"]
    if quantization is None and dtype is None:
        return None
    return (Variant(quantization, dtype or "auto"),)


def _slo(options: Mapping[str, Any], traffic: Traffic) -> Slo:
    one_token = traffic.output.least_longest == 1
    limits = {
        name: None if options[name] is None else parse_seconds(options[name], flag)
        for name, flag in (("ttft_p95", "--ttft-p95"), ("tpot_p95", "--tpot-p95"), ("latency", "--latency"))
    }
    if one_token and limits["tpot_p95"] is not None:
        raise PlannerError("an answer of one token has no time per later token: drop --tpot-p95, or raise --output")
    if not any(limits.values()):
        example = "--latency 50ms" if one_token else "--ttft-p95 800ms --tpot-p95 50ms"
        raise PlannerError(f"without a limit any machine would do: add {example}")
    return Slo(ttft_p95_s=limits["ttft_p95"], tpot_p95_s=limits["tpot_p95"], e2e_p95_s=limits["latency"])


def _sizes(names: list[str] | None) -> tuple[str, ...]:
    """The sizes named, in full; PlannerError for one that a plan may not take."""
    found = []
    for name in names or ():
        size = sku(name)
        if not size.plannable:
            raise PlannerError(f"{size.short_name} cannot be planned ({size.unplannable_reason}): choose another size")
        found.append(size.name)
    return tuple(dict.fromkeys(found))


def _priority(options: Mapping[str, Any]) -> Priority:
    named: str | None = options["priority"]
    if options["spot"] and named not in (None, "spot"):
        raise PlannerError(f"--spot and --priority {named} contradict each other: give one of them")
    word = "spot" if options["spot"] else named or "on-demand"
    for priority in PRIORITIES:
        if word == priority:
            return priority
    raise PlannerError(f"--priority {word[:40]!r} is no way to buy: write one of {', '.join(PRIORITIES)}")
