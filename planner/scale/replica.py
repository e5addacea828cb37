"""One replica on one kind of GPUs: the rate at which it keeps the SLO, and what clients see there.

The SLO is kept by the high end of the range, so the model is asked for the SLO / high, and the rate stays below what
the low end of the throughput allows.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal

from planner.catalog.serving_speed import Factors
from planner.catalog.serving_speed import Metric as Kind
from planner.errors import PlannerError
from planner.performance.load import Load, closed_form, largest_rate, saturation_per_s, simulated
from planner.performance.server import Server
from planner.performance.traffic import Slo, Traffic
from planner.scale.answer import METRIC_WORDS, Method, Metric, Performance, Point
from planner.scale.measured import MeasuredCurve
from planner.size import Span

ALONE = 1e-4  # of saturation: a load at which requests do not meet
SWEEP = (0.02, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95)  # of saturation
METRICS: tuple[Metric, ...] = ("ttft", "tpot", "e2e")
KINDS: tuple[Kind, ...] = ("itl", "ttft", "throughput")


def limit_of(slo: Slo, metric: Metric) -> float | None:
    return {"ttft": slo.ttft_p95_s, "tpot": slo.tpot_p95_s, "e2e": slo.e2e_p95_s}[metric]


def excess(seen: Performance, slo: Slo, *, at_high: bool) -> tuple[float, Metric]:
    """By what factor the worst latency is above its limit (below 1: kept), and which one it is."""
    found = []
    for metric in METRICS:
        limit, span = limit_of(slo, metric), seen.of(metric)
        if limit is not None and span is not None:
            found.append(((span.high if at_high else span.expected) / limit, metric))
    return max(found)


def milliseconds(seconds: float, figures: int = 3) -> str:
    """`412 ms`, `4.15 ms`, `12.5 s`: so many figures below 100 ms, milliseconds up to ten seconds."""
    if seconds == float("inf"):
        return "without end"
    ms = seconds * 1000
    if ms >= 9_999.5:
        return f"{seconds:,.1f} s"
    return f"{ms:,.0f} ms" if ms >= 99.5 else f"{ms:.{figures}g} ms"


def rate_figure(value: float) -> str:
    """A rate for people: three figures below 100, whole and with thousands separated above."""
    return f"{value:,.0f}" if value >= 99.95 else f"{value:.3g}"


def missed(seen: Performance, slo: Slo, *, at_high: bool) -> str:
    """`misses TTFT p95: 1,900 ms even alone`, for the worst of the limits."""
    _, metric = excess(seen, slo, at_high=at_high)
    span, limit = seen.of(metric), limit_of(slo, metric)
    assert span is not None
    assert limit is not None
    text = f"misses {METRIC_WORDS[metric]}: {milliseconds(span.expected)} even alone"
    if span.expected <= limit:
        text += f", {milliseconds(span.high)} at the high end"
    return f"{text}, {milliseconds(limit)} wanted"


@dataclass(frozen=True)
class Modelled:
    """A replica as the model sees it."""

    server: Server
    traffic: Traffic
    slo: Slo
    at_high: bool
    kept: dict[float, Performance] = field(default_factory=dict, compare=False)
    method: Method = "closed form"

    @cached_property
    def factors(self) -> dict[Kind, Factors]:
        return {name: self.server.speed.factors(name) for name in KINDS}

    @property
    def one_token(self) -> bool:
        return self.traffic.output.least_longest == 1

    @cached_property
    def saturation_per_s(self) -> float:
        return saturation_per_s(self.server, self.traffic)

    @cached_property
    def alone(self) -> Performance:
        return self.at(self.saturation_per_s * ALONE)

    @cached_property
    def largest_per_s(self) -> float:
        """Requests a second within the SLO, 0 when even one alone misses it."""
        if excess(self.alone, self.slo, at_high=self.at_high)[0] > 1:
            return 0.0
        if not self.at_high:
            return largest_rate(self.server, self.traffic, self.slo)
        most = self.saturation_per_s * self.factors["throughput"].low
        return min(largest_rate(self.server, self.traffic, self._inner_slo()), most)

    def _inner_slo(self) -> Slo:
        """The SLO that the expected latencies must keep so that the high ones keep the stated one."""
        ttft, itl = self.factors["ttft"].high, self.factors["itl"].high
        slo = self.slo

        def within(limit: float | None, factor: float) -> float | None:
            return None if limit is None else limit / factor

        return Slo(
            ttft_p95_s=within(slo.ttft_p95_s, ttft),
            tpot_p95_s=within(slo.tpot_p95_s, itl),
            e2e_p95_s=within(slo.e2e_p95_s, ttft if self.one_token else max(ttft, itl)),
        )

    def at(self, rate_per_s: float) -> Performance:
        if rate_per_s not in self.kept:
            load = closed_form(self.server, self._at_rate(rate_per_s), self.slo)
            self.kept[rate_per_s] = self._performance(load, rate_per_s, "closed form")
        return self.kept[rate_per_s]

    def simulated(self, rate_per_s: float, replicas: int, *, requests: int, seed: int) -> Performance:
        """By discrete events; of a trace the requests that one replica of so many gets in turn."""
        traffic = self._at_rate(rate_per_s)
        if self.traffic.arrivals:
            prompt, output = self.traffic.prompt, self.traffic.output
            traffic = self.traffic.model_copy(
                update={
                    "rate_per_s": None,
                    "arrivals": self.traffic.arrivals[::replicas],
                    "prompt": prompt.model_copy(update={"values": prompt.values[::replicas]}),
                    "output": output.model_copy(update={"values": output.values[::replicas]}),
                }
            )
        load = simulated(self.server, traffic, self.slo, requests=requests, seed=seed)
        return self._performance(load, rate_per_s, "simulation")

    def _at_rate(self, rate_per_s: float) -> Traffic:
        return self.traffic.model_copy(update={"rate_per_s": rate_per_s, "concurrency": None, "arrivals": ()})

    def _performance(self, load: Load, rate_per_s: float, method: Literal["closed form", "simulation"]) -> Performance:
        ttft, itl = self.factors["ttft"], self.factors["itl"]
        first, later = _span(load.ttft.p95, ttft), _span(load.tpot.p95, itl)
        widest = ttft if self.one_token else Factors(low=min(ttft.low, itl.low), high=max(ttft.high, itl.high))
        return Performance(
            rate_per_s=rate_per_s,
            ttft_p95_s=first,
            tpot_p95_s=None if self.one_token else later,
            e2e_p95_s=_span(load.e2e.p95, widest),
            utilization=load.utilization,
            in_flight=load.running + load.waiting,
            output_tokens_per_s=load.output_tokens_per_s,
            preemptions=load.preemptions,
            method=method,
        )

    @property
    def extrapolated(self) -> bool:
        return self.server.speed.extrapolated

    @property
    def arguments(self) -> tuple[str, ...]:
        return self.server.memory.arguments

    @cached_property
    def sweep(self) -> tuple[Point, ...]:
        """Throughput and latency at shares of saturation; concurrency: rate x seconds of a request (Little)."""
        points = []
        for share in SWEEP:
            load = closed_form(self.server, self._at_rate(share * self.saturation_per_s))
            points.append(
                Point(
                    concurrency=load.requests_per_s * load.e2e.mean,
                    tpot_s=load.tpot.mean,
                    ttft_s=load.ttft.mean,
                    e2e_s=load.e2e.mean,
                    requests_per_s=load.requests_per_s,
                    output_tokens_per_s=load.output_tokens_per_s,
                )
            )
        return tuple(points)


@dataclass(frozen=True)
class Measured:
    """A replica as somebody measured it."""

    curve: MeasuredCurve
    traffic: Traffic
    slo: Slo
    method: Method = "measured"
    extrapolated: bool = False
    arguments: tuple[str, ...] = ()

    @property
    def saturation_per_s(self) -> float:
        """The highest measured rate: what lies beyond is not known."""
        return self.curve.highest

    @cached_property
    def alone(self) -> Performance:
        return self.at(self.curve.lowest)

    @cached_property
    def largest_per_s(self) -> float:
        """The highest rate up to which every measured load keeps the SLO; 0 when the lowest misses it.

        Within a segment latencies are linear, so the first crossing is found by halving.
        """
        best = 0.0
        for run in self.curve.runs:
            if not self._keeps(run.rate_per_s):
                if best:
                    low, high = best, run.rate_per_s
                    for _ in range(60):
                        middle = (low + high) / 2
                        low, high = (middle, high) if self._keeps(middle) else (low, middle)
                    best = low
                break
            best = run.rate_per_s
        return best

    def _keeps(self, rate_per_s: float) -> bool:
        return excess(self.at(rate_per_s), self.slo, at_high=False)[0] <= 1

    def at(self, rate_per_s: float) -> Performance:
        """Between measured loads. Raises PlannerError outside of them."""
        run, tokens = self.curve.at(rate_per_s), self.traffic.output.mean
        e2e = run.ttft_s + (tokens - 1) * run.tpot_s
        one = self.traffic.output.least_longest == 1
        return Performance(
            rate_per_s=rate_per_s,
            ttft_p95_s=_exactly(run.ttft_s),
            tpot_p95_s=None if one else _exactly(run.tpot_s),
            e2e_p95_s=_exactly(e2e),
            utilization=rate_per_s / self.curve.highest,
            in_flight=rate_per_s * e2e,  # Little's law
            output_tokens_per_s=run.output_tokens_per_s,
            method="measured",
        )

    def simulated(self, rate_per_s: float, replicas: int, *, requests: int, seed: int) -> Performance:
        raise PlannerError("--measured takes the place of the model, and --simulate simulates it: drop one of them")

    @cached_property
    def sweep(self) -> tuple[Point, ...]:
        tokens = self.traffic.output.mean
        return tuple(
            Point(
                concurrency=run.rate_per_s * (run.ttft_s + (tokens - 1) * run.tpot_s),
                tpot_s=run.tpot_s,
                ttft_s=run.ttft_s,
                e2e_s=run.ttft_s + (tokens - 1) * run.tpot_s,
                requests_per_s=run.rate_per_s,
                output_tokens_per_s=run.output_tokens_per_s,
            )
            for run in self.curve.runs
        )


Replica = Modelled | Measured


def _span(value: float, factors: Factors) -> Span:
    return Span(low=value * factors.low, expected=value, high=value * factors.high)


def _exactly(value: float) -> Span:
    return Span(low=value, expected=value, high=value)
