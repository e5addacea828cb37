"""From a config.json to the tensors of a model: one builder for each architecture, and a refusal for the others."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from planner.architectures import classic, decoders, experts, vision
from planner.architectures.decoders import Builder
from planner.architectures.fields import Fields
from planner.architectures.parts import Draft
from planner.architectures.projectors import PROJECTORS
from planner.errors import UnknownArchitecture

DECODERS: dict[str, Builder] = {
    "llama": decoders.llama,
    "granite": decoders.llama,
    "mistral": decoders.mistral,
    "qwen2": decoders.qwen2,
    "qwen2_vl_text": decoders.qwen2,
    "qwen2_5_vl_text": decoders.qwen2,
    "qwen3": decoders.qwen3,
    "gemma": decoders.gemma,
    "gemma2": decoders.gemma2,
    "gemma3_text": decoders.gemma3_text,
    "olmo2": decoders.olmo2,
    "olmo3": decoders.olmo3,
    "phi3": decoders.phi3,
    "stablelm": decoders.stablelm,
    "cohere": decoders.cohere,
    "mixtral": experts.mixtral,
    "qwen2_moe": experts.qwen2_moe,
    "qwen3_moe": experts.qwen3_moe,
    "gpt_oss": experts.gpt_oss,
    "llama4_text": experts.llama4_text,
    "deepseek_v2": experts.deepseek,
    "deepseek_v3": experts.deepseek,
    "qwen3_next": experts.qwen3_next,
    "qwen3_5_text": experts.qwen3_5_text,
    "mllama_text_model": vision.mllama_text,
    "phi": classic.phi,
    "starcoder2": classic.starcoder2,
    "falcon": classic.falcon,
    "RefinedWeb": classic.falcon,
    "RefinedWebModel": classic.falcon,
    "gpt_neox": classic.gpt_neox,
    "gpt2": classic.gpt2,
    "gpt_bigcode": classic.gpt_bigcode,
    "opt": classic.opt,
    "bloom": classic.bloom,
    "qwen": classic.qwen,
    "chatglm": classic.chatglm,
    "baichuan": classic.baichuan,
}

# A wrapper's text and vision types where its config.json leaves them to the configuration class.
TEXT_TYPE = {
    "gemma3": "gemma3_text",
    "mistral3": "mistral",
    "llama4": "llama4_text",
    "mllama": "mllama_text_model",
    "llava_next": "llama",
    "kimi_vl": "deepseek_v3",
    "qwen2_vl": "qwen2_vl_text",
    "qwen2_5_vl": "qwen2_5_vl_text",
    "qwen3_5": "qwen3_5_text",
}
VISION_TYPE = {
    "gemma3": "siglip_vision_model",
    "mistral3": "pixtral",
    "llama4": "llama4_vision_model",
    "mllama": "mllama_vision_model",
    "llava_next": "clip_vision_model",
    "kimi_vl": "moonvit",
    "qwen2_vl": "qwen2_vl",
    "qwen2_5_vl": "qwen2_5_vl",
    "qwen3_5": "qwen3_5",
}
# Wrappers whose older config.json files hold the text model's fields themselves, without text_config.
FLAT = ("qwen2_vl", "qwen2_5_vl")


def build(config: Mapping[str, object], owner: str) -> Draft:
    """The draft of a model from its config.json. Raises UnknownArchitecture or PlannerError, naming the field."""
    fields = Fields(config, owner)
    kind = fields.text("model_type")
    if kind in PROJECTORS:
        return _multimodal(fields, kind)
    return _decoder(fields, kind)


def _decoder(fields: Fields, kind: str) -> Draft:
    builder = DECODERS.get(kind)
    if builder is None:
        raise UnknownArchitecture(
            f"{fields.owner} has model_type {kind[:60]!r}, whose tensors are not known here: choose a model of a known "
            "architecture (`planner models` lists some), such as llama, mistral, qwen3, gemma3, phi3 or gpt_oss"
        )
    draft = builder(fields)
    return draft if draft.architecture else replace(draft, architecture=kind)


def _multimodal(fields: Fields, kind: str) -> Draft:
    """The text decoder with its vision tower and projector.

    The wrapper's own tie_word_embeddings, where stated, decides over the text part's.
    """
    text = fields if kind in FLAT and not fields.has("text_config") else fields.section("text_config")
    text_type = text.text("model_type", default=TEXT_TYPE[kind])
    if text_type == kind:  # Qwen2-VL's own files call both parts qwen2_vl
        text_type = TEXT_TYPE[kind]
    stated = fields.get("tie_word_embeddings")
    if stated is not None:
        text = text.override({"tie_word_embeddings": stated})
    draft = _decoder(text, text_type)
    draft.architecture = text_type
    tower = fields.section("vision_config", optional=True)
    tower_type = tower.text("model_type", default=VISION_TYPE[kind])
    build_tower = vision.TOWERS.get(tower_type)
    if build_tower is None:
        raise vision.no_tower(tower_type)
    draft.tensors = [
        *draft.tensors,
        *build_tower(tower),
        *PROJECTORS[kind](fields, tower, draft.hidden_size),
    ]
    return draft
