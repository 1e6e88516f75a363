"""``onnxslim-kd infer``: what is on these images?"""

import json
from pathlib import Path

import click

from onnxslim_kd.cli import options
from onnxslim_kd.cli.options import FILE


@click.command()
@click.argument("model", type=FILE)
@click.argument("images", type=FILE, nargs=-1, required=True)
@click.option("--topk", type=click.IntRange(1), default=5, show_default=True,
              help="Classes for each image.")  # fmt: skip
@click.option("--labels", type=FILE, help="A text file with one class name per line.")
@options.preprocess
@click.option("--batch-size", type=click.IntRange(1), default=16, show_default=True,
              help="Images at a time.")  # fmt: skip
@options.provider
@options.threads
@options.as_json
def infer(
    model: Path,
    images: tuple[Path, ...],
    topk: int,
    labels: Path | None,
    preprocess: str,
    batch_size: int,
    provider: str,
    threads: int,
    as_json: bool,
) -> None:
    """Classify IMAGES with MODEL on ONNX Runtime."""
    from onnxslim_kd import model as model_io
    from onnxslim_kd.errors import UserError
    from onnxslim_kd.training.evaluate import Predictor, Reading
    from onnxslim_kd.training.evaluate import infer as run

    try:
        names = labels.read_text("utf-8").splitlines() if labels else None
    except (OSError, UnicodeDecodeError) as error:
        why = getattr(error, "strerror", None) or error
        raise UserError(f"{labels}: cannot be read: {why}") from error
    predictor = Predictor(model_io.load(model), provider=provider, threads=threads)
    reading = Reading(preprocess=preprocess, batch_size=batch_size)
    rows: list[tuple[str, str, str]] = []
    for guess in run(predictor, list(images), reading, topk=topk, names=names):
        if as_json:
            best = zip(guess.classes, guess.names, guess.scores, strict=True)
            found = [{"class": c, "name": n, "probability": p} for c, n, p in best]
            click.echo(json.dumps({"image": str(guess.file), "classes": found}))
        for row, (name, score) in enumerate(zip(guess.names, guess.scores, strict=True)):
            rows.append(("" if row else str(guess.file), name, f"{score:.4f}"))
    if not as_json:
        options.print_table(None, ("image", "class", "probability"), rows)
