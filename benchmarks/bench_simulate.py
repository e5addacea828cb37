"""How long 100,000 requests take to simulate, from a quiet server to an overloaded one, and the closed form."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from functools import partial

from planner import catalog
from planner.catalog.hardware import gpu
from planner.memory.serving import ServingSettings
from planner.performance.load import closed_form, largest_rate, saturation_per_s, simulated
from planner.performance.server import server
from planner.performance.traffic import Lengths, Slo, Traffic

REQUESTS = 100_000
SHARES = (0.3, 0.8, 0.95, 1.3)  # of the rate at which the server saturates
RUNS = 15
CASES = (  # model, card, context, prompt and output tokens; the second is limited by its KV cache
    ("qwen3-8b", "A100-80GB", 16_384, 500, 200),
    ("qwen3-8b", "A10", 8_192, 1_000, 200),
)


def main() -> None:
    """Print seconds by model, card and load, then milliseconds of the closed form and of a search for the rate."""
    for model, card, context, prompt, output in CASES:
        engine = server(catalog.model(model), ServingSettings(max_model_len=context), gpu(card))
        lengths = Traffic(prompt=Lengths(mean=prompt, sigma=0.8), output=Lengths(mean=output, sigma=0.8))
        most = saturation_per_s(engine, lengths)
        print(f"{model} on {card}, {prompt} + {output} tokens, saturated at {most:.2f} requests a second")
        for share in SHARES:
            traffic = lengths.model_copy(update={"rate_per_s": share * most})
            start = time.perf_counter()
            load = simulated(engine, traffic, requests=REQUESTS)
            seconds = time.perf_counter() - start
            print(
                f"  {share:.0%}: {REQUESTS:,} requests in {seconds:.2f} s; {load.running:.0f} sequences on average,"
                f" {load.preemptions:,} preemptions, {load.requests_per_s / most:.0%} of saturation served"
            )
        half = lengths.model_copy(update={"rate_per_s": most / 2})
        closed = _median_ms(partial(closed_form, engine, half))
        search = _median_ms(partial(largest_rate, engine, lengths, Slo(ttft_p95_s=1.0, tpot_p95_s=0.1)))
        print(f"  closed form: {closed:.1f} ms, the largest rate for an SLO: {search:.0f} ms, of processor time")


def _median_ms(work: Callable[[], object]) -> float:
    """Milliseconds of processor time, the median of RUNS."""
    spent = []
    for _ in range(RUNS):
        start = time.process_time()
        work()
        spent.append((time.process_time() - start) * 1000)
    return statistics.median(spent)


if __name__ == "__main__":
    main()
