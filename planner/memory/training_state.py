"""Fine-tuning memory that does not depend on the tokens: weights, adapters, optimizer state, gradients, buckets."""

from __future__ import annotations

from collections.abc import Iterable
from math import prod
from typing import NamedTuple

from planner.catalog.engines import cublas_workspace_bytes
from planner.catalog.trainers import constant
from planner.memory.finetune_settings import SHARDED, BaseQuantization, Optimizer, Run
from planner.model import Tensor, adapter_parameters, lora_targets


class Static(NamedTuple):
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


def static_bytes(job: Run) -> Static:
    spec, s = job.spec, job.settings
    adapters = sum(n for _, n in adapter_tensors(job))
    embeddings = sum(t.parameters for t in spec.tensors if t.part in ("embedding", "lm_head"))
    trained_base = spec.parameter_count if job.trains_all else embeddings if s.trained_embeddings else 0
    base = base_weight_bytes(job)
    # modules_to_save keeps the frozen original and trains a copy
    copies = embeddings * job.weight_itemsize if s.trained_embeddings and not job.trains_all else 0
    n = s.n_gpus
    sharded = s.parallelism in SHARDED
    shard_weights = n if sharded else 1
    weights = -(-base // shard_weights) + -(-copies // shard_weights)
    adapter_bytes = adapters * job.adapter_itemsize
    trained: list[tuple[int, int]] = [(adapters, job.adapter_itemsize), (trained_base, job.weight_itemsize)]
    optimizer = sum(optimizer_state_bytes(job.optimizer, count, itemsize) for count, itemsize in trained)
    if job.optimizer == "adamw_8bit" and job.trainer.embedding_state_32bit and trained_base:
        looked_up = sum(t.parameters for t in spec.tensors if t.part == "embedding")
        optimizer += 8 * looked_up - optimizer_state_bytes(job.optimizer, looked_up, 4)
    gradients = sum(count * itemsize for count, itemsize in trained)
    scratch = sum(_step_scratch_bytes(job.optimizer, count, itemsize) for count, itemsize in trained)
    if s.parallelism.startswith("zero"):
        # DeepSpeed keeps 16-bit working weights, and fp32 masters and states of its own
        count = adapters + trained_base
        optimizer = 4 * count + optimizer_state_bytes(job.optimizer, count, 4)
        gradients = 2 * count
        scratch = 4 * count  # the fp32 copy of the partition's gradients
        if job.trains_all:
            weights = -(-2 * spec.parameter_count // shard_weights)
    shard_state = n if sharded or s.parallelism in ("zero1", "zero2") else 1
    optimizer = -(-optimizer // shard_state)
    scratch = -(-scratch // shard_state)
    if sharded or s.parallelism == "zero2":
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
        if s.parallelism.startswith("fsdp"):  # CPUOffloadPolicy: the step runs where the parameters are
            optimizer = scratch = 0
    if s.optimizer_in_backward:
        largest = max((t.elements for t in spec.tensors), default=0)
        gradients = scratch = 0
        buckets += largest * job.weight_itemsize * (2 if job.optimizer == "adamw_torch" else 1)
    root, layer = _gathered_bytes(job) if sharded else (0, 0)
    reference = 0
    if s.task == "dpo" and job.trains_all:
        width = 2 if s.parallelism.startswith("zero") else job.weight_itemsize
        reference = -(-spec.parameter_count * width // shard_weights)
    return Static(
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
        workspace=cublas_workspace_bytes(hopper=job.hopper) * int(constant("cublas_workspaces")["value"]),
    )


def adapter_tensors(job: Run) -> Iterable[tuple[Tensor, int]]:
    """Each adapted matrix family with the adapter's parameters: rank * (in + out), and out magnitudes for DoRA."""
    s = job.settings
    if job.trains_all:
        return
    for tensor in lora_targets(job.spec, s.lora_targets):
        magnitudes = tensor.shape[0] * tensor.count if s.method in ("dora", "qdora") else 0
        yield tensor, adapter_parameters(job.spec, tensor, s.lora_rank) + magnitudes


def base_weight_bytes(job: Run) -> int:
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


def _is_quantized(job: Run, tensor: Tensor) -> bool:
    if len(tensor.shape) < 2 or tensor.part in ("embedding", "lm_head"):
        return False
    if tensor.part == "expert":
        return job.trainer.experts_are_linear
    if tensor.part == "router":
        return job.trainer.experts_are_linear
    return tensor.linear


def quantized_bytes(shape: tuple[int, ...], scheme: BaseQuantization) -> int:
    """Bytes of one quantised matrix (out, in): see base_weight_bytes."""
    count = prod(shape)
    if scheme in ("gptq4", "gptq8"):
        bits = 4 if scheme == "gptq4" else 8
        groups = -(-shape[-1] // int(constant("gptq")["group"])) * (count // shape[-1])
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


def _gathered_bytes(job: Run) -> tuple[int, int]:
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
