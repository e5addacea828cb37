"""The `vllm serve` line that the answer prints is one that vLLM's own parser takes."""

from __future__ import annotations

import os

import pytest

pytest.importorskip("vllm", reason="needs vLLM: run make live")

from planner.catalog import load_model
from planner.catalog.hardware import gpu
from planner.memory.serving import ServingSettings, serving_memory

CASES = {
    "plain": {},
    "tensor parallel": {"tensor_parallel_size": 2},
    "fp8 KV": {"kv_cache_dtype": "fp8"},
    "fp8 weights": {"quantization": "fp8"},
    "bitsandbytes": {"quantization": "bitsandbytes"},
    "LoRA": {"enable_lora": True, "max_loras": 4, "max_lora_rank": 32},
    "no prefix caching": {"enable_prefix_caching": False, "block_size": 32},
    "eager": {"enforce_eager": True, "hybrid_kv_cache": False, "pipeline_parallel_size": 2},
    "draft model": {"draft": load_model("qwen3-0.6b"), "draft_tokens": 3},
    "limits": {"max_num_seqs": 7, "max_num_batched_tokens": 4096, "gpu_memory_utilization": 0.85},
}


@pytest.fixture(scope="module")
def parser() -> object:
    os.environ |= {"VLLM_LOGGING_LEVEL": "ERROR", "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"}
    from vllm.entrypoints.launchers.cli_args import make_arg_parser
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    return make_arg_parser(FlexibleArgumentParser(exit_on_error=False))


@pytest.mark.parametrize("card", ["a10", "h100-nvl", "t4"])
@pytest.mark.parametrize("name", CASES)
def test_vllms_parser_takes_the_arguments_of_the_answer(parser: object, name: str, card: str) -> None:
    place = gpu(card)
    settings = ServingSettings(max_model_len=8192, **CASES[name])  # type: ignore[arg-type]
    memory = serving_memory(
        load_model("qwen3-8b"),
        settings,
        usable_bytes=place.usable_bytes,
        compute_capability=place.capability,
        device_name=place.label,
    )
    parsed = parser.parse_args(["Qwen/Qwen3-8B", *memory.arguments])  # type: ignore[attr-defined]
    assert parsed.max_model_len == 8192
    assert parsed.tensor_parallel_size == settings.tensor_parallel_size
    assert parsed.max_num_seqs == memory.max_num_seqs
    assert parsed.max_num_batched_tokens == memory.max_num_batched_tokens
    assert parsed.gpu_memory_utilization == memory.gpu_memory_utilization
