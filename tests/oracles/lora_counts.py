"""Counts the trainable parameters that peft adds to every catalog model transformers knows, into lora_counts.csv.

Run with the `trace` extra installed: python tests/oracles/lora_counts.py
Targets: `attn` is the list q_proj, k_proj, v_proj, o_proj; `all-linear` and `default` (None) are peft's own.
Where peft refuses, the cell holds `refused`.
"""

from __future__ import annotations

import csv
from pathlib import Path

import peft
import torch
from params_meta import build, models

TABLE = Path(__file__).with_suffix(".csv")
TARGETS = {"attn": ["q_proj", "k_proj", "v_proj", "o_proj"], "all-linear": "all-linear", "default": None}
RANKS = (8, 64)


def count(config: dict, targets: list[str] | str | None, rank: int) -> int | str:
    model = build(config)
    try:
        with torch.device("meta"):
            adapted = peft.get_peft_model(model, peft.LoraConfig(r=rank, target_modules=targets, task_type="CAUSAL_LM"))
    except ValueError:  # no module of that name, or no default for the architecture
        return "refused"
    return sum(p.numel() for p in adapted.parameters() if p.requires_grad)


def main() -> None:
    temporary = TABLE.with_suffix(".tmp")
    with temporary.open("w", newline="") as file:
        rows = csv.writer(file, lineterminator="\n")
        rows.writerow(["model", "targets", "rank", "trainable", "peft"])
        for name, entry in models().items():
            for label, targets in TARGETS.items():
                for rank in RANKS:
                    rows.writerow([name, label, rank, count(entry["config"], targets, rank), peft.__version__])
            file.flush()
    temporary.replace(TABLE)


if __name__ == "__main__":
    main()
