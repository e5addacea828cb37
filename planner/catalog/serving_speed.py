"""How fast serving engines are: the fitted constants of serving_speed.json, resolved for a card and a format."""

from __future__ import annotations

from functools import cache
from typing import Literal, get_args

from planner.catalog import read_facts
from planner.catalog.engines import parse_version
from planner.catalog.hardware import Gpu
from planner.errors import NotModelled, PlannerError
from planner.model import Frozen

SpeedEngine = Literal["vllm", "vllm-v0", "tensorrt-llm", "sglang"]
Kernel = Literal[
    "16-bit",
    "fp8",
    "fp8-block",
    "fp8-weight-only",
    "int8",
    "int8-weight-only",
    "int4",
    "bitsandbytes",
    "mxfp4",
    "nvfp4",
]
Metric = Literal["itl", "ttft", "throughput"]
KERNELS: tuple[Kernel, ...] = get_args(Kernel)


class Factors(Frozen):
    """low and high as multiples of the expected value: they held the stated share of the rows that were left out."""

    low: float
    high: float


class ServingSpeed(Frozen):
    """An engine's constants on one GPU with weights of one format.

    weights, kv, elementwise: share of the memory bandwidth that reading them attains; matmul, attention: share of the
    tensor peak; expert_weights, expert_matmul: of those for routed experts, the latter where the 16-bit peak is 10^15
    (server.grouped_share); link: share of the link's rate
    ramp_tokens: see step.Speeds; seconds: of a step, of each layer, of a layer of experts beside it, of each layer in
    a step with prompts, of a sequence, of one all-reduce; floor_seconds: of a request outside the engine's steps
    rows: measured runs behind weights and matmul; extrapolated: none, so that priors stand in and the range is wide
    """

    engine: SpeedEngine
    architecture: str
    kernel: Kernel
    weights: float
    kv: float
    elementwise: float
    matmul: float
    attention: float
    expert_weights: float
    expert_matmul: float
    link: float
    ramp_tokens: float
    step_seconds: float
    layer_seconds: float
    expert_layer_seconds: float
    mixed_layer_seconds: float
    sequence_seconds: float
    reduction_seconds: float
    floor_seconds: float
    rows: int
    extrapolated: bool
    source: str

    def factors(self, metric: Metric) -> Factors:
        """The range around a metric that this engine's left-out measurements ask for."""
        known = "extrapolated" if self.extrapolated else "measured"
        low, high = read_facts("serving_speed.json")["ranges"][metric][known]
        return Factors(low=low, high=high)


def speed_engine(name: str, version: str | None = None) -> SpeedEngine:
    """The engine family of a name as people write it, with vLLM before 0.8 apart. Raises PlannerError for others."""
    word = name.lower()
    if "vllm" in word:
        if "rocm" in word:
            raise NotModelled(
                "vLLM on ROCm has kernels of its own, and none is fitted: measure there, and give the results"
            )
        return "vllm-v0" if version and parse_version(version) < (0, 8, 0) else "vllm"
    if "tensorrt" in word or "trt" in word:
        return "tensorrt-llm"
    if "sglang" in word:
        return "sglang"
    raise NotModelled(f"{name or 'an unnamed engine'} is not modelled: vLLM, SGLang and TensorRT-LLM are")


def architecture(card: Gpu) -> str:
    """The generation whose constants a card takes: turing, a100, ampere, ada, hopper, blackwell, blackwell-rtx."""
    if not card.is_cuda:
        raise NotModelled(
            f"{card.label} is not a CUDA card, and no speed is fitted there: measure, and give the results"
        )
    names: dict[str, str] = read_facts("serving_speed.json")["architectures"]
    found = names.get(card.compute_capability) or names.get(card.compute_capability.split(".")[0])
    if found is None:
        raise NotModelled(f"no speed is known for compute capability {card.compute_capability}: choose another card")
    return found


def matmul_peak(card: Gpu, kernel: Kernel) -> float:
    """Dense tensor operations per second that the data sheet gives for what the kernel multiplies.

    Weight-only formats multiply in 16 bits; FP4 twice as fast as FP8 where the card has it (compute capability 10 and
    later). Raises PlannerError where no figure is published.
    """
    wide = card.bf16_tflops or card.fp16_tflops
    four = card.is_cuda and card.capability[0] >= 10
    tera = {
        "fp8": card.fp8_tflops or (2 * wide if wide and card.supports_fp8 == "native" else None),
        "int8": card.int8_tops,
        "nvfp4": 4 * wide if wide and four else wide,
        "mxfp4": 2 * wide if wide and four else wide,
    }
    tera["fp8-block"] = tera["fp8"]
    found = tera.get(kernel, wide)
    if not found:
        raise PlannerError(f"no tensor peak is published for {card.label}: name another card, or give measurements")
    return found * 1e12


def schedules_ahead(engine: SpeedEngine, version: str) -> bool:
    """Whether the host prepares the next step while this one runs, by default: vLLM since 0.14 (its release notes)."""
    return engine == "vllm" and parse_version(version) >= (0, 14, 0)


@cache
def serving_speed(
    engine: SpeedEngine,
    card_architecture: str,
    kernel: Kernel,
    link: Literal["nvlink", "pcie"],
    *,
    asynchronous: bool = False,
) -> ServingSpeed:
    """The constants of an engine on one generation of cards with one weight format."""
    facts = read_facts("serving_speed.json")
    values = facts["engines"][engine]
    rows = int(values["rows"].get(card_architecture, {}).get(kernel, 0))
    hidden = values["asynchronous"] if asynchronous else 1.0
    return ServingSpeed(
        engine=engine,
        architecture=card_architecture,
        kernel=kernel,
        weights=values["weights"][card_architecture][kernel],
        matmul=values["matmul"][card_architecture][kernel],
        **{name: values[name][card_architecture] for name in ("kv", "elementwise", "attention", "layer_seconds")},
        link=values["link"][link],
        **{
            name: values[name]
            for name in (
                "expert_weights",
                "expert_matmul",
                "ramp_tokens",
                "expert_layer_seconds",
                "reduction_seconds",
                "floor_seconds",
            )
        },
        **{name: values[name] * hidden for name in ("step_seconds", "mixed_layer_seconds", "sequence_seconds")},
        rows=rows,
        extrapolated=rows < facts["rows_to_trust"],
        source=facts["source"],
    )
