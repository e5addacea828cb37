"""Counts the parameters of every catalog model that transformers knows, on torch's meta device, into params_meta.csv.

Run with the `trace` extra installed: python tests/oracles/params_meta.py
"""

from __future__ import annotations

import csv
import json
import os
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"

import torch
import transformers
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

CATALOG = Path(__file__).parents[2] / "planner" / "catalog" / "models.json"
TABLE = Path(__file__).with_suffix(".csv")
VISION = ("vision_tower", "vision_model", "visual", "multi_modal_projector", "image_newline")


def models() -> dict[str, dict]:
    """Catalog entries by name, without those whose code lives in their own hub repository."""
    entries = json.loads(CATALOG.read_text())["models"]
    return {entry["name"]: entry for entry in entries if hasattr(transformers, entry["config"]["architectures"][0])}


def build(config: dict) -> torch.nn.Module:
    """The model of a config.json, without weights."""
    fields = {k: v for k, v in config.items() if k not in ("model_type", "architectures", "quantization_config")}
    parsed = CONFIG_MAPPING[config["model_type"]](**fields)
    with torch.device("meta"):
        return getattr(transformers, config["architectures"][0])(parsed).to(torch.bfloat16)


def main() -> None:
    temporary = TABLE.with_suffix(".tmp")
    with temporary.open("w", newline="") as file:
        rows = csv.writer(file, lineterminator="\n")
        rows.writerow(["model", "parameters", "persistent_buffers", "text_only", "transformers"])
        for name, entry in models().items():
            model = build(entry["config"])
            total = sum(p.numel() for p in model.parameters())  # a tied matrix counts once
            stored = set(model.state_dict())
            buffers = sum(b.numel() for key, b in model.named_buffers() if key in stored)
            seen = {key: p.numel() for key, p in model.named_parameters() if any(word in key for word in VISION)}
            rows.writerow([name, total, buffers, total + buffers - sum(seen.values()), transformers.__version__])
            file.flush()
    temporary.replace(TABLE)


if __name__ == "__main__":
    main()
