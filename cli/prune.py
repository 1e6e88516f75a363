"""onnxslim-kd prune."""

import json
from collections import Counter
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from onnxslim_kd.cli import options
from onnxslim_kd.cli.options import FILE
from onnxslim_kd.errors import UserError
from onnxslim_kd.prune_config import SPELLED, PruneConfig

if TYPE_CHECKING:
    from onnxslim_kd.api import Pruned
    from onnxslim_kd.plans import Plan


@click.command()
@click.argument("model", type=FILE)
@click.option("-o", "--output", type=FILE, help="Where to write the result.")
@options.of(PruneConfig, SPELLED)
@click.option("--pruned-params", help="Names, separated by commas (with --pruned-ratios).")
@click.option("--pruned-ratios", help="Their ratios, separated by commas.")
@click.option("--save-plan", type=FILE, help="Write the plan as JSON.")
@click.option("--dry-run", is_flag=True, help="Decide and print; write no model.")
@options.force
@options.untrusted
@options.as_json
def prune(
    model: Path,
    output: Path | None,
    save_plan: Path | None,
    dry_run: bool,
    force: bool,
    untrusted: bool,
    as_json: bool,
    **given: Any,
) -> None:
    """Remove whole channels of the parameters of MODEL that a pattern or list names."""
    if output is None and not dry_run:
        raise click.UsageError("give -o FILE for the result, or --dry-run")
    from onnxslim_kd import api, prune_config
    from onnxslim_kd.model import save

    for path in (save_plan, output):
        if path is not None:
            api.check_output(model, path, overwrite=force)
    if save_plan is not None and output is not None and save_plan.resolve() == output.resolve():
        raise UserError(f"{output}: is named both for the model and for the plan")
    options.check_untrusted(untrusted, model)
    config = _config(given)
    result, latency = (None, None) if dry_run else prune_config.prune(model, config)
    plan = result.plan if result is not None else prune_config.plan(model, config)
    if result is not None and output is not None:
        save(result.model, output, overwrite=force)
    if save_plan is not None:
        plan.save(save_plan, overwrite=force)
    if latency is not None:
        click.echo(f"Latency: {latency} of the original's ({config.provider}).", err=as_json)
    _report(plan, result, as_json=as_json, output=output)


def _config(given: dict[str, Any]) -> PruneConfig:
    """The options as one object; the tutorials' two lists are ratios as well."""
    from onnxslim_kd.training.config import validated

    names, numbers = given.pop("pruned_params"), given.pop("pruned_ratios")
    if (names is None) != (numbers is None):
        raise UserError("--pruned-params and --pruned-ratios go together")
    if names is not None and given["ratios"] is not None:
        raise UserError("give either --ratios or --pruned-params, not both")
    if names is not None:
        given["ratios"] = options.paired_ratios(names, numbers)
    elif given["ratios"] is not None:
        given["ratios"] = options.ratios(given["ratios"])
    given["inputs"] = options.shapes(given["inputs"])
    config = validated(PruneConfig, given)
    if config.data is not None and not config.looks_at_data:
        raise UserError(
            f"--data: criterion {config.criterion} looks at none, and --correct is not given"
        )
    return config


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
        number = len(plan.refused)
        why.append(f"{number} parameter{'s' * (number != 1)} must stay")
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
    data: dict[str, Any] = {"plan": json.loads(plan.model_dump_json())}  # infinite scores as text
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
