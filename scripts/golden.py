"""The command lines whose whole output the tests compare with tests/golden, and the way to rebuild those files.

`python scripts/golden.py` (make golden) writes them; `git diff tests/golden` then shows what readers will see change.
"""

from __future__ import annotations

import contextlib
import io
import os
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

    def file(self, columns: int) -> Path:
        return GOLDEN / f"{self.name}-{columns}.{self.suffix}"


class Outcome(NamedTuple):
    """What a command line did."""

    exit_code: int
    stdout: str
    stderr: str


SIZE = ("size", "--model", "qwen3-8b", "--ctx", "2k,8k,32k")
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


def rebuild() -> list[Path]:
    """Write every golden file whose text has changed and remove those that no case names; returns them."""
    GOLDEN.mkdir(exist_ok=True)
    changed = []
    wanted = set()
    for case, columns in goldens():
        file = case.file(columns)
        wanted.add(file)
        outcome = run(case.argv, columns)
        if outcome.exit_code != case.exit_code or outcome.stderr:
            raise SystemExit(f"planner {' '.join(case.argv)} ended with {outcome.exit_code}: {outcome.stderr}")
        if not file.exists() or file.read_text(encoding="utf-8") != outcome.stdout:
            file.write_text(outcome.stdout, encoding="utf-8")
            changed.append(file)
    for file in sorted(set(GOLDEN.iterdir()) - wanted):
        file.unlink()
        changed.append(file)
    return changed


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    rebuilt = rebuild()
    print("\n".join(str(file.relative_to(ROOT)) for file in rebuilt) or "every golden file is as it was")
