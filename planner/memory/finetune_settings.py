"""A fine-tuning run in the trainers' own words, and the same with every default resolved."""

from __future__ import annotations

from typing import Literal, NamedTuple

from pydantic import Field

from planner.catalog.trainers import LossHead, Trainer, trainer
from planner.errors import NotModelled, PlannerError
from planner.memory.activations import AttentionKernel, Kernels
from planner.memory.tape import Checkpointing
from planner.model import Frozen, LoraTargets, ModelSpec

Method = Literal["full", "lora", "qlora", "dora", "qdora"]
Optimizer = Literal[
    "adamw_torch",
    "adamw_torch_fused",
    "adamw_8bit",
    "paged_adamw_8bit",
    "paged_adamw_32bit",
    "adamw_4bit",
    "sgd",
    "sgd_momentum",
    "none",
]
Parallelism = Literal["none", "ddp", "zero1", "zero2", "zero3", "fsdp", "fsdp2"]
SHARDED: tuple[Parallelism, ...] = ("zero3", "fsdp", "fsdp2")  # a GPU holds only its part of the weights
Offload = Literal["optimizer", "parameters", "activations"]
Width = Literal["bf16", "fp16", "fp32"]
BaseQuantization = Literal["nf4", "nf4-double", "gptq4", "gptq8", "int8"]


class FinetuneSettings(Frozen):
    """One fine-tuning run, in the trainers' own words.

    method: full | lora | qlora | dora | qdora; trainer: a name of catalog/trainers.json, whose defaults None asks for
    seq_len: tokens of a sequence (packed or padded); micro_batch: sequences a GPU takes at once
    lora_rank, lora_targets: "all-linear", "attention", "default" or module names; adapter_dtype; lora_dropout
    trained_embeddings: embeddings and head are trained beside the adapter (modules_to_save)
    weights_dtype: of trained or frozen base weights; fp32 for full fine-tuning means fp32 masters under autocast
    base_quantization: of a frozen base (qlora); kbit_prepare: prepare_model_for_kbit_training's fp32 casts
    gradient_accumulation_steps: above 1 the gradients stay alive during forward and backward
    optimizer_in_backward: the step runs per parameter in the backward, so gradients never add up
    attention: flash, efficient (no S x S either), eager (S x S in memory); None: what the GPU allows
    parallelism, n_gpus, offload; task: sft or dpo (two sequences a sample and a reference model)
    """

    method: Method = "qlora"
    trainer: str = "trl"
    seq_len: int = Field(ge=1, le=1 << 26)
    micro_batch: int = Field(default=1, ge=1, le=1 << 16)
    lora_rank: int = Field(default=16, ge=1, le=1 << 14)
    lora_targets: LoraTargets = "all-linear"
    lora_dropout: float = Field(default=0.0, ge=0.0, lt=1.0)
    adapter_dtype: Width | None = None
    trained_embeddings: bool = False
    weights_dtype: Width = "bf16"
    base_quantization: BaseQuantization = "nf4-double"
    kbit_prepare: bool = False
    autocast: bool | None = None
    optimizer: Optimizer | None = None
    optimizer_in_backward: bool = False
    gradient_checkpointing: bool | None = None
    checkpointing: Checkpointing | None = None
    gradient_accumulation_steps: int = Field(default=1, ge=1)
    attention: AttentionKernel | None = None
    loss: LossHead | None = None
    kernels: Kernels | None = None
    parallelism: Parallelism = "none"
    n_gpus: int = Field(default=1, ge=1, le=1 << 16)
    offload: frozenset[Offload] = frozenset()
    task: Literal["sft", "dpo"] = "sft"


class Run(NamedTuple):
    """Settings with every default resolved."""

    settings: FinetuneSettings
    trainer: Trainer
    spec: ModelSpec
    trains_all: bool
    quantized: bool
    adapter_itemsize: int
    weight_itemsize: int
    optimizer: Optimizer
    loss: LossHead
    kernels: Kernels
    checkpointing: Checkpointing
    autocast: bool
    attention: AttentionKernel
    hopper: bool


DEQUANTIZED = ("mxfp4", "fp8")  # transformers unpacks these while loading: Mxfp4Config, FineGrainedFP8Config
_ITEMSIZE = {"bf16": 2, "fp16": 2, "fp32": 4}


def stored_base(spec: ModelSpec) -> BaseQuantization | None:
    """The base quantisation that adapters on a packed checkpoint find there; None for what is not modelled."""
    stored = spec.quantization
    if stored is None or stored.bits not in (4, 8):
        return None
    if stored.method == "gptq":
        return "gptq4" if stored.bits == 4 else "gptq8"
    if stored.method == "bitsandbytes":
        return "int8" if stored.bits == 8 else "nf4-double" if stored.double_quant else "nf4"
    return None


def packed_refusal(spec: ModelSpec, settings: FinetuneSettings) -> str:
    """Why this checkpoint cannot be trained on in that way, in one sentence; empty when it can."""
    stored = spec.quantization
    if stored is None or stored.method in DEQUANTIZED:
        return ""
    if settings.method in ("qlora", "qdora") and settings.base_quantization == stored_base(spec):
        return ""
    return (
        f"{spec.name} is stored as {stored.method}, and training it with {settings.method} is not modelled:"
        " name its 16-bit checkpoint"
    )


def resolve(spec: ModelSpec, settings: FinetuneSettings, bf16: bool, flash: bool, hopper: bool) -> Run:
    stack = trainer(settings.trainer)
    trains_all = settings.method == "full"
    quantized = settings.method in ("qlora", "qdora")
    refusal = packed_refusal(spec, settings)
    if refusal:
        raise NotModelled(refusal)
    if settings.weights_dtype == "bf16" and not bf16 and trains_all:
        raise PlannerError(
            "this GPU has no bf16, and fp16 weights cannot be trained in full: keep fp32 masters"
            " (--weights-dtype fp32), use LoRA, or take an Ampere or newer GPU"
        )
    if settings.parallelism == "none" and settings.n_gpus > 1:
        raise PlannerError(f"{settings.n_gpus} GPUs need a --parallelism: ddp, zero1, zero2, zero3, fsdp or fsdp2")
    if settings.weights_dtype == "fp16" and trains_all:
        raise PlannerError(
            "fp16 weights cannot be trained in full, their gradients leave its range: use --weights-dtype bf16 or fp32"
        )
    if "parameters" in settings.offload and settings.parallelism not in SHARDED:
        raise PlannerError("parameters are offloaded only by --parallelism zero3, fsdp or fsdp2: choose one of them")
    if settings.attention == "flash" and not flash:
        raise PlannerError(
            "this GPU has no FlashAttention 2: use --attention efficient (PyTorch's memory-efficient kernel) or eager"
        )
    attention: AttentionKernel = settings.attention or ("flash" if flash else "eager")
    # without bf16 the step runs in fp16, whose loss scaling takes no 16-bit gradients (torch amp/grad_scaler.py)
    narrow = quantized and bf16
    adapter = settings.adapter_dtype or (stack.adapter_on_quantized if narrow else "fp32")
    checkpointing: Checkpointing = "none"
    recomputes = settings.gradient_checkpointing
    if stack.checkpoints if recomputes is None else recomputes:
        default = "non_reentrant" if stack.checkpointing in ("none", "offloaded") else stack.checkpointing
        checkpointing = settings.checkpointing or default  # type: ignore[assignment]
    if "activations" in settings.offload and checkpointing == "none":
        raise NotModelled(
            "offloaded activations are modelled with gradient checkpointing alone: add --gradient-checkpointing"
        )
    return Run(
        settings=settings,
        trainer=stack,
        spec=spec,
        trains_all=trains_all,
        quantized=quantized,
        adapter_itemsize=_ITEMSIZE[adapter],
        weight_itemsize=_ITEMSIZE[settings.weights_dtype],
        optimizer=settings.optimizer or stack.optimizer,  # type: ignore[arg-type]
        loss=settings.loss or stack.loss,
        kernels=settings.kernels or Kernels(**stack.kernels),
        checkpointing=checkpointing,
        autocast=stack.autocast if settings.autocast is None else settings.autocast,
        attention=attention,
        hopper=hopper,
    )
