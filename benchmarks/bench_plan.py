"""How long a full plan takes: two workloads over every region, size and way to buy; and the whole command, cold."""

from __future__ import annotations

import statistics
import subprocess
import sys
import time
from pathlib import Path

RUNS = 9
INTENT = {
    "model": "qwen3-8b",
    "regions": ["any"],
    "workloads": [
        {"kind": "finetune", "context": "32k", "schedule": "120h"},
        {"kind": "serve", "context": "32k", "schedule": "mon-fri 08:00-18:00", "replicas": 2},
    ],
    "take_turns": True,
    "pricing": {"commitments": ["reserved-1y", "savings-plan-1y", "savings-plan-3y", "reserved-3y"]},
    "quota": {"*": {"spot_vcpus": 96, "total_vcpus": 400}},
}


def main() -> None:
    """Print the sheet's loading time, the plan's, and the cold command's, in milliseconds."""
    from planner.catalog.prices import BUNDLED, load_sheet, parse_sheet
    from planner.plan import make_plan, parse_intent

    folder = Path(sys.modules["planner.catalog.prices"].__file__ or "").parent
    data = (folder / f"{BUNDLED[0]}.json").read_bytes()
    print(f"reading the price sheet: {_median(lambda: parse_sheet(data, 'bench')):.0f} ms")
    sheet, intent = load_sheet(BUNDLED[0]), parse_intent(INTENT, "bench")
    start = time.perf_counter()
    plan = make_plan(intent, sheet)
    first = (time.perf_counter() - start) * 1000
    again = _median(lambda: make_plan(intent, sheet))
    print(f"a plan over {len(plan.regions)} regions: {first:.0f} ms the first time, {again:.0f} ms after")
    command = [
        str(Path(sys.executable).with_name("planner")),
        *("plan", "--model", "qwen3-8b", "--ctx", "32k", "--region", "any", "--prices", BUNDLED[0]),
    ]
    cold = _median(lambda: subprocess.run(command, capture_output=True, check=True))
    print(f"planner plan --region any, cold: {cold:.0f} ms")


def _median(work: object) -> float:
    """Milliseconds, the median of RUNS."""
    assert callable(work)
    spent = []
    for _ in range(RUNS):
        start = time.perf_counter()
        work()
        spent.append((time.perf_counter() - start) * 1000)
    return statistics.median(spent)


if __name__ == "__main__":
    main()
