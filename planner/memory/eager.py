"""Memory of plain inference with transformers: weights, one growing cache, and a whole prompt through one layer."""

from __future__ import annotations

from planner.catalog.engines import constant_source, cublas_workspace_bytes
from planner.errors import NotModelled, PlannerError
from planner.memory.estimate import MemoryEstimate, exact
from planner.memory.serving_peak import HIDDEN_COPIES
from planner.memory.weights import allocator_rounding_bytes, weight_bytes, weight_scheme
from planner.model import ModelSpec


def eager_memory(
    spec: ModelSpec,
    *,
    input_tokens: int,
    output_tokens: int,
    batch_size: int = 1,
    quantization: str | None = None,
    compute_capability: tuple[int, int] = (8, 0),
) -> MemoryEstimate:
    """What torch allocates at the peak of `model.generate` with transformers, bytes.

    peak = weights + allocator rounding + cuBLAS workspace + max(prefill, decode)
    prefill = batch * input * (KV + 2 B * (3 * ffn + 4 * hidden)): the last layer's feed-forward over the prompt
    decode  = batch * (input + output) * KV
    The output head sees the last token alone (transformers 4.45 and later); attention is FlashAttention or SDPA.
    Source: transformers/models/qwen2/modeling_qwen2.py, cache_utils.py (DynamicCache).
    """
    if spec.experts is not None or any(group.kind != "full" for group in spec.layers):
        raise NotModelled(f"{spec.name} is not a dense model with full attention: eager inference covers those alone")
    if min(input_tokens, output_tokens, batch_size) < 0 or batch_size == 0:
        raise PlannerError("eager inference needs a batch of at least 1 and no negative token counts: correct them")
    scheme = weight_scheme(spec, quantization)
    kv = sum(2 * 2 * group.count * group.kv_heads * group.head_dim for group in spec.layers)
    layer = 2 * ((3 if spec.gated_mlp else 2) * spec.ffn + HIDDEN_COPIES * spec.hidden_size)
    prefill = batch_size * input_tokens * (kv + layer)
    decode = batch_size * (input_tokens + output_tokens) * kv
    held = cublas_workspace_bytes(hopper=compute_capability[0] >= 9)
    tokens: dict[str, int | float | str] = {
        "batch_size": batch_size,
        "input_tokens": input_tokens,
        "output_tokens": output_tokens,
    }
    cache = batch_size * input_tokens * kv if prefill >= decode else decode
    return MemoryEstimate(
        components=(
            exact(
                "weights",
                weight_bytes(spec, scheme, compute_capability=compute_capability),
                "sum over tensors of their stored bytes",
                "shapes: " + (spec.source or spec.name),
                {"parameters": spec.parameter_count, "format": scheme.name},
            ),
            exact(
                "allocator rounding",
                allocator_rounding_bytes(spec, scheme, compute_capability=compute_capability, fused=False),
                "rests of up to 1 MiB below the next 2 MiB, over the large parameters",
                constant_source("allocator"),
            ),
            exact(
                "KV cache",
                cache,
                "tokens * 2 * layers * kv_heads * head_dim * 2 B",
                "transformers/cache_utils.py, DynamicCache",
                tokens,
            ),
            exact(
                "activations",
                max(prefill, decode) - cache,
                "input_tokens * 2 B * (3 * ffn + 4 * hidden)",
                "transformers/models/qwen2/modeling_qwen2.py, Qwen2MLP",
                {**tokens, "ffn": spec.ffn, "hidden_size": spec.hidden_size},
            ),
            exact("cuBLAS workspace", held, "fixed by the card", constant_source("cublas_workspace_bytes")),
        ),
        peak_instant="prefill of the whole prompt" if prefill >= decode else "the last generated token",
        not_modelled=("the CUDA context", "attention scores where neither FlashAttention nor SDPA is used"),
    )
