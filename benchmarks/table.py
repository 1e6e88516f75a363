"""Write results/*.json into README.md, in brief, and RESULTS.md (`--check`: only compare)."""

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from common import RESULTS
from fashion_table import BLOCKS

BEGIN, END = "<!-- results:begin -->", "<!-- results:end -->"
ROOT = Path(__file__).parent.parent
COMPLETE = "benchmarks/RESULTS.md"
SHIPPED = ("MACs", "Latency", "Size", "Top-1", "Top-5")
"""What is said in brief of networks that were trained."""

Results = Mapping[str, dict[str, Any]]


def read(folder: Path) -> Results:
    """Return what every benchmark measured, by the name of its file."""
    return {path.stem: json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))}


def summary(results: Results) -> str:
    """Return what stands in README.md: the trained networks, and a line for every benchmark."""
    trained = [line for name, result in results.items() for line in _trained(name, result)]
    lines = [_benchmark(name, result) for name, result in results.items()]
    columns = ("Benchmark", "The first of its targets", "Reached", "Targets met")
    return f"{_markdown(('', *SHIPPED), trained)}\n\n{_markdown(columns, lines)}"


def _trained(name: str, result: dict[str, Any]) -> list[list[str]]:
    """A network before and after cuts as `prune` makes them by default: in whole blocks."""
    found = []
    for table in result["tables"]:
        for line in table["lines"] if "Top-1" in table["columns"] else ():
            cells = dict(zip(table["columns"], line, strict=True))
            if line[0] in ("original", BLOCKS):
                net = name.partition("-")[2]
                what = _link(name, net) if line[0] == "original" else f"{net}, cut and distilled"
                found.append([what, *(cells[column] for column in SHIPPED)])
    return found


def _benchmark(name: str, result: dict[str, Any]) -> list[str]:
    claims = result["claims"]
    if not claims:
        return [_link(name, f"`{name}`"), "-", "-", "-"]
    met, first = sum(claim["met"] for claim in claims), claims[0]
    asked = f"{first['what']}: {first['target']}"
    return [_link(name, f"`{name}`"), asked, _reached(first), f"{met} of {len(claims)}"]


def _reached(claim: dict[str, Any]) -> str:
    return str(claim["measured"]) + ("" if claim["met"] else " **(missed)**")


def _link(name: str, text: str) -> str:
    return f"[{text}]({COMPLETE}#{name.lower()})"


def complete(results: Results) -> str:
    """Return what stands in RESULTS.md: the command, the tables and the claims of each."""
    return "\n\n".join(_section(name, result) for name, result in results.items())


def _section(name: str, result: dict[str, Any]) -> str:
    claims = [
        (claim["what"], claim["target"], claim["measured"], "met" if claim["met"] else "**missed**")
        for claim in result["claims"]
    ]
    blocks = [f"## {name}", f"`{result['command']}` on {_machine(result['environment'])}"]
    for table in result["tables"]:
        blocks += [f"**{table['title']}**", _markdown(table["columns"], table["lines"])]
    blocks.append(_markdown(("What", "Target", "Measured", ""), claims))
    return "\n\n".join(blocks)


def _machine(environment: dict[str, Any]) -> str:
    cores = environment["cores"]
    return f"{environment['cpu']}, {cores} core{'s' if cores > 1 else ''}"


def _markdown(columns: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    rows = [columns, ["---"] * len(columns), *lines]
    return "\n".join(
        f"| {' | '.join(cell.replace('|', '&#124;') for cell in row)} |" for row in rows
    )


def replaced(text: str, new: str, name: str = "README.md") -> str:
    """Return ``text`` of the file ``name`` with ``new`` between the two markers."""
    if text.count(BEGIN) != 1 or text.count(END) != 1 or text.index(BEGIN) > text.index(END):
        raise SystemExit(f"{name} needs one {BEGIN} before one {END}")
    before, rest = text.split(BEGIN)
    return f"{before}{BEGIN}\n{new}\n{END}{rest.split(END)[1]}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="change nothing; fail when stale")
    check = parser.parse_args().check
    results = read(RESULTS)
    for name, write in PLACES.items():
        text = (ROOT / name).read_text()
        new = replaced(text, write(results), name)
        if check and new != text:
            sys.exit(f"{name} does not show results/*.json; run python benchmarks/table.py")
        if not check:
            (ROOT / name).write_text(new)


PLACES = {"README.md": summary, COMPLETE: complete}

if __name__ == "__main__":
    main()
