"""The memory of one fine-tuning step: torch's peak allocated bytes on one GPU, as a maximum over instants.

    peak = max over instants of ( weights + adapters + optimizer state + gradients then alive + activations then alive )

Instants: the optimizer step; the loss (its forward and its backward); the backward of the last layer (all checkpoints
or saved tensors alive, few gradients) and of the first (few checkpoints, all gradients). What a layer and the head
keep and take comes from `layer_tape.py` and `head_tape.py`; what a trainer fuses, chunks and casts by default from
`catalog/trainers.json`.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

from planner.catalog.trainers import constant
from planner.memory.activations import HeadShape, LayerShape, StepSettings, layer_shape
from planner.memory.estimate import Component, MemoryEstimate, exact
from planner.memory.finetune_settings import SHARDED, FinetuneSettings, Run, resolve
from planner.memory.head_tape import play_head
from planner.memory.layer_tape import play_layer
from planner.memory.tape import StepBytes, run
from planner.memory.training_state import Static, adapter_tensors, static_bytes
from planner.model import Frozen, ModelSpec

__all__ = ["FinetuneSettings", "Instant", "TrainingMemory", "training_memory"]


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


_SOURCE_STATE = "torch optim/adamw.py (exp_avg, exp_avg_sq; foreach keeps one temporary of the parameters' size)"
_SOURCE_TAPE = (
    "byte tape of transformers' layers and losses (planner/memory/layer_tape.py, head_tape.py), held to a trace on"
    " fake tensors within 2 % (tests/oracles/training_trace.csv)"
)


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
    hopper = compute_capability.split(".")[0] in ("9", "10", "12")
    return _training_memory(spec, settings, supports_bf16, supports_flash_attention, hopper)


@lru_cache(maxsize=4096)
def _training_memory(
    spec: ModelSpec, settings: FinetuneSettings, bf16: bool, flash: bool, hopper: bool
) -> TrainingMemory:
    """training_memory by what matters of a card, so that a search over sizes asks once for each kind of card."""
    job = resolve(spec, settings, bf16, flash, hopper)
    static = static_bytes(job)
    tapes = _play(job)
    instants = _instants(job, static, tapes)
    peak = max(instants, key=lambda instant: instant.total_bytes)
    return TrainingMemory(
        allocated_bytes=peak.total_bytes,
        peak_instant=peak.name,
        instants=instants,
        estimate=_estimate(job, peak, static),
        trainable_parameters=static.trainable,
        settings=settings,
        notes=_notes(job),
    )


class _Layer(NamedTuple):
    many: int
    bytes: StepBytes


class _Tapes(NamedTuple):
    tokens: int
    rope_tables: int
    checkpoint: int
    layers: tuple[_Layer, ...]
    head: StepBytes
    embedding_gradient: int


def _play(job: Run) -> _Tapes:
    spec, s = job.spec, job.settings
    sequences = s.micro_batch * (2 if s.task == "dpo" else 1)
    tokens = sequences * s.seq_len
    fp32_stream = job.weight_itemsize == 4 or s.kbit_prepare
    # FSDP's mixed precision and DeepSpeed's bf16 engine hand the layers 16-bit weights
    sharded_masters = s.parallelism.startswith(("fsdp", "zero"))
    step = StepSettings(
        tokens=tokens,
        seq_len=s.seq_len,
        trains_weights=job.trains_all,
        residual_itemsize=4 if fp32_stream and not sharded_masters else 2,
        weight_itemsize=4 if job.weight_itemsize == 4 and not sharded_masters else 2,
        grad_itemsize=4 if job.weight_itemsize == 4 and not sharded_masters else 2,
        autocast=job.autocast,
        lora_rank=0 if job.trains_all else s.lora_rank,
        lora_targets=frozenset(tensor.name for tensor, _ in adapter_tensors(job)),
        lora_itemsize=4 if job.adapter_itemsize == 4 else 2,
        lora_experts=any(tensor.part == "expert" for tensor, _ in adapter_tensors(job)),
        lora_dropout=s.lora_dropout > 0,
        dora=s.method in ("dora", "qdora"),
        quantized=job.quantized,
        attention=job.attention,
        kernels=job.kernels,
        trains_head=job.trains_all or s.trained_embeddings,
        head_itemsize=4 if fp32_stream and not sharded_masters else 2,
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
    # cosines and sines of one row of positions, once for each kind of rope
    ropes = len({group.kind for group in spec.layers}) if spec.architecture.startswith("gemma3") else 1
    tables = 2 * ropes * step.residual_itemsize * spec.head_dim * s.seq_len
    return _Tapes(tokens, tables, checkpoint, tuple(layers), run(play_head(head, step, job.loss)), embedding)


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


def _instants(job: Run, static: Static, tapes: _Tapes) -> tuple[Instant, ...]:
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
    head_kept = 0 if s.optimizer_in_backward else tapes.head.kept  # used up and freed at once
    # FSDP1 hooks of frozen layers hold each layer's input, and its gradient, until the backward ends
    frozen_fsdp = s.parallelism == "fsdp" and not job.trains_all and checkpointed
    skipped = int(constant("fsdp_frozen_layers_not_held")["value"])
    held = tapes.checkpoint * (layers + max(0, layers - skipped)) if frozen_fsdp else 0
    worst = max(tapes.layers, key=lambda layer: layer.bytes.backward_peak).bytes
    # gradients when the first layer's backward starts: all but its own and those of an untied embedding
    untied = 0 if job.spec.tied_embeddings else tapes.embedding_gradient
    own = worst.kept if worst.kept else static.gradients // max(1, layers)
    late = max(0, static.gradients - (own + untied) // _grad_shards(job))
    # the head's gradient is FSDP's root unit's, which is reduced only when the backward is over
    root_held = tapes.embedding_gradient if s.parallelism.startswith("fsdp") else 0
    widest_forward = max(layer.bytes.forward_peak for layer in tapes.layers)
    widest_saved = max(layer.bytes.saved for layer in tapes.layers)

    def instant(name: str, gradients: int, activations: int, transient: int, *, layer_gather: bool = False) -> Instant:
        parts = dict(base)
        parts["gathered weights"] = gathered + (static.gathered_layer if layer_gather else 0)
        parts["gradients"] = gradients
        parts["activations"] = activations + tapes.rope_tables
        parts["working"] = transient
        return Instant(name=name, parts={key: value for key, value in parts.items() if value})

    step = {**base, "gradients": static.gradients, "step temporaries": static.step_scratch}
    alive = kept(layers) + saved  # at the end of the forward
    above = alive if checkpointed else saved - widest_saved  # while the last layer is at work
    result = [
        Instant(name="optimizer step", parts={key: value for key, value in step.items() if value}),
        instant("loss, forward", carried, alive + casts, tapes.head.forward_peak),
        instant("loss, backward", carried, alive, tapes.head.backward_peak),
        instant("backward of the last layer", carried + head_kept, above, worst.backward_peak, layer_gather=True),
        instant(
            "backward of the first layer",
            max(carried, late) + root_held,
            held or kept(1),
            worst.backward_peak,
            layer_gather=True,
        ),
    ]
    if not checkpointed:
        result.append(instant("forward of the last layer", carried, above, widest_forward, layer_gather=True))
    if tapes.embedding_gradient:
        # a tied embedding's own gradient is summed with the head's into a third tensor
        tied = 2 * tapes.embedding_gradient if job.spec.tied_embeddings else 0
        own_whole = root_held if not job.spec.tied_embeddings else 0
        result.append(
            instant("backward of the embedding", static.gradients + root_held, 0, tied + own_whole + tapes.checkpoint)
        )
    return tuple(result)


def _grad_shards(job: Run) -> int:
    return job.settings.n_gpus if job.settings.parallelism in (*SHARDED, "zero2") else 1


# --- the answer -------------------------------------------------------------------------------------------------------

_EXPLAINED: dict[str, tuple[str, tuple[str, ...], str]] = {
    "weights": (
        "parameters x bytes each / shards; 4-bit: half a byte and scales for linear weights, 16 bits for the rest",
        ("parameters", "weights", "shards"),
        "bitsandbytes functional.py quantize_4bit; checkpoint shapes (docs/method.md)",
    ),
    "adapters": (
        "sum over adapted matrices of rank x (in + out) x bytes each",
        ("trainable_parameters", "lora_rank", "lora_targets", "adapter_bytes_each", "shards"),
        "peft tuners/lora/layer.py; counts equal peft's (tests/oracles/lora_counts.csv)",
    ),
    "optimizer state": (
        "two moments for each trained parameter, in its own width; 8-bit: a byte each and one fp32 for 256",
        ("trainable_parameters", "optimizer", "shards"),
        _SOURCE_STATE,
    ),
    "reference model": (
        "a second copy of the weights, frozen, in their width",
        ("parameters",),
        "trl trainer/dpo_trainer.py",
    ),
    "workspace": (
        "a cuBLAS workspace for the forward thread and one for autograd's",
        ("hopper_or_later",),
        str(constant("cublas_workspaces")["source"]),
    ),
    "communication": (
        "gradient buckets",
        ("parallelism",),
        "torch DDP reducer; " + str(constant("deepspeed_bucket_elements")["source"]),
    ),
    "gathered weights": (
        "embeddings, head and the layer at work, gathered from all shards",
        ("parallelism", "shards"),
        "torch FSDP and DeepSpeed ZeRO-3; seen in fms-acceleration's benchmark tables",
    ),
    "gradients": (
        "trained parameters x bytes each, of those that have a gradient at this instant",
        ("trainable_parameters", "instant", "gradient_accumulation_steps"),
        "torch autograd",
    ),
    "activations": (
        "checkpoints: hidden x tokens x layers x bytes each; without them: all that autograd saves in the layers",
        ("hidden_size", "tokens", "layers", "checkpointing"),
        _SOURCE_TAPE,
    ),
    "working": (
        "what the layer or the loss head at work recomputes, saves and passes back, at its highest",
        ("instant", "tokens", "hidden_size", "ffn", "vocab_size", "loss", "attention"),
        _SOURCE_TAPE,
    ),
    "step temporaries": (
        "square roots of all second moments at once (foreach)",
        ("trainable_parameters", "optimizer"),
        _SOURCE_STATE,
    ),
}
"""formula, the inputs it uses, and its source, by component"""


def _facts(job: Run, peak: Instant, static: Static) -> dict[str, int | float | str]:
    s, spec = job.settings, job.spec
    targets = s.lora_targets if isinstance(s.lora_targets, str) else ",".join(s.lora_targets)
    return {
        "instant": peak.name,
        "parameters": spec.parameter_count,
        "trainable_parameters": static.trainable,
        "weights": s.base_quantization if job.quantized else s.weights_dtype,
        "lora_rank": s.lora_rank,
        "lora_targets": targets,
        "adapter_bytes_each": job.adapter_itemsize,
        "optimizer": job.optimizer,
        "shards": s.n_gpus,
        "parallelism": s.parallelism,
        "gradient_accumulation_steps": s.gradient_accumulation_steps,
        "tokens": s.micro_batch * s.seq_len * (2 if s.task == "dpo" else 1),
        "layers": spec.num_layers,
        "hidden_size": spec.hidden_size,
        "ffn": spec.ffn or (spec.experts.ffn * spec.experts.per_token if spec.experts else 0),
        "vocab_size": spec.vocab_size,
        "checkpointing": job.checkpointing,
        "loss": job.loss,
        "attention": job.attention,
        "hopper_or_later": "yes" if job.hopper else "no",
    }


def _estimate(job: Run, peak: Instant, static: Static) -> MemoryEstimate:
    facts = _facts(job, peak, static)
    components = []
    for name, size in peak.parts.items():
        formula, used, source = _EXPLAINED[name]
        components.append(exact(name, size, formula, source, {key: facts[key] for key in used}))
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


def _not_modelled(job: Run) -> tuple[str, ...]:
    missing = ["torch.compile's fusions", "memory of data loading and of evaluation with generation"]
    if job.optimizer.startswith("paged"):
        missing.append("paged optimizer states, which live in managed memory and move to the GPU when there is room")
    return tuple(missing)


def _notes(job: Run) -> tuple[str, ...]:
    notes = []
    if job.attention == "eager":
        notes.append(
            "the attention scores are materialised (S x S); --attention efficient or a GPU with FlashAttention 2"
            " removes them"
        )
    if job.quantized and job.spec.experts and not job.trainer.experts_are_linear:
        notes.append("transformers 5 stores routed experts as one parameter that bitsandbytes leaves in 16 bits")
    if job.spec.quantization is not None:
        notes.append(f"the {job.spec.quantization.method} checkpoint is unpacked to 16 bits while loading (dequantize)")
    if job.spec.has_vision:
        notes.append("the vision tower counts as weights; activations are those of text tokens")
    return tuple(notes)
