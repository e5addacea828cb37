"""Fit the constants of planner/catalog/training_speed.json to published training speeds, and say how far off they are.

`python scripts/calibrate_training.py` prints errors with every project's rows left out in turn; `--write` stores the
fit. Robust least squares (Gauss-Newton, Huber weights) on logarithms of seconds, every constant held by a prior.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from planner.catalog.training_speed import card_family  # noqa: E402
from planner.errors import PlannerError  # noqa: E402
from planner.memory.finetune_settings import resolve  # noqa: E402
from planner.performance.training import Card, card_of, step_parts, trainer_kind  # noqa: E402
from planner.performance.training_work import TrainingWork, training_work  # noqa: E402
from planner.validate import load_rows  # noqa: E402
from planner.validate_training import COLUMNS, speed_row  # noqa: E402

FACTS = ROOT / "planner" / "catalog" / "training_speed.json"
MEASURED = ROOT / "tests" / "measured" / "training_speed.csv"
LEFT_OUT = MEASURED.with_name("training_left_out.json")
NOISE = 0.08  # log error of a good row: two runs of one configuration in the tables differ by up to 10 %
HUBER = 2.0  # residuals beyond so many times the noise count linearly
FAMILY_SPREAD = 0.12  # prior log spread of a family's own deviation from the sustained fraction
COVERAGE = 0.85  # share of the left-out rows that the stated interval is made to hold
BOUNDED = ("sustained_fraction", "bandwidth_fraction", "overlap_fraction", "link_fraction")  # shares below 1
Vector = np.ndarray[Any, np.dtype[np.float64]]


class Row(NamedTuple):
    """A measured row, ready to be timed."""

    id: str
    source: str
    grade: str
    family: str
    gpu: str
    work: TrainingWork
    card: Card
    cap: float
    kind: str
    seconds: float


def read(path: Path) -> tuple[list[Row], Counter[str]]:
    """The rows that can be predicted, grades A and B, and how many are refused for what."""
    rows, refused = [], Counter[str]()
    for cells in load_rows(path, COLUMNS):
        try:
            found = speed_row(cells)
            family = card_family(found.card.name)
            s, gpu = found.settings, found.card
            hopper = gpu.is_cuda and gpu.capability[0] >= 9
            job = resolve(found.spec, s, gpu.supports_bf16, gpu.supports_flash_attention_2 is not False, hopper)
            work = training_work(job, compiled=found.compiled, recomputed=found.recomputed)
        except PlannerError as error:
            refused[str(error)] += 1
            continue
        if found.grade not in "AB":
            refused["grade C: something of the configuration is not known"] += 1
            continue
        rows.append(
            Row(
                id=cells["id"],
                source=found.source,
                grade=found.grade,
                family=family.name,
                gpu=gpu.name,
                work=work,
                card=card_of(gpu, family, found.link_bytes_per_s),
                cap=family.matmul_cap,
                kind=trainer_kind(job.trainer.name, found.compiled),
                seconds=work.tokens * work.accumulation / found.measured,
            )
        )
    return rows, refused


class Model:
    """The constants as a vector: log of each (logit of a share), then the families' deviations."""

    def __init__(self, facts: Mapping[str, Any], families: Sequence[str]) -> None:
        self.fixed = {r["name"]: r["value"] for r in facts["constants"]}
        self.fitted = [r for r in facts["constants"] if r["fitted"]]
        self.families = list(families)
        self.prior = np.array([self._into(r["name"], r["prior"]) for r in self.fitted] + [0.0] * len(families))
        spread = [r["prior_spread"] / (1 - r["prior"] if r["name"] in BOUNDED else 1) for r in self.fitted]
        self.spread = np.array(spread + [FAMILY_SPREAD] * len(families))

    @staticmethod
    def _into(name: str, value: float) -> float:
        return float(np.log(value / (1 - value)) if name in BOUNDED else np.log(value))

    def constants(self, theta: Vector) -> dict[str, Any]:
        values = dict(self.fixed)
        for record, x in zip(self.fitted, theta, strict=False):
            values[record["name"]] = float(1 / (1 + np.exp(-x)) if record["name"] in BOUNDED else np.exp(x))
        return values

    def fraction(self, theta: Vector, family: str, cap: float) -> float:
        """What products reach: the sustained share of the cap, with the family's own deviation; never above the cap."""
        own = theta[len(self.fitted) + self.families.index(family)] if family in self.families else 0.0
        return min(cap, cap * self.constants(theta)["sustained_fraction"] * float(np.exp(own)))

    def log_seconds(self, theta: Vector, rows: Sequence[Row]) -> Vector:
        k = self.constants(theta)
        return np.array(
            [
                np.log(
                    sum(
                        step_parts(
                            r.work,
                            replace(r.card, matmul_fraction=self.fraction(theta, r.family, r.cap)),
                            r.kind,
                            k,
                        ).values()
                    )
                )
                for r in rows
            ]
        )


def weights_of(rows: Sequence[Row]) -> Vector:
    """A project with n rows weighs as much as sqrt(n) independent ones; grade B counts half."""
    counts = Counter(r.source for r in rows)
    return np.array([counts[r.source] ** -0.5 * (1.0 if r.grade == "A" else 0.5) for r in rows])


def fit(model: Model, rows: Sequence[Row], rounds: int = 12) -> Vector:
    """Gauss-Newton with Huber weights and priors, in logarithms."""
    theta, measured, weight = model.prior.copy(), np.log([r.seconds for r in rows]), weights_of(rows)
    for _ in range(rounds):
        base = model.log_seconds(theta, rows)
        residual = (measured - base) / NOISE
        jacobian = np.empty((len(rows), len(theta)))
        for i in range(len(theta)):
            moved = theta.copy()
            moved[i] += 1e-4
            jacobian[:, i] = (model.log_seconds(moved, rows) - base) / 1e-4 / NOISE
        huber = weight * np.minimum(1.0, HUBER / np.maximum(np.abs(residual), 1e-9))
        pull = (model.prior - theta) / model.spread**2
        left = (jacobian * huber[:, None]).T @ jacobian + np.diag(model.spread**-2)
        theta = theta + np.clip(np.linalg.solve(left, (jacobian * huber[:, None]).T @ residual + pull), -0.5, 0.5)
    return theta


def left_out(facts: Mapping[str, Any], rows: Sequence[Row], group: Callable[[Row], str]) -> dict[str, float]:
    """log(predicted / measured speed) of every row, each group predicted by a fit to the others."""
    errors: dict[str, float] = {}
    for name in dict.fromkeys(map(group, rows)):
        kept = [r for r in rows if group(r) != name]
        held = [r for r in rows if group(r) == name]
        model = Model(facts, sorted({r.family for r in kept}))
        found = model.log_seconds(fit(model, kept), held)
        errors |= {r.id: float(np.log(r.seconds) - x) for r, x in zip(held, found, strict=True)}
    return errors


def quantile(values: Vector, weight: Vector, share: float) -> float:
    order = np.argsort(values)
    total = np.cumsum(weight[order])
    return float(values[order][np.searchsorted(total, share * total[-1])])


Line = tuple[str, int, float, float, float, float]


def lines(rows: Sequence[Row], errors: Mapping[str, float], key: Callable[[Row], str], band: float) -> list[Line]:
    """(group, rows, median %, bias %, 90th percentile %, within the interval %) of each group and of all."""
    found = []
    for name in [*dict.fromkeys(map(key, rows)), ""]:
        off = np.array([errors[r.id] for r in rows if not name or key(r) == name])
        size = 100 * np.abs(np.exp(off) - 1)
        figures = (
            np.median(size),
            100 * (np.exp(np.median(off)) - 1),
            np.quantile(size, 0.9),
            100 * np.mean(np.abs(off) <= band),
        )
        median, bias, high, inside = (round(float(figure), 1) for figure in figures)
        found.append((name or "all", len(off), median, bias, high, inside))
    return found


def table(title: str, rows: Sequence[Row], errors: Mapping[str, float], key: Callable[[Row], str], band: float) -> None:
    print(f"\n{title:<34} rows  median %   bias %    p90 %  within interval %")
    for name, count, median, bias, high, inside in lines(rows, errors, key, band):
        print(f"{name:<34} {count:4} {median:9.1f} {bias:+8.1f} {high:8.1f} {inside:10.0f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("file", nargs="?", type=Path, default=MEASURED)
    parser.add_argument("--write", action="store_true", help="store the fit in planner/catalog/training_speed.json")
    chosen = parser.parse_args()
    facts = json.loads(FACTS.read_text(encoding="utf-8"))
    rows, refused = read(chosen.file)
    families = sorted({r.family for r in rows})
    model = Model(facts, families)
    theta = fit(model, rows)
    out = left_out(facts, rows, lambda r: r.source)
    sizes = np.abs([out[r.id] for r in rows])
    band = max(quantile(sizes, weights_of(rows), COVERAGE), float(np.quantile(sizes, COVERAGE)))
    strange = left_out(facts, rows, lambda r: r.family)
    others = [r for r in rows if r.family != "a100"]
    wide = max(2 * band, quantile(np.abs([strange[r.id] for r in others]), weights_of(others), COVERAGE))
    fitted_errors = dict(
        zip(
            [r.id for r in rows],
            [float(np.log(r.seconds) - x) for r, x in zip(rows, model.log_seconds(theta, rows), strict=True)],
            strict=True,
        )
    )
    for reason, count in refused.most_common():
        print(f"{count:4} refused: {reason}")
    table("fitted to all, by project", rows, fitted_errors, lambda r: f"{r.source} ({r.grade})", band)
    table("left out by project", rows, out, lambda r: f"{r.source} ({r.grade})", band)
    table("left out, by GPU", rows, out, lambda r: r.gpu, band)
    grade_a = [r for r in rows if r.grade == "A"]
    table("left out, grade A", grade_a, out, lambda r: r.source, band)
    table("family left out", others, strange, lambda r: r.family, wide)
    k = model.constants(theta)
    print(f"\ninterval: a factor of {np.exp(band):.3f} each way, {np.exp(wide):.3f} for unmeasured families")
    for record in model.fitted:
        print(f"{record['name']:<26} {k[record['name']]:.6g} (prior {record['prior']:g})")
    for family in families:
        cap = next(r.cap for r in rows if r.family == family)
        print(f"matmul_fraction {family:<10} {model.fraction(theta, family, cap):.4f} (cap {cap})")
    if chosen.write:
        store(facts, model, theta, rows, band, wide)
        by_project = lines(rows, out, lambda r: f"{r.source} (grade {r.grade})", band)
        grade = next(line for line in lines(grade_a, out, lambda r: r.source, band) if line[0] == "all")
        found = {"table": [*by_project[:-1], ("all of grade A", *grade[1:]), by_project[-1]]}
        LEFT_OUT.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


def store(facts: dict[str, Any], model: Model, theta: Vector, rows: Sequence[Row], band: float, wide: float) -> None:
    """Write the constants back, one record a line."""
    k = model.constants(theta)
    for record in model.fitted:
        record["value"] = float(f"{k[record['name']]:.4g}")
    seen = Counter(r.family for r in rows)
    for family in facts["families"]:
        family["matmul_fraction"] = float(f"{model.fraction(theta, family['name'], family['matmul_cap']):.4f}")
        family["rows"] = seen[family["name"]]
        family["extrapolated"] = not seen[family["name"]]
    projects = sorted({r.source for r in rows})
    facts["fit"] |= {
        "rows": len(rows),
        "sources": len(projects),
        "log_spread": float(f"{band:.3f}"),
        "extrapolated_log_spread": float(f"{wide:.3f}"),
        "source": "scripts/calibrate_training.py on tests/measured/training_speed.csv, robust least squares on log"
        f" seconds with priors, a project weighing as the square root of its rows: {', '.join(projects)}",
    }
    records = {name: ",\n".join(f"    {_line(r)}" for r in facts[name]) for name in ("constants", "families")}
    FACTS.write_text(
        f'{{\n  "about": {_line(facts["about"])},\n  "fit": {_line(facts["fit"])},\n  "constants": [\n'
        f'{records["constants"]}\n  ],\n  "families": [\n{records["families"]}\n  ]\n}}\n',
        encoding="utf-8",
    )


def _line(value: object) -> str:
    return json.dumps(value, ensure_ascii=False)


if __name__ == "__main__":
    main()
