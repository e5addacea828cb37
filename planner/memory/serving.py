"""Serving memory: what vLLM loads, profiles and leaves for the KV cache, and how much context that holds.

KV cache = ceil(usable * gpu_memory_utilization) - weights - activation peak - non-torch (- CUDA graphs since 0.20)
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from itertools import product
from math import ceil
from typing import TYPE_CHECKING

from planner.catalog.engines import Engine, engine
from planner.errors import NotModelled, PlannerError
from planner.memory import serving_peak as peak
from planner.memory.estimate import MemoryEstimate
from planner.memory.kv import KvLayout, kv_buckets, kv_layout, longest_context, steady_bytes
from planner.memory.serving_parts import (
    ServingSettings,
    arguments,
    kv_component,
    loaded_bytes,
    loaded_components,
    measured_bytes,
    measured_components,
    not_modelled,
)
from planner.memory.serving_peak import Batch, Device
from planner.memory.weights import WeightScheme, weight_scheme
from planner.model import Frozen, ModelSpec

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

__all__ = [
    "Device",
    "KvPerSequence",
    "ServingMemory",
    "ServingSettings",
    "SweepTable",
    "rank_layout",
    "serving_memory",
    "sweep",
]

PEAK_INSTANT = "the profiled activation peak while every wanted sequence is at its full context"


class KvPerSequence(Frozen):
    """Bytes of one sequence at the full context on one rank, three ways.

    steady: what it needs between steps; reserved: what vLLM's blocks may take while it is prefilled, padding layers
    included; unified: with every layer keeping the whole context (hybrid KV cache manager off)
    """

    steady_bytes: int
    reserved_bytes: int
    unified_bytes: int


class ServingMemory(Frozen):
    """One GPU's memory under vLLM, the fullest rank's.

    estimate: the demand: weights, peak, and the KV cache of `concurrency` sequences
    kv_bytes: the supply that vLLM finds, negative when it cannot start; budget_bytes: usable * gpu_memory_utilization
    kv_bytes_per_token: sum over the rank's layers, as if no layer forgot; sized_layers: with padding layers
    kv_tokens: as vLLM prints it; sequences_at_context: how many full-context sequences the pool holds
    max_context: of a single sequence, at most the model's own; fits: `concurrency` sequences fit at max_model_len
    prefix_cache_bytes: what those sequences leave of the pool for cached prefixes
    arguments: for `vllm serve`, without the model's name
    """

    estimate: MemoryEstimate
    budget_bytes: int
    kv_bytes: int
    kv_blocks: int
    kv_bytes_per_token: int
    kv_tokens: int
    kv_for_one_sequence: KvPerSequence
    sized_layers: int
    sequences_at_context: int
    max_context: int
    fits: bool
    prefix_cache_bytes: int
    engine_version: str
    max_num_seqs: int
    max_num_batched_tokens: int
    gpu_memory_utilization: float
    arguments: tuple[str, ...]


def serving_memory(
    spec: ModelSpec,
    workload: ServingSettings,
    *,
    usable_bytes: int,
    compute_capability: tuple[int, int] = (9, 0),
    device_name: str = "",
    multiprocessors: int | None = None,
) -> ServingMemory:
    """Memory of one GPU that serves spec with vLLM, and what its KV cache holds.

    kv_bytes = ceil(usable_bytes * gpu_memory_utilization) - loaded - measured, with loaded the weights, rope tables,
    adapters and draft, and measured the activation peak and non-torch memory (and the CUDA graphs since 0.20).
    usable_bytes is what CUDA reports, in bytes; device_name matters where it holds "A100".
    Raises PlannerError for what vLLM refuses (heads that tp does not divide) or what is not modelled.
    Source: vllm/v1/worker/gpu_worker.py, determine_available_memory.
    """
    device = Device(
        usable_bytes=usable_bytes,
        compute_capability=compute_capability,
        name=device_name,
        multiprocessors=multiprocessors,
    )
    version = engine(workload.engine_version)
    scheme = weight_scheme(spec, workload.quantization)
    batch = _batch(spec, workload, version, device)
    layout = rank_layout(spec, workload)
    unified = _layout(spec, workload, version, False)
    share = _share(workload, version)
    budget = ceil(usable_bytes * share)
    loaded = loaded_components(spec, workload, version, scheme, device)
    kv_bytes = (
        budget
        - sum(part.expected_bytes for part in loaded)
        - measured_bytes(spec, workload, version, scheme, device, batch)
    )
    in_flight = batch.tokens * version.concurrent_batches
    blocks = max(kv_bytes, 0) // layout.bytes_per_block
    each = layout.blocks_for(workload.max_model_len, in_flight)
    reserved = each * layout.bytes_per_block
    kv = KvPerSequence(
        steady_bytes=steady_bytes(layout.buckets, workload.max_model_len),
        reserved_bytes=reserved,
        unified_bytes=unified.blocks_for(workload.max_model_len, in_flight) * unified.bytes_per_block,
    )
    wanted = reserved * workload.concurrency
    components = (
        *loaded,
        *measured_components(spec, workload, version, scheme, device, batch),
        kv_component(workload, layout, kv.steady_bytes, each),
    )
    return ServingMemory(
        estimate=MemoryEstimate(
            components=components, peak_instant=PEAK_INSTANT, not_modelled=not_modelled(spec, workload)
        ),
        budget_bytes=budget,
        kv_bytes=kv_bytes,
        kv_blocks=blocks,
        kv_bytes_per_token=layout.naive_bytes_per_token,
        kv_tokens=layout.printed_tokens(blocks, workload.max_model_len, in_flight),
        kv_for_one_sequence=kv,
        sized_layers=layout.sized_layers,
        sequences_at_context=blocks // each,
        max_context=longest_context(layout, blocks, in_flight, spec.max_context),
        fits=blocks >= each * workload.concurrency,
        prefix_cache_bytes=max(0, blocks * layout.bytes_per_block - wanted) if workload.enable_prefix_caching else 0,
        engine_version=version.version,
        max_num_seqs=batch.sequences,
        max_num_batched_tokens=batch.tokens,
        gpu_memory_utilization=share,
        arguments=arguments(spec, workload, batch, share, compute_capability),
    )


def _share(workload: ServingSettings, version: Engine) -> float:
    asked = workload.gpu_memory_utilization
    return version.gpu_memory_utilization if asked is None else asked


def _batch(spec: ModelSpec, workload: ServingSettings, version: Engine, device: Device) -> Batch:
    batch = peak.default_batch(
        spec,
        version,
        device,
        max_model_len=workload.max_model_len,
        max_num_batched_tokens=workload.max_num_batched_tokens,
        max_num_seqs=workload.max_num_seqs,
    )
    if batch.tokens < batch.sequences:  # vllm/config/scheduler.py
        raise PlannerError(
            f"vLLM refuses {batch.sequences:,} sequences in steps of {batch.tokens:,} tokens: raise"
            " --max-num-batched-tokens to at least --max-num-seqs, or lower that"
        )
    return batch


def rank_layout(spec: ModelSpec, workload: ServingSettings) -> KvLayout:
    """The KV cache of one rank, as that engine version groups it."""
    return _layout(spec, workload, engine(workload.engine_version), workload.hybrid_kv_cache)


def _layout(spec: ModelSpec, workload: ServingSettings, version: Engine, hybrid: bool | None) -> KvLayout:
    models = [spec] if workload.draft is None else [spec, workload.draft]
    buckets = [
        bucket
        for model in models
        for bucket in kv_buckets(
            model,
            version,
            tp=workload.tensor_parallel_size,
            pp=workload.pipeline_parallel_size,
            kv_cache_dtype=workload.kv_cache_dtype,
        )
    ]
    return kv_layout(
        buckets,
        version,
        block_tokens=workload.block_size,
        prefix_caching=workload.enable_prefix_caching,
        speculative_tokens=workload.draft_tokens,
        hybrid=hybrid,
    )


@dataclass(frozen=True)
class SweepTable:
    """Many answers of serving_memory at once.

    combinations: (index into specs, quantization, tensor_parallel_size); skipped: refused ones, with the reason
    kv_bytes, kv_blocks: (combination, device)
    reserved_bytes (of one sequence), sequences, fits: (combination, device, context)
    """

    combinations: tuple[tuple[int, str | None, int], ...]
    skipped: tuple[tuple[tuple[int, str | None, int], str], ...]
    contexts: tuple[int, ...]
    devices: tuple[Device, ...]
    kv_bytes: NDArray[np.int64]
    kv_blocks: NDArray[np.int64]
    reserved_bytes: NDArray[np.int64]
    sequences: NDArray[np.int64]
    fits: NDArray[np.bool_]

    @property
    def configurations(self) -> int:
        return int(self.sequences.size)


def sweep(
    specs: Sequence[ModelSpec],
    *,
    contexts: Sequence[int],
    devices: Sequence[Device],
    quantizations: Sequence[str | None] = (None,),
    tensor_parallel: Sequence[int] = (1,),
    settings: ServingSettings | None = None,
) -> SweepTable:
    """serving_memory for every model x format x tensor parallel size x device x context, by the same formulas.

    What depends on neither device nor context is computed once for a combination, what depends on the device's class
    once for the class, and the rest is integer array arithmetic. settings: everything else that vLLM is told.
    Raises PlannerError for the V0 engine with default batches, which grow with the context.
    """
    import numpy as np

    base = settings or ServingSettings(max_model_len=max(contexts))
    version = engine(base.engine_version)
    if version.whole_prompt_batches and base.max_num_batched_tokens is None:
        raise NotModelled("the V0 engine's batch grows with the context: state max_num_batched_tokens for a sweep")
    share = _share(base, version)
    budgets = np.array([ceil(device.usable_bytes * share) for device in devices], dtype=np.int64)
    lengths = np.array(contexts, dtype=np.int64)
    shape = (-1, len(devices), len(contexts))
    kept, skipped, supplies, pools, needs, counts = [], [], [], [], [], []
    for index, spec in enumerate(specs):
        layouts: dict[int, KvLayout] = {}
        measured: dict[Hashable, int] = {}
        batches = [_batch(spec, base, version, device) for device in devices]
        in_flight = np.array([batch.tokens for batch in batches], dtype=np.int64) * version.concurrent_batches
        for tp, asked in product(tensor_parallel, quantizations):
            workload = base.model_copy(update={"tensor_parallel_size": tp, "quantization": asked})
            try:
                scheme = weight_scheme(spec, asked)
                taken = _taken_bytes(spec, workload, version, scheme, devices, batches, measured)
                if tp not in layouts:
                    layouts[tp] = rank_layout(spec, workload)
            except PlannerError as error:
                skipped.append(((index, asked, tp), str(error)))
                continue
            layout = layouts[tp]
            supply = budgets - np.array(taken, dtype=np.int64)
            blocks = np.maximum(supply, 0) // layout.bytes_per_block
            each = np.broadcast_to(layout.blocks_for(lengths[None, :], in_flight[:, None]), shape[1:])
            kept.append((index, asked, tp))
            supplies.append(supply)
            pools.append(blocks)
            needs.append(each * layout.bytes_per_block)
            counts.append(blocks[:, None] // each)
    sequences = np.array(counts, dtype=np.int64).reshape(shape)
    return SweepTable(
        combinations=tuple(kept),
        skipped=tuple(skipped),
        contexts=tuple(contexts),
        devices=tuple(devices),
        kv_bytes=np.array(supplies, dtype=np.int64).reshape(shape[:2]),
        kv_blocks=np.array(pools, dtype=np.int64).reshape(shape[:2]),
        reserved_bytes=np.array(needs, dtype=np.int64).reshape(shape),
        sequences=sequences,
        fits=sequences >= base.concurrency,
    )


def _taken_bytes(
    spec: ModelSpec,
    workload: ServingSettings,
    version: Engine,
    scheme: WeightScheme,
    devices: Sequence[Device],
    batches: Sequence[Batch],
    measured: dict[Hashable, int],
) -> list[int]:
    """Bytes that are not KV cache for each device, computed once for devices that differ in nothing but their size.

    measured: a model's profile results so far; of the format only what activation_peak looks at makes a difference.
    """
    packed = scheme.quantization is not None and scheme.quantization.method == "mxfp4"  # its padding differs by card
    loaded: dict[bool, int] = {}
    traits = None if scheme.quantization is None else (scheme.quantization.activation_bits, packed)
    taken = []
    for device, batch in zip(devices, batches, strict=True):
        capability = device.compute_capability
        hopper = packed and capability[0] == 9
        if hopper not in loaded:
            loaded[hopper] = loaded_bytes(spec, workload, version, scheme, capability)
        key = (workload.tensor_parallel_size, traits, capability, device.multiprocessors, batch.tokens, batch.sequences)
        if key not in measured:
            measured[key] = measured_bytes(spec, workload, version, scheme, device, batch)
        taken.append(loaded[hopper] + measured[key])
    return taken
