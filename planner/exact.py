"""`planner size --trace`: each fine-tuning answer beside the same step run by transformers and peft on fake tensors."""

from __future__ import annotations

from typing import Literal

from planner.catalog import load_config, load_model
from planner.errors import NotModelled, PlannerError
from planner.fit import with_context, with_gpus
from planner.memory.finetune_settings import resolve
from planner.memory.training import FinetuneSettings, training_memory
from planner.model import VISION_PARTS
from planner.size import ContextAnswer, SizeAnswer, SizeRequest, TracedPeak

_TRACED_OPTIMIZERS: dict[str, Literal["adamw_torch", "adamw_torch_fused", "sgd"]] = {
    "adamw_torch": "adamw_torch",
    "adamw_torch_fused": "adamw_torch_fused",
    "sgd": "sgd",
}


def with_traces(text: str, request: SizeRequest, answer: SizeAnswer) -> SizeAnswer:
    """The answer with `traced` filled in. text: the model as it was named.

    Raises PlannerError without fine-tuning, without torch, or where the step cannot be traced: the message says why.
    """
    if request.finetune is None:
        raise PlannerError("--trace runs a training step: add --task finetune or both")
    rows = [_traced(text, request.finetune, row) if row.task == "finetune" else row for row in answer.answers]
    return answer.model_copy(update={"answers": tuple(rows)})


def _traced(text: str, settings: FinetuneSettings, row: ContextAnswer) -> ContextAnswer:
    from planner.trace import trace_training

    chosen = with_context(with_gpus(settings, row.gpus), row.context)
    assert isinstance(chosen, FinetuneSettings)
    if chosen.parallelism != "none" or chosen.offload:
        raise NotModelled("the trace runs on one GPU without offloading: choose a size of one GPU, or drop --trace")
    if chosen.method == "qdora":
        raise NotModelled("qlora with DoRA (qdora) is not traced: choose qlora or dora, or drop --trace")
    if chosen.task == "dpo" or chosen.trained_embeddings or chosen.optimizer_in_backward:
        raise NotModelled("the trace knows SFT with full, lora, qlora and dora: drop --trace for this run")
    spec = load_model(text)
    job = resolve(spec, chosen, bf16=True, flash=True, hopper=False)
    if job.loss not in ("hf", "chunked", "none") or any(job.trainer.kernels.values()):
        raise NotModelled(f"the trace runs the losses hf and chunked of plain transformers and TRL, not {job.loss!r}")
    if job.optimizer not in _TRACED_OPTIMIZERS:
        raise NotModelled(f"the trace knows adamw_torch, adamw_torch_fused and sgd, not {job.optimizer}: choose one")
    autocast = job.autocast
    if chosen.method == "full" and chosen.weights_dtype != "fp32":
        autocast = False  # nothing to cast, and transformers trains pure 16-bit weights without it
    trace = trace_training(
        load_config(text),
        method=chosen.method,
        seq_len=chosen.seq_len,
        micro_batch=chosen.micro_batch,
        gradient_checkpointing=job.checkpointing != "none",
        loss=job.loss,
        lora_rank=chosen.lora_rank,
        target_modules=chosen.lora_targets,
        adapter_dtype="fp32" if job.adapter_itemsize == 4 else "bf16",
        autocast=autocast,
        optimizer=_TRACED_OPTIMIZERS[job.optimizer],
        base_dtype="fp32" if chosen.weights_dtype == "fp32" else "bf16",
        kbit_prepare=chosen.kbit_prepare,
        attention="eager" if job.attention == "eager" else "flash",
        accumulate=chosen.gradient_accumulation_steps > 1,
    )
    text_only = spec.model_copy(update={"tensors": tuple(t for t in spec.tensors if t.part not in VISION_PARTS)})
    planned = training_memory(text_only, chosen.model_copy(update={"autocast": autocast}))
    peak = max(planned.instants, key=lambda instant: instant.total_bytes)
    planned_bytes = peak.total_bytes - peak.parts.get("workspace", 0)
    return row.model_copy(
        update={
            "traced": TracedPeak(
                peak_bytes=trace.peak_bytes,
                peak_instant=trace.peak_instant,
                planned_bytes=planned_bytes,
                error_pct=round(100 * (planned_bytes / trace.peak_bytes - 1), 3),
                seconds=trace.seconds,
                versions=trace.versions,
            )
        }
    )
