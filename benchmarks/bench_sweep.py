"""Prints how many serving configurations a second one process evaluates, over the whole model catalog."""

from __future__ import annotations

import time

from planner import catalog
from planner.memory.serving import Device, sweep

GIB = 1 << 30
CONTEXTS = (2_048, 4_096, 8_192, 16_384, 32_768, 65_536, 131_072, 262_144, 1_048_576)
FORMATS = (None, "fp8", "fp8-block", "w8a8", "awq", "gptq-8bit", "w4a16", "mxfp4")
CARDS = (  # usable bytes as CUDA reports them, compute capability, name
    (14.6, (7, 5), "T4"),
    (22.0, (8, 6), "A10"),
    (22.0, (8, 9), "L4"),
    (39.5, (8, 0), "A100-40GB"),
    (44.4, (8, 9), "L40S"),
    (79.2, (8, 0), "A100-80GB"),
    (79.2, (9, 0), "H100-80GB"),
    (93.1, (9, 0), "H100 NVL"),
    (139.8, (9, 0), "H200"),
    (178.3, (10, 0), "B200"),
)


def main() -> None:
    specs = [catalog.model(entry.name) for entry in catalog.model_entries()]
    devices = [Device(usable_bytes=int(gib * GIB), compute_capability=cc, name=name) for gib, cc, name in CARDS]
    sweep(specs[:1], contexts=CONTEXTS, devices=devices)  # imports numpy
    start = time.perf_counter()
    table = sweep(specs, contexts=CONTEXTS, devices=devices, quantizations=FORMATS, tensor_parallel=(1, 2, 4, 8))
    seconds = time.perf_counter() - start
    rate = table.configurations / seconds
    print(f"{len(specs)} models, {table.configurations:,} configurations in {seconds:.2f} s: {rate:,.0f} a second")
    print(f"{len(table.skipped):,} combinations refused, {int(table.fits.sum()):,} configurations fit")


if __name__ == "__main__":
    main()
