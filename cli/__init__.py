"""The command line: one file per command; parse, one library call, print."""

import importlib
import io
import logging
import sys
from collections.abc import Sequence
from importlib.metadata import version
from typing import Any

import click

from onnxslim_kd.errors import OnnxSlimError

# name -> what `onnxslim-kd --help` says of it; the module is onnxslim_kd.cli.<name with _>, and
# it is imported only when its command runs, for onnxruntime and torch take seconds.
COMMANDS = {
    "export": "Write an architecture, or your torch module, as ONNX with live BatchNormalization.",
    "inspect": "List parameters, groups, shapes and costs of a model.",
    "prune": "Remove whole channels of chosen parameters, with proof.",
    "sensitivity": "Measure what each group of channels is worth.",
    "search": "Search for the ratios that cost least under a budget.",
    "bench": "Measure models against each other on ONNX Runtime.",
    "merge": "Join student, teachers and distillation losses in one ONNX graph, with proof.",
    "draw": "Draw a graph, folded by module.",
    "train": "Fine-tune or distil a model, plain or merged.",
    "infer-prune": "Reduce a model to what inference needs, with proof.",
    "calibrate": "Re-estimate BatchNormalization statistics from unlabelled data.",
    "eval": "Measure a model on labelled data.",
    "infer": "Classify images.",
    "run": "Carry out a whole run from one YAML file: stages, artefacts, report.",
    "convert-config": "Turn a YAML of the tutorials into one for run.",
}


class Lazy(click.Group):
    """A group that imports a command when it is asked for."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Return the names in the order of the table."""
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Import and return the command, or None for an unknown name."""
        if cmd_name not in COMMANDS:
            return None
        name = cmd_name.replace("-", "_")
        command = getattr(importlib.import_module(f"onnxslim_kd.cli.{name}"), name)
        assert isinstance(command, click.Command)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """List the commands without importing any."""
        with formatter.section("Commands"):
            formatter.write_dl(list(COMMANDS.items()))

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command; an error made on purpose, or by the machine, ends in one sentence."""
        for stream in (sys.stdout, sys.stderr):
            if isinstance(stream, io.TextIOWrapper):  # a name that a terminal cannot show
                stream.reconfigure(errors="backslashreplace")
        logging.getLogger("onnx_ir").setLevel(logging.ERROR)  # it warns of what is refused
        try:
            return super().invoke(ctx)
        except (OnnxSlimError, OSError, MemoryError) as error:
            if ctx.params.get("debug") or isinstance(error, BrokenPipeError):
                raise
            click.echo(f"Error: {str(error) or 'not enough memory'}", err=True)
            ctx.exit(error.exit_code if isinstance(error, OnnxSlimError) else 1)


@click.group(cls=Lazy, context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--debug", is_flag=True, help="Show the traceback of an error.")
@click.version_option(version("onnxslim-kd"), prog_name="onnxslim-kd")
def main(debug: bool) -> None:
    """Make an ONNX model smaller and faster without its source code: ONNX in, ONNX out."""


def run(arguments: Sequence[str]) -> None:
    """Run the command line with ``arguments``, for examples and tests."""
    main.main(args=list(arguments), prog_name="onnxslim-kd", standalone_mode=False)


if __name__ == "__main__":
    sys.exit(main())
