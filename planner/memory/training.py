"""The memory of one fine-tuning step: torch's peak allocated bytes on one GPU, as a maximum over instants.

    peak = max over instants of ( weights + adapters + optimizer state + gradients then alive + activations then alive )

Instants: the optimizer step; the loss (its forward and its backward); the backward of the last layer (all checkpoints
or saved tensors alive, few gradients) and of the first (few checkpoints, all gradients). What a layer and the head
keep and take comes from `activations.py`; what a trainer fuses, chunks and casts by default from
`catalog/trainers.json`.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal, NamedTuple

from pydantic import Field

from planner.catalog.trainers import LossHead, Trainer, constant, trainer
from planner.errors import PlannerError
from planner.memory.activations import (
    AttentionKernel,
    HeadShape,
    Kernels,
    LayerShape,
    StepSettings,
    layer_shape,
    play_head,
    play_layer,
)
from planner.memory.estimate import Component, MemoryEstimate, exact
from planner.memory.tape import Checkpointing, StepBytes, run
from planner.model import Frozen, LoraTargets, ModelSpec, Tensor, adapter_parameters, lora_targets

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
    gradient_checkpointing: bool = True
    checkpointing: Checkpointing | None = None
    gradient_accumulation_steps: int = Field(default=1, ge=1)
    attention: AttentionKernel | None = None
    loss: LossHead | None = None
    kernels: Kernels | None = None
    packing: bool = True
    parallelism: Parallelism = "none"
    n_gpus: int = Field(default=1, ge=1, le=1 << 16)
    offload: frozenset[Offload] = frozenset()
    task: Literal["sft", "dpo"] = "sft"


class Instant(Frozen):
    """A moment of the step: its bytes by component, which sum to its total."""

    name: str
    parts: dict[str, int]

    @property
    def total_bytes(self) -> int:
        return sum(self.parts.values())


class TrainingMemory(Frozen):
    """The answer: the peak by component, every instant considered, and what the process takes beyond torch.

    allocated: peak of torch.cuda.max_memory_allocated; estimate adds allocator slack and the CUDA context.
    """

    allocated_bytes: int
    peak_instant: str
    instants: tuple[Instant, ...]
    estimate: MemoryEstimate
    trainable_parameters: int
    settings: FinetuneSettings
    notes: tuple[str, ...] = ()


class _Run(NamedTuple):
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


_ITEMSIZE = {"bf16": 2, "fp16": 2, "fp32": 4}
_SOURCE_STATE = "torch optim/adamw.py (exp_avg, exp_avg_sq; foreach keeps one temporary of the parameters' size)"
_SOURCE_TAPE = "byte tape of the reference layer (planner/memory/activations.py), held to a fake-tensor trace"


def training_memory(
    spec: ModelSpec,
    settings: FinetuneSettings,
    *,
    supports_bf16: bool = True,
    supports_flash_attention: bool = True,
    compute_capability: str = "8.0",
) -> TrainingMemory:
    """Peak bytes of one fine-tuning step on one GPU, by component, with the instant that sets it.

    Formula: maximum over instants of static + gradients + activations then alive (module docstring).
    supports_bf16: False on T4 and V100, where 16 bits means fp16 and full fine-tuning needs fp32 masters.
    supports_flash_attention: without it the eager kernel's S x S scores are paid unless another kernel is asked for.
    Raises PlannerError when the run cannot exist, NotModelled when no formula here covers it.
    """
    job = _resolve(spec, settings, supports_bf16, supports_flash_attention, compute_capability)
    static = _static_bytes(job)
    tapes = _play(job)
    instants = _instants(job, static, tapes)
    peak = max(instants, key=lambda instant: instant.total_bytes)
    estimate = _estimate(job, peak, static)
    return TrainingMemory(
        allocated_bytes=peak.total_bytes,
        peak_instant=peak.name,
        instants=instants,
        estimate=estimate,
        trainable_parameters=static.trainable,
        settings=settings,
        notes=_notes(job),
    )


def _resolve(spec: ModelSpec, settings: FinetuneSettings, bf16: bool, flash: bool, capability: str) -> _Run:
    stack = trainer(settings.trainer)
    trains_all = settings.method == "full"
    quantized = settings.method in ("qlora", "qdora")
    if settings.weights_dtype == "bf16" and not bf16 and trains_all:
        raise PlannerError(
            "this GPU has no bf16, and fp16 weights cannot be trained in full: keep fp32 masters"
            " (--weights-dtype fp32), use LoRA, or take an Ampere or newer GPU"
        )
    if settings.parallelism == "none" and settings.n_gpus > 1:
        raise PlannerError(f"{settings.n_gpus} GPUs need a --parallelism: ddp, zero1, zero2, zero3, fsdp or fsdp2")
    if quantized and settings.parallelism in ("zero1", "zero2") and settings.offload & {"parameters"}:
        raise PlannerError("parameters are offloaded only by zero3 or fsdp: choose one of them")
    if settings.attention == "flash" and not flash:
        raise PlannerError(
            "this GPU has no FlashAttention 2: use --attention efficient (PyTorch's memory-efficient kernel) or eager"
        )
    attention: AttentionKernel = settings.attention or ("flash" if flash else "eager")
    adapter = settings.adapter_dtype or (stack.adapter_on_quantized if quantized else "fp32")
    checkpointing: Checkpointing = "none"
    if settings.gradient_checkpointing:
        default = "non_reentrant" if stack.checkpointing in ("none", "offloaded") else stack.checkpointing
        checkpointing = settings.checkpointing or default  # type: ignore[assignment]
    return _Run(
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
        hopper=capability.split(".")[0] in ("9", "10", "12"),
    )


# --- what does not depend on the tokens -------------------------------------------------------------------------------


class _Static(NamedTuple):
    """Bytes on one GPU that the instants share, and the gradients and temporaries that some of them add."""

    trainable: int
    weights: int
    adapters: int
    optimizer: int
    gradients: int
    step_scratch: int
    gathered_root: int
    gathered_layer: int
    buckets: int
    reference: int
    workspace: int


def _static_bytes(job: _Run) -> _Static:
    spec, s = job.spec, job.settings
    adapters = sum(n for _, n in _adapter_tensors(job))
    embeddings = sum(t.parameters for t in spec.tensors if t.part in ("embedding", "lm_head"))
    trained_base = spec.parameter_count if job.trains_all else embeddings if s.trained_embeddings else 0
    base = base_weight_bytes(job)
    # modules_to_save keeps the frozen original and trains a copy
    copies = embeddings * job.weight_itemsize if s.trained_embeddings and not job.trains_all else 0
    n = s.n_gpus
    zero3 = s.parallelism in ("zero3", "fsdp", "fsdp2")
    shard_weights = n if zero3 else 1
    weights = -(-base // shard_weights) + -(-copies // shard_weights)
    adapter_bytes = adapters * job.adapter_itemsize
    trained: list[tuple[int, int]] = [(adapters, job.adapter_itemsize), (trained_base, job.weight_itemsize)]
    optimizer = sum(optimizer_state_bytes(job.optimizer, count, itemsize) for count, itemsize in trained)
    gradients = sum(count * itemsize for count, itemsize in trained)
    scratch = sum(_step_scratch_bytes(job.optimizer, count, itemsize) for count, itemsize in trained)
    if s.parallelism.startswith("zero"):
        # DeepSpeed keeps 16-bit working weights, and fp32 masters and states of its own
        count = adapters + trained_base
        optimizer = 12 * count
        gradients = 2 * count
        scratch = 4 * count  # the fp32 copy of the partition's gradients
        if job.trains_all:
            weights = -(-2 * spec.parameter_count // shard_weights)
    shard_state = n if zero3 or s.parallelism in ("zero1", "zero2") else 1
    optimizer = -(-optimizer // shard_state)
    scratch = -(-scratch // shard_state)
    if zero3 or s.parallelism == "zero2":
        gradients = -(-gradients // n)
    adapter_bytes = -(-adapter_bytes // shard_weights)
    buckets = 0
    if s.parallelism == "ddp":  # gradient buckets beside the gradients
        buckets = gradients
    elif s.parallelism.startswith("zero"):  # two buckets (overlap_comm) of 16 bits, whatever there is to reduce
        buckets = 2 * 2 * int(constant("deepspeed_bucket_elements")["value"])
    if "optimizer" in s.offload:
        optimizer = scratch = 0
    if "parameters" in s.offload:  # and with them their gradients
        weights = adapter_bytes = gradients = 0
    if s.optimizer_in_backward:
        largest = max((t.elements for t in spec.tensors), default=0)
        gradients = scratch = 0
        buckets += largest * job.weight_itemsize * (2 if job.optimizer == "adamw_torch" else 1)
    root, layer = _gathered_bytes(job) if zero3 else (0, 0)
    reference = 0
    if s.task == "dpo" and job.trains_all:
        reference = -(-spec.parameter_count * 2 // shard_weights)
    workspace = constant("cublas_workspace_bytes")
    return _Static(
        trainable=adapters + trained_base,
        weights=weights,
        adapters=adapter_bytes,
        optimizer=optimizer,
        gradients=gradients,
        step_scratch=scratch,
        gathered_root=root,
        gathered_layer=layer,
        buckets=buckets,
        reference=reference,
        workspace=int(workspace["hopper" if job.hopper else "value"]) * int(workspace["handles"]),
    )


def _adapter_tensors(job: _Run) -> Iterable[tuple[Tensor, int]]:
    """Each adapted matrix family with the adapter's parameters: rank * (in + out), and out magnitudes for DoRA."""
    s = job.settings
    if job.trains_all:
        return
    for tensor in lora_targets(job.spec, s.lora_targets):
        magnitudes = tensor.shape[0] * tensor.count if s.method in ("dora", "qdora") else 0
        yield tensor, adapter_parameters(job.spec, tensor, s.lora_rank) + magnitudes


def base_weight_bytes(job: _Run) -> int:
    """Bytes of the base model's weights, whole, before any sharding.

    16-bit or fp32: parameters * itemsize. NF4: linear weights at half a byte, one absmax per 64 weights (fp32; with
    double quantisation one byte and an fp32 per 256 of those); embeddings, head and norms keep 16 bits, or 32 where
    prepare_model_for_kbit_training casts them. GPTQ: packed weights, fp16 scales, packed zeros and the group index.
    Source: bitsandbytes functional.py quantize_4bit; AutoGPTQ qlinear_cuda.py; peft prepare_model_for_kbit_training.
    """
    total = 0
    for tensor in job.spec.tensors:
        if job.quantized and _is_quantized(job, tensor):
            total += tensor.count * quantized_bytes(tensor.shape, job.settings.base_quantization)
        elif job.quantized:
            wide = job.settings.kbit_prepare and tensor.part not in ("vision",)
            total += tensor.parameters * (4 if wide else 2)
        else:
            total += tensor.parameters * job.weight_itemsize
    return total


def _is_quantized(job: _Run, tensor: Tensor) -> bool:
    if len(tensor.shape) < 2 or tensor.part in ("embedding", "lm_head"):
        return False
    if tensor.part == "expert":
        return tensor.linear or job.trainer.experts_are_linear
    if tensor.part == "router":
        return job.trainer.experts_are_linear
    return tensor.linear


def quantized_bytes(shape: tuple[int, ...], scheme: BaseQuantization) -> int:
    """Bytes of one quantised matrix (out, in): see base_weight_bytes."""
    count = 1
    for size in shape:
        count *= size
    if scheme in ("gptq4", "gptq8"):
        bits = 4 if scheme == "gptq4" else 8
        groups = -(-shape[-1] // 128) * (count // shape[-1])
        return count * bits // 8 + groups * 2 + groups * bits // 8 + 4 * shape[-1]
    if scheme == "int8":  # LLM.int8: one fp32 scale a row
        return count + 4 * (count // shape[-1])
    nf4 = constant("nf4")
    absmax = -(-count // int(nf4["block"]))
    if scheme == "nf4":
        return -(-count // 2) + 4 * absmax + 64
    return -(-count // 2) + absmax + 4 * -(-absmax // int(nf4["absmax_block"])) + 64 + 1024 + 4


def optimizer_state_bytes(optimizer: Optimizer, parameters: int, itemsize: int) -> int:
    """State of `parameters` trained parameters of `itemsize` bytes.

    AdamW keeps two moments in the parameters' own width; 8-bit ones a byte each and one fp32 per 256; 4-bit half a
    byte each and one fp32 per 128. Paged states live in managed memory that torch does not allocate: 0 here.
    Source: torch optim/adamw.py, bitsandbytes optim/optimizer.py, torchao optim/subclass_4bit.py.
    """
    if optimizer in ("adamw_torch", "adamw_torch_fused"):
        return 2 * itemsize * parameters
    if optimizer == "adamw_8bit":
        return 2 * parameters + 2 * 4 * -(-parameters // int(constant("bnb_blockwise_state")["block"]))
    if optimizer == "adamw_4bit":
        return parameters + 2 * 4 * -(-parameters // int(constant("torchao_4bit_state")["block"]))
    if optimizer == "sgd_momentum":
        return itemsize * parameters
    return 0


def _step_scratch_bytes(optimizer: Optimizer, parameters: int, itemsize: int) -> int:
    """foreach AdamW takes the square roots of all second moments at once; fused kernels take nothing."""
    return itemsize * parameters if optimizer == "adamw_torch" else 0


def _gathered_bytes(job: _Run) -> tuple[int, int]:
    """What a fully sharded run gathers at a time: (embeddings, head and final norm; one decoder layer), 16 bits."""
    spec = job.spec
    root = sum(2 * t.parameters for t in spec.tensors if t.part in ("embedding", "lm_head"))
    per_layer = 0
    for tensor in spec.tensors:
        if tensor.part in ("embedding", "lm_head", "vision", "projector"):
            continue
        if job.quantized and _is_quantized(job, tensor):
            size = tensor.count * quantized_bytes(tensor.shape, job.settings.base_quantization)
        else:
            size = 2 * tensor.parameters
        per_layer += size
    return root, per_layer // spec.num_layers


# --- what the tokens cost ---------------------------------------------------------------------------------------------


class _Layer(NamedTuple):
    many: int
    bytes: StepBytes


class _Tapes(NamedTuple):
    tokens: int
    checkpoint: int
    layers: tuple[_Layer, ...]
    head: StepBytes
    embedding_gradient: int


def _play(job: _Run) -> _Tapes:
    spec, s = job.spec, job.settings
    sequences = s.micro_batch * (2 if s.task == "dpo" else 1)
    tokens = sequences * s.seq_len
    fp32_stream = (job.trains_all and job.weight_itemsize == 4) or (s.kbit_prepare and not job.autocast)
    sharded_masters = s.parallelism.startswith("fsdp")  # FSDP's mixed precision hands the layers 16-bit weights
    step = StepSettings(
        tokens=tokens,
        seq_len=s.seq_len,
        trains_weights=job.trains_all,
        residual_itemsize=4 if fp32_stream and not sharded_masters else 2,
        weight_itemsize=4 if job.weight_itemsize == 4 and not sharded_masters else 2,
        grad_itemsize=4 if job.weight_itemsize == 4 and not sharded_masters else 2,
        autocast=job.autocast,
        lora_rank=0 if job.trains_all else s.lora_rank,
        lora_targets=frozenset(tensor.name for tensor, _ in _adapter_tensors(job)),
        lora_itemsize=4 if job.adapter_itemsize == 4 else 2,
        lora_dropout=s.lora_dropout > 0,
        dora=s.method in ("dora", "qdora"),
        quantized=job.quantized,
        attention=job.attention,
        kernels=job.kernels,
        trains_head=job.trains_all or s.trained_embeddings,
    )
    layers = []
    norm = "rms"
    for shape, count in _layer_kinds(spec):
        norm = shape.norm
        layers.append(
            _Layer(count, run(play_layer(shape, step, checkpointed=job.checkpointing != "none"), job.checkpointing))
        )
    head = HeadShape(hidden=spec.hidden_size, vocab=spec.vocab_size, softcap=spec.logit_softcap, norm=norm)
    checkpoint = step.residual_itemsize * spec.hidden_size * tokens
    embedding = step.grad_itemsize * spec.vocab_size * spec.hidden_size if step.trains_head else 0
    return _Tapes(tokens, checkpoint, tuple(layers), run(play_head(head, step, job.loss)), embedding)


def _layer_kinds(spec: ModelSpec) -> list[tuple[LayerShape, int]]:
    """Distinct layers and how many there are: by attention kind, and dense or MoE."""
    kinds = []
    moe_layers = spec.experts.layers if spec.experts else 0
    dense_layers = spec.num_layers - moe_layers
    for group in spec.layers:
        if not moe_layers:
            kinds.append((layer_shape(spec, group), group.count))
            continue
        moe = round(group.count * moe_layers / spec.num_layers)
        if moe:
            kinds.append((layer_shape(spec, group, dense=False), moe))
        if dense_layers and group.count > moe:
            kinds.append((layer_shape(spec, group), group.count - moe))
    return kinds


def _instants(job: _Run, static: _Static, tapes: _Tapes) -> tuple[Instant, ...]:
    s = job.settings
    layers = sum(layer.many for layer in tapes.layers)
    base = {
        "weights": static.weights,
        "adapters": static.adapters,
        "optimizer state": static.optimizer,
        "reference model": static.reference,
        "workspace": static.workspace,
        "communication": static.buckets,
    }
    gathered = static.gathered_root
    carried = static.gradients if s.gradient_accumulation_steps > 1 else 0
    offloaded = "activations" in s.offload or (job.trainer.checkpointing == "offloaded" and job.checkpointing != "none")
    checkpointed = job.checkpointing != "none"

    # an adapter run under reentrant checkpointing keeps one more residual stream than it has layers
    extra = (
        int(constant("reentrant_adapter_streams")["value"])
        if job.checkpointing == "reentrant" and not job.trains_all
        else 0
    )

    def kept(count: int) -> int:
        if not checkpointed:
            return 0
        return tapes.checkpoint * (min(count, 2) if offloaded else count + extra)

    casts = sum(layer.many * layer.bytes.casts for layer in tapes.layers) if checkpointed else 0
    saved = 0 if checkpointed else sum(layer.many * layer.bytes.saved for layer in tapes.layers)
    head_kept = tapes.head.kept
    # FSDP1 hooks of frozen layers hold each layer's input, and its gradient, until the backward ends
    frozen_fsdp = s.parallelism == "fsdp" and not job.trains_all and checkpointed
    skipped = int(constant("fsdp_frozen_layers_not_held")["value"])
    held = tapes.checkpoint * (layers + max(0, layers - skipped)) if frozen_fsdp else 0
    worst = max(tapes.layers, key=lambda layer: layer.bytes.backward_peak).bytes
    # gradients when the first layer's backward starts: all but its own and those of an untied embedding
    untied = 0 if job.spec.tied_embeddings else tapes.embedding_gradient
    own = worst.kept if worst.kept else static.gradients // max(1, layers)
    late = max(0, static.gradients - (own + untied) // _grad_shards(job))
    widest_forward = max(layer.bytes.forward_peak for layer in tapes.layers)
    widest_saved = max(layer.bytes.saved for layer in tapes.layers)

    def instant(name: str, gradients: int, activations: int, transient: int, *, layer_gather: bool = False) -> Instant:
        parts = dict(base)
        parts["gathered weights"] = gathered + (static.gathered_layer if layer_gather else 0)
        parts["gradients"] = gradients
        parts["activations"] = activations
        parts["working"] = transient
        return Instant(name=name, parts={key: value for key, value in parts.items() if value})

    step = dict(base)
    step["gradients"] = static.gradients
    step["step temporaries"] = static.step_scratch
    result = [Instant(name="optimizer step", parts={key: value for key, value in step.items() if value})]
    result.append(instant("loss, forward", carried, kept(layers) + saved + casts, tapes.head.forward_peak))
    result.append(instant("loss, backward", carried, kept(layers) + saved, tapes.head.backward_peak))
    if checkpointed:
        result.append(
            instant(
                "backward of the last layer",
                carried + head_kept,
                kept(layers),
                worst.backward_peak,
                layer_gather=True,
            )
        )
        result.append(
            instant(
                "backward of the first layer",
                max(carried, late),
                held or kept(1),
                worst.backward_peak,
                layer_gather=True,
            )
        )
    else:
        result.append(
            instant("forward of the last layer", carried, saved - widest_saved, widest_forward, layer_gather=True)
        )
        result.append(
            instant(
                "backward of the last layer",
                carried + head_kept,
                saved - widest_saved,
                worst.backward_peak,
                layer_gather=True,
            )
        )
        result.append(
            instant(
                "backward of the first layer",
                max(carried, late),
                0,
                worst.backward_peak,
                layer_gather=True,
            )
        )
    if tapes.embedding_gradient:
        tied = tapes.embedding_gradient if job.spec.tied_embeddings else 0
        result.append(instant("backward of the embedding", static.gradients, 0, tied + tapes.checkpoint))
    return tuple(result)


def _grad_shards(job: _Run) -> int:
    return job.settings.n_gpus if job.settings.parallelism in ("zero2", "zero3", "fsdp", "fsdp2") else 1


# --- the answer -------------------------------------------------------------------------------------------------------

_FORMULAS: dict[str, tuple[str, str]] = {
    "weights": ("parameters x bytes each / shards; quantised linear weights at 4 bits + scales", "base_weight_bytes"),
    "adapters": ("rank x (in + out) summed over adapted matrices x bytes each", "peft tuners/lora/layer.py"),
    "optimizer state": ("two moments in the trained parameters' width (8-bit: 1 byte each)", _SOURCE_STATE),
    "reference model": ("a second copy of the weights, frozen, 16 bits", "trl trainer/dpo_trainer.py"),
    "workspace": ("cuBLAS workspaces, one for the forward thread and one for autograd's", "pytorch CUDABlas"),
    "communication": ("gradient buckets", "torch DDP reducer; deepspeed zero/stage_1_and_2.py"),
    "gathered weights": ("embeddings, head and the layer at work, gathered from all shards", "FSDP, ZeRO-3"),
    "gradients": ("trained parameters x bytes each that have one at this instant", "torch autograd"),
    "activations": ("checkpoints: hidden x tokens x layers x bytes, or all saved tensors", _SOURCE_TAPE),
    "working": ("the layer or loss head at work: recomputed tensors and gradients on the way", _SOURCE_TAPE),
    "step temporaries": ("square roots of all second moments at once (foreach)", _SOURCE_STATE),
}


def _estimate(job: _Run, peak: Instant, static: _Static) -> MemoryEstimate:
    s = job.settings
    inputs: dict[str, int | float | str] = {
        "model": job.spec.name,
        "seq_len": s.seq_len,
        "micro_batch": s.micro_batch,
        "trainable_parameters": static.trainable,
        "loss": job.loss,
        "optimizer": job.optimizer,
        "instant": peak.name,
    }
    components = []
    for name, size in peak.parts.items():
        formula, source = _FORMULAS[name]
        components.append(exact(name, size, formula, source, inputs))
    slack = constant("fragmentation_fraction")
    moving = sum(peak.parts.get(name, 0) for name in ("activations", "working", "gradients", "step temporaries"))
    components.append(
        Component(
            name="allocator slack",
            low_bytes=int(moving * float(slack["low"])),
            expected_bytes=int(moving * float(slack["expected"])),
            high_bytes=int(moving * float(slack["high"])),
            formula="a share of what comes and goes that the caching allocator cannot reuse",
            inputs={"moving_bytes": moving, "expected_fraction": slack["expected"]},
            source=str(slack["source"]),
        )
    )
    context = constant("cuda_context_bytes")
    components.append(
        Component(
            name="CUDA context",
            low_bytes=int(context["low"]),
            expected_bytes=int(context["expected"]),
            high_bytes=int(context["high"]),
            formula="the CUDA context and loaded kernels, outside torch's allocator",
            inputs={},
            source=str(context["source"]),
        )
    )
    return MemoryEstimate(components=tuple(components), peak_instant=peak.name, not_modelled=_not_modelled(job))


def _not_modelled(job: _Run) -> tuple[str, ...]:
    missing = ["torch.compile's fusions", "memory of data loading and of evaluation with generation"]
    if job.optimizer.startswith("paged"):
        missing.append("paged optimizer states, which live in managed memory and move to the GPU when there is room")
    return tuple(missing)


def _notes(job: _Run) -> tuple[str, ...]:
    notes = []
    if job.attention == "eager":
        notes.append(
            "the attention scores are materialised (S x S); --attention efficient or a GPU with FlashAttention 2"
            " removes them"
        )
    if job.quantized and job.spec.experts and not job.trainer.experts_are_linear:
        notes.append("transformers 5 stores routed experts as one parameter that bitsandbytes leaves in 16 bits")
    if any(t.part == "vision" for t in job.spec.tensors):
        notes.append("the vision tower counts as weights; activations are those of text tokens")
    return tuple(notes)
