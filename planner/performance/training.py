"""Speed of fine-tuning: seconds of a micro-batch and of an optimizer step on one GPU, by component.

    micro-batch = smooth maximum of (GPU time, CPU time of launching it) + exchange that does not hide behind it
    GPU time    = products / (matmul_fraction x peak) + weights read / bandwidth + attention + loss head + adapters
                  + element-wise bytes / bandwidth + unpacking of the frozen weights
    step        = gradient_accumulation_steps x micro-batch + optimizer + exchange once a step

`training_work.py` counts operations and bytes; catalog/training_speed.json has what cards reach, and how it was fitted.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from math import exp
from typing import Any

from planner.catalog.hardware import Gpu
from planner.catalog.training_speed import CardFamily, card_family, fitted, speed_constants, speed_sources
from planner.errors import NotModelled, PlannerError
from planner.memory.finetune_settings import FinetuneSettings, resolve
from planner.model import Frozen, ModelSpec
from planner.performance.training_work import TrainingWork, training_work

__all__ = ["SpeedPart", "SpeedRange", "TrainingSpeed", "training_speed"]

MFU_CONVENTION = (
    "operations the step needs / (seconds x dense 16-bit peak): 6 a matrix weight and token for full fine-tuning, 4"
    " with frozen weights, and attention over the keys a token sees; what checkpointing repeats does not count"
)


class SpeedRange(Frozen):
    """A figure from its low to its high end; the ends are what the fit's left-out measurements allow."""

    low: float
    expected: float
    high: float


class SpeedPart(Frozen):
    """One line of an optimizer step: its expected seconds, the formula, inputs and source behind it."""

    name: str
    seconds: float
    formula: str
    inputs: dict[str, float | int | str]
    source: str


class TrainingSpeed(Frozen):
    """How fast a run trains on one kind of card.

    micro_batch_seconds, step_seconds: of one micro-batch, and of an optimizer step with all of its micro-batches
    tokens_per_s_per_gpu: of all tokens in the batch, padding too; samples_per_s: sequences of all GPUs together
    mfu: see MFU_CONVENTION; matmul_fraction: the share of the peak that products reach here, which MFU cannot exceed
    parts: of one optimizer step; they sum to step_seconds.expected
    extrapolated: no training was measured on a card of this kind
    """

    gpu: str
    n_gpus: int
    tokens_per_micro_batch: int
    micro_batch_seconds: SpeedRange
    step_seconds: SpeedRange
    tokens_per_s_per_gpu: SpeedRange
    samples_per_s: SpeedRange
    mfu: SpeedRange
    matmul_fraction: float
    parts: tuple[SpeedPart, ...]
    extrapolated: bool
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Card:
    """What of a card and its links decides, in operations and bytes a second; usable_bytes: of its memory."""

    peak_flops: float
    fp32_flops: float
    bandwidth: float
    pcie: float
    link: float
    matmul_fraction: float
    attention_fraction: float
    usable_bytes: float


def training_speed(
    spec: ModelSpec,
    settings: FinetuneSettings,
    card: Gpu,
    *,
    link_bytes_per_s: float | None = None,
    compiled: bool = False,
    recomputed: float | None = None,
    sample_tokens: int | None = None,
) -> TrainingSpeed:
    """Seconds, tokens a second and MFU of a fine-tuning run, with the components behind them.

    link_bytes_per_s: each way between the GPUs, PCIe where it is not given; compiled: under torch.compile
    recomputed: share of the forward that selective checkpointing repeats (None: as the settings say)
    sample_tokens: of one sample where several are packed in a sequence (None: a sequence is one sample)
    Formula: module docstring. Raises PlannerError for a run that cannot exist, NotModelled for what no formula covers.
    """
    return _training_speed(spec, settings, card, link_bytes_per_s, compiled, recomputed, sample_tokens)


@lru_cache(maxsize=1024)
def _training_speed(
    spec: ModelSpec,
    settings: FinetuneSettings,
    gpu: Gpu,
    link: float | None,
    compiled: bool,
    recomputed: float | None,
    sample_tokens: int | None,
) -> TrainingSpeed:
    family = card_family(gpu.name)
    card = card_of(gpu, family, link)
    hopper = gpu.is_cuda and gpu.capability[0] >= 9
    job = resolve(spec, settings, gpu.supports_bf16, gpu.supports_flash_attention_2 is not False, hopper)
    work = training_work(job, compiled=compiled, recomputed=recomputed, sample_tokens=sample_tokens)
    if "activations" in settings.offload and work.recomputed == 0:
        raise NotModelled("activations are offloaded with gradient checkpointing alone: add --gradient-checkpointing")
    kind = trainer_kind(job.trainer.name, compiled)
    seconds = step_parts(work, card, kind, speed_constants())
    step = sum(seconds.values())
    once = seconds["optimizer"] + seconds["paging"] + seconds["exchange once a step"]
    spread = exp(fitted().extrapolated_log_spread if family.extrapolated else fitted().log_spread)
    tokens = work.tokens * work.accumulation
    sequences = settings.micro_batch * settings.gradient_accumulation_steps * settings.n_gpus
    peak = work.useful_flops * work.accumulation / card.peak_flops
    return TrainingSpeed(
        gpu=gpu.name,
        n_gpus=settings.n_gpus,
        tokens_per_micro_batch=work.tokens,
        micro_batch_seconds=_slower((step - once) / work.accumulation, spread),
        step_seconds=_slower(step, spread),
        tokens_per_s_per_gpu=_faster(tokens / step, spread),
        samples_per_s=_faster(sequences / step, spread),
        mfu=_capped(_faster(peak / step, spread), family.matmul_cap),
        matmul_fraction=family.matmul_fraction,
        parts=tuple(_explained(name, value, work, card, family) for name, value in seconds.items() if value > 0),
        extrapolated=family.extrapolated,
        notes=_notes(gpu, family, compiled),
    )


def card_of(gpu: Gpu, family: CardFamily, link: float | None) -> Card:
    """A card's rates: bf16 where it has it, else fp16. Raises NotModelled where the data sheet has neither."""
    tflops = gpu.bf16_tflops or gpu.fp16_tflops
    if tflops is None:
        raise NotModelled(
            f"training speed on {gpu.label} is not modelled: its 16-bit matmul rate is not in the catalog"
        )
    if link is not None and link <= 0:
        raise PlannerError(f"a link of {link:g} bytes a second moves nothing: give the rate of one direction")
    return Card(
        peak_flops=tflops * 1e12,
        fp32_flops=family.fp32_tflops[gpu.name] * 1e12,
        bandwidth=float(gpu.bandwidth_bytes_per_s),
        pcie=float(gpu.pcie_bytes_per_s),
        link=float(link or gpu.pcie_bytes_per_s),
        matmul_fraction=family.matmul_fraction,
        attention_fraction=family.attention_fraction,
        usable_bytes=float(gpu.usable_bytes),
    )


def trainer_kind(trainer: str, compiled: bool) -> str:
    """How much CPU time a trainer needs for a layer: compiled, fused (Unsloth), lean (plain PyTorch models), eager."""
    if compiled:
        return "compiled"
    return {"unsloth": "fused", "torchtune": "lean", "litgpt": "lean"}.get(trainer, "eager")


def step_parts(work: TrainingWork, card: Card, kind: str, k: Mapping[str, Any]) -> dict[str, float]:
    """Seconds of each component of one optimizer step; k: the constants, which a calibration may vary."""
    matmul = card.matmul_fraction * card.peak_flops
    bandwidth = k["bandwidth_fraction"] * card.bandwidth
    fp32 = card.matmul_fraction * card.fp32_flops
    forward = work.layer_flops / matmul + work.layer_bytes / bandwidth
    backward = work.weight_passes * forward
    attention = (
        work.attention_flops * (1 + work.recomputed + k["flash_backward"]) / (card.attention_fraction * card.peak_flops)
    )
    attention += work.score_bytes / bandwidth
    elementwise = (k["eager_traffic"] * work.eager_bytes + k["fused_traffic"] * work.fused_bytes) / bandwidth
    head = work.head_passes * (work.head_flops / (fp32 if work.head_fp32 else matmul) + work.head_bytes / bandwidth)
    head += work.logit_bytes / bandwidth
    adapters = work.adapter_flops / (fp32 if work.adapter_fp32 else matmul) + work.adapter_bytes / bandwidth
    passes = 2 + work.recomputed
    unpacked = 0.0
    if work.packing:
        unpacked = passes * k["unpacked_bytes"] * work.packed_weights / (k[f"{work.packing}_fraction"] * card.bandwidth)
    reference = work.reference_passes * (forward + work.attention_flops / (card.attention_fraction * card.peak_flops))
    gpu = forward * (1 + work.recomputed) + backward + attention + elementwise + head + adapters + unpacked + reference
    decomposed = k["dora_factor"] * gpu if work.weight_decomposed else 0.0
    gpu += decomposed
    cpu = work.launches * (
        work.launch_layers * k["layer_launch_seconds"] * k["trainer_launches"][kind]
        + work.launch_adapters * k["adapter_launch_seconds"] * k["trainer_launches"][kind]
    )
    cpu += work.gathers * k["shard_launch_seconds"]
    power = k["smooth_maximum"]
    computing = (gpu**power + cpu**power) ** (1 / power)
    link = k["link_fraction"] * card.link
    exchanged = work.exchanged_bytes / link
    # managed memory: what does not fit beside the weights is fetched for the step and written back
    paged = 2 * max(0.0, min(work.paged_bytes, work.paged_bytes + work.resident_bytes - card.usable_bytes))
    copied = work.offloaded_bytes / (k["pcie_fraction"] * card.pcie)
    hidden = k["overlap_fraction"]
    n = work.accumulation
    return {
        "forward": n * forward,
        "backward": n * backward,
        "recomputation": n * forward * work.recomputed,
        "attention": n * attention,
        "element-wise kernels": n * elementwise,
        "loss head": n * head,
        "adapters": n * adapters,
        "unpacking of weights": n * unpacked,
        "reference model": n * reference,
        "weight decomposition": n * decomposed,
        "waiting for launches": n * (computing - gpu),
        "exchange between GPUs": n * _exposed(exchanged, computing, hidden),
        "offload": n * _exposed(copied, computing, hidden) + work.pcie_bytes / (k["pcie_fraction"] * card.pcie),
        "exchange once a step": _exposed(work.step_exchanged_bytes / link, computing, hidden),
        "paging": _exposed(paged / (k["pcie_fraction"] * card.pcie), computing, hidden),
        "optimizer": work.optimizer_bytes / bandwidth + work.cpu_parameters / k["cpu_adam_parameters_per_s"],
    }


def _exposed(transfer: float, computing: float, hidden: float) -> float:
    """What of a transfer computation does not hide: (1 - hidden) of it, and all beyond the computation's own time."""
    return max((1 - hidden) * transfer, transfer - computing)


def _slower(seconds: float, spread: float) -> SpeedRange:
    return SpeedRange(low=seconds / spread, expected=seconds, high=seconds * spread)


_faster = _slower  # the same band around a rate


def _capped(value: SpeedRange, cap: float) -> SpeedRange:
    """No card exceeds the best matmul that was measured on it."""
    return SpeedRange(low=value.low, expected=min(value.expected, cap), high=min(value.high, cap))


_EXPLAINED: dict[str, tuple[str, tuple[str, ...], tuple[str, ...]]] = {
    "forward": (
        "2 x tokens x matrix weights / (matmul_fraction x peak) + 16-bit weights / (bandwidth_fraction x bandwidth)",
        ("tokens", "layer_flops", "layer_bytes", "matmul_fraction", "peak_flops", "bandwidth", "accumulation"),
        ("sustained_fraction", "bandwidth_fraction"),
    ),
    "backward": (
        "the forward once for the inputs' gradients, and once more for the weights' where they are trained",
        ("weight_passes",),
        ("sustained_fraction",),
    ),
    "recomputation": (
        "the forward once more for what gradient checkpointing does not keep",
        ("recomputed",),
        ("sustained_fraction",),
    ),
    "attention": (
        "2 heads (head_dim + value_dim) x keys that a token sees, forward and 2.5 times backward / (attention_fraction"
        " x peak); S x S scores at 24 B a pass where they are materialised",
        ("attention_flops", "attention_fraction", "score_bytes"),
        ("flash_backward", "bandwidth_fraction"),
    ),
    "element-wise kernels": (
        "bytes of norms, rotary embedding, activation and residual sums, all passes / (bandwidth_fraction x bandwidth)",
        ("eager_bytes", "fused_bytes", "bandwidth"),
        ("eager_traffic", "fused_traffic", "bandwidth_fraction"),
    ),
    "loss head": (
        "tokens x vocabulary x hidden, forward and backward, and the bytes that the loss moves a logit",
        ("head_flops", "head_passes", "logit_bytes"),
        ("logit_bytes",),
    ),
    "adapters": (
        "two thin products a matrix, and reading, casting, scaling and adding what goes in and out",
        ("adapter_flops", "adapter_bytes"),
        ("bandwidth_fraction",),
    ),
    "unpacking of weights": (
        "half a byte read and two written a packed weight in each pass / (its fraction x bandwidth)",
        ("packing", "packed_weights"),
        ("nf4_fraction", "gptq_fraction", "gptq_plain_fraction"),
    ),
    "reference model": ("a forward of the frozen copy", ("reference_passes",), ("sustained_fraction",)),
    "weight decomposition": ("DoRA's share on top of the GPU's time", (), ("dora_factor",)),
    "waiting for launches": (
        "(GPU^4 + CPU^4)^(1/4) - GPU; CPU: launches of every layer's and adapter's kernels, hooks of sharded layers",
        ("launch_layers", "launch_adapters", "launches", "gathers"),
        ("layer_launch_seconds", "adapter_launch_seconds", "shard_launch_seconds", "backward_launches"),
    ),
    "exchange between GPUs": (
        "bytes received / (link_fraction x link), less what hides behind computation",
        ("exchanged_bytes", "link"),
        ("overlap_fraction", "link_fraction"),
    ),
    "offload": (
        "bytes copied / (pcie_fraction x PCIe), less what hides behind computation",
        ("offloaded_bytes", "pcie_bytes", "pcie"),
        ("pcie_fraction",),
    ),
    "exchange once a step": (
        "bytes of the all-reduce / (link_fraction x link), less what hides behind the last micro-batch",
        ("step_exchanged_bytes", "link"),
        ("overlap_fraction", "link_fraction"),
    ),
    "paging": (
        "2 x optimizer states that do not fit beside the weights / (pcie_fraction x PCIe), less what hides behind"
        " computation",
        ("paged_bytes", "resident_bytes", "usable_bytes", "pcie"),
        ("pcie_fraction",),
    ),
    "optimizer": (
        "parameters, gradients and moments read and written, and clipping / (bandwidth_fraction x bandwidth)",
        ("optimizer_bytes", "cpu_parameters"),
        ("optimizer_bytes",),
    ),
}
"""formula, the inputs it uses, and the constants whose values and sources are quoted, by component"""
_BY_FAMILY = ("forward", "backward", "recomputation", "attention", "reference model")  # and by the card's own rates


def _explained(name: str, seconds: float, work: TrainingWork, card: Card, family: CardFamily) -> SpeedPart:
    formula, used, constants = _EXPLAINED[name]
    facts, values = {**vars(work), **vars(card)}, speed_constants()
    inputs = {key: facts[key] for key in used}
    inputs |= {key: values[key] for key in constants if isinstance(values[key], int | float)}
    sources = [speed_sources(constants)] if constants else []
    if name in _BY_FAMILY:
        sources.append(f"{family.name}: {family.source}")
    return SpeedPart(name=name, seconds=seconds, formula=formula, inputs=inputs, source="; ".join(sources))


def _notes(gpu: Gpu, family: CardFamily, compiled: bool) -> tuple[str, ...]:
    notes = []
    if family.extrapolated:
        notes.append(
            f"no training speed was measured on a card like {gpu.label}: its matmul rate is taken from elsewhere, and"
            " the range is wider"
        )
    if gpu.bf16_tflops is None:
        notes.append(f"{gpu.label} has no bf16: the rate is fp16's, under loss scaling")
    if family.name.startswith("geforce"):
        notes.append("GeForce cards sum products in fp32 at the rate of the data sheet's fp32-accumulate line")
    if compiled:
        notes.append("torch.compile's own time at the start is not counted")
    return tuple(notes)
