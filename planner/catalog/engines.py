"""What a vLLM version does with memory: the facts of engines.json, by version, read lazily."""

from __future__ import annotations

import re
from functools import cache
from typing import Any

from planner.catalog import read_facts
from planner.errors import PlannerError
from planner.model import Frozen, Quantization

Version = tuple[int, int, int]


class GibRange(Frozen):
    low: float
    expected: float
    high: float


class GraphCost(Frozen):
    """CUDA graphs in GiB: base + per_layer * layers + moe (for a mixture of experts), give or take spread."""

    base: float
    per_layer: float
    moe: float
    spread: float


class VisionInput(Frozen):
    """How a multimodal family's images reach the encoder when vLLM profiles it.

    pixel_bytes_per_token: of pixels behind one encoder token; patches_per_token: that the tower computes for it
    tokens_per_image: images are whole; max_item_tokens: of the largest image, profiled even beyond the batch
    whole_on_each_rank_when_16_bit: the tower is not sharded unless the checkpoint is quantised
    """

    pixel_bytes_per_token: int
    tokens_per_image: int
    patches_per_token: int
    max_item_tokens: int
    whole_on_each_rank_when_16_bit: bool = False


class Engine(Frozen):
    """The constants of one vLLM version; engines.json holds the source and the date of each.

    v2_runner_families: architectures that the V2 model runner serves ("dense": all that are not MoE, "all")
    non_torch_gib: NCCL, kernels' own memory and the like, by tensor parallel size; before_hopper: of one such card
    pipeline_gib: what pipeline stages add to it
    sources: by constant, where it comes from
    """

    version: str
    gpu_memory_utilization: float
    small_batched_tokens: int
    small_max_num_seqs: int
    large_batched_tokens: int
    large_max_num_seqs: int
    very_large_batched_tokens: int
    a100_counts_as_small: bool
    whole_prompt_batches: bool
    sampler_bytes_per_logit: float
    sampler_row_buffer_bytes: int
    v2_runner_families: tuple[str, ...]
    v2_runner_quantized: bool
    v2_sampler_bytes_per_logit: float
    v2_state_bytes_per_logit: float
    v2_state_in_budget: bool
    moe_workspace_persistent: bool
    graphs_in_budget: bool
    graphs_gib: GraphCost
    non_torch_gib: dict[int, GibRange]
    non_torch_before_hopper_gib: GibRange
    pipeline_gib: GibRange
    minimum_compute_capability: tuple[int, int]
    hybrid_groups: bool
    group_pad_factor: float
    tokens_by_concurrency: bool
    concurrent_batches: int
    mla_row_alignment_bytes: int
    lora_extra_vocab: int
    linear_blocks_with_prefix_cache: int
    sources: dict[str, str]

    @property
    def is_v0(self) -> bool:
        """The engine before V1 (0.8): one block table for all layers."""
        return parse_version(self.version) < (0, 8, 0)


class QuantizationFormat(Frozen):
    """A weight format that can be asked for by name on a 16-bit model, and the bytes of one of its scales."""

    name: str
    quantization: Quantization
    scale_bytes: int
    note: str


def parse_version(text: str) -> Version:
    """`0.19.0`, `v0.10.2`, `0.11` as a tuple. PlannerError for anything without a number such as 0.19."""
    match = re.search(r"(\d+)\.(\d+)(?:\.(\d+))?", text)
    if match is None:
        raise PlannerError(f"{text!r} is not a vLLM version: write it as 0.19.0")
    return int(match[1]), int(match[2]), int(match[3] or 0)


def default_engine_version() -> str:
    """The version a plan uses when none is asked for."""
    return str(read_facts("engines.json")["default_version"])


@cache
def engine(version: str | None = None) -> Engine:
    """The constants of a vLLM version: of each, the last entry that is not newer than it.

    Versions before 0.6 are refused (PlannerError); later ones than the newest entry take its values.
    The V0 engine of the 0.8 releases is asked for as 0.7.
    """
    version = version or default_engine_version()
    wanted = parse_version(version)
    values: dict[str, Any] = {}
    sources: dict[str, str] = {}
    for record in read_facts("engines.json")["by_version"]:  # in the order of `since` within each name
        if parse_version(record["since"]) <= wanted:
            values[record["name"]] = record["value"]
            sources[record["name"]] = record["source"]
    if not values:
        raise PlannerError(f"vLLM {version} is older than what is modelled: choose 0.6 or later")
    values["non_torch_gib"] = {int(tp): _range(numbers) for tp, numbers in values["non_torch_gib"].items()}
    for name in ("non_torch_before_hopper_gib", "pipeline_gib"):
        values[name] = _range(values[name])
    return Engine(version=version, sources=sources, **values)


def _range(numbers: list[float]) -> GibRange:
    low, expected, high = numbers
    return GibRange(low=low, expected=expected, high=high)


def constant(name: str) -> Any:
    """A constant that no version changed, by name; see engines.json for its source."""
    return read_facts("engines.json")["constants"][name]["value"]


def constant_source(name: str) -> str:
    return str(read_facts("engines.json")["constants"][name]["source"])


def cublas_workspace_bytes(*, hopper: bool) -> int:
    """One cuBLAS workspace of PyTorch's; hopper: compute capability 9 and later."""
    sizes: dict[str, int] = constant("cublas_workspace_bytes")
    return sizes["hopper_and_later" if hopper else "earlier"]


def vision_input(architecture: str) -> VisionInput:
    """How a multimodal family's images reach the encoder; families not listed count as Qwen-VL's."""
    table: dict[str, dict[str, Any]] = constant("vision")
    for family, values in table.items():
        if architecture.startswith(family):
            return VisionInput(**values)
    return VisionInput(**table["default"])


@cache
def quantization_formats() -> dict[str, QuantizationFormat]:
    """Weight formats by the name a person asks for."""
    formats = {}
    for record in read_facts("engines.json")["quantizations"]:
        fields = {k: v for k, v in record.items() if k not in ("name", "scale_bytes", "note", "source", "as_of")}
        formats[record["name"]] = QuantizationFormat(
            name=record["name"],
            quantization=Quantization(**fields),
            scale_bytes=record["scale_bytes"],
            note=record["note"],
        )
    return formats


def quantization_format(name: str) -> QuantizationFormat:
    """The weight format of that name; PlannerError lists the names when there is none."""
    formats = quantization_formats()
    if name not in formats:
        raise PlannerError(f"quantization {name!r} is not known: choose one of {', '.join(formats)}")
    return formats[name]
