"""The lines of a serving estimate: what loading puts on the GPU, what profiling measures, what the pool must hold."""

from __future__ import annotations

import json

from pydantic import Field

from planner.catalog.engines import Engine, constant, constant_source
from planner.memory import serving_peak as peak
from planner.memory import weights
from planner.memory.estimate import Component, exact
from planner.memory.kv import BLOCK_TOKENS, KvLayout
from planner.memory.serving_peak import Batch, Device
from planner.memory.weights import WeightScheme, weight_scheme
from planner.model import Frozen, ModelSpec


class ServingSettings(Frozen):
    """What `vllm serve` is told. None: vLLM's own default for that version and card.

    quantization: None or "auto" as the checkpoint is stored, else a format's name (catalog/engines.json)
    concurrency: sequences wanted at the full context, for which the estimate counts KV cache
    draft: model (or EAGLE head) that proposes draft_tokens tokens a step, loaded beside the target
    hybrid_kv_cache: False when the hybrid KV cache manager is switched off
    engine_version: None the default of the catalog; the V0 engine of 0.8 releases is written as 0.7
    """

    max_model_len: int = Field(gt=0)
    max_num_seqs: int | None = Field(default=None, gt=0)
    max_num_batched_tokens: int | None = Field(default=None, gt=0)
    gpu_memory_utilization: float | None = Field(default=None, gt=0, le=1)
    tensor_parallel_size: int = Field(default=1, ge=1)
    pipeline_parallel_size: int = Field(default=1, ge=1)
    quantization: str | None = None
    kv_cache_dtype: str = "auto"
    block_size: int = Field(default=BLOCK_TOKENS, gt=0)
    enforce_eager: bool = False
    enable_lora: bool = False
    max_loras: int = Field(default=1, ge=1)
    max_lora_rank: int = Field(default=16, ge=1)
    draft: ModelSpec | None = None
    draft_tokens: int = Field(default=0, ge=0)
    enable_prefix_caching: bool = True
    hybrid_kv_cache: bool | None = None
    concurrency: int = Field(default=1, ge=1)
    engine_version: str | None = None


def loaded_bytes(
    spec: ModelSpec,
    workload: ServingSettings,
    version: Engine,
    scheme: WeightScheme,
    compute_capability: tuple[int, int],
) -> int:
    """What is on the GPU before the profile run: weights, absorbed MLA projections, rope tables, adapters, draft."""
    return sum(part[1] for part in _loaded_parts(spec, workload, version, scheme, compute_capability))


def measured_bytes(
    spec: ModelSpec, workload: ServingSettings, version: Engine, scheme: WeightScheme, device: Device, batch: Batch
) -> int:
    """What the profile run takes from the budget: activation peak, non-torch, and by version graphs and V2 state."""
    total = peak.activation_peak(spec, scheme, version, device, batch, tp=workload.tensor_parallel_size).total_bytes
    total += _non_torch(workload, version, device)[1]
    if version.graphs_in_budget:
        total += _graphs(spec, workload, version, batch)[1]
    if version.v2_state_in_budget:
        total += peak.v2_state_bytes(spec, scheme, version, batch)
    return total


def _graphs(spec: ModelSpec, workload: ServingSettings, version: Engine, batch: Batch) -> tuple[int, int, int]:
    return peak.graph_bytes(spec, version, batch, workload.pipeline_parallel_size, enforce_eager=workload.enforce_eager)


def _non_torch(workload: ServingSettings, version: Engine, device: Device) -> tuple[int, int, int]:
    return peak.non_torch_bytes(version, device, workload.tensor_parallel_size, workload.pipeline_parallel_size)


Part = tuple[str, int, str, dict[str, int | float | str], str]


def _loaded_parts(
    spec: ModelSpec,
    workload: ServingSettings,
    version: Engine,
    scheme: WeightScheme,
    compute_capability: tuple[int, int],
) -> list[Part]:
    """Name, bytes, formula, inputs and source of everything that loading puts on the GPU."""
    tp, pp = workload.tensor_parallel_size, workload.pipeline_parallel_size
    sizes = {"tensor_parallel_size": tp, "pipeline_parallel_size": pp}
    families = weights.family_bytes(spec, scheme, tp=tp, compute_capability=compute_capability)
    parts: list[Part] = [
        (
            "weights",
            weights.weight_bytes(spec, scheme, tp=tp, pp=pp, sizes=families),
            "sum over tensors of count * bytes of the rank's rows and columns in the stored format",
            {"parameters": spec.parameter_count, "format": scheme.name, **sizes},
            "shapes: " + (spec.source or spec.name) + "; sharding: vllm/model_executor/layers/linear.py",
        ),
        (
            "rope tables",
            weights.rope_table_bytes(spec),
            "positions * rotary width * 2 B for each kind of layer",
            {"max_context": spec.max_context, "head_dim": spec.head_dim},
            "vllm/model_executor/layers/rotary_embedding/base.py",
        ),
    ]
    rounding = weights.allocator_rounding_bytes(spec, scheme, tp=tp, pp=pp, sizes=families)
    if rounding:
        parts.append(
            (
                "allocator rounding",
                rounding,
                "rests of up to 1 MiB below the next 2 MiB, over the large parameters",
                dict(sizes),
                "pytorch/c10/cuda/CUDACachingAllocator.cpp",
            )
        )
    absorbed = weights.absorbed_mla_bytes(spec, tp, pp)
    if absorbed:
        parts.append(
            (
                "absorbed MLA projections",
                absorbed,
                "kv_b_proj once more in 16 bits",
                dict(sizes),
                "vllm/model_executor/layers/attention/mla_attention.py",
            )
        )
    if workload.enable_lora:
        rank, slots = workload.max_lora_rank, workload.max_loras
        parts.append(
            (
                "LoRA slots",
                weights.lora_slot_bytes(
                    spec, rank=rank, slots=slots, tp=tp, pp=pp, extra_vocab=version.lora_extra_vocab
                ),
                "max_loras * max_lora_rank * (inputs + outputs) * 2 B over the linear layers",
                {"max_loras": slots, "max_lora_rank": rank, **sizes},
                "vllm/lora/layers/base_linear.py",
            )
        )
    if workload.draft is not None:
        draft = workload.draft
        parts.append(
            (
                "draft model",
                weights.weight_bytes(draft, weight_scheme(draft), tp=tp, compute_capability=compute_capability),
                "sum over its tensors, sharded like the target's",
                {"parameters": draft.parameter_count, "tensor_parallel_size": tp},
                "vllm/v1/spec_decode/draft_model.py",
            )
        )
    return parts


def loaded_components(
    spec: ModelSpec, workload: ServingSettings, version: Engine, scheme: WeightScheme, device: Device
) -> list[Component]:
    return [
        exact(name, size, formula, source, inputs)
        for name, size, formula, inputs, source in _loaded_parts(
            spec, workload, version, scheme, device.compute_capability
        )
    ]


def measured_components(
    spec: ModelSpec, workload: ServingSettings, version: Engine, scheme: WeightScheme, device: Device, batch: Batch
) -> list[Component]:
    tp = workload.tensor_parallel_size
    sizes: dict[str, int | float | str] = {
        "max_num_batched_tokens": batch.tokens,
        "max_num_seqs": batch.sequences,
        "vocab_size": spec.vocab_size,
        "hidden_size": spec.hidden_size,
    }
    top = peak.activation_peak(spec, scheme, version, device, batch, tp=tp)
    spread = int(top.total_bytes * float(constant("activation_spread")))
    low, expected, high = _non_torch(workload, version, device)
    older = tp == 1 and device.compute_capability[0] < 9
    components = [
        Component(
            name="activation peak",
            low_bytes=top.total_bytes - spread,
            expected_bytes=top.total_bytes,
            high_bytes=top.total_bytes + spread,
            formula="kept buffers + cuBLAS workspace + the larger of the prefill batch and the sampler",
            inputs={
                "phase": top.phase,
                "prefill_bytes": top.prefill_bytes,
                "sampler_bytes": top.sampler_bytes,
                "kept_bytes": top.persistent_bytes,
                **sizes,
            },
            source=version.sources["sampler_bytes_per_logit"],
        ),
        Component(
            name="non-torch",
            low_bytes=low,
            expected_bytes=expected,
            high_bytes=high,
            formula="measured: NCCL, kernels and libraries outside torch's pool",
            inputs={"tensor_parallel_size": tp, "engine_version": version.version},
            source=version.sources["non_torch_before_hopper_gib" if older else "non_torch_gib"],
        ),
    ]
    state = peak.v2_state_bytes(spec, scheme, version, batch)
    if state:
        formula = "max_num_seqs * vocab_size * 4.125 B" + _outside(version.v2_state_in_budget)
        components.append(exact("sampler state", state, formula, version.sources["v2_state_bytes_per_logit"], sizes))
    low, expected, high = _graphs(spec, workload, version, batch)
    if expected:
        components.append(
            Component(
                name="CUDA graphs",
                low_bytes=low,
                expected_bytes=expected,
                high_bytes=high,
                formula="measured: base + per layer (+ MoE)" + _outside(version.graphs_in_budget),
                inputs={"layers": spec.num_layers, "engine_version": version.version},
                source=version.sources["graphs_gib"],
            )
        )
    low, expected, high = peak.context_bytes()
    components.append(
        Component(
            name="CUDA context",
            low_bytes=low,
            expected_bytes=expected,
            high_bytes=high,
            formula="measured" + _outside(False),
            inputs={},
            source=constant_source("cuda_context_gib"),
        )
    )
    return components


def _outside(in_budget: bool) -> str:
    return "" if in_budget else ", on top of gpu_memory_utilization"


def kv_component(workload: ServingSettings, layout: KvLayout, steady: int, blocks: int) -> Component:
    """KV cache of the wanted sequences: low what they need between steps, expected what vLLM's blocks take."""
    reserved = blocks * layout.bytes_per_block
    count = workload.concurrency
    return Component(
        name="KV cache",
        low_bytes=min(steady, reserved) * count,
        expected_bytes=reserved * count,
        high_bytes=reserved * count,
        formula="concurrency * blocks of a sequence * bytes of a block in all layers of a group",
        inputs={
            "concurrency": count,
            "max_model_len": workload.max_model_len,
            "blocks": blocks,
            "bytes_per_block": layout.bytes_per_block,
            "groups": len(layout.groups),
            "sized_layers": layout.sized_layers,
        },
        source="vllm/v1/core/kv_cache_utils.py, vllm/v1/kv_cache_interface.py",
    )


def not_modelled(spec: ModelSpec, workload: ServingSettings) -> tuple[str, ...]:
    notes = ["memory that other processes hold on the GPU"]
    if spec.has_vision:
        notes.append("the vision encoder's own activations, where they exceed the decoder's")
    if any(group.kind == "linear" for group in spec.layers):
        notes.append("the chunked scan of linear-attention layers in a long prefill batch")
    if workload.draft is not None or workload.draft_tokens:
        notes.append("the rejection sampler's logits of speculative decoding")
    return tuple(notes)


# what vLLM makes of 16-bit weights while it loads them; every other format must be stored so
QUANTIZED_AT_START = ("fp8", "bitsandbytes", "nf4")


def arguments(
    spec: ModelSpec, workload: ServingSettings, batch: Batch, share: float, compute_capability: tuple[int, int]
) -> tuple[str, ...]:
    """Flags of `vllm serve` that make the server what was computed."""
    flags = [
        f"--max-model-len={workload.max_model_len}",
        f"--gpu-memory-utilization={share:g}",
        f"--max-num-seqs={batch.sequences}",
        f"--max-num-batched-tokens={batch.tokens}",
    ]
    if workload.tensor_parallel_size > 1:
        flags.append(f"--tensor-parallel-size={workload.tensor_parallel_size}")
    if workload.pipeline_parallel_size > 1:
        flags.append(f"--pipeline-parallel-size={workload.pipeline_parallel_size}")
    if spec.quantization is None and workload.quantization in QUANTIZED_AT_START:
        flags.append(f"--quantization={'fp8' if workload.quantization == 'fp8' else 'bitsandbytes'}")
    if workload.kv_cache_dtype != "auto":
        flags.append(f"--kv-cache-dtype={workload.kv_cache_dtype}")
    if compute_capability < (8, 0):
        flags.append("--dtype=float16")  # no bfloat16 before Ampere
    if workload.block_size != BLOCK_TOKENS:
        flags.append(f"--block-size={workload.block_size}")
    if workload.enforce_eager:
        flags.append("--enforce-eager")
    if workload.enable_lora:
        flags += [
            "--enable-lora",
            f"--max-loras={workload.max_loras}",
            f"--max-lora-rank={workload.max_lora_rank}",
        ]
    flags.append("--enable-prefix-caching" if workload.enable_prefix_caching else "--no-enable-prefix-caching")
    if workload.hybrid_kv_cache is False:
        flags.append("--disable-hybrid-kv-cache-manager")
    if workload.draft is not None:
        draft = {
            "model": workload.draft.hub_id or workload.draft.name,
            "num_speculative_tokens": workload.draft_tokens,
        }
        flags.append(f"--speculative-config={json.dumps(draft, separators=(',', ':'))}")
    return tuple(flags)
