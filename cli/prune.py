"""onnxslim-kd prune."""

from collections import Counter
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from onnxslim_kd.cli import options
from onnxslim_kd.errors import UserError

if TYPE_CHECKING:
    from onnxslim_kd.api import Pruned
    from onnxslim_kd.passes.prune import Choice
    from onnxslim_kd.passes.targets import Curves, LatencyTarget, Quantity, Target
    from onnxslim_kd.plans import Plan
    from onnxslim_kd.samples import Samples


@click.command()
@click.argument("model", type=click.Path(path_type=Path))
@click.option("-o", "--output", type=click.Path(path_type=Path), help="Where to write the result.")
@click.option("--pattern", help="Regular expression on parameter, node and module names.")
@click.option("--ratio", type=float, default=0.5, show_default=True, help="Share that goes.")
@click.option("--ratios", help="A ratio per parameter: name=0.2,name2=0.4.")
@click.option("--pruned-params", help="Names, separated by commas (with --pruned-ratios).")
@click.option("--pruned-ratios", help="Their ratios, separated by commas.")
@click.option("--target-macs", type=float, help="Remove this share of the MACs instead.")
@click.option("--target-params", type=float, help="Remove this share of the parameters.")
@click.option("--target-size", type=float, help="Remove this share of the weights' bytes.")
@click.option("--target-latency", type=float, help="Keep this share of the measured latency.")
@click.option(
    "--provider",
    type=click.Choice(["cpu", "cuda", "tensorrt"]),
    default="cpu",
    show_default=True,
    help="Where latency is measured.",
)
@click.option(
    "--threads",
    type=click.IntRange(0),
    default=0,
    help="Threads inside an operator; by default the cores there are.",
)
@click.option("--cache", type=click.Path(path_type=Path), help="Folder of measured layers.")
@click.option(
    "--bench/--no-bench",
    default=False,
    show_default=True,
    help="Measure the result; refuse one that is slower.",
)
@click.option("--force-slower", is_flag=True, help="Write it even if it measures slower.")
@click.option(
    "--allocation",
    type=click.Choice(["uniform", "global", "isomorphic"]),
    default="uniform",
    show_default=True,
    help="The same share of every group, one threshold over all scores, or one per kind.",
)
@click.option("--sensitivity", type=click.Path(path_type=Path), help="A file of `sensitivity`.")
@click.option("--max-loss", type=float, help="With it: the share of the metric a group may cost.")
@click.option("--ignore", help="Regular expression of what must stay.")
@click.option(
    "--criterion",
    default="l1",
    show_default=True,
    help="l1, l2, lamp, group-l2, geometric-median, bn-scale or random; with --data also taylor,"
    " activation and reconstruction.",
)
@click.option("--steps", default=1, show_default=True, help="Score anew before each step.")
@click.option("--data", help="Samples for the criterion or --correct; as in train.")
@click.option("--preprocess", default="", help="The same line as in training.")
@click.option("--samples", default=512, show_default=True, help="How many at most; in memory.")
@click.option("--correct", is_flag=True, help="Let the next layers make up for what went.")
@click.option(
    "--group-score",
    type=click.Choice(["first", "mean", "max"]),
    default="first",
    show_default=True,
    help="Whose scores count in a group: the first listed parameter's, or all of them.",
)
@click.option(
    "--selector",
    type=click.Choice(["share", "energy"]),
    default="share",
    show_default=True,
    help="Whether the ratio is a share of the channels or of their squared scores.",
)
@click.option(
    "--round-to",
    type=click.IntRange(1),
    help="Keep multiples of this many channels; by default what this CPU computes at once.",
)
@click.option(
    "--attention",
    type=click.Choice(["heads", "dims"]),
    default="heads",
    show_default=True,
    help="Remove whole heads, or dimensions of all heads.",
)
@click.option("--free-output", multiple=True, help="An output that may lose channels; repeatable.")
@click.option("--input", "inputs", multiple=True, help="A shape: name=1x3x224x224; repeatable.")
@click.option("--plan", "plan_file", type=click.Path(path_type=Path), help="Replay this plan.")
@click.option("--save-plan", type=click.Path(path_type=Path), help="Write the plan as JSON.")
@click.option("--dry-run", is_flag=True, help="Decide and print; write no model.")
@click.option("--pass", "before", multiple=True, help="module:function on a gs.Graph, before.")
@click.option("--pass-after", "after", multiple=True, help="The same, after the cut.")
@click.option("--verify/--no-verify", default=True, show_default=True, help="Prove the result.")
@click.option("--force", is_flag=True, help="Replace the output if it exists.")
@options.untrusted
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of tables.")
def prune(model: Path, **given: Any) -> None:
    """Remove whole channels of the parameters of MODEL that a pattern or list names."""
    if given["output"] is None and not given["dry_run"]:
        raise click.UsageError("give -o FILE for the result, or --dry-run")
    from onnxslim_kd import api
    from onnxslim_kd.model import check_writable

    if given["save_plan"] is not None:
        check_writable(given["save_plan"], overwrite=given["force"])
    options.check_untrusted(given["untrusted"], model)
    reading = api.Reading(
        attention=given["attention"],
        free_outputs=given["free_output"],
        inputs=options.shapes(given["inputs"]),
        passes=given["before"],
        passes_after=given["after"],
    )
    samples = _samples(model, given)
    if given["correct"]:
        reading = replace(reading, correct=samples)
    choice = _choice(given, samples)
    result = None
    if not given["dry_run"]:
        result = api.prune(
            model,
            choice,
            None if given["bench"] else given["output"],
            reading=reading,
            verify=given["verify"],
            overwrite=given["force"],
        )
    if result is not None and given["bench"]:
        _bench(model, result, given)
    plan = result.plan if result is not None else api.plan(model, choice, reading)
    if given["save_plan"] is not None:
        plan.save(given["save_plan"], overwrite=given["force"])
    _report(plan, result, as_json=given["as_json"], output=given["output"])


def _bench(model: Path, result: "Pruned", given: dict[str, Any]) -> None:
    """Measure the result against MODEL, and write it unless it is slower."""
    from onnxslim_kd import api
    from onnxslim_kd.model import save
    from onnxslim_kd.passes import latency_measure

    api.check_output(model, given["output"], overwrite=given["force"])
    ratio = latency_measure.not_slower(
        model,
        result.model,
        shapes=options.shapes(given["inputs"]),
        setting=latency_measure.quick(given["provider"], given["threads"]),
        force=given["force_slower"],
    )
    save(result.model, given["output"], overwrite=given["force"])
    click.echo(f"Latency: {ratio} of the original's ({given['provider']}).", err=given["as_json"])


def _samples(model: Path, given: dict[str, Any]) -> "Samples | None":
    if given["data"] is None:
        if given["correct"]:
            raise UserError("--correct looks at data, labelled or not: give it with --data")
        return None
    from onnxslim_kd.model import load
    from onnxslim_kd.training.samples import read

    settings = {"preprocess": given["preprocess"], "samples": given["samples"]}
    return read(load(model), given["data"], **settings)


def _choice(given: dict[str, Any], samples: "Samples | None") -> "Choice | Plan":
    """The plan to replay, or the choice that the options make."""
    from onnxslim_kd.passes.prune import Choice
    from onnxslim_kd.passes.ratios import Amount
    from onnxslim_kd.plans import Plan

    ratios = _ratios(given)
    if given["plan_file"] is not None:
        if given["pattern"] or ratios:
            raise UserError("--plan decides everything: leave out --pattern and --ratios")
        return Plan.load(given["plan_file"])
    return Choice(
        pattern=given["pattern"],
        ratio=given["ratio"],
        ratios=ratios,
        ignore=given["ignore"],
        criterion=given["criterion"],
        group_score=given["group_score"],
        amount=Amount(given["round_to"] or 0, given["selector"]),
        target=_target(given),
        allocation=given["allocation"],
        sensitivity=_curves(given["sensitivity"]),
        max_loss=given["max_loss"],
        samples=samples,
        steps=given["steps"],
    )


def _curves(path: Path | None) -> "Curves | None":
    if path is None:
        return None
    from onnxslim_kd import sensitivity

    found = sensitivity.load(path)
    return {name: found.curve(name) for name in found.losses}


def _target(given: dict[str, Any]) -> "Target | LatencyTarget | None":
    from onnxslim_kd.passes.targets import LatencyTarget, Target

    quantities: tuple[Quantity, ...] = ("macs", "params", "size")
    names = [q for q in (*quantities, "latency") if given[f"target_{q}"] is not None]
    if len(names) > 1:
        raise UserError(f"give one target, not {' and '.join(f'--target-{q}' for q in names)}")
    if "latency" in names:
        where = given["provider"], given["threads"], given["cache"]
        return LatencyTarget(given["target_latency"], *where)
    return next((Target(q, given[f"target_{q}"]) for q in quantities if q in names), None)


def _ratios(given: dict[str, Any]) -> dict[str, float] | None:
    names, numbers = given["pruned_params"], given["pruned_ratios"]
    if (names is None) != (numbers is None):
        raise UserError("--pruned-params and --pruned-ratios go together")
    if names is not None and given["ratios"] is not None:
        raise UserError("give either --ratios or --pruned-params, not both")
    if names is not None:
        return options.paired_ratios(names, numbers)
    return options.ratios(given["ratios"]) if given["ratios"] is not None else None


# ------------------------------------------------------------------------- printing


def _report(plan: "Plan", result: "Pruned | None", *, as_json: bool, output: Path | None) -> None:
    if as_json:
        options.print_json(_json(plan, result))
        return
    rows = []
    for group in plan.groups:
        for member in group.members:
            if member.kept is not None:
                share = 1 - member.after / member.before
                rows.append((member.parameter, member.before, member.after, f"{share:.0%}"))
    if rows:
        options.print_table("Pruned", ("parameter", "before", "after", "removed"), rows)
    _print_refusals(plan)
    for note in plan.notes:
        click.echo(f"Note: {note}")
    _print_reached(plan)
    if result is None:
        _print_costs([("MACs", plan.macs_before, plan.macs_after)])
        click.echo("Dry run: nothing was written.")
        return
    before, after = result.before, result.after
    _print_costs(
        [
            ("MACs", before.macs, after.macs),
            ("parameters", before.parameters, after.parameters),
            ("bytes", before.bytes, after.bytes),
        ]
    )
    for reason in dict.fromkeys(r for g in plan.groups for r in g.approximate if g.removed):
        click.echo(f"Approximate: {reason}; the survivors are computed alone.")
    click.echo(f"Verified: {result.proof}." if result.proof else "Not verified (--no-verify).")
    _print_corrected(result)
    click.echo(f"Wrote {output}")


def _print_corrected(result: "Pruned") -> None:
    if result.uncorrected:
        click.echo(
            f"Not corrected, for their kind is not handled: {', '.join(result.uncorrected)}."
        )
    if not result.corrected:
        return
    rows = [(c.node, f"{c.before:.1%}", f"{c.after:.1%}") for c in result.corrected]
    options.print_table("Corrected: squared error of outputs", ("layer", "cut", "now"), rows)
    if result.proof is not None:
        click.echo("What was verified is the cut; the weights were corrected after that.")


def _print_refusals(plan: "Plan") -> None:
    reasons = Counter(refusal.reason for refusal in plan.refused)
    rows = []
    for reason, number in reasons.most_common():
        names = [r.parameter for r in plan.refused if r.reason == reason]
        shown = ", ".join(names[:3]) + (f" and {number - 3} more" if number > 3 else "")
        rows.append((shown, reason))
    if rows:
        options.print_table("Left alone", ("parameter", "reason"), rows)


def _print_reached(plan: "Plan") -> None:
    """Say what was asked and what was reached, and why they differ."""
    units = sum(group.units for group in plan.groups)
    if not units:
        click.echo("Nothing can be removed: every channel asked for must stay.")
        return
    asked = sum(group.ratio * group.units for group in plan.groups) / units
    reached = sum(group.removed for group in plan.groups) / units
    text = f"Asked {asked:.1%} of the channels, reached {reached:.1%}"
    why = []
    if abs(asked - reached) > 0.005:
        why.append("groups are rounded to whole blocks of channels")
    if plan.refused:
        why.append(f"{len(plan.refused)} parameters must stay")
    click.echo(text + (f" ({'; '.join(why)})." if why else "."))


def _print_costs(rows: list[tuple[str, int, int]]) -> None:
    options.print_table(
        "Cost",
        ("", "before", "after", "ratio"),
        [
            (name, options.count(a), options.count(b), f"{b / a:.3f}" if a else "-")
            for name, a, b in rows
        ],
    )


def _json(plan: "Plan", result: "Pruned | None") -> dict[str, Any]:
    data: dict[str, Any] = {"plan": plan.model_dump(mode="json")}
    if result is not None:
        for name, cost in (("before", result.before), ("after", result.after)):
            data[name] = {"macs": cost.macs, "parameters": cost.parameters, "bytes": cost.bytes}
        data["corrected"] = [asdict(layer) for layer in result.corrected]
        data["uncorrected"] = result.uncorrected
        proof = result.proof
        data["verified"] = proof and {
            "shapes": proof.shapes,
            "outputs": proof.outputs,
            "inner_values": proof.inner_values,
            "error": proof.error,
            "tolerance": proof.tolerance,
        }
    return data
