"""Independent oracle: vLLM's own model classes, built without memory, say what weights and KV cache they keep.

Writes one JSON record a line. Needs vLLM (the CPU build will do) and no GPU, weights or network:

    HF_HUB_OFFLINE=1 python tests/oracles/vllm_kv.py > tests/oracles/vllm_kv.jsonl

Every catalog model is built on torch's meta device as rank 0 of a tensor parallel group whose other ranks do not exist
(torch's fake process group). Its parameters are summed, and vLLM's cache manager sizes 512 GiB for it. Multimodal
models are built as their text part. What loading drops or leaves empty on a GPU is not counted: see UNCOUNTED.
"""

# ruff: noqa: E402 - vLLM reads the environment when it is imported
from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

os.environ.update(
    HF_HUB_OFFLINE="1",
    VLLM_LOGGING_LEVEL="CRITICAL",
    VLLM_NO_USAGE_STATS="1",
    VLLM_CPU_KVCACHE_SPACE="1",
    VLLM_ENABLE_V1_MULTIPROCESSING="0",
)

import torch
import torch.distributed
from torch.testing._internal.distributed.fake_pg import FakeStore

for module in (torch.cpu, torch._C._cpu):  # shapes alone are built: 8-bit CPU kernels may be chosen on any machine
    module._is_amx_tile_supported = lambda: True

import vllm.distributed.parallel_state as groups
from vllm.config import set_current_vllm_config
from vllm.distributed.device_communicators.base_device_communicator import DeviceCommunicatorBase
from vllm.distributed.device_communicators.shm_broadcast import MessageQueue
from vllm.engine.arg_utils import EngineArgs
from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase
from vllm.model_executor.model_loader.utils import initialize_model
from vllm.utils.torch_utils import set_default_torch_dtype
from vllm.v1.core.kv_cache_utils import get_kv_cache_capacity, get_kv_cache_configs
from vllm.v1.kv_cache_interface import SlidingWindowSpec

ROOT = Path(__file__).resolve().parents[2]
AVAILABLE = 512 << 30
CONTEXTS = (8_192, 131_072)
BATCHED_TOKENS = 2_048
BLOCK = 16  # CUDA's; the CPU backend wants multiples of 32 for sliding layers
UNCOUNTED = (
    "g_idx",  # emptied by the Marlin kernels when there is no activation reordering
    "weight_shape",
    "input_scale",
    "k_scale",
    "v_scale",
    "q_scale",
    "prob_scale",
)

GROUP = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 128}
CHANNEL = {"num_bits": 8, "symmetric": True, "strategy": "channel", "dynamic": False}
TOKEN = {"num_bits": 8, "symmetric": True, "strategy": "token", "dynamic": True}


def compressed(kind: str, **parts: object) -> dict[str, object]:
    return {
        "quant_method": "compressed-tensors",
        "format": kind,
        "quantization_status": "compressed",
        "ignore": ["lm_head", "re:.*gate$", "re:.*router$"],
        "config_groups": {"group_0": {"targets": ["Linear"], **parts}},
    }


FORMATS: dict[str, dict[str, object]] = {
    "fp8-block": {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [128, 128]},
    "fp8": {"quant_method": "fp8", "activation_scheme": "dynamic"},
    "fp8-dynamic": compressed(
        "float-quantized", weights={**CHANNEL, "type": "float"}, input_activations={**TOKEN, "type": "float"}
    ),
    "w8a8": compressed("int-quantized", weights={**CHANNEL, "type": "int"}, input_activations={**TOKEN, "type": "int"}),
    "awq": {"quant_method": "awq", "bits": 4, "group_size": 128, "zero_point": True, "version": "gemm"},
    "gptq": {"quant_method": "gptq", "bits": 4, "group_size": 128, "sym": True, "desc_act": False},
    "w4a16": compressed("pack-quantized", weights=GROUP),
    "mxfp4": {
        "quant_method": "mxfp4",
        "modules_to_not_convert": ["model.layers.*.self_attn", "model.layers.*.mlp.router", "embed_tokens", "lm_head"],
    },
}


def jobs(experts: bool, packed: bool, listed: bool) -> list[tuple[int, str, str]]:
    """(tensor parallel size, KV type, format): every size as stored, an FP8 cache, and the formats of listed models."""
    plain = [(tp, "auto", "") for tp in (1, 2, 4, 8)] + [(1, "fp8", "")]
    if packed or not listed:
        return plain
    return plain + [(1, "auto", name) for name in FORMATS if experts or name != "mxfp4"] + [(4, "auto", "fp8-block")]


TIED = {"gemma3": True}  # what the configuration class assumes where config.json is silent
DECODERS = {
    "deepseek_v3": "DeepseekV3ForCausalLM",
    "gemma3_text": "Gemma3ForCausalLM",
    "granite": "GraniteForCausalLM",
    "mistral": "MistralForCausalLM",
}


def text_config(config: dict[str, object]) -> dict[str, object]:
    """The text part of a multimodal config, as a causal language model of its own."""
    inner = config.get("text_config")
    if not isinstance(inner, dict):
        return dict(config)
    text = {
        "tie_word_embeddings": config.get("tie_word_embeddings", TIED.get(str(config["model_type"]), False)),
        **inner,
    }
    if text.get("model_type") in DECODERS:
        text.setdefault("architectures", [DECODERS[text["model_type"]]])
    text.setdefault("torch_dtype", config.get("torch_dtype", "bfloat16"))
    if "quantization_config" in config:
        text["quantization_config"] = config["quantization_config"]
    return text


@contextlib.contextmanager
def lone_rank(config: object, tp: int):
    """Rank 0 of a tensor parallel group of that size, with nobody to talk to."""
    groups.destroy_model_parallel()
    groups.destroy_distributed_environment()
    make = torch.distributed.new_group

    def pretend(ranks=None, backend=None, timeout=None, **rest):
        return make(ranks, backend="fake", **rest)

    with (
        set_current_vllm_config(config),
        mock.patch.object(torch.distributed, "new_group", pretend),
        mock.patch.object(torch.distributed, "barrier", return_value=None),
        mock.patch.object(groups, "_node_count", return_value=1),
        mock.patch.object(groups, "resolve_obj_by_qualname", return_value=DeviceCommunicatorBase),
        mock.patch.object(MessageQueue, "create_from_process_group", return_value=None),
    ):
        torch.distributed.init_process_group("fake", store=FakeStore(), rank=0, world_size=tp)
        groups.init_distributed_environment(tp, 0, "env://", 0, "fake")
        groups.initialize_model_parallel(tp, 1, backend="fake")
        with set_default_torch_dtype(torch.bfloat16), torch.device("meta"):
            yield


def measure(config: dict[str, object], tp: int, kv: str, quantization: str) -> dict[str, object]:
    if quantization:
        config = {**config, "quantization_config": FORMATS[quantization]}
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "config.json").write_text(json.dumps(config))
        engine = EngineArgs(
            model=folder,
            skip_tokenizer_init=True,
            load_format="dummy",
            dtype="bfloat16",
            max_model_len=CONTEXTS[0],
            block_size=BLOCK,
            kv_cache_dtype=kv,
            enforce_eager=True,
            max_num_batched_tokens=BATCHED_TOKENS,
            tensor_parallel_size=tp,
            hf_overrides={"max_position_embeddings": max(CONTEXTS)},
        ).create_engine_config()
        with lone_rank(engine, tp):
            model = initialize_model(vllm_config=engine)
    engine.cache_config.kv_cache_layout = "LBNHC"
    layers = {}
    for name, layer in engine.compilation_config.static_forward_context.items():
        spec = layer.get_kv_cache_spec(engine) if isinstance(layer, AttentionLayerBase) else None
        if spec is not None:
            layers[name] = dataclasses.replace(spec, block_size=BLOCK) if isinstance(spec, SlidingWindowSpec) else spec
    cases = []
    for context in CONTEXTS:
        engine.model_config.max_model_len = engine.model_config.original_max_model_len = context
        cache = get_kv_cache_configs(engine, [dict(layers)], [AVAILABLE])[0]
        cases.append(
            {
                "max_model_len": context,
                "in_flight": engine.max_in_flight_tokens,
                "groups": len(cache.kv_cache_groups),
                "num_blocks": cache.num_blocks,
                "kv_tokens": get_kv_cache_capacity(engine, cache)[0],
            }
        )
    counted = (p for name, p in model.named_parameters() if not name.endswith(UNCOUNTED))
    return {
        "weight_bytes": sum(p.numel() * p.element_size() for p in counted),
        "kv_bytes_per_token": sum(spec.page_size_bytes / spec.block_size for spec in layers.values()),
        "cases": cases,
    }


def records(wanted: set[str]) -> Iterator[dict[str, object]]:
    """The records of these models, or of all distinct shapes of the catalog."""
    catalog = json.loads((ROOT / "planner" / "catalog" / "models.json").read_text(encoding="utf-8"))
    seen: set[str] = set()
    for entry in catalog["models"]:
        shape = json.dumps(entry["config"], sort_keys=True)
        if shape in seen or (wanted and entry["name"] not in wanted):
            continue
        seen.add(shape)
        config = text_config(entry["config"])
        experts = any("expert" in key for key in config)
        for tp, kv, quantization in jobs(experts, "quantization_config" in config, entry["listed"]):
            record = {"model": entry["name"], "tp": tp, "kv": kv, "format": quantization}
            try:
                record.update(measure(config, tp, kv, quantization))
            except Exception as error:  # noqa: BLE001 - what vLLM cannot build here is part of the answer
                record["not_built"] = (
                    f"{type(error).__name__}: {str(error).splitlines()[0][:120] if str(error) else ''}"
                )
            yield record


def main() -> None:
    wanted = set(sys.argv[1:])
    if wanted:
        for record in records(wanted):
            print(json.dumps(record), flush=True)
        return
    table = Path(__file__).with_suffix(".jsonl")
    temporary = table.with_suffix(".tmp")
    with temporary.open("w", encoding="utf-8") as file:
        for record in records(wanted):
            file.write(json.dumps(record) + "\n")
    temporary.replace(table)


if __name__ == "__main__":
    main()
