"""Published fine-tuning measurements against the plan: a row becomes settings, settings a peak, the peak an error."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from planner.catalog import model
from planner.catalog.hardware import gpu
from planner.errors import NotModelled, PlannerError
from planner.memory.activations import Kernels
from planner.memory.training import FinetuneSettings, TrainingMemory, training_memory
from planner.model import ModelSpec
from planner.units import GIB
from planner.validate import Compared, RowPrediction, Validation, compare, predict_all

COLUMNS = (
    "id",
    "source",
    "framework",
    "model",
    "method",
    "lora_rank",
    "target_modules",
    "optimizer",
    "param_dtype",
    "precision",
    "seq_len",
    "micro_batch",
    "grad_checkpointing",
    "attention_impl",
    "fused_ce",
    "offload",
    "parallelism",
    "n_gpus",
    "gpu",
    "peak_mem_gb",
    "mem_unit",
    "notes",
)


class FinetunePrediction(NamedTuple):
    """One row predicted. measured_bytes is None where the run is reported to have failed for memory."""

    grade: str
    kind: str
    measured_bytes: int | None
    predicted_bytes: int
    memory: TrainingMemory
    out_of_memory: bool
    certain: bool
    fits: bool | None


def grade_of(row: Mapping[str, str]) -> str:
    """The grade its notes open with (A: whole configuration known), or `?`."""
    match = re.match(r"\[grade (\w)", row["notes"])
    return match[1] if match else "?"


def measure_of(row: Mapping[str, str]) -> tuple[str, int | None]:
    """(what was measured, bytes): allocated, reserved, device (nvidia-smi) or unstated; GiB unless decimal is said."""
    unit = row["mem_unit"].lower()
    if "reserved" in unit:
        kind = "reserved"
    elif "nvidia-smi" in unit:
        kind = "device"
    elif any(word in unit for word in ("allocated", "torch peak", "active")):
        kind = "allocated"
    else:
        kind = "unstated"
    text = row["peak_mem_gb"].strip()
    if not re.fullmatch(r"[0-9]+(\.[0-9]+)?", text):
        return kind, None
    scale = GIB if "gib" in unit or "gb" not in unit else 10**9
    if kind == "unstated" and "as printed" in unit:
        scale = GIB  # a tool that prints GB divides by 2^30 more often than not
    return kind, round(float(text) * scale)


def predict_row(row: Mapping[str, str]) -> FinetunePrediction:
    """The prediction for one row; NotModelled or PlannerError says why there is none."""
    kind, measured = measure_of(row)
    failed = _failed_for_memory(row)
    if measured is None and not failed:
        raise NotModelled("no peak memory was measured")
    card = _card(row["gpu"])
    settings = settings_of(row)
    spec = shape_of(row["model"])
    if settings.method != "full":
        settings = settings.model_copy(update={"lora_targets": targets_of(row, spec)})
    memory = training_memory(
        spec,
        settings,
        supports_bf16=card.supports_bf16 if card else True,
        compute_capability=card.compute_capability if card else "8.0",
    )
    estimate = memory.estimate
    predicted = memory.allocated_bytes
    if kind == "reserved":
        predicted += estimate.component("allocator slack").expected_bytes
    elif kind in ("device", "unstated"):
        predicted = estimate.expected_bytes
    if "per-gpu" not in row["mem_unit"].lower() and "SUM-OVER-GPUS" in row["mem_unit"]:
        predicted *= settings.n_gpus
    usable = card.usable_bytes if card else None
    return FinetunePrediction(
        grade=grade_of(row),
        kind=kind,
        measured_bytes=measured,
        predicted_bytes=predicted,
        memory=memory,
        out_of_memory=measured is None and failed,
        certain="inferred" not in row["notes"] and "cause not recorded" not in row["notes"],
        fits=None if usable is None else estimate.expected_bytes <= usable,
    )


def validate_finetune(rows: Iterable[Mapping[str, str]]) -> Validation:
    """Predict every row of a table of training runs and compare; what cannot be predicted is refused with a reason.

    Quantities, in GiB: `peak_allocated` of grade A rows whose tool reports torch's allocated peak, and the same for
    other grades; `peak_reserved`, `peak_device` (nvidia-smi) and `peak_unstated`, which add what an allocator may keep
    and are bounds more than measurements; `out_of_memory`: 100 % for a failed run that was predicted to fit.
    """
    return predict_all(rows, _row_prediction)


def _row_prediction(row: Mapping[str, str]) -> RowPrediction:
    found = predict_row(row)
    settings = found.memory.settings
    quantities: dict[str, Compared] = {}
    if found.measured_bytes is not None:
        suffix = "" if found.grade == "A" else f"_grade_{found.grade.lower()}"
        name = f"peak_{found.kind}{suffix}"
        quantities[name] = compare(found.predicted_bytes / GIB, found.measured_bytes / GIB)
    elif found.fits is not None:
        name = "out_of_memory" if found.certain else "out_of_memory_uncertain"
        quantities[name] = Compared(
            predicted=float(not found.fits), measured=1.0, error_pct=-100.0 if found.fits else 0.0
        )
    return RowPrediction(
        id=row["id"],
        model=row["model"],
        setting=f"{settings.method} {settings.micro_batch} x {settings.seq_len}, {settings.parallelism}"
        f" on {settings.n_gpus}, loss {settings.loss or 'default'}; peak: {found.memory.peak_instant}",
        assumed=(),
        quantities=quantities,
    )


def _failed_for_memory(row: Mapping[str, str]) -> bool:
    text = " ".join((row["notes"], row["peak_mem_gb"], row.get("other_throughput", "")))
    return not row["peak_mem_gb"].strip() and re.search(r"\bOOM\b|out of memory|FAILED", text, re.I) is not None


def _card(text: str) -> Any:
    if not text.strip():
        return None
    try:
        return gpu(text)
    except PlannerError:
        return None


def _model_name(text: str) -> str:
    """`Llama 2 7 B` -> `llama-2-7b`; `Qwen-7B(-Chat)` -> `qwen-7b`; parenthesised remarks go."""
    name = re.sub(r"\([^)]*\)", "", text).strip()
    name = re.sub(r"(\d) B\b", r"\1B", name)
    return re.sub(r"\s+", "-", name)


def shape_of(text: str) -> ModelSpec:
    """The catalog's model that a table names, also where it adds the size to it (`phi-1.5 1.3 B`)."""
    try:
        return model(_model_name(text))
    except PlannerError:
        shorter = re.sub(r"\s[0-9.]+ B$", "", text)
        if shorter == text:
            raise
        return model(_model_name(shorter))


def _whole(row: Mapping[str, str], column: str) -> int:
    match = re.match(r"\s*(\d+)\s*(?:\(|$)", row[column])
    if match is None:
        raise NotModelled(f"{column} is not stated")
    return int(match[1])


MEMORY_REFUSALS: Mapping[str, Mapping[str, str]] = {
    "framework": {
        r"megatron|nemo": "Megatron's parallelism is not modelled",
        r"thunder|eager -|pretrain": "compiled pre-training graphs are not modelled",
        r"ulysses|arctic": "sequence parallelism is not modelled",
        r"easycontext|context parallel": "context parallelism is not modelled",
        r"grpo": "GRPO's rollouts are not modelled",
        r"autotp": "tensor-parallel training is not modelled",
        r"badam|galore|muon": "this optimizer's memory is not modelled",
        r"torchtitan|fms-fsdp": "selective activation checkpointing is not modelled",
    },
    "method": {
        r"adapter": "LLaMA-Adapter is not modelled",
        r"grpo": "GRPO's rollouts are not modelled",
        r"badam|galore": "this optimizer's memory is not modelled",
        r"fwd\+bwd": "a step without optimizer outside a trainer is not modelled",
    },
    "parallelism": {
        r"device_map": "naive model parallelism (device_map) splits layers as they fall; not modelled",
        r"tensor|tp\d|pp\d|hsdp": "tensor, pipeline and hybrid sharding are not modelled for training",
        r"ulysses|ring|context|sequence": "sequence and context parallelism are not modelled",
    },
    "precision": {r"fp8": "FP8 training is not modelled"},
    "optimizer": {r"galore|badam|muon|adafactor|lomo": "this optimizer's memory is not modelled"},
    "grad_checkpointing": {r"selective": "selective activation checkpointing is not modelled"},
}


def settings_of(
    row: Mapping[str, str], refusals: Mapping[str, Mapping[str, str]] = MEMORY_REFUSALS
) -> FinetuneSettings:
    """The row's configuration in our words; NotModelled names what is outside the formulas.

    refusals: by column, patterns of cells that are not modelled, each with its reason
    """
    if "litgpt" in row["framework"].lower() and row["parallelism"].startswith("fsdp"):
        raise NotModelled(
            "LitGPT puts the whole model on each GPU before it shards; the peak of loading is not modelled"
        )
    if re.search(r"sequence[_ -]parallel", row["notes"], re.I):
        raise NotModelled("sequence and context parallelism are not modelled")
    for column, reasons in refusals.items():
        for pattern, reason in reasons.items():
            if re.search(pattern, row[column], re.I):
                raise NotModelled(reason)
    seq_len, micro_batch = _whole(row, "seq_len"), _whole(row, "micro_batch")
    stack = _trainer(row)
    method = _method(row)
    autocast = None if not row["precision"] else not re.search(r"no autocast|bf16-true|pure", row["precision"], re.I)
    sharding = _sharding(row)
    checkpointing = _checkpointing(row)
    masters = _fp32_masters(row, sharding)
    loss = _loss(row, stack)
    return FinetuneSettings(
        method=method,
        trainer=stack,
        seq_len=seq_len,
        micro_batch=micro_batch,
        lora_rank=int(row["lora_rank"]) if row["lora_rank"].strip().isdigit() else 16,
        trained_embeddings="trainable wte" in row["target_modules"],
        weights_dtype="fp32" if masters else "bf16",
        base_quantization=_base_quantization(row),
        kbit_prepare="baseline-peft" in row.get("other_throughput", "") and sharding == "none",
        autocast=autocast,
        optimizer=_optimizer(row),
        optimizer_in_backward="optimizer_in_bwd" in row["optimizer"],
        gradient_checkpointing=checkpointing,
        attention=_attention(row),
        loss=loss,
        kernels=_kernels(row, stack),
        parallelism=sharding,
        n_gpus=int(row["n_gpus"]) if row["n_gpus"].strip().isdigit() else 1,
        offload=_offload(row),
    )


def _trainer(row: Mapping[str, str]) -> str:
    framework = row["framework"].lower()
    if "fms-hf-tuning" in framework:
        return "fms"
    for name in ("unsloth", "torchtune", "litgpt"):
        if name in framework:
            return name
    if "axolotl" in framework or framework == "ms-swift" or "soup" in framework:
        return "transformers"
    if "trl" in framework and "transformers 4" not in framework and row["id"].startswith("iss"):
        return "trl"
    return "transformers-4"


def _method(row: Mapping[str, str]) -> str:
    method = row["method"].lower()
    if method.startswith(("qlora", "lora-gptq")):
        return "qlora"
    if method.startswith(("lora", "dora", "full")):
        return re.split(r"[\s(-]", method)[0]
    raise NotModelled(f"method {row['method']!r} is not modelled")


def _base_quantization(row: Mapping[str, str]) -> str:
    text = f"{row['method']} {row['param_dtype']}".lower()
    if "gptq8" in text or "int8" in text:
        return "gptq8" if "gptq" in text else "int8"
    if "gptq" in text:
        return "gptq4"
    plain = "bnb.nf4" in text and "-dq" not in text
    return "nf4" if plain else "nf4-double"


_TARGET_ROLES = {
    "query": ("q_proj", "qkv_proj", "query_key_value", "c_attn", "W_pack"),
    "key": ("k_proj",),
    "value": ("v_proj",),
    "projection": ("o_proj", "attention.dense", "self_attention.dense", "self_attn.dense", "attn.c_proj"),
    "output_proj": ("o_proj",),
    "mlp": ("gate_proj", "up_proj", "gate_up_proj", "down_proj", "fc1", "fc2", "dense_h_to_4h", "dense_4h_to_h"),
}
"""LitGPT's and torchtune's words for transformers' modules"""


def targets_of(row: Mapping[str, str], spec: ModelSpec) -> str | tuple[str, ...]:
    text = row["target_modules"].strip()
    if "DEFAULT" in text:  # the projections that take the attention's input
        return _present(spec, ("q_proj", "k_proj", "v_proj", *_TARGET_ROLES["query"]))
    if "trainable wte" in text or "c_attn,attn.c_proj" in text:
        return ("c_attn", "attn.c_proj", "w1", "w2")
    text = re.sub(r"\([^)]*\)", "", text).strip()
    if not text or re.match(r"all\b|all[- ]", text, re.I):
        return "all-linear"
    names: list[str] = []
    for name in re.split(r"[\s,+]+", text):
        short = name.rsplit(".", 1)[-1]
        names += _TARGET_ROLES.get(short, (f"{short}_proj",) if short in ("q", "k", "v") else (short,))
    return _present(spec, names)


def _present(spec: ModelSpec, names: Iterable[str]) -> tuple[str, ...]:
    known = [tensor.module for tensor in spec.tensors if tensor.linear]
    found = tuple(dict.fromkeys(n for n in names if any(k == n or k.endswith(f".{n}") for k in known)))
    if not found:
        raise NotModelled("the row's LoRA targets are not modules of this model")
    return found


def _optimizer(row: Mapping[str, str]) -> str | None:
    text = row["optimizer"].lower()
    if not text:
        return None
    if "pagedadamw8bit" in text or "paged_adamw_8bit" in text:
        return "paged_adamw_8bit"
    if "8bit" in text:
        return "adamw_8bit"
    if "4bit" in text:
        return "adamw_4bit"
    if "fused" in text:
        return "adamw_torch_fused"
    return "adamw_torch"


def _checkpointing(row: Mapping[str, str]) -> bool:
    text = row["grad_checkpointing"].strip().lower()
    if not text or "not stated" in text:
        raise NotModelled("gradient checkpointing is not stated")
    return not text.startswith("false")


def _attention(row: Mapping[str, str]) -> str:
    text = row["attention_impl"].lower()
    if text.startswith("eager"):
        return "eager"
    return "flash"


def _sharding(row: Mapping[str, str]) -> str:
    text = row["parallelism"].strip().lower()
    if text in ("", "none"):
        full_deepspeed = row["method"] == "full" and "deepspeed" in row["framework"].lower()
        return "zero3" if full_deepspeed else "none"
    for name in ("zero3", "zero2", "zero1", "fsdp2", "fsdp", "ddp"):
        if text.startswith(name):
            return name
    raise NotModelled(f"parallelism {row['parallelism']!r} is not modelled")


def _fp32_masters(row: Mapping[str, str], sharding: str) -> bool:
    if "fp32" in row["param_dtype"] and "bnb" not in row["param_dtype"]:
        return True
    autocast = "autocast)" in row["precision"] and "no autocast" not in row["precision"]
    # accelerate upcasts trained parameters to fp32 when FSDP runs with mixed precision
    return row["method"] == "full" and sharding == "fsdp" and autocast


def _loss(row: Mapping[str, str], stack: str) -> str | None:
    text = row["fused_ce"].lower()
    if text.startswith(("fast", "in-place", "in place")):
        return "in_place"
    if "liger" in text:
        return "liger"
    if "cut_cross" in text or "unsloth" in text or "chunked_nll" in text:
        return "chunked"
    if "chunked" in text:
        return "logit_chunks" if stack in ("litgpt", "torchtune") else "chunked"
    if text.startswith("none"):
        if stack == "transformers":
            return "hf"
        if stack == "transformers-4" and "fms" not in row["framework"]:
            return "hf_outputs"
        return "hf_16bit" if _keeps_16_bit_logits(row) else "hf_shifted"
    return None


def _kernels(row: Mapping[str, str], stack: str) -> Kernels | None:
    if stack != "fms":
        return None
    fused = not row["fused_ce"].lower().startswith("none")
    # the first benchmark table was run on transformers 4.46, whose loss keeps the 16-bit logits; the Liger one on 4.45
    own_loss = "gpt_bigcode" in row["model"]
    return Kernels(
        norm=fused,
        rope=fused,
        expert_loop=True,
        widens_adapter_input=True,
        keeps_logits="liger" not in row["source"] and not _keeps_16_bit_logits(row),
        logit_copies=1 if own_loss else 0,
        upcasts_logits=not _keeps_16_bit_logits(row),
    )


def _keeps_16_bit_logits(row: Mapping[str, str]) -> bool:
    """GPTBigCode computes its loss itself, without an upcast; on a quantised base its logits arrive in fp32."""
    return "gpt_bigcode" in row["model"] and not row["method"].startswith("qlora")


def _offload(row: Mapping[str, str]) -> frozenset[Any]:
    text = row["offload"].lower()
    wanted = set()
    if "optim" in text:
        wanted.add("optimizer")
    if "param" in text:
        wanted.add("parameters")
    if "activation" in text:
        wanted.add("activations")
    return frozenset(wanted)
