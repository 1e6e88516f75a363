"""onnxslim-kd merge: student, teachers and losses in one ONNX file."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from onnxslim_kd.cli import options
from onnxslim_kd.cli.options import FILE
from onnxslim_kd.errors import UserError

if TYPE_CHECKING:
    import onnx_ir as ir

    from onnxslim_kd.passes.suggest import Suggestion
    from onnxslim_kd.roles import Term
    from onnxslim_kd.verify_merge import Proof


@click.command(
    epilog="Example: onnxslim-kd merge student.onnx --teacher teacher.onnx"
    " --loss l2:fc_0.tmp_1=fc_0.tmp_1 -o merged.onnx"
)
@click.argument("student", type=FILE)
@click.option(
    "--teacher", "teachers", multiple=True, required=True, metavar="[NAME=]FILE",
    help="A teacher; its names get the prefix NAME_ (teacher_). Repeat for several.",
)  # fmt: skip
@click.option(
    "--loss", "losses", multiple=True, metavar="KIND:S=T[,OPTION=...]",
    help="A loss between student value S and teacher value T. Repeat for several.",
)  # fmt: skip
@click.option("-o", "--output", type=FILE, help="The merged file.")
@click.option("--prefix", help="Instead of teacher_, for a single teacher.")
@click.option(
    "--map", "mapped", multiple=True, metavar="T=S",
    help="Teacher input T reads student input S.",
)  # fmt: skip
@click.option(
    "--adapt", "adapted", multiple=True, metavar="[T:]KEY=...",
    help="Adapt the student's input for teacher input T:"
    " layout=NHWC, resize=224x224, mean=..., std=..., dtype=float16.",
)  # fmt: skip
@click.option("--free-batch", is_flag=True, help="Make a batch fixed to 1 dynamic, with proof.")
@click.option("--seed", default=0, show_default=True, help="For the losses' own weights.")
@click.option(
    "--verify/--no-verify", default=True, show_default=True,
    help="Prove that student and teachers compute what they did alone.",
)  # fmt: skip
@click.option(
    "--input", "shapes", multiple=True, metavar="NAME=1x3x224x224",
    help="Shape of a dynamic input for the proof; twice for two sizes.",
)  # fmt: skip
@click.option("--suggest", is_flag=True, help="List losses that fit and write nothing.")
@click.option("--external-data", is_flag=True, help="Keep the weights in a file of their own.")
@options.untrusted
@options.force
@options.as_json
def merge(
    student: Path,
    teachers: tuple[str, ...],
    losses: tuple[str, ...],
    output: Path | None,
    prefix: str | None,
    mapped: tuple[str, ...],
    adapted: tuple[str, ...],
    free_batch: bool,
    seed: int,
    verify: bool,
    shapes: tuple[str, ...],
    suggest: bool,
    external_data: bool,
    untrusted: bool,
    force: bool,
    as_json: bool,
) -> None:
    """Merge STUDENT, its teachers and distillation losses into one ONNX file."""
    from onnxslim_kd.model import check_writable, save
    from onnxslim_kd.passes.adapters import parse
    from onnxslim_kd.passes.merge import merge as merge_models
    from onnxslim_kd.verify_merge import verify_merge
    from onnxslim_kd.workload import parse_shapes

    named = _teachers(teachers, prefix)
    options.check_untrusted(untrusted, student, *named.values())
    if suggest:
        _print_suggestions(student, named, as_json=as_json)
        return
    if output is None:
        raise click.UsageError("give the merged file with -o, or ask for --suggest")
    check_writable(output, overwrite=force)
    ours, theirs = _freed(student, named) if free_batch else (student, named)
    merged = merge_models(
        ours,
        theirs,
        losses,
        inputs_map=dict(_pair("--map", text) for text in mapped),
        adapters=dict(parse(text) for text in adapted),
        seed=seed,
    )
    proof = None
    if verify:
        proof = verify_merge(merged, ours, theirs, shapes=parse_shapes(shapes), seed=seed)
    save(merged, output, overwrite=force, external_data=external_data or None)
    _print(merged, proof, output, as_json=as_json)


def _teachers(given: Sequence[str], prefix: str | None) -> dict[str, Path]:
    """Read ``[NAME=]FILE``; a single teacher is called after the prefix."""
    found: dict[str, Path] = {}
    for text in given:
        name, equals, path = text.partition("=")
        if not equals or not name.isidentifier():
            name, path = "teacher", text
        if name in found:
            raise UserError(f"two teachers are called {name!r}; write --teacher NAME=FILE")
        found[name] = Path(path)
    if prefix is None:
        return found
    if len(found) > 1:
        raise UserError("--prefix is for a single teacher; name several with --teacher NAME=FILE")
    if not prefix.removesuffix("_"):
        raise UserError(f"--prefix {prefix!r}: give a name, such as teacher_")
    return {prefix.removesuffix("_"): path for path in found.values()}


def _pair(option: str, text: str) -> tuple[str, str]:
    left, equals, right = text.partition("=")
    if not equals or not left or not right:
        raise UserError(f"{option} {text}: expected TEACHER_INPUT=STUDENT_INPUT")
    return left, right


def _freed(
    student: Path, teachers: dict[str, Path]
) -> "tuple[ir.Model | Path, dict[str, ir.Model | Path]]":
    """Free the batch of every model that has a fixed one."""
    from onnxslim_kd.passes.batch import free_batch, has_fixed_batch

    models = {"": student, **teachers}
    freed = {name: free_batch(p) if has_fixed_batch(p) else p for name, p in models.items()}
    return freed.pop(""), freed


def _print(merged: "ir.Model", proof: "Proof | None", output: Path, *, as_json: bool) -> None:
    from dataclasses import asdict

    from onnxslim_kd import roles

    record = roles.read(merged)
    assert record is not None
    if as_json:
        result = {"output": str(output), "roles": record.model_dump()}
        click.echo(json.dumps(result | {"proof": asdict(proof) if proof else None}, indent=2))
        return
    rows = []
    for term in record.terms:
        value = f"{proof.losses[term.output]:.6g}" if proof else "not computed"
        rows.append((term.name, term.kind, f"{term.weight:g}", _epochs(term), value))
    columns = ("loss", "kind", "weight", "epochs", "value for random inputs")
    options.print_table(None, columns, rows)
    for teacher in record.teachers:
        for own, source in teacher.inputs.items():
            click.echo(f"{teacher.name}: input {own} reads {source}")
    if proof is not None:
        options.tell(
            f"Verified: student and teachers compute what they did alone; {proof.values} values"
            f" equal bit for bit at {len(proof.sizes)} input size{'s' * (len(proof.sizes) > 1)}."
            + f" {proof.random} are random and were not compared."
            * (proof.random > 0)
        )
    click.echo(f"Wrote {output}")


def _epochs(term: "Term") -> str:
    """The epochs in which a loss counts, from 0; the last one is not among them."""
    if term.end_epoch is None:
        return f"from {term.start_epoch}" if term.start_epoch else "all"
    return f"{term.start_epoch} to {term.end_epoch}"


def _print_suggestions(student: Path, teachers: dict[str, Path], *, as_json: bool) -> None:
    from dataclasses import asdict

    from onnxslim_kd.passes.suggest import suggest

    found = {name: suggest(student, path) for name, path in teachers.items()}
    if as_json:
        listed = {name: [asdict(s) for s in some] for name, some in found.items()}
        click.echo(json.dumps(listed, indent=2))
        return
    for name, some in found.items():
        _print_list(name, some)


def _print_list(teacher: str, suggestions: "list[Suggestion]") -> None:
    """One line to copy for each, with shapes below; long names must not be cut."""
    click.echo(f"{len(suggestions)} losses fit {teacher}, best first:")
    for item in suggestions:
        ours, theirs = item.shapes
        click.echo(f"{item.score:.2f}  --loss '{item.text}'")
        click.echo(f"      {ours} <- {theirs}")
