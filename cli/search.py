"""onnxslim-kd search."""

from pathlib import Path
from typing import Any

import click

from onnxslim_kd.cli import options

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
@options.preprocess
@click.option(
    "--metric",
    default="auto",
    show_default=True,
    help="auto, top1, miou, map, distance or module:function.",
)
@click.option("--samples", default=1024, show_default=True, help="At most this many; in memory.")
@options.inputs
@options.provider
@options.threads
@click.option("--cache", type=FILE, help="With --target-latency: folder of measured layers.")
@click.option("--force", is_flag=True, help="Replace the plan if it exists.")
@options.as_json
def search(
    model: Path,
    output: Path,
    save_plan: Path | None,
    inputs: tuple[str, ...],
    force: bool,
    as_json: bool,
    **given: Any,
) -> None:
    """Look for the ratios that cost the least of a metric under a budget."""
    from onnxslim_kd import search as searching
    from onnxslim_kd.model import check_writable
    from onnxslim_kd.search_config import SearchConfig
    from onnxslim_kd.training import config as configs

    config = configs.validated(SearchConfig, given | {"inputs": options.shapes(inputs)})
    file = save_plan or output.with_suffix(".plan.json")
    check_writable(file, overwrite=force)
    job, refused = config.job(model)
    options.follow("searching", searching.run(job, output, config.trials, **config.runtime))
    plan = searching.plan(job, searching.load(output), refused)
    plan.save(file, overwrite=force)
    if as_json:
        options.print_json({"output": file, "plan": plan.model_dump(mode="json")})
        return
    rows = [
        (group.asked_by[0], group.units, group.units - group.removed, f"{group.ratio:.0%}")
        for group in plan.groups
    ]
    options.print_table("The best trial", ("group", "units", "kept", "removed"), rows)
    options.tell(f"Note: {plan.notes[0]}")
    click.echo(f"Wrote {file}; cut with: onnxslim-kd prune {model} --plan {file} -o OUT")
