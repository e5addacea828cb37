"""Serving memory: hand-worked sizes, vLLM's own classes as the oracle, and what must always hold."""

from __future__ import annotations

import json
from functools import cache
from itertools import product
from math import ceil
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from planner import catalog
from planner.catalog.engines import engine, parse_version, quantization_formats
from planner.errors import NotModelled, PlannerError
from planner.memory import weights
from planner.memory.eager import eager_memory
from planner.memory.kv import kv_buckets, kv_layout, longest_context
from planner.memory.serving import Device, ServingMemory, ServingSettings, serving_memory, sweep
from planner.memory.weights import lora_slot_bytes, weight_bytes, weight_scheme
from planner.model import VISION_PARTS, ModelSpec

GIB = 1 << 30
ORACLE = Path(__file__).parents[1] / "oracles" / "vllm_kv.jsonl"
ORACLE_AVAILABLE = 512 * GIB
MODELS = (
    "qwen3-8b",
    "gemma-3-12b",
    "deepseek-v2-lite",
    "qwen3-30b-a3b",
    "gpt-oss-20b",
    "mistral-7b-v0.1",
    "qwen3.5-4b",
)


@cache
def spec(name: str) -> ModelSpec:
    return catalog.model(name)


def serve(name: str, context: int, gib: float = 79.2, **options: Any) -> ServingMemory:
    card = {key: options.pop(key) for key in ("compute_capability", "device_name") if key in options}
    return serving_memory(
        spec(name), ServingSettings(max_model_len=context, **options), usable_bytes=int(gib * GIB), **card
    )


# ------------------------------------------------------------------------------------------------- worked by hand


def test_gemma_3_12b_needs_2_3_gib_for_32k_not_12() -> None:
    # 48 layers, 8 kv heads of 256: 2 * 8 * 256 * 2 B = 8192 B a layer and token.
    # 8 full layers hold 32,768 tokens, 40 sliding ones their window of 1,024.
    kv = serve("gemma-3-12b", 32_768).kv_for_one_sequence
    assert kv.steady_bytes == 8 * 32_768 * 8192 + 40 * 1024 * 8192 == 2_483_027_968  # 2.31 GiB
    assert kv.unified_bytes == 48 * 32_768 * 8192 == 12 * GIB
    assert kv.steady_bytes < kv.reserved_bytes < kv.unified_bytes


def test_gemma_3_12b_reserves_the_window_and_the_batch_in_flight() -> None:
    # 6 groups of 8 layers; a block of 16 tokens costs 8 * 16 * 8192 B. Full: 2048 blocks. Each of 5 sliding groups:
    # ceil((1023 + 2048) / 16) + 1 = 193 blocks with 2,048 batched tokens and one batch in flight.
    answer = serve("gemma-3-12b", 32_768, engine_version="0.19.0", max_num_batched_tokens=2048)
    assert answer.kv_for_one_sequence.reserved_bytes == (2048 + 5 * 193) * 8 * 16 * 8192


def test_gemma_3_27b_is_sized_as_70_layers() -> None:
    # 62 layers, 10 full and 52 sliding: groups of 10, so the sliding ones fill 5.2 groups, padded to 6.
    assert serve("gemma-3-27b", 8192, engine_version="0.19.0").sized_layers == 70


def test_gemma_3_27b_is_sized_as_62_full_layers_without_hybrid_groups() -> None:
    old = serve("gemma-3-27b", 8192, engine_version="0.8.5")
    off = serve("gemma-3-27b", 8192, engine_version="0.19.0", hybrid_kv_cache=False)
    assert old.sized_layers == off.sized_layers == 62
    # 16 kv heads of 128: 2 * 16 * 128 * 2 B = 8192 B a layer and token, for 8,192 tokens
    assert off.kv_for_one_sequence.reserved_bytes == 62 * 8192 * 8192
    assert "--disable-hybrid-kv-cache-manager" in off.arguments


@pytest.mark.parametrize("tp", [1, 2, 4, 8])
def test_the_latent_of_deepseek_v2_lite_costs_the_same_on_every_rank(tp: int) -> None:
    # 27 layers * (512 + 64) elements * 2 B
    assert serve("deepseek-v2-lite", 8192, tensor_parallel_size=tp).kv_bytes_per_token == 31_104


def test_deepseek_v3_on_eight_gpus_neither_divides_nor_multiplies_its_latent() -> None:
    # 61 layers * 576 elements * 2 B
    assert serve("deepseek-v3", 8192, 139.8, tensor_parallel_size=8).kv_bytes_per_token == 70_272


def test_the_v0_engine_padded_a_latent_to_256_bytes() -> None:
    # 576 elements * 2 B = 1152 B take 1280 B: 61 * 1280
    assert (
        serve("deepseek-r1", 8192, 139.8, tensor_parallel_size=8, engine_version="0.7.3").kv_bytes_per_token == 78_080
    )


def test_heads_are_replicated_when_there_are_more_gpus_than_heads() -> None:
    # Qwen3-30B-A3B: 48 layers, 4 kv heads of 128 (hidden 2048 / 32 heads would give 64)
    one, eight = serve("qwen3-30b-a3b", 8192), serve("qwen3-30b-a3b", 8192, tensor_parallel_size=8)
    assert one.kv_bytes_per_token == 48 * 2 * 4 * 128 * 2 == 98_304
    assert eight.kv_bytes_per_token == 48 * 2 * 1 * 128 * 2 == 98_304 // 4


def test_an_fp8_cache_halves_the_bytes_of_a_token() -> None:
    # Qwen3-8B: 36 layers, 8 kv heads of 128
    assert serve("qwen3-8b", 8192).kv_bytes_per_token == 36 * 2 * 8 * 128 * 2 == 147_456
    assert serve("qwen3-8b", 8192, kv_cache_dtype="fp8").kv_bytes_per_token == 73_728


def test_qwen3_8b_awq_weighs_what_its_checkpoint_does() -> None:
    # 6,945,767,424 packed weights * (0.5 + (2 + 0.5) / 128) B + 16-bit: 2 * 151,936 * 4096 rows of embedding and head,
    # 36 * (2 * 4096 + 2 * 128) + 4096 norms.
    packed = 36 * (4096 * (4096 + 1024 + 1024) + 4096 * 4096 + 3 * 4096 * 12_288)
    plain = 2 * 151_936 * 4096 + 36 * (2 * 4096 + 2 * 128) + 4096
    expected = packed // 2 + packed // 128 * 5 // 2 + 2 * plain
    assert expected == 6_098_479_104
    for model, asked in (("Qwen/Qwen3-8B-AWQ", None), ("qwen3-8b", "awq")):
        assert weight_bytes(spec(model), weight_scheme(spec(model), asked)) == expected


def test_qwen3_8b_on_an_a10_holds_some_20_thousand_tokens_but_not_32_thousand() -> None:
    # 0.9 * 22.06 - 15.27 weights - 1.40 activations (38 B * 256 * 151,936) - 0.05 = 3.13 GiB = 22,800 tokens
    a10 = {"compute_capability": (8, 6), "device_name": "NVIDIA A10"}
    answer = serve("qwen3-8b", 32_768, 22.06, engine_version="0.11.0", **a10)
    assert not answer.fits
    assert answer.sequences_at_context == 0
    assert answer.max_context == answer.kv_tokens == 22_800


def test_a_block_of_qwen3_5_grows_until_it_holds_a_state() -> None:
    # State: 3 * 8192 conv elements * 2 B + 32 * 128 * 128 * 4 B = 2,146,304 B; 4096 B a token and layer: 528 tokens.
    # The 0.29 start-up log has 9.10 GiB and 267,842 tokens at a context of 32,768.
    version = engine("0.29.0")
    layout = kv_layout(kv_buckets(spec("qwen3.5-4b"), version, tp=1), version)
    assert {group.block_tokens for group in layout.groups} == {528}
    assert layout.printed_tokens(int(9.1 * GIB) // layout.bytes_per_block, 32_768, 4096) == 267_842


def test_lora_slots_cost_rank_times_inputs_and_outputs() -> None:
    # Mistral-7B: q 8192, k and v 5120 each, o 8192, gate, up and down 18,432 each = 81,920 a layer; 32 layers, rank 16
    assert lora_slot_bytes(spec("mistral-7b-v0.2"), rank=16, slots=1) == 81_920 * 32 * 16 * 2
    assert lora_slot_bytes(spec("mistral-7b-v0.2"), rank=16, slots=4) == 4 * 81_920 * 32 * 16 * 2


def test_pipeline_stages_share_the_layers_and_keep_an_end_each() -> None:
    # Qwen3-32B: embedding and head are equally large, so two stages are two halves but for the last norm
    whole = weight_bytes(spec("qwen3-32b"), weight_scheme(spec("qwen3-32b")))
    half = weight_bytes(spec("qwen3-32b"), weight_scheme(spec("qwen3-32b")), pp=2)
    assert half == pytest.approx(whole / 2, rel=1e-6)


def test_mxfp4_pads_the_experts_as_the_kernel_wants() -> None:
    # gpt-oss-120b loads 64.38 GiB on an H100 with Triton and 65.97 with Marlin
    sizes = [
        weight_bytes(spec("gpt-oss-120b"), weight_scheme(spec("gpt-oss-120b")), compute_capability=card) / GIB
        for card in ((9, 0), (8, 0))
    ]
    assert sizes == pytest.approx([64.38, 65.97], rel=0.002)


def test_a_draft_model_brings_weights_and_layers() -> None:
    alone = serve("qwen3-8b", 8192)
    both = serve("qwen3-8b", 8192, draft=spec("qwen3-0.6b"), draft_tokens=4)
    draft = spec("qwen3-0.6b")
    assert both.estimate.component("draft model").expected_bytes == 2 * draft.parameter_count
    # 28 layers of the draft, 8 kv heads of 128, beside 36 of the target
    assert both.kv_bytes_per_token == alone.kv_bytes_per_token + 28 * 4096


def test_eager_inference_follows_the_prompt_through_one_layer() -> None:
    # Qwen2.5-14B, 30,720 tokens in, 2,048 out. KV 196,608 B a token, feed-forward 2 B * (3 * 13,824 + 4 * 5120).
    estimate = eager_memory(spec("qwen2.5-14b"), input_tokens=30_720, output_tokens=2048)
    moving = 30_720 * (196_608 + 2 * (3 * 13_824 + 4 * 5120))
    # gate, up and down are 135 MiB, embedding and head 1485: torch's allocator keeps the last MiB below 136 and 1486
    rounding = (3 * 48 + 2) * (1 << 20)
    assert estimate.expected_bytes == 2 * spec("qwen2.5-14b").parameter_count + rounding + moving + 8_519_680
    assert estimate.expected_bytes / GIB == pytest.approx(36.85, rel=0.001)  # as published (Qwen2.5 speed benchmark)


# -------------------------------------------------------------------------------------- defaults of vLLM's versions


@pytest.mark.parametrize(
    ("version", "gib", "name", "tokens", "sequences"),
    [
        ("0.19.0", 79.2, "NVIDIA H100 80GB HBM3", 8192, 1024),
        ("0.19.0", 79.2, "NVIDIA A100-SXM4-80GB", 2048, 256),
        ("0.8.5", 79.2, "NVIDIA A100-SXM4-80GB", 8192, 1024),
        ("0.19.0", 22.0, "NVIDIA A10", 2048, 256),
        ("0.19.0", 178.3, "NVIDIA B200", 8192, 1024),
        ("0.28.0", 178.3, "NVIDIA B200", 16_384, 1024),
        ("0.7.3", 79.2, "NVIDIA H100 80GB HBM3", 8192, 256),
    ],
)
def test_batch_limits_follow_version_and_card(version: str, gib: float, name: str, tokens: int, sequences: int) -> None:
    answer = serve("qwen3-0.6b", 8192, gib, engine_version=version, device_name=name)
    assert (answer.max_num_batched_tokens, answer.max_num_seqs) == (tokens, sequences)


def test_utilization_is_092_from_020_on_and_graphs_come_out_of_it() -> None:
    assert serve("qwen3-8b", 8192, engine_version="0.19.0").gpu_memory_utilization == 0.90
    late = serve("qwen3-8b", 8192, engine_version="0.20.0")
    eager = serve("qwen3-8b", 8192, engine_version="0.20.0", enforce_eager=True)
    assert late.gpu_memory_utilization == 0.92
    graphs = late.estimate.component("CUDA graphs").expected_bytes
    assert eager.kv_bytes - late.kv_bytes == graphs > 0


def test_the_sampler_peak_fell_when_it_stopped_sorting() -> None:
    # Qwen3-14B on an H100, 1,024 sequences: 5.64 GiB up to 0.16, 2.23 GiB from 0.17 on (published version sweep)
    peaks = [
        serve("qwen3-14b", 8192, engine_version=version).estimate.component("activation peak").expected_bytes / GIB
        for version in ("0.16.0", "0.17.0")
    ]
    assert peaks == pytest.approx([5.64, 2.23], abs=0.01)


def test_every_constant_of_a_version_names_its_source() -> None:
    constants = engine("0.19.0")
    for name in type(constants).model_fields:
        if name not in ("version", "sources"):
            assert constants.sources[name].strip()


# --------------------------------------------------------------------------------------------------------- refusals


def test_heads_that_the_gpus_cannot_share_are_refused() -> None:
    with pytest.raises(PlannerError, match="28 attention heads, which 8 GPUs cannot share"):
        serve("qwen2.5-7b", 8192, tensor_parallel_size=8)


def test_a_quantised_checkpoint_is_not_quantised_again() -> None:
    with pytest.raises(PlannerError, match="stored as awq: drop quantization='fp8'"):
        serve("Qwen/Qwen3-8B-AWQ", 8192, quantization="fp8")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"quantization": "int3"}, "'int3' is not known: choose one of fp8"),
        ({"quantization": "mxfp4"}, "MXFP4 packs routed experts"),
        ({"kv_cache_dtype": "int4"}, "'int4' is not modelled: use auto"),
        ({"engine_version": "0.5.0"}, "older than what is modelled"),
        ({"engine_version": "newest"}, "not a vLLM version"),
        ({"pipeline_parallel_size": 64}, "too few for 64 pipeline stages"),
    ],
)
def test_what_is_not_modelled_is_refused_in_one_sentence(options: dict[str, Any], words: str) -> None:
    with pytest.raises(PlannerError, match=words):
        serve("qwen3-8b", 8192, **options)


def test_the_v0_engine_with_a_vision_encoder_is_refused() -> None:
    with pytest.raises(NotModelled, match=r"use vLLM 0\.8 or later"):
        serve("gemma-3-12b", 8192, engine_version="0.7.3")


# ----------------------------------------------------------------------------------- vLLM's own classes as an oracle


NOT_COMPARED = {
    "santacoder": "vLLM builds GPTBigCode with whole matrices on every rank",
    "phi-1.5": "vLLM keeps no bias for the output head, transformers does",
    "phi-2": "vLLM keeps no bias for the output head, transformers does",
}
IGNORES_CACHE_TYPE = ("falcon-7b", "falcon-40b")  # vLLM's Falcon layers are not given the cache's type
WHOLE_WINDOW = ("phi-4-mini", "phi-3.5-mini", "ministral-8b")  # windows as long as the context


@cache
def oracle() -> list[dict[str, Any]]:
    records = [json.loads(line) for line in ORACLE.read_text(encoding="utf-8").splitlines()]
    return [record for record in records if "not_built" not in record]


def text_part(model: ModelSpec) -> ModelSpec:
    return model.model_copy(update={"tensors": tuple(t for t in model.tensors if t.part not in VISION_PARTS)})


def test_the_oracle_covers_the_catalog() -> None:
    assert len({record["model"] for record in oracle()}) >= 80
    assert {record["tp"] for record in oracle()} == {1, 2, 4, 8}
    assert {record["format"] for record in oracle()} >= {
        "fp8",
        "fp8-block",
        "fp8-dynamic",
        "w8a8",
        "awq",
        "gptq",
        "w4a16",
        "mxfp4",
    }


def test_blocks_groups_and_tokens_are_those_of_vllms_cache_manager() -> None:
    version = engine("0.32.0")
    for record in oracle():
        model = spec(record["model"])
        if any(group.kind == "linear" for group in model.layers):
            continue  # vLLM's CPU build does not enlarge blocks beside linear layers, as it does on a GPU
        if record["kv"] == "fp8" and record["model"] in IGNORES_CACHE_TYPE:
            continue
        layout = kv_layout(kv_buckets(model, version, tp=record["tp"], kv_cache_dtype=record["kv"]), version)
        blocks = ORACLE_AVAILABLE // layout.bytes_per_block
        for case in record["cases"]:
            assert (blocks, len(layout.groups)) == (case["num_blocks"], case["groups"]), record["model"]
            tokens = layout.printed_tokens(blocks, case["max_model_len"], case["in_flight"])
            if case["max_model_len"] > model.max_context:
                continue  # the oracle stretches every model to 128k
            # where the window is the context, vLLM still adds the extra block of a sliding layer to each sequence
            extra = 17 / case["max_model_len"] if record["model"] in WHOLE_WINDOW else 0
            assert tokens == pytest.approx(case["kv_tokens"], rel=extra, abs=0), record["model"]
        assert layout.naive_bytes_per_token == record["kv_bytes_per_token"], record["model"]


def test_weight_bytes_of_a_rank_are_those_of_vllms_parameters(monkeypatch: pytest.MonkeyPatch) -> None:
    # the CPU kernels of the oracle pad MXFP4 experts to 32, a scale's width, and nothing else
    unpadded = {"triton": {"intermediate": 32, "k": 1, "hidden": 1, "bias_bytes": 2}}
    known = weights.constant
    monkeypatch.setattr(weights, "constant", lambda name: unpadded if name == "mxfp4_padding" else known(name))
    for record in oracle():
        if record["model"] in NOT_COMPARED:
            continue
        model = text_part(spec(record["model"]))
        ours = weight_bytes(model, weight_scheme(model, record["format"] or None), tp=record["tp"])
        assert ours == pytest.approx(record["weight_bytes"], rel=0, abs=difference(model, record)), record


def difference(model: ModelSpec, record: dict[str, Any]) -> int:
    """Bytes by which the oracle may differ, each for a reason."""
    allowed = 0
    if record["format"]:
        allowed += 64 * model.num_layers  # scales of the cache and scalar scales of stacked matrices
    if record["format"] in ("fp8", "fp8-block", "awq", "gptq"):
        # a checkpoint lists its routers as ignored; the oracle's configs do not, and vLLM packs them
        allowed += sum(2 * tensor.parameters for tensor in model.tensors if tensor.part == "router")
    if record["format"] == "gptq" and model.experts is not None:
        allowed += record["weight_bytes"] // 200  # sort indices of fused experts, which loading empties
    return allowed


# ------------------------------------------------------------------------------------------------- what always holds


@given(
    name=st.sampled_from(MODELS),
    context=st.integers(64, 40_000),
    more=st.integers(1, 40_000),
    version=st.sampled_from(["0.8.5", "0.11.0", "0.19.0", "0.23.0", "0.32.0"]),
)
@settings(max_examples=60, deadline=None)
def test_more_context_never_needs_less_memory(name: str, context: int, more: int, version: str) -> None:
    short, long = (serve(name, length, engine_version=version) for length in (context, context + more))
    assert long.estimate.expected_bytes >= short.estimate.expected_bytes
    assert long.kv_for_one_sequence.steady_bytes >= short.kv_for_one_sequence.steady_bytes
    assert long.sequences_at_context <= short.sequences_at_context


@given(name=st.sampled_from(MODELS), sequences=st.integers(1, 2000), more=st.integers(1, 2000))
@settings(max_examples=40, deadline=None)
def test_more_sequences_never_need_less_memory(name: str, sequences: int, more: int) -> None:
    few, many = (serve(name, 8192, max_num_seqs=count, concurrency=count) for count in (sequences, sequences + more))
    assert many.estimate.expected_bytes > few.estimate.expected_bytes
    assert many.kv_bytes <= few.kv_bytes


@given(name=st.sampled_from(MODELS), rank=st.integers(1, 256), more=st.integers(1, 256), slots=st.integers(1, 8))
@settings(max_examples=40, deadline=None)
def test_a_higher_rank_never_needs_less_memory(name: str, rank: int, more: int, slots: int) -> None:
    low, high = (lora_slot_bytes(spec(name), rank=value, slots=slots) for value in (rank, rank + more))
    assert low < high
    assert lora_slot_bytes(spec(name), rank=rank, slots=slots + 1) > low


@given(name=st.sampled_from(("qwen3-8b", "gemma-2-9b", "deepseek-v2-lite")), more=st.integers(1, 20))
@settings(max_examples=20, deadline=None)
def test_more_layers_never_need_less_memory(name: str, more: int) -> None:
    model = spec(name)
    group = model.layers[-1]
    deeper = model.model_copy(
        update={"layers": (*model.layers[:-1], group.model_copy(update={"count": group.count + more}))}
    )
    sizes = [
        serving_memory(each, ServingSettings(max_model_len=8192), usable_bytes=79 * GIB) for each in (model, deeper)
    ]
    assert sizes[1].kv_for_one_sequence.steady_bytes > sizes[0].kv_for_one_sequence.steady_bytes
    assert sizes[1].estimate.expected_bytes > sizes[0].estimate.expected_bytes


@pytest.mark.parametrize("name", MODELS)
def test_more_gpus_never_need_more_weight_bytes_each(name: str) -> None:
    for asked in (None, *quantization_formats()):
        sizes = []
        for tp in (1, 2, 4, 8):
            try:
                sizes.append(weight_bytes(spec(name), weight_scheme(spec(name), asked), tp=tp))
            except PlannerError:
                break
        assert sizes == sorted(sizes, reverse=True)


@given(name=st.sampled_from(MODELS), context=st.integers(16, 40_000), tp=st.sampled_from([1, 2, 4]))
@settings(max_examples=30, deadline=None)
def test_an_estimate_is_the_sum_of_its_components_and_survives_json(name: str, context: int, tp: int) -> None:
    answer = serve(name, context, tensor_parallel_size=tp, enable_lora=True)
    components = answer.estimate.components
    assert answer.estimate.expected_bytes == sum(component.expected_bytes for component in components)
    assert answer.estimate.low_bytes <= answer.estimate.expected_bytes <= answer.estimate.high_bytes
    assert ServingMemory.model_validate_json(answer.model_dump_json()) == answer
    assert all(component.formula and component.source for component in components)


@given(name=st.sampled_from(MODELS), context=st.integers(16, 40_000), gib=st.floats(16, 180))
@settings(max_examples=40, deadline=None)
def test_the_budget_is_spent_exactly(name: str, context: int, gib: float) -> None:
    answer = serve(name, context, gib, engine_version="0.32.0")
    inside = sum(c.expected_bytes for c in answer.estimate.components if c.name not in ("KV cache", "CUDA context"))
    assert answer.budget_bytes == ceil(int(gib * GIB) * 0.92)
    assert answer.kv_bytes == answer.budget_bytes - inside


@given(name=st.sampled_from(MODELS), blocks=st.integers(0, 20_000))
@settings(max_examples=60, deadline=None)
def test_the_longest_context_fits_and_the_next_token_does_not(name: str, blocks: int) -> None:
    version = engine("0.19.0")
    layout = kv_layout(kv_buckets(spec(name), version, tp=1), version)
    limit = 131_072
    length = longest_context(layout, blocks, 2048, limit)
    if length:
        assert layout.blocks_for(length, 2048) <= blocks
    if length < limit:
        assert layout.blocks_for(length + 1, 2048) > blocks


# ------------------------------------------------------------------------------------------------------------ sweep


def test_a_sweep_gives_the_same_answers_one_by_one() -> None:
    specs = [spec(name) for name in MODELS]
    devices = [
        Device(usable_bytes=int(22.06 * GIB), compute_capability=(8, 6), name="A10"),
        Device(usable_bytes=int(79.2 * GIB), compute_capability=(8, 0), name="A100"),
        Device(usable_bytes=int(139.8 * GIB), compute_capability=(9, 0), name="H200"),
    ]
    contexts, formats, sizes = (2048, 8192, 32_768), (None, "awq", "fp8"), (1, 2, 8)
    table = sweep(specs, contexts=contexts, devices=devices, quantizations=formats, tensor_parallel=sizes)
    assert len(table.combinations) + len(table.skipped) == len(specs) * len(formats) * len(sizes)
    assert table.combinations
    for place, (index, asked, tp) in enumerate(table.combinations):
        for (d, device), (c, context) in product(enumerate(devices), enumerate(contexts)):
            answer = serving_memory(
                specs[index],
                ServingSettings(max_model_len=context, quantization=asked, tensor_parallel_size=tp),
                usable_bytes=device.usable_bytes,
                compute_capability=device.compute_capability,
                device_name=device.name,
            )
            assert table.kv_bytes[place, d] == answer.kv_bytes
            assert table.kv_blocks[place, d] == answer.kv_blocks
            assert table.reserved_bytes[place, d, c] == answer.kv_for_one_sequence.reserved_bytes
            assert table.sequences[place, d, c] == answer.sequences_at_context
            assert table.fits[place, d, c] == answer.fits


def test_a_sweep_says_why_it_skips() -> None:
    table = sweep([spec("qwen3-8b")], contexts=(8192,), devices=[Device(usable_bytes=GIB)], quantizations=("mxfp4",))
    assert table.combinations == ()
    assert table.configurations == 0
    assert "MXFP4 packs routed experts" in table.skipped[0][1]


def test_a_sweep_of_the_v0_engine_needs_its_batch() -> None:
    with pytest.raises(NotModelled, match="state max_num_batched_tokens"):
        sweep(
            [spec("qwen3-8b")],
            contexts=(8192,),
            devices=[Device(usable_bytes=GIB)],
            settings=ServingSettings(max_model_len=8192, engine_version="0.7.3"),
        )


def test_versions_are_read_from_the_words_of_logs() -> None:
    assert parse_version("v0.10.2") == (0, 10, 2)
    assert parse_version("~0.12/0.13 (2025-12-17)") == (0, 12, 0)


def test_fewer_tokens_a_step_than_sequences_are_refused_as_vllm_does() -> None:
    with pytest.raises(PlannerError, match="refuses 128 sequences in steps of 64 tokens"):
        serve("qwen3-8b", 8192, max_num_seqs=128, max_num_batched_tokens=64)
    assert serve("qwen3-8b", 8192, max_num_seqs=64, max_num_batched_tokens=64).fits
    assert serve("qwen3-8b", 8192, max_num_batched_tokens=64).max_num_seqs == 64
