"""Predictions put beside published measurements, with the error of every quantity and a reason for every refusal."""

from __future__ import annotations

import csv
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from pydantic import Field, ValidationError

from planner import catalog
from planner.catalog.engines import engine, parse_version
from planner.catalog.hardware import gpu
from planner.errors import NotModelled, PlannerError
from planner.memory import serving_peak as peak
from planner.memory.eager import eager_memory
from planner.memory.serving import ServingMemory, ServingSettings, rank_layout, serving_memory
from planner.memory.serving_parts import loaded_bytes
from planner.memory.weights import weight_scheme
from planner.model import Frozen, ModelSpec
from planner.units import GIB

SERVING_COLUMNS = (
    "id",
    "engine",
    "engine_version",
    "model",
    "weight_dtype_or_quant",
    "kv_dtype",
    "gpu",
    "gpu_total_gib",
    "tp",
    "pp",
    "max_model_len",
    "gpu_mem_util",
    "max_num_batched_tokens",
    "max_num_seqs",
    "weights_gib_per_gpu",
    "activation_peak_gib",
    "non_torch_gib",
    "cuda_graph_gib",
    "kv_cache_gib_per_gpu",
    "kv_tokens",
    "gpu_blocks",
    "block_size",
    "total_used_gb",
    "input_len",
)
ASSUMED_VERSION = {"V0": "0.7", "V1": "0.19"}  # for rows that do not state one
GENERATED_TOKENS = 2048  # of the published transformers speed benchmark, whose rows carry no output length
CONTRADICTION_GIB = 1.0  # printed terms add up to 0.3 GiB in every log that is not a mistake
Row = Mapping[str, str]


class Compared(Frozen):
    """A predicted and a measured figure; error_pct = (predicted / measured - 1) * 100."""

    predicted: float
    measured: float
    error_pct: float


class RowPrediction(Frozen):
    """One measured row.

    quantities: what was compared; assumed: what the row does not say; withheld: why its KV cache was not compared
    groups: by what the errors are told apart as well (source, GPU); inside: the stated range holds what was measured
    """

    id: str
    model: str
    setting: str
    assumed: tuple[str, ...]
    quantities: dict[str, Compared]
    withheld: str = ""
    groups: dict[str, str] = Field(default_factory=dict)
    inside: bool | None = None


class Refusal(Frozen):
    id: str
    reason: str


class QuantityError(Frozen):
    """Errors of one quantity over distinct rows, in percent, without their sign."""

    quantity: str
    rows: int
    median_abs_pct: float
    p90_abs_pct: float
    max_abs_pct: float
    worst_row: str


class GroupError(QuantityError):
    """Errors of one quantity in one group: `by` is what the rows are told apart by, `group` which of them."""

    by: str
    group: str


class Validation(Frozen):
    """rows read; predictions and refusals of them; errors by quantity (replicates counted once), and by group."""

    rows: int
    predictions: tuple[RowPrediction, ...]
    refusals: tuple[Refusal, ...]
    errors: tuple[QuantityError, ...]
    grouped: tuple[GroupError, ...] = ()

    @property
    def predicted(self) -> int:
        return len(self.predictions)

    @property
    def refused(self) -> int:
        return len(self.refusals)

    @property
    def refusal_reasons(self) -> dict[str, int]:
        return dict(Counter(refusal.reason for refusal in self.refusals).most_common())

    def error(self, quantity: str) -> QuantityError:
        """The errors of that quantity; PlannerError when no row measured it."""
        for entry in self.errors:
            if entry.quantity == quantity:
                return entry
        raise PlannerError(f"no row compares {quantity!r}: ask for one of {', '.join(e.quantity for e in self.errors)}")


def load_rows(path: str | Path, columns: Iterable[str] = SERVING_COLUMNS) -> list[dict[str, str]]:
    """The rows of a CSV of measurements; PlannerError when it cannot be read or lacks columns."""
    try:
        with Path(path).open(newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file)
            missing = [name for name in columns if name not in (reader.fieldnames or ())]
            if missing:
                raise PlannerError(f"{path} lacks the columns {', '.join(missing)}: add them, empty where unknown")
            return [{name: value or "" for name, value in row.items() if name is not None} for row in reader]
    except (OSError, UnicodeDecodeError) as error:
        raise PlannerError(f"{path} cannot be read as a CSV file ({error}): give the path of a table") from error


def summarise(predictions: Iterable[RowPrediction], refusals: Iterable[Refusal], rows: int) -> Validation:
    """Errors by quantity: median, 90th percentile (linear interpolation) and largest, over distinct settings."""
    kept, seen = tuple(predictions), set()
    found: dict[tuple[str, str, str], list[tuple[float, str]]] = {}
    for prediction in kept:
        for name, pair in prediction.quantities.items():
            key = (prediction.setting, name, round(pair.measured, 3))
            if key in seen:
                continue
            seen.add(key)
            for by, group in (("", ""), *prediction.groups.items()):
                found.setdefault((by, group, name), []).append((abs(pair.error_pct), prediction.id))
    errors = [_error(name, values) for (by, _, name), values in found.items() if not by]
    grouped = [
        GroupError(by=by, group=group, **_error(name, values).model_dump())
        for (by, group, name), values in sorted(found.items())
        if by
    ]
    return Validation(
        rows=rows, predictions=kept, refusals=tuple(refusals), errors=tuple(errors), grouped=tuple(grouped)
    )


def _error(quantity: str, values: list[tuple[float, str]]) -> QuantityError:
    sizes = sorted(value for value, _ in values)
    return QuantityError(
        quantity=quantity,
        rows=len(sizes),
        median_abs_pct=_percentile(sizes, 0.5),
        p90_abs_pct=_percentile(sizes, 0.9),
        max_abs_pct=sizes[-1],
        worst_row=max(values)[1],
    )


def within_range(validation: Validation, quantity: str | None = None) -> float | None:
    """The share of rows (of one quantity, or of all) whose stated range holds what was measured; None without any."""
    told = [
        row.inside
        for row in validation.predictions
        if row.inside is not None and (quantity is None or quantity in row.quantities)
    ]
    return sum(told) / len(told) if told else None


def _percentile(ordered: list[float], share: float) -> float:
    place = share * (len(ordered) - 1)
    low = int(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (place - low)


def compare(predicted: float, measured: float) -> Compared:
    return Compared(predicted=predicted, measured=measured, error_pct=(predicted / measured - 1) * 100)


# --------------------------------------------------------------------------------------------------------- serving


def validate_serving(rows: Iterable[Row]) -> Validation:
    """Predictions for published serving measurements (vLLM start-up logs and transformers runs).

    A row's own GPU total wins over the catalog's. What a row does not say is vLLM's default for that version and card
    and is listed in `assumed`. Refused: unknown shapes, cards whose usable memory is not known, other engines.
    """
    return predict_all(rows, _predict)


def predict_all(rows: Iterable[Row], predict: Callable[[Row], RowPrediction]) -> Validation:
    """Every row's prediction, or the reason why it is refused."""
    predictions, refusals = [], []
    for row in rows:
        try:
            predictions.append(predict(row))
        except PlannerError as error:
            refusals.append(Refusal(id=row.get("id", ""), reason=str(error)))
    return summarise(predictions, refusals, len(predictions) + len(refusals))


def _predict(row: Row) -> RowPrediction:
    try:
        return _predict_engine(row)
    except ValidationError as error:  # a cell that vLLM itself would not take, such as a utilization of 1.2
        field = ".".join(str(part) for part in error.errors()[0]["loc"])
        raise PlannerError(f"the row's {field} is not a value that vLLM takes") from error


def _predict_engine(row: Row) -> RowPrediction:
    name = row["engine"].strip()
    if name.lower().startswith("vllm"):
        return _predict_vllm(row)
    if "transformers" in name.lower():
        return _predict_eager(row)
    raise NotModelled(f"{name or 'an unnamed engine'} is not modelled: vLLM and transformers are")


def number(cell: str | None) -> float | None:
    """The first number of a cell such as `0.85 (mem-fraction-static)` or `28.08 GB`; None when there is none."""
    match = re.search(r"-?\d[\d,]*\.?\d*", cell or "")
    value = float(match[0].replace(",", "")) if match else None
    return value if value is not None and abs(value) < 1e15 else None


def _whole(cell: str | None) -> int | None:
    value = number(cell)
    return None if value is None else int(value)


def shape(name: str) -> ModelSpec:
    """The catalog's shape for a name as logs write it: with remarks in brackets, or one word among others."""
    bare = re.sub(r"\s*\(.*?\)", "", name).strip()
    tries = [bare, re.sub(r"[()]", "", name).strip(), *(word for word in bare.split() if len(word) > 5 and "-" in word)]
    for attempt in tries[1:]:
        try:
            return catalog.model(attempt)
        except PlannerError:
            continue
    return catalog.model(bare)


def _spec(row: Row) -> tuple[ModelSpec, str | None]:
    """The model's shape, and the format to ask for when the catalog's shape is 16-bit but the row is not."""
    spec = shape(row["model"])
    words = f"{row['weight_dtype_or_quant']} {row['model']}".lower()
    if spec.quantization is not None:
        return spec, None
    eight = "int8" in words or "8-bit" in words
    formats = (
        ("mxfp4", "mxfp4"),
        ("awq", "awq"),
        ("gptq", "gptq-8bit" if eight else "gptq"),
        ("bitsandbytes", "bitsandbytes"),
        ("bnb", "bitsandbytes"),
        ("nf4", "bitsandbytes"),
        ("w4a16", "w4a16"),
        ("w8a8", "w8a8"),
        ("fp8-dynamic", "fp8-dynamic"),
        ("fp8 (block", "fp8-block"),
        ("fp8", "fp8"),
    )
    asked = next((name for word, name in formats if word in words), None)
    if asked is None and ("4-bit" in words or "int4" in words):
        raise NotModelled("the row says 4-bit without the format: state awq, gptq or bitsandbytes")
    return spec, asked


def _device(row: Row) -> tuple[peak.Device | None, tuple[str, ...]]:
    """The card: its total from the row, else from the catalog; None when neither knows it."""
    printed = number(row["gpu_total_gib"])
    try:
        known = gpu(re.sub(r"\s*\(.*?\)", "", row["gpu"]).strip()) if row["gpu"].strip() else None
    except PlannerError:
        known = None
    if known is None and printed is None:
        return None, ()
    capability = known.capability if known is not None and known.is_cuda else (8, 6)
    usable = int(printed * GIB) if printed is not None else known.usable_bytes if known is not None else 0
    device = peak.Device(usable_bytes=usable, compute_capability=capability, name=row["gpu"])
    return device, () if printed is not None else ("GPU total from the catalog",)


def _version(row: Row) -> tuple[str, tuple[str, ...]]:
    """The version a row states, or the usual one of its engine generation; V0 releases of 0.8 count as 0.7."""
    generation = "V0" if "V0" in row["engine"] else "V1"
    if number(row["engine_version"]) is None or "." not in row["engine_version"]:
        return ASSUMED_VERSION[generation], (f"engine version {ASSUMED_VERSION[generation]}",)
    text = re.sub(r"(\d+\.\d+)\.x", r"\1", row["engine_version"])
    version = parse_version(text)
    if generation == "V0" and version >= (0, 8, 0):
        return ASSUMED_VERSION["V0"], ()
    return ".".join(map(str, version)), ()


def _settings(row: Row, spec: ModelSpec, asked: str | None) -> tuple[ServingSettings, tuple[str, ...]]:
    version, assumed = _version(row)
    tp = _whole(row["tp"])
    if tp is None:
        raise NotModelled("the row does not state the tensor parallel size")
    if "expert parallel" in row.get("notes", ""):
        raise NotModelled("experts spread by data and expert parallelism are not modelled")
    share = number(row["gpu_mem_util"])
    context = _whole(row["max_model_len"])
    batched, sequences = _whole(row["max_num_batched_tokens"]), _whole(row["max_num_seqs"])
    unsaid = {"gpu_memory_utilization": share, "max_model_len": context, "batch limits": batched or sequences}
    lora = re.search(r"max_loras\s*=\s*(\d+).*?rank\s*=?\s*(\d+)", row["weight_dtype_or_quant"])
    settings = ServingSettings(
        max_model_len=context or spec.max_context,
        max_num_seqs=sequences,
        max_num_batched_tokens=batched,
        gpu_memory_utilization=share,
        tensor_parallel_size=tp,
        pipeline_parallel_size=_whole(row["pp"]) or 1,
        quantization=asked,
        kv_cache_dtype="fp8" if row["kv_dtype"].lower().startswith("fp8") else "auto",
        block_size=_whole(row["block_size"]) or 16,
        enable_lora=lora is not None,
        max_loras=int(lora[1]) if lora else 1,
        max_lora_rank=int(lora[2]) if lora else 16,
        engine_version=version,
    )
    return settings, (*assumed, *(name for name, value in unsaid.items() if value is None))


def _predict_vllm(row: Row) -> RowPrediction:
    spec, asked = _spec(row)
    settings, assumed = _settings(row, spec, asked)
    device, from_catalog = _device(row)
    version = engine(settings.engine_version)
    scheme = weight_scheme(spec, asked)
    quantities: dict[str, Compared] = {}
    capability = device.compute_capability if device is not None else (9, 0)
    loaded = loaded_bytes(spec, settings, version, scheme, capability)
    _add(quantities, "weights_gib_per_gpu", loaded / GIB, number(row["weights_gib_per_gpu"]))
    measured_kv = number(row["kv_cache_gib_per_gpu"])
    tokens, sized = _measured_tokens(row), rank_layout(spec, settings)
    if measured_kv is not None and measured_kv > 0 and tokens:
        batch = settings.max_num_batched_tokens or version.small_batched_tokens
        blocks = int(measured_kv * GIB) // sized.bytes_per_block
        ours = sized.printed_tokens(blocks, settings.max_model_len, batch * version.concurrent_batches)
        if ours:
            _add(quantities, "kv_bytes_per_token", measured_kv * GIB / ours, measured_kv * GIB / tokens)
    withheld = ""
    if device is not None:
        answer = serving_memory(
            spec,
            settings,
            usable_bytes=device.usable_bytes,
            compute_capability=device.compute_capability,
            device_name=device.name,
        )
        withheld = _why_withheld(row, answer)
        _add_measured(quantities, row, answer, tokens, compare_cache=not withheld)
    if not quantities:
        missing = "its card's memory is not known" if device is None else "it prints no figure that is predicted"
        raise NotModelled(withheld or f"nothing to compare: {missing}")
    return RowPrediction(
        id=row["id"],
        model=spec.name,
        setting="|".join((spec.name, settings.model_dump_json(exclude={"max_model_len"}), str(device))),
        assumed=(*assumed, *from_catalog),
        quantities=quantities,
        withheld=withheld,
    )


def _why_withheld(row: Row, answer: ServingMemory) -> str:
    """Why a row cannot judge the size of the KV cache: its inputs are missing, or its own figures disagree."""
    if _version(row)[1]:
        return "the engine version, whose constants the KV cache depends on, is not stated"
    total, share = number(row["gpu_total_gib"]), number(row["gpu_mem_util"])
    weights, cache = number(row["weights_gib_per_gpu"]), number(row["kv_cache_gib_per_gpu"])
    peak_gib, other = number(row["activation_peak_gib"]), number(row["non_torch_gib"])
    if total and share and weights is not None and cache is not None:
        rest = total * share - weights - cache - (peak_gib or 0.0) - (other or 0.0)
        if rest < -CONTRADICTION_GIB or (peak_gib and other is not None and rest > CONTRADICTION_GIB):
            return f"the row's own terms miss its KV cache by {abs(rest):.1f} GiB"
    limits = number(row["max_num_seqs"]) or number(row["max_num_batched_tokens"])
    ours = answer.estimate.component("activation peak").expected_bytes / GIB
    if not limits and peak_gib and peak_gib > 2 * ours and peak_gib - ours > 1:
        return "the row does not state the batch limits that were raised: its peak is over twice that of the defaults"
    return ""


def _add_measured(
    quantities: dict[str, Compared], row: Row, answer: ServingMemory, tokens: int | None, *, compare_cache: bool
) -> None:
    for column, component in (
        ("activation_peak_gib", "activation peak"),
        ("non_torch_gib", "non-torch"),
        ("cuda_graph_gib", "CUDA graphs"),
    ):
        measured = number(row[column])
        if measured is not None and measured > 0:
            predicted = answer.estimate.component(component).expected_bytes / GIB
            _add(quantities, column.removesuffix("_gib"), predicted, measured)
    if not compare_cache:
        return
    measured = number(row["kv_cache_gib_per_gpu"])
    if measured is not None and measured > 0:
        _add(quantities, "kv_cache_bytes", answer.kv_bytes, measured * GIB)
    if tokens:
        _add(quantities, "kv_tokens", answer.kv_tokens, tokens)


def _measured_tokens(row: Row) -> int | None:
    """Tokens as printed, or blocks * block size as the V0 engine prints them."""
    tokens = _whole(row["kv_tokens"])
    if tokens:
        return tokens
    blocks, size = _whole(row["gpu_blocks"]), _whole(row["block_size"])
    return blocks * size if blocks and size else None


def _add(quantities: dict[str, Compared], name: str, predicted: float, measured: float | None) -> None:
    if measured:
        quantities[name] = compare(predicted, measured)


def _predict_eager(row: Row) -> RowPrediction:
    """A transformers run: torch's peak. Its tables print GiB and call them GB."""
    spec, asked = _spec(row)
    used, prompt = number(row["total_used_gb"]), _whole(row["input_len"])
    if used is None or prompt is None:
        raise NotModelled("a transformers row needs its memory and prompt length")
    estimate = eager_memory(spec, input_tokens=prompt, output_tokens=GENERATED_TOKENS, quantization=asked)
    return RowPrediction(
        id=row["id"],
        model=spec.name,
        setting=f"{spec.name}|{asked}|{prompt}",
        assumed=(f"{GENERATED_TOKENS} generated tokens",),
        quantities={"eager_total": compare(estimate.expected_bytes / GIB, used)},
    )


def as_table(validation: Validation) -> list[dict[str, Any]]:
    """One flat record for each compared quantity of each row, for CSV and JSON output."""
    return [
        {"id": p.id, "model": p.model, "quantity": name, **pair.model_dump()}
        for p in validation.predictions
        for name, pair in p.quantities.items()
    ]
