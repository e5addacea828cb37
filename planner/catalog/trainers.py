"""Trainers (what a fine-tuning stack fuses, chunks and casts by default) and the constants of their memory."""

from __future__ import annotations

import difflib
import json
from functools import cache
from importlib import resources
from typing import Any, Literal

from planner.errors import PlannerError
from planner.model import Frozen


class Trainer(Frozen):
    """A fine-tuning stack's defaults.

    loss: one of planner.memory.activations.LossHead; checkpointing: none, reentrant, non_reentrant or offloaded
    adapter_on_quantized: width of LoRA adapters on a quantised base; autocast: 16-bit autocast around the step
    kernels: the fused operations; experts_are_linear: routed experts are nn.Linear modules (transformers 4)
    """

    name: str
    label: str
    loss: str
    checkpointing: Literal["none", "reentrant", "non_reentrant", "offloaded"]
    optimizer: str
    adapter_on_quantized: Literal["bf16", "fp32"]
    autocast: bool
    kernels: dict[str, bool]
    experts_are_linear: bool = False
    source: str
    as_of: str


@cache
def _file() -> dict[str, Any]:
    text = resources.files("planner.catalog").joinpath("trainers.json").read_text(encoding="utf-8")
    loaded: dict[str, Any] = json.loads(text)
    return loaded


@cache
def trainers() -> dict[str, Trainer]:
    """Every trainer by name."""
    return {record["name"]: Trainer.model_validate(record) for record in _file()["trainers"]}


def trainer(name: str) -> Trainer:
    """The trainer of that name; PlannerError with the nearest names when there is none."""
    known = trainers()
    if name in known:
        return known[name]
    near = ", ".join(difflib.get_close_matches(name, known, n=3, cutoff=0.3)) or ", ".join(known)
    raise PlannerError(f"no trainer is called {name!r}: try {near}")


def constant(name: str) -> dict[str, Any]:
    """A constant of training memory with its source and date."""
    record: dict[str, Any] = _file()["constants"][name]
    return record
