"""onnxslim-kd sensitivity."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from onnxslim_kd.cli import options
from onnxslim_kd.cli.options import FILE
from onnxslim_kd.errors import UserError

if TYPE_CHECKING:
    from onnxslim_kd.sensitivity import Sensitivities

MOST_RATIOS = 5
"""Columns that fit beside a name."""


@click.command(options_metavar="[OPTIONS]", epilog="To join files: sensitivity merge A B -o C.")
@click.argument("models", nargs=-1, required=True, type=FILE, metavar="MODEL | merge FILES...")
@click.option("-o", "--output", required=True, type=FILE, help="The file to begin or go on with.")
@click.option("--pattern", default=".*", show_default=True, help="Which parameters.")
@click.option("--ratios", default="0.1,0.2,0.3,0.4,0.5,0.6,0.7,0.8,0.9", show_default=True,
              help="Shares that are silenced.")  # fmt: skip
@click.option("--criterion", default="l1", show_default=True, help="Which channels go first.")
@click.option("--data", help="As in train; without it the outputs' distance is measured.")
@options.preprocess
@click.option(
    "--metric",
    default="auto",
    show_default=True,
    help="auto, top1, miou, map, distance or module:function.",
)
@click.option("--samples", default=1024, show_default=True, help="At most this many; in memory.")
@click.option("--batch-size", type=click.IntRange(1), default=64, show_default=True,
              help="Samples at a time.")  # fmt: skip
@options.inputs
@options.provider
@options.threads
@click.option("--force", is_flag=True, help="With merge: replace the output if it exists.")
@options.as_json
def sensitivity(models: tuple[Path, ...], **given: Any) -> None:
    """Measure what MODEL loses when a share of each group's channels is silent."""
    from onnxslim_kd import sensitivity as measuring

    if models[0] == Path("merge"):
        if len(models) < 3:
            raise click.UsageError("sensitivity merge needs two files or more")
        from onnxslim_kd.model import write_text

        joined = measuring.merge(models[1:])
        write_text(given["output"], joined.text(), overwrite=given["force"])
        _print(joined, given)
        return
    if len(models) > 1:
        raise click.UsageError("give one model, or `merge` and files")
    _measure(models[0], given)


def _measure(model: Path, given: dict[str, Any]) -> None:
    from onnxslim_kd import api
    from onnxslim_kd import sensitivity as measuring
    from onnxslim_kd.measures import Measure
    from onnxslim_kd.passes.matching import match

    reading = api.Reading(inputs=options.shapes(given["inputs"]))
    analysis = api.inspect(model, reading)
    chosen = [p for p in match(analysis, given["pattern"]) if p.produces]
    names = ("data", "preprocess", "metric", "samples", "batch_size")
    measure = Measure(**{name: given[name] for name in names})
    job = measuring.Job(
        analysis,
        chosen,
        *measure.score(analysis),
        criterion=given["criterion"],
        ratios=_ratios(given),
        samples=measure.looked_at(analysis, given["criterion"]),
    )
    runtime = {"provider": given["provider"], "threads": given["threads"]}
    options.follow("measuring", measuring.run(job, given["output"], **runtime))
    _print(measuring.load(given["output"]), given)


def _print(found: "Sensitivities", given: dict[str, Any]) -> None:
    if given["as_json"]:
        click.echo(found.text(), nl=False)
        return
    curves = {name: dict(found.curve(name)) for name in found.losses}
    ratios = sorted({ratio for curve in curves.values() for ratio in curve})
    ratios = ratios[:: -(-len(ratios) // MOST_RATIOS)]
    rows = [
        (name, *(f"{curve[r]:+.1%}" if r in curve else "-" for r in ratios))
        for name, curve in curves.items()
    ]
    columns = ("parameter", *(f"{ratio:g}" for ratio in ratios))
    options.print_table(f"Loss of {found.measure}", columns, rows)
    click.echo(f"Wrote {given['output']}")


def _ratios(given: dict[str, Any]) -> tuple[float, ...]:
    try:
        return tuple(float(text) for text in given["ratios"].split(","))
    except ValueError:
        raise UserError(f"--ratios {given['ratios']!r}: expected a form such as 0.1,0.5") from None
