"""The report's pictures as SVG text: success bars with intervals, a grid of episodes, learning curves.

Pure functions from numbers to markup. Colours are CSS classes, so that the page decides on light, dark and print.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape


@dataclass(frozen=True)
class Rate:
    """A success rate with its interval: Rate("base policy", 0.45, 0.383, 0.519, "before")."""

    label: str
    success: float  # in [0, 1]
    low: float
    high: float
    css: str  # class of its colour


@dataclass(frozen=True)
class Curve:
    """Points of a learning curve, in the order of x: Curve("held-out", [0, 60], [0.4, 0.9], "after")."""

    name: str
    x: Sequence[float]
    y: Sequence[float]
    css: str
    low: Sequence[float] = ()  # interval, as long as y or empty
    high: Sequence[float] = ()
    dots: bool = True


def success_bars(rates: Sequence[Rate]) -> str:
    """Horizontal bars from 0 to 1 with the interval as a whisker and the numbers in text."""
    row, left, width = 44, 250, 440
    height = row * len(rates) + 34
    parts = [_axis_lines(left, width, row * len(rates) + 6)]
    for index, rate in enumerate(rates):
        y = index * row + row / 2 + 2
        start, end = left + width * rate.low, left + width * rate.high
        parts += [
            _label(left - 12, y + 5, rate.label, anchor="end", css=""),
            _box(rate.css, left, y - 12, width * rate.success, 24),
            f'<path class="whisker" d="M{start:.1f} {y:.1f}H{end:.1f}M{start:.1f} {y - 5}v10M{end:.1f} {y - 5}v10"/>',
            _label(left + width + 14, y, f"{rate.success:.3f}", anchor="start", css="strong"),
            _label(left + width + 14, y + 14, f"[{rate.low:.3f}, {rate.high:.3f}]", anchor="start"),
        ]
    return _svg(left + width + 110, height, "success rates with 95 % Wilson intervals", parts)


def _axis_lines(left: float, width: float, height: float) -> str:
    lines = []
    for i in range(5):
        x = left + width * i / 4
        lines += [f'<path class="grid" d="M{x:.1f} 0V{height}"/>', _label(x, height + 18, f"{i / 4:g}")]
    return "".join(lines)


def outcome_grid(before: Sequence[bool], after: Sequence[bool], *, columns: int = 40) -> str:
    """One square for each initial state: what became of it before and after."""
    names = {(True, True): "kept", (False, True): "gained", (True, False): "lost", (False, False): "missed"}
    word = {True: "success", False: "failure"}
    size, step = 14, 18
    squares = [
        _box(
            names[bool(a), bool(b)],
            i % columns * step,
            i // columns * step,
            size,
            size,
            title=f"initial state {i}: {word[bool(a)]} before, {word[bool(b)]} after",
        )
        for i, (a, b) in enumerate(zip(before, after, strict=True))
    ]
    rows = math.ceil(len(before) / columns)
    width = min(columns, len(before)) * step
    return _svg(width, rows * step, "outcome of every initial state before and after", squares)


def learning_curves(
    curves: Sequence[Curve],
    *,
    x_label: str,
    x_format: Callable[[float], str],
    y_label: str = "success",
    bounds: tuple[float, float] = (0.0, 1.0),
    marks: Sequence[tuple[float, str]] = (),
) -> str:
    """Success, or another number, over time or experience.

    Args:
        curves: drawn in order, later ones on top.
        x_label: what x is, with its unit.
        x_format: how a tick of x is written.
        y_label: what y is.
        bounds: lowest and highest y of the picture.
        marks: (x, label) of vertical lines, such as the ends of stages.
    """
    left, top, width, height = 44, 14, 440, 230
    ticks = nice_ticks(max((x for curve in curves for x in curve.x), default=1.0))
    scale, (lowest, highest) = ticks[-1] or 1.0, bounds

    def at(x: float, y: float) -> str:
        return f"{left + width * x / scale:.1f} {top + height * (1 - (y - lowest) / (highest - lowest)):.1f}"

    parts = []
    for i in range(5):
        y = top + height * (1 - i / 4)
        parts.append(f'<path class="grid" d="M{left} {y:.1f}h{width}"/>')
        parts.append(_label(left - 8, y + 4, f"{lowest + (highest - lowest) * i / 4:.4g}", anchor="end"))
    for tick in ticks:
        parts.append(_label(left + width * tick / scale, top + height + 18, x_format(tick)))
    for x, label in marks:
        parts.append(f'<path class="mark" d="M{at(x, lowest)}V{top}"><title>{escape(label)}</title></path>')
    for curve in curves:
        parts += _draw_curve(curve, at)
    parts.append(_label(left + width / 2, top + height + 38, x_label))
    return _svg(left + width + 22, top + height + 46, f"{y_label} over {x_label}", parts)


def _draw_curve(curve: Curve, at: Callable[[float, float], str]) -> list[str]:
    parts = []
    if len(curve.low) == len(curve.x) and len(curve.x) > 1:
        band = [at(x, y) for x, y in zip(curve.x, curve.high)] + [at(x, y) for x, y in zip(curve.x, curve.low)][::-1]
        parts.append(f'<path class="band {curve.css}" d="M{"L".join(band)}Z"/>')
    if len(curve.x) > 1:
        line = "L".join(at(x, y) for x, y in zip(curve.x, curve.y))
        parts.append(f'<path class="line {curve.css}" d="M{line}"/>')
    if curve.dots:
        for x, y in zip(curve.x, curve.y):
            cx, cy = at(x, y).split()
            parts.append(f'<circle class="{curve.css}" cx="{cx}" cy="{cy}" r="3.5"><title>{y:.3f}</title></circle>')
    return parts


def nice_ticks(largest: float, *, count: int = 5) -> list[float]:
    """From 0 in round steps to at least `largest`: for 118, [0, 25, 50, 75, 100, 125]."""
    if not largest > 0:
        return [0.0, 1.0]
    raw = largest / count
    power = 10.0 ** math.floor(math.log10(raw))
    step = power * next(factor for factor in (1, 2, 2.5, 5, 10) if factor * power >= raw * (1 - 1e-9))
    return [step * i for i in range(math.ceil(largest / step - 1e-9) + 1)]


def nice_bounds(values: Sequence[float]) -> tuple[float, float]:
    """Round numbers around all values, four equal steps apart: (-200, 0) for -183 to -21."""
    low, high = min(values), max(values)
    raw = max(high - low, abs(high) * 1e-3, 1e-9) / 4
    power = 10.0 ** math.floor(math.log10(raw))
    for step in (factor * scale for scale in (power, 10 * power) for factor in (1, 2, 2.5, 5)):
        bottom = step * math.floor(low / step)
        if bottom + 4 * step >= high:
            return bottom, bottom + 4 * step
    return low, high


def _label(x: float, y: float, text: str, *, anchor: str = "middle", css: str = "small") -> str:
    return f'<text class="{css}" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'


def _box(css: str, x: float, y: float, width: float, height: float, *, title: str = "") -> str:
    title = f"<title>{escape(title)}</title>" if title else ""
    return (
        f'<rect class="{css}" x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" height="{height:.1f}" rx="3">{title}</rect>'
    )


def _svg(width: float, height: float, title: str, parts: Sequence[str]) -> str:
    return (
        f'<svg viewBox="0 0 {width:.0f} {height:.0f}" width="{width:.0f}" role="img" aria-label="{escape(title)}">'
        + "".join(parts)
        + "</svg>"
    )
