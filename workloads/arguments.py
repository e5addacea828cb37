"""The command line of a vLLM server, argument by argument, each with where its value comes from."""

from __future__ import annotations

import json
from typing import NamedTuple

from planner.plan.lock import LockedWorkload
from planner.plan.serving import Serving
from workloads.timing import serving_timing

PORT = 8000
MODELS, ADAPTERS = "/models", "/adapters"  # where containers of the storage account are mounted
GUARD = "key_guard"  # the module that asks for the API key
# by flag: what the memory model worked out, in words
_FROM_MEMORY = {
    "--max-model-len": "the workload's context, for which the plan holds KV cache",
    "--gpu-memory-utilization": "the share of the GPU that the memory receipt fills",
    "--max-num-seqs": "vLLM's default for the card, or the intent's setting: the receipt counts its logits and graphs",
    "--max-num-batched-tokens": "vLLM's default for the card, or the intent's setting: the activation peak rests on it",
    "--tensor-parallel-size": "GPUs of one machine that the model is split over",
    "--pipeline-parallel-size": "stages of layers, from the intent's settings or one a machine",
    "--quantization": "16-bit weights that are quantised while they load, by the intent's settings",
    "--kv-cache-dtype": "the intent's setting: the KV cache of the receipt is that small",
    "--dtype": "what the card computes in",
    "--kv-cache-memory-bytes": "KV cache of the receipt, in whole GiB of the machine's memory",
    "--block-size": "the intent's setting",
    "--enforce-eager": "the intent's setting: no CUDA graphs in the receipt",
    "--enable-lora": "adapters of the intent",
    "--max-loras": "adapters in one batch: their slots are in the receipt",
    "--max-lora-rank": "the largest rank: the slots of the receipt are that large",
    "--enable-prefix-caching": "what the KV cache has to spare keeps shared prefixes",
    "--no-enable-prefix-caching": "the intent's setting",
    "--disable-hybrid-kv-cache-manager": "the intent's setting: every layer keeps the whole context",
    "--speculative-config": "the intent's draft model, which is in the receipt",
}


class Argument(NamedTuple):
    """Words of a command line that belong together, and why they are there."""

    words: tuple[str, ...]
    why: str


def serving_of(workload: LockedWorkload) -> Serving:
    """What the lock keeps of a server. ValueError for a workload that is none (a programming error)."""
    if workload.serving is None:
        raise ValueError(f"{workload.name} is no server")
    return workload.serving


def weights_path(workload: LockedWorkload) -> str:
    """What `vllm serve` is told to serve: a hub id, or the folder of that name in the mounted container."""
    name = workload.hub_id or workload.model
    return f"{MODELS}/{name}" if serving_of(workload).weights == "blob" else name


def explained_arguments(workload: LockedWorkload, *, guarded: bool = False) -> list[Argument]:
    """All that follows `vllm serve`, in order, each part with its reason; guarded: there is an API key to ask for."""
    serving, timing = serving_of(workload), serving_timing(serving_of(workload))
    where = "the container `models`" if serving.weights == "blob" else "the hub"
    found = [
        Argument((weights_path(workload),), f"the workload's checkpoint, read from {where}"),
        Argument((f"--served-model-name={workload.model}",), "the plan's name of the model, which clients ask for"),
        Argument((f"--port={PORT}",), "the container's port"),
        *(Argument((flag,), _FROM_MEMORY.get(flag.partition("=")[0], "the plan")) for flag in workload.arguments),
        Argument(("--enable-chunked-prefill",), "long prompts do not keep others waiting: the receipt counts on it"),
    ]
    if serving.hf_overrides:
        found.append(
            Argument((f"--hf-overrides={serving.hf_overrides}",), "the intent's, over the model's config.json")
        )
    if serving.tool_call_parser:
        found += [
            Argument(("--enable-auto-tool-choice",), "the model may call tools"),
            Argument(
                (f"--tool-call-parser={serving.tool_call_parser}",), "how this model writes calls, by engines.json"
            ),
        ]
    if serving.adapters:
        modules = (f"{adapter.name}={_adapter_path(adapter.folder, adapter.hub_id)}" for adapter in serving.adapters)
        found.append(Argument(("--lora-modules", *modules), "adapters of the intent"))
    if serving.sleep_level:
        found.append(Argument(("--enable-sleep-mode",), f"the intent's sleep_level {serving.sleep_level}"))
    found += [
        Argument(
            (f"--shutdown-timeout={timing.shutdown_seconds}",),
            f"{serving.answer_tokens:,} tokens of the longest answer x {serving.token_seconds} s, at least 30 s",
        ),
        Argument(
            ("--disable-access-log-for-endpoints=/health,/metrics",), "probes and scrapes are not worth paying logs for"
        ),
    ]
    if guarded:
        why = "vLLM asks for the API key below /v1, this on every path but /health and /metrics"
        found.append(Argument((f"--middleware={GUARD}.KeyGuard",), why))
    return found


def _adapter_path(folder: str | None, hub_id: str | None) -> str:
    return f"{ADAPTERS}/{folder}" if folder else str(hub_id)


def vllm_arguments(workload: LockedWorkload, *, guarded: bool = False) -> list[str]:
    """All that follows `vllm serve` on a server's command line.

    guarded: there is an API key, and the whole port asks for it. ValueError for a workload that is no server.
    """
    return [word for argument in explained_arguments(workload, guarded=guarded) for word in argument.words]


def gpus_of_pod(workload: LockedWorkload) -> int:
    """GPUs of one pod: all of a replica's or run's, or those of one of its machines."""
    kept = workload.serving or workload.training
    return workload.gpus // (kept.machines if kept else 1)


def adapter_request(name: str, folder: str) -> str:
    """The body of a request to /v1/load_lora_adapter for a folder of the container `adapters`."""
    return json.dumps({"lora_name": name, "lora_path": f"{ADAPTERS}/{folder}"})
