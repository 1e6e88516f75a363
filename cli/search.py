"""onnxslim-kd search."""

from pathlib import Path
from typing import Any

import click

from onnxslim_kd.cli import options
from onnxslim_kd.errors import UserError

FILE = click.Path(path_type=Path)


@click.command()
@click.argument("model", type=FILE)
@click.option("-o", "--output", required=True, type=FILE, help="The study to begin or go on with.")
@click.option("--save-plan", type=FILE, help="The best plan; beside the study unless given.")
@click.option("--trials", type=click.IntRange(1), default=100, show_default=True, help="In all.")
@click.option("--target-macs", type=float, help="Remove this share of the MACs.")
@click.option(
    "--target-latency",
    type=float,
    help="Keep this share of the latency: trials by layers, the plan as measured.",
)
@click.option("--pattern", default=".*", show_default=True, help="Which parameters.")
@click.option("--ignore", help="Regular expression of what must stay.")
@click.option("--criterion", default="l1", show_default=True, help="Which channels go first.")
@click.option("--round-to", type=click.IntRange(1), help="As in prune.")
@click.option("--data", help="As in train; without it the outputs' distance is measured.")
@click.option("--preprocess", default="", help="The same line as in training.")
@click.option(
    "--metric", default="auto", help="auto, top1, miou, map, distance or module:function."
)
@click.option("--samples", default=1024, show_default=True, help="At most this many; in memory.")
@click.option("--input", "inputs", multiple=True, help="A shape: name=1x3x224x224; repeatable.")
@click.option("--provider", default="cpu", show_default=True, help="cpu, cuda or tensorrt.")
@click.option("--threads", default=0, help="0 lets the runtime choose.")
@click.option("--cache", type=FILE, help="With --target-latency: folder of measured layers.")
@click.option("--force", is_flag=True, help="Replace the plan if it exists.")
def search(model: Path, **given: Any) -> None:
    """Look for the ratios that cost the least of a metric under a budget."""
    if (given["target_macs"] is None) == (given["target_latency"] is None):
        raise click.UsageError("give either --target-macs or --target-latency")
    from rich.progress import Progress, SpinnerColumn, TextColumn, TimeRemainingColumn

    from onnxslim_kd import search as searching
    from onnxslim_kd.model import check_writable

    file = given["save_plan"] or given["output"].with_suffix(".plan.json")
    check_writable(file, overwrite=given["force"])
    job, refused = _job(model, given)
    runtime = {"provider": given["provider"], "threads": given["threads"]}
    columns = (SpinnerColumn(), *Progress.get_default_columns()[:3], TimeRemainingColumn())
    with Progress(*columns, TextColumn("{task.completed}/{task.total}")) as bar:
        task = bar.add_task("searching")
        for done, total in searching.run(job, given["output"], given["trials"], **runtime):
            bar.update(task, completed=done, total=total)
    study = searching.load(given["output"])
    plan = searching.plan(job, study, refused)
    plan.save(file, overwrite=given["force"])
    rows = [
        (group.asked_by[0], group.units, group.units - group.removed, f"{group.ratio:.0%}")
        for group in plan.groups
    ]
    options.print_table("The best trial", ("group", "units", "kept", "removed"), rows)
    click.echo(f"Note: {plan.notes[0]}")
    click.echo(f"Wrote {file}; cut with: onnxslim-kd prune {model} --plan {file} -o OUT")


def _job(model: Path, given: dict[str, Any]) -> tuple[Any, Any]:
    """What to search for, and the parameters that must stay."""
    from onnxslim_kd import api
    from onnxslim_kd import search as searching
    from onnxslim_kd.measures import Measure
    from onnxslim_kd.passes import prune
    from onnxslim_kd.passes.ratios import Amount

    analysis = api.inspect(model, api.Reading(inputs=options.shapes(given["inputs"])))
    names = ("data", "preprocess", "metric", "samples")
    measure = Measure(**{name: given[name] for name in names})
    choice = prune.Choice(
        pattern=given["pattern"],
        ignore=given["ignore"],
        criterion=given["criterion"],
        samples=measure.looked_at(analysis, given["criterion"]),
    )
    ranked, refused, _ = prune.rank(analysis, choice)
    amount = prune.resolved(Amount(given["round_to"] or 0))
    budget = _budget(analysis, ranked, amount, given)
    score = measure.score(analysis)
    return searching.Job(analysis, ranked, budget, *score, given["criterion"]), refused


def _budget(analysis: Any, ranked: Any, amount: Any, given: dict[str, Any]) -> Any:
    from onnxslim_kd import budgets
    from onnxslim_kd.passes.targets import Device, LatencyTarget, Target

    if given["target_macs"] is not None:
        return budgets.Macs(analysis, ranked, Target("macs", given["target_macs"]), amount)
    if given["round_to"] is not None:
        raise UserError("--round-to: the widths of --target-latency are those that run fast here")
    device = Device(given["provider"], given["threads"], given["cache"])
    return budgets.Seconds.of(analysis, ranked, LatencyTarget(given["target_latency"]), device)
