"""Charts: axes with round ticks, every curve and bar inside the picture."""

import math
import re
import xml.etree.ElementTree as ET
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from onnxslim_kd import charts
from onnxslim_kd.charts import COLOURS, HEIGHT, WIDTH, Axis, distributions, lines, number, shortened


@given(st.floats(-1e6, 1e6), st.floats(1e-3, 1e6))
def test_ticks_are_few_round_and_inside(low, width):
    axis = Axis(low, low + width, 0, 100)
    ticks = axis.ticks()
    assert 1 <= len(ticks) <= 6
    assert all(-0.2 <= axis(tick) <= 100.2 for tick in ticks)
    steps = {f"{b - a:.2e}"[0] for a, b in pairwise(ticks)}
    assert steps <= set("125") | {"4", "9"}  # 4.99e-1 and 9.99e-1 are rounding


def curves(count, length=5):
    return [(f"curve {i}", [(x, i * x) for x in range(length)]) for i in range(count)]


def svg(markup):
    text = str(markup)
    return ET.fromstring(text[: text.index("</svg>") + 6])


def test_every_curve_is_drawn_inside_and_named_in_the_legend():
    markup = lines(curves(3), "epoch", "loss")
    drawn = [line.get("points") for line in svg(markup).iter("polyline")]
    assert len(drawn) == 3
    points = [tuple(map(float, p.split(","))) for line in drawn for p in line.split()]
    assert all(0 <= x <= WIDTH and 0 <= y <= HEIGHT for x, y in points)
    assert re.findall(r"</i>([^<]+)</li>", markup) == ["curve 0", "curve 1", "curve 2"]
    first_y = float(drawn[2].split()[0].split(",")[1])
    assert first_y > float(drawn[2].split()[-1].split(",")[1]), "larger is higher"


def test_of_many_curves_those_that_move_most_have_a_colour():
    markup = str(lines(curves(20), "ratio", "lost"))
    names = re.findall(r"</i>([^<]+)</li>", markup)
    assert names == [f"curve {i}" for i in range(20 - len(COLOURS), 20)] + ["13 more"]
    assert markup.count('class="curve quiet"') == 13


def test_gaps_single_points_and_nothing():
    assert lines([], "x", "y") == ""
    assert lines([("nan", [(0, math.nan)])], "x", "y") == ""
    markup = lines([("one", [(1, 2)]), ("gap", [(0, 1), (1, math.inf), (2, 3)])], "x", "y")
    assert len(list(svg(markup).iter("circle"))) == 1
    gap = next(e.get("points") for e in svg(markup).iter("polyline") if " " in e.get("points"))
    assert len(gap.split()) == 2
    assert distributions([]) == "" and distributions([("m", [])]) == ""


def test_histograms_mark_the_median_and_leave_the_hiccup_out():
    values = [*np.linspace(1, 2, 300), 500.0]
    markup = distributions([("a.onnx", values), ("b.onnx", [1.5] * 10)])
    bars = [bar for bar in svg(markup).iter("rect")]
    assert all(0 <= float(bar.get("x")) <= WIDTH for bar in bars)
    assert len(bars) > 40, "the axis ends at 2, not at 500"
    assert markup.count('class="median"') == 2 and "median 1.5 ms" in markup  # of all runs


@pytest.mark.parametrize("draw", [lambda n: lines([(n, [(0, 1), (1, 2)])], n, n),
                                  lambda n: distributions([(n, [1.0, 2.0])])])  # fmt: skip
def test_names_are_escaped(draw):
    assert "<b>" not in draw("<b>bold</b>")


def test_numbers_and_names_are_short():
    assert [number(v) for v in (0.123456, 12.0, 1234.5, 3504872)] == [
        "0.123", "12", "1,234", "3,504,872",
    ]  # fmt: skip
    assert shortened("short", 10) == "short"
    assert shortened("a" * 20 + "b" * 20, 11) == "aaaaa\N{HORIZONTAL ELLIPSIS}bbbbb"
    assert charts.number(-1500.4) == "-1,500"
