"""The memory of a fine-tuning step: bytes worked out by hand, refusals, and what must always hold."""

from __future__ import annotations

from functools import cache
from typing import Any, get_args

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from planner import catalog
from planner.errors import NotModelled, PlannerError
from planner.memory.finetune_settings import Method, Parallelism
from planner.memory.training import FinetuneSettings, Instant, TrainingMemory, training_memory
from planner.memory.training_state import optimizer_state_bytes, quantized_bytes
from planner.model import ModelSpec, spec_from_config
from planner.units import GIB

MISTRAL = 7_241_732_096  # parameters of mistralai/Mistral-7B-v0.1
QWEN = 8_190_735_360  # of Qwen/Qwen3-8B
WORKSPACE = 2 * (2 * 4096 + 8 * 16) * 1024  # cuBLAS: 2 x 4 MiB + 8 x 16 KiB for each of two threads
CARD = ("supports_bf16", "supports_flash_attention", "compute_capability")


@cache
def spec(name: str) -> ModelSpec:
    return catalog.model(name)


def train(name: str, seq_len: int = 4096, **options: Any) -> TrainingMemory:
    card = {key: options.pop(key) for key in CARD if key in options}
    return training_memory(spec(name), FinetuneSettings(seq_len=seq_len, **options), **card)


def instant(memory: TrainingMemory, name: str) -> Instant:
    return next(i for i in memory.instants if i.name == name)


def part(memory: TrainingMemory, name: str, at: str | None = None) -> int:
    return instant(memory, at or memory.peak_instant).parts.get(name, 0)


# ------------------------------------------------------------------------------------------------- worked by hand


def test_full_fine_tuning_of_mistral_7b_in_bf16_needs_10_bytes_a_parameter_at_the_step() -> None:
    # foreach AdamW: weights 2, gradients 2, two moments 2 + 2, the square roots of one moment 2.
    # fms-acceleration scripts/benchmarks/refs/a100_80gb.csv prints 67.46 GiB
    answer = train("mistral-7b-v0.1", method="full", trainer="fms")
    assert answer.peak_instant == "optimizer step"
    assert answer.allocated_bytes == 10 * MISTRAL + WORKSPACE == 72_434_360_320
    assert round(answer.allocated_bytes / GIB, 2) == 67.46
    assert answer.trainable_parameters == MISTRAL


def test_a_fused_optimizer_saves_the_square_roots() -> None:
    answer = train("mistral-7b-v0.1", method="full", trainer="fms", optimizer="adamw_torch_fused")
    assert instant(answer, "optimizer step").total_bytes == 8 * MISTRAL + WORKSPACE


def test_fp32_masters_sharded_over_four_gpus_need_20_bytes_a_parameter_over_four() -> None:
    # weights, gradients, two moments and the square roots, 4 B each
    answer = train("mistral-7b-v0.1", method="full", trainer="fms", weights_dtype="fp32", parallelism="fsdp", n_gpus=4)
    assert instant(answer, "optimizer step").total_bytes == 20 * MISTRAL // 4 + WORKSPACE


def test_nf4_with_double_quantisation_takes_4_127_bits_a_weight() -> None:
    # 4096 x 4096 = 16,777,216 weights: half a byte each; 262,144 blocks of 64 with a one-byte scale; an fp32 for each
    # 256 of those (1,024); the code book of 16 fp32, that of the scales of 256 fp32, and their mean
    size = 8_388_608 + 262_144 + 4 * 1024 + 64 + 1024 + 4
    assert quantized_bytes((4096, 4096), "nf4-double") == size == 8_655_940
    assert round(8 * size / 4096**2, 3) == 4.127


def test_nf4_alone_takes_4_5_bits_a_weight() -> None:
    assert quantized_bytes((4096, 4096), "nf4") == 8_388_608 + 4 * 262_144 + 64


def test_gptq_packs_weights_and_zeros_and_keeps_a_scale_a_group() -> None:
    # 32 groups of 128 inputs for each of 4096 outputs = 131,072 scales of 2 B, zeros of 4 bits; g_idx: int32 an input
    assert quantized_bytes((4096, 4096), "gptq4") == 8_388_608 + 2 * 131_072 + 131_072 // 2 + 4 * 4096
    assert quantized_bytes((4096, 4096), "gptq8") == 16_777_216 + 2 * 131_072 + 131_072 + 4 * 4096


def test_int8_keeps_one_fp32_scale_a_row() -> None:
    assert quantized_bytes((1024, 4096), "int8") == 1024 * 4096 + 4 * 1024


@pytest.mark.parametrize(
    ("optimizer", "itemsize", "size"),
    [
        ("adamw_torch", 2, 4_000_000),  # two moments in the weights' own width
        ("adamw_torch_fused", 4, 8_000_000),
        ("adamw_8bit", 4, 2_000_000 + 2 * 4 * 3907),  # 1,000,000 / 256 = 3906.25 blocks
        ("adamw_4bit", 4, 1_000_000 + 2 * 4 * 7813),  # 1,000,000 / 128 = 7812.5 blocks
        ("paged_adamw_8bit", 4, 0),  # in managed memory
        ("paged_adamw_32bit", 4, 0),
        ("sgd_momentum", 4, 4_000_000),
        ("sgd", 4, 0),
        ("none", 4, 0),
    ],
)
def test_the_state_of_a_million_parameters(optimizer: Any, itemsize: int, size: int) -> None:
    assert optimizer_state_bytes(optimizer, 1_000_000, itemsize) == size


def test_the_nf4_base_of_qwen3_8b_is_5_6_gib() -> None:
    # a layer's seven matrices: q, o 4096 x 4096; k, v 1024 x 4096; gate, up, down 12288 x 4096
    layer = 2 * 16_777_216 + 2 * 4_194_304 + 3 * 50_331_648
    matrices = 36 * (layer // 2 + layer // 64 + 4 * (layer // 64 // 256) + 7 * (64 + 1024 + 4))
    embeddings = 2 * 151_936 * 4096  # untied
    norms = 36 * (2 * 4096 + 2 * 128) + 4096
    assert 36 * layer + embeddings + norms == QWEN
    answer = train("qwen3-8b", method="qlora")
    assert part(answer, "weights") == matrices + 2 * (embeddings + norms)
    assert part(answer, "weights") / GIB == pytest.approx(5.65, abs=0.01)


def test_a_plain_peft_base_casts_what_is_not_quantised_to_fp32() -> None:
    embeddings_and_norms = 2 * 151_936 * 4096 + 36 * (2 * 4096 + 2 * 128) + 4096
    cast = part(train("qwen3-8b", method="qlora", kbit_prepare=True), "weights")
    assert cast - part(train("qwen3-8b", method="qlora"), "weights") == 2 * embeddings_and_norms


def test_adapters_of_rank_16_on_all_linear_layers_of_qwen3_8b() -> None:
    # rank * (in + out): q, o 8192; k, v 5120; gate, up, down 16,384
    trainable = 36 * 16 * (2 * 8192 + 2 * 5120 + 3 * 16_384)
    answer = train("qwen3-8b", method="lora")
    assert answer.trainable_parameters == trainable == 43_646_976
    assert part(answer, "adapters") == 4 * trainable  # peft keeps them in fp32 on a 16-bit base
    assert part(answer, "optimizer state") == 8 * trainable
    assert part(train("qwen3-8b", method="qlora"), "adapters") == 2 * trainable  # TRL: bf16 on a quantised one


def test_dora_adds_a_magnitude_for_each_output() -> None:
    # a layer's outputs: q 4096, k and v 1024, o 4096, gate and up 12,288, down 4096
    outputs = 36 * (4096 + 2 * 1024 + 4096 + 2 * 12_288 + 4096)
    extra = (
        train("qwen3-8b", method="dora").trainable_parameters - train("qwen3-8b", method="lora").trainable_parameters
    )
    assert extra == outputs


def test_embeddings_trained_beside_an_adapter_are_copies() -> None:
    answer = train("qwen3-8b", method="lora", trained_embeddings=True)
    embeddings = 2 * 151_936 * 4096
    assert answer.trainable_parameters == 43_646_976 + embeddings
    assert part(answer, "weights") == 2 * (QWEN + embeddings)


def test_checkpoints_are_two_bytes_of_hidden_a_token_and_layer() -> None:
    # 36 layers x 4096 x 2 B, and the rope's cos and sin, 128 x 2 B each, for each of 8192 tokens more
    near, far = (part(train("qwen3-8b", s, method="lora"), "activations", "loss, forward") for s in (8192, 16_384))
    assert far - near == (36 * 4096 * 2 + 2 * 128 * 2) * 8192


# ----------------------------------------------------------------------------------------------------- loss heads


def test_qlora_of_qwen3_8b_at_32k_needs_about_22_gib_chunked_and_over_65_with_the_plain_loss() -> None:
    # the plain head keeps 32,768 x 151,936 logits in 16 bits (9.3 GiB), an fp32 copy and log-softmax (18.5 GiB each)
    chunked, plain = (train("qwen3-8b", 32_768, loss=loss).allocated_bytes / GIB for loss in ("chunked", "hf"))
    assert 20 < chunked < 24
    assert plain > 65
    logits = 32_768 * 151_936
    assert plain - chunked > (2 + 4 + 4) * logits / GIB * 0.95


def test_loss_heads_need_more_the_more_they_materialise() -> None:
    order = ("chunked", "in_place", "hf", "hf_outputs")
    peaks = [train("qwen3-8b", 32_768, loss=loss).allocated_bytes for loss in order]
    assert peaks == sorted(set(peaks))
    assert train("qwen3-8b", 32_768, loss="none").allocated_bytes <= peaks[0]


def test_the_loss_head_decides_nothing_at_a_short_context() -> None:
    answers = {loss: train("qwen3-8b", 64, method="full", loss=loss) for loss in ("chunked", "liger", "hf")}
    assert len({a.peak_instant for a in answers.values()}) == 1
    assert len({a.allocated_bytes for a in answers.values()}) == 1


# -------------------------------------------------------------------------------------------------------- cards


@pytest.mark.parametrize("capability", ["7.5", "7.0"])
def test_full_fine_tuning_in_16_bits_is_refused_without_bf16(capability: str) -> None:
    with pytest.raises(PlannerError, match=r"no bf16.*keep fp32 masters .*or take an Ampere") as refusal:
        train("qwen3-0.6b", 512, method="full", supports_bf16=False, compute_capability=capability)
    assert "\n" not in str(refusal.value)


def test_without_bf16_fp32_masters_and_adapters_are_possible() -> None:
    card = {"supports_bf16": False, "supports_flash_attention": False, "compute_capability": "7.5"}
    assert train("qwen3-0.6b", 512, method="full", weights_dtype="fp32", **card).allocated_bytes
    assert train("qwen3-0.6b", 512, method="lora", **card).allocated_bytes


def test_without_bf16_the_adapters_of_a_4_bit_base_are_32_bits_wide() -> None:
    """fp16 scales the loss, and its scaler takes no 16-bit gradients."""
    card = {"supports_bf16": False, "supports_flash_attention": False, "compute_capability": "7.5"}
    ampere = train("qwen3-8b", 2048, method="qlora", lora_rank=16)
    turing = train("qwen3-8b", 2048, method="qlora", lora_rank=16, attention="efficient", **card)
    # of a layer 16 x (q and o 2 x (4096 + 4096), k and v 2 x (4096 + 1024), three of 4096 + 12288) = 1,212,416; x 36
    assert part(ampere, "adapters") == 2 * 43_646_976
    assert part(turing, "adapters") == 4 * 43_646_976
    assert part(turing, "optimizer state") == 8 * 43_646_976


def test_flash_attention_is_refused_where_the_card_has_none() -> None:
    with pytest.raises(PlannerError, match=r"no FlashAttention 2: use --attention efficient"):
        train("qwen3-0.6b", 512, attention="flash", supports_flash_attention=False)


def test_a_card_without_flash_attention_pays_the_scores_unless_another_kernel_is_asked_for() -> None:
    default = train("qwen3-8b", 4096, supports_flash_attention=False)
    eager = train("qwen3-8b", 4096, attention="eager", supports_flash_attention=False)
    efficient = train("qwen3-8b", 4096, attention="efficient", supports_flash_attention=False)
    assert default.allocated_bytes == eager.allocated_bytes > 1.5 * efficient.allocated_bytes
    assert any("S x S" in note for note in default.notes)
    assert not efficient.notes


def test_eager_attention_grows_with_the_square_of_the_sequence() -> None:
    # 32 heads; at the worst moment 10 B a score: the fp32 probabilities (4), their gradient (4) and that of the
    # masked 16-bit scores (2). f(2S) - 2 f(S) takes the linear part away and leaves twice the quadratic one.
    def working(seq_len: int) -> int:
        return part(train("qwen3-8b", seq_len, attention="eager"), "working", "backward of the last layer")

    for seq_len in (4096, 8192):
        quadratic = (working(2 * seq_len) - 2 * working(seq_len)) / (2 * seq_len**2 * 32)
        assert quadratic == pytest.approx(10, rel=0.1)


def test_a_hopper_card_has_larger_cublas_workspaces() -> None:
    assert part(train("qwen3-8b", compute_capability="9.0"), "workspace") == 2 * 32 * 1024 * 1024
    assert part(train("qwen3-8b", compute_capability="8.0"), "workspace") == WORKSPACE


# --------------------------------------------------------------------------------------------------- several GPUs


@pytest.mark.parametrize(
    ("parallelism", "weights", "gradients", "state"),
    [
        # DeepSpeed: 16-bit weights and gradients, 12 B of fp32 master and moments; 4 B of fp32 gradients at the step
        ("zero1", 2 * QWEN, 2 * QWEN, 12 * QWEN // 4),
        ("zero2", 2 * QWEN, 2 * QWEN // 4, 12 * QWEN // 4),
        ("zero3", 2 * QWEN // 4, 2 * QWEN // 4, 12 * QWEN // 4),
        # DDP shards nothing; FSDP everything, with torch's own moments
        ("ddp", 2 * QWEN, 2 * QWEN, 4 * QWEN),
        ("fsdp", 2 * QWEN // 4, 2 * QWEN // 4, 4 * QWEN // 4),
        ("fsdp2", 2 * QWEN // 4, 2 * QWEN // 4, 4 * QWEN // 4),
    ],
)
def test_each_parallelism_divides_what_it_shards_by_four(
    parallelism: str, weights: int, gradients: int, state: int
) -> None:
    answer = train("qwen3-8b", method="full", parallelism=parallelism, n_gpus=4)
    at = "optimizer step"
    assert part(answer, "weights", at) == weights
    assert part(answer, "gradients", at) == gradients
    assert part(answer, "optimizer state", at) == state
    assert (part(answer, "gathered weights", "loss, forward") > 0) == (parallelism in ("zero3", "fsdp", "fsdp2"))


def test_ddp_keeps_buckets_as_large_as_the_gradients() -> None:
    answer = train("qwen3-8b", method="full", parallelism="ddp", n_gpus=2)
    assert part(answer, "communication", "optimizer step") == 2 * QWEN


def test_deepspeed_keeps_two_buckets_of_half_a_billion_elements() -> None:
    for parallelism in ("zero1", "zero2", "zero3"):
        answer = train("qwen3-8b", method="full", parallelism=parallelism, n_gpus=2)
        assert part(answer, "communication") == 2 * 500_000_000 * 2


def test_a_sharded_run_gathers_its_embeddings_and_the_layer_at_work() -> None:
    answer = train("qwen3-8b", method="full", parallelism="fsdp2", n_gpus=8)
    root = 2 * 2 * 151_936 * 4096
    layer = 2 * (QWEN - 2 * 151_936 * 4096) // 36
    assert part(answer, "gathered weights", "loss, forward") == root
    assert part(answer, "gathered weights", "backward of the last layer") == pytest.approx(root + layer, rel=1e-3)


def test_several_gpus_need_a_parallelism() -> None:
    with pytest.raises(PlannerError, match=r"2 GPUs need a --parallelism: ddp, zero1"):
        train("qwen3-8b", n_gpus=2)


@pytest.mark.parametrize("method", ["qlora", "lora", "full"])
@pytest.mark.parametrize("parallelism", ["none", "ddp", "zero1", "zero2"])
def test_parameters_are_offloaded_only_by_what_shards_them(method: str, parallelism: str) -> None:
    gpus = 1 if parallelism == "none" else 2
    with pytest.raises(PlannerError, match="only by --parallelism zero3, fsdp or fsdp2"):
        train("qwen3-8b", method=method, parallelism=parallelism, n_gpus=gpus, offload={"parameters"})


def test_fp16_weights_are_not_trained_in_full() -> None:
    with pytest.raises(PlannerError, match="fp16 weights cannot be trained in full"):
        train("qwen3-8b", method="full", weights_dtype="fp16")


def test_deepspeed_keeps_the_states_of_the_optimizer_asked_for_beside_its_fp32_masters() -> None:
    # 4 B of master a parameter; AdamW two fp32 moments, 8 B; SGD without momentum none
    for optimizer, each in (("adamw_torch", 12), ("sgd", 4)):
        run = train("qwen3-8b", method="full", parallelism="zero3", n_gpus=4, optimizer=optimizer)
        assert part(run, "optimizer state") == each * QWEN // 4


def test_an_optimizer_in_the_backward_leaves_no_gradient_of_the_head_behind() -> None:
    run = train("qwen3-8b", method="full", optimizer_in_backward=True)
    last = next(instant for instant in run.instants if instant.name == "backward of the last layer")
    assert "gradients" not in last.parts


# ---------------------------------------------------------------------------------------------- what a choice does


def test_offloading_the_optimizer_removes_its_states() -> None:
    kept = train("qwen3-8b", method="full", parallelism="zero3", n_gpus=4)
    moved = train("qwen3-8b", method="full", parallelism="zero3", n_gpus=4, offload={"optimizer"})
    assert part(kept, "optimizer state") == 12 * QWEN // 4
    assert part(moved, "optimizer state") == part(moved, "step temporaries") == 0


def test_offloading_parameters_leaves_what_is_gathered() -> None:
    moved = train("qwen3-8b", method="full", parallelism="zero3", n_gpus=4, offload={"optimizer", "parameters"})
    assert part(moved, "weights") == part(moved, "gradients", "optimizer step") == 0
    assert part(moved, "gathered weights", "loss, backward") > 0


def test_offloading_activations_leaves_two_checkpoints_on_the_gpu() -> None:
    moved = train("qwen3-8b", 32_768, offload={"activations"})
    ropes = 2 * 128 * 2 * 32_768  # cos and sin of every position
    assert part(moved, "activations", "loss, backward") == 2 * 4096 * 2 * 32_768 + ropes
    assert moved.allocated_bytes < train("qwen3-8b", 32_768).allocated_bytes


def test_an_optimizer_in_the_backward_never_holds_all_gradients() -> None:
    usual = train("qwen3-8b", method="full", optimizer="adamw_8bit")
    fused = train("qwen3-8b", method="full", optimizer="adamw_8bit", optimizer_in_backward=True)
    assert part(usual, "gradients", "optimizer step") == 2 * QWEN
    assert part(fused, "gradients", "optimizer step") == 0
    assert part(fused, "gradients", "backward of the first layer") == 0
    assert usual.allocated_bytes - fused.allocated_bytes > QWEN


def test_gradient_accumulation_keeps_the_gradients_during_the_forward() -> None:
    once = train("qwen3-8b", method="full")
    twice = train("qwen3-8b", method="full", gradient_accumulation_steps=2)
    assert part(once, "gradients", "loss, forward") == 0
    assert part(twice, "gradients", "loss, forward") == 2 * QWEN
    assert twice.allocated_bytes >= once.allocated_bytes
    many = train("qwen3-8b", method="full", gradient_accumulation_steps=64)
    assert many.allocated_bytes == twice.allocated_bytes


def test_dpo_doubles_the_tokens() -> None:
    pair = train("qwen3-8b", task="dpo", micro_batch=3)
    assert pair.allocated_bytes == train("qwen3-8b", micro_batch=6).allocated_bytes


def test_full_dpo_adds_a_frozen_reference_model() -> None:
    pair = train("qwen3-8b", method="full", task="dpo")
    plain = train("qwen3-8b", method="full", micro_batch=2)
    assert pair.allocated_bytes - plain.allocated_bytes == part(pair, "reference model") == 2 * QWEN
    sharded = train("qwen3-8b", method="full", task="dpo", parallelism="fsdp2", n_gpus=4)
    assert part(sharded, "reference model") == 2 * QWEN // 4


@pytest.mark.parametrize("name", ["qwen3-8b", "mistral-7b-v0.1", "gemma-3-1b"])
@pytest.mark.parametrize("checkpointing", [True, False])
def test_dora_needs_at_least_what_lora_needs(name: str, checkpointing: bool) -> None:
    lora, dora = (train(name, 2048, method=m, gradient_checkpointing=checkpointing) for m in ("lora", "dora"))
    assert dora.allocated_bytes >= lora.allocated_bytes
    lora, dora = (train(name, 2048, method=m, gradient_checkpointing=checkpointing) for m in ("qlora", "qdora"))
    assert dora.allocated_bytes >= lora.allocated_bytes


@pytest.mark.parametrize("name", ["qwen3-8b", "phi-4", "gemma-3-1b", "mixtral-8x7b", "deepseek-v2-lite"])
@pytest.mark.parametrize("method", ["full", "lora", "qlora"])
def test_checkpointing_never_needs_more(name: str, method: str) -> None:
    # but for a checkpoint and the recomputed output: two residual streams of one layer, where gradients set the peak
    for seq_len in (512, 4096):
        streams = 2 * 2 * spec(name).hidden_size * seq_len
        off = train(name, seq_len, method=method, gradient_checkpointing=False)
        for kind in ("reentrant", "non_reentrant"):
            on = train(name, seq_len, method=method, checkpointing=kind)
            assert on.allocated_bytes <= off.allocated_bytes + streams


def test_without_checkpointing_a_layer_keeps_45_to_54_times_its_hidden_width() -> None:
    # bytes a token and layer over hidden, as published runs of SwiGLU models without checkpointing show
    name = "mistral-7b-v0.1"
    near, far = (
        part(train(name, s, method="full", gradient_checkpointing=False), "activations", "loss, forward")
        for s in (2048, 4096)
    )
    per_token = (far - near) / (2048 * 32 * 4096)
    assert 40 <= per_token <= 60


def test_an_adapter_of_all_layers_needs_more_than_one_of_the_attention() -> None:
    every, few = (train("qwen3-8b", lora_targets=targets) for targets in ("all-linear", "attention"))
    assert few.trainable_parameters < every.trainable_parameters
    assert few.allocated_bytes < every.allocated_bytes


# ------------------------------------------------------------------------------------------------ how it answers


MANY: tuple[tuple[str, dict[str, Any]], ...] = (
    ("qwen3-8b", {}),
    ("qwen3-8b", {"method": "full"}),
    ("qwen3-8b", {"method": "full", "weights_dtype": "fp32", "gradient_checkpointing": False}),
    ("qwen3-8b", {"method": "lora", "trainer": "unsloth"}),
    ("gemma-3-12b", {"method": "qdora", "attention": "eager"}),
    ("mixtral-8x7b", {"method": "qlora", "trainer": "fms", "base_quantization": "gptq4"}),
    ("deepseek-v2-lite", {"method": "lora", "trainer": "torchtune"}),
    ("phi-4", {"method": "full", "parallelism": "fsdp2", "n_gpus": 8, "offload": {"optimizer"}}),
    ("qwen3-8b", {"method": "full", "task": "dpo", "parallelism": "zero3", "n_gpus": 2}),
    ("llama-3.1-8b", {"lora_targets": ("q_proj", "v_proj"), "trainer": "litgpt", "gradient_checkpointing": False}),
)


@pytest.mark.parametrize(("name", "options"), MANY)
def test_the_peak_is_the_largest_instant_and_the_estimate_its_parts(name: str, options: dict[str, Any]) -> None:
    answer = train(name, 2048, **options)
    assert len({i.name for i in answer.instants}) == len(answer.instants) >= 5
    assert answer.allocated_bytes == max(i.total_bytes for i in answer.instants)
    peak = instant(answer, answer.peak_instant)
    assert peak.total_bytes == answer.allocated_bytes == sum(peak.parts.values())
    assert all(size > 0 for i in answer.instants for size in i.parts.values())
    estimate = answer.estimate
    outside = ("allocator slack", "CUDA context")
    inside = {c.name: c.expected_bytes for c in estimate.components if c.name not in outside}
    assert inside == peak.parts
    assert estimate.expected_bytes == sum(c.expected_bytes for c in estimate.components)
    assert estimate.expected_bytes == answer.allocated_bytes + sum(
        estimate.component(c).expected_bytes for c in outside
    )
    assert estimate.low_bytes <= estimate.expected_bytes <= estimate.high_bytes
    assert estimate.peak_instant == answer.peak_instant
    assert all(c.formula and c.source for c in estimate.components)


@pytest.mark.parametrize(("name", "options"), MANY)
def test_the_answer_survives_json(name: str, options: dict[str, Any]) -> None:
    answer = train(name, 2048, **options)
    assert TrainingMemory.model_validate_json(answer.model_dump_json()) == answer


def test_linear_attention_is_not_modelled_and_says_what_to_do() -> None:
    with pytest.raises(NotModelled, match=r"linear-attention layers .*use --trace"):
        train("qwen3.5-4b", method="lora")


def test_experts_that_transformers_5_fuses_stay_in_16_bits_and_a_note_says_so() -> None:
    # gpt-oss-20b: 24 layers of 32 experts, each 5760 x 2880 and 2880 x 2880
    # Mixtral-8x7B: 32 layers of 8 experts, each three matrices of 14336 x 4096
    for name, experts in (
        ("gpt-oss-20b", 24 * 32 * (5760 * 2880 + 2880 * 2880)),
        ("mixtral-8x7b", 32 * 8 * 3 * 14_336 * 4096),
    ):
        answer = train(name, method="qlora")
        assert any("leaves in 16 bits" in note for note in answer.notes)
        assert part(answer, "weights") > 2 * experts
        older = train(name, method="qlora", trainer="transformers-4")
        assert part(older, "weights") < experts
        assert not any("leaves in 16 bits" in note for note in older.notes)


def test_a_vision_tower_counts_as_weights_and_a_note_says_so() -> None:
    assert any("vision tower" in note for note in train("gemma-3-4b", method="lora").notes)


def test_8_bit_adam_keeps_the_embeddings_moments_in_fp32_under_the_trainer() -> None:
    # Qwen3-8B: 151,936 x 4,096 embedding parameters take 8 B of state; the rest 2 B and 8 B for each 256
    embedding = 151_936 * 4096
    rest = QWEN - embedding
    answer = train("qwen3-8b", method="full", optimizer="adamw_8bit")
    state = part(answer, "optimizer state", "optimizer step")
    assert state == pytest.approx(8 * embedding + 2 * rest + 8 * rest / 256, abs=64)
    torchtune = train("qwen3-8b", method="full", optimizer="adamw_8bit", trainer="torchtune")
    assert part(torchtune, "optimizer state", "optimizer step") == pytest.approx(2 * QWEN + 8 * QWEN / 256, abs=64)


def test_deepspeed_hands_the_layers_16_bit_weights_whatever_they_were_loaded_as() -> None:
    def at(width: str) -> TrainingMemory:
        return train("qwen3-8b", method="full", weights_dtype=width, parallelism="zero3", n_gpus=8)

    for name in ("loss, backward", "backward of the last layer"):
        assert instant(at("fp32"), name) == instant(at("bf16"), name)


def test_whether_layers_are_recomputed_is_the_trainers_default_until_it_is_said() -> None:
    # TRL, Unsloth and torchtune checkpoint; transformers' own Trainer and LitGPT do not
    for name, default in (("trl", True), ("transformers", False), ("litgpt", False), ("unsloth", True)):
        unsaid, said = (
            train("qwen3-8b", trainer=name, gradient_checkpointing=how).allocated_bytes for how in (None, default)
        )
        assert unsaid == said
        assert unsaid != train("qwen3-8b", trainer=name, gradient_checkpointing=not default).allocated_bytes


def test_fsdp_holds_the_whole_gradient_of_its_root_unit_until_the_backward_is_over() -> None:
    # embedding and head sit in the root unit, reduced last: 151,936 x 4,096 x 2 B of the head wait unsharded
    def gradients(parallelism: Parallelism) -> int:
        answer = train("qwen3-8b", method="full", parallelism=parallelism, n_gpus=8)
        return part(answer, "gradients", "backward of the first layer")

    assert gradients("fsdp2") - gradients("zero3") == 2 * 151_936 * 4096


@pytest.mark.parametrize("parallelism", ["fsdp", "fsdp2"])
def test_fsdp_that_offloads_parameters_steps_on_the_cpu(parallelism: Parallelism) -> None:
    answer = train("qwen3-8b", method="full", parallelism=parallelism, n_gpus=8, offload=frozenset({"parameters"}))
    step = instant(answer, "optimizer step").parts
    assert not {"optimizer state", "step temporaries", "gradients", "weights"} & set(step)


def test_the_reference_model_of_dpo_is_as_wide_as_the_weights() -> None:
    for width, each in (("bf16", 2), ("fp32", 4)):
        answer = train("qwen3-8b", method="full", task="dpo", weights_dtype=width)
        assert part(answer, "reference model") == each * QWEN


def test_offloaded_activations_without_checkpointing_are_refused() -> None:
    with pytest.raises(NotModelled, match="add --gradient-checkpointing"):
        train("qwen3-8b", offload=frozenset({"activations"}), gradient_checkpointing=False)


def test_packed_checkpoints_are_not_trained_on_and_mxfp4_is_unpacked() -> None:
    config = catalog.load_config("qwen3-8b") | {
        "quantization_config": {"quant_method": "awq", "bits": 4, "group_size": 128}
    }
    packed = spec_from_config(config, name="qwen3-8b-awq", source="")
    for method in ("full", "lora", "qlora"):
        with pytest.raises(NotModelled, match=r"is stored as awq, .*: name its 16-bit checkpoint"):
            training_memory(packed, FinetuneSettings(method=method, seq_len=4096))
    assert any("unpacked to 16 bits" in note for note in train("gpt-oss-20b", method="lora").notes)


def test_adapters_on_a_checkpoint_that_bitsandbytes_packed_are_qlora() -> None:
    config = catalog.load_config("qwen3-8b") | {
        "quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_use_double_quant": True}
    }
    packed = spec_from_config(config, name="qwen3-8b-bnb-4bit", source="")
    qlora = FinetuneSettings(method="qlora", seq_len=4096)
    assert training_memory(packed, qlora).allocated_bytes == train("qwen3-8b").allocated_bytes
    with pytest.raises(NotModelled, match="training it with lora is not modelled"):
        training_memory(packed, FinetuneSettings(method="lora", seq_len=4096))


def test_an_unknown_trainer_is_refused_with_the_nearest() -> None:
    with pytest.raises(PlannerError, match="no trainer is called 'unslot': try unsloth"):
        train("qwen3-8b", trainer="unslot")


def test_paged_states_are_said_not_to_be_counted() -> None:
    answer = train("qwen3-8b", optimizer="paged_adamw_8bit")
    assert part(answer, "optimizer state") == 0
    assert any("paged optimizer states" in text for text in answer.estimate.not_modelled)


# -------------------------------------------------------------------------------------------- what always holds

MODELS = ("qwen3-8b", "qwen3-0.6b", "gemma-3-4b", "phi-4", "mixtral-8x7b", "deepseek-v2-lite", "falcon-7b")
RUNS = st.fixed_dictionaries(
    {
        "method": st.sampled_from(get_args(Method)),
        "trainer": st.sampled_from(("trl", "transformers", "transformers-4", "unsloth", "torchtune")),
        "gradient_checkpointing": st.booleans(),
        "loss": st.sampled_from(("chunked", "liger", "hf", "in_place", "logit_chunks", None)),
        "attention": st.sampled_from(("flash", "efficient")),
        "gradient_accumulation_steps": st.sampled_from((1, 4)),
    }
)


@settings(max_examples=40, deadline=None)
@given(st.sampled_from(MODELS), RUNS, st.integers(1, 16_384), st.integers(1, 4096), st.integers(1, 4))
def test_a_longer_sequence_and_a_larger_batch_never_need_less(
    name: str, run: dict[str, Any], seq_len: int, more: int, batch: int
) -> None:
    here = train(name, seq_len, micro_batch=batch, **run).allocated_bytes
    assert train(name, seq_len + more, micro_batch=batch, **run).allocated_bytes >= here
    assert train(name, seq_len, micro_batch=batch + 1, **run).allocated_bytes >= here


@settings(max_examples=30, deadline=None)
@given(st.sampled_from(MODELS), RUNS, st.integers(1, 128), st.integers(1, 128))
def test_a_higher_rank_never_needs_less(name: str, run: dict[str, Any], rank: int, more: int) -> None:
    lower = train(name, 1024, lora_rank=rank, **run)
    higher = train(name, 1024, lora_rank=rank + more, **run)
    assert higher.allocated_bytes >= lower.allocated_bytes
    assert higher.trainable_parameters >= lower.trainable_parameters


@settings(max_examples=30, deadline=None)
@given(
    st.sampled_from(MODELS),
    RUNS,
    st.sampled_from([p for p in get_args(Parallelism) if p != "none"]),
    st.sampled_from((1, 2, 3, 4, 8)),
)
def test_more_shards_never_need_more_weights_states_or_gradients(
    name: str, run: dict[str, Any], parallelism: str, gpus: int
) -> None:
    few = train(name, 1024, parallelism=parallelism, n_gpus=gpus, **run)
    many = train(name, 1024, parallelism=parallelism, n_gpus=2 * gpus, **run)
    for name_of_part in ("weights", "adapters", "optimizer state", "gradients", "step temporaries"):
        assert part(many, name_of_part, "optimizer step") <= part(few, name_of_part, "optimizer step")


@settings(max_examples=20, deadline=None)
@given(st.sampled_from(("qwen3-8b", "llama-3.1-8b", "mistral-7b-v0.1", "phi-4")), RUNS, st.integers(1, 60))
def test_more_layers_never_need_less(name: str, run: dict[str, Any], layers: int) -> None:
    config = catalog.model_entry(name).config
    few, many = (
        training_memory(
            spec_from_config(config | {"num_hidden_layers": n}, name, "test"), FinetuneSettings(seq_len=2048, **run)
        )
        for n in (layers, layers + 1)
    )
    assert many.allocated_bytes > few.allocated_bytes


@pytest.mark.parametrize("name", [e.name for e in catalog.model_entries() if e.listed])
def test_every_listed_model_can_be_planned_or_says_why_not(name: str) -> None:
    for method in ("full", "qlora"):
        if any(group.kind == "linear" for group in spec(name).layers):
            with pytest.raises(NotModelled, match="is not modelled"):
                train(name, 1024, method=method)
        else:
            assert train(name, 1024, method=method).allocated_bytes > 0
