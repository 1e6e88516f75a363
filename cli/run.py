"""onnxslim-kd run."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from onnxslim_kd.cli import options
from onnxslim_kd.cli.options import FILE

if TYPE_CHECKING:
    from onnxslim_kd.report import ReportData


@click.command(epilog="Example: onnxslim-kd run examples/digits.yaml -o stages.original.epochs=2")
@click.argument("config", type=FILE)
@click.option(
    "-o", "overrides", multiple=True, metavar="KEY.PATH=VALUE",
    help="Another value for a setting; repeatable.",
)  # fmt: skip
@click.option("--resume", is_flag=True, help="Go on inside a training that was interrupted.")
@click.option(
    "--dir", "folder", type=FILE,
    help="Where the artefacts go.  [default: runs/ and the name of CONFIG]",
)  # fmt: skip
@click.option("--dry-run", is_flag=True, help="Check CONFIG, and say which stages would run.")
@click.option("--json", "as_json", is_flag=True, help="Events and the result as JSON lines.")
def run(
    config: Path,
    overrides: tuple[str, ...],
    resume: bool,
    folder: Path | None,
    dry_run: bool,
    as_json: bool,
) -> None:
    """Run all stages of CONFIG that are not up to date, and write the report."""
    from onnxslim_kd import pipeline, recipe

    folder = folder or Path("runs") / config.stem
    chosen = recipe.read(config, overrides)
    if dry_run:
        _print_pending(pipeline.pending(chosen, folder), as_json=as_json)
        return
    listen = options.print_line if as_json else _tell
    data = pipeline.run(chosen, folder, resume=resume, listen=listen)
    if as_json:
        options.print_line({"event": "report", "metrics": [m.model_dump() for m in data.metrics]})
        return
    _print_table(data)
    click.echo(f"Report: {folder / pipeline.HTML}, {folder / pipeline.MARKDOWN}")


def _tell(event: Mapping[str, Any]) -> None:
    """Print what happens: a line for every stage and every epoch."""
    if event["event"] == "stage" and "seconds" in event:
        click.echo(f"      {event['seconds']:.1f} s")
    elif event["event"] == "stage":
        why = "up to date" if event["kept"] else event["reason"]
        click.echo(f"[{event['number']}/{event['of']}] {event['name']}: {why}")
    elif event["event"] in ("epoch", "resume"):
        from onnxslim_kd.cli.train import describe

        for line in describe(event):
            click.echo(f"      {line}")


def _print_pending(reasons: Mapping[str, str | None], *, as_json: bool) -> None:
    if as_json:
        options.print_json(reasons)
        return
    for number, (name, reason) in enumerate(reasons.items(), start=1):
        click.echo(f"[{number}/{len(reasons)}] {name}: {reason or 'up to date'}")


def _print_table(data: "ReportData") -> None:
    from onnxslim_kd.charts import number

    rows = []
    for metric in data.metrics:
        unit = f" {metric.unit}" if metric.unit else ""
        ratio = "-" if metric.change is None else f"{metric.change:.3f}"
        if metric.is_score:
            ratio = metric.points
        if metric.interval is not None:
            ratio += " [{:.3f}, {:.3f}]".format(*metric.interval)
        rows.append((metric.name, number(metric.before) + unit, number(metric.after) + unit, ratio))
    if rows:
        options.print_table(data.title, ("", "before", "after", "change"), rows)
