"""A picture of a graph, folded by module: the student left, the losses next to it, then teachers.

The layout is a column for each lane, in the order of the graph; a loss stands at the height of
what it reads. That reads better than a general graph layout, for networks are chains and losses
connect two of them. Hovering over a box or an edge shows full names in a browser.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

import onnx_ir as ir

from onnxslim_kd.boxes import LOSS, LOSSES, MOST, STUDENT, Box, Folded, fold
from onnxslim_kd.model import ModelLike, load, name_of
from onnxslim_kd.passes import dims

WIDTH, HEIGHT, GAP, LANE = 210, 44, 18, 170
"""Of a box, between boxes of a lane, and between lanes, in pixels."""
MARGIN, INPUTS, TOP = 60, 52, 120
CHARACTERS = 33
"""Of the small print that fit into a box."""


@dataclass(frozen=True)
class Place:
    """Where a box stands: its upper left corner."""

    x: float
    y: float

    @property
    def bottom(self) -> tuple[float, float]:
        """The middle of the lower edge."""
        return self.x + WIDTH / 2, self.y + HEIGHT

    @property
    def top(self) -> tuple[float, float]:
        """The middle of the upper edge."""
        return self.x + WIDTH / 2, self.y


def draw(source: ModelLike, *, most: int = MOST) -> str:
    """Return the SVG picture of a model, merged or plain.

    Args:
        source: The model.
        most: Boxes for each network; more show finer modules.

    Raises:
        ModelError: The model cannot be read.
    """
    model = load(source)
    folded = fold(model, most=most)
    places = _places(folded)
    width = max(place.x for place in places) + WIDTH + MARGIN
    height = max(place.y for place in places) + HEIGHT + 90
    parts = [
        *_edges(folded, places),
        *_inputs(folded, places),
        *_outputs(folded, places),
        *(_box(box, place) for box, place in zip(folded.boxes, places, strict=True)),
        *_headings(folded, places),
    ]
    title = escape(model.graph.name or "graph")
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:.0f} {height:.0f}"'
        f' width="{width:.0f}" height="{height:.0f}">\n<title>{title}</title>\n{STYLE}\n'
        f'<rect width="100%" height="100%" fill="#fff"/>\n' + "\n".join(parts) + "\n</svg>\n"
    )


# ---------------------------------------------------------------------------- layout


def _places(folded: Folded) -> list[Place]:
    places: list[Place] = []
    for column, (lane, boxes) in enumerate(folded.lanes.items()):
        x = MARGIN + column * (WIDTH + LANE)
        if lane == LOSSES:
            places += [Place(x, 0)] * len(boxes)  # after its sources are placed, below
        else:
            places += [Place(x, TOP + row * (HEIGHT + GAP)) for row in range(len(boxes))]
    _place_losses(folded, places)
    return places


def _place_losses(folded: Folded, places: list[Place]) -> None:
    """Put every term at the mean height of what it reads, without overlap; the sum goes last."""
    losses = [i for i, box in enumerate(folded.boxes) if box.lane == LOSSES]
    wanted = {}
    for i in losses:
        heights = [places[a].y for a, b in folded.edges if b == i and a not in losses]
        wanted[i] = sum(heights) / len(heights) if heights else float("inf")
    lowest = float(TOP)
    for i in sorted(losses, key=lambda i: wanted[i]):
        y = max(lowest, wanted[i] if wanted[i] < float("inf") else lowest + GAP)
        places[i] = Place(places[i].x, y)
        lowest = y + HEIGHT + GAP


# ----------------------------------------------------------------------------- parts


def _box(box: Box, place: Place) -> str:
    out = _shape_text(box)
    small = box.operators
    count = f"{_short(box.parameters)} weights" if box.parameters else ""
    lane = box.lane if box.lane in (STUDENT, LOSSES) else "teacher"
    return (
        f'<g class="box {lane}"><title>{escape(box.title)}\n{escape(small)}\n{escape(out)}'
        f"{' (' + count + ')' if count else ''}</title>"
        f'<rect x="{place.x:.0f}" y="{place.y:.0f}" width="{WIDTH}" height="{HEIGHT}" rx="6"/>'
        f'<text x="{place.x + 9:.0f}" y="{place.y + 17:.0f}" class="name">'
        f"{escape(_clip(box.title, 20))}</text>"
        f'<text x="{place.x + WIDTH - 9:.0f}" y="{place.y + 17:.0f}" class="shape">{out}</text>'
        f'<text x="{place.x + 9:.0f}" y="{place.y + 34:.0f}" class="small">'
        f"{escape(_clip(small, CHARACTERS))}</text></g>"
    )


def _edges(folded: Folded, places: Sequence[Place]) -> list[str]:
    boxes = folded.boxes
    order = {id(box): row for lane in folded.lanes.values() for row, box in enumerate(lane)}
    found = []
    for (a, b), values in folded.edges.items():
        one, other = places[a], places[b]
        if boxes[a].lane != boxes[b].lane:
            path = _across(one, other)
        elif boxes[a].lane != LOSSES and order[id(boxes[b])] == order[id(boxes[a])] + 1:
            (x, y), (x2, y2) = one.bottom, other.top
            path = f"M{x:.0f} {y:.0f}L{x2:.0f} {y2 - 2:.0f}"
        else:
            path = _around(one, other, outside=-1 if boxes[a].lane == STUDENT else 1)
        kind = "tap" if boxes[a].lane != LOSSES == boxes[b].lane else "flow"
        found.append(_line(path, kind, values))
    return found


def _across(one: Place, other: Place) -> str:
    """From one lane to another, side to side."""
    right = other.x > one.x
    x, x2 = (one.x + WIDTH, other.x - 3) if right else (one.x, other.x + WIDTH + 3)
    y, y2 = one.y + HEIGHT / 2, other.y + HEIGHT / 2
    bend = (x2 - x) / 2
    return f"M{x:.0f} {y:.0f}C{x + bend:.0f} {y:.0f} {x2 - bend:.0f} {y2:.0f} {x2:.0f} {y2:.0f}"


def _around(one: Place, other: Place, *, outside: int) -> str:
    """Within a lane, past the boxes between."""
    side = WIDTH if outside > 0 else 0
    x, y, y2 = one.x + side, one.y + HEIGHT / 2, other.y + HEIGHT / 2
    reach = x + outside * min(45, 12 + abs(y2 - y) / 12)
    return (
        f"M{x:.0f} {y:.0f}C{reach:.0f} {y:.0f} {reach:.0f} {y2:.0f} {x + 3 * outside:.0f} {y2:.0f}"
    )


def _line(path: str, kind: str, values: Sequence[ir.Value]) -> str:
    names = escape("\n".join(f"{v.name} {dims.text(v)}" for v in values))
    return f'<path class="{kind}" d="{path}" marker-end="url(#tip)"><title>{names}</title></path>'


def _inputs(folded: Folded, places: Sequence[Place]) -> list[str]:
    """A pill above every lane with the inputs that it is the first to read, and lines from it."""
    found = []
    shown: dict[float, list[ir.Value]] = {}
    for value, readers in folded.inputs.items():
        if not readers:
            continue
        x, y = places[readers[0]].x + WIDTH / 2, INPUTS + 20
        shown.setdefault(places[readers[0]].x, []).append(value)
        for reader in readers:
            x2, y2 = places[reader].top
            path = f"M{x:.0f} {y}C{x:.0f} {y + 24} {x2:.0f} {y2 - 40:.0f} {x2:.0f} {y2 - 2:.0f}"
            found.append(_line(path, "feed", [value]))
    return found + [_pill(x, INPUTS, values) for x, values in shown.items()]


def _outputs(folded: Folded, places: Sequence[Place]) -> list[str]:
    """A pill below every box that computes outputs; the terms of the loss are boxes already."""
    shown: dict[int, list[ir.Value]] = {}
    for value, home in folded.outputs.items():
        if folded.boxes[home].lane != LOSSES or folded.boxes[home].title == LOSS:
            shown.setdefault(home, []).append(value)
    found = []
    for home, values in shown.items():
        x, y = places[home].bottom
        found.append(_line(f"M{x:.0f} {y:.0f}L{x:.0f} {y + 24:.0f}", "feed", values))
        found.append(_pill(places[home].x, y + 26, values))
    return found


def _pill(x: float, y: float, values: Sequence[ir.Value]) -> str:
    texts = [f"{name_of(value)} {dims.text(value)}" for value in values]
    text = texts[0] if len(texts) == 1 else ", ".join(name_of(value) for value in values)
    return (
        f'<g class="pill"><title>{escape(chr(10).join(texts))}</title>'
        f'<rect x="{x:.0f}" y="{y:.0f}" width="{WIDTH}" height="20" rx="10"/>'
        f'<text x="{x + WIDTH / 2:.0f}" y="{y + 14:.0f}">'
        f"{escape(_clip(text, CHARACTERS))}</text></g>"
    )


def _headings(folded: Folded, places: Sequence[Place]) -> list[str]:
    found, first = [], 0
    for lane, boxes in folded.lanes.items():
        weights = sum(box.parameters for box in boxes)
        name = lane if len(folded.lanes) > 1 else "model"
        text = f"{name}: {_short(weights)} weights" if weights else name
        found.append(
            f'<text class="heading" x="{places[first].x:.0f}" y="{INPUTS - 22}">'
            f"{escape(text)}</text>"
        )
        first += len(boxes)
    return found


def _shape_text(box: Box) -> str:
    """The shape of what leaves the box, without the batch."""
    shape = dims.read(box.nodes[-1].outputs[0])
    if shape is None:
        return ""
    return "x".join(str(d) if isinstance(d, int) else "?" for d in shape[1:])


def _short(number: int) -> str:
    for unit, size in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= size:
            return f"{number / size:.3g}{unit}"
    return str(number)


def _clip(text: str, most: int) -> str:
    return text if len(text) <= most else text[: most - 1] + "\u2026"


STYLE = """<defs><marker id="tip" viewBox="0 0 8 8" refX="6" refY="4" markerWidth="6"
 markerHeight="6" orient="auto"><path d="M0 0L8 4L0 8z" fill="#667"/></marker></defs>
<style>
text { font-family: Helvetica, Arial, sans-serif; font-size: 11px; fill: #223 }
.name { font-size: 13px; font-weight: bold }
.shape { text-anchor: end; fill: #556 }
.small { fill: #556 }
.heading { font-size: 15px; font-weight: bold }
.box rect { stroke-width: 1.2 }
.student rect { fill: #e4f0fb; stroke: #3b7dbd }
.teacher rect { fill: #eaf5e6; stroke: #5b9a48 }
.losses rect { fill: #fdf0dc; stroke: #c98a2b }
.pill rect { fill: #f3f3f6; stroke: #889 }
.pill text { text-anchor: middle }
.flow, .tap, .feed { fill: none }
.flow { stroke: #667; stroke-width: 1.3 }
.tap { stroke: #c98a2b; stroke-width: 1.1; stroke-opacity: 0.75 }
.feed { stroke: #99a; stroke-width: 1; stroke-dasharray: 4 3 }
</style>"""
