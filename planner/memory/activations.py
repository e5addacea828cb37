"""What one training step knows of a model's layers: their widths, and which operations a trainer fuses.

`layer_tape.py` and `head_tape.py` play these on the byte tape.
"""

from __future__ import annotations

from typing import Literal

from planner.catalog.trainers import constant
from planner.errors import NotModelled
from planner.model import Frozen, LayerGroup, ModelSpec

Norm = Literal["rms", "gemma", "layer"]
AttentionKernel = Literal["flash", "efficient", "eager"]


class Kernels(Frozen):
    """Which operations of a layer a trainer fuses.

    norm: saves its 16-bit input instead of an fp32 copy; rope: in place; swiglu: saves gate and up only
    lora: Unsloth-style MLP and attention whose backward recomputes and writes in place
    repeat_kv: key and value are expanded to all heads before attention (older transformers)
    expert_loop: routed experts run one after another (transformers 4), not in one grouped product
    widens_adapter_input: an adapter on a 4-bit base takes its input in its own width, under autocast too
    logit_copies: further copies of the logits that stay alive; upcasts_logits: the loss works in fp32
    keeps_logits: the 16-bit logits stay alive while the loss works on an fp32 copy (transformers 4.46 and later)
    """

    norm: bool = False
    rope: bool = False
    swiglu: bool = False
    lora: bool = False
    repeat_kv: bool = False
    expert_loop: bool = False
    keeps_logits: bool = False
    widens_adapter_input: bool = False
    logit_copies: int = 0
    upcasts_logits: bool = True


class LayerShape(Frozen):
    """The widths of one layer, all in elements a token."""

    hidden: int
    heads: int
    q: int
    kv: int
    v: int
    attention_out: int
    window: int | None
    fused_qkv: bool
    qk_norm: bool
    norm: Norm
    post_norms: bool
    copies_attention: bool
    """rope by cat() leaves query head-major, so the attention's output is copied before the output projection"""
    parallel: bool
    gated: bool
    fused_gate_up: bool
    ffn: int
    experts_per_token: int
    expert_ffn: int
    expert_count: int
    shared_ffn: int
    mla: tuple[int, int, int, int] | None
    """(q_lora_rank or 0, kv_lora_rank, rope_head_dim, nope_head_dim * heads) of latent attention"""
    modules: dict[str, str]
    """tensor name by role: q, k, v or qkv, o; gate, up or gate_up, down; what LoRA targets are matched against"""


class StepSettings(Frozen):
    """What the tape needs to know of a run.

    tokens: micro_batch * seq_len; trains_weights: full fine-tuning
    residual_itemsize: bytes an element of the residual stream (4 under fp32 weights or fp32-cast embeddings)
    weight_itemsize, grad_itemsize: of a trained weight; autocast: linear layers run in 16 bits whatever comes in
    head_itemsize: bytes an element of the output head (4 where k-bit preparation casts it)
    lora_targets: names of the weights that carry an adapter; lora_experts: routed experts do
    quantized: base weights are dequantised for each product
    """

    tokens: int
    seq_len: int
    trains_weights: bool
    residual_itemsize: Literal[2, 4] = 2
    weight_itemsize: Literal[2, 4] = 2
    grad_itemsize: Literal[2, 4] = 2
    autocast: bool = True
    lora_rank: int = 0
    lora_targets: frozenset[str] = frozenset()
    lora_itemsize: Literal[2, 4] = 4
    lora_experts: bool = False
    lora_dropout: bool = False
    dora: bool = False
    quantized: bool = False
    attention: AttentionKernel = "flash"
    kernels: Kernels = Kernels()
    trains_head: bool = False
    head_itemsize: Literal[2, 4] = 2


_ATTENTION_ROLES = {
    "q": ("q_proj",),
    "k": ("k_proj",),
    "v": ("v_proj",),
    "qkv": ("qkv_proj", "query_key_value", "c_attn", "Wqkv", "W_pack"),
    "o": ("o_proj", "dense", "out_proj", "c_proj"),
    "q_a": ("q_a_proj",),
    "q_b": ("q_b_proj",),
    "kv_a": ("kv_a_proj_with_mqa",),
    "kv_b": ("kv_b_proj",),
}


def layer_shape(spec: ModelSpec, group: LayerGroup, *, dense: bool = True) -> LayerShape:
    """The widths of a layer of `group`; `dense` chooses the feed-forward where a model has both kinds.

    Raises NotModelled for linear attention, whose kernels' saved tensors are not known here.
    """
    if group.kind == "linear":
        raise NotModelled(
            f"training memory of {spec.name} is not modelled: its linear-attention layers save states that depend on"
            " the kernel; use --trace"
        )
    names = _roles(spec)
    traits = constant("architectures")
    experts = spec.experts
    moe = experts is not None and not dense
    gemma = spec.architecture.startswith("gemma")
    mla = None
    head_dim = group.head_dim or spec.head_dim
    value_dim = group.value_head_dim or head_dim
    if group.kind == "mla":
        ranks = {t.leaf: t.shape for t in spec.tensors if t.part == "attention" and len(t.shape) == 2}
        kv_a = ranks["kv_a_proj_with_mqa"][0]
        latent = ranks["kv_b_proj"][1]
        mla = (ranks["q_a_proj"][0] if "q_a_proj" in ranks else 0, latent, kv_a - latent, group.heads * (head_dim))
    kv_heads = group.kv_heads or group.heads
    return LayerShape(
        hidden=spec.hidden_size,
        heads=group.heads,
        q=group.heads * head_dim,
        kv=kv_heads * head_dim,
        v=kv_heads * value_dim,
        attention_out=group.heads * value_dim,
        window=group.window,
        fused_qkv="qkv" in names,
        qk_norm=spec.qk_norm,
        norm="gemma" if gemma else "layer" if spec.architecture in traits["layer_norm"] else "rms",
        copies_attention=spec.architecture in traits["rope_by_cat"],
        post_norms=spec.architecture in traits["post_norms"],
        parallel=spec.architecture in traits["parallel_block"],
        gated=spec.gated_mlp,
        fused_gate_up="gate_up" in names,
        ffn=0 if moe else spec.ffn,
        experts_per_token=experts.per_token if moe and experts else 0,
        expert_ffn=experts.ffn if moe and experts else 0,
        expert_count=experts.count if moe and experts else 0,
        shared_ffn=experts.shared_ffn if moe and experts else 0,
        mla=mla,
        modules=names,
    )


def _roles(spec: ModelSpec) -> dict[str, str]:
    """Which weight plays which part: attention by the usual names, the dense feed-forward by its shapes."""
    roles: dict[str, str] = {}
    for tensor in spec.tensors:
        if len(tensor.shape) != 2:
            continue
        last = tensor.leaf
        if tensor.part == "attention":
            roles.update({role: tensor.name for role, known in _ATTENTION_ROLES.items() if last in known})
        elif tensor.part in ("mlp", "shared_expert"):
            if tensor.shape[1] != spec.hidden_size:
                roles["down"] = tensor.name
            elif spec.gated_mlp and last in ("gate_up_proj", "dense_h_to_4h"):
                roles["gate_up"] = tensor.name
            elif spec.gated_mlp and "gate" not in roles:
                roles["gate"] = tensor.name
            else:
                roles["up"] = tensor.name
    return roles


class HeadShape(Frozen):
    """The output side: widths, logit soft-capping (Gemma 2), and the style of the final norm."""

    hidden: int
    vocab: int
    softcap: bool
    norm: Norm
