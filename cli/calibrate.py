"""``onnxslim-kd calibrate``: BatchNormalization statistics from unlabelled data, no training."""

from pathlib import Path

import click

from onnxslim_kd.cli import options
from onnxslim_kd.cli.options import FILE


@click.command()
@click.argument("model", type=FILE)
@click.option("-o", "--output", type=FILE, required=True, help="The result.")
@click.option("--data", required=True, help="As in train; labels are not read.")
@options.preprocess
@click.option("--like", type=FILE, help="The model before pruning; needed where BN was folded.")
@click.option("--plan", type=FILE, help="The pruning plan that leads from --like to MODEL.")
@click.option(
    "--batches", type=click.IntRange(1), default=8, show_default=True, help="To measure on."
)
@click.option("--batch-size", type=click.IntRange(1), default=64, show_default=True,
              help="Samples in each.")  # fmt: skip
@options.force
@options.as_json
def calibrate(
    model: Path,
    output: Path,
    data: str,
    preprocess: str,
    like: Path | None,
    plan: Path | None,
    batches: int,
    batch_size: int,
    force: bool,
    as_json: bool,
) -> None:
    """Re-estimate the statistics of MODEL (of a merged one, its student), as after pruning."""
    from onnxslim_kd import model as model_io
    from onnxslim_kd.training import bn

    model_io.check_writable(output, overwrite=force)
    loaded = model_io.load(model)
    some = bn.some_batches(loaded, data, preprocess=preprocess, batches=batches, size=batch_size)
    done = bn.calibrate(loaded, some, like, plan)
    model_io.save(loaded, output, overwrite=force)
    samples = sum(map(len, some))
    if as_json:
        options.print_json({**done, "samples": samples, "output": output})
        return
    click.echo(
        f"{done['reestimated']} BatchNormalization re-estimated, {done['corrected']} convolutions"
        f" corrected on {samples} samples"
    )
    click.echo(f"Wrote {output}")
