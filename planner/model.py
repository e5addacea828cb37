"""The shape of a transformer: every tensor it holds and what each layer keeps for a token."""

from __future__ import annotations

from collections.abc import Mapping
from decimal import Decimal
from math import prod
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, PlainSerializer

from planner.errors import PlannerError

AttentionKind = Literal["full", "sliding", "chunked", "mla", "linear"]
Part = Literal[
    "embedding",  # token (and learned position) embeddings
    "lm_head",  # absent when tied
    "attention",
    "mlp",  # dense feed-forward
    "expert",  # routed experts
    "shared_expert",
    "router",
    "norm",  # every norm weight, q/k norms too
    "state",  # what a linear-attention layer has beside its projections (conv kernels, A_log, dt_bias ...)
    "vision",  # vision tower
    "projector",  # vision-to-text projector
]
Shard = Literal["out", "in", "vocab", "kv", "none"]
"""The axis tensor parallelism splits: rows (out), columns (in), padded vocabulary rows (vocab),
key/value rows that are replicated once tp > kv_heads (kv), or nothing: every rank holds it whole (none)."""


VISION_PARTS: tuple[Part, ...] = ("vision", "projector")


class Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", defer_build=True)


Amount = Annotated[Decimal, PlainSerializer(lambda value: f"{value:f}", return_type=str, when_used="json")]
"""A Decimal that JSON writes out, never with an exponent."""


class Tensor(Frozen):
    """A family of equal tensors.

    name: the checkpoint's name without prefix and layer number, e.g. `self_attn.q_proj.weight`
    shape: as stored; (out_features, in_features) for a matrix
    count: how many the model holds (layers, or layers x experts)
    linear: an nn.Linear weight or bias, hence a target of "all-linear" LoRA and of weight quantisation;
        false for output heads and routers, which both leave alone, and for experts stored as one parameter
    kv_rows: rows of a fused query-key-value matrix that are keys and values: they are split like "kv", not "out"
    """

    name: str
    shape: tuple[int, ...]
    count: int
    part: Part
    shard: Shard = "none"
    linear: bool = False
    kv_rows: int = 0

    @property
    def module(self) -> str:
        """The name of the module that holds it: `self_attn.q_proj` for `self_attn.q_proj.weight`."""
        return self.name.removesuffix(".weight").removesuffix(".bias")

    @property
    def leaf(self) -> str:
        """The module's own name: `q_proj`."""
        return self.module.rpartition(".")[2]

    @property
    def elements(self) -> int:
        """Elements of one member of the family."""
        return prod(self.shape)

    @property
    def parameters(self) -> int:
        """Elements of the whole family: prod(shape) * count."""
        return self.elements * self.count


class LayerGroup(Frozen):
    """Layers whose attention keeps the same things for a token.

    count: layers of this kind
    kv_heads, head_dim: of full, sliding and chunked attention; value_head_dim where it differs from head_dim
    window: tokens a sliding or chunked layer looks back
    latent_dim: kv_lora_rank + qk_rope_head_dim of an MLA layer, kept once per token and per rank
    conv_state_elements, recurrent_state_elements: of a linear-attention layer, per sequence, whole model width
    """

    kind: AttentionKind
    count: int
    heads: int
    kv_heads: int = 0
    head_dim: int = 0
    value_head_dim: int = 0
    window: int | None = None
    latent_dim: int = 0
    conv_state_elements: int = 0
    recurrent_state_elements: int = 0


class Experts(Frozen):
    """The mixture-of-experts part: routed experts, how many a token visits, and the shared ones.

    ffn: intermediate size of one routed expert; shared_ffn: of all shared experts of a layer together
    layers: how many layers are MoE (the others are dense)
    """

    count: int
    per_token: int
    ffn: int
    shared_ffn: int = 0
    layers: int


class Quantization(Frozen):
    """How a checkpoint stores its linear weights, as its quantization_config says.

    method: fp8 | awq | gptq | compressed-tensors | bitsandbytes | mxfp4 | ...
    bits: of one weight; group_size: weights that share a scale (-1 one scale per output channel, 0 one per tensor)
    block: (rows, columns) that share a scale in block FP8
    symmetric: no zero points are stored
    activation_bits: 8 for w8a8, 16 for weight-only
    ignored: name patterns of the linear modules that stay in 16 bits
    kv_bits: 8 when the checkpoint asks for an FP8 KV cache
    """

    method: str
    bits: float
    group_size: int = 0
    block: tuple[int, int] | None = None
    symmetric: bool = True
    activation_bits: int = 16
    double_quant: bool = False
    ignored: tuple[str, ...] = ()
    kv_bits: int | None = None


class ModelSpec(Frozen):
    """A transformer's shape.

    name: short name, hub id or folder as the user gave it; hub_id where known
    architecture: config.json's model_type (of the text part); family e.g. "qwen3"
    layers: groups by attention kind; the sum of their counts is num_hidden_layers
    ffn: intermediate size of a dense layer (0 when all layers are MoE)
    gated_mlp: SwiGLU/GeGLU (three matrices) or plain (two)
    tied_embeddings: lm_head shares the embedding
    max_context: max_position_embeddings after rope scaling the config itself states
    parameter_count: sum of all tensors; tested against transformers on the meta device
    quantization: of the checkpoint, None for a 16-bit one; torch_dtype_bytes: 2 (4 for an fp32 checkpoint)
    attention_bias etc. live in the tensors, not here
    notes: what of the checkpoint is not counted, one sentence each
    """

    name: str
    hub_id: str | None = None
    architecture: str
    hidden_size: int
    layers: tuple[LayerGroup, ...]
    heads: int
    kv_heads: int
    head_dim: int
    ffn: int
    gated_mlp: bool
    experts: Experts | None = None
    vocab_size: int
    tied_embeddings: bool
    max_context: int
    tensors: tuple[Tensor, ...]
    quantization: Quantization | None = None
    torch_dtype_bytes: int = 2
    logit_softcap: bool = False
    qk_norm: bool = False
    source: str = ""
    notes: tuple[str, ...] = ()

    @property
    def num_layers(self) -> int:
        return sum(group.count for group in self.layers)

    @property
    def parameter_count(self) -> int:
        return sum(tensor.parameters for tensor in self.tensors)

    @property
    def text_parameter_count(self) -> int:
        return sum(t.parameters for t in self.tensors if t.part not in VISION_PARTS)

    @property
    def has_vision(self) -> bool:
        return any(t.part in VISION_PARTS for t in self.tensors)

    @property
    def active_parameter_count(self) -> int:
        """Parameters one token goes through: everything but the routed experts it does not visit."""
        if self.experts is None:
            return self.parameter_count
        idle = self.experts.count - self.experts.per_token
        routed = sum(t.parameters for t in self.tensors if t.part == "expert")
        return self.parameter_count - routed * idle // self.experts.count


def spec_from_config(config: Mapping[str, object], name: str, source: str) -> ModelSpec:
    """The shape of the model that a parsed config.json describes.

    name: what messages call it; source: where the config was read, kept in the spec.
    Raises UnknownArchitecture for a model_type or vision tower not known here, PlannerError naming any field that is
    missing, of the wrong type or impossible. The sum of the tensors equals what transformers builds
    (tests/oracles/params_meta.csv).
    """
    from planner.architectures import build  # they import the types above
    from planner.architectures.quantization import dtype_bytes, quantization_of

    draft = vars(build(config, name))
    return ModelSpec(
        **(draft | {"tensors": tuple(draft["tensors"])}),
        name=name,
        quantization=quantization_of(config, name),
        torch_dtype_bytes=dtype_bytes(config, name),
        source=source,
    )


# Architectures whose experts peft still takes for the linear layers they were before transformers 5 fused them into one
# parameter, and their router with them (peft/utils/transformers_weight_conversion.py): the names of gate, up and down.
# It gives the fused gate_up_proj twice the rank, one half for each of its members.
_FUSED_EXPERTS = {
    "mixtral": ("w1", "w3", "w2"),
    **dict.fromkeys(("qwen3_moe", "qwen3_next", "deepseek_v2", "deepseek_v3"), ("gate_proj", "up_proj", "down_proj")),
}

# The modules LoraConfig targets when target_modules is left out (peft/utils/constants.py), by model_type.
_QUERY_VALUE = ("q_proj", "v_proj")
_PEFT_DEFAULT = {
    **dict.fromkeys(("llama", "mistral", "stablelm", "gemma", "gemma2", "gemma3_text"), _QUERY_VALUE),
    **dict.fromkeys(("qwen2", "qwen3", "opt", "llama4_text"), _QUERY_VALUE),
    **dict.fromkeys(("gpt_neox", "bloom", "falcon", "chatglm"), ("query_key_value",)),
    **dict.fromkeys(("gpt2", "gpt_bigcode"), ("c_attn",)),
    "phi": ("q_proj", "v_proj", "fc1", "fc2"),
}

LoraTargets = Literal["all-linear", "attention", "default"] | tuple[str, ...]


def lora_targets(spec: ModelSpec, targets: LoraTargets) -> tuple[Tensor, ...]:
    """The matrices that get an adapter, as peft chooses them.

    "all-linear": every linear layer but the output head, in the vision tower too; "attention": the projections of the
    text decoder's attention; "default": what peft takes when no target is named; a tuple: modules whose name is, or
    ends in, one of these. Raises PlannerError when nothing matches, or only one of two fused expert projections does.
    """
    if targets == "all-linear":
        return _all_linear(spec)
    if targets == "attention":
        return tuple(t for t in _layers(spec) if t.part == "attention")
    if targets == "default":
        names = _PEFT_DEFAULT.get(spec.architecture)
        if names is None or (spec.has_vision and spec.architecture != "llama4_text"):
            raise PlannerError(
                f"peft has no default LoRA targets for {spec.name} ({spec.architecture}): "
                "say which, for example all-linear or attention"
            )
        return _by_name(spec, names)
    if isinstance(targets, str):
        raise PlannerError(
            f"{targets!r} is not a set of LoRA targets: use all-linear, attention, default or a list of module names"
        )
    return _by_name(spec, targets)


def lora_parameter_count(spec: ModelSpec, rank: int, targets: LoraTargets) -> int:
    """Trainable parameters of a LoRA adapter: sum of rank * (in + out) over the matrices of `lora_targets`.

    Fused expert projections: rank * (in + 2 * out) for each of gate and up, because peft adapts the pair at twice the
    rank. Equals peft's own count (tests/oracles/lora_counts.csv). Raises PlannerError for a rank below one.
    """
    if rank < 1:
        raise PlannerError(f"a LoRA rank of {rank} is not possible: use a whole number from 1, for example 16")
    return sum(adapter_parameters(spec, tensor, rank) for tensor in lora_targets(spec, targets))


def adapter_parameters(spec: ModelSpec, tensor: Tensor, rank: int) -> int:
    """Adapter parameters of one family of `lora_targets`: see lora_parameter_count."""
    out, inp = tensor.shape
    fused = tensor.part == "expert" and tensor.leaf in _FUSED_EXPERTS[spec.architecture][:2]
    return rank * (inp + (2 * out if fused else out)) * tensor.count


def _layers(spec: ModelSpec) -> tuple[Tensor, ...]:
    """The matrices of linear layers as transformers 5 builds them: experts are parameters, Llama 4's router a layer."""
    return tuple(
        t
        for t in spec.tensors
        if len(t.shape) == 2
        and t.part != "expert"
        and (t.linear or (t.part == "router" and spec.architecture == "llama4_text"))
    )


def _fused(spec: ModelSpec) -> tuple[tuple[str, ...], tuple[Tensor, ...]]:
    """The module names that peft moves to expert parameters, and the expert and router matrices behind them."""
    names = _FUSED_EXPERTS.get(spec.architecture)
    if names is None or spec.experts is None:
        return (), ()
    members = tuple(t for t in spec.tensors if t.part in ("expert", "router") and len(t.shape) == 2)
    return ("gate", *names), members


def _all_linear(spec: ModelSpec) -> tuple[Tensor, ...]:
    names, members = _fused(spec)
    # where a name is moved to the experts, dense and shared layers of the same name get no adapter
    return tuple(t for t in _layers(spec) if t.leaf not in names) + members


def _by_name(spec: ModelSpec, names: tuple[str, ...]) -> tuple[Tensor, ...]:
    moved, members = _fused(spec)
    asked = {name.rpartition(".")[2] for name in names} & set(moved)
    if len(asked & set(moved[1:3])) == 1:
        raise PlannerError(
            f"{spec.name} stores its experts' {moved[1]} and {moved[2]} as one parameter: "
            "name both as LoRA targets, or neither"
        )
    kept = tuple(name for name in names if name.rpartition(".")[2] not in moved)
    candidates = (*_layers(spec), *(t for t in spec.tensors if t.part == "lm_head" and len(t.shape) == 2))
    found = tuple(t for t in candidates if any(t.module == name or t.module.endswith(f".{name}") for name in kept))
    found += tuple(t for t in members if t.leaf in asked)
    if not found:
        leaves = sorted({t.leaf for t in _layers(spec) if t.part not in VISION_PARTS})
        raise PlannerError(f"{spec.name} has none of these LoRA targets: its linear layers are {', '.join(leaves)}")
    return found
