"""Write the results table of README.md from results/*.json (`--check`: only compare)."""

import argparse
import json
import sys
from pathlib import Path

from common import RESULTS

BEGIN, END = "<!-- results:begin -->", "<!-- results:end -->"
README = Path(__file__).parent.parent / "README.md"


def table(results: Path = RESULTS) -> str:
    """Return the table: one line per claim, in the order of the files' names."""
    lines = ["| What | Target | Measured | | Reproduce |", "| --- | --- | --- | --- | --- |"]
    machines = set()
    for path in sorted(results.glob("*.json")):
        result = json.loads(path.read_text())
        machines.add(f"{result['environment']['cpu']}, {result['environment']['cores']} cores")
        for claim in result["claims"]:
            cells = [claim["what"], claim["target"], claim["measured"]]
            cells += ["met" if claim["met"] else "**missed**", f"`{result['command']}`"]
            lines.append(f"| {' | '.join(cell.replace('|', '&#124;') for cell in cells)} |")
    if machines:
        lines += ["", f"Measured on {'; '.join(sorted(machines))}."]
    return "\n".join(lines)


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
