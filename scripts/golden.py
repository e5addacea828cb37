"""The command lines whose whole output the tests compare with tests/golden, and the way to rebuild those files.

`python scripts/golden.py` (make golden) writes them, after the plans in the shipped stacks; `git diff tests/golden
stacks` then shows what readers will see change.
"""

from __future__ import annotations

import contextlib
import io
import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple
from unittest import mock

ROOT = Path(__file__).parents[1]
GOLDEN = ROOT / "tests" / "golden"
MEASURED = ROOT / "tests" / "measured"


class Case(NamedTuple):
    """A command line: the name of its golden files, arguments, terminal widths, ending and exit code."""

    name: str
    argv: tuple[str, ...]
    columns: tuple[int, ...] = (80, 160)
    suffix: str = "txt"
    exit_code: int = 0
    warns: bool = False  # of old prices, on stderr

    def file(self, columns: int) -> Path:
        return GOLDEN / f"{self.name}-{columns}.{self.suffix}"


class Outcome(NamedTuple):
    """What a command line did."""

    exit_code: int
    stdout: str
    stderr: str


SIZE = ("size", "--model", "qwen3-8b", "--ctx", "2k,8k,32k")
PLAN = ("--model", "qwen3-8b", "--ctx", "8k", "--serve-hours", "mon-fri 08:00-18:00")
COMPARE = ("--tokens-per-month", "5e9", "--api", "10", "-q", "awq", "--no-spot")
SCALE = (
    *("scale", "--model", "qwen3-8b", "--rps", "20", "--input", "500", "--output", "200", "--ttft-p95", "800ms"),
    *("--tpot-p95", "50ms", "--region", "swedencentral"),
)
SPEEDS = ("--tokens-per-second", "NC4as_T4_v3=300", "--tokens-per-second", "NC24ads_A100_v4=2500")
TODAY = "1795305600"  # 2026-11-22, by which prices have an age and a budget a date
SHIPPED = ("dev-cpu", "dev-2k", "dev-32k", "prod-budget", "prod-standard", "prod-enterprise")
CASES: tuple[Case, ...] = (
    Case("size-qwen3-8b", SIZE),
    Case(
        "size-gemma-3-12b-explain",
        ("size", "--model", "gemma-3-12b", "--ctx", "32k", "--task", "serve", "--explain"),
        columns=(160,),
    ),
    Case("size-a10-misfit", ("size", "--model", "qwen3-8b", "--ctx", "32k", "--gpu", "a10"), exit_code=1),
    Case("size-json", (*SIZE, "--json"), columns=(80,), suffix="json"),
    Case("size-csv", (*SIZE, "--csv"), columns=(80,), suffix="csv"),
    Case("models", ("models",)),
    Case("models-code", ("models", "--use-case", "code", "--recommend")),
    Case("skus", ("skus",)),
    Case("plan-dev-32k", ("plan", "--stack", "dev-32k", "--dry-run"), warns=True),
    Case("preview-dev-32k", ("preview", "--stack", "dev-32k")),
    Case(
        "preview-prod-standard", ("preview", "--stack", "prod-standard", "--format", "md"), columns=(80,), suffix="md"
    ),
    *(Case(f"render-{stack}", ("render", "--stack", stack), (80,), "yaml") for stack in SHIPPED),
    Case("render-explain", ("render", "--stack", "dev-32k", "--explain")),
    Case("plan-explain", ("plan", *PLAN, "--explain", "--region", "eastus,westeurope"), columns=(160,), warns=True),
    Case("plan-json", ("plan", *PLAN, "--json"), columns=(80,), suffix="json", warns=True),
    Case(
        "plan-beside",
        (
            *("plan", "--model", "qwen3-8b", "--ctx", "2k,4k,8k,16k,32k,64k", "--rope-scaling", "yarn:2"),
            *("--serve-hours", "60h", "--take-turns", "-q", "awq"),
        ),
        warns=True,
    ),
    Case("prices-a100", ("prices", "--sku", "NC24ads_A100_v4")),
    Case("prices-swedencentral", ("prices", "--region", "swedencentral")),
    Case("scale-qwen3-8b", SCALE, warns=True),
    Case("scale-explain", (*SCALE, "--sku", "NC24ads_A100_v4", "--explain"), columns=(160,), warns=True),
    Case(
        "scale-classify",
        ("scale", "--model", "phi-3.5-mini", "--qps", "500", "--input", "256", "--latency", "150ms"),
        columns=(80,),
        warns=True,
    ),
    Case("compare-5b", ("compare", *COMPARE, *SPEEDS, "--utilization", "0.6"), warns=True),
    Case("budget-dev-32k", ("budget", "--scenario", "dev-32k"), columns=(80,), suffix="md", warns=True),
    Case(
        "budget-dev-2k-reference",
        ("budget", "--scenario", "dev-2k", "--prices", "2026-01-reference"),
        columns=(80,),
        suffix="md",
        warns=True,
    ),
    Case("budget-stack", ("budget", "--stack", "prod-standard"), columns=(80,), suffix="md", warns=True),
    Case("budget-stack-json", ("budget", "--stack", "dev-2k", "--format", "json"), (80,), "json", warns=True),
    Case("budget-stack-csv", ("budget", "--stack", "dev-2k", "--format", "csv"), (80,), "csv", warns=True),
    Case("budget-stack-html", ("budget", "--stack", "dev-32k", "--format", "html"), (80,), "html", warns=True),
    Case("validate-serving", ("validate", "serving", str(MEASURED / "inference.csv"), "--summary")),
    Case("validate-finetune", ("validate", "finetune", str(MEASURED / "training.csv"), "--summary")),
)


def goldens() -> Iterator[tuple[Case, int]]:
    """Every golden file, as its case and terminal width."""
    for case in CASES:
        for columns in case.columns:
            yield case, columns


def run(argv: tuple[str, ...], columns: int = 80) -> Outcome:
    """What `planner ARGV` prints in a terminal of that width without colours; runs in this process."""
    from planner.cli import main

    plain = {k: v for k, v in os.environ.items() if k not in ("FORCE_COLOR", "CLICOLOR_FORCE", "TTY_COMPATIBLE")}
    plain |= {"COLUMNS": str(columns), "NO_COLOR": "1", "TERM": "dumb"}
    plain = {"SOURCE_DATE_EPOCH": TODAY, "TONNAGE_CACHE": os.devnull} | plain
    stdout, stderr = io.StringIO(), io.StringIO()
    code = 0
    with (
        mock.patch.dict(os.environ, plain, clear=True),
        mock.patch.object(sys, "argv", ["planner", *argv]),
        contextlib.redirect_stdout(stdout),
        contextlib.redirect_stderr(stderr),
    ):
        try:
            main()
        except SystemExit as end:
            code = int(end.code or 0)
    return Outcome(code, stdout.getvalue(), stderr.getvalue())


def folded(text: str) -> str:
    """The text without the lines of the fine-tuning program's modules, whose own file is beside it in the repository.

    What is in them changes the digits of the ConfigMap's name and of the Job's, which stay.
    """
    module = re.compile(r"^(  (?:planner|workloads)\.[\w.]+\.py): \|-?\n((?:    .*\n|\n)*)", re.MULTILINE)
    return module.sub(lambda found: f"{found[1]}: # {found[2].count(chr(10))} lines\n", text)


def replan() -> list[Path]:
    """Write the plan of every shipped stack into its file; returns the files that changed."""
    from planner.stack import stack_names, stack_path

    changed = []
    for stack in stack_names():
        before = stack_path(stack).read_bytes()
        outcome = run(("plan", "--stack", stack))
        if outcome.exit_code:
            raise SystemExit(f"planner plan --stack {stack} ended with {outcome.exit_code}: {outcome.stderr}")
        if stack_path(stack).read_bytes() != before:
            changed.append(stack_path(stack).absolute())
    return changed


def rebuild() -> list[Path]:
    """Write every golden file whose text has changed and remove those that no case names; returns them."""
    GOLDEN.mkdir(exist_ok=True)
    changed = []
    wanted = set()
    for case, columns in goldens():
        file = case.file(columns)
        wanted.add(file)
        outcome = run(case.argv, columns)
        if outcome.exit_code != case.exit_code or bool(outcome.stderr) != case.warns:
            raise SystemExit(f"planner {' '.join(case.argv)} ended with {outcome.exit_code}: {outcome.stderr}")
        text = folded(outcome.stdout)
        if not file.exists() or file.read_text(encoding="utf-8") != text:
            file.write_text(text, encoding="utf-8")
            changed.append(file)
    for file in sorted(set(GOLDEN.iterdir()) - wanted):
        file.unlink()
        changed.append(file)
    return changed


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    os.chdir(ROOT)
    rebuilt = replan() + rebuild()
    print("\n".join(str(file.relative_to(ROOT)) for file in rebuilt) or "every golden file is as it was")
