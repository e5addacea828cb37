"""Servers without a GPU are sized and priced like the others, and refused what a CPU cannot do."""

from __future__ import annotations

from typing import Any

import golden
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from locks import ROOT, planned

from planner.catalog import load_model
from planner.errors import PlannerError
from planner.memory.cpu import cpu_serving_memory
from planner.memory.serving import ServingMemory, ServingSettings
from workloads.render import render

GIB = 1 << 30


def wanted(model: str = "qwen3-0.6b", **workload: Any) -> dict[str, Any]:
    server = {"kind": "serve", "device": "cpu", "context": 8192, "schedule": "mon-fri 08:00-18:00"} | workload
    return {"model": model, "workloads": [server], "approved_usd_per_month": 5000}


def memory(model: str = "qwen3-0.6b", usable: int = 64 * GIB, **more: Any) -> ServingMemory:
    return cpu_serving_memory(load_model(model), ServingSettings(**{"max_model_len": 8192} | more), usable_bytes=usable)


def test_the_memory_is_weights_cache_activations_and_the_programs_own() -> None:
    parts = {part.name: part.expected_bytes for part in memory().estimate.components}
    assert parts["weights"] == 596_049_920 * 2  # Qwen3-0.6B in 16 bits
    # 28 layers x 2 x 8 heads x 128 x 2 bytes = 114,688 bytes a token; 8,192 tokens are 0.875 GiB: one whole GiB
    assert parts["KV cache"] == GIB
    # 2,048 tokens x (8 x 1,024 + 3 x 3,072) x 2 bytes + 16 sequences x 151,936 x 8 bytes
    assert parts["activations"] == 2048 * (8 * 1024 + 3 * 3072) * 2 + 16 * 151_936 * 8


def test_a_small_model_takes_the_smallest_machine_and_its_hours_are_priced() -> None:
    _, lock = planned(wanted())
    pool, server = lock.pools[0], lock.workloads[0]
    assert (pool.sku, pool.gpus_per_node, pool.gpu, server.gpus) == ("Standard_D4s_v5", 0, "", 0)
    # 50 of a week's 168 hours are 217.3 a month, and 10 minutes after each of 21.7 days; 0.192 USD an hour
    assert float(pool.usd_per_month) == pytest.approx((217.3 + 21.7 / 6) * 0.192, rel=0.001)
    assert lock.quota["standardDSv5Family"] == 4 + 3 * 4  # and three machines of 4 for the system, one of them spare


def test_a_larger_model_takes_a_larger_machine() -> None:
    _, lock = planned(wanted("qwen3-8b"))
    assert lock.pools[0].ram_gib_per_node * 0.8 * GIB >= lock.workloads[0].needed_bytes
    assert lock.workloads[0].needed_bytes > 16_381_470_720  # its weights


def test_a_step_takes_the_time_to_read_weights_and_cache() -> None:
    serving = planned(wanted())[1].workloads[0].serving
    assert serving is not None
    # (1,192,099,840 + 1,073,741,824) bytes / (4 vCPUs x 3.2 GB/s x 0.5) = 0.354 s
    assert str(serving.token_seconds) == "0.355"
    assert serving.answer_tokens == 256  # assumptions.json, the low figure


@pytest.mark.parametrize(
    ("more", "sentence"),
    [
        ({"settings": {"quantization": "awq"}, "checkpoint": "a/b"}, "weights in another format than 16 bits on a CPU"),
        ({"settings": {"kv_cache_dtype": "fp8"}}, "a KV cache in another format than 16 bits on a CPU"),
        ({"settings": {"tensor_parallel_size": 2}}, "several devices on a CPU is not modelled"),
        ({"sleep_level": 1}, "vLLM has no sleep mode on a CPU: leave sleep_level out"),
    ],
)
def test_what_a_cpu_cannot_do_is_refused(more: dict[str, Any], sentence: str) -> None:
    with pytest.raises(PlannerError, match=sentence):
        planned(wanted(**more))


def test_a_model_that_no_machine_holds_is_refused_with_what_it_needs() -> None:
    with pytest.raises(PlannerError, match=r"serve \(llama-3.1-405b at 8,192 tokens\) fits on no size that is allowed"):
        planned(wanted("llama-3.1-405b"))


@settings(deadline=None, max_examples=30)
@given(st.integers(256, 32768), st.integers(1, 8))
def test_more_context_or_sequences_never_need_less(context: int, sequences: int) -> None:
    less = memory(max_model_len=context, concurrency=sequences)
    assert memory(max_model_len=context + 128, concurrency=sequences).estimate.expected_bytes >= (
        less.estimate.expected_bytes
    )
    assert memory(max_model_len=context, concurrency=sequences + 1).estimate.expected_bytes >= (
        less.estimate.expected_bytes
    )
    given_bytes = int(next(a.partition("=")[2] for a in less.arguments if a.startswith("--kv-cache-memory-bytes=")))
    assert given_bytes == less.estimate.component("KV cache").expected_bytes
    assert given_bytes >= less.kv_for_one_sequence.reserved_bytes * sequences


@pytest.mark.parametrize("form", ["md", "json", "csv", "html"])
def test_the_budget_page_knows_machines_without_gpus(form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    outcome = golden.run(("budget", "--stack", "dev-cpu", "--format", form))
    assert outcome.exit_code == 0, outcome.stderr
    assert "D4s_v5" in outcome.stdout


def test_servers_with_and_without_a_gpu_live_side_by_side() -> None:
    small = {"kind": "serve", "name": "small", "model": "qwen3-0.6b", "device": "cpu", "context": 4096}
    _, lock = planned({**wanted("qwen3-8b"), "workloads": [{"kind": "serve", "context": 8192}, small]})
    assert {pool.workloads: bool(pool.gpus_per_node) for pool in lock.pools} == {("serve",): True, ("small",): False}
    made = [(m["kind"], m["metadata"]["name"]) for m in render(lock)]
    assert {("Deployment", "serve"), ("Deployment", "small"), ("DaemonSet", "nvidia-device-plugin")} <= set(made)
