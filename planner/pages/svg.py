"""Drawing: SVG by hand, with text that is measured before it is placed."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from math import ceil, floor, log10
from typing import Literal, NamedTuple

from planner.model import Frozen

FONT, SMALL = 13, 12
WIDE, NARROW = 816, 358


class Figure(Frozen):
    """A chart. caption: what it shows, in plain words; wide, narrow: the same as SVG for a desk and for a phone."""

    type: Literal["figure"] = "figure"
    caption: str
    wide: str
    narrow: str


class Box(NamedTuple):
    """The area of a plot inside its SVG."""

    left: float
    top: float
    right: float
    bottom: float


# ------------------------------------------------------------------------------------------------------------ drawing


def text_width(text: str, size: float = SMALL) -> float:
    """At most how wide a text is drawn, in the widest of the fonts that the page asks for (DejaVu Sans, Verdana)."""
    return size * sum(_em(letter) for letter in text)


def _em(letter: str) -> float:
    if letter in "ijlI|'.,:; ":
        return 0.38
    if letter in 'ft()[]{}-r/"_':
        return 0.5
    if letter in "mwMW%@" or not letter.isascii():
        return 1.0
    return 0.78 if letter.isupper() else 0.65


def shorten(text: str, width: float, size: float = SMALL) -> str:
    """The text, or as much of it as fits a width, with three dots."""
    if text_width(text, size) <= width:
        return text
    while text and text_width(f"{text}...", size) > width:
        text = text[:-1]
    return f"{text.rstrip()}..."


def wrap(text: str, width: float, size: float = SMALL, most: int = 2) -> list[str]:
    """The text in at most so many lines of a width; the last is shortened."""
    lines: list[str] = []
    words = text.split()
    while words and len(lines) < most - 1:
        count = len(words)
        while count > 1 and text_width(" ".join(words[:count]), size) > width:
            count -= 1
        lines.append(shorten(" ".join(words[:count]), width, size))
        words = words[count:]
    return [*lines, shorten(" ".join(words), width, size)] if words else lines


def spread(wanted: Sequence[float], widths: Sequence[float], low: float, high: float) -> list[float]:
    """Places for labels on a line, in the order of `wanted`: as near to it as they can be without touching.

    wanted: rising centres; widths: of each, space included; low, high: the line's ends, beyond which none lies while
    they fit at all.
    """
    placed: list[float] = []
    for centre, width in zip(wanted, widths, strict=True):
        least = low + width / 2 if not placed else placed[-1] + (widths[len(placed) - 1] + width) / 2
        placed.append(max(centre, least))
    ceiling = high
    for i in range(len(placed) - 1, -1, -1):
        placed[i] = min(placed[i], ceiling - widths[i] / 2)
        ceiling = placed[i] - widths[i] / 2
    return placed


def ticks(largest: float, most: int = 6) -> list[float]:
    """Round figures from 0 up to at least `largest`, at most so many steps."""
    rough = largest / most
    power = 10.0 ** floor(log10(rough))
    step = next(m * power for m in (1, 2, 5, 10) if m * power >= rough * 0.999999)
    return [step * i for i in range(ceil(largest / step - 1e-9) + 1)]


def written(value: float) -> str:
    return f"{value:.1f}".removesuffix(".0")


def put_text(x: float, y: float, words: str, style: str = "", anchor: str = "start") -> str:
    classes = f' class="{style}"' if style else ""
    side = "" if anchor == "start" else f' text-anchor="{anchor}"'
    return f'<text x="{written(x)}" y="{written(y)}"{classes}{side}>{escape(words)}</text>'


def put_line(x1: float, y1: float, x2: float, y2: float, style: str) -> str:
    return f'<line x1="{written(x1)}" y1="{written(y1)}" x2="{written(x2)}" y2="{written(y2)}" class="{style}"/>'


def put_rect(x: float, y: float, width: float, height: float, style: str) -> str:
    return (
        f'<rect x="{written(x)}" y="{written(y)}" width="{written(width)}" height="{written(height)}" class="{style}"/>'
    )


def put_circle(x: float, y: float, radius: float, style: str) -> str:
    return f'<circle cx="{written(x)}" cy="{written(y)}" r="{written(radius)}" class="{style}"/>'


def put_path(points: Sequence[tuple[float, float]], style: str) -> str:
    steps = " ".join(f"{'M' if i == 0 else 'L'}{written(x)} {written(y)}" for i, (x, y) in enumerate(points))
    return f'<path d="{steps}" class="{style}"/>'


def drawing(name: str, width: float, height: float, title: str, description: str, body: Sequence[str]) -> str:
    size = "wide" if width > NARROW else "narrow"
    key = f"{name}-{size}"
    return (
        f'<svg class="chart {size}" role="img" aria-labelledby="{key}-title {key}-desc"'
        f' viewBox="0 0 {written(width)} {written(height)}">'
        f'<title id="{key}-title">{escape(title)}</title><desc id="{key}-desc">{escape(description)}</desc>'
        f"{''.join(body)}</svg>"
    )


# --------------------------------------------------------------------------------------------------------- cost by line
