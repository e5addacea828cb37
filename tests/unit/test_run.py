"""A training run: steps, hours and USD by hand, what a batch wastes, and nonsense that is refused in a sentence."""

from __future__ import annotations

import json
from decimal import Decimal
from functools import cache
from math import ceil
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from planner import catalog
from planner.catalog.hardware import gpu, sku
from planner.catalog.prices import load_sheet
from planner.cli import app, main
from planner.cost.spot import training_overhead
from planner.errors import PlannerError
from planner.memory.training import FinetuneSettings, training_memory
from planner.run import (
    RunRequest,
    assumed_risk,
    checkpoint_bytes,
    checkpoint_hours,
    default_context,
    run_request,
    with_runs,
)
from planner.size import SizeAnswer, SizeRequest, TrainingRun, size

MODEL = "mistral-7b-v0.3"
A100 = "NC24ads_A100_v4"


def asked(samples: int = 10_000, tokens: int = 512, **more: Any) -> RunRequest:
    return RunRequest(samples=samples, tokens_per_sample=tokens, **more)


@cache
def answer(contexts: tuple[int, ...], place: str, desk: bool, **options: Any) -> tuple[SizeRequest, SizeAnswer]:
    request = SizeRequest(
        contexts=contexts,
        finetune=FinetuneSettings(seq_len=max(contexts), **options),
        sku=None if desk else sku(place),
        gpu=gpu(place) if desk else None,
    )
    return request, size(catalog.model(MODEL), request)


def run(wanted: RunRequest, context: int = 512, place: str = A100, desk: bool = False, **options: Any) -> TrainingRun:
    request, found = answer((context,), place, desk, **options)
    made = with_runs(catalog.model(MODEL), request, found, wanted).answers[0].run
    assert made is not None
    return made


# ------------------------------------------------------------------------------------------------ by hand


def test_steps_are_samples_times_epochs_over_the_batch() -> None:
    assert run(asked(), micro_batch=8).steps == 1250
    assert run(asked(epochs=3), micro_batch=8, gradient_accumulation_steps=4).steps == 938  # 30,000 / 32 = 937.5
    assert run(asked(samples=1)).steps == 1


def test_hours_are_steps_times_seconds_and_usd_are_hours_times_the_rate() -> None:
    found = run(asked(), micro_batch=8)
    for end in ("low", "expected", "high"):
        assert getattr(found.hours, end) == pytest.approx(1250 * getattr(found.step_seconds, end) / 3600)
    rate = load_sheet().rate(f"Standard_{A100}", "eastus", "on-demand")
    assert rate is not None
    assert found.usd_on_demand is not None
    assert float(found.usd_on_demand.expected) == pytest.approx(float(rate) * found.hours.expected, abs=0.01)
    assert found.region == "eastus"
    assert found.samples_per_s.expected == pytest.approx(10_000 / (found.hours.expected * 3600))


def test_spot_pays_for_evictions_and_says_how_often_to_save() -> None:
    found = run(asked(samples=1_000_000), micro_batch=8)
    overhead = training_overhead(assumed_risk(), checkpoint_hours(found.checkpoint_bytes))
    rate = load_sheet().rate(f"Standard_{A100}", "eastus", "spot")
    assert rate is not None
    assert found.usd_spot is not None
    assert found.usd_on_demand is not None
    expected = float(rate) * found.hours.expected * float(overhead.factor[1])
    assert float(found.usd_spot.expected) == pytest.approx(expected, abs=0.01)
    assert overhead.factor[1] > 1
    assert found.usd_spot.low < found.usd_spot.expected < found.usd_spot.high < found.usd_on_demand.expected
    assert overhead.interval_hours is not None
    assert found.checkpoint_minutes == pytest.approx(float(overhead.interval_hours) * 60)


def test_an_adapter_checkpoint_is_the_adapter_and_its_two_moments() -> None:
    # 41,943,040 parameters of rank 16 on all linear layers of Mistral-7B: 4 B each, and two moments of 4 B
    memory = training_memory(catalog.model(MODEL), FinetuneSettings(method="lora", seq_len=512, lora_rank=16))
    assert checkpoint_bytes(memory) == 41_943_040 * 12
    # 503 MB at 120 MB/s and 15 s besides, as assumptions.json expects
    assert checkpoint_hours(41_943_040 * 12)[1] * 3600 == pytest.approx(41_943_040 * 12 / 120e6 + 15)


# --------------------------------------------------------------------------------------- what a batch wastes


def test_a_batch_is_padded_to_the_longest_sample_or_the_context() -> None:
    found = run(asked(tokens=300, max_tokens_per_sample=400), context=1024, micro_batch=4)
    assert (found.sequence_tokens, found.fill.expected) == (400, 0.75)
    assert any("padded to 400 tokens, which wastes 25%" in text for text in found.assumed)
    assert run(asked(tokens=256), context=1024, micro_batch=4).fill.expected == 0.25


def test_one_sample_at_a_time_pads_nothing() -> None:
    found = run(asked(tokens=256), context=1024, micro_batch=1)
    assert (found.sequence_tokens, found.fill.low, found.fill.high) == (256, 1, 1)


def test_packing_fills_contexts_and_needs_fewer_rows() -> None:
    # 8 samples of 512 fill 4096 whole
    whole = run(asked(packing=True), context=4096)
    assert (whole.sequence_tokens, whole.fill.low, whole.fill.high) == (4096, 1, 1)
    assert whole.steps == 10_000 * 512 / 4096
    # 2 samples of 700 leave 648 of 2048: 0.684 when none is cut, 1 at best, the middle expected
    parts = run(asked(tokens=700, packing=True), context=2048)
    assert parts.fill.low == pytest.approx(1400 / 2048)
    assert parts.fill.expected == pytest.approx((1400 / 2048 + 1) / 2)
    assert parts.steps == ceil(10_000 * 700 / (2048 * parts.fill.expected))
    assert parts.hours.low < parts.hours.expected < parts.hours.high


def test_packing_beats_padding_where_lengths_differ() -> None:
    packed = run(asked(tokens=256, packing=True), context=2048, micro_batch=4)
    padded = run(asked(tokens=256, packing=False), context=2048, micro_batch=4)
    assert packed.hours.expected < 0.3 * padded.hours.expected


# ---------------------------------------------------------------------------------------- what must always hold


@given(st.integers(1, 2000), st.integers(2, 50), st.sampled_from([1, 2, 8]))
@settings(max_examples=30, deadline=None)
def test_hours_are_linear_in_whole_steps(batches: int, times: int, micro_batch: int) -> None:
    one = run(asked(samples=batches * micro_batch), micro_batch=micro_batch)
    many = run(asked(samples=batches * micro_batch * times), micro_batch=micro_batch)
    assert many.hours.expected == pytest.approx(times * one.hours.expected)
    assert run(asked(samples=batches * micro_batch, epochs=times), micro_batch=micro_batch).steps == many.steps


@given(st.integers(1, 4096), st.booleans(), st.sampled_from([1, 4]), st.floats(0.01, 5))
@settings(max_examples=40, deadline=None)
def test_every_span_is_in_order(tokens: int, packing: bool, micro_batch: int, epochs: float) -> None:
    found = run(asked(tokens=tokens, packing=packing, epochs=epochs), context=4096, micro_batch=micro_batch)
    for span in (
        found.hours,
        found.step_seconds,
        found.fill,
        found.mfu,
        found.samples_per_s,
        found.tokens_per_s_per_gpu,
    ):
        assert 0 < span.low <= span.expected <= span.high
    assert found.fill.high <= 1
    assert found.usd_on_demand is not None
    assert Decimal(0) <= found.usd_on_demand.low <= found.usd_on_demand.expected <= found.usd_on_demand.high


# ------------------------------------------------------------------------------------------ the command


def command(*argv: str) -> Any:
    return CliRunner().invoke(app, ["size", "--model", MODEL, *argv], env={"COLUMNS": "80"})


def test_the_context_of_a_run_is_its_longest_sample_unless_one_is_named() -> None:
    text = command("--task", "finetune", "--samples", "10000", "--tokens-per-sample", "512").stdout
    assert "A run of 10,000 samples at 512" in text
    assert default_context(asked(max_tokens_per_sample=900)) == "900"


def test_json_has_the_run_where_one_was_asked_for_and_no_word_of_it_elsewhere() -> None:
    args = ("--ctx", "1k,2k", "--sku", A100, "--json")
    found = json.loads(command(*args, "--samples", "100", "--tokens-per-sample", "512").stdout)
    by_task = {(a["task"], a["context"]): a.get("run") for a in found["answers"]}
    assert by_task["serve", 1024] is None
    assert by_task["finetune", 1024]["samples"] == 100
    assert by_task["finetune", 2048]["sequence_tokens"] == 512
    assert "run" not in json.loads(command(*args).stdout)["answers"][-1]


def test_the_answer_says_time_speed_and_both_prices() -> None:
    text = command("--sku", A100, "--task", "finetune", "--samples", "10000", "--tokens-per-sample", "512").stdout
    for part in ("tokens/s a GPU, MFU", "on demand (", "on spot (", "in eastus", "a checkpoint every"):
        assert part in text
    assert "padded" not in text


def test_explain_shows_every_part_of_a_step_with_its_formula_and_what_is_supposed() -> None:
    args = ("--sku", A100, "--task", "finetune", "--samples", "10000", "--tokens-per-sample", "512", "--explain")
    text = command(*args).stdout
    for part in ("recomputation", "unpacking of weights", "loss head", "Supposed:", "Prices: price sheet"):
        assert part in text


def test_a_desk_has_no_price_and_a_card_nobody_measured_says_so() -> None:
    found = run(asked(), place="a10", desk=True)
    assert found.usd_on_demand is None
    assert found.extrapolated
    text = command("--gpu", "a10", "--task", "finetune", "--samples", "10", "--tokens-per-sample", "512").stdout
    assert "no price" in text
    assert "no training speed was measured" in text


def test_where_it_does_not_fit_there_is_no_run() -> None:
    outcome = command(
        "--gpu",
        "t4",
        "--method",
        "lora",
        "--task",
        "finetune",
        "--samples",
        "10",
        "--tokens-per-sample",
        "512",
        "--json",
    )
    assert outcome.exit_code == 1
    assert "run" not in json.loads(outcome.stdout)["answers"][0]


@pytest.mark.parametrize(
    ("argv", "sentence"),
    [
        ("--ctx 2k --samples 0 --tokens-per-sample 512", "a run of 0 samples cannot be planned"),
        ("--ctx 2k --samples 10 --tokens-per-sample 512 --task serve", "--task serve plans none"),
        ("--ctx 2k --samples 10 --tokens-per-sample 4096", "beyond a context of 2,048, where they would be cut"),
        ("--ctx 2k --samples 10", "--samples needs the mean length of a sample"),
        ("--ctx 2k --tokens-per-sample 512", "is about a training run: add --samples"),
        ("--ctx 2k --packing", "is about a training run: add --samples"),
        ("--ctx 2k --samples 10 --tokens-per-sample 0", "a sample of 0 tokens teaches nothing"),
        ("--ctx 2k --samples 10 --tokens-per-sample many", "is not a token count"),
        ("--ctx 2k --samples 10 --tokens-per-sample 512 --epochs nan", "nan epochs cannot be planned"),
        ("--ctx 2k --samples 10 --tokens-per-sample 512 --epochs -1", "-1 epochs cannot be planned"),
        ("--ctx 2k --samples 10 --tokens-per-sample 512 --max-tokens-per-sample 12", "is shorter than the mean"),
        ("", "no context was given"),
    ],
)
def test_nonsense_gets_one_sentence(
    argv: str, sentence: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.argv", ["planner", "size", "--model", MODEL, *argv.split()])
    with pytest.raises(SystemExit) as stopped:
        main()
    assert stopped.value.code == 2
    said = capsys.readouterr().err
    assert sentence in said
    assert said.count("\n") == 1


def test_a_request_without_fine_tuning_has_no_run() -> None:
    request, found = answer((512,), A100, False)
    with pytest.raises(PlannerError, match="this answer has none"):
        with_runs(catalog.model(MODEL), request.model_copy(update={"finetune": None}), found, asked())
    assert (
        run_request(dict.fromkeys(("samples", "tokens_per_sample", "max_tokens_per_sample", "epochs", "packing")))
        is None
    )
