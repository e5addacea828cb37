"""Vision towers: what a multimodal checkpoint holds beside its text decoder and the projector between them.

Tensor parallelism is not applied to them here: vLLM splits some towers and replicates others, and whole is the
larger of the two. Sources: the modeling files of the same name in transformers.
"""

from __future__ import annotations

from collections.abc import Callable

from planner.architectures.decoders import PRE_NORMS, layer_count, same_layers, start
from planner.architectures.fields import MAX_LAYERS, Fields
from planner.architectures.parts import Draft, Tensors, attention, gated_mlp, linear, norm, norms, parameter
from planner.errors import UnknownArchitecture


def _linears(names: dict[str, tuple[int, int]], count: int, *, bias: bool, prefix: str) -> Tensors:
    """Linear layers of a tower: name -> (out, in)."""
    return [
        t for name, (out, inp) in names.items() for t in linear(f"{prefix}{name}", out, inp, count, "vision", bias=bias)
    ]


def _norms(names: tuple[str, ...], size: int, count: int, *, prefix: str, bias: bool = True) -> Tensors:
    return [t for name in names for t in norm(f"{prefix}{name}", size, count, bias=bias, part="vision")]


def _sizes(v: Fields) -> tuple[int, int, int, int, int]:
    """Width, feed-forward width, layers, side of a patch and colour channels, as most towers name them."""
    size, ffn = v.integer("hidden_size"), v.integer("intermediate_size")
    layers = v.integer("num_hidden_layers", high=MAX_LAYERS)
    return size, ffn, layers, v.size("patch_size"), v.integer("num_channels")


def _patches(v: Fields, image: int, patch: int) -> int:
    if image < patch:
        raise v.refuse("image_size", f"must be at least patch_size ({patch}), not {image}")
    return (image // patch) ** 2


# SiglipVisionConfig and CLIPVisionConfig, as their configuration files assume them.
SIGLIP_DEFAULTS: dict[str, object] = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "num_channels": 3,
    "image_size": 224,
    "patch_size": 16,
}
CLIP_DEFAULTS: dict[str, object] = {**SIGLIP_DEFAULTS, "patch_size": 32}


def siglip(v: Fields) -> Tensors:
    """SigLIP: learned positions for every patch; an attention-pooling head unless vision_use_head is false."""
    v = v.with_defaults(SIGLIP_DEFAULTS)
    size, ffn, layers, patch, channels = _sizes(v)
    p = "vision_tower."
    tensors = [
        *parameter(f"{p}embeddings.patch_embedding.weight", (size, channels, patch, patch), 1, "vision"),
        *parameter(f"{p}embeddings.patch_embedding.bias", (size,), 1, "vision"),
        *parameter(
            f"{p}embeddings.position_embedding.weight", (_patches(v, v.size("image_size"), patch), size), 1, "vision"
        ),
        *_siglip_blocks(p, size, ffn, layers),
        *_norms(("post_layernorm",), size, 1, prefix=p),
    ]
    if v.flag("vision_use_head", True):
        tensors += [
            *parameter(f"{p}head.probe", (1, 1, size), 1, "vision"),
            *parameter(f"{p}head.attention.in_proj_weight", (3 * size, size), 1, "vision"),
            *parameter(f"{p}head.attention.in_proj_bias", (3 * size,), 1, "vision"),
            *_linears(
                {"head.attention.out_proj": (size, size), "head.mlp.fc1": (ffn, size), "head.mlp.fc2": (size, ffn)},
                1,
                bias=True,
                prefix=p,
            ),
            *_norms(("head.layernorm",), size, 1, prefix=p),
        ]
    return tensors


def _siglip_blocks(prefix: str, size: int, ffn: int, layers: int) -> Tensors:
    """The block that SigLIP and CLIP share."""
    p = f"{prefix}encoder.layers."
    return [
        *_linears(
            {
                **{f"self_attn.{n}": (size, size) for n in ("q_proj", "k_proj", "v_proj", "out_proj")},
                "mlp.fc1": (ffn, size),
                "mlp.fc2": (size, ffn),
            },
            layers,
            bias=True,
            prefix=p,
        ),
        *_norms(("layer_norm1", "layer_norm2"), size, layers, prefix=p),
    ]


def clip(v: Fields) -> Tensors:
    """CLIP: a class token, positions for it and every patch, no bias on the patch projection."""
    v = v.with_defaults(CLIP_DEFAULTS)
    size, ffn, layers, patch, channels = _sizes(v)
    p = "vision_tower."
    return [
        *parameter(f"{p}embeddings.class_embedding", (size,), 1, "vision"),
        *parameter(f"{p}embeddings.patch_embedding.weight", (size, channels, patch, patch), 1, "vision"),
        *parameter(
            f"{p}embeddings.position_embedding.weight",
            (_patches(v, v.size("image_size"), patch) + 1, size),
            1,
            "vision",
        ),
        *_siglip_blocks(p, size, ffn, layers),
        *_norms(("pre_layrnorm", "post_layernorm"), size, 1, prefix=p),
    ]


PIXTRAL_DEFAULTS: dict[str, object] = {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_channels": 3,
    "patch_size": 16,
}


def pixtral(v: Fields) -> Tensors:
    """Pixtral: rotary positions, RMS norms, gated feed-forward, no biases."""
    v = v.with_defaults(PIXTRAL_DEFAULTS)
    size, ffn, layers, patch, channels = _sizes(v)
    p = "vision_tower."
    block = {f"attention.{n}": (size, size) for n in ("q_proj", "k_proj", "v_proj", "o_proj")}
    block |= {"feed_forward.gate_proj": (ffn, size), "feed_forward.up_proj": (ffn, size)}
    return [
        *parameter(f"{p}patch_conv.weight", (size, channels, patch, patch), 1, "vision"),
        *_norms(("ln_pre",), size, 1, prefix=p, bias=False),
        *_linears(
            {**block, "feed_forward.down_proj": (size, ffn)}, layers, bias=False, prefix=f"{p}transformer.layers."
        ),
        *_norms(("attention_norm", "ffn_norm"), size, layers, prefix=f"{p}transformer.layers.", bias=False),
    ]


LLAMA4_VISION_DEFAULTS: dict[str, object] = {
    "num_hidden_layers": 34,
    "num_channels": 3,
    "intermediate_size": 5632,
    "vision_output_dim": 7680,
    "image_size": 448,
    "patch_size": 14,
    "projector_input_dim": 4096,
    "projector_output_dim": 4096,
}


def llama4_vision(v: Fields) -> Tensors:
    """Llama 4: linear patch embedding, class token, learned positions, a two-layer adapter after pixel shuffle."""
    v = v.with_defaults(LLAMA4_VISION_DEFAULTS)
    size, ffn, layers, patch, channels = _sizes(v)
    ratio = v.number("pixel_shuffle_ratio", 0.5)
    if not 0.01 <= ratio <= 1:
        raise v.refuse("pixel_shuffle_ratio", f"must be between 0.01 and 1, not {ratio}")
    shuffled = int(size // ratio**2)
    inner, out = v.integer("projector_input_dim"), v.integer("projector_output_dim")
    p = "vision_model."
    if shuffled != ffn:  # the adapter reads intermediate_size channels, which only this equality makes right
        raise v.refuse("intermediate_size", f"must be hidden_size / pixel_shuffle_ratio^2 = {shuffled}, not {ffn}")
    return [
        *parameter(f"{p}class_embedding", (size,), 1, "vision"),
        *parameter(f"{p}positional_embedding_vlm", (_patches(v, v.size("image_size"), patch) + 1, size), 1, "vision"),
        *_linears({"patch_embedding.linear": (size, channels * patch * patch)}, 1, bias=False, prefix=p),
        *_norms(("layernorm_pre", "layernorm_post"), size, 1, prefix=p),
        *_linears(
            {
                **{f"self_attn.{n}": (size, size) for n in ("q_proj", "k_proj", "v_proj", "o_proj")},
                "mlp.fc1": (ffn, size),
                "mlp.fc2": (size, ffn),
            },
            layers,
            bias=True,
            prefix=f"{p}model.layers.",
        ),
        *_norms(PRE_NORMS, size, layers, prefix=f"{p}model.layers."),
        *_linears(
            {"vision_adapter.mlp.fc1": (inner, ffn), "vision_adapter.mlp.fc2": (out, inner)}, 1, bias=False, prefix=p
        ),
    ]


QWEN2_VL_VISION_DEFAULTS: dict[str, object] = {
    "depth": 32,
    "embed_dim": 1280,
    "mlp_ratio": 4,
    "in_channels": 3,
    "patch_size": 14,
    "spatial_merge_size": 2,
    "temporal_patch_size": 2,
}


def qwen2_vl_vision(v: Fields) -> Tensors:
    """Qwen2-VL: fused qkv, plain feed-forward, LayerNorm; here hidden_size is the width of the text model."""
    v = v.with_defaults(QWEN2_VL_VISION_DEFAULTS)
    size, ratio = v.integer("embed_dim"), v.integer("mlp_ratio", high=1024)
    return _qwen_vision(v, size, ratio * size, out=v.integer("hidden_size"), gated=False)


QWEN2_5_VL_VISION_DEFAULTS: dict[str, object] = {
    "depth": 32,
    "intermediate_size": 3420,
    "in_channels": 3,
    "patch_size": 14,
    "spatial_merge_size": 2,
    "temporal_patch_size": 2,
    "out_hidden_size": 3584,
}


def qwen2_5_vl_vision(v: Fields) -> Tensors:
    """Qwen2.5-VL: fused qkv, gated feed-forward with biases, RMS norms."""
    v = v.with_defaults(QWEN2_5_VL_VISION_DEFAULTS)
    size, ffn = v.integer("hidden_size"), v.integer("intermediate_size")
    return _qwen_vision(v, size, ffn, out=v.integer("out_hidden_size"), gated=True)


def _qwen_vision(v: Fields, size: int, ffn: int, *, out: int, gated: bool) -> Tensors:
    layers = v.integer("depth", high=MAX_LAYERS)
    channels = v.integer("in_channels", "in_chans")
    patch, frames = v.size("patch_size"), v.integer("temporal_patch_size", high=1024)
    merged = size * v.integer("spatial_merge_size", high=1024) ** 2
    p = "visual."
    block = {"attn.qkv": (3 * size, size), "attn.proj": (size, size)}
    if gated:
        block |= {"mlp.gate_proj": (ffn, size), "mlp.up_proj": (ffn, size), "mlp.down_proj": (size, ffn)}
    else:
        block |= {"mlp.fc1": (ffn, size), "mlp.fc2": (size, ffn)}
    return [
        *parameter(f"{p}patch_embed.proj.weight", (size, channels, frames, patch, patch), 1, "vision"),
        *_linears(block, layers, bias=True, prefix=f"{p}blocks."),
        *_norms(("norm1", "norm2"), size, layers, prefix=f"{p}blocks.", bias=not gated),
        *norm(f"{p}merger.ln_q", size, 1, bias=not gated, part="projector"),
        *linear(f"{p}merger.mlp.0", merged, merged, 1, "projector", bias=True),
        *linear(f"{p}merger.mlp.2", out, merged, 1, "projector", bias=True),
    ]


QWEN3_5_VISION_DEFAULTS: dict[str, object] = {
    "depth": 27,
    "hidden_size": 1152,
    "intermediate_size": 4304,
    "in_channels": 3,
    "patch_size": 16,
    "spatial_merge_size": 2,
    "temporal_patch_size": 2,
    "out_hidden_size": 3584,
    "num_position_embeddings": 2304,
}


def qwen3_5_vision(v: Fields) -> Tensors:
    """Qwen3.5: learned positions, fused qkv, plain feed-forward, LayerNorm, a two-layer merger."""
    v = v.with_defaults(QWEN3_5_VISION_DEFAULTS)
    size, ffn = v.integer("hidden_size"), v.integer("intermediate_size")
    layers, out = v.integer("depth", high=MAX_LAYERS), v.integer("out_hidden_size")
    channels, patch = v.integer("in_channels"), v.size("patch_size")
    merged = size * v.integer("spatial_merge_size", high=1024) ** 2
    kernel = (size, channels, v.integer("temporal_patch_size", high=1024), patch, patch)
    if v.get("deepstack_visual_indexes"):
        raise v.refuse("deepstack_visual_indexes", "must be empty: the mergers it asks for are not modelled")
    p = "visual."
    block = {"attn.qkv": (3 * size, size), "attn.proj": (size, size)}
    block |= {"mlp.linear_fc1": (ffn, size), "mlp.linear_fc2": (size, ffn)}
    return [
        *parameter(f"{p}patch_embed.proj.weight", kernel, 1, "vision"),
        *parameter(f"{p}patch_embed.proj.bias", (size,), 1, "vision"),
        *parameter(f"{p}pos_embed.weight", (v.integer("num_position_embeddings"), size), 1, "vision"),
        *_linears(block, layers, bias=True, prefix=f"{p}blocks."),
        *_norms(("norm1", "norm2"), size, layers, prefix=f"{p}blocks."),
        *norm(f"{p}merger.norm", size, 1, bias=True, part="projector"),
        *linear(f"{p}merger.linear_fc1", merged, merged, 1, "projector", bias=True),
        *linear(f"{p}merger.linear_fc2", out, merged, 1, "projector", bias=True),
    ]


MLLAMA_VISION_DEFAULTS: dict[str, object] = {
    "hidden_size": 1280,
    "num_hidden_layers": 32,
    "num_global_layers": 8,
    "num_channels": 3,
    "intermediate_size": 5120,
    "vision_output_dim": 7680,
    "image_size": 448,
    "patch_size": 14,
    "max_num_tiles": 4,
}


def mllama_vision(v: Fields) -> Tensors:
    """Llama 3.2 Vision: local and gated global layers, and embeddings for each tile and aspect ratio."""
    v = v.with_defaults(MLLAMA_VISION_DEFAULTS)
    size, ffn = v.integer("hidden_size"), v.integer("intermediate_size")
    local, wide = v.integer("num_hidden_layers", high=MAX_LAYERS), v.integer("num_global_layers", high=MAX_LAYERS)
    patch, channels = v.size("patch_size"), v.integer("num_channels")
    tiles = v.integer("max_num_tiles", high=1024)
    ratios = v.get("supported_aspect_ratios")
    shapes = len(ratios) if isinstance(ratios, list | tuple) else 8
    patches = _patches(v, v.size("image_size"), patch) + 1
    p = "vision_model."
    block = {f"self_attn.{n}": (size, size) for n in ("q_proj", "k_proj", "v_proj", "o_proj")}
    tensors = [
        *parameter(f"{p}class_embedding", (size,), 1, "vision"),
        *parameter(f"{p}patch_embedding.weight", (size, channels, patch, patch), 1, "vision"),
        *parameter(f"{p}gated_positional_embedding.gate", (1,), 1, "vision"),
        *parameter(f"{p}gated_positional_embedding.embedding", (patches, size), 1, "vision"),
        *parameter(
            f"{p}gated_positional_embedding.tile_embedding.weight", (shapes + 1, tiles * patches * size), 1, "vision"
        ),
        *_norms(("layernorm_pre", "layernorm_post"), size, 1, prefix=p),
        *parameter(f"{p}global_transformer.layers.gate_attn", (1,), wide, "vision"),
        *parameter(f"{p}global_transformer.layers.gate_ffn", (1,), wide, "vision"),
    ]
    for place in ("pre", "post"):
        tensors += parameter(f"{p}{place}_tile_positional_embedding.gate", (1,), 1, "vision")
        tensors += parameter(
            f"{p}{place}_tile_positional_embedding.embedding.weight", (shapes + 1, tiles * size), 1, "vision"
        )
    for stack, layers in (("transformer.layers.", local), ("global_transformer.layers.", wide)):
        tensors += [
            *_linears(block, layers, bias=False, prefix=f"{p}{stack}"),
            *_linears({"mlp.fc1": (ffn, size), "mlp.fc2": (size, ffn)}, layers, bias=True, prefix=f"{p}{stack}"),
            *_norms(PRE_NORMS, size, layers, prefix=f"{p}{stack}"),
        ]
    return tensors


MOONVIT_DEFAULTS: dict[str, object] = {
    "patch_size": 14,
    "init_pos_emb_height": 64,
    "init_pos_emb_width": 64,
    "num_hidden_layers": 27,
    "hidden_size": 1152,
    "intermediate_size": 4304,
}


def moonvit(v: Fields) -> Tensors:
    """Kimi-VL's MoonViT: a learned grid of positions, fused wqkv, LayerNorm (vllm/model_executor/models/moonvit.py)."""
    v = v.with_defaults(MOONVIT_DEFAULTS)
    size, ffn = v.integer("hidden_size"), v.integer("intermediate_size")
    layers, patch = v.integer("num_hidden_layers", high=MAX_LAYERS), v.size("patch_size")
    grid = (v.integer("init_pos_emb_height"), v.integer("init_pos_emb_width"), size)
    p = "vision_tower."
    block = {"wqkv": (3 * size, size), "wo": (size, size), "mlp.fc0": (ffn, size), "mlp.fc1": (size, ffn)}
    return [
        *parameter(f"{p}patch_embed.proj.weight", (size, 3, patch, patch), 1, "vision"),
        *parameter(f"{p}patch_embed.proj.bias", (size,), 1, "vision"),
        *parameter(f"{p}patch_embed.pos_emb.weight", grid, 1, "vision"),
        *_linears(block, layers, bias=True, prefix=f"{p}encoder.blocks."),
        *_norms(("norm0", "norm1"), size, layers, prefix=f"{p}encoder.blocks."),
        *_norms(("encoder.final_layernorm",), size, 1, prefix=p),
    ]


def no_tower(kind: str) -> UnknownArchitecture:
    return UnknownArchitecture(
        f"vision tower {kind[:60]!r} is not known here, so its size is not: use the text-only checkpoint, or one with "
        f"{', '.join(sorted(TOWERS))}"
    )


TOWERS: dict[str, Callable[[Fields], Tensors]] = {
    "siglip_vision_model": siglip,
    "clip_vision_model": clip,
    "pixtral": pixtral,
    "llama4_vision_model": llama4_vision,
    "qwen2_vl": qwen2_vl_vision,
    "qwen2_vl_vision": qwen2_vl_vision,
    "qwen2_5_vl": qwen2_5_vl_vision,
    "qwen2_5_vl_vision": qwen2_5_vl_vision,
    "qwen3_5": qwen3_5_vision,
    "qwen3_5_vision": qwen3_5_vision,
    "mllama_vision_model": mllama_vision,
    "moonvit": moonvit,
}


def mllama_text(f: Fields) -> Draft:
    """Llama's decoder in which some layers attend to the image instead of the text (cross_attention_layers).

    The embedding has eight rows more than the output head. Every layer is counted as full attention: vLLM gave the
    cross-attention layers the same cache pages as the others.
    """
    draft, layers = start(f, tied=False), layer_count(f)
    chosen = f.integers("cross_attention_layers", 0, layers - 1) or tuple(
        i for i in (3, 8, 13, 18, 23, 28, 33, 38) if i < layers
    )
    cross = len(set(chosen))
    hidden, head_dim = draft.hidden_size, draft.head_dim
    draft.tensors = [
        *parameter("embed_tokens.weight", (draft.vocab_size + 8, hidden), 1, "embedding", "vocab"),
        *linear("lm_head", draft.vocab_size, hidden, 1, "lm_head", "vocab", target=False),
        *(attention(draft, layers - cross) if layers > cross else []),
        *attention(draft, cross, prefix="cross_attn."),
        *norms(("cross_attn.q_norm", "cross_attn.k_norm"), head_dim, cross),
        *parameter("cross_attn_attn_gate", (1,), cross, "attention"),
        *parameter("cross_attn_mlp_gate", (1,), cross, "mlp"),
        *gated_mlp("mlp.", hidden, draft.ffn, layers),
        *norms(PRE_NORMS, hidden, layers),
        *norm("norm", hidden, 1),
    ]
    draft.notes = ("cross-attention layers are counted as full attention; images fill them, not text",)
    return same_layers(draft, layers)
