"""Predictions against published start-up logs: how far off, on how many rows, and why others are refused."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from planner.errors import PlannerError
from planner.validate import (
    SERVING_COLUMNS,
    RowPrediction,
    Validation,
    as_table,
    compare,
    load_rows,
    number,
    summarise,
    validate_serving,
)

MEASURED = Path(__file__).parents[1] / "measured" / "inference.csv"


@cache
def rows() -> list[dict[str, str]]:
    return load_rows(MEASURED)


@cache
def validation() -> Validation:
    return validate_serving(rows())


def predicted(row_id: str) -> RowPrediction:
    return next(p for p in validation().predictions if p.id == row_id)


def test_kv_cache_bytes_are_within_1_5_percent_in_the_median_and_6_at_the_90th_percentile() -> None:
    error = validation().error("kv_cache_bytes")
    assert error.rows >= 50
    assert error.median_abs_pct <= 1.5
    assert error.p90_abs_pct <= 6


def test_kv_bytes_per_token_are_the_logs_own() -> None:
    error = validation().error("kv_bytes_per_token")
    assert error.rows >= 60
    assert error.max_abs_pct <= 0.7


def test_weights_are_within_half_a_percent_on_nine_rows_of_ten() -> None:
    error = validation().error("weights_gib_per_gpu")
    assert error.median_abs_pct <= 0.1
    assert error.p90_abs_pct <= 0.5


def test_the_activation_peak_is_within_two_percent_in_the_median() -> None:
    assert validation().error("activation_peak").median_abs_pct <= 2


def test_transformers_runs_are_within_three_percent() -> None:
    error = validation().error("eager_total")
    assert error.rows == 32
    assert error.max_abs_pct <= 3


def test_every_row_is_predicted_or_refused_with_a_sentence() -> None:
    result = validation()
    assert result.rows == len(rows()) == result.predicted + result.refused
    assert result.predicted >= 110
    assert sum(result.refusal_reasons.values()) == result.refused
    assert all(len(refusal.reason) > 20 for refusal in result.refusals)


@pytest.mark.parametrize(
    ("row_id", "words"),
    [
        ("I184", "llama.cpp is not modelled"),
        ("I188", "SGLang is not modelled"),
        ("I181", "does not state the tensor parallel size"),
        ("I105", "4-bit without the format"),
        ("I121", "expert parallelism"),
    ],
)
def test_refusals_name_what_is_missing(row_id: str, words: str) -> None:
    refusal = next(r for r in validation().refusals if r.id == row_id)
    assert words in refusal.reason


def test_a_row_whose_own_terms_disagree_does_not_judge_the_cache() -> None:
    # 79.18 * 0.9 - 64.38 - 7.38 - 0.13 = -0.63 GiB, but the row has 3.33 (it was run at 0.95)
    row = predicted("I091")
    assert row.withheld == "the row's own terms miss its KV cache by 4.0 GiB"
    assert "kv_cache_bytes" not in row.quantities
    assert abs(row.quantities["activation_peak"].error_pct) < 1


def test_defaults_that_stand_in_for_missing_cells_are_reported() -> None:
    assert "batch limits" in predicted("I086").assumed
    assert "gpu_memory_utilization" in predicted("I157").assumed
    assert predicted("I002").assumed == ()


def test_the_printed_total_wins_over_the_catalog() -> None:
    assert "GPU total from the catalog" not in predicted("I142").assumed
    assert "GPU total from the catalog" in predicted("I066").assumed


def test_replicates_are_counted_once() -> None:
    # I050 to I055 differ in max_model_len alone
    again = [row for row in rows() if row["id"] in ("I050", "I052", "I053", "I054", "I055")]
    result = validate_serving(again)
    assert result.predicted == 5
    assert result.error("kv_cache_bytes").rows == 1


def test_percentiles_are_interpolated() -> None:
    made = [
        RowPrediction(id=str(i), model="m", setting=str(i), assumed=(), quantities={"x": compare(100 + i, 100)})
        for i in range(11)
    ]
    error = summarise(made, [], 11).error("x")
    assert (error.median_abs_pct, error.p90_abs_pct, error.max_abs_pct) == pytest.approx((5, 9, 10))
    assert error.worst_row == "10"


def test_a_quantity_that_no_row_measured_is_refused() -> None:
    with pytest.raises(PlannerError, match="no row compares 'speed': ask for one of"):
        validation().error("speed")


def test_a_table_without_its_columns_is_refused_in_one_sentence(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    path.write_text("id,engine\n1,vLLM V1\n")
    with pytest.raises(PlannerError, match=r"lacks the columns engine_version, model, .*: add them") as caught:
        load_rows(path)
    assert "\n" not in str(caught.value)
    with pytest.raises(PlannerError, match="cannot be read as a CSV file"):
        load_rows(tmp_path / "none.csv")


def test_odd_and_empty_cells_do_not_stop_a_validation(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    header = list(rows()[0])
    odd = [",".join("?" if column == "gpu_mem_util" else "" for column in header), ",".join(["x"] * len(header))]
    path.write_text("\n".join([",".join(header), *odd]) + "\n")
    result = validate_serving(load_rows(path))
    assert (result.rows, result.predicted, result.refused) == (2, 0, 2)


@given(
    cells=st.dictionaries(
        st.sampled_from(SERVING_COLUMNS[4:]),
        st.sampled_from(["", "0", "-1", "1.2", "8", "1e9", "9" * 400, "fp8", "nan", "(none)", "~0.6.x", "é", "a,b"]),
    )
)
@settings(max_examples=150, deadline=None)
def test_no_cell_makes_a_validation_fail(cells: dict[str, str]) -> None:
    result = validate_serving([{**rows()[0], **cells}])
    assert result.rows == result.predicted + result.refused == 1


@pytest.mark.parametrize(
    ("cell", "value"),
    [("0.85 (mem-fraction-static)", 0.85), ("28.08 GB", 28.08), ("1,505,552", 1505552), ("", None), ("n/a", None)],
)
def test_numbers_are_read_from_cells_as_people_write_them(cell: str, value: float | None) -> None:
    assert number(cell) == value


def test_the_flat_table_has_a_record_for_each_comparison() -> None:
    table = as_table(validation())
    assert len(table) == sum(len(p.quantities) for p in validation().predictions)
    assert set(table[0]) == {"id", "model", "quantity", "predicted", "measured", "error_pct"}


def test_every_measurement_names_its_public_source() -> None:
    assert all(row["source"].strip() for row in rows())
