"""Write training_trace.csv: peak allocated bytes of one training step, traced with planner.trace on fake tensors.

    python tests/oracles/training_trace.py [--only qwen3-8b] [--out tests/oracles/training_trace.csv]

Needs the extra `trace`. The model configs are those of planner/catalog/models.json. A row that is there already, traced
with the same versions, is kept, so an interrupted run goes on where it stopped; delete the file to trace all anew.
"""

from __future__ import annotations

import argparse
import csv
import itertools
import json
import os
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

from planner.errors import PlannerError
from planner.trace import COMPONENTS, library_versions, trace_training

HERE = Path(__file__).parent
CATALOG = HERE.parents[1] / "planner" / "catalog" / "models.json"
DENSE = ("llama-3.1-8b", "qwen3-8b", "qwen3-0.6b", "phi-4", "gemma-3-4b")
SEQUENCES = (512, 2048, 8192, 32768)
MOMENTS = ("forward", "loss_forward", "loss_backward", "backward", "optimizer_step")
DEFAULTS: dict[str, Any] = {
    "method": "lora",
    "base_dtype": "bf16",
    "adapter_dtype": "fp32",
    "autocast": True,
    "kbit_prepare": False,
    "gradient_checkpointing": True,
    "loss": "chunked",
    "attention": "flash",
    "optimizer": "adamw_torch_fused",
    "lora_rank": 16,
    "target_modules": "all-linear",
    "micro_batch": 1,
    "seq_len": 2048,
    "accumulate": False,
}
METHODS: dict[str, dict[str, Any]] = {
    "full in bf16": {"method": "full", "autocast": False},
    "full, fp32 masters": {"method": "full", "base_dtype": "fp32"},
    "lora": {"method": "lora"},
    "qlora as TRL does it": {"method": "qlora", "adapter_dtype": "bf16"},
}
RESULTS = (
    "peak_bytes",
    "peak_instant",
    "peak_layer",
    "peak_operation",
    *(f"peak_{name}" for name in COMPONENTS),
    "end_of_forward_saved",
    "end_of_forward_logits",
    *(f"{moment}_bytes" for moment in MOMENTS),
    "parameters",
    "trainable_parameters",
    "depth",
    "layers_traced",
    "seconds",
    "versions",
)
COLUMNS = ("model", *DEFAULTS, *RESULTS)


def settings() -> Iterator[tuple[str, dict[str, Any]]]:
    """(model, what differs from DEFAULTS) of every row."""
    grid = list(itertools.product(METHODS.values(), (True, False), ("chunked", "hf"), SEQUENCES))
    for model in DENSE:
        for method, checkpointing, loss, length in grid:
            yield model, {**method, "gradient_checkpointing": checkpointing, "loss": loss, "seq_len": length}
    yield from _variants()
    for checkpointing, length in itertools.product((True, False), SEQUENCES):
        common = {"gradient_checkpointing": checkpointing, "seq_len": length}
        for method in ("full in bf16", "lora", "qlora as TRL does it"):  # grouped products have no fp32 weights
            yield "qwen3-30b-a3b", {**METHODS[method], **common}
        yield "mistral-7b-v0.3", common
        yield "mistral-7b-v0.3", {"loss": "hf", **common}
        for model in ("llama-3.1-8b", "qwen3-8b"):
            yield model, {"loss": "none", **common}
            yield model, {"method": "dora", **common}


def _variants() -> Iterator[tuple[str, dict[str, Any]]]:
    """One thing changed at a time, on two models and both ways of checkpointing."""
    attention_only = {"target_modules": ["q_proj", "v_proj"]}
    changes: list[dict[str, Any]] = [
        {"lora_rank": 64},
        {"micro_batch": 4},
        {"micro_batch": 4, "loss": "hf"},
        {"adapter_dtype": "bf16"},
        {"adapter_dtype": "bf16", "autocast": False},
        {"autocast": False},
        attention_only,
        {"accumulate": True},
        {"base_dtype": "fp32"},
        {"attention": "eager"},
        {"attention": "math"},
        {"method": "qlora", "adapter_dtype": "fp32"},
        {"method": "qlora", "kbit_prepare": True},
        {"method": "qlora", "kbit_prepare": True, "adapter_dtype": "bf16"},
        {"method": "qlora", "adapter_dtype": "bf16", **attention_only},
        {"optimizer": "sgd"},
        {"optimizer": "adamw_torch"},
        *({**METHODS["full in bf16"], "optimizer": name} for name in ("adamw_torch", "adamw_torch_single", "sgd")),
        *({**METHODS["full, fp32 masters"], "optimizer": name} for name in ("adamw_torch", "sgd")),
        {**METHODS["full in bf16"], "autocast": True},
        {**METHODS["full in bf16"], "accumulate": True},
        {**METHODS["full, fp32 masters"], "accumulate": True},
    ]
    for model, change, checkpointing in itertools.product(("llama-3.1-8b", "qwen3-8b"), changes, (True, False)):
        yield model, {**change, "gradient_checkpointing": checkpointing}


def trace_row(model: str, config: dict[str, Any], setting: dict[str, Any]) -> dict[str, Any]:
    """One row of the table. Raises PlannerError where the step cannot be traced."""
    trace = trace_training(config, **setting)
    found = trace.model_dump()
    return {
        **key(model, setting),
        **{name: found.get(name) for name in RESULTS},
        **{f"peak_{name}": getattr(trace.peak, name) for name in COMPONENTS},
        "end_of_forward_saved": trace.end_of_forward.saved + trace.end_of_forward.weight_casts,
        "end_of_forward_logits": trace.end_of_forward.logits,
        **{f"{moment}_bytes": trace.instants[moment].total for moment in MOMENTS if moment in trace.instants},
        "layers_traced": "+".join(map(str, trace.layers_traced)),
        "versions": versions(),
    }


def versions() -> str:
    return " ".join(f"{name} {version}" for name, version in library_versions().items())


def key(model: str, setting: dict[str, Any]) -> dict[str, str]:
    """The columns that say what was traced, as text."""
    targets = setting["target_modules"]
    shown = {**setting, "target_modules": targets if isinstance(targets, str) else " ".join(targets)}
    return {"model": model, **{name: str(shown[name]) for name in DEFAULTS}}


def identify(row: dict[str, str]) -> tuple[str, ...]:
    """What a row is about: its model and every setting."""
    return tuple(row[name] for name in ("model", *DEFAULTS))


def read(path: Path, versions: str) -> dict[tuple[str, ...], dict[str, Any]]:
    """The rows of a table that were traced with these versions."""
    if not path.exists():
        return {}
    with path.open(newline="") as table:
        return {identify(row): row for row in csv.DictReader(table) if row["versions"] == versions}


def write(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    temporary = path.with_suffix(".tmp")
    with temporary.open("w", newline="") as table:
        writer = csv.DictWriter(table, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    temporary.replace(path)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=HERE / "training_trace.csv")
    parser.add_argument("--only", help="trace the missing rows of this model alone")
    options = parser.parse_args()
    configs = {entry["name"]: entry["config"] for entry in json.loads(CATALOG.read_text())["models"]}
    wanted = {identify(key(model, {**DEFAULTS, **change})): (model, change) for model, change in settings()}
    rows = {identity: row for identity, row in read(options.out, versions()).items() if identity in wanted}
    write(options.out, rows.values())
    failures = 0
    for identity, (model, change) in wanted.items():
        if identity in rows or (options.only and options.only != model):
            continue
        try:
            row = trace_row(model, configs[model], {**DEFAULTS, **change})
        except PlannerError as error:
            failures += 1
            print(f"{model} {change}: {error}", file=sys.stderr)
            continue
        rows[identity] = row
        with options.out.open("a", newline="") as table:  # at once: a trace of hundreds of rows may be interrupted
            csv.DictWriter(table, COLUMNS, lineterminator="\n").writerow(row)
        print(
            f"{model:18s} {row['peak_bytes']:>15,} {row['peak_instant']:14s} {row['seconds']:6} s  {change}", flush=True
        )
    write(options.out, (rows[identity] for identity in wanted if identity in rows))
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
