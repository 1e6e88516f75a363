"""The report of a run: what it can show, and one HTML page of it that needs no network.

Every part of `ReportData` may be left out; what is not there is not shown.
"""

import base64
from collections import defaultdict
from importlib.resources import files
from typing import Literal

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup
from pydantic import BaseModel, ConfigDict

from onnxslim_kd import charts
from onnxslim_kd.charts import number, shortened

SHORT = 32
"""Characters of a name in a table; the whole name is its tooltip."""


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Metric(_Frozen):
    """One number of the headline."""

    name: str
    before: float
    after: float
    unit: str = ""
    better: Literal["lower", "higher"] = "lower"
    interval: tuple[float, float] | None = None
    """Of the ratio ``after / before``, where it was measured repeatedly."""
    ratio: float | None = None
    """Where the ratio was measured itself, by pairs; None for ``after / before``."""

    @property
    def change(self) -> float | None:
        """``after / before``."""
        if self.ratio is not None:
            return self.ratio
        return self.after / self.before if self.before else None

    @property
    def is_score(self) -> bool:
        """Whether it is read as it is, in points, and not as a ratio."""
        return self.better == "higher"

    @property
    def points(self) -> str:
        """The difference of a score, in words."""
        return f"{self.after - self.before:+.2f}" if self.after != self.before else "no change"

    @property
    def improved(self) -> bool | None:
        """Whether it got better; None for no difference seen."""
        change = self.change
        low, high = self.interval or (change, change)
        if change is None or low is None or high is None or low <= 1 <= high:
            return None
        return (change < 1) == (self.better == "lower")


class ModelRow(_Frozen):
    """One model in the table of results."""

    name: str
    values: dict[str, float]
    """By the title of the column, with its unit."""


class Layer(_Frozen):
    """Channels of one layer."""

    name: str
    before: int
    after: int

    @property
    def removed(self) -> float:
        """The share that went."""
        return 1 - self.after / self.before if self.before else 0.0


class Refusal(_Frozen):
    """A parameter that was not pruned."""

    name: str
    reason: str


class Curve(_Frozen):
    """A named line of points."""

    name: str
    points: tuple[tuple[float, float], ...]


class Plot(_Frozen):
    """Curves over a common axis."""

    title: str
    x_label: str
    y_label: str
    curves: tuple[Curve, ...]


class Timing(_Frozen):
    """One model's latency, in milliseconds."""

    model: str
    median: float
    p90: float
    p99: float
    ratio: float
    interval: tuple[float, float]
    verdict: str = ""
    milliseconds: tuple[float, ...] = ()


class Latencies(_Frozen):
    """All models at one size of inputs."""

    title: str
    rows: tuple[Timing, ...]
    notes: tuple[str, ...] = ()


class OperatorTime(_Frozen):
    """Milliseconds of one operator type, or of one node, one number per model."""

    name: str
    milliseconds: tuple[float, ...]
    count: tuple[int, ...]
    """Nodes that ran; 0 where a model has none."""

    @property
    def change(self) -> float:
        """From the first model to the last."""
        return self.milliseconds[-1] - self.milliseconds[0]


class ReportData(_Frozen):
    """What the report shows; every part is optional."""

    title: str = "onnxslim-kd report"
    summary: str = ""
    notes: tuple[str, ...] = ()
    metrics: tuple[Metric, ...] = ()
    models: tuple[ModelRow, ...] = ()
    latencies: tuple[Latencies, ...] = ()
    layers: tuple[Layer, ...] = ()
    refusals: tuple[Refusal, ...] = ()
    plan_notes: tuple[str, ...] = ()
    sensitivity: Plot | None = None
    learning: tuple[Plot, ...] = ()
    operators: tuple[OperatorTime, ...] = ()
    nodes: tuple[OperatorTime, ...] = ()
    """Those that changed most come first."""
    operator_models: tuple[str, ...] = ()
    """The models that the numbers of `operators` and `nodes` belong to."""
    graph_svg: str | None = None
    configuration: str = ""
    versions: dict[str, str] = {}

    @property
    def columns(self) -> list[str]:
        """The columns of the table of results."""
        return list(dict.fromkeys(title for row in self.models for title in row.values))

    @property
    def reasons(self) -> dict[str, list[str]]:
        """What was refused, by reason."""
        found: dict[str, list[str]] = defaultdict(list)
        for refusal in self.refusals:
            found[refusal.reason].append(refusal.name)
        return dict(found)


def render(data: ReportData) -> str:
    """Return the report as one HTML page that needs nothing else."""
    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {"number": number, "plot": _plot, "histograms": _histograms}
    environment.filters["short"] = lambda name: shortened(name, SHORT)
    page = files(__package__).joinpath("report.html").read_text("utf-8")
    template = environment.from_string(page)
    return template.render(data=data, graph=_picture(data.graph_svg))


def _plot(plot: Plot) -> Markup:
    return charts.lines([(c.name, c.points) for c in plot.curves], plot.x_label, plot.y_label)


def _histograms(latencies: Latencies) -> Markup:
    return charts.distributions([(row.model, row.milliseconds) for row in latencies.rows])


def _picture(svg: str | None) -> str | None:
    """Return an SVG as a data URI: as an image it can neither run scripts nor load anything."""
    if svg is None:
        return None
    return f"data:image/svg+xml;base64,{base64.b64encode(svg.encode()).decode()}"
