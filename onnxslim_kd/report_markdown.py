"""The report as Markdown, for a pull request: what is long is folded."""

from collections.abc import Iterable, Sequence

from onnxslim_kd.charts import number
from onnxslim_kd.report import Metric, OperatorTime, ReportData, Timing

LONG = 12
"""Lines of a table from which on it is folded."""
Cells = tuple[str, ...]


def render_markdown(data: ReportData) -> str:
    """Return the tables of the report."""
    parts = [f"## {data.title}", data.summary, *(f"> {note}" for note in data.notes)]
    if data.metrics:
        parts.append(_table(("", "before", "after", "change"), map(_metric_cells, data.metrics)))
    if data.models:
        rows = ((r.name, *(_cell(r.values.get(c)) for c in data.columns)) for r in data.models)
        parts += ["### Models", _table(("model", *data.columns), rows)]
    parts += [*_latencies(data), *_profile(data), *_pruning(data)]
    if data.configuration:
        parts.append(_folded("Configuration", f"```yaml\n{data.configuration.rstrip()}\n```"))
    if data.versions:
        parts.append(", ".join(f"{name} {version}" for name, version in data.versions.items()))
    return "\n\n".join(part for part in parts if part) + "\n"


def _latencies(data: ReportData) -> Iterable[str]:
    columns = ("model", "median ms", "p90", "p99", "ratio [95 %]", "")
    for case in data.latencies:
        yield f"### Latency: {case.title}"
        yield _table(columns, map(_timing_cells, case.rows))
        yield from (f"> {note}" for note in case.notes)


def _profile(data: ReportData) -> Iterable[str]:
    models = (f"{model} ms (nodes)" for model in data.operator_models)
    columns = ("operator", *models, "change")
    if data.operators:
        yield "### Where the time goes"
        yield _table(columns, map(_operator_cells, data.operators))
    if data.nodes:
        table = _table(("node", *columns[1:]), map(_operator_cells, data.nodes))
        yield _folded("Node by node", table)


def _pruning(data: ReportData) -> Iterable[str]:
    if data.layers:
        layers = [
            (layer.name, str(layer.before), str(layer.after), f"{layer.removed:.0%}")
            for layer in data.layers
        ]
        table = _table(("layer", "before", "after", "removed"), layers)
        yield "### Channels"
        yield table if len(layers) < LONG else _folded(f"{len(layers)} layers", table)
        yield from data.plan_notes
    if data.refusals:
        yield "### Not pruned, and why"
        yield "\n".join(f"- {why}: {', '.join(names)}" for why, names in data.reasons.items())


def _folded(title: str, text: str) -> str:
    return f"<details><summary>{title}</summary>\n\n{text}\n\n</details>"


def _cell(value: float | None) -> str:
    return "" if value is None else number(value)


def _metric_cells(metric: Metric) -> Cells:
    unit = f" {metric.unit}" if metric.unit else ""
    interval = " [{:.3f}, {:.3f}]".format(*metric.interval) if metric.interval else ""
    change = "" if metric.change is None else f"{metric.change:.3f}x{interval}"
    if metric.is_score:
        change = metric.points
    return metric.name, number(metric.before) + unit, number(metric.after) + unit, change


def _timing_cells(row: Timing) -> Cells:
    times = (f"{ms:.3f}" for ms in (row.median, row.p90, row.p99))
    ratio = "{:.3f} [{:.3f}, {:.3f}]".format(row.ratio, *row.interval)
    return row.model, *times, ratio, row.verdict


def _operator_cells(operator: OperatorTime) -> Cells:
    pairs = zip(operator.milliseconds, operator.count, strict=True)
    return (
        operator.name,
        *(f"{ms:.3f} ({n})" if n else "none" for ms, n in pairs),
        f"{operator.change:+.3f}",
    )


def _table(header: Cells, rows: Iterable[Sequence[str]]) -> str:
    lines = [header, ("---", *("---:",) * (len(header) - 1)), *rows]
    return "\n".join(f"| {' | '.join(c.replace('|', '&#124;') for c in line)} |" for line in lines)
