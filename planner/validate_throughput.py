"""Published serving speeds against the plan: rows become a benchmark, which is replayed, and each figure an error."""

from __future__ import annotations

import random
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from itertools import accumulate
from math import exp
from statistics import NormalDist

from pydantic import ValidationError

from planner.catalog.engines import parse_version
from planner.catalog.hardware import Gpu, gpu
from planner.catalog.serving_speed import SpeedEngine, matmul_peak, speed_engine
from planner.errors import NotModelled, PlannerError
from planner.memory.serving import ServingSettings
from planner.model import ModelSpec
from planner.performance.server import Link, Server, quick_step, server
from planner.performance.simulate import Limits, Served, simulate
from planner.performance.step import Speeds
from planner.validate import Refusal, RowPrediction, Validation, compare, number, shape, summarise

COLUMNS = (
    "id", "source", "engine", "engine_version", "model", "quant", "gpu", "n_gpus", "tp",
    "input_len", "output_len", "batch_or_concurrency", "request_rate", "metric", "value", "notes",
)  # fmt: skip
METRICS = {
    "ttft_ms_mean": "TTFT",
    "tpot_ms_mean": "TPOT",
    "itl_ms": "ITL",
    "decode_tok_s_single_stream": "single stream",
    "output_tok_s_total": "throughput",
    "total_tok_s": "throughput",
    "req_s": "throughput",
}
Row = Mapping[str, str]

WAVES = 10  # requests a client of a closed loop sends, where a row does not say: what such benchmarks usually do
MANY_CLIENTS, FEW_WAVES = 128, 4  # beyond so many clients the start weighs little, and fewer waves are replayed
QUEUED = 0.3  # of the clients wait for their first token on average: above that the server is saturated
OTHER_SEQUENCES = {"tensorrt-llm": 2048, "sglang": 1024}  # their own defaults
KEPT_UP = 0.8  # of the rate, or the queue grows
BURST_PER_S = 100.0  # sent faster than that, some hundred requests are there at once
RATED_REQUESTS = 500  # sent at a rate, where a row does not say how many
MORE_THAN_SMALL = 300  # running at a time: more than the 256 that vLLM allows small cards by default
LIGHT = 0.8  # no engine attains more of the data sheet than this, so a faster row was not computed as it says


@dataclass(frozen=True)
class Benchmark:
    """What one run of a benchmark did, from the rows that it left.

    settings: with the usual defaults where the rows do not say, in `assumed`; asynchronous: scheduling as its command
    says, None for the engine's default; concurrency: clients of a closed loop, rate_per_s: of Poisson arrivals, neither
    for all requests at once; measured: by metric, the row's id and its value; source: the document
    """

    source: str
    engine: SpeedEngine
    spec: ModelSpec
    settings: ServingSettings
    card: Gpu
    link: Link | None
    prompts: tuple[int, ...]
    outputs: tuple[int, ...]
    concurrency: int | None
    rate_per_s: float | None
    asynchronous: bool | None
    measured: Mapping[str, tuple[str, float]]
    assumed: tuple[str, ...]

    @property
    def server(self) -> Server:
        """The replica that it ran on; PlannerError where that cannot be."""
        return server(
            self.spec, self.settings, self.card, self.link, engine=self.engine, asynchronous=self.asynchronous
        )

    @property
    def label(self) -> str:
        """The setting in words, for the table."""
        load = "at once" if self.concurrency is None else f"{self.concurrency} clients"
        load = load if self.rate_per_s is None else f"{self.rate_per_s:g} a second"
        size = f"{sum(self.prompts) // len(self.prompts)}/{sum(self.outputs) // len(self.outputs)} tokens"
        tp = self.settings.tensor_parallel_size
        return f"{self.engine}, {tp} x {self.card.name}, {len(self.prompts)} requests {load}, {size}"


def validate_throughput(rows: Iterable[Row]) -> Validation:
    """Predict the figures of published serving benchmarks and compare; what cannot be predicted is refused.

    Rows that share everything but the metric are one benchmark, whose schedule is replayed step by step. Quantities:
    TPOT, ITL, single stream, throughput, TTFT and `TTFT (saturated)`.
    """
    predictions: list[RowPrediction] = []
    refusals: list[Refusal] = []
    count = 0
    for group in groups(rows):
        count += len(group)
        try:
            found = benchmark(group)
            predictions += _predictions(found)
            told = {name for name, _ in found.measured.values()}
            refusals += [Refusal(id=row["id"], reason=_suspect(row)) for row in group if row["id"] not in told]
        except PlannerError as error:
            refusals += [Refusal(id=row["id"], reason=str(error)) for row in group]
    return summarise(predictions, refusals, count)


def groups(rows: Iterable[Row]) -> list[list[Row]]:
    """Rows of one run together: everything equal but the metric and what the notes say of one figure."""
    found: dict[tuple[str, ...], list[Row]] = {}
    for row in rows:
        notes = re.sub(r"^SUSPECT \([^)]*\);\s*", "", row["notes"])
        kept = tuple(row[name] for name in COLUMNS if name not in ("id", "metric", "value", "notes"))
        found.setdefault((*kept, notes), []).append(row)
    return list(found.values())


def _suspect(row: Row) -> str:
    """Why a figure is not compared; empty where it is."""
    if "SUSPECT" in row["notes"]:
        return "the table marks the figure as suspect"
    value = number(row["value"])
    if row["metric"] not in METRICS or value is None or value <= 0:
        return f"{row['metric'] or 'an unnamed figure'} is not a figure that is predicted, or it is not a number"
    loop = "TensorRT" in row["engine"] and row["request_rate"] == "closed loop"
    if loop and row["metric"] == "ttft_ms_mean":
        return "TTFT of TensorRT-LLM's closed loops counts the start of the run: its TPOT alone is compared"
    return ""


# ------------------------------------------------------------------------------------------------------ the benchmark


def benchmark(group: Sequence[Row]) -> Benchmark:
    """The run behind rows that share everything but the metric. NotModelled or PlannerError says why there is none."""
    try:
        return _benchmark(group)
    except ValidationError as error:  # a cell that no engine would take, such as a batch of 0 sequences
        field = ".".join(str(part) for part in error.errors()[0]["loc"])
        raise PlannerError(f"the row's {field} is not a value that an engine takes") from error


def _benchmark(group: Sequence[Row]) -> Benchmark:
    row = group[0]
    notes = row["notes"]
    engine = _engine(row)
    for pattern, reason in _REFUSED_NOTES:
        if re.search(pattern, notes, re.I):
            raise NotModelled(reason)
    measured: dict[str, tuple[str, float]] = {}
    for each in group:
        value = number(each["value"])
        if not _suspect(each) and value is not None:
            measured[each["metric"]] = (each["id"], value)
    if not measured:
        raise NotModelled(_suspect(row))
    card = gpu(row["gpu"])
    tp = _whole(row["tp"])
    if tp is None or (_whole(row["n_gpus"]) or tp) != tp:
        raise NotModelled("the tensor parallel size is not stated, or other GPUs are used beside it")
    if tp > 8 and "nvl72" not in card.notes.lower() and card.name != "gb200":
        raise NotModelled("tensor parallelism over several machines is not modelled")
    spec, quantization = _spec(row)
    prompts, outputs, concurrency, assumed = _load(row, measured)
    rate = _rate(row)
    if rate is not None:
        concurrency = None  # the clients that are stated beside a rate are those that it leaves waiting
    longest = max(map(sum, zip(prompts, outputs, strict=True)))
    settings, more = _settings(row, engine, spec, card, tp, quantization, longest)
    running = _running(measured, prompts, outputs)
    if (
        engine == "vllm"
        and concurrency is None
        and rate is None
        and settings.max_num_seqs is None
        and running > MORE_THAN_SMALL
    ):
        settings = settings.model_copy(update={"max_num_seqs": 1024, "max_num_batched_tokens": 8192})
        more = (*more, f"1,024 sequences a step, for its own figures leave {running:,.0f} running")
    found = Benchmark(
        source=source_of(row),
        engine=engine,
        spec=spec,
        settings=settings,
        card=card,
        link=_link(card, tp),
        prompts=prompts,
        outputs=outputs,
        concurrency=concurrency,
        rate_per_s=rate,
        asynchronous=True if "--async-scheduling" in notes else None,
        measured=measured,
        assumed=(*assumed, *more),
    )
    _check_littles_law(found)
    return found


def _running(measured: Mapping[str, tuple[str, float]], prompts: Sequence[int], outputs: Sequence[int]) -> float:
    """Sequences that ran at a time by the run's own figures: output tokens a second * seconds a token; 0 if unsaid."""
    tpot, rate = measured.get("tpot_ms_mean"), measured.get("output_tok_s_total")
    if rate is None and (total := measured.get("total_tok_s")):
        rate = (total[0], total[1] * sum(outputs) / (sum(outputs) + sum(prompts)))
    return tpot[1] * rate[1] / 1e3 if tpot and rate else 0.0


def source_of(row: Row) -> str:
    """The document a row comes from, without the line in it; a collection's own campaign where it names one."""
    document = row["source"].partition("#")[0].strip()
    campaign = re.search(r"source_file=([^;]+)", row["notes"])
    return f"{document} {campaign[1].strip()}" if campaign else document


_REFUSED_NOTES = (
    (r"vLLM 0\.4\.", "vLLM before 0.6 is not modelled: it left CUDA graphs beyond 8,192 tokens, among other things"),
    (r"speculative", "speculative decoding without its acceptance rate is not predicted"),
    (r"enforce-eager", "an engine without CUDA graphs is not modelled"),
    (r"_ep(?!1\b|1_|none)\d+", "experts spread by expert parallelism are not modelled"),
    (r"llama-bench|layer split", "llama.cpp is not modelled: vLLM, SGLang and TensorRT-LLM are"),
)


def _engine(row: Row) -> SpeedEngine:
    version = row["engine_version"] if re.fullmatch(r"v?\d+\.\d+.*", row["engine_version"].strip()) else None
    return speed_engine(row["engine"], version)


def _whole(cell: str) -> int | None:
    return int(cell) if re.fullmatch(r"\s*\d{1,9}\s*", cell) else None


_FORMATS = (
    ("nvfp4", "nvfp4"), ("mxfp4", "mxfp4"), ("gptq-int8", "gptq-8bit"), ("gptq (int8)", "gptq-8bit"),
    ("gptq marlin (int8)", "gptq-8bit"), ("gptq", "gptq"), ("awq", "awq"), ("w4a16", "w4a16"), ("w8a8", "w8a8"),
    ("bitsandbytes", "bitsandbytes"), ("fp8_block", "fp8-block"), ("fp8 dynamic", "fp8-dynamic"), ("fp8", "fp8"),
)  # fmt: skip


def _spec(row: Row) -> tuple[ModelSpec, str | None]:
    """The model's shape, and the format to ask for where the catalog's shape is 16-bit and the row is not."""
    spec = shape(row["model"])
    words = row["quant"].lower()
    if spec.quantization is not None:
        return spec, None
    if not words or words.startswith(("bf16", "fp16", "f16", "(not stated")):
        return spec, None
    if "fp8/bf16 not stated" in words:
        raise NotModelled("the row does not say whether its weights are FP8 or 16-bit")
    name = next((name for word, name in _FORMATS if word in words), None)
    if name is None:
        raise NotModelled(f"the weight format {row['quant']!r} is not modelled")
    if words == "fp8" and row["model"].startswith("Qwen/"):
        name = "fp8-block"  # Qwen's own FP8 checkpoints
    return spec, name


def _settings(
    row: Row, engine: SpeedEngine, spec: ModelSpec, card: Gpu, tp: int, quantization: str | None, longest: int
) -> tuple[ServingSettings, tuple[str, ...]]:
    assumed = []
    words = row["quant"].lower()
    version = None
    if engine == "vllm-v0":
        version = "0.7"
    elif engine == "vllm" and re.match(r"v?\d+\.\d+", row["engine_version"]):
        version = ".".join(map(str, parse_version(row["engine_version"])))
    elif engine == "vllm":
        version = "0.11"
        assumed.append("vLLM 0.11")
    else:
        version = "0.11"  # the memory of other engines is taken as vLLM's: the rest is what they leave, about the same
    eight_bit_cache = "kv cache fp8" in words or "fp8 kv" in words
    if words in ("fp8/fp8", "fp4/nvfp4") and not (spec.architecture == "gpt_oss" and card.capability[0] < 10):
        eight_bit_cache = True
        assumed.append("FP8 KV cache, as in ModelOpt's checkpoints")
    seqs, batched = _flag(row, "max-num-seqs"), _flag(row, "max-num-batched-tokens")
    limit = re.search(r"max_num_seqs=(\d+)", row["batch_or_concurrency"])
    if limit:
        seqs = int(limit[1])
    if engine in OTHER_SEQUENCES:
        seqs, batched = 256, batched or 8192  # of these alone does the memory that they leave depend
        assumed.append(f"{OTHER_SEQUENCES[engine]:,} sequences and {batched:,} tokens a step")
    return (
        ServingSettings(
            max_model_len=max(4096, min(spec.max_context, 2 * longest), longest + 64),
            max_num_seqs=seqs,
            max_num_batched_tokens=max(batched, seqs) if batched and seqs else batched,
            tensor_parallel_size=tp,
            quantization=quantization,
            kv_cache_dtype="fp8" if eight_bit_cache else "auto",
            engine_version=version,
        ),
        tuple(assumed),
    )


def _flag(row: Row, name: str) -> int | None:
    """A limit from the row's label, else from its command where the section does not vary it."""
    label = re.search(rf'label="[^"]*--{name}[= ](\d+)', row["notes"])
    if label:
        return int(label[1])
    command = re.search(rf'cmd="[^"]*--{name}[= ](\d+)', row["notes"])
    return int(command[1]) if command and "Tuning" not in row["notes"] else None


def _link(card: Gpu, tp: int) -> Link | None:
    """The card's own NVLink where it has one, else its PCIe lanes: rows do not say more."""
    if tp == 1:
        return None
    if card.link.startswith("nvlink") and card.link_bytes_per_s and "pcie" not in card.name:
        return Link(kind="nvlink", bytes_per_s=card.link_bytes_per_s)
    return Link(kind="pcie", bytes_per_s=card.pcie_bytes_per_s)


def _rate(row: Row) -> float | None:
    """Requests a second that are sent, None for loops and bursts. A rate above all that any server does is a burst."""
    text = row["request_rate"].strip()
    rate = float(text) if re.fullmatch(r"[0-9]+(\.[0-9]+)?", text) else None
    if rate == 0:
        raise PlannerError("a rate of 0 requests a second measures nothing: state the rate")
    return rate if rate is not None and rate < BURST_PER_S else None


Lengths = tuple[tuple[int, ...], tuple[int, ...], int | None, tuple[str, ...]]


def _load(row: Row, measured: Mapping[str, tuple[str, float]]) -> Lengths:
    """Prompt and output lengths of every request, the clients of a closed loop, and what had to be assumed."""
    notes, batch = row["notes"], row["batch_or_concurrency"].strip()
    prompt, output = _whole(row["input_len"]), _whole(row["output_len"])
    totals = re.search(
        r"(?:prompts=|ShareGPT )(\d+).*?total_input_tokens=(\d+)[;,] total_(?:generated_tokens|generated|output)=(\d+)",
        notes,
    )
    clients = _whole(batch)
    if clients == 0:
        raise PlannerError("a benchmark with 0 clients measures nothing: state its concurrency")
    assumed: list[str] = []
    if totals:
        count = int(totals[1])
        means = int(totals[2]) / max(count, 1), int(totals[3]) / max(count, 1)
    elif "sharegpt" in notes.lower():
        count, means = 1000, SHAREGPT_MEANS
        assumed.append("the usual 1,000 requests of ShareGPT")
    elif "decode_tok_s_single_stream" in measured or (
        clients == 1 and row["request_rate"] == "" and prompt is not None
    ):
        if not output:
            raise NotModelled("a run that generates nothing measures prompts alone, by another engine's clock")
        if prompt is None:
            assumed.append("a prompt of one token")
        return (max(prompt or 1, 1),), (output,), 1, tuple(assumed)
    elif prompt and output:
        means = float(prompt), float(output)
        requests, printed = measured.get("req_s"), measured.get("output_tok_s_total")
        if requests and printed and row["request_rate"] == "inf":
            means = means[0], min(means[1], printed[1] / requests[1])  # what was generated, by its own figures
        offline = re.match(r"(\d+) (?:requests|prompts)", batch)
        if offline:
            count, clients = int(offline[1]), None
        elif clients and row["request_rate"] == "closed loop":
            count = clients * (WAVES if clients <= MANY_CLIENTS else FEW_WAVES)
            assumed.append(f"{count // clients} requests a client")
            low, high = (0.8, 1.0) if re.search(r"source_file=20\d\d-\d\d-\d\d", notes) else (0.9, 1.1)
            if row["engine"] == "SGLang":
                low = high = 1.0  # prompts first: clients that start together stay together
            return (
                *_spread(means, count, low, high),
                clients,
                (*assumed, f"lengths from {low:g} to {high:g} of the stated"),
            )
        elif _rate(row) is not None:
            stated = re.search(r"(\d+) prompts", notes)
            count = int(stated[1]) if stated else RATED_REQUESTS
            return (
                *_spread(means, count, 0.9, 1.1),
                None,
                (f"{count} requests, lengths from 0.9 to 1.1 of the stated",),
            )
        elif clients and re.search(r"requests at once|prefill-dominated", notes):
            count, clients = clients, None
        elif clients and row["request_rate"] == "inf":
            stated = re.search(r"(\d+) prompts", notes)
            count = int(stated[1]) if stated else clients * FEW_WAVES
            return (*_spread(means, count, 0.9, 1.1), clients, ("lengths from 0.9 to 1.1 of the stated",))
        else:
            raise NotModelled("how its requests arrive is not stated")
    else:
        raise NotModelled("the lengths of its requests are not stated")
    if count < 1 or count > 100_000 or min(means) < 0.5:
        raise PlannerError("the row's number of requests or their lengths are not those of a benchmark")
    if "sharegpt" in notes.lower() and means[0] < 1000 and "random" not in notes:
        assumed.append("ShareGPT's spread of lengths")
        return (
            _lognormal(count, means[0], SHAREGPT_SPREAD[0], SHAREGPT_LONGEST[0], 1),
            _lognormal(count, means[1], SHAREGPT_SPREAD[1], SHAREGPT_LONGEST[1], 2),
            clients,
            tuple(assumed),
        )
    lengths = tuple(max(1, round(mean)) for mean in means)
    return (lengths[0],) * count, (lengths[1],) * count, clients, tuple(assumed)


SHAREGPT_MEANS = (217.0, 200.0)  # tokens, as the benchmarks with Qwen's and Llama-3's tokenizers print them
SHAREGPT_SPREAD = (1.4, 1.0)  # of the logarithm
SHAREGPT_LONGEST = (1024, 1200)  # the benchmark's filter cuts prompts at 1,024 tokens, and both together at 2,048


@cache
def _lognormal(count: int, mean: float, sigma: float, longest: int, seed: int) -> tuple[int, ...]:
    """Quantiles of a log-normal between 4 and `longest` with that mean, shuffled."""
    shape_of = [exp(sigma * NormalDist().inv_cdf((i + 0.5) / count)) for i in range(count)]
    low, high = 1e-3, float(longest)
    for _ in range(60):
        scale = (low * high) ** 0.5
        if sum(min(max(4.0, scale * x), longest) for x in shape_of) / count < mean:
            low = scale
        else:
            high = scale
    lengths = [int(min(max(4.0, low * x), longest)) for x in shape_of]
    random.Random(seed).shuffle(lengths)
    return tuple(lengths)


def _spread(means: tuple[float, float], count: int, low: float, high: float) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Lengths drawn evenly from low to high of the stated ones: clients of a closed loop fall out of step."""
    draw = random.Random(7).uniform
    pairs = [(max(1, int(means[0] * draw(low, high))), max(2, int(means[1] * draw(low, high)))) for _ in range(count)]
    return tuple(p for p, _ in pairs), tuple(o for _, o in pairs)


# ------------------------------------------------------------------------------------------------------ the prediction


def replay(found: Benchmark, *, keep_steps: bool = False) -> tuple[Server, Served]:
    """The benchmark's requests through the scheduler of the server that it ran on."""
    running = found.server
    served = simulate(
        running.step,
        found.prompts,
        found.outputs,
        limits_of(found, running),
        arrivals=None if found.rate_per_s is None else _arrivals(len(found.prompts), found.rate_per_s),
        concurrency=found.concurrency,
        keep_steps=keep_steps,
    )
    return running, served


def _arrivals(count: int, rate_per_s: float) -> list[float]:
    draw = random.Random(11).expovariate
    return list(accumulate((draw(rate_per_s) for _ in range(count - 1)), initial=0.0))


def limits_of(found: Benchmark, running: Server) -> Limits:
    """The scheduler's limits. A benchmark did run, so the cache held its longest request, whatever is planned for."""
    longest = max(p + o for p, o in zip(found.prompts, found.outputs, strict=True))
    return replace(
        running.limits,
        kv_tokens=max(running.limits.kv_tokens, longest + 16),
        max_num_seqs=OTHER_SEQUENCES.get(found.engine, running.limits.max_num_seqs),
    )


def predicted(found: Benchmark) -> tuple[dict[str, float], bool]:
    """Every figure that a benchmark prints, in the units of the table, and whether the server was saturated."""
    running, served = replay(found)
    return figures(found, served, running.speeds.floor), saturated(found, served)


def figures(found: Benchmark, served: Served, floor_seconds: float) -> dict[str, float]:
    """What the clients of a replayed benchmark print: means of TTFT, TPOT and ITL in ms, and rates per second.

    TPOT is the mean over requests of (last - first token) / (output - 1), ITL the mean over all gaps.
    """
    count = len(found.prompts)
    gaps = [done - first for done, first in zip(served.done, served.first, strict=True)]
    longer = [(gap, output - 1) for gap, output in zip(gaps, found.outputs, strict=True) if output > 1]
    tokens = sum(found.outputs)
    result = {
        "ttft_ms_mean": 1e3
        * (sum(f - s for f, s in zip(served.first, served.sent, strict=True)) / count + floor_seconds),
        "output_tok_s_total": tokens / served.seconds,
        "decode_tok_s_single_stream": tokens / served.seconds,
        "total_tok_s": (tokens + sum(found.prompts)) / served.seconds,
        "req_s": count / served.seconds,
    }
    if longer:
        result["tpot_ms_mean"] = 1e3 * sum(gap / steps for gap, steps in longer) / len(longer)
        result["itl_ms"] = 1e3 * sum(gap for gap, _ in longer) / sum(steps for _, steps in longer)
    return result


def saturated(found: Benchmark, served: Served) -> bool:
    """Whether requests queue: all at once, sent faster than they are served, or more than QUEUED of a closed loop's
    clients wait for a first token."""
    if found.rate_per_s is not None:
        return len(found.prompts) / served.seconds < KEPT_UP * found.rate_per_s
    if found.concurrency is None:
        return True
    waited = sum(f - s for f, s in zip(served.first, served.sent, strict=True))
    return waited / served.seconds > QUEUED * found.concurrency


_INTERVALS = {"TTFT": "ttft", "TPOT": "itl", "ITL": "itl", "single stream": "itl", "throughput": "throughput"}


def _predictions(found: Benchmark) -> list[RowPrediction]:
    running, served = replay(found)
    check_light(found, running)
    values, queued = figures(found, served, running.speeds.floor), saturated(found, served)
    rows = []
    for metric, (name, value) in found.measured.items():
        if metric not in values:
            continue
        quantity = METRICS[metric]
        pair = compare(values[metric], value)
        factors = running.speed.factors(_INTERVALS[quantity])  # type: ignore[arg-type]
        if quantity == "TTFT" and queued:
            quantity = "TTFT (saturated)"
        rows.append(
            RowPrediction(
                id=name,
                model=found.spec.name,
                setting=f"{found.label}, {found.settings.model_dump_json(exclude_defaults=True)}",
                assumed=found.assumed,
                quantities={quantity: pair},
                groups={"source": found.source, "GPU": found.card.name, "engine": found.engine},
                inside=values[metric] * factors.low <= value <= values[metric] * factors.high,
            )
        )
    return rows


def _check_littles_law(found: Benchmark) -> None:
    """Refuses a closed loop whose own figures say that far fewer requests were in flight than it had clients."""
    needed = [found.measured.get(name) for name in ("req_s", "ttft_ms_mean", "tpot_ms_mean")]
    if found.concurrency is None or None in needed:
        return
    rate, ttft, tpot = (pair[1] for pair in needed if pair is not None)
    mean_output = sum(found.outputs) / len(found.outputs)
    in_flight = rate * (ttft + (mean_output - 1) * tpot) / 1e3
    if in_flight < 0.5 * found.concurrency:
        raise NotModelled(
            "by Little's law its own figures leave less than half of the stated clients in flight: its load is another"
        )


def check_light(found: Benchmark, running: Server) -> None:
    """Refuses a closed loop whose TPOT is below what the data sheet's rates allow at that load, with LIGHT of them."""
    tpot = found.measured.get("tpot_ms_mean")
    if tpot is None or found.concurrency is None:
        return
    ideal = simulate(
        quick_step(running.work, ideal_speeds(running)),
        found.prompts,
        found.outputs,
        replace(running.limits, kv_tokens=float("inf")),
        concurrency=found.concurrency,
    )
    limit = figures(found, ideal, 0.0)["tpot_ms_mean"]
    if tpot[1] < limit / LIGHT:
        raise NotModelled(
            f"its TPOT is within {1 - LIGHT:.0%} of what the data sheet allows at that load: its prompts were cached,"
            " or fewer ran at a time"
        )


def ideal_speeds(running: Server) -> Speeds:
    """The data sheet's rates without any overhead."""
    card = running.card
    narrow = matmul_peak(card, running.speed.kernel)
    rate = card.bandwidth_bytes_per_s
    return Speeds(
        weight_bytes=rate, head_bytes=rate, expert_bytes=rate, kv_bytes=rate, elementwise_bytes=float("inf"),
        dense_flops=narrow, head_flops=narrow, expert_flops=narrow, attention_flops=float("inf"), ramp_tokens=0,
        step=0.0, layer=0.0, mixed=0.0, sequence=0.0, link_latency=0.0, link_bytes=float("inf"), floor=0.0,
    )  # fmt: skip
