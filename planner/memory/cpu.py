"""Serving memory without a GPU: what vLLM's CPU backend keeps in a machine's memory."""

from __future__ import annotations

from math import ceil

from planner.catalog import read_facts
from planner.errors import NotModelled
from planner.memory.estimate import Component, MemoryEstimate, exact
from planner.memory.serving import ServingMemory, ServingSettings, serving_memory
from planner.model import ModelSpec
from planner.units import GIB

PEAK_INSTANT = "a batch is computed while every wanted sequence is at its full context"
_PROFILED_BYTES = 1 << 42  # more than any model: only what is loaded and wanted is read from that estimate


def cpu_serving_memory(spec: ModelSpec, settings: ServingSettings, *, usable_bytes: int) -> ServingMemory:
    """Memory of one server on a CPU, and the KV cache that it is given.

    weights + rope tables + slots of adapters (as on a GPU) + KV cache + activations + runtime
    KV cache: the wanted sequences at their full context in blocks of 128 tokens, in whole GiB
    activations: tokens of a batch x (8 hidden + 3 ffn) x 2 bytes, and two rows of float32 logits a sequence
    runtime: Python, PyTorch and compiled code of vLLM's two processes (cpu.json)
    Raises NotModelled for what the CPU backend cannot do or nobody measured.
    Source: vllm/v1/worker/cpu_worker.py and vllm/platforms/cpu.py of 0.32.0.
    """
    facts = read_facts("cpu.json")["serving"]
    _check(spec, settings)
    sequences = settings.max_num_seqs or facts["max_num_seqs"]["value"]
    tokens = settings.max_num_batched_tokens or facts["max_num_batched_tokens"]["value"]
    own = settings.model_copy(
        update={
            "max_num_seqs": min(sequences, tokens),
            "max_num_batched_tokens": tokens,
            "block_size": facts["block_size"]["value"],
        }
    )
    like = serving_memory(spec, own, usable_bytes=_PROFILED_BYTES)
    loaded = [part for part in like.estimate.components if part.name in ("weights", "rope tables", "adapters")]
    wanted = like.kv_for_one_sequence.reserved_bytes * settings.concurrency
    kv = ceil(wanted / GIB) * GIB
    activations = tokens * (8 * spec.hidden_size + 3 * _widest(spec)) * 2 + sequences * spec.vocab_size * 4 * 2
    runtime = facts["runtime_bytes"]
    components = (
        *loaded,
        exact("KV cache", kv, "the wanted sequences in whole GiB", "vllm/v1/worker/cpu_worker.py", {"wanted": wanted}),
        Component(
            name="activations",
            low_bytes=activations // 2,
            expected_bytes=activations,
            high_bytes=activations * 2,
            formula="tokens * (8 hidden + 3 ffn) * 2 + 2 sequences * vocabulary * 4",
            inputs={"tokens": tokens, "hidden": spec.hidden_size, "ffn": _widest(spec), "sequences": sequences},
            source="tensors alive in one decoder layer; the range is a factor of two",
        ),
        Component(
            name="runtime",
            low_bytes=runtime["low"],
            expected_bytes=runtime["expected"],
            high_bytes=runtime["high"],
            formula="measured",
            source=runtime["source"],
        ),
    )
    estimate = MemoryEstimate(
        components=components,
        peak_instant=PEAK_INSTANT,
        not_modelled=("the copy of a tensor while its weights are packed for the CPU's instructions",),
    )
    supply = usable_bytes - estimate.expected_bytes + kv
    return like.model_copy(
        update={
            "estimate": estimate,
            "budget_bytes": usable_bytes,
            "kv_bytes": supply,
            "fits": estimate.expected_bytes <= usable_bytes,
            "prefix_cache_bytes": kv - wanted,
            "arguments": _arguments(own, kv, settings.enable_lora),
        }
    )


def _check(spec: ModelSpec, settings: ServingSettings) -> None:
    refused = {
        "weights in another format than 16 bits": spec.quantization is not None or settings.quantization is not None,
        "a KV cache in another format than 16 bits": settings.kv_cache_dtype != "auto",
        "several devices": settings.tensor_parallel_size * settings.pipeline_parallel_size > 1,
        "speculative decoding": settings.draft is not None,
    }
    for what, asked in refused.items():
        if asked:
            raise NotModelled(f"{what} on a CPU is not modelled: leave it out, or serve {spec.name} on a GPU")


def _widest(spec: ModelSpec) -> int:
    """The widest row of a layer's matrices, which is its feed-forward part's."""
    return max(max(tensor.shape) for tensor in spec.tensors if tensor.part not in ("embedding", "lm_head"))


def _arguments(settings: ServingSettings, kv_bytes: int, lora: bool) -> tuple[str, ...]:
    """Flags of `vllm serve` that make the server what was computed."""
    flags = [
        f"--max-model-len={settings.max_model_len}",
        f"--max-num-seqs={settings.max_num_seqs}",
        f"--max-num-batched-tokens={settings.max_num_batched_tokens}",
        f"--kv-cache-memory-bytes={kv_bytes}",
        f"--block-size={settings.block_size}",
        "--dtype=bfloat16",
    ]
    if lora:
        flags += ["--enable-lora", f"--max-loras={settings.max_loras}", f"--max-lora-rank={settings.max_lora_rank}"]
    flags.append("--enable-prefix-caching" if settings.enable_prefix_caching else "--no-enable-prefix-caching")
    return tuple(flags)
