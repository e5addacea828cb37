"""Fit the constants of serving steps to published measurements, and say how far each source is off when left out.

`python scripts/calibrate_serving.py` prints the tables and writes planner/catalog/serving_speed.json and the table of
docs; `--dry-run` only prints.

Every benchmark is replayed once. In closed loops and bursts the order of events does not depend on how long steps
take, so a figure is a fixed weighted sum of step times, and fitting is least squares on the logarithm of predicted /
measured: Gauss-Newton, with a loss that grows linearly beyond 20 % and priors from planner/catalog/serving_priors.json.
A source weighs as the square root of its rows. A constant is what all engines share plus what each engine adds to it.
"""

from __future__ import annotations

import ast
import hashlib
import json
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from planner.catalog.hardware import Gpu  # noqa: E402
from planner.catalog.serving_speed import KERNELS, matmul_peak, schedules_ahead  # noqa: E402
from planner.errors import PlannerError  # noqa: E402
from planner.performance.server import grouped_share  # noqa: E402
from planner.performance.step import UNBOUNDED, Speeds, Window, Work, step_parts  # noqa: E402
from planner.validate import load_rows  # noqa: E402
from planner.validate_throughput import (  # noqa: E402
    COLUMNS,
    Benchmark,
    benchmark,
    check_light,
    groups,
    replay,
    saturated,
)

Floats = NDArray[np.float64]
Key = tuple[str, ...]
PRIORS = json.loads((ROOT / "planner/catalog/serving_priors.json").read_text(encoding="utf-8"))
TARGET = ROOT / "planner/catalog/serving_speed.json"
MEASURED = ROOT / "tests/measured/throughput.csv"
ARCHITECTURES = tuple(dict.fromkeys(PRIORS["architectures"].values()))
SHARES = ("weights", "kv", "matmul", "attention", "elementwise")
ENGINES = ("vllm", "vllm-v0", "tensorrt-llm", "sglang")
METRICS = {"tpot_ms_mean": "itl", "itl_ms": "itl", "decode_tok_s_single_stream": "itl", "ttft_ms_mean": "ttft"}
METRICS |= dict.fromkeys(("output_tok_s_total", "total_tok_s", "req_s"), "throughput")
SPREAD = 0.15  # of the logarithm, a good row's own error
LINEAR = 0.2  # errors above this count linearly
ROW_WEIGHTS = {"itl": 1.0, "ttft": 0.5, "throughput": 1.0, "saturated ttft": 0.03}
BURST_WEIGHT = 0.4  # all requests at once: their lengths are assumed, and the front end's pace is in the figures
LEFT_OUT_CARDS = frozenset({"h20"})  # a card whose published speeds disagree with each other
ROWS_TO_TRUST = 4


@dataclass(frozen=True)
class Run:
    """A replayed benchmark. bins: (steps, 5) of step arguments; weights: (steps, 4) of total, TTFT, TPOT and ITL."""

    found: Benchmark
    work: Work
    kernel: str
    architecture: str
    asynchronous: bool
    bins: Floats
    weights: Floats
    saturated: bool


def replayed(found: Benchmark) -> Run:
    """The schedule of a benchmark, its steps gathered into bins of like ones."""
    if found.rate_per_s is not None:
        raise PlannerError("which requests meet depends on how long steps take: not a fixed sum of step times")
    running, served = replay(found, keep_steps=True)
    check_light(found, running)
    steps = np.array(served.steps, dtype=float)
    decode, context, prefill, pairs, sampled, count, _, waiting, decoding, slowness = steps.T
    gaps = max(sum(found.outputs) - len(found.outputs), 1)
    requests = len(found.prompts)
    weights = np.stack([count, count * waiting / requests, count * slowness / requests, count * decoding / gaps], 1)
    marks = np.stack(
        [np.round(3 * np.log2(decode + 1)), np.round(3 * np.log2(prefill + 1)),
         np.round(3 * np.log2(context / np.maximum(decode, 1) + 1))], 1,
    )  # fmt: skip
    _, place = np.unique(marks, axis=0, return_inverse=True)
    place = place.ravel()
    size = np.bincount(place, weights=count)
    bins = np.stack(
        [np.bincount(place, weights=count * x) / size for x in (decode, context, prefill, pairs, sampled)], 1
    )
    version = found.settings.engine_version or "0.32"
    return Run(
        found=found,
        work=running.work,
        kernel=running.speed.kernel,
        architecture=running.speed.architecture,
        asynchronous=schedules_ahead(found.engine, version) if found.asynchronous is None else found.asynchronous,
        bins=bins,
        weights=np.stack([np.bincount(place, weights=w) for w in weights.T], 1),
        saturated=saturated(found, served),
    )


def read_runs(path: Path) -> list[Run]:
    """Every benchmark of a table that can be predicted; the others are refused as `planner validate` refuses them."""
    runs = []
    for group in groups(load_rows(path, COLUMNS)):
        try:
            runs.append(replayed(benchmark(group)))
        except PlannerError:
            continue
    return runs


# ------------------------------------------------------------------------------------------------------- parameters


def parameters() -> dict[Key, tuple[float, float]]:
    """Every constant by name with its prior: (logarithm of the value, sigma)."""
    found: dict[Key, tuple[float, float]] = {}

    def add(key: Key, value: float, sigma: float) -> None:
        found[key] = (float(np.log(value)), sigma)

    for name in SHARES:
        for arch in ARCHITECTURES:
            prior = PRIORS["shares"][name]
            value = PRIORS["weak_architectures"].get(arch, {}).get(name, prior["value"])
            add((name, arch), value, prior["sigma"])
    for name in ("weights", "matmul"):
        for kernel, prior in PRIORS["kernels"].items():
            add((name, kernel), prior[name], PRIORS["kernel_sigma"][name])
        for arch in ARCHITECTURES:
            for kernel in KERNELS:
                add((name, arch, kernel), 1.0, PRIORS["pair_sigma"][name])
    for arch in ARCHITECTURES:
        prior = PRIORS["layer_by_architecture"]
        add(("layer", arch), prior.get(arch, prior["value"]), prior["sigma"])
    for kind in ("nvlink", "pcie"):
        add(("link", kind), PRIORS["link"][kind]["value"], PRIORS["link"][kind]["sigma"])
    for name, prior in PRIORS["engine"].items():
        add((name,), prior["value"], prior["sigma"])
    return found


PARAMETERS = tuple(parameters())
INDEX = {key: place for place, key in enumerate(PARAMETERS)}


class Problem:
    """The runs of one engine as arrays: what each constant multiplies, and what was measured."""

    def __init__(self, runs: Sequence[Run]) -> None:
        self.runs = runs
        sizes = [len(run.bins) for run in runs]
        self.run_of = np.repeat(np.arange(len(runs)), sizes)
        self.bins = np.concatenate([run.bins for run in runs])
        self.weights = np.concatenate([run.weights for run in runs])
        self.work = _stacked_work([run.work for run in runs], self.run_of)
        cards = [run.found.card for run in runs]
        self.bandwidth = self._by_run(cards, lambda card: float(card.bandwidth_bytes_per_s))
        self.wide = self._by_run(cards, lambda card: matmul_peak(card, "16-bit"))
        self.narrow = np.array([matmul_peak(run.found.card, run.kernel) for run in runs])  # type: ignore[arg-type]
        self.link = np.array([run.found.link.bytes_per_s if run.found.link else 1e12 for run in runs])
        self.layers = np.array([float(run.work.layers) for run in runs])
        self.experts = np.array([run.found.spec.experts is not None for run in runs])
        self.packed = self.experts & np.array([run.kernel in ("mxfp4", "nvfp4") for run in runs])
        self.asynchronous = np.array([run.asynchronous for run in runs])
        self.engine = np.array([ENGINES.index(run.found.engine) for run in runs])
        archs, kernels = [run.architecture for run in runs], [run.kernel for run in runs]
        none = len(PARAMETERS)  # a constant that is 1
        self.keys: dict[str, list[NDArray[np.intp]]] = {
            name: [np.array([INDEX[name, arch] for arch in archs])] for name in (*SHARES, "layer")
        }
        for name in ("weights", "matmul"):
            plain = [INDEX[name, arch, "16-bit"] for arch in archs]
            self.keys[f"plain {name}"] = [*self.keys[name], np.array(plain)]
            pairs = [INDEX[name, arch, kernel] for arch, kernel in zip(archs, kernels, strict=True)]
            of_kernel = [none if kernel == "16-bit" else INDEX[name, kernel] for kernel in kernels]
            self.keys[name] = [*self.keys[name], np.array(pairs), np.array(of_kernel)]
        links = [run.found.link.kind if run.found.link else "nvlink" for run in runs]
        self.keys["link"] = [np.array([INDEX["link", kind] for kind in links])]
        for key in PARAMETERS:
            if len(key) == 1:
                self.keys[key[0]] = [np.full(len(runs), INDEX[key])]
        self.rows = _rows(runs)
        self.metric = np.array([row[0] for row in self.rows])
        self.place = np.array([row[1] for row in self.rows])
        self.measured = np.log([row[2] for row in self.rows])
        self.kind = np.array([row[3] for row in self.rows])
        self.source = np.array([runs[row[1]].found.source for row in self.rows])
        many = Counter(self.source.tolist())
        self.weight = np.array(
            [row[4] / many[source] ** 0.5 for row, source in zip(self.rows, self.source, strict=True)]
        )

    @staticmethod
    def _by_run(cards: Iterable[Gpu], pick: Callable[[Gpu], float]) -> Floats:
        return np.array([pick(card) for card in cards])

    def speeds(self, theta: Floats) -> tuple[Speeds, Floats]:
        """The rates of every bin's run, and every run's floor."""
        logs = _by_engine(theta)

        def value(name: str) -> Floats:
            return np.asarray(np.exp(sum(logs[self.engine, places] for places in self.keys[name])))

        def spread(values: Floats) -> Floats:
            return np.asarray(values[self.run_of])

        weights, plain_weights, matmul, plain_matmul = (
            value(name) for name in ("weights", "plain weights", "matmul", "plain matmul")
        )
        hidden = np.where(self.asynchronous, value("asynchronous"), 1.0)
        layer = value("layer_seconds") * value("layer") + self.experts * value("expert_layer_seconds")
        speeds = Speeds(
            weight_bytes=spread(self.bandwidth * np.where(self.packed, plain_weights, weights)),
            head_bytes=spread(self.bandwidth * plain_weights),
            expert_bytes=spread(self.bandwidth * weights * value("expert_weights")),
            kv_bytes=spread(self.bandwidth * value("kv")),
            elementwise_bytes=spread(self.bandwidth * value("elementwise")),
            dense_flops=spread(np.where(self.packed, self.wide * plain_matmul, self.narrow * matmul)),
            head_flops=spread(self.wide * plain_matmul),
            expert_flops=spread(
                self.narrow * matmul * np.minimum(1.0, value("expert_matmul") * grouped_share(self.wide))
            ),
            attention_flops=spread(self.wide * value("attention")),
            ramp_tokens=spread(value("ramp_tokens")),
            step=spread(value("step_seconds") * hidden),
            layer=spread(layer),
            mixed=spread(self.layers * value("mixed_layer_seconds") * hidden),
            sequence=spread(value("sequence_seconds") * hidden),
            link_latency=spread(value("reduction_seconds")),
            link_bytes=spread(self.link * value("link")),
            floor=0.0,
        )
        return speeds, value("floor_seconds")

    def predicted(self, theta: Floats) -> Floats:
        """The logarithm of every measured figure, in seconds or seconds per unit."""
        speeds, floor = self.speeds(theta)
        decode, context, prefill, pairs, sampled = self.bins.T
        seconds = step_parts(
            self.work, speeds, decode=decode, context=context, prefill=prefill, pairs=pairs, sampled=sampled
        ).total
        sums = np.stack(
            [np.bincount(self.run_of, weights=w * seconds, minlength=len(self.runs)) for w in self.weights.T]
        )
        sums[1] += floor
        return np.asarray(np.log(np.maximum(sums[self.metric, self.place], 1e-9)))


def _by_engine(theta: Floats) -> Floats:
    """(engine, constant) logarithms from what is shared and what each engine adds, and a last constant that is 1."""
    table = theta.reshape(1 + len(ENGINES), len(PARAMETERS))
    return np.pad(table[0] + table[1:], ((0, 0), (0, 1)))


def _stacked_work(works: Sequence[Work], run_of: NDArray[np.intp]) -> Work:
    """Many runs' work as one, its numbers arrays over the bins."""

    def stack(pick: Callable[[Work], float]) -> Any:
        return np.array([pick(work) for work in works], dtype=float)[run_of]

    none = Window(token_bytes=0.0, pair_flops=0.0, reach=UNBOUNDED)

    def window(work: Work, place: int) -> Window:
        return work.windows[place] if place < len(work.windows) else none

    deepest = max(len(work.windows) for work in works)
    names = [name for name in Work.__dataclass_fields__ if name != "windows"]
    numbers = {name: stack(lambda work, name=name: getattr(work, name)) for name in names}  # type: ignore[misc]
    windows = tuple(
        Window(
            token_bytes=stack(lambda work, at=place: window(work, at).token_bytes),  # type: ignore[misc]
            pair_flops=stack(lambda work, at=place: window(work, at).pair_flops),  # type: ignore[misc]
            reach=stack(lambda work, at=place: window(work, at).reach),  # type: ignore[misc]
        )
        for place in range(deepest)
    )
    return Work(windows=windows, **numbers)


def _rows(runs: Sequence[Run]) -> list[tuple[int, int, float, str, float]]:
    """(which sum, run, measured value of it, kind, weight) of every figure."""
    rows = []
    for place, run in enumerate(runs):
        found = run.found
        tokens, prompts = sum(found.outputs), sum(found.prompts)
        units = {"output_tok_s_total": tokens, "decode_tok_s_single_stream": tokens, "total_tok_s": tokens + prompts,
                 "req_s": len(found.prompts)}  # fmt: skip
        seen = set()
        burst = 1.0 if found.concurrency else BURST_WEIGHT
        for name, (_, value) in found.measured.items():
            kind = METRICS[name]
            if name in units:
                if "rate" in seen:
                    continue  # the same figure in other words
                seen.add("rate")
                rows.append((0, place, units[name] / value, kind, ROW_WEIGHTS[kind] * burst))
                continue
            column = {"ttft_ms_mean": 1, "tpot_ms_mean": 2, "itl_ms": 3}[name]
            if kind == "ttft" and run.saturated:
                kind = "saturated ttft"
            weight = ROW_WEIGHTS[kind] * (0.5 if name == "itl_ms" else 1.0) * burst
            rows.append((column, place, value / 1e3, kind, weight))
    return rows


# ---------------------------------------------------------------------------------------------------------- fitting


def fit(problem: Problem, mean: Floats, sigma: Floats, kept: NDArray[np.bool_], start: Floats | None = None) -> Floats:
    """The constants that explain the kept rows best, starting from the priors: Gauss-Newton with damping."""
    theta = mean.copy() if start is None else start.copy()
    scale = problem.weight * kept / SPREAD**2
    damping = 1e-2

    def cost(at: Floats) -> tuple[float, Floats]:
        off = problem.predicted(at) - problem.measured
        loss = 2 * LINEAR**2 * (np.sqrt(1 + (off / LINEAR) ** 2) - 1)
        return float((scale * loss).sum() + (((at - mean) / sigma) ** 2).sum()), off

    value, off = cost(theta)
    active, engines = _active(problem), problem.engine[problem.place]
    for _ in range(15):
        slopes = np.zeros((len(off), len(theta)))
        for place in active:
            moved = theta.copy()
            moved[place] += 1e-3
            slope = (problem.predicted(moved) - problem.measured - off) / 1e-3
            slopes[:, place] = slope
            for engine in range(len(ENGINES)):  # what an engine adds moves its own rows alone
                slopes[:, (1 + engine) * len(PARAMETERS) + place] = np.where(engines == engine, slope, 0.0)
        weight = scale / np.sqrt(1 + (off / LINEAR) ** 2)
        curve = slopes.T @ (slopes * weight[:, None]) + np.diag(1 / sigma**2)
        pull = slopes.T @ (weight * off) + (theta - mean) / sigma**2
        while damping < 1e4:
            step = np.clip(-np.linalg.solve(curve + damping * np.diag(np.diag(curve)), pull), -0.7, 0.7)
            better, next_off = cost(theta + step)
            if better < value:
                break
            damping *= 5
        else:
            return theta
        damping = max(damping / 5, 1e-5)
        theta, off = theta + step, next_off
        done = value - better < 1e-3 * value
        value = better
        if done:
            break
    return theta


def _active(problem: Problem) -> list[int]:
    """The constants that these runs can say anything about."""
    archs = {run.architecture for run in problem.runs}
    kernels = {run.kernel for run in problem.runs}
    return [
        place
        for key, place in INDEX.items()
        if (len(key) == 1 or key[1] in archs | kernels | {"nvlink", "pcie"})
        and (len(key) < 3 or key[2] in kernels | {"16-bit"})
    ]


@dataclass(frozen=True)
class Fitted:
    """The constants, the errors (logarithm of predicted / measured) with them, and of each source without its rows."""

    problem: Problem
    theta: Floats
    inside: Floats
    outside: Floats


def fit_all(runs: Sequence[Run]) -> Fitted:
    """The fit over all rows, and the errors of each source by a fit without it."""
    problem = Problem(runs)
    priors = parameters()
    shared = np.array([priors[key] for key in PARAMETERS])
    own = PRIORS["other_engines"]["sigma"] * shared[:, 1]
    mean = np.concatenate([shared[:, 0], *[np.zeros(len(PARAMETERS))] * len(ENGINES)])
    sigma = np.concatenate([shared[:, 1], *[own] * len(ENGINES)])
    trusted = np.array([problem.runs[place].found.card.name not in LEFT_OUT_CARDS for place in problem.place])
    theta = fit(problem, mean, sigma, trusted)
    inside = problem.predicted(theta) - problem.measured
    outside = inside.copy()
    for source in sorted(set(problem.source.tolist())):
        mine = problem.source == source
        without = fit(problem, mean, sigma, trusted & ~mine, theta)
        outside[mine] = (problem.predicted(without) - problem.measured)[mine]
    return Fitted(problem=problem, theta=theta, inside=inside, outside=outside)


# ----------------------------------------------------------------------------------------------------------- writing


def catalog(fitted: Fitted, ranges: dict[str, Any], source: str) -> dict[str, Any]:
    """What planner.catalog.serving_speed reads."""
    engines = {}
    for name, logs in zip(ENGINES, _by_engine(fitted.theta), strict=True):
        value = {key: float(np.exp(logs[place])) for key, place in INDEX.items()}
        rows: dict[str, Counter[str]] = {}
        for run in fitted.problem.runs:
            if run.found.engine != name:
                continue
            rows.setdefault(run.architecture, Counter())[run.kernel] += 1
        entry: dict[str, Any] = {}
        for part in ("weights", "matmul"):
            entry[part] = {
                arch: {
                    kernel: _figure(
                        value[part, arch]
                        * value[part, arch, kernel]
                        * (1.0 if kernel == "16-bit" else value[part, kernel])
                    )
                    for kernel in KERNELS
                }
                for arch in ARCHITECTURES
            }
        for part in ("kv", "attention", "elementwise"):
            entry[part] = {arch: _figure(value[part, arch]) for arch in ARCHITECTURES}
        entry["layer_seconds"] = {
            arch: _figure(value["layer_seconds",] * value["layer", arch]) for arch in ARCHITECTURES
        }
        entry["link"] = {kind: _figure(value["link", kind]) for kind in ("nvlink", "pcie")}
        entry |= {key[0]: _figure(v) for key, v in value.items() if len(key) == 1 and key[0] != "layer_seconds"}
        entry["rows"] = {arch: dict(sorted(counts.items())) for arch, counts in sorted(rows.items())}
        engines[name] = entry
    return {
        "note": "Generated by scripts/calibrate_serving.py (make calibrate). rows: benchmarks of a kernel on a card",
        "as_of": PRIORS["as_of"],
        "source": source,
        "inputs": inputs_digest(),
        "rows_to_trust": ROWS_TO_TRUST,
        "architectures": PRIORS["architectures"],
        "ranges": ranges,
        "engines": engines,
    }


def _figure(value: float) -> float:
    return float(f"{value:.4g}")


def ranges_of(fitted: Fitted, without: str | None = None) -> dict[str, Any]:
    """low and high as multiples of a prediction: the middle COVER of measured / predicted over left-out sources."""
    problem = fitted.problem
    known = _known_without(problem)
    found: dict[str, Any] = {}
    for metric in ("itl", "ttft", "throughput"):
        mine = (problem.kind == metric) & (problem.source != without)
        near, far = -fitted.outside[mine & known], -fitted.outside[mine & ~known]
        low, high = np.quantile(near, [(1 - COVER) / 2, (1 + COVER) / 2])
        wide_low, wide_high = 1.5 * low, 1.5 * high
        if len(far) >= 20:
            far_low, far_high = np.quantile(far, [(1 - COVER) / 2, (1 + COVER) / 2])
            wide_low, wide_high = min(wide_low, far_low), max(wide_high, far_high)
        found[metric] = {
            "measured": [_figure(np.exp(min(low, -0.05))), _figure(np.exp(max(high, 0.05)))],
            "extrapolated": [_figure(np.exp(min(wide_low, -0.2))), _figure(np.exp(max(wide_high, 0.2)))],
        }
    return found


COVER = 0.88


def _known_without(problem: Problem) -> NDArray[np.bool_]:
    """Whether a row's engine has enough benchmarks of its kernel on its generation when its own source is left out."""
    keys = [(run.found.engine, run.architecture, run.kernel) for run in problem.runs]
    count = Counter(keys)
    by_source = Counter((key, run.found.source) for key, run in zip(keys, problem.runs, strict=True))
    left = {key: count[key[0]] - number for key, number in by_source.items()}
    places = zip(problem.place, problem.source, strict=True)
    return np.array([left[keys[place], str(source)] >= ROWS_TO_TRUST for place, source in places])


def table(fitted: Fitted) -> list[str]:
    """Errors by metric and engine, then by source, as lines of Markdown."""
    problem = fitted.problem
    engines = np.array([problem.runs[place].found.engine for place in problem.place])
    lines = [
        "| engine | source | metric | rows | left out: median % | bias % | 90th percentile % | fitted: median % |",
        "|---|---|---|---:|---:|---:|---:|---:|",
    ]

    def line(engine: str, source: str, kind: str) -> None:
        mask = problem.kind == kind
        if engine != "all":
            mask &= engines == engine
        if source != "all":
            mask &= problem.source == source
        if mask.any():
            off, inside = np.expm1(fitted.outside[mask]) * 100, np.expm1(fitted.inside[mask]) * 100
            lines.append(
                f"| {engine} | {source} | {kind} | {len(off)} | {np.median(abs(off)):.1f} | {np.median(off):+.1f}"
                f" | {np.quantile(abs(off), 0.9):.1f} | {np.median(abs(inside)):.1f} |"
            )

    for kind in KINDS:
        for engine in ("all", *ENGINES):
            line(engine, "all", kind)
    for engine in ENGINES:
        for source in sorted(set(problem.source[engines == engine].tolist())):
            for kind in KINDS:
                line(engine, source, kind)
    return lines


KINDS = ("itl", "throughput", "ttft", "saturated ttft")


def coverage(fitted: Fitted) -> dict[str, float]:
    """The share of left-out figures inside a range that was made without their source, by metric."""
    problem, held, total = fitted.problem, Counter[str](), Counter[str]()
    known = _known_without(problem)
    for source in set(problem.source.tolist()):
        ranges = ranges_of(fitted, without=source)
        for place in np.flatnonzero(problem.source == source):
            kind = str(problem.kind[place])
            if kind in ranges:
                low, high = ranges[kind]["measured" if known[place] else "extrapolated"]
                total[kind] += 1
                held[kind] += bool(np.log(low) <= -fitted.outside[place] <= np.log(high))
    return {kind: held[kind] / total[kind] for kind in sorted(total)}


def inputs_digest() -> str:
    """A digest of what the constants follow from: measurements, priors, the formulas of a step and of this fit."""
    found = hashlib.sha256(MEASURED.read_bytes())
    found.update(json.dumps(PRIORS, sort_keys=True).encode())
    for path in (ROOT / "planner/performance/step.py", Path(__file__)):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        for node in ast.walk(tree):  # words about the code may change
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and ast.get_docstring(node) is not None:
                node.body = node.body[1:]
        found.update(ast.dump(tree).encode())
    return found.hexdigest()[:16]


def calibrate(path: Path) -> tuple[Fitted, dict[str, Any]]:
    """The fit to a table, and the catalog file that it makes."""
    runs = read_runs(path)
    fitted = fit_all(runs)
    source = (
        f"fitted to {len(fitted.problem.rows)} published figures of {len(runs)} benchmarks"
        " (tests/measured/throughput.csv) by scripts/calibrate_serving.py"
    )
    return fitted, catalog(fitted, ranges_of(fitted), source)


def main() -> int:
    fitted, facts = calibrate(MEASURED)
    print("\n".join(table(fitted)))
    print("within the range made without their source:", {k: f"{v:.0%}" for k, v in coverage(fitted).items()})
    if "--dry-run" not in sys.argv:
        _write(TARGET, json.dumps(facts, indent=1) + "\n")
        _write(TABLE, left_out_page(fitted))
    return 0


TABLE = ROOT / "tests/measured/throughput_left_out.json"


def left_out_page(fitted: Fitted) -> str:
    """The errors of every source without its rows, as docs/validation.md shows them: too slow to make with the page."""
    return json.dumps({"coverage": coverage(fitted), "table": table(fitted)}, indent=1) + "\n"


def _write(path: Path, text: str) -> None:
    beside = path.with_suffix(".part")
    beside.write_text(text, encoding="utf-8")
    beside.replace(path)


if __name__ == "__main__":
    sys.exit(main())
