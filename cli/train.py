"""``onnxslim-kd train``: fine-tune and distil."""

import json
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from onnxslim_kd.cli import options
from onnxslim_kd.cli.options import FILE

SHOWN = 8
"""Names listed before "and N more"."""
NO_TERMS = {"event", "epoch", "step", "steps", "loss", "lr", "samples_per_second"}
"""What a step's event holds besides the terms of the loss."""


@click.command()
@click.argument("model", type=FILE)
@click.option("-o", "--output", type=FILE, required=True, help="Where the trained model goes.")
@click.option("--config", type=FILE, help="YAML with the settings below, and all others.")
@click.option("--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Any setting.")
@click.option("--data", help="digits, npz:F, idx:DIR, folder:DIR, imagelist:F, coco:F, module:fn."
              " [default: digits]")  # fmt: skip
@click.option("--val-data", help="What is evaluated on after every epoch.")
@click.option("--preprocess", help="Steps, as in random-crop=224,flip,normalize=imagenet.")
@click.option("--epochs", type=int, help="How often all data is seen. [default: 10]")
@click.option("--batch-size", type=int, help="Samples, over all processes. [default: 64]")
@click.option("--lr", "optimizer__lr", type=float, help="Learning rate. [default: 0.01]")
@click.option("--optimizer", "optimizer__name", type=click.Choice(["sgd", "adam", "adamw"]),
              help="sgd has a momentum of 0.9. [default: sgd]")  # fmt: skip
@click.option("--weight-decay", "optimizer__weight_decay", type=float,
              help="Pull towards zero; spares norms and biases. [default: 0.0001]")  # fmt: skip
@click.option(
    "--schedule",
    "schedule__kind",
    help="constant, piecewise, cosine, linear or poly. [default: cosine]",
)
@click.option("--warmup", "schedule__warmup", type=float,
              help="Epochs of rising learning rate. [default: 0]")  # fmt: skip
@click.option("--train", multiple=True, metavar="RE", help="Parameters to train as well.")
@click.option("--freeze", multiple=True, metavar="RE", help="Parameters to leave as they are.")
@click.option(
    "--bn",
    type=click.Choice(["auto", "keep", "reinsert", "none", "frozen"]),
    help="auto re-inserts BatchNormalization where it was folded away. [default: auto]",
)
@click.option(
    "--like",
    type=FILE,
    help="The original of a pruned model: what its channels were re-inserted BN starts with.",
)
@click.option("--plan", type=FILE, help="The pruning plan that leads from --like to MODEL.")
@click.option("--init-from", type=FILE, help="Take weights of the same name and shape from here.")
@click.option(
    "--init-shapes/--no-init-shapes",
    default=None,
    help="Take its shapes as well: a pruned file makes MODEL as narrow as it is.",
)
@click.option("--metric", help="auto, top1, miou, map, loss or module:function. [default: auto]")
@click.option("--checkpoint", type=FILE, help="Folder; resumes from it.")
@click.option("--checkpoint-steps", type=int, help="Also inside an epoch, every so many steps.")
@click.option(
    "--save-eval-model/--no-save-eval-model",
    default=None,
    help="The student, beside every checkpoint. [default: save-eval-model]",
)
@click.option("--max-bad", type=int, help="Unreadable samples that are left out. [default: 0]")
@click.option("--workers", type=int, help="Processes that decode images. [default: 0]")
@click.option("--seed", type=int, help="Of order, augmentation, masks and dropout. [default: 0]")
@click.option(
    "--device",
    type=click.Choice(["auto", "cpu", "cuda"]),
    help="auto: CUDA where it is. [default: auto]",
)
@click.option("--threads", type=int, help="Of this process; by default what torch chooses.")
@click.option(
    "--amp", type=click.Choice(["none", "bf16", "fp16"]), help="Mixed precision. [default: none]"
)
@click.option("--compile/--no-compile", default=None, help="torch.compile the graph.")
@click.option("--sync-bn/--no-sync-bn", default=None, help="Statistics over all processes.")
@click.option("--ema", type=float, help="Decay of a moving average of the weights, as in 0.999.")
@click.option("--accumulate", type=int, help="Pieces in which a batch is computed. [default: 1]")
@click.option("--clip-norm", type=float, help="Largest L2 norm of the gradient.")
@click.option("--mutual/--no-mutual", default=None, help="The teacher trains as well.")
@click.option(
    "--teacher-runtime",
    type=click.Choice(["auto", "ort", "torch"]),
    help="auto is ONNX Runtime on the CPU and torch on CUDA. [default: auto]",
)
@click.option(
    "--cache-teacher/--no-cache-teacher",
    default=None,
    help="Keep what the teacher gives on disk; for data without chance.",
)
@click.option("--prune-schedule", metavar="RE=RATIO@EPOCHS",
              help="Cuts after so many epochs, as in conv.*=0.5@0,2,4.")  # fmt: skip
@click.option("--log", type=FILE, help="A file of JSON lines.")
@click.option("--tensorboard", type=FILE, help="Folder; needs the extra of that name.")
@options.force
@click.option("--json", "as_json", is_flag=True, help="Events as JSON lines on the terminal.")
def train(
    model: Path,
    output: Path,
    config: Path | None,
    overrides: tuple[str, ...],
    prune_schedule: str | None,
    force: bool,
    as_json: bool,
    **settings: Any,
) -> None:
    """Fine-tune or distil MODEL, plain or merged; the names stay, the weights get better."""
    from onnxslim_kd import model as model_io
    from onnxslim_kd.training import config as configs
    from onnxslim_kd.training.engine import train as run
    from onnxslim_kd.training.journal import journal

    held = configs.read(config, overrides)
    for key, value in settings.items():
        if value not in (None, ()):
            configs.put(
                held, key.replace("__", "."), list(value) if isinstance(value, tuple) else value
            )
    if prune_schedule is not None:
        from onnxslim_kd.training import shrink

        held["cuts"] = shrink.parse(prune_schedule)
    chosen = configs.parse(held)
    model_io.check_writable(output, overwrite=force)
    loaded = model_io.load(model)
    with (
        _terminal(chosen.epochs, as_json=as_json) as terminal,
        journal(terminal, chosen.log, chosen.tensorboard) as listen,
    ):
        outcome = run(loaded, chosen, listen)
    if not outcome.finished:
        hint = "run the same command again to go on" if chosen.checkpoint else "nothing is kept"
        click.echo(f"Stopped before the end; {hint}.", err=True)
        sys.exit(130)
    if outcome.leads:
        model_io.save(outcome.model, output, overwrite=force)
        click.echo(f"Wrote {output}", err=as_json)


@contextmanager
def _terminal(epochs: int, *, as_json: bool) -> Iterator[Any]:
    """Give a listener: JSON lines, a progress bar on a terminal, or plain lines."""
    console = Console()
    if as_json:
        yield lambda event: click.echo(json.dumps(event)) if event["event"] != "tick" else None
        return
    if not console.is_terminal:
        yield _print
        return
    columns = ("[progress.description]{task.description}", "{task.fields[loss]}")
    with Progress(
        TextColumn(columns[0]),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn(columns[1]),
        console=console,
        transient=True,
    ) as progress:
        task = progress.add_task("epoch", total=None, loss="")

        def listen(event: Mapping[str, Any]) -> None:
            if event["event"] in ("tick", "step"):
                done = event["epoch"] * event["steps"] + event["step"]
                progress.update(task, completed=done, total=epochs * event["steps"])
            if event["event"] == "step":
                loss = f"{_losses(event)}, {event['samples_per_second']:.0f}/s"
                where = f"epoch {event['epoch'] + 1}/{epochs}"
                progress.update(task, loss=loss, description=where)
                return
            for line in describe(event):
                progress.console.print(line, highlight=False)

        yield listen


def _print(event: Mapping[str, Any]) -> None:
    for line in describe(event):
        click.echo(line)


def describe(event: Mapping[str, Any]) -> list[str]:
    """Return an event as lines for people."""
    kind = event["event"]
    if kind == "start":
        lines = [f"trains {len(event['trained'])} tensors, {event['numbers']:,} numbers"]
        lines += _listed("frozen", event["frozen"])
        lines += _listed("not on the way to the loss", event["unused"])
        if event["teacher"]:
            lines.append(f"teacher runs in {event['teacher']}")
        return lines
    if kind == "prepared":
        return list(event["notes"])
    if kind == "unreached":
        return _listed("gets no gradient", event["names"])
    if kind == "init":
        lines = [f"init-from: {event['loaded']} tensors"]
        lines += _listed("other shape, kept", event["other_shape"])
        return lines + _listed("not in that file, kept", event["missing"])
    if kind == "bn":
        done = _listed("BatchNormalization re-inserted behind", event["reinserted"])
        return done or ["BatchNormalization re-inserted nowhere: no convolution lost it"]
    if kind == "resume":
        inside = f", step {event['step']}" if event["step"] else ""
        return [f"resumes after epoch {event['epoch']}{inside}"]
    if kind == "step":
        return [_step(event)]
    if kind == "epoch":
        return [_epoch(event)]
    return []


def _listed(what: str, names: Any) -> list[str]:
    if not names:
        return []
    shown = ", ".join(list(names)[:SHOWN])
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return [f"{what} ({len(names)}): {shown}{more}"]


def _losses(event: Mapping[str, Any]) -> str:
    """The loss and its terms, where there are several."""
    terms = {name: value for name, value in event.items() if name not in NO_TERMS}
    shown = {"loss": event["loss"], **(terms if len(terms) > 1 else {})}
    return ", ".join(f"{name} {value:.4g}" for name, value in shown.items())


def _step(event: Mapping[str, Any]) -> str:
    """A step inside an epoch; people count epochs from one."""
    where = f"epoch {event['epoch'] + 1} step {event['step']}/{event['steps']}"
    speed = f"{event['samples_per_second']:.0f} samples/s"
    return f"{where}: {_losses(event)}, lr {event['lr']:.4g}, {speed}"


def _epoch(event: Mapping[str, Any]) -> str:
    """The end of an epoch, with what was evaluated."""
    found = {k: v for k, v in event.items() if k not in ("event", "epoch", "seconds")}
    numbers = [f"{name} {value:.5g}" for name, value in found.items()]
    return f"epoch {event['epoch']}: " + ", ".join([*numbers, f"{event['seconds']:.1f} s"])
