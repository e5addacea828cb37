"""What `planner scale` is asked and what it answers: nothing here computes."""

from __future__ import annotations

from typing import Literal, NamedTuple

from planner.catalog.prices import Priority
from planner.memory.serving import ServingSettings
from planner.model import Amount, Frozen, ModelSpec
from planner.performance.features import Feature
from planner.performance.traffic import Slo, Traffic
from planner.scale.day import Band
from planner.size import Span

SCHEMA: Literal["tonnage.scale/1"] = "tonnage.scale/1"
Method = Literal["closed form", "simulation", "measured"]
Metric = Literal["ttft", "tpot", "e2e"]
METRIC_WORDS: dict[Metric, str] = {"ttft": "TTFT p95", "tpot": "TPOT p95", "e2e": "latency p95"}
METRIC_FLAGS: dict[Metric, str] = {"ttft": "--ttft-p95", "tpot": "--tpot-p95", "e2e": "--latency"}


class Variant(NamedTuple):
    """How a model is served: a weight format by its catalog name (None: as stored) and vLLM's kv_cache_dtype."""

    quantization: str | None
    kv_cache_dtype: str


class Wanted(Frozen):
    """What is asked for.

    traffic: at the busiest time, its rate in all; slo: what each replica must keep; context: max_model_len, tokens
    variants: None to try 16 bits beside fp8 and int4 where a card has them; sizes: none for all that a plan may take
    priority: the way to buy by which choices are ordered; at_high: the high end of the range must keep the SLO
    drawn: with the points of the charts
    spare: machines beside those needed; day: the rate of each hour as a share of the busiest one's
    """

    spec: ModelSpec
    traffic: Traffic
    slo: Slo
    settings: ServingSettings
    variants: tuple[Variant, ...] | None = None
    sizes: tuple[str, ...] = ()
    tp: int | None = None
    regions: tuple[str, ...] = ("eastus",)
    priority: Priority = "on-demand"
    at_high: bool = True
    spare: int = 0
    day: tuple[float, ...]
    day_source: str
    simulate: bool = False
    requests: int = 2000
    seed: int = 0
    everything: bool = False
    drawn: bool = False
    notes: tuple[str, ...] = ()

    @property
    def rate_per_s(self) -> float:
        rate = self.traffic.rate_per_s
        assert rate is not None
        return rate


class Performance(Frozen):
    """What clients see of one replica at a rate: 95th percentiles in seconds, from the low to the high end.

    ttft, tpot: None for one output token, where e2e says all; utilization: of saturation
    in_flight: requests that run or wait
    """

    rate_per_s: float
    ttft_p95_s: Span | None
    tpot_p95_s: Span | None
    e2e_p95_s: Span
    utilization: float
    in_flight: float
    output_tokens_per_s: float
    preemptions: int = 0
    method: Method

    def of(self, metric: Metric) -> Span | None:
        return {"ttft": self.ttft_p95_s, "tpot": self.tpot_p95_s, "e2e": self.e2e_p95_s}[metric]


class Point(Frozen):
    """One replica with so many requests at once, on average: means in seconds."""

    concurrency: float
    tpot_s: float
    ttft_s: float
    e2e_s: float
    requests_per_s: float
    output_tokens_per_s: float


class Money(Frozen):
    """One way to buy the machines of a choice. usd_per_million: tokens, at the rate that was asked for all the time."""

    priority: Priority
    usd_per_hour: Amount
    usd_per_month: Amount
    usd_per_million_output: Amount
    usd_per_million_total: Amount


class Choice(Frozen):
    """Machines of one size that keep the SLO.

    machines: spares included; replicas: on the machines that are needed; largest_per_s: requests a second of one
    replica within the SLO; saturation_per_s: of one replica whatever the latency; performance: at the rate asked
    money: every way that has a price in `region`; arguments: of `vllm serve`; extrapolated: no run on such a card with
    this format is behind the constants; one_less: why a machine less does not do
    """

    sku: str
    gpu: str
    gpus_per_machine: int
    tensor_parallel_size: int
    weights: str
    kv_cache_dtype: str
    replicas: int
    machines: int
    spare: int
    replicas_per_machine: int
    largest_per_s: float
    saturation_per_s: float
    performance: Performance
    region: str
    money: tuple[Money, ...]
    band: Band
    extrapolated: bool
    arguments: tuple[str, ...] = ()
    sweep: tuple[Point, ...] = ()
    one_less: str = ""

    def bought(self, priority: Priority) -> Money | None:
        return next((way for way in self.money if way.priority == priority), None)


class Rejected(Frozen):
    """What does not do, and why in a sentence.

    usd_per_month: of one machine, None without a price; alone: a request by itself, where only the SLO is missed
    excess: by what factor it misses it then; could: it may do, at a higher price than the choices
    """

    sku: str
    gpu: str
    tensor_parallel_size: int
    weights: str
    kv_cache_dtype: str
    reason: str
    usd_per_month: Amount | None = None
    alone: Performance | None = None
    excess: float | None = None
    could: bool = False


class Machine(Frozen):
    """One machine at the most that it answers within the SLO. pareto: no other is cheaper and answers more."""

    sku: str
    weights: str
    kv_cache_dtype: str
    tensor_parallel_size: int
    requests_per_s: float
    usd_per_hour: Amount
    pareto: bool = False


class ScaleAnswer(Frozen):
    """Everything `planner scale` knows; `--json` prints exactly this. choices: cheapest first; empty: nothing does.

    at: `high` or `expected`, the end of the latency range that must keep the SLO, or `measured`; cheaper: sizes of
    which one machine would cost less than the first choice, each with its reason; nearest: where nothing does
    machines: of every size, for the chart alone; features: what the engine's would buy on the first choice, explained
    """

    schema_version: Literal["tonnage.scale/1"] = SCHEMA
    model: str
    rate_per_s: float
    input_tokens: float
    output_tokens: float
    context: int
    slo: Slo
    at: Literal["high", "expected", "measured"]
    priority: Priority
    regions: tuple[str, ...]
    choices: tuple[Choice, ...]
    cheaper: tuple[Rejected, ...]
    rejected: tuple[Rejected, ...]
    nearest: Rejected | None = None
    nearest_flags: str = ""
    machines: tuple[Machine, ...] = ()
    day: tuple[float, ...]
    day_source: str
    price_source: str
    features: tuple[Feature, ...] = ()
    notes: tuple[str, ...] = ()
