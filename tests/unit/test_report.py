"""What people read: tables whose cells sum, sentences that say why, and nothing that the answer does not hold."""

from __future__ import annotations

import csv
import io
import json
from typing import Any

import pytest
from rich.console import Console

from planner import catalog, report
from planner.catalog.hardware import gpu, skus
from planner.fit import Step
from planner.memory.serving import ServingSettings
from planner.memory.training import FinetuneSettings
from planner.size import SizeAnswer, SizeRequest, size
from planner.units import GIB, format_gib
from planner.validate import Compared, Refusal, RowPrediction, summarise


def answer(name: str, *contexts: int, serve: bool = True, finetune: bool = True, **options: Any) -> SizeAnswer:
    wanted = SizeRequest(
        contexts=contexts,
        serve=ServingSettings(max_model_len=max(contexts)) if serve else None,
        finetune=FinetuneSettings(seq_len=max(contexts)) if finetune else None,
        **options,
    )
    return size(catalog.model(name), wanted)


def shown(found: SizeAnswer, columns: int = 120, *, explain: bool = False) -> str:
    out = io.StringIO()
    report.print_size(Console(file=out, width=columns, highlight=False), found, explain=explain)
    return out.getvalue()


def one_line(text: str) -> str:
    return " ".join(text.split())


# -------------------------------------------------------------------------------------------------------- tables


@pytest.mark.parametrize("name", ["qwen3-8b", "gemma-3-12b", "gpt-oss-20b"])
def test_the_cells_of_a_row_sum_to_its_total(name: str) -> None:
    found = answer(name, 8192)
    for row in found.answers:
        line = next(
            text
            for text in shown(
                answer(name, 8192, serve=row.task == "serve", finetune=row.task == "finetune")
            ).splitlines()
            if text.startswith("      8k") or text.strip().startswith("8k ")
        )
        cells = [float(cell.replace(",", "")) for cell in line.split()[1:] if cell.replace(".", "").isdigit()]
        count = len(report.SERVING_COLUMNS if row.task == "serve" else report.TRAINING_COLUMNS) + 1
        parts, total = cells[:count], cells[count]
        assert sum(parts) == pytest.approx(total, abs=0.12)  # weights and total to a tenth, others to a hundredth
        assert total == pytest.approx(row.needed_bytes / GIB, abs=0.06)


def test_every_component_is_in_a_column_or_in_other_once() -> None:
    for columns in (report.SERVING_COLUMNS, report.TRAINING_COLUMNS):
        named = [part for _, parts in columns for part in parts]
        assert len(named) == len(set(named))


def test_the_head_line_says_model_parameters_layers_context_and_kv() -> None:
    text = one_line(shown(answer("qwen3-8b", 8192)))
    assert text.startswith("qwen3-8b: 8.19 B parameters, 36 layers, context 40,960, 147,456 B of KV cache a token")


def test_active_parameters_are_said_of_a_mixture_of_experts_only() -> None:
    assert "B active)" in shown(answer("gpt-oss-20b", 8192, finetune=False))
    assert "active)" not in shown(answer("qwen3-8b", 8192, finetune=False))


def test_the_next_step_is_the_vllm_command_of_the_last_context_that_fits() -> None:
    text = one_line(shown(answer("qwen3-8b", 2048, 8192, finetune=False)))
    assert "Next: vllm serve Qwen/Qwen3-8B --max-model-len=8192" in text


def test_what_does_not_fit_says_why_and_what_would() -> None:
    found = answer("qwen3-8b", 32_768, serve=False, gpu=gpu("t4"))
    text = one_line(shown(found))
    (row,) = found.answers
    assert one_line(row.reason) in text
    for remedy in row.remedies:
        assert remedy.flags in text
        assert format_gib(remedy.needed_bytes) in text
    assert "Next: repeat the command with one of the changes above" in text


def test_a_card_that_cannot_run_it_shows_dashes_and_the_reason() -> None:
    text = one_line(shown(answer("gemma-3-4b", 1024, finetune=False, gpu=gpu("t4"))))
    assert "1k - - - - - no -" in text
    assert "has no bf16" in text


def test_windowed_layers_get_three_kv_figures_and_others_none() -> None:
    assert "with the hybrid cache manager off" in one_line(shown(answer("gemma-3-12b", 32_768, finetune=False)))
    assert "hybrid" not in shown(answer("qwen3-8b", 32_768, finetune=False))


def test_a_note_is_printed_once_however_many_contexts_it_holds_for() -> None:
    text = one_line(shown(answer("gemma-3-4b", 2048, 4096, 8192, serve=False)))
    assert text.count("the vision tower counts as weights") == 1


def test_a_ladder_is_a_line_a_size_with_its_last_context() -> None:
    lines = report.ladder_lines(
        [Step(place="NC4as_T4_v3", from_tokens=1, to_tokens=900), Step(place="X", from_tokens=901, to_tokens=40_960)]
    )
    assert lines[1].split() == ["up", "to", "900", "tokens", "NC4as_T4_v3"]
    assert lines[2].split() == ["up", "to", "40,960", "tokens", "X"]


@pytest.mark.parametrize("columns", [60, 80, 100, 160])
def test_no_line_is_wider_than_the_terminal(columns: int) -> None:
    for found in (answer("qwen3-8b", 2048, 32_768), answer("qwen3-8b", 32_768, gpu=gpu("t4"))):
        for explain in (False, True):
            text = shown(found, columns, explain=explain)
            assert max(len(line) for line in text.splitlines()) <= columns


# --------------------------------------------------------------------------------------------------------- explain


@pytest.mark.parametrize("name", ["qwen3-8b", "gemma-3-12b"])
def test_explain_shows_formula_inputs_and_source_of_every_component(name: str) -> None:
    found = answer(name, 8192)
    text = one_line(shown(found, 200, explain=True))
    for row in found.answers:
        assert row.estimate is not None
        for part in row.estimate.components:
            assert part.name in text
            assert one_line(part.formula) in text
            assert one_line(part.source) in text
            for key in part.inputs:
                assert f"{key}=" in text
        for gap in row.estimate.not_modelled:
            assert one_line(gap) in text


def test_explain_lists_every_instant_from_the_largest_down() -> None:
    found = answer("qwen3-8b", 8192, serve=False)
    text = one_line(shown(found, 200, explain=True))
    listed = text[text.index("Instants: ") :]
    sizes = sorted(found.answers[0].instants.items(), key=lambda item: -item[1])
    places = [listed.index(f"{name} {format_gib(size_bytes)}") for name, size_bytes in sizes]
    assert places == sorted(places)


def test_explain_of_what_cannot_run_is_its_reason() -> None:
    text = one_line(shown(answer("gemma-3-4b", 1024, finetune=False, gpu=gpu("t4")), explain=True))
    assert "Serving at 1k: NVIDIA T4 has no bf16" in text


# ------------------------------------------------------------------------------------------------------ csv, json


def test_csv_has_a_line_a_component_and_a_total() -> None:
    found = answer("qwen3-8b", 8192)
    rows = list(csv.DictReader(io.StringIO(report.size_csv(found))))
    for row in found.answers:
        assert row.estimate is not None
        mine = [r for r in rows if r["task"] == row.task]
        assert [r["component"] for r in mine] == [*(c.name for c in row.estimate.components), "total"]
        assert int(mine[-1]["expected_bytes"]) == row.needed_bytes
        assert {r["fits"] for r in mine} == {"true"}
        assert {r["place"] for r in mine} == {row.place}


def test_csv_of_what_cannot_run_has_its_head_alone() -> None:
    text = report.size_csv(answer("gemma-3-4b", 1024, finetune=False, gpu=gpu("t4")))
    assert text.count("\n") == 1


def test_the_validation_s_json_can_be_written_and_counts() -> None:
    row = RowPrediction(
        id="r1",
        model="m",
        setting="s",
        assumed=(),
        quantities={"peak": Compared(predicted=11.0, measured=10.0, error_pct=10.0)},
    )
    found = report.validation_json(summarise([row], [Refusal(id="r2", reason="why")], 2))
    assert json.loads(json.dumps(found)) == found
    assert found["summary"]["quantities"]["peak"] == {
        "rows": 1,
        "median_abs_pct": 10.0,
        "p90_abs_pct": 10.0,
        "max_abs_pct": 10.0,
        "worst_row": "r1",
    }
    assert found["summary"]["refused_reasons"] == {"why": 1}


def test_a_validation_is_printed_with_its_rows_or_as_a_summary() -> None:
    row = RowPrediction(
        id="row-17",
        model="m",
        setting="s",
        assumed=(),
        quantities={"peak": Compared(predicted=11.0, measured=10.0, error_pct=10.0)},
    )
    found = summarise([row], [Refusal(id="r2", reason="no such card")], 2)
    texts = []
    for rows in (True, False):
        out = io.StringIO()
        report.print_validation(Console(file=out, width=100), found, rows=rows)
        texts.append(out.getvalue())
    full, summary = texts
    assert "+10.00" in full
    assert "+10.00" not in summary
    for text in texts:
        assert "2 rows, 1 predicted, 1 refused" in text
        assert "no such card" in text
        assert "10.00" in text


# ------------------------------------------------------------------------------------------------------- catalogs


@pytest.mark.parametrize("columns", [80, 160, 400])
def test_the_table_of_models_names_each_and_its_licence(columns: int) -> None:
    entries = [entry for entry in catalog.model_entries() if entry.listed]
    out = io.StringIO()
    Console(file=out, width=columns).print(report.models_table(entries, columns))
    for entry in entries:
        assert entry.name in out.getvalue()
        assert entry.license in out.getvalue()
    assert f"{len(entries)} models" in out.getvalue()


@pytest.mark.parametrize("columns", [80, 160, 400])
def test_the_table_of_sizes_names_each_and_says_why_one_cannot_be_planned(columns: int) -> None:
    listed = [size_ for size_ in skus() if size_.plannable or columns == 400]
    out = io.StringIO()
    Console(file=out, width=columns).print(report.skus_table(listed, columns))
    text = one_line(out.getvalue())
    for size_ in listed:
        assert size_.short_name in text
        assert one_line(size_.unplannable_reason) in text
    assert f"{len(listed)} Azure GPU sizes" in text
