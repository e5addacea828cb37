"""`planner size --trace`: the closed form stands beside the real step, in the same answer."""

from __future__ import annotations

import json

import pytest

pytest.importorskip("torch", reason="the trace needs torch: run make live")

from typer.testing import CliRunner

from planner.cli import app


def answers(*options: str) -> list[dict[str, object]]:
    argv = ["size", "--model", "qwen3-0.6b", "--task", "finetune", "--trace", "--json", *options]
    result = CliRunner().invoke(app, argv)
    assert result.exit_code == 0, result.stderr
    found: list[dict[str, object]] = json.loads(result.stdout)["answers"]
    return found


@pytest.mark.parametrize(
    "options",
    [
        (),
        ("--method", "lora", "--loss", "hf", "--trainer", "transformers"),
        ("--method", "full", "--weights-dtype", "fp32"),
        ("--method", "dora", "--no-gradient-checkpointing"),
    ],
)
def test_the_plan_is_within_two_percent_of_the_traced_step(options: tuple[str, ...]) -> None:
    (row,) = answers("--ctx", "2048", *options)
    traced = row["traced"]
    assert isinstance(traced, dict)
    assert abs(traced["error_pct"]) <= 2
    assert {"torch", "transformers", "peft"} <= set(traced["versions"])


def test_a_run_that_cannot_be_traced_is_refused_with_the_reason() -> None:
    argv = ["size", "--model", "qwen3-0.6b", "--ctx", "2k", "--task", "finetune", "--loss", "liger", "--trace"]
    result = CliRunner().invoke(app, argv)
    assert "not 'liger'" in str(result.exception)
