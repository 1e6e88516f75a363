"""onnxslim-kd search."""

from pathlib import Path
from typing import Any

import click

from onnxslim_kd.cli import options
from onnxslim_kd.cli.options import FILE
from onnxslim_kd.search_config import SearchConfig


@click.command()
@click.argument("model", type=FILE)
@click.option("-o", "--output", required=True, type=FILE, help="The study to begin or go on with.")
@click.option("--save-plan", type=FILE, help="The best plan; beside the study unless given.")
@options.of(SearchConfig, {"inputs": "input"})
@click.option("--force", is_flag=True, help="Replace the plan if it exists.")
@options.as_json
def search(
    model: Path,
    output: Path,
    save_plan: Path | None,
    force: bool,
    as_json: bool,
    **given: Any,
) -> None:
    """Look for the ratios that cost the least of a metric under a budget."""
    from onnxslim_kd import search as searching
    from onnxslim_kd.model import check_writable
    from onnxslim_kd.training import config as configs

    config = configs.validated(SearchConfig, given | {"inputs": options.shapes(given["inputs"])})
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
