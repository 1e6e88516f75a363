"""What fashion_mnist.py shows: its stages' records joined over the seeds, and what was promised."""

import statistics
from typing import Any

from common import Claim, Table

KD, BLOCKS, BY_HAND = "KD", "KD, whole blocks", "Torch-Pruning + KD by hand"
FOLDED = "KD, from a folded file cut by Taylor, BN re-inserted"
TIMED = (KD, BLOCKS, BY_HAND)
"""The ways with a cut of their own; the others share that of KD, hence its latency."""
SHIPPED = ("top1", "top5", "bytes")
COLUMNS = ("", "Top-1", "Top-5", "Size", "MACs", "Points lost", "Latency")
TARGETS = {0.5: 0.3, 0.75: 1.0}
"""Points that KD may leave lost, by the share of MACs removed."""
BEHIND, REAL = 0.3, 93.0


def stage_of(way: str, share: float) -> str:
    """Return the name of the stage that recovers in this way."""
    return f"{way.replace(' ', '_').replace(',', '')}-{share:g}"


def table(found: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Join the seeds of every row of a net."""
    rows: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for one in found:
        rows.setdefault((one["share"], one["way"]), []).append(one)
    return [_row(group) for group in rows.values()]


def _row(group: list[dict[str, Any]]) -> dict[str, Any]:
    first = group[0]
    lost = [one["original"]["top1"] - one["top1"] for one in group]
    return {
        **{key: first[key] for key in ("net", "share", "way", "epochs")},
        "seeds": [one["seed"] for one in group],
        "macs_removed": [one["macs_removed"] for one in group],
        "original": {key: [one["original"][key] for one in group] for key in SHIPPED},
        **{key: [one[key] for one in group] for key in SHIPPED},
        "lost": statistics.mean(lost),
        "spread": [min(lost), max(lost)],
    }


def shown(rows: list[dict[str, Any]], latencies: dict[str, Any]) -> Table:
    """Make the table of a net: what ships, before and after."""
    first = rows[0]
    before, after = first["epochs"]
    title = f"Fashion-MNIST, {first['net']}: {before} epochs, cut, {after} epochs"
    title += f", mean of {len(first['seeds'])} seed(s)"
    lines = [_line("original", first["original"], ["1", "-", "1"])]
    for row in rows:
        cut = row["way"] if row["way"] in TIMED else KD
        ratio = latencies[stage_of(cut, row["share"])]["median"]
        macs = 1 - statistics.mean(row["macs_removed"])
        low, high = row["spread"]
        lost = f"{row['lost']:.2f} ({low:.2f} to {high:.2f})"
        lines.append(_line(row["way"], row, [f"{macs:.2f}", lost, f"{ratio:.2f}"]))
    return Table(title, COLUMNS, lines)


def _line(way: str, row: dict[str, Any], ratios: list[str]) -> list[str]:
    top1, top5, size = (statistics.mean(row[key]) for key in SHIPPED)
    return [way, f"{top1:.2f}", f"{top5:.2f}", f"{size / 1e3:.0f} kB", *ratios]


def claims(rows: list[dict[str, Any]]) -> list[Claim]:
    by = {(row["share"], row["way"]): row for row in rows}
    first, found = rows[0], []
    net, after = first["net"], f"{first['epochs'][1]} epochs, {len(first['seeds'])} seed(s)"
    if net == "resnet20":
        top1 = statistics.mean(first["original"]["top1"])
        what = f"Fashion-MNIST, {net}, top-1 after {first['epochs'][0]} epochs"
        found.append(Claim(what, f">= {REAL:g} %", f"{top1:.2f} %", met=top1 >= REAL))
    for share in sorted({row["share"] for row in rows}):
        kd, bn = by[share, KD], by[share, FOLDED]
        what = f"Fashion-MNIST, {net}, points lost at {share:.0%} fewer MACs, KD, {after}"
        found.append(_points(what, TARGETS[share], kd["lost"]))
        what = f"... from a folded file cut by Taylor, behind live BN, {net}, {share:.0%}"
        found.append(_points(what, BEHIND, bn["lost"] - kd["lost"]))
    return found


def _points(what: str, most: float, points: float) -> Claim:
    return Claim(what, f"<= {most}", f"{points:.2f}", met=points <= most)
