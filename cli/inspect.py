"""onnxslim-kd inspect."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from onnxslim_kd.cli import options
from onnxslim_kd.cli.options import FILE

if TYPE_CHECKING:
    from onnxslim_kd.passes.groups import Analysis, Parameter
    from onnxslim_kd.values import Row


@click.command()
@click.argument("models", nargs=-1, required=True, type=FILE)
@click.option("--pattern", help="Only parameters, nodes or modules that match.")
@click.option("--explain", metavar="PARAM", help="One parameter's group, or what pins it.")
@click.option("--values", is_flag=True, help="List values with shapes; two models side by side.")
@click.option("--all", "everything", is_flag=True, help="Biases and norms, too.")
@click.option(
    "--attention",
    type=click.Choice(["auto", "heads", "dims"]),
    default="auto",
    show_default=True,
    help="What attention loses: whole heads, dimensions of all heads, or what can go.",
)
@click.option("--free-output", multiple=True, help="An output that may lose channels; repeatable.")
@options.inputs
@options.untrusted
@options.as_json
def inspect(models: tuple[Path, ...], **given: Any) -> None:
    """List what MODEL holds and which of its channels can go."""
    if len(models) > (2 if given["values"] else 1):
        raise click.UsageError("give one model, or two with --values")
    options.check_untrusted(given["untrusted"], *models)
    if given["values"]:
        _values(models, as_json=given["as_json"])
        return
    from onnxslim_kd import api

    reading = api.Reading(
        attention=given["attention"],
        free_outputs=given["free_output"],
        inputs=options.shapes(given["inputs"]),
    )
    analysis = api.inspect(models[0], reading)
    if given["explain"] is not None:
        _explain(analysis, given["explain"], as_json=given["as_json"])
    else:
        _parameters(analysis, given)


def _parameters(analysis: "Analysis", given: dict[str, Any]) -> None:
    from onnxslim_kd import cost as costs
    from onnxslim_kd.passes import heads
    from onnxslim_kd.passes.matching import match

    chosen = match(analysis, given["pattern"]) if given["pattern"] else analysis.parameters
    shown = [p for p in chosen if p.produces or given["everything"] or given["as_json"]]
    cost = costs.cost(analysis.model, analysis.shapes)
    total = {"macs": cost.macs, "parameters": cost.parameters, "bytes": cost.bytes}
    rows = [_row(analysis, p) for p in shown]
    if given["as_json"]:
        options.print_json({"inputs": analysis.shapes.inputs, **total, "list": rows})
        return
    numbers = {name: i for i, name in enumerate(dict.fromkeys(r["group"] for r in rows))}
    options.print_table(
        f"{len(rows)} of {len(analysis.parameters)} parameters",
        ("parameter", "shape", "axis", "group", "prunable"),
        [
            (
                r["parameter"],
                "x".join(map(str, r["shape"])),
                r["axis"],
                numbers[r["group"]],
                r["refused"] or f"{r['units']} units",
            )
            for r in rows
        ],
    )
    click.echo("Inputs: " + ", ".join(f"{n} {list(s)}" for n, s in analysis.shapes.inputs.items()))
    click.echo("  ".join(f"{name}: {options.count(number)}" for name, number in total.items()))
    for note in (*analysis.notes, *heads.notes(analysis.by_dims)):
        click.echo(f"Note: {note}.")
    if not analysis.parameters:
        click.echo("No parameter is read by an operator that has a rule: nothing can be pruned.")


def _row(analysis: "Analysis", parameter: "Parameter") -> dict[str, Any]:
    import numpy as np

    labels = np.unique(analysis.labels(parameter.birth))
    index = next(i for i, p in enumerate(analysis.parameters) if p is parameter)
    return {
        "parameter": parameter.name,
        "node": parameter.node.name,
        "shape": list(analysis.shapes.shape[parameter.birth.value]),
        "axis": parameter.axis,
        "group": analysis.group_of[index],
        "units": len(labels),
        "output": parameter.produces,
        "refused": analysis.refusal(parameter),
    }


def _explain(analysis: "Analysis", name: str, *, as_json: bool) -> None:
    from onnxslim_kd.passes.explain import explain

    story = explain(analysis, name)
    if as_json:
        options.print_json(story.model_dump())
        return
    click.echo(story.headline)
    if story.chain:
        click.echo("  through " + " -> ".join(story.chain))
    if story.members:
        options.print_table(
            "Cut together",
            ("parameter", "axis", "channels", "node"),
            [(m.parameter, m.axis, m.channels, m.node) for m in story.members],
        )


def _values(models: tuple[Path, ...], *, as_json: bool) -> None:
    from onnxslim_kd import values

    if len(models) == 2:
        pairs: list[tuple[Any, ...]] = list(values.side_by_side(*models))
    else:
        from onnxslim_kd.model import load

        pairs = [(row,) for row in values.listing(load(models[0]))]
    rows = [tuple(cell for row in pair for cell in _cells(row)) for pair in pairs]
    if as_json:
        options.print_json({"values": rows})
        return
    columns = [title for m in models for title in (m.name, "type")]
    widths = [max(map(len, column)) for column in zip(columns, *rows, strict=True)]
    if len(models) == 1 or sum(widths) + 2 * len(widths) <= options.console().width:
        options.print_table("Values", columns, rows)
    else:
        _print_below(columns, rows, max(widths[0], widths[2]))


def _print_below(columns: Sequence[str], rows: Iterable[Sequence[str]], width: int) -> None:
    """Two models where they do not fit side by side: names are there to be copied, not folded."""
    click.echo(f"{columns[0]}, and below each value the one of {columns[2]}")
    for ours, our_type, theirs, their_type in rows:
        click.echo(f"{ours or '-':{width}}    {our_type}")
        click.echo(f"  {theirs or '-':{width}}  {their_type}")


def _cells(row: "Row | None") -> tuple[str, str]:
    return (row.name, row.type) if row is not None else ("", "")
