"""The fitted constants are those of the measurements that lie here, and the fit sees what the planner predicts."""

from __future__ import annotations

import calibrate_serving
import numpy as np
import pytest
from test_validate_throughput import row

from planner.catalog import read_facts
from planner.performance.step import step_parts
from planner.validate_throughput import benchmark, predicted


def test_the_constants_follow_from_the_measurements_and_formulas_as_they_are() -> None:
    assert read_facts("serving_speed.json")["inputs"] == calibrate_serving.inputs_digest(), "run `make calibrate`"


@pytest.mark.parametrize(
    "cells",
    [
        {},
        {"batch_or_concurrency": "64", "input_len": "4096"},
        {"model": "openai/gpt-oss-20b", "quant": "MXFP4", "batch_or_concurrency": "32"},
        {"engine": "SGLang", "batch_or_concurrency": "16"},
        {
            "batch_or_concurrency": "inf (all at once)",
            "request_rate": "inf",
            "notes": "dataset=random; prompts=200; total_input_tokens=100000; total_generated_tokens=20000; ",
        },
    ],
)
def test_the_sums_that_are_fitted_are_the_figures_that_are_predicted(cells: dict[str, str]) -> None:
    rows = [
        row(**cells, metric=name, value="1000", id=name)
        for name in ("ttft_ms_mean", "tpot_ms_mean", "itl_ms", "output_tok_s_total")
    ]
    found = benchmark(rows)
    run = calibrate_serving.replayed(found)
    running = found.server
    decode, context, prefill, pairs, sampled = run.bins.T
    seconds = step_parts(
        running.work, running.speeds, decode=decode, context=context, prefill=prefill, pairs=pairs, sampled=sampled
    ).total
    total, ttft, tpot, itl = run.weights.T @ seconds
    expected, _ = predicted(found)
    # like steps are gathered into bins, which costs a little
    assert sum(found.outputs) / total == pytest.approx(expected["output_tok_s_total"], rel=0.02)
    assert 1e3 * (ttft + running.speeds.floor) == pytest.approx(expected["ttft_ms_mean"], rel=0.02)
    assert 1e3 * tpot == pytest.approx(expected["tpot_ms_mean"], rel=0.02)
    assert 1e3 * itl == pytest.approx(expected["itl_ms"], rel=0.02)


def test_a_fit_finds_the_constants_that_made_the_figures() -> None:
    """Figures made with a slower memory than the priors say are fitted by a slower memory."""
    rows = [
        row(id=f"{n}", batch_or_concurrency=str(n), metric="tpot_ms_mean", value="1000", source=f"page {n}")
        for n in (1, 2, 4, 8)
    ]
    runs = [calibrate_serving.replayed(benchmark([r])) for r in rows]
    problem = calibrate_serving.Problem(runs)
    priors = calibrate_serving.parameters()
    shared = np.array([priors[key] for key in calibrate_serving.PARAMETERS])
    blank = [np.zeros(len(shared))] * len(calibrate_serving.ENGINES)
    mean = np.concatenate([shared[:, 0], *blank])
    sigma = np.concatenate([shared[:, 1], *[1e-3 * shared[:, 1]] * len(calibrate_serving.ENGINES)])
    truth = mean.copy()
    place = calibrate_serving.INDEX["weights", "hopper"]
    truth[place] -= 0.1
    problem.measured = problem.predicted(truth)
    everything = np.ones(len(problem.rows), dtype=bool)
    found = calibrate_serving.fit(problem, mean, sigma, everything)
    before = np.abs(problem.predicted(mean) - problem.measured).max()
    after = np.abs(problem.predicted(found) - problem.measured).max()
    assert before > 0.05
    assert after < 0.3 * before
    assert found[place] < mean[place]
