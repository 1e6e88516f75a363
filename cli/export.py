"""onnxslim-kd export."""

import ast
from pathlib import Path

import click

from onnxslim_kd.cli import options
from onnxslim_kd.cli.options import FILE


@click.command()
@click.argument("spec", required=False)
@click.option("-o", "--output", type=FILE, help="Where to write the model.")
@click.option("--list", "list_", is_flag=True, help="List the architectures of the zoo.")
@click.option(
    "--input",
    "inputs",
    multiple=True,
    metavar="NAME=SHAPE",
    help="An input, such as image=1x3x224x224 or ids=1x77:int64; repeatable. The first axis"
    " becomes dynamic; 1?x3x224?x224? marks others, 1!x3x224x224 keeps all fixed.",
)
@click.option(
    "--arg",
    "arguments",
    multiple=True,
    metavar="NAME=VALUE",
    help="An argument of the builder, such as classes=10; repeatable.",
)
@click.option("--weights", type=FILE, help="A .safetensors, .npz or .pt.")
@click.option("--opset", default=17, show_default=True, help="17 to 20.")
@click.option("--seed", default=0, show_default=True, help="For the initial weights.")
@options.force
@options.as_json
def export(
    spec: str | None,
    output: Path | None,
    list_: bool,
    inputs: tuple[str, ...],
    arguments: tuple[str, ...],
    weights: Path | None,
    opset: int,
    seed: int,
    force: bool,
    as_json: bool,
) -> None:
    """Export SPEC, a zoo name or package.module:function, to ONNX.

    BatchNormalization stays live and parameters keep their names, so that the model can be pruned
    by name and trained. The outputs in ONNX Runtime are compared with torch's.
    """
    if list_:
        _list_zoo(as_json=as_json)
        return
    if spec is None or output is None:
        raise click.UsageError("give SPEC and -o FILE, or --list")
    from onnxslim_kd import model as model_io

    model_io.check_writable(output, overwrite=force)
    from onnxslim_kd.zoo.export import export
    from onnxslim_kd.zoo.inputs import Input

    wanted = {name: Input.parse(text) for name, text in map(_pair, inputs)}
    model = export(
        spec,
        inputs=wanted,
        weights=weights,
        arguments={name: _literal(text) for name, text in map(_pair, arguments)},
        opset=opset,
        seed=seed,
    )
    model_io.save(model, output, overwrite=force)
    if as_json:
        options.print_json({"output": output, "nodes": len(model.graph), "opset": opset})
        return
    click.echo(f"{len(model.graph)} nodes, opset {opset}; outputs equal to torch's")
    click.echo(f"Wrote {output}")


def _list_zoo(*, as_json: bool) -> None:
    from onnxslim_kd.zoo import ZOO

    rows = [(name, "x".join(map(str, entry.shape)), entry.about) for name, entry in ZOO.items()]
    if as_json:
        options.print_json({name: {"image": shape, "what": what} for name, shape, what in rows})
        return
    options.print_table(None, ("name", "input image", "what"), rows)


def _pair(text: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not (name and equals and value):
        raise click.UsageError(f"{text!r} is not of the form NAME=VALUE")
    return name, value


def _literal(text: str) -> object:
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text
