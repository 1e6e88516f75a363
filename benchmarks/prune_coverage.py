"""How much of real networks can be pruned: everything, at one half, every refusal named.

    python benchmarks/prune_coverage.py FOLDER [--oracle oracle.py] [--shape NAME=1x3x320x320]

For every .onnx file of FOLDER: the MACs left, what was left alone and why, the error of the proof,
and, with --oracle, what an independent checker says (a script that takes the original and the
pruned file and exits with 0 for PASS).
"""

import argparse
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

from common import Claim, write

from onnxslim_kd import api
from onnxslim_kd.errors import OnnxSlimError
from onnxslim_kd.passes.prune import Choice
from onnxslim_kd.passes.ratios import Amount

TARGET = 0.28
CHOICE = Choice(pattern=".*", ratio=0.5, amount=Amount(round_to=1))
VERDICTS = {0: "PASS", 1: "FAIL"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--oracle", type=Path, help="a script: ORIGINAL PRUNED [--shape N:1,3,9,9]")
    parser.add_argument("--shape", action="append", default=[], metavar="NAME=1x3x320x320")
    options = parser.parse_args()
    shapes = dict(shape.split("=") for shape in options.shape)
    rows = []
    for path in sorted(options.folder.glob("*.onnx")):
        rows.append(measure(path, options.oracle, shapes))
        print(rows[-1], flush=True)
    write(
        "prune_coverage",
        claims=claims(rows, oracle=options.oracle is not None),
        rows=rows,
        arguments=["FOLDER", *(["--oracle FILE"] if options.oracle else [])],
    )


def measure(path: Path, oracle: Path | None, shapes: dict[str, str]) -> dict[str, Any]:
    """Prune one file in every way there is, and say what stayed."""
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "pruned.onnx"
        try:
            done = api.prune(path, CHOICE, output)
        except OnnxSlimError as error:
            return {"model": path.stem, "error": str(error)}
        plan = done.plan
        assert done.proof is not None
        row = {
            "model": path.stem,
            "macs_before": plan.macs_before,
            "macs_left": plan.macs_after / plan.macs_before,
            "parameters_left": done.after.parameters / done.before.parameters,
            "refused": dict(Counter(refusal.reason for refusal in plan.refused)),
            "approximate": plan.approximate,
            "proof_error": done.proof.error,
        }
        if oracle is not None:
            row["oracle"] = verdict(oracle, path, output, inputs_of(done, shapes))
        return row


def inputs_of(done: api.Pruned, shapes: dict[str, str]) -> dict[str, str]:
    """The shapes given, for the inputs that this model has."""
    names = {value.name for value in done.model.graph.inputs}
    return {name: shape for name, shape in shapes.items() if name in names}


def verdict(oracle: Path, original: Path, pruned: Path, shapes: dict[str, str]) -> str:
    command = [sys.executable, str(oracle), str(original), str(pruned), "--seeds", "1"]
    for name, shape in shapes.items():
        command += ["--shape", f"{name}:{shape.replace('x', ',')}"]
    code = subprocess.run(command, check=False, capture_output=True).returncode
    return VERDICTS.get(code, "cannot decide")


def claims(rows: list[dict[str, Any]], *, oracle: bool) -> list[Claim]:
    done = [row for row in rows if "macs_left" in row]
    left = sorted(row["macs_left"] for row in done)
    found = [
        Claim(
            f"MACs left when half of everything is asked for, over {len(rows)} real networks",
            f"<= {TARGET} on each",
            f"{left[0]:.4f} to {left[-1]:.4f}",
            met=len(done) == len(rows) and left[-1] <= TARGET,
        )
    ]
    if oracle:
        passed = sum(row.get("oracle") == "PASS" for row in rows)
        found.append(
            Claim(
                "pruned networks that an independent checker proves exact",
                f"{len(rows)} of {len(rows)}",
                f"{passed} of {len(rows)}",
                met=passed == len(rows),
            )
        )
    return found


if __name__ == "__main__":
    main()
