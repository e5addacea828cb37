"""Bytes, GiB and token counts."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from planner.errors import PlannerError
from planner.units import GIB, KIB, MIB, format_gib, format_tokens, parse_tokens, to_gib


def test_the_binary_units_are_powers_of_1024() -> None:
    assert (KIB, MIB, GIB) == (1024, 1024 * 1024, 1024 * 1024 * 1024)


@pytest.mark.parametrize(
    ("text", "tokens"),
    [
        ("32768", 32_768),
        ("32k", 32_768),  # 32 x 1024
        ("32K", 32_768),
        ("1m", 1_048_576),  # 1024 x 1024
        ("2ktok", 2_048),
        ("2kTokens", 2_048),
        (" 128k ", 131_072),
        ("131,072", 131_072),
        ("131_072", 131_072),
        ("0.5k", 512),
        ("0", 0),
    ],
)
def test_a_token_count_is_read_with_suffix_and_separators(text: str, tokens: int) -> None:
    assert parse_tokens(text) == tokens


@pytest.mark.parametrize("text", ["", "k", "-1", "1e3", "32 k", "32kb", "32g", "many", "1.2.3"])
def test_what_is_not_a_token_count_is_refused_with_an_example(text: str) -> None:
    with pytest.raises(PlannerError, match="is not a token count: write a whole number such as 32768, or 32k"):
        parse_tokens(text)


@pytest.mark.parametrize("text", ["1.5", "0.3k", "1.0001k"])
def test_a_fraction_of_a_token_is_refused(text: str) -> None:
    with pytest.raises(PlannerError, match="is not a whole number of tokens"):
        parse_tokens(text)


@pytest.mark.parametrize(
    ("tokens", "text"),
    [
        (32_768, "32k"),
        (1_048_576, "1m"),
        (1_049_600, "1025k"),  # 1025 x 1024: not a whole number of m
        (1_000, "1,000"),
        (131_073, "131,073"),
        (1_000_000, "1,000,000"),
        (0, "0"),
        (512, "512"),
    ],
)
def test_a_token_count_is_written_with_a_suffix_only_where_it_is_exact(tokens: int, text: str) -> None:
    assert format_tokens(tokens) == text


@given(st.integers(min_value=0, max_value=10**12))
def test_what_is_written_is_read_back_as_the_same_count(tokens: int) -> None:
    assert parse_tokens(format_tokens(tokens)) == tokens


@pytest.mark.parametrize(
    ("size_bytes", "text"),
    [
        (GIB, "1.00 GiB"),
        (2_480_343_613, "2.31 GiB"),  # 2.31 x 2^30
        (85_520_809_984, "79.6 GiB"),  # an H100's nvidia-smi total, 81559 MiB: 79.65 lies just below, 79.6475
        (10_737_418_240, "10.0 GiB"),
        (10_732_000_000, "9.99 GiB"),  # 9.99495 x 2^30
        (-GIB // 2, "-0.50 GiB"),
        (0, "0.00 GiB"),
        (2_199_023_255_552, "2,048.0 GiB"),
    ],
)
def test_bytes_are_written_in_gib_with_two_decimals_below_ten(size_bytes: int, text: str) -> None:
    assert format_gib(size_bytes) == text


def test_gib_is_bytes_divided_by_two_to_the_thirty() -> None:
    assert to_gib(3 * 2**29) == 1.5
