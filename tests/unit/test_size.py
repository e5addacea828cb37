"""`planner size` as a function: one answer for each task and context, ladders, remedies that hold, refused contexts."""

from __future__ import annotations

import importlib.util
import json
import shlex
import sys
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from planner import catalog
from planner.catalog.hardware import gpu, sku
from planner.errors import PlannerError
from planner.memory.serving import ServingSettings
from planner.memory.training import FinetuneSettings
from planner.model import ModelSpec
from planner.size import MAX_CONTEXTS, SizeAnswer, SizeRequest, check_contexts, headroom_of, size

ROOT = Path(__file__).parents[2]


def _golden() -> ModuleType:
    path = ROOT / "scripts" / "golden.py"
    found = importlib.util.spec_from_file_location("golden", path)
    assert found is not None
    assert found.loader is not None
    module = importlib.util.module_from_spec(found)
    sys.modules["golden"] = module
    found.loader.exec_module(module)
    return module


command = _golden()


@cache
def spec(name: str) -> ModelSpec:
    return catalog.model(name)


def request(*contexts: int, serve: bool = True, finetune: bool = True, **options: Any) -> SizeRequest:
    return SizeRequest(
        contexts=contexts,
        serve=ServingSettings(max_model_len=max(contexts)) if serve else None,
        finetune=FinetuneSettings(seq_len=max(contexts)) if finetune else None,
        **options,
    )


def asked(*argv: str) -> SizeAnswer:
    """The answer of the command itself."""
    outcome = command.run(("size", *argv, "--json"))
    assert outcome.exit_code in (0, 1), outcome.stderr
    return SizeAnswer.model_validate_json(outcome.stdout)


# ------------------------------------------------------------------------------------------------------- answers


def test_there_is_one_answer_for_each_task_and_context_in_the_order_asked() -> None:
    answer = size(spec("qwen3-8b"), request(8192, 2048, 32_768))
    assert [(a.task, a.context) for a in answer.answers] == [
        (task, context) for task in ("serve", "finetune") for context in (8192, 2048, 32_768)
    ]
    assert answer.fits


def test_data_parallel_training_may_use_any_number_of_a_vms_gpus() -> None:
    argv = ("--model", "qwen3-8b", "--ctx", "8k", "--task", "finetune", "--sku", "ND96isr_H100_v5")
    (answer,) = asked(*argv, "--parallelism", "ddp", "--n-gpus", "3").answers
    assert (answer.fits, answer.gpus, answer.link) == (True, 3, "")


def test_tp_spreads_fine_tuning_on_cards_too_and_pipeline_stages_do_not() -> None:
    argv = ("--model", "qwen3-8b", "--ctx", "8k", "--tp", "2", "--pp", "2")
    gpus = {a.task: a.gpus for a in asked(*argv, "--gpu", "h100-nvl").answers}
    assert gpus == {"serve": 4, "finetune": 2}
    gpus = {a.task: a.gpus for a in asked(*argv, "--sku", "ND96isr_H100_v5").answers}
    assert gpus == {"serve": 4, "finetune": 2}


def test_where_nothing_fits_the_largest_size_that_can_run_it_says_what_is_too_big() -> None:
    # the AMD size is larger, but does not run bitsandbytes
    argv = ("--model", "llama-3.3-70b", "--ctx", "128k", "--task", "finetune", "--micro-batch", "64")
    (answer,) = asked(*argv).answers
    assert not answer.fits
    assert answer.gpu.startswith("h200")
    assert answer.reason.endswith("GiB)")


def test_a_packed_checkpoint_is_served_and_its_fine_tuning_left_out_with_a_note(tmp_path: Path) -> None:
    config = catalog.load_config("qwen3-8b") | {
        "quantization_config": {"quant_method": "bitsandbytes", "load_in_8bit": True}
    }
    (tmp_path / "config.json").write_text(json.dumps(config), encoding="utf-8")
    answer = asked("--model", str(tmp_path), "--ctx", "8k", "--gpu", "a10", "--method", "lora")
    assert [a.task for a in answer.answers] == ["serve"]
    assert any("fine-tuning is left out" in note for note in answer.notes)
    estimate = answer.answers[0].estimate
    assert estimate is not None
    # LLM.int8: a byte a weight and a float32 a row in the linear layers, 16 bits for embedding, head and norms
    per_layer = {"qkv": (6144, 4096), "o": (4096, 4096), "gate_up": (24_576, 4096), "down": (4096, 12_288)}
    linear = 36 * sum(rows * cols + 4 * rows for rows, cols in per_layer.values())
    plain = 2 * (2 * 151_936 * 4096 + 36 * (2 * 4096 + 2 * 128) + 4096)
    assert estimate.component("weights").expected_bytes == linear + plain


def test_the_head_of_the_answer_is_the_model() -> None:
    answer = size(spec("qwen3-8b"), request(8192))
    assert (answer.model, answer.hub_id) == ("qwen3-8b", "Qwen/Qwen3-8B")
    assert (answer.parameters, answer.layers, answer.max_context) == (8_190_735_360, 36, 40_960)
    # 36 layers x 2 (key, value) x 8 heads x 128 x 2 B
    assert answer.kv_bytes_per_token == 36 * 2 * 8 * 128 * 2 == 147_456


def test_kv_bytes_per_token_are_those_of_one_gpu_with_the_kv_type_asked_for() -> None:
    plain = asked("--model", "qwen3-8b", "--ctx", "8k", "--task", "serve", "--tp", "2")
    half = asked("--model", "qwen3-8b", "--ctx", "8k", "--task", "serve", "--kv-cache-dtype", "fp8")
    assert plain.kv_bytes_per_token == 147_456
    assert half.kv_bytes_per_token == 147_456 // 2


def test_an_answer_needs_what_its_components_sum_to_and_at_most_what_there_is() -> None:
    for row in size(spec("gemma-3-12b"), request(2048, 32_768)).answers:
        assert row.estimate is not None
        assert row.needed_bytes == row.estimate.expected_bytes
        assert row.fits
        assert row.needed_bytes <= row.usable_bytes == gpu(row.gpu).usable_bytes
        assert row.largest_context >= row.context
        assert (row.reason, row.remedies) == ("", ())


def test_a_serving_answer_has_vllm_s_arguments_and_no_training_figures() -> None:
    (row,) = size(spec("qwen3-8b"), request(8192, finetune=False)).answers
    assert "--max-model-len=8192" in row.arguments
    assert row.sequences_at_context is not None
    assert row.kv_tokens is not None
    assert row.sequences_at_context <= row.kv_tokens // 8192
    assert row.allocated_bytes is None
    assert not row.instants
    assert not row.loss_heads


def test_a_training_answer_has_instants_and_four_loss_heads_and_no_serving_figures() -> None:
    (row,) = size(spec("qwen3-8b"), request(32_768, serve=False)).answers
    assert row.allocated_bytes == max(row.instants.values())
    assert row.trainable_parameters == 43_646_976
    assert [head.loss for head in row.loss_heads] == ["chunked", "liger", "hf", "hf_outputs"]
    peaks = {head.loss: head.allocated_bytes for head in row.loss_heads}
    assert peaks["chunked"] == row.allocated_bytes  # TRL's default
    assert peaks["chunked"] < peaks["hf"] < peaks["hf_outputs"]
    assert (row.kv_tokens, row.arguments, row.engine_version) == (None, (), None)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"gpu": gpu("a10")},
        {"gpu": gpu("t4")},
        {"sku": sku("NC96ads_A100_v4"), "gpus": 4},
        {"headroom": 0.2},
    ],
    ids=str,
)
def test_the_answer_survives_json(options: dict[str, Any]) -> None:
    answer = size(spec("qwen3-8b"), request(2048, 32_768, **options))
    assert SizeAnswer.model_validate_json(answer.model_dump_json()) == answer
    assert json.loads(answer.model_dump_json())["schema_version"] == "tonnage.size/1"


def test_the_search_has_ladders_and_a_place_that_is_given_has_none() -> None:
    searched = size(spec("qwen3-8b"), request(8192))
    assert searched.serving_ladder
    assert searched.finetune_ladder
    for options in ({"gpu": gpu("a10")}, {"sku": sku("NV36ads_A10_v5")}):
        given_place = size(spec("qwen3-8b"), request(8192, **options))
        assert not given_place.serving_ladder
        assert not given_place.finetune_ladder


def test_the_place_of_an_answer_is_on_its_ladder() -> None:
    answer = size(spec("qwen3-8b"), request(2048, 8192, 32_768))
    for row in answer.answers:
        steps = answer.serving_ladder if row.task == "serve" else answer.finetune_ladder
        step = next(s for s in steps if s.from_tokens <= row.context <= s.to_tokens)
        assert step.place.partition(", ")[0] == row.place.partition(", ")[0]


def test_a_spread_over_gpus_says_what_their_link_means() -> None:
    answer = asked("--model", "qwen3-8b", "--ctx", "8k", "--task", "serve", "--sku", "NC96ads_A100_v4", "--tp", "4")
    (row,) = answer.answers
    assert (row.gpus, row.sku) == (4, "Standard_NC96ads_A100_v4")
    assert "NVLink pairs joined by PCIe" in row.link
    assert "--tensor-parallel-size=4" in row.arguments


def test_a_card_outside_any_vm_may_be_several() -> None:
    (row,) = asked(
        "--model", "llama-3.3-70b", "--ctx", "8k", "--task", "serve", "--gpu", "h100-nvl", "--tp", "2"
    ).answers
    assert row.fits
    assert (row.gpus, row.sku) == (2, None)


# ---------------------------------------------------------------------------------------------------- headroom


def test_training_keeps_a_twentieth_free_and_serving_nothing_unless_asked() -> None:
    plain = request(8192)
    assert (headroom_of(plain, "serve"), headroom_of(plain, "finetune")) == (0.0, 0.05)
    asked_for = request(8192, headroom=0.2)
    assert (headroom_of(asked_for, "serve"), headroom_of(asked_for, "finetune")) == (0.2, 0.2)


@settings(max_examples=15, deadline=None)
@given(st.sampled_from(("qwen3-8b", "mistral-7b-v0.1")), st.floats(0, 0.5), st.floats(0, 0.4))
def test_more_headroom_never_reaches_further(name: str, headroom: float, more: float) -> None:
    few, many = (
        size(spec(name), request(4096, gpu=gpu("a100-40-sxm"), headroom=share)) for share in (headroom, headroom + more)
    )
    for here, there in zip(few.answers, many.answers, strict=True):
        assert there.largest_context <= here.largest_context
        assert here.fits or not there.fits


# ------------------------------------------------------------------------------------------- what does not fit


def test_a_misfit_names_what_is_too_big_by_how_much_and_where() -> None:
    answer = size(spec("qwen3-8b"), request(32_768, serve=False, gpu=gpu("t4")))
    (row,) = answer.answers
    assert not answer.fits
    assert not row.fits
    assert row.reason.startswith("qwen3-8b at 32k tokens does not fit on NVIDIA T4")
    assert "the largest part is" in row.reason
    assert "\n" not in row.reason


def test_a_card_that_cannot_run_it_gives_the_reason_and_no_estimate() -> None:
    (row,) = size(spec("gemma-3-4b"), request(1024, finetune=False, gpu=gpu("t4"))).answers
    assert not row.fits
    assert row.estimate is None
    assert "has no bf16 and vLLM refuses fp16" in row.reason


def test_what_fits_nowhere_is_tried_on_the_largest_size() -> None:
    wanted = SizeRequest(contexts=(1024,), finetune=FinetuneSettings(seq_len=1024, method="full", weights_dtype="fp32"))
    answer = size(spec("llama-3.1-405b"), wanted)
    (row,) = answer.answers
    assert not row.fits
    assert row.gpus == 8
    assert answer.finetune_ladder == ()
    assert row.reason


@pytest.mark.parametrize(
    "argv",
    [
        "--model qwen3-8b --ctx 32k --gpu a10 --task serve",
        "--model qwen3-8b --ctx 8k --gpu t4 --task serve",
        "--model gemma-3-12b --ctx 128k --gpu a10 --task serve",
        "--model llama-3.3-70b --ctx 8k --gpu a100-80-pcie --task serve",
        "--model qwen3-8b --ctx 32k --gpu a100-40-sxm --concurrency 32 --task serve",
        "--model llama-3.3-70b --ctx 32k --sku NC48ads_A100_v4 --task serve",
        "--model qwen3-8b --ctx 32k --gpu a10 --method full --task finetune",
        "--model qwen3-8b --ctx 32k --gpu a10 --task finetune",
        "--model qwen3-8b --ctx 8k --gpu a10 --method lora --loss hf --task finetune",
        "--model phi-4 --ctx 16k --gpu h100-nvl --method lora --micro-batch 8 --no-gradient-checkpointing"
        " --task finetune",
        "--model qwen3-8b --ctx 4k --gpu l4 --method lora --attention eager --task finetune",
        "--model mistral-7b-v0.1 --ctx 8k --sku NC4as_T4_v3 --task finetune",
    ],
)
def test_every_remedy_fits_when_its_flags_are_added(argv: str) -> None:
    words = shlex.split(argv)
    (row,) = asked(*words).answers
    assert not row.fits
    assert row.remedies
    for remedy in row.remedies:
        flags = shlex.split(remedy.flags)
        line = list(words)
        if "--sku" in flags:  # instead of the place that was given
            for place in ("--gpu", "--sku", "--tp"):
                if place in line:
                    at = line.index(place)
                    del line[at : at + 2]
        if "--gradient-checkpointing" in flags and "--no-gradient-checkpointing" in line:
            line.remove("--no-gradient-checkpointing")
        (changed,) = asked(*line, *flags).answers
        assert changed.fits, remedy
        if changed.place == remedy.place:  # with its change a VM size may do with fewer of its GPUs
            assert changed.needed_bytes == remedy.needed_bytes, remedy
        else:
            assert "--sku" in line
            assert changed.gpus < row.gpus, remedy


# ------------------------------------------------------------------------------------------------------ contexts


@pytest.mark.parametrize("tokens", [0, -1, -(10**18)])
def test_a_context_starts_at_one_token(tokens: int) -> None:
    with pytest.raises(PlannerError, match="cannot be planned: it starts at 1"):
        check_contexts(spec("qwen3-8b"), (8192, tokens), None)


@pytest.mark.parametrize("tokens", [40_961, 10**9, 10**30])
def test_a_context_beyond_the_model_s_is_refused(tokens: int) -> None:
    with pytest.raises(PlannerError, match="beyond qwen3-8b's context of 40,960") as refusal:
        check_contexts(spec("qwen3-8b"), (tokens,), None)
    assert ("--rope-scaling" in str(refusal.value)) == (tokens <= 64 * 40_960)


def test_a_rope_extension_that_is_stated_lengthens_the_context() -> None:
    check_contexts(spec("qwen3-8b"), (131_072,), 4)
    with pytest.raises(PlannerError, match=r"40,960 x 2: lower --ctx, or state .*yarn:4"):
        check_contexts(spec("qwen3-8b"), (131_072,), 2)
    answer = asked("--model", "qwen3-8b", "--ctx", "128k", "--rope-scaling", "yarn:4", "--task", "serve")
    assert answer.max_context == 4 * 40_960
    assert answer.answers[0].fits
    assert answer.serving_ladder[-1].to_tokens == 4 * 40_960


def test_no_context_and_too_many_are_refused() -> None:
    with pytest.raises(PlannerError, match="no context was given"):
        check_contexts(spec("qwen3-8b"), (), None)
    check_contexts(spec("qwen3-8b"), (1,) * MAX_CONTEXTS, None)
    with pytest.raises(PlannerError, match="65 contexts are too many"):
        check_contexts(spec("qwen3-8b"), (1,) * (MAX_CONTEXTS + 1), None)


def test_size_itself_refuses_a_context_that_cannot_be() -> None:
    with pytest.raises(PlannerError, match="beyond"):
        size(spec("qwen3-8b"), request(65_536))


@settings(max_examples=12, deadline=None)
@given(st.integers(1, 40_960))
def test_any_context_of_the_model_has_an_answer(tokens: int) -> None:
    for row in size(spec("qwen3-8b"), request(tokens)).answers:
        assert row.fits
        assert row.context == tokens <= row.largest_context
