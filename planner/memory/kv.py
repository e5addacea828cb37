"""The KV cache as vLLM lays it out: layers in groups, groups in one pool of blocks, blocks for a sequence."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from planner.catalog.engines import Engine, constant
from planner.errors import PlannerError
from planner.memory.weights import cdiv, round_up
from planner.model import AttentionKind, Frozen, LayerGroup, ModelSpec

BLOCK_TOKENS = 16  # vLLM's default on CUDA


class KvBucket(Frozen):
    """Layers on one rank that keep the same bytes for a token and forget at the same distance.

    token_bytes: of one layer for one token (0 for a linear layer); state_bytes: of one linear layer for one sequence
    """

    kind: AttentionKind
    layers: int
    token_bytes: int = 0
    state_bytes: int = 0
    window: int | None = None


class KvGroup(Frozen):
    """Layers that share a block table: each of their blocks holds block_tokens tokens (or one state)."""

    kind: AttentionKind
    block_tokens: int
    window: int | None = None
    state_blocks: int = 0


class KvLayout(Frozen):
    """One rank's cache. A block costs bytes_per_block in every group, padding layers included.

    naive_bytes_per_token: sum of token_bytes over the layers, as if none forgot
    """

    groups: tuple[KvGroup, ...]
    bytes_per_block: int
    naive_bytes_per_token: int
    buckets: tuple[KvBucket, ...]
    sized_layers: int
    tokens_by_concurrency: bool

    def blocks_for(self, tokens: Any, in_flight: Any) -> Any:
        """Blocks that a sequence of `tokens` may hold at most; both are ints or integer arrays.

        full: ceil(tokens / block); sliding: ceil(min(window - 1 + in_flight, tokens) / block) + 1; chunked the same
        with the whole chunk and no extra block; linear: its states.
        Source: vllm/v1/kv_cache_interface.py, max_admission_blocks_per_request.
        """
        total = 0 * tokens
        for group in self.groups:
            if group.kind == "linear":
                total = total + group.state_blocks
            elif group.window is None:
                total = total + -(-tokens // group.block_tokens)
            else:
                kept = group.window - (group.kind == "sliding") + in_flight
                held = kept + (tokens - kept) * (tokens < kept)  # min(kept, tokens), for ints and arrays alike
                total = total + -(-held // group.block_tokens) + (group.kind == "sliding")
        return total

    def printed_tokens(self, blocks: int, max_model_len: int, in_flight: int) -> int:
        """`GPU KV cache size: N tokens`: blocks // groups * block size, or since 0.21 concurrency * max_model_len."""
        if blocks <= 0:
            return 0
        if self.tokens_by_concurrency:
            return int(blocks / self.blocks_for(max_model_len, in_flight) * max_model_len)
        sizes = [group.block_tokens for group in self.groups]
        return blocks // len(self.groups) * min(sizes)


def kv_buckets(
    spec: ModelSpec, engine: Engine, *, tp: int, pp: int = 1, kv_cache_dtype: str = "auto"
) -> tuple[KvBucket, ...]:
    """The layers of one rank by kind, with the bytes each keeps.

    2 * ceil(kv_heads / tp) * head_dim * bytes a layer and token (heads are replicated once tp > kv_heads);
    MLA: latent_dim * bytes, whole on every rank; linear: conv and recurrent state / tp, for a sequence.
    With pipeline parallelism each kind's layers are those of the largest stage.
    """
    width = kv_element_bytes(spec, kv_cache_dtype)
    return tuple(_bucket(group, engine, tp, pp, width) for group in spec.layers)


def kv_element_bytes(spec: ModelSpec, kv_cache_dtype: str) -> int:
    """1 for fp8 (asked, or `auto` where the checkpoint ships FP8 cache scales), else 2; other words are refused."""
    word = kv_cache_dtype.lower()
    if word in ("auto", "none", ""):
        return 1 if spec.quantization is not None and spec.quantization.kv_bits == 8 else 2
    if word.startswith("fp8"):
        return 1
    if word in ("bfloat16", "float16", "bf16", "fp16", "half"):
        return 2
    raise PlannerError(f"kv_cache_dtype {kv_cache_dtype!r} is not modelled: use auto, bfloat16, float16 or fp8")


def _bucket(group: LayerGroup, engine: Engine, tp: int, pp: int, width: int) -> KvBucket:
    layers = cdiv(group.count, pp)
    if group.kind == "linear":
        state: dict[str, int] = constant("linear_state_bytes")
        size = group.conv_state_elements * state["conv"] + group.recurrent_state_elements * state["recurrent"]
        return KvBucket(kind="linear", layers=layers, state_bytes=cdiv(size, tp))
    if group.kind == "mla":
        size = round_up(group.latent_dim * width, engine.mla_row_alignment_bytes)
        return KvBucket(kind="mla", layers=layers, token_bytes=size)
    heads = cdiv(group.kv_heads, tp)
    size = heads * (group.head_dim + (group.value_head_dim or group.head_dim)) * width
    return KvBucket(kind=group.kind, layers=layers, token_bytes=size, window=group.window)


def kv_layout(
    buckets: Iterable[KvBucket],
    engine: Engine,
    *,
    block_tokens: int = BLOCK_TOKENS,
    prefix_caching: bool = True,
    speculative_tokens: int = 0,
    hybrid: bool | None = None,
) -> KvLayout:
    """Groups of equally many layers, padded where the counts do not divide, over one pool of equal blocks.

    One kind of layer (or an engine without hybrid groups, or hybrid=False): one group with every layer. Otherwise the
    group size is the rarest kind's layer count, or the commonest's when that is less than group_pad_factor times it;
    each kind fills ceil(layers / size) groups, and what is missing in the last one is padding. Layers with smaller
    pages get larger blocks; beside linear layers, blocks grow until a block holds a state.
    Source: vllm/v1/core/kv_cache_utils.py, get_kv_cache_groups.
    """
    kept = _merge(bucket for bucket in buckets if bucket.layers)
    if not kept:
        raise PlannerError("the model has no layers that keep anything: there is no KV cache to size")
    naive = sum(bucket.token_bytes * bucket.layers for bucket in kept)
    linear = [bucket for bucket in kept if bucket.kind == "linear"]
    attention = [bucket for bucket in kept if bucket.kind != "linear"]
    use_hybrid = engine.hybrid_groups if hybrid is None else hybrid
    if not linear and not use_hybrid and len(attention) > 1:
        attention = _merge(bucket.model_copy(update={"kind": "full", "window": None}) for bucket in attention)
    token_bytes = max((bucket.token_bytes for bucket in attention), default=0)
    if linear and token_bytes:
        state = max(bucket.state_bytes for bucket in linear)
        block_tokens = max(block_tokens, round_up(cdiv(state, token_bytes), BLOCK_TOKENS))
    same_reach = len({(b.kind == "sliding" and b.window) or b.kind for b in attention}) == 1
    if not linear and same_reach:
        group = KvGroup(kind=attention[0].kind, block_tokens=block_tokens, window=attention[0].window)
        per_block = sum(bucket.token_bytes * bucket.layers for bucket in attention) * block_tokens
        sized = sum(bucket.layers for bucket in attention)
        return _layout((group,), per_block, naive, kept, sized, engine)
    page = max(token_bytes * block_tokens, max((bucket.state_bytes for bucket in linear), default=0))
    counts = [bucket.layers for bucket in (*attention, *linear)]
    size = max(counts) if max(counts) < min(counts) * engine.group_pad_factor else min(counts)
    states = engine.linear_blocks_with_prefix_cache if prefix_caching else 1
    groups: list[KvGroup] = []
    for bucket in (*attention, *linear):
        tokens = block_tokens
        if bucket.token_bytes and (token_bytes * block_tokens) % (bucket.token_bytes * block_tokens) == 0:
            tokens = block_tokens * (token_bytes // bucket.token_bytes)
        group = KvGroup(
            kind=bucket.kind,
            block_tokens=tokens,
            window=bucket.window,
            state_blocks=states + speculative_tokens if bucket.kind == "linear" else 0,
        )
        groups += [group] * cdiv(bucket.layers, size)
    return _layout(tuple(groups), page * size, naive, kept, size * len(groups), engine)


def _layout(
    groups: tuple[KvGroup, ...], per_block: int, naive: int, buckets: list[KvBucket], sized: int, engine: Engine
) -> KvLayout:
    return KvLayout(
        groups=groups,
        bytes_per_block=per_block,
        naive_bytes_per_token=naive,
        buckets=tuple(buckets),
        sized_layers=sized,
        tokens_by_concurrency=engine.tokens_by_concurrency,
    )


def _merge(buckets: Iterable[KvBucket]) -> list[KvBucket]:
    """Buckets that differ in nothing but their layer counts become one (a draft model's layers join the target's)."""
    layers: dict[KvBucket, int] = {}
    for bucket in buckets:
        alike = bucket.model_copy(update={"layers": 0})
        layers[alike] = layers.get(alike, 0) + bucket.layers
    return [bucket.model_copy(update={"layers": count}) for bucket, count in layers.items()]


def steady_bytes(buckets: Iterable[KvBucket], tokens: int) -> int:
    """What a sequence of that many tokens needs between steps: windows hold min(window, tokens), states do not grow."""
    total = 0
    for bucket in buckets:
        held = tokens if bucket.window is None else min(bucket.window, tokens)
        total += bucket.layers * (held * bucket.token_bytes + bucket.state_bytes)
    return total


def longest_context(layout: KvLayout, blocks: int, in_flight: int, limit: int) -> int:
    """The largest context up to limit of which one sequence fits into that many blocks; 0 when no token does."""
    if blocks <= 0 or layout.blocks_for(1, in_flight) > blocks:
        return 0
    low, high = 1, limit
    while low < high:
        middle = (low + high + 1) // 2
        if layout.blocks_for(middle, in_flight) <= blocks:
            low = middle
        else:
            high = middle - 1
    return low
