"""What `planner scale` is asked in the tests, as its command line would ask."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from planner.catalog.prices import PriceSheet, load_sheet
from planner.scale import ScaleAnswer, scale, wanted_from_options
from planner.scale.measured import MeasuredCurve

SHEET = load_sheet("2026-11")
OPTIONS: dict[str, Any] = {
    "model": "qwen3-8b", "rps": None, "qps": None, "input_tokens": "500", "output_tokens": "200", "spread": None,
    "ttft_p95": "800ms", "tpot_p95": "50ms", "latency": None, "trace": None, "measured": None, "region": "eastus",
    "sku": None, "tp": None, "quantization": None, "kv_cache_dtype": None, "ctx": None, "rope_scaling": None,
    "prefix_hit_rate": 0.0, "max_num_seqs": None, "max_num_batched_tokens": None, "gpu_memory_utilization": None,
    "engine_version": None, "spot": False, "priority": None, "spare": 0, "at_expected": False, "peak_to_mean": None,
    "daily": None, "simulate": False, "seed": 0, "explain": False, "drawn": False,
}  # fmt: skip


def planned(sheet: PriceSheet = SHEET, runs: tuple[MeasuredCurve, ...] = (), **options: Any) -> ScaleAnswer:
    """The answer for options as the command line has them, on top of OPTIONS."""
    return scale(wanted_from_options(OPTIONS | options), sheet, runs)


def table(folder: Path, text: str, name: str = "runs.csv") -> str:
    """The path of a new file with that text."""
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return str(path)
