"""Pruning for latency: by one ratio, by MACs with rounding, and by what the machine measures.

    python benchmarks/latency_pruning.py [yolov8n.onnx ...] [--only PART] [--seconds 20] [--resume]

Models: five torch modules, the detector that ships inside of rapidocr-onnxruntime, and files given.
(a) is one ratio for every layer, any width: cut by Torch-Pruning and written by torch's exporter
where there is a module, and by us with the same widths where there is only a file; (b) the same
share of MACs with widths in whole blocks of the machine; (c) is ours, for a latency. One thread,
by the clock, in turn: keep the machine idle. Every model's rows are kept as soon as they are there;
--resume goes on with what is missing.
"""

import argparse
import dataclasses
import json
import statistics
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

import latency_peer as peer
import onnx_ir as ir
from common import RESULTS, Claim, Table, compare, session_call, write

from onnxslim_kd import Amount, Choice, api
from onnxslim_kd import model as model_io
from onnxslim_kd.bench import Setting
from onnxslim_kd.cost import cost
from onnxslim_kd.passes import prune
from onnxslim_kd.passes.groups import Analysis
from onnxslim_kd.passes.latency_measure import compare as measured_ratio
from onnxslim_kd.passes.latency_path import kept_importance
from onnxslim_kd.passes.targets import Device, LatencyTarget, Target
from onnxslim_kd.plans import Plan
from onnxslim_kd.statistics import Ratio
from onnxslim_kd.workload import workloads

KEPT = RESULTS / "latency_pruning.part.jsonl"
SHAPES = {"yolov8n": {"images": (1, 3, 640, 640)}, "ch_PP": {"x": (1, 3, 320, 320)}}
IGNORE = ".*dfl"
"""The bins of a YOLO head count distances: a cut would change what they mean."""
MACS = 0.5
LATENCY = 0.6
HALVINGS = 6
TOLERANCE = 0.03
FASTER, MORE = 1.15, 1.10
GLANCE = Setting(threads=1, rounds=15, seconds=2.0)


@dataclass(frozen=True)
class Cut:
    """A pruned model and what it cost."""

    plan: Plan
    model: ir.Model
    kept: float
    """Share of the importance."""
    seconds: float
    """To decide, which includes measuring for (c)."""
    by: str = "onnxslim-kd"

    @property
    def ratio(self) -> float:
        """The share that every group was asked to lose."""
        return max(group.ratio for group in self.plan.groups)


@dataclass(frozen=True)
class Subject:
    """A model to be pruned."""

    name: str
    analysis: Analysis
    shapes: dict[str, tuple[int, ...]]

    @classmethod
    def load(cls, path: Path) -> "Subject":
        given = next((s for name, s in SHAPES.items() if name in path.stem), None)
        reading = api.Reading(inputs=given)
        analysis = reading.analyse(path)
        shapes = workloads(analysis.model, [given] if given else ())[0].shapes
        return cls(path.stem, analysis, dict(shapes))

    def cut(self, choice: Choice) -> Cut:
        start = time.perf_counter()
        plan = prune.plan(self.analysis, choice)
        seconds = time.perf_counter() - start
        ranked, _, _ = prune.rank(self.analysis, choice)
        kept = kept_importance(ranked, prune.removed_by(self.analysis, plan))
        return Cut(plan, prune.cut(self.analysis.model, plan), kept, seconds)

    def by_ratio(self, ratio: float) -> Cut:
        return self.cut(choice(ratio=ratio, amount=Amount(1)))

    def at_latency(self, latency: float) -> tuple[Cut, float]:
        """Halve the interval of the one ratio; return the fullest cut that is no slower."""
        low, high, found = 0.0, 0.95, []
        for _ in range(HALVINGS):
            ratio = (low + high) / 2
            cut = self.by_ratio(ratio)
            measured = measured_ratio(self.analysis.model, cut.model, self.shapes, GLANCE).median
            found.append((cut, measured))
            low, high = (ratio, high) if measured > latency else (low, ratio)
        fast = [f for f in found if f[1] <= latency * (1 + TOLERANCE)]
        return max(fast or found[-1:], key=lambda f: f[0].kept)


def choice(**options: Any) -> Choice:
    return Choice(pattern=".*", ignore=IGNORE, **options)


# ----------------------------------------------------------------------------- judge


def as_others_do(subject: Subject, folder: Path) -> Cut:
    """One ratio, any width; by Torch-Pruning where torch has the model."""
    ours = subject.cut(choice(target=Target("macs", MACS), amount=Amount(1)))
    if subject.name not in peer.NAMES:
        return dataclasses.replace(ours, by="onnxslim-kd with the same widths: no torch module")
    made = peer.cut(subject.name, ours.ratio, folder / f"{subject.name}.peer.onnx")
    return dataclasses.replace(ours, model=made, by="Torch-Pruning, exported by torch")


def one(path: Path, cache: Path, seconds: float) -> dict[str, Any]:
    subject = Subject.load(path)
    device = Device(threads=1, cache=cache)
    cuts = {
        "a": as_others_do(subject, cache),
        "b": subject.cut(choice(target=Target("macs", MACS))),
        "c": subject.cut(choice(target=LatencyTarget(LATENCY), device=device)),
    }
    cuts["a_at_latency"], _ = subject.at_latency(LATENCY)
    feeds = workloads(subject.analysis.model, [subject.shapes])[0].feeds[0]
    models = {"original": subject.analysis.model} | {n: cut.model for n, cut in cuts.items()}
    calls = {n: session_call(model, feeds, threads=1) for n, model in models.items()}
    timings = compare(calls, rounds=100, seconds=seconds)
    whole = cost(subject.analysis.model).macs
    row: dict[str, Any] = {
        "model": subject.name,
        "original": dataclasses.asdict(timings["original"].latency),
    }
    for name, cut in cuts.items():
        row[name] = {
            "by": cut.by,
            "macs": cost(cut.model).macs / whole,
            "latency": dataclasses.asdict(timings[name].ratio_to(timings["original"])),
            "kept": cut.kept,
            "seconds": cut.seconds,
            "widths": [(g.units, g.units - g.removed) for g in cut.plan.groups],
            "notes": list(cut.plan.notes),
        }
    row["a_over_b"] = dataclasses.asdict(timings["a"].ratio_to(timings["b"]))
    show(row)
    return row


def show(row: dict[str, Any]) -> None:
    print(row["model"])
    for name in ("a", "b", "c", "a_at_latency"):
        r, measured = row[name], Ratio(**row[name]["latency"])
        print(
            f"  {name:12} macs {r['macs']:.3f} latency {measured} kept {r['kept']:.3f}"
            f" in {r['seconds']:.1f} s ({r['by']})",
            flush=True,
        )


# ---------------------------------------------------------------------------- claims


def claims(rows: Sequence[dict[str, Any]]) -> list[Claim]:
    total = len(rows)
    off = {row["model"]: abs(row["c"]["latency"]["median"] / LATENCY - 1) for row in rows}
    near = sum(o <= TOLERANCE for o in off.values())
    worst = max(off, key=off.__getitem__)
    more = {row["model"]: row["c"]["kept"] / row["a_at_latency"]["kept"] for row in rows}
    richer = sum(m >= MORE for m in more.values())
    least = min(more, key=more.__getitem__)
    faster = {row["model"]: per_mac(row) for row in rows if off_edges(row)}
    quick = sum(f >= FASTER for f in faster.values())
    return [
        Claim(
            f"--target-latency {LATENCY} measures what was asked, within {TOLERANCE:.0%}",
            f"{total} of {total} models",
            f"{near} of {total}; worst {worst}, {off[worst]:.1%} off",
            met=near == total,
        ),
        Claim(
            "importance kept at that latency, against one ratio for every layer",
            f">= {MORE:.2f}x on every model",
            f"{richer} of {total}; mean {mean(more):.2f}x, least {more[least]:.2f}x ({least})",
            met=richer == total,
        ),
        Claim(
            "half of the MACs: speed per MAC with whole blocks, against one ratio with any width",
            f">= {FASTER:.2f}x on every model",
            f"{quick} of {len(faster)}; mean {mean(faster):.2f}x,"
            f" least {min(faster.values(), default=0.0):.2f}x",
            met=quick == len(faster),
        ),
    ]


def mean(ratios: Mapping[str, float]) -> float:
    return statistics.geometric_mean(ratios.values()) if ratios else 0.0


def per_mac(row: dict[str, Any]) -> float:
    """How much faster (b) is than (a), for equal MACs: coarse blocks may remove more."""
    return float(row["a_over_b"]["median"] * row["b"]["macs"] / row["a"]["macs"])


def shown(rows: Sequence[dict[str, Any]]) -> Table:
    """The latency that is left, and the MACs that are left."""
    lines = [[row["model"], *(latency_at_macs(row[name]) for name in "abc")] for row in rows]
    heads = "one ratio, any width", "one ratio, whole blocks", f"`--target-latency {LATENCY}`"
    title = "Latency left (at MACs left), original = 1, one thread, nothing trained"
    return Table(title, ("Network", *heads), lines)


def latency_at_macs(cut: dict[str, Any]) -> str:
    return f"{cut['latency']['median']:.2f} ({cut['macs']:.2f})"


def off_edges(row: dict[str, Any]) -> bool:
    """Whether the one ratio left widths that are no multiple of 4, outside of the fast kernels."""
    return any(after % 4 for before, after in row["a"]["widths"] if after != before)


def written(name: str, folder: Path) -> Path:
    path = folder / f"{name}.onnx"
    model_io.save(peer.original(name), path)
    return path


def shipped() -> Path:
    models = Path(str(files("rapidocr_onnxruntime").joinpath("models")))
    return models / "ch_PP-OCRv4_det_infer.onnx"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("more", nargs="*", type=Path, help="more models")
    parser.add_argument("--only", default="", help="only models whose name contains this")
    parser.add_argument("--seconds", type=float, default=20.0, help="of measuring one model")
    parser.add_argument("--resume", action="store_true", help="keep what a stopped run measured")
    arguments = parser.parse_args()
    if not arguments.resume:
        KEPT.unlink(missing_ok=True)
    lines = KEPT.read_text().splitlines() if KEPT.exists() else []
    rows = {row["model"]: row for row in map(json.loads, lines)}
    with tempfile.TemporaryDirectory() as folder:
        files = {path.stem: path for path in (shipped(), *arguments.more)}
        for name in dict.fromkeys((*peer.NAMES, *files)):
            if name in rows or arguments.only not in name:
                continue
            path = written(name, Path(folder)) if name in peer.NAMES else files[name]
            rows[name] = one(path, Path(folder), arguments.seconds)
            with KEPT.open("a") as kept:
                kept.write(json.dumps(rows[name]) + "\n")
    packages = ("rapidocr-onnxruntime", "torch-pruning")
    found = list(rows.values())
    write(
        "latency_pruning",
        claims=claims(found),
        rows=found,
        tables=[shown(found)],
        arguments=[path.name for path in arguments.more],
        packages=packages,
    )
    KEPT.unlink(missing_ok=True)


if __name__ == "__main__":
    main()
