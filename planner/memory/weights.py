"""Weight bytes that one GPU holds once vLLM has loaded a model: sharding, quantisation, padding, LoRA slots."""

from __future__ import annotations

import re
from collections.abc import Sequence
from math import ceil, prod

from planner.catalog.engines import constant, quantization_format, quantization_formats, vision_input
from planner.errors import NotModelled, PlannerError
from planner.model import VISION_PARTS, Frozen, ModelSpec, Quantization, Tensor

VOCABULARY_ALIGNMENT = 64  # vllm/model_executor/layers/vocab_parallel_embedding.py, DEFAULT_VOCAB_PADDING_SIZE
DECODER_PARTS = ("attention", "mlp", "expert", "shared_expert")
FLOAT32_SUFFIXES = ("e_score_correction_bias", "A_log")  # kept in float32 whatever the model's type


class WeightScheme(Frozen):
    """How weights are stored on the GPU: None for 16 bits. scale_bytes: of one scale; name: for tables."""

    name: str
    quantization: Quantization | None
    scale_bytes: int = 2


def cdiv(numerator: int, denominator: int) -> int:
    return -(-numerator // denominator)


def round_up(value: int, multiple: int) -> int:
    return cdiv(value, multiple) * multiple


def weight_scheme(spec: ModelSpec, asked: str | None = None) -> WeightScheme:
    """The scheme of a checkpoint, or the one asked for by name on a 16-bit model.

    Raises PlannerError when a quantised checkpoint is asked to be something else.
    """
    stored = spec.quantization
    if asked is None or asked == "auto":
        if stored is None:
            return WeightScheme(name="16-bit", quantization=None)
        return WeightScheme(name=_format_name(stored), quantization=stored, scale_bytes=_scale_bytes(stored))
    if asked in ("bf16", "bfloat16", "fp16", "float16", "16-bit", "none"):
        if stored is not None:
            raise PlannerError(f"{spec.name} is stored as {stored.method}: name the 16-bit checkpoint instead")
        return WeightScheme(name="16-bit", quantization=None)
    if asked == "nf4":
        asked = "bitsandbytes"
    if stored is not None:
        if asked in (stored.method, _format_name(stored)):
            return WeightScheme(name=_format_name(stored), quantization=stored, scale_bytes=_scale_bytes(stored))
        raise PlannerError(
            f"{spec.name} is stored as {stored.method}: drop quantization={asked!r} or name its 16-bit checkpoint"
        )
    wanted = quantization_format(asked)
    if wanted.quantization.method == "mxfp4" and spec.experts is None:
        raise NotModelled(f"MXFP4 packs routed experts and {spec.name} has none: choose w4a16, awq or gptq")
    return WeightScheme(name=asked, quantization=wanted.quantization, scale_bytes=wanted.scale_bytes)


def _format_name(stored: Quantization) -> str:
    """The catalog's name for a checkpoint's quantization_config, its method where the catalog has none."""
    same = ("method", "bits", "block", "activation_bits")
    for name, known in quantization_formats().items():
        if all(getattr(known.quantization, field) == getattr(stored, field) for field in same):
            return name
    return stored.method


def _scale_bytes(stored: Quantization) -> int:
    """Of one scale in vLLM: float32 for 8-bit weights and bitsandbytes, a byte in MXFP4, 16 bits elsewhere."""
    if stored.method == "mxfp4":
        return 1
    return 4 if (stored.bits >= 8 and stored.method != "gptq") or stored.method == "bitsandbytes" else 2


def rank_shape(tensor: Tensor, spec: ModelSpec, tp: int) -> tuple[int, ...]:
    """The shape of one member of a tensor family on one rank of tp.

    vocab: rows padded to 64, then split. out and in: rows and columns split. kv: key/value heads are split until each
    rank has one, then replicated; of a fused matrix only kv_rows are. A vision tower's matrices are split.
    Source: vllm/model_executor/layers/linear.py (QKVParallelLinear), vocab_parallel_embedding.py.
    """
    shape = tensor.shape
    if tensor.part == "vision" and tensor.linear and len(shape) == 2 and _splits_vision(spec):
        return (cdiv(shape[0], tp), shape[1])
    if tensor.shard == "vocab":
        return (round_up(shape[0], VOCABULARY_ALIGNMENT) // tp, *shape[1:])
    if tp == 1 or tensor.shard == "none":
        return shape
    heads = max(spec.kv_heads, 1)
    if tensor.shard == "kv":
        return (_kv_rows(shape[0], heads, tp), *shape[1:])
    if tensor.shard == "out":
        queries = shape[0] - tensor.kv_rows
        return (cdiv(queries, tp) + _kv_rows(tensor.kv_rows, heads, tp), *shape[1:])
    return (*shape[:-1], cdiv(shape[-1], tp))


def _splits_vision(spec: ModelSpec) -> bool:
    return spec.quantization is not None or not vision_input(spec.architecture).whole_on_each_rank_when_16_bit


def _kv_rows(rows: int, heads: int, tp: int) -> int:
    return rows * cdiv(heads, tp) // heads


def weight_bytes(
    spec: ModelSpec,
    scheme: WeightScheme,
    *,
    tp: int = 1,
    pp: int = 1,
    compute_capability: tuple[int, int] = (9, 0),
    sizes: Sequence[int] | None = None,
) -> int:
    """Bytes of all parameters on the fullest rank.

    sum over tensor families of count * bytes(rank shape, scheme); with pipeline parallelism the layers of the largest
    stage plus the larger of the first stage's embedding (and vision tower) and the last one's output head.
    sizes: what family_bytes gave, where a caller has it already.
    """
    check_parallel(spec, tp, pp)
    if sizes is None:
        sizes = family_bytes(spec, scheme, tp=tp, compute_capability=compute_capability)
    if pp == 1:
        return sum(sizes)
    layers = first = last = 0
    for tensor, size in zip(spec.tensors, sizes, strict=True):
        if tensor.part == "embedding":
            first += size
            last += size if spec.tied_embeddings else 0
        elif tensor.part in VISION_PARTS:
            first += size
        elif tensor.part == "lm_head" or (tensor.part == "norm" and tensor.count == 1):
            last += size
        else:
            layers += size
    return ceil(layers * cdiv(spec.num_layers, pp) / spec.num_layers) + max(first, last)


def family_bytes(
    spec: ModelSpec, scheme: WeightScheme, *, tp: int, compute_capability: tuple[int, int]
) -> tuple[int, ...]:
    """tensor_bytes of every family, in the order of spec.tensors."""
    return tuple(
        tensor_bytes(tensor, spec, scheme, tp=tp, compute_capability=compute_capability) for tensor in spec.tensors
    )


def check_parallel(spec: ModelSpec, tp: int, pp: int) -> None:
    """Refuses what vLLM refuses: heads that tp does not divide, and more pipeline stages than layers."""
    if tp < 1 or pp < 1:
        raise PlannerError(f"tensor and pipeline parallel sizes start at 1: {tp} and {pp} were asked for")
    if spec.heads % tp:
        raise PlannerError(f"{spec.name} has {spec.heads} attention heads, which {tp} GPUs cannot share: use a divisor")
    grouped = any(group.kind in ("full", "sliding", "chunked") for group in spec.layers)
    if grouped and spec.kv_heads % tp and tp % spec.kv_heads:
        raise PlannerError(
            f"{spec.name} has {spec.kv_heads} key/value heads: choose a tensor parallel size that fits them"
        )
    if pp > spec.num_layers:
        raise PlannerError(f"{spec.name} has {spec.num_layers} layers, too few for {pp} pipeline stages")


def tensor_bytes(
    tensor: Tensor,
    spec: ModelSpec,
    scheme: WeightScheme,
    *,
    tp: int = 1,
    compute_capability: tuple[int, int] = (9, 0),
) -> int:
    """Bytes of a whole family on one rank: quantised members, and those the checkpoint leaves in 16 bits."""
    shape = rank_shape(tensor, spec, tp)
    plain = prod(shape) * (4 if tensor.name.endswith(FLOAT32_SUFFIXES) else 2)
    quantization = scheme.quantization
    if quantization is None:
        return plain * tensor.count
    if quantization.method == "mxfp4" and tensor.part == "expert":
        return _mxfp4_expert_bytes(tensor, spec, tp, compute_capability) * tensor.count
    if not is_quantized(tensor, quantization):
        return plain * tensor.count
    kept = _kept_members(tensor, spec, quantization.ignored)
    return kept * plain + (tensor.count - kept) * _quantized_bytes(shape, quantization, scheme.scale_bytes)


def is_quantized(tensor: Tensor, quantization: Quantization) -> bool:
    """Whether a family's weights are packed, but for those that the checkpoint names as ignored.

    Embeddings, output heads, routers, norms, biases and (unless the checkpoint says otherwise) the vision tower stay
    in 16 bits; MXFP4 packs experts alone.
    """
    if len(tensor.shape) < 2 or tensor.part not in DECODER_PARTS or tensor.shape[0] == 1:
        return False  # one row: the gate of a shared expert
    if quantization.method == "mxfp4":
        return tensor.part == "expert"
    return tensor.linear or tensor.part == "expert"


def _kept_members(tensor: Tensor, spec: ModelSpec, ignored: tuple[str, ...]) -> int:
    """How many members of a family the ignore list keeps in 16 bits: all of them, or those of the layers it numbers."""
    name = tensor.module
    layers: set[int] = set()
    for pattern in ignored:
        if pattern.startswith("re:"):
            if re.search(pattern[3:], f"model.layers.0.{name}"):
                return tensor.count
            continue
        numbered = re.search(r"(?:layers|h|blocks)\.(\d+)\.(.+)$", pattern)
        if numbered is None:
            if _segments_match(pattern, name):
                return tensor.count
        elif _segments_match(numbered[2], name):
            layers.add(int(numbered[1]))
    return min(tensor.count, len(layers) * max(1, tensor.count // spec.num_layers))


def _segments_match(pattern: str, name: str) -> bool:
    """Whether the dotted words of an ignore pattern, less the model's prefix, stand side by side in a name."""
    words = [w for w in re.sub(r"^(model\.)?(language_model\.)?(model\.)?(layers\.\*\.)?", "", pattern).split(".") if w]
    parts = name.split(".")
    return bool(words) and any(parts[i : i + len(words)] == words for i in range(len(parts)))


def _quantized_bytes(shape: tuple[int, ...], q: Quantization, scale_bytes: int) -> int:
    """Packed weights, scales and zero points of one matrix (rows = outputs, columns = inputs) on one rank.

    weights rows * cols * bits / 8; scales: one for the tensor, for a row, for a block, or rows * cols / group_size;
    zero points as wide as the weights, one per group, in AWQ and GPTQ and where the format is not symmetric;
    bitsandbytes with double quantisation: a byte per 64 weights and a float32 per 256 of those; its 8 bits (LLM.int8):
    a float32 per row.
    """
    rows, cols = prod(shape[:-1]), shape[-1]
    weights = ceil(rows * cols * q.bits / 8)
    if q.method == "bitsandbytes" and q.bits == 8:
        return weights + 4 * rows
    if q.method == "bitsandbytes":
        blocks = cdiv(rows * cols, q.group_size or 64)
        return weights + (blocks + 4 * cdiv(blocks, 256) if q.double_quant else 4 * blocks)
    if q.block is not None:
        scales = cdiv(rows, q.block[0]) * cdiv(cols, q.block[1])
    elif q.group_size > 0:
        scales = rows * cdiv(cols, q.group_size)
    else:
        scales = rows if q.group_size < 0 else 1
    zeros = 0
    if q.bits < 16 and (q.method in ("awq", "gptq") or not q.symmetric):
        zeros = ceil(scales * q.bits / 8)
    return weights + scales * scale_bytes + zeros


def _mxfp4_expert_bytes(tensor: Tensor, spec: ModelSpec, tp: int, compute_capability: tuple[int, int]) -> int:
    """One expert's tensor as vLLM's MXFP4 kernels want it: half a byte a weight, a byte per 32 of them, padded.

    Compute capability 9 takes the Triton kernels, which pad the reduction axis; others Marlin, which pads both.
    Biases are float32 for Triton, 16 bits for Marlin. Source: vllm/model_executor/layers/quantization/mxfp4.py.
    """
    assert spec.experts is not None
    triton = compute_capability[0] == 9
    pad: dict[str, int] = constant("mxfp4_padding")["triton" if triton else "marlin"]
    ffn = round_up(cdiv(spec.experts.ffn, tp), pad["intermediate"])
    hidden = round_up(spec.hidden_size, pad["hidden"])
    is_input = tensor.shard == "out"  # gate and up, or the two in one
    matrices = tensor.shape[0] // spec.experts.ffn if is_input else 1
    rows = matrices * ffn if is_input else hidden
    if len(tensor.shape) == 1:
        return rows * pad["bias_bytes"]
    cols = hidden if is_input else ffn
    return rows * round_up(cols, pad["k"]) // 2 + rows * cdiv(cols, 32)


FUSED = {"q_proj": "qkv", "k_proj": "qkv", "v_proj": "qkv", "gate_proj": "gate_up", "up_proj": "gate_up"}
"""Matrices that vLLM stacks into one parameter (packed_modules_mapping of its models)."""


def allocator_rounding_bytes(
    spec: ModelSpec,
    scheme: WeightScheme,
    *,
    tp: int = 1,
    pp: int = 1,
    compute_capability: tuple[int, int] = (9, 0),
    sizes: Sequence[int] | None = None,
    fused: bool = True,
) -> int:
    """What torch's allocator adds to large parameters: a rest of up to 1 MiB below the next multiple of 2 MiB.

    fused, as in vLLM: query, key and value are one parameter, so are gate and up, and all experts of a layer.
    Source: pytorch/c10/cuda/CUDACachingAllocator.cpp (round_size, should_split).
    """
    if sizes is None:
        sizes = family_bytes(spec, scheme, tp=tp, compute_capability=compute_capability)
    modules: dict[tuple[str, int], int] = {}
    for tensor, total in zip(spec.tensors, sizes, strict=True):
        if len(tensor.shape) < 2 or tensor.part in VISION_PARTS:
            continue
        stacked = spec.experts.count if tensor.part == "expert" and spec.experts is not None else 1
        layers = max(1, tensor.count // stacked)
        prefix, _, last = tensor.module.rpartition(".")
        key = (f"{prefix}.{FUSED.get(last, last) if fused else last}", layers)
        modules[key] = modules.get(key, 0) + total // layers
    rules: dict[str, int] = constant("allocator")
    added = 0
    for (_, layers), size in modules.items():
        rest = -size % rules["rounding"]
        if size >= rules["large"] and rest <= rules["kept_remainder"]:
            added += rest * (cdiv(layers, pp) if layers > 1 else 1)
    return added


def absorbed_mla_bytes(spec: ModelSpec, tp: int, pp: int = 1) -> int:
    """The 16-bit copies of kv_b_proj that multi-head latent attention multiplies with while decoding (W_UK, W_UV).

    Source: vllm/model_executor/layers/attention/mla_attention.py, process_weights_after_loading.
    """
    total = sum(
        2 * prod(rank_shape(tensor, spec, tp)) * tensor.count
        for tensor in spec.tensors
        if tensor.name.endswith("kv_b_proj.weight")
    )
    return cdiv(total * cdiv(spec.num_layers, pp), spec.num_layers)


def rope_table_bytes(spec: ModelSpec) -> int:
    """Tables of cosines and sines: positions * rotary width * 2 B, for each kind of layer that has its own.

    Source: vllm/model_executor/layers/rotary_embedding/base.py.
    """
    latent = next((group.latent_dim for group in spec.layers if group.kind == "mla"), 0)
    width = spec.head_dim
    if latent:
        rank = next((t.shape[0] for t in spec.tensors if t.name.endswith("kv_a_layernorm.weight")), latent)
        width = latent - rank or 64
    table: dict[str, list[int]] = constant("rope_position_factors")
    factors = next((f for family, f in table.items() if spec.architecture.startswith(family)), table["default"])
    if spec.max_context <= 32_768:
        factors = [1] * len(factors)  # the small Gemma 3 has no scaling
    return sum(factors) * spec.max_context * width * 2


def lora_slot_bytes(spec: ModelSpec, *, rank: int, slots: int, tp: int = 1, pp: int = 1, extra_vocab: int = 0) -> int:
    """What vLLM sets aside for adapters: slots * rank * (inputs + outputs) * 2 B over the decoder's linear layers.

    A column-parallel layer keeps A whole and splits B; a row-parallel one splits A and keeps B whole. Up to 0.11 the
    embedding and the output head have slots too, with room for extra_vocab tokens.
    Source: vllm/lora/layers/base_linear.py, create_lora_weights.
    """
    if rank < 1 or slots < 1:
        raise PlannerError(f"LoRA needs max_lora_rank and max_loras of at least 1, not {rank} and {slots}")
    elements = 0
    for tensor in spec.tensors:
        adapted = tensor.part in DECODER_PARTS and (tensor.linear or tensor.part == "expert")
        if not adapted or len(tensor.shape) < 2:
            continue
        outputs, inputs = rank_shape(tensor, spec, tp)[-2:]
        elements += tensor.count * (outputs + inputs)
    elements = cdiv(elements * cdiv(spec.num_layers, pp), spec.num_layers)
    size = 2 * slots * rank * elements
    if extra_vocab:
        hidden, vocab = spec.hidden_size, round_up(spec.vocab_size + extra_vocab, 256)
        size += 2 * slots * (2 * rank * (hidden + vocab) + extra_vocab * hidden)
    return size
