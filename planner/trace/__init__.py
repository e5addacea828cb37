"""Exact training memory without a GPU: one real training step on fake tensors, every storage counted.

The step is transformers, peft, TRL and torch.optim themselves; only the tensors are fake (shape and type, no bytes), so
a laptop can trace a 70B model. A shallow stack is traced at two depths and extended linearly, separately for each
moment of the step; the peak is the largest moment. Needs the extra `trace`.

What differs between this host's CPU kernels and CUDA is put right here: flash attention without an S x S matrix and
with the workspaces of its backward, Triton loss kernels that work in place, TRL's gather of the labelled positions,
bitsandbytes' dequantised weights, foreach optimizers, sums in fp32 under autocast, and the rounding of the caching
allocator. Not counted: the CUDA context, cuBLAS workspaces (8 to 32 MiB a handle), fragmentation, and blocks that the
allocator does not split (up to 1 MiB each). Vision towers stay out: the text model alone is traced. Linear-attention
layers are traced in their PyTorch form, not with the kernels of the fla package.
"""

from __future__ import annotations

import contextlib
import importlib
import textwrap
import time
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from planner.errors import NotModelled, PlannerError
from planner.trace.cuda import require
from planner.trace.ledger import (
    COMPONENTS,
    Attention,
    Components,
    Dtype,
    Loss,
    Method,
    Optimizer,
    Trace,
    by_moment,
    extrapolate,
    line,
    line_int,
)
from planner.trace.step import Step

__all__ = ["COMPONENTS", "Components", "Trace", "library_versions", "trace_training"]

LIBRARY_ERRORS = (AssertionError, AttributeError, ImportError, LookupError, RuntimeError, TypeError, ValueError)
"""What transformers, peft, TRL and torch raise where a model's code or config.json goes a way of its own."""


def trace_training(
    config: Mapping[str, Any],
    *,
    method: Method | Literal["qdora"],
    seq_len: int,
    micro_batch: int = 1,
    gradient_checkpointing: bool = True,
    loss: Loss = "chunked",
    lora_rank: int = 16,
    target_modules: str | Sequence[str] = "all-linear",
    adapter_dtype: Dtype = "fp32",
    autocast: bool = True,
    optimizer: Optimizer = "adamw_torch_fused",
    base_dtype: Dtype = "bf16",
    kbit_prepare: bool = False,
    attention: Attention = "flash",
    accumulate: bool = False,
    kernel_workspaces: bool = True,
    full_depth: bool = False,
) -> Trace:
    """Peak allocated bytes of one training step of the model that `config` (a config.json) describes.

    method: full trains every weight in base_dtype; lora and dora freeze them; qlora stores the linear ones in NF4 with
        double quantisation; qdora is refused.
    loss: hf makes the logits, chunked is TRL's fused head, none stops at the last hidden state.
    autocast: the forward pass runs in bf16 autocast, as accelerate does with mixed_precision=bf16.
    kbit_prepare: peft.prepare_model_for_kbit_training casts what is not 4-bit to fp32.
    accumulate: gradients of an earlier micro-batch are still there (gradient_accumulation_steps > 1).
    full_depth: trace every layer instead of extrapolating from two shallow stacks; same figures, more seconds.
    Every token is labelled and no padding mask is passed (packed sequences).

    Raises PlannerError when torch is missing or a setting is inconsistent, UnknownArchitecture for a model_type that
    transformers does not have, NotModelled for a combination that the step cannot be traced with.
    """
    started = time.perf_counter()
    torch = require("torch")
    _check(method, seq_len, micro_batch, autocast, base_dtype, kbit_prepare, attention)
    step = Step(
        torch=torch,
        config=dict(config),
        method=method,
        seq_len=seq_len,
        micro_batch=micro_batch,
        gradient_checkpointing=gradient_checkpointing,
        loss=loss,
        lora_rank=lora_rank,
        target_modules=target_modules if isinstance(target_modules, str) else list(target_modules),
        adapter_dtype=adapter_dtype,
        autocast=autocast,
        optimizer=optimizer,
        base_dtype=base_dtype,
        kbit_prepare=kbit_prepare,
        attention=attention,
        accumulate=accumulate,
        kernel_workspaces=kernel_workspaces,
    )
    try:
        depth, depths = step.depths(full_depth)
        runs = [step.run(layers) for layers in depths]
    except (*LIBRARY_ERRORS, require("huggingface_hub.errors").StrictDataclassError) as error:
        reason = textwrap.shorten(str(error), 200, placeholder="...").rstrip(".")
        raise NotModelled(
            f"the libraries cannot run a step of model type {config.get('model_type')} with these settings on fake "
            f"tensors ({type(error).__name__}: {reason}): drop --trace for the closed-form estimate"
        ) from error
    peaks = extrapolate(runs, depth)
    (moment, layer), (peak, operation) = max(peaks.items(), key=lambda item: item[1][0].total)
    return Trace(
        peak_bytes=peak.total,
        peak_instant=moment,
        peak_layer=layer if layer is not None and 0 <= layer < depth else None,
        peak_operation=operation,
        peak=peak,
        instants=by_moment(peaks),
        end_of_forward=line([run.end_of_forward for run in runs], depths, depth),
        parameters=line_int([run.parameters for run in runs], depths, depth),
        trainable_parameters=line_int([run.trainable_parameters for run in runs], depths, depth),
        depth=depth,
        layers_traced=tuple(depths),
        seconds=round(time.perf_counter() - started, 2),
        versions=library_versions(),
    )


def _check(
    method: Method | Literal["qdora"],
    seq_len: int,
    micro_batch: int,
    autocast: bool,
    base: Dtype,
    kbit_prepare: bool,
    attention: Attention,
) -> None:
    if seq_len < 2 or micro_batch < 1:
        raise PlannerError(
            f"cannot trace {micro_batch} sequences of {seq_len} tokens: give at least 1 sequence of at least 2 tokens"
        )
    if method == "qdora":
        raise NotModelled("qlora with DoRA (qdora) is not traced: choose qlora or dora, or drop --trace")
    if kbit_prepare and method != "qlora":
        raise PlannerError(f"kbit_prepare belongs to a quantised base: use method qlora, or leave it off for {method}")
    if base == "fp32" and method == "qlora":
        raise PlannerError("a qlora base is NF4 computed in bf16: leave base_dtype at bf16, or use kbit_prepare")
    if not autocast and attention == "flash" and (base == "fp32" or kbit_prepare):
        raise NotModelled("flash attention has no fp32 kernel: turn autocast on, or choose attention math or eager")


def library_versions() -> dict[str, str]:
    """Versions of the libraries whose step is traced, those that are installed."""
    metadata = importlib.import_module("importlib.metadata")
    found = {}
    for name in ("torch", "transformers", "peft", "trl", "bitsandbytes"):
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    return found
