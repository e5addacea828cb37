"""The training peak against the oracle: one step of the real model, trainer and optimizer on torch's fake tensors.

tests/oracles/training_trace.csv is written by tests/oracles/training_trace.py with the versions its last column names.
The trace has no cuBLAS, whose workspaces are left out of the comparison.
"""

from __future__ import annotations

import csv
from functools import cache
from pathlib import Path

import pytest

from planner import catalog
from planner.memory.training import FinetuneSettings, TrainingMemory, training_memory
from planner.model import ModelSpec

ORACLE = Path(__file__).parents[1] / "oracles" / "training_trace.csv"
TOLERANCE = 0.02
NO_WORD = {"attention": "math", "optimizer": "adamw_torch_single"}
"""What the trace can run and a plan has no word for: sdpa's math kernel and AdamW one tensor at a time"""


@cache
def rows() -> list[dict[str, str]]:
    with ORACLE.open(newline="", encoding="utf-8") as file:
        every = list(csv.DictReader(file))
    return [row for row in every if all(row[column] != word for column, word in NO_WORD.items())]


@cache
def text_model(name: str) -> ModelSpec:
    """The decoder alone: a vision tower is not traced."""
    spec = catalog.model(name)
    return spec.model_copy(update={"tensors": tuple(t for t in spec.tensors if t.part not in ("vision", "projector"))})


def settings_of(row: dict[str, str]) -> FinetuneSettings:
    targets = row["target_modules"]
    return FinetuneSettings(
        method=row["method"],
        trainer="transformers",
        seq_len=int(row["seq_len"]),
        micro_batch=int(row["micro_batch"]),
        lora_rank=int(row["lora_rank"]),
        lora_targets=targets if targets in ("all-linear", "attention", "default") else tuple(targets.split()),
        gradient_checkpointing=row["gradient_checkpointing"] == "True",
        loss=row["loss"],
        adapter_dtype=row["adapter_dtype"],
        optimizer=row["optimizer"],
        weights_dtype=row["base_dtype"],
        autocast=row["autocast"] == "True",
        kbit_prepare=row["kbit_prepare"] == "True",
        attention=row["attention"],
        gradient_accumulation_steps=2 if row["accumulate"] == "True" else 1,
    )


def name_of(row: dict[str, str]) -> str:
    saved = "checkpoints" if row["gradient_checkpointing"] == "True" else "no checkpoints"
    return (
        f"{row['model']} {row['method']} {row['base_dtype']}/{row['adapter_dtype']} {saved} loss {row['loss']}"
        f" autocast {row['autocast']} rank {row['lora_rank']}"
        f" {row['attention']} {row['optimizer']} {row['target_modules']} kbit {row['kbit_prepare']}"
        f" accumulate {row['accumulate']} {row['seq_len']} x {row['micro_batch']}"
    )


@cache
def predictions() -> dict[str, tuple[TrainingMemory, int]]:
    """The plan and its peak without cuBLAS's workspaces, by row."""
    found = {}
    for row in rows():
        memory = training_memory(text_model(row["model"]), settings_of(row))
        peak = next(instant for instant in memory.instants if instant.name == memory.peak_instant)
        found[name_of(row)] = (memory, memory.allocated_bytes - peak.parts.get("workspace", 0))
    return found


def test_the_oracle_holds_each_configuration_once() -> None:
    names = [name_of(row) for row in rows()]
    assert len(names) == len(set(names)) >= 450
    for column, least in (("model", 6), ("method", 4), ("loss", 3), ("optimizer", 3), ("seq_len", 4)):
        assert len({row[column] for row in rows()}) >= least


def test_the_oracle_traced_the_models_that_are_planned() -> None:
    for row in rows():
        spec = text_model(row["model"])
        trainable = int(row["trainable_parameters"])
        adapters = 0 if row["method"] == "full" else trainable
        assert int(row["parameters"]) == spec.parameter_count + adapters, name_of(row)
        assert predictions()[name_of(row)][0].trainable_parameters == trainable, name_of(row)


def test_the_peak_is_within_2_percent_of_the_trace_on_every_row() -> None:
    far = {}
    for row in rows():
        ours = predictions()[name_of(row)][1]
        error = ours / int(row["peak_bytes"]) - 1
        if abs(error) > TOLERANCE:
            far[name_of(row)] = f"{error:+.2%} (traced peak: {row['peak_instant']} {row['peak_operation']})"
    assert far == {}


def test_half_of_the_peaks_are_met_within_a_thousandth_and_nine_of_ten_within_five() -> None:
    errors = sorted(abs(predictions()[name_of(row)][1] / int(row["peak_bytes"]) - 1) for row in rows())
    assert errors[len(errors) // 2] <= 0.001
    assert errors[int(0.9 * len(errors))] <= 0.005


@pytest.mark.parametrize("method", ["full", "lora", "qlora", "dora"])
def test_the_trace_and_the_plan_name_the_same_half_of_the_step(method: str) -> None:
    # where the two largest instants differ by more than 2 %, the plan must name the traced one
    halves = {"forward": "forward", "loss_forward": "loss", "loss_backward": "loss", "backward": "backward"}
    for row in rows():
        if row["method"] != method or row["peak_instant"] not in halves:
            continue
        memory, _ = predictions()[name_of(row)]
        word = halves[row["peak_instant"]]
        best = max((i.total_bytes for i in memory.instants if word in i.name), default=0)
        assert best >= memory.allocated_bytes * (1 - TOLERANCE), (name_of(row), memory.peak_instant)


def test_weights_adapters_and_states_are_those_of_the_trace() -> None:
    # the trace rounds each tensor up to 512 bytes, as torch's allocator does
    for row in rows():
        step = predictions()[name_of(row)][0].instants[0].parts
        for ours, theirs in (
            ("weights", "peak_base"),
            ("adapters", "peak_adapter"),
            ("optimizer state", "peak_optimizer"),
        ):
            assert step.get(ours, 0) == pytest.approx(int(row[theirs]), rel=0.0005, abs=1024), (ours, name_of(row))
