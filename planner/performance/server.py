"""A server as its clients meet it: a model on the GPUs of one replica, its step times, what its scheduler allows."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

from planner.catalog.engines import default_engine_version
from planner.catalog.hardware import Gpu, VmSku, link_bytes_per_s
from planner.catalog.serving_speed import (
    Kernel,
    ServingSpeed,
    SpeedEngine,
    architecture,
    matmul_peak,
    schedules_ahead,
    serving_speed,
    speed_engine,
)
from planner.errors import NotModelled, PlannerError
from planner.memory.serving import ServingMemory, ServingSettings, serving_memory
from planner.memory.weights import WeightScheme, weight_scheme
from planner.model import ModelSpec
from planner.performance.simulate import Limits, StepSeconds
from planner.performance.step import Speeds, StepParts, Work, step_parts, work_of


@dataclass(frozen=True)
class Link:
    """What joins the GPUs of a replica: its kind, and bytes per second each way."""

    kind: Literal["nvlink", "pcie"]
    bytes_per_s: float


@dataclass(frozen=True)
class Server:
    """One replica.

    memory: what its KV cache holds; speed: the constants that `speeds` was resolved from
    """

    spec: ModelSpec
    settings: ServingSettings
    card: Gpu
    link: Link | None
    work: Work
    speed: ServingSpeed
    speeds: Speeds
    memory: ServingMemory

    @cached_property
    def limits(self) -> Limits:
        """What vLLM's scheduler may put into a step, and the tokens that the KV cache holds."""
        return Limits(
            max_num_seqs=self.memory.max_num_seqs,
            max_num_batched_tokens=self.memory.max_num_batched_tokens,
            kv_tokens=self.memory.kv_tokens,
            prefill_first=self.speed.engine == "sglang",
        )

    @cached_property
    def step(self) -> StepSeconds:
        """The seconds of a step, quick for the simulation: what depends on the batch alone is remembered."""
        return quick_step(self.work, self.speeds)

    def parts(self, *, decode: float, context: float, prefill: float = 0, pairs: float = 0) -> StepParts:
        """The seconds of a step by cause."""
        return step_parts(self.work, self.speeds, decode=decode, context=context, prefill=prefill, pairs=pairs)


def server(
    spec: ModelSpec,
    settings: ServingSettings,
    card: Gpu,
    link: Link | None = None,
    *,
    engine: SpeedEngine | None = None,
    asynchronous: bool | None = None,
) -> Server:
    """One replica of a model over `settings.tensor_parallel_size` GPUs of a kind.

    asynchronous: asynchronous scheduling, None as the version does by default.
    Raises PlannerError where it does not fit or cannot be split, for cards without published peaks, and NotModelled
    for pipeline stages, cards of other makers and formats without a fitted kernel.
    """
    tp = settings.tensor_parallel_size
    if settings.pipeline_parallel_size > 1:
        raise NotModelled("the speed of pipeline stages is not modelled: use --tp, or take a larger GPU")
    if tp > 1 and link is None:
        raise PlannerError(f"the link between the {tp} GPUs is not known: name an Azure size with --sku")
    version = settings.engine_version or default_engine_version()
    family = engine or speed_engine("vllm", version)
    if asynchronous is None:
        asynchronous = schedules_ahead(family, version)
    scheme = weight_scheme(spec, settings.quantization)
    kernel = kernel_of(spec, scheme, card)
    speed = serving_speed(
        family, architecture(card), kernel, link.kind if link is not None else "nvlink", asynchronous=asynchronous
    )
    memory = serving_memory(
        spec,
        settings,
        usable_bytes=card.usable_bytes,
        compute_capability=card.capability,
        device_name=card.label,
    )
    work = work_of(
        spec,
        scheme,
        tensor_parallel_size=tp,
        kv_cache_dtype=settings.kv_cache_dtype,
        compute_capability=card.capability,
        engine_version=settings.engine_version,
    )
    return Server(
        spec=spec,
        settings=settings,
        card=card,
        link=link,
        work=work,
        speed=speed,
        speeds=speeds_of(speed, card, link, experts=spec.experts is not None, layers=spec.num_layers),
        memory=memory,
    )


def link_of(size: VmSku, tensor_parallel_size: int) -> Link | None:
    """The link inside a tensor-parallel group on an Azure size; None for one GPU. PlannerError where not published."""
    if tensor_parallel_size == 1:
        return None
    rate = link_bytes_per_s(size, tensor_parallel_size)
    if rate is None:
        raise PlannerError(
            f"how {size.short_name} joins {tensor_parallel_size} of its GPUs is not published:"
            " choose another --tp or size"
        )
    pcie = size.topology == "pcie" or (size.topology == "nvlink-pairs" and tensor_parallel_size > 2)
    return Link(kind="pcie" if pcie else "nvlink", bytes_per_s=rate)


def kernel_of(spec: ModelSpec, scheme: WeightScheme, card: Gpu) -> Kernel:
    """The matmul kernel that serves weights of a format on a card: weight-only where the card lacks the type.

    The 8-bit per-channel formats of compressed-tensors are FP8 or INT8 by what the checkpoint or the format is called.
    """
    stored = scheme.quantization
    if stored is None:
        return "16-bit"
    if stored.method in ("mxfp4", "nvfp4"):
        return stored.method  # type: ignore[return-value]
    if stored.method == "bitsandbytes":
        return "bitsandbytes"
    if stored.bits > 8:
        return "16-bit"
    if stored.bits == 8:
        if stored.method == "gptq" or stored.activation_bits == 16:
            return "int8-weight-only"
        named = f"{scheme.name} {spec.name} {stored.method}".lower()
        if stored.block is None and stored.group_size != 0 and "fp8" not in named:
            return "int8"
        if card.supports_fp8 != "native":
            return "fp8-weight-only"
        return "fp8-block" if stored.block is not None else "fp8"
    return "int4"


def speeds_of(speed: ServingSpeed, card: Gpu, link: Link | None, *, experts: bool, layers: int) -> Speeds:
    """The rates of step.Speeds: shares of the data sheet's figures, as fitted, times those figures.

    4-bit formats of experts (MXFP4, NVFP4 of a mixture of experts) leave the dense matrices in 16 bits.
    """
    bandwidth = card.bandwidth_bytes_per_s
    wide, narrow = matmul_peak(card, "16-bit"), matmul_peak(card, speed.kernel)
    packed_experts = experts and speed.kernel in ("mxfp4", "nvfp4")
    plain = _plain(speed)
    return Speeds(
        weight_bytes=bandwidth * (plain.weights if packed_experts else speed.weights),
        head_bytes=bandwidth * plain.weights,
        expert_bytes=bandwidth * speed.weights * speed.expert_weights,
        kv_bytes=bandwidth * speed.kv,
        elementwise_bytes=bandwidth * speed.elementwise,
        dense_flops=wide * plain.matmul if packed_experts else narrow * speed.matmul,
        head_flops=wide * plain.matmul,
        expert_flops=narrow * speed.matmul * min(1.0, speed.expert_matmul * grouped_share(wide)),
        attention_flops=wide * speed.attention,
        ramp_tokens=speed.ramp_tokens,
        step=speed.step_seconds,
        layer=speed.layer_seconds + (speed.expert_layer_seconds if experts else 0.0),
        mixed=layers * speed.mixed_layer_seconds,
        sequence=speed.sequence_seconds,
        link_latency=speed.reduction_seconds,
        link_bytes=link.bytes_per_s * speed.link if link is not None else 1.0,
        floor=speed.floor_seconds,
    )


def grouped_share(peak_flops: Any) -> Any:
    """How a card's peak scales what grouped matmuls attain of it: (10^15 / peak)^(1/2).

    Few rows for each expert keep a slow card busy more easily than a fast one. Number or array.
    """
    return (1e15 / peak_flops) ** 0.5


def _plain(speed: ServingSpeed) -> ServingSpeed:
    """The same engine and card with 16-bit weights."""
    if speed.kernel == "16-bit":
        return speed
    return serving_speed(speed.engine, speed.architecture, "16-bit", "nvlink")


def quick_step(work: Work, speeds: Speeds) -> StepSeconds:
    """step_parts(...).total as a plain function of numbers, for millions of calls.

    Of steps that only decode, all but the reading of the cache depends on the batch alone and is remembered.
    """
    known: dict[float, float] = {}
    windows = [(window.token_bytes / speeds.kv_bytes, window.reach) for window in work.windows]

    def step(decode: float, context: float, prefill: float, pairs: float, sampled: float) -> float:
        if prefill:
            parts = step_parts(
                work, speeds, decode=decode, context=context, prefill=prefill, pairs=pairs, sampled=sampled
            )
            return float(parts.total)
        fixed = known.get(decode)
        if fixed is None:
            fixed = known[decode] = float(step_parts(work, speeds, decode=decode, context=0).total)
        for seconds, reach in windows:
            fixed += seconds * min(context, decode * reach)
        return fixed

    return step
