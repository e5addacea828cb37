"""The trainers' catalog: complete records, known words only, and a source and a date behind every constant."""

from __future__ import annotations

import json
from importlib.resources import files
from typing import Any, get_args

import pytest

from planner import catalog
from planner.catalog.trainers import LossHead, constant, trainer, trainers
from planner.errors import PlannerError
from planner.memory.activations import Kernels
from planner.memory.finetune_settings import Optimizer
from planner.memory.training import FinetuneSettings, training_memory

DATA: dict[str, Any] = json.loads((files("planner.catalog") / "trainers.json").read_text(encoding="utf-8"))
NAMES = [record["name"] for record in DATA["trainers"]]


def test_no_trainer_is_listed_twice() -> None:
    assert len(set(NAMES)) == len(NAMES) == len(trainers())


@pytest.mark.parametrize("name", NAMES)
def test_a_record_uses_only_words_that_the_planner_knows(name: str) -> None:
    record = trainer(name)
    assert record.name == name
    assert record.loss in get_args(LossHead)
    assert record.optimizer in get_args(Optimizer)
    assert Kernels(**record.kernels)  # refuses a kernel that is not one
    assert record.label
    assert len(record.source) > 10
    assert record.as_of[:4] >= "2025"


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("method", ["full", "lora", "qlora"])
def test_each_trainer_s_defaults_can_be_planned(name: str, method: str) -> None:
    settings = FinetuneSettings(method=method, trainer=name, seq_len=2048)
    assert training_memory(catalog.model("qwen3-0.6b"), settings).allocated_bytes > 0


@pytest.mark.parametrize("name", DATA["constants"])
def test_every_constant_has_a_source_and_a_date(name: str) -> None:
    record = constant(name)
    assert len(record["source"]) > 10
    assert record["as_of"] > "2025"
    assert set(record) > {"source", "as_of"}
    assert all(value >= 0 for value in record.values() if isinstance(value, int | float))


@pytest.mark.parametrize("name", [n for n, r in DATA["constants"].items() if "low" in r])
def test_a_range_is_in_order(name: str) -> None:
    record = constant(name)
    assert record["low"] <= record["expected"] <= record["high"]


@pytest.mark.parametrize(("name", "near"), [("TRL", "trl"), ("torch-tune", "torchtune"), ("zzz", "trl, transformers")])
def test_an_unknown_trainer_is_refused_with_names_that_exist(name: str, near: str) -> None:
    with pytest.raises(PlannerError, match=rf"no trainer is called '{name}': try .*{near}"):
        trainer(name)
