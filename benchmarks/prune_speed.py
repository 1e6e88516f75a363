"""Speed of pruning, without the proof: against a copy of the file, Torch-Pruning, memory, size.

    python benchmarks/prune_speed.py [--quick] [--models FOLDER]

(a) `api.prune` from file to file, which is what the command runs, but for the proof, against
    onnx.load + onnx.save of the same file; --models adds the files of a folder,
(b) analyse + plan + cut against Torch-Pruning's pruner construction + step on the same network,
(c) peak memory of the command that cuts two layers of a 2.8 GB model, against the model's bytes,
(d) time against the number of nodes, 1k to 50k.

A round runs both sides once; ratios are medians over rounds, with the smallest and the largest.
"""

import argparse
import copy
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import onnx
import torch
from common import Claim, write
from densenet import densenet121
from prune_size import CHOICE, decide_and_cut, memory, nodes, seconds
from torch import Tensor, nn
from yolo import Yolov8n

from onnxslim_kd import api, proof
from onnxslim_kd import model as model_io
from onnxslim_kd.passes import groups, prune
from onnxslim_kd.silencing import silence
from onnxslim_kd.zoo.export import build

ROUNDS = 5
Timed = Callable[[], float]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="two networks, one round")
    parser.add_argument("--models", type=Path, metavar="FOLDER", help="more .onnx files for (a)")
    options = parser.parse_args()
    claims: list[Claim] = []
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        networks(Path(folder), claims, rows, options)
        memory(Path(folder), claims, rows)
        nodes(claims, rows)
    if not options.quick:
        write("prune_speed", claims=claims, rows=rows, packages=("onnx", "torch-pruning"))
    for claim in claims if options.quick else ():
        print(claim)


def paired(calls: Mapping[str, Timed], rounds: int) -> dict[str, Any]:
    """Time two calls in turns; return medians and the ratio of the first to the second."""
    found: dict[str, list[float]] = {name: [] for name in calls}
    for index in range(rounds + 1):
        for name, call in list(calls.items())[:: 1 if index % 2 else -1]:
            took = call()
            if index:  # the first round warms up
                found[name].append(took)
    ours, theirs = found.values()
    ratios = [a / b for a, b in zip(ours, theirs, strict=True)]
    return {f"{name}_s": statistics.median(times) for name, times in found.items()} | {
        "ratio": statistics.median(ratios),
        "ratio_range": [min(ratios), max(ratios)],
    }


# --------------------------------------------------------------------- (a), (b): networks


def modules(*, quick: bool) -> dict[str, nn.Module]:
    found = {name: build(name, {}) for name in ("resnet18", "mobilenet_v2")}
    if not quick:
        found |= {name: build(name, {}) for name in ("resnet34", "resnet50", "resnet152")}
        found |= {"densenet121": densenet121(), "vit_b_16": vit_b(), "yolov8n": Yolov8n()}
    return {name: module.eval() for name, module in found.items()}


def vit_b() -> nn.Module:
    import transformers

    options: dict[str, Any] = {"num_labels": 1000, "attn_implementation": "eager"}
    config = transformers.ViTConfig(**options)

    class Logits(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.vit = transformers.ViTForImageClassification(config)

        def forward(self, x: Tensor) -> Tensor:
            logits: Tensor = self.vit(x).logits
            return logits

    return Logits()


def networks(
    folder: Path, claims: list[Claim], rows: list[dict[str, Any]], options: argparse.Namespace
) -> None:
    rounds = 1 if options.quick else ROUNDS
    files, peers = [], []
    for name, module in modules(quick=options.quick).items():
        path = folder / f"{name}.onnx"
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.onnx.export(module, (torch.zeros(1, 3, 224, 224),), path, dynamo=False)
        files.append(against_copy(path, folder, rounds))
        peers.append({"part": "b", "model": name} | against_peer(path, module, rounds))
        print(files[-1], peers[-1], sep="\n", flush=True)
        path.unlink()
    for path in sorted(options.models.glob("*.onnx")) if options.models else ():
        files.append(against_copy(path, folder, rounds))
        print(files[-1], flush=True)
    rows += files + peers
    claims += [_file_claim(files), _peer_claim([row for row in peers if "ratio" in row])]


def _file_claim(files: list[dict[str, Any]]) -> Claim:
    worst = max(files, key=lambda row: row["ratio"])
    return Claim(
        "prune a file (load, analyse, plan, cut, save) against onnx.load + onnx.save",
        "<= 1.50 on each network",
        f"{_spread(files)}, most on {worst['model']}",
        met=worst["ratio"] <= 1.5,
    )


def _peer_claim(peers: list[dict[str, Any]]) -> Claim:
    slowest = max(peers, key=lambda row: row["ratio"])
    return Claim(
        "analyse, plan and cut against Torch-Pruning's pruner and step",
        "<= 0.10 on each network",
        f"{_spread(peers)}, most on {slowest['model']}",
        met=slowest["ratio"] <= 0.1,
    )


def against_copy(path: Path, folder: Path, rounds: int) -> dict[str, Any]:
    size = path.stat().st_size
    calls = {"ours": lambda: whole(path, folder), "copy": lambda: copied(path, folder)}
    row = {"part": "a", "model": path.stem, "bytes": size} | paired(calls, rounds)
    return row | {"proof_s": proof_time(path)}


def against_peer(path: Path, module: nn.Module, rounds: int) -> dict[str, Any]:
    try:
        torch_pruning(module)
    except (IndexError, RuntimeError, ZeroDivisionError) as error:  # what it raises on a graph
        ours = statistics.median(in_memory(path) for _ in range(rounds))  # that it misreads
        return {"ours_s": ours, "torch_pruning": f"{type(error).__name__}: {error}"}
    calls = {"ours": lambda: in_memory(path), "torch_pruning": lambda: torch_pruning(module)}
    return paired(calls, rounds)


def _spread(rows: list[dict[str, Any]]) -> str:
    ratios = sorted(row["ratio"] for row in rows)
    return f"{statistics.median(ratios):.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f})"


def whole(path: Path, folder: Path) -> float:
    target = folder / "pruned.onnx"
    target.unlink(missing_ok=True)
    return seconds(lambda: api.prune(path, CHOICE, target, verify=False))


def copied(path: Path, folder: Path) -> float:
    target = folder / "copy.onnx"
    target.unlink(missing_ok=True)
    return seconds(lambda: onnx.save(onnx.load(path), target))


def in_memory(path: Path) -> float:
    model = model_io.load(path)
    return seconds(lambda: decide_and_cut(model))


def torch_pruning(module: nn.Module) -> float:
    import torch_pruning as tp

    module = copy.deepcopy(module)
    linear = [m for m in module.modules() if isinstance(m, nn.Linear)]
    heads = {
        m: 12 for name, m in module.named_modules() if name.endswith(("query", "key", "value"))
    }
    heads |= {
        m: 12 for n, m in module.named_modules() if n.endswith(("q_proj", "k_proj", "v_proj"))
    }

    def run() -> None:
        pruner = tp.pruner.MagnitudePruner(
            module,
            torch.zeros(1, 3, 224, 224),
            importance=tp.importance.MagnitudeImportance(p=1),
            pruning_ratio=0.5,
            ignored_layers=linear[-1:],
            num_heads=heads,
            prune_num_heads=True,
            head_pruning_ratio=0.5,
        )
        pruner.step()

    return seconds(run)


def proof_time(path: Path) -> float:
    """Seconds to silence the original, run both and compare."""
    analysis = groups.analyse(model_io.load(path))
    removed = prune.removed_by(analysis, prune.plan(analysis, CHOICE))
    start = time.perf_counter()
    silenced = silence(analysis, removed)
    silencing = time.perf_counter() - start
    prune.apply(analysis, removed)
    return silencing + seconds(lambda: proof.prove(silenced, analysis.model))


if __name__ == "__main__":
    main()
