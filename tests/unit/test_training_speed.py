"""Training speed: operations by hand, what must hold on every card, one published reference, and the fit."""

from __future__ import annotations

import importlib.util
import sys
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from planner import catalog
from planner.catalog import read_facts
from planner.catalog.hardware import gpu, gpus
from planner.catalog.training_speed import card_family, fitted, speed_constants, speed_sources
from planner.errors import NotModelled, PlannerError
from planner.memory.finetune_settings import resolve
from planner.memory.training import FinetuneSettings
from planner.model import ModelSpec
from planner.performance.training import TrainingSpeed, training_speed
from planner.performance.training_work import TrainingWork, training_work

ROOT = Path(__file__).parents[2]
CARDS = [card.name for card in gpus() if card.bf16_tflops or card.fp16_tflops]
LLAMA_LAYER = 4 * 4096 * 4096 + 3 * 4096 * 11008  # q, k, v, o; gate, up, down of Llama-2-7B
LLAMA_WEIGHTS = 32 * LLAMA_LAYER
LLAMA_HEAD = 32000 * 4096


@cache
def spec(name: str) -> ModelSpec:
    return catalog.model(name)


def run(**options: Any) -> FinetuneSettings:
    usual: dict[str, Any] = {"method": "lora", "trainer": "transformers", "seq_len": 4096, "attention": "efficient"}
    return FinetuneSettings(**(usual | options))


def work(model: str = "llama-2-7b", *, sample_tokens: int | None = None, **options: Any) -> TrainingWork:
    job = resolve(spec(model), run(**options), bf16=True, flash=True, hopper=False)
    return training_work(job, sample_tokens=sample_tokens)


def speed(
    model: str = "llama-2-7b", card: str = "a100-80-sxm", link: float | None = None, **more: Any
) -> TrainingSpeed:
    return training_speed(spec(model), run(**more), gpu(card), link_bytes_per_s=link)


def seconds(found: TrainingSpeed, name: str) -> float:
    return sum(part.seconds for part in found.parts if part.name == name)


# ------------------------------------------------------------------------------------------------------ by hand


def test_a_forward_takes_two_operations_for_each_weight_and_token() -> None:
    found = work(micro_batch=2)
    assert found.tokens == 8192
    assert found.layer_flops == 2 * 8192 * LLAMA_WEIGHTS
    assert found.head_flops == 2 * 8192 * LLAMA_HEAD


def test_causal_attention_sees_half_of_the_keys() -> None:
    # 32 layers, 32 heads of 128 + 128, (4096 + 1) / 2 keys on average, 2 operations each
    assert work().attention_flops == pytest.approx(4096 * 32 * 2 * 32 * 256 * 4097 / 2)


def test_attention_within_a_window_sees_the_window() -> None:
    # mistral-7b-v0.1: window 4096; at 16384 tokens 4096 - 4096 x 4095 / 32768 = 3584.125 keys a token
    found = work("mistral-7b-v0.1", seq_len=16384)
    assert found.attention_flops == pytest.approx(16384 * 32 * 2 * 32 * 256 * 3584.125)


def test_packed_samples_attend_to_themselves_alone() -> None:
    whole, packed = work(seq_len=4096), work(seq_len=4096, sample_tokens=512)
    assert packed.attention_flops / whole.attention_flops == pytest.approx(513 / 4097)
    assert packed.layer_flops == whole.layer_flops


def test_of_a_mixture_of_experts_a_token_meets_two_of_eight() -> None:
    # Mixtral: attention 2 x 4096^2 + 2 x 4096 x 1024, router 8 x 4096, 2 experts of 3 x 4096 x 14336
    layer = 2 * 4096 * 4096 + 2 * 4096 * 1024 + 8 * 4096 + 2 * 3 * 4096 * 14336
    assert work("mixtral-8x7b").layer_flops == 2 * 4096 * 32 * layer


def test_frozen_weights_save_one_of_three_products_and_checkpointing_adds_one() -> None:
    assert work(method="full").weight_passes == 2
    assert work().weight_passes == 1
    assert work(gradient_checkpointing=True).recomputed == 1
    assert work(gradient_checkpointing=False).recomputed == 0


def test_mfu_counts_six_operations_a_weight_for_full_and_four_for_lora() -> None:
    attention = 3 * work().attention_flops
    assert work(method="full").useful_flops == 6 * 4096 * (LLAMA_WEIGHTS + LLAMA_HEAD) + attention
    assert work().useful_flops == 4 * 4096 * (LLAMA_WEIGHTS + LLAMA_HEAD) + attention
    found = speed(gradient_checkpointing=True)
    assert found.mfu.expected == pytest.approx(work().useful_flops / (found.step_seconds.expected * 312e12))


def test_ddp_moves_each_gradient_twice_and_sharding_gathers_the_weights() -> None:
    # half of everything stays on its GPU; LoRA r 16 on Llama-2-7B has 39,976,960 parameters, fp32 here
    assert work(parallelism="ddp", n_gpus=2).step_exchanged_bytes == 2 * 0.5 * 4 * 39_976_960
    full = work(method="full", parallelism="fsdp2", n_gpus=2)
    weights = spec("llama-2-7b").parameter_count
    assert full.exchanged_bytes == 0.5 * (2 * 2 * weights + 2 * weights)  # forward, backward, gradients
    reentrant = work(method="full", parallelism="zero3", n_gpus=2, trainer="fms")
    assert reentrant.exchanged_bytes == 0.5 * (3 * 2 * weights + 2 * weights)
    assert work().exchanged_bytes == 0


def test_a_fused_optimizer_moves_less_than_one_that_goes_tensor_by_tensor() -> None:
    weights = spec("llama-2-7b").parameter_count
    # bf16: parameter read and written, gradient read, two moments read and written: 14 B; clipping 6 B
    assert work(method="full", optimizer="adamw_torch_fused").optimizer_bytes == weights * (14 + 6)
    assert work(method="full", optimizer="adamw_torch").optimizer_bytes == weights * (2.5 * 14 + 6)
    assert work(method="full", optimizer="adamw_8bit").optimizer_bytes == weights * (2 * 2 + 2 + 2 * 2 + 6)


# --------------------------------------------------------------------------------------------- a whole step


def test_the_parts_sum_to_the_step() -> None:
    found = speed(method="qlora", gradient_accumulation_steps=4, parallelism="fsdp2", n_gpus=4)
    assert sum(part.seconds for part in found.parts) == pytest.approx(found.step_seconds.expected)
    assert all(part.formula and part.source for part in found.parts)


def test_a_step_is_its_micro_batches_and_what_comes_once() -> None:
    one, eight = (speed(method="full", gradient_accumulation_steps=n) for n in (1, 8))
    once = seconds(one, "optimizer")
    assert once > 0
    expected = 8 * one.micro_batch_seconds.expected + once
    assert eight.step_seconds.expected == pytest.approx(expected)
    assert eight.tokens_per_s_per_gpu.expected > one.tokens_per_s_per_gpu.expected


def test_the_published_reference_of_an_a10_lies_within_the_interval() -> None:
    """Mistral-7B, QLoRA, 512 tokens, batch 8 on an A10: 1.46 samples/s, 10,000 samples in 114 minutes.

    The reference states neither the adapter's rank and targets nor checkpointing. Rank 16 on all linear layers with
    checkpointing, TRL's defaults, give 1.61 samples/s (103 minutes), 10 % more. Without checkpointing 2.3 come out, so
    the reference did recompute, or ran on something slower. No constant was fitted to it.
    """
    settings = FinetuneSettings(method="qlora", seq_len=512, micro_batch=8)
    found = training_speed(spec("mistral-7b-v0.3"), settings, gpu("a10"))
    assert found.samples_per_s.expected == pytest.approx(1.46, rel=0.15)
    assert found.samples_per_s.low <= 1.46 <= found.samples_per_s.high
    assert 10_000 / found.samples_per_s.expected / 60 == pytest.approx(114, rel=0.15)
    without = settings.model_copy(update={"gradient_checkpointing": False})
    assert training_speed(spec("mistral-7b-v0.3"), without, gpu("a10")).samples_per_s.low > 1.46


def test_short_sequences_wait_for_the_cpu() -> None:
    # QwenLM/Qwen README: a LoRA step of the 1.8B model takes 1.0 s at 256 and at 512 tokens alike
    short, longer = (speed("qwen-1.8b", trainer="transformers-4", seq_len=n) for n in (256, 512))
    assert seconds(short, "waiting for launches") > 0.5 * short.step_seconds.expected
    assert longer.step_seconds.expected < 1.1 * short.step_seconds.expected
    long = speed("qwen-1.8b", trainer="transformers-4", seq_len=8192)
    assert seconds(long, "waiting for launches") < 0.01 * long.step_seconds.expected


def test_dora_costs_about_18_percent() -> None:
    ratio = speed(method="dora").step_seconds.expected / speed(method="lora").step_seconds.expected
    assert ratio == pytest.approx(1.18, abs=0.02)


def test_unpacking_four_bits_costs_time_of_its_own() -> None:
    found = speed(method="qlora")
    assert seconds(found, "unpacking of weights") > 0
    assert seconds(speed(), "unpacking of weights") == 0


def test_a_slow_link_shows_where_weights_are_gathered() -> None:
    nvlink, pcie = (
        speed(method="full", parallelism="fsdp2", n_gpus=4, seq_len=512, link=rate) for rate in (300e9, 16e9)
    )
    assert pcie.step_seconds.expected > 1.5 * nvlink.step_seconds.expected
    ddp = speed(parallelism="ddp", n_gpus=4, seq_len=2048, micro_batch=4, link=16e9)
    alone = speed(seq_len=2048, micro_batch=4)
    assert ddp.step_seconds.expected < 1.05 * alone.step_seconds.expected  # adapters are small


def test_an_optimizer_on_the_cpu_and_paged_states_cost_time() -> None:
    # 6.74 B parameters at 4 B a second, and 4 bytes of each over PCIe
    plain = speed(method="full", parallelism="zero2", n_gpus=2, link=300e9)
    moved = speed(method="full", parallelism="zero2", n_gpus=2, link=300e9, offload=frozenset({"optimizer"}))
    assert moved.step_seconds.expected - plain.step_seconds.expected > 0.8 * 6.738e9 / 2 / 4e9
    # 13.5 GB of weights and as many of states do not fit into 24
    assert seconds(speed(card="rtx-4090", method="full", optimizer="paged_adamw_8bit"), "paging") > 0
    assert seconds(speed(card="a100-80-sxm", method="full", optimizer="paged_adamw_8bit"), "paging") == 0


def test_scores_that_are_materialised_cost_more_the_longer_the_sequence() -> None:
    for tokens in (1024, 8192):
        eager, efficient = (speed(seq_len=tokens, attention=kind) for kind in ("eager", "efficient"))
        assert seconds(eager, "attention") > seconds(efficient, "attention")


# ------------------------------------------------------------------------------------- what must always hold


models = st.sampled_from(["llama-2-7b", "qwen3-8b", "mistral-7b-v0.3", "gemma-2-9b", "mixtral-8x7b", "phi-4"])
methods = st.sampled_from(["full", "lora", "qlora", "dora"])
sizes = st.tuples(st.sampled_from([128, 512, 2048, 8192]), st.sampled_from([1, 2, 8]), st.booleans())


@given(models, methods, sizes, st.sampled_from(CARDS))
@settings(max_examples=60, deadline=None)
def test_no_run_exceeds_what_products_reach_on_the_card(
    model: str, method: str, size: tuple[int, int, bool], card: str
) -> None:
    tokens, batch, again = size
    options = {"method": method, "seq_len": tokens, "micro_batch": batch, "gradient_checkpointing": again}
    if method == "full":
        options["weights_dtype"] = "fp32"  # T4 and V100 need masters
    if method == "qlora" and card == "mi300x":
        return
    found = speed(model, card, **options)
    assert 0 < found.mfu.expected <= found.matmul_fraction <= card_family(card).matmul_cap
    assert found.mfu.low <= found.mfu.expected <= found.mfu.high
    rate = found.tokens_per_s_per_gpu
    assert 0 < rate.low < rate.expected < rate.high
    assert found.step_seconds.low < found.step_seconds.expected < found.step_seconds.high


@given(models, methods, st.sampled_from([1.0, 1.1, 2.0, 10.0]), st.sampled_from([1.0, 1.5, 4.0]))
@settings(max_examples=30, deadline=None)
def test_a_faster_card_is_never_slower(model: str, method: str, flops: float, bandwidth: float) -> None:
    card = gpu("a100-80-sxm")
    assert card.bf16_tflops is not None
    update = {
        "bf16_tflops": card.bf16_tflops * flops,
        "bandwidth_bytes_per_s": int(card.bandwidth_bytes_per_s * bandwidth),
    }
    better = card.model_copy(update=update)
    plain, faster = (training_speed(spec(model), run(method=method), c) for c in (card, better))
    assert faster.tokens_per_s_per_gpu.expected >= plain.tokens_per_s_per_gpu.expected * (1 - 1e-9)


@given(st.sampled_from(["llama-2-7b", "qwen3-8b", "phi-4", "qwen3-14b"]), sizes, st.integers(1, 64))
@settings(max_examples=40, deadline=None)
def test_lora_is_never_slower_than_full_on_models_of_seven_billion_and_more(
    model: str, size: tuple[int, int, bool], rank: int
) -> None:
    tokens, batch, again = size
    common = {"seq_len": tokens, "micro_batch": batch, "gradient_checkpointing": again, "trainer": "unsloth"}
    lora = speed(model, method="lora", lora_rank=rank, **common)
    assert lora.step_seconds.expected <= speed(model, method="full", **common).step_seconds.expected


@given(models, methods, st.sampled_from([512, 2048]))
@settings(max_examples=20, deadline=None)
def test_checkpointing_is_never_faster_and_a_larger_batch_never_slower_a_token(
    model: str, method: str, tokens: int
) -> None:
    kept, again = (speed(model, method=method, seq_len=tokens, gradient_checkpointing=c) for c in (False, True))
    assert again.step_seconds.expected >= kept.step_seconds.expected
    large = speed(model, method=method, seq_len=tokens, micro_batch=4, gradient_checkpointing=True)
    assert large.tokens_per_s_per_gpu.expected >= again.tokens_per_s_per_gpu.expected


# ------------------------------------------------------------------------------------------------- refusals


def test_what_no_formula_covers_is_refused() -> None:
    linear = next(e.name for e in catalog.model_entries() if any(g.kind == "linear" for g in spec(e.name).layers))
    with pytest.raises(NotModelled, match="linear-attention layers depend on the kernel"):
        speed(linear)
    with pytest.raises(PlannerError, match="has no bf16"):
        speed(card="t4", method="full")
    with pytest.raises(PlannerError, match="moves nothing"):
        speed(parallelism="ddp", n_gpus=2, link=0.0 - 1)
    bare = gpu("t4").model_copy(update={"fp16_tflops": None})
    with pytest.raises(NotModelled, match="16-bit matmul rate is not in the catalog"):
        training_speed(spec("llama-2-7b"), run(), bare)
    with pytest.raises(NotModelled, match="is not modelled: add it to"):
        card_family("abacus")


def test_cards_that_nobody_measured_say_so_and_are_less_sure() -> None:
    known, unknown = speed(card="a100-80-sxm"), speed(card="a10")
    assert not known.extrapolated
    assert unknown.extrapolated
    assert any("no training speed was measured" in note for note in unknown.notes)
    assert unknown.step_seconds.high / unknown.step_seconds.low > known.step_seconds.high / known.step_seconds.low
    assert any("no bf16" in note for note in speed(card="t4").notes)


# -------------------------------------------------------------------------------------------- the catalog


def test_every_card_has_a_family_and_only_one() -> None:
    families = read_facts("training_speed.json")["families"]
    listed = [name for family in families for name in family["fp32_tflops"]]
    assert sorted(listed) == sorted(card.name for card in gpus())


def test_every_constant_has_a_source_and_a_day() -> None:
    facts = read_facts("training_speed.json")
    for record in (*facts["constants"], *facts["families"], facts["fit"]):
        assert record["source"]
        assert record["as_of"]
    assert speed_sources(("nf4_fraction", "gptq_fraction")).count(f"fitted to {fitted().rows} published runs") == 1
    assert "fitted" not in speed_sources(("cpu_adam_parameters_per_s",))


def test_families_are_measured_or_marked_and_stay_below_their_cap() -> None:
    for record in read_facts("training_speed.json")["families"]:
        family = card_family(next(iter(record["fp32_tflops"])))
        assert family.extrapolated == (family.rows == 0)
        assert 0 < family.attention_fraction < family.matmul_cap <= 1
        assert family.matmul_fraction <= family.matmul_cap


@cache
def calibration() -> ModuleType:
    found = importlib.util.spec_from_file_location("calibrate", ROOT / "scripts" / "calibrate_training.py")
    assert found is not None
    assert found.loader is not None
    module = importlib.util.module_from_spec(found)
    sys.modules["calibrate"] = module
    found.loader.exec_module(module)
    return module


@cache
def measured() -> list[Any]:
    rows: list[Any] = calibration().read(ROOT / "tests" / "measured" / "training_speed.csv")[0]
    return rows


def test_the_constants_are_those_that_the_calibration_finds() -> None:
    script = calibration()
    model = script.Model(read_facts("training_speed.json"), sorted({row.family for row in measured()}))
    theta = script.fit(model, measured())
    found = model.constants(theta)
    for record in model.fitted:
        assert speed_constants()[record["name"]] == pytest.approx(found[record["name"]], rel=0.01)
    assert fitted().rows == len(measured())


def test_runs_of_a_project_that_was_left_out_are_met_within_15_percent_in_the_median() -> None:
    script = calibration()
    facts = read_facts("training_speed.json")
    held = [row for row in measured() if row.source == "Qwen" and row.grade == "A"]
    kept = [row for row in measured() if row.source != "Qwen"]
    model = script.Model(facts, sorted({row.family for row in kept}))
    predicted = model.log_seconds(script.fit(model, kept), held)
    errors = sorted(abs(float(value)) for value in predicted - script.np.log([row.seconds for row in held]))
    assert len(errors) >= 60
    assert errors[len(errors) // 2] <= 0.10
    inside = sum(error <= fitted().log_spread for error in errors) / len(errors)
    assert 0.8 <= inside <= 1
