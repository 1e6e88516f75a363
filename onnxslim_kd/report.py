"""The report of a run: one HTML file without network, and Markdown for a pull request.

Every part of `ReportData` may be left out; what is not there is not shown.
"""

import base64
from collections import defaultdict
from collections.abc import Iterable
from importlib.resources import files
from typing import TYPE_CHECKING, Literal

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup
from pydantic import BaseModel, ConfigDict

from onnxslim_kd import charts
from onnxslim_kd.charts import number, shortened
from onnxslim_kd.profile import by_type

if TYPE_CHECKING:
    from onnxslim_kd import bench

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
    def improved(self) -> bool | None:
        """Whether it got better; None for no difference seen."""
        change = self.change
        low, high = self.interval or (change, change)
        if change is None or low is None or high is None or low <= 1 <= high:
            return None
        return (change < 1) == (self.better == "lower")


class Layer(_Frozen):
    """Channels of one layer."""

    name: str
    before: int
    after: int


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
    """Milliseconds of one operator type, one number per model."""

    name: str
    milliseconds: tuple[float, ...]
    count: tuple[int, ...]


class ReportData(_Frozen):
    """What the report shows; every part is optional."""

    title: str = "onnxslim-kd report"
    summary: str = ""
    notes: tuple[str, ...] = ()
    metrics: tuple[Metric, ...] = ()
    latencies: tuple[Latencies, ...] = ()
    layers: tuple[Layer, ...] = ()
    refusals: tuple[Refusal, ...] = ()
    sensitivity: Plot | None = None
    learning: tuple[Plot, ...] = ()
    operators: tuple[OperatorTime, ...] = ()
    operator_models: tuple[str, ...] = ()
    """The models that the numbers of `operators` belong to."""
    graph_svg: str | None = None
    configuration: str = ""
    versions: dict[str, str] = {}

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
    template = environment.from_string(files(__package__).joinpath("report.html").read_text())
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


# ------------------------------------------------------------------------- from a bench


def from_bench(found: "bench.Report") -> ReportData:
    """Show what `onnxslim_kd.bench.bench` found; the headline is the last model's."""
    first, last = found.models[0], found.models[-1]
    environment = found.environment
    threads = f"{found.setting.threads} thread{'s' * (found.setting.threads != 1)}"
    case = found.cases[0]
    against = "" if len(found.models) < 3 else f"{last.name} against {first.name}; "
    return ReportData(
        title=" vs ".join(model.name for model in found.models),
        summary=f"{against}{found.ran_on}, {threads}, {environment.cpu}",
        metrics=() if first is last else _headline(found),
        latencies=tuple(map(_latencies, found.cases)),
        operators=tuple(
            OperatorTime(name=c.name, milliseconds=c.milliseconds, count=c.count)
            for c in by_type([row.operators for row in case.rows])
        ),
        operator_models=tuple(row.model for row in case.rows),
        versions=environment.versions,
    )


def _headline(found: "bench.Report") -> tuple[Metric, ...]:
    first, last = found.models[0], found.models[-1]
    before, after = found.cases[0].rows[0], found.cases[0].rows[-1]
    ratio = after.ratio
    return (
        Metric(
            name="Latency",
            before=before.latency.median,
            after=after.latency.median,
            unit="ms",
            ratio=ratio.median,
            interval=(ratio.low, ratio.high),
        ),
        Metric(name="Size", before=first.bytes / 1e6, after=last.bytes / 1e6, unit="MB"),
        Metric(name="MACs", before=before.macs / 1e6, after=after.macs / 1e6, unit="M"),
        Metric(name="Parameters", before=first.parameters, after=last.parameters),
    )


def _latencies(case: "bench.Case") -> Latencies:
    rows = tuple(
        Timing(
            model=row.model,
            median=row.latency.median,
            p90=row.latency.p90,
            p99=row.latency.p99,
            ratio=row.ratio.median,
            interval=(row.ratio.low, row.ratio.high),
            verdict=row.verdict if index else "",
            milliseconds=row.milliseconds,
        )
        for index, row in enumerate(case.rows)
    )
    sizes = ", ".join(f"{n} {'x'.join(map(str, s))}" for n, s in case.shapes.items())
    return Latencies(title=sizes, rows=rows, notes=case.notes)


# ---------------------------------------------------------------------------- Markdown


def render_markdown(data: ReportData) -> str:
    """Return the tables of the report for a pull request."""
    parts = [f"## {data.title}", data.summary, *(f"> {note}" for note in data.notes)]
    if data.metrics:
        parts.append(_table(("", "before", "after", "ratio"), map(_metric_cells, data.metrics)))
    for case in data.latencies:
        columns = ("model", "median ms", "p90", "p99", "ratio [95 %]", "")
        parts += [f"### {case.title}", _table(columns, map(_timing_cells, case.rows))]
        parts += [f"> {note}" for note in case.notes]
    if data.operators:
        cells = (
            (o.name, *(f"{ms:.3f} ({n})" for ms, n in zip(o.milliseconds, o.count, strict=True)))
            for o in data.operators
        )
        header = ("operator", *(f"{model} ms (nodes)" for model in data.operator_models))
        parts += ["### Where the time goes", _table(header, cells)]
    if data.layers:
        layers = ((layer.name, str(layer.before), str(layer.after)) for layer in data.layers)
        parts += ["### Channels", _table(("layer", "before", "after"), layers)]
    if data.refusals:
        parts.append("### Not pruned")
        parts += [f"- {reason}: {', '.join(names)}" for reason, names in data.reasons.items()]
    if data.versions:
        parts.append(", ".join(f"{name} {version}" for name, version in data.versions.items()))
    return "\n\n".join(part for part in parts if part) + "\n"


def _metric_cells(metric: Metric) -> tuple[str, ...]:
    unit = f" {metric.unit}" if metric.unit else ""
    interval = " [{:.3f}, {:.3f}]".format(*metric.interval) if metric.interval else ""
    ratio = "" if metric.change is None else f"{metric.change:.3f}{interval}"
    return metric.name, number(metric.before) + unit, number(metric.after) + unit, ratio


def _timing_cells(row: Timing) -> tuple[str, ...]:
    times = (f"{ms:.3f}" for ms in (row.median, row.p90, row.p99))
    return (
        row.model,
        *times,
        "{:.3f} [{:.3f}, {:.3f}]".format(row.ratio, *row.interval),
        row.verdict,
    )


def _table(header: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> str:
    lines = [header, ("---",) * len(header), *rows]
    return "\n".join(f"| {' | '.join(c.replace('|', '&#124;') for c in line)} |" for line in lines)
