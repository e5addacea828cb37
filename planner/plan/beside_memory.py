"""What a lock keeps of a workload beside its memory: worked out of the intent, the plan and the assumptions."""

from __future__ import annotations

from decimal import ROUND_CEILING, Decimal

from planner.catalog import load_model
from planner.catalog.assumptions import assumption
from planner.catalog.hardware import Gpu, VmSku, machine
from planner.catalog.mig import card_of, cut
from planner.catalog.platform import platform
from planner.cost.cluster import OS_DISK_GIB
from planner.errors import PlannerError
from planner.memory.serving_parts import QUANTIZED_AT_START, ServingSettings
from planner.memory.training import FinetuneSettings
from planner.memory.weights import weight_bytes, weight_scheme
from planner.model import ModelSpec
from planner.performance.training import training_speed
from planner.plan.cpu import memory_of
from planner.plan.intent import FinetuneWorkload, Intent, ServeWorkload, model_of, settings_of
from planner.plan.result import Placed, Plan
from planner.plan.serving import Cache, Serving, check_extension, read_rate, token_seconds, tool_parser
from planner.plan.training import Training, runs_of
from planner.units import format_gib


def serving_of(wanted: ServeWorkload, placed: Placed, plan: Plan, intent: Intent) -> Serving:
    """What a lock keeps of a server beside its memory.

    PlannerError for weights that no disk of its machine holds, and for an extended context of which vLLM is not told.
    """
    spec, settings = model_of(intent, wanted), settings_of(wanted)
    assert isinstance(settings, ServingSettings)
    own = load_model(wanted.model or intent.model).max_context
    check_extension(wanted.name, spec, wanted.context, own, wanted.hf_overrides)
    size = _machine(placed, plan)
    stored = _stored_bytes(spec, settings)
    cache = int(assumption("compiled_code_bytes").high) + (stored * 11 // 10 if wanted.weights == "hub" else 0)
    place = _disk(_cut(size, intent), cache, placed.gpus // wanted.machines, wanted.replicas)
    if place is None:
        raise PlannerError(
            f"{wanted.name}: {format_gib(stored)} of weights do not fit on the disks of a {size.short_name}: put them"
            " into the storage account and set weights: blob, from where they are read as they are needed"
        )
    # a CPU takes its time for each token, and nobody waits an hour for a server to stop
    usual = assumption("answer_tokens").low if wanted.device == "cpu" else assumption("answer_tokens").expected
    parser = wanted.tool_call_parser or tool_parser(spec.name, spec.architecture)
    return Serving(
        machines=wanted.machines,
        device=wanted.device,
        weights=wanted.weights,
        stored_bytes=stored,
        cache_bytes=cache,
        cache=place,
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


def _machine(placed: Placed, plan: Plan) -> VmSku:
    return machine(next(pool for pool in plan.pools if pool.name == placed.pool).sku)


def _cut(size: VmSku, intent: Intent) -> VmSku:
    """A size as its pods see it: with MIG devices for GPUs where the intent cuts them."""
    return (cut(size, intent.gpu_instance_profile) or size) if intent.gpu_instance_profile else size


def _disk(size: VmSku, needed_bytes: int, gpus: int, most: int) -> Cache | None:
    """Where a pod's files lie: on the system disk while pods may fill that far, else on NVMe disks; None: nowhere.

    gpus: of a pod, by which others of its workload may share the machine; most: of them there are no more
    """
    pods = min(most, max((size.gpu_count or 1) // gpus, 1)) if gpus else 1
    disks: tuple[tuple[Cache, int], ...] = (("disk", OS_DISK_GIB), ("nvme", size.local_nvme_gib or 0))
    for place, disk_gib in disks:
        if needed_bytes * pods <= int(disk_gib * platform().shares["disk"]) << 30:
            return place
    return None


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
    card = card_of(_cut(size, intent))
    return token_seconds(card, card.usable_bytes, stages)


def training_of(wanted: FinetuneWorkload, placed: Placed, plan: Plan, intent: Intent) -> Training:
    """What a lock keeps of a fine-tuning workload beside its memory. PlannerError where no disk of a machine holds it.

    disk = the model's files + (checkpoints kept + the one that is written) x checkpoint + result + run_files_bytes
    """
    spec, kept = model_of(intent, wanted), intent.storage.checkpoints_kept or 1
    size = _machine(placed, plan)
    card = card_of(_cut(size, intent))
    stored = weight_bytes(spec, weight_scheme(spec))
    weights = placed.memory.component("weights").expected_bytes
    result = max(stored, weights) if wanted.method == "full" else placed.checkpoint_bytes
    disk = stored + (kept + 1) * placed.checkpoint_bytes + result + int(assumption("run_files_bytes").high)
    runs = runs_of(wanted.name, wanted.replicas, wanted.recipe, wanted.runs)
    cache = _disk(_cut(size, intent), disk, placed.gpus // wanted.machines, len(runs))
    if cache is None:
        raise PlannerError(
            f"{wanted.name}: a run needs {format_gib(disk)} of disk for the model, {kept + 1} checkpoints and the"
            f" result, and its share of a {size.short_name} has less: keep fewer (storage.checkpoints_kept), train an"
            " adapter, or name a size with NVMe disks in skus"
        )
    peak = card.bf16_tflops if card.supports_bf16 else card.fp16_tflops
    return Training(
        machines=wanted.machines,
        runs=runs,
        weights=wanted.weights,
        queue=wanted.queue,
        disk_bytes=disk,
        cache=cache,
        micro_batch_seconds=_micro_batch_seconds(spec, wanted, placed, card),
        write_bytes_per_second=int(assumption("checkpoint_write_bytes_per_s").low),
        save_seconds=int(assumption("checkpoint_fixed_seconds").high),
        flops_per_second=None if peak is None else round(peak * 1e12),
    )


def _micro_batch_seconds(spec: ModelSpec, wanted: FinetuneWorkload, placed: Placed, card: Gpu) -> Decimal | None:
    """Of the longest micro batch, at most; None where no speed is modelled."""
    settings = settings_of(wanted)
    assert isinstance(settings, FinetuneSettings)
    chosen = {name: placed.settings[name] for name in ("attention", "parallelism") if name in placed.settings}
    try:
        speed = training_speed(spec, settings.model_copy(update=chosen | {"n_gpus": placed.gpus}), card)
    except PlannerError:
        return None
    return Decimal(speed.micro_batch_seconds.high).quantize(Decimal("0.001"), ROUND_CEILING)
