"""The pieces that decoders are made of: families of tensors, with the axis that tensor parallelism splits."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from planner.model import AttentionKind, Experts, LayerGroup, Part, Shard, Tensor

Tensors = list[Tensor]
GATED = ("gate_proj", "up_proj", "down_proj")


@dataclass
class Draft:
    """A model under construction: the fields of ModelSpec that its architecture decides."""

    architecture: str
    hidden_size: int
    layers: tuple[LayerGroup, ...]
    heads: int
    kv_heads: int
    head_dim: int
    ffn: int
    vocab_size: int
    tied_embeddings: bool
    max_context: int
    gated_mlp: bool = True
    experts: Experts | None = None
    logit_softcap: bool = False
    qk_norm: bool = False
    tensors: Tensors = field(default_factory=list)
    notes: tuple[str, ...] = ()


def linear(
    name: str,
    out: int,
    inp: int,
    count: int,
    part: Part,
    shard: Shard = "none",
    *,
    bias: bool = False,
    kv_rows: int = 0,
    target: bool = True,
) -> Tensors:
    """A linear layer's weight (out, in) and, where it has one, its bias.

    A bias follows the rows of its weight: it is split with them ("out", "kv", "vocab") and whole otherwise.
    target=False for matrices that neither quantisation nor "all-linear" LoRA touches (routers, output heads).
    """
    tensors = [
        Tensor(
            name=f"{name}.weight",
            shape=(out, inp),
            count=count,
            part=part,
            shard=shard,
            linear=target,
            kv_rows=kv_rows,
        )
    ]
    if bias:
        rows: Shard = shard if shard in ("out", "kv", "vocab") else "none"
        tensors.append(
            Tensor(
                name=f"{name}.bias", shape=(out,), count=count, part=part, shard=rows, linear=target, kv_rows=kv_rows
            )
        )
    return tensors


def norm(name: str, size: int, count: int, *, bias: bool = False, part: Part = "norm") -> Tensors:
    """A norm's weight and, for LayerNorm with bias, its bias: whole on every rank."""
    tensors = [Tensor(name=f"{name}.weight", shape=(size,), count=count, part=part)]
    if bias:
        tensors.append(Tensor(name=f"{name}.bias", shape=(size,), count=count, part=part))
    return tensors


def parameter(name: str, shape: tuple[int, ...], count: int, part: Part, shard: Shard = "none") -> Tensors:
    """A bare parameter: no linear layer, so no LoRA target and not quantised."""
    return [Tensor(name=name, shape=shape, count=count, part=part, shard=shard)]


def embeddings(draft: Draft, *, token: str = "embed_tokens", head: str = "lm_head", head_bias: bool = False) -> Tensors:
    """The token embedding and, unless it is tied to it, the output head."""
    vocab, hidden = draft.vocab_size, draft.hidden_size
    tensors = parameter(f"{token}.weight", (vocab, hidden), 1, "embedding", "vocab")
    if not draft.tied_embeddings:
        tensors += linear(head, vocab, hidden, 1, "lm_head", "vocab", bias=head_bias, target=False)
    elif head_bias:
        tensors += parameter(f"{head}.bias", (vocab,), 1, "lm_head", "vocab")
    return tensors


def attention(
    draft: Draft,
    count: int,
    *,
    qkv_bias: bool = False,
    out_bias: bool = False,
    prefix: str = "self_attn.",
    out_name: str = "o_proj",
    query_factor: int = 1,
) -> Tensors:
    """Separate query, key, value and output projections. query_factor 2: the query projection carries a gate too."""
    hidden, width = draft.hidden_size, draft.head_dim
    query, key_value = draft.heads * width, draft.kv_heads * width
    return [
        *linear(f"{prefix}q_proj", query_factor * query, hidden, count, "attention", "out", bias=qkv_bias),
        *linear(f"{prefix}k_proj", key_value, hidden, count, "attention", "kv", bias=qkv_bias),
        *linear(f"{prefix}v_proj", key_value, hidden, count, "attention", "kv", bias=qkv_bias),
        *linear(f"{prefix}{out_name}", hidden, query, count, "attention", "in", bias=out_bias),
    ]


def fused_attention(
    draft: Draft, count: int, *, qkv: str, out: str, qkv_bias: bool = False, out_bias: bool = False
) -> Tensors:
    """One projection for query, key and value together, and the output projection."""
    hidden, width = draft.hidden_size, draft.head_dim
    query, key_value = draft.heads * width, draft.kv_heads * width
    rows = query + 2 * key_value
    return [
        *linear(qkv, rows, hidden, count, "attention", "out", bias=qkv_bias, kv_rows=2 * key_value),
        *linear(out, hidden, query, count, "attention", "in", bias=out_bias),
    ]


def gated_mlp(
    prefix: str,
    hidden: int,
    ffn: int,
    count: int,
    *,
    part: Part = "mlp",
    bias: bool = False,
    names: tuple[str, str, str] = GATED,
) -> Tensors:
    """SwiGLU or GeGLU: gate and up (ffn, hidden), down (hidden, ffn)."""
    gate, up, down = names
    return [
        *linear(f"{prefix}{gate}", ffn, hidden, count, part, "out", bias=bias),
        *linear(f"{prefix}{up}", ffn, hidden, count, part, "out", bias=bias),
        *linear(f"{prefix}{down}", hidden, ffn, count, part, "in", bias=bias),
    ]


def plain_mlp(hidden: int, ffn: int, count: int, *, up: str, down: str, bias: bool, part: Part = "mlp") -> Tensors:
    """Two matrices with an activation between them."""
    return [
        *linear(up, ffn, hidden, count, part, "out", bias=bias),
        *linear(down, hidden, ffn, count, part, "in", bias=bias),
    ]


def norms(names: Iterable[str], size: int, count: int, *, bias: bool = False) -> Tensors:
    return [tensor for name in names for tensor in norm(name, size, count, bias=bias)]


def group(
    draft_heads: tuple[int, int, int], kinds: Iterable[tuple[AttentionKind, int | None]]
) -> tuple[LayerGroup, ...]:
    """Layers counted by attention kind and window, in the order in which the kinds first appear.

    draft_heads: (heads, kv_heads, head_dim), the same for all of them.
    """
    counts: dict[tuple[AttentionKind, int | None], int] = {}
    for kind in kinds:
        counts[kind] = counts.get(kind, 0) + 1
    heads, kv_heads, head_dim = draft_heads
    return tuple(
        LayerGroup(kind=kind, count=count, heads=heads, kv_heads=kv_heads, head_dim=head_dim, window=window)
        for (kind, window), count in counts.items()
    )
