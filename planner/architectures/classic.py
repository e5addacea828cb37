"""Text decoders of the GPT line and others whose blocks differ from Llama's: fused projections, plain feed-forwards."""

from __future__ import annotations

from planner.architectures.decoders import context_length, dense, layer_count, same_layers, start, window_of
from planner.architectures.fields import MAX_CONTEXT, MAX_HEADS, MAX_VOCAB, Fields
from planner.architectures.parts import (
    Draft,
    attention,
    embeddings,
    fused_attention,
    gated_mlp,
    linear,
    norm,
    norms,
    parameter,
    plain_mlp,
)


def phi(f: Fields) -> Draft:
    """phi-1.5 and phi-2: biases everywhere, the output head too; one LayerNorm a layer."""
    draft, layers = start(f, tied=False, gated=False), layer_count(f)
    hidden = draft.hidden_size
    draft.tensors = [
        *embeddings(draft, head_bias=True),
        *attention(draft, layers, qkv_bias=True, out_bias=True, out_name="dense"),
        *plain_mlp(hidden, draft.ffn, layers, up="mlp.fc1", down="mlp.fc2", bias=True),
        *norm("input_layernorm", hidden, layers, bias=True),
        *norm("final_layernorm", hidden, 1, bias=True),
    ]
    if f.flag("qk_layernorm", False):
        draft.qk_norm = True
        draft.tensors += norms(("self_attn.q_layernorm", "self_attn.k_layernorm"), draft.head_dim, layers, bias=True)
    return same_layers(draft, layers)


def starcoder2(f: Fields) -> Draft:
    draft, layers = start(f, tied=True, gated=False), layer_count(f)
    hidden, bias = draft.hidden_size, f.flag("use_bias", True)
    draft.tensors = [
        *embeddings(draft),
        *attention(draft, layers, qkv_bias=bias, out_bias=bias),
        *plain_mlp(hidden, draft.ffn, layers, up="mlp.c_fc", down="mlp.c_proj", bias=bias),
        *norms(("input_layernorm", "post_attention_layernorm"), hidden, layers, bias=True),
        *norm("norm", hidden, 1, bias=True),
    ]
    return same_layers(draft, layers, window_of(f))


def falcon(f: Fields) -> Draft:
    """Fused query_key_value; one key/value head (multi_query) or groups of them (new_decoder_architecture).

    Parallel attention has one norm a layer, the new architecture two (ln_attn, ln_mlp) unless it asks for one.
    Source: transformers/models/falcon/modeling_falcon.py.
    """
    hidden, layers = f.integer("hidden_size", "n_embed"), layer_count(f)
    heads = f.integer("num_attention_heads", "n_head", high=MAX_HEADS)
    new = f.flag("new_decoder_architecture", False)
    if new:
        kv_heads = f.integer("num_kv_heads", "n_head_kv", high=MAX_HEADS, default=heads)
    else:
        kv_heads = 1 if f.flag("multi_query", True) else heads
    if hidden % heads or heads % kv_heads:
        raise f.refuse("num_attention_heads", f"must divide hidden_size ({hidden}) and be a multiple of num_kv_heads")
    draft = Draft(
        architecture=f.text("model_type", default=""),
        hidden_size=hidden,
        layers=(),
        heads=heads,
        kv_heads=kv_heads,
        head_dim=hidden // heads,
        ffn=f.integer("ffn_hidden_size", default=4 * hidden),
        gated_mlp=False,
        vocab_size=f.integer("vocab_size", high=MAX_VOCAB),
        tied_embeddings=f.flag("tie_word_embeddings", True),
        max_context=context_length(f, default=2048),  # FalconConfig's own default; the 7B and 40B files state none
    )
    bias = f.flag("bias", False)
    one_norm = ("input_layernorm",)
    if new and f.integer("num_ln_in_parallel_attn", high=2, default=2) == 2:
        names: tuple[str, ...] = ("ln_attn", "ln_mlp")
    elif new or f.flag("parallel_attn", True):
        names = one_norm
    else:
        names = (*one_norm, "post_attention_layernorm")
    draft.tensors = [
        *embeddings(draft, token="word_embeddings"),
        *fused_attention(
            draft,
            layers,
            qkv="self_attention.query_key_value",
            out="self_attention.dense",
            qkv_bias=bias,
            out_bias=bias,
        ),
        *plain_mlp(hidden, draft.ffn, layers, up="mlp.dense_h_to_4h", down="mlp.dense_4h_to_h", bias=bias),
        *norms(names, hidden, layers, bias=True),
        *norm("ln_f", hidden, 1, bias=True),
    ]
    return same_layers(draft, layers)


def gpt_neox(f: Fields) -> Draft:
    """Pythia, StableLM-alpha: fused query_key_value with bias, two LayerNorms a layer, untied embed_out."""
    draft, layers = start(f, tied=False, gated=False), layer_count(f)
    hidden, bias = draft.hidden_size, f.flag("attention_bias", True)
    draft.tensors = [
        *embeddings(draft, token="embed_in", head="embed_out"),
        *fused_attention(
            draft, layers, qkv="attention.query_key_value", out="attention.dense", qkv_bias=bias, out_bias=bias
        ),
        *plain_mlp(hidden, draft.ffn, layers, up="mlp.dense_h_to_4h", down="mlp.dense_4h_to_h", bias=True),
        *norms(("input_layernorm", "post_attention_layernorm"), hidden, layers, bias=True),
        *norm("final_layer_norm", hidden, 1, bias=True),
    ]
    return same_layers(draft, layers)


def _gpt2_block(f: Fields, draft: Draft, layers: int) -> Draft:
    hidden = draft.hidden_size
    draft.tensors = [
        *embeddings(draft, token="wte"),
        *parameter("wpe.weight", (draft.max_context, hidden), 1, "embedding"),
        *fused_attention(draft, layers, qkv="attn.c_attn", out="attn.c_proj", qkv_bias=True, out_bias=True),
        *plain_mlp(hidden, draft.ffn, layers, up="mlp.c_fc", down="mlp.c_proj", bias=True),
        *norms(("ln_1", "ln_2"), hidden, layers, bias=True),
        *norm("ln_f", hidden, 1, bias=True),
    ]
    return same_layers(draft, layers)


def gpt2(f: Fields) -> Draft:
    """Learned positions; matrices are stored (in, out), which changes no count."""
    return _gpt2_block(f, start(f, tied=True, gated=False), layer_count(f))


def gpt_bigcode(f: Fields) -> Draft:
    """GPT-2's block with one key/value head for all queries (multi_query): StarCoder, SantaCoder."""
    draft = start(f, tied=True, gated=False)
    if f.flag("multi_query", True):
        draft.kv_heads = 1
    return _gpt2_block(f, draft, layer_count(f))


def opt(f: Fields) -> Draft:
    """Learned positions with two rows of padding; a projection where the embedding is narrower than the model."""
    draft, layers = start(f, tied=True, gated=False), layer_count(f)
    hidden = draft.hidden_size
    narrow = f.integer("word_embed_proj_dim", default=hidden)
    bias, affine = f.flag("enable_bias", True), f.flag("layer_norm_elementwise_affine", True)
    before = f.flag("do_layer_norm_before", True) and not f.flag("_remove_final_layer_norm", False)
    draft.tensors = [
        *parameter("embed_tokens.weight", (draft.vocab_size, narrow), 1, "embedding", "vocab"),
        *parameter("embed_positions.weight", (draft.max_context + 2, hidden), 1, "embedding"),
        *attention(draft, layers, qkv_bias=bias, out_bias=bias, out_name="out_proj"),
        *plain_mlp(hidden, draft.ffn, layers, up="fc1", down="fc2", bias=bias),
    ]
    if not draft.tied_embeddings:
        draft.tensors += linear("lm_head", draft.vocab_size, narrow, 1, "lm_head", "vocab", target=False)
    if affine:
        draft.tensors += norms(("self_attn_layer_norm", "final_layer_norm"), hidden, layers, bias=True)
        draft.tensors += norm("decoder.final_layer_norm", hidden, 1, bias=True) if before else []
    if narrow != hidden:
        draft.tensors += [
            *linear("project_in", hidden, narrow, 1, "embedding", target=True),
            *linear("project_out", narrow, hidden, 1, "embedding", target=True),
        ]
    return same_layers(draft, layers)


def bloom(f: Fields) -> Draft:
    """ALiBi positions, so its context is what it was trained on (seq_length, 2048); a norm after the embedding."""
    hidden, layers = f.integer("hidden_size", "n_embed"), layer_count(f)
    heads = f.integer("num_attention_heads", "n_head", high=MAX_HEADS)
    if hidden % heads:
        raise f.refuse("num_attention_heads", f"must divide hidden_size ({hidden}), not {heads}")
    draft = Draft(
        architecture="bloom",
        hidden_size=hidden,
        layers=(),
        heads=heads,
        kv_heads=heads,
        head_dim=hidden // heads,
        ffn=4 * hidden,
        gated_mlp=False,
        vocab_size=f.integer("vocab_size", high=MAX_VOCAB),
        tied_embeddings=f.flag("tie_word_embeddings", True),
        max_context=context_length(f, default=2048),
    )
    draft.tensors = [
        *embeddings(draft, token="word_embeddings"),
        *norm("word_embeddings_layernorm", hidden, 1, bias=True),
        *fused_attention(
            draft,
            layers,
            qkv="self_attention.query_key_value",
            out="self_attention.dense",
            qkv_bias=True,
            out_bias=True,
        ),
        *plain_mlp(hidden, draft.ffn, layers, up="mlp.dense_h_to_4h", down="mlp.dense_4h_to_h", bias=True),
        *norms(("input_layernorm", "post_attention_layernorm"), hidden, layers, bias=True),
        *norm("ln_f", hidden, 1, bias=True),
    ]
    return same_layers(draft, layers)


# The code of the following lives in their hub repositories.


def qwen(f: Fields) -> Draft:
    """The first Qwen: fused c_attn with bias, and intermediate_size counting both gated halves.

    Source: Qwen/Qwen-7B modeling_qwen.py.
    """
    draft, layers = start(f, tied=False), layer_count(f)
    if draft.ffn % 2:
        raise f.refuse("intermediate_size", f"must be even, not {draft.ffn}: it counts both halves of the gated layer")
    draft.ffn //= 2
    hidden, bias = draft.hidden_size, not f.flag("no_bias", True)
    draft.tensors = [
        *embeddings(draft, token="wte"),
        *fused_attention(draft, layers, qkv="attn.c_attn", out="attn.c_proj", qkv_bias=True, out_bias=bias),
        *gated_mlp("mlp.", hidden, draft.ffn, layers, names=("w2", "w1", "c_proj"), bias=bias),
        *norms(("ln_1", "ln_2"), hidden, layers),
        *norm("ln_f", hidden, 1),
    ]
    return same_layers(draft, layers)


def chatglm(f: Fields) -> Draft:
    """ChatGLM 2 and 3: fused query_key_value with two key/value groups, gated dense_h_to_4h, untied output layer.

    Source: THUDM/chatglm3-6b modeling_chatglm.py.
    """
    hidden, layers = f.integer("hidden_size"), layer_count(f)
    heads = f.integer("num_attention_heads", high=MAX_HEADS)
    groups = f.integer("multi_query_group_num", high=MAX_HEADS) if f.flag("multi_query_attention", False) else heads
    if heads % groups:
        raise f.refuse("multi_query_group_num", f"must divide num_attention_heads ({heads}), not {groups}")
    if not f.flag("rmsnorm", True):
        raise f.refuse("rmsnorm", "must be true, the only norm of this architecture that is modelled")
    draft = Draft(
        architecture="chatglm",
        hidden_size=hidden,
        layers=(),
        heads=heads,
        kv_heads=groups,
        head_dim=f.integer("kv_channels"),
        ffn=f.integer("ffn_hidden_size"),
        vocab_size=f.integer("padded_vocab_size", "vocab_size", high=MAX_VOCAB),
        tied_embeddings=f.flag("tie_word_embeddings", False),
        max_context=f.integer("seq_length", high=MAX_CONTEXT),
    )
    bias = f.flag("add_bias_linear", False)
    draft.tensors = [
        *embeddings(draft, token="embedding.word_embeddings", head="output_layer"),
        *fused_attention(
            draft,
            layers,
            qkv="self_attention.query_key_value",
            out="self_attention.dense",
            qkv_bias=bias or f.flag("add_qkv_bias", False),
            out_bias=bias,
        ),
        *linear("mlp.dense_h_to_4h", 2 * draft.ffn, hidden, layers, "mlp", "out", bias=bias),
        *linear("mlp.dense_4h_to_h", hidden, draft.ffn, layers, "mlp", "in", bias=bias),
        *norms(("input_layernorm", "post_attention_layernorm"), hidden, layers),
        *(norm("final_layernorm", hidden, 1) if f.flag("post_layer_norm", True) else []),
    ]
    return same_layers(draft, layers)


def baichuan(f: Fields) -> Draft:
    """Llama's block with query, key and value fused in W_pack. Source: baichuan-inc/Baichuan2-7B-Chat."""
    draft, layers = start(f, tied=False), layer_count(f)
    dense(f, draft, layers)
    fused = fused_attention(draft, layers, qkv="self_attn.W_pack", out="self_attn.o_proj")
    draft.tensors = [t for t in draft.tensors if t.part != "attention"] + fused
    return same_layers(draft, layers)
