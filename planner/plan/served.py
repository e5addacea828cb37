"""What a lock keeps of a server beside its memory: worked out of the intent, the plan and the assumptions."""

from __future__ import annotations

from decimal import Decimal

from planner.catalog import load_model
from planner.catalog.assumptions import assumption
from planner.catalog.hardware import VmSku, machine
from planner.catalog.mig import card_of, cut
from planner.cost.cluster import OS_DISK_GIB
from planner.memory.serving_parts import QUANTIZED_AT_START, ServingSettings
from planner.memory.weights import weight_bytes, weight_scheme
from planner.model import ModelSpec
from planner.plan.cpu import memory_of
from planner.plan.intent import Intent, ServeWorkload, model_of, settings_of
from planner.plan.result import Placed, Plan
from planner.plan.serving import Serving, cache_place, check_extension, read_rate, token_seconds, tool_parser


def serving_of(wanted: ServeWorkload, placed: Placed, plan: Plan, intent: Intent) -> Serving:
    """What a lock keeps of a server beside its memory.

    PlannerError for weights that no disk of its machine holds, and for an extended context of which vLLM is not told.
    """
    spec, settings = model_of(intent, wanted), settings_of(wanted)
    assert isinstance(settings, ServingSettings)
    own = load_model(wanted.model or intent.model).max_context
    check_extension(wanted.name, spec, wanted.context, own, wanted.hf_overrides)
    size = machine(next(pool for pool in plan.pools if pool.name == placed.pool).sku)
    stored = _stored_bytes(spec, settings)
    cache = int(assumption("compiled_code_bytes").high) + (stored * 11 // 10 if wanted.weights == "hub" else 0)
    # a CPU takes its time for each token, and nobody waits an hour for a server to stop
    usual = assumption("answer_tokens").low if wanted.device == "cpu" else assumption("answer_tokens").expected
    parser = wanted.tool_call_parser or tool_parser(spec.name, spec.architecture)
    return Serving(
        machines=wanted.machines,
        device=wanted.device,
        weights=wanted.weights,
        stored_bytes=stored,
        cache_bytes=cache,
        cache=cache_place(wanted.name, size, stored, cache, placed.gpus // wanted.machines, OS_DISK_GIB),
        read_bytes_per_second=read_rate(wanted.weights),
        engine_seconds=int(assumption("engine_start_seconds").high),
        machine_seconds=int(assumption("gpu_machine_seconds").high),
        endpoint_seconds=int(assumption("endpoint_seconds").high),
        answer_tokens=min(wanted.answer_tokens or int(usual), wanted.context),
        token_seconds=_token_seconds(wanted, placed, size, intent, settings.pipeline_parallel_size * wanted.machines),
        tool_call_parser=None if parser == "none" else parser,
        adapters=wanted.adapters,
        runtime_adapters=wanted.runtime_adapters,
        expose=wanted.expose,
        gateway=wanted.gateway,
        hf_overrides=wanted.hf_overrides,
        sleep_level=wanted.sleep_level,
    )


def _stored_bytes(spec: ModelSpec, settings: ServingSettings) -> int:
    """Bytes that are read at a start: 16-bit files where they are quantised while they load; the draft's too."""
    made_at_start = spec.quantization is None and settings.quantization in QUANTIZED_AT_START
    stored = weight_bytes(spec, weight_scheme(spec, None if made_at_start else settings.quantization))
    return stored + (weight_bytes(settings.draft, weight_scheme(settings.draft)) if settings.draft else 0)


def _token_seconds(wanted: ServeWorkload, placed: Placed, size: VmSku, intent: Intent, stages: int) -> Decimal:
    """Of one decoding step at most: on a GPU it reads all of its memory, on a CPU weights and KV cache."""
    if wanted.device == "cpu":
        read = sum(placed.memory.component(name).expected_bytes for name in ("weights", "KV cache"))
        return token_seconds(memory_of(size), read, stages)
    card = card_of((cut(size, intent.gpu_instance_profile) or size) if intent.gpu_instance_profile else size)
    return token_seconds(card, card.usable_bytes, stages)
