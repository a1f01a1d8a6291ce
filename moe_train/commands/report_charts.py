"""The pictures of a report: curves as SVG and load maps as PNG, all inside the page."""

from __future__ import annotations

import base64
import math
from collections.abc import Sequence
from html import escape
from typing import NamedTuple

import numpy as np

from moe_train.machine.png import load_colors, png_of

WIDTH, HEIGHT = 520, 250
"""Size of a chart in pixels."""
_LEFT, _RIGHT, _TOP, _BOTTOM = 64, 14, 34, 30
"""Margins around the axes in pixels."""
MAX_POINTS = 800
"""Number of points of a curve; of more, the smallest and the largest value of each interval of steps are drawn."""
MAX_COLUMNS = 120
"""Number of columns of a load map; of more steps, each column is a mean."""
COLORS = ("#2266aa", "#dd7711", "#338833", "#aa3377", "#777777", "#117777", "#885522", "#5544bb")

Point = tuple[int, float | None]
"""A step and a value; None where it was not finite, which leaves a gap."""


class Curve(NamedTuple):
    """A named line of a chart."""

    name: str
    points: Sequence[Point]
    dots: bool = False
    """Whether each value is marked with a dot, as for values that are measured now and then."""


def chart(title: str, curves: Sequence[Curve], marks: Sequence[int] = (), log_scale: bool = False) -> str:
    """Return the SVG of curves over steps; empty without any finite value.

    Args:
        title: shown above.
        curves: what is drawn; on a logarithmic scale values of 0 or less are gaps.
        marks: steps that get a dotted line, where the run was resumed.
        log_scale: whether the vertical scale is logarithmic.
    """
    curves = [curve._replace(points=_usable(curve.points, log_scale)) for curve in curves]
    values = [value for curve in curves for _, value in curve.points if value is not None]
    if not values:
        return ""
    steps = [step for curve in curves for step, _ in curve.points]
    axes = _Axes(min(steps), max(steps), min(values), max(values), log_scale)
    elements = [f'<text x="{_LEFT}" y="16" font-weight="bold">{escape(title)}</text>', *axes.grid()]
    for step in marks:
        x = axes.x(step)
        elements.append(f'<line x1="{x}" y1="{_TOP}" x2="{x}" y2="{HEIGHT - _BOTTOM}" stroke="#999" stroke-dasharray="2 3"/>')
    legend = []
    for number, curve in enumerate(curves):
        color = COLORS[number % len(COLORS)]
        elements += _line(axes, curve, color)
        if any(value is not None for _, value in curve.points):
            legend.append(f'<tspan fill="{color}">{"● " if curve.dots else "― "}{escape(curve.name)}</tspan>')
    if len(curves) > 1:
        elements.append(f'<text x="{WIDTH - _RIGHT}" y="30" text-anchor="end" font-size="10">{" ".join(legend)}</text>')
    content = "\n".join(elements)
    return (
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" role="img" aria-label="{escape(title)}" font-size="11" '
        f'font-family="system-ui, sans-serif">{content}</svg>'
    )


class _Axes:
    """Maps steps and values to pixels."""

    def __init__(self, first: int, last: int, low: float, high: float, log_scale: bool) -> None:
        self._log_scale = log_scale
        self._first = first
        self._steps = max(last - first, 1)
        self._low = math.log10(low) if log_scale else low
        top = math.log10(high) if log_scale else high
        # A constant is drawn in the middle.
        margin = 0.0 if top > self._low else (abs(top) / 10 or 0.5)
        self._low -= margin
        self._span = top + margin - self._low

    def x(self, step: int) -> float:
        return round(_LEFT + (step - self._first) / self._steps * (WIDTH - _LEFT - _RIGHT), 1)

    def y(self, value: float) -> float:
        height = ((math.log10(value) if self._log_scale else value) - self._low) / self._span
        return round(_TOP + (1 - height) * (HEIGHT - _TOP - _BOTTOM), 1)

    def grid(self) -> list[str]:
        """Return lines and labels at four heights, and the first and the last step."""
        elements = []
        for part in range(4):
            at = self._low + self._span * part / 3
            value = 10**at if self._log_scale else at
            y = self.y(value)
            elements.append(f'<line x1="{_LEFT}" y1="{y}" x2="{WIDTH - _RIGHT}" y2="{y}" stroke="#ddd"/>')
            elements.append(f'<text x="{_LEFT - 6}" y="{y + 4}" text-anchor="end" fill="#555">{value:.4g}</text>')
        for step, anchor in ((self._first, "start"), (self._first + self._steps, "end")):
            elements.append(f'<text x="{self.x(step)}" y="{HEIGHT - 10}" text-anchor="{anchor}" fill="#555">{step:,}</text>')
        return elements


def _usable(points: Sequence[Point], log_scale: bool) -> list[Point]:
    """Return few enough points, with gaps where a value cannot be drawn."""
    usable: list[Point] = []
    for step, value in points:
        can_be_drawn = value is not None and math.isfinite(value) and (value > 0 or not log_scale)
        usable.append((step, value if can_be_drawn else None))
    if len(usable) <= MAX_POINTS:
        return usable
    fewer: list[Point] = []
    size = 2 * len(usable) / MAX_POINTS
    for number in range(MAX_POINTS // 2):
        part = usable[int(number * size) : int((number + 1) * size)]
        drawn = sorted((point for point in part if point[1] is not None), key=lambda point: point[1] or 0.0)
        # The extremes in the order of steps, so that no spike is lost.
        fewer += sorted({drawn[0], drawn[-1]}) if drawn else [part[0]]
    return fewer


def _line(axes: _Axes, curve: Curve, color: str) -> list[str]:
    """Return the elements of a curve: a line for each stretch without gaps, and dots."""
    stretches: list[list[str]] = [[]]
    dots = []
    for step, value in curve.points:
        if value is None:
            stretches.append([])
            continue
        stretches[-1].append(f"{axes.x(step)},{axes.y(value)}")
        if curve.dots:
            title = f"<title>step {step}: {value:.5g}</title>"
            dots.append(f'<circle cx="{axes.x(step)}" cy="{axes.y(value)}" r="3" fill="{color}">{title}</circle>')
    # A line of one point is invisible without round ends.
    style = f'fill="none" stroke="{color}" stroke-width="1.4" stroke-linecap="round"'
    return [f'<polyline points="{" ".join(part + part[-1:])}" {style}/>' for part in stretches if part] + dots


class LoadMaps(NamedTuple):
    """Load of the experts over time."""

    steps: list[int]
    """First step of each column."""
    load_SLE: np.ndarray
    """Load of each expert of each sparse layer, in columns S; 1 is an even load."""


def load_maps(records: Sequence[tuple[int, list[list[float]]]]) -> LoadMaps | None:
    """Gather the loads of a run in at most MAX_COLUMNS columns; None without any of one shape.

    Args:
        records: (step, load by layer and expert as a share of the layer's assignments).
    """
    shapes = {np.shape(load) for _, load in records}
    if len(shapes) != 1 or len(next(iter(shapes))) != 2:
        return None
    parts = np.array_split(np.arange(len(records)), min(MAX_COLUMNS, len(records)))
    load_SLE = np.stack([np.mean([records[i][1] for i in part], axis=0) for part in parts])
    return LoadMaps([records[part[0]][0] for part in parts], load_SLE * load_SLE.shape[2])


def picture(load_HW: np.ndarray, width: int, height: int, title: str) -> str:
    """Return a load map as an image element, stretched without smoothing.

    Args:
        load_HW: (H, W) loads, 1 for an even load.
        width: width in pixels.
        height: height in pixels.
        title: description of the image.
    """
    data = base64.b64encode(png_of(load_colors(load_HW))).decode()
    return (
        f'<img src="data:image/png;base64,{data}" width="{width}" height="{height}" alt="{escape(title)}" title="{escape(title)}">'
    )
