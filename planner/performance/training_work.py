"""What one micro-batch of training makes a GPU do: operations, bytes and launches, whatever the card."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from planner.catalog.training_speed import speed_constants
from planner.errors import NotModelled
from planner.memory.activations import LayerShape, layer_shape
from planner.memory.finetune_settings import SHARDED, Run
from planner.memory.training_state import Static, adapter_tensors, base_weight_bytes, static_bytes
from planner.model import LayerGroup, ModelSpec, Tensor

_PASSES = ("attention", "mlp", "expert", "shared_expert", "router")


@dataclass(frozen=True)
class TrainingWork:
    """The work of one micro-batch on one GPU, and of one optimizer step.

    tokens; layer_flops: of all layers' products, one forward; layer_bytes: of 16-bit weights one forward reads
    head_flops, head_bytes: the output head's; head_passes: how often it is multiplied; head_fp32: in full precision
    attention_flops: one forward, causal and within windows; score_bytes: of S x S scores, all passes (eager attention)
    recomputed: share of the forward that the backward repeats (gradient checkpointing)
    weight_passes: products of the backward for one of the forward: 1 (input), 2 with the weights' own gradient
    eager_bytes, fused_bytes: moved by element-wise kernels of the layers, all passes; logit_bytes: by the loss
    adapter_flops: all passes, adapter_fp32: in full precision; adapter_bytes: moved around them
    packed_weights: weights to unpack in one pass; packing: nf4, gptq, gptq_plain, bandwidth or ""
    launch_layers, launch_adapters: how many layers' and adapters' kernels the CPU launches; launches: passes over each
    gathers: sharded layers gathered; exchanged_bytes: over the link a micro-batch, step_exchanged_bytes: once a step
    optimizer_bytes: read and written by the step; cpu_parameters: stepped on the CPU; pcie_bytes: copied for it
    paged_bytes: optimizer states in managed memory, resident_bytes: of weights and other state they compete with
    offloaded_bytes: checkpoints copied to the host and back; useful_flops: without what is computed twice
    """

    tokens: int
    layer_flops: float
    layer_bytes: float
    head_flops: float
    head_bytes: float
    head_passes: float
    head_fp32: bool
    attention_flops: float
    score_bytes: float
    recomputed: float
    weight_passes: float
    eager_bytes: float
    fused_bytes: float
    logit_bytes: float
    adapter_flops: float
    adapter_fp32: bool
    adapter_bytes: float
    packed_weights: float
    packing: str
    launch_layers: float
    launch_adapters: float
    launches: float
    gathers: float
    exchanged_bytes: float
    step_exchanged_bytes: float
    optimizer_bytes: float
    cpu_parameters: float
    pcie_bytes: float
    paged_bytes: float
    resident_bytes: float
    offloaded_bytes: float
    useful_flops: float
    reference_passes: int
    weight_decomposed: bool
    accumulation: int


def training_work(
    job: Run, *, compiled: bool = False, recomputed: float | None = None, sample_tokens: int | None = None
) -> TrainingWork:
    """The work of a run whose defaults are resolved.

    compiled: torch.compile fuses the element-wise kernels; recomputed: share of the forward that is computed again,
    where checkpointing is selective (None: all of it when checkpointing is on, none when it is off); sample_tokens: of
    one sample where several are packed in a sequence and attend to themselves alone (None: a sequence is one sample).
    Formulas: a product of m tokens with an (out, in) matrix takes 2 m in out operations; causal attention over S tokens
    2 heads (head_dim + value_dim) S / 2 a token. Raises NotModelled for linear attention.
    """
    spec, s = job.spec, job.settings
    sequences = s.micro_batch * (2 if s.task == "dpo" else 1)
    tokens = sequences * s.seq_len
    share = (1.0 if job.checkpointing != "none" else 0.0) if recomputed is None else recomputed
    weights = _active_weights(spec)
    head = spec.vocab_size * spec.hidden_size
    attention = tokens * sum(
        g.count * _attention_flops(spec, g, min(sample_tokens or s.seq_len, s.seq_len)) for g in spec.layers
    )
    static = static_bytes(job)
    eager, fused, scores = _layer_traffic(job, compiled)
    back = speed_constants()["backward_traffic"]
    item = 4 if _fp32_stream(job) else 2
    backward = 2.0 if job.trains_all else 1.0
    trains_head = job.trains_all or s.trained_embeddings
    again = 1.0 if job.loss in speed_constants()["head_recomputed"] else 0.0
    adapters = [(tensor, count) for tensor, count in adapter_tensors(job)]
    adapter_parameters = sum(_visited(spec, tensor) * count for tensor, count in adapters)
    adapter_fp32 = job.adapter_itemsize == 4 and (not job.autocast or job.kernels.widens_adapter_input)
    packed = sum(t.parameters for t in spec.tensors if _is_packed(job, t))
    moe = spec.experts
    by_expert = moe is not None and (job.kernels.expert_loop or job.trainer.experts_are_linear)
    layers = float(spec.num_layers)
    if by_expert and moe is not None:
        layers += moe.layers * moe.count * speed_constants()["expert_launches"]
    stored = base_weight_bytes(job)
    return TrainingWork(
        tokens=tokens,
        layer_flops=2.0 * tokens * weights,
        layer_bytes=2.0 * sum(t.parameters for t in spec.tensors if t.part in _PASSES and len(t.shape) >= 2),
        head_flops=2.0 * tokens * head,
        head_bytes=2.0 * head,
        head_passes=2.0 + again + (1.0 if trains_head else 0.0),
        head_fp32=s.kbit_prepare,
        attention_flops=attention,
        score_bytes=scores * tokens * (1.0 + share + back["scores"]),
        recomputed=share,
        weight_passes=backward,
        eager_bytes=eager * tokens * (1.0 + share + back["eager"]) * item / 2,
        fused_bytes=fused * tokens * (1.0 + share + back["fused"]) * item / 2,
        logit_bytes=float(tokens) * spec.vocab_size * _logit_bytes(job, compiled),
        adapter_flops=2.0 * tokens * adapter_parameters * (3.0 + share),
        adapter_fp32=adapter_fp32,
        adapter_bytes=_adapter_traffic(job, adapters, adapter_fp32, compiled)
        * tokens
        * (1.0 + share + back["adapter"]),
        packed_weights=float(packed) if job.quantized else 0.0,
        packing=_packing(job, compiled),
        launch_layers=layers,
        launch_adapters=float(sum(t.count for t, _ in adapters if t.part != "expert")),
        launches=1.0 + share + speed_constants()["backward_launches"],
        gathers=_gathers(job) * spec.num_layers,
        exchanged_bytes=_exchanged(job, static, stored),
        step_exchanged_bytes=_exchanged_once(job, static),
        optimizer_bytes=_optimizer_bytes(job, static, compiled),
        cpu_parameters=float(-(-static.trainable // s.n_gpus)) if "optimizer" in s.offload else 0.0,
        pcie_bytes=4.0 * static.trainable / s.n_gpus if "optimizer" in s.offload else 0.0,
        paged_bytes=_paged_bytes(job, static),
        resident_bytes=float(static.weights + static.adapters + static.gradients + static.workspace),
        offloaded_bytes=_offloaded(job, stored, tokens),
        useful_flops=2.0 * tokens * (weights + head) * (1.0 + backward) + attention * 3.0,
        reference_passes=1 if s.task == "dpo" else 0,
        weight_decomposed=s.method in ("dora", "qdora"),
        accumulation=s.gradient_accumulation_steps,
    )


def _visited(spec: ModelSpec, tensor: Tensor) -> float:
    """The share of a tensor family that a token goes through: 1, or experts visited / experts."""
    if tensor.part != "expert" or spec.experts is None:
        return 1.0
    return spec.experts.per_token / spec.experts.count


def _is_packed(job: Run, tensor: Tensor) -> bool:
    """A matrix of the layers that a quantised base packs; experts and router only where they are linear modules."""
    if tensor.part in ("expert", "router"):
        return job.trainer.experts_are_linear and len(tensor.shape) >= 2
    return tensor.part in _PASSES and tensor.linear and len(tensor.shape) >= 2


def _active_weights(spec: ModelSpec) -> float:
    """Elements of the layers' matrices that one token is multiplied with."""
    return sum(t.parameters * _visited(spec, t) for t in spec.tensors if t.part in _PASSES and len(t.shape) >= 2)


def _attention_flops(spec: ModelSpec, group: LayerGroup, seq_len: int) -> float:
    """Operations for one token in one layer: 2 heads (head_dim + value_dim) keys, of which a token sees (S + 1) / 2.

    Within a window w < S it sees w - w (w - 1) / 2S on average.
    """
    if group.kind == "linear":
        raise NotModelled(
            f"training speed of {spec.name} is not modelled: its linear-attention layers depend on the kernel"
        )
    head_dim = group.head_dim or spec.head_dim
    reach = min(group.window or seq_len, seq_len)
    keys = reach - reach * (reach - 1) / (2 * seq_len)
    return 2.0 * group.heads * (head_dim + (group.value_head_dim or head_dim)) * keys


def _kinds(spec: ModelSpec) -> Iterator[tuple[LayerShape, LayerGroup, int]]:
    """Distinct layers: by attention, and dense or with experts."""
    moe = spec.experts.layers if spec.experts else 0
    for group in spec.layers:
        routed = round(group.count * moe / spec.num_layers)
        if routed:
            yield layer_shape(spec, group, dense=False), group, routed
        if group.count > routed:
            yield layer_shape(spec, group), group, group.count - routed


def _layer_traffic(job: Run, compiled: bool) -> tuple[float, float, float]:
    """Bytes a token of element-wise kernels in one forward of all layers: (eager, fused, S x S scores), 16-bit stream.

    Elements of norms, rotary embedding, activation and residual sums x bytes each (kernel_bytes of the catalog).
    """
    eager = fused = scores = 0.0
    kernels, s, table = job.kernels, job.settings, speed_constants()["kernel_bytes"]
    for shape, group, count in _kinds(job.spec):
        norms = shape.hidden * ((1 if shape.parallel else 2) + (2 if shape.post_norms else 0))
        norms += (shape.q + shape.kv) if shape.qk_norm else 0
        ffn = shape.ffn + shape.experts_per_token * shape.expert_ffn + shape.shared_ffn
        layer_norm = shape.norm == "layer"
        parts = (
            ("layer_norm" if layer_norm else "rms_norm", kernels.norm or layer_norm, norms),
            ("rotary", kernels.rope, shape.q + shape.kv),
            ("gated_activation" if shape.gated else "activation", kernels.swiglu or not shape.gated, ffn),
            ("residual", False, 2 * shape.hidden),
        )
        for name, is_fused, elements in parts:
            in_torch, in_one_kernel = table[name]
            if is_fused or compiled:
                fused += count * elements * in_one_kernel
            else:
                eager += count * elements * in_torch
        eager += count * table["routed"] * shape.experts_per_token * shape.hidden
        if job.attention == "eager":
            scores += count * group.heads * s.seq_len * table["scores"]
    return eager, fused, scores


def _adapter_traffic(job: Run, adapters: list[tuple[Tensor, int]], fp32: bool, compiled: bool) -> float:
    """Bytes a token around all adapters in one forward: input read (and cast), output written, scaled and added."""
    total = 0.0
    item = job.adapter_itemsize if fp32 else 2
    for tensor, _ in adapters:
        out, inp = tensor.shape[-2:]
        if job.kernels.lora or compiled:
            each = 2.0 * inp + 6.0 * out  # scaled and added to the base's output by one kernel
        else:
            each = inp * (2.0 + (2.0 * item if fp32 else 0.0)) + out * (4.0 * item + 4.0)
            each += inp * 5.0 if job.settings.lora_dropout else 0.0
        total += each * tensor.count * _visited(job.spec, tensor)
    return total


def _fp32_stream(job: Run) -> bool:
    """The residual stream is fp32: fp32 weights that no sharder casts, or prepare_model_for_kbit_training."""
    s = job.settings
    return s.kbit_prepare or (job.weight_itemsize == 4 and not s.parallelism.startswith(("fsdp", "zero")))


def _logit_bytes(job: Run, compiled: bool) -> float:
    table = speed_constants()["logit_bytes"]
    return float(min(table[job.loss], table["in_place"]) if compiled else table[job.loss])


def _packing(job: Run, compiled: bool) -> str:
    """Which kernel unpacks the weights; a compiler fuses torch's own into one that runs at the bandwidth."""
    base = job.settings.base_quantization
    if not job.quantized:
        return ""
    if base.startswith("nf4"):
        return "bandwidth" if compiled else "nf4"
    return "gptq" if job.trainer.name == "fms" else "gptq_plain"


def _gathers(job: Run) -> float:
    """How often each layer's shards are gathered: forward and backward.

    Reentrant checkpointing lies outside the sharded layer, so that repeating its forward gathers and frees once more.
    """
    if job.settings.parallelism not in SHARDED:
        return 0.0
    return 3.0 if job.checkpointing == "reentrant" else 2.0


def _exchanged(job: Run, static: Static, stored: int) -> float:
    """Bytes that a GPU receives over the link for one micro-batch, when every collective is a ring.

    Sharded weights: (n - 1) / n of them at each gather, and of the gradients as they are scattered.
    """
    s = job.settings
    n = s.n_gpus
    if n == 1:
        return 0.0
    part = (n - 1) / n
    if s.parallelism in SHARDED:
        weights = 2.0 * job.spec.parameter_count if job.trains_all else float(stored)
        return part * (_gathers(job) * weights + 2.0 * static.trainable)
    if s.parallelism == "zero2":
        return part * 2.0 * static.trainable
    return 0.0


def _exchanged_once(job: Run, static: Static) -> float:
    """Bytes over the link once a step: DDP's all-reduce, and the parameters that ZeRO-1 and 2 hand back."""
    s = job.settings
    n = s.n_gpus
    if n == 1:
        return 0.0
    part = (n - 1) / n
    item = job.adapter_itemsize if not job.trains_all else job.weight_itemsize
    if s.parallelism == "ddp":
        return 2.0 * part * item * static.trainable
    if s.parallelism == "zero1":
        return part * 4.0 * static.trainable
    return part * 2.0 * static.trainable if s.parallelism == "zero2" else 0.0


def _optimizer_bytes(job: Run, static: Static, compiled: bool) -> float:
    """Bytes that clipping and the optimizer move in a step: parameter and moments read and written, gradient read."""
    s, table = job.settings, speed_constants()
    if job.optimizer == "none" or "optimizer" in s.offload:
        return 0.0
    n = s.n_gpus if s.parallelism in (*SHARDED, "zero1", "zero2") else 1
    item = 4 if s.parallelism.startswith("zero") else job.weight_itemsize if job.trains_all else job.adapter_itemsize
    moments = _moments(job, item)
    one_kernel = "fused" in job.optimizer or "8bit" in job.optimizer or compiled or s.parallelism.startswith("zero")
    passes = table["optimizer_bytes"]
    factor = passes["paged"] if job.optimizer.startswith("paged") else passes["fused" if one_kernel else "foreach"]
    each = factor * (2 * item + item + 2 * moments)
    clip = 0 if s.optimizer_in_backward else table["clip_bytes_per_parameter"]
    return static.trainable / n * float(each + clip)


def _moments(job: Run, item: int) -> int:
    """Bytes of optimizer state a parameter that is `item` bytes wide."""
    known = {"adamw_8bit": 2, "paged_adamw_8bit": 2, "paged_adamw_32bit": 8, "adamw_4bit": 1, "sgd": 0}
    return known.get(job.optimizer, item if job.optimizer == "sgd_momentum" else 2 * item)


def _paged_bytes(job: Run, static: Static) -> float:
    """Optimizer states that live in managed memory and compete for the GPU's."""
    return float(_moments(job, 2) * static.trainable) if job.optimizer.startswith("paged") else 0.0


def _offloaded(job: Run, stored: int, tokens: int) -> float:
    """Bytes copied between GPU and host for one micro-batch: checkpoints there and back, parameters at each gather."""
    s = job.settings
    total = 0.0
    if "activations" in s.offload or (job.trainer.checkpointing == "offloaded" and job.checkpointing != "none"):
        total += 2 * 2.0 * job.spec.hidden_size * tokens * job.spec.num_layers
    if "parameters" in s.offload:
        total += _gathers(job) * stored / s.n_gpus
    return total
