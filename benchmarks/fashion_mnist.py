"""Prune by 50 % and 75 % of the MACs, and get the accuracy back: Fashion-MNIST.

    benchmarks/get_data.sh
    python benchmarks/fashion_mnist.py --run FOLDER [--scale full] [--nets resnet20] [--seeds 0 1]

Every stage leaves a JSON file in FOLDER and is skipped when it is there; a stage that was broken
off goes on from its last epoch. Accuracy is that of the last epoch on the test images, never the
best one. ``--scale smoke`` shows in minutes that everything runs; its numbers mean nothing and are
never written as results. Every net has a file of results.
"""

import argparse
import json
from collections.abc import Iterator
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import THREADS, compare, session_call, write
from fashion_table import SHIPPED, TIMED, claims, shown, stage_of, table
from fashion_ways import (
    BATCH,
    CUTS,
    NETS,
    PREPROCESS,
    SCALES,
    SHAPE,
    WAYS,
    Place,
    cut,
    folded,
    original,
)

from onnxslim_kd import model as model_io
from onnxslim_kd.passes.strip import infer_prune
from onnxslim_kd.training.evaluate import Predictor, Reading, evaluate

SHARES = (0.5, 0.75)

# ------------------------------------------------------------------------- what ships


def deploy(place: Place, name: str) -> dict[str, Any]:
    """Strip a net to what ships, and measure that in ONNX Runtime."""
    place.save(infer_prune(place.file(name)).model, f"{name}-deployed")
    shipped = place.file(f"{name}-deployed")
    reading = Reading(place.data("test"), PREPROCESS, BATCH)
    found = evaluate(Predictor(model_io.load(shipped), threads=THREADS), reading)
    return {**found.metrics, "bytes": shipped.stat().st_size}


def latency(place: Place, shares: list[float]) -> dict[str, Any]:
    """Time what ships of each cut, batch 1, against the original; its weights do not matter."""
    names = [stage_of(way, share) for share in shares for way in TIMED]
    feeds = {"image": np.zeros(SHAPE, np.float32)}
    calls = {
        name: session_call(place.file(f"{name}-deployed"), feeds, threads=1)
        for name in ("original", *names)
    }
    timings = compare(calls)
    return {name: asdict(timings[name].ratio_to(timings["original"])) for name in names}


# ------------------------------------------------------------------------------ the run


def run(place: Place, shares: list[float]) -> Iterator[dict[str, Any]]:
    """Do all stages of one net and seed, the short way to a whole row first."""
    place.folder.mkdir(parents=True, exist_ok=True)
    start = place.stage("original", lambda: original(place))
    start |= place.stage("original-deployed", lambda: deploy(place, "original"))
    place.stage("folded", lambda: folded(place))
    for share in shares:
        cuts = {
            kind: place.stage(f"{kind}-{share:g}", partial(cut, place, kind, share))
            for kind in CUTS
        }
        for way, (work, kind) in WAYS.items():
            name = stage_of(way, share)
            record = place.stage(name, partial(work, place, share, name))
            record |= place.stage(f"{name}-deployed", partial(deploy, place, name))
            yield {
                "net": place.net,
                "share": share,
                "way": way,
                "macs_removed": record.get("macs", cuts[kind]["macs"]),
                "original": {key: start[key] for key in SHIPPED},
                **{key: record[key] for key in SHIPPED},
                "epochs": [start["epochs"], record["epochs"]],
                "seed": place.seed,
            }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--run", type=Path, required=True, help="folder of the stages")
    parser.add_argument("--scale", choices=SCALES, default="full")
    parser.add_argument("--nets", nargs="+", choices=NETS, default=list(NETS))
    parser.add_argument("--shares", nargs="+", type=float, choices=SHARES, default=list(SHARES))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1])
    given = parser.parse_args()
    scale = SCALES[given.scale]
    torch.set_num_threads(THREADS)
    for net in given.nets:
        places = [Place(given.run / given.scale / net / str(s), net, s, scale) for s in given.seeds]
        rows = table([row for place in places for row in run(place, given.shares)])
        print(json.dumps(rows, indent=1))
        if given.scale != "smoke":
            write(
                f"fashion_mnist-{net}",
                claims=claims(rows),
                rows=[asdict(scale), *rows],
                tables=[shown(rows, timed(places[0], given.shares))],
                arguments=_arguments(net, given),
            )


def timed(place: Place, shares: list[float]) -> dict[str, Any]:
    stage = "-".join(["latency", *map(str, shares)])
    return place.stage(stage, lambda: latency(place, shares))


def _arguments(net: str, given: argparse.Namespace) -> list[str]:
    seeds = " ".join(map(str, given.seeds))
    return ["--run FOLDER", f"--scale {given.scale}", f"--nets {net}", f"--seeds {seeds}"]


if __name__ == "__main__":
    main()
