"""Write the results tables of README.md from results/*.json (`--check`: only compare)."""

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from common import RESULTS

BEGIN, END = "<!-- results:begin -->", "<!-- results:end -->"
README = Path(__file__).parent.parent / "README.md"


def table(results: Path = RESULTS) -> str:
    """Return the tables of all results, then the claims, in the order of the files' names."""
    found = [json.loads(path.read_text()) for path in sorted(results.glob("*.json"))]
    blocks = [_titled(one, result["command"]) for result in found for one in result["tables"]]
    columns = ["What", "Target", "Measured", "", "Reproduce"]
    blocks.append(_markdown(columns, [line for result in found for line in _claims(result)]))
    machines = {_machine(result["environment"]) for result in found}
    if machines:
        blocks.append(f"Measured on {'; '.join(sorted(machines))}.")
    return "\n\n".join(blocks)


def _titled(table: dict[str, Any], command: str) -> str:
    body = _markdown(table["columns"], table["lines"])
    return f"**{table['title']}** (`{command}`)\n\n{body}"


def _claims(result: dict[str, Any]) -> Iterator[list[str]]:
    for claim in result["claims"]:
        verdict = "met" if claim["met"] else "**missed**"
        command = f"`{result['command']}`"
        yield [claim["what"], claim["target"], claim["measured"], verdict, command]


def _markdown(columns: list[str], lines: list[list[str]]) -> str:
    rows = [columns, ["---"] * len(columns), *lines]
    return "\n".join(
        f"| {' | '.join(cell.replace('|', '&#124;') for cell in row)} |" for row in rows
    )


def _machine(environment: dict[str, Any]) -> str:
    cores = environment["cores"]
    return f"{environment['cpu']}, {cores} core{'s' if cores > 1 else ''}"


def replaced(text: str, new: str) -> str:
    """Return ``text`` with ``new`` between the two markers."""
    if text.count(BEGIN) != 1 or text.count(END) != 1 or text.index(BEGIN) > text.index(END):
        raise SystemExit(f"README.md needs one {BEGIN} before one {END}")
    before, rest = text.split(BEGIN)
    return f"{before}{BEGIN}\n{new}\n{END}{rest.split(END)[1]}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="change nothing; fail when stale")
    check = parser.parse_args().check
    text = README.read_text()
    new = replaced(text, table())
    if check and new != text:
        sys.exit("README.md does not show results/*.json; run python benchmarks/table.py")
    if not check:
        README.write_text(new)


if __name__ == "__main__":
    main()
