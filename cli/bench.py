"""onnxslim-kd bench."""

from pathlib import Path
from typing import TYPE_CHECKING

import click

from onnxslim_kd.cli import options

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from onnxslim_kd.bench import Case, Report

FILE = click.Path(dir_okay=False, path_type=Path)
MOST_NODES = 10
"""Lines of the node-by-node comparison on the terminal; the files hold all."""


def _batches(_ctx: click.Context, _param: click.Parameter, text: str | None) -> list[int]:
    parts = [part.strip() for part in text.split(",")] if text else []
    if not all(part.isdigit() and int(part) > 0 for part in parts):
        raise click.BadParameter(f"{text!r} is no list of sizes like 1,8")
    return [int(part) for part in parts]


@click.command()
@click.argument("models", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option(
    "--input",
    "shapes",
    multiple=True,
    metavar="NAME=1x3x224x224",
    help="Shape of an input; given twice for one name, both sizes are measured.",
)
@click.option(
    "--batch", "batches", callback=_batches, metavar="1,8", help="Sizes of the free first axes."
)
@click.option("--inputs", type=FILE, help="An npz file to feed instead of random numbers.")
@click.option(
    "--provider",
    type=click.Choice(["cpu", "cuda", "tensorrt"]),
    default="cpu",
    show_default=True,
    help="Where to run; running elsewhere is an error.",
)
@click.option("--threads", type=click.IntRange(1), help="Default: the cores of this process.")
@click.option(
    "--rounds",
    type=int,
    default=30,
    show_default=True,
    help="How often the models are measured in turn.",
)
@click.option(
    "--seconds",
    type=float,
    default=30.0,
    show_default=True,
    help="Of one size of inputs, after which no further round begins.",
)
@click.option("--profile", is_flag=True, help="Also say where the time goes, per operator.")
@click.option("--json", "json_file", type=FILE, help="Write everything measured.")
@click.option("--markdown", type=FILE, help="Write the tables for a pull request.")
@click.option("--html", type=FILE, help="Write a page with pictures.")
@options.untrusted
@click.option("--force", is_flag=True, help="Replace files that are there.")
def bench(
    models: tuple[Path, ...],
    shapes: tuple[str, ...],
    batches: list[int],
    inputs: Path | None,
    provider: str,
    threads: int | None,
    rounds: int,
    seconds: float,
    profile: bool,
    json_file: Path | None,
    markdown: Path | None,
    html: Path | None,
    untrusted: bool,
    force: bool,
) -> None:
    """Measure MODELS against the first of them, in turn, on this machine."""
    from onnxslim_kd.bench import Setting
    from onnxslim_kd.bench import bench as measure
    from onnxslim_kd.model import check_writable, write_text
    from onnxslim_kd.report import render
    from onnxslim_kd.report_markdown import render_markdown
    from onnxslim_kd.report_parts import from_bench
    from onnxslim_kd.workload import parse_shapes, read_inputs

    for output in filter(None, (json_file, markdown, html)):
        check_writable(output, overwrite=force)
    options.check_untrusted(untrusted, *models)
    found = measure(
        models,
        shapes=parse_shapes(shapes),
        batches=batches,
        inputs=read_inputs(inputs) if inputs else None,
        setting=Setting(provider, threads or 0, rounds, seconds, profile),
    )
    _print(found)
    for path, write in (
        (json_file, found.to_json),
        (markdown, lambda: render_markdown(from_bench(found))),
        (html, lambda: render(from_bench(found))),
    ):
        if path is not None:
            write_text(path, write(), overwrite=force)


def _print(report: "Report") -> None:
    from rich.console import Console

    console = Console(highlight=False, markup=False)  # names may hold brackets
    threads = report.setting.threads
    console.print(
        f"{report.ran_on}, {threads} thread{'s' * (threads != 1)}, {report.environment.cpu},"
        f" ONNX Runtime {_runtime_version(report)}"
    )
    console.print(_subjects(report))
    for case in report.cases:
        sizes = ", ".join(
            f"{n} {'x'.join(map(str, s)) or '(scalar)'}" for n, s in case.shapes.items()
        )
        console.print(f"\n{sizes}", style="bold")
        console.print(_latencies(case))
        if not case.rows[0].difference.same:  # from itself: it gives no numbers
            console.print(f"{case.rows[0].model}: {case.rows[0].difference}")
        for row in case.rows[1:]:
            console.print(f"{row.model}: {row.verdict}")
        for note in case.notes:
            console.print(f"note: {note}", style="yellow")
        if report.setting.profile:
            _print_profile(console, case)


def _runtime_version(report: "Report") -> str:
    versions = report.environment.versions
    return versions.get("onnxruntime-gpu") or versions.get("onnxruntime", "")


def _table(*columns: str) -> "Table":
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for index, column in enumerate(columns):
        table.add_column(
            column, justify="right" if index else "left", no_wrap=bool(index), overflow="fold"
        )
    return table


def _subjects(report: "Report") -> "Table":
    table = _table("model", "parameters", "size")
    for model in report.models:
        table.add_row(model.name, f"{model.parameters:,}", f"{model.bytes / 1e6:,.2f} MB")
    return table


def _latencies(case: "Case") -> "Table":
    table = _table("model", "median ms", "p90", "p99", "ratio [95 %]", "M MACs")
    for index, row in enumerate(case.rows):
        times = (f"{ms:.3f}" for ms in (row.latency.median, row.latency.p90, row.latency.p99))
        table.add_row(row.model, *times, str(row.ratio) if index else "1", f"{row.macs / 1e6:,.1f}")
    return table


def _print_profile(console: "Console", case: "Case") -> None:
    from onnxslim_kd.charts import shortened
    from onnxslim_kd.profile import by_node, by_type

    profiles = [row.operators for row in case.rows]
    for title, changes in (
        ("operator", by_type(profiles)),
        ("node (largest first)", by_node(profiles)[:MOST_NODES]),
    ):
        table = _table(title, *(f"{shortened(row.model, 16)} ms" for row in case.rows))
        for change in changes:
            cells = zip(change.milliseconds, change.count, strict=True)
            table.add_row(change.name, *(f"{ms:.3f} ({n})" if n else "-" for ms, n in cells))
        console.print(table)
