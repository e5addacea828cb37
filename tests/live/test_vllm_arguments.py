"""Every `vllm serve` line that is printed or rendered is one that vLLM's own parser takes, and says the same to it."""

from __future__ import annotations

import contextlib
import os
from argparse import ArgumentError
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("vllm", reason="needs vLLM: run make live")

import tiny_qwen3
from locks import planned
from test_serving_workload import GPU_ONLY

from planner.catalog import load_model
from planner.catalog.hardware import gpu
from planner.memory.serving import ServingSettings, serving_memory
from planner.plan.lock import Lock, LockedWorkload
from planner.stack import read_lock, stack_names
from workloads.render import render, vllm_arguments

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


# ------------------------------------------------------------------------------------------------- rendered manifests

ROOT = Path(__file__).parents[2]
with contextlib.chdir(ROOT):
    SHIPPED = {
        f"{stack}/{workload.name}": workload
        for stack in stack_names()
        for workload in read_lock(stack).workloads
        if workload.task == "serve"
    }
ADAPTERS = [
    {"name": "support", "rank": 16, "base": "Qwen/Qwen3-8B", "folder": "support-1"},
    {"name": "sales", "rank": 64, "base": "Qwen/Qwen3-8B", "hub_id": "somebody/sales-lora"},
]
# what a server can be asked to be, beside the shipped ones
WANTED: dict[str, dict[str, Any]] = {
    "adapters": {"adapters": ADAPTERS, "runtime_adapters": True},
    "weights in Blob": {"weights": "blob"},
    "no tools": {"tool_call_parser": "none"},
    "sleep": {"sleep_level": 2},
    "fp8 KV": {"settings": {"kv_cache_dtype": "fp8"}},
    "two GPUs": {"settings": {"tensor_parallel_size": 2}},
}


def parsed_of(parser: Any, words: list[str]) -> Any:
    """What vLLM makes of a command line: parsed, and checked as `vllm serve` does before it starts anything."""
    from vllm.entrypoints.launchers.cli_args import validate_parsed_serve_args

    parsed = parser.parse_args(words)
    validate_parsed_serve_args(parsed)
    if parsed.tool_call_parser is not None:
        from vllm.tool_parsers import ToolParserManager

        assert parsed.tool_call_parser in ToolParserManager.list_registered()
    return parsed


def server_lock(name: str) -> Lock:
    """The plan of one server that has what the case wants, on A100 machines."""
    sizes = ["NC24ads_A100_v4", "NC48ads_A100_v4"]
    workload = {"kind": "serve", "context": 8192, **WANTED[name]}
    return planned({"model": "qwen3-8b", "workloads": [workload], "skus": sizes, "approved_usd_per_month": 20_000})[1]


def check(parser: Any, workload: LockedWorkload) -> Any:
    """The parsed command line of a server, which says what the plan says."""
    assert workload.serving is not None
    words = vllm_arguments(workload, guarded=True)
    parsed = parsed_of(parser, words)
    assert (parsed.model_tag, parsed.served_model_name, parsed.port) == (words[0], [workload.model], 8000)
    assert parsed.max_model_len == workload.context
    assert parsed.tensor_parallel_size * parsed.pipeline_parallel_size == max(workload.gpus, 1)
    assert parsed.enable_auto_tool_choice == (parsed.tool_call_parser is not None)
    assert parsed.enable_prefix_caching
    assert parsed.shutdown_timeout >= 30
    assert parsed.disable_access_log_for_endpoints == "/health,/metrics"
    assert parsed.api_key is None  # from the environment: a command line can be read by others
    assert parsed.middleware == ["key_guard.KeyGuard"]
    assert parsed_of(parser, vllm_arguments(workload)).middleware == []  # without a key there is none to ask for
    return parsed


@pytest.mark.parametrize("name", SHIPPED)
def test_vllms_parser_takes_the_command_line_of_every_shipped_stack(parser: Any, name: str) -> None:
    check(parser, SHIPPED[name])


@pytest.mark.parametrize("name", WANTED)
def test_vllms_parser_takes_the_command_line_of_whatever_a_server_is_asked_to_be(parser: Any, name: str) -> None:
    (workload,) = server_lock(name).workloads
    parsed = check(parser, workload)
    if name == "adapters":
        assert [(module.name, module.path) for module in parsed.lora_modules] == [
            ("support", "/adapters/support-1"),
            ("sales", "somebody/sales-lora"),
        ]
        assert (parsed.enable_lora, parsed.max_loras, parsed.max_lora_rank) == (True, 2, 64)
    assert parsed.enable_sleep_mode == (name == "sleep")
    assert parsed.model_tag == ("/models/Qwen/Qwen3-8B" if name == "weights in Blob" else "Qwen/Qwen3-8B")


def test_vllms_parser_takes_the_command_lines_of_the_machines_of_one_replica(parser: Any) -> None:
    lock = server_lock("two GPUs")
    (workload,) = lock.workloads
    assert workload.serving is not None
    several = workload.model_copy(update={"serving": workload.serving.model_copy(update={"machines": 2})})
    (group,) = (
        one for one in render(lock.model_copy(update={"workloads": (several,)})) if one["kind"] == "LeaderWorkerSet"
    )
    template = group["spec"]["leaderWorkerTemplate"]
    # what the controller of LeaderWorkerSets gives every pod
    given = {"$(LWS_LEADER_ADDRESS)": "serve-0.serve.tonnage", "$(LWS_WORKER_INDEX)": "1"}
    for part, rank, headless in (("leaderTemplate", 0, False), ("workerTemplate", 1, True)):
        (container,) = template[part]["spec"]["containers"]
        words = list(container["args"])
        for variable, value in given.items():
            words = [word.replace(variable, value) for word in words]
        parsed = parsed_of(parser, words)
        assert (parsed.nnodes, parsed.node_rank, parsed.headless) == (2, rank, headless)
        assert parsed.master_addr == given["$(LWS_LEADER_ADDRESS)"]


@pytest.mark.parametrize("wrong", ["--no-such-flag=1", "--kv-cache-dtype=fp7", "--max-model-len=long"])
def test_the_parser_does_refuse(parser: Any, wrong: str) -> None:
    words = vllm_arguments(next(iter(SHIPPED.values())))
    with pytest.raises((ArgumentError, SystemExit, ValueError, KeyError)):
        parsed_of(parser, [*words, wrong])


def test_what_is_left_out_without_a_gpu_is_what_vllm_refuses_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from vllm.engine.arg_utils import EngineArgs

    tiny_qwen3.save_model(tmp_path, tiny_qwen3.save_tokenizer(tmp_path))
    assert EngineArgs(model=str(tmp_path), max_model_len=512).create_engine_config() is not None
    assert GPU_ONLY == ("--enable-sleep-mode",)
    with pytest.raises(ValueError, match="Sleep mode is not supported on current platform"):
        EngineArgs(model=str(tmp_path), max_model_len=512, enable_sleep_mode=True).create_engine_config()
