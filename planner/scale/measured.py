"""Your own benchmark in place of the model: what one replica did at several loads, interpolated between them.

A row is one run: sku or gpu, tp, rate or concurrency, ttft_ms, tpot_ms, output_tok_s, and optionally weights. TTFT and
TPOT are what the SLO speaks of, 95th percentiles. Between two runs both are taken as linear in the rate; outside of
them nothing is said.
"""

from __future__ import annotations

from bisect import bisect_left
from itertools import pairwise

from planner.catalog.hardware import Gpu, VmSku, gpu, sku, tensor_parallel_options
from planner.errors import PlannerError
from planner.model import Frozen
from planner.scale.day import number_in, read_csv

EXAMPLE = (
    "the columns sku or gpu, tp, rate (requests a second) or concurrency, ttft_ms, tpot_ms, output_tok_s, and if you"
    " like weights"
)
UNNAMED = "as measured"


class Run(Frozen):
    """One measured load of a replica. concurrency: None where the run was at a rate."""

    rate_per_s: float
    concurrency: int | None
    ttft_s: float
    tpot_s: float
    output_tokens_per_s: float


class MeasuredCurve(Frozen):
    """Runs of one kind of replica, by rising rate. sku: a VM size, or empty for every size with that GPU."""

    sku: str
    gpu: str
    tp: int
    weights: str
    runs: tuple[Run, ...]

    @property
    def lowest(self) -> float:
        return self.runs[0].rate_per_s

    @property
    def highest(self) -> float:
        return self.runs[-1].rate_per_s

    def covers(self, size: VmSku) -> bool:
        """Whether such a replica can stand on a size."""
        named = size.name == self.sku if self.sku else size.gpu == self.gpu
        return named and size.plannable and self.tp in tensor_parallel_options(size)

    def at(self, rate_per_s: float) -> Run:
        """The run at a rate, linear between its neighbours; PlannerError outside of what was measured."""
        rates = [run.rate_per_s for run in self.runs]
        if not rates[0] * (1 - 1e-9) <= rate_per_s <= rates[-1] * (1 + 1e-9):
            raise PlannerError(
                f"{self.label} was measured from {rates[0]:.3g} to {rates[-1]:.3g} requests a second, and"
                f" {rate_per_s:.3g} is outside of that: add a run there"
            )
        i = min(max(bisect_left(rates, rate_per_s), 1), len(rates) - 1) if len(rates) > 1 else 0
        if i == 0:
            return self.runs[0]
        a, b = self.runs[i - 1], self.runs[i]
        t = min(max((rate_per_s - a.rate_per_s) / (b.rate_per_s - a.rate_per_s), 0.0), 1.0)

        def between(low: float, high: float) -> float:
            return low + t * (high - low)

        return Run(
            rate_per_s=rate_per_s,
            concurrency=None,
            ttft_s=between(a.ttft_s, b.ttft_s),
            tpot_s=between(a.tpot_s, b.tpot_s),
            output_tokens_per_s=between(a.output_tokens_per_s, b.output_tokens_per_s),
        )

    @property
    def label(self) -> str:
        return f"{self.sku.removeprefix('Standard_') or self.gpu}, TP {self.tp}, {self.weights}"


def read_measured(path: str, output_tokens: float) -> tuple[MeasuredCurve, ...]:
    """The curves in a CSV; a run at a concurrency has the rate output_tok_s / output tokens of a request.

    Raises PlannerError in one sentence for unknown sizes, missing cells, or runs in which a higher rate was faster.
    """
    rows = read_csv(path, ("ttft_ms", "tpot_ms", "output_tok_s"), EXAMPLE)
    columns = rows[0].keys()
    if not {"sku", "gpu"} & columns or not {"rate", "concurrency"} & columns:
        raise PlannerError(f"{path} says not where or at what load it was measured: give {EXAMPLE}")
    groups: dict[tuple[str, str, int, str], list[Run]] = {}
    for line, row in enumerate(rows, start=2):
        size = sku(row["sku"]) if row.get("sku") else None
        card = _card(row, size, path, line)
        tp = int(number_in(row, "tp", path, line)) if row.get("tp") else 1
        if tp < 1:
            raise PlannerError(f"{path}, line {line}: tp is {tp}: write on how many GPUs the replica ran")
        name = size.name if size else ""
        key = (name, card.name, tp, row.get("weights") or UNNAMED)
        groups.setdefault(key, []).append(_run(row, output_tokens, path, line))
    curves = []
    for (name, card_name, tp, weights), runs in groups.items():
        runs.sort(key=lambda run: run.rate_per_s)
        curve = MeasuredCurve(sku=name, gpu=card_name, tp=tp, weights=weights, runs=tuple(runs))
        for a, b in pairwise(runs):
            if a.rate_per_s == b.rate_per_s:
                raise PlannerError(
                    f"{path} has two runs of {curve.label} at {a.rate_per_s:.3g} requests a second: keep one"
                )
        curves.append(curve)
    return tuple(curves)


def _card(row: dict[str, str], size: VmSku | None, path: str, line: int) -> Gpu:
    named = gpu(row["gpu"]) if row.get("gpu") else None
    if size is not None and size.gpu is not None:
        if named is not None and named.name != size.gpu:
            raise PlannerError(
                f"{path}, line {line}: {size.short_name} has no {named.label}: correct sku or gpu, or leave one out"
            )
        return gpu(size.gpu)
    if named is None:
        raise PlannerError(f"{path}, line {line}: neither sku nor gpu is filled in: write where it was measured")
    return named


def _run(row: dict[str, str], output_tokens: float, path: str, line: int) -> Run:
    concurrency = int(number_in(row, "concurrency", path, line)) if row.get("concurrency") else None
    tokens = number_in(row, "output_tok_s", path, line)
    rate = number_in(row, "rate", path, line) if row.get("rate") else tokens / output_tokens
    if not rate or not tokens:
        raise PlannerError(f"{path}, line {line}: nothing was answered in that run: leave it out")
    if row.get("rate") and tokens < 0.9 * rate * output_tokens:
        raise PlannerError(
            f"{path}, line {line}: {rate:g} requests a second of {output_tokens:g} tokens are"
            f" {rate * output_tokens:,.0f} tokens a second and {tokens:,.0f} were answered: leave out overloaded runs,"
            " or ask for the output length that was measured"
        )
    return Run(
        rate_per_s=rate,
        concurrency=concurrency,
        ttft_s=number_in(row, "ttft_ms", path, line) / 1000,
        tpot_s=number_in(row, "tpot_ms", path, line) / 1000,
        output_tokens_per_s=tokens,
    )
