"""Published training speeds against the plan: a row becomes a run, the run a speed, the speed an error."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import NamedTuple

from pydantic import ValidationError

from planner.catalog.hardware import Gpu, gpu
from planner.catalog.training_speed import card_family, speed_constants
from planner.errors import NotModelled, PlannerError
from planner.memory.training import FinetuneSettings, training_memory
from planner.model import ModelSpec
from planner.performance.training import TrainingSpeed, training_speed
from planner.validate import RowPrediction, Validation, compare, number, predict_all
from planner.validate_finetune import COLUMNS as MEMORY_COLUMNS
from planner.validate_finetune import MEMORY_REFUSALS, grade_of, settings_of, shape_of, targets_of

QUANTITY = "tokens_per_s_per_gpu"
COLUMNS = (*MEMORY_COLUMNS, QUANTITY, "mfu", "other_throughput")

# Selective checkpointing and fms-fsdp's pre-training have a speed although their memory is not modelled.
SPEED_REFUSALS: Mapping[str, Mapping[str, str]] = {
    **MEMORY_REFUSALS,
    "framework": {k: v for k, v in MEMORY_REFUSALS["framework"].items() if "torchtitan" not in k},
    "parallelism": {
        **MEMORY_REFUSALS["parallelism"],
        r"device_map": "naive model parallelism (device_map) keeps all GPUs but one idle; not modelled",
    },
    "grad_checkpointing": {},
}


class SpeedRow(NamedTuple):
    """A row in our words. measured: tokens a second on each GPU; recomputed: None where settings say it."""

    spec: ModelSpec
    settings: FinetuneSettings
    card: Gpu
    link_bytes_per_s: float | None
    compiled: bool
    recomputed: float | None
    measured: float
    grade: str
    source: str
    assumed: tuple[str, ...]


def source_of(row: Mapping[str, str]) -> str:
    """The project a row comes from: the repository's name, whatever its owner, file and commit.

    Rows of one project share a harness, a cluster and a habit, so that leaving out one file of it leaves out nothing.
    """
    match = re.search(r"github(?:\.com)?[:/]+[\w.-]+/([\w.-]+?)(?:@|/|:|\s|$)", row["source"])
    return match[1] if match else (row["source"].split() or ["unnamed"])[0]


def speed_row(row: Mapping[str, str]) -> SpeedRow:
    """A row's run and its measured speed; NotModelled or PlannerError says why there is none."""
    try:
        return _speed_row(row)
    except ValidationError as error:  # a cell that no trainer would take, such as a sequence of 0 tokens
        field = ".".join(str(part) for part in error.errors()[0]["loc"])
        raise PlannerError(f"the row's {field} is not a value that a trainer takes") from error


def _speed_row(row: Mapping[str, str]) -> SpeedRow:
    if re.search(r"CAUTION speed", row["notes"]):
        raise NotModelled("the table's own note says that its speed is not plausible or its lengths vary")
    plain, recomputed, assumed = _plain(row)
    settings = settings_of(plain, SPEED_REFUSALS)
    accumulation = _accumulation(row)
    settings = settings.model_copy(update={"gradient_accumulation_steps": accumulation})
    if re.search(r"fms-fsdp|torchtitan", row["framework"], re.I):
        settings = settings.model_copy(update={"trainer": "torchtune", "autocast": False})
    card, notes = _card(row["gpu"])
    spec = shape_of(row["model"])
    if not settings.optimizer and settings.method == "full" and _state_is_too_large(spec, settings, card):
        raise NotModelled("its optimizer is not stated, and the usual one does not fit that GPU")
    if settings.method != "full":
        settings = settings.model_copy(update={"lora_targets": targets_of(row, spec)})
    return SpeedRow(
        spec=spec,
        settings=settings,
        card=card,
        link_bytes_per_s=_link(row, card, settings),
        compiled="compile" in f"{row['notes']} {row['framework']}".lower(),
        recomputed=recomputed,
        measured=_measured(row, settings),
        grade=grade_of(row),
        source=source_of(row),
        assumed=(*assumed, *notes),
    )


def speed_of(found: SpeedRow) -> TrainingSpeed:
    """The prediction for a row."""
    return training_speed(
        found.spec,
        found.settings,
        found.card,
        link_bytes_per_s=found.link_bytes_per_s,
        compiled=found.compiled,
        recomputed=found.recomputed,
    )


def validate_training(rows: Iterable[Mapping[str, str]]) -> Validation:
    """Predict every row's training speed and compare; what cannot be predicted is refused with a reason.

    Quantities: `tokens_per_s_per_gpu` of grade A rows, with `_grade_b` and so on for others.
    """
    return predict_all(rows, _row_prediction)


def _row_prediction(row: Mapping[str, str]) -> RowPrediction:
    found = speed_row(row)
    speed = speed_of(found)
    rate = speed.tokens_per_s_per_gpu
    _check_plausible(found, speed)
    pair = compare(rate.expected, found.measured)
    suffix = "" if found.grade == "A" else f"_grade_{found.grade.lower()}"
    inside = rate.low <= found.measured <= rate.high
    s = found.settings
    return RowPrediction(
        id=row["id"],
        model=row["model"],
        setting=f"{s.method} {s.micro_batch} x {s.seq_len}, {s.parallelism} on {s.n_gpus} {found.card.name},"
        f" loss {s.loss or 'default'}{', compiled' if found.compiled else ''}",
        assumed=found.assumed,
        quantities={f"{QUANTITY}{suffix}": pair},
        groups={"source": found.source, "GPU": found.card.name},
        inside=inside,
    )


IMPLAUSIBLE = 1.1  # times the best matmul that anybody measured on such a card


def _check_plausible(found: SpeedRow, speed: TrainingSpeed) -> None:
    """Refuses a row whose products alone would need more than the card's best rate: it is a sum, or another card."""
    products = sum(p.seconds for p in speed.parts if p.name in ("forward", "backward", "recomputation"))
    tokens = speed.tokens_per_micro_batch * found.settings.gradient_accumulation_steps
    needed = products * speed.matmul_fraction * found.measured / tokens
    if needed > IMPLAUSIBLE * card_family(found.card.name).matmul_cap:
        raise NotModelled("its products alone would need more than the best rate that was measured on that GPU")


def _plain(row: Mapping[str, str]) -> tuple[dict[str, str], float | None, tuple[str, ...]]:
    """The row with its checkpointing and sharding in the words that settings_of knows; what of it was assumed."""
    cells, assumed = dict(row), []
    recomputed = None
    text = row["grad_checkpointing"].strip().lower()
    if text.startswith("no ac"):
        cells["grad_checkpointing"] = "false"
    elif text.startswith("selective"):
        cells["grad_checkpointing"], recomputed = "true", speed_constants()["selective_recomputation"]
        assumed.append("selective checkpointing repeats half of the forward")
    elif "implies off" in text:
        cells["grad_checkpointing"] = "false"
        assumed.append("gradient checkpointing is off")
    elif not text and re.search(r"gradient checkpointing is [\w-]+ default true", row["notes"], re.I):
        cells["grad_checkpointing"] = "true"
        assumed.append("gradient checkpointing is on by default")
    if row["parallelism"].strip().lower() == "hsdp":
        cells["parallelism"] = "fsdp"
        assumed.append("hybrid sharding exchanges within a machine alone")
    if not row["lora_rank"].strip() and not row["method"].startswith("full"):
        assumed.append("LoRA rank 16")
    return cells, recomputed, tuple(assumed)


def _state_is_too_large(spec: ModelSpec, settings: FinetuneSettings, card: Gpu) -> bool:
    memory = training_memory(spec, settings, supports_bf16=card.supports_bf16)
    state = sum(
        part.expected_bytes for part in memory.estimate.components if part.name in ("weights", "optimizer state")
    )
    return state > card.usable_bytes


_PER_ITERATION = re.compile(r"(\d+(?:\.\d+)?) s/it \(it = optimizer step, GA=(\d+)\)")


def _accumulation(row: Mapping[str, str]) -> int:
    match = _PER_ITERATION.search(row["other_throughput"]) or re.search(r"()\bGA=(\d+)", row["notes"])
    return max(1, int(match[2])) if match else 1


def _measured(row: Mapping[str, str], settings: FinetuneSettings) -> float:
    """Tokens a second on each GPU: as printed, from seconds an optimizer step, or from a total over stated GPUs."""
    text = row[QUANTITY].strip()
    if re.fullmatch(r"[0-9][0-9,]*(\.[0-9]+)?", text) and (printed := number(text)):
        return printed
    per_iteration = _PER_ITERATION.search(row["other_throughput"])
    tokens = settings.seq_len * settings.micro_batch
    if per_iteration and float(per_iteration[1]) > 0 and int(per_iteration[2]):
        return tokens * int(per_iteration[2]) / float(per_iteration[1])
    total = re.search(r"([\d,]+) tokens/s on (\d+)", row["other_throughput"])
    if total and int(total[2]) and (summed := number(total[1])):
        return summed / int(total[2])
    if re.search(r"samples|epoch|iteration|seconds used|fixed number of steps", row["other_throughput"]):
        raise NotModelled("its samples vary in length, and their tokens are not stated")
    raise NotModelled("no speed in tokens was measured")


# What a table may write for a card that the catalog calls otherwise; the first that is found is taken.
_UNCLEAR_CARDS = {r"\bh100\b": "h100-80-sxm", r"hopper": "h100-80-sxm", r"\bh200\b": "h200"}


def _card(text: str) -> tuple[Gpu, tuple[str, ...]]:
    """The card that a cell names, and what was assumed of it."""
    bare = re.sub(r"\([^)]*\)|\d+\s*Gbps", "", text).strip()
    if not bare:
        raise NotModelled("the GPU is not stated")
    for attempt in (text, bare):
        try:
            return gpu(attempt), ()
        except PlannerError:
            continue
    for pattern, name in _UNCLEAR_CARDS.items():
        if re.search(pattern, bare, re.I):
            return gpu(name), (f"{bare} is {name}",)
    return gpu(bare), ()


def _link(row: Mapping[str, str], card: Gpu, settings: FinetuneSettings) -> float | None:
    """The rate between the GPUs: the machines' network where a row states it and shards over it, else the link."""
    if settings.n_gpus == 1:
        return None
    network = re.search(r"(\d+)\s*Gbps", row["gpu"])
    if network and "hsdp" not in row["parallelism"].lower():
        return float(network[1]) / 8 * 1e9  # one ring a network card: together they carry the machine's whole rate
    return None if card.link_bytes_per_s is None else float(card.link_bytes_per_s)
