"""From the vision tower's width to the text model's: the projector of each multimodal wrapper."""

from __future__ import annotations

from collections.abc import Callable

from planner.architectures.fields import MAX_LAYERS, Fields
from planner.architectures.parts import Tensors, linear, norm, parameter
from planner.architectures.vision import (
    LLAMA4_VISION_DEFAULTS,
    MLLAMA_VISION_DEFAULTS,
    MOONVIT_DEFAULTS,
    PIXTRAL_DEFAULTS,
    SIGLIP_DEFAULTS,
)


def gemma3_projector(f: Fields, v: Fields, text: int) -> Tensors:
    size = v.with_defaults(SIGLIP_DEFAULTS).integer("hidden_size")
    return [
        *parameter("multi_modal_projector.mm_input_projection_weight", (size, text), 1, "projector"),
        *norm("multi_modal_projector.mm_soft_emb_norm", size, 1, part="projector"),
    ]


def mistral3_projector(f: Fields, v: Fields, text: int) -> Tensors:
    """Norm, a merge of spatial_merge_size^2 patches, and two layers."""
    size = v.with_defaults(PIXTRAL_DEFAULTS).integer("hidden_size")
    merged = size * f.integer("spatial_merge_size", high=1024, default=2) ** 2
    bias = f.flag("multimodal_projector_bias", False)
    p = "multi_modal_projector."
    if not isinstance(f.get("vision_feature_layer"), int | None):
        raise f.refuse("vision_feature_layer", "must be one layer, not a list")
    return [
        *norm(f"{p}norm", size, 1, part="projector"),
        *linear(f"{p}patch_merger.merging_layer", size, merged, 1, "projector"),
        *linear(f"{p}linear_1", text, size, 1, "projector", bias=bias),
        *linear(f"{p}linear_2", text, text, 1, "projector", bias=bias),
    ]


def llama4_projector(f: Fields, v: Fields, text: int) -> Tensors:
    wide = v.with_defaults(LLAMA4_VISION_DEFAULTS).integer("vision_output_dim")
    return linear("multi_modal_projector.linear_1", text, wide, 1, "projector")


def mllama_projector(f: Fields, v: Fields, text: int) -> Tensors:
    wide = v.with_defaults(MLLAMA_VISION_DEFAULTS).integer("vision_output_dim")
    return linear("multi_modal_projector", text, wide, 1, "projector", bias=True)


def llava_next_projector(f: Fields, v: Fields, text: int) -> Tensors:
    """Two layers over the vision layers that vision_feature_layer lists, side by side, and the newline embedding."""
    size = v.with_defaults(SIGLIP_DEFAULTS).integer("hidden_size")
    chosen = f.get("vision_feature_layer")
    count = len(f.integers("vision_feature_layer", -MAX_LAYERS, MAX_LAYERS)) if isinstance(chosen, list | tuple) else 1
    if not count:
        raise f.refuse("vision_feature_layer", "must name at least one layer")
    bias = f.flag("multimodal_projector_bias", True)
    return [
        *parameter("image_newline", (text,), 1, "projector"),
        *linear("multi_modal_projector.linear_1", text, count * size, 1, "projector", bias=bias),
        *linear("multi_modal_projector.linear_2", text, text, 1, "projector", bias=bias),
    ]


def kimi_vl_projector(f: Fields, v: Fields, text: int) -> Tensors:
    """Norm over one patch, then two layers over a merged block of them (vllm/model_executor/models/kimi_vl.py)."""
    size = v.with_defaults(MOONVIT_DEFAULTS).integer("hidden_size")
    kernel = v.integers("merge_kernel_size", 1, 1024) or (2, 2)
    if len(kernel) != 2:
        raise v.refuse("merge_kernel_size", f"must be a pair, not {len(kernel)} numbers")
    merged = size * kernel[0] * kernel[1]
    p = "multi_modal_projector."
    return [
        *norm(f"{p}pre_norm", size, 1, bias=True, part="projector"),
        *linear(f"{p}linear_1", merged, merged, 1, "projector", bias=True),
        *linear(f"{p}linear_2", text, merged, 1, "projector", bias=True),
    ]


def no_projector(f: Fields, v: Fields, text: int) -> Tensors:
    """The tower ends in the text model's width (Qwen's mergers)."""
    return []


PROJECTORS: dict[str, Callable[[Fields, Fields, int], Tensors]] = {
    "gemma3": gemma3_projector,
    "mistral3": mistral3_projector,
    "llama4": llama4_projector,
    "mllama": mllama_projector,
    "llava_next": llava_next_projector,
    "kimi_vl": kimi_vl_projector,
    "qwen2_vl": no_projector,
    "qwen2_5_vl": no_projector,
    "qwen3_5": no_projector,
}
