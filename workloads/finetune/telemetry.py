"""What a run says while it runs: JSON lines on stdout, a bar on a terminal, a textfile for Prometheus, MLflow if asked.

Every line is one object with `event` and `run`; figures have their unit in their name. Only `time` is of a wall clock.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import math
import os
import sys
import time
from pathlib import Path
from typing import IO, Any

from planner.errors import PlannerError
from workloads.finetune.config import Metrics

GAUGES = {
    "step": "Optimizer steps done",
    "steps": "Optimizer steps of the whole run",
    "loss": "Loss of the last logged steps",
    "eval_loss": "Loss of the last evaluation",
    "learning_rate": "Learning rate",
    "tokens_per_second": "Tokens a second, all GPUs",
    "mfu": "Share of the card's dense FLOP/s that the model's own arithmetic takes",
    "peak_allocated_bytes": "Peak of torch's allocator since the start of the process",
    "predicted_allocated_bytes": "The same as the plan predicts it",
    "checkpoint_step": "Step of the newest whole checkpoint",
    "remaining_seconds": "Seconds to the end at the present pace",
}


class Telemetry:
    """The voice of one run. Rank 0 alone has one that speaks. PlannerError where mlflow is asked for and missing."""

    def __init__(self, run: str, metrics: Metrics, *, out: IO[str] | None = None, quiet: bool = False) -> None:
        if metrics.mlflow is not None and importlib.util.find_spec("mlflow") is None:
            raise PlannerError("the package mlflow is not installed: add it to the image, or leave metrics.mlflow out")
        self._run = run
        self._metrics = metrics
        self._out = sys.stdout if out is None else out
        self._quiet = quiet
        self._gauges: dict[str, float] = {}
        self._mlflow: Any = None
        self._bar: Any = None

    def event(self, name: str, **facts: Any) -> None:
        """One JSON line, and its figures to the gauges."""
        if self._quiet:
            return
        said = {"event": name, "run": self._run, "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())}
        said |= {key: _plain(value) for key, value in facts.items() if value is not None}
        print(json.dumps(said), file=self._out, flush=True)
        self._gauges |= {k: float(v) for k, v in facts.items() if k in GAUGES and isinstance(v, int | float)}
        self._write_textfile()
        self._advance(name, facts)
        if name in ("step", "evaluation"):
            self._log_mlflow(facts)

    def _write_textfile(self) -> None:
        if self._metrics.textfile is None:
            return
        with contextlib.suppress(OSError):  # nobody loses a run over its metrics
            path = Path(self._metrics.textfile)
            path.parent.mkdir(parents=True, exist_ok=True)
            beside = path.with_name(f".{path.name}.{os.getpid()}")
            beside.write_text(textfile(self._run, self._gauges), encoding="utf-8")
            beside.replace(path)

    def _advance(self, name: str, facts: dict[str, Any]) -> None:
        """The bar, on stderr and only where somebody looks at it."""
        if name != "step" or not sys.stderr.isatty():
            return
        if self._bar is None:
            from rich.console import Console
            from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

            self._bar = Progress(
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TimeRemainingColumn(),
                TextColumn("{task.fields[loss]}"),
                console=Console(stderr=True),
            )
            self._task = self._bar.add_task(self._run, total=facts["steps"], loss="")
            self._bar.start()
        self._bar.update(self._task, completed=facts["step"], loss=f"loss {facts.get('loss', math.nan):.4f}")

    def _log_mlflow(self, facts: dict[str, Any]) -> None:
        if self._metrics.mlflow is None:
            return
        if self._mlflow is None:
            import mlflow

            mlflow.set_tracking_uri(self._metrics.mlflow)
            mlflow.start_run(run_name=self._run)
            self._mlflow = mlflow
        figures = {key: float(value) for key, value in facts.items() if isinstance(value, int | float)}
        self._mlflow.log_metrics(figures, step=int(facts["step"]))

    def close(self) -> None:
        if self._bar is not None:
            self._bar.stop()
        if self._mlflow is not None:
            self._mlflow.end_run()


def textfile(run: str, gauges: dict[str, float]) -> str:
    """Gauges in Prometheus' text format, for the textfile collector of node-exporter."""
    lines = []
    for name, text in GAUGES.items():
        if name in gauges:
            full = f"tonnage_finetune_{name}"
            lines += [f"# HELP {full} {text}", f"# TYPE {full} gauge", f'{full}{{run="{run}"}} {gauges[name]!r}']
    return "".join(f"{line}\n" for line in lines)


def _plain(value: Any) -> Any:
    """What JSON can hold: NaN and infinities as text."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, dict):
        return {key: _plain(inner) for key, inner in value.items()}
    return value
