"""The page's figures as SVG: intervals, boxes, differences per case, curves."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from markupsafe import Markup

from autossl.evaluation.report.sources import quantile
from autossl.evaluation.report.svg import (
    LEFT,
    RIGHT,
    WIDTH,
    Scale,
    axis_below,
    circle,
    drawing,
    line,
    polyline,
    rectangle,
    round_ticks,
    scale_for,
    text,
    tick_text,
)

ROW = 40
BELOW = 38
"""Height of the axis with its labels and title."""
LOG_RATIO = 100
"""Largest over smallest value from which an axis is logarithmic."""
SERIES = 8
"""Styles of lines; more series repeat them."""


@dataclass(frozen=True)
class IntervalRow:
    """A figure with its interval."""

    name: str
    estimate: float
    low: float
    high: float
    strong: bool = False


def interval_figure(rows: Sequence[IntervalRow], axis: str, what: str, zero: bool = True) -> Markup:
    """A line per interval with a dot at the estimate.

    Args:
        rows: In units of the axis; NaN where nothing is known.
        axis: Title of the axis.
        what: Said to those who cannot see it.
        zero: Whether the axis holds zero, with a line there.
    """
    values = [value for row in rows for value in (row.estimate, row.low, row.high)]
    scale = scale_for(values, LEFT, WIDTH - RIGHT, (-1e-9, 1e-9) if zero else ())
    bottom = 4 + ROW * len(rows)
    parts = axis_below(scale, bottom, 4, axis)
    if zero:
        parts.append(line(scale(0), 4, scale(0), bottom, "zero"))
    for n, row in enumerate(rows):
        y = 4 + ROW * n
        style = "strong" if row.strong else ""
        parts.append(text(LEFT, y + 14, row.name, f"label {style}"))
        if math.isfinite(row.low) and math.isfinite(row.high):
            parts.append(line(scale(row.low), y + 27, scale(row.high), y + 27, f"interval {style}"))
            parts += [line(scale(v), y + 22, scale(v), y + 32, f"interval {style}") for v in (row.low, row.high)]
        if math.isfinite(row.estimate):
            parts.append(circle(scale(row.estimate), y + 27, 5.5 if row.strong else 4.5, "estimate"))
    return drawing(parts, bottom + BELOW, what)


def box_figure(groups: Mapping[str, Sequence[float]], axis: str, what: str, highlight: str = "") -> Markup:
    """A box plot per group: quartiles, median, whiskers within 1.5 times the box beyond it, and a dot per value.

    Args:
        groups: Name → values.
        axis: Title of the axis.
        what: Said to those who cannot see it.
        highlight: The group that is drawn stronger.
    """
    values = [value for own in groups.values() for value in own]
    positive = bool(values) and min(values) > 0
    scale = scale_for(values, LEFT, WIDTH - RIGHT, (), positive and max(values) / min(values) > LOG_RATIO)
    bottom = 4 + (ROW + 6) * len(groups)
    parts = axis_below(scale, bottom, 4, axis)
    for n, (name, own) in enumerate(groups.items()):
        y = 4 + (ROW + 6) * n
        parts.append(text(LEFT, y + 13, name, "label strong" if name == highlight else "label"))
        parts += _box(sorted(own), scale, y + 30)
    return drawing(parts, bottom + BELOW, what)


def _box(values: Sequence[float], scale: Scale, y: float) -> list[Markup]:
    if not values:
        return []
    q1, median, q3 = (quantile(values, share) for share in (0.25, 0.5, 0.75))
    reach = 1.5 * (q3 - q1)
    inside = [value for value in values if q1 - reach <= value <= q3 + reach]
    parts = [
        line(scale(inside[0]), y, scale(q1), y, "whisker"),
        line(scale(q3), y, scale(inside[-1]), y, "whisker"),
        rectangle(scale(q1), y - 9, max(1.0, scale(q3) - scale(q1)), 18, "box"),
        line(scale(median), y - 9, scale(median), y + 9, "median"),
    ]
    # dots move up and down in turn, so that equal values stay apart; no chance in it
    return parts + [circle(scale(value), y + (n % 5 - 2) * 3, 1.8, "dot") for n, value in enumerate(values)]


def differences_figure(differences: Mapping[str, float], axis: str, what: str) -> Markup:
    """A stem per case from zero to its difference, sorted; gains and losses differ in shade and direction.

    Args:
        differences: Case → difference in units of the axis.
        axis: Title of the axis.
        what: Said to those who cannot see it.
    """
    ordered = sorted(differences.items(), key=lambda item: (item[1], item[0]))
    height, left = 170, 44
    scale = scale_for([value for _, value in ordered], height - 8, 8, (-1e-9, 1e-9))
    step = (WIDTH - RIGHT - left) / max(1, len(ordered))
    parts = []
    for tick in round_ticks(scale.low, scale.high, 4):
        parts.append(line(left, scale(tick), WIDTH - RIGHT, scale(tick), "grid"))
        parts.append(text(left - 6, scale(tick) + 4, tick_text(tick), "tick", "end"))
    parts.append(line(left, scale(0), WIDTH - RIGHT, scale(0), "zero"))
    for n, (case, value) in enumerate(ordered):
        x, style = left + (n + 0.5) * step, "gain" if value > 0 else "loss"
        parts.append(line(x, scale(0), x, scale(value), f"stem {style}"))
        said = f"{case}: {value:+.2f}".replace("-", "−")
        parts.append(circle(x, scale(value), max(1.5, min(4.0, step * 0.35)), f"stem-end {style}", said))
    parts.append(text((left + WIDTH - RIGHT) / 2, height + 18, axis, "tick", "middle"))
    return drawing(parts, height + 26, what)


def curves_figure(series: Mapping[str, Sequence[tuple[float, float]]], axes: tuple[str, str], what: str) -> Markup:
    """A line per series.

    Args:
        series: Name → points.
        axes: Titles of the horizontal and the vertical axis.
        what: Said to those who cannot see it.
    """
    height, left = 170, 40
    points = [point for own in series.values() for point in own]
    across = scale_for([x for x, _ in points], left, WIDTH - RIGHT, (0.0,))
    up = scale_for([y for _, y in points], height - 4, 8, (0.0,))
    parts = []
    for tick in up.ticks:
        parts.append(line(left, up(tick), WIDTH - RIGHT, up(tick), "grid"))
        parts.append(text(left - 6, up(tick) + 4, tick_text(tick), "tick", "end"))
    for tick in across.ticks:
        parts.append(text(across(tick), height + 14, tick_text(tick), "tick", "middle"))
    for n, (name, own) in enumerate(series.items()):
        style = f"curve series-{n % SERIES}"
        parts.append(polyline([(across(x), up(y)) for x, y in own], style))
        x = left + 8 + n * ((WIDTH - left - RIGHT) / max(1, len(series)))
        parts += [line(x, height + 44, x + 18, height + 44, style), text(x + 22, height + 48, name, "tick")]
    parts.append(text((left + WIDTH - RIGHT) / 2, height + 30, axes[0], "tick", "middle"))
    parts.append(text(4, 10, axes[1], "tick above"))
    return drawing(parts, height + 56, what)
