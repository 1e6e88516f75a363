"""onnxslim-kd convert-config."""

from pathlib import Path

import click


@click.command()
@click.argument("config", type=click.Path(path_type=Path))
@click.option("-o", "--output", type=click.Path(path_type=Path), required=True, help="The result.")
@click.option("--force", is_flag=True, help="Replace the output if it exists.")
def convert_config(config: Path, output: Path, force: bool) -> None:
    """Turn CONFIG, of PaddleSlim's Compressor or of PaddleClas, into one for `run`."""
    import yaml

    from onnxslim_kd.config_convert import convert
    from onnxslim_kd.model import check_writable, write_text

    check_writable(output, overwrite=force)
    found = convert(config)
    write_text(output, yaml.safe_dump(found.settings, sort_keys=False, width=100), overwrite=force)
    for note in found.notes:
        click.echo(click.wrap_text(f"- {note}", 80, subsequent_indent="  "))
    click.echo(f"Wrote {output}")
