"""The few shapes that the page's figures are made of: SVG text that takes its colors from the page's style sheet."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup, escape

WIDTH = 420
"""Of every figure, in its own units: a phone shows them at 0.8, a desktop at 1.2, so that text stays legible."""
LEFT, RIGHT = 10, 14


@dataclass(frozen=True)
class Scale:
    """From values to positions along an axis."""

    low: float
    high: float
    start: float
    end: float
    logarithmic: bool = False

    def __call__(self, value: float) -> float:
        """Position of a value; values beyond the ends are put there."""
        low, high, at = (
            math.log10(v) if self.logarithmic else v for v in (self.low, self.high, max(value, self._least))
        )
        share = min(1.0, max(0.0, (at - low) / (high - low)))
        return self.start + share * (self.end - self.start)

    @property
    def _least(self) -> float:
        return self.low if self.logarithmic else -math.inf

    @property
    def ticks(self) -> list[float]:
        """Round numbers within the ends."""
        if self.logarithmic:
            first, last = math.ceil(math.log10(self.low) - 1e-9), math.floor(math.log10(self.high) + 1e-9)
            return [10.0**power for power in range(first, last + 1)]
        return round_ticks(self.low, self.high)


def round_ticks(low: float, high: float, about: int = 5) -> list[float]:
    """Multiples of 1, 2 or 5 times a power of ten between two values."""
    raw = (high - low) / about
    power = 10 ** math.floor(math.log10(raw))
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= raw * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [step * number for number in range(first, math.floor(high / step + 1e-9) + 1)]


def scale_for(
    values: Sequence[float], start: float, end: float, include: Sequence[float] = (), logarithmic: bool = False
) -> Scale:
    """Covers all finite values with a margin."""
    known = [value for value in (*values, *include) if math.isfinite(value)]
    if logarithmic:
        known = [value for value in known if value > 0] or [1.0, 10.0]
        return Scale(min(known) / 1.3, max(known) * 1.3, start, end, True)
    low, high = (min(known), max(known)) if known else (0.0, 1.0)
    margin = 0.06 * (high - low) or max(abs(high), 1e-3) * 0.1
    floor = low == 0 and 0.0 in include  # what cannot be below zero begins there
    return Scale(0.0 if floor else low - margin, high + margin, start, end)


def number(value: float) -> str:
    """A coordinate."""
    return f"{value:.1f}".removesuffix(".0")


def tick_text(value: float) -> str:
    """A label of an axis."""
    text = f"{value:.10g}" if abs(value) < 1000 else f"{value:,.0f}"
    return text.replace("-", "−")


def text(x: float, y: float, words: str, style: str = "", anchor: str = "start") -> Markup:
    """A line of text."""
    return Markup('<text x="{}" y="{}" class="{}" text-anchor="{}">{}</text>').format(
        number(x), number(y), style, anchor, words
    )


def line(x1: float, y1: float, x2: float, y2: float, style: str) -> Markup:
    """A straight line."""
    return Markup('<line x1="{}" y1="{}" x2="{}" y2="{}" class="{}"/>').format(
        number(x1), number(y1), number(x2), number(y2), style
    )


def circle(x: float, y: float, radius: float, style: str, title: str = "") -> Markup:
    """A dot, with words that appear when it is pointed at."""
    inner = Markup("<title>{}</title>").format(title) if title else Markup("")
    return Markup('<circle cx="{}" cy="{}" r="{}" class="{}">{}</circle>').format(
        number(x), number(y), number(radius), style, inner
    )


def rectangle(x: float, y: float, width: float, height: float, style: str) -> Markup:
    """A box."""
    return Markup('<rect x="{}" y="{}" width="{}" height="{}" class="{}"/>').format(
        number(x), number(y), number(width), number(height), style
    )


def polyline(points: Sequence[tuple[float, float]], style: str) -> Markup:
    """A line through points."""
    path = " ".join(f"{number(x)},{number(y)}" for x, y in points)
    return Markup('<polyline points="{}" class="{}"/>').format(path, style)


def drawing(parts: Sequence[Markup], height: float, what: str, width: float = WIDTH) -> Markup:
    """The whole figure; `what` is said to those who cannot see it."""
    return Markup(
        '<svg viewBox="0 0 {} {}" role="img" aria-label="{}" xmlns="http://www.w3.org/2000/svg">{}</svg>'
    ).format(number(width), number(height), escape(what), Markup("").join(parts))


def axis_below(scale: Scale, y: float, top: float, title: str) -> list[Markup]:
    """Grid lines from `top` to `y`, their labels, and the title of the axis."""
    parts = []
    for tick in scale.ticks:
        x = scale(tick)
        parts += [line(x, top, x, y, "grid"), text(x, y + 15, tick_text(tick), "tick", "middle")]
    return [*parts, text((scale.start + scale.end) / 2, y + 32, title, "tick", "middle")]
