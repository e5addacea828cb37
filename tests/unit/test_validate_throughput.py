"""Published benchmarks are read as their tables mean them, replayed, and compared; what cannot be is refused."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path

import pytest
from typer.testing import CliRunner

from planner.cli import app
from planner.errors import PlannerError
from planner.validate import Validation, load_rows, within_range
from planner.validate_throughput import (
    COLUMNS,
    benchmark,
    figures,
    groups,
    predicted,
    replay,
    source_of,
    validate_throughput,
)

MEASURED = Path(__file__).parents[1] / "measured" / "throughput.csv"
ALONE = {
    "id": "X-1",
    "source": "https://example.org/speeds#L1",
    "engine": "vLLM",
    "engine_version": "0.11.0",
    "model": "Qwen/Qwen3-8B",
    "quant": "BF16",
    "gpu": "H100 SXM 80",
    "n_gpus": "1",
    "tp": "1",
    "input_len": "1024",
    "output_len": "128",
    "batch_or_concurrency": "8",
    "request_rate": "closed loop",
    "metric": "tpot_ms_mean",
    "value": "9.0",
    "notes": "",
}


def row(**cells: str) -> dict[str, str]:
    return ALONE | cells


@cache
def small() -> Validation:
    """A document that is quick to replay: an H100 with 1 to 8 clients."""
    rows = [r for r in load_rows(MEASURED, COLUMNS) if "qwen3-8b/h100-latency.md" in r["source"]]
    return validate_throughput(rows)


def test_a_published_page_is_met_within_its_bars() -> None:
    errors = {error.quantity: error for error in small().errors}
    assert errors["TPOT"].median_abs_pct <= 12
    assert errors["ITL"].median_abs_pct <= 12
    assert errors["throughput"].median_abs_pct <= 15
    share = within_range(small())
    assert share is not None
    assert share > 0.7


def test_errors_are_told_apart_by_source_card_and_engine() -> None:
    by = {(error.by, error.group) for error in small().grouped}
    assert ("GPU", "h100-80-sxm") in by
    assert {("engine", name) for name in ("vllm", "sglang", "tensorrt-llm")} <= by


def test_every_row_is_predicted_or_refused_with_a_reason() -> None:
    found = small()
    assert found.predicted + found.refused == found.rows
    assert all(reason for reason in found.refusal_reasons)


def test_rows_of_one_run_are_one_benchmark() -> None:
    rows = [row(), row(id="X-2", metric="ttft_ms_mean", value="60"), row(id="X-3", batch_or_concurrency="16")]
    assert [len(group) for group in groups(rows)] == [2, 1]
    found = benchmark(groups(rows)[0])
    assert found.measured == {"tpot_ms_mean": ("X-1", 9.0), "ttft_ms_mean": ("X-2", 60.0)}
    assert found.concurrency == 8
    assert len(found.prompts) == 80  # ten a client
    assert abs(sum(found.prompts) / 80 - 1024) < 0.04 * 1024


def test_a_suspect_figure_is_refused_and_its_neighbours_are_not() -> None:
    rows = [row(), row(id="X-2", metric="itl_ms", value="0.0", notes="SUSPECT (implausibly low); ")]
    found = validate_throughput(rows)
    assert [prediction.id for prediction in found.predictions] == ["X-1"]
    assert found.refusal_reasons == {"the table marks the figure as suspect": 1}


def test_figures_are_those_that_benchmark_clients_print() -> None:
    found = benchmark([row(batch_or_concurrency="1", input_len="100", output_len="10")])
    _running, served = replay(found)
    values = figures(found, served, 0.05)
    # one client: requests follow each other, so the time is the sum of theirs
    whole = sum(done - sent for done, sent in zip(served.done, served.sent, strict=True))
    assert served.seconds == pytest.approx(whole)
    assert values["output_tok_s_total"] == pytest.approx(sum(found.outputs) / served.seconds)
    assert values["total_tok_s"] == pytest.approx((sum(found.outputs) + sum(found.prompts)) / served.seconds)
    assert values["req_s"] == pytest.approx(10 / served.seconds)
    first = sum(first - sent for first, sent in zip(served.first, served.sent, strict=True)) / 10
    assert values["ttft_ms_mean"] == pytest.approx(1e3 * (first + 0.05))
    assert values["tpot_ms_mean"] == pytest.approx(values["itl_ms"], rel=0.01)  # alone, all gaps are alike


def test_a_single_stream_is_one_request() -> None:
    cells = {"metric": "decode_tok_s_single_stream", "value": "120", "request_rate": "", "batch_or_concurrency": "1"}
    found = benchmark([row(**cells, input_len="1", output_len="2048")])
    assert (found.prompts, found.outputs, found.concurrency) == ((1,), (2048,), 1)
    values, queued = predicted(found)
    assert not queued
    assert 80 < values["decode_tok_s_single_stream"] < 250


def test_all_at_once_is_saturated_and_a_few_clients_are_not() -> None:
    burst = {"batch_or_concurrency": "inf (all at once)", "request_rate": "inf", "input_len": "", "output_len": ""}
    notes = "dataset=random; prompts=300; total_input_tokens=300000; total_generated_tokens=3000; "
    assert predicted(benchmark([row(**burst, notes=notes)]))[1]
    assert not predicted(benchmark([row()]))[1]


def test_the_lengths_of_sharegpt_have_the_stated_mean_and_a_tail() -> None:
    notes = "dataset=ShareGPT; prompts=1000; total_input_tokens=217393; total_generated_tokens=201605; "
    cells = {"batch_or_concurrency": "inf (all at once)", "request_rate": "inf", "input_len": "", "output_len": ""}
    found = benchmark([row(**cells, notes=notes)])
    assert abs(sum(found.outputs) / 1000 - 201.6) < 2
    assert max(found.outputs) > 800
    assert max(found.prompts) <= 1024
    assert found == benchmark([row(**cells, notes=notes)])


def test_figures_that_show_a_crowd_choose_the_larger_of_two_defaults() -> None:
    cells = {"gpu": "A100-80 (unspecified)", "batch_or_concurrency": "inf (all at once)", "request_rate": "inf",
             "input_len": "", "output_len": ""}  # fmt: skip
    notes = "ShareGPT, 1000 prompts"
    rows = [
        row(**cells, notes=notes, metric="total_tok_s", value="10338.25"),
        row(**cells, notes=notes, id="X-2", metric="tpot_ms_mean", value="200.02"),
    ]
    # 10,338 tokens/s of which 200 of 417 are answers, 0.2 s each: 992 ran at a time, more than the default 256
    found = benchmark(rows)
    assert found.settings.max_num_seqs == 1024
    assert any("992 running" in text for text in found.assumed)


def test_a_campaign_inside_a_collection_is_a_source_of_its_own() -> None:
    assert source_of(row()) == "https://example.org/speeds"
    assert source_of(row(notes="id=a; source_file=2026-04-06.csv; b")) == "https://example.org/speeds 2026-04-06.csv"


def test_requests_at_a_rate_arrive_one_by_one() -> None:
    slow = benchmark([row(request_rate="0.5", batch_or_concurrency="1", notes="60 prompts")])
    assert (slow.rate_per_s, slow.concurrency, len(slow.prompts)) == (0.5, None, 60)
    values, queued = predicted(slow)
    assert not queued
    alone, _ = predicted(benchmark([row(batch_or_concurrency="1")]))
    assert values["tpot_ms_mean"] == pytest.approx(alone["tpot_ms_mean"], rel=0.1)
    assert values["req_s"] == pytest.approx(0.5, rel=0.3)  # 60 arrivals of a Poisson stream
    assert predicted(benchmark([row(request_rate="90", notes="900 prompts")]))[1]
    assert benchmark([row(request_rate="200", batch_or_concurrency="8", notes="8 requests at once")]).rate_per_s is None


@pytest.mark.parametrize(
    ("cells", "message"),
    [
        ({"notes": 'cmd="vllm serve x --max-num-seqs 0"'}, "max_num_seqs is not a value that an engine takes"),
        ({"tp": "0", "n_gpus": "0"}, "tensor_parallel_size is not a value that an engine takes"),
        ({"request_rate": "0"}, "a rate of 0 requests a second"),
        ({"engine": "llama.cpp"}, "llama.cpp is not modelled"),
        ({"engine": "vLLM (ROCm)"}, "vLLM on ROCm"),
        ({"model": "nobody/knows-1b"}, "is not in the model catalog"),
        ({"gpu": "Voodoo 2"}, "is not a GPU in the catalog"),
        ({"quant": "Q4_K_M"}, "the weight format 'Q4_K_M' is not modelled"),
        ({"tp": "?"}, "the tensor parallel size is not stated"),
        ({"tp": "16", "n_gpus": "16"}, "tensor parallelism over several machines"),
        ({"batch_or_concurrency": "not shown"}, "how its requests arrive is not stated"),
        ({"batch_or_concurrency": "0"}, "a benchmark with 0 clients measures nothing"),
        ({"input_len": ""}, "the lengths of its requests are not stated"),
        ({"value": "n/a"}, "is not a number"),
        ({"value": "-3"}, "is not a number"),
        ({"metric": "vibes"}, "is not a figure that is predicted"),
        (
            {"notes": 'cmd="vllm serve x --speculative-config={...}"'},
            "speculative decoding without its acceptance rate",
        ),
        ({"notes": "--enforce-eager (no CUDA graphs)"}, "without CUDA graphs"),
        ({"notes": "id=x_tp4_ep4_1"}, "expert parallelism"),
    ],
)
def test_what_cannot_be_predicted_is_refused_with_a_sentence(cells: dict[str, str], message: str) -> None:
    with pytest.raises(PlannerError, match=message):
        benchmark([row(**cells)])
    found = validate_throughput([row(**cells)])
    assert (found.predicted, found.refused) == (0, 1)


def test_a_run_whose_own_figures_deny_its_load_is_refused() -> None:
    # 0.5 requests/s x (0.1 s + 127 x 5 ms) = 0.37 in flight, not 64
    rows = [
        row(batch_or_concurrency="64", metric="req_s", value="0.5"),
        row(batch_or_concurrency="64", id="X-2", metric="ttft_ms_mean", value="100"),
        row(batch_or_concurrency="64", id="X-3", metric="tpot_ms_mean", value="5"),
    ]
    with pytest.raises(PlannerError, match="by Little's law"):
        benchmark(rows)


def test_a_run_faster_than_the_data_sheet_is_refused() -> None:
    # 64 prompts of 8,192 tokens x 16.4 GFLOP within 128 steps of 10 ms would need 6.7 PFLOPS of a card with 0.99
    found = validate_throughput([row(batch_or_concurrency="64", input_len="8192", value="10")])
    assert next(iter(found.refusal_reasons)).startswith("its TPOT is within 20% of what the data sheet allows")


def test_the_command_prints_errors_by_source_and_pure_json(tmp_path: Path) -> None:
    table = tmp_path / "rows.csv"
    cells = [",".join(f'"{r[name]}"' for name in COLUMNS) for r in (row(), row(id="X-2", engine="llama.cpp"))]
    table.write_text("\n".join([",".join(COLUMNS), *cells]) + "\n")
    text = CliRunner().invoke(app, ["validate", "throughput", str(table), "--summary"]).stdout
    assert "Errors by source" in text
    assert "of the measured values lie within the stated range" in text
    found = json.loads(CliRunner().invoke(app, ["validate", "throughput", str(table), "--json"]).stdout)
    assert found["summary"]["predicted"] == found["summary"]["refused"] == 1
    assert "h100-80-sxm" in found["summary"]["by"]["GPU"]


def test_a_table_without_its_columns_is_refused(tmp_path: Path) -> None:
    table = tmp_path / "rows.csv"
    table.write_text("id,value\n1,2\n")
    result = CliRunner().invoke(app, ["validate", "throughput", str(table)])
    assert isinstance(result.exception, PlannerError)
    assert "lacks the columns source, engine" in str(result.exception)
