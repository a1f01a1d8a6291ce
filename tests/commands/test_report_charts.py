"""Curves and load maps: where values stand, gaps, spikes that are kept, and shapes that change."""

from __future__ import annotations

import re
from xml.etree import ElementTree

import numpy as np
import pytest

from moe_train.commands.report_charts import HEIGHT, MAX_COLUMNS, MAX_POINTS, WIDTH, Curve, chart, load_maps

SVG = "{http://www.w3.org/2000/svg}"


def lines_of(svg: str) -> list[list[tuple[float, float]]]:
    """The points of each polyline."""
    root = ElementTree.fromstring(svg)
    return [[tuple(map(float, p.split(","))) for p in line.get("points", "").split()] for line in root.iter("polyline")]  # type: ignore[misc]


def test_values_stand_in_proportion_and_gaps_split_the_line() -> None:
    points = [(0, 4.0), (10, 2.0), (20, None), (30, float("nan")), (40, 3.0), (50, float("inf")), (60, 2.0)]
    first, second, third = lines_of(chart("a & <b>", [Curve("loss", points)]))
    assert len(set(first)) == 2 and len(set(second)) == 1 and len(set(third)) == 1
    (x0, top), (x10, bottom) = first[:2]
    assert 0 < x0 < x10 < WIDTH and 0 < top < bottom < HEIGHT
    assert second[0][1] == pytest.approx((top + bottom) / 2, abs=0.1) and second[0][0] - x0 == pytest.approx(
        4 * (x10 - x0), abs=0.3
    )


def test_a_logarithmic_scale_has_no_place_for_zero() -> None:
    [line, last] = lines_of(chart("norm", [Curve("n", [(1, 1.0), (2, 10.0), (3, 0.0), (4, 100.0)])], log_scale=True))
    heights = [line[0][1], line[1][1], last[0][1]]
    assert heights[0] - heights[1] == pytest.approx(heights[1] - heights[2], abs=0.11)


def test_nothing_to_draw_and_a_constant() -> None:
    assert chart("none", [Curve("n", [(1, None)])]) == "" == chart("none", [])
    [line] = lines_of(chart("constant", [Curve("n", [(1, 0.0), (2, 0.0)])], marks=[1]))
    assert line[0][1] == line[1][1]


def test_no_spike_of_a_long_run_is_lost() -> None:
    values = np.ones(100_000)
    values[54_321] = 99.0
    svg = chart("long", [Curve("n", list(enumerate(values.tolist())))])
    [line] = lines_of(svg)
    assert len(line) <= MAX_POINTS + 1 and min(y for _, y in line) < 50
    assert ">99<" in re.sub(r"\s", "", svg)


def test_loads_over_time_are_means_in_columns() -> None:
    records = [(step, [[step / 1000, 1 - step / 1000]]) for step in range(1000)]
    maps = load_maps(records)
    assert maps is not None and maps.load_SLE.shape == (MAX_COLUMNS, 1, 2) and maps.steps[0] == 0
    np.testing.assert_allclose(maps.load_SLE.sum(-1), 2)
    assert maps.load_SLE[0, 0, 0] == pytest.approx(2 * 0.004, rel=0.2) and (np.diff(maps.load_SLE[:, 0, 0]) > 0).all()
    assert load_maps([]) is None and load_maps([(1, [[1.0]]), (2, [[0.5, 0.5]])]) is None
