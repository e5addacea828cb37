"""Constants of training speed: what cards reach, and what trainers cost; the facts of training_speed.json, read lazily.

Those that carry a prior are fitted by `scripts/calibrate_training.py`, which writes them.
"""

from __future__ import annotations

from functools import cache
from typing import Any

from planner.catalog import read_facts
from planner.errors import NotModelled
from planner.model import Frozen


class CardFamily(Frozen):
    """Cards that turn their peak into training in the same way.

    fp32_tflops: of each card, without tensor cores; matmul_cap: share of the 16-bit dense peak that the best large
    product reaches (measured); matmul_fraction: what the products of a training step reach, at most the cap;
    attention_fraction: what FlashAttention reaches, of the same peak
    extrapolated: no training measurement of this family went into the fit, so the interval is wider; rows: how many did
    """

    name: str
    fp32_tflops: dict[str, float]
    matmul_cap: float
    matmul_fraction: float
    attention_fraction: float
    extrapolated: bool
    rows: int
    source: str
    as_of: str


class Fitted(Frozen):
    """How the constants were fitted, and how far measurements that were left out lie from the predictions.

    rows, sources: measurements and the projects that they come from; log_spread: natural logarithm of the half-width of
    the stated interval, extrapolated_log_spread: for families without a measurement
    """

    rows: int
    sources: int
    log_spread: float
    extrapolated_log_spread: float
    source: str
    as_of: str


@cache
def card_family(gpu: str) -> CardFamily:
    """The family of a card by its catalog name; NotModelled for a card that no family lists."""
    for record in read_facts("training_speed.json")["families"]:
        if gpu in record["fp32_tflops"]:
            return CardFamily.model_validate(record)
    raise NotModelled(f"training speed on {gpu} is not modelled: add it to planner/catalog/training_speed.json")


@cache
def fitted() -> Fitted:
    """The record of the fit."""
    return Fitted.model_validate(read_facts("training_speed.json")["fit"])


@cache
def speed_constants() -> dict[str, Any]:
    """Every constant's value by name; speed_source has where each comes from."""
    return {record["name"]: record["value"] for record in read_facts("training_speed.json")["constants"]}


def speed_sources(names: tuple[str, ...]) -> str:
    """Where constants come from: the fit, told once, and each one's prior or source. KeyError for an unknown name."""
    records = {str(record["name"]): record for record in read_facts("training_speed.json")["constants"]}
    found = [records[name] for name in names]
    fit = f"fitted to {fitted().rows} published runs of {fitted().sources} projects (scripts/calibrate_training.py)"
    told = [fit] if any(record["fitted"] for record in found) else []
    return "; ".join(dict.fromkeys((*told, *(str(record["source"]) for record in found))))
