"""Serving memory: what vLLM loads, profiles and leaves for the KV cache, and how much context that holds.

    KV cache = ceil(usable * gpu_memory_utilization) - weights - activation peak - non-torch (- CUDA graphs since 0.20)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from math import ceil
from typing import TYPE_CHECKING

from pydantic import Field

from planner.catalog.engines import Engine, constant_source, engine
from planner.errors import PlannerError
from planner.memory import serving_peak, weights
from planner.memory.estimate import Component, MemoryEstimate, exact
from planner.memory.kv import BLOCK_TOKENS, KvLayout, kv_buckets, kv_layout, longest_context, steady_bytes
from planner.memory.serving_peak import Batch, Device
from planner.memory.weights import WeightScheme, cdiv
from planner.model import Frozen, ModelSpec

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

PEAK_INSTANT = "vLLM at work: the profiled activation peak while every wanted sequence is at its full context"


class ServingSettings(Frozen):
    """What `vllm serve` is told. None: vLLM's own default for that version and card.

    quantization: None or "auto" as the checkpoint is stored, else a format's name (catalog/engines.json)
    concurrency: sequences wanted at the full context, for which the estimate counts KV cache
    draft: model (or EAGLE head) that proposes draft_tokens tokens a step, loaded beside the target
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


class KvPerSequence(Frozen):
    """Bytes of one sequence at the full context, three ways.

    steady: what it needs between steps; reserved: what vLLM's blocks may take while it is prefilled, padding layers
    included; unified: with every layer keeping the whole context (hybrid groups off)
    """

    steady_bytes: int
    reserved_bytes: int
    unified_bytes: int


class ServingMemory(Frozen):
    """One GPU's memory under vLLM.

    estimate: the demand: weights, peak, and the KV cache of `concurrency` sequences; kv_bytes: the supply that vLLM
    finds (negative when it cannot start); kv_bytes_per_token: sum over one rank's layers, as if no layer forgot
    kv_tokens: as vLLM prints it; sequences_at_context: how many full-context sequences the pool holds
    max_context: of a single sequence, at most the model's own; fits: `concurrency` sequences fit at max_model_len
    prefix_cache_bytes: of the pool, what those sequences leave for cached prefixes
    arguments: for `vllm serve`, without the model's name
    """

    estimate: MemoryEstimate
    budget_bytes: int
    kv_bytes: int
    kv_blocks: int
    kv_bytes_per_token: int
    kv_tokens: int
    kv_for_one_sequence: KvPerSequence
    sequences_at_context: int
    max_context: int
    fits: bool
    prefix_cache_bytes: int
    engine_version: str
    max_num_seqs: int
    max_num_batched_tokens: int
    gpu_memory_utilization: float
    arguments: tuple[str, ...]


@dataclass(frozen=True)
class _Rank:
    """Everything that does not depend on the context: computed once, used by one answer or by a whole sweep."""

    spec: ModelSpec
    settings: ServingSettings
    engine: Engine
    scheme: WeightScheme

    @cached_property
    def layout(self) -> KvLayout:
        return self._layout(self.settings.hybrid_kv_cache)

    def _layout(self, hybrid: bool | None) -> KvLayout:
        s = self.settings
        buckets = self._buckets(self.spec) + (self._buckets(s.draft) if s.draft is not None else ())
        return kv_layout(
            buckets,
            self.engine,
            block_tokens=s.block_size,
            prefix_caching=s.enable_prefix_caching,
            speculative_tokens=s.draft_tokens,
            hybrid=hybrid,
        )

    def _buckets(self, spec: ModelSpec) -> tuple[kv_bucket_type, ...]:
        s = self.settings
        return kv_buckets(
            spec, self.engine, tp=s.tensor_parallel_size, pp=s.pipeline_parallel_size, kv_cache_dtype=s.kv_cache_dtype
        )


def serving_memory(
    spec: ModelSpec,
    workload: ServingSettings,
    *,
    usable_bytes: int,
    compute_capability: tuple[int, int] = (9, 0),
    device_name: str = "",
    multiprocessors: int | None = None,
) -> ServingMemory:
    raise NotImplementedError
