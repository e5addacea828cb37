"""What people say of cards and features, beside what the plan says. None of it was used to fit anything."""

from __future__ import annotations

import pytest

from planner.catalog import model
from planner.catalog.hardware import gpu
from planner.memory.serving import ServingSettings
from planner.performance.features import speculation_by_batch
from planner.performance.load import closed_form
from planner.performance.server import server
from planner.performance.traffic import Lengths, Traffic


def test_a_t4_classifies_with_a_3_8_b_model_within_150_ms() -> None:
    """A published sizing takes a T4 for classification with a 3.8 B model (Phi-3.5-mini) at 150 ms, 95th percentile.

    It does not say how long the texts are. At 256 tokens: 2 x 3.7 B x 256 operations at 0.4 of 65 TFLOPS are 73 ms, and
    reading 7.6 GB at 0.85 of 320 GB/s, in part beside it, 28 ms; with the floor of 36 ms there is room for a little
    queue. At 512 tokens there is none: the reference holds for short texts alone.
    """
    card = server(model("phi-3.5-mini"), ServingSettings(max_model_len=2048), gpu("t4"))

    def p95(tokens: int, rate: float) -> float:
        traffic = Traffic(prompt=Lengths(mean=tokens), output=Lengths(mean=1), rate_per_s=rate)
        return closed_form(card, traffic).ttft.p95

    assert p95(256, 0.5) < 0.150
    assert p95(512, 0.5) > 0.150


def test_speculation_fades_with_the_batch() -> None:
    """Published: 2 to 3 times faster alone, nothing or a loss in a crowd (EAGLE's and vLLM's own pages say so)."""
    h100 = server(model("llama-3.1-8b"), ServingSettings(max_model_len=4096), gpu("h100-80-sxm"))
    gains = [
        speculation_by_batch(h100, batch, context=1000, acceptance=0.7, draft_tokens=3) for batch in (1, 16, 64, 256)
    ]
    assert 2.0 < gains[0] < 2.54  # at most (1 - 0.7^4) / 0.3 = 2.53
    assert gains == sorted(gains, reverse=True)
    assert gains[-1] < 0.75 * gains[0]


@pytest.mark.parametrize("card", ["a100-80-pcie", "h100-80-sxm"])
def test_fp8_beats_awq_in_a_crowd_only_where_the_card_multiplies_it(card: str) -> None:
    settings = ServingSettings(max_model_len=4096)
    saturated = []
    for name in ("fp8", "awq"):
        running = server(model("qwen3-8b"), settings.model_copy(update={"quantization": name}), gpu(card))
        parts = running.parts(decode=200, context=200 * 400, prefill=1848, pairs=1848 * 250)
        saturated.append(2048 / parts.total)
    assert (saturated[0] / saturated[1] > 1.3) == (card == "h100-80-sxm")
