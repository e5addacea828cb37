"""A step's work is what the shapes say, and its time follows the work."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from planner.catalog import model
from planner.memory.weights import weight_scheme
from planner.performance.server import quick_step
from planner.performance.step import Speeds, Work, distinct_experts, step_parts, work_of

SPEEDS = Speeds(
    weight_bytes=3e12,
    head_bytes=3e12,
    expert_bytes=3e12,
    kv_bytes=2e12,
    elementwise_bytes=1e12,
    dense_flops=5e14,
    head_flops=5e14,
    expert_flops=3e14,
    attention_flops=2e14,
    ramp_tokens=10.0,
    step=1e-4,
    layer=4e-5,
    mixed=2e-3,
    sequence=2e-5,
    link_latency=1e-5,
    link_bytes=3e11,
    floor=0.02,
)


def work(name: str, tp: int = 1, quantization: str | None = None) -> Work:
    spec = model(name)
    return work_of(spec, weight_scheme(spec, quantization), tensor_parallel_size=tp)


def test_a_dense_layer_costs_two_operations_a_weight_and_two_bytes() -> None:
    found = work("qwen3-8b")
    # a layer: q and o 4096 x 4096, k and v 1024 x 4096, gate, up and down 12288 x 4096; 36 layers
    weights = 36 * (2 * 4096 * 4096 + 2 * 1024 * 4096 + 3 * 12288 * 4096)
    assert found.dense_flops == 2 * weights
    # and norms: two of 4096 and two of 128 in a layer, one at the end
    assert found.dense_bytes == 2 * (weights + 36 * (2 * 4096 + 2 * 128) + 4096)
    assert found.head_flops == 2 * 151_936 * 4096
    assert found.head_bytes == 2 * 151_936 * 4096


def test_attention_reads_the_cache_and_multiplies_every_pair_twice() -> None:
    (window,) = work("qwen3-8b").windows
    assert window.token_bytes == 36 * 2 * 8 * 128 * 2  # keys and values of 8 heads
    assert window.pair_flops == 36 * 2 * 32 * (128 + 128)  # scores and sums over 32 heads


def test_tied_embeddings_are_the_output_head() -> None:
    found = work("qwen3-0.6b")
    assert found.head_bytes == 2 * 151_936 * 1024


def test_a_rank_holds_its_share_but_latent_attention_and_single_heads_are_whole() -> None:
    whole, half = work("qwen3-8b"), work("qwen3-8b", tp=2)
    assert half.dense_flops == whole.dense_flops / 2
    assert half.windows[0].token_bytes == whole.windows[0].token_bytes / 2
    assert half.message_bytes == 2 * (2 - 1) / 2 * 4096 * 2
    assert half.reductions == 2 * 36
    assert whole.reductions == 0
    latent = work("deepseek-v2-lite", tp=2).windows[0]
    assert latent.token_bytes == work("deepseek-v2-lite").windows[0].token_bytes


def test_four_bit_weights_are_read_at_about_a_quarter() -> None:
    share = work("qwen3-8b", quantization="awq").dense_bytes / work("qwen3-8b").dense_bytes
    assert 0.25 < share < 0.27  # 4 bits, and a 16-bit scale and a 4-bit zero point for 128 weights: 4.156 of 16


@pytest.mark.parametrize(
    ("tokens", "visited"),
    [
        (1, 8.0),  # a token visits its own eight
        (2, 128 * (1 - (120 / 128) ** 2)),  # 15.5: some coincide
        (1000, 128.0),
    ],
)
def test_distinct_experts_grow_with_the_batch_until_all_are_read(tokens: int, visited: float) -> None:
    assert distinct_experts(128, 8, tokens) == pytest.approx(visited, rel=1e-9)


def test_experts_of_a_small_batch_are_read_in_part() -> None:
    found = work("qwen3-30b-a3b")
    one = step_parts(found, SPEEDS, decode=1, context=0).experts
    many = step_parts(found, SPEEDS, decode=64, context=0).experts
    # 8 of 128 experts of 57.98 GB: 3.6 GB / 3 TB/s = 1.2 ms; with 64 tokens nearly all: 19 ms
    assert one == pytest.approx(found.expert_bytes * 8 / 128 / 3e12, rel=0.01)
    assert many > 10 * one


def test_windows_stop_reading_beyond_their_reach() -> None:
    found = work("gemma-3-12b")
    near = step_parts(found, SPEEDS, decode=1, context=1024).kv
    far = step_parts(found, SPEEDS, decode=1, context=33_792).kv
    full = next(window for window in found.windows if window.reach > 1024)
    # 32,768 more tokens are read by the 8 layers without a window alone
    assert far - near == pytest.approx(32_768 * full.token_bytes / 2e12)


def test_a_decode_step_is_worked_out_by_hand() -> None:
    parts = step_parts(work("qwen3-8b"), SPEEDS, decode=1, context=1000)
    read, multiplied = 13.892e9 / 3e12, 13.8915e9 * 11 / 5e14
    assert parts.dense == pytest.approx((read**3 + multiplied**3) ** (1 / 3), rel=1e-3)  # 4.63 ms
    assert parts.kv == pytest.approx(1000 * 147_456 / 2e12)
    assert parts.overhead == pytest.approx(1e-4 + 36 * 4e-5 + 2e-5)
    assert parts.exchange == parts.experts == parts.attention == 0


def test_parts_add_up_to_the_step() -> None:
    parts = step_parts(work("qwen3-30b-a3b", tp=2), SPEEDS, decode=8, context=9000, prefill=512, pairs=512 * 256)
    named = (parts.dense, parts.experts, parts.head, parts.kv, parts.attention, parts.elementwise, parts.exchange)
    assert parts.total == pytest.approx(sum(named) + parts.overhead)
    assert min(named) > 0


batches = st.tuples(st.integers(1, 512), st.integers(0, 10**6), st.integers(0, 8192))


@given(batches, st.sampled_from(["qwen3-8b", "gemma-3-12b", "gpt-oss-20b", "qwen3.5-9b", "deepseek-v2-lite"]))
def test_more_work_never_takes_less_time(batch: tuple[int, int, int], name: str) -> None:
    decode, context, prefill = batch
    found = work(name)

    def seconds(decode: int, context: int, prefill: int, speeds: Speeds = SPEEDS) -> float:
        pairs = prefill * prefill / 2
        return float(step_parts(found, speeds, decode=decode, context=context, prefill=prefill, pairs=pairs).total)

    base = seconds(decode, context, prefill)
    assert seconds(decode + 1, context, prefill) >= base
    assert seconds(decode, context + 1000, prefill) >= base
    assert seconds(decode, context, prefill + 1) >= base
    faster = replace(SPEEDS, weight_bytes=6e12, head_bytes=6e12, expert_bytes=6e12, kv_bytes=4e12)
    assert seconds(decode, context, prefill, faster) <= base


@given(batches, st.sampled_from(["qwen3-8b", "gemma-3-12b", "qwen3-30b-a3b", "qwen3.5-9b"]))
def test_the_quick_step_is_the_step(batch: tuple[int, int, int], name: str) -> None:
    decode, context, prefill = batch
    found = work(name)
    quick = quick_step(found, SPEEDS)
    pairs = prefill * 100.0
    whole = step_parts(
        found, SPEEDS, decode=decode, context=context, prefill=prefill, pairs=pairs, sampled=decode
    ).total
    assert quick(decode, context, prefill, pairs, decode) == pytest.approx(whole, rel=1e-9)
    assert quick(decode, context, prefill, pairs, decode) == quick(decode, context, prefill, pairs, decode)


def test_arrays_give_what_numbers_give() -> None:
    found = work("gpt-oss-20b")
    decode, context = np.array([1.0, 32.0]), np.array([500.0, 90_000.0])
    both = step_parts(found, SPEEDS, decode=decode, context=context, prefill=np.array([0.0, 256.0]), pairs=1e5).total
    second = step_parts(found, SPEEDS, decode=32.0, context=90_000.0, prefill=256.0, pairs=1e5).total
    assert both[1] == pytest.approx(second)
