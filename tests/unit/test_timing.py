"""A server's times follow from its bytes, its source and its answers, and fit into each other."""

from __future__ import annotations

from decimal import Decimal
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from planner.plan.serving import Serving
from workloads.timing import KILL_SECONDS, PROBE_SECONDS, serving_timing


def served(**more: Any) -> Serving:
    plain: dict[str, Any] = {
        "stored_bytes": 16_381_470_720,
        "cache_bytes": 1,
        "read_bytes_per_second": 50_000_000,
        "engine_seconds": 600,
        "machine_seconds": 1200,
        "endpoint_seconds": 15,
        "answer_tokens": 1024,
        "token_seconds": Decimal("0.088"),
    }
    return Serving(**plain | more)


def test_a_start_takes_ten_minutes_and_the_time_to_read_the_weights() -> None:
    timing = serving_timing(served())  # 327.6 s at 50 MB/s and 600 s are 927.6 s: 15.46 minutes
    assert timing.start_seconds == 16 * 60
    assert timing.start_failures == 96  # one look every ten seconds
    assert timing.deadline_seconds == 20 * 60 + 16 * 60


def test_weights_from_the_storage_account_are_there_sooner() -> None:
    timing = serving_timing(served(read_bytes_per_second=120_000_000))  # 136.5 s + 600 s: 12.3 minutes
    assert timing.start_seconds == 13 * 60


def test_a_server_that_stops_finishes_its_longest_answer() -> None:
    timing = serving_timing(served())  # 1024 x 0.088 s = 90.1 s
    assert timing.shutdown_seconds == 91
    assert timing.pre_stop_seconds == 15
    assert timing.grace_seconds == 15 + 91 + 10


def test_short_answers_still_get_half_a_minute() -> None:
    assert serving_timing(served(answer_tokens=10)).shutdown_seconds == 30


@given(
    st.builds(
        served,
        stored_bytes=st.integers(1, 10**12),
        read_bytes_per_second=st.integers(10**6, 10**10),
        engine_seconds=st.integers(1, 3600),
        endpoint_seconds=st.integers(0, 60),
        answer_tokens=st.integers(1, 1 << 20),
        token_seconds=st.decimals("0.001", "1", places=3),
    )
)
def test_every_time_holds_what_must_happen_within_it(serving: Serving) -> None:
    timing = serving_timing(serving)
    assert timing.start_failures * PROBE_SECONDS == timing.start_seconds
    assert timing.start_seconds >= serving.stored_bytes / serving.read_bytes_per_second + serving.engine_seconds
    assert timing.shutdown_seconds >= serving.answer_tokens * serving.token_seconds
    assert timing.grace_seconds >= timing.pre_stop_seconds + timing.shutdown_seconds + KILL_SECONDS
    assert timing.deadline_seconds > timing.start_seconds
