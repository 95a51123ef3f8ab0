"""The report's pictures: success bars with intervals, a grid of episodes, learning curves.

Pure functions from numbers to SVG; what is drawn is in templates/parts.html, where things lie on a curve is said here.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from jinja2 import Environment, PackageLoader, StrictUndefined

TEMPLATES = Environment(
    loader=PackageLoader("embodied_rft.report"),
    autoescape=True,
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
)
TEMPLATES.filters["tenths"] = "{:.1f}".format
TEMPLATES.globals["zip"] = zip


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


def part(name: str, *arguments: object, **options: object) -> str:
    """A part of templates/parts.html, such as "success_bars": markup, which templates do not escape again."""
    return getattr(TEMPLATES.get_template("parts.html").module, name)(*arguments, **options)  # type: ignore[no-any-return]


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

    def band(curve: Curve) -> list[str]:
        if len(curve.low) != len(curve.x) or len(curve.x) < 2:
            return []
        return [*map(at, curve.x, curve.high), *[*map(at, curve.x, curve.low)][::-1]]

    steps = [(i / 4, lowest + (highest - lowest) * i / 4) for i in range(5)]
    return part(
        "learning_curves",
        f"{y_label} over {x_label}",
        (left + width + 22, top + height + 46),
        grid=[(left, top + height * (1 - share), width, f"{y:.4g}") for share, y in steps],
        ticks=[(left + width * tick / scale, top + height + 18, x_format(tick)) for tick in ticks],
        marks=[(at(x, lowest), top, label) for x, label in marks],
        curves=[(curve, band(curve), [*map(at, curve.x, curve.y)]) for curve in curves],
        x_label=(left + width / 2, top + height + 38, x_label),
    )


def nice_ticks(largest: float) -> list[float]:
    """From 0 in about five round steps to at least `largest`: for 118, [0, 25, 50, 75, 100, 125]."""
    if not largest > 0:
        return [0.0, 1.0]
    raw = largest / 5
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
