"""One step of a serving engine, from what it makes a GPU do: bytes moved, operations, exchanges, and fixed costs.

step = dense matmuls + experts + output head + KV cache read + prefill attention + elementwise + all-reduce + overhead

Every matmul takes the smooth maximum of reading its weights and multiplying. The formulas take numbers or arrays.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import Any

from planner.catalog.engines import engine
from planner.memory.kv import kv_buckets
from planner.memory.weights import WeightScheme, check_parallel, rank_shape, tensor_bytes
from planner.model import VISION_PARTS, ModelSpec

UNBOUNDED = 1e18  # a window that holds any context
SMOOTH = 3.0  # exponent of the smooth maximum: 26 % above the larger term where both are equal


@dataclass(frozen=True)
class Window:
    """Attention layers of one reach on a rank.

    token_bytes: of KV cache that they read for a context token; pair_flops: for one query and one key over their heads
    reach: tokens that they look back, UNBOUNDED for all
    """

    token_bytes: float
    pair_flops: float
    reach: float


@dataclass(frozen=True)
class Work:
    """What a step makes each GPU of a replica do.

    dense_bytes, dense_flops: weights read by every step, operations for a token; head_*: of the output head, for a
    sampled token; expert_bytes: all routed experts of the rank, expert_flops: for a token
    experts, experts_per_token: 1 of 1 in a dense model, where they have no bytes
    state_bytes: of linear layers, read and written for a sequence; elementwise_bytes: of activations, for a token
    message_bytes: a token's part of one all-reduce, of which a step makes `reductions`
    """

    layers: int
    tensor_parallel_size: int
    dense_bytes: float
    dense_flops: float
    head_bytes: float
    head_flops: float
    expert_bytes: float
    expert_flops: float
    experts: int
    experts_per_token: int
    windows: tuple[Window, ...]
    state_bytes: float
    elementwise_bytes: float
    message_bytes: float
    reductions: int


@dataclass(frozen=True)
class Speeds:
    """How fast an engine does it on one GPU, everything in bytes, operations or units of a second.

    weight_bytes, head_bytes, expert_bytes, kv_bytes, elementwise_bytes: rates of reading; dense_flops, head_flops,
    expert_flops, attention_flops: attainable matmul rates; ramp_tokens: that a dense matmul costs beside its own
    step, layer, mixed, sequence: fixed seconds of a step, of each layer, of a step with prefill, of each running
    sequence; link_latency: of one all-reduce, link_bytes: rate at which it moves
    floor: from a request to its scheduling and from its first token back to the client
    """

    weight_bytes: Any
    head_bytes: Any
    expert_bytes: Any
    kv_bytes: Any
    elementwise_bytes: Any
    dense_flops: Any
    head_flops: Any
    expert_flops: Any
    attention_flops: Any
    ramp_tokens: Any
    step: Any
    layer: Any
    mixed: Any
    sequence: Any
    link_latency: Any
    link_bytes: Any
    floor: Any


@dataclass(frozen=True)
class StepParts:
    """Seconds of one step by cause."""

    dense: Any
    experts: Any
    head: Any
    kv: Any
    attention: Any
    elementwise: Any
    exchange: Any
    overhead: Any

    @property
    def total(self) -> Any:
        return (
            self.dense
            + self.experts
            + self.head
            + self.kv
            + self.attention
            + self.elementwise
            + self.exchange
            + self.overhead
        )


def step_parts(
    work: Work, speeds: Speeds, *, decode: Any, context: Any, prefill: Any = 0, pairs: Any = 0, sampled: Any = None
) -> StepParts:
    """Seconds of a step that gives `decode` sequences a token each and computes `prefill` prompt tokens.

    context: KV tokens that the decoding sequences hold together; pairs: (query, key) pairs of the prefill tokens, so
    p * (done + p / 2) for p tokens after `done`; sampled: rows of the output head, decode + finished prompts.
    """
    tokens = decode + prefill
    sampled = decode if sampled is None else sampled
    dense = _matmul(
        work.dense_bytes / speeds.weight_bytes,
        work.dense_flops * (tokens + speeds.ramp_tokens) / speeds.dense_flops,
    )
    head = _matmul(work.head_bytes / speeds.head_bytes, work.head_flops * sampled / speeds.head_flops)
    share = distinct_experts(work.experts, work.experts_per_token, tokens) / work.experts
    experts = _matmul(work.expert_bytes * share / speeds.expert_bytes, work.expert_flops * tokens / speeds.expert_flops)
    kv, attention = 2 * decode * work.state_bytes / speeds.kv_bytes, 0.0
    for window in work.windows:
        kv = kv + window.token_bytes * _minimum(context, decode * window.reach) / speeds.kv_bytes
        attention = attention + window.pair_flops * _minimum(pairs, prefill * window.reach) / speeds.attention_flops
    exchange = work.reductions * (speeds.link_latency + work.message_bytes * tokens / speeds.link_bytes)
    overhead = speeds.step + work.layers * speeds.layer + speeds.sequence * decode + speeds.mixed * _minimum(prefill, 1)
    return StepParts(
        dense=dense,
        experts=experts,
        head=head,
        kv=kv,
        attention=attention,
        elementwise=work.elementwise_bytes * tokens / speeds.elementwise_bytes,
        exchange=exchange,
        overhead=overhead,
    )


def distinct_experts(experts: int, per_token: int, tokens: Any) -> Any:
    """How many experts of a layer a batch is expected to visit: E (1 - (1 - k / E)^n), for evenly spread tokens."""
    return experts * (1 - (1 - per_token / experts) ** tokens)


def _matmul(read: Any, multiply: Any) -> Any:
    """The smooth maximum (read^s + multiply^s)^(1/s): near the larger, a quarter more where they are equal."""
    return (read**SMOOTH + multiply**SMOOTH) ** (1 / SMOOTH)


def _minimum(a: Any, b: Any) -> Any:
    if isinstance(a, (int, float)) and isinstance(b, (int, float)):
        return a if a < b else b
    import numpy as np

    return np.minimum(a, b)


def work_of(
    spec: ModelSpec,
    scheme: WeightScheme,
    *,
    tensor_parallel_size: int = 1,
    kv_cache_dtype: str = "auto",
    compute_capability: tuple[int, int] = (9, 0),
    engine_version: str | None = None,
) -> Work:
    """What a step of that model makes each GPU of a tensor-parallel group do.

    Matmuls: 2 operations for every element of a rank's matrices (experts: those a token visits); embeddings are looked
    up, vision towers left out; the head is the embedding where they are tied. Raises PlannerError for heads that the
    GPUs cannot share.
    """
    tp = tensor_parallel_size
    check_parallel(spec, tp, 1)
    sums = dict.fromkeys(("dense", "head", "expert"), 0.0)
    flops = dict.fromkeys(sums, 0.0)
    for tensor in spec.tensors:
        if tensor.part in VISION_PARTS:
            continue
        if tensor.part == "embedding" and not (spec.tied_embeddings and tensor.shard == "vocab"):
            continue
        part = "expert" if tensor.part == "expert" else "head" if tensor.part in ("lm_head", "embedding") else "dense"
        size = tensor_bytes(tensor, spec, scheme, tp=tp, compute_capability=compute_capability)
        sums[part] += size
        if len(tensor.shape) >= 2:
            flops[part] += 2 * prod(rank_shape(tensor, spec, tp)) * tensor.count
    experts = spec.experts
    if experts is not None:
        flops["expert"] *= experts.per_token / experts.count
    itemsize = 2
    windows, state = [], 0.0
    buckets = kv_buckets(spec, engine(engine_version), tp=tp, pp=1, kv_cache_dtype=kv_cache_dtype)
    for group, bucket in zip((g for g in spec.layers if g.count), buckets, strict=True):
        state += bucket.layers * bucket.state_bytes
        if bucket.token_bytes:
            width = group.head_dim + (group.value_head_dim or group.head_dim) or group.latent_dim * 2
            windows.append(
                Window(
                    token_bytes=bucket.layers * bucket.token_bytes,
                    pair_flops=2.0 * group.count * group.heads * width / tp,
                    reach=bucket.window or UNBOUNDED,
                )
            )
    wide = spec.ffn or (experts.ffn * experts.per_token + experts.shared_ffn if experts is not None else 0)
    moved = 8 * spec.hidden_size + 3 * wide / tp + 4 * spec.heads * spec.head_dim / tp
    return Work(
        layers=spec.num_layers,
        tensor_parallel_size=tp,
        dense_bytes=sums["dense"],
        dense_flops=flops["dense"],
        head_bytes=sums["head"],
        head_flops=flops["head"],
        expert_bytes=sums["expert"],
        expert_flops=flops["expert"],
        experts=experts.count if experts is not None else 1,
        experts_per_token=experts.per_token if experts is not None else 1,
        windows=tuple(windows),
        state_bytes=state,
        elementwise_bytes=float(itemsize * spec.num_layers * moved),
        message_bytes=2 * (tp - 1) / tp * spec.hidden_size * itemsize,
        reductions=2 * spec.num_layers if tp > 1 else 0,
    )
