"""How a server is run beside its memory: what an intent may choose, and what its timeouts follow from."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from decimal import ROUND_CEILING, Decimal
from functools import cache
from typing import Annotated, Any, Literal

from pydantic import Field

from planner.catalog import model_entry, read_facts
from planner.catalog.assumptions import assumption
from planner.catalog.hardware import Gpu
from planner.errors import PlannerError
from planner.model import Amount, Frozen, ModelSpec

NAME = r"^[a-z]([a-z0-9-]{0,30}[a-z0-9])?$"
HUB_ID = r"^[A-Za-z0-9._-]+/[A-Za-z0-9._-]+$"
AdapterName = Annotated[str, Field(pattern=r"^[A-Za-z0-9]([A-Za-z0-9._-]{0,62}[A-Za-z0-9])?$")]
Weights = Literal["hub", "blob"]
Device = Literal["gpu", "cpu"]
Cache = Literal["disk", "nvme"]
Expose = Literal["cluster", "internal", "gateway"]


class Adapter(Frozen):
    """A LoRA adapter that is loaded when its server starts.

    name: by which requests ask for it, as for a model; folder: its folder in the container `adapters`, or hub_id
    rank: of its matrices; base: hub id of the model that it was trained on
    """

    name: AdapterName
    rank: int = Field(ge=1, le=512)
    base: str = Field(pattern=HUB_ID)
    folder: str | None = Field(default=None, pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*(/[A-Za-z0-9][A-Za-z0-9._-]*)*$")
    hub_id: str | None = Field(default=None, pattern=HUB_ID)


class Gateway(Frozen):
    """A Gateway of the cluster (Gateway API) that routes to a server. hostnames: none takes all of the Gateway's."""

    name: str = Field(pattern=r"^[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?$")
    namespace: str = Field(pattern=r"^[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?$")
    hostnames: tuple[Annotated[str, Field(pattern=r"^[a-z0-9*]([a-z0-9.-]*[a-z0-9])?$")], ...] = ()


class Serving(Frozen):
    """What a lock keeps of a server, beside its memory and its vLLM arguments.

    machines: of a replica, each with gpus / machines of its GPUs; device: what it computes on
    weights: where they are read from at each start
    stored_bytes: of the weights as they are read; cache_bytes: of the machine's disk, for them and for compiled code
    cache: the system disk, or the machine's own NVMe disks where that is too small
    read_bytes_per_second, engine_seconds, machine_seconds, endpoint_seconds: pessimistic, by assumptions.json
    answer_tokens: of the longest answer that is finished when the server must stop; token_seconds: of one, at most
    tool_call_parser: vLLM's name, None without tools; runtime_adapters: more can be loaded by request
    sleep_level: of vLLM's sleep mode, None without
    """

    machines: int = 1
    device: Device = "gpu"
    weights: Weights = "hub"
    stored_bytes: int
    cache_bytes: int
    cache: Cache = "disk"
    read_bytes_per_second: int
    engine_seconds: int
    machine_seconds: int
    endpoint_seconds: int
    answer_tokens: int
    token_seconds: Amount
    tool_call_parser: str | None = None
    adapters: tuple[Adapter, ...] = ()
    runtime_adapters: bool = False
    expose: Expose = "cluster"
    gateway: Gateway | None = None
    hf_overrides: str | None = None
    sleep_level: Literal[1, 2] | None = None


def token_seconds(card: Gpu, read_bytes: int, pipeline_stages: int = 1) -> Decimal:
    """Seconds of one decoding step at most, stage after stage: read_bytes / (bandwidth * bandwidth_share) * stages.

    read_bytes: that a step can read: all of a GPU's memory, or a server's weights and KV cache in a machine's
    """
    rate = card.bandwidth_bytes_per_s * assumption("bandwidth_share").low
    return (read_bytes * pipeline_stages / rate).quantize(Decimal("0.001"), ROUND_CEILING)


def read_rate(weights: Weights) -> int:
    """Bytes a second at which weights arrive when it goes badly."""
    return int(assumption("hub_read_bytes_per_s" if weights == "hub" else "blob_read_bytes_per_s").low)


@cache
def tool_parser(model: str, architecture: str) -> str | None:
    """vLLM's name for how a model of the catalog writes tool calls; None where nobody says."""
    for record in read_facts("engines.json")["tool_call_parsers"]:
        if architecture in record["architectures"] and re.search(record["models"], model):
            return str(record["value"])
    return None


# ranks that vLLM has kernels for; source: vllm/config/lora.py of 0.32.0, MaxLoRARanks
LORA_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)


def check_server(adapters: Sequence[Adapter], expose: Expose, gateway: Gateway | None) -> None:
    """ValueError for adapters that share a name or say not where they lie, and for a gateway that is not named."""
    names = [adapter.name for adapter in adapters]
    if len(set(names)) < len(names):
        raise ValueError("two adapters have the same name: give each its own")
    for adapter in adapters:
        if (adapter.folder is None) == (adapter.hub_id is None):
            raise ValueError(f"the adapter {adapter.name} lies in a folder or on the hub: write folder or hub_id")
    if (expose == "gateway") != (gateway is not None):
        raise ValueError("expose: gateway goes with a gateway, its name and its namespace: write both or neither")


def check_overrides(text: str | None) -> None:
    """ValueError for what is no JSON object."""
    if text is None:
        return
    try:
        whole = isinstance(json.loads(text), dict)
    except ValueError:
        whole = False
    if not whole:
        raise ValueError("hf_overrides is a JSON object as text, such as '{\"max_position_embeddings\": 65536}'")


def check_extension(name: str, spec: ModelSpec, context: int, own: int, overrides: str | None) -> None:
    """PlannerError for a context beyond the model's own where vLLM is not told how it is reached.

    own: tokens of the model's context as it is stored
    """
    if context > own and overrides is None:
        raise PlannerError(
            f"{name}: vLLM must be told how {spec.name} gets from {own:,} to {context:,} tokens: write hf_overrides"
            f" into its workload, JSON with max_position_embeddings {context} and the whole rope_parameters (rope_type,"
            " rope_theta, factor, original_max_position_embeddings) of its model card"
        )


def lora_settings(
    name: str, settings: Mapping[str, Any], adapters: Sequence[Adapter], runtime_adapters: bool
) -> dict[str, Any]:
    """What adapters add to a server's settings, for which the plan then counts memory. PlannerError for their ranks."""
    if not adapters and not runtime_adapters and not settings.get("enable_lora"):
        return {}
    if settings.get("enable_lora") is False:
        raise PlannerError(f"{name} has adapters and says enable_lora: false: take one of both out")
    stated = settings.get("max_lora_rank")
    if isinstance(stated, int) and stated not in LORA_RANKS:
        known = ", ".join(map(str, LORA_RANKS))
        raise PlannerError(f"{name}: vLLM has no kernels for max_lora_rank {stated}: choose one of {known}")
    largest = max((adapter.rank for adapter in adapters), default=1)
    if isinstance(stated, int) and stated < largest:
        adapter = next(adapter for adapter in adapters if adapter.rank == largest)
        raise PlannerError(
            f"{name}: the adapter {adapter.name} has rank {largest}, above max_lora_rank {stated}: raise max_lora_rank"
        )
    return {
        "enable_lora": True,
        "max_loras": settings.get("max_loras", max(len(adapters), 1)),
        "max_lora_rank": stated or next(rank for rank in LORA_RANKS if rank >= max(largest, 16)),
    }


def _shape(name: str) -> str:
    """The catalog's name of a model, whoever stored it and in what format; of others what they are called."""
    try:
        return model_entry(name).name
    except PlannerError:
        return name


def check_adapters(name: str, spec: ModelSpec, adapters: Sequence[Adapter]) -> None:
    """PlannerError for an adapter that was trained on another model than the server's."""
    for adapter in adapters:
        if _shape(adapter.base) != _shape(spec.name):
            raise PlannerError(
                f"{name}: the adapter {adapter.name} was trained on {adapter.base} and the server has {spec.name}:"
                " serve its base, or take the adapter out"
            )
