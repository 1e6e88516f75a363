"""onnxslim-kd infer-prune: the model as it ships."""

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from onnxslim_kd.cli import options
from onnxslim_kd.cli.options import FILE
from onnxslim_kd.errors import UserError

if TYPE_CHECKING:
    from onnxslim_kd.passes.strip import Stripped


@click.command(epilog="Example: onnxslim-kd infer-prune merged.onnx -o student.onnx")
@click.argument("model", type=FILE)
@click.option("-o", "--output", type=FILE, required=True, help="The result.")
@click.option(
    "--keep", default="student", show_default=True, metavar="ROLE",
    help="Of a merged model: student, teacher, or the name of one teacher.",
)  # fmt: skip
@click.option("--outputs", metavar="A,B", help="Make these values the outputs instead.")
@click.option("--softmax", is_flag=True, help="Append a softmax over the classes.")
@click.option("--sigmoid", is_flag=True, help="Append a sigmoid.")
@click.option("--fp16", is_flag=True, help="Half precision inside; inputs and outputs stay.")
@click.option(
    "--format", "form", type=click.Choice(["onnx", "ort"]), default="onnx", show_default=True,
    help="ort also writes ONNX Runtime's mobile format beside the result.",
)  # fmt: skip
@options.inputs
@click.option("--verify/--no-verify", default=True, show_default=True, help="Prove the result.")
@options.force
@options.untrusted
@options.as_json
def infer_prune(model: Path, **given: Any) -> None:
    """Reduce MODEL to what inference needs: no teacher, no losses, no dead or doubled work.

    Works on any ONNX file. Every step is kept only if the outputs stay the same.
    """
    from onnxslim_kd.passes.half import to_half
    from onnxslim_kd.passes.strip import infer_prune as strip
    from onnxslim_kd.runtime import write_ort

    output: Path = given["output"]
    _check_options(output, given)
    options.check_untrusted(given["untrusted"], model)
    shapes = options.shapes(given["inputs"])
    stripped = strip(
        model,
        keep=given["keep"],
        outputs=[name.strip() for name in (given["outputs"] or "").split(",") if name.strip()],
        activation=_activation(given),
        shapes=shapes,
        verify=given["verify"],
    )
    result, half = stripped.model, None
    if given["fp16"]:
        result, half = to_half(result, shapes)
    from onnxslim_kd.model import save, write_file

    save(result, output, overwrite=given["force"])
    if given["form"] == "ort":
        write_file(
            output.with_suffix(".ort"),
            lambda path: write_ort(result, path),
            overwrite=given["force"],
        )
    _report(stripped, half, given)


def _check_options(output: Path, given: dict[str, Any]) -> None:
    """Refuse what cannot work before any work is done."""
    from onnxslim_kd.model import check_writable

    if given["softmax"] and given["sigmoid"]:
        raise UserError("give either --softmax or --sigmoid, not both")
    if output.suffix == ".ort":
        raise UserError(f"-o {output}: name the .onnx file; --format ort writes the .ort beside it")
    check_writable(output, overwrite=given["force"])
    if given["form"] == "ort":
        check_writable(output.with_suffix(".ort"), overwrite=given["force"])


def _activation(given: dict[str, Any]) -> Any:
    return "softmax" if given["softmax"] else "sigmoid" if given["sigmoid"] else None


def _report(stripped: "Stripped", half: float | None, given: dict[str, Any]) -> None:
    if given["as_json"]:
        options.print_json(_as_json(stripped, half))
        return
    before, after = (sum(pair[i] for pair in stripped.counts.values()) for i in (0, 1))
    rows: list[tuple[object, ...]] = [
        (name, old, new) for name, (old, new) in stripped.counts.items() if old != new
    ]
    rows.append(("all operators", before, after))
    rows.append(("bytes of weights", *(f"{number:,}" for number in stripped.bytes)))
    options.print_table("What infer-prune removed and folded", ("", "before", "after"), rows)
    steps = ", ".join(f"{name} {count}" for name, count in stripped.removed.items() if count)
    options.tell(f"Nodes less by step: {steps or 'none'}")
    for note in stripped.notes:
        options.tell(f"Note: {note}")
    click.echo(_proof_text(stripped))
    if half is not None:
        click.echo(f"Half precision: outputs differ by {half:.1e} of their magnitude at most")
    output: Path = given["output"]
    beside = f" and {output.with_suffix('.ort')}" if given["form"] == "ort" else ""
    click.echo(f"Wrote {output}{beside}")


def _proof_text(stripped: "Stripped") -> str:
    proof = stripped.proof
    if proof is None:
        return "Proof: full checker; the outputs were not compared"
    equal = "equal" if not proof.worst else f"within {proof.worst:.1e}"
    lines = [f"Proof: full checker; outputs {equal} on {_inputs(len(proof.shapes))}"]
    for shapes in proof.shapes:
        texts = (f"{name} {'x'.join(map(str, s)) or 'scalar'}" for name, s in shapes.items())
        lines.append(f"  {', '.join(texts)}")
    if proof.same_decisions:
        lines.append("  both given the original's decisions (TopK, comparisons), scores compared")
    return "\n".join(lines)


def _inputs(count: int) -> str:
    return "1 input" if count == 1 else f"{count} inputs"


def _as_json(stripped: "Stripped", half: float | None) -> dict[str, Any]:
    proof = stripped.proof
    return {
        "counts": stripped.counts,
        "bytes": stripped.bytes,
        "removed": stripped.removed,
        "notes": stripped.notes,
        "proof": None if proof is None else asdict(proof),
        "half": half,
    }
