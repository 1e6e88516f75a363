"""Small SVG charts for the report; colours are CSS variables, so they follow light and dark mode.

A chart is drawn 380 units wide, which is a phone's width: there its text has its own size, and on
a wide screen it grows by a fifth.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from markupsafe import Markup, escape

Point = tuple[float, float]
WIDTH, HEIGHT = 380, 230
LEFT, RIGHT, TOP, BOTTOM = 46, 10, 10, 38
COLOURS = tuple(f"s{index}" for index in range(2, 9))
"""Of curves; `s1` is grey, for the reference among distributions."""
BINS = 48
ROW = 54
"""Height of one model's distribution."""


@dataclass(frozen=True)
class Axis:
    """A linear axis from ``low`` to ``high`` drawn from ``start`` to ``end``."""

    low: float
    high: float
    start: float
    end: float

    def __call__(self, value: float) -> float:
        """Return where ``value`` is drawn."""
        share = (value - self.low) / (self.high - self.low)
        return round(self.start + share * (self.end - self.start), 1)

    def ticks(self, count: int = 5) -> list[float]:
        """Return round numbers inside the axis."""
        step = _round_step((self.high - self.low) / count)
        first = math.ceil(self.low / step - 1e-9)
        last = math.floor(self.high / step + 1e-9)
        return [round(i * step, 12) for i in range(first, last + 1)]


def _round_step(rough: float) -> float:
    power = 10.0 ** math.floor(math.log10(rough))
    return next(m * power for m in (1, 2, 5, 10) if m * power >= rough * 0.999)


def _axis(values: Sequence[float], start: float, end: float) -> Axis:
    low, high = min(values), max(values)
    if low == high:
        low, high = low - (abs(low) or 1) / 20, high + (abs(high) or 1) / 20
    return Axis(low, high, start, end)


def _rounded(axis: Axis, count: int) -> Axis:
    """Let an axis begin and end with a tick, and with zero if that is near."""
    low = 0.0 if 0 < axis.low < axis.high / 2 else axis.low
    step = _round_step((axis.high - low) / count)
    low, high = step * math.floor(low / step + 1e-9), step * math.ceil(axis.high / step - 1e-9)
    return Axis(low, high, axis.start, axis.end)


def number(value: float) -> str:
    """Format a number for people: three or four digits, thousands separated."""
    if abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:.4g}" if abs(value) >= 10 else f"{value:.3g}"


def lines(curves: Sequence[tuple[str, Sequence[Point]]], x_label: str, y_label: str) -> Markup:
    """Draw named curves over a common axis; a legend follows below where there are several.

    With more curves than colours, those that end farthest from where they began have one.
    """
    drawn = [(name, _finite(points)) for name, points in curves]
    drawn = [(name, points) for name, points in drawn if points]
    if not drawn:
        return Markup("")
    x = _axis([p[0] for _, points in drawn for p in points], LEFT, WIDTH - RIGHT)
    y = _rounded(_axis([p[1] for _, points in drawn for p in points], HEIGHT - BOTTOM, TOP), 4)
    loud = sorted(drawn, key=lambda c: -abs(c[1][-1][1] - c[1][0][1]))[: len(COLOURS)]
    loud = [curve for curve in drawn if curve in loud]
    quiet = [curve for curve in drawn if curve not in loud]
    body = [_grid(x, y, x_label, y_label)]
    body += [_curve(name, points, x, y, "quiet") for name, points in quiet]
    body += [_curve(*curve, x, y, style) for curve, style in zip(loud, COLOURS, strict=False)]
    names = [(style, name) for (name, _), style in zip(loud, COLOURS, strict=False)]
    names += [("quiet", f"{len(quiet)} more")] if quiet else []
    label = f"{y_label or ', '.join(name for name, _ in loud)} over {x_label}"
    return _svg(body, HEIGHT, label) + (_legend(names) if len(drawn) > 1 else Markup(""))


def _finite(points: Iterable[Point]) -> list[Point]:
    return [(x, y) for x, y in points if math.isfinite(x) and math.isfinite(y)]


def _grid(x: Axis, y: Axis, x_label: str, y_label: str) -> Markup:
    parts = []
    for tick in y.ticks(4):
        parts.append(
            f'<line class="grid" x1="{x.start}" x2="{x.end}" y1="{y(tick)}" y2="{y(tick)}"/>'
            f'<text x="{x.start - 6}" y="{y(tick) + 4}" text-anchor="end">{number(tick)}</text>'
        )
    parts += [
        f'<text x="{x(tick)}" y="{y.start + 16}" text-anchor="middle">{number(tick)}</text>'
        for tick in x.ticks()
    ]
    middle = (x.start + x.end) / 2
    parts.append(
        f'<text class="label" x="{middle}" y="{HEIGHT - 4}" text-anchor="middle">'
        f"{escape(x_label)}</text>"
        f'<text class="label" transform="translate(10 {(y.start + y.end) / 2}) rotate(-90)"'
        f' text-anchor="middle">{escape(y_label)}</text>'
    )
    return Markup("".join(parts))


def _curve(name: str, points: Sequence[Point], x: Axis, y: Axis, style: str) -> Markup:
    path = " ".join(f"{x(a)},{y(b)}" for a, b in points)
    dot = Markup("")
    if len(points) == 1:
        dot = Markup('<circle cx="{}" cy="{}" r="3"/>').format(x(points[0][0]), y(points[0][1]))
    return Markup('<g class="curve {}"><title>{}</title><polyline points="{}"/>{}</g>').format(
        style, name, path, dot
    )


def distributions(models: Sequence[tuple[str, Sequence[float]]], unit: str = "ms") -> Markup:
    """Draw one histogram per model over a common axis, with its median marked.

    The axis ends at the 95th percentile or at three times the largest median, or a few hiccups
    would squeeze all the rest into a line.
    """
    kept = [(name, np.asarray(values)) for name, values in models if len(values)]
    if not kept:
        return Markup("")
    most = 3 * max(float(np.median(values)) for _, values in kept)
    ends = [min(float(e), most) for _, values in kept for e in np.percentile(values, [0, 95])]
    x = _axis(ends, 10, WIDTH - 10)
    height = ROW * len(kept) + 36
    body = [
        Markup('<text x="{}" y="{}" text-anchor="middle">{}</text>').format(
            x(tick), height - 20, number(tick)
        )
        for tick in x.ticks()
    ]
    body.append(
        Markup('<text class="label" x="{}" y="{}" text-anchor="middle">{}</text>').format(
            WIDTH / 2, height - 4, unit
        )
    )
    for index, (name, values) in enumerate(kept):
        style = COLOURS[(index - 1) % len(COLOURS)] if index else "s1"
        body.append(_histogram(name, values, x, ROW * (index + 1) - 4, style, unit))
    return _svg(body, height, "distribution of latencies")


def _histogram(
    name: str,
    values: np.ndarray[Any, Any],
    x: Axis,
    base: float,
    style: str,
    unit: str,
) -> Markup:
    counts, edges = np.histogram(values, BINS, (x.low, x.high))
    tallest = ROW - 26
    bars = Markup("").join(
        Markup('<rect x="{}" y="{}" width="{}" height="{}"/>').format(
            x(edge),
            round(base - tallest * n / counts.max(), 1),
            round((x.end - x.start) / BINS - 0.8, 1),
            round(tallest * n / counts.max(), 1),
        )
        for n, edge in zip(counts, edges, strict=False)
        if n
    )
    median = float(np.median(values))
    return Markup(
        '<g class="bars {style}"><title>{name}</title>{bars}'
        '<line class="grid" x1="{left}" x2="{right}" y1="{base}" y2="{base}"/>'
        '<line class="median" x1="{x}" x2="{x}" y1="{top}" y2="{base}"/></g>'
        '<text x="{left}" y="{text}"><tspan class="name">{short}</tspan>'
        " <tspan>median {median} {unit}</tspan></text>"
    ).format(
        style=style,
        name=name,
        bars=bars,
        left=x.start,
        right=x.end,
        base=base,
        x=x(median),
        top=base - tallest - 4,
        text=base - tallest - 8,
        short=shortened(name, 34),
        median=number(median),
        unit=unit,
    )


def shortened(name: str, length: int) -> str:
    """Cut the middle out of a long name."""
    if len(name) <= length:
        return name
    half = (length - 1) // 2
    return f"{name[:half]}\N{HORIZONTAL ELLIPSIS}{name[-half:]}"


def _legend(names: Sequence[tuple[str, str]]) -> Markup:
    items = Markup("").join(
        Markup('<li><i class="{}"></i>{}</li>').format(style, name) for style, name in names
    )
    return Markup('<ul class="legend">{}</ul>').format(items)


def _svg(body: Sequence[Markup], height: float, label: str) -> Markup:
    return Markup(
        '<svg class="chart" viewBox="0 0 {} {}" role="img" aria-label="{}">{}</svg>'
    ).format(WIDTH, height, label, Markup("").join(body))
