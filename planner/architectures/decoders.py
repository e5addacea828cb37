"""Text decoders with separate query, key and value projections and a gated feed-forward, dense or mixture of experts."""

from __future__ import annotations

from collections.abc import Callable

from planner.architectures.fields import MAX_CONTEXT, MAX_EXPERTS, MAX_HEADS, MAX_LAYERS, MAX_VOCAB, Fields
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
from planner.model import AttentionKind, Experts, LayerGroup

Builder = Callable[[Fields], Draft]
Kinds = list[tuple[AttentionKind, int | None]]

LAYER_KINDS = ("full_attention", "sliding_attention", "chunked_attention", "linear_attention")


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
    field = "rope_scaling" if isinstance(f.get("rope_scaling"), dict) else "rope_parameters"
    if not isinstance(f.get(field), dict):
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
        [("full", None) if window is not None and window >= draft.max_context else (kind, window) for kind, window in kinds],
    )


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


# ---------------------------------------------------------------------------------------------- dense decoders


def llama(f: Fields) -> Draft:
    """llama, and granite, whose tensors are the same (transformers/models/llama/modeling_llama.py)."""
    draft, layers = start(f, tied=False), layer_count(f)
    bias = f.flag("attention_bias", False)
    dense(f, draft, layers, qkv_bias=bias, out_bias=bias, mlp_bias=f.flag("mlp_bias", False))
    use_layers(draft, [("full", None)] * layers)
    return draft


def mistral(f: Fields) -> Draft:
    """No biases, and one sliding window for all layers: 4096 when config.json leaves the field out, none when null."""
    draft, layers = start(f, tied=False), layer_count(f)
    dense(f, draft, layers)
    window = window_of(f) if f.has("sliding_window") else 4096
    use_layers(draft, [("full", None) if window is None else ("sliding", window)] * layers)
    return draft


def _qwen_kinds(f: Fields, layers: int) -> Kinds:
    """Qwen 2 and 3: the layers from max_window_layers on slide, and only if use_sliding_window says so."""
    window = window_of(f) if f.flag("use_sliding_window", False) else None
    if window is None:
        return [("full", None)] * layers
    first = f.integer("max_window_layers", low=0, high=MAX_LAYERS, default=28)
    return kinds_of(f, layers, window, ["sliding_attention" if i >= first else "full_attention" for i in range(layers)])


def qwen2(f: Fields) -> Draft:
    draft, layers = start(f, tied=False), layer_count(f)
    dense(f, draft, layers, qkv_bias=True)
    use_layers(draft, _qwen_kinds(f, layers))
    return draft


def qwen3(f: Fields) -> Draft:
    draft, layers = start(f, tied=False, head_dim=128), layer_count(f)
    bias = f.flag("attention_bias", False)
    dense(f, draft, layers, qkv_bias=bias, out_bias=bias)
    draft.tensors += head_norms(draft, layers)
    use_layers(draft, _qwen_kinds(f, layers))
    return draft


def gemma(f: Fields) -> Draft:
    draft, layers = start(f, tied=True, head_dim=256), layer_count(f)
    bias = f.flag("attention_bias", False)
    dense(f, draft, layers, qkv_bias=bias, out_bias=bias)
    use_layers(draft, [("full", None)] * layers)
    return draft


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
    use_layers(draft, [("full", None)] * layers)
    return draft


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
    window = window_of(f)
    use_layers(draft, [("full", None) if window is None else ("sliding", window)] * layers)
    return draft


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
    use_layers(draft, [("full", None)] * layers)
    return draft


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
    use_layers(draft, [("full", None)] * layers)
    return draft


# --------------------------------------------------------------------------------- mixture of experts, plain attention


def moe_layers(f: Fields, layers: int) -> int:
    """Layers with experts: every decoder_sparse_step-th one that mlp_only_layers does not name (Qwen 2 and 3)."""
    step = f.integer("decoder_sparse_step", high=MAX_LAYERS, default=1)
    dense_only = set(f.integers("mlp_only_layers", 0, MAX_LAYERS))
    return sum(1 for i in range(layers) if i not in dense_only and (i + 1) % step == 0)


def experts_of(f: Fields, layers: int, ffn: int, *, shared_ffn: int = 0, count: tuple[str, ...] = ("num_experts",)) -> Experts:
    total = f.integer(*count, high=MAX_EXPERTS)
    return Experts(
        count=total,
        per_token=f.integer("num_experts_per_tok", high=total),
        ffn=ffn,
        shared_ffn=shared_ffn,
        layers=layers,
    )


def routed(
    draft: Draft,
    experts: Experts,
    *,
    prefix: str = "mlp.",
    names: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj"),
) -> Tensors:
    """The router (experts, hidden) and the experts' gated feed-forwards."""
    return [
        *linear(f"{prefix}gate", experts.count, draft.hidden_size, experts.layers, "router", target=False),
        *gated_mlp(
            f"{prefix}experts.",
            draft.hidden_size,
            experts.ffn,
            experts.layers * experts.count,
            part="expert",
            names=names,
        ),
    ]


def with_experts(f: Fields, draft: Draft, layers: int, experts: Experts, *, qkv_bias: bool, out_bias: bool) -> Draft:
    """Llama's block with experts in `experts.layers` layers and a dense feed-forward in the others."""
    plain = layers - experts.layers
    draft.experts = experts
    draft.tensors = [
        *embeddings(draft),
        *attention(draft, layers, qkv_bias=qkv_bias, out_bias=out_bias),
        *(gated_mlp("mlp.", draft.hidden_size, draft.ffn, plain) if plain else []),
        *routed(draft, experts),
        *norms(PRE_NORMS, draft.hidden_size, layers),
        *norm("norm", draft.hidden_size, 1),
    ]
    draft.ffn = draft.ffn if plain else 0
    return draft


def shared_expert(draft: Draft, experts: Experts) -> Tensors:
    """Qwen's one shared expert and the gate that weighs it."""
    return [
        *gated_mlp(
            "mlp.shared_expert.", draft.hidden_size, experts.shared_ffn, experts.layers, part="shared_expert"
        ),
        *linear("mlp.shared_expert_gate", 1, draft.hidden_size, experts.layers, "shared_expert"),
    ]


def mixtral(f: Fields) -> Draft:
    draft, layers = start(f, tied=False), layer_count(f)
    experts = experts_of(f, layers, draft.ffn, count=("num_local_experts", "num_experts"))
    draft.experts = experts
    draft.tensors = [
        *embeddings(draft),
        *attention(draft, layers),
        *routed(draft, experts, prefix="block_sparse_moe.", names=("w1", "w3", "w2")),
        *norms(PRE_NORMS, draft.hidden_size, layers),
        *norm("norm", draft.hidden_size, 1),
    ]
    draft.ffn = 0
    window = window_of(f)
    use_layers(draft, [("full", None) if window is None else ("sliding", window)] * layers)
    return draft


def qwen2_moe(f: Fields) -> Draft:
    draft, layers = start(f, tied=False), layer_count(f)
    experts = experts_of(
        f,
        moe_layers(f, layers),
        f.integer("moe_intermediate_size"),
        shared_ffn=f.integer("shared_expert_intermediate_size"),
    )
    with_experts(f, draft, layers, experts, qkv_bias=f.flag("qkv_bias", True), out_bias=False)
    draft.tensors += shared_expert(draft, experts)
    use_layers(draft, _qwen_kinds(f, layers))
    return draft


def qwen3_moe(f: Fields) -> Draft:
    """Here use_sliding_window holds for all layers: Qwen3MoeConfig has no max_window_layers."""
    draft, layers = start(f, tied=False), layer_count(f)
    experts = experts_of(
        f, moe_layers(f, layers), f.integer("moe_intermediate_size"), count=("num_experts", "num_local_experts")
    )
    bias = f.flag("attention_bias", False)
    with_experts(f, draft, layers, experts, qkv_bias=bias, out_bias=bias)
    draft.tensors += head_norms(draft, layers)
    window = window_of(f) if f.flag("use_sliding_window", False) else None
    use_layers(draft, [("full", None) if window is None else ("sliding", window)] * layers)
    return draft


def gpt_oss(f: Fields) -> Draft:
    """Biases everywhere, an attention sink a head, experts stored as one parameter for all; layers alternate."""
    draft, layers = start(f, tied=False), layer_count(f)
    hidden, ffn = draft.hidden_size, draft.ffn
    experts = experts_of(f, layers, ffn, count=("num_local_experts",))
    each = layers * experts.count
    bias = f.flag("attention_bias", True)
    draft.experts = experts
    draft.tensors = [
        *embeddings(draft),
        *attention(draft, layers, qkv_bias=bias, out_bias=bias),
        *parameter("self_attn.sinks", (draft.heads,), layers, "attention", "out"),
        *linear("mlp.router", experts.count, hidden, layers, "router", bias=True, target=False),
        *parameter("mlp.experts.gate_up_proj", (2 * ffn, hidden), each, "expert", "out"),
        *parameter("mlp.experts.gate_up_proj_bias", (2 * ffn,), each, "expert", "out"),
        *parameter("mlp.experts.down_proj", (hidden, ffn), each, "expert", "in"),
        *parameter("mlp.experts.down_proj_bias", (hidden,), each, "expert"),
        *norms(PRE_NORMS, hidden, layers),
        *norm("norm", hidden, 1),
    ]
    draft.ffn = 0
    window = window_of(f) if f.has("sliding_window") else 128
    use_layers(draft, kinds_of(f, layers, window, every(layers, 2)))
    return draft


# What Llama4TextConfig assumes for the fields that config.json may leave out (configuration_llama4.py).
LLAMA4_DEFAULTS: dict[str, object] = {"attention_chunk_size": 8192, "intermediate_size_mlp": 16_384}


def llama4_text(f: Fields) -> Draft:
    """Chunked layers with rope, every fourth one full without; experts stored as one parameter, one shared expert."""
    f = f.with_defaults(LLAMA4_DEFAULTS)
    draft, layers = start(f, tied=False, head_dim=128), layer_count(f)
    hidden, ffn = draft.hidden_size, draft.ffn
    step = f.integer("interleave_moe_layer_step", high=MAX_LAYERS, default=1)
    chosen = f.integers("moe_layers", 0, layers - 1) or tuple(range(step - 1, layers, step))
    moe = len(set(chosen))
    experts = experts_of(f, moe, ffn, shared_ffn=ffn, count=("num_local_experts",))
    wide = f.integer("intermediate_size_mlp")
    bias = f.flag("attention_bias", False)
    draft.experts = experts
    draft.tensors = [
        *embeddings(draft),
        *attention(draft, layers, qkv_bias=bias, out_bias=bias),
        *(gated_mlp("feed_forward.", hidden, wide, layers - moe) if layers > moe else []),
        *linear("feed_forward.router", experts.count, hidden, moe, "router", target=False),
        *parameter("feed_forward.experts.gate_up_proj", (2 * ffn, hidden), moe * experts.count, "expert", "out"),
        *parameter("feed_forward.experts.down_proj", (hidden, ffn), moe * experts.count, "expert", "in"),
        *gated_mlp("feed_forward.shared_expert.", hidden, ffn, moe, part="shared_expert"),
        *norms(PRE_NORMS, hidden, layers),
        *norm("norm", hidden, 1),
    ]
    draft.ffn = wide if layers > moe else 0
    chunk = f.integer("attention_chunk_size", high=MAX_CONTEXT)
    rope = f.integers("no_rope_layers", 0, 1) or tuple(
        int((i + 1) % f.integer("no_rope_layer_interval", high=MAX_LAYERS, default=4) != 0) for i in range(layers)
    )
    if len(rope) != layers:
        raise f.refuse("no_rope_layers", f"names {len(rope)} layers, but num_hidden_layers is {layers}")
    words = f.layer_types(layers, ("full_attention", "chunked_attention"))
    chunked = [word == "chunked_attention" for word in words] or [bool(r) for r in rope]
    use_layers(draft, [("chunked", chunk) if c else ("full", None) for c in chunked])
    return draft


# -------------------------------------------------------------------------------------------- multi-head latent attention


def deepseek(f: Fields) -> Draft:
    """DeepSeek V2 and V3: multi-head latent attention, dense first layers, shared experts.

    A token keeps kv_lora_rank + qk_rope_head_dim elements a layer, on every rank. The multi-token-prediction
    layers at the end of V3's checkpoint (num_nextn_predict_layers) are not loaded and not counted.
    Source: transformers/models/deepseek_v3/modeling_deepseek_v3.py.
    """
    layers = layer_count(f)
    nope, rope = f.integer("qk_nope_head_dim"), f.integer("qk_rope_head_dim")
    value, rank = f.integer("v_head_dim"), f.integer("kv_lora_rank")
    draft = start(f, tied=False, head_dim=nope + rope)
    draft.head_dim = nope + rope  # some configs state head_dim = qk_rope_head_dim, which is not a head's width
    hidden, heads = draft.hidden_size, draft.heads
    query_rank = f.optional_integer("q_lora_rank")
    bias = f.flag("attention_bias", False)
    first = min(f.integer("first_k_dense_replace", low=0, high=MAX_LAYERS, default=0), layers)
    step = f.integer("moe_layer_freq", high=MAX_LAYERS, default=1)
    if step != 1:
        raise f.refuse("moe_layer_freq", f"must be 1, the only pattern that is modelled, not {step}")
    version3 = f.get("model_type") != "deepseek_v2"
    ffn = f.integer("moe_intermediate_size")
    shared = f.integer("n_shared_experts", low=0, high=MAX_EXPERTS, default=0)
    moe = layers - first
    if query_rank is None:
        query = linear("self_attn.q_proj", heads * (nope + rope), hidden, layers, "attention", "out")
    else:
        query = [
            *linear("self_attn.q_a_proj", query_rank, hidden, layers, "attention", bias=bias),
            *norm("self_attn.q_a_layernorm", query_rank, layers),
            *linear("self_attn.q_b_proj", heads * (nope + rope), query_rank, layers, "attention", "out"),
        ]
    draft.tensors = [
        *embeddings(draft),
        *query,
        *linear("self_attn.kv_a_proj_with_mqa", rank + rope, hidden, layers, "attention", bias=bias),
        *norm("self_attn.kv_a_layernorm", rank, layers),
        *linear("self_attn.kv_b_proj", heads * (nope + value), rank, layers, "attention", "out"),
        *linear("self_attn.o_proj", hidden, heads * value, layers, "attention", "in", bias=bias),
        *(gated_mlp("mlp.", hidden, draft.ffn, first) if first else []),
        *norms(PRE_NORMS, hidden, layers),
        *norm("norm", hidden, 1),
    ]
    if moe:
        draft.experts = experts_of(f, moe, ffn, shared_ffn=shared * ffn, count=("n_routed_experts",))
        draft.tensors += routed(draft, draft.experts)
        if version3 and f.text("topk_method", default="noaux_tc") == "noaux_tc":
            draft.tensors += parameter("mlp.gate.e_score_correction_bias", (draft.experts.count,), moe, "router")
        if shared:
            draft.tensors += gated_mlp("mlp.shared_experts.", hidden, shared * ffn, moe, part="shared_expert")
    draft.ffn = draft.ffn if first else 0
    draft.layers = (
        LayerGroup(
            kind="mla",
            count=layers,
            heads=heads,
            kv_heads=heads,
            head_dim=nope + rope,
            value_head_dim=value,
            latent_dim=rank + rope,
        ),
    )
    if f.integer("num_nextn_predict_layers", low=0, high=MAX_LAYERS, default=0):
        draft.notes += (MTP_NOTE,)
    return draft


MTP_NOTE = "the checkpoint's multi-token-prediction layers are not loaded and not counted"


# ---------------------------------------------------------------------------------------- gated delta-net hybrids


def _delta_net(f: Fields, draft: Draft, layers: int, *, fused: bool) -> Draft:
    """The attention of Qwen3-Next and Qwen3.5: three gated delta-net layers for each gated full-attention layer.

    State of a linear layer per sequence: a convolution window of (kernel - 1) inputs over queries, keys and values,
    and one head_k x head_v matrix for each value head. fused: qkvz and ba each in one projection (Qwen3-Next).
    Source: transformers/models/qwen3_next and qwen3_5, modeling files.
    """
    hidden = draft.hidden_size
    step = f.integer("full_attention_interval", high=MAX_LAYERS, default=4)
    words = f.layer_types(layers, ("full_attention", "linear_attention")) or tuple(
        "linear_attention" if (i + 1) % step else "full_attention" for i in range(layers)
    )
    full = sum(word == "full_attention" for word in words)
    linears = layers - full
    key_heads, value_heads = f.integer("linear_num_key_heads", high=MAX_HEADS), f.integer("linear_num_value_heads", high=MAX_HEADS)
    key_dim, value_dim = f.integer("linear_key_head_dim"), f.integer("linear_value_head_dim")
    kernel = f.integer("linear_conv_kernel_dim", high=1024)
    if value_heads % key_heads:
        raise f.refuse("linear_num_key_heads", f"must divide linear_num_value_heads ({value_heads}), not {key_heads}")
    keys, values = key_heads * key_dim, value_heads * value_dim
    channels = 2 * keys + values
    bias = f.flag("attention_bias", False)
    if fused:
        projections = [
            *linear("linear_attn.in_proj_qkvz", channels + values, hidden, linears, "attention", "out"),
            *linear("linear_attn.in_proj_ba", 2 * value_heads, hidden, linears, "attention", "out"),
        ]
    else:
        projections = [
            *linear("linear_attn.in_proj_qkv", channels, hidden, linears, "attention", "out"),
            *linear("linear_attn.in_proj_z", values, hidden, linears, "attention", "out"),
            *linear("linear_attn.in_proj_b", value_heads, hidden, linears, "attention", "out"),
            *linear("linear_attn.in_proj_a", value_heads, hidden, linears, "attention", "out"),
        ]
    attended = [
        *attention(draft, full, qkv_bias=bias, out_bias=bias, query_factor=2),
        *head_norms(draft, full),
    ]
    stated = [
        *projections,
        *linear("linear_attn.out_proj", hidden, values, linears, "attention", "in"),
        *parameter("linear_attn.conv1d.weight", (channels, 1, kernel), linears, "state", "out"),
        *parameter("linear_attn.A_log", (value_heads,), linears, "state", "out"),
        *parameter("linear_attn.dt_bias", (value_heads,), linears, "state", "out"),
        *norm("linear_attn.norm", value_dim, linears),
    ]
    draft.tensors += [*(attended if full else []), *(stated if linears else [])]
    groups: list[LayerGroup] = []
    if linears:
        groups.append(
            LayerGroup(
                kind="linear",
                count=linears,
                heads=value_heads,
                kv_heads=key_heads,
                head_dim=key_dim,
                value_head_dim=value_dim,
                conv_state_elements=channels * (kernel - 1),
                recurrent_state_elements=value_heads * key_dim * value_dim,
            )
        )
    if full:
        groups.append(
            LayerGroup(kind="full", count=full, heads=draft.heads, kv_heads=draft.kv_heads, head_dim=draft.head_dim)
        )
    draft.layers = tuple(groups)
    return draft


def qwen3_next(f: Fields) -> Draft:
    draft, layers = start(f, tied=False, head_dim=256), layer_count(f)
    experts = experts_of(
        f,
        moe_layers(f, layers),
        f.integer("moe_intermediate_size"),
        shared_ffn=f.integer("shared_expert_intermediate_size"),
    )
    plain = layers - experts.layers
    draft.experts = experts
    draft.tensors = [
        *embeddings(draft),
        *(gated_mlp("mlp.", draft.hidden_size, draft.ffn, plain) if plain else []),
        *routed(draft, experts),
        *shared_expert(draft, experts),
        *norms(PRE_NORMS, draft.hidden_size, layers),
        *norm("norm", draft.hidden_size, 1),
    ]
    draft.ffn = draft.ffn if plain else 0
    _delta_net(f, draft, layers, fused=True)
    draft.notes += (MTP_NOTE,)
    return draft


def qwen3_5_text(f: Fields) -> Draft:
    """Qwen3.5's dense text model."""
    draft, layers = start(f, tied=False, head_dim=256), layer_count(f)
    draft.tensors = [
        *embeddings(draft),
        *gated_mlp("mlp.", draft.hidden_size, draft.ffn, layers),
        *norms(PRE_NORMS, draft.hidden_size, layers),
        *norm("norm", draft.hidden_size, 1),
    ]
    _delta_net(f, draft, layers, fused=False)
    draft.notes += (MTP_NOTE,)
    return draft
