"""`planner size --samples`: how long a fine-tuning run takes on the size that was found, and what it costs there.

    hours = optimizer steps x seconds of a step / 3600;  USD = hours x price of the VM (x evictions' factor on spot)

Steps follow from samples, epochs and how a batch is filled; seconds from planner.performance.training.
"""

from __future__ import annotations

from collections.abc import Mapping
from decimal import Decimal
from math import ceil, isfinite
from typing import Any

from planner.catalog.assumptions import assumption
from planner.catalog.hardware import VmSku, gpu, link_bytes_per_s, sku, tensor_parallel_options
from planner.catalog.prices import PriceSheet, Priority, load_sheet
from planner.cost.spot import Overhead, SpotRisk, training_overhead
from planner.errors import PlannerError
from planner.fit import PRICED_IN, demand, with_context, with_gpus
from planner.memory.finetune_settings import SHARDED
from planner.memory.training import FinetuneSettings, TrainingMemory
from planner.model import Frozen, ModelSpec
from planner.performance.training import SpeedRange, TrainingSpeed, training_speed
from planner.size import ContextAnswer, RunPart, SizeAnswer, SizeRequest, Span, TrainingRun, UsdSpan
from planner.units import parse_tokens, round_money

MAX_SAMPLES = 10**12
MAX_EPOCHS = 10_000
EXAMPLE = "for example --samples 10000 --tokens-per-sample 512"


class RunRequest(Frozen):
    """The data of a run. tokens_per_sample: the mean; max_tokens_per_sample: the longest, what a batch is padded to."""

    samples: int
    tokens_per_sample: int
    max_tokens_per_sample: int | None = None
    epochs: float = 1.0
    packing: bool = False


def run_request(options: Mapping[str, Any]) -> RunRequest | None:
    """The run behind the command line's options, None where none was asked for; PlannerError for what cannot be."""
    samples, tokens = options["samples"], options["tokens_per_sample"]
    if samples is None:
        for name in ("tokens_per_sample", "max_tokens_per_sample", "epochs", "packing"):
            if options[name] is not None:
                raise PlannerError(f"--{name.replace('_', '-')} is about a training run: add --samples, {EXAMPLE}")
        return None
    if options["task"] == "serve":
        raise PlannerError("--samples asks for a training run and --task serve plans none: use --task finetune or both")
    if tokens is None:
        raise PlannerError(f"--samples needs the mean length of a sample: add --tokens-per-sample, {EXAMPLE}")
    if not 1 <= samples <= MAX_SAMPLES:
        raise PlannerError(f"a run of {samples:,} samples cannot be planned: write a number from 1 to {MAX_SAMPLES:,}")
    epochs = 1.0 if options["epochs"] is None else float(options["epochs"])
    if not isfinite(epochs) or not 0 < epochs <= MAX_EPOCHS:
        raise PlannerError(f"{epochs:g} epochs cannot be planned: write a number above 0 and up to {MAX_EPOCHS:,}")
    mean, longest = parse_tokens(tokens), options["max_tokens_per_sample"]
    if mean < 1:
        raise PlannerError("a sample of 0 tokens teaches nothing: write the mean length, such as 512")
    most = None if longest is None else parse_tokens(longest)
    if most is not None and most < mean:
        raise PlannerError(
            f"the longest sample ({most:,} tokens) is shorter than the mean ({mean:,}): raise --max-tokens-per-sample"
        )
    return RunRequest(
        samples=samples,
        tokens_per_sample=mean,
        max_tokens_per_sample=most,
        epochs=epochs,
        packing=bool(options["packing"]),
    )


def default_context(asked: RunRequest | None) -> str:
    """The context of a run that names none: its longest sample. PlannerError where there is no run either."""
    if asked is None:
        raise PlannerError("no context was given: write --ctx 32768, or several as --ctx 2k,8k,32k")
    return str(asked.max_tokens_per_sample or asked.tokens_per_sample)


def with_runs(spec: ModelSpec, request: SizeRequest, answer: SizeAnswer, asked: RunRequest) -> SizeAnswer:
    """The answer with `run` filled in wherever fine-tuning fits. PlannerError for samples beyond a context."""
    if request.finetune is None:
        raise PlannerError("--samples asks for a training run, and this answer has none: use --task finetune")
    longest = asked.max_tokens_per_sample or asked.tokens_per_sample
    if longest > min(request.contexts):
        raise PlannerError(
            f"samples of {longest:,} tokens are beyond a context of {min(request.contexts):,}, where they would be cut:"
            " raise --ctx, or lower --tokens-per-sample"
        )
    settings, sheet = request.finetune, load_sheet()
    rows = []
    for row in answer.answers:
        if row.task == "finetune" and row.fits:
            chosen = with_context(with_gpus(settings, row.gpus), row.context)
            assert isinstance(chosen, FinetuneSettings)
            row = row.model_copy(update={"run": training_run(spec, chosen, row, asked, sheet)})
        rows.append(row)
    return answer.model_copy(update={"answers": tuple(rows)})


def training_run(
    spec: ModelSpec, settings: FinetuneSettings, place: ContextAnswer, asked: RunRequest, sheet: PriceSheet
) -> TrainingRun:
    """Hours and USD of a run where `place` says that it fits.

    Rows of a batch: packed, samples x mean / (context x fill), else one a sample. steps = rows x epochs / (micro_batch
    x accumulation x GPUs), rounded up. Low and high combine those of the speed and of the fill.
    """
    size = sku(place.sku) if place.sku else None
    card = gpu(place.gpu)
    memory = demand(spec, settings, card)
    assert isinstance(memory, TrainingMemory)
    tokens, fill, assumed = _filling(settings, asked)
    at = settings.model_copy(update={"seq_len": tokens})
    speed = training_speed(
        spec,
        at,
        card,
        link_bytes_per_s=_link(size, settings.n_gpus),
        sample_tokens=asked.tokens_per_sample if asked.packing else None,
    )
    batch = settings.micro_batch * settings.gradient_accumulation_steps * settings.n_gpus
    low, steps, high = (_steps(asked, tokens, share, batch) for share in (fill.high, fill.expected, fill.low))
    seconds = speed.step_seconds
    hours = Span(
        low=low * seconds.low / 3600, expected=steps * seconds.expected / 3600, high=high * seconds.high / 3600
    )
    total = asked.samples * asked.epochs
    stored = checkpoint_bytes(memory)
    overhead = training_overhead(assumed_risk(), checkpoint_hours(stored))
    interval = overhead.interval_hours
    on_demand, spot = (_rate(sheet, size, priority) for priority in ("on-demand", "spot"))
    return TrainingRun(
        samples=asked.samples,
        epochs=asked.epochs,
        tokens_per_sample=asked.tokens_per_sample,
        packing=asked.packing,
        sequence_tokens=tokens,
        fill=fill,
        steps=steps,
        step_seconds=_span(seconds),
        tokens_per_s_per_gpu=_span(speed.tokens_per_s_per_gpu),
        samples_per_s=Span(
            low=total / (hours.high * 3600), expected=total / (hours.expected * 3600), high=total / (hours.low * 3600)
        ),
        mfu=_span(speed.mfu),
        hours=hours,
        region=PRICED_IN if on_demand is not None else "",
        usd_on_demand=None if on_demand is None else _usd(on_demand, hours, Overhead()),
        usd_spot=None if spot is None else _usd(spot, hours, overhead),
        spot_factor=float(overhead.factor[1]),
        checkpoint_minutes=None if interval is None else float(interval * 60),
        checkpoint_bytes=stored,
        extrapolated=speed.extrapolated,
        parts=tuple(RunPart(**part.model_dump()) for part in speed.parts),
        assumed=(*assumed, *_always_assumed(speed, size)),
        price_source=_price_source(sheet, size),
    )


def checkpoint_bytes(memory: TrainingMemory) -> int:
    """Bytes of one training checkpoint: what is trained and its optimizer state, over all GPUs that hold a part."""
    settings = memory.settings
    parts = {part.name: part.expected_bytes for part in memory.estimate.components}
    trained = parts.get("weights", 0) if settings.method == "full" else parts.get("adapters", 0)
    n = settings.n_gpus
    state = parts.get("optimizer state", 0) * (n if settings.parallelism not in ("none", "ddp") else 1)
    return trained * (n if settings.parallelism in SHARDED else 1) + state


def checkpoint_hours(size_bytes: int) -> tuple[float, float, float]:
    """Hours that writing a checkpoint takes, at best, as expected, at worst: bytes / rate + what it costs besides."""
    speed, fixed = assumption("checkpoint_write_bytes_per_s"), assumption("checkpoint_fixed_seconds")
    best, usual, worst = (
        float(size_bytes / rate + seconds) / 3600
        for rate, seconds in ((speed.high, fixed.low), (speed.expected, fixed.expected), (speed.low, fixed.high))
    )
    return best, usual, worst


def assumed_risk() -> SpotRisk:
    """How often spot machines are taken back and what that costs, by the catalog's assumptions."""
    rate, restart = assumption("evictions_per_hour"), assumption("restart_hours")
    return SpotRisk(
        evictions_per_hour=(rate.low, rate.expected, rate.high),
        restart_hours=(restart.low, restart.expected, restart.high),
    )


def _filling(settings: FinetuneSettings, asked: RunRequest) -> tuple[int, Span, tuple[str, ...]]:
    """Tokens of a row as the GPU computes it, the share of them that are samples' own, and what that assumes.

    Packed: a context holds floor(context / mean) samples when all are of mean length and none is cut, and is full at
    best; the middle of both is expected. Padded: mean / longest, and 1 where a GPU takes one sample at a time.
    """
    mean, context = asked.tokens_per_sample, settings.seq_len
    if asked.packing:
        least = context // mean * mean / context
        fill = Span(low=least, expected=(least + 1) / 2, high=1.0)
        return context, fill, ("samples are packed into whole contexts and attend to themselves alone",)
    if settings.micro_batch == 1:
        return mean, Span(low=1, expected=1, high=1), ("one sample at a time, so that nothing is padded",)
    longest = asked.max_tokens_per_sample or context
    share = mean / longest
    text = f"every batch is padded to {longest:,} tokens, which wastes {1 - share:.0%} of it"
    if share == 1:
        text = "all samples are of one length"
    return longest, Span(low=share, expected=share, high=share), (text,)


def _steps(asked: RunRequest, tokens: int, fill: float, batch: int) -> int:
    rows = asked.samples * asked.epochs
    if asked.packing:
        rows *= asked.tokens_per_sample / (tokens * fill)
    return max(1, ceil(rows / batch - 1e-9))


def _link(size: VmSku | None, gpus: int) -> float | None:
    """The slowest link between the GPUs of a VM; None (PCIe) at a desk and where it is not published."""
    if size is None or gpus == 1 or gpus not in tensor_parallel_options(size):
        return None
    rate = link_bytes_per_s(size, gpus)
    return None if rate is None else float(rate)


def _rate(sheet: PriceSheet, size: VmSku | None, priority: Priority) -> Decimal | None:
    return None if size is None else sheet.rate(size.name, PRICED_IN, priority)


def _usd(rate: Decimal, hours: Span, overhead: Overhead) -> UsdSpan:
    low, expected, high = (
        round_money(rate * Decimal(f"{value:.9f}") * factor)
        for value, factor in zip((hours.low, hours.expected, hours.high), overhead.factor, strict=True)
    )
    return UsdSpan(low=low, expected=expected, high=high)


def _price_source(sheet: PriceSheet, size: VmSku | None) -> str:
    offer = None if size is None else sheet.offer(size.name, PRICED_IN, "on-demand")
    return "" if offer is None else f"price sheet {sheet.name}, {offer.provenance.source} ({offer.provenance.as_of})"


def _always_assumed(speed: TrainingSpeed, size: VmSku | None) -> tuple[str, ...]:
    found = ["starting the machine, loading the model and evaluation come on top", *speed.notes]
    if speed.n_gpus > 1 and size is None:
        found.append("the GPUs are joined by PCIe")
    return tuple(found)


def _span(value: SpeedRange) -> Span:
    return Span(low=value.low, expected=value.expected, high=value.high)
