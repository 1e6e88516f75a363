"""onnxslim-kd convert-config."""

from pathlib import Path

import click

from onnxslim_kd.cli import options
from onnxslim_kd.cli.options import FILE


@click.command()
@click.argument("config", type=FILE)
@click.option("-o", "--output", type=FILE, required=True, help="The result.")
@options.force
@options.as_json
def convert_config(config: Path, output: Path, force: bool, as_json: bool) -> None:
    """Turn CONFIG, of PaddleSlim's Compressor or of PaddleClas, into one for `run`."""
    import yaml

    from onnxslim_kd.config_convert import convert
    from onnxslim_kd.model import check_writable, write_text

    check_writable(output, overwrite=force)
    found = convert(config)
    write_text(output, yaml.safe_dump(found.settings, sort_keys=False, width=100), overwrite=force)
    if as_json:
        options.print_json({"output": output, "notes": found.notes})
        return
    for note in found.notes:
        click.echo(click.wrap_text(f"- {note}", 80, subsequent_indent="  "))
    click.echo(f"Wrote {output}")
