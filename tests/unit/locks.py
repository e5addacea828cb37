"""Plans to test the infrastructure with: those of the shipped stacks, and of intents that a test writes."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import yaml

from planner.catalog.prices import DEFAULT, load_sheet
from planner.plan import Intent, make_plan, parse_intent
from planner.plan.lock import Lock, lock_of

ROOT = Path(__file__).parents[2]
STACKS = ("dev-cpu", "dev-2k", "dev-32k", "prod-budget", "prod-standard", "prod-enterprise")


@cache
def shipped(stack: str) -> tuple[Intent, Lock]:
    """The intent of a shipped stack and the plan that the bundled prices give it."""
    content = yaml.safe_load((ROOT / "stacks" / f"Pulumi.{stack}.yaml").read_text(encoding="utf-8"))
    return planned(content["config"]["tonnage:intent"])


def planned(wanted: dict[str, Any]) -> tuple[Intent, Lock]:
    """An intent and its plan at the bundled prices."""
    intent = parse_intent(wanted, "the test's intent")
    return intent, lock_of(make_plan(intent, load_sheet(DEFAULT)), intent)


def served(**more: Any) -> dict[str, Any]:
    """An intent with one server of Qwen3-8B at 8,192 tokens in eastus, with what a test changes."""
    stored = {"settings": {"quantization": "awq"}, "checkpoint": "Qwen/Qwen3-8B-AWQ"}
    workload = {"kind": "serve", "context": 8192} | stored | more.pop("workload", {})
    return {"model": "qwen3-8b", "workloads": [workload], "approved_usd_per_month": 5000} | more


def tuned(**more: Any) -> dict[str, Any]:
    """An intent that fine-tunes Qwen3-8B at 2,048 tokens in eastus, with what a test changes."""
    workload = {"kind": "finetune", "context": 2048} | more.pop("workload", {})
    return {"model": "qwen3-8b", "workloads": [workload], "approved_usd_per_month": 50_000} | more
