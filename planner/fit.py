"""A workload on a GPU: what fits, with what parallelism, how far the context reaches, and what would fit instead."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from decimal import Decimal
from typing import Any, Literal

from planner.catalog.engines import constant, engine, quantization_formats
from planner.catalog.hardware import Gpu, VmSku, gpu_of, skus, tensor_parallel_options
from planner.catalog.mig import CutSku, card_of
from planner.errors import PlannerError
from planner.memory.serving import ServingMemory, ServingSettings, serving_memory
from planner.memory.training import FinetuneSettings, TrainingMemory, training_memory
from planner.model import Frozen, ModelSpec
from planner.units import format_gib, format_tokens

PRICED_IN = "eastus"  # the region by whose prices remedies are compared
Task = Literal["serve", "finetune"]
Settings = ServingSettings | FinetuneSettings


def default_headroom(task: Task) -> float:
    """The share of a GPU to leave free: none for serving (vLLM budgets itself) and 5 % for training."""
    return 0.0 if task == "serve" else 0.05


class Place(Frozen):
    """Where a workload could run: GPUs of one kind, in a VM size or on a desk.

    gpus: how many of them the workload uses; available: how many there are; of a size cut by MIG, its devices
    """

    gpu: Gpu
    sku: VmSku | None
    gpus: int
    available: int

    @property
    def label(self) -> str:
        """`NC24ads_A100_v4`, or the card's own name at a desk; with the number of GPUs where it is not one."""
        name = self.sku.short_name if self.sku else self.gpu.label
        return name if self.gpus == 1 else f"{name}, {self.gpus} GPUs"


class Fit(Frozen):
    """The workload fits.

    settings: with the parallelism chosen; needed_bytes, usable_bytes: on the fullest GPU
    headroom_bytes: what stays free; largest_context: the longest that still fits here, in tokens
    """

    place: Place
    settings: Settings
    memory: ServingMemory | TrainingMemory
    needed_bytes: int
    usable_bytes: int
    largest_context: int

    @property
    def headroom_bytes(self) -> int:
        return self.usable_bytes - self.needed_bytes


class Remedy(Frozen):
    """A change with which it would fit. flags: what to add to the command line; needed_bytes: on one GPU then.

    usd_per_hour: of the VM on demand in PRICED_IN, None at a desk or without a price there
    """

    change: str
    flags: str
    needed_bytes: int
    place: str
    usd_per_hour: Decimal | None = None


class Misfit(Frozen):
    """The workload does not fit, or cannot run there (reason).

    component: the largest part of what is needed; missing_bytes: how much too little a GPU has
    """

    place: Place
    component: str
    needed_bytes: int
    usable_bytes: int
    missing_bytes: int
    largest_context: int
    reason: str = ""
    memory: ServingMemory | TrainingMemory | None = None


def candidates(*, retired: bool = False) -> tuple[VmSku, ...]:
    """The Azure sizes a plan may choose, smallest first: by GPU memory in the VM, then vCPUs, then RAM."""
    sizes = [size for size in skus() if size.plannable and (retired or size.status in ("available", "preview"))]
    return tuple(sorted(sizes, key=_size_key))


def _size_key(size: VmSku) -> tuple[Any, ...]:
    card = gpu_of(size)
    confidential = size.short_name.startswith("NCC")
    unsure = size.aks_supported != "yes"
    preview = size.status != "available"
    memory = card.usable_bytes * (size.gpu_count or 0)
    return (preview, unsure, memory, confidential, size.vcpu or 0, size.ram_gib or 0, size.name)


def check_card(spec: ModelSpec, settings: Settings, card: Gpu) -> None:
    """Refuses in one sentence what the card cannot run: its quantisation, its KV type, or a model without fp16."""
    if isinstance(settings, FinetuneSettings):
        if not card.is_cuda and settings.method in ("qlora", "qdora"):
            raise PlannerError(f"bitsandbytes' 4-bit training on {card.label} is not modelled: take an NVIDIA card")
        return
    if not card.supports_bf16 and _needs_bf16(spec):
        raise PlannerError(
            f"{card.label} has no bf16 and vLLM refuses fp16 for {spec.architecture} (its activations overflow):"
            " take an Ampere or newer card"
        )
    lowest = engine(settings.engine_version).minimum_compute_capability
    if card.is_cuda and card.capability < lowest:
        raise PlannerError(
            f"vLLM {engine(settings.engine_version).version} needs compute capability {lowest[0]}.{lowest[1]} and"
            f" {card.label} has {card.compute_capability}: take a newer card, or --engine-version 0.19.0"
        )
    if card.is_cuda and any(group.kind == "mla" for group in spec.layers):
        lowest = tuple(constant("minimum_capability_mla"))
        if card.capability < lowest:
            raise PlannerError(
                f"{card.label} (compute capability {card.compute_capability}) cannot run vLLM's multi-head latent"
                f" attention, which {spec.name} needs: take an Ampere or newer card"
            )
    method = spec.quantization.method if spec.quantization else settings.quantization
    minimum = _minimum_capability(method)
    if card.is_cuda and minimum and card.capability < minimum:
        raise PlannerError(
            f"{card.label} (compute capability {card.compute_capability}) cannot run {method} weights, which need"
            f" {minimum[0]}.{minimum[1]}: use 16-bit weights, gptq, or a newer card"
        )
    stored = spec.quantization.kv_bits if spec.quantization else None
    if (settings.kv_cache_dtype.startswith("fp8") or stored == 8) and card.supports_fp8 == "no":
        advice = f"{spec.name} stores its KV cache in it" if stored == 8 else "leave --kv-cache-dtype at auto"
        raise PlannerError(f"{card.label} has no FP8: {advice}, or take an Ada, Hopper or newer card")


def _needs_bf16(spec: ModelSpec) -> bool:
    return spec.architecture.removesuffix("_text") in constant("float16_refused")


def _minimum_capability(method: str | None) -> tuple[int, int] | None:
    """The lowest compute capability whose kernels take the format, None for 16-bit weights and formats not listed."""
    formats = quantization_formats()
    name = formats[method].quantization.method if method in formats else method
    table: dict[str, list[int]] = constant("minimum_capability")
    found = table.get(name or "")
    return (found[0], found[1]) if found else None


def demand(spec: ModelSpec, settings: Settings, card: Gpu) -> ServingMemory | TrainingMemory:
    """The memory of the workload on one GPU of that kind; PlannerError when the card cannot run it."""
    check_card(spec, settings, card)
    if isinstance(settings, ServingSettings):
        return serving_memory(
            spec,
            settings,
            usable_bytes=card.usable_bytes,
            compute_capability=card.capability,
            device_name=card.label,
        )
    return training_memory(
        spec,
        settings,
        supports_bf16=card.supports_bf16,
        supports_flash_attention=card.supports_flash_attention_2 is not False,
        compute_capability=card.compute_capability,
    )


def needed_bytes(memory: ServingMemory | TrainingMemory) -> int:
    """Bytes wanted of one GPU.

    Serving: what lies outside the utilization budget (all that vLLM does not manage) plus the demand inside it.
    Fine-tuning: the expected peak with allocator slack and CUDA context.
    """
    return memory.estimate.expected_bytes


def slack_bytes(memory: ServingMemory | TrainingMemory, usable_bytes: int, headroom: float) -> int:
    """What is left of one GPU once that share of it is kept free; negative when it does not fit.

    Serving: KV cache that vLLM finds - the KV cache of the wanted sequences. Fine-tuning: usable - expected peak, with
    allocator slack and CUDA context.
    """
    spare = round(usable_bytes * headroom)
    if isinstance(memory, ServingMemory):
        return memory.kv_bytes - spare - memory.estimate.component("KV cache").expected_bytes
    return usable_bytes - spare - needed_bytes(memory)


def try_place(
    spec: ModelSpec, settings: Settings, place: Place, *, headroom: float = 0.0, search_context: bool = True
) -> Fit | Misfit:
    """The workload on exactly this place, parallelism as set. A refusal becomes a Misfit with its reason."""
    card = place.gpu
    try:
        memory = demand(spec, settings, card)
    except PlannerError as error:
        return Misfit(
            place=place,
            component="",
            needed_bytes=0,
            usable_bytes=card.usable_bytes,
            missing_bytes=0,
            largest_context=0,
            reason=str(error),
        )
    longest = largest_context(spec, settings, card, memory, headroom=headroom) if search_context else 0
    needed = needed_bytes(memory)
    slack = slack_bytes(memory, card.usable_bytes, headroom)
    if slack >= 0:
        return Fit(
            place=place,
            settings=settings,
            memory=memory,
            needed_bytes=needed,
            usable_bytes=card.usable_bytes,
            largest_context=longest,
        )
    return Misfit(
        place=place,
        component=limiting_component(memory),
        needed_bytes=needed,
        usable_bytes=card.usable_bytes,
        missing_bytes=-slack,
        largest_context=longest,
        memory=memory,
    )


def limiting_component(memory: ServingMemory | TrainingMemory) -> str:
    """The largest component of the demand, in the estimate's own word."""
    return max(memory.estimate.components, key=lambda part: part.expected_bytes).name


def with_context(settings: Settings, tokens: int) -> Settings:
    """The same workload at another context length."""
    if isinstance(settings, ServingSettings):
        return settings.model_copy(update={"max_model_len": tokens})
    return settings.model_copy(update={"seq_len": tokens})


def context_of(settings: Settings) -> int:
    return settings.max_model_len if isinstance(settings, ServingSettings) else settings.seq_len


def largest_context(
    spec: ModelSpec,
    settings: Settings,
    card: Gpu,
    memory: ServingMemory | TrainingMemory | None = None,
    *,
    headroom: float = 0.0,
) -> int:
    """The longest context, in tokens up to the model's own, at which the workload still fits on that GPU; 0 for none.

    Searched, for memory grows with the context (a property test holds it).
    """
    if isinstance(settings, ServingSettings) and isinstance(memory, ServingMemory):
        # in chunked prefill the activation peak does not depend on the context, and the pool alone decides
        chunked = not engine(settings.engine_version).whole_prompt_batches
        if chunked and settings.concurrency == 1 and not headroom:
            return memory.max_context
    return _reach(spec, settings, card, 1, max(spec.max_context, context_of(settings)), headroom)


def _last_that_fits(slack: Callable[[int], int], limit: int) -> int:
    """The largest n in 0 .. limit with slack(n) >= 0, for a slack that falls with n; 0 when there is none.

    Memory is nearly linear in the context, so every other probe interpolates, and the rest halve the bracket.
    """
    low, high = 1, limit
    low_slack = slack(low)
    if low_slack < 0:
        return 0
    high_slack = slack(high)
    if high_slack >= 0:
        return high
    interpolate = True
    while high - low > 1:
        middle = (low + high) // 2
        if interpolate:
            middle = low + (high - low) * low_slack // (low_slack - high_slack)
            middle = min(max(middle, low + 1), high - 1)
        found = slack(middle)
        # a probe that moved the bracket by less than half is followed by one that halves it
        interpolate = not interpolate or (high - middle if found >= 0 else middle - low) * 2 < high - low
        if found >= 0:
            low, low_slack = middle, found
        else:
            high, high_slack = middle, found
    return low


def with_gpus(settings: Settings, gpus: int) -> Settings:
    """The workload over so many GPUs: tensor parallel inside each pipeline stage, fully sharded when fine-tuning."""
    if isinstance(settings, ServingSettings):
        return settings.model_copy(update={"tensor_parallel_size": max(1, gpus // settings.pipeline_parallel_size)})
    if settings.parallelism != "none":
        return settings.model_copy(update={"n_gpus": gpus})
    return settings.model_copy(update={"parallelism": "fsdp2" if gpus > 1 else "none", "n_gpus": gpus})


def gpus_of(settings: Settings) -> int:
    if isinstance(settings, ServingSettings):
        return settings.tensor_parallel_size * settings.pipeline_parallel_size
    return settings.n_gpus


def spread_flags(settings: Settings) -> str:
    """The options that say over how many GPUs the workload spreads, for a refusal's advice."""
    if isinstance(settings, ServingSettings):
        return "--tp or --pp"
    return "--tp" if settings.parallelism == "none" else "--n-gpus"


def gpu_options(settings: Settings, size: VmSku, gpus: int | None = None) -> tuple[int, ...]:
    """How many GPUs of one VM the workload may use.

    Exactly `gpus`, or as many as a stated training parallelism asks for, else all that its pipeline stages divide.
    Of MIG devices one: a process sees no more, and NCCL joins none.
    """
    stages = settings.pipeline_parallel_size if isinstance(settings, ServingSettings) else 1
    if isinstance(settings, FinetuneSettings) and (settings.parallelism != "none" or settings.n_gpus > 1):
        gpus = settings.n_gpus
    options = (gpus,) if gpus else tensor_parallel_options(size)
    most = 1 if isinstance(size, CutSku) else size.gpu_count or 0
    return tuple(count for count in options if count <= most and count % stages == 0)


def fit_size(
    spec: ModelSpec,
    settings: Settings,
    size: VmSku,
    *,
    headroom: float = 0.0,
    gpus: int | None = None,
    search_context: bool = True,
) -> Fit | Misfit:
    """The smallest parallelism with which the workload fits on one VM of that size, else the Misfit of the largest.

    gpus: exactly so many instead. search_context: False leaves largest_context of a Fit at 0, which is quicker.
    Raises PlannerError where the size cannot be planned.
    """
    card = card_of(size)
    available = size.gpu_count or 0
    options = gpu_options(settings, size, gpus)
    if not options:
        wanted = gpus or gpus_of(settings)
        raise PlannerError(
            f"{size.short_name} has {available} GPU{'s' if available > 1 else ''}, not {wanted}:"
            f" lower {spread_flags(settings)}, or take a larger size"
        )
    last: Fit | Misfit | None = None
    for count in options:
        place = Place(gpu=card, sku=size, gpus=count, available=available)
        outcome = try_place(spec, with_gpus(settings, count), place, headroom=headroom, search_context=False)
        if isinstance(outcome, Fit):
            return try_place(spec, outcome.settings, place, headroom=headroom) if search_context else outcome
        if last is None or not outcome.reason or (isinstance(last, Misfit) and last.reason):
            last = outcome
    assert last is not None
    return last


def fit_gpu(spec: ModelSpec, settings: Settings, card: Gpu, *, headroom: float = 0.0) -> Fit | Misfit:
    """The workload on cards of that kind outside any VM, with the parallelism that the settings name."""
    count = gpus_of(settings)
    return try_place(spec, settings, Place(gpu=card, sku=None, gpus=count, available=count), headroom=headroom)


def smallest(
    spec: ModelSpec,
    settings: Settings,
    sizes: Iterable[VmSku] | None = None,
    *,
    headroom: float = 0.0,
    gpus: int | None = None,
) -> Fit | None:
    """The smallest Azure size on which it fits, or None. gpus: only with exactly that many GPUs of a VM."""
    for size in candidates() if sizes is None else sizes:
        if not gpu_options(settings, size, gpus):
            continue
        outcome = fit_size(spec, settings, size, headroom=headroom, gpus=gpus)
        if isinstance(outcome, Fit):
            return outcome
    return None


class Step(Frozen):
    """From which context on an Azure size is the smallest that fits: from_tokens .. to_tokens."""

    place: str
    from_tokens: int
    to_tokens: int


def ladder(
    spec: ModelSpec,
    settings: Settings,
    *,
    headroom: float = 0.0,
    gpus: int | None = None,
    limit: int | None = None,
) -> tuple[Step, ...]:
    """Where the smallest size that fits changes as the context grows, up to the model's own or `limit`.

    Each size's largest context is found by bisection; a size stays on the ladder while no smaller one reaches as far.
    """
    limit = limit or spec.max_context
    steps: list[Step] = []
    reached = 0
    for size in candidates():
        if reached >= limit:
            break
        card, available = gpu_of(size), size.gpu_count or 0
        options = gpu_options(settings, size, gpus)
        for count in reversed(options):  # the most GPUs reach furthest; some models cannot be split so far
            longest = _reach(spec, with_gpus(settings, count), card, reached + 1, limit, headroom)
            if longest:
                fewest = next(
                    n for n in options if _reach(spec, with_gpus(settings, n), card, longest, longest, headroom)
                )
                place = Place(gpu=card, sku=size, gpus=fewest, available=available)
                steps.append(Step(place=place.label, from_tokens=reached + 1, to_tokens=longest))
                reached = longest
                break
    return tuple(steps)


def _reach(spec: ModelSpec, settings: Settings, card: Gpu, at_least: int, limit: int, headroom: float) -> int:
    """The longest context up to `limit` that fits on the card, 0 when not even `at_least` does."""

    def slack(tokens: int) -> int:
        try:
            memory = demand(spec, with_context(settings, at_least + tokens - 1), card)
        except PlannerError:
            return -1
        return slack_bytes(memory, card.usable_bytes, headroom)

    found = _last_that_fits(slack, limit - at_least + 1)
    return at_least + found - 1 if found else 0


Change = tuple[str, str, Callable[[Any], Any]]

_SERVING_CHANGES: tuple[Change, ...] = (
    ("FP8 KV cache", "--kv-cache-dtype fp8", lambda s: s.model_copy(update={"kv_cache_dtype": "fp8"})),
    ("int4 weights (AWQ)", "--quantization awq", lambda s: s.model_copy(update={"quantization": "awq"})),
    ("FP8 weights", "--quantization fp8", lambda s: s.model_copy(update={"quantization": "fp8"})),
    (
        "int4 weights and FP8 KV cache",
        "--quantization awq --kv-cache-dtype fp8",
        lambda s: s.model_copy(update={"quantization": "awq", "kv_cache_dtype": "fp8"}),
    ),
    (
        "a smaller prefill batch",
        "--max-num-batched-tokens 2048 --max-num-seqs 64",
        lambda s: s.model_copy(update={"max_num_batched_tokens": 2048, "max_num_seqs": 64}),
    ),
    (
        "more of the GPU for vLLM",
        "--gpu-memory-utilization 0.95",
        lambda s: s.model_copy(update={"gpu_memory_utilization": 0.95}),
    ),
    ("one sequence at a time", "--concurrency 1", lambda s: s.model_copy(update={"concurrency": 1})),
)
_FINETUNE_CHANGES: tuple[Change, ...] = (
    (
        "gradient checkpointing",
        "--gradient-checkpointing",
        lambda s: s.model_copy(update={"gradient_checkpointing": True}),
    ),
    ("a chunked loss", "--loss chunked", lambda s: s.model_copy(update={"loss": "chunked"})),
    ("micro-batch 1", "--micro-batch 1", lambda s: s.model_copy(update={"micro_batch": 1})),
    (
        "the memory-efficient attention kernel",
        "--attention efficient",
        lambda s: s.model_copy(update={"attention": "efficient"}),
    ),
    ("an 8-bit optimizer", "--optimizer adamw_8bit", lambda s: s.model_copy(update={"optimizer": "adamw_8bit"})),
    ("LoRA", "--method lora", lambda s: s.model_copy(update={"method": "lora"})),
    ("QLoRA", "--method qlora", lambda s: s.model_copy(update={"method": "qlora"})),
    (
        "QLoRA with checkpointing, chunked loss and micro-batch 1",
        "--method qlora --gradient-checkpointing --loss chunked --micro-batch 1",
        lambda s: s.model_copy(
            update={"method": "qlora", "gradient_checkpointing": True, "loss": "chunked", "micro_batch": 1}
        ),
    ),
)


def remedies(spec: ModelSpec, misfit: Misfit, settings: Settings, *, headroom: float = 0.0) -> tuple[Remedy, ...]:
    """What would fit instead, nearest first: a change on the same GPU, more of its GPUs, the smallest larger size."""
    changes = _SERVING_CHANGES if isinstance(settings, ServingSettings) else _FINETUNE_CHANGES
    found: list[Remedy] = []
    place = misfit.place
    chosen = with_gpus(settings, place.gpus) if place.sku else settings
    spread = _spread(settings, place.gpus) if place.sku else ""
    for change, flags, alter in changes:
        altered = alter(chosen)
        if altered == chosen or _already(spec, flags):
            continue
        outcome = try_place(spec, altered, place, headroom=headroom, search_context=False)
        if isinstance(outcome, Fit) and all(outcome.needed_bytes != known.needed_bytes for known in found):
            found.append(
                Remedy(
                    change=change,
                    flags=flags + spread,
                    needed_bytes=outcome.needed_bytes,
                    place=place.label,
                    usd_per_hour=_usd_per_hour(place.sku),
                )
            )
        if len(found) == 3:
            break
    if place.sku is None and isinstance(settings, ServingSettings):
        for count in (2, 4, 8):
            if count <= place.gpus or count % settings.pipeline_parallel_size:
                continue
            more = Place(gpu=place.gpu, sku=None, gpus=count, available=count)
            outcome = try_place(spec, with_gpus(settings, count), more, headroom=headroom, search_context=False)
            if isinstance(outcome, Fit):
                found.append(
                    Remedy(
                        change=f"{count} of these GPUs",
                        flags=_spread(settings, count).strip(),
                        needed_bytes=outcome.needed_bytes,
                        place=more.label,
                    )
                )
                break
    alone = settings if isinstance(settings, FinetuneSettings) else with_gpus(settings, settings.pipeline_parallel_size)
    larger = smallest(spec, alone, headroom=headroom)
    if larger is not None:
        sku = larger.place.sku
        assert sku is not None
        instead = " in place of --gpu" if place.sku is None else ""
        found.append(
            Remedy(
                change=f"a larger size ({larger.place.gpu.label}){instead}",
                flags=f"--sku {sku.short_name}{_spread(settings, larger.place.gpus)}",
                needed_bytes=larger.needed_bytes,
                place=larger.place.label,
                usd_per_hour=_usd_per_hour(sku),
            )
        )
    return tuple(found)


def _usd_per_hour(size: VmSku | None) -> Decimal | None:
    """The on-demand price of a size in PRICED_IN; the sheet is read only where something does not fit."""
    from planner.catalog.prices import load_sheet

    return None if size is None else load_sheet().rate(size.name, PRICED_IN, "on-demand")


def _spread(settings: Settings, gpus: int) -> str:
    """` --tp 4` where the workload spreads over GPUs and its own options do not say so yet."""
    if isinstance(settings, ServingSettings):
        gpus //= settings.pipeline_parallel_size
    elif settings.parallelism != "none":
        return ""
    return f" --tp {gpus}" if gpus > 1 else ""


def _already(spec: ModelSpec, flags: str) -> bool:
    """A quantised checkpoint cannot be quantised again."""
    return spec.quantization is not None and "--quantization" in flags


def misfit_sentence(spec: ModelSpec, misfit: Misfit, tokens: int) -> str:
    """One sentence: what is too big, by how much, where."""
    if misfit.reason:
        return misfit.reason
    where = f"{spec.name} at {format_tokens(tokens)} tokens does not fit on {misfit.place.label}"
    memory = misfit.memory
    if isinstance(memory, ServingMemory):
        share = f"{memory.gpu_memory_utilization:g} of the GPU"
        budget = f"the {format_gib(memory.budget_bytes)} that vLLM may use ({share})"
        wanted = memory.estimate.component("KV cache").expected_bytes
        if memory.kv_bytes <= 0:
            taken = memory.budget_bytes - memory.kv_bytes
            return f"{where}: weights and activations alone take {format_gib(taken)} of {budget}"
        return f"{where}: {budget} leaves {format_gib(memory.kv_bytes)} for a KV cache of {format_gib(wanted)}"
    assert memory is not None
    size = memory.estimate.component(misfit.component).expected_bytes
    return (
        f"{where}: it needs {format_gib(misfit.needed_bytes)} of {format_gib(misfit.usable_bytes)} a GPU and some to"
        f" spare, {format_gib(misfit.missing_bytes)} too much; the largest part is {misfit.component}"
        f" ({format_gib(size)})"
    )
