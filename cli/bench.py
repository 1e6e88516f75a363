"""onnxslim-kd bench."""

from pathlib import Path
from typing import TYPE_CHECKING

import click

from onnxslim_kd.cli import options

if TYPE_CHECKING:
    from onnxslim_kd.bench import Case, Report

FILE = click.Path(dir_okay=False, path_type=Path)
PRINTED = Path("-")
"""A file that is standard output."""
MOST_NODES = 10
"""Lines of the node-by-node comparison on the terminal; the files hold all."""


def _batches(_ctx: click.Context, _param: click.Parameter, text: str | None) -> list[int]:
    parts = [part.strip() for part in text.split(",")] if text else []
    if not all(part.isdigit() and int(part) > 0 for part in parts):
        raise click.BadParameter(f"{text!r} is no list of sizes like 1,8")
    return [int(part) for part in parts]


@click.command()
@click.argument("models", nargs=-1, required=True, type=options.FILE)
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
@options.provider
@options.threads
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
@click.option(
    "--json",
    "json_file",
    type=FILE,
    is_flag=False,
    flag_value="-",
    help="Write everything measured; without FILE, or with -, print it instead of tables.",
)
@click.option("--markdown", type=FILE, help="Write the tables for a pull request.")
@click.option("--html", type=FILE, help="Write a page with pictures.")
@options.untrusted
@click.option("--force", is_flag=True, help="Replace the outputs if they exist.")
def bench(
    models: tuple[Path, ...],
    shapes: tuple[str, ...],
    batches: list[int],
    inputs: Path | None,
    provider: str,
    threads: int,
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

    printed = json_file == PRINTED
    json_file = None if printed else json_file
    for output in filter(None, (json_file, markdown, html)):
        check_writable(output, overwrite=force)
    options.check_untrusted(untrusted, *models)
    found = measure(
        models,
        shapes=parse_shapes(shapes),
        batches=batches,
        inputs=read_inputs(inputs) if inputs else None,
        setting=Setting(provider, threads, rounds, seconds, profile),
    )
    if printed:
        click.echo(found.to_json())
    else:
        _print(found)
        if inputs is None and len(models) > 1:
            click.echo("Agreement is that on random inputs; give your own with --inputs.")
    for path, write in (
        (json_file, found.to_json),
        (markdown, lambda: render_markdown(from_bench(found))),
        (html, lambda: render(from_bench(found))),
    ):
        if path is not None:
            write_text(path, write(), overwrite=force)


def _print(report: "Report") -> None:
    threads = report.setting.threads
    click.echo(
        f"{report.ran_on}, {threads} thread{'s' * (threads != 1)}, {report.environment.cpu},"
        f" ONNX Runtime {_runtime_version(report)}"
    )
    _subjects(report)
    for case in report.cases:
        sizes = ", ".join(
            f"{n} {'x'.join(map(str, s)) or '(scalar)'}" for n, s in case.shapes.items()
        )
        _latencies(sizes, case)
        if not case.rows[0].difference.same:  # from itself: it gives no numbers
            options.tell(f"{case.rows[0].model}: {case.rows[0].difference}")
        for row in case.rows[1:]:
            options.tell(f"{row.model}: {row.verdict}")
        for note in case.notes:
            options.tell(f"Note: {note}")
        if report.setting.profile:
            _print_profile(case)


def _runtime_version(report: "Report") -> str:
    versions = report.environment.versions
    return versions.get("onnxruntime-gpu") or versions.get("onnxruntime", "")


def _subjects(report: "Report") -> None:
    rows = [(m.name, f"{m.parameters:,}", f"{m.bytes / 1e6:,.2f} MB") for m in report.models]
    options.print_table(None, ("model", "parameters", "size"), rows)


def _latencies(title: str, case: "Case") -> None:
    rows = []
    for index, row in enumerate(case.rows):
        times = (f"{ms:.3f}" for ms in (row.latency.median, row.latency.p90, row.latency.p99))
        rows.append((row.model, *times, str(row.ratio) if index else "1", f"{row.macs / 1e6:,.1f}"))
    columns = ("model", "median ms", "p90", "p99", "ratio [95 %]", "M MACs")
    options.print_table(title, columns, rows)


def _print_profile(case: "Case") -> None:
    from onnxslim_kd.charts import shortened
    from onnxslim_kd.profile import by_node, by_type

    profiles = [row.operators for row in case.rows]
    for title, changes in (
        ("operator", by_type(profiles)),
        ("node (largest first)", by_node(profiles)[:MOST_NODES]),
    ):
        rows = []
        for change in changes:
            cells = zip(change.milliseconds, change.count, strict=True)
            rows.append((change.name, *(f"{ms:.3f} ({n})" if n else "-" for ms, n in cells)))
        models = (f"{shortened(row.model, 16)} ms" for row in case.rows)
        options.print_table(None, (title, *models), rows)
