"""Text decoders with a mixture of experts, with multi-head latent attention, or with gated delta-net layers."""

from __future__ import annotations

from planner.architectures.decoders import (
    PRE_NORMS,
    every,
    head_norms,
    kinds_of,
    layer_count,
    qwen_kinds,
    same_layers,
    start,
    use_layers,
    window_of,
)
from planner.architectures.fields import MAX_CONTEXT, MAX_EXPERTS, MAX_HEADS, MAX_LAYERS, Fields
from planner.architectures.parts import (
    GATED,
    Draft,
    Tensors,
    attention,
    embeddings,
    gated_mlp,
    linear,
    norm,
    norms,
    parameter,
)
from planner.model import Experts, LayerGroup

MTP_NOTE = "the checkpoint's multi-token-prediction layers are not loaded and not counted"


def moe_layers(f: Fields, layers: int) -> int:
    """Layers with experts: every decoder_sparse_step-th one that mlp_only_layers does not name (Qwen 2 and 3)."""
    step = f.integer("decoder_sparse_step", high=MAX_LAYERS, default=1)
    dense_only = set(f.integers("mlp_only_layers", 0, MAX_LAYERS))
    return sum(1 for i in range(layers) if i not in dense_only and (i + 1) % step == 0)


def experts_of(
    f: Fields, layers: int, ffn: int, *, shared_ffn: int = 0, count: tuple[str, ...] = ("num_experts",)
) -> Experts:
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
    names: tuple[str, str, str] = GATED,
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


def with_experts(
    draft: Draft,
    layers: int,
    experts: Experts,
    *,
    qkv_bias: bool = False,
    out_bias: bool = False,
    prefix: str = "mlp.",
    names: tuple[str, str, str] = GATED,
) -> Draft:
    """Llama's block with experts in `experts.layers` layers and a dense feed-forward in the others."""
    plain = layers - experts.layers
    draft.experts = experts
    draft.tensors = [
        *embeddings(draft),
        *attention(draft, layers, qkv_bias=qkv_bias, out_bias=out_bias),
        *(gated_mlp("mlp.", draft.hidden_size, draft.ffn, plain) if plain else []),
        *routed(draft, experts, prefix=prefix, names=names),
        *norms(PRE_NORMS, draft.hidden_size, layers),
        *norm("norm", draft.hidden_size, 1),
    ]
    draft.ffn = draft.ffn if plain else 0
    return draft


def shared_expert(draft: Draft, experts: Experts) -> Tensors:
    """Qwen's one shared expert and the gate that weighs it."""
    return [
        *gated_mlp("mlp.shared_expert.", draft.hidden_size, experts.shared_ffn, experts.layers, part="shared_expert"),
        *linear("mlp.shared_expert_gate", 1, draft.hidden_size, experts.layers, "shared_expert"),
    ]


def mixtral(f: Fields) -> Draft:
    draft, layers = start(f, tied=False), layer_count(f)
    experts = experts_of(f, layers, draft.ffn, count=("num_local_experts", "num_experts"))
    with_experts(draft, layers, experts, prefix="block_sparse_moe.", names=("w1", "w3", "w2"))
    return same_layers(draft, layers, window_of(f))


def qwen2_moe(f: Fields) -> Draft:
    draft, layers = start(f, tied=False), layer_count(f)
    experts = experts_of(
        f,
        moe_layers(f, layers),
        f.integer("moe_intermediate_size"),
        shared_ffn=f.integer("shared_expert_intermediate_size"),
    )
    with_experts(draft, layers, experts, qkv_bias=f.flag("qkv_bias", True), out_bias=False)
    draft.tensors += shared_expert(draft, experts)
    use_layers(draft, qwen_kinds(f, layers))
    return draft


def qwen3_moe(f: Fields) -> Draft:
    """Here use_sliding_window holds for all layers: Qwen3MoeConfig has no max_window_layers."""
    draft, layers = start(f, tied=False), layer_count(f)
    experts = experts_of(
        f, moe_layers(f, layers), f.integer("moe_intermediate_size"), count=("num_experts", "num_local_experts")
    )
    bias = f.flag("attention_bias", False)
    with_experts(draft, layers, experts, qkv_bias=bias, out_bias=bias)
    draft.tensors += head_norms(draft, layers)
    window = window_of(f) if f.flag("use_sliding_window", False) else None
    return same_layers(draft, layers, window)


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
    key_heads, value_heads = (
        f.integer("linear_num_key_heads", high=MAX_HEADS),
        f.integer("linear_num_value_heads", high=MAX_HEADS),
    )
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
