"""``onnxslim-kd eval``: measure any ONNX model on labelled data."""

import json
from pathlib import Path

import click

from onnxslim_kd.cli import options
from onnxslim_kd.cli.options import FILE


@click.command("eval")
@click.argument("model", type=FILE)
@click.option("--data", default="digits?split=test", show_default=True, help="As in train.")
@options.preprocess
@click.option(
    "--metric", default="auto", show_default=True, help="auto, top1, miou, map or module:function."
)
@click.option("--batch-size", type=click.IntRange(1), default=64, show_default=True,
              help="Samples at a time.")  # fmt: skip
@click.option("--workers", type=click.IntRange(0), default=0, show_default=True,
              help="Processes that decode images.")  # fmt: skip
@click.option("--max-bad", type=click.IntRange(0), default=0, show_default=True,
              help="Unreadable samples that are left out.")  # fmt: skip
@options.provider
@options.threads
@options.as_json
def eval(
    model: Path,
    data: str,
    preprocess: str,
    metric: str,
    batch_size: int,
    workers: int,
    max_bad: int,
    provider: str,
    threads: int,
    as_json: bool,
) -> None:
    """Measure MODEL on ONNX Runtime; of a merged model, the student."""
    from onnxslim_kd import model as model_io
    from onnxslim_kd.training.evaluate import Predictor, Reading, evaluate

    predictor = Predictor(model_io.load(model), provider=provider, threads=threads)
    reading = Reading(data, preprocess, batch_size, workers, max_bad)
    found = evaluate(predictor, reading, metric)
    if as_json:
        click.echo(json.dumps({**found.metrics, "samples": found.samples, "bad": found.bad}))
        return
    numbers = ", ".join(f"{name} {value:.3f}" for name, value in found.metrics.items())
    left_out = f", {found.bad} unreadable" if found.bad else ""
    speed = found.samples / found.seconds
    click.echo(f"{numbers}  ({found.samples} samples{left_out}, {speed:.0f}/s)")
