"""Serving under load: queues whose answer is known, the closed form beside the simulation, features, and refusals."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from math import exp, inf
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from planner import catalog
from planner.catalog.hardware import gpu
from planner.errors import PlannerError
from planner.memory.serving import ServingSettings
from planner.performance.features import speculation_by_batch, tokens_per_step, what_it_buys
from planner.performance.load import (
    Load,
    alone,
    at_rate,
    check_slo,
    closed_form,
    largest_rate,
    saturation_per_s,
    simulated,
)
from planner.performance.queueing import closed_chain, first_token, open_chain
from planner.performance.replica import Asked, Replica
from planner.performance.server import Server, server
from planner.performance.simulate import Limits
from planner.performance.traffic import Lengths, Slo, Traffic, read_traffic


@cache
def replica_of(
    model: str, card: str, quantization: str | None = None, engine: Any = None, context: int = 8192
) -> Server:
    settings_ = ServingSettings(max_model_len=context, quantization=quantization)
    return server(catalog.model(model), settings_, gpu(card), engine=engine)


def requests(prompt: float, output: float, sigma: float = 0.0, **others: Any) -> Traffic:
    return Traffic(prompt=Lengths(mean=prompt, sigma=sigma), output=Lengths(mean=output, sigma=sigma), **others)


# ------------------------------------------------------------------------------------- queues whose answer is known


@dataclass(frozen=True)
class Toy:
    """Steps of `fixed` seconds, `each` for a sequence and `token` for a prompt token."""

    limits: Limits
    fixed: float = 0.0
    each: float = 0.0
    token: float = 0.0
    extra: int = 0

    def seconds(self, decode: Any, context: Any, prefill: Any, pairs: Any, sampled: Any) -> Any:
        return self.fixed + self.each * decode + self.token * prefill + 0.0 * sampled


def toy(asked: Asked, **parts: Any) -> Replica:
    return Replica(Toy(**parts), asked)  # type: ignore[arg-type]


def equal(prompt: int, output: int) -> Asked:
    return Asked(np.full(8, float(prompt)), np.full(8, float(output)))


@pytest.mark.parametrize("rho", [0.2, 0.5, 0.8])
def test_prompts_that_fill_a_step_wait_as_in_an_m_d_1_queue(rho: float) -> None:
    # one prompt of 100 tokens a step of 1 s; Pollaczek-Khinchine: S + rho S / 2 (1 - rho)
    replica = toy(equal(100, 1), limits=Limits(8, 100), token=0.01)
    values, weights = first_token(replica, rho, open_chain(replica, rho))
    assert float((values * weights).sum()) == pytest.approx(1 + rho / (2 * (1 - rho)), rel=0.05)


@pytest.mark.parametrize("rho", [0.3, 0.6, 0.9])
def test_sequences_that_share_a_fixed_rate_are_as_many_as_in_an_m_g_1_processor_sharing_queue(rho: float) -> None:
    # a step of n sequences lasts n x 10 ms: 100 steps are 1 s of work each, and rho / (1 - rho) run
    replica = toy(equal(1, 101), limits=Limits(1000, 100_000), each=0.01, token=1e-6)
    chain = open_chain(replica, rho)
    assert chain.running == pytest.approx(rho / (1 - rho), rel=0.06)
    assert chain.step_seconds == pytest.approx(0.01 / (1 - rho), rel=0.06)


def test_sequences_that_do_not_slow_each_other_are_poisson_in_number() -> None:
    # a step lasts 10 ms whatever is in it: 100 steps of 3 requests a second are 3 sequences on average
    chain = open_chain(toy(equal(1, 101), limits=Limits(1000, 100_000), fixed=0.01), 3.0)
    assert chain.running == pytest.approx(3, rel=0.01)
    assert list(chain.probability[:3]) == pytest.approx([exp(-3), 3 * exp(-3), 4.5 * exp(-3)], rel=0.06)


def test_a_place_is_held_for_the_step_of_the_prompt_and_for_each_later_token() -> None:
    # 8 places, 101 steps of 10 ms each: 8 / 1.01 s
    assert toy(equal(1, 101), limits=Limits(8, 100_000), fixed=0.01).saturation == pytest.approx(8 / 1.01)


def test_the_budget_of_a_step_is_shared_by_prompts_and_answers() -> None:
    # each request takes 90 prompt tokens and 10 decode steps of a budget of 100 a step of 1 s: one request a second
    assert toy(equal(90, 11), limits=Limits(1000, 100), fixed=1.0).saturation == pytest.approx(1.0, rel=0.02)


def test_a_full_cache_limits_the_sequences_and_costs_the_answers_a_second_computation() -> None:
    # 10 sequences of 100 + 100 / 2 tokens and half a prompt fill 1,550 tokens: 10 places
    roomy = toy(equal(100, 100), limits=Limits(10, 100_000), fixed=0.01, token=1e-5)
    full = toy(equal(100, 100), limits=Limits(100, 100_000, kv_tokens=1550), fixed=0.01, token=1e-5)
    assert full.most == 10
    # 1e-5 s x 100 more prompt tokens a request: 1 / full - 1 / roomy = 1 ms
    assert 1 / full.saturation - 1 / roomy.saturation == pytest.approx(1e-3, rel=0.05)


def test_clients_of_a_closed_loop_obey_littles_law() -> None:
    # two clients; prompt 1 s alone; 10 steps of 1 s: two answers in 11 to 12 s
    replica = toy(equal(1, 11), limits=Limits(8, 100), fixed=1.0)
    rate, chain, values, weights = closed_chain(replica, 2)
    assert rate == pytest.approx(2 / 11, rel=0.05)
    assert rate * (float((values * weights).sum()) + 10 * chain.step_seconds) == pytest.approx(2)


# ------------------------------------------------------------------------------------ closed form beside simulation

# model, card, format, engine, prompt and output tokens, sigma
GRID = (
    ("qwen3-8b", "A100-80GB", None, None, 500, 200, 0.0),
    ("qwen3-8b", "A100-80GB", None, None, 3000, 200, 0.3),  # prompts beyond the budget of a step
    ("qwen3-8b", "H100-80GB", "fp8", None, 1000, 200, 0.5),
    ("qwen3-30b-a3b", "H100-80GB", None, None, 1000, 200, 0.5),
    ("qwen2.5-7b", "T4", "awq", None, 300, 100, 0.0),
    ("gemma-3-4b", "L4", None, None, 800, 150, 0.4),  # sliding windows
    ("qwen3-8b", "A100-80GB", None, "sglang", 1000, 200, 0.4),  # prompts first
    ("phi-3-mini", "A100-80GB", None, None, 512, 1, 0.0),  # classification
)


@pytest.mark.parametrize("share", [0.3, 0.7])
@pytest.mark.parametrize("case", GRID, ids=lambda case: f"{case[0]}-{case[1]}-{case[3] or 'vllm'}-{case[4]}")
def test_closed_form_and_simulation_agree_below_saturation(case: tuple[Any, ...], share: float) -> None:
    model, card, quantization, engine, prompt, output, sigma = case
    engine_ = replica_of(model, card, quantization, engine)
    lengths = requests(prompt, output, sigma)
    traffic = at_rate(lengths, share * saturation_per_s(engine_, lengths))
    formula, run = closed_form(engine_, traffic), simulated(engine_, traffic, requests=4000)
    assert formula.ttft.mean == pytest.approx(run.ttft.mean, rel=0.12)
    assert formula.ttft.p95 == pytest.approx(run.ttft.p95, rel=0.25)
    assert formula.e2e.mean == pytest.approx(run.e2e.mean, rel=0.1)
    assert formula.utilization == pytest.approx(run.utilization)
    if output > 1:
        assert formula.tpot.mean == pytest.approx(run.tpot.mean, rel=0.07)
        assert formula.tpot.p95 == pytest.approx(run.tpot.p95, rel=0.2)
        assert formula.running == pytest.approx(run.running, rel=0.1)


@pytest.mark.parametrize("case", GRID[:5], ids=lambda case: f"{case[0]}-{case[1]}-{case[4]}")
def test_an_overloaded_server_completes_what_saturation_says(case: tuple[Any, ...]) -> None:
    model, card, quantization, engine, prompt, output, sigma = case
    engine_ = replica_of(model, card, quantization, engine)
    lengths = requests(prompt, output, sigma)
    most = saturation_per_s(engine_, lengths)
    run = simulated(engine_, at_rate(lengths, 2 * most), requests=4000)
    assert run.saturated
    assert run.requests_per_s == pytest.approx(most, rel=0.12)  # the places fill during the first part of the run


@pytest.mark.parametrize("clients", [1, 8, 64])
def test_closed_loops_agree_in_throughput_and_in_the_time_of_a_token(clients: int) -> None:
    engine = replica_of("qwen3-8b", "A100-80GB")
    traffic = requests(500, 200, 0.5, concurrency=clients)
    formula, run = closed_form(engine, traffic), simulated(engine, traffic, requests=max(400, 25 * clients))
    assert formula.requests_per_s == pytest.approx(run.requests_per_s, rel=0.1)
    assert formula.tpot.mean == pytest.approx(run.tpot.mean, rel=0.1)
    assert formula.utilization <= 1.0


def test_a_lone_client_is_served_in_the_time_of_its_own_steps() -> None:
    engine = replica_of("qwen3-8b", "A100-80GB")
    run = simulated(engine, requests(500, 2, concurrency=1), requests=20)
    first = engine.step(0, 0, 500, 500 * 250, 1)
    second = engine.step(1, 501, 0, 0, 1)
    assert run.ttft.mean == pytest.approx(first + engine.speeds.floor)
    assert run.tpot.mean == pytest.approx(second)
    assert run.e2e.p99 == pytest.approx(first + second + engine.speeds.floor)


def test_an_overloaded_closed_form_says_so_and_gives_no_finite_latency() -> None:
    engine = replica_of("qwen3-8b", "A100-80GB")
    lengths = requests(500, 200)
    load = closed_form(engine, at_rate(lengths, 2 * saturation_per_s(engine, lengths)), Slo(ttft_p95_s=1))
    assert load.saturated
    assert load.utilization == pytest.approx(2)
    assert load.ttft.p95 == inf
    assert load.requests_per_s == pytest.approx(saturation_per_s(engine, lengths))
    assert load.goodput_per_s == 0


def test_the_range_around_each_metric_is_that_of_the_fitted_speeds() -> None:
    engine = replica_of("qwen3-8b", "A100-80GB")
    load = closed_form(engine, requests(500, 200, rate_per_s=1.0))
    for metric in ("ttft", "itl", "throughput"):
        factors = engine.speed.factors(metric)  # type: ignore[arg-type]
        assert (load.low[metric], load.high[metric]) == (factors.low, factors.high)  # type: ignore[index]


def test_a_simulation_is_the_same_for_a_seed_and_another_for_another() -> None:
    engine = replica_of("qwen3-8b", "A100-80GB")
    traffic = requests(500, 200, 0.5, rate_per_s=4.0)
    runs = [simulated(engine, traffic, requests=300, seed=seed) for seed in (1, 1, 2)]
    assert runs[0] == runs[1]
    assert runs[0] != runs[2]


def test_goodput_counts_the_requests_that_keep_every_limit() -> None:
    engine = replica_of("qwen3-8b", "A100-80GB")
    traffic = requests(500, 200, 0.5, rate_per_s=4.0)
    for method in (closed_form, simulated):
        load = method(engine, traffic)
        assert load.goodput_per_s is None
        easy = method(engine, traffic, Slo(ttft_p95_s=1e3, tpot_p95_s=1e3, e2e_p95_s=1e4))
        assert easy.goodput_per_s == pytest.approx(easy.requests_per_s)
        half = method(engine, traffic, Slo(ttft_p95_s=load.ttft.p50))
        assert half.goodput_per_s == pytest.approx(load.requests_per_s / 2, rel=0.1)
        assert method(engine, traffic, Slo(tpot_p95_s=1e-6)).goodput_per_s == 0


def test_both_methods_skip_the_tokens_of_a_cached_prefix() -> None:
    engine = replica_of("qwen3-8b", "A100-80GB")
    plain, cached = (requests(3000, 2, rate_per_s=0.1, prefix_hit_rate=hit) for hit in (0.0, 0.9))
    for method in (closed_form, simulated):
        floor = engine.speeds.floor
        # 300 tokens in place of 3,000: at least five times less, the fixed cost of a step included
        assert (method(engine, plain).ttft.mean - floor) / (method(engine, cached).ttft.mean - floor) > 3


# ----------------------------------------------------------------------------------------------- search and the SLO


@given(
    prompt=st.integers(50, 2000), output=st.integers(2, 300), sigma=st.floats(0, 0.8), share=st.floats(0.02, 0.9)
)  # fmt: skip
@settings(max_examples=25, deadline=None)
def test_percentiles_are_ordered_and_more_load_is_never_faster(
    prompt: int, output: int, sigma: float, share: float
) -> None:
    engine = replica_of("qwen3-8b", "A100-80GB")
    lengths = requests(prompt, output, sigma)
    most = saturation_per_s(engine, lengths)
    light, heavy = (closed_form(engine, at_rate(lengths, part * most)) for part in (share * 0.7, share))
    for seen in (light.ttft, light.tpot, light.e2e):
        assert 0 <= seen.p50 <= seen.p95 <= seen.p99 < inf
    assert heavy.ttft.mean >= light.ttft.mean * 0.999
    assert heavy.tpot.mean >= light.tpot.mean * 0.999
    assert heavy.running >= light.running


@pytest.mark.parametrize("share", [0.01, 0.5, 0.95])
def test_answers_of_hardly_more_than_a_token_have_times_above_zero(share: float) -> None:
    engine = replica_of("qwen3-8b", "A100-80GB")
    lengths = requests(300, 1, 0.5)
    load = closed_form(engine, at_rate(lengths, share * saturation_per_s(engine, lengths)))
    assert 0 < load.tpot.p50 <= load.tpot.p95
    assert load.ttft.p50 <= load.e2e.p50


def test_a_looser_slo_never_allows_less() -> None:
    engine = replica_of("qwen3-8b", "A100-80GB")
    lengths = requests(500, 200, 0.5)
    rates = [largest_rate(engine, lengths, Slo(ttft_p95_s=2.0, tpot_p95_s=t)) for t in (0.013, 0.02, 0.03, 0.05, 1.0)]
    assert rates == sorted(rates)
    assert rates[-1] < saturation_per_s(engine, lengths)


def test_the_largest_rate_meets_the_slo_and_four_percent_more_does_not() -> None:
    engine = replica_of("qwen3-8b", "A100-80GB")
    lengths, limit = requests(500, 200, 0.5), 0.03
    rate = largest_rate(engine, lengths, Slo(tpot_p95_s=limit))
    assert closed_form(engine, at_rate(lengths, rate)).tpot.p95 <= limit
    assert closed_form(engine, at_rate(lengths, 1.04 * rate)).tpot.p95 > limit


def test_a_limit_below_the_floor_allows_nothing_and_the_sentence_names_the_floor() -> None:
    engine = replica_of("qwen3-8b", "A100-80GB")
    lengths = requests(500, 200)
    floor = alone(engine, lengths).ttft.p95
    assert largest_rate(engine, lengths, Slo(ttft_p95_s=floor / 2)) == 0
    with pytest.raises(PlannerError, match=rf"TTFT p95 of .* lone request sees .*, {floor * 1e3:,.0f} ms: ask"):
        check_slo(engine, lengths, Slo(ttft_p95_s=floor / 2))
    check_slo(engine, lengths, Slo(ttft_p95_s=floor * 1.01))


def test_a_limit_of_no_time_is_refused() -> None:
    with pytest.raises(PlannerError, match="a limit of 0 s for TPOT p95 is none"):
        check_slo(replica_of("qwen3-8b", "A100-80GB"), requests(500, 200), Slo(tpot_p95_s=0.0))


# --------------------------------------------------------------------------------------------------------- features


def test_expected_tokens_of_a_step_with_speculation() -> None:
    assert tokens_per_step(0.5, 1) == pytest.approx(1.5)
    assert tokens_per_step(0.7, 3) == pytest.approx(1 + 0.7 + 0.49 + 0.343)
    assert tokens_per_step(0.0, 5) == 1
    assert tokens_per_step(1.0, 4) == 5


def test_speculation_gains_less_the_larger_the_batch() -> None:
    engine = replica_of("qwen3-8b", "A100-80GB")
    gains = [speculation_by_batch(engine, n, context=1000, acceptance=0.7, draft_tokens=3) for n in (1, 4, 16, 64, 256)]
    assert gains == sorted(gains, reverse=True)
    assert gains[0] > 1.8  # of 2.53 tokens a step: weights are read once for four tokens
    assert gains[-1] < 0.75 * gains[0]


def test_a_draft_model_costs_its_own_steps() -> None:
    engine, draft = replica_of("qwen3-8b", "A100-80GB"), replica_of("qwen3-0.6b", "A100-80GB")
    free, paid = (
        speculation_by_batch(engine, 1, context=1000, acceptance=0.7, draft_tokens=3, draft=model)
        for model in (None, draft)
    )
    # 3 steps of the draft model beside one of the target, which the verification hardly prolongs
    one, small = engine.step(1, 1000, 0, 0, 1), draft.step(1, 1000, 0, 0, 1)
    assert 1 / paid - 1 / free == pytest.approx(3 * small / one / tokens_per_step(0.7, 3), rel=0.02)


def test_what_features_buy_alone_and_at_saturation() -> None:
    engine = replica_of("qwen3-8b", "A100-80GB")
    formats = {"AWQ": replica_of("qwen3-8b", "A100-80GB", "awq")}
    caching, speculation, adapters, awq = what_it_buys(engine, requests(1000, 200, 0.4), formats=formats)
    assert caching.saturated > 1.1
    assert caching.alone > 1  # the first token comes earlier; the others as they did
    assert speculation.alone > 1.5 > speculation.saturated
    assert 0.8 < adapters.alone < 1
    assert 0.8 < adapters.saturated < 1
    # 4-bit weights win where reading them is what takes long, and lose where the matmuls are (A100)
    assert awq.alone > 1.15
    assert awq.saturated < 1


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"hit_rate": 1.5}, "the prefix hit rate 1.5 is not a share: give 0 to 1"),
        ({"hit_rate": 1.0}, "leaves no prompt to compute"),
        ({"acceptance": -0.1}, "the acceptance -0.1 is not a share"),
        ({"draft_tokens": 0}, "0 draft tokens are no speculation"),
        ({"adapters": 0}, "0 adapters change nothing"),
    ],
)
def test_features_that_are_none_are_refused(options: dict[str, Any], sentence: str) -> None:
    with pytest.raises(PlannerError, match=sentence):
        what_it_buys(replica_of("qwen3-8b", "A100-80GB"), requests(100, 10), **options)


# --------------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("traffic", "sentence"),
    [
        (requests(500, 200), "in one way: a rate, a concurrency, or the arrivals of a trace"),
        (requests(500, 200, rate_per_s=1.0, concurrency=2), "in one way"),
        (requests(500, 200, rate_per_s=0.0), "a rate of 0 requests a second is no load: ask for more than 0"),
        (requests(500, 200, rate_per_s=-1.0), "a rate of -1"),
        (requests(500, 200, rate_per_s=inf), "a rate of inf"),
        (requests(500, 200, concurrency=0), "0 clients are no load: ask for at least 1"),
        (requests(8000, 200, rate_per_s=1.0), "of 8,200 tokens together exceed max_model_len 8,192"),
        (requests(0.5, 200, rate_per_s=1.0), "prompt lengths need a mean of at least 1 token"),
        (requests(500, 200, 9.0, rate_per_s=1.0), "a sigma from 0 to 3"),
        (requests(500, 200, rate_per_s=1.0, prefix_hit_rate=1.0), "a prefix hit rate of 1 is no share of a prompt"),
        (requests(500, 200, arrivals=(0.0, 1.0)), "a prompt and an output length for each of at least two arrivals"),
    ],
)
def test_traffic_that_cannot_be_is_refused(traffic: Traffic, sentence: str) -> None:
    engine = replica_of("qwen3-8b", "A100-80GB")
    for method in (closed_form, simulated):
        with pytest.raises(PlannerError, match=sentence):
            method(engine, traffic)


def test_a_request_that_the_cache_cannot_hold_is_refused() -> None:
    engine = replica_of("qwen3-8b", "A10", context=32_768)
    held = int(engine.limits.kv_tokens)
    assert held < 32_768
    with pytest.raises(PlannerError, match=rf"longer than the KV cache of {held:,} tokens on NVIDIA A10"):
        closed_form(engine, requests(32_000, 500, rate_per_s=0.1))


def test_a_simulation_of_too_few_requests_is_refused() -> None:
    with pytest.raises(PlannerError, match="19 requests are too few for percentiles: simulate at least 20"):
        simulated(replica_of("qwen3-8b", "A100-80GB"), requests(500, 200, rate_per_s=1.0), requests=19)


# ---------------------------------------------------------------------------------------------- lengths and traces


def test_equal_lengths_are_all_the_mean() -> None:
    assert Lengths(mean=500).quantiles(3) == [500, 500, 500]
    assert Lengths(mean=500).sample(3, 7) == [500, 500, 500]


@given(mean=st.floats(50, 5000), sigma=st.floats(0, 1.2))
@settings(max_examples=50, deadline=None)
def test_slices_and_samples_of_log_normal_lengths_keep_the_mean(mean: float, sigma: float) -> None:
    lengths = Lengths(mean=mean, sigma=sigma)
    slices = lengths.quantiles(200)
    assert slices == sorted(slices)
    assert np.mean(slices) == pytest.approx(mean, rel=0.002, abs=0.51)  # half a token of rounding
    # the error of a sample's mean is its deviation / sqrt(n); five of those
    deviation = (np.exp(sigma**2) - 1) ** 0.5 + 1e-3
    assert np.mean(lengths.sample(4000, 3)) == pytest.approx(mean, rel=5 * deviation / 4000**0.5, abs=0.51)


def test_the_median_of_log_normal_lengths_is_below_the_mean_by_half_the_variance_of_the_logarithm() -> None:
    # exp(-sigma^2 / 2) = 0.7261 for 0.8
    assert Lengths(mean=1000, sigma=0.8).quantiles(999)[499] == pytest.approx(726.1, abs=1)


def test_lengths_are_cut_at_the_longest_and_are_never_none() -> None:
    lengths = Lengths(mean=100, sigma=2.5, longest=300)
    assert max(lengths.sample(2000, 1)) == 300
    assert min(lengths.sample(2000, 1)) == 1
    assert lengths.least_longest == 300


def test_counted_lengths_are_sampled_and_sliced_as_they_are() -> None:
    lengths = Lengths(mean=20, values=(30, 10, 20, 20))
    assert lengths.quantiles(4) == [10, 20, 20, 30]
    assert lengths.quantiles(2) == [15, 25]
    assert set(lengths.sample(200, 0)) == {10, 20, 30}


TRACE = "arrival_seconds,prompt_tokens,output_tokens,user\n0.5,100,20,a\n1.5,300,40,b\n4.5,200,30,c\n"


def test_a_trace_is_replayed_request_by_request(tmp_path: Path) -> None:
    path = tmp_path / "trace.csv"
    path.write_text(TRACE)
    traffic = read_traffic(path)
    assert traffic.arrivals == (0.5, 1.5, 4.5)
    assert traffic.prompt.values == (100, 300, 200)
    assert traffic.output.mean == 30
    engine = replica_of("qwen3-8b", "A100-80GB")
    run = simulated(engine, traffic)
    # each is alone: the first one's tokens take 0.3 s
    firsts = [engine.step(0, 0, p, p * p / 2, 1) for p in (100, 300, 200)]
    assert run.ttft.mean == pytest.approx(sum(firsts) / 3 + engine.speeds.floor)
    assert closed_form(engine, traffic).requests_per_s == pytest.approx(0.5)  # two gaps in 4 s


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("arrival_seconds,prompt_tokens\n0,1\n", "lacks the columns output_tokens: a trace needs all of"),
        (TRACE + "x,1,1,d\n", "line 5 of .* has 'x' for arrival_seconds: write seconds"),
        (TRACE + "nan,1,1,d\n", "has 'nan' for arrival_seconds"),
        (TRACE + "-1,1,1,d\n", "has '-1' for arrival_seconds"),
        (TRACE + "5,0,1,d\n", "has '0' for prompt_tokens: write a whole number of tokens from 1"),
        (TRACE + "5,1,1.5,d\n", "has '1.5' for output_tokens"),
        (TRACE + "5\n", "for prompt_tokens"),
        (TRACE + "4,1,1,d\n", "line 5 of .* arrives before the line above it: sort the trace"),
        ("arrival_seconds,prompt_tokens,output_tokens\n1,1,1\n", "at least two"),
        ("arrival_seconds,prompt_tokens,output_tokens\n1,1,1\n1,1,1\n", "at different times"),
    ],
)
def test_a_trace_with_a_defect_is_refused_with_its_line(tmp_path: Path, text: str, sentence: str) -> None:
    path = tmp_path / "trace.csv"
    path.write_text(text)
    with pytest.raises(PlannerError, match=sentence):
        read_traffic(path)


def test_a_trace_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(PlannerError, match="cannot be read as a CSV file"):
        read_traffic(tmp_path / "none.csv")


def test_a_load_is_written_as_json_even_where_it_has_no_end() -> None:
    engine = replica_of("qwen3-8b", "A100-80GB")
    load = closed_form(engine, requests(500, 200, rate_per_s=1e4))
    assert '"p95":null' in load.model_dump_json()
    finite = closed_form(engine, requests(500, 200, rate_per_s=1.0))
    assert Load.model_validate_json(finite.model_dump_json()) == finite
