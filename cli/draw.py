"""onnxslim-kd draw: a picture of a graph."""

from pathlib import Path

import click

from onnxslim_kd.cli import options
from onnxslim_kd.cli.options import FILE


@click.command()
@click.argument("model", type=FILE)
@click.option("-o", "--output", type=FILE, required=True, help="The SVG.")
@click.option("--most", type=click.IntRange(3), default=24, show_default=True,
              help="Boxes for each network; more show finer modules.")  # fmt: skip
@options.force
def draw(model: Path, output: Path, most: int, force: bool) -> None:
    """Draw MODEL, merged or plain, folded by module, as an SVG picture."""
    from onnxslim_kd.draw import draw as picture
    from onnxslim_kd.model import check_writable, write_text

    check_writable(output, overwrite=force)
    write_text(output, picture(model, most=most), overwrite=force)
    click.echo(f"Wrote {output}")
