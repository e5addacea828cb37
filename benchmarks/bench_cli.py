"""Cold start of `planner size`: wall time, processor time and peak memory of a fresh process, and what it imports."""

from __future__ import annotations

import os
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path

RUNS = 15
PLANNER = Path(sys.executable).with_name("planner")
COMMANDS = (
    ("size", "--model", "qwen3-8b", "--ctx", "32768"),
    ("size", "--model", "qwen3-8b", "--ctx", "2k,8k,32k"),
    ("size", "--model", "gemma-3-12b", "--ctx", "32k", "--task", "serve", "--json"),
)
HEAVY = ("torch", "transformers", "peft", "trl", "vllm", "pulumi", "numpy", "httpx", "huggingface_hub")


def main() -> None:
    # the first run writes the bytecode that an installed program has
    environment = {**os.environ, "COLUMNS": "80", "PYTHONDONTWRITEBYTECODE": ""}
    subprocess.run([PLANNER, *COMMANDS[0]], check=True, stdout=subprocess.DEVNULL, env=environment)
    for command in COMMANDS:
        walls, spent = [], []
        for _ in range(RUNS):
            before = resource.getrusage(resource.RUSAGE_CHILDREN)
            started = time.perf_counter()
            subprocess.run([PLANNER, *command], check=True, stdout=subprocess.DEVNULL, env=environment)
            walls.append(time.perf_counter() - started)
            after = resource.getrusage(resource.RUSAGE_CHILDREN)
            spent.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
        peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024
        print(
            f"planner {' '.join(command)}: median {statistics.median(walls):.3f} s wall (best {min(walls):.3f}),"
            f" {statistics.median(spent):.3f} s of processor, peak {peak:.0f} MiB"
        )
    code = "import sys; from planner.cli import app; app(sys.argv[1:], standalone_mode=False); print(*sys.modules)"
    output = subprocess.run(
        [sys.executable, "-c", code, *COMMANDS[0]], check=True, capture_output=True, text=True, env=environment
    ).stdout
    loaded = set(output.splitlines()[-1].split())
    print("heavy modules imported:", ", ".join(name for name in HEAVY if name in loaded) or "none")


if __name__ == "__main__":
    main()
