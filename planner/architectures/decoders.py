"""Dense text decoders of Llama's line: grouped-query attention, gated feed-forward, norms before or after."""

from __future__ import annotations

from collections.abc import Callable

from planner.architectures.fields import MAX_CONTEXT, MAX_HEADS, MAX_LAYERS, MAX_VOCAB, Fields
from planner.architectures.parts import (
    Draft,
    Tensors,
    attention,
    embeddings,
    fused_attention,
    gated_mlp,
    group,
    linear,
    norm,
    norms,
    parameter,
)
from planner.model import AttentionKind

Builder = Callable[[Fields], Draft]
Kinds = list[tuple[AttentionKind, int | None]]


def context_length(f: Fields, *, default: int | None = None) -> int:
    """max_position_embeddings, stretched where the config's rope scaling says that it is not yet.

    linear and dynamic scaling: max_position_embeddings * factor. yarn: the larger of max_position_embeddings and
    original_max_position_embeddings * factor (most configs state the product already). llama3, longrope and mrope:
    as stated, and Gemma 3's too. Source: vllm/config/model.py, _get_and_verify_max_len.
    """
    names = ("n_positions", "seq_length", "model_max_length")
    if default is not None and f.get("max_position_embeddings", *names) is None:
        return default
    stated = f.integer("max_position_embeddings", *names, high=MAX_CONTEXT)
    field = "rope_scaling" if f.get("rope_scaling") is not None else "rope_parameters"
    if f.get(field) is None:
        return stated
    rope = f.section(field)
    kind = rope.text("rope_type", "type", default="default")
    factor = rope.number("factor", 1.0)
    if kind in ("linear", "dynamic"):
        return int(stated * factor)
    if "yarn" in kind:
        original = rope.integer("original_max_position_embeddings", high=MAX_CONTEXT, default=stated)
        return max(stated, int(original * factor))
    return stated


def start(f: Fields, *, tied: bool, head_dim: int | None = None, gated: bool = True) -> Draft:
    """The sizes that every decoder has. head_dim: the architecture's default; None means hidden_size / heads."""
    heads = f.integer("num_attention_heads", "n_head", high=MAX_HEADS)
    kv_heads = f.integer("num_key_value_heads", high=MAX_HEADS, default=heads)
    if heads % kv_heads:
        raise f.refuse("num_key_value_heads", f"must divide num_attention_heads ({heads}), not {kv_heads}")
    hidden = f.integer("hidden_size", "n_embd")
    if head_dim is None and f.get("head_dim") is None and hidden % heads:
        raise f.refuse("num_attention_heads", f"must divide hidden_size ({hidden}), not {heads}")
    return Draft(
        architecture=f.text("model_type", default=""),
        hidden_size=hidden,
        layers=(),
        heads=heads,
        kv_heads=kv_heads,
        head_dim=f.integer("head_dim", default=head_dim or hidden // heads),
        ffn=f.integer("intermediate_size", "n_inner", "ffn_dim", default=4 * hidden if not gated else _gated_ffn(f)),
        gated_mlp=gated,
        vocab_size=f.integer("vocab_size", high=MAX_VOCAB),
        tied_embeddings=f.flag("tie_word_embeddings", tied),
        max_context=context_length(f),
    )


def _gated_ffn(f: Fields) -> int:
    """A gated decoder has no rule for its intermediate size: it must be stated."""
    return f.integer("intermediate_size")


def layer_count(f: Fields) -> int:
    return f.integer("num_hidden_layers", "n_layer", "num_layers", high=MAX_LAYERS)


def use_layers(draft: Draft, kinds: Kinds) -> None:
    """Sets the layer groups; a window that holds the whole context is no window."""
    draft.layers = group(
        (draft.heads, draft.kv_heads, draft.head_dim),
        [
            ("full", None) if window is not None and window >= draft.max_context else (kind, window)
            for kind, window in kinds
        ],
    )


def same_layers(draft: Draft, layers: int, window: int | None = None) -> Draft:
    """All layers alike: full attention, or one sliding window."""
    use_layers(draft, [("full", None) if window is None else ("sliding", window)] * layers)
    return draft


def kinds_of(f: Fields, layers: int, window: int | None, default: list[str]) -> Kinds:
    """Attention kind and window of each layer, from layer_types or the architecture's own pattern."""
    words = f.layer_types(layers, ("full_attention", "sliding_attention")) or default
    if window is None:
        if "sliding_attention" in words:
            raise f.refuse("sliding_window", "is missing, but some layers slide")
        return [("full", None)] * layers
    return [("sliding", window) if word == "sliding_attention" else ("full", None) for word in words]


def every(layers: int, step: int) -> list[str]:
    """Sliding layers, with every `step`th one full."""
    return ["full_attention" if (i + 1) % step == 0 else "sliding_attention" for i in range(layers)]


def window_of(f: Fields) -> int | None:
    """sliding_window; 0 means none, as in vLLM."""
    return f.optional_integer("sliding_window", low=0, high=MAX_CONTEXT) or None


def softcap(f: Fields) -> bool:
    """Whether output logits are capped: a tanh that keeps another copy of them in training."""
    return f.get("final_logit_softcapping") is not None


PRE_NORMS = ("input_layernorm", "post_attention_layernorm")
GEMMA_NORMS = (*PRE_NORMS, "pre_feedforward_layernorm", "post_feedforward_layernorm")
POST_NORMS = ("post_attention_layernorm", "post_feedforward_layernorm")


def dense(
    f: Fields,
    draft: Draft,
    layers: int,
    *,
    qkv_bias: bool = False,
    out_bias: bool = False,
    mlp_bias: bool = False,
    layer_norms: tuple[str, ...] = PRE_NORMS,
    norm_bias: bool = False,
) -> Draft:
    """Llama's block: grouped-query attention, gated feed-forward, norms. Adds everything but the layer groups."""
    draft.tensors = [
        *embeddings(draft),
        *attention(draft, layers, qkv_bias=qkv_bias, out_bias=out_bias),
        *gated_mlp("mlp.", draft.hidden_size, draft.ffn, layers, bias=mlp_bias),
        *norms(layer_norms, draft.hidden_size, layers, bias=norm_bias),
        *norm("norm", draft.hidden_size, 1, bias=norm_bias),
    ]
    return draft


def head_norms(draft: Draft, layers: int) -> Tensors:
    """One norm over head_dim, shared by all query heads, and one for the key heads."""
    draft.qk_norm = True
    return norms(("self_attn.q_norm", "self_attn.k_norm"), draft.head_dim, layers)


def wide_norms(draft: Draft, layers: int) -> Tensors:
    """A norm over all query heads together, and one over all key heads."""
    draft.qk_norm = True
    return [
        *norm("self_attn.q_norm", draft.heads * draft.head_dim, layers),
        *norm("self_attn.k_norm", draft.kv_heads * draft.head_dim, layers),
    ]


def llama(f: Fields) -> Draft:
    """llama, and granite, whose tensors are the same (transformers/models/llama/modeling_llama.py)."""
    draft, layers = start(f, tied=False), layer_count(f)
    bias = f.flag("attention_bias", False)
    dense(f, draft, layers, qkv_bias=bias, out_bias=bias, mlp_bias=f.flag("mlp_bias", False))
    return same_layers(draft, layers)


def mistral(f: Fields) -> Draft:
    """No biases, and one sliding window for all layers: 4096 when config.json leaves the field out, none when null."""
    draft, layers = start(f, tied=False), layer_count(f)
    dense(f, draft, layers)
    window = window_of(f) if f.has("sliding_window") else 4096
    return same_layers(draft, layers, window)


def qwen_kinds(f: Fields, layers: int) -> Kinds:
    """Qwen 2 and 3: the layers from max_window_layers on slide, and only if use_sliding_window says so."""
    window = window_of(f) if f.flag("use_sliding_window", False) else None
    if window is None:
        return [("full", None)] * layers
    first = f.integer("max_window_layers", low=0, high=MAX_LAYERS, default=28)
    return kinds_of(f, layers, window, ["sliding_attention" if i >= first else "full_attention" for i in range(layers)])


def qwen2(f: Fields) -> Draft:
    draft, layers = start(f, tied=False), layer_count(f)
    dense(f, draft, layers, qkv_bias=True)
    use_layers(draft, qwen_kinds(f, layers))
    return draft


def qwen3(f: Fields) -> Draft:
    draft, layers = start(f, tied=False, head_dim=128), layer_count(f)
    bias = f.flag("attention_bias", False)
    dense(f, draft, layers, qkv_bias=bias, out_bias=bias)
    draft.tensors += head_norms(draft, layers)
    use_layers(draft, qwen_kinds(f, layers))
    return draft


def gemma(f: Fields) -> Draft:
    draft, layers = start(f, tied=True, head_dim=256), layer_count(f)
    bias = f.flag("attention_bias", False)
    dense(f, draft, layers, qkv_bias=bias, out_bias=bias)
    return same_layers(draft, layers)


def gemma2(f: Fields) -> Draft:
    """Four norms a layer; every other layer slides, the first one does."""
    draft, layers = start(f, tied=True, head_dim=256), layer_count(f)
    bias = f.flag("attention_bias", False)
    dense(f, draft, layers, qkv_bias=bias, out_bias=bias, layer_norms=GEMMA_NORMS)
    window = window_of(f) if f.has("sliding_window") else 4096
    use_layers(draft, kinds_of(f, layers, window, every(layers, 2)))
    draft.logit_softcap = softcap(f)
    return draft


# What Gemma3TextConfig assumes for the fields that Google's config.json files leave out
# (transformers/models/gemma3/configuration_gemma3.py).
GEMMA3_DEFAULTS: dict[str, object] = {
    "vocab_size": 262_208,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "max_position_embeddings": 131_072,
    "sliding_window": 4096,
}


def gemma3_text(f: Fields) -> Draft:
    """Gemma 2's block with q/k norms; every sixth layer is full (sliding_window_pattern)."""
    f = f.with_defaults(GEMMA3_DEFAULTS)
    draft, layers = start(f, tied=True), layer_count(f)
    draft.max_context = f.integer("max_position_embeddings", high=MAX_CONTEXT)  # states the stretched length already
    bias = f.flag("attention_bias", False)
    dense(f, draft, layers, qkv_bias=bias, out_bias=bias, layer_norms=GEMMA_NORMS)
    draft.tensors += head_norms(draft, layers)
    step = f.integer("sliding_window_pattern", high=MAX_LAYERS, default=6)
    use_layers(draft, kinds_of(f, layers, window_of(f), every(layers, step)))
    draft.logit_softcap = softcap(f)
    return draft


def olmo2(f: Fields) -> Draft:
    """Norms after attention and feed-forward, and q/k norms over all heads at once."""
    draft, layers = start(f, tied=False), layer_count(f)
    bias = f.flag("attention_bias", False)
    dense(f, draft, layers, qkv_bias=bias, out_bias=bias, layer_norms=POST_NORMS)
    draft.tensors += wide_norms(draft, layers)
    return same_layers(draft, layers)


def olmo3(f: Fields) -> Draft:
    """OLMo 2's tensors; three sliding layers for each full one."""
    draft = olmo2(f)
    layers = layer_count(f)
    window = window_of(f) if f.has("sliding_window") else 4096
    use_layers(draft, kinds_of(f, layers, window, every(layers, 4)))
    return draft


def phi3(f: Fields) -> Draft:
    """Phi-3, Phi-4 and Phi-4-mini: fused qkv_proj and gate_up_proj."""
    draft, layers = start(f, tied=False), layer_count(f)
    hidden, ffn = draft.hidden_size, draft.ffn
    draft.tensors = [
        *embeddings(draft),
        *fused_attention(draft, layers, qkv="self_attn.qkv_proj", out="self_attn.o_proj"),
        *linear("mlp.gate_up_proj", 2 * ffn, hidden, layers, "mlp", "out"),
        *linear("mlp.down_proj", hidden, ffn, layers, "mlp", "in"),
        *norms(PRE_NORMS, hidden, layers),
        *norm("norm", hidden, 1),
    ]
    return same_layers(draft, layers, window_of(f))


def stablelm(f: Fields) -> Draft:
    """LayerNorm with bias; the second norm is missing where attention and feed-forward run in parallel."""
    draft, layers = start(f, tied=False), layer_count(f)
    names = PRE_NORMS[:1] if f.flag("use_parallel_residual", False) else PRE_NORMS
    dense(f, draft, layers, qkv_bias=f.flag("use_qkv_bias", False), layer_norms=names, norm_bias=True)
    if f.flag("qk_layernorm", False):  # one norm for each head
        draft.qk_norm = True
        draft.tensors += [
            *norm("self_attn.q_layernorm.norms", draft.head_dim, layers * draft.heads),
            *norm("self_attn.k_layernorm.norms", draft.head_dim, layers * draft.kv_heads),
        ]
    return same_layers(draft, layers)


def cohere(f: Fields) -> Draft:
    """One norm a layer, without bias; attention and feed-forward run in parallel."""
    draft, layers = start(f, tied=True), layer_count(f)
    bias = f.flag("attention_bias", False)
    dense(f, draft, layers, qkv_bias=bias, out_bias=bias, layer_norms=PRE_NORMS[:1])
    if f.flag("use_qk_norm", False):
        draft.qk_norm = True
        draft.tensors += [
            *parameter("self_attn.q_norm.weight", (draft.heads, draft.head_dim), layers, "norm", "out"),
            *parameter("self_attn.k_norm.weight", (draft.kv_heads, draft.head_dim), layers, "norm", "kv"),
        ]
    return same_layers(draft, layers)
