"""How a checkpoint stores its weights: `quantization_config` and `torch_dtype` of a config.json."""

from __future__ import annotations

import re
from collections.abc import Mapping

from planner.architectures.fields import Fields
from planner.errors import NotModelled
from planner.model import Quantization

KNOWN = ("fp8", "fbgemm_fp8", "awq", "gptq", "compressed-tensors", "bitsandbytes", "mxfp4", "modelopt")

_DTYPE_BYTES = {"float32": 4, "float": 4, "float16": 2, "half": 2, "bfloat16": 2}


def dtype_bytes(config: Mapping[str, object], owner: str) -> int:
    """Bytes of an unquantised weight: of `dtype` or `torch_dtype`, of the text part failing that; else 2."""
    fields = Fields(config, owner)
    stated = fields.get("dtype", "torch_dtype")
    if stated is None and isinstance(config.get("text_config"), Mapping):
        fields = fields.section("text_config")
        stated = fields.get("dtype", "torch_dtype")
    if stated is None:
        return 2
    word = fields.text("dtype", "torch_dtype").removeprefix("torch.")
    if word not in _DTYPE_BYTES:
        raise fields.refuse("dtype", f"must be one of {', '.join(_DTYPE_BYTES)}, not {word[:40]!r}")
    return _DTYPE_BYTES[word]


def quantization_of(config: Mapping[str, object], owner: str) -> Quantization | None:
    """The checkpoint's quantisation, None for a 16-bit one. Raises NotModelled for a quant_method not known here."""
    fields = Fields(config, owner)
    holder = fields
    for name in ("quantization_config", "compression_config"):
        if fields.get(name) is not None:
            break
    else:
        if not isinstance(config.get("text_config"), Mapping):
            return None
        holder, name = fields.section("text_config"), "quantization_config"
        if holder.get(name) is None:
            return None
    q = holder.section(name)
    method = q.text("quant_method", default="compressed-tensors" if q.has("config_groups") else "").lower()
    reader = _READERS.get(method)
    if reader is None:
        raise NotModelled(
            f"{owner} is quantised with {method[:60] or 'an unnamed quant_method'!r}, which is not modelled: "
            f"choose a checkpoint in 16 bits or one of {', '.join(KNOWN)}"
        )
    return reader(q)


def _fp8(q: Fields) -> Quantization:
    """Block FP8 (weight_block_size, DeepSeek and Qwen) or one scale per tensor."""
    block = q.integers("weight_block_size", 1, 1 << 20)
    if block and len(block) != 2:
        raise q.refuse("weight_block_size", f"must be a pair, not {len(block)} numbers")
    return Quantization(
        method="fp8",
        bits=8,
        block=(block[0], block[1]) if block else None,
        activation_bits=8,
        ignored=q.texts("modules_to_not_convert", "ignored_layers"),
    )


def _fbgemm_fp8(q: Fields) -> Quantization:
    return Quantization(
        method="fbgemm_fp8", bits=8, group_size=-1, activation_bits=8, ignored=q.texts("modules_to_not_convert")
    )


def _awq(q: Fields) -> Quantization:
    return Quantization(
        method="awq",
        bits=q.integer("bits", "w_bit", low=2, high=8, default=4),
        group_size=_group_size(q, "group_size", "q_group_size", default=128),
        symmetric=not q.flag("zero_point", True),
        ignored=q.texts("modules_to_not_convert"),
    )


def _gptq(q: Fields) -> Quantization:
    if q.get("dynamic"):
        raise NotModelled(
            f"{q.owner} gives modules their own GPTQ format (dynamic), which is not modelled: "
            "choose a checkpoint with one format for all linear modules"
        )
    return Quantization(
        method="gptq",
        bits=q.integer("bits", low=2, high=8),
        group_size=_group_size(q, "group_size", default=128),
        symmetric=q.flag("sym", True),
        ignored=q.texts("modules_in_block_to_quantize_exclude"),
    )


def _patterns(q: Fields, field: str) -> tuple[str, ...]:
    """A list of module names; those that start with `re:` must be regular expressions."""
    names = q.texts(field)
    for name in names:
        if not name.startswith("re:"):
            continue
        try:
            re.compile(name[3:])
        except re.error as error:
            raise q.refuse(field, f"holds a broken regular expression, {name[:60]!r}: {error}") from error
    return names


def _group_size(q: Fields, field: str, *older: str, default: int) -> int:
    """-1 means one group for each output channel."""
    size = q.integer(field, *older, low=-1, default=default)
    if size == 0:
        raise q.refuse(field, "must be -1 or a positive number of weights, not 0")
    return size


def _compressed_tensors(q: Fields) -> Quantization:
    """llm-compressor's format: one scheme for all linear modules, with a list of those left alone.

    Raises NotModelled when the groups of config_groups store weights in different ways.
    """
    groups = q.section("config_groups")
    found: list[Quantization] = []
    for name in groups.names():
        group = groups.section(name)
        if group.get("weights") is None:
            continue
        targets = group.texts("targets")
        if targets and "Linear" not in targets:
            raise NotModelled(
                f"{q.owner} quantises {', '.join(targets)[:60]} alone, which is not modelled: "
                "choose a checkpoint with one scheme for all linear modules"
            )
        found.append(_scheme(q, group))
    if not found:
        raise q.refuse("config_groups", "names no quantised weights")
    if any(other != found[0] for other in found):
        raise NotModelled(
            f"{q.owner} stores groups of modules in different quantised formats, which is not modelled: "
            "choose a checkpoint with one scheme for all linear modules"
        )
    return found[0]


def _scheme(q: Fields, group: Fields) -> Quantization:
    weights = group.section("weights")
    strategy = weights.text("strategy", default="group" if weights.get("group_size") else "tensor")
    block: tuple[int, int] | None = None
    if strategy == "tensor":
        size = 0
    elif strategy == "channel":
        size = -1
    elif strategy in ("group", "tensor_group"):
        size = _group_size(weights, "group_size", default=128)
    elif strategy == "block":
        pair = weights.integers("block_structure", 1, 1 << 20)
        if len(pair) != 2:
            raise weights.refuse("block_structure", "must be a pair of numbers")
        size, block = 0, (pair[0], pair[1])
    else:
        raise weights.refuse("strategy", f"must be tensor, channel, group or block, not {strategy[:40]!r}")
    activations = group.section("input_activations", optional=True)
    cache = q.section("kv_cache_scheme", optional=True)
    return Quantization(
        method="compressed-tensors",
        bits=weights.integer("num_bits", low=2, high=16),
        group_size=size,
        block=block,
        symmetric=weights.flag("symmetric", True),
        activation_bits=activations.integer("num_bits", low=2, high=16, default=16),
        ignored=_patterns(q, "ignore"),
        kv_bits=cache.optional_integer("num_bits", low=2, high=16),
    )


# Weights that share a scale in bitsandbytes' 4-bit formats (bitsandbytes/functional.py, quantize_4bit, blocksize).
_BNB_BLOCK = 64


def _bitsandbytes(q: Fields) -> Quantization:
    ignored = q.texts("llm_int8_skip_modules")
    if q.flag("load_in_4bit", False) or q.flag("_load_in_4bit", False):
        return Quantization(
            method="bitsandbytes",
            bits=4,
            group_size=_BNB_BLOCK,
            double_quant=q.flag("bnb_4bit_use_double_quant", False),
            ignored=ignored,
        )
    if not (q.flag("load_in_8bit", False) or q.flag("_load_in_8bit", False)):
        raise q.refuse("load_in_4bit", "and load_in_8bit are both missing or false")
    return Quantization(method="bitsandbytes", bits=8, group_size=-1, activation_bits=8, ignored=ignored)


def _mxfp4(q: Fields) -> Quantization:
    """Only the experts are stored so: 32 four-bit weights share one 8-bit exponent (OCP MX specification 1.0)."""
    return Quantization(method="mxfp4", bits=4, group_size=32, ignored=q.texts("modules_to_not_convert"))


def _modelopt(q: Fields) -> Quantization:
    """NVIDIA ModelOpt: FP8 with a scale per tensor, or NVFP4 with a scale for each 16 weights."""
    inner = q.section("quantization") if q.get("quantization") is not None else q
    algorithm = inner.text("quant_algo").upper()
    ignored = inner.texts("exclude_modules", "ignore")
    scheme = q.get("kv_cache_scheme")
    kv = inner.get("kv_cache_quant_algo") == "FP8" or isinstance(scheme, Mapping)
    if algorithm not in ("FP8", "NVFP4"):
        raise NotModelled(
            f"{q.owner} is quantised with modelopt {algorithm[:40]}, which is not modelled: use FP8 or NVFP4"
        )
    bits, size = (8, 0) if algorithm == "FP8" else (4, 16)
    return Quantization(
        method="modelopt",
        bits=bits,
        group_size=size,
        activation_bits=bits,
        ignored=ignored,
        kv_bits=8 if kv else None,
    )


_READERS = {
    "fp8": _fp8,
    "fbgemm_fp8": _fbgemm_fp8,
    "awq": _awq,
    "gptq": _gptq,
    "compressed-tensors": _compressed_tensors,
    "bitsandbytes": _bitsandbytes,
    "mxfp4": _mxfp4,
    "modelopt": _modelopt,
}
