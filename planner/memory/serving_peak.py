"""What vLLM's profile run measures beside the weights: the activation peak, and what lives outside the tensor pool."""

from __future__ import annotations

from planner.catalog.engines import Engine, GibRange, constant, vision_input
from planner.memory.weights import VISION_PARTS, WeightScheme, cdiv
from planner.model import Frozen, ModelSpec
from planner.units import GIB

HIDDEN_COPIES = 4  # attention output, residual before and after, and the normalised input of the feed-forward


class Batch(Frozen):
    """The batch that is profiled: tokens of a full prefill step and sequences that are sampled after it."""

    tokens: int
    sequences: int


class Device(Frozen):
    """One GPU as vLLM sees it.

    usable_bytes: what CUDA reports, not the nameplate; name: vLLM looks for `A100` in it
    multiprocessors: None takes a typical card of that compute capability (a few MiB)
    """

    usable_bytes: int
    compute_capability: tuple[int, int] = (9, 0)
    name: str = ""
    multiprocessors: int | None = None


class ActivationPeak(Frozen):
    """Bytes by phase; the peak is persistent + workspace + the larger of prefill and sampler.

    persistent: MoE workspace kept across calls, and what a vision encoder leaves while the decoder is profiled
    workspace: cuBLAS
    """

    prefill_bytes: int
    sampler_bytes: int
    persistent_bytes: int
    workspace_bytes: int

    @property
    def total_bytes(self) -> int:
        return self.persistent_bytes + self.workspace_bytes + max(self.prefill_bytes, self.sampler_bytes)

    @property
    def phase(self) -> str:
        return "sampler" if self.sampler_bytes >= self.prefill_bytes else "prefill"


def uses_v2_runner(spec: ModelSpec, scheme: WeightScheme, engine: Engine) -> bool:
    """Whether vLLM's second model runner serves the model by default (vllm/config/vllm.py, use_v2_model_runner)."""
    families = engine.v2_runner_families
    if "all" in families:
        return True
    if scheme.quantization is not None and not engine.v2_runner_quantized:
        return False
    hybrid = any(group.kind == "linear" for group in spec.layers)
    if "dense" in families and spec.experts is None and not hybrid:
        return True
    return spec.architecture in families and not has_vision(spec)


def has_vision(spec: ModelSpec) -> bool:
    return any(tensor.part in VISION_PARTS for tensor in spec.tensors)


def default_batch(
    spec: ModelSpec,
    engine: Engine,
    device: Device,
    *,
    max_model_len: int,
    max_num_batched_tokens: int | None = None,
    max_num_seqs: int | None = None,
) -> Batch:
    """The batch of `vllm serve` on that card, where the settings do not say.

    Cards of 70 GiB and more (from 0.9 on not A100) take the large defaults, of 160 GiB and more the very large ones;
    the V0 engine takes whole prompts, max(max_model_len, 2048) tokens, unless it prefills in chunks (above 32k).
    Source: vllm/engine/arg_utils.py, get_batch_defaults.
    """
    large = device.usable_bytes >= constant("large_card_bytes")
    if engine.a100_counts_as_small and "a100" in device.name.lower():
        large = False
    tokens = max_num_batched_tokens
    if tokens is None:
        tokens = engine.large_batched_tokens if large else engine.small_batched_tokens
        if large and device.usable_bytes >= constant("very_large_card_bytes"):
            tokens = engine.very_large_batched_tokens
        latent = any(group.kind == "mla" for group in spec.layers)
        if engine.whole_prompt_batches and (max_model_len <= 32_768 or latent):
            tokens = max(tokens, max_model_len)
    sequences = max_num_seqs
    if sequences is None:
        sequences = min(engine.large_max_num_seqs if large else engine.small_max_num_seqs, tokens)
    return Batch(tokens=tokens, sequences=sequences)


def activation_peak(
    spec: ModelSpec, scheme: WeightScheme, engine: Engine, device: Device, batch: Batch, *, tp: int
) -> ActivationPeak:
    """The peak of vLLM's dummy run: a full prefill batch through the decoder, then the sampler on every sequence.

    prefill = tokens * 2 B * (3 * ffn / tp + 4 * hidden) (+ the 8-bit copy of both inputs with 8-bit activations)
    sampler = sequences * vocab * sampler_bytes_per_logit + multiprocessors * vocab * sampler_row_buffer_bytes
              + hidden states of the batch and twice those that are sampled
    MoE     = tokens * experts_per_token * 2 B * (max(ffn / tp, hidden) + max(2 * ffn / tp, hidden)), kept since 0.13
    vision  = encoder tokens * (hidden * 2 B + pixels behind a token), held while the decoder runs
    """
    hidden, tokens = spec.hidden_size, batch.tokens
    dense = spec.ffn
    routed = 0
    if spec.experts is not None:
        dense = max(dense, spec.experts.shared_ffn)
        routed = _moe_bytes(spec, tokens, tp)
    width = cdiv((3 if spec.gated_mlp else 2) * dense, tp)
    prefill = 2 * tokens * (width + HIDDEN_COPIES * hidden)
    eight_bit = scheme.quantization is not None and scheme.quantization.activation_bits == 8
    if eight_bit:
        prefill += tokens * (cdiv(dense, tp) + hidden)
    packed_experts = scheme.quantization is not None and scheme.quantization.method == "mxfp4"
    keeps_workspace = engine.moe_workspace_persistent and not packed_experts
    if not keeps_workspace:
        prefill = max(prefill, routed + 2 * tokens * HIDDEN_COPIES * hidden)
    v2 = uses_v2_runner(spec, scheme, engine)
    rate = engine.v2_sampler_bytes_per_logit if v2 else engine.sampler_bytes_per_logit
    sampler = int(batch.sequences * spec.vocab_size * rate) + 2 * hidden * (tokens + 2 * batch.sequences)
    if not v2:
        rows = min(_multiprocessors(device), batch.sequences)
        sampler += rows * spec.vocab_size * engine.sampler_row_buffer_bytes
    workspace: dict[str, int] = constant("cublas_workspace_bytes")
    return ActivationPeak(
        prefill_bytes=prefill,
        sampler_bytes=sampler,
        persistent_bytes=(routed if keeps_workspace else 0) + _vision_bytes(spec, engine, tokens),
        workspace_bytes=workspace["hopper_and_later" if device.compute_capability[0] >= 9 else "earlier"],
    )


def _moe_bytes(spec: ModelSpec, tokens: int, tp: int) -> int:
    """The two workspaces of the fused experts: vllm/model_executor/layers/fused_moe/fused_moe.py, workspace_shapes."""
    assert spec.experts is not None
    ffn, hidden = cdiv(spec.experts.ffn, tp), spec.hidden_size
    return 2 * tokens * spec.experts.per_token * (max(ffn, hidden) + max(2 * ffn, hidden))


def _vision_bytes(spec: ModelSpec, engine: Engine, tokens: int) -> int:
    """Pixels and encoder output of the whole images that the encoder budget (a batch's tokens) holds, at least one."""
    if engine.is_v0 or not has_vision(spec):
        return 0
    image = vision_input(spec.architecture)
    kept = max(tokens // image.tokens_per_image, 1) * image.tokens_per_image
    return kept * (2 * spec.hidden_size + image.pixel_bytes_per_token)


def _multiprocessors(device: Device) -> int:
    if device.multiprocessors is not None:
        return device.multiprocessors
    known: dict[str, int] = constant("multiprocessors")
    major, minor = device.compute_capability
    same_line = next((count for key, count in known.items() if key.startswith(f"{major}.")), 132)
    return known.get(f"{major}.{minor}", same_line)


def v2_state_bytes(spec: ModelSpec, scheme: WeightScheme, engine: Engine, batch: Batch) -> int:
    """Penalty counts that the V2 model runner keeps for every sequence slot: max_num_seqs * vocab * 4.125 B."""
    if not uses_v2_runner(spec, scheme, engine):
        return 0
    return int(batch.sequences * spec.vocab_size * engine.v2_state_bytes_per_logit)


def non_torch_bytes(engine: Engine, tp: int) -> tuple[int, int, int]:
    """Low, expected and high bytes of NCCL, kernels and libraries, at that tensor parallel size or the next listed."""
    sizes = sorted(engine.non_torch_gib)
    found: GibRange = engine.non_torch_gib[next((size for size in sizes if size >= tp), sizes[-1])]
    return int(found.low * GIB), int(found.expected * GIB), int(found.high * GIB)


def graph_bytes(spec: ModelSpec, engine: Engine, pp: int, *, enforce_eager: bool) -> tuple[int, int, int]:
    """Low, expected and high bytes of the CUDA graphs: base + per_layer * layers (+ moe), nothing when eager."""
    if enforce_eager:
        return 0, 0, 0
    cost = engine.graphs_gib
    layers = cdiv(spec.num_layers, pp)
    expected = cost.base + cost.per_layer * layers + (cost.moe if spec.experts is not None else 0.0)
    return int(max(expected - cost.spread, 0.1) * GIB), int(expected * GIB), int((expected + cost.spread) * GIB)


def context_bytes() -> tuple[int, int, int]:
    """Low, expected and high bytes of the CUDA context and libraries, which no budget of vLLM counts."""
    low, expected, high = constant("cuda_context_gib")
    return int(low * GIB), int(expected * GIB), int(high * GIB)
