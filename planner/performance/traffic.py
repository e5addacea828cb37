"""What clients ask of a server: lengths of prompts and answers, how requests come, the latency they were promised."""

from __future__ import annotations

import csv
from itertools import pairwise
from math import ceil, isfinite, log
from pathlib import Path
from statistics import NormalDist

from planner.errors import PlannerError
from planner.model import Frozen

TRACE_COLUMNS = ("arrival_seconds", "prompt_tokens", "output_tokens")


class Lengths(Frozen):
    """How many tokens a prompt or an answer has.

    mean: in tokens; sigma: of the logarithm of a log-normal length with that mean, 0 where all are equal
    longest: longer ones are cut, which lowers the mean; values: lengths as they were counted, in place of the law
    """

    mean: float
    sigma: float = 0.0
    longest: int | None = None
    values: tuple[int, ...] = ()

    def quantiles(self, n: int) -> list[int]:
        """n equally likely lengths, ascending: the means of n equal slices of the law, whole and at least 1."""
        if self.values:
            ordered = sorted(self.values)
            edges = [i * len(ordered) // n for i in range(n + 1)]
            return [
                self._whole(sum(part) / len(part))
                for part in (ordered[low : max(high, low + 1)] for low, high in pairwise(edges))
            ]
        # of a log-normal law with mean m and sigma s, the share of m below the quantile of z is Phi(z - s)
        normal = NormalDist()
        below = [normal.cdf(normal.inv_cdf(i / n) - self.sigma) for i in range(1, n)]
        # sorted, for equal lengths just at a half token may round either way
        return sorted(self._whole(self.mean * n * (high - low)) for low, high in pairwise((0.0, *below, 1.0)))

    def sample(self, n: int, seed: int) -> list[int]:
        """n random lengths, the same for the same seed."""
        import numpy as np

        random = np.random.default_rng(seed)
        if self.values:
            return [self._whole(value) for value in random.choice(self.values, n)]
        middle = log(self.mean) - self.sigma**2 / 2
        return [self._whole(value) for value in np.exp(middle + self.sigma * random.standard_normal(n))]

    def _whole(self, value: float) -> int:
        whole = max(1, round(float(value)))
        return whole if self.longest is None else min(whole, self.longest)

    @property
    def least_longest(self) -> int:
        """A length that occurs for certain: the longest value, the cut, or the mean."""
        if self.values:
            return max(self._whole(value) for value in self.values)
        return ceil(self.mean) if self.longest is None else self.longest if self.sigma else self._whole(self.mean)


class Traffic(Frozen):
    """Requests: their lengths, and one of three ways in which they come.

    rate_per_s: at random moments (Poisson); concurrency: each client sends its next request when the last is answered
    arrivals: seconds of a trace, ascending, with one value of `prompt` and of `output` for each
    prefix_hit_rate: share of a prompt's tokens that the prefix cache holds already
    """

    prompt: Lengths
    output: Lengths
    rate_per_s: float | None = None
    concurrency: int | None = None
    arrivals: tuple[float, ...] = ()
    prefix_hit_rate: float = 0.0


class Slo(Frozen):
    """What 95 of 100 requests are promised, in seconds; None where nothing is.

    ttft: to the first token; tpot: for each later token, the mean of a request; e2e: to the last token
    """

    ttft_p95_s: float | None = None
    tpot_p95_s: float | None = None
    e2e_p95_s: float | None = None


class Percentiles(Frozen):
    """Seconds. Infinite where a queue grows without end."""

    mean: float
    p50: float
    p95: float
    p99: float


def read_traffic(path: str | Path) -> Traffic:
    """The requests of a CSV trace with the columns arrival_seconds, prompt_tokens and output_tokens.

    Raises PlannerError for a file that cannot be read, a missing column, and a row that is not a request.
    """
    times: list[float] = []
    prompts: list[int] = []
    outputs: list[int] = []
    try:
        with Path(path).open(newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file)
            missing = [name for name in TRACE_COLUMNS if name not in (reader.fieldnames or ())]
            if missing:
                raise PlannerError(f"{path} lacks the columns {', '.join(missing)}: a trace needs all of {_columns()}")
            for row in reader:
                where = f"line {reader.line_num} of {path}"
                times.append(_seconds(row["arrival_seconds"], where))
                prompts.append(_tokens(row["prompt_tokens"], "prompt_tokens", where))
                outputs.append(_tokens(row["output_tokens"], "output_tokens", where))
                if len(times) > 1 and times[-1] < times[-2]:
                    raise PlannerError(f"{where} arrives before the line above it: sort the trace by arrival_seconds")
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise PlannerError(f"{path} cannot be read as a CSV file ({error}): give the path of a trace") from error
    if len(times) < 2 or times[-1] <= times[0]:
        raise PlannerError(f"{path} holds no two requests at different times: a trace needs at least two")
    return Traffic(
        prompt=Lengths(mean=sum(prompts) / len(prompts), values=tuple(prompts)),
        output=Lengths(mean=sum(outputs) / len(outputs), values=tuple(outputs)),
        arrivals=tuple(times),
    )


def _columns() -> str:
    return ", ".join(TRACE_COLUMNS)


def _seconds(cell: str | None, where: str) -> float:
    try:
        value = float(cell or "")
    except ValueError:
        value = -1.0
    if not isfinite(value) or value < 0:
        raise PlannerError(f"{where} has {cell!r} for arrival_seconds: write seconds from the start, such as 12.5")
    return value


def _tokens(cell: str | None, column: str, where: str) -> int:
    text = (cell or "").strip()
    if not (text.isascii() and text.isdigit()) or not 1 <= int(text) <= 10**9:
        raise PlannerError(f"{where} has {cell!r} for {column}: write a whole number of tokens from 1")
    return int(text)
