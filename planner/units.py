"""Bytes, GiB, token counts and money: conversion and formatting, nothing else."""

from __future__ import annotations

import re
from decimal import ROUND_CEILING, ROUND_HALF_UP, Decimal
from fractions import Fraction

from planner.errors import PlannerError

KIB = 1 << 10
MIB = 1 << 20
GIB = 1 << 30

_TOKENS = re.compile(r"([0-9]{1,30}(?:\.[0-9]{1,9})?)([kKmM]?)(?:[tT]ok(?:ens)?)?")


def parse_tokens(text: str) -> int:
    """A token count: `32768`, `32k` (x 1024), `1m` (x 1024^2). Raises PlannerError for anything else."""
    match = _TOKENS.fullmatch(text.strip().replace("_", "").replace(",", ""))
    if match is None:
        raise PlannerError(f"{text[:40]!r} is not a token count: write a whole number such as 32768, or 32k")
    scale = {"": 1, "k": 1 << 10, "m": 1 << 20}[match[2].lower()]
    value = Fraction(match[1]) * scale
    if value.denominator != 1:
        raise PlannerError(f"{text[:40]!r} is not a whole number of tokens: write it out, for example 32768")
    return value.numerator


def format_tokens(tokens: int) -> str:
    """`32k` for 32768, `131,072` stays readable: multiples of 1024 get the suffix, others thousands separators."""
    if tokens >= MIB and tokens % MIB == 0:
        return f"{tokens // MIB}m"
    if tokens >= KIB and tokens % KIB == 0:
        return f"{tokens // KIB}k"
    return f"{tokens:,}"


def to_gib(size_bytes: float) -> float:
    """Bytes / 2^30."""
    return size_bytes / GIB


def gib_figure(size_bytes: float) -> str:
    """GiB without the word, for columns: two decimals below 10, one above."""
    gib = to_gib(size_bytes)
    return f"{gib:.2f}" if abs(gib) < 9.995 else f"{gib:,.1f}"


def format_gib(size_bytes: float) -> str:
    """The figure and its unit: `2.31 GiB`, `79.2 GiB`."""
    return f"{gib_figure(size_bytes)} GiB"


CENT = Decimal("0.01")


def round_money(amount: Decimal, unit: Decimal = CENT, *, up: bool = False) -> Decimal:
    """To the nearest multiple of unit, halves away from zero as accountants do; up: to the next multiple."""
    return (amount / unit).quantize(Decimal(1), rounding=ROUND_CEILING if up else ROUND_HALF_UP) * unit


def money_figure(amount: Decimal, unit: Decimal = CENT) -> str:
    """Thousands separated, with the decimals of unit: `1,025`, `0.70`, `-3.20`."""
    exponent = unit.normalize().as_tuple().exponent
    places = max(0, -exponent) if isinstance(exponent, int) else 2
    return f"{round_money(amount, unit):,.{places}f}"


def format_usd(amount: Decimal, unit: Decimal = CENT) -> str:
    """`$1,025.00`, `-$3.20`."""
    text = money_figure(amount, unit)
    return f"-${text[1:]}" if text.startswith("-") else f"${text}"
