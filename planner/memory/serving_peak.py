"""What vLLM's profile run measures beside the weights: the activation peak, and what lives outside the tensor pool."""

from __future__ import annotations

from planner.catalog.engines import Engine, GibRange, constant, cublas_workspace_bytes, vision_input
from planner.errors import NotModelled
from planner.memory.weights import WeightScheme, cdiv
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
    """Bytes by phase; the peak is persistent + workspace + the largest of encoder, prefill and sampler.

    persistent: MoE workspace kept across calls, and what a vision encoder leaves while the decoder is profiled
    workspace: cuBLAS
    """

    prefill_bytes: int
    sampler_bytes: int
    encoder_bytes: int
    persistent_bytes: int
    workspace_bytes: int

    @property
    def total_bytes(self) -> int:
        phases = max(self.prefill_bytes, self.sampler_bytes, self.encoder_bytes)
        return self.persistent_bytes + self.workspace_bytes + phases

    @property
    def phase(self) -> str:
        sizes = {"sampler": self.sampler_bytes, "prefill": self.prefill_bytes, "encoder": self.encoder_bytes}
        return max(sizes, key=sizes.__getitem__)


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
    return spec.architecture in families and not spec.has_vision


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
    encoder = patches of the profiled images through one layer of the vision tower
    vision  = encoder tokens * (hidden * 2 B + pixels behind a token), held while the decoder runs
    """
    hidden, tokens = spec.hidden_size, batch.tokens
    dense = spec.ffn
    routed = 0
    if spec.experts is not None:
        dense = max(dense, spec.experts.shared_ffn)
        routed = _moe_bytes(spec, engine, tokens, tp)
    width = cdiv((3 if spec.gated_mlp else 2) * dense, tp)
    prefill = 2 * tokens * (width + HIDDEN_COPIES * hidden)
    eight_bit = scheme.quantization is not None and scheme.quantization.activation_bits == 8
    if eight_bit:
        prefill += tokens * (cdiv(dense, tp) + hidden)
    encoder, kept_vision = _vision_bytes(spec, engine, tokens, tp)
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
    return ActivationPeak(
        prefill_bytes=prefill,
        sampler_bytes=sampler,
        encoder_bytes=encoder,
        persistent_bytes=(routed if keeps_workspace else 0) + kept_vision,
        workspace_bytes=cublas_workspace_bytes(hopper=device.compute_capability[0] >= 9),
    )


def _moe_bytes(spec: ModelSpec, engine: Engine, tokens: int, tp: int) -> int:
    """The fused experts' buffers: vllm/model_executor/layers/fused_moe/fused_moe.py, workspace_shapes.

    Kept workspaces: both as wide as the widest of what they hold. One call's buffers: chunks of 32,768 tokens.
    """
    assert spec.experts is not None
    ffn, hidden = cdiv(spec.experts.ffn, tp), spec.hidden_size
    second = max(ffn, hidden) if engine.moe_workspace_persistent else ffn
    rows = min(tokens, int(constant("moe_chunk_tokens"))) * spec.experts.per_token
    return 2 * rows * (max(2 * ffn, hidden) + second)


def _vision_bytes(spec: ModelSpec, engine: Engine, tokens: int, tp: int) -> tuple[int, int]:
    """The encoder's own peak, and the pixels and encoder output that stay while the decoder is profiled.

    Encoded are the whole images that the budget holds: a batch's tokens, or the largest image where that is more.
    The tower's peak is one layer over all patches: patches * 2 B * (feed-forward / tp + 4 * hidden).
    """
    if not spec.has_vision:
        return 0, 0
    if engine.is_v0:
        raise NotModelled(f"the V0 engine profiles {spec.name} with images for every sequence: use vLLM 0.8 or later")
    image = vision_input(spec.architecture)
    budget = max(tokens, image.max_item_tokens)
    encoded = max(budget // image.tokens_per_image, 1) * image.tokens_per_image
    matrices = [t.shape for t in spec.tensors if t.part == "vision" and t.linear and len(t.shape) == 2]
    hidden = min((min(shape) for shape in matrices), default=0)
    gated = any("gate_proj" in t.name for t in spec.tensors if t.part == "vision")
    feed_forward = max((shape[0] for shape in matrices), default=0) * (3 if gated else 2)
    patches = encoded * image.patches_per_token
    encoder = 2 * patches * (cdiv(feed_forward, tp) + HIDDEN_COPIES * hidden)
    return encoder, encoded * (2 * spec.hidden_size + image.pixel_bytes_per_token)


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


def non_torch_bytes(engine: Engine, device: Device, tp: int, pp: int) -> tuple[int, int, int]:
    """Low, expected and high bytes of NCCL, kernels and libraries, at that tensor parallel size or the next listed."""
    sizes = sorted(engine.non_torch_gib)
    found: GibRange = engine.non_torch_gib[next((size for size in sizes if size >= tp), sizes[-1])]
    if tp == 1 and device.compute_capability[0] < 9:
        found = engine.non_torch_before_hopper_gib
    numbers = (found.low, found.expected, found.high)
    if pp > 1:
        stages = engine.pipeline_gib
        numbers = (found.low + stages.low, found.expected + stages.expected, found.high + stages.high)
    low, expected, high = (int(gib * GIB) for gib in numbers)
    return low, expected, high


def graph_bytes(spec: ModelSpec, engine: Engine, batch: Batch, pp: int, *, enforce_eager: bool) -> tuple[int, int, int]:
    """Low, expected and high bytes of the CUDA graphs, nothing when eager.

    (base + per_layer * layers + moe) * captured batch sizes / 51, the sizes of a server with 256 sequences and more.
    """
    if enforce_eager:
        return 0, 0, 0
    cost = engine.graphs_gib
    layers = cdiv(spec.num_layers, pp)
    share = _captured_sizes(batch) / int(constant("graph_sizes")["counted"])
    expected = (cost.base + cost.per_layer * layers + (cost.moe if spec.experts is not None else 0.0)) * share
    low, high = max(expected - cost.spread * share, 0.0), expected + cost.spread * share
    return int(low * GIB), int(expected * GIB), int(high * GIB)


def _captured_sizes(batch: Batch) -> int:
    """Batch sizes captured: 1, 2, 4, every 8 up to 248, then every 16, until min(2 * sequences, tokens, 512)."""
    largest = min(2 * batch.sequences, batch.tokens, int(constant("graph_sizes")["largest"]))
    small = sum(size <= largest for size in (1, 2, 4))
    return small + min(largest, 255) // 8 + max(0, (largest - 256) // 16 + 1 if largest >= 256 else 0)


def context_bytes() -> tuple[int, int, int]:
    """Low, expected and high bytes of the CUDA context and libraries, which no budget of vLLM counts."""
    low, expected, high = constant("cuda_context_gib")
    return int(low * GIB), int(expected * GIB), int(high * GIB)
