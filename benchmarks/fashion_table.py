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


def table(found: list[dict[str, Any]], seeds: list[int]) -> list[dict[str, Any]]:
    """Join the seeds of a row; rows without all of them are left out."""
    rows: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for one in found:
        rows.setdefault((one["net"], one["share"], one["way"]), []).append(one)
    return [_row(group, seeds) for group in rows.values() if len(group) == len(seeds)]


def _row(group: list[dict[str, Any]], seeds: list[int]) -> dict[str, Any]:
    first = group[0]
    lost = [one["original"]["top1"] - one["top1"] for one in group]
    return {
        **{key: first[key] for key in ("net", "share", "way", "epochs")},
        "seeds": seeds,
        "macs_removed": [one["macs_removed"] for one in group],
        "original": {key: [one["original"][key] for one in group] for key in SHIPPED},
        **{key: [one[key] for one in group] for key in SHIPPED},
        "lost": statistics.mean(lost),
        "spread": [min(lost), max(lost)],
    }


def shown(rows: list[dict[str, Any]], latencies: dict[str, dict[str, Any]]) -> list[Table]:
    """Make one table per net: what ships, before and after."""
    tables = []
    for net in dict.fromkeys(row["net"] for row in rows):
        own = [row for row in rows if row["net"] == net]
        before, after = own[0]["epochs"]
        title = f"Fashion-MNIST, {net}: {before} epochs, cut, {after} epochs"
        title += f", mean of {len(own[0]['seeds'])} seed(s)"
        lines = [_line("original", own[0]["original"], ["1", "-", "1"])]
        for row in own:
            cut = row["way"] if row["way"] in TIMED else KD
            ratio = latencies[net][stage_of(cut, row["share"])]["median"]
            macs = 1 - statistics.mean(row["macs_removed"])
            low, high = row["spread"]
            lost = f"{row['lost']:.2f} ({low:.2f} to {high:.2f})"
            lines.append(_line(row["way"], row, [f"{macs:.2f}", lost, f"{ratio:.2f}"]))
        tables.append(Table(title, COLUMNS, lines))
    return tables


def _line(way: str, row: dict[str, Any], ratios: list[str]) -> list[str]:
    top1, top5, size = (statistics.mean(row[key]) for key in SHIPPED)
    return [way, f"{top1:.2f}", f"{top5:.2f}", f"{size / 1e3:.0f} kB", *ratios]


def claims(rows: list[dict[str, Any]]) -> list[Claim]:
    by = {(row["net"], row["share"], row["way"]): row for row in rows}
    found = []
    for net in dict.fromkeys(row["net"] for row in rows):
        own = [row for row in rows if row["net"] == net]
        after = f"{own[0]['epochs'][1]} epochs, {len(own[0]['seeds'])} seed(s)"
        if net == "resnet20":
            top1 = statistics.mean(own[0]["original"]["top1"])
            what = f"Fashion-MNIST, {net}, top-1 after {own[0]['epochs'][0]} epochs"
            found.append(Claim(what, f">= {REAL:g} %", f"{top1:.2f} %", met=top1 >= REAL))
        for share in TARGETS:
            kd, bn = by.get((net, share, KD)), by.get((net, share, FOLDED))
            if kd:
                what = f"Fashion-MNIST, {net}, points lost at {share:.0%} fewer MACs, KD, {after}"
                found.append(_points(what, TARGETS[share], kd["lost"]))
            if kd and bn:
                what = f"... from a folded file cut by Taylor, behind live BN, {net}, {share:.0%}"
                found.append(_points(what, BEHIND, bn["lost"] - kd["lost"]))
    return found


def _points(what: str, most: float, points: float) -> Claim:
    return Claim(what, f"<= {most}", f"{points:.2f}", met=points <= most)
