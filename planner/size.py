"""`planner size`: one model at several context lengths, served and fine-tuned, each on the smallest place that fits."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, Literal, TypeVar

from pydantic import Field, ValidationError

from planner.catalog import load_model
from planner.catalog.engines import constant
from planner.catalog.hardware import Gpu, VmSku, gpu, gpu_of, link_note, sku, tensor_parallel_options
from planner.catalog.trainers import trainer
from planner.errors import PlannerError
from planner.fit import (
    Fit,
    Misfit,
    Place,
    Remedy,
    Settings,
    Step,
    Task,
    candidates,
    default_headroom,
    demand,
    fit_gpu,
    fit_size,
    gpu_options,
    gpus_of,
    ladder,
    misfit_sentence,
    remedies,
    smallest,
    spread_flags,
    with_context,
)
from planner.memory.estimate import MemoryEstimate
from planner.memory.finetune_settings import packed_refusal, resolve, stored_base
from planner.memory.kv import BLOCK_TOKENS
from planner.memory.serving import KvPerSequence, ServingMemory, ServingSettings, rank_layout
from planner.memory.training import FinetuneSettings, TrainingMemory
from planner.memory.weights import check_parallel, weight_scheme
from planner.model import Amount, Frozen, ModelSpec, lora_targets
from planner.units import parse_tokens

SCHEMA: Literal["tonnage.size/1"] = "tonnage.size/1"
MAX_CONTEXTS = 64
MAX_ROPE_FACTOR = 64
S = TypeVar("S", ServingSettings, FinetuneSettings)


class SizeRequest(Frozen):
    """What was asked: contexts in tokens, tasks, where (a GPU, a VM size, or the smallest Azure size), headroom."""

    contexts: tuple[int, ...]
    serve: ServingSettings | None = None
    finetune: FinetuneSettings | None = None
    gpu: Gpu | None = None
    sku: VmSku | None = None
    gpus: int | None = None
    headroom: float | None = None
    rope_factor: float | None = None


class LossHeadPeak(Frozen):
    """The fine-tuning peak with another loss head: how much that one choice decides."""

    loss: str
    allocated_bytes: int
    peak_instant: str


class TracedPeak(Frozen):
    """The same step run on fake tensors: torch's allocated peak, and the plan's error against it in percent.

    planned_bytes: the plan without cuBLAS workspaces, which the trace does not see
    """

    peak_bytes: int
    peak_instant: str
    planned_bytes: int
    error_pct: float
    seconds: float
    versions: dict[str, str]


class Span(Frozen):
    """A figure from its low to its high end."""

    low: float
    expected: float
    high: float


class UsdSpan(Frozen):
    """USD from the low to the high end."""

    low: Amount
    expected: Amount
    high: Amount


class RunPart(Frozen):
    """Where the time of an optimizer step goes: expected seconds, with the formula, inputs and source behind them."""

    name: str
    seconds: float
    formula: str
    inputs: dict[str, float | int | str]
    source: str


class TrainingRun(Frozen):
    """How long and how dear a fine-tuning run is.

    sequence_tokens: of a row of the batch as the GPU computes it; fill: share of them that are the samples' own
    steps: optimizer steps; samples_per_s: of all GPUs; mfu: operations needed / (seconds x dense 16-bit peak)
    hours: of training alone; usd: of the whole VM in `region`, None at a desk or without a price there
    spot_factor: billed hours for one of work, with evictions; checkpoint_minutes: between checkpoints on spot
    extrapolated: no training speed was measured on such a card; assumed, price_source: what the figures rest on
    """

    samples: int
    epochs: float
    tokens_per_sample: int
    packing: bool
    sequence_tokens: int
    fill: Span
    steps: int
    step_seconds: Span
    tokens_per_s_per_gpu: Span
    samples_per_s: Span
    mfu: Span
    hours: Span
    region: str = ""
    usd_on_demand: UsdSpan | None = None
    usd_spot: UsdSpan | None = None
    spot_factor: float | None = None
    checkpoint_minutes: float | None = None
    checkpoint_bytes: int = 0
    extrapolated: bool = False
    parts: tuple[RunPart, ...] = ()
    assumed: tuple[str, ...] = ()
    price_source: str = ""


class ContextAnswer(Frozen):
    """One task at one context.

    place, gpus, gpu: where it fits, or where it was tried; fits; largest_context there, in tokens
    estimate: bytes of one GPU by component; kv and the serving figures for serving only, trainable for fine-tuning
    arguments: of `vllm serve`; link: what the GPUs' link means; reason, remedies: when it does not fit
    """

    task: Task
    context: int
    fits: bool
    place: str
    sku: str | None
    gpu: str
    gpus: int
    usable_bytes: int
    needed_bytes: int
    largest_context: int
    estimate: MemoryEstimate | None
    kv_per_sequence: KvPerSequence | None = None
    kv_tokens: int | None = None
    sequences_at_context: int | None = None
    prefix_cache_bytes: int | None = None
    max_num_seqs: int | None = None
    max_num_batched_tokens: int | None = None
    gpu_memory_utilization: float | None = None
    engine_version: str | None = None
    arguments: tuple[str, ...] = ()
    allocated_bytes: int | None = None
    trainable_parameters: int | None = None
    instants: dict[str, int] = Field(default_factory=dict)
    loss_heads: tuple[LossHeadPeak, ...] = ()
    traced: TracedPeak | None = None
    run: TrainingRun | None = Field(default=None, exclude_if=lambda run: run is None)
    link: str = ""
    reason: str = ""
    remedies: tuple[Remedy, ...] = ()
    notes: tuple[str, ...] = ()


class SizeAnswer(Frozen):
    """Everything `planner size` knows; `--json` prints exactly this."""

    schema_version: Literal["tonnage.size/1"] = SCHEMA
    model: str
    hub_id: str | None
    parameters: int
    active_parameters: int
    layers: int
    max_context: int
    kv_bytes_per_token: int | None
    weight_format: str
    source: str
    answers: tuple[ContextAnswer, ...]
    serving_ladder: tuple[Step, ...] = ()
    finetune_ladder: tuple[Step, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def fits(self) -> bool:
        return all(answer.fits for answer in self.answers)


_SERVE_OPTIONS = (
    "max_num_seqs",
    "max_num_batched_tokens",
    "gpu_memory_utilization",
    "pipeline_parallel_size",
    "quantization",
    "kv_cache_dtype",
    "block_size",
    "enforce_eager",
    "enable_lora",
    "max_loras",
    "max_lora_rank",
    "enable_prefix_caching",
    "concurrency",
    "engine_version",
)
_FINETUNE_OPTIONS = (
    "method",
    "trainer",
    "micro_batch",
    "gradient_accumulation_steps",
    "lora_rank",
    "adapter_dtype",
    "weights_dtype",
    "optimizer",
    "loss",
    "gradient_checkpointing",
    "attention",
    "parallelism",
    "n_gpus",
)


_FLAGS = {"draft_tokens": "num_speculative_tokens", "seq_len": "ctx", "max_model_len": "ctx"}


def request_from_options(options: Mapping[str, Any]) -> tuple[ModelSpec, SizeRequest]:
    """The model and the request behind the command line's options; PlannerError names the option that is wrong."""
    spec = load_model(options["model"])
    contexts = tuple(parse_tokens(part) for part in options["ctx"].split(",") if part.strip())
    rope = rope_factor(options["rope_scaling"])
    check_contexts(spec, contexts, rope)
    for name in ("gpu", "sku"):
        if options[name] is not None and not options[name].strip():
            raise PlannerError(f"--{name} is empty: name one, as `planner skus` lists them, or drop the option")
    if options["gpu"] and options["sku"]:
        raise PlannerError("--gpu plans for a card and --sku for a VM size: give one of them")
    headroom = options["headroom"]
    if headroom is not None and not 0 <= headroom < 1:
        raise PlannerError(f"a headroom of {headroom:g} is not a share of the GPU: write 0.1 for a tenth")
    task, tp = options["task"], options["tp"]
    finetune = serve = None
    if task in ("serve", "both"):
        check_parallel(spec, tp or 1, options["pipeline_parallel_size"])
        serve = _serving(spec, options, max(contexts))
    if task in ("finetune", "both"):
        finetune = _finetuning(spec, options, max(contexts))
        refusal = packed_refusal(spec, finetune)
        if refusal and task == "both":
            note = f"fine-tuning is left out: {refusal}"
            spec, finetune = spec.model_copy(update={"notes": (*spec.notes, note)}), None
    if finetune is not None:
        trainer(finetune.trainer)
        if finetune.method != "full":
            lora_targets(spec, finetune.lora_targets)
        if options["gpu"] and tp and finetune.n_gpus == 1:
            spread = "fsdp2" if finetune.parallelism == "none" and tp > 1 else finetune.parallelism
            finetune = finetune.model_copy(update={"n_gpus": tp, "parallelism": spread})
        resolve(spec, finetune, bf16=True, flash=True, hopper=True)  # refuses what no card can do
    return spec, SizeRequest(
        contexts=contexts,
        serve=serve,
        finetune=finetune,
        gpu=gpu(options["gpu"]) if options["gpu"] else None,
        sku=sku(options["sku"]) if options["sku"] else None,
        gpus=tp * (serve.pipeline_parallel_size if serve else 1) if tp else None,
        headroom=headroom,
        rope_factor=rope,
    )


def _serving(spec: ModelSpec, options: Mapping[str, Any], context: int) -> ServingSettings:
    """The serving options; PlannerError for those that vLLM refuses whatever the card."""
    draft = load_model(options["draft_model"]) if options["draft_model"] else None
    if draft is not None and draft.vocab_size != spec.vocab_size:
        raise PlannerError(
            f"{draft.name} has {draft.vocab_size:,} tokens and {spec.name} {spec.vocab_size:,}, and vLLM refuses a"
            " draft with another vocabulary: choose one of the model's own family"
        )
    ranks: list[int] = constant("lora_ranks")
    if options["enable_lora"] and options["max_lora_rank"] not in ranks:
        raise PlannerError(
            f"vLLM has no --max-lora-rank {options['max_lora_rank']}: choose one of {', '.join(map(str, ranks))}"
        )
    if options["block_size"] % BLOCK_TOKENS:
        raise PlannerError(f"--block-size {options['block_size']} is not a multiple of {BLOCK_TOKENS}: use 16 or 32")
    if options["num_speculative_tokens"] and draft is None:
        raise PlannerError("--num-speculative-tokens needs a model that drafts them: add --draft-model")
    return _checked(
        ServingSettings,
        {name: options[name] for name in _SERVE_OPTIONS}
        | {
            "max_model_len": context,
            "tensor_parallel_size": options["tp"] or 1,
            "draft": draft,
            "draft_tokens": options["num_speculative_tokens"] or (1 if draft else 0),
            "hybrid_kv_cache": False if options["disable_hybrid_kv_cache_manager"] else None,
        },
    )


def _finetuning(spec: ModelSpec, options: Mapping[str, Any], context: int) -> FinetuneSettings:
    """The fine-tuning options, with adapters on a packed checkpoint as it is packed."""
    return _checked(
        FinetuneSettings,
        {name: options[name] for name in _FINETUNE_OPTIONS}
        | {
            "seq_len": context,
            "lora_targets": _lora_targets(options["lora_targets"]),
            "offload": frozenset(part.strip() for part in options["offload"].split(",") if part.strip()),
            "task": "dpo" if options["dpo"] else "sft",
            "base_quantization": stored_base(spec) or "nf4-double",
        },
    )


def _checked(kind: type[S], fields: dict[str, Any]) -> S:
    """The settings, or one sentence about the first field that pydantic refuses."""
    try:
        return kind(**fields)
    except ValidationError as error:
        first = error.errors()[0]
        name = "_".join(str(part) for part in first["loc"][:1])
        flag = "--" + _FLAGS.get(name, name).replace("_", "-")
        value = fields.get(name)
        shown = ",".join(sorted(value)) if isinstance(value, frozenset) else repr(value)
        raise PlannerError(f"{flag} {shown} cannot be planned: {first['msg'].lower()}") from error


def _lora_targets(text: str) -> str | tuple[str, ...]:
    if text in ("all-linear", "attention", "default"):
        return text
    return tuple(part.strip() for part in text.split(",") if part.strip())


def rope_factor(text: str | None) -> float | None:
    """`yarn:4` -> 4.0; a bare factor is taken too."""
    if text is None:
        return None
    match = re.fullmatch(r"(?:(?:yarn|linear|dynamic|longrope|llama3):)?([0-9]+(?:\.[0-9]+)?)", text.strip().lower())
    if match is None or not 1 <= float(match[1]) <= MAX_ROPE_FACTOR:
        raise PlannerError(f"{text!r} is not a rope extension: write its kind and factor, for example yarn:4")
    return float(match[1])


def check_contexts(spec: ModelSpec, contexts: Sequence[int], rope_factor: float | None) -> None:
    """Refuses contexts that are not positive, too many, or above the model's own without a stated rope extension."""
    if not contexts:
        raise PlannerError("no context was given: write --ctx 32768, or several as --ctx 2k,8k,32k")
    if len(contexts) > MAX_CONTEXTS:
        raise PlannerError(f"{len(contexts)} contexts are too many for one table: ask for at most {MAX_CONTEXTS}")
    limit = int(spec.max_context * (rope_factor or 1))
    for tokens in contexts:
        if tokens < 1:
            raise PlannerError(f"a context of {tokens} tokens cannot be planned: it starts at 1")
        if tokens > limit:
            factor = -(-tokens // spec.max_context)
            extended = f" x {rope_factor:g}" if rope_factor else ""
            extension = f", or state the rope extension you will serve with (--rope-scaling yarn:{factor})"
            raise PlannerError(
                f"{tokens:,} tokens are beyond {spec.name}'s context of {spec.max_context:,}{extended}:"
                f" lower --ctx{extension if factor <= MAX_ROPE_FACTOR else ''}"
            )


def size(spec: ModelSpec, request: SizeRequest) -> SizeAnswer:
    """The answer to a request; PlannerError for contexts, cards or settings that cannot be."""
    check_contexts(spec, request.contexts, request.rope_factor)
    if request.rope_factor:
        spec = spec.model_copy(update={"max_context": int(spec.max_context * request.rope_factor)})
        note = (
            f"contexts above the model's own rest on a rope extension by {request.rope_factor:g}: give it to vLLM and"
            " to the trainer as the model's card says (--hf-overrides)"
        )
        spec = spec.model_copy(update={"notes": (*spec.notes, note)})
    tasks: list[tuple[Task, Settings]] = []
    if request.serve is not None:
        tasks.append(("serve", request.serve))
    if request.finetune is not None:
        tasks.append(("finetune", request.finetune))
    answers = [_answer(spec, request, task, settings, n) for task, settings in tasks for n in request.contexts]
    search = request.gpu is None and request.sku is None
    serving = [a for a in answers if a.task == "serve"]
    return SizeAnswer(
        model=spec.name,
        hub_id=spec.hub_id,
        parameters=spec.parameter_count,
        active_parameters=spec.active_parameter_count,
        layers=spec.num_layers,
        max_context=spec.max_context,
        kv_bytes_per_token=_kv_bytes_per_token(spec, request.serve) if serving and request.serve else None,
        weight_format=_weight_format(spec, request.serve),
        source=spec.source,
        answers=tuple(answers),
        serving_ladder=_ladder(spec, request, "serve", request.serve) if search and request.serve else (),
        finetune_ladder=_ladder(spec, request, "finetune", request.finetune) if search and request.finetune else (),
        notes=spec.notes,
    )


def headroom_of(request: SizeRequest, task: Task) -> float:
    """The share of a GPU to leave free: as asked, else the task's default."""
    return default_headroom(task) if request.headroom is None else request.headroom


def _gpus(request: SizeRequest, task: Task) -> int | None:
    """How many GPUs were asked for: pipeline stages multiply those of serving alone."""
    if request.gpus is None or task == "serve" or request.serve is None:
        return request.gpus
    return request.gpus // request.serve.pipeline_parallel_size


def _kv_bytes_per_token(spec: ModelSpec, settings: ServingSettings) -> int:
    one = settings.model_copy(update={"tensor_parallel_size": 1, "pipeline_parallel_size": 1})
    return rank_layout(spec, one).naive_bytes_per_token


def _weight_format(spec: ModelSpec, settings: ServingSettings | None) -> str:
    return weight_scheme(spec, settings.quantization if settings else None).name


def _ladder(spec: ModelSpec, request: SizeRequest, task: Task, settings: Settings) -> tuple[Step, ...]:
    try:
        return ladder(spec, settings, headroom=headroom_of(request, task), gpus=_gpus(request, task))
    except PlannerError:  # a workload that no card can run has no ladder; its answer says why
        return ()


def _answer(spec: ModelSpec, request: SizeRequest, task: Task, settings: Settings, tokens: int) -> ContextAnswer:
    chosen = with_context(settings, tokens)
    headroom = headroom_of(request, task)
    outcome: Fit | Misfit | None
    if request.gpu is not None:
        outcome = fit_gpu(spec, chosen, request.gpu, headroom=headroom)
    elif request.sku is not None:
        outcome = fit_size(spec, chosen, request.sku, headroom=headroom, gpus=_gpus(request, task))
    else:
        outcome = smallest(spec, chosen, headroom=headroom, gpus=_gpus(request, task))
        if outcome is None:
            outcome = _best_effort(spec, chosen, headroom, _gpus(request, task))
    return _context_answer(spec, task, tokens, outcome, chosen, headroom)


def _best_effort(spec: ModelSpec, settings: Settings, headroom: float, gpus: int | None) -> Fit | Misfit:
    """The Misfit on the largest Azure size that can run it; where all refuse, a CUDA card's refusal."""
    sizes = [s for s in candidates() if gpu_options(settings, s, gpus)]
    if not sizes:
        wanted = gpus or gpus_of(settings)
        raise PlannerError(f"no Azure size has {wanted} GPUs in one VM: lower {spread_flags(settings)}")

    refused: list[Fit | Misfit] = []
    for size in sorted(sizes, key=lambda s: gpu_of(s).usable_bytes * (s.gpu_count or 0), reverse=True):
        outcome = fit_size(spec, settings, size, headroom=headroom, gpus=gpus)
        if isinstance(outcome, Fit) or not outcome.reason:
            return outcome
        refused.append(outcome)
    cuda = (outcome for outcome in refused if outcome.place.gpu.is_cuda)
    return next(cuda, refused[0])


def _context_answer(
    spec: ModelSpec, task: Task, tokens: int, outcome: Fit | Misfit, settings: Settings, headroom: float
) -> ContextAnswer:
    place, memory = outcome.place, outcome.memory
    fields: dict[str, object] = {}
    if isinstance(memory, ServingMemory):
        fields = {
            "kv_per_sequence": memory.kv_for_one_sequence,
            "kv_tokens": memory.kv_tokens,
            "sequences_at_context": memory.sequences_at_context,
            "prefix_cache_bytes": memory.prefix_cache_bytes,
            "max_num_seqs": memory.max_num_seqs,
            "max_num_batched_tokens": memory.max_num_batched_tokens,
            "gpu_memory_utilization": memory.gpu_memory_utilization,
            "engine_version": memory.engine_version,
            "arguments": memory.arguments,
        }
    elif isinstance(memory, TrainingMemory):
        fields = {
            "allocated_bytes": memory.allocated_bytes,
            "trainable_parameters": memory.trainable_parameters,
            "instants": {instant.name: instant.total_bytes for instant in memory.instants},
            "loss_heads": _loss_heads(spec, memory, place.gpu),
            "notes": memory.notes,
        }
    misfit = isinstance(outcome, Misfit)
    return ContextAnswer(
        task=task,
        context=tokens,
        fits=not misfit,
        place=place.label,
        sku=place.sku.name if place.sku else None,
        gpu=place.gpu.name,
        gpus=place.gpus,
        usable_bytes=outcome.usable_bytes,
        needed_bytes=outcome.needed_bytes,
        largest_context=outcome.largest_context,
        estimate=memory.estimate if memory else None,
        link=_link(place, task),
        reason=misfit_sentence(spec, outcome, tokens) if isinstance(outcome, Misfit) else "",
        remedies=remedies(spec, outcome, settings, headroom=headroom) if isinstance(outcome, Misfit) else (),
        **fields,
    )


def _link(place: Place, task: Task) -> str:
    """The link between the GPUs, and what it means for serving; empty on one GPU, at a desk, and for odd splits."""
    if place.sku is None or place.gpus == 1 or place.gpus not in tensor_parallel_options(place.sku):
        return ""
    text = link_note(place.sku, place.gpus).text
    return text if task == "serve" else text.partition(": ")[0]


def _loss_heads(spec: ModelSpec, memory: TrainingMemory, card: Gpu) -> tuple[LossHeadPeak, ...]:
    """The same run with TRL's chunked head, Liger's, and the plain one of transformers 5 and of Trainers of 2023."""
    peaks = []
    for loss in ("chunked", "liger", "hf", "hf_outputs"):
        other = demand(spec, memory.settings.model_copy(update={"loss": loss}), card)
        assert isinstance(other, TrainingMemory)
        peaks.append(LossHeadPeak(loss=loss, allocated_bytes=other.allocated_bytes, peak_instant=other.peak_instant))
    return tuple(peaks)
